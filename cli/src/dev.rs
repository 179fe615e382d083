//! `pilotlight dev`: coordinator and agent in one process, on loopback, in plaintext, for the user who started it.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use anyhow::Context as _;
use pilotlight_agent::{config::InventorySource, gateway::ClientSettings};
use pilotlight_coordinator::config::{Security, StoreConfig};
use tokio_util::sync::CancellationToken;

use crate::{agent::NodeArgs, coordinator::ServingArgs, dev_token, output};

/// Settings of `dev`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where clients connect.
    #[arg(long, env = "PILOTLIGHT_LISTEN_INGRESS", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    listen_ingress: SocketAddr,
    /// gRPC for operators.
    #[arg(long, env = "PILOTLIGHT_LISTEN", default_value = "127.0.0.1:7443", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// HTTP for /metrics, /healthz and /readyz.
    #[arg(long, env = "PILOTLIGHT_LISTEN_HTTP", default_value = "127.0.0.1:7480", value_name = "ADDRESS")]
    listen_http: SocketAddr,
    /// Directory for all state.
    #[arg(long, env = "PILOTLIGHT_DATA_DIR", default_value = ".pilotlight", value_name = "DIR")]
    data_dir: PathBuf,
    #[command(flatten)]
    serving: ServingArgs,
    #[command(flatten)]
    node: NodeArgs,
}

/// Runs both until stopped, or until one of them fails.
pub async fn run(args: Args, stopping: CancellationToken) -> anyhow::Result<()> {
    let data_dir = std::path::absolute(&args.data_dir).context("data-dir")?;
    if args.node.runs_as_another_user() {
        pilotlight_identity::passable_dir(&data_dir)?;
    } else {
        pilotlight_identity::private_dir(&data_dir)?;
    }
    // Before there is a new token: whoever uses this directory already must not lose the one that works.
    let _lock = pilotlight_identity::lock_dir(&data_dir)?;
    for address in [args.listen, args.listen_ingress, args.listen_http] {
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    }
    let (token, _record) = dev_token::create(&data_dir, args.listen)?;
    let ingress = args.listen_ingress;
    let coordinator = pilotlight_coordinator::config::Config {
        listen: args.listen,
        listen_http: args.listen_http,
        data_dir: data_dir.join("coordinator"),
        store: StoreConfig::Embedded,
        security: Security::Token(token.clone()),
        ..args.serving.config(ingress.port())
    };
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let agent = pilotlight_agent::config::Config {
        node_name: "dev".to_owned(),
        coordinators: vec![format!("http://{}", args.listen)],
        security: pilotlight_agent::config::Security::Token(token),
        data_dir: data_dir.join("agent"),
        listen_ingress: ingress,
        listen_peer: any_port,
        listen_http: any_port,
        stop_replicas_on_exit: true,
        clients: ClientSettings { list_known_hosts: true, ..ClientSettings::default() },
        ..Default::default()
    };
    let agent = args.node.fill(agent, InventorySource::NvmlOrSimulated);
    greet(args.listen, ingress, args.listen_http).map_err(|_| anyhow::anyhow!("standard output is closed"))?;

    // The agent goes first: its replicas stop while the coordinator can still see it.
    let (agent_stopping, coordinator_stopping) = (stopping.child_token(), CancellationToken::new());
    let mut coordinating = tokio::spawn(pilotlight_coordinator::run(coordinator, coordinator_stopping.clone()));
    let mut serving = tokio::spawn(pilotlight_agent::run(agent, agent_stopping.clone()));
    tokio::select! {
        ended = &mut serving => {
            coordinator_stopping.cancel();
            coordinating.await??;
            ended??;
        }
        ended = &mut coordinating => {
            agent_stopping.cancel();
            serving.await??;
            ended??;
        }
    }
    Ok(())
}

fn greet(grpc: SocketAddr, ingress: SocketAddr, http: SocketAddr) -> Result<(), crate::failure::Failure> {
    let server = if grpc.port() == 7443 { String::new() } else { format!(" --server http://{grpc}") };
    output::print(&format!(
        "pilotlight dev: plaintext, on this machine only; Ctrl-C stops it and its replicas. In another terminal:\n\
         \n  pilotlight{server} apply -f deploy/examples/iris.yaml\
         \n  pilotlight{server} get -w\
         \n  curl http://iris.default.localhost:{}/v1/models/iris:predict -d '{{\"instances\": [[6.8, 2.8, 4.8, 1.4]]}}'\n\
         \nMetrics: http://{http}/metrics\n\n",
        ingress.port()
    ))
}
