//! GPUs as operators and placement see them. Pure.

use std::time::Duration;

use jiff::Timestamp;
use pilotlight_proto::{control::v1 as control, fleet::v1 as fleet};

use super::{
    view::timestamp,
    world::{NodeState, ReplicaState, World, since},
};
use crate::placement;

/// Memory of other processes up to which a GPU is taken for free, bytes. Display servers and monitoring tools hold some.
const IGNORED_FOREIGN_MEMORY: u64 = 512 << 20;

/// An agent reports its GPUs every 30 s at least. If it is connected and has not for so long, its driver hangs.
const REPORT_OVERDUE: Duration = Duration::from_secs(120);

/// What is wrong with a node's GPUs as a whole; empty if nothing is known to be.
pub(super) fn error(node: &NodeState, now: Timestamp) -> String {
    let Some(report) = &node.gpu_report else { return String::new() };
    let silence = since(node.gpu_reported_at, now);
    if node.session.is_some() && silence > REPORT_OVERDUE {
        return format!("GPUs were last reported {} s ago: the NVIDIA driver does not answer", silence.as_secs());
    }
    report.error.clone()
}

/// A GPU as placement sees it; `None` if it is quarantined.
pub(super) fn placeable(node: &NodeState, gpu: &fleet::Gpu) -> Option<placement::Gpu> {
    if node.quarantine(gpu.index).is_some() {
        return None;
    }
    let health = node.gpu_health(gpu.index).filter(|health| health.uuid == gpu.uuid);
    let counted = |bytes: u64| if bytes > IGNORED_FOREIGN_MEMORY { bytes } else { 0 };
    let device = |device: &fleet::MigDevice| placement::MigDevice {
        uuid: device.uuid.clone(),
        profile: device.profile.clone(),
        held_by_others: health
            .and_then(|health| health.mig_foreign_memory_bytes.get(&device.uuid))
            .is_some_and(|bytes| counted(*bytes) > 0),
    };
    Some(placement::Gpu {
        index: gpu.index,
        product: gpu.product.clone(),
        memory_bytes: gpu.memory_bytes,
        foreign_memory_bytes: health.map_or(0, |health| counted(health.foreign_memory_bytes)),
        nvlink_group: gpu.nvlink_group,
        mig_enabled: gpu.mig_enabled,
        mig_devices: gpu.mig_devices.iter().map(device).collect(),
    })
}

/// A GPU with its health and the replicas that hold it, out of all that are on its node.
pub(super) fn node_gpu(node: &NodeState, gpu: &fleet::Gpu, replicas: &[&ReplicaState]) -> control::NodeGpu {
    let holding = replicas.iter().filter(|replica| !replica.has_released_gpu()).map(|replica| &replica.record);
    let holders: Vec<_> = holding.clone().filter(|record| record.gpu_indices.contains(&gpu.index)).collect();
    let device = |device: &fleet::MigDevice| control::NodeMigDevice {
        uuid: device.uuid.clone(),
        profile: device.profile.clone(),
        replica: holding
            .clone()
            .find(|record| record.mig_devices.contains(&device.uuid))
            .map(|record| record.name.clone())
            .unwrap_or_default(),
    };
    let quarantine = node.quarantine(gpu.index).map(|quarantine| control::GpuQuarantine {
        since: Some(timestamp(quarantine.since)),
        reason: quarantine.reason.as_str().to_owned(),
        message: quarantine.message.clone(),
    });
    control::NodeGpu {
        index: gpu.index,
        product: gpu.product.clone(),
        memory_bytes: gpu.memory_bytes,
        replica: holders.last().map(|record| record.name.clone()).unwrap_or_default(),
        replicas: holders.iter().map(|record| record.name.clone()).collect(),
        mig_devices: gpu.mig_devices.iter().map(device).collect(),
        uuid: gpu.uuid.clone(),
        quarantine,
        health: node.gpu_health(gpu.index).filter(|health| health.uuid == gpu.uuid).map(health),
    }
}

fn health(health: &fleet::GpuHealth) -> control::GpuHealth {
    let health = health.clone();
    let xid = |event: fleet::XidEvent| control::XidEvent { xid: event.xid, count: event.count, last_at: event.last_at };
    let process = |process: fleet::GpuProcess| control::GpuProcess {
        pid: process.pid,
        name: process.name,
        memory_bytes: process.memory_bytes,
    };
    control::GpuHealth {
        lost: health.lost,
        xids: health.xids.into_iter().map(xid).collect(),
        ecc_uncorrectable_errors: health.ecc_uncorrectable_errors,
        row_remap_pending: health.row_remap_pending,
        row_remap_failed: health.row_remap_failed,
        nvlinks_active: health.nvlinks_active,
        nvlinks_expected: health.nvlinks_expected,
        throttle_reasons: health.throttle_reasons,
        temperature_celsius: health.temperature_celsius,
        utilization_percent: health.utilization_percent,
        memory_used_bytes: health.memory_used_bytes,
        foreign_memory_bytes: health.foreign_memory_bytes,
        foreign_processes: health.foreign_processes.into_iter().map(process).collect(),
        unreadable: health.unreadable,
    }
}

/// GPU memory that a replica uses, as last measured, and that was set aside for it, bytes.
pub(super) fn memory_of(world: &World, replica: &ReplicaState) -> (Option<u64>, u64) {
    let record = &replica.record;
    let Some(node) = world.nodes.get(&record.node) else { return (None, 0) };
    let report = node.gpu_report.as_ref().filter(|_| record.devices() > 0);
    let used = report.map(|report| {
        let measured = report.replicas.iter().find(|measured| measured.replica == record.name);
        measured.map_or(0, |measured| measured.bytes)
    });
    let gpus = || node.inventory.iter().flat_map(|inventory| &inventory.gpus);
    let part =
        world.revisions.get(&record.revision).and_then(|revision| revision.record.template.resources.gpu_memory_bytes);
    let requested = match part {
        _ if !record.mig_devices.is_empty() => {
            let devices = gpus().flat_map(|gpu| &gpu.mig_devices);
            devices.filter(|device| record.mig_devices.contains(&device.uuid)).map(|device| device.memory_bytes).sum()
        }
        Some(part) => part.saturating_mul(record.gpu_indices.len() as u64),
        None => gpus().filter(|gpu| record.gpu_indices.contains(&gpu.index)).map(|gpu| gpu.memory_bytes).sum(),
    };
    (used, requested)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fleet::SessionHandle, model::NodeRecord, reconcile::plan::tests::Cell};

    #[test]
    fn a_driver_that_hangs_is_noticed_by_the_reports_that_do_not_come() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut node = NodeState::unheard(NodeRecord::new("a", at(0)), at(0));
        node.session = Some(SessionHandle::to_nobody("a"));
        assert_eq!(error(&node, at(1000)), "", "it has reported nothing, as a node without a driver");
        let report = fleet::GpuReport { error: "only 1 of 2 GPUs".into(), ..Default::default() };
        (node.gpu_report, node.gpu_reported_at) = (Some(report), at(1000));
        assert_eq!(error(&node, at(1120)), "only 1 of 2 GPUs");
        assert_eq!(error(&node, at(1121)), "GPUs were last reported 121 s ago: the NVIDIA driver does not answer");
        node.session = None;
        assert_eq!(error(&node, at(1121)), "only 1 of 2 GPUs", "it cannot report anything");
    }

    #[test]
    fn memory_that_a_replica_uses_is_shown_beside_what_was_set_aside_for_it() {
        let mut cell = Cell::of(&[1]).replica("m-1", "a", 0, fleet::ReplicaPhase::Ready);
        let memory = |cell: &Cell| memory_of(&cell.world, &cell.world.replicas["m-1"]);
        assert_eq!(memory(&cell), (None, 48 << 30), "its agent measures nothing");
        let measured = fleet::ReplicaGpuMemory { replica: "m-1".into(), bytes: 7 << 30 };
        let report = fleet::GpuReport { replicas: vec![measured], ..Default::default() };
        cell.world.nodes.get_mut("a").unwrap().gpu_report = Some(report);
        assert_eq!(memory(&cell), (Some(7 << 30), 48 << 30));
        cell.world.nodes.get_mut("a").unwrap().gpu_report = Some(fleet::GpuReport::default());
        assert_eq!(memory(&cell), (Some(0), 48 << 30), "no process of it uses a GPU");
    }
}
