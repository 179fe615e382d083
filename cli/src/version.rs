//! `pilotlight version`.

use pilotlight_proto::control::v1::GetVersionRequest;
use serde_json::json;

use crate::{
    connect::ConnectionArgs,
    failure::Failure,
    output::{self, Format},
};

/// How to print it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Format.
    #[arg(short, long, default_value = "table")]
    output: Format,
    /// Only this program's version; asks no coordinator.
    #[arg(long)]
    client: bool,
}

/// Prints the versions; a coordinator that is not there is no error.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let server = if args.client {
        None
    } else {
        connection.client()?.get_version(GetVersionRequest {}).await.ok().map(tonic::Response::into_inner)
    };
    if args.output.is_structured() {
        let server = server.map(|s| json!({"version": s.version, "cell": s.cell, "store": s.store}));
        return output::print_value(&json!({"client": {"version": own}, "server": server}), &args.output);
    }
    output::print(&format!("client: {own}\n"))?;
    match server {
        Some(s) => output::print(&format!("server: {} (cell {}, store {})\n", s.version, s.cell, s.store)),
        None if args.client => Ok(()),
        None => output::print("server: not reached\n"),
    }
}
