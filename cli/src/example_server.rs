//! `pilotlight example-server`.

use std::{net::IpAddr, time::Duration};

use anyhow::Context as _;
use pilotlight_example_server::Options;
use tokio_util::sync::CancellationToken;

/// Which server.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Classifies iris flowers, by KServe's V1 and V2 protocols.
    Iris(IrisArgs),
}

/// Settings of the iris server.
#[derive(Debug, clap::Args)]
pub struct IrisArgs {
    /// Port to listen on.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    port: u16,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Name of the model.
    #[arg(long, default_value = "iris")]
    model_name: String,
    /// Time that loading takes at least.
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    load_time: Duration,
    /// Time that each answer takes at least.
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    request_time: Duration,
    /// Value of the header x-served-by of each answer, to tell versions apart.
    #[arg(long, value_name = "NAME")]
    served_by: Option<String>,
}

/// Runs a server.
pub async fn run(command: Command, stopping: CancellationToken) -> anyhow::Result<()> {
    let Command::Iris(args) = command;
    let options = Options {
        host: args.host,
        port: args.port,
        model_name: args.model_name,
        load_time: args.load_time,
        request_time: args.request_time,
        served_by: args.served_by.map(|name| name.parse()).transpose().context("served-by")?,
    };
    Ok(pilotlight_example_server::run(options, stopping.cancelled_owned()).await?)
}
