//! `pilotlight gpu`.

use anyhow::anyhow;
use bytesize::ByteSize;
use pilotlight_proto::control::v1::{GpuHealth, ListNodesRequest, Node, NodeGpu, UnquarantineGpuRequest};

use crate::{connect::ConnectionArgs, failure::Failure, output, table::Table};

/// What to do with GPUs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List GPUs with their health, and why they are quarantined.
    #[command(visible_alias = "list")]
    Ls {
        /// Node name [default: all nodes].
        node: Option<String>,
    },
    /// Place replicas on a GPU again that is quarantined because of an error.
    ///
    /// Errors that were reported until now do not quarantine it again; new ones do.
    Unquarantine {
        /// Node name.
        node: String,
        /// Index on the node, or UUID.
        gpu: String,
    },
}

/// Carries out a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let mut client = connection.client()?;
    match command {
        Command::Ls { node } => {
            let mut nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
            if let Some(name) = node {
                nodes.retain(|node| node.name == name);
                if nodes.is_empty() {
                    return Err(anyhow!("node {name} not found: no node of this name has joined").into());
                }
            }
            output::print(&table(&nodes))
        }
        Command::Unquarantine { node, gpu } => {
            client.unquarantine_gpu(UnquarantineGpuRequest { node: node.clone(), gpu: gpu.clone() }).await?;
            output::print(&format!("gpu {gpu} of node/{node} unquarantined\n"))
        }
    }
}

/// The GPUs of these nodes, one a row; also part of `describe node`.
pub fn table(nodes: &[Node]) -> String {
    let columns = ["NODE", "GPU", "PRODUCT", "STATE", "TEMP", "UTIL", "MEMORY", "FOREIGN", "REPLICAS", "MESSAGE"];
    let mut table = Table::new(&columns);
    for (node, gpu) in nodes.iter().flat_map(|node| node.gpus.iter().map(move |gpu| (node, gpu))) {
        table.row(cells(node, gpu));
    }
    table.text()
}

fn cells(node: &Node, gpu: &NodeGpu) -> [String; 10] {
    let health = gpu.health.clone().unwrap_or_default();
    let known = gpu.health.is_some();
    let state = match (&gpu.quarantine, known) {
        (Some(_), _) => "Quarantined",
        (None, true) => "Healthy",
        (None, false) => "Unknown",
    };
    let total = ByteSize(gpu.memory_bytes);
    let memory = if known { format!("{}/{total}", ByteSize(health.memory_used_bytes)) } else { total.to_string() };
    [
        node.name.clone(),
        gpu.index.to_string(),
        gpu.product.clone(),
        state.to_owned(),
        health.temperature_celsius.map(|celsius| format!("{celsius}C")).unwrap_or_default(),
        health.utilization_percent.map(|percent| format!("{percent}%")).unwrap_or_default(),
        memory,
        if known { ByteSize(health.foreign_memory_bytes).to_string() } else { String::new() },
        gpu.replicas.join(","),
        messages(gpu).join("; "),
    ]
}

/// What is to be said of a GPU: its quarantine first, then what is not as it should be.
fn messages(gpu: &NodeGpu) -> Vec<String> {
    let quarantine = gpu.quarantine.iter().map(|quarantine| format!("{}: {}", quarantine.reason, quarantine.message));
    quarantine.chain(gpu.health.iter().flat_map(irregularities)).collect()
}

fn irregularities(health: &GpuHealth) -> Vec<String> {
    let mut found = Vec::new();
    if health.nvlinks_active < health.nvlinks_expected {
        found.push(format!("{} of {} NVLinks active", health.nvlinks_active, health.nvlinks_expected));
    }
    if !health.throttle_reasons.is_empty() {
        found.push(format!("throttled: {}", health.throttle_reasons.join(", ")));
    }
    if !health.xids.is_empty() {
        let xids: Vec<_> = health.xids.iter().map(|event| format!("{} ({}x)", event.xid, event.count)).collect();
        found.push(format!("XIDs since the agent's start: {}", xids.join(", ")));
    }
    if !health.foreign_processes.is_empty() {
        let processes = health.foreign_processes.iter();
        let named: Vec<_> = processes.map(|process| format!("{} ({})", process.pid, process.name)).collect();
        found.push(format!("used by other processes: {}", named.join(", ")));
    }
    if !health.unreadable.is_empty() {
        found.push(format!("cannot be read: {}", health.unreadable.join(", ")));
    }
    found
}

/// What is wrong with a node's GPUs, for the list of nodes: those that are quarantined, and why; and a driver that does not
/// answer.
pub fn problems(node: &Node) -> Vec<String> {
    let quarantined = node.gpus.iter().filter_map(|gpu| {
        let quarantine = gpu.quarantine.as_ref()?;
        Some(format!("GPU {} quarantined: {}", gpu.index, quarantine.message))
    });
    let error = (!node.gpu_error.is_empty()).then(|| node.gpu_error.clone());
    quarantined.chain(error).collect()
}

#[cfg(test)]
mod tests {
    use pilotlight_proto::control::v1::{GpuProcess, GpuQuarantine, XidEvent};

    use super::*;

    #[test]
    fn a_gpu_says_what_is_wrong_with_it() {
        let quarantine = GpuQuarantine { since: None, reason: "XidError".into(), message: "XID 79: gone".into() };
        let health = GpuHealth {
            temperature_celsius: Some(64),
            memory_used_bytes: 1 << 30,
            foreign_memory_bytes: 1 << 30,
            nvlinks_active: 17,
            nvlinks_expected: 18,
            xids: vec![XidEvent { xid: 79, count: 2, last_at: None }],
            foreign_processes: vec![GpuProcess { pid: 7, name: "python".into(), memory_bytes: 1 << 30 }],
            ..Default::default()
        };
        let gpu = NodeGpu {
            index: 3,
            memory_bytes: 80 << 30,
            quarantine: Some(quarantine),
            health: Some(health),
            ..Default::default()
        };
        let idle = NodeGpu { index: 4, health: Some(GpuHealth::default()), ..Default::default() };
        let simulated = NodeGpu { index: 5, ..Default::default() };
        let node = Node { name: "a".into(), gpus: vec![gpu, idle, simulated], ..Default::default() };
        assert_eq!(problems(&node), ["GPU 3 quarantined: XID 79: gone"]);
        let shown = table(std::slice::from_ref(&node));
        let row = shown.lines().nth(1).unwrap();
        assert!(row.contains("Quarantined") && row.contains("64C") && row.contains("1.0 GiB/80.0 GiB"), "{shown}");
        assert!(
            row.ends_with(
                "XidError: XID 79: gone; 17 of 18 NVLinks active; XIDs since the agent's start: 79 (2x); used by other \
                 processes: 7 (python)"
            ),
            "{shown}"
        );
        assert!(shown.contains("Healthy") && shown.contains("Unknown"), "{shown}");
        let unread = Node { gpu_error: "no driver".into(), ..Default::default() };
        assert_eq!(problems(&unread), ["no driver"]);
    }
}
