//! Eviction policies against each other: many models, few GPUs, budgets per node, a trace of bursts.
//!
//! The decisions are the server's own: [`crate::eviction`]. What lies outside them is virtual: time, what a
//! start from each rung really takes, and the requests. Every policy gets the same trace, the same way to
//! choose a node, and the same ladder; only who steps down differs. Pure: the same scenario and seed give
//! the same outcome.

mod engine;
mod load;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::Serialize;

pub use engine::run;
pub use load::{Arrival, Load, Model};

use crate::eviction::{Bytes, Policy};

const GIB: u64 = 1 << 30;

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Models and their requests.
    pub load: Load,
    /// Identical nodes.
    pub nodes: usize,
    /// GPUs of a node; a model takes whole ones.
    pub gpus: u32,
    /// Main memory of a node for what sleeps or is staged, bytes.
    pub host: u64,
    /// Disk of a node for images and weights, bytes.
    pub disk: u64,
    /// After this time without requests a model goes to sleep.
    pub idle: Duration,
    /// How far ahead the need is looked at.
    pub horizon: Duration,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            load: Load::default(),
            nodes: 4,
            gpus: 8,
            host: 256 * GIB,
            disk: 1024 * GIB,
            idle: Duration::from_secs(60),
            horizon: HORIZON,
        }
    }
}

/// How far ahead the need is looked at, unless said otherwise. Much longer ones make all that is in a burst
/// look equally needed.
pub const HORIZON: Duration = Duration::from_secs(120);

/// Bytes that stand for one whole GPU.
const GPU: u64 = 80 * GIB;

impl Scenario {
    /// A node's budget.
    fn budget(&self) -> Bytes {
        Bytes { gpu: u64::from(self.gpus) * GPU, host: self.host, disk: self.disk }
    }

    /// Says which value cannot be simulated.
    ///
    /// # Errors
    /// The value's name and its range.
    pub fn check(&self) -> Result<(), String> {
        let load = &self.load;
        let in_range = [
            ("nodes", self.nodes as f64, 1.0, 1000.0),
            ("gpus", f64::from(self.gpus), 4.0, 64.0),
            ("models", load.models as f64, 1.0, 10_000.0),
            ("zipf", load.zipf, 0.0, 4.0),
            ("rate", load.rate, 1e-6, 1000.0),
            ("burst share", load.burst_share, 0.0, 1.0),
            ("length in seconds", load.length.as_secs_f64(), 1.0, 31.0 * 86_400.0),
        ];
        for (name, value, least, most) in in_range {
            if !(least..=most).contains(&value) {
                return Err(format!("{name}: {value}: expected {least} to {most}"));
            }
        }
        // Each model has to fit an empty node.
        let largest = load.largest();
        for (name, bytes) in [("host", self.host), ("disk", self.disk)] {
            if bytes < largest {
                return Err(format!("{name}: {bytes}: expected at least {largest}, the largest model's bytes"));
            }
        }
        Ok(())
    }
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Requests, all of which are served in the end.
    pub requests: u64,
    /// Starts from each rung: Absent, Cached, Staged, Asleep.
    pub starts: [u64; 4],
    /// Requests that met no ready model.
    pub waited: u64,
    /// What requests waited, in sum, seconds.
    pub wait_seconds: f64,
    /// The longest wait of 99 % of all requests, seconds.
    pub wait_p99: f64,
    /// GPUs held, loading included.
    pub gpu_minutes: f64,
    /// Steps down that the budgets asked for.
    pub evictions: u64,
}

impl Outcome {
    /// Starts that were no wake from sleep.
    pub fn cold_starts(&self) -> u64 {
        self.starts[..3].iter().sum()
    }

    /// All starts.
    pub fn all_starts(&self) -> u64 {
        self.starts.iter().sum()
    }
}

/// Every policy over the same scenario, the best first-named.
///
/// # Errors
/// See [`Scenario::check`].
pub fn compare(scenario: &Scenario) -> Result<Vec<(Policy, Outcome)>, String> {
    scenario.check()?;
    let trace = scenario.load.trace();
    let policies = [Policy::CostAware, Policy::Lru, Policy::Lfu];
    Ok(policies.map(|policy| (policy, run(scenario, &trace, policy))).into())
}
