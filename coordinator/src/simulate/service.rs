//! The virtual data path of one service: who waits, which slots are free, and the load that agents report.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use pilotlight_proto::fleet::v1::RevisionLoad;

/// A number that changes in steps, and its integral over time.
#[derive(Debug, Default)]
struct Gauge {
    value: f64,
    area: f64,
    changed: Duration,
    began: Duration,
}

impl Gauge {
    fn add(&mut self, change: f64, now: Duration) {
        self.area += self.value * (now - self.changed).as_secs_f64();
        self.changed = now;
        self.value += change;
    }

    /// The mean since the last call.
    fn take(&mut self, now: Duration) -> f64 {
        self.add(0.0, now);
        let elapsed = (now - self.began).as_secs_f64();
        let mean = if elapsed > 0.0 { self.area / elapsed } else { self.value };
        (self.area, self.began) = (0.0, now);
        // Sums of many fractions leave a trace of nothing.
        if mean.abs() < 1e-9 { 0.0 } else { mean }
    }
}

/// Index of a replica in the engine.
pub(super) type ReplicaId = usize;
/// Index of a request in the trace.
pub(super) type RequestId = usize;

/// One service.
#[derive(Debug, Default)]
pub(super) struct VirtualService {
    /// `<namespace>/<revision>`.
    pub revision: String,
    /// Requests that a replica runs at the same time; 0 is no limit.
    pub concurrency: u32,
    /// Longest time a request may wait and run.
    pub timeout: Duration,
    /// In order of arrival.
    pub waiting: VecDeque<RequestId>,
    /// Requests that run.
    pub running: usize,
    /// Ready replicas with a free slot, the emptiest first.
    free: BTreeSet<(u32, ReplicaId)>,
    waiting_gauge: Gauge,
    running_gauge: Gauge,
    draining_gauge: Gauge,
    tokens_gauge: Gauge,
    arrivals: u64,
    completions: u64,
}

impl VirtualService {
    /// Nobody waits, nothing runs.
    pub fn new(revision: String, concurrency: u32, timeout: Duration) -> Self {
        Self { revision, concurrency, timeout, ..Default::default() }
    }

    /// A request has come, with so many tokens in its prompt.
    pub fn arrive(&mut self, request: RequestId, prompt: f64, now: Duration) {
        self.arrivals += 1;
        self.waiting.push_back(request);
        self.waiting_gauge.add(1.0, now);
        self.tokens_gauge.add(prompt, now);
    }

    /// The first in line leaves it, to run or to be told that it took too long.
    pub fn leave_line(&mut self, now: Duration) -> Option<RequestId> {
        let request = self.waiting.pop_front()?;
        self.waiting_gauge.add(-1.0, now);
        Some(request)
    }

    /// The emptiest replica with a free slot.
    pub fn free(&self) -> Option<ReplicaId> {
        self.free.first().map(|(_, replica)| *replica)
    }

    /// A replica that takes requests runs `running` now, where it ran `before`.
    pub fn slots(&mut self, replica: ReplicaId, before: u32, running: Option<u32>) {
        self.free.remove(&(before, replica));
        if let Some(running) = running.filter(|running| self.concurrency == 0 || *running < self.concurrency) {
            self.free.insert((running, replica));
        }
    }

    /// True where some replica takes requests and has a slot.
    pub fn has_slot(&self) -> bool {
        !self.free.is_empty()
    }

    /// A request runs. Tokens grow steadily while it does: half of those it generates on average.
    pub fn begin(&mut self, generated: f64, now: Duration) {
        self.running += 1;
        self.running_gauge.add(1.0, now);
        self.tokens_gauge.add(generated / 2.0, now);
    }

    /// It has ended.
    pub fn end(&mut self, tokens: (f64, f64), draining: bool, now: Duration) {
        self.running -= 1;
        self.completions += 1;
        self.running_gauge.add(-1.0, now);
        self.tokens_gauge.add(-tokens.0 - tokens.1 / 2.0, now);
        if draining {
            self.draining_gauge.add(-1.0, now);
        }
    }

    /// It was told that it took too long.
    pub fn timed_out(&mut self, prompt: f64, now: Duration) {
        self.tokens_gauge.add(-prompt, now);
    }

    /// A replica with so many requests leaves.
    pub fn drain(&mut self, running: u32, now: Duration) {
        self.draining_gauge.add(f64::from(running), now);
    }

    /// What agents report.
    pub fn report(&mut self, now: Duration) -> RevisionLoad {
        let (waiting, running) = (self.waiting_gauge.take(now), self.running_gauge.take(now));
        RevisionLoad {
            revision: self.revision.clone(),
            average_concurrency: waiting + running,
            average_waiting: waiting,
            request_count: std::mem::take(&mut self.arrivals),
            completed_count: std::mem::take(&mut self.completions),
            queue_depth: self.waiting.len() as u64,
            running: self.running as u64,
            draining_concurrency: self.draining_gauge.take(now),
            tokens_in_flight: self.tokens_gauge.take(now),
            replicas: Vec::new(),
        }
    }
}
