//! Log lines that would repeat without end.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Allows a log line at most every 10 s.
#[derive(Debug, Default)]
pub struct RateLimit(Mutex<Option<Instant>>);

impl RateLimit {
    /// Returns `true` if the line may be written now.
    pub fn allow(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = last.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if allowed {
            *last = Some(Instant::now());
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_is_written_and_the_next_one_is_not() {
        let limit = RateLimit::default();
        assert!(limit.allow());
        assert!(!limit.allow());
    }
}
