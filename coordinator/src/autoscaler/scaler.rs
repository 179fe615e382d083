//! One revision's autoscaler: windows, decision, bounds and clocks together.

use std::{fmt, time::Duration};

use pilotlight_proto::fleet::v1::RevisionLoad;
use serde::{Deserialize, Serialize};

use super::{
    Class, Metric, ScalerConfig, Time,
    gpu::Offered,
    kpa::{self, Input, Wish},
    prewarm::History,
    scale_to_zero::{self, Activity, Applied, Held, Proxy, Situation},
    window::Window,
};

/// One agent's report of one revision. Reports of several agents add up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Time-weighted mean of requests waiting or running.
    pub average_concurrency: f64,
    /// Requests that arrived, per second.
    pub request_rate: f64,
    /// Part of `average_concurrency` that waited.
    #[serde(default)]
    pub average_waiting: f64,
    /// Part of `average_concurrency` that ran on replicas which leave.
    #[serde(default)]
    pub draining_concurrency: f64,
    /// Requests that ended, per second.
    #[serde(default)]
    pub completion_rate: f64,
    /// Prompt and generated tokens of requests waiting or running, mean.
    #[serde(default)]
    pub tokens_in_flight: f64,
    /// Seconds that the report covers; 0 is unknown and counts as one.
    #[serde(default)]
    pub seconds: f64,
}

impl Sample {
    /// From a report that covers `interval`.
    pub fn of_report(load: &RevisionLoad, interval: Duration) -> Self {
        let seconds = interval.as_secs_f64();
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Self {
            average_concurrency: load.average_concurrency,
            request_rate: rate(load.request_count),
            average_waiting: load.average_waiting,
            draining_concurrency: load.draining_concurrency,
            completion_rate: rate(load.completed_count),
            tokens_in_flight: load.tokens_in_flight,
            seconds,
        }
    }

    /// The buckets that the report belongs into, as seconds before now, oldest first, and how much of it
    /// each gets. A report of about a second counts as one, as Knative's do; a longer one fills each of its
    /// seconds, a shorter one a part of one.
    fn buckets(&self) -> impl Iterator<Item = (u64, f64)> {
        let (count, part) = match self.seconds {
            seconds if seconds > 1.5 => (seconds.round().min(REPORT_MOST) as u64, 1.0),
            seconds if seconds > 0.0 && seconds < 0.5 => (1, seconds),
            _ => (1, 1.0),
        };
        (0..count).rev().map(move |age| (age, part))
    }

    /// A part of it.
    fn part(&self, part: f64) -> Self {
        Self {
            average_concurrency: self.average_concurrency * part,
            request_rate: self.request_rate * part,
            average_waiting: self.average_waiting * part,
            draining_concurrency: self.draining_concurrency * part,
            completion_rate: self.completion_rate * part,
            tokens_in_flight: self.tokens_in_flight * part,
            seconds: self.seconds,
        }
    }

    /// The load in the metric's unit.
    fn value(&self, config: &ScalerConfig) -> f64 {
        match config.metric {
            Metric::Concurrency if config.class == Class::Gpu => {
                // A long request on a replica that leaves needs no other replica.
                (self.average_concurrency - self.draining_concurrency).max(0.0)
            }
            Metric::Concurrency => self.average_concurrency,
            Metric::Rps => self.request_rate,
            Metric::QueueDepth => {
                let running = (self.average_concurrency - self.average_waiting).max(0.0);
                self.average_waiting + running / config.slots * config.target
            }
            Metric::TokensInFlight => self.tokens_in_flight,
        }
    }
}

/// What is seen at a decision.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Replicas that take requests; `None` where they could not be counted.
    pub ready: Option<u32>,
    /// Replicas that have a place and load.
    #[serde(default)]
    pub starting: u32,
    /// Replicas wanted until now.
    pub current: u32,
    /// Replicas that the fleet could hold, those of this revision included; `None` where unknown. Only
    /// the GPU class looks at it.
    #[serde(default)]
    pub fits: Option<u32>,
    /// False where the revision gets no traffic any more.
    pub reachable: bool,
    /// True once the revision has had its initial scale ready.
    pub initial_scale_reached: bool,
    /// Time that a replica takes from being placed to being ready, as last seen; zero where unknown.
    #[serde(default)]
    pub load_time: Duration,
}

/// A decision and what led to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Replicas that were ready.
    pub ready: u32,
    /// Replicas that were loading.
    #[serde(default)]
    pub starting: u32,
    /// The wish before bounds; -1 is unknown.
    pub desired: i32,
    /// Replicas to have.
    pub applied: u32,
    /// Load over the stable window.
    pub stable_value: f64,
    /// Load over the panic window.
    pub panic_value: f64,
    /// Load that one replica should carry.
    pub target: f64,
    /// True while in panic.
    pub panic: bool,
    /// Spare capacity.
    pub excess_burst_capacity: f64,
    /// Which rules acted.
    pub reasons: Vec<Reason>,
}

impl Decision {
    /// True where both say the same, wait times aside.
    pub fn same_but_for_time(&self, other: &Self) -> bool {
        let rule = |reason: &Reason| {
            let held = if let Reason::Held(held) = reason { Some(std::mem::discriminant(held)) } else { None };
            (std::mem::discriminant(reason), held)
        };
        let rules = |decision: &Self| decision.reasons.iter().map(rule).collect::<Vec<_>>();
        self.ready == other.ready
            && self.starting == other.starting
            && self.desired == other.desired
            && self.applied == other.applied
            && self.panic == other.panic
            && rules(self) == rules(other)
    }
}

/// A rule that acted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reason {
    /// No load was reported lately: nothing changes.
    NoData,
    /// Panic: the number does not fall.
    Panic,
    /// More was wanted than the rate allows.
    ScaleUpRate(i32),
    /// Less was wanted than the rate allows.
    ScaleDownRate(i32),
    /// A larger wish is still within the scale-down delay.
    ScaleDownDelay(i32),
    /// The lower bound.
    MinScale(u32),
    /// The upper bound.
    MaxScale(u32),
    /// Replicas beyond what the load needs.
    Spare(u32),
    /// The past makes load likely that needs as many.
    Prewarm(u32),
    /// More are wanted than the fleet has places for.
    Capacity(u32),
    /// A rule on the way to zero.
    Held(Held),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoData => f.write_str("no load reported; nothing changes"),
            Self::Panic => f.write_str("in panic: the number does not fall"),
            Self::ScaleUpRate(wanted) => write!(f, "max-scale-up-rate holds back {wanted}"),
            Self::ScaleDownRate(wanted) => write!(f, "max-scale-down-rate holds back {wanted}"),
            Self::ScaleDownDelay(wanted) => write!(f, "scale-down-delay holds back {wanted}"),
            Self::MinScale(bound) => write!(f, "min-scale {bound}"),
            Self::MaxScale(bound) => write!(f, "max-scale {bound}"),
            Self::Spare(spare) => write!(f, "spare-replicas {spare}"),
            Self::Prewarm(0) => f.write_str("pre-warming expects no load"),
            Self::Prewarm(wanted) => write!(f, "pre-warming expects load for {wanted} replicas"),
            Self::Capacity(wanted) => write!(f, "{wanted} wanted, more than the fleet has GPUs for"),
            Self::Held(Held::ScaleToZeroDisabled) => f.write_str("scale to zero is off"),
            Self::Held(Held::Activating) => f.write_str("becoming ready"),
            Self::Held(Held::ActiveWindow) => f.write_str("active for less than a stable window"),
            Self::Held(Held::BecomingInactive) => f.write_str("inactive from now on"),
            Self::Held(Held::Proxy) => f.write_str("the gateway is not known to hold requests yet"),
            Self::Held(Held::Retention(left)) => {
                write!(f, "retained for another {}", humantime::format_duration(Duration::from_secs(left.as_secs())))
            }
        }
    }
}

/// All state of one revision's autoscaler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaler {
    pub(super) config: ScalerConfig,
    stable: Window,
    panic: Window,
    pub(super) state: kpa::State,
    activity: Activity,
    since: Time,
    /// With the concurrency metric, where the class or pre-warming wants to know.
    offered: Option<Box<Offered>>,
    /// Where pre-warming is on.
    history: Option<Box<History>>,
    /// A poke has counted a request that the next report counts, too.
    poked: bool,
}

/// Agents report at least this often, seconds.
const REPORT_MOST: f64 = 60.0;
/// A second that has passed this long ago without a report had no load.
const SILENT_AFTER: Duration = Duration::from_secs(2);

/// One request that waits.
const POKE: Sample = Sample {
    average_concurrency: 1.0,
    request_rate: 1.0,
    average_waiting: 1.0,
    draining_concurrency: 0.0,
    completion_rate: 0.0,
    tokens_in_flight: 1.0,
    seconds: 1.0,
};

fn offered(config: &ScalerConfig) -> Option<Box<Offered>> {
    let wanted = config.class == Class::Gpu || config.prewarm;
    (wanted && config.metric == Metric::Concurrency).then(|| Box::new(Offered::new(config)))
}

impl Scaler {
    /// At `now`, with this many replicas ready (`None` where they could not be counted).
    pub fn new(config: ScalerConfig, now: Time, ready: Option<u32>) -> Self {
        let activity = if ready.unwrap_or(0) > 0 { Activity::Active } else { Activity::Activating };
        Self {
            stable: Window::new(config.stable_window),
            panic: Window::new(config.panic_window),
            state: kpa::State::new(&config, now, ready),
            activity,
            since: now,
            offered: offered(&config),
            history: config.prewarm.then(Box::default),
            poked: false,
            config,
        }
    }

    /// Takes other settings; what was recorded stays as far as it fits.
    pub fn reconfigure(&mut self, config: ScalerConfig) {
        self.stable.resize(config.stable_window);
        self.panic.resize(config.panic_window);
        match (&mut self.offered, offered(&config)) {
            (Some(former), Some(_)) => former.resize(&config),
            (former, new) => *former = new,
        }
        if config.prewarm != self.config.prewarm {
            self.history = config.prewarm.then(Box::default);
        }
        self.config = config;
    }

    /// Takes in a report. Reports of one second add up.
    pub fn record(&mut self, now: Time, sample: &Sample) {
        let mut sample = *sample;
        if self.poked && sample.request_rate > 0.0 {
            self.poked = false;
            sample.average_concurrency = (sample.average_concurrency - POKE.average_concurrency).max(0.0);
            sample.average_waiting = (sample.average_waiting - POKE.average_waiting).max(0.0);
            sample.request_rate = (sample.request_rate - POKE.request_rate).max(0.0);
        }
        for (age, part) in sample.buckets() {
            self.add(now.saturating_sub(Duration::from_secs(age)), &sample.part(part));
        }
    }

    /// Agents report what there is. Knative's collector asks each replica and so hears of nothing, too: an
    /// idle revision with replicas has load zero, not no load.
    pub fn silence(&mut self, now: Time) {
        let until = now.saturating_sub(SILENT_AFTER);
        self.stable.pass(until);
        self.panic.pass(until);
        if let Some(offered) = &mut self.offered {
            offered.pass(until);
        }
    }

    /// A first request waits: it counts at once as one, as Knative's activator pokes its autoscaler, and
    /// is taken off the next report.
    pub fn poke(&mut self, now: Time) {
        self.add(now, &POKE);
        self.poked = true;
    }

    fn add(&mut self, now: Time, sample: &Sample) {
        let value = sample.value(&self.config);
        self.stable.record(now, value);
        self.panic.record(now, value);
        if let Some(offered) = &mut self.offered {
            offered.record(now, sample);
        }
        if let Some(history) = self.history.as_mut().filter(|_| value > 0.0) {
            history.busy(now);
        }
    }

    /// Decides.
    pub fn decide(&mut self, now: Time, seen: &Observation) -> Decision {
        let load = self.load(now, seen);
        let input = Input { ready: seen.ready, starting: seen.starting, load, reachable: seen.reachable };
        let wish = kpa::decide(&self.config, &mut self.state, now, &input);
        let mut reasons = self.reasons(wish);
        let desired = self.beyond(wish, now, seen, &mut reasons);
        let applied = self.apply(now, seen, desired);
        let bounded = applied.write.unwrap_or(seen.current);
        let count = self.within_fleet(bounded, seen, &mut reasons);
        self.bounds(wish.map(|_| desired), bounded, &mut reasons);
        reasons.extend(applied.held.map(Reason::Held));
        let (stable_value, panic_value) = load.unwrap_or_default();
        Decision {
            ready: seen.ready.unwrap_or(0),
            starting: seen.starting,
            desired,
            applied: count,
            stable_value,
            panic_value,
            target: self.config.target,
            panic: self.state.panic_since.is_some(),
            excess_burst_capacity: wish.map_or(0.0, |wish| wish.excess_burst_capacity),
            reasons,
        }
    }

    /// The load over the stable and the panic window; `None` where nobody has reported lately.
    fn load(&mut self, now: Time, seen: &Observation) -> Option<(f64, f64)> {
        if self.stable.is_empty(now) {
            return None;
        }
        let aggregation = self.config.aggregation;
        let load = (self.stable.average(now, aggregation), self.panic.average(now, aggregation));
        let bounded = match &mut self.offered {
            Some(offered) => offered.bound(&self.config, now, load, seen.load_time),
            None => load,
        };
        // While nothing is ready the queue says how long the wait was, not how large the load is.
        if let Some(history) = self.history.as_mut().filter(|_| seen.ready.unwrap_or(0) > 0) {
            history.observe(now, bounded.1);
        }
        // Knative's class sees the load as it is.
        Some(if self.config.class == Class::Gpu { bounded } else { load })
    }

    /// The wish, and what is added to it: spare replicas, and those that the past asks for.
    fn beyond(&self, wish: Option<Wish>, now: Time, seen: &Observation, reasons: &mut Vec<Reason>) -> i32 {
        let mut desired = wish.map_or(-1, |wish| wish.desired);
        let spare = self.config.spare_replicas;
        if desired > 0 && spare > 0 {
            desired = desired.saturating_add_unsigned(spare);
            reasons.push(Reason::Spare(spare));
        }
        let past = self.history.as_ref().map_or(0, |history| history.wish(&self.config, now, seen.load_time));
        if seen.reachable && past as i32 > desired {
            desired = past as i32;
            reasons.push(Reason::Prewarm(past));
        }
        desired
    }

    /// Bounds and scale to zero, and the activity that follows.
    fn apply(&mut self, now: Time, seen: &Observation, desired: i32) -> Applied {
        let situation = Situation {
            activity: self.activity,
            for_time: now.saturating_sub(self.since),
            current: seen.current,
            desired,
            reachable: seen.reachable,
            initial_scale_reached: seen.initial_scale_reached,
            proxy: Proxy::GATEWAY,
        };
        let applied = scale_to_zero::apply(&self.config, &situation);
        if applied.result >= 0 {
            let (ready, reachable) = (seen.ready.unwrap_or(0), seen.reachable);
            let initial = seen.initial_scale_reached;
            let activity = scale_to_zero::activity(&self.config, applied.result, ready, reachable, initial);
            if activity != self.activity {
                self.activity = activity;
                self.since = now;
            }
        }
        applied
    }

    /// GPU class: no more than the fleet can hold. One is always asked for, so that placement says why
    /// it fits nowhere.
    fn within_fleet(&self, count: u32, seen: &Observation, reasons: &mut Vec<Reason>) -> u32 {
        match seen.fits.filter(|_| self.config.class == Class::Gpu) {
            Some(fits) if count > fits.max(1) => {
                reasons.push(Reason::Capacity(count));
                fits.max(1)
            }
            _ => count,
        }
    }

    fn reasons(&self, wish: Option<Wish>) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let Some(wish) = wish else { return vec![Reason::NoData] };
        let panic = self.state.panic_since.is_some();
        let raw = wish.raw_stable.max(if panic { wish.raw_panic } else { 0 });
        if panic {
            reasons.push(Reason::Panic);
        }
        if raw > wish.allowed.1 {
            reasons.push(Reason::ScaleUpRate(raw));
        } else if raw < wish.allowed.0 && !panic {
            reasons.push(Reason::ScaleDownRate(raw));
        }
        if wish.desired > wish.undelayed {
            reasons.push(Reason::ScaleDownDelay(wish.undelayed));
        }
        reasons
    }

    fn bounds(&self, desired: Option<i32>, count: u32, reasons: &mut Vec<Reason>) {
        let Some(desired) = desired.map(|desired| desired.max(0) as u32) else { return };
        if desired < count && count == self.config.min_scale {
            reasons.push(Reason::MinScale(count));
        }
        if desired > count && count == self.config.max_scale {
            reasons.push(Reason::MaxScale(count));
        }
    }
}
