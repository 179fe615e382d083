//! How many replicas a revision should have: Knative's request-driven autoscaler (KPA) as pure functions.
//!
//! [`window`] averages load over time, [`kpa`] turns averages into a wish, [`scale_to_zero`] bounds the
//! wish and decides when the last replica may go, and [`Scaler`] joins them for one revision. Settings
//! come from [`Defaults`], annotations and KServe's fields ([`ScalerConfig::resolve`]). [`gpu`] is what the
//! class for GPU fleets does differently, [`prewarm`] what the past says of the next minutes.
//!
//! # Tick and rates
//! Knative applies `max-scale-up-rate` and `max-scale-down-rate` at each decision, to the number of
//! *ready* replicas: `ceil(rate · max(1, ready))` and `floor(max(1, ready) / rate)`. So it is here,
//! whatever the tick (2 s unless configured). CoreWeave's documentation states its rates per 15 s; with
//! Knative's code, which it runs, they hold per decision: with a tick of 15 s the two say the same. A
//! scale-up is limited anew only once the replicas of the last one are ready; a scale-down by 1.1 takes
//! every decision about 9 %, and at least one replica. The GPU class takes the scale-down rate per 15 s
//! ([`kpa::RAMP`]) whatever the tick.

mod annotations;
mod config;
pub mod gpu;
pub mod kpa;
pub mod prewarm;
pub mod scale_to_zero;
mod scaler;
#[cfg(test)]
mod tests;
pub mod window;

use std::time::Duration;

pub use config::{Aggregation, Class, Defaults, Metric, ScalerConfig, metric_target};
pub use scaler::{Decision, Observation, Reason, Sample, Scaler};

/// Time since any fixed moment; only differences matter.
pub type Time = Duration;
