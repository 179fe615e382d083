//! Leases that any member may keep alive.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use etcd_client::Client;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Lease, StoreError, members::Members};

/// Grants a lease and keeps it alive until its handle is dropped.
pub(super) async fn grant(members: &Arc<Members>, ttl: Duration) -> Result<Lease, StoreError> {
    let seconds = ttl.as_secs().max(1);
    let asked = Instant::now();
    let granted = members.ask(|mut client| async move { client.lease_grant(seconds as i64, None).await }).await?;
    let id = granted.id();
    let (lost, keep_alive) = (CancellationToken::new(), CancellationToken::new());
    let reason = Arc::<OnceLock<String>>::default();
    let ttl = Duration::from_secs(seconds);
    let keeper = Keeper { members: Arc::clone(members), id, ttl, lost: lost.clone(), reason: Arc::clone(&reason) };
    tokio::spawn(keeper.run(asked, keep_alive.clone()));
    let (members, revoked) = (Arc::clone(members), lost.clone());
    let revoke = Box::new(move || {
        // Made only when it is called: the call itself cannot be shared between threads.
        let revoking = async move {
            revoked.cancel();
            let revoke = |mut client: Client| async move { client.lease_revoke(id).await };
            if let Err(error) = members.once(revoke, members.member_timeout()).await {
                warn!(%error, lease = id, "cannot revoke; it ends with its time to live");
            }
        };
        Box::pin(revoking) as BoxFuture<'static, ()>
    });
    Ok(Lease::new(id as u64, lost, keep_alive, revoke).with_reason(reason))
}

struct Keeper {
    members: Arc<Members>,
    id: i64,
    ttl: Duration,
    lost: CancellationToken,
    reason: Arc<OnceLock<String>>,
}

impl Keeper {
    /// Keeps the lease alive until `dropped`. It counts as lost once it was not renewed for its whole time to live,
    /// counted from when the last renewal was asked for: etcd may have ended it by then.
    async fn run(self, mut renewed_at: Instant, dropped: CancellationToken) {
        let mut failure = None;
        while renewed_at.elapsed() < self.ttl && !self.lost.is_cancelled() {
            let asked = Instant::now();
            let renewed = tokio::select! {
                () = dropped.cancelled() => return,
                renewed = self.renew(self.ttl.saturating_sub(renewed_at.elapsed())) => renewed,
            };
            let pause = match renewed {
                Ok(true) => {
                    failure = None;
                    renewed_at = asked;
                    self.ttl / 4
                }
                Ok(false) => break,
                Err(StoreError::Unavailable(reason)) => {
                    debug!(reason, lease = self.id, "cannot renew the lease; trying again");
                    failure = Some(reason);
                    self.ttl / 20
                }
                Err(error) => {
                    warn!(%error, lease = self.id, "cannot renew the lease");
                    break;
                }
            };
            tokio::select! {
                () = dropped.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
        if let Some(failure) = failure {
            // It is set once, here.
            let _ = self.reason.set(failure);
        }
        self.lost.cancel();
    }

    /// Returns `true` if the lease goes on, `false` if etcd has ended it. Each member has a share of the time left, so that
    /// one that is frozen leaves time for the others.
    async fn renew(&self, left: Duration) -> Result<bool, StoreError> {
        let id = self.id;
        let call = |mut client: Client| async move {
            let (mut keeper, mut answers) = client.lease_keep_alive(id).await?;
            keeper.keep_alive().await?;
            answers.message().await
        };
        let share = self.ttl / (2 + self.members.len().min(3) as u32);
        let answer = self.members.once(call, left.min(share).max(Duration::from_millis(10))).await?;
        Ok(answer.is_some_and(|answer| answer.ttl() > 0))
    }
}
