//! `pilotlight logs`.

use std::io::Write as _;

use pilotlight_proto::control::v1::{GetRequest, LogsRequest, LogsResponse};
use tonic::Streaming;

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    follow::{self, Reached, follow},
    output,
};

/// Lines of each replica that are printed again after the connection broke: what came meanwhile is among them.
const REPEATED_LINES: u32 = 10;

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
    let mut printer = Printer { all_headed, last: String::new(), failed: false };
    if request.follow {
        // The lines before are printed once.
        let mut next = request.clone();
        let session = async |client: Client, reached: &mut Reached| {
            let request = std::mem::replace(&mut next, LogsRequest { tail_lines: REPEATED_LINES, ..request.clone() });
            follow_once(client, request, &mut printer, reached).await
        };
        follow(&connection, follow::PATIENCE, session).await?;
    } else {
        let mut client = connection.client()?;
        printer.print(client.logs(request).await?.into_inner()).await?;
    }
    if printer.failed { Err(Failure::Refused) } else { Ok(()) }
}

/// One session: until the service and its last replica are gone.
async fn follow_once(
    mut client: Client,
    request: LogsRequest,
    printer: &mut Printer,
    reached: &mut Reached,
) -> Result<(), Failure> {
    if request.replica.is_empty() {
        let (namespace, name) = (request.namespace.clone(), request.name.clone());
        let of = GetRequest { namespace, name: name.clone() };
        let service = client.get(of).await?.into_inner().service.unwrap_or_default();
        if service.ready_replicas + service.starting_replicas == 0 {
            writeln!(std::io::stderr(), "{name} has no running replica; waiting for the next one")?;
        }
    }
    let pieces = client.logs(request).await?.into_inner();
    reached.set();
    printer.print(pieces).await
}

/// Prints pieces of output.
struct Printer {
    /// Whether the first piece is headed, too.
    all_headed: bool,
    /// Whose piece was printed last.
    last: String,
    /// Whether the output of a replica could not be read.
    failed: bool,
}

impl Printer {
    async fn print(&mut self, mut pieces: Streaming<LogsResponse>) -> Result<(), Failure> {
        while let Some(piece) = pieces.message().await? {
            if !piece.error.is_empty() {
                // The other replicas' output is still worth reading.
                self.failed = true;
                writeln!(std::io::stderr(), "error: {}: {}", piece.replica, piece.error)?;
            }
            if piece.data.is_empty() {
                continue;
            }
            if self.last != piece.replica && (self.all_headed || !self.last.is_empty()) {
                output::print(&format!("==> {} <==\n", piece.replica))?;
            }
            self.last = piece.replica;
            output::print_bytes(&piece.data)?;
        }
        Ok(())
    }
}
