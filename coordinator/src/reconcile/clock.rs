//! The one place where the loop learns the time.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// Wall-clock time that never jumps: the time at start, plus what has passed since.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Timestamp,
    started: Instant,
}

impl Clock {
    /// Reads the wall clock once.
    pub fn start() -> Self {
        Self { wall: Timestamp::now(), started: Instant::now() }
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        self.wall + self.started.elapsed()
    }
}

/// The autoscaler's time of a timestamp: since the Unix epoch.
pub fn scaler_time(now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(Timestamp::UNIX_EPOCH)).unwrap_or(Duration::ZERO)
}
