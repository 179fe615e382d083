//! Pauses before a failed replica is started again, as Kubernetes' kubelet makes them; models that nobody
//! waits for are fetched with the same.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// A replica that was ready for this long before it failed starts with a fresh back-off. Kubelet's time is the same, but
/// counts from the start of the process: a model that takes longer to load would never back off.
const FORGIVEN: Duration = Duration::from_secs(600);

/// Nothing the first time, then 10 s, doubling to 5 min.
#[derive(Debug, Default)]
pub(crate) struct CrashBackoff {
    failures: u32,
}

impl CrashBackoff {
    /// The pause after a failure; zero after the first one. `ready` is for how long the replica was ready before it.
    pub(crate) fn after(&mut self, ready: Duration) -> Duration {
        if ready >= FORGIVEN {
            self.failures = 0;
        }
        self.failures += 1;
        match self.failures {
            1 => Duration::ZERO,
            failures => FIRST.saturating_mul(1 << (failures - 2).min(16)).min(LONGEST),
        }
    }

    /// Failures in a row.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_follow_kubernetes() {
        let mut backoff = CrashBackoff::default();
        let seconds: Vec<_> = (0..8).map(|_| backoff.after(Duration::from_secs(1)).as_secs()).collect();
        assert_eq!(seconds, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.after(FORGIVEN).as_secs(), 0);
    }
}
