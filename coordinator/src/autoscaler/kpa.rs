//! The decision at each tick: from two averages to a wish. Source: Knative Serving's KPA.

use serde::{Deserialize, Serialize};

use super::{ScalerConfig, Time, window::MaxWindow};

/// What one decision leaves for the next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// When panic began or was last extended; `None` is calm.
    pub panic_since: Option<Time>,
    /// Most replicas wanted since panic began.
    pub max_panic_pods: i32,
    /// Wishes within the scale-down delay; `None` where there was no delay at the start.
    pub delay: Option<MaxWindow>,
}

/// What is seen at a tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Input {
    /// Ready replicas; `None` where they could not be counted.
    pub ready: Option<u32>,
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

/// Slots of the scale-down delay are as long as Knative's tick.
const SLOT_SECONDS: u64 = 2;

impl State {
    /// At the start. With more than one replica ready it begins in panic, so that a restart does not
    /// shrink the fleet.
    pub fn new(config: &ScalerConfig, now: Time, ready: Option<u32>) -> Self {
        let ready = ready.unwrap_or(0);
        let slots = config.scale_down_delay.as_secs().div_ceil(SLOT_SECONDS) as usize;
        Self {
            panic_since: (ready > 1).then_some(now),
            max_panic_pods: ready as i32,
            delay: (!config.scale_down_delay.is_zero()).then(|| MaxWindow::new(slots)),
        }
    }
}

/// Decides. `None` where an input is missing: then nothing changes.
pub fn decide(config: &ScalerConfig, state: &mut State, now: Time, input: &Input) -> Option<Wish> {
    let ready = f64::from(input.ready?);
    let (stable, panic) = input.load?;
    let base = ready.max(1.0);
    let up = (config.max_scale_up_rate * base).ceil();
    let down = if input.reachable { (base / config.max_scale_down_rate).floor() } else { 0.0 };
    let raw_stable = (stable / config.target).ceil();
    let raw_panic = (panic / config.target).ceil();
    let limit = |raw: f64| {
        let limited = raw.max(down).min(up);
        let activated = if config.activation_scale > 1 && raw > 0.0 { f64::from(config.activation_scale) } else { 0.0 };
        limited.max(activated) as i32
    };
    let (want_stable, want_panic) = (limit(raw_stable), limit(raw_panic));

    if raw_panic / base >= config.panic_threshold {
        state.panic_since = Some(now);
    } else if state.panic_since.is_some_and(|since| since + config.stable_window < now) {
        state.panic_since = None;
        state.max_panic_pods = 0;
    }
    let undelayed = if state.panic_since.is_some() {
        state.max_panic_pods = state.max_panic_pods.max(want_stable).max(want_panic);
        state.max_panic_pods
    } else {
        want_stable
    };
    let desired = match &mut state.delay {
        Some(delay) if input.reachable => {
            delay.record((now.as_secs() / SLOT_SECONDS) as i64, undelayed);
            delay.current()
        }
        _ => undelayed,
    };
    Some(Wish {
        desired,
        excess_burst_capacity: excess_burst_capacity(config, ready, panic),
        raw_stable: raw_stable as i32,
        raw_panic: raw_panic as i32,
        allowed: (down as i32, up as i32),
        undelayed,
    })
}

fn excess_burst_capacity(config: &ScalerConfig, ready: f64, panic: f64) -> f64 {
    match config.target_burst_capacity {
        0.0 => 0.0,
        -1.0 => -1.0,
        wanted => (ready * config.total - wanted - panic).floor(),
    }
}
