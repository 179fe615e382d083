//! Leader election: the coordinator that made the key `leader` leads its cell as long as its lease lasts.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use tracing::{debug, info};

use crate::store::{COMMIT_KEY, Entry, Event, Events, Fenced, Lease, Store, StoreError, Transaction};

pub(crate) const KEY: &str = "leader";
/// Longest time between two looks at the leader's key. A watch tells sooner, unless it hangs on a frozen etcd member.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before a campaign tries again after the store did not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The leader, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// URL at which agents and operators reach it.
    pub address: String,
    /// Differs for each process.
    #[serde(default)]
    pub process: String,
}

impl LeaderRecord {
    /// This process, which is reached at `address`.
    pub fn of_this_process(address: String) -> Self {
        Self { address, process: uuid::Uuid::new_v4().to_string() }
    }
}

/// What a campaign finds out while it lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CampaignEvent {
    /// Another coordinator leads.
    OtherLeads(LeaderRecord),
    /// The store does not answer, and why.
    StoreUnavailable(String),
}

/// Held by the leader. Dropped, it ends after its time to live; see [`Leadership::resign`].
#[derive(Debug)]
pub struct Leadership {
    fenced: Arc<Fenced>,
    lease: Lease,
}

impl Leadership {
    /// The store, each commit of which fails once another coordinator leads.
    pub fn fenced(&self) -> Arc<dyn Store> {
        Arc::clone(&self.fenced) as _
    }

    /// Resolves when leadership has ended, or may have, and says why; the fenced store then refuses all commits.
    pub async fn lost(&self) -> String {
        tokio::select! {
            reason = self.lease.lost() => {
                self.fenced.give_up(reason.clone());
                reason
            }
            reason = self.fenced.lost() => reason,
        }
    }

    /// Lets the next one lead at once.
    pub async fn resign(self) {
        self.lease.revoke().await;
    }
}

/// Waits until this process leads. `report` is told who leads meanwhile, or that the store does not answer.
///
/// # Errors
/// The store cannot be used at all; one that does not answer is asked again.
pub async fn campaign(
    store: Arc<dyn Store>,
    candidate: &LeaderRecord,
    ttl: Duration,
    report: impl Fn(CampaignEvent),
) -> Result<Leadership, StoreError> {
    loop {
        match attempt(&store, candidate, ttl, &report).await {
            Ok(Some(leadership)) => return Ok(leadership),
            Ok(None) => {}
            Err(StoreError::Unavailable(reason)) => {
                report(CampaignEvent::StoreUnavailable(reason));
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Leads, or waits until the present leader is gone.
async fn attempt(
    store: &Arc<dyn Store>,
    candidate: &LeaderRecord,
    ttl: Duration,
    report: &impl Fn(CampaignEvent),
) -> Result<Option<Leadership>, StoreError> {
    if let Some(entry) = store.get(KEY).await? {
        if record_of(&entry) == *candidate {
            // This process led before and lost the store. Nothing of that term can be committed any more.
            store.commit(Transaction::new().expect_created(KEY, entry.create_revision).delete(KEY)).await?;
        } else {
            wait_for_vacancy(store, candidate, report).await?;
        }
        return Ok(None);
    }
    let lease = store.lease(ttl).await?;
    let record = serde_json::to_vec(candidate).unwrap_or_default();
    let write = Transaction::new().expect_absent(KEY).put_with_lease(KEY, record, lease.id()).delete(COMMIT_KEY);
    match store.commit(write).await {
        Ok(revision) => {
            let fenced = Arc::new(Fenced::new(Arc::clone(store), KEY, revision, lease.id()));
            Ok(Some(Leadership { fenced, lease }))
        }
        Err(StoreError::Conflict { .. }) => {
            lease.revoke().await;
            Ok(None)
        }
        // The commit may have taken place: without the lease it does not last.
        Err(error) => {
            lease.revoke().await;
            Err(error)
        }
    }
}

/// Returns once nobody leads.
async fn wait_for_vacancy(
    store: &Arc<dyn Store>,
    candidate: &LeaderRecord,
    report: &impl Fn(CampaignEvent),
) -> Result<(), StoreError> {
    let mut events: Option<Events> = None;
    let mut leader = None;
    loop {
        let listing = store.list(KEY).await?;
        let Some(entry) = listing.entries.iter().find(|entry| entry.key == KEY) else { return Ok(()) };
        let record = record_of(entry);
        if leader.as_ref() != Some(&record) {
            if record.address == candidate.address {
                info!("waiting until the lease of this coordinator's former process has expired");
            } else {
                info!(leader = %record.address, "another coordinator leads; standing by");
                report(CampaignEvent::OtherLeads(record.clone()));
            }
            leader = Some(record);
        }
        if events.is_none() {
            events = Some(store.watch(KEY, listing.revision + 1).await?);
        }
        let deleted = |events: &[Event]| events.iter().any(|e| matches!(e, Event::Delete { key, .. } if key == KEY));
        match tokio::time::timeout(LOOK_INTERVAL, next(events.as_mut())).await {
            Ok(Some(Ok(batch))) if deleted(&batch) => return Ok(()),
            Ok(Some(Ok(_))) | Err(_) => {}
            Ok(Some(Err(error))) => {
                debug!(%error, "cannot watch the leader's key");
                events = None;
            }
            Ok(None) => events = None,
        }
    }
}

/// The leader that the key names.
pub(crate) fn record_of(entry: &Entry) -> LeaderRecord {
    serde_json::from_slice(&entry.value).unwrap_or_else(|_| {
        // As coordinators before format version 1 wrote it.
        LeaderRecord { address: String::from_utf8_lossy(&entry.value).into_owned(), process: String::new() }
    })
}

async fn next(events: Option<&mut Events>) -> Option<Result<Vec<Event>, StoreError>> {
    match events {
        Some(events) => events.next().await,
        None => None,
    }
}
