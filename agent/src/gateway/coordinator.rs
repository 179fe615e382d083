//! Whether the coordinator is there, for requests that only it can have served: those for which no replica is ready.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

use crate::sidecar::RevisionQueue;

/// How long requests wait for a coordinator that is away. A coordinator that is restarted, or another one that takes
/// over from it, is there within seconds.
pub(super) const COORDINATOR_TIMEOUT: Duration = Duration::from_secs(30);

/// The session with the coordinator, as far as requests are concerned.
pub(super) struct Coordinator {
    /// Since when there has been no session; `None` while there is one.
    away_since: watch::Sender<Option<Instant>>,
}

impl Coordinator {
    /// There is no session yet.
    pub(super) fn new() -> Self {
        Self { away_since: watch::Sender::new(Some(Instant::now())) }
    }

    pub(super) fn set_connected(&self, connected: bool) {
        self.away_since.send_if_modified(|away_since| {
            let changes = connected == away_since.is_some();
            if changes {
                *away_since = (!connected).then(Instant::now);
            }
            changes
        });
    }

    /// Resolves once the coordinator has been away for [`COORDINATOR_TIMEOUT`] and no replica of the revision is ready,
    /// with the time for which it has been away.
    pub(super) async fn unavailable_for(&self, queue: &RevisionQueue) -> Duration {
        let mut away_since = self.away_since.subscribe();
        loop {
            let since = *away_since.borrow_and_update();
            let Some(since) = since else {
                // An error is impossible: the sender is `self`.
                let _ = away_since.changed().await;
                continue;
            };
            let timeout = COORDINATOR_TIMEOUT.saturating_sub(since.elapsed());
            if timeout.is_zero() && !queue.any_ready() {
                return since.elapsed();
            }
            tokio::select! {
                // A replica that is ready now need not be later.
                () = tokio::time::sleep(timeout.max(Duration::from_secs(1))) => {}
                _ = away_since.changed() => {}
            }
        }
    }
}
