//! All that the coordinator knows: desired state as stored, and what agents last said, in memory.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1 as fleet;
use pilotlight_telemetry::TraceContext;

use super::failures::Failures;
pub use super::node_state::NodeState;
use crate::{
    autoscaler::{Decision, Defaults, Scaler, ScalerConfig},
    eviction::{Arrivals, Costs},
    model::{
        ConditionRecord, ModelRecord, ReplicaRecord, RevisionKey, RevisionRecord, ServiceKey, ServiceRecord, owner,
        service_key,
    },
    rollout::{self, Policy, Signs, Target, progress},
    spec::{self, ComponentKind, IdleReplicas, PlacementPolicy},
    values::Values,
};

/// Decisions kept per revision for `describe`.
pub const DECISIONS_KEPT: usize = 50;
/// Events kept per service for `describe`.
pub const EVENTS_KEPT: usize = 50;

/// The whole state of one cell.
#[derive(Debug)]
pub struct World {
    /// What holds for every service.
    pub settings: Settings,
    /// Components of applied services.
    pub services: BTreeMap<ServiceKey, ServiceState>,
    /// Their revisions.
    pub revisions: BTreeMap<RevisionKey, RevisionState>,
    /// Replicas that shall exist, by name.
    pub replicas: BTreeMap<String, ReplicaState>,
    /// Nodes that have joined, by name.
    pub nodes: BTreeMap<String, NodeState>,
    /// What operators asked for of models, by node (`None`: all) and address.
    pub asked: BTreeMap<(Option<String>, String), ModelRecord>,
    /// Port of the URLs of services.
    pub ingress_port: u16,
}

/// What holds for every service of the cell.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Cell name.
    pub cell: String,
    /// Host suffix.
    pub domain: String,
    /// Port that clients use; 0: the one on which agents listen.
    pub ingress_port: u16,
    /// Requests one gateway may hold per revision.
    pub queue_limit: u32,
    /// Fleet-wide autoscaler defaults.
    pub scaling: Defaults,
    /// Silence after which a node is lost.
    pub node_lease: Duration,
    /// How replicas are placed unless their annotations say otherwise.
    pub placement_policy: PlacementPolicy,
    /// What becomes of a service's last replica once nobody needs it, unless its annotations say.
    pub idle_replicas: IdleReplicas,
    /// Values of secrets and config maps, for assignments.
    pub values: Arc<Values>,
}

#[cfg(test)]
impl Settings {
    /// A cell "test" whose nodes are never lost.
    pub(crate) fn for_tests() -> Self {
        Self {
            cell: "test".into(),
            domain: "test".into(),
            ingress_port: 80,
            queue_limit: 10,
            scaling: Defaults::default(),
            node_lease: Duration::from_secs(1_000_000),
            placement_policy: PlacementPolicy::BinPack,
            idle_replicas: IdleReplicas::Stop,
            values: Default::default(),
        }
    }
}

/// One component of a service; its predictor stands for the service as a whole.
#[derive(Debug)]
pub struct ServiceState {
    /// As stored.
    pub record: ServiceRecord,
    /// Numbers of its revisions that still exist.
    pub revisions: BTreeSet<u32>,
    /// Whether the service's conditions held when last looked at, and since when. Only with predictors.
    pub conditions: BTreeMap<String, ConditionRecord>,
    /// Shares of its requests when last looked at, for telling of changes.
    pub shares: Vec<Target>,
    /// What happened lately to the service, oldest first. Only with predictors.
    pub events: VecDeque<Event>,
}

/// Something that happened to a service, in the shape of Kubernetes' events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: Timestamp,
    /// True for `Warning`, false for `Normal`.
    pub warning: bool,
    /// CamelCase.
    pub reason: &'static str,
    /// `<kind>/<name>`.
    pub object: String,
    /// For people.
    pub message: String,
}

/// One revision.
#[derive(Debug)]
pub struct RevisionState {
    /// As stored.
    pub record: RevisionRecord,
    /// Resolved from the revision's annotations and the fleet's defaults.
    pub scaling: ScalerConfig,
    /// Made at the first decision after the fleet has settled.
    pub scaler: Option<Scaler>,
    /// Replicas that the last decision asks for.
    pub wanted: u32,
    /// How long its newest ready replica took from being placed; zero before the first.
    pub load_time: Duration,
    /// When it was asked for, as far as that says something of the next time.
    pub arrivals: Arrivals,
    /// How long its replicas really took to serve, from each rung.
    pub costs: Costs,
    /// The last decisions, oldest first.
    pub decisions: VecDeque<(Timestamp, Decision)>,
    /// Its replicas, draining ones included.
    pub replicas: BTreeSet<String>,
    /// Why some wanted replicas have no place, empty where all have.
    pub unplaced: Option<String>,
    /// Why its last attempts failed, and where.
    pub failures: Failures,
    /// Replicas that the roll-out of the service leaves it; `None` is as many as are wanted.
    pub most: Option<u32>,
    /// True where only the promise of a warm replica keeps it from taking another revision's place.
    pub kept_out: bool,
    /// When it last showed a sign of progress.
    pub progress_at: Timestamp,
    /// Requests waiting for it, by node, as last reported.
    pub waiting: BTreeMap<String, u64>,
    /// Trace of the request that woke it, until a replica has been started for it.
    pub trace: TraceContext,
}

/// One replica.
#[derive(Debug)]
pub struct ReplicaState {
    /// As stored.
    pub record: ReplicaRecord,
    /// What its agent last said of it; `None` until then.
    pub status: Option<fleet::ReplicaStatus>,
    /// What it has shown so far.
    pub signs: Signs,
    /// What its agent said when it last failed; `None` once it was ready again.
    pub failure: Option<fleet::ReplicaStatus>,
    /// Requests running on it, as last reported.
    pub running: u64,
    /// Trace of the decision that made or woke it.
    pub trace: TraceContext,
    /// True where it sleeps so that others have its GPUs: it wakes once somebody waits for it.
    pub yielded: bool,
    /// What is lost where it makes room: seconds of waiting to be expected, as of the last look
    /// ([`super::warmth`]).
    pub worth: f64,
}

impl ServiceState {
    /// A service whose revisions are not yet known.
    pub fn new(record: ServiceRecord) -> Self {
        Self {
            record,
            revisions: Default::default(),
            conditions: Default::default(),
            shares: Vec::new(),
            events: Default::default(),
        }
    }
}

impl ReplicaState {
    /// The phase last reported; unspecified before the first report.
    pub fn phase(&self) -> fleet::ReplicaPhase {
        self.status.as_ref().map_or(fleet::ReplicaPhase::Unspecified, fleet::ReplicaStatus::phase)
    }

    /// True where it sleeps, as it shall.
    pub fn sleeps(&self) -> bool {
        self.record.asleep && self.phase() == fleet::ReplicaPhase::Asleep
    }

    /// True where it sleeps without its GPUs: others may have them.
    pub fn has_released_gpu(&self) -> bool {
        let holds = self.status.as_ref().is_none_or(|status| status.holds_gpu_memory);
        self.sleeps() && !holds
    }

    /// True where it takes requests.
    pub fn ready(&self) -> bool {
        !self.record.draining && !self.record.asleep && self.phase() == fleet::ReplicaPhase::Ready
    }
}

impl RevisionState {
    /// Replicas that make it ready, where there is room for them.
    pub fn needed(&self) -> u32 {
        let most = if self.scaling.max_scale() == 0 { u32::MAX } else { self.scaling.max_scale() };
        progress::needed(self.scaling.initial_scale(), self.scaling.min_scale()).min(most)
    }

    /// True while somebody waits for an answer of it.
    pub fn awaited(&self) -> bool {
        self.waiting.values().any(|waiting| *waiting > 0)
    }

    /// Replicas that it shall have now.
    pub fn allowed(&self) -> u32 {
        self.most.map_or(self.wanted, |most| most.min(self.wanted))
    }

    /// True while it takes over from others one replica at a time.
    pub fn replaces_in_place(&self) -> bool {
        self.record.in_place && !self.record.been_ready && self.record.failed.is_none()
    }
}

/// How many replicas of a revision are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Take requests.
    pub ready: u32,
    /// Placed, not ready yet (starting, failing, or not yet reported).
    pub starting: u32,
    /// Finish and leave.
    pub draining: u32,
    /// Sleep, or are about to.
    pub asleep: u32,
}

impl Counts {
    /// Those that serve or will.
    pub fn live(&self) -> u32 {
        self.ready + self.starting
    }
}

/// How many replicas of a revision sleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sleepers {
    /// Whatever happens; those that are missing are started, and put to sleep.
    pub promised: u32,
    /// As long as nobody needs their room: no more than so many stay where they are there already.
    pub most: u32,
}

impl World {
    /// An empty cell.
    pub fn new(settings: Settings) -> Self {
        let mut world = Self {
            ingress_port: 0,
            settings,
            services: BTreeMap::new(),
            revisions: BTreeMap::new(),
            replicas: BTreeMap::new(),
            nodes: BTreeMap::new(),
            asked: BTreeMap::new(),
        };
        world.update_ingress_port();
        world
    }

    /// Counts the replicas of a revision.
    pub fn counts(&self, revision: &RevisionState) -> Counts {
        let mut counts = Counts::default();
        for replica in revision.replicas.iter().filter_map(|name| self.replicas.get(name)) {
            match () {
                () if replica.record.draining => counts.draining += 1,
                () if replica.record.asleep => counts.asleep += 1,
                () if replica.ready() => counts.ready += 1,
                () => counts.starting += 1,
            }
        }
        counts
    }

    /// One of a service's revisions.
    pub fn revision_of(&self, service: &ServiceState, number: u32) -> Option<&RevisionState> {
        self.revisions.get(&service.record.revision_key(number))
    }

    /// The newest of a service's revisions, whatever its state.
    pub fn newest(&self, service: &ServiceState) -> Option<&RevisionState> {
        self.revision_of(service, service.record.latest_revision)
    }

    /// What the service's annotations say about its roll-out.
    pub fn policy(&self, service: &ServiceState) -> Policy {
        Policy::resolve(service.record.annotations(), self.settings.scaling.progress_deadline)
    }

    /// Shares of a service's requests; empty where no revision was ever ready, or the service is stopped.
    pub fn targets(&self, service: &ServiceState) -> Vec<Target> {
        let mut targets = self.steady_targets(service);
        if let Some(newest) = self.newest(service).filter(|newest| newest.replaces_in_place()) {
            let ready = self.counts(newest).ready;
            let share = progress::share_in_place(newest.needed(), ready, service.record.canary());
            rollout::shift(&mut targets, newest.record.number, share);
        }
        targets
    }

    /// The same, leaving out a revision that is about to replace others one replica at a time.
    pub fn steady_targets(&self, service: &ServiceState) -> Vec<Target> {
        if service.record.service.stopped {
            return Vec::new();
        }
        if let Some(shares) = service.record.shares() {
            let ready = |number| self.revision_of(service, number).is_some_and(|revision| revision.record.been_ready);
            return rollout::by_shares(service.record.latest_ready, &shares, ready);
        }
        let tag_latest = rollout::policy::tag_latest(service.record.annotations());
        rollout::split(&service.record.history(), service.record.spec().canary_traffic_percent, tag_latest)
    }

    /// Where requests go: [`World::targets`], and before anything was ready the newest revision, where
    /// they wait unless it has failed.
    pub fn destinations(&self, service: &ServiceState) -> Vec<Target> {
        let targets = self.targets(service);
        if !targets.is_empty() || service.record.service.stopped {
            return targets;
        }
        let newest = self.newest(service).filter(|newest| newest.record.failed.is_none());
        newest
            .map(|newest| Target { revision: newest.record.number, percent: 100, latest: true, tag: None })
            .into_iter()
            .collect()
    }

    /// True where the revision takes traffic or is the one being rolled out (Knative's reachability).
    pub fn reachable(&self, revision: &RevisionState) -> bool {
        let number = revision.record.number;
        self.services.get(&revision.record.service_key()).is_some_and(|service| {
            !service.record.service.stopped
                && (number == service.record.latest_revision
                    || self.steady_targets(service).iter().any(|target| target.revision == number))
        })
    }

    /// True where the revision shall have no replicas, whoever asks for it: it has failed, was replaced
    /// before it was ever ready, or its service is stopped or gone.
    pub fn retired(&self, revision: &RevisionState) -> bool {
        let record = &revision.record;
        record.failed.is_some()
            || self.services.get(&record.service_key()).is_none_or(|service| {
                let replaced = !record.been_ready && record.number != service.record.latest_revision;
                replaced || service.record.service.stopped
            })
    }

    /// How many replicas of a revision sleep, where so many serve or will.
    pub fn sleepers(&self, revision: &RevisionState, serving: u32) -> Sleepers {
        match self.asked_warm(revision) {
            Some(_) => {
                let promised = self.promised_sleepers(revision, serving);
                Sleepers { promised, most: promised }
            }
            None => {
                let may = self.settings.idle_replicas == IdleReplicas::Sleep && serving == 0;
                // Where a newer revision takes its place, it goes.
                let last = may && revision.most.is_none() && self.may_sleep(revision);
                Sleepers { promised: 0, most: u32::from(last) }
            }
        }
    }

    /// How many of a revision's replicas sleep at least, where so many serve or will.
    pub fn promised_sleepers(&self, revision: &RevisionState, serving: u32) -> u32 {
        let missing = self.asked_warm(revision).unwrap_or(0).saturating_sub(serving);
        if missing > 0 && self.may_sleep(revision) { missing } else { 0 }
    }

    /// True where a sleeper is one of those that are promised, and so stays.
    pub fn keeps_promise(&self, revision: &RevisionState, replica: &ReplicaState) -> bool {
        let promised = self.promised_sleepers(revision, revision.allowed()) as usize;
        let sleepers = revision.replicas.iter().filter_map(|name| self.replicas.get(name));
        let mut sleepers = sleepers.filter(|other| other.record.asleep && !other.record.draining);
        sleepers.by_ref().take(promised).any(|other| other.record.name == replica.record.name)
    }

    /// Returns `true` if a replica that sleeps does so because its service asks for it, and not only as long as nobody
    /// needs its room.
    pub fn sleeps_on_request(&self, replica: &ReplicaState) -> bool {
        let revision = self.revisions.get(&replica.record.revision);
        revision.is_some_and(|revision| self.keeps_promise(revision, replica))
    }

    fn asked_warm(&self, revision: &RevisionState) -> Option<u32> {
        spec::warm_replicas(self.services.get(&revision.record.service_key())?.record.annotations())
    }

    fn may_sleep(&self, revision: &RevisionState) -> bool {
        revision.record.been_ready && self.reachable(revision)
    }

    /// True once every known node has told what runs there, or its lease has run out. Before that
    /// nothing may be scaled down, since replicas that run may not have been reported yet.
    pub fn settled(&self, now: Timestamp) -> bool {
        self.nodes.values().all(|node| node.heard || node.lost(self.settings.node_lease, now))
    }

    /// Puts a replica into the world and its indices.
    pub fn insert_replica(&mut self, record: ReplicaRecord, trace: TraceContext) {
        if let Some(revision) = self.revisions.get_mut(&record.revision) {
            revision.replicas.insert(record.name.clone());
        }
        if let Some(node) = self.nodes.get_mut(&record.node) {
            node.replicas.insert(record.name.clone());
        }
        let state = ReplicaState {
            record,
            status: None,
            signs: Signs::default(),
            failure: None,
            running: 0,
            trace,
            yielded: false,
            worth: 0.0,
        };
        self.replicas.insert(state.record.name.clone(), state);
    }

    /// Takes a replica out of the world and its indices.
    pub fn remove_replica(&mut self, name: &str) -> Option<ReplicaRecord> {
        let replica = self.replicas.remove(name)?;
        if let Some(revision) = self.revisions.get_mut(&replica.record.revision) {
            revision.replicas.remove(name);
        }
        if let Some(node) = self.nodes.get_mut(&replica.record.node) {
            node.replicas.remove(name);
        }
        Some(replica.record)
    }

    /// The component that a replica is of.
    pub fn component_of(&self, replica: &ReplicaRecord) -> ServiceKey {
        let component = self.revisions.get(&replica.revision).map(|revision| revision.record.component);
        service_key(&replica.namespace, &replica.service, component.unwrap_or_default())
    }

    /// All components of a service, its predictor first.
    pub fn components<'a>(&'a self, service: &'a ServiceState) -> impl Iterator<Item = &'a ServiceState> {
        let spec = &service.record.service;
        let key = |kind| service_key(&spec.namespace, &spec.name, kind);
        ComponentKind::ALL.into_iter().filter_map(move |kind| self.services.get(&key(kind)))
    }

    /// The revisions that there are of a service, those of all its components.
    pub fn revisions_of<'a>(&'a self, service: &'a ServiceState) -> impl Iterator<Item = &'a RevisionState> {
        self.components(service)
            .flat_map(|component| component.revisions.iter().filter_map(|number| self.revision_of(component, *number)))
    }

    /// Records an event of a service or one of its components, as [`record_event`] does.
    pub fn note(&mut self, service: &str, event: Event) {
        let Some(service) = self.services.get_mut(owner(service)) else { return };
        record_event(&mut service.events, event);
    }
}

/// Adds an event. The oldest are removed if there are more than [`EVENTS_KEPT`]. An event that only repeats the newest
/// one replaces it.
pub(super) fn record_event(events: &mut VecDeque<Event>, event: Event) {
    if events
        .back()
        .is_some_and(|last| last.reason == event.reason && last.object == event.object && last.message == event.message)
    {
        events.pop_back();
    }
    events.push_back(event);
    while events.len() > EVENTS_KEPT {
        events.pop_front();
    }
}

/// Time from `earlier` to `later`, zero where the order is the other way.
pub fn since(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or(Duration::ZERO)
}
