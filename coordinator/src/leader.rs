//! One coordinator leads a cell: the one that made the key `leader`, while its lease lasts.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use tracing::{info, warn};

use crate::store::{Event, Fenced, Lease, Store, StoreError, Transaction};

const KEY: &str = "leader";
/// Pause before a campaign tries again after the store could not be reached.
const PAUSE: Duration = Duration::from_secs(1);

/// Held by the leader. Dropped, it ends after its time to live; see [`Leadership::resign`].
#[derive(Debug)]
pub struct Leadership {
    fenced: Arc<dyn Store>,
    lease: Lease,
}

impl Leadership {
    /// The store, each commit of which fails once another coordinator leads.
    pub fn fenced(&self) -> Arc<dyn Store> {
        Arc::clone(&self.fenced)
    }

    /// Resolves when leadership has ended, or may have.
    pub async fn lost(&self) {
        self.lease.lost().await;
    }

    /// Lets the next one lead at once.
    pub async fn resign(self) {
        self.lease.revoke().await;
    }
}

/// Waits until this process leads.
///
/// # Errors
/// The store cannot be used at all; one that cannot be reached is tried again.
pub async fn campaign(store: Arc<dyn Store>, identity: &str, ttl: Duration) -> Result<Leadership, StoreError> {
    loop {
        match attempt(&store, identity, ttl).await {
            Ok(Some(leadership)) => return Ok(leadership),
            Ok(None) => {}
            Err(StoreError::Unavailable(reason)) => {
                warn!(%reason, "cannot campaign for leadership; trying again");
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Leads, or waits until the present leader is gone.
async fn attempt(store: &Arc<dyn Store>, identity: &str, ttl: Duration) -> Result<Option<Leadership>, StoreError> {
    let lease = store.lease(ttl).await?;
    let write = Transaction::new().expect_absent(KEY).put_with_lease(KEY, identity.to_owned(), lease.id());
    match store.commit(write).await {
        Ok(revision) => {
            let fenced = Arc::new(Fenced::new(Arc::clone(store), KEY, revision));
            return Ok(Some(Leadership { fenced, lease }));
        }
        Err(StoreError::Conflict { .. }) => lease.revoke().await,
        Err(error) => return Err(error),
    }
    let listing = store.list(KEY).await?;
    let Some(leader) = listing.entries.iter().find(|entry| entry.key == KEY) else { return Ok(None) };
    info!(leader = %String::from_utf8_lossy(&leader.value), "another coordinator leads; standing by");
    let mut events = store.watch(KEY, listing.revision + 1).await?;
    while let Some(events) = events.next().await {
        match events {
            Ok(events) if events.iter().any(|event| matches!(event, Event::Delete { key, .. } if key == KEY)) => break,
            Ok(_) => {}
            Err(StoreError::Compacted { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
