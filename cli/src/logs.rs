//! `pilotlight logs`.

use pilotlight_proto::control::v1::LogsRequest;

use crate::{connect::ConnectionArgs, failure::Failure, output};

/// Whose logs.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Service.
    name: String,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Go on with what is written from now on.
    #[arg(short, long)]
    follow: bool,
    /// Lines from the end to begin with; 0 is all.
    #[arg(long, default_value_t = 0)]
    tail: u32,
    /// Only this replica's.
    #[arg(long, default_value = "", hide_default_value = true)]
    replica: String,
}

/// Prints logs as they come; with several replicas, each piece is headed by its replica's name.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let request = LogsRequest {
        namespace: args.namespace,
        name: args.name,
        replica: args.replica,
        follow: args.follow,
        tail_lines: args.tail,
        ..Default::default()
    };
    let mut pieces = connection.client()?.logs(request).await?.into_inner();
    let mut last = String::new();
    while let Some(piece) = pieces.message().await? {
        if !piece.error.is_empty() {
            return Err(anyhow::anyhow!("{}: {}", piece.replica, piece.error).into());
        }
        if piece.data.is_empty() {
            continue;
        }
        if !last.is_empty() && last != piece.replica {
            output::print(&format!("==> {} <==\n", piece.replica))?;
        }
        last = piece.replica;
        output::print_bytes(&piece.data)?;
    }
    Ok(())
}
