//! Which GPUs of a node a request would get.

use std::cmp::Reverse;

use super::{
    Gpu, PlacementRequest,
    filters::Misfit,
    ledger::{Ledger, State},
};
use crate::spec::MigRequest;

/// What a node gives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Grant {
    /// Ascending.
    pub(super) gpu_indices: Vec<u32>,
    /// UUIDs.
    pub(super) mig_devices: Vec<String>,
}

/// What the node would give, or the first amount that it lacks. Depends on the ledger's signature alone,
/// but for the UUIDs.
pub(super) fn of(ledger: &Ledger<'_>, request: &PlacementRequest) -> Result<Grant, Misfit> {
    if !ledger.cpu_fits(request.cpu_millis) {
        return Err(Misfit::Cpu);
    }
    if !ledger.memory_fits(request.memory_bytes) {
        return Err(Misfit::Memory);
    }
    match (&request.mig, request.gpu_memory_bytes) {
        (Some(mig), _) => mig_devices(ledger, mig),
        (None, Some(bytes)) => shared_gpu(ledger, bytes),
        (None, None) => whole_gpus(ledger, request.gpus),
    }
}

/// The fullest GPU that still has room, so that whole ones stay whole.
fn shared_gpu(ledger: &Ledger<'_>, bytes: u64) -> Result<Grant, Misfit> {
    let roomy = ledger.gpus.iter().filter(|state| state.free >= bytes && !state.gpu.mig_enabled);
    let tightest = roomy.min_by_key(|state| (state.untouched, state.free, state.gpu.index));
    let grant = |state: &State<'_>| Grant { gpu_indices: vec![state.gpu.index], mig_devices: Vec::new() };
    tightest.map(grant).ok_or(Misfit::GpuMemory { wanted: bytes })
}

/// Devices of one GPU where one has enough, and of the one with the fewest such; else of several.
fn mig_devices(ledger: &Ledger<'_>, wanted: &MigRequest) -> Result<Grant, Misfit> {
    let count = wanted.count as usize;
    let mut free: Vec<(u32, Vec<&str>)> = ledger
        .gpus
        .iter()
        .map(|state| (state.gpu.index, state.free_devices(&wanted.profile).collect::<Vec<_>>()))
        .filter(|(_, devices)| !devices.is_empty())
        .collect();
    if free.iter().map(|(_, devices)| devices.len()).sum::<usize>() < count {
        return Err(Misfit::Mig { profile: wanted.profile.clone(), wanted: wanted.count });
    }
    free.sort_by_key(|(index, devices)| (devices.len() < count, devices.len(), *index));
    let chosen = free.iter().flat_map(|(index, devices)| devices.iter().map(|uuid| (*index, *uuid))).take(count);
    let (mut gpu_indices, mig_devices): (Vec<_>, Vec<_>) = chosen.map(|(gpu, uuid)| (gpu, uuid.to_owned())).unzip();
    gpu_indices.sort_unstable();
    gpu_indices.dedup();
    Ok(Grant { gpu_indices, mig_devices })
}

/// Whole GPUs of the smallest NVLink group that is large enough; where none is, of as few groups as will do.
fn whole_gpus(ledger: &Ledger<'_>, wanted: u32) -> Result<Grant, Misfit> {
    let count = wanted as usize;
    if count == 0 {
        return Ok(Grant::default());
    }
    let mut free: Vec<&Gpu> = ledger.whole_free().collect();
    if free.len() < count {
        return Err(Misfit::Gpus { wanted });
    }
    free.sort_unstable_by_key(|gpu| (gpu.nvlink_group, gpu.index));
    // A GPU without links is a group of its own.
    let groups = || free.chunk_by(|a, b| a.nvlink_group != 0 && a.nvlink_group == b.nvlink_group);
    let best = groups().filter(|group| group.len() >= count).min_by_key(|group| (group.len(), group[0].index));
    let mut gpu_indices: Vec<u32> = match best {
        Some(group) => group[..count].iter().map(|gpu| gpu.index).collect(),
        None => {
            let mut groups: Vec<&[&Gpu]> = groups().collect();
            groups.sort_unstable_by_key(|group| (Reverse(group.len()), group[0].index));
            groups.into_iter().flatten().take(count).map(|gpu| gpu.index).collect()
        }
    };
    gpu_indices.sort_unstable();
    Ok(Grant { gpu_indices, mig_devices: Vec::new() })
}
