//! `pilotlight example-server`.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use pilotlight_example_server::{Around, AroundOptions, Options};
use tokio_util::sync::CancellationToken;

/// Which server.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Classifies iris flowers, by KServe's V1 and V2 protocols.
    Iris(IrisArgs),
    /// Stands before it: takes flowers by the names of their measures, answers with names of species.
    IrisTransformer(AroundArgs),
    /// Explains it: says which measures of a flower its class depends on.
    IrisExplainer(AroundArgs),
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
    /// File or folder, such as /mnt/models, all of which is read into memory before the model is ready, and
    /// kept there, also while it sleeps (POST /sleep?level=1, POST /wake_up, GET /is_sleeping).
    #[arg(long, value_name = "PATH")]
    load: Option<PathBuf>,
    /// Time that each answer takes at least.
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    request_time: Duration,
    /// Value of the header x-served-by of each answer, to tell versions apart.
    #[arg(long, value_name = "NAME")]
    served_by: Option<String>,
}

/// Settings of a transformer or explainer, spelled as KServe gives them to such containers.
#[derive(Debug, clap::Args)]
pub struct AroundArgs {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on.
    #[arg(long = "http_port", env = "PORT", default_value_t = 8080)]
    http_port: u16,
    /// Name of the model.
    #[arg(long = "model_name", default_value = "iris")]
    model_name: String,
    /// Where the predictor is, as host:port.
    #[arg(long = "predictor_host")]
    predictor_host: String,
    /// Requests that it answers at the same time; it takes as many as come.
    #[arg(long = "workers", hide = true)]
    _workers: Option<u32>,
}

/// Runs a server.
pub async fn run(command: Command, stopping: CancellationToken) -> anyhow::Result<()> {
    let stopped = stopping.cancelled_owned();
    match command {
        Command::Iris(args) => pilotlight_example_server::run(iris(args)?, stopped).await?,
        Command::IrisTransformer(args) => run_around(Around::Transformer, args, stopped).await?,
        Command::IrisExplainer(args) => run_around(Around::Explainer, args, stopped).await?,
    }
    Ok(())
}

fn iris(args: IrisArgs) -> anyhow::Result<Options> {
    Ok(Options {
        host: args.host,
        port: args.port,
        model_name: args.model_name,
        load_time: args.load_time,
        load: args.load,
        request_time: args.request_time,
        served_by: args.served_by.map(|name| name.parse()).transpose().context("served-by")?,
    })
}

async fn run_around(
    kind: Around,
    args: AroundArgs,
    stopped: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let AroundArgs { host, http_port: port, model_name, predictor_host, _workers } = args;
    let options = AroundOptions { kind, host, port, model_name, predictor_host };
    Ok(pilotlight_example_server::run_around(options, stopped).await?)
}
