//! Which GPUs of a node a request would get.

use std::{cmp::Reverse, collections::BTreeMap};

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
    let free: Vec<&Gpu> = ledger.whole_free().collect();
    if free.len() < count {
        return Err(Misfit::Gpus { wanted });
    }
    let mut groups: Vec<Vec<u32>> = groups(&free);
    let best = groups.iter().filter(|group| group.len() >= count).min_by_key(|group| (group.len(), group[0]));
    let mut chosen = match best {
        Some(group) => group.clone(),
        None => {
            groups.sort_by_key(|group| (Reverse(group.len()), group[0]));
            groups.concat()
        }
    };
    chosen.truncate(count);
    chosen.sort_unstable();
    Ok(Grant { gpu_indices: chosen, mig_devices: Vec::new() })
}

/// Free GPUs by NVLink group, each ascending; a GPU without links is a group of its own.
fn groups(free: &[&Gpu]) -> Vec<Vec<u32>> {
    let mut groups: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
    for gpu in free {
        let alone = if gpu.nvlink_group == 0 { gpu.index } else { 0 };
        groups.entry((gpu.nvlink_group, alone)).or_default().push(gpu.index);
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups
}
