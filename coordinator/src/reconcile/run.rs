//! The loop: takes inputs one at a time, lets the pure functions decide, writes, then tells.
//!
//! It is the only writer of services, revisions and replicas. What is in memory is changed only after
//! the store has taken it, so that a failed write leaves nothing half done: the same revisions are
//! simply planned again at the next tick.

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, coordinator_message::Message as ToAgent};
use pilotlight_telemetry::TraceContext;
use tokio::{
    sync::{broadcast, mpsc},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info_span, warn};

use super::{
    answer::Unanswered,
    clock::Clock,
    commands::{Change, Input},
    metering,
    observe::{self, Dirty},
    plan,
    push::RoutePush,
    record::Recorder,
    routes, scale, view, warmth,
    world::{Event, NodeState, Settings, World, since},
};
use crate::{
    fleet::SessionHandle,
    metrics::CoordinatorMetrics,
    model::{NodeRecord, RevisionKey, keys, owner},
    store::{Store, StoreError, Transaction},
    usage::Meter,
};

/// Time between two looks at how long sessions have been silent.
const SILENCE_INTERVAL: Duration = Duration::from_secs(1);
/// Inputs handled before the loop acts on them together.
const INPUTS_AT_ONCE: usize = 256;
/// Writes in one transaction; etcd takes 128 operations by default, compares included.
pub(super) const WRITES_AT_ONCE: usize = 50;

/// The loop and all it owns.
pub struct Reconciler {
    pub(super) world: World,
    pub(super) store: Arc<dyn Store>,
    pub(super) clock: Clock,
    pub(super) dirty: Dirty,
    pub(super) changes: broadcast::Sender<Change>,
    pub(super) recorder: Recorder,
    pub(super) metrics: CoordinatorMetrics,
    pub(super) meter: Meter,
    /// When it was last looked at what idle models hold.
    pub(super) warmed_at: Timestamp,
    pub(super) routes: RoutePush,
    /// When it was last looked at how long sessions have been silent.
    pub(super) looked_at: Timestamp,
    pub(super) tick: Duration,
    pub(super) report_interval: Duration,
    pub(super) inputs: mpsc::Receiver<Input>,
    /// Applies whose answers wait for gateways.
    pub(super) unanswered: Vec<Unanswered>,
}

/// What the loop is made with.
pub struct Setup {
    /// Where desired state is kept.
    pub store: Arc<dyn Store>,
    /// What holds for every service.
    pub settings: Settings,
    /// Time between decisions.
    pub tick: Duration,
    /// What agents are told to report at.
    pub report_interval: Duration,
    /// Where the autoscaler's inputs are written down.
    pub recorder: Recorder,
    /// The loop's end of a `Handle`.
    pub inputs: mpsc::Receiver<Input>,
    /// Where watchers are told of changes.
    pub changes: broadcast::Sender<Change>,
}

impl Reconciler {
    /// Records what the loop does in these metrics.
    #[must_use]
    pub fn with_metrics(self, metrics: CoordinatorMetrics) -> Self {
        Self { metrics, ..self }
    }

    /// Runs until stopped. What it knows can then still be read; see [`Reconciler::answer_reads`].
    pub async fn run(mut self, stopping: CancellationToken) -> Self {
        let mut ticks = tokio::time::interval(self.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let began;
            tokio::select! {
                () = stopping.cancelled() => break,
                _ = ticks.tick() => {
                    began = Instant::now();
                    self.observe_silence(self.clock.now());
                    self.on_tick().await;
                }
                () = self.routes.due() => began = Instant::now(),
                input = self.inputs.recv() => {
                    let Some(input) = input else { break };
                    began = Instant::now();
                    self.observe_silence(self.clock.now());
                    self.take(input).await;
                    for _ in 1..INPUTS_AT_ONCE {
                        let Ok(input) = self.inputs.try_recv() else { break };
                        self.take(input).await;
                    }
                }
            }
            self.act().await;
            self.metrics.record_loop(began.elapsed(), self.inputs.len());
        }
        self.write_all_usage(self.clock.now()).await;
        self.recorder.flush();
        self
    }

    async fn take(&mut self, input: Input) {
        let now = self.clock.now();
        match input {
            Input::Connected { session, hello } => self.connected(session, *hello, now).await,
            Input::Disconnected { node, session } => self.disconnected(&node, session, now),
            Input::Heard { node, session, message } => {
                let current = self.world.nodes.get(&node).and_then(|node| node.session.as_ref());
                if current.is_some_and(|current| current.id == session) {
                    metering::observe(&mut self.meter, &self.world, &node, &message, now);
                    observe::hear(&mut self.world, &node, message, now, &mut self.recorder, &mut self.dirty);
                }
            }
            Input::Apply { service, dry_run, reply } => {
                let result = self.apply(*service, dry_run, now).await;
                self.answer_later(result, dry_run, now, reply);
            }
            Input::Delete { key, reply } => {
                let _ = reply.send(self.delete(&key).await);
            }
            Input::SetAvailability { node, availability, reply } => {
                let _ = reply.send(self.set_availability(&node, availability).await);
            }
            Input::UnquarantineGpu { node, gpu, reply } => {
                let _ = reply.send(self.unquarantine_gpu(&node, &gpu, now).await);
            }
            Input::DeleteNode { node, reply } => {
                let _ = reply.send(self.delete_node(&node, now).await);
            }
            Input::ChangeModel { uri, node, change, reply } => {
                let _ = reply.send(self.change_model(uri, node, change).await);
            }
            Input::LetGo { replicas, reply } => {
                let _ = reply.send(self.let_go(replicas, now).await);
            }
            Input::ValuesChanged { namespace } => self.values_changed(&namespace),
            Input::Usage { reply } => {
                let _ = reply.send(self.live_usage(now));
            }
            Input::Read(look) => look(&self.world, now),
        }
    }

    async fn connected(&mut self, session: SessionHandle, hello: fleet::Hello, now: Timestamp) {
        let name = session.node.clone();
        if !self.world.nodes.contains_key(&name) {
            let record = NodeRecord::new(&name, now);
            let write = Transaction::new().put_json(&keys::node(&name), &record);
            if let Err(error) = self.commit(write).await {
                warn!(node = %name, %error, "cannot record the node; it has to connect again");
                session.close();
                return;
            }
            self.world.nodes.insert(name.clone(), NodeState::unheard(record, now));
        }
        let welcome = fleet::Welcome {
            cell: self.world.settings.cell.clone(),
            report_interval: Some(routes::duration(self.report_interval)),
            node_lease: Some(routes::duration(self.world.settings.node_lease)),
            time: Some(view::timestamp(now)),
        };
        let told = session.tell(ToAgent::Welcome(welcome));
        self.meter_connected(&name, &hello, now);
        session.follow_routes(self.routes.feed());
        let Some(node) = self.world.nodes.get_mut(&name) else { return };
        if let Some(former) = node.session.take() {
            former.close();
        }
        node.last_seen = now;
        if node.hello.boot_id != hello.boot_id {
            node.gpu_report = None;
        }
        node.hello = hello;
        node.session = told.then_some(session);
        node.routes_applied = 0;
        self.world.update_ingress_port();
        self.dirty.nodes.insert(name);
        self.dirty.peers = true;
    }

    fn disconnected(&mut self, name: &str, session: u64, now: Timestamp) {
        let Some(node) = self.world.nodes.get_mut(name) else { return };
        if node.session.as_ref().is_some_and(|current| current.id == session) {
            node.session = None;
            node.last_seen = now;
            self.meter.disconnect(name);
            self.world.update_ingress_port();
        }
    }

    /// Takes in which sessions are silent. A loop that stood still (a paused machine, a store that was slow) cannot tell
    /// silent agents from messages that were not read: the leases of all nodes then start again.
    fn observe_silence(&mut self, now: Timestamp) {
        let stood_still = since(self.looked_at, now) > self.world.settings.node_lease / 2;
        if stood_still {
            warn!(time = ?since(self.looked_at, now), "the control loop stood still; the leases of all nodes begin anew");
        }
        if stood_still || since(self.looked_at, now) >= SILENCE_INTERVAL {
            for node in self.world.nodes.values_mut() {
                node.observe_silence(now);
                if stood_still && !node.lost(self.world.settings.node_lease, self.looked_at) {
                    node.last_seen = now;
                }
            }
            self.looked_at = now;
        }
    }

    async fn on_tick(&mut self) {
        let now = self.clock.now();
        let made = scale::decide_all(&mut self.world, now, &mut self.recorder, &mut self.dirty);
        self.metrics.record_decisions(made);
        self.give_up(now).await;
        // Wishes that are open, and replicas on nodes that drain or may have been lost meanwhile.
        self.dirty.waiting_for_a_place(&self.world);
        let lease = self.world.settings.node_lease;
        let to_leave = self.world.nodes.values().filter(|node| node.lost(lease, now) || node.moves_replicas());
        let orphans = to_leave.flat_map(|node| &node.replicas).filter_map(|name| self.world.replicas.get(name));
        let orphaned: Vec<_> = orphans.map(|replica| replica.record.revision.clone()).collect();
        self.dirty.revisions.extend(orphaned);
        self.dirty.warmth |= since(self.warmed_at, now) >= warmth::INTERVAL;
        self.write_due_usage(now).await;
        self.recorder.flush();
    }

    /// Acts on all that has changed.
    async fn act(&mut self) {
        let now = self.clock.now();
        self.quarantine_gpus(now).await;
        self.take_back(now).await;
        self.promote(now).await;
        if self.dirty.warmth && self.world.settled(now) {
            (self.dirty.warmth, self.warmed_at) = (false, now);
            if let Err(error) = self.keep_warm(now).await {
                warn!(%error, "cannot write which sleepers leave; will be tried again");
            }
        }
        self.note_shares(now);
        let mut pass = scale::Pass::default();
        for key in std::mem::take(&mut self.dirty.urgent) {
            let trace = self.world.revisions.get(&key).map(|revision| revision.trace.clone()).unwrap_or_default();
            let span = info_span!("autoscaler.decide", otel.kind = "internal", revision = %key);
            pilotlight_telemetry::set_parent(&span, &trace);
            let changed = span.in_scope(|| scale::decide(&mut self.world, &key, now, &mut self.recorder, &mut pass));
            if changed {
                if let Some(revision) = self.world.revisions.get_mut(&key) {
                    revision.trace = TraceContext::of(&span);
                }
                self.dirty.revision(&self.world, &key);
            }
        }
        self.metrics.record_decisions(pass.decisions);
        if !self.dirty.revisions.is_empty() {
            self.replan(now).await;
        }
        for name in std::mem::take(&mut self.dirty.metered) {
            metering::intend(&mut self.meter, &self.world, &name, now);
        }
        self.push();
        self.answer(now);
        // Gateways do not wait for what only people read.
        self.remember_conditions(now).await;
        self.publish();
    }

    async fn replan(&mut self, now: Timestamp) {
        let revisions = std::mem::take(&mut self.dirty.revisions);
        let mut plan = plan::plan(&self.world, &revisions, now);
        if !self.world.settled(now) {
            plan.keep_all();
        }
        for (key, why) in std::mem::take(&mut plan.unplaced) {
            self.note_unplaced(&key, why, now);
        }
        let services = revisions.iter().filter_map(|key| Some(self.world.revisions.get(key)?.record.service_key()));
        let services = services.collect();
        let starting = plan.starting(&self.world);
        if let Err(error) = self.carry_out(plan, now).await {
            error!(%error, "cannot write the plan; will be planned again");
            self.note_unrecorded(starting, &error, now);
            self.dirty.revisions.extend(revisions);
            return;
        }
        for key in &revisions {
            let Some(revision) = self.world.revisions.get_mut(key) else { continue };
            if revision.failures.clear_unrecorded() {
                self.dirty.services.insert(revision.record.service_key());
            }
        }
        self.make_room(services, now).await;
    }

    /// Has gateways answer requests for revisions of which no replica can be started or woken, since the store is away.
    fn note_unrecorded(&mut self, revisions: BTreeSet<RevisionKey>, error: &StoreError, now: Timestamp) {
        for key in revisions {
            let live = self.world.revisions.get(&key).is_some_and(|revision| self.world.counts(revision).live() > 0);
            let Some(revision) = self.world.revisions.get_mut(&key).filter(|_| !live) else { continue };
            revision.failures.record_unrecorded(&error.to_string(), now);
            self.dirty.services.insert(revision.record.service_key());
        }
    }

    fn note_unplaced(&mut self, key: &str, why: Option<String>, now: Timestamp) {
        let Some(revision) = self.world.revisions.get_mut(key) else { return };
        if revision.unplaced == why {
            return;
        }
        let service = revision.record.service_key();
        let object = format!("Revision/{}", revision.record.name);
        revision.unplaced.clone_from(&why);
        if let Some(message) = why {
            self.world.note(&service, Event { time: now, warning: true, reason: "FailedScheduling", object, message });
        }
        self.dirty.services.insert(service);
    }

    pub(super) async fn commit(&self, write: Transaction) -> Result<(), StoreError> {
        if write.is_empty() {
            return Ok(());
        }
        self.store.commit(write).await.map(drop)
    }

    /// Tells watchers.
    fn publish(&mut self) {
        for key in std::mem::take(&mut self.dirty.services) {
            if owner(&key) == key && self.world.services.contains_key(&key) {
                // Nobody may be watching.
                let _ = self.changes.send(Change::Updated(key));
            }
        }
    }
}
