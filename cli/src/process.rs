//! What long-running commands and short ones have around them.

use std::{future::Future, io::stderr};

use clap::ValueEnum;
use pilotlight_telemetry::{LogFormat, Settings};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{failure::Failure, output};

/// Logs of processes that serve.
#[derive(Debug, clap::Args)]
pub struct LoggingArgs {
    /// What is logged: a level, or target=level, comma separated.
    #[arg(long, global = true, env = "PILOTLIGHT_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// How it looks.
    #[arg(long, global = true, env = "PILOTLIGHT_LOG_FORMAT", default_value = "text")]
    log_format: Logs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Logs {
    Text,
    Json,
}

/// Runs a process that serves until SIGINT or SIGTERM.
pub fn serve<F>(
    name: &'static str,
    logging: &LoggingArgs,
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let format = match logging.log_format {
        Logs::Text => LogFormat::Text,
        Logs::Json => LogFormat::Json,
    };
    runtime(true)?.block_on(async {
        let settings = Settings {
            service_name: name,
            version: env!("CARGO_PKG_VERSION"),
            format,
            filter: logging.log.clone(),
            colour: output::colours(&stderr()),
        };
        let telemetry = pilotlight_telemetry::init(settings).map_err(anyhow::Error::from)?;
        raise_file_limit();
        let stopping = CancellationToken::new();
        tokio::spawn(stop_on_signal(stopping.clone()));
        let outcome = work(stopping).await;
        // Sending what is left may block.
        let sent = tokio::task::spawn_blocking(|| telemetry.shutdown()).await;
        sent.map_err(anyhow::Error::from)?;
        outcome.map_err(Failure::from)
    })
}

/// Raises the soft limit of open files to the hard one; connections and replicas need many.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => info!(from = ?current, to = ?maximum, "limit of open files"),
        Err(error) => warn!(%error, limit = ?current, "cannot raise the limit of open files"),
    }
}

async fn stop_on_signal(stopping: CancellationToken) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    stopping.cancel();
}

/// Runs a command that asks the coordinator.
pub fn ask(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    runtime(false)?.block_on(work)
}

fn runtime(threads: bool) -> Result<tokio::runtime::Runtime, Failure> {
    let mut builder = if threads {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    Ok(builder.enable_all().build()?)
}
