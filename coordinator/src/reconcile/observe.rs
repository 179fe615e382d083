//! What agents say, put into the world. Returns what has to be looked at again.

use std::collections::BTreeSet;

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase, Rung, agent_message::Message};
use pilotlight_telemetry::TraceContext;

use super::{
    clock::scaler_time,
    record::{Entry, Recorder},
    warmth,
    world::{Event, RevisionState, World, since},
};
use crate::{
    autoscaler::Sample,
    model::{self, ReplicaRecord, RevisionKey, ServiceKey},
};

/// What has changed since the loop last acted.
#[derive(Debug, Default)]
pub struct Dirty {
    /// Revisions whose replicas have to be planned.
    pub revisions: BTreeSet<RevisionKey>,
    /// Revisions whose next decision should not wait for the tick.
    pub urgent: BTreeSet<RevisionKey>,
    /// Services whose routes or status may have changed.
    pub services: BTreeSet<ServiceKey>,
    /// Nodes whose assignment may have changed.
    pub nodes: BTreeSet<String>,
    /// Replicas of which something else is to be charged from now on.
    pub metered: BTreeSet<String>,
    /// True where it has to be looked at once what idle models hold.
    pub warmth: bool,
    /// True where the list of nodes has changed.
    pub peers: bool,
    /// Nodes whose GPUs have been reported, and may have to be quarantined.
    pub reported_gpus: BTreeSet<String>,
    /// Replicas of a node that was lost, as it reports them after its return.
    pub returned: Vec<(ReplicaRecord, fleet::ReplicaStatus)>,
}

impl Dirty {
    /// A revision's replicas changed: plan it, and show its service anew.
    pub fn revision(&mut self, world: &World, key: &str) {
        self.revisions.insert(key.to_owned());
        if let Some(revision) = world.revisions.get(key) {
            self.services.insert(revision.record.service_key());
        }
    }

    /// Capacity came free: whoever waits for a place, or holds back for a roll-out, is planned again.
    pub fn waiting_for_a_place(&mut self, world: &World) {
        let waits = |revision: &RevisionState| revision.unplaced.is_some() || revision.most.is_some();
        let waiting = world.revisions.iter().filter(|(_, revision)| waits(revision));
        self.revisions.extend(waiting.map(|(key, _)| key.clone()));
    }
}

/// Takes in one message of one node.
pub fn hear(
    world: &mut World,
    node: &str,
    message: Message,
    now: Timestamp,
    recorder: &mut Recorder,
    dirty: &mut Dirty,
) {
    if let Some(state) = world.nodes.get_mut(node) {
        state.last_seen = now;
    }
    match message {
        Message::Inventory(inventory) => {
            if let Some(state) = world.nodes.get_mut(node) {
                state.inventory = Some(inventory);
            }
            dirty.waiting_for_a_place(world);
        }
        Message::QueueReport(report) => queue_report(world, node, report, now, recorder, dirty),
        Message::Demand(demand) => demanded(world, node, demand, now, recorder, dirty),
        Message::ReplicaStatuses(statuses) => statuses_of(world, node, statuses, now, dirty),
        // Nothing is placed anew because of it: it counts where a place is looked for anyhow.
        Message::CacheReport(report) => {
            if let Some(state) = world.nodes.get_mut(node) {
                state.cached = report;
            }
        }
        Message::GpuReport(report) => {
            if let Some(state) = world.nodes.get_mut(node) {
                (state.gpu_report, state.gpu_reported_at) = (Some(report), now);
                dirty.reported_gpus.insert(node.to_owned());
            }
        }
        Message::RoutesApplied(applied) => {
            if let Some(state) = world.nodes.get_mut(node) {
                state.routes_applied = applied.version;
            }
        }
        // For metering alone.
        Message::ReplicaHistories(_) | Message::RequestCounters(_) => {}
        // Sessions handle these themselves.
        Message::Hello(_) | Message::LogChunk(_) | Message::ModelEvicted(_) | Message::TrustApplied(_) => {}
    }
}

fn queue_report(
    world: &mut World,
    node: &str,
    report: fleet::QueueReport,
    now: Timestamp,
    recorder: &mut Recorder,
    dirty: &mut Dirty,
) {
    let interval = report.interval.and_then(|i| std::time::Duration::try_from(i).ok()).unwrap_or_default();
    for load in report.revisions {
        for replica in &load.replicas {
            if let Some(state) = world.replicas.get_mut(&replica.replica) {
                state.running = replica.running;
            }
        }
        let Some(revision) = world.revisions.get_mut(&load.revision) else { continue };
        let waited = if load.queue_depth == 0 {
            revision.waiting.remove(node).is_some()
        } else {
            revision.waiting.insert(node.to_owned(), load.queue_depth) != Some(load.queue_depth)
        };
        if waited {
            dirty.services.insert(revision.record.service_key());
        }
        if load.request_count > 0 {
            revision.arrivals.observe(scaler_time(now));
        }
        let sample = Sample::of_report(&load, interval);
        let wakes = revision.wanted == 0 && sample.average_concurrency > 0.0;
        if let Some(scaler) = &mut revision.scaler {
            recorder.write(now, &load.revision, || Entry::Sample { sample });
            scaler.record(scaler_time(now), &sample);
        }
        if wakes {
            dirty.urgent.insert(load.revision);
        }
    }
}

/// A request waits for a revision with no ready replica: decide now, as part of its trace.
fn demanded(
    world: &mut World,
    node: &str,
    demand: fleet::Demand,
    now: Timestamp,
    recorder: &mut Recorder,
    dirty: &mut Dirty,
) {
    let Some(revision) = world.revisions.get_mut(&demand.revision) else { return };
    revision.waiting.insert(node.to_owned(), demand.waiting);
    revision.arrivals.observe(scaler_time(now));
    if revision.replicas.iter().any(|name| world.replicas.get(name).is_some_and(|replica| replica.record.asleep)) {
        // It may be wanted already, and sleep since others had its GPUs as long as nobody waited.
        dirty.revisions.insert(demand.revision.clone());
    }
    dirty.services.insert(revision.record.service_key());
    let further = !revision.record.component.is_predictor();
    let owner = model::service_key(&revision.record.namespace, &revision.record.service, Default::default());
    let trace = TraceContext { traceparent: demand.traceparent, tracestate: demand.tracestate };
    wake(world, &demand.revision, &trace, now, recorder, dirty);
    // What a transformer is asked it asks its predictor: both wake at the same time, not one after the other.
    let Some(predictor) = world.services.get(&owner).filter(|_| further) else { return };
    let asked = world.destinations(predictor).into_iter().filter(|target| target.percent > 0);
    let asked: Vec<_> = asked.map(|target| predictor.record.revision_key(target.revision)).collect();
    for revision in asked {
        wake(world, &revision, &trace, now, recorder, dirty);
    }
}

/// Counts a first request for a revision at zero, and has it decided upon at once.
fn wake(
    world: &mut World,
    key: &str,
    trace: &TraceContext,
    now: Timestamp,
    recorder: &mut Recorder,
    dirty: &mut Dirty,
) {
    let Some(revision) = world.revisions.get_mut(key).filter(|revision| revision.wanted == 0) else { return };
    revision.trace = trace.clone();
    if let Some(scaler) = &mut revision.scaler {
        recorder.write(now, key, || Entry::Poke);
        scaler.poke(scaler_time(now));
    }
    dirty.urgent.insert(key.to_owned());
}

/// The whole truth about one node's replicas.
fn statuses_of(world: &mut World, node: &str, statuses: fleet::ReplicaStatuses, now: Timestamp, dirty: &mut Dirty) {
    let Some(state) = world.nodes.get_mut(node) else { return };
    if !state.heard {
        state.heard = true;
        dirty.nodes.insert(node.to_owned());
    }
    let mut unreported = state.replicas.clone();
    let mut left_behind = std::mem::take(&mut state.left_behind);
    for status in statuses.replicas {
        unreported.remove(&status.replica);
        match world.replicas.get(&status.replica) {
            Some(replica) if replica.record.node == node => took(world, status, now, dirty),
            // Runs there, but is wanted elsewhere or not at all: the assignment says so, unless it is taken back.
            _ => {
                dirty.nodes.insert(node.to_owned());
                if let Some(record) = left_behind.remove(&status.replica) {
                    dirty.returned.push((record, status));
                } else if let Some((_, last)) = dirty.returned.iter_mut().find(|(it, _)| it.name == status.replica) {
                    *last = status;
                }
            }
        }
    }
    for name in unreported {
        let Some(replica) = world.replicas.get_mut(&name) else { continue };
        let revision = replica.record.revision.clone();
        // A draining replica that its agent no longer knows has ended.
        let ended = replica.record.draining;
        if replica.status.take().is_some() || ended {
            if ended {
                replica.status = Some(fleet::ReplicaStatus {
                    replica: name,
                    revision: revision.clone(),
                    phase: ReplicaPhase::Stopped.into(),
                    ..Default::default()
                });
            }
            dirty.revision(world, &revision);
        }
    }
}

/// Reasons of replicas that are being restarted since a probe has failed, or since they have lost their GPUs.
const RESTART_REASONS: [&str; 2] = ["Unhealthy", "GpuAccessLost"];

/// One replica's new status.
pub(super) fn took(world: &mut World, status: fleet::ReplicaStatus, now: Timestamp, dirty: &mut Dirty) {
    let Some(replica) = world.replicas.get_mut(&status.replica) else { return };
    if replica.status.as_ref() == Some(&status) {
        return;
    }
    let before = replica.phase();
    let phase = status.phase();
    let changed_rung = if replica.status.as_ref().map(|last| &last.transition) == Some(&status.transition) {
        None
    } else {
        status.transition
    };
    let woken = changed_rung.is_some_and(|it| it.from() == Rung::Asleep);
    // One that was ready before this coordinator began says nothing of how long it took.
    let took = (phase == ReplicaPhase::Ready && before != ReplicaPhase::Unspecified && !woken)
        .then(|| since(replica.record.created_at, now));
    let revision = replica.record.revision.clone();
    let service = model::service_key(&replica.record.namespace, &replica.record.service, Default::default());
    let name = status.replica.clone();
    let message = status.message.clone();
    let restarts = RESTART_REASONS.into_iter().find(|reason| status.reason == *reason);
    let restarts = restarts.filter(|_| phase == ReplicaPhase::Starting);
    let progress = replica.signs.progress(&status);
    match phase {
        ReplicaPhase::Failed => {
            dirty.warmth |= warmth::lacks_room(&status);
            replica.failure = Some(status.clone());
        }
        ReplicaPhase::Ready => replica.failure = None,
        _ => {}
    }
    let node = replica.record.node.clone();
    let draining = replica.record.draining;
    replica.status = Some(status.clone());
    if let Some(revision) = world.revisions.get_mut(&revision) {
        if progress {
            revision.progress_at = now;
        }
        match phase {
            _ if draining => {}
            ReplicaPhase::Failed => revision.failures.record(&status, &node, now),
            ReplicaPhase::Pending | ReplicaPhase::Fetching | ReplicaPhase::Starting | ReplicaPhase::Ready => {
                revision.failures.clear();
            }
            _ => {}
        }
    }
    if let (Some(it), Some(revision)) = (changed_rung, world.revisions.get_mut(&revision)) {
        warmth::measure(revision, &it);
    }
    dirty.revision(world, &revision);
    if before == phase {
        return;
    }
    if [before, phase].contains(&ReplicaPhase::Asleep) {
        dirty.metered.insert(name.clone());
        // Its GPUs may be free now.
        dirty.waiting_for_a_place(world);
    }
    if let (Some(took), Some(revision)) = (took, world.revisions.get_mut(&revision)) {
        revision.load_time = took;
    }
    let (warning, reason, message) = match phase {
        ReplicaPhase::Fetching => (false, "Fetching", "its models are fetched to the node".to_owned()),
        ReplicaPhase::Starting => match restarts {
            Some(reason) => (true, reason, format!("{message}; is restarted")),
            None => (false, "Started", "process started, waiting for readiness".to_owned()),
        },
        ReplicaPhase::Ready => (false, "Ready", "takes requests".to_owned()),
        ReplicaPhase::Asleep => (false, "Asleep", "sleeps until it is needed".to_owned()),
        ReplicaPhase::Failed => (true, "Failed", message),
        ReplicaPhase::Stopped => (false, "Stopped", "drained and stopped".to_owned()),
        ReplicaPhase::Unspecified | ReplicaPhase::Pending | ReplicaPhase::Draining => return,
    };
    world.note(&service, Event { time: now, warning, reason, object: format!("Replica/{name}"), message });
}
