//! The decision at each tick: from two averages to a wish. Source: Knative Serving's KPA.
//!
//! The class for GPU fleets goes the same way and differs in what the limits are measured by
//! ([`basis`]): replicas that load count as capacity, and the way down is a ramp.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Class, ScalerConfig, Time, window::MaxWindow};

/// What one decision leaves for the next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// When panic began or was last extended; `None` is calm.
    pub panic_since: Option<Time>,
    /// Most replicas wanted since panic began.
    pub max_panic_pods: i32,
    /// Wishes within the scale-down delay; `None` where there was no delay at the start.
    pub delay: Option<MaxWindow>,
    /// GPU class: wishes within [`RAMP`], from which the scale-down rate counts.
    #[serde(default)]
    pub recent: Option<MaxWindow>,
}

/// What is seen at a tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Input {
    /// Ready replicas; `None` where they could not be counted.
    pub ready: Option<u32>,
    /// Replicas that load; only the GPU class looks at them.
    pub starting: u32,
    /// Load averaged over the two windows, whole revision; `None` where there is no data.
    pub load: Option<(f64, f64)>,
    /// False where the revision gets no traffic any more.
    pub reachable: bool,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Wish {
    /// Replicas wanted, before bounds.
    pub desired: i32,
    /// Spare capacity, in the metric's unit; negative where there is too little.
    pub excess_burst_capacity: f64,
    /// Replicas that the stable load alone asks for, unlimited.
    pub raw_stable: i32,
    /// Replicas that the panic load alone asks for, unlimited.
    pub raw_panic: i32,
    /// Least and most that the rates allow.
    pub allowed: (i32, i32),
    /// What was wanted before the scale-down delay.
    pub undelayed: i32,
}

/// Slots of the scale-down delay are as long as Knative's tick, whatever ours is.
const SLOT: Duration = Duration::from_secs(2);
/// GPU class: the scale-down rate holds per this time, as CoreWeave documents its rates.
pub const RAMP: Duration = Duration::from_secs(15);

fn slot(now: Time, length: Duration) -> i64 {
    (now.as_nanos() / length.as_nanos()) as i64
}

impl State {
    /// At the start. With more than one replica ready it begins in panic, so that a restart does not
    /// shrink the fleet.
    pub fn new(config: &ScalerConfig, now: Time, ready: Option<u32>) -> Self {
        let ready = ready.unwrap_or(0);
        let slots = config.scale_down_delay.as_nanos().div_ceil(SLOT.as_nanos()) as usize;
        let recent = (config.class == Class::Gpu).then(|| {
            let mut recent = MaxWindow::new(RAMP.as_secs() as usize);
            recent.record(slot(now, Duration::from_secs(1)), ready.saturating_sub(config.spare_replicas) as i32);
            recent
        });
        Self {
            panic_since: (ready > 1).then_some(now),
            max_panic_pods: ready as i32,
            delay: (!config.scale_down_delay.is_zero()).then(|| MaxWindow::new(slots)),
            recent,
        }
    }

    fn panic_or_calm(&mut self, config: &ScalerConfig, now: Time, over: bool) -> bool {
        if over {
            self.panic_since = Some(now);
        } else if self.panic_since.is_some_and(|since| since + config.stable_window < now) {
            self.panic_since = None;
            self.max_panic_pods = 0;
        }
        self.panic_since.is_some()
    }
}

/// What panic and the rates are measured by.
struct Basis {
    /// Replicas that the panic threshold is held against.
    replicas: f64,
    /// Least and most that the rates allow.
    allowed: (f64, f64),
}

fn basis(config: &ScalerConfig, state: &mut State, now: Time, input: &Input, ready: f64) -> Basis {
    let up = (config.max_scale_up_rate * ready.max(1.0)).ceil();
    let (replicas, from, up) = match (&mut state.recent, config.class) {
        (Some(recent), Class::Gpu) => {
            // What loads was ordered for this load: it is neither ordered again nor taken back.
            let capacity = (ready + f64::from(input.starting)).max(1.0);
            recent.hold(slot(now, Duration::from_secs(1)));
            (capacity, f64::from(recent.current()).max(1.0), up.max(capacity))
        }
        _ => (ready.max(1.0), ready.max(1.0), up),
    };
    let down = if input.reachable { (from / config.max_scale_down_rate).floor() } else { 0.0 };
    Basis { replicas, allowed: (down, up) }
}

/// Decides. `None` where an input is missing: then nothing changes.
pub fn decide(config: &ScalerConfig, state: &mut State, now: Time, input: &Input) -> Option<Wish> {
    let ready = f64::from(input.ready?);
    let (stable, panic) = input.load?;
    let Basis { replicas, allowed: (down, up) } = basis(config, state, now, input, ready);
    let raw_stable = (stable / config.target).ceil();
    let raw_panic = (panic / config.target).ceil();
    let limit = |raw: f64| {
        let limited = raw.max(down).min(up);
        let activated = if config.activation_scale > 1 && raw > 0.0 { f64::from(config.activation_scale) } else { 0.0 };
        limited.max(activated) as i32
    };
    let (want_stable, want_panic) = (limit(raw_stable), limit(raw_panic));

    let panicking = state.panic_or_calm(config, now, raw_panic / replicas >= config.panic_threshold);
    let undelayed = if panicking {
        state.max_panic_pods = state.max_panic_pods.max(want_stable).max(want_panic);
        state.max_panic_pods
    } else {
        want_stable
    };
    if let Some(recent) = &mut state.recent {
        recent.record(slot(now, Duration::from_secs(1)), undelayed);
    }
    let desired = match &mut state.delay {
        Some(delay) if input.reachable => {
            delay.record(slot(now, SLOT), undelayed);
            delay.current()
        }
        _ => undelayed,
    };
    Some(Wish {
        desired,
        excess_burst_capacity: excess_burst_capacity(config.target_burst_capacity, ready, config.total, panic),
        raw_stable: raw_stable as i32,
        raw_panic: raw_panic as i32,
        allowed: (down as i32, up as i32),
        undelayed,
    })
}

/// Capacity beyond the load and the burst that is asked for, in the metric's unit: `ready` replicas that
/// can carry `total` each, less `wanted` and the load over the panic window. -1 where the wanted burst
/// is without end, 0 where none is wanted.
pub fn excess_burst_capacity(wanted: f64, ready: f64, total: f64, panic: f64) -> f64 {
    match wanted {
        0.0 => 0.0,
        -1.0 => -1.0,
        wanted => (ready * total - wanted - panic).floor(),
    }
}

/// The same before the first decision: as if the initial scale were ready and nothing loaded it.
/// Knative cuts off towards zero here.
pub fn initial_excess_burst_capacity(wanted: f64, initial_scale: u32, total: f64) -> f64 {
    match wanted {
        0.0 | -1.0 => wanted,
        wanted => (f64::from(initial_scale) * total - wanted).trunc(),
    }
}

/// Proxies (activators) that Knative would put before a revision, each carrying `proxy_capacity`. In
/// Pilotlight every agent is one; the number tells a user what the same service needs on Knative.
pub fn proxies(ready: u32, total: f64, wanted_burst: f64, proxy_capacity: f64) -> u32 {
    const LEAST: f64 = 2.0;
    if wanted_burst == 0.0 {
        return LEAST as u32;
    }
    ((f64::from(ready) * total + wanted_burst.max(0.0)) / proxy_capacity).ceil().max(LEAST) as u32
}
