//! The leader's view of the store: its commits hold only while it leads, take place in order, and take place once.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{sync::Mutex, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Entry, Events, Lease, Listing, Store, StoreError, Transaction};

/// Time in which a commit is tried again while the store does not answer.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between attempts double from the first to the last of these.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(800)];
/// The key that numbers the leader's commits; it ends with the leader's lease, and a new leader removes it.
pub const COMMIT_KEY: &str = "commit";

/// Adds two compares and a write to each commit.
///
/// The first compare is the fence: the leader's key must still be the one that this leader made. The second makes a
/// chain of the commits: each one writes the key `commit` and expects it as the commit before left it. So a commit
/// whose answer is lost can be sent again (through another etcd member), and one that a frozen member delivers late
/// does not take place any more.
#[derive(Debug)]
pub struct Fenced {
    inner: Arc<dyn Store>,
    leader_key: String,
    /// Revision in which the leader's key was made.
    created: u64,
    lease: u64,
    chain: Mutex<Chain>,
    /// Cancelled once the leader must step down: another one leads, or it is not known whether a commit took place.
    lost: CancellationToken,
    /// Why.
    reason: OnceLock<String>,
}

/// The leader's last commit.
#[derive(Debug, Default)]
struct Chain {
    /// Number of the last commit that was sent.
    sent: u64,
    /// Revision of the last commit that took place; 0 before the first.
    revision: u64,
}

impl Fenced {
    /// Fences `inner` by `leader_key`, which was made in revision `created` and is bound to `lease`.
    pub fn new(inner: Arc<dyn Store>, leader_key: &str, created: u64, lease: u64) -> Self {
        Self {
            inner,
            leader_key: leader_key.to_owned(),
            created,
            lease,
            chain: Mutex::default(),
            lost: CancellationToken::new(),
            reason: OnceLock::new(),
        }
    }

    /// Resolves once the leader must step down, and says why.
    pub async fn lost(&self) -> String {
        self.lost.cancelled().await;
        self.reason.get().cloned().unwrap_or_default()
    }

    /// Refuses all further commits, for this reason.
    pub fn give_up(&self, reason: String) {
        // The first reason counts.
        let _ = self.reason.set(reason);
        self.lost.cancel();
    }

    fn fenced_off(&self) -> StoreError {
        self.give_up("another coordinator leads".to_owned());
        StoreError::Fenced
    }

    /// What commit `number` of this leader writes.
    fn mark(&self, number: u64) -> String {
        format!("{}-{number}", self.created)
    }

    /// Whether commit `number`, of which no answer came, took place; then its revision.
    async fn revision_of(&self, number: u64) -> Result<Option<u64>, StoreError> {
        let last = self.inner.get(COMMIT_KEY).await?;
        let matches = |entry: &Entry| entry.value.as_ref() == self.mark(number).as_bytes();
        Ok(last.filter(matches).map(|entry| entry.mod_revision))
    }
}

#[async_trait]
impl Store for Fenced {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.inner.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        let mut chain = self.chain.lock().await;
        if self.lost.is_cancelled() {
            return Err(StoreError::Fenced);
        }
        chain.sent += 1;
        let number = chain.sent;
        let transaction = transaction
            .expect_created(&self.leader_key, self.created)
            .expect_revision(COMMIT_KEY, chain.revision)
            .put_with_lease(COMMIT_KEY, self.mark(number), self.lease);
        let deadline = Instant::now() + COMMIT_TIMEOUT;
        let mut in_doubt = false;
        let mut pause = RETRY_PAUSES[0];
        loop {
            match self.inner.commit(transaction.clone()).await {
                Ok(revision) => {
                    chain.revision = revision;
                    return Ok(revision);
                }
                Err(StoreError::Conflict { key }) if key == self.leader_key => {
                    return Err(self.fenced_off());
                }
                Err(StoreError::Conflict { key }) if in_doubt || key == COMMIT_KEY => {
                    // An attempt before this one may have taken place.
                    return match self.revision_of(number).await {
                        Ok(Some(revision)) => {
                            chain.revision = revision;
                            Ok(revision)
                        }
                        Ok(None) if key == COMMIT_KEY => Err(self.fenced_off()),
                        Ok(None) => Err(StoreError::Conflict { key }),
                        Err(error) => {
                            self.give_up(format!("it is not known whether a commit took place: {error}"));
                            Err(error)
                        }
                    };
                }
                Err(error @ StoreError::Unavailable(_)) if !self.inner.may_commit_late() => return Err(error),
                Err(StoreError::Unavailable(reason)) if Instant::now() + pause < deadline => {
                    if !in_doubt {
                        warn!(reason, "the store does not answer a commit; trying again");
                    }
                    in_doubt = true;
                    tokio::time::sleep(pause).await;
                    pause = RETRY_PAUSES[1].min(pause * 2);
                }
                Err(error @ StoreError::Unavailable(_)) => {
                    // The commit may still take place. What is in memory may then differ from what is stored: the
                    // next leader, which may be this process, reads all of it.
                    self.give_up(format!("it is not known whether a commit took place: {error}"));
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError> {
        self.inner.watch(prefix, from_revision).await
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.lease(ttl).await
    }

    fn may_commit_late(&self) -> bool {
        self.inner.may_commit_late()
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.inner.ping().await
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex as StdMutex,
        atomic::{AtomicU64, Ordering},
    };

    use super::*;
    use crate::store::{StoreExt as _, embedded::EmbeddedStore};

    /// A store whose answers can be lost, and whose commits can arrive late.
    #[derive(Debug)]
    struct Lossy {
        inner: EmbeddedStore,
        /// Commits that take place although no answer comes.
        answers_lost: AtomicU64,
        /// Commits that neither take place nor are answered; they are kept.
        requests_kept: AtomicU64,
        kept: StdMutex<Vec<Transaction>>,
    }

    /// Counts down; true while it has not reached zero.
    fn take(counter: &AtomicU64) -> bool {
        counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }

    #[async_trait]
    impl Store for Lossy {
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            self.inner.get(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
            self.inner.list(prefix).await
        }
        async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
            let lost = || StoreError::Unavailable("no answer".into());
            if take(&self.requests_kept) {
                self.kept.lock().unwrap().push(transaction);
                return Err(lost());
            }
            let revision = self.inner.commit(transaction).await?;
            if take(&self.answers_lost) { Err(lost()) } else { Ok(revision) }
        }
        async fn watch(&self, prefix: &str, from: u64) -> Result<Events, StoreError> {
            self.inner.watch(prefix, from).await
        }
        async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
            self.inner.lease(ttl).await
        }
        async fn ping(&self) -> Result<(), StoreError> {
            Ok(())
        }
        fn kind(&self) -> &'static str {
            "lossy"
        }
    }

    struct Case {
        _directory: tempfile::TempDir,
        _lease: Lease,
        lossy: Arc<Lossy>,
        fenced: Fenced,
    }

    async fn case() -> Case {
        let directory = tempfile::tempdir().unwrap();
        let inner = EmbeddedStore::open(&directory.path().join("state.redb")).unwrap();
        let lossy = Lossy { inner, answers_lost: 0.into(), requests_kept: 0.into(), kept: StdMutex::default() };
        let lossy = Arc::new(lossy);
        let lease = lossy.lease(Duration::from_secs(60)).await.unwrap();
        let created = lossy.commit(Transaction::new().put_with_lease("leader", "me", lease.id())).await.unwrap();
        let fenced = Fenced::new(Arc::clone(&lossy) as _, "leader", created, lease.id());
        Case { _directory: directory, _lease: lease, lossy, fenced }
    }

    #[tokio::test]
    async fn a_commit_whose_answer_is_lost_takes_place_once() {
        let case = case().await;
        case.lossy.answers_lost.store(1, Ordering::SeqCst);
        let create = Transaction::new().expect_absent("a").put_json("a", &1);
        let revision = case.fenced.commit(create.clone()).await.unwrap();
        let entry = case.fenced.get("a").await.unwrap().unwrap();
        assert_eq!((entry.mod_revision, entry.version), (revision, 1));
        assert!(matches!(case.fenced.commit(create).await, Err(StoreError::Conflict { key }) if key == "a"));
        case.fenced.commit(Transaction::new().put_json("b", &1)).await.unwrap();
    }

    #[tokio::test]
    async fn a_commit_that_arrives_late_does_not_undo_a_newer_one() {
        let case = case().await;
        case.lossy.requests_kept.store(1, Ordering::SeqCst);
        case.fenced.commit(Transaction::new().put_json("a", &1)).await.unwrap();
        case.fenced.commit(Transaction::new().put_json("a", &2)).await.unwrap();
        let late = case.lossy.kept.lock().unwrap().pop().unwrap();
        assert!(matches!(case.lossy.commit(late).await, Err(StoreError::Conflict { .. })));
        let store: Arc<dyn Store> = case.lossy.clone();
        assert_eq!(store.get_json::<u32>("a").await.unwrap(), Some(2));
    }

    #[tokio::test]
    async fn a_leader_that_cannot_know_what_is_stored_steps_down() {
        let case = case().await;
        case.lossy.requests_kept.store(u64::MAX, Ordering::SeqCst);
        let outcome = case.fenced.commit(Transaction::new().put_json("a", &1)).await;
        assert!(matches!(outcome, Err(StoreError::Unavailable(_))), "{outcome:?}");
        case.fenced.lost().await;
        case.lossy.requests_kept.store(0, Ordering::SeqCst);
        let outcome = case.fenced.commit(Transaction::new().put_json("a", &1)).await;
        assert!(matches!(outcome, Err(StoreError::Fenced)), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_leader_whose_key_is_gone_commits_nothing() {
        let case = case().await;
        case.lossy.commit(Transaction::new().delete("leader")).await.unwrap();
        assert!(matches!(case.fenced.commit(Transaction::new().put_json("a", &1)).await, Err(StoreError::Fenced)));
        case.fenced.lost().await;
    }
}
