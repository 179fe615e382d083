//! Quarantining GPUs, and clearing them.

use jiff::Timestamp;
use tracing::{info, warn};

use super::{
    commands::CommandError,
    run::Reconciler,
    world::{Event, NodeState, World, record_event},
};
use crate::{
    model::{NodeRecord, keys},
    quarantine::{self, GpuRecord, Quarantine, Refusal},
    store::Transaction,
};

impl Reconciler {
    /// Quarantines the GPUs that have been reported to be broken. If the store refuses, it is tried again at the next
    /// pass of the loop. The plan then moves replicas elsewhere.
    pub(super) async fn quarantine_gpus(&mut self, now: Timestamp) {
        for name in std::mem::take(&mut self.dirty.reported_gpus) {
            let Some(node) = self.world.nodes.get(&name) else { continue };
            let Some(report) = &node.gpu_report else { continue };
            let decided = quarantine::decide(&node.record, report, now);
            if decided.is_empty() {
                continue;
            }
            let mut record = node.record.clone();
            for (_, uuid, quarantine) in &decided {
                record.gpus.entry(uuid.clone()).or_default().quarantine = Some(quarantine.clone());
            }
            if let Err(error) = self.set_node_record(record).await {
                warn!(node = %name, %error, "cannot write that GPUs are quarantined; will be tried again");
                self.dirty.reported_gpus.insert(name);
                continue;
            }
            for (index, uuid, quarantine) in decided {
                let message = &quarantine.message;
                warn!(node = %name, gpu = index, %uuid, reason = quarantine.reason.as_str(), message, "GPU quarantined");
                self.record_quarantine(&name, index, &quarantine, now);
            }
        }
    }

    /// Lets a quarantined GPU take replicas again.
    pub(super) async fn unquarantine_gpu(&mut self, name: &str, gpu: &str, now: Timestamp) -> Result<(), CommandError> {
        let node = self.world.nodes.get(name).ok_or_else(|| CommandError::NodeNotFound(name.to_owned()))?;
        let (index, uuid) = find_gpu(node, gpu)?;
        let known = node.record.gpus.get(&uuid).cloned().unwrap_or_default();
        let health = node.gpu_report.iter().flat_map(|report| &report.gpus).find(|health| health.uuid == uuid);
        let cleared = quarantine::clear(&known, health).map_err(|refusal| {
            let (node, gpu) = (name.to_owned(), gpu.to_owned());
            match refusal {
                Refusal::NotQuarantined => CommandError::GpuNotQuarantined { node, gpu },
                Refusal::StillLost => CommandError::GpuLost { node, gpu },
            }
        })?;
        let mut record = node.record.clone();
        record.gpus.insert(uuid.clone(), cleared);
        self.set_node_record(record).await?;
        info!(node = %name, gpu = index, %uuid, "GPU cleared");
        let number = index.map_or(uuid, |index| index.to_string());
        let message = format!("GPU {number} takes replicas again");
        if let Some(node) = self.world.nodes.get_mut(name) {
            let object = format!("Node/{name}");
            record_event(&mut node.events, Event { time: now, warning: false, reason: "GpuCleared", object, message });
        }
        self.dirty.waiting_for_a_place(&self.world);
        Ok(())
    }

    async fn set_node_record(&mut self, record: NodeRecord) -> Result<(), crate::store::StoreError> {
        self.commit(Transaction::new().put_json(&keys::node(&record.name), &record)).await?;
        if let Some(node) = self.world.nodes.get_mut(&record.name) {
            node.record = record;
        }
        Ok(())
    }

    /// Records events of the node and of the services whose replicas move, and has these planned.
    fn record_quarantine(&mut self, name: &str, index: u32, quarantine: &Quarantine, now: Timestamp) {
        let object = format!("Node/{name}");
        let message = format!("GPU {index} is quarantined: {}", quarantine.message);
        let event = Event { time: now, warning: true, reason: "GpuQuarantined", object, message };
        for service in services_on(&self.world, name, index) {
            self.world.note(&service, event.clone());
        }
        let Some(node) = self.world.nodes.get_mut(name) else { return };
        record_event(&mut node.events, event);
        let replicas = node.replicas.iter().filter_map(|name| self.world.replicas.get(name));
        let revisions = replicas.map(|replica| replica.record.revision.clone());
        self.dirty.revisions.extend(revisions);
    }
}

/// Services with replicas on this GPU, each once.
fn services_on(world: &World, node: &str, index: u32) -> Vec<String> {
    let Some(node) = world.nodes.get(node) else { return Vec::new() };
    let replicas = node.replicas.iter().filter_map(|name| world.replicas.get(name));
    let using = replicas.filter(|replica| replica.record.gpu_indices.contains(&index));
    let mut services: Vec<_> = using.map(|replica| world.component_of(&replica.record)).collect();
    services.sort_unstable();
    services.dedup();
    services
}

/// The GPU that an operator names by index or UUID. One that the node does not have any more is found by the UUID of its
/// quarantine.
fn find_gpu(node: &NodeState, gpu: &str) -> Result<(Option<u32>, String), CommandError> {
    let present = || node.inventory.iter().flat_map(|inventory| &inventory.gpus);
    if let Some(found) = present().find(|found| found.uuid == gpu || found.index.to_string() == gpu) {
        return Ok((Some(found.index), found.uuid.clone()));
    }
    let quarantined = |(uuid, record): &(&String, &GpuRecord)| record.quarantine.is_some() && *uuid == gpu;
    if let Some((uuid, _)) = node.record.gpus.iter().find(quarantined) {
        return Ok((None, uuid.clone()));
    }
    let mut known: Vec<_> = present().map(|gpu| format!("{} ({})", gpu.index, gpu.uuid)).collect();
    let absent = node
        .record
        .gpus
        .iter()
        .filter(|(uuid, record)| record.quarantine.is_some() && !present().any(|gpu| gpu.uuid == **uuid));
    known.extend(absent.map(|(uuid, _)| uuid.clone()));
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(CommandError::GpuNotFound { node: node.record.name.clone(), gpu: gpu.to_owned(), known })
}
