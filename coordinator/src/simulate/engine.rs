//! The virtual world outside the coordinator: events in order of time, and what follows from each.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase, agent_message::Message};

use super::{
    Scenario, ScenarioError, fleet as machines,
    outcome::{Outcome, Point, Ran, Served, Tally},
    service::{ReplicaId, RequestId, VirtualService},
    setup::{add, named, settings},
    trace::Work,
    usage::{Life, Metered, Metering},
};
use crate::{
    model::ReplicaRecord,
    reconcile::{
        observe::{self, Dirty},
        plan,
        record::Recorder,
        scale,
        world::World,
    },
};

/// Simulates a scenario from its first request until its tail is over.
///
/// # Errors
/// The scenario contradicts itself.
pub fn run(scenario: &Scenario) -> Result<Outcome, ScenarioError> {
    let mut engine = Engine::new(scenario)?;
    engine.play();
    Ok(engine.outcome())
}

/// The same, and what is metered. The coordinator's meter is lost and read again from what it had written after each
/// `term`.
///
/// # Errors
/// As [`run`].
pub fn run_metered(scenario: &Scenario, term: Duration) -> Result<Metered, ScenarioError> {
    let mut engine = Engine::new(scenario)?;
    engine.schedule(term, Event::FailOver(term));
    engine.play();
    let lives = engine.replicas.iter().map(|replica| replica.life.clone()).collect();
    let end = engine.time();
    Ok(engine.metering.finish(end, engine.now, lives))
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(RequestId),
    Complete(ReplicaId, RequestId),
    Ready(ReplicaId),
    Report,
    Tick,
    /// Another leader takes over, and again after each such time.
    FailOver(Duration),
}

#[derive(Debug)]
struct VirtualReplica {
    name: String,
    node: String,
    service: usize,
    phase: ReplicaPhase,
    running: u32,
    ran: Ran,
    life: Life,
}

impl VirtualReplica {
    fn enter(&mut self, phase: ReplicaPhase, now: Duration) {
        self.phase = phase;
        self.life.push((now, phase));
    }
}

struct Engine<'a> {
    scenario: &'a Scenario,
    world: World,
    recorder: Recorder,
    dirty: Dirty,
    metering: Metering,
    /// Index of the service for each name of the trace.
    asked: Vec<usize>,
    services: Vec<VirtualService>,
    replicas: Vec<VirtualReplica>,
    /// Those that are there; `replicas` has those that were, too.
    by_name: BTreeMap<String, ReplicaId>,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    sequence: u64,
    now: Duration,
    end: Duration,
    tallies: Vec<Tally>,
}

impl<'a> Engine<'a> {
    fn new(scenario: &'a Scenario) -> Result<Self, ScenarioError> {
        let interval = Duration::from_millis(10)..=Duration::from_secs(600);
        for (name, value) in [("tick", scenario.tick), ("report-interval", scenario.report_interval)] {
            if !interval.contains(&value) {
                return Err(ScenarioError::Interval(name));
            }
        }
        scenario.scaling.validate().map_err(|wrong| ScenarioError::Settings(wrong.join("; ")))?;
        let asked = scenario.trace.services.iter().map(|name| named(scenario, name)).collect::<Result<_, _>>()?;
        let mut world = World::new(settings(scenario));
        machines::join(&mut world, &scenario.nodes, scenario.trace.epoch);
        let mut services = Vec::new();
        for service in &scenario.services {
            services.push(add(&mut world, service, scenario.trace.epoch)?);
        }
        let last = scenario.trace.requests.last().map_or(Duration::ZERO, |request| request.at);
        let tallies = services.iter().map(|_| Tally::default()).collect();
        let mut engine = Self {
            scenario,
            world,
            recorder: Recorder::in_memory(),
            dirty: Dirty::default(),
            metering: Metering::default(),
            asked,
            services,
            replicas: Vec::new(),
            by_name: BTreeMap::new(),
            events: BinaryHeap::new(),
            sequence: 0,
            now: Duration::ZERO,
            end: last + scenario.tail,
            tallies,
        };
        engine.schedule(Duration::ZERO, Event::Tick);
        engine.schedule(scenario.report_interval, Event::Report);
        engine.next_arrival(0);
        Ok(engine)
    }

    fn schedule(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn next_arrival(&mut self, request: RequestId) {
        if let Some(next) = self.scenario.trace.requests.get(request) {
            self.schedule(next.at, Event::Arrive(request));
        }
    }

    fn time(&self) -> Timestamp {
        self.scenario.trace.epoch.checked_add(self.now).unwrap_or(Timestamp::MAX)
    }

    fn play(&mut self) {
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at > self.end {
                break;
            }
            self.now = at;
            match event {
                Event::Arrive(request) => self.arrive(request),
                Event::Complete(replica, request) => self.complete(replica, request),
                Event::Ready(replica) => self.ready(replica),
                Event::Report => self.report(),
                Event::Tick => self.tick(),
                Event::FailOver(term) => self.fail_over(term),
            }
            self.act();
        }
        self.now = self.end;
    }

    fn hear(&mut self, node: &str, message: Message) {
        let now = self.time();
        self.metering.observe(&self.world, node, &message, now);
        observe::hear(&mut self.world, node, message, now, &mut self.recorder, &mut self.dirty);
    }

    /// The node whose gateway all requests enter by.
    fn gateway(&self) -> String {
        self.world.nodes.keys().next().cloned().unwrap_or_default()
    }

    fn ready_replicas(&self) -> impl Iterator<Item = &VirtualReplica> {
        let there = self.by_name.values().map(|id| &self.replicas[*id]);
        there.filter(|replica| replica.phase == ReplicaPhase::Ready)
    }

    fn tokens(&self, request: RequestId) -> (f64, f64) {
        match self.scenario.trace.requests[request].work {
            Work::Tokens { prompt, generated } => (f64::from(prompt), f64::from(generated)),
            Work::Duration(_) | Work::Unknown => (0.0, 0.0),
        }
    }

    fn arrive(&mut self, request: RequestId) {
        self.next_arrival(request + 1);
        let index = self.asked[self.scenario.trace.requests[request].service];
        let (prompt, _) = self.tokens(request);
        let cold = !self.ready_replicas().any(|replica| replica.service == index);
        self.tallies[index].came(cold);
        let (limit, service) = (self.scenario.queue_limit, &mut self.services[index]);
        if service.waiting.len() >= limit && !service.has_slot() {
            self.tallies[index].shed += 1;
            return;
        }
        service.arrive(request, prompt, self.now);
        self.dispatch(index);
        if cold {
            let revision = self.services[index].revision.clone();
            let demand = fleet::Demand { revision, waiting: 1, ..Default::default() };
            let gateway = self.gateway();
            self.hear(&gateway, Message::Demand(demand));
        }
    }

    /// Binds those who wait to free slots.
    fn dispatch(&mut self, index: usize) {
        self.give_up(index);
        while let Some(replica) = self.services[index].free() {
            let Some(request) = self.services[index].leave_line(self.now) else { return };
            let (_, generated) = self.tokens(request);
            let arrived = self.scenario.trace.requests[request].at;
            let time = self.scenario.model.time_of(self.scenario.trace.requests[request].work);
            let running = self.replicas[replica].running;
            self.replicas[replica].running += 1;
            let service = &mut self.services[index];
            service.begin(generated, self.now);
            service.slots(replica, running, Some(running + 1));
            self.tallies[index].served.push(Served { arrived, began: self.now, time });
            self.schedule(self.now + time, Event::Complete(replica, request));
        }
    }

    /// Those who have waited for their whole timeout get 504.
    fn give_up(&mut self, index: usize) {
        while let Some(request) = self.services[index].waiting.front().copied() {
            let waited = self.now - self.scenario.trace.requests[request].at;
            if waited < self.services[index].timeout {
                return;
            }
            let (prompt, _) = self.tokens(request);
            let service = &mut self.services[index];
            service.leave_line(self.now);
            service.timed_out(prompt, self.now);
            self.tallies[index].timed_out += 1;
        }
    }

    fn complete(&mut self, id: ReplicaId, request: RequestId) {
        let tokens = self.tokens(request);
        let replica = &mut self.replicas[id];
        let (index, before) = (replica.service, replica.running);
        replica.running -= 1;
        let draining = replica.phase == ReplicaPhase::Draining;
        let left = replica.running;
        self.services[index].end(tokens, draining, self.now);
        if !draining {
            self.services[index].slots(id, before, Some(left));
            self.dispatch(index);
        } else if left == 0 {
            self.stopped(id);
        }
    }

    fn ready(&mut self, id: ReplicaId) {
        let replica = &mut self.replicas[id];
        // It may have been told to leave while it loaded.
        if replica.phase != ReplicaPhase::Starting {
            return;
        }
        replica.enter(ReplicaPhase::Ready, self.now);
        let (index, node) = (replica.service, replica.node.clone());
        self.services[index].slots(id, 0, Some(0));
        self.say_what_runs(&node);
        self.dispatch(index);
    }

    fn stopped(&mut self, id: ReplicaId) {
        self.replicas[id].enter(ReplicaPhase::Stopped, self.now);
        let node = self.replicas[id].node.clone();
        self.say_what_runs(&node);
    }

    /// The whole truth about a node's replicas, as its agent sends it.
    fn say_what_runs(&mut self, node: &str) {
        let Some(state) = self.world.nodes.get(node) else { return };
        let present = state.replicas.iter().filter_map(|name| self.by_name.get(name));
        let present: Vec<_> = present.map(|id| &self.replicas[*id]).collect();
        let histories = Metering::histories(present.iter().map(|replica| (&*replica.name, &replica.life)), self.now);
        let replicas = present
            .into_iter()
            .map(|replica| fleet::ReplicaStatus {
                replica: replica.name.clone(),
                revision: self.services[replica.service].revision.clone(),
                phase: replica.phase.into(),
                ..Default::default()
            })
            .collect();
        self.hear(node, Message::ReplicaHistories(histories));
        self.hear(node, Message::ReplicaStatuses(fleet::ReplicaStatuses { replicas }));
    }

    fn report(&mut self) {
        let mut revisions: Vec<_> = self.services.iter_mut().map(|service| service.report(self.now)).collect();
        for replica in self.ready_replicas() {
            let load = fleet::ReplicaLoad { replica: replica.name.clone(), running: u64::from(replica.running) };
            revisions[replica.service].replicas.push(load);
        }
        let interval = prost_types::Duration::try_from(self.scenario.report_interval).ok();
        let gateway = self.gateway();
        self.hear(&gateway, Message::QueueReport(fleet::QueueReport { interval, revisions }));
        self.schedule(self.now + self.scenario.report_interval, Event::Report);
    }

    /// As the coordinator's loop does at each tick.
    fn tick(&mut self) {
        let now = self.time();
        scale::decide_all(&mut self.world, now, &mut self.recorder, &mut self.dirty);
        self.dirty.waiting_for_a_place(&self.world);
        (0..self.services.len()).for_each(|index| self.give_up(index));
        self.schedule(self.now + self.scenario.tick, Event::Tick);
        self.replan();
        self.look();
        self.metering.write_due(&self.world, now);
    }

    fn fail_over(&mut self, term: Duration) {
        let now = self.time();
        self.metering.fail_over(&self.world, now);
        let nodes: Vec<_> = self.world.nodes.keys().cloned().collect();
        nodes.iter().for_each(|node| self.say_what_runs(node));
        self.schedule(self.now + term, Event::FailOver(term));
    }

    /// As the coordinator's loop does after each input.
    fn act(&mut self) {
        let now = self.time();
        let mut pass = scale::Pass::default();
        for key in std::mem::take(&mut self.dirty.urgent) {
            if scale::decide(&mut self.world, &key, now, &mut self.recorder, &mut pass) {
                self.dirty.revision(&self.world, &key);
            }
        }
        self.replan();
        self.dirty.services.clear();
        self.dirty.nodes.clear();
    }

    fn replan(&mut self) {
        // Replicas that go make room, which may have been waited for.
        while !self.dirty.revisions.is_empty() {
            let revisions = std::mem::take(&mut self.dirty.revisions);
            let now = self.time();
            let plan = plan::plan(&self.world, &revisions, now);
            let leaving: Vec<String> = plan.leaving().map(|(name, _)| name.clone()).collect();
            for (key, why) in plan.unplaced {
                if let Some(revision) = self.world.revisions.get_mut(&key) {
                    revision.unplaced = why;
                }
            }
            for (name, _) in plan.forget {
                self.forget(&name);
            }
            for name in leaving {
                self.drain(&name);
            }
            for create in plan.create {
                self.create(create);
            }
        }
    }

    fn create(&mut self, create: plan::Create) {
        let Some(revision) = self.world.revisions.get(&create.revision) else { return };
        let id = self.replicas.len();
        let record = &revision.record;
        let Some(index) = self.services.iter().position(|service| service.revision == create.revision) else { return };
        let gpus = record.template.resources.gpus;
        let name = format!("{}-{id:08}", record.name);
        let placed = ReplicaRecord {
            name: name.clone(),
            namespace: record.namespace.clone(),
            service: record.service.clone(),
            revision: create.revision.clone(),
            node: create.node.clone(),
            gpu_indices: create.gpu_indices,
            mig_devices: create.mig_devices,
            gpu_class: self.scenario.nodes.first().map(|node| node.product.clone()).unwrap_or_default(),
            created_at: self.time(),
            draining: false,
            asleep: false,
        };
        self.world.insert_replica(placed.clone(), Default::default());
        self.metering.open(&self.world, &placed, self.time());
        self.by_name.insert(name.clone(), id);
        self.replicas.push(VirtualReplica {
            name,
            node: create.node.clone(),
            service: index,
            phase: ReplicaPhase::Starting,
            running: 0,
            ran: Ran { from: self.now, until: None, gpus },
            life: vec![(self.now, ReplicaPhase::Starting)],
        });
        self.schedule(self.now + self.scenario.model.load_time, Event::Ready(id));
        self.say_what_runs(&create.node);
    }

    fn drain(&mut self, name: &str) {
        let Some(state) = self.world.replicas.get_mut(name) else { return };
        state.record.draining = true;
        let Some(id) = self.by_name.get(name).copied() else { return };
        let replica = &mut self.replicas[id];
        let (index, running) = (replica.service, replica.running);
        replica.enter(ReplicaPhase::Draining, self.now);
        self.services[index].slots(id, running, None);
        self.services[index].drain(running, self.now);
        if running == 0 {
            self.stopped(id);
        }
    }

    fn forget(&mut self, name: &str) {
        self.metering.close(name, self.time());
        self.world.remove_replica(name);
        if let Some(id) = self.by_name.remove(name) {
            self.replicas[id].ran.until = Some(self.now);
        }
        self.dirty.waiting_for_a_place(&self.world);
    }

    /// Notes how things stand.
    fn look(&mut self) {
        for (index, service) in self.services.iter().enumerate() {
            let Some(revision) = self.world.revisions.get(&service.revision) else { continue };
            let counts = self.world.counts(revision);
            self.tallies[index].timeline.push(Point {
                seconds: self.now.as_secs_f64(),
                wanted: revision.wanted,
                ready: counts.ready,
                starting: counts.starting,
                draining: counts.draining,
                waiting: service.waiting.len(),
                running: service.running,
                ..Default::default()
            });
        }
    }

    fn outcome(self) -> Outcome {
        let epoch = self.scenario.trace.epoch;
        let decisions = Outcome::decisions(&self.recorder.lines(), epoch);
        let mut ran: BTreeMap<usize, Vec<Ran>> = BTreeMap::new();
        for replica in self.replicas {
            ran.entry(replica.service).or_default().push(replica.ran);
        }
        let services = self.services.iter().zip(self.tallies).enumerate().map(|(index, (service, tally))| {
            let config = self.world.revisions.get(&service.revision).map(|revision| &revision.scaling);
            let name = &self.scenario.services[index].name;
            let decided = decisions.get(&service.revision).map_or(&[][..], Vec::as_slice);
            tally.outcome(name, config, decided, ran.remove(&index).unwrap_or_default(), self.end)
        });
        Outcome { seconds: self.end.as_secs_f64(), services: services.collect() }
    }
}
