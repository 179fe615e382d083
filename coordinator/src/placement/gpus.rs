//! What is free on one node, kept up to date while requests are placed.

use std::collections::BTreeMap;

use super::{Gpu, Node, PlacementRequest};

/// A node and what is still free on it.
#[derive(Debug)]
pub(super) struct Ledger<'a> {
    pub(super) node: &'a Node,
    /// Free memory by GPU index; a GPU that is held whole has none.
    free_memory: BTreeMap<u32, u64>,
    cpu_taken: u64,
    memory_taken: u64,
    /// Replicas per revision, for spreading.
    revisions: BTreeMap<String, u32>,
}

impl<'a> Ledger<'a> {
    pub(super) fn of(node: &'a Node) -> Self {
        let free_memory = node.gpus.iter().map(|gpu| (gpu.index, gpu.memory_bytes)).collect();
        let mut ledger = Self { node, free_memory, cpu_taken: 0, memory_taken: 0, revisions: BTreeMap::new() };
        for taken in &node.taken {
            ledger.hold(&taken.gpu_indices, taken.gpu_memory_bytes, taken.cpu_millis, taken.memory_bytes);
            *ledger.revisions.entry(taken.revision.clone()).or_default() += 1;
        }
        ledger
    }

    pub(super) fn take(&mut self, request: &PlacementRequest, gpu_indices: &[u32]) {
        self.hold(gpu_indices, request.gpu_memory_bytes, request.cpu_millis, request.memory_bytes);
        *self.revisions.entry(request.revision.clone()).or_default() += 1;
    }

    fn hold(&mut self, gpu_indices: &[u32], share: Option<u64>, cpu: u64, memory: u64) {
        for index in gpu_indices {
            if let Some(free) = self.free_memory.get_mut(index) {
                *free = share.map_or(0, |share| free.saturating_sub(share));
            }
        }
        self.cpu_taken += cpu;
        self.memory_taken += memory;
    }

    pub(super) fn cpu_fits(&self, millis: u64) -> bool {
        self.node.cpu_millis.is_none_or(|limit| self.cpu_taken + millis <= limit)
    }

    pub(super) fn memory_fits(&self, bytes: u64) -> bool {
        self.node.memory_bytes.is_none_or(|limit| self.memory_taken + bytes <= limit)
    }

    /// GPUs that nobody holds any part of.
    pub(super) fn whole_free(&self) -> impl Iterator<Item = &Gpu> {
        self.node.gpus.iter().filter(|gpu| self.free_memory[&gpu.index] == gpu.memory_bytes)
    }

    /// GPUs with at least this much free memory, with how much.
    pub(super) fn with_free(&self, bytes: u64) -> impl Iterator<Item = (&Gpu, u64)> {
        self.node.gpus.iter().map(|gpu| (gpu, self.free_memory[&gpu.index])).filter(move |(_, free)| *free >= bytes)
    }

    pub(super) fn replicas_of(&self, revision: &str) -> u32 {
        self.revisions.get(revision).copied().unwrap_or(0)
    }
}
