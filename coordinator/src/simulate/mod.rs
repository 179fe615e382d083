//! `pilotlight simulate`: the coordinator's own functions over a virtual clock, a virtual fleet and a trace.
//!
//! Nothing is modelled twice: reports go through [`crate::reconcile::observe`], decisions through
//! [`crate::reconcile::scale`] and the autoscaler, replicas through [`crate::reconcile::plan`] and placement.
//! Only what lies outside the coordinator is virtual: time, the nodes' model servers ([`engine`]) and
//! the requests ([`trace`], [`pattern`]). [`replay`] feeds a live run's recording to the autoscaler instead.
//! Pure: the same scenario gives the same outcome.

mod engine;
mod fleet;
mod outcome;
pub mod pattern;
pub mod replay;
mod service;
mod setup;
#[cfg(test)]
mod tests;
pub mod trace;
mod usage;
pub mod warmth;

use std::time::Duration;

use serde::Serialize;

pub use engine::{run, run_metered};
pub use fleet::{FleetError, VirtualNode, nodes};
pub use outcome::{Outcome, PanicPeriod, Percentiles, Point, ServiceOutcome};
pub use trace::{Request, Trace, Work};
pub use usage::{Life, Metered};

use crate::{autoscaler::Defaults, spec::InferenceService};

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The services, each at zero replicas and past its initial scale when the trace begins.
    pub services: Vec<InferenceService>,
    /// Fleet-wide autoscaler settings.
    pub scaling: Defaults,
    /// The machines.
    pub nodes: Vec<VirtualNode>,
    /// The requests.
    pub trace: Trace,
    /// How the model servers behave.
    pub model: ModelProfile,
    /// Time between decisions.
    pub tick: Duration,
    /// Time between reports.
    pub report_interval: Duration,
    /// Requests that may wait for one service; further ones are shed.
    pub queue_limit: usize,
    /// Time that is simulated past the last arrival.
    pub tail: Duration,
}

/// How the model servers behave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ModelProfile {
    /// From being placed to being ready.
    pub load_time: Duration,
    /// Prompt tokens read per second and request.
    pub prefill_tokens_per_second: f64,
    /// Tokens generated per second and request.
    pub decode_tokens_per_second: f64,
    /// How long a request runs where the trace gives neither duration nor tokens.
    pub request_time: Duration,
}

impl Default for ModelProfile {
    fn default() -> Self {
        Self {
            load_time: Duration::from_secs(30),
            prefill_tokens_per_second: 8_000.0,
            decode_tokens_per_second: 50.0,
            request_time: Duration::from_secs(1),
        }
    }
}

impl ModelProfile {
    /// How long a request runs once it has a slot.
    pub fn time_of(&self, work: Work) -> Duration {
        match work {
            Work::Duration(duration) => duration,
            Work::Tokens { prompt, generated } => Duration::from_secs_f64(
                f64::from(prompt) / self.prefill_tokens_per_second
                    + f64::from(generated) / self.decode_tokens_per_second,
            ),
            Work::Unknown => self.request_time,
        }
    }
}

/// Why a scenario cannot be simulated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ScenarioError {
    /// Nothing to simulate.
    #[error("the manifest has no InferenceService")]
    NoService,
    /// The trace names a service that the manifest does not have.
    #[error("the trace asks for service {asked}, which the manifest does not have; it has: {known}")]
    UnknownService {
        /// As the trace has it.
        asked: String,
        /// All that there are.
        known: String,
    },
    /// The autoscaler's settings contradict each other.
    #[error("{0}")]
    Settings(String),
    /// An interval is out of range.
    #[error("{0} must be from 10 ms to 10 min")]
    Interval(&'static str),
}
