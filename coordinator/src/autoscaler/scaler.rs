//! One revision's autoscaler: windows, decision, bounds and clocks together.

use std::{fmt, time::Duration};

use pilotlight_proto::fleet::v1::RevisionLoad;
use serde::{Deserialize, Serialize};

use super::{
    Metric, ScalerConfig, Time,
    kpa::{self, Input},
    scale_to_zero::{self, Activity, Held, Situation},
    window::Window,
};

/// One agent's report of one revision.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Time-weighted mean of requests waiting or running.
    pub average_concurrency: f64,
    /// Requests that arrived, per second.
    pub request_rate: f64,
}

impl Sample {
    /// From a report that covers `interval`.
    pub fn of_report(load: &RevisionLoad, interval: Duration) -> Self {
        let seconds = interval.as_secs_f64();
        let request_rate = if seconds > 0.0 { load.request_count as f64 / seconds } else { 0.0 };
        Self { average_concurrency: load.average_concurrency, request_rate }
    }
}

/// What is seen at a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Replicas that take requests; `None` where they could not be counted.
    pub ready: Option<u32>,
    /// Replicas wanted until now.
    pub current: u32,
    /// False where the revision gets no traffic any more.
    pub reachable: bool,
    /// True once the revision has had its initial scale ready.
    pub initial_scale_reached: bool,
}

/// A decision and what led to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Replicas that were ready.
    pub ready: u32,
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
        let rules = |decision: &Self| decision.reasons.iter().map(std::mem::discriminant).collect::<Vec<_>>();
        self.ready == other.ready
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
            Self::Held(Held::ScaleToZeroDisabled) => f.write_str("scale to zero is off"),
            Self::Held(Held::Activating) => f.write_str("becoming ready"),
            Self::Held(Held::ActiveWindow) => f.write_str("active for less than a stable window"),
            Self::Held(Held::BecomingInactive) => f.write_str("inactive from now on"),
            Self::Held(Held::Retention(left)) => {
                write!(f, "retained for another {}", humantime::format_duration(Duration::from_secs(left.as_secs())))
            }
        }
    }
}

/// All state of one revision's autoscaler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaler {
    config: ScalerConfig,
    stable: Window,
    panic: Window,
    state: kpa::State,
    activity: Activity,
    since: Time,
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
            config,
        }
    }

    /// Takes other settings; what was recorded stays as far as it fits.
    pub fn reconfigure(&mut self, config: ScalerConfig) {
        self.stable.resize(config.stable_window);
        self.panic.resize(config.panic_window);
        self.config = config;
    }

    /// Takes in a report. Reports of one second add up.
    pub fn record(&mut self, now: Time, sample: &Sample) {
        let value = match self.config.metric {
            Metric::Concurrency => sample.average_concurrency,
            Metric::Rps => sample.request_rate,
        };
        self.stable.record(now, value);
        self.panic.record(now, value);
    }

    /// A first request waits: it counts at once as one, as Knative's activator pokes its autoscaler.
    pub fn poke(&mut self, now: Time) {
        self.record(now, &Sample { average_concurrency: 1.0, request_rate: 1.0 });
    }

    /// Decides.
    pub fn decide(&mut self, now: Time, seen: &Observation) -> Decision {
        let aggregation = self.config.aggregation;
        let load = (!self.stable.is_empty(now))
            .then(|| (self.stable.average(now, aggregation), self.panic.average(now, aggregation)));
        let input = Input { ready: seen.ready, load, reachable: seen.reachable };
        let wish = kpa::decide(&self.config, &mut self.state, now, &input);
        let desired = wish.map_or(-1, |wish| wish.desired);
        let situation = Situation {
            activity: self.activity,
            for_time: now.saturating_sub(self.since),
            current: seen.current,
            desired,
            reachable: seen.reachable,
            initial_scale_reached: seen.initial_scale_reached,
        };
        let applied = scale_to_zero::apply(&self.config, &situation);
        let ready = seen.ready.unwrap_or(0);
        if applied.result >= 0 {
            let activity = scale_to_zero::activity(
                &self.config,
                applied.result,
                ready,
                seen.reachable,
                seen.initial_scale_reached,
            );
            if activity != self.activity {
                self.activity = activity;
                self.since = now;
            }
        }
        let count = applied.write.unwrap_or(seen.current);
        let (stable_value, panic_value) = load.unwrap_or_default();
        Decision {
            ready,
            desired,
            applied: count,
            stable_value,
            panic_value,
            target: self.config.target,
            panic: self.state.panic_since.is_some(),
            excess_burst_capacity: wish.map_or(0.0, |wish| wish.excess_burst_capacity),
            reasons: self.reasons(wish, count, applied.held),
        }
    }

    fn reasons(&self, wish: Option<kpa::Wish>, count: u32, held: Option<Held>) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let Some(wish) = wish else { return vec![Reason::NoData] };
        let raw = wish.raw_stable.max(if self.state.panic_since.is_some() { wish.raw_panic } else { 0 });
        if self.state.panic_since.is_some() {
            reasons.push(Reason::Panic);
        }
        if raw > wish.allowed.1 {
            reasons.push(Reason::ScaleUpRate(raw));
        } else if raw < wish.allowed.0 && self.state.panic_since.is_none() {
            reasons.push(Reason::ScaleDownRate(raw));
        }
        if wish.desired > wish.undelayed {
            reasons.push(Reason::ScaleDownDelay(wish.undelayed));
        }
        let desired = wish.desired.max(0) as u32;
        if desired < count && count == self.config.min_scale {
            reasons.push(Reason::MinScale(count));
        }
        if desired > count && count == self.config.max_scale {
            reasons.push(Reason::MaxScale(count));
        }
        reasons.extend(held.map(Reason::Held));
        reasons
    }
}
