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

/// What is known of the proxy that holds requests while no replica runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proxy {
    /// True where requests are sent through it.
    pub in_path: bool,
    /// For how long they have been.
    pub for_time: Duration,
    /// True where a probe has shown it to be in the path.
    pub confirmed: bool,
}

impl Proxy {
    /// Pilotlight's gateways: every request goes through one, always.
    pub const GATEWAY: Self = Self { in_path: true, for_time: Duration::MAX, confirmed: true };
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
    /// The proxy before it.
    pub proxy: Proxy,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// The wish as it stands: -1 unknown.
    pub result: i32,
    /// Replicas to have from now on; `None` where nothing changes.
    pub write: Option<u32>,
    /// The rule that held a replica back, if one did.
    pub held: Option<Held>,
    /// When Knative looks again, where nothing else would make it. Our loop looks at every tick.
    pub recheck_after: Option<Duration>,
    /// True where the proxy has to be probed until it answers.
    pub probe: bool,
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
    /// The proxy has not been seen in the path, or not for the grace period.
    Proxy,
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

/// Applies bounds and the scale-to-zero rules.
pub fn apply(config: &ScalerConfig, situation: &Situation) -> Applied {
    let Situation { activity, current, .. } = *situation;
    if situation.desired < 0 && activity != Activity::Activating {
        return Applied { result: situation.desired, ..Default::default() };
    }
    let min = least(config, situation.reachable, situation.initial_scale_reached);
    let max = if config.max_scale == 0 { u32::MAX } else { config.max_scale };
    let desired = (situation.desired.max(0) as u32).max(min).min(max);
    if desired > 0 {
        let write = (desired != current).then_some(desired);
        return Applied { result: desired as i32, write, ..Default::default() };
    }
    to_zero(config, situation)
}

fn to_zero(config: &ScalerConfig, situation: &Situation) -> Applied {
    let Situation { activity, for_time, current, proxy, .. } = *situation;
    let keep_one = |held, recheck_after| Applied {
        result: 1,
        write: (current != 1).then_some(1),
        held: Some(held),
        recheck_after,
        probe: false,
    };
    let wait = |result, held, recheck_after| Applied { result, held: Some(held), recheck_after, ..Default::default() };
    if !config.enable_scale_to_zero {
        return keep_one(Held::ScaleToZeroDisabled, None);
    }
    match activity {
        Activity::Activating if for_time > config.activation_timeout => go(current),
        Activity::Activating => wait(-1, Held::Activating, Some(config.activation_timeout)),
        Activity::Active if for_time < config.stable_window => {
            keep_one(Held::ActiveWindow, Some(config.stable_window - for_time))
        }
        // Nothing changes in the path that would make Knative look again.
        Activity::Active => wait(0, Held::BecomingInactive, proxy.in_path.then_some(config.grace)),
        Activity::Inactive if config.target_burst_capacity != -1.0 && !proxy.confirmed => {
            Applied { probe: true, ..wait(0, Held::Proxy, None) }
        }
        Activity::Inactive => inactive(config, situation),
    }
}

fn go(current: u32) -> Applied {
    Applied { result: 0, write: (current != 0).then_some(0), ..Default::default() }
}

/// Inactive, and the proxy is in the path. Retention is a least time, the grace period a most.
fn inactive(config: &ScalerConfig, situation: &Situation) -> Applied {
    let Situation { for_time, current, proxy, .. } = *situation;
    let retention = if situation.reachable { config.pod_retention } else { Duration::ZERO };
    let wait = |held, left| Applied { held: Some(held), recheck_after: Some(left), ..Default::default() };
    if for_time >= config.grace.max(retention) {
        go(current)
    } else if for_time < retention {
        wait(Held::Retention(retention - for_time), retention - for_time)
    } else if proxy.for_time >= config.grace {
        go(current)
    } else {
        wait(Held::Proxy, config.grace - proxy.for_time)
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
