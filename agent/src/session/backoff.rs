//! Pauses between attempts to connect.

use std::time::Duration;

use rand::Rng as _;
use tokio::time::Instant;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);
/// Pauses start over after a session that lasted this long. A coordinator that accepts sessions and ends them, for
/// example because it is overloaded, is not asked ever faster.
const STABLE_SESSION: Duration = Duration::from_secs(10);

/// Doubles from 100 ms to 3 s, each with up to half as much again at random, so that a fleet does not
/// come back in one wave.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    attempts: u32,
    /// When the last session was opened, if it was since the last pause.
    opened_at: Option<Instant>,
}

impl Backoff {
    pub(super) fn next(&mut self) -> Duration {
        if self.opened_at.take().is_some_and(|opened_at| opened_at.elapsed() >= STABLE_SESSION) {
            self.attempts = 0;
        }
        let pause = FIRST.saturating_mul(1 << self.attempts.min(16)).min(LONGEST);
        self.attempts += 1;
        pause + pause.mul_f64(rand::rng().random_range(0.0..0.5))
    }

    /// A session has been opened.
    pub(super) fn session_opened(&mut self) {
        self.opened_at = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_a_limit_and_start_over_after_a_session_that_lasted() {
        let mut backoff = Backoff::default();
        let first = backoff.next();
        assert!(first >= FIRST && first < FIRST * 3 / 2);
        let later: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(later.iter().all(|pause| *pause < LONGEST * 3 / 2));
        assert!(later[39] >= LONGEST);
        backoff.session_opened();
        tokio::time::advance(STABLE_SESSION - Duration::from_millis(1)).await;
        assert!(backoff.next() >= LONGEST, "that session was short");
        backoff.session_opened();
        tokio::time::advance(STABLE_SESSION).await;
        assert!(backoff.next() < FIRST * 3 / 2);
    }
}
