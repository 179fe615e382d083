//! `pilotlight init`: writes the configuration of a coordinator or of a node.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, bail};
use pilotlight_identity::{Coordinators, JoinToken, Trust, check_label};
use serde_json::{Value, json};

use crate::{failure::Failure, output};

/// User that replicas which are processes run as, made by the Debian package.
const REPLICA_USER: &str = "pilotlight-replica";

/// What to configure.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Write coordinator.yaml, and print how to start the coordinator and how a node joins.
    Coordinator(CoordinatorArgs),
    /// Write agent.yaml and agent.env, by which this machine joins a cell.
    Node(NodeArgs),
}

/// Settings of a coordinator.
#[derive(Debug, clap::Args)]
pub struct CoordinatorArgs {
    /// Names and addresses by which nodes and users reach this coordinator; the first one is advertised [default: this
    /// machine's host name].
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    names: Vec<String>,
    /// Port on all addresses, for nodes and users.
    #[arg(long, default_value_t = 7443)]
    port: u16,
    /// etcd's addresses, those of all members; without any, the state is kept in a file.
    #[arg(long, value_delimiter = ',', value_name = "URL")]
    etcd_endpoints: Vec<String>,
    /// Directory of the configuration.
    #[arg(long, default_value = "/etc/pilotlight", value_name = "DIR")]
    dir: PathBuf,
}

/// Settings of a node.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// Address of a coordinator; give all of them, separated by commas or with further flags.
    #[arg(long, required = true, value_delimiter = ',', value_name = "URL")]
    coordinator: Vec<String>,
    /// Join token, as `pilotlight token create` prints it.
    #[arg(long, env = "PILOTLIGHT_TOKEN", hide_env_values = true)]
    token: String,
    /// Name of this node, unique in the cell, a DNS label [default: the first part of this machine's host name].
    #[arg(long)]
    node_name: Option<String>,
    /// Directory of the configuration.
    #[arg(long, default_value = "/etc/pilotlight", value_name = "DIR")]
    dir: PathBuf,
}

/// Executes a command.
pub fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Coordinator(args) => coordinator(args),
        Command::Node(args) => node(args),
    }
}

fn coordinator(args: CoordinatorArgs) -> Result<(), Failure> {
    let mut names = args.names;
    if names.is_empty() {
        names.push(host_name());
    }
    if let Some(bad) = names.iter().find(|name| name.is_empty() || name.contains(['/', ' ', ':'])) {
        return Err(anyhow!("names: {bad:?}, expected host names and addresses without scheme and port").into());
    }
    let url = format!("https://{}:{}", names[0], args.port);
    // The CLI on this machine uses loopback.
    let all = names.iter().cloned().chain(["localhost".to_owned(), "127.0.0.1".to_owned()]);
    let mut settings = json!({ "listen": format!("0.0.0.0:{}", args.port), "names": all.collect::<Vec<_>>() });
    if !args.etcd_endpoints.is_empty() {
        settings["etcdEndpoints"] = args.etcd_endpoints.into();
    }
    let file = args.dir.join("coordinator.yaml");
    write_new(&file, &yaml("coordinator", settings)?, 0o644)?;
    output::print(&format!(
        "{} written. Start the coordinator:\n\n  \
         sudo systemctl enable --now pilotlight-coordinator\n\n\
         Make a join token for each node:\n\n  \
         sudo pilotlight token create --server {url} --credentials /var/lib/pilotlight/coordinator/operator\n\n\
         On the node, join by it:\n\n  \
         sudo pilotlight init node --coordinator {url} --token TOKEN && sudo systemctl enable --now pilotlight-agent\n",
        file.display()
    ))
}

fn node(args: NodeArgs) -> Result<(), Failure> {
    let name = match args.node_name {
        Some(name) => name,
        None => host_name().split('.').next().unwrap_or_default().to_ascii_lowercase(),
    };
    check_label(&name).map_err(|error| anyhow!("node-name: {error}"))?;
    let token: JoinToken = args.token.parse().map_err(|error| anyhow!("token: {error}"))?;
    Coordinators::new(&args.coordinator, Trust::Pinned(token.pin()))
        .map_err(|error| anyhow!("coordinator: {error}"))?;
    let mut settings = json!({ "nodeName": name, "coordinator": args.coordinator });
    if has_user(REPLICA_USER) {
        settings["runAs"] = REPLICA_USER.into();
    }
    let (file, variables) = (args.dir.join("agent.yaml"), args.dir.join("agent.env"));
    write_new(&file, &yaml("agent", settings)?, 0o644)?;
    // The agent needs it until it has a certificate; it works once.
    replace_private(&variables, &format!("PILOTLIGHT_TOKEN={token}\n"))?;
    output::print(&format!("{} and {} written for node {name}\n", file.display(), variables.display()))
}

fn yaml(section: &str, settings: Value) -> anyhow::Result<String> {
    Ok(serde_norway::to_string(&json!({ section: settings }))?)
}

/// Writes a file that must not be there yet.
fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    match file {
        Ok(file) => write(file, text).with_context(|| path.display().to_string()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("{} is there already; edit it, or remove it to start anew", path.display())
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Writes a file that its owner alone may read.
fn replace_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let replace = || -> anyhow::Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        write(OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?, text)
    };
    replace().with_context(|| path.display().to_string())
}

fn write(mut file: File, text: &str) -> anyhow::Result<()> {
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Returns `true` if this machine has a user of this name.
fn has_user(name: &str) -> bool {
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    users.lines().any(|line| line.split(':').next() == Some(name))
}
