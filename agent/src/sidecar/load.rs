//! How one revision's load on this node is counted: time-weighted means, as Knative's queue-proxy
//! computes them, and events since the last report.

use pilotlight_proto::fleet::v1::RevisionLoad;
use tokio::time::Instant;

/// A number and its integral over time.
#[derive(Debug)]
pub struct Meter {
    value: u64,
    area: f64,
    changed: Instant,
    began: Instant,
}

impl Meter {
    /// Zero, from `now` on.
    pub fn new(now: Instant) -> Self {
        Self { value: 0, area: 0.0, changed: now, began: now }
    }

    /// The number now.
    pub fn value(&self) -> u64 {
        self.value
    }

    /// Sets the number.
    pub fn set(&mut self, value: u64, now: Instant) {
        self.area += self.value as f64 * now.duration_since(self.changed).as_secs_f64();
        self.changed = now;
        self.value = value;
    }

    /// The mean since the last call, and begins anew. The number itself where no time has passed.
    pub fn take(&mut self, now: Instant) -> f64 {
        self.set(self.value, now);
        let elapsed = now.duration_since(self.began).as_secs_f64();
        let mean = if elapsed > 0.0 { self.area / elapsed } else { self.value as f64 };
        self.area = 0.0;
        self.began = now;
        mean
    }
}

/// What is counted of one revision between two reports, tokens aside.
#[derive(Debug)]
pub(super) struct Load {
    waiting: Meter,
    running: Meter,
    draining: Meter,
    arrivals: u64,
    completed: u64,
    /// True once it has been said that nothing happens.
    told_quiet: bool,
}

impl Load {
    pub(super) fn new(now: Instant) -> Self {
        let meter = || Meter::new(now);
        Self {
            waiting: meter(),
            running: meter(),
            draining: meter(),
            arrivals: 0,
            completed: 0,
            // There was nothing yet.
            told_quiet: true,
        }
    }

    /// A request has entered by this node's gateway.
    pub(super) fn arrived(&mut self) {
        self.arrivals += 1;
        self.told_quiet = false;
    }

    /// An answer of one of this node's replicas has ended.
    pub(super) fn completed(&mut self) {
        self.completed += 1;
        self.told_quiet = false;
    }

    /// There is something to report, whatever the numbers say.
    pub(super) fn changed(&mut self) {
        self.told_quiet = false;
    }

    /// So many wait here.
    pub(super) fn waiting(&mut self, waiting: u64, now: Instant) {
        self.waiting.set(waiting, now);
    }

    /// So many run on this node's replicas, `draining` of them on those that leave.
    pub(super) fn running(&mut self, running: u64, draining: u64, now: Instant) {
        self.running.set(running, now);
        self.draining.set(draining, now);
    }

    /// True once it has been said that nothing happens.
    pub(super) fn told_quiet(&self) -> bool {
        self.told_quiet
    }

    /// What was counted since the last call; begins anew. `None` where that has been said already:
    /// a revision without replicas here that has become quiet says so once.
    pub(super) fn take(&mut self, now: Instant, replicas: bool) -> Option<RevisionLoad> {
        let average_waiting = self.waiting.take(now);
        let load = RevisionLoad {
            average_waiting,
            average_concurrency: average_waiting + self.running.take(now),
            draining_concurrency: self.draining.take(now),
            request_count: std::mem::take(&mut self.arrivals),
            completed_count: std::mem::take(&mut self.completed),
            queue_depth: self.waiting.value(),
            running: self.running.value(),
            ..Default::default()
        };
        let quiet = load.average_concurrency == 0.0
            && load.request_count == 0
            && load.completed_count == 0
            && load.queue_depth == 0;
        let silent = quiet && !replicas && self.told_quiet;
        self.told_quiet = quiet;
        (!silent).then_some(load)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_mean_is_weighted_by_time() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut meter = Meter::new(start);
        meter.set(2, at(250));
        meter.set(1, at(500));
        assert!((meter.take(at(1000)) - 1.0).abs() < 1e-9, "0.25·0 + 0.25·2 + 0.5·1");
        assert!((meter.take(at(2000)) - 1.0).abs() < 1e-9, "goes on with what was there");
        meter.set(0, at(2000));
        assert!(meter.take(at(3000)).abs() < 1e-9);
    }
}
