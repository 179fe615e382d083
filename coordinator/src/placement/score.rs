//! Which of the nodes that fit is best. The fields, in order, are the policy; less is better.

use super::{PlacementRequest, gpus::Ledger};

/// A node's order for one request.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// A replica that needs no GPU leaves GPU nodes to those that do.
    gpu_node_wasted: bool,
    /// Several GPUs of one replica talk to each other: NVLink before PCIe.
    gpus_apart: bool,
    /// Replicas of one revision on different nodes survive the loss of one.
    same_revision: u32,
    /// Best fit: fill nodes up, so that large requests find empty ones.
    free_gpus_left: usize,
    /// By name, so that the answer is always the same.
    order: usize,
}

impl Score {
    pub(super) fn of(ledger: &Ledger<'_>, request: &PlacementRequest, gpu_indices: &[u32], order: usize) -> Self {
        let mut groups =
            ledger.node.gpus.iter().filter(|gpu| gpu_indices.contains(&gpu.index)).map(|gpu| gpu.nvlink_group);
        let first = groups.next().unwrap_or(0);
        let apart = gpu_indices.len() > 1 && (first == 0 || groups.any(|group| group != first));
        Self {
            gpu_node_wasted: gpu_indices.is_empty() && !ledger.node.gpus.is_empty(),
            gpus_apart: apart,
            same_revision: ledger.replicas_of(&request.revision),
            free_gpus_left: ledger.whole_free().count().saturating_sub(gpu_indices.len()),
            order,
        }
    }
}
