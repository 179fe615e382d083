//! What came of a simulation, in numbers.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    autoscaler::{Decision, ScalerConfig},
    reconcile::{
        record::{Entry, Line},
        world::since,
    },
};

/// A whole simulation.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Length, tail included.
    pub seconds: f64,
    /// In the manifest's order.
    pub services: Vec<ServiceOutcome>,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceOutcome {
    /// Its name.
    pub service: String,
    /// Requests that came.
    pub requests: u64,
    /// Those that found no replica ready.
    pub cold_requests: u64,
    /// Those that were answered, or ran when the simulation ended.
    pub served: u64,
    /// Those refused by a full queue.
    pub shed: u64,
    /// Those that waited for their whole timeout.
    pub timed_out: u64,
    /// Seconds from arrival to a slot.
    pub wait: Percentiles,
    /// Seconds from arrival to the end of the answer.
    pub latency: Percentiles,
    /// Replicas that were started.
    pub replicas_ordered: usize,
    /// Times that the first replica was started from none.
    pub cold_starts: usize,
    /// Most replicas at a time, loading and leaving ones included.
    pub peak_replicas: usize,
    /// Most that the load needed: requests in the system if every one had run at once, averaged over a
    /// panic window, over the target.
    pub peak_need: usize,
    /// How many more than that were there at the peak.
    pub ordered_past_need: usize,
    /// Minutes that replicas existed.
    pub replica_minutes: f64,
    /// The same times the GPUs of each.
    pub gpu_minutes: f64,
    /// When panic was.
    pub panic: Vec<PanicPeriod>,
    /// How things stood, by tick.
    pub timeline: Vec<Point>,
}

/// A time in panic, in seconds since the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PanicPeriod {
    /// The first decision in panic.
    pub from: f64,
    /// The first one after it.
    pub until: f64,
}

/// Of many values, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90 % are no larger.
    pub p90: f64,
    /// 99 % are no larger.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// How a service stood at one tick.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    /// Since the beginning.
    pub seconds: f64,
    /// Replicas asked for.
    pub wanted: u32,
    /// Replicas that took requests.
    pub ready: u32,
    /// Replicas that loaded.
    pub starting: u32,
    /// Replicas that finished and left.
    pub draining: u32,
    /// Requests waiting.
    pub waiting: usize,
    /// Requests running.
    pub running: usize,
    /// Whether the autoscaler was in panic.
    pub panic: bool,
    /// Load over the stable window.
    pub stable_value: f64,
    /// Load over the panic window.
    pub panic_value: f64,
}

/// A request that ran.
#[derive(Debug, Clone, Copy)]
pub(super) struct Served {
    pub arrived: Duration,
    pub began: Duration,
    pub time: Duration,
}

/// A replica's life.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ran {
    pub from: Duration,
    pub until: Option<Duration>,
    pub gpus: u32,
}

/// What the engine counts for one service.
#[derive(Debug, Default)]
pub(super) struct Tally {
    came: u64,
    cold: u64,
    pub shed: u64,
    pub timed_out: u64,
    pub served: Vec<Served>,
    pub timeline: Vec<Point>,
}

impl Percentiles {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied().unwrap_or_default()
        };
        let mean = if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 };
        Self { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

impl Outcome {
    /// Decisions by revision, each with seconds since `epoch`.
    pub(super) fn decisions(lines: &[Line], epoch: Timestamp) -> BTreeMap<String, Vec<(f64, Decision)>> {
        let mut decisions: BTreeMap<String, Vec<(f64, Decision)>> = BTreeMap::new();
        for line in lines {
            if let Entry::Decide { decision, .. } = &line.entry {
                let seconds = since(epoch, line.at).as_secs_f64();
                decisions.entry(line.revision.clone()).or_default().push((seconds, decision.clone()));
            }
        }
        decisions
    }
}

impl Tally {
    /// A request has come; `cold` where no replica was ready.
    pub fn came(&mut self, cold: bool) {
        self.came += 1;
        self.cold += u64::from(cold);
    }

    /// Puts it all together.
    pub fn outcome(
        mut self,
        name: &str,
        config: Option<&ScalerConfig>,
        decisions: &[(f64, Decision)],
        ran: Vec<Ran>,
        end: Duration,
    ) -> ServiceOutcome {
        fill_in(&mut self.timeline, decisions);
        let (peak_replicas, cold_starts) = peak(&ran);
        let peak_need = config.map_or(0, |config| need(&self.served, config));
        let minutes = |ran: &Ran| (ran.until.unwrap_or(end) - ran.from).as_secs_f64() / 60.0;
        ServiceOutcome {
            service: name.to_owned(),
            requests: self.came,
            cold_requests: self.cold,
            served: self.served.len() as u64,
            shed: self.shed,
            timed_out: self.timed_out,
            wait: Percentiles::of(self.served.iter().map(|s| (s.began - s.arrived).as_secs_f64()).collect()),
            latency: Percentiles::of(
                self.served.iter().map(|s| (s.began + s.time - s.arrived).as_secs_f64()).collect(),
            ),
            replicas_ordered: ran.len(),
            cold_starts,
            peak_replicas,
            peak_need,
            ordered_past_need: peak_replicas.saturating_sub(peak_need),
            replica_minutes: ran.iter().map(minutes).sum(),
            gpu_minutes: ran.iter().map(|ran| minutes(ran) * f64::from(ran.gpus)).sum(),
            panic: panic_periods(decisions, end),
            timeline: self.timeline,
        }
    }
}

/// Puts what was decided at each point's time beside what was there.
fn fill_in(timeline: &mut [Point], decisions: &[(f64, Decision)]) {
    let mut decided = decisions.iter().peekable();
    let mut last = None;
    for point in timeline {
        while let Some((_, decision)) = decided.next_if(|(seconds, _)| *seconds <= point.seconds) {
            last = Some(decision);
        }
        if let Some(decision) = last {
            point.panic = decision.panic;
            point.stable_value = decision.stable_value;
            point.panic_value = decision.panic_value;
        }
    }
}

fn panic_periods(decisions: &[(f64, Decision)], end: Duration) -> Vec<PanicPeriod> {
    let mut periods = Vec::new();
    let mut from = None;
    for (seconds, decision) in decisions {
        match (from, decision.panic) {
            (None, true) => from = Some(*seconds),
            (Some(began), false) => {
                periods.push(PanicPeriod { from: began, until: *seconds });
                from = None;
            }
            _ => {}
        }
    }
    periods.extend(from.map(|from| PanicPeriod { from, until: end.as_secs_f64() }));
    periods
}

/// Most replicas at a time, and how often the first came after none.
fn peak(ran: &[Ran]) -> (usize, usize) {
    // At one moment, those that go make room for those that come.
    let mut changes: Vec<(Duration, i64)> = ran.iter().map(|ran| (ran.from, 1)).collect();
    changes.extend(ran.iter().filter_map(|ran| ran.until.map(|until| (until, -1))));
    changes.sort_unstable();
    let (mut present, mut most, mut from_none) = (0, 0, 0);
    for (_, change) in changes {
        from_none += usize::from(present == 0 && change > 0);
        present += change;
        most = most.max(present);
    }
    (most.max(0) as usize, from_none)
}

/// Replicas that the load would have needed if none had taken any time to start.
fn need(served: &[Served], config: &ScalerConfig) -> usize {
    let last = served.iter().map(|s| s.arrived + s.time).max().unwrap_or_default();
    // By second: requests in the system if each had run from its arrival on.
    let mut load = vec![0.0; last.as_secs() as usize + 2];
    for request in served {
        let (from, to) = (request.arrived.as_secs_f64(), (request.arrived + request.time).as_secs_f64());
        for second in from as usize..=to as usize {
            load[second] += (to.min(second as f64 + 1.0) - from.max(second as f64)).max(0.0);
        }
    }
    let window = config.panic_window.as_secs().max(1) as usize;
    let mut sum = 0.0;
    let mut most: f64 = 0.0;
    for second in 0..load.len() {
        sum += load[second];
        if second >= window {
            sum -= load[second - window];
        }
        most = most.max(sum / window as f64);
    }
    // The target is in requests where the metric is; for others the slots of a replica are.
    let per_replica = match config.metric {
        crate::autoscaler::Metric::Concurrency => config.target,
        _ => config.slots,
    };
    (most / per_replica).ceil() as usize
}
