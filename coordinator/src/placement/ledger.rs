//! What is free on one node, kept up to date while requests are placed.

use std::collections::BTreeMap;

use super::{Gpu, Node, PlacementRequest, Taken, grant::Grant};

/// A node and what is still free on it.
#[derive(Debug)]
pub(super) struct Ledger<'a> {
    pub(super) node: &'a Node,
    /// In the order of the node's list.
    pub(super) gpus: Vec<State<'a>>,
    cpu_taken: u64,
    memory_taken: u64,
    /// Replicas per revision, for spreading.
    revisions: BTreeMap<&'a str, u32>,
}

/// A GPU and what is still free of it.
#[derive(Debug)]
pub(super) struct State<'a> {
    pub(super) gpu: &'a Gpu,
    /// Memory that nobody holds, bytes.
    pub(super) free: u64,
    /// `false` if anybody holds a part of it.
    pub(super) untouched: bool,
    /// For each MIG device, whether it is free.
    pub(super) mig_free: Vec<bool>,
}

/// All of a ledger that decides what the node can give. Nodes with equal signatures give the same.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Signature<'a> {
    gpus: Vec<GpuSignature<'a>>,
    cpu_left: Option<u64>,
    memory_left: Option<u64>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct GpuSignature<'a> {
    index: u32,
    memory: u64,
    free: u64,
    untouched: bool,
    group: u32,
    mig_enabled: bool,
    mig: Vec<(&'a str, bool)>,
}

impl<'a> Ledger<'a> {
    pub(super) fn of(node: &'a Node) -> Self {
        Self::but(node, |_| true)
    }

    /// As if only those replicas were there that `stays` says.
    pub(super) fn but(node: &'a Node, stays: impl Fn(&Taken) -> bool) -> Self {
        let state = |gpu: &'a Gpu| State {
            gpu,
            free: gpu.memory_bytes.saturating_sub(gpu.foreign_memory_bytes),
            untouched: gpu.foreign_memory_bytes == 0,
            mig_free: gpu.mig_devices.iter().map(|device| !device.held_by_others).collect(),
        };
        let gpus = node.gpus.iter().map(state).collect();
        let mut ledger = Self { node, gpus, cpu_taken: 0, memory_taken: 0, revisions: BTreeMap::new() };
        for taken in node.taken.iter().filter(|taken| stays(taken)) {
            ledger.hold(&taken.gpu_indices, &taken.mig_devices, taken.gpu_memory_bytes);
            ledger.cpu_taken += taken.cpu_millis;
            ledger.memory_taken += taken.memory_bytes;
            *ledger.revisions.entry(&taken.revision).or_default() += 1;
        }
        ledger
    }

    pub(super) fn take(&mut self, request: &'a PlacementRequest, grant: &Grant) {
        self.hold(&grant.gpu_indices, &grant.mig_devices, request.gpu_memory_bytes);
        self.cpu_taken += request.cpu_millis;
        self.memory_taken += request.memory_bytes;
        *self.revisions.entry(&request.revision).or_default() += 1;
    }

    fn hold(&mut self, gpu_indices: &[u32], mig_devices: &[String], share: Option<u64>) {
        for state in self.gpus.iter_mut().filter(|state| gpu_indices.contains(&state.gpu.index)) {
            if mig_devices.is_empty() {
                state.untouched = false;
                state.free = share.map_or(0, |share| state.free.saturating_sub(share));
            }
            for (device, free) in state.gpu.mig_devices.iter().zip(&mut state.mig_free) {
                *free &= !mig_devices.contains(&device.uuid);
            }
        }
    }

    /// True where all devices of a replica are there and free.
    pub(super) fn is_free(&self, taken: &Taken) -> bool {
        let mig_free = |uuid: &String| {
            let devices = self.gpus.iter().flat_map(|state| state.gpu.mig_devices.iter().zip(&state.mig_free));
            devices.into_iter().any(|(device, free)| device.uuid == *uuid && *free)
        };
        let gpu_free = |index: &u32| {
            let state = self.gpus.iter().find(|state| state.gpu.index == *index);
            state.is_some_and(|state| match taken.gpu_memory_bytes {
                Some(share) => state.free >= share,
                None => state.untouched,
            })
        };
        if taken.mig_devices.is_empty() {
            taken.gpu_indices.iter().all(gpu_free)
        } else {
            taken.mig_devices.iter().all(mig_free)
        }
    }

    pub(super) fn cpu_fits(&self, millis: u64) -> bool {
        self.cpu_left().is_none_or(|left| millis <= left)
    }

    pub(super) fn memory_fits(&self, bytes: u64) -> bool {
        self.memory_left().is_none_or(|left| bytes <= left)
    }

    fn cpu_left(&self) -> Option<u64> {
        self.node.cpu_millis.map(|limit| limit.saturating_sub(self.cpu_taken))
    }

    fn memory_left(&self) -> Option<u64> {
        self.node.memory_bytes.map(|limit| limit.saturating_sub(self.memory_taken))
    }

    /// GPUs that nobody holds any part of and that are not divided.
    pub(super) fn whole_free(&self) -> impl Iterator<Item = &'a Gpu> {
        self.gpus.iter().filter(|state| state.untouched && !state.gpu.mig_enabled).map(|state| state.gpu)
    }

    pub(super) fn replicas_of(&self, revision: &str) -> u32 {
        self.revisions.get(revision).copied().unwrap_or(0)
    }

    pub(super) fn revisions(&self) -> impl Iterator<Item = &'a str> {
        self.revisions.keys().copied()
    }

    pub(super) fn signature(&self) -> Signature<'a> {
        let gpu = |state: &State<'a>| GpuSignature {
            index: state.gpu.index,
            memory: state.gpu.memory_bytes,
            free: state.free,
            untouched: state.untouched,
            group: state.gpu.nvlink_group,
            mig_enabled: state.gpu.mig_enabled,
            mig: state
                .gpu
                .mig_devices
                .iter()
                .map(|device| device.profile.as_str())
                .zip(state.mig_free.clone())
                .collect(),
        };
        Signature {
            gpus: self.gpus.iter().map(gpu).collect(),
            cpu_left: self.cpu_left(),
            memory_left: self.memory_left(),
        }
    }
}

impl<'a> State<'a> {
    /// Its free MIG devices of this profile.
    pub(super) fn free_devices(&self, profile: &str) -> impl Iterator<Item = &'a str> {
        let devices = self.gpu.mig_devices.iter().zip(&self.mig_free);
        devices
            .filter(move |(device, free)| **free && device.profile == profile)
            .map(|(device, _)| device.uuid.as_str())
    }
}
