//! Pilotlight's one binary: coordinator, agent, both at once (`dev`), and the operators' commands.

mod agent;
mod apply;
mod ca;
mod cache;
mod clients;
mod config;
mod connect;
mod coordinator;
mod delete;
mod describe;
mod dev;
mod dev_token;
mod diff;
mod dry_run;
mod events;
mod example_server;
mod failure;
mod follow;
mod get;
mod gpu;
mod init;
mod json;
mod jsonpath;
mod logs;
mod manifests;
mod node;
mod output;
mod process;
mod rollout;
mod scaling;
mod selector;
mod simulate;
mod snapshot;
mod table;
mod target;
mod token;
mod usage;
mod user;
mod version;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use connect::ConnectionArgs;
use failure::Failure;

/// Serverless inference for GPU hosts, without Kubernetes.
///
/// Settings come from flags, then from variables PILOTLIGHT_*, then from one YAML file. Exit status: 0 is
/// well, 1 is an error or a refusal, 2 is wrong usage.
#[derive(Debug, Parser)]
#[command(name = "pilotlight", version, max_term_width = 110)]
struct Cli {
    /// YAML file with settings [default: ~/.config/pilotlight/config.yaml if it is there].
    #[arg(long, global = true, env = "PILOTLIGHT_CONFIG", value_name = "FILE")]
    config: Option<std::path::PathBuf>,
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    logging: process::LoggingArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run coordinator and agent in one process, on this machine alone.
    Dev(dev::Args),
    /// Run a coordinator.
    Coordinator(coordinator::Args),
    /// Run an agent.
    Agent(agent::Args),
    /// Write the configuration of a coordinator or a node.
    #[command(subcommand)]
    Init(init::Command),
    /// Apply manifests.
    Apply(apply::Args),
    /// Show what an apply would change. Exit status: 0 is nothing, 1 is something, 2 is an error.
    Diff(diff::Args),
    /// List services and what belongs to them.
    Get(get::Args),
    /// Show all about one service or node.
    Describe(describe::Args),
    /// Delete services, runtimes, secrets, config maps, and nodes that are gone.
    Delete(delete::Args),
    /// Wait until services or nodes meet a condition or are gone.
    Wait(wait::Args),
    /// Print what has happened to services.
    Events(events::Args),
    /// Watch a roll-out, go back, go on, start again; list revisions.
    #[command(subcommand)]
    Rollout(rollout::Command),
    /// Simulate services over a trace of requests, or replay what an autoscaler was told.
    Simulate(Box<simulate::Args>),
    /// Print what a service's replicas write.
    Logs(logs::Args),
    /// Take nodes out of use and back.
    #[command(subcommand)]
    Node(node::Command),
    /// List GPUs with their health, and place replicas again on those that were quarantined.
    #[command(subcommand)]
    Gpu(gpu::Command),
    /// Look at the models on the nodes' disks; warm, pin and evict them.
    #[command(subcommand)]
    Cache(cache::Command),
    /// Make, list and revoke join tokens for nodes.
    #[command(subcommand)]
    Token(token::Command),
    /// Save, restore and verify copies of what is stored for a cell.
    #[command(subcommand)]
    Snapshot(Box<snapshot::Command>),
    /// Show what services used, and what it costs.
    Usage(usage::Args),
    /// Create, renew and revoke credentials of operators.
    #[command(subcommand)]
    User(user::Command),
    /// Show and rotate the cell's certificate authority.
    #[command(subcommand)]
    Ca(ca::Command),
    /// Run a model server for the examples.
    #[command(subcommand)]
    ExampleServer(example_server::Command),
    /// Print the versions of this program and of the coordinator.
    Version(version::Args),
    /// Print a script that completes this program's words in a shell.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = match read() {
        Ok(cli) => cli,
        Err(failure) => return failure.report(),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Flags, variables and file, in that order.
fn read() -> Result<Cli, Failure> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let command = config::with_file(Cli::command(), &arguments)?;
    let matches = command.try_get_matches_from(arguments)?;
    Ok(Cli::from_arg_matches(&matches)?)
}

fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { connection, logging, command, .. } = cli;
    match command {
        Command::Dev(args) => process::serve("pilotlight-dev", &logging, |stopping| dev::run(args, stopping)),
        Command::Coordinator(args) => {
            process::serve("pilotlight-coordinator", &logging, |stopping| coordinator::run(args, stopping))
        }
        Command::Agent(args) => process::serve("pilotlight-agent", &logging, |stopping| agent::run(args, stopping)),
        Command::ExampleServer(server) => {
            process::serve("pilotlight-example-server", &logging, |stopping| example_server::run(server, stopping))
        }
        Command::Apply(args) => process::ask(apply::run(connection, args)),
        Command::Diff(args) => process::ask(diff::run(connection, args)),
        Command::Get(args) => process::ask(get::run(connection, args)),
        Command::Describe(args) => process::ask(describe::run(connection, args)),
        Command::Delete(args) => process::ask(delete::run(connection, args)),
        Command::Wait(args) => process::ask(wait::run(connection, args)),
        Command::Events(args) => process::ask(events::run(connection, args)),
        Command::Rollout(command) => process::ask(rollout::run(connection, command)),
        Command::Simulate(args) => simulate::run(*args),
        Command::Logs(args) => process::ask(logs::run(connection, args)),
        Command::Node(command) => process::ask(node::run(connection, command)),
        Command::Gpu(command) => process::ask(gpu::run(connection, command)),
        Command::Cache(command) => process::ask(cache::run(connection, command)),
        Command::Token(command) => process::ask(token::run(connection, command)),
        Command::Snapshot(command) => process::ask(snapshot::run(connection, *command)),
        Command::Init(command) => process::ask(async { init::run(command) }),
        Command::Ca(command) => process::ask(ca::run(connection, command)),
        Command::Usage(args) => process::ask(usage::run(connection, args)),
        Command::User(command) => process::ask(user::run(connection, command)),
        Command::Version(args) => process::ask(version::run(connection, args)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pilotlight", &mut script);
            output::print(&String::from_utf8_lossy(&script))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
