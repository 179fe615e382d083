//! Pauses between attempts to connect.

use std::time::Duration;

use rand::Rng as _;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Doubles from 100 ms to 5 s, each with up to half as much again at random, so that a fleet does not
/// come back in one wave.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    attempts: u32,
}

impl Backoff {
    pub(super) fn next(&mut self) -> Duration {
        let pause = FIRST.saturating_mul(1 << self.attempts.min(16)).min(LONGEST);
        self.attempts += 1;
        pause + pause.mul_f64(rand::rng().random_range(0.0..0.5))
    }

    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_start_over() {
        let mut backoff = Backoff::default();
        let first = backoff.next();
        assert!(first >= FIRST && first < FIRST * 3 / 2);
        let later: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(later.iter().all(|pause| *pause < LONGEST * 3 / 2));
        assert!(later[39] >= LONGEST);
        backoff.reset();
        assert!(backoff.next() < FIRST * 3 / 2);
    }
}
