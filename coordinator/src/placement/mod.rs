//! Which node and which GPUs a replica gets.
//!
//! [`place`] is a pure function over a [`FleetView`]: each request is tried against every node by
//! [`filters`], the nodes that pass are ordered by [`score`], and the best one's GPUs are taken before
//! the next request is looked at. Later requests of one call so see what earlier ones took.

mod filters;
mod gpus;
mod score;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt};

use k8s_openapi::api::core::v1::NodeSelector;

pub use filters::Misfit;

use crate::spec::RevisionTemplate;

/// The nodes that replicas may be placed on.
#[derive(Debug, Clone, Default)]
pub struct FleetView {
    /// In any order; the result does not depend on it.
    pub nodes: Vec<Node>,
}

/// One node as placement sees it.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// Unique name.
    pub name: String,
    /// False where it is cordoned.
    pub schedulable: bool,
    /// For `nodeSelector` and `nodeAffinity`.
    pub labels: BTreeMap<String, String>,
    /// Its GPUs.
    pub gpus: Vec<Gpu>,
    /// CPU that replicas may request, thousandths of a core; `None` is no limit.
    pub cpu_millis: Option<u64>,
    /// Memory that replicas may request, bytes; `None` is no limit.
    pub memory_bytes: Option<u64>,
    /// What is there already.
    pub taken: Vec<Taken>,
}

/// One GPU.
#[derive(Debug, Clone, Default)]
pub struct Gpu {
    /// Index on its node.
    pub index: u32,
    /// Product name.
    pub product: String,
    /// Frame buffer, bytes.
    pub memory_bytes: u64,
    /// GPUs with the same non-zero number are joined by NVLink.
    pub nvlink_group: u32,
}

/// What a replica holds on its node.
#[derive(Debug, Clone, Default)]
pub struct Taken {
    /// Replica name.
    pub replica: String,
    /// Key of its revision.
    pub revision: String,
    /// The GPUs it holds.
    pub gpu_indices: Vec<u32>,
    /// Part of each GPU's memory that it holds, bytes; `None` is the whole GPU.
    pub gpu_memory_bytes: Option<u64>,
    /// Requested CPU, thousandths of a core.
    pub cpu_millis: u64,
    /// Requested memory, bytes.
    pub memory_bytes: u64,
}

/// What a replica asks for.
#[derive(Debug, Clone, Default)]
pub struct PlacementRequest {
    /// For messages.
    pub replica: String,
    /// Key of its revision.
    pub revision: String,
    /// Number of GPUs, all on one node.
    pub gpus: u32,
    /// Part of one GPU's memory, bytes, instead of whole GPUs.
    pub gpu_memory_bytes: Option<u64>,
    /// Requested CPU, thousandths of a core.
    pub cpu_millis: u64,
    /// Requested memory, bytes.
    pub memory_bytes: u64,
    /// All of these labels must be there.
    pub node_selector: BTreeMap<String, String>,
    /// `requiredDuringSchedulingIgnoredDuringExecution`.
    pub required_affinity: Option<NodeSelector>,
}

impl PlacementRequest {
    /// What the `index`-th new replica of a revision asks for.
    pub fn of(template: &RevisionTemplate, revision: &str, index: u32) -> Self {
        let resources = &template.resources;
        Self {
            replica: format!("{revision}#{index}"),
            revision: revision.to_owned(),
            gpus: resources.gpus,
            gpu_memory_bytes: resources.gpu_memory_bytes,
            cpu_millis: resources.cpu_millis,
            memory_bytes: resources.memory_bytes,
            node_selector: template.node_selector.clone(),
            required_affinity: template.node_affinity.clone(),
        }
    }
}

impl Taken {
    /// What a placed replica of a revision holds.
    pub fn of(template: &RevisionTemplate, replica: &str, revision: &str, gpu_indices: Vec<u32>) -> Self {
        let resources = &template.resources;
        Self {
            replica: replica.to_owned(),
            revision: revision.to_owned(),
            gpu_indices,
            gpu_memory_bytes: resources.gpu_memory_bytes,
            cpu_millis: resources.cpu_millis,
            memory_bytes: resources.memory_bytes,
        }
    }
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The request's replica.
    pub replica: String,
    /// Where it goes, or why nowhere.
    pub outcome: Outcome,
}

/// Where a replica goes, or why nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It has a place.
    Placed {
        /// Node name.
        node: String,
        /// The GPUs it gets there, ascending.
        gpu_indices: Vec<u32>,
    },
    /// No node fits.
    Unplaced(Unplaced),
}

/// How many nodes failed which test.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unplaced {
    /// Nodes looked at.
    pub nodes: usize,
    /// For each reason, how many nodes failed by it; a node counts for the first test it failed.
    pub misfits: BTreeMap<Misfit, usize>,
}

impl fmt::Display for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no node is connected");
        }
        write!(f, "0/{} nodes fit", self.nodes)?;
        for (index, (misfit, count)) in self.misfits.iter().enumerate() {
            write!(f, "{} {count} {misfit}", if index == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

/// Places the requests one after the other. Deterministic; the order of nodes does not matter.
pub fn place(fleet: &FleetView, requests: &[PlacementRequest]) -> Vec<Placement> {
    let mut nodes: Vec<gpus::Ledger<'_>> = fleet.nodes.iter().map(gpus::Ledger::of).collect();
    nodes.sort_by(|a, b| a.node.name.cmp(&b.node.name));
    requests.iter().map(|request| place_one(&mut nodes, request)).collect()
}

fn place_one(nodes: &mut [gpus::Ledger<'_>], request: &PlacementRequest) -> Placement {
    let mut best: Option<(score::Score, usize, Vec<u32>)> = None;
    let mut unplaced = Unplaced { nodes: nodes.len(), ..Default::default() };
    for (index, ledger) in nodes.iter().enumerate() {
        match filters::fit(ledger, request) {
            Ok(gpu_indices) => {
                let score = score::Score::of(ledger, request, &gpu_indices, index);
                if best.as_ref().is_none_or(|(best, ..)| score < *best) {
                    best = Some((score, index, gpu_indices));
                }
            }
            Err(misfit) => *unplaced.misfits.entry(misfit).or_default() += 1,
        }
    }
    let outcome = match best {
        Some((_, index, gpu_indices)) => {
            nodes[index].take(request, &gpu_indices);
            Outcome::Placed { node: nodes[index].node.name.clone(), gpu_indices }
        }
        None => Outcome::Unplaced(unplaced),
    };
    Placement { replica: request.replica.clone(), outcome }
}

/// How many replicas like this one the fleet could hold beside what is taken.
pub fn capacity(fleet: &FleetView, request: &PlacementRequest) -> u32 {
    /// Beyond this the answer bounds nothing: a replica that asks for no GPU fits without end.
    const MOST: u32 = 100_000;
    fleet
        .nodes
        .iter()
        .map(|node| {
            let mut ledger = gpus::Ledger::of(node);
            let mut count = 0;
            while count < MOST
                && let Ok(gpu_indices) = filters::fit(&ledger, request)
            {
                if gpu_indices.is_empty() && node.cpu_millis.is_none() && node.memory_bytes.is_none() {
                    return MOST;
                }
                ledger.take(request, &gpu_indices);
                count += 1;
            }
            count
        })
        .fold(0, u32::saturating_add)
}
