//! What the handlers share: the model once it is there, and counts of what was asked.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::{Classifier, error::Refusal, weights::Weights};

/// One model server.
#[derive(Debug)]
pub struct Server {
    pub(crate) model_name: String,
    pub(crate) request_time: Duration,
    classifier: OnceLock<Classifier>,
    weights: OnceLock<Weights>,
    asleep: AtomicBool,
    began: Instant,
    /// Processor time until then.
    start_took: Duration,
    /// How long loading took.
    load_took: OnceLock<Duration>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    received: AtomicU64,
    answered: AtomicU64,
    in_flight: AtomicU64,
    max_in_flight: AtomicU64,
}

/// Requests for predictions and streams since the start; probes and metadata are not counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Requests that arrived, those refused included.
    pub received: u64,
    /// Requests answered to the end, refusals included. A client that hung up got no answer.
    pub answered: u64,
    /// Requests being worked on now.
    pub in_flight: u64,
    /// The most that were ever worked on at the same time.
    pub max_in_flight: u64,
    /// Bytes of the weights that were loaded into memory.
    pub weight_bytes: u64,
    /// Processor time of this process when the server began to listen, microseconds: what it takes to become a process
    /// that listens.
    pub start_microseconds: u64,
    /// From the moment at which the server began to listen until its model was there, microseconds; 0 before that.
    pub load_microseconds: u64,
    /// Process id, so that a caller behind a proxy can tell servers apart.
    pub pid: u32,
}

impl Server {
    /// A server whose model is still to come. `request_time` is how long each answer takes at least.
    pub fn new(model_name: impl Into<String>, request_time: Duration) -> Self {
        Self {
            model_name: model_name.into(),
            request_time,
            classifier: OnceLock::new(),
            weights: OnceLock::new(),
            asleep: AtomicBool::new(false),
            began: Instant::now(),
            // Linux always has this clock.
            start_took: clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from),
            load_took: OnceLock::new(),
            counts: Arc::default(),
        }
    }

    /// The model is there. A second one is ignored.
    pub fn loaded(&self, classifier: Classifier) {
        // Models are loaded once per process; the first one stays.
        let _ = self.load_took.set(self.began.elapsed());
        let _ = self.classifier.set(classifier);
    }

    /// Keeps weights in memory, asleep or not. Second ones are ignored.
    pub(crate) fn keep(&self, weights: Weights) {
        // As with the model.
        let _ = self.weights.set(weights);
    }

    /// True once the model is there, and while it does not sleep.
    pub fn ready(&self) -> bool {
        self.loading_done() && !self.asleep()
    }

    pub(crate) fn loading_done(&self) -> bool {
        self.classifier.get().is_some()
    }

    /// True while it sleeps.
    pub fn asleep(&self) -> bool {
        self.asleep.load(Relaxed)
    }

    /// Puts it to sleep, or wakes it; what it loaded stays in memory.
    pub(crate) fn set_asleep(&self, asleep: bool) {
        self.asleep.store(asleep, Relaxed);
    }

    /// What was asked so far.
    pub fn stats(&self) -> Stats {
        Stats {
            received: self.counts.received.load(Relaxed),
            answered: self.counts.answered.load(Relaxed),
            in_flight: self.counts.in_flight.load(Relaxed),
            max_in_flight: self.counts.max_in_flight.load(Relaxed),
            weight_bytes: self.weights.get().map_or(0, Weights::bytes),
            start_microseconds: microseconds(self.start_took),
            load_microseconds: self.load_took.get().copied().map_or(0, microseconds),
            pid: std::process::id(),
        }
    }

    pub(crate) fn classifier(&self) -> Result<&Classifier, Refusal> {
        let classifier = self.classifier.get().ok_or_else(|| Refusal::loading(&self.model_name))?;
        if self.asleep() { Err(Refusal::asleep(&self.model_name)) } else { Ok(classifier) }
    }

    /// Refuses a name that is not this server's model.
    pub(crate) fn check_name(&self, name: &str) -> Result<(), Refusal> {
        if name == self.model_name {
            return Ok(());
        }
        Err(Refusal::not_found(format!("model {name:?} is not served here; this server has {:?}", self.model_name)))
    }

    /// Counts a request until the result is dropped.
    pub(crate) fn begin(&self) -> InFlight {
        self.counts.received.fetch_add(1, Relaxed);
        let now = self.counts.in_flight.fetch_add(1, Relaxed) + 1;
        self.counts.max_in_flight.fetch_max(now, Relaxed);
        InFlight { counts: Arc::clone(&self.counts) }
    }
}

/// A request being worked on; dropped without [`InFlight::answered`] when the client hangs up.
#[derive(Debug)]
pub(crate) struct InFlight {
    counts: Arc<Counts>,
}

impl InFlight {
    pub(crate) fn answered(self) {
        self.counts.answered.fetch_add(1, Relaxed);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.counts.in_flight.fetch_sub(1, Relaxed);
    }
}

fn microseconds(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}
