//! The virtual fleet: events in order of time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    time::Duration,
};

use super::{Arrival, GPU, Model, Outcome, Scenario};
use crate::{
    autoscaler::Time,
    eviction::{Arrivals, Bytes, Costs, Entry, Policy, Rung, held, victims},
};

/// What happens; of those at the same time, the first one made comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives(usize),
    Loaded(usize),
    Ends(usize),
    /// Idle since then.
    Idle(usize, Time),
}

/// One model's state.
struct State {
    arrivals: Arrivals,
    costs: Costs,
    serves: Option<Serves>,
    /// Arrival times of requests that wait, each with how long it runs.
    waiting: VecDeque<(Time, Duration)>,
    in_line: bool,
}

struct Serves {
    node: usize,
    since: Time,
    from: Rung,
    loaded: bool,
    running: u32,
    idle_since: Option<Time>,
}

struct Fleet<'a> {
    scenario: &'a Scenario,
    policy: Policy,
    models: &'a [Model],
    states: Vec<State>,
    /// By node: each model's rung there, unless absent.
    nodes: Vec<BTreeMap<usize, Rung>>,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    made: u64,
    /// Models that wait for room, first come first.
    line: VecDeque<usize>,
    waits: Vec<f64>,
    outcome: Outcome,
}

/// Runs one policy to the end of the trace, and until every request has been served.
pub fn run(scenario: &Scenario, (models, arrivals): &(Vec<Model>, Vec<Arrival>), policy: Policy) -> Outcome {
    let state = |model: &Model| State {
        arrivals: Arrivals::since(Time::ZERO),
        costs: Costs::estimated(&model.footprint),
        serves: None,
        waiting: VecDeque::new(),
        in_line: false,
    };
    let mut fleet = Fleet {
        scenario,
        policy,
        models,
        states: models.iter().map(state).collect(),
        nodes: vec![BTreeMap::new(); scenario.nodes],
        events: BinaryHeap::new(),
        made: 0,
        line: VecDeque::new(),
        waits: Vec::with_capacity(arrivals.len()),
        outcome: Outcome::default(),
    };
    for (at, arrival) in arrivals.iter().enumerate() {
        fleet.at(arrival.at, Event::Arrives(at));
    }
    while let Some(Reverse((now, _, event))) = fleet.events.pop() {
        match event {
            Event::Arrives(at) => fleet.arrives(now, arrivals[at]),
            Event::Loaded(model) => fleet.loaded(now, model),
            Event::Ends(model) => fleet.ends(now, model),
            Event::Idle(model, since) => fleet.idle(now, model, since),
        }
    }
    fleet.outcome()
}

impl Fleet<'_> {
    fn at(&mut self, time: Time, event: Event) {
        self.events.push(Reverse((time, self.made, event)));
        self.made += 1;
    }

    fn arrives(&mut self, now: Time, arrival: Arrival) {
        self.outcome.requests += 1;
        let state = &mut self.states[arrival.model];
        state.arrivals.observe(now);
        match &mut state.serves {
            Some(serves) if serves.loaded => {
                serves.running += 1;
                serves.idle_since = None;
                self.waits.push(0.0);
                self.at(now + arrival.runs, Event::Ends(arrival.model));
            }
            Some(_) => state.waiting.push_back((now, arrival.runs)),
            None => {
                state.waiting.push_back((now, arrival.runs));
                if !state.in_line {
                    state.in_line = true;
                    self.line.push_back(arrival.model);
                    self.start_waiting(now);
                }
            }
        }
    }

    /// Starts whom there is room for, first come first; one that needs much room does not stop the others.
    fn start_waiting(&mut self, now: Time) {
        for _ in 0..self.line.len() {
            let Some(model) = self.line.pop_front() else { return };
            if self.start(now, model) {
                self.states[model].in_line = false;
            } else {
                self.line.push_back(model);
            }
        }
    }

    /// On the node where it starts soonest, of those the one with the fewest GPUs taken. False: no room.
    fn start(&mut self, now: Time, model: usize) -> bool {
        let rung = |node: &BTreeMap<usize, Rung>| node.get(&model).copied().unwrap_or(Rung::Absent);
        let costs = self.states[model].costs;
        let gpu = |node: &BTreeMap<usize, Rung>| -> u64 {
            node.iter().map(|(model, rung)| self.models[*model].footprint.held(*rung).gpu).sum()
        };
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        order.sort_by(|a, b| {
            let [a, b] = [&self.nodes[*a], &self.nodes[*b]];
            costs.seconds(rung(a)).total_cmp(&costs.seconds(rung(b))).then_with(|| gpu(a).cmp(&gpu(b)))
        });
        for node in order {
            let from = rung(&self.nodes[node]);
            self.nodes[node].insert(model, Rung::Serving);
            if self.make_room(now, node, Some(model)) {
                let takes = self.models[model].takes(from);
                self.states[model].serves =
                    Some(Serves { node, since: now, from, loaded: false, running: 0, idle_since: None });
                self.at(now + takes, Event::Loaded(model));
                return true;
            }
            match from {
                Rung::Absent => self.nodes[node].remove(&model),
                from => self.nodes[node].insert(model, from),
            };
        }
        false
    }

    /// Brings a node within its budget. False, and nothing done: what is in use does not leave room.
    fn make_room(&mut self, now: Time, node: usize, coming: Option<usize>) -> bool {
        let budget = self.scenario.budget();
        let used = self.nodes[node].iter().map(|(model, rung)| self.models[*model].footprint.held(*rung));
        if used.fold(Bytes::default(), |sum, held| sum + held).within(budget) {
            return true;
        }
        let entries: Vec<Entry> =
            self.nodes[node].iter().map(|(model, rung)| self.entry(now, *model, *rung, coming)).collect();
        debug_assert!(!held(&entries).within(budget));
        let chosen = victims(&entries, budget, self.policy);
        if chosen.past != Bytes::default() {
            return false;
        }
        let models: Vec<usize> = self.nodes[node].keys().copied().collect();
        for step in chosen.steps {
            // Entries have the models' names, which are in the order of their indices.
            let Ok(at) = models.binary_search_by(|model| self.models[*model].name.cmp(&step.name)) else { continue };
            self.outcome.evictions += 1;
            self.step_down(now, node, models[at], step.to);
        }
        true
    }

    fn entry(&self, now: Time, model: usize, rung: Rung, coming: Option<usize>) -> Entry {
        let state = &self.states[model];
        let busy = |serves: &Serves| !serves.loaded || serves.running > 0;
        Entry {
            name: self.models[model].name.clone(),
            rung,
            footprint: self.models[model].footprint,
            costs: state.costs,
            need: state.arrivals.need(now, self.scenario.horizon),
            last_used: state.arrivals.last().unwrap_or_default(),
            uses: state.arrivals.count(),
            pinned: None,
            in_use: coming == Some(model) || (rung == Rung::Serving && state.serves.as_ref().is_some_and(busy)),
        }
    }

    fn step_down(&mut self, now: Time, node: usize, model: usize, to: Rung) {
        let rung = match to {
            Rung::Absent => self.nodes[node].remove(&model),
            to => self.nodes[node].insert(model, to),
        };
        if rung == Some(Rung::Serving)
            && let Some(serves) = self.states[model].serves.take()
        {
            self.hold(model, now - serves.since);
        }
    }

    /// Accounts for GPUs that were held.
    fn hold(&mut self, model: usize, time: Duration) {
        let gpus = self.models[model].footprint.gpu / GPU;
        self.outcome.gpu_minutes += gpus as f64 * time.as_secs_f64() / 60.0;
    }

    fn loaded(&mut self, now: Time, model: usize) {
        let state = &mut self.states[model];
        let Some(serves) = &mut state.serves else { return };
        serves.loaded = true;
        serves.running = state.waiting.len() as u32;
        state.costs.measure(serves.from, now - serves.since);
        self.outcome.starts[serves.from as usize] += 1;
        for (came, runs) in std::mem::take(&mut state.waiting) {
            self.outcome.waited += 1;
            self.waits.push((now - came).as_secs_f64());
            self.at(now + runs, Event::Ends(model));
        }
    }

    fn ends(&mut self, now: Time, model: usize) {
        let Some(serves) = &mut self.states[model].serves else { return };
        serves.running -= 1;
        if serves.running == 0 {
            serves.idle_since = Some(now);
            self.at(now + self.scenario.idle, Event::Idle(model, now));
            // It may make room now.
            self.start_waiting(now);
        }
    }

    fn idle(&mut self, now: Time, model: usize, since: Time) {
        let Some(serves) = &self.states[model].serves else { return };
        if serves.idle_since != Some(since) {
            return;
        }
        let node = serves.node;
        self.step_down(now, node, model, Rung::Asleep);
        // Nothing that sleeps is in use: there is always room.
        self.make_room(now, node, None);
        self.start_waiting(now);
    }

    fn outcome(mut self) -> Outcome {
        self.waits.sort_by(f64::total_cmp);
        self.outcome.wait_seconds = self.waits.iter().sum();
        let at = (0.99 * self.waits.len() as f64).ceil() as usize;
        self.outcome.wait_p99 = self.waits.get(at.saturating_sub(1)).copied().unwrap_or(0.0);
        self.outcome
    }
}
