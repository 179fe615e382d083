//! Replicas that still run on a node which was lost and has come back.

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase};
use tracing::{info, warn};

use super::{
    metering, observe,
    run::Reconciler,
    world::{Event, World},
};
use crate::{
    model::{ReplicaRecord, keys},
    store::Transaction,
};

impl Reconciler {
    /// Takes back the replicas that are still of use. All others are not in the node's assignment, and so are stopped.
    pub(super) async fn take_back(&mut self, now: Timestamp) {
        for (record, status) in std::mem::take(&mut self.dirty.returned) {
            if !is_of_use(&self.world, &record, &status) {
                continue;
            }
            let key = keys::replica(&record.name);
            let write = Transaction::new().expect_absent(&key).put_json(&key, &record);
            if let Err(error) = self.commit(write).await {
                warn!(replica = %record.name, %error, "cannot take back a replica of a node that was lost");
                continue;
            }
            info!(replica = %record.name, node = %record.node, "its node has come back, and it still runs");
            let service = self.world.component_of(&record);
            let message = format!("node {} has come back, and it still runs there", record.node);
            let object = format!("Replica/{}", record.name);
            self.world.note(&service, Event { time: now, warning: false, reason: "Adopted", object, message });
            let (name, revision) = (record.name.clone(), record.revision.clone());
            self.world.insert_replica(record.clone(), Default::default());
            metering::open(&mut self.meter, &self.world, &record, now);
            observe::took(&mut self.world, status, now, &mut self.dirty);
            self.dirty.metered.insert(name);
            self.dirty.revision(&self.world, &revision);
        }
    }
}

/// Returns `true` if the replica serves or will, fewer others are ready than are wanted, and its GPUs are not quarantined
/// and nobody else has them.
fn is_of_use(world: &World, record: &ReplicaRecord, status: &fleet::ReplicaStatus) -> bool {
    if matches!(status.phase(), ReplicaPhase::Unspecified | ReplicaPhase::Failed | ReplicaPhase::Stopped) {
        return false;
    }
    let Some(revision) = world.revisions.get(&record.revision).filter(|revision| !world.retired(revision)) else {
        return false;
    };
    let counts = world.counts(revision);
    let is_missed =
        if record.asleep { counts.live() + counts.asleep == 0 } else { counts.ready < revision.allowed().max(1) };
    let Some(node) = world.nodes.get(&record.node) else { return false };
    let mut others = node.replicas.iter().filter_map(|name| world.replicas.get(name));
    is_missed
        && node.quarantine_of(record).is_none()
        && (record.asleep || !others.any(|other| shares_gpu(record, &other.record)))
}

/// Returns `true` if both use one GPU, or one part of it, at the same time.
fn shares_gpu(one: &ReplicaRecord, other: &ReplicaRecord) -> bool {
    let overlap = |a: &[String], b: &[String]| a.iter().any(|device| b.contains(device));
    match (one.mig_devices.as_slice(), other.mig_devices.as_slice()) {
        _ if other.asleep => false,
        ([], _) | (_, []) => one.gpu_indices.iter().any(|gpu| other.gpu_indices.contains(gpu)),
        (mine, theirs) => overlap(mine, theirs),
    }
}
