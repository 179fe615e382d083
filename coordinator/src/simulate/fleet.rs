//! The machines of a simulation.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pilotlight_proto::fleet::v1 as fleet;
use serde::{Deserialize, Serialize};

use crate::{
    fleet::SessionHandle,
    model::NodeRecord,
    reconcile::world::{NodeState, World},
    spec::quantity,
};

/// A machine, or several that are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VirtualNode {
    /// Node name; where `count` is more than one, `-1`, `-2`, … are added.
    pub name: String,
    /// How many there are of it.
    #[serde(default = "one")]
    pub count: u32,
    /// GPUs of each.
    pub gpus: u32,
    /// What the GPUs are called.
    #[serde(default = "product")]
    pub product: String,
    /// Memory of each GPU, as a Kubernetes quantity.
    #[serde(default = "memory")]
    pub gpu_memory: String,
    /// For nodeSelector and nodeAffinity.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

fn product() -> String {
    "NVIDIA H100 80GB HBM3".to_owned()
}

fn memory() -> String {
    "80Gi".to_owned()
}

impl Default for VirtualNode {
    /// Sixteen machines with eight GPUs each.
    fn default() -> Self {
        Self {
            name: "node".into(),
            count: 16,
            gpus: 8,
            product: product(),
            gpu_memory: memory(),
            labels: BTreeMap::new(),
        }
    }
}

/// Why a list of machines cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// It is no list of machines.
    #[error(transparent)]
    Yaml(#[from] serde_norway::Error),
    /// The memory cannot be read.
    #[error("{node}: gpuMemory: {value:?}: expected a quantity such as 80Gi")]
    Memory {
        /// Which node.
        node: String,
        /// As given.
        value: String,
    },
    /// There are none.
    #[error("a fleet needs at least one node")]
    Empty,
    /// Two have one name.
    #[error("two nodes are called {0}")]
    Twice(String),
}

/// Reads machines from YAML: a list of [`VirtualNode`]s.
///
/// # Errors
/// What is wrong, and where.
pub fn nodes(text: &str) -> Result<Vec<VirtualNode>, FleetError> {
    let nodes: Vec<VirtualNode> = serde_norway::from_str(text)?;
    let mut names = std::collections::BTreeSet::new();
    for node in &nodes {
        if quantity::units(&node.gpu_memory).is_err() {
            return Err(FleetError::Memory { node: node.name.clone(), value: node.gpu_memory.clone() });
        }
        if !names.insert(&node.name) {
            return Err(FleetError::Twice(node.name.clone()));
        }
    }
    if nodes.iter().all(|node| node.count == 0) { Err(FleetError::Empty) } else { Ok(nodes) }
}

/// Puts the machines into the world, connected and heard from.
pub(super) fn join(world: &mut World, nodes: &[VirtualNode], now: Timestamp) {
    for node in nodes {
        for number in 1..=node.count {
            let name = if node.count == 1 { node.name.clone() } else { format!("{}-{number}", node.name) };
            let record = NodeRecord::new(&name, now);
            let mut state = NodeState::unheard(record, now);
            state.session = Some(SessionHandle::to_nobody(&name));
            state.inventory = Some(inventory(node, &name));
            state.heard = true;
            world.nodes.insert(name, state);
        }
    }
}

fn inventory(node: &VirtualNode, name: &str) -> fleet::Inventory {
    // Checked when it was read; a node without memory would only take whole GPUs.
    let memory_bytes = quantity::units(&node.gpu_memory).unwrap_or(0);
    let gpus = (0..node.gpus).map(|index| fleet::Gpu {
        index,
        uuid: format!("GPU-{name}-{index}"),
        product: node.product.clone(),
        memory_bytes,
        nvlink_group: 1,
        ..Default::default()
    });
    fleet::Inventory {
        gpus: gpus.collect(),
        labels: node.labels.clone().into_iter().collect(),
        simulated: true,
        ..Default::default()
    }
}
