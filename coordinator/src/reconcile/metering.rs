//! Feeds the meter with what agents report and what the coordinator decides, and writes what it counts.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase, agent_message::Message};
use tracing::warn;

use super::{
    plan::Gone,
    run::{Reconciler, WRITES_AT_ONCE},
    world::World,
};
use crate::{
    model::{ReplicaRecord, keys},
    store::{Store, StoreError, Transaction},
    usage::{
        Activity, Change, Checkpoint, Clock, Counts, GapReason, Live, Meter, Placement, ShardState, Workload, shard_of,
    },
};

/// A message proves what its agent did when it was sent, not when it came; it is counted up to this long before.
const HEARD_LAG: Clock = 2_000;
/// Bytes of one transaction; etcd takes 1.5 MiB by default.
const MAX_BYTES_PER_WRITE: usize = 512 << 10;
/// Replicas removed in one transaction, each with the state of its shard.
pub(super) const MAX_REMOVALS_PER_WRITE: usize = 10;

/// Milliseconds since the Unix epoch.
pub fn clock(time: Timestamp) -> Clock {
    time.as_millisecond()
}

/// Reads what a previous leader has written, and meters the replicas that there are.
pub(super) async fn resume(store: &dyn Store, world: &World, now: Timestamp) -> Result<Meter, StoreError> {
    let listing = store.list(crate::usage::segment::STATE).await?;
    let mut states = Vec::new();
    for entry in listing.entries {
        let Some(number) = shard_of(&entry.key) else { continue };
        let state: ShardState = serde_json::from_slice(&entry.value)
            .map_err(|error| StoreError::Unreadable { key: entry.key.clone(), reason: error.to_string() })?;
        states.push((number, state));
    }
    Ok(resume_from(states, world, now))
}

/// Continues from what a previous leader has written, with the replicas that there are.
pub fn resume_from(states: Vec<(u32, ShardState)>, world: &World, now: Timestamp) -> Meter {
    let mut meter = Meter::resume(states);
    for node in meter.nodes() {
        if !world.nodes.contains_key(&node) {
            meter.delete_node(&node, clock(now));
        }
    }
    for replica in world.replicas.values() {
        open(&mut meter, world, &replica.record, now);
    }
    let lost: Vec<_> = meter.replicas().filter(|name| !world.replicas.contains_key(*name)).map(str::to_owned).collect();
    for replica in lost {
        meter.lose(&replica, clock(now));
    }
    meter
}

/// Meters a replica that belongs to the coordinator, for the first time or again.
pub fn open(meter: &mut Meter, world: &World, record: &ReplicaRecord, now: Timestamp) {
    meter.open(placement(world, record));
    intend(meter, world, &record.name, now);
}

/// Takes in whether a replica is to sleep, and for whom.
pub fn intend(meter: &mut Meter, world: &World, name: &str, now: Timestamp) {
    let Some(replica) = world.replicas.get(name) else { return };
    let asleep = replica.record.asleep && !replica.record.draining;
    meter.intend(name, !asleep, asleep && !world.sleeps_on_request(replica), clock(now));
}

fn placement(world: &World, record: &ReplicaRecord) -> Placement {
    let revision = world.revisions.get(&record.revision).map(|revision| &revision.record);
    let (_, name) = record.revision.split_once('/').unwrap_or_default();
    let no_labels = BTreeMap::new();
    let service = revision.and_then(|revision| world.services.get(&revision.service_key()));
    let labels = service.map_or(&no_labels, |service| &service.record.service.labels);
    let resources = revision.map(|revision| &revision.template.resources);
    Placement {
        replica: record.name.clone(),
        workload: Workload::new(&record.namespace, &record.service, name, labels),
        gpu_class: record.gpu_class.clone(),
        node: record.node.clone(),
        gpu_millis: gpu_millis(world, record, resources.and_then(|resources| resources.gpu_memory_bytes)),
        cpu_millis: resources.map_or(0, |resources| resources.cpu_millis),
        memory_mib: resources.map_or(0, |resources| resources.memory_bytes >> 20),
        created: clock(record.created_at),
    }
}

/// Thousandths of a GPU or MIG device that a replica holds. A share of a GPU is the share of its memory, rounded up.
fn gpu_millis(world: &World, record: &ReplicaRecord, share: Option<u64>) -> u32 {
    let whole = record.devices() as u32 * 1000;
    let inventory = world.nodes.get(&record.node).and_then(|node| node.inventory.as_ref());
    let gpus = inventory.map_or(&[][..], |inventory| &inventory.gpus);
    let gpu = record.gpu_indices.first().and_then(|index| gpus.iter().find(|gpu| gpu.index == *index));
    match (share, gpu.map_or(0, |gpu| gpu.memory_bytes)) {
        (Some(share), all) if share < all => {
            u32::try_from((u128::from(share) * 1000).div_ceil(u128::from(all))).unwrap_or(whole)
        }
        _ => whole,
    }
}

/// Takes in one message of one node, before the world does. Most have nothing to meter.
pub fn observe(meter: &mut Meter, world: &World, node: &str, message: &Message, now: Timestamp) {
    let process = || world.nodes.get(node).map_or("", |node| node.hello.boot_id.as_str());
    match message {
        Message::ReplicaHistories(histories) => {
            let histories = changes_of(histories, now);
            // Those whose first write was lost with the leader, but not their records.
            for replica in histories.keys().filter_map(|name| world.replicas.get(name)) {
                if replica.record.node == node && !meter.knows(&replica.record.name) {
                    open(meter, world, &replica.record, now);
                }
            }
            meter.observe(node, process(), &histories, clock(now));
        }
        Message::ReplicaStatuses(statuses) => {
            let activities = statuses
                .replicas
                .iter()
                .map(|status| (status.replica.clone(), activity(status.phase(), status.holds_gpu_memory)));
            meter.observe_statuses(node, &activities.collect(), clock(now));
        }
        Message::RequestCounters(counters) => {
            for counter in &counters.revisions {
                let counts = Counts {
                    requests: counter.requests,
                    prompt_tokens: counter.prompt_tokens,
                    generated_tokens: counter.generated_tokens,
                    requests_without_usage: counter.requests_without_usage,
                };
                meter.count(node, process(), workload(world, &counter.revision), counts, clock(now));
            }
        }
        _ => {}
    }
}

/// Whose requests are those of a revision. Its service is not known any more once it has been deleted.
fn workload(world: &World, key: &str) -> Workload {
    let (namespace, name) = key.split_once('/').unwrap_or(("", key));
    let no_labels = BTreeMap::new();
    let Some(revision) = world.revisions.get(key) else { return Workload::new(namespace, "", name, &no_labels) };
    let service = world.services.get(&revision.record.service_key());
    let labels = service.map_or(&no_labels, |service| &service.record.service.labels);
    Workload::new(namespace, &revision.record.service, name, labels)
}

fn changes_of(histories: &fleet::ReplicaHistories, now: Timestamp) -> BTreeMap<String, Vec<Change>> {
    let change = |change: &fleet::PhaseChange| {
        let age = change.age.and_then(|age| std::time::Duration::try_from(age).ok()).unwrap_or_default();
        let at = now.checked_sub(age).map_or(Clock::MIN, clock);
        Change { sequence: change.sequence, at, activity: activity(change.phase(), change.holds_gpu_memory) }
    };
    let replicas = histories.replicas.iter();
    replicas.map(|history| (history.replica.clone(), history.changes.iter().map(change).collect())).collect()
}

fn activity(phase: ReplicaPhase, holds_gpu_memory: bool) -> Activity {
    match phase {
        ReplicaPhase::Unspecified => Activity::Running,
        ReplicaPhase::Pending | ReplicaPhase::Fetching | ReplicaPhase::Failed => Activity::Waiting,
        ReplicaPhase::Starting => Activity::Loading,
        ReplicaPhase::Ready | ReplicaPhase::Draining => Activity::Serving,
        ReplicaPhase::Asleep => Activity::Asleep { held: holds_gpu_memory },
        ReplicaPhase::Stopped => Activity::Ended,
    }
}

/// Up to when a node with an open session was heard of.
pub fn heard(world: &World, now: Timestamp) -> impl Fn(&str) -> Option<Clock> {
    move |node| {
        let session = world.nodes.get(node)?.session.as_ref()?;
        Some(clock(now) - session.silence().as_millis() as Clock - HEARD_LAG)
    }
}

impl Reconciler {
    /// A node has opened a session: its agent may know how far the clocks of two leaders differ.
    pub(super) fn meter_connected(&mut self, node: &str, hello: &fleet::Hello, now: Timestamp) {
        let age = hello.coordinator_time_age.and_then(|age| std::time::Duration::try_from(age).ok());
        let stated = hello.coordinator_time.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok());
        let offset = stated.zip(age).map(|(time, age)| clock(now) - clock(time) - age.as_millis() as Clock);
        self.meter.connect(node, &hello.boot_id, offset, clock(now));
    }

    /// Takes in for whom replicas sleep, which may change with the replicas beside them.
    pub(super) fn meter_sleepers(&mut self, now: Timestamp) {
        for (name, _) in self.world.replicas.iter().filter(|(_, replica)| replica.record.asleep) {
            intend(&mut self.meter, &self.world, name, now);
        }
    }

    /// Usage that may not be in the store yet, up to now.
    pub(super) fn live_usage(&mut self, now: Timestamp) -> Live {
        self.meter.advance(heard(&self.world, now), clock(now));
        self.meter.live(clock(now))
    }

    /// Writes what was not written for a minute.
    pub(super) async fn write_due_usage(&mut self, now: Timestamp) {
        let due = self.meter.due(clock(now));
        if !due.is_empty() {
            self.meter_sleepers(now);
            self.write_usage(&due, now).await;
        }
    }

    /// Writes all that is not written yet.
    pub(super) async fn write_all_usage(&mut self, now: Timestamp) {
        self.meter.advance(heard(&self.world, now), clock(now));
        let unwritten = self.meter.unwritten();
        self.write_usage(&unwritten, now).await;
    }

    async fn write_usage(&mut self, shards: &[usize], now: Timestamp) {
        // A shard has two values; one transaction takes no more than so many bytes, or one shard.
        let mut shards = shards.to_vec();
        while !shards.is_empty() {
            let mut count = shards.len().min(WRITES_AT_ONCE / 2);
            let checkpoint = loop {
                let checkpoint = self.meter.checkpoint(&shards[..count], heard(&self.world, now), clock(now));
                if checkpoint.bytes() <= MAX_BYTES_PER_WRITE || count == 1 {
                    break checkpoint;
                }
                count /= 2;
            };
            let write = with_usage(Transaction::new(), &checkpoint);
            if let Err(error) = self.commit(write).await {
                warn!(%error, "cannot write usage; will be tried again");
                return;
            }
            self.meter.committed(checkpoint);
            shards.drain(..count);
        }
    }

    /// Removes replicas from the store, together with their last usage.
    pub(super) async fn commit_removal(&mut self, gone: &[(String, Gone)], now: Timestamp) -> Result<(), StoreError> {
        let write = gone.iter().fold(Transaction::new(), |write, (name, _)| write.delete(&keys::replica(name)));
        let closed: Vec<_> = gone
            .iter()
            .filter_map(|(name, why)| match why {
                Gone::Stopped => Some((name.as_str(), GapReason::ReplicaUnknown)),
                Gone::NodeDeleted => Some((name.as_str(), GapReason::NodeDeleted)),
                // Its node may return, and report what it did.
                Gone::NodeLost => None,
            })
            .collect();
        let checkpoint = self.meter.closing(&closed, clock(now));
        self.commit(with_usage(write, &checkpoint)).await?;
        self.meter.committed(checkpoint);
        for (name, _) in gone.iter().filter(|(_, why)| *why == Gone::NodeLost) {
            self.meter.lose(name, clock(now));
        }
        Ok(())
    }

    /// The labels of a service may have changed.
    pub(super) fn relabel_usage(&mut self, service: &str) {
        let Some(state) = self.world.services.get(service) else { return };
        let labels = &state.record.service.labels;
        for revision in self.world.revisions_of(state) {
            revision.replicas.iter().for_each(|replica| self.meter.relabel(replica, labels));
        }
    }
}

fn with_usage(write: Transaction, checkpoint: &Checkpoint) -> Transaction {
    checkpoint.values.iter().fold(write, |write, (key, value)| write.put(key, value.clone()))
}
