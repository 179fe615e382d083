//! Bounds, initial scale, and when the last replica may go. Source: Knative Serving's KPA reconciler.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ScalerConfig;

/// A revision's activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// Enough replicas are ready.
    Active,
    /// Nobody needs it.
    Inactive,
    /// Replicas are wanted and not yet ready.
    Activating,
}

/// The state that the wish is applied to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Situation {
    /// Activity, and for how long.
    pub activity: Activity,
    /// Time in that activity.
    pub for_time: Duration,
    /// Replicas wanted until now.
    pub current: u32,
    /// The wish; -1 is unknown.
    pub desired: i32,
    /// False where the revision gets no traffic any more.
    pub reachable: bool,
    /// True once the revision has had its initial scale ready.
    pub initial_scale_reached: bool,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// The wish as it stands: -1 unknown.
    pub result: i32,
    /// Replicas to have from now on; `None` where nothing changes.
    pub write: Option<u32>,
    /// The rule that held a replica back, if one did.
    pub held: Option<Held>,
}

/// Why replicas are kept that the load does not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// Scale to zero is off.
    ScaleToZeroDisabled,
    /// It is becoming ready.
    Activating,
    /// It has been active for less than a stable window.
    ActiveWindow,
    /// It has just become inactive; the gateways hold requests from now on.
    BecomingInactive,
    /// The pod retention period, of which this much is left.
    Retention(Duration),
}

/// The lower bound that holds now.
pub fn least(config: &ScalerConfig, reachable: bool, initial_scale_reached: bool) -> u32 {
    let min = if reachable { config.min_scale } else { 0 };
    let initial =
        if reachable && !initial_scale_reached && config.initial_scale > 1 { config.initial_scale } else { 0 };
    min.max(initial)
}

/// Applies bounds and the scale-to-zero rules. In Pilotlight gateways always are in the path, so that
/// Knative's wait for its proxy is over as soon as the revision is inactive.
pub fn apply(config: &ScalerConfig, situation: &Situation) -> Applied {
    let Situation { activity, current, .. } = *situation;
    if situation.desired < 0 && activity != Activity::Activating {
        return Applied { result: situation.desired, write: None, held: None };
    }
    let min = least(config, situation.reachable, situation.initial_scale_reached);
    let max = if config.max_scale == 0 { u32::MAX } else { config.max_scale };
    let desired = (situation.desired.max(0) as u32).max(min).min(max);
    if desired > 0 {
        return Applied { result: desired as i32, write: (desired != current).then_some(desired), held: None };
    }
    to_zero(config, situation)
}

fn to_zero(config: &ScalerConfig, situation: &Situation) -> Applied {
    let Situation { activity, for_time, current, .. } = *situation;
    let keep_one = |held| Applied { result: 1, write: (current != 1).then_some(1), held: Some(held) };
    let go = Applied { result: 0, write: (current != 0).then_some(0), held: None };
    let wait = |result, held| Applied { result, write: None, held: Some(held) };
    if !config.enable_scale_to_zero {
        return keep_one(Held::ScaleToZeroDisabled);
    }
    match activity {
        Activity::Activating if for_time > config.activation_timeout => go,
        Activity::Activating => wait(-1, Held::Activating),
        Activity::Active if for_time < config.stable_window => keep_one(Held::ActiveWindow),
        Activity::Active => wait(0, Held::BecomingInactive),
        Activity::Inactive => {
            let retention = if situation.reachable { config.pod_retention } else { Duration::ZERO };
            match retention.checked_sub(for_time) {
                Some(left) if !left.is_zero() => wait(0, Held::Retention(left)),
                _ => go,
            }
        }
    }
}

/// The activity that follows from a wish and what is ready.
pub fn activity(
    config: &ScalerConfig,
    desired: i32,
    ready: u32,
    reachable: bool,
    initial_scale_reached: bool,
) -> Activity {
    if desired == 0 {
        return Activity::Inactive;
    }
    if ready < least(config, reachable, initial_scale_reached).max(1) { Activity::Activating } else { Activity::Active }
}
