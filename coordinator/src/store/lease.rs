//! The handle of a lease.

use std::sync::{Arc, OnceLock};

use futures::future::BoxFuture;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What ends a lease.
pub(super) type Revoke = Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send + Sync>;

/// Kept alive while held. Dropped, it ends after its time to live; revoked, it ends at once.
pub struct Lease {
    id: u64,
    lost: CancellationToken,
    _keep_alive: DropGuard,
    revoke: Revoke,
    /// Why it could not be kept alive, where the store says.
    reason: Arc<OnceLock<String>>,
}

impl Lease {
    /// `lost` is cancelled when the lease has ended; `keep_alive` ends with the handle; `revoke` ends
    /// the lease.
    pub(super) fn new(id: u64, lost: CancellationToken, keep_alive: CancellationToken, revoke: Revoke) -> Self {
        Self { id, lost, _keep_alive: keep_alive.drop_guard(), revoke, reason: Arc::default() }
    }

    /// The same, where the store sets `reason` before it cancels `lost`.
    pub(super) fn with_reason(self, reason: Arc<OnceLock<String>>) -> Self {
        Self { reason, ..self }
    }

    /// For [`super::Transaction::put_with_lease`].
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Resolves when the lease has ended, or may have: the store could not be asked in time. Says why.
    pub async fn lost(&self) -> String {
        self.lost.cancelled().await;
        self.reason.get().cloned().unwrap_or_else(|| "the lease has expired".to_owned())
    }

    /// Ends it now.
    pub async fn revoke(self) {
        (self.revoke)().await;
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).finish_non_exhaustive()
    }
}
