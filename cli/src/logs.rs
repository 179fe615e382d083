//! `pilotlight logs`.

use std::io::Write as _;

use pilotlight_proto::control::v1::{GetRequest, LogsRequest};

use crate::{connect::ConnectionArgs, failure::Failure, output};

/// Whose logs.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Service.
    name: String,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Go on with what is written from now on, by replicas that are started later, too.
    #[arg(short, long)]
    follow: bool,
    /// Lines from the end to begin with; 0 is all.
    #[arg(long, default_value_t = 0)]
    tail: u32,
    /// Only this replica's.
    #[arg(long, default_value = "", hide_default_value = true)]
    replica: String,
    /// Output of previous runs: of replicas that have ended, their last run; of others, the run before the last restart.
    #[arg(short, long, conflicts_with = "follow")]
    previous: bool,
}

/// Prints logs as they come; with several replicas, each piece is headed by its replica's name.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    // `kind/name`, as other commands print it, is the same.
    let name = args.name.rsplit_once('/').map_or(args.name.as_str(), |(_, name)| name).to_owned();
    let mut client = connection.client()?;
    if args.follow && args.replica.is_empty() {
        let of = GetRequest { namespace: args.namespace.clone(), name: name.clone() };
        let service = client.get(of).await?.into_inner().service.unwrap_or_default();
        if service.ready_replicas + service.starting_replicas == 0 {
            writeln!(std::io::stderr(), "{name} has no running replica; waiting for the next one")?;
        }
    }
    let request = LogsRequest {
        namespace: args.namespace,
        name,
        replica: args.replica,
        follow: args.follow,
        tail_lines: args.tail,
        previous: args.previous,
    };
    // Previous output is that of several replicas more often than not.
    let all_headed = request.previous && request.replica.is_empty();
    let mut pieces = client.logs(request).await?.into_inner();
    let (mut last, mut failed) = (String::new(), false);
    while let Some(piece) = pieces.message().await? {
        if !piece.error.is_empty() {
            // The other replicas' output is still worth reading.
            failed = true;
            writeln!(std::io::stderr(), "error: {}: {}", piece.replica, piece.error)?;
        }
        if piece.data.is_empty() {
            continue;
        }
        if last != piece.replica && (all_headed || !last.is_empty()) {
            output::print(&format!("==> {} <==\n", piece.replica))?;
        }
        last = piece.replica;
        output::print_bytes(&piece.data)?;
    }
    if failed { Err(Failure::Refused) } else { Ok(()) }
}
