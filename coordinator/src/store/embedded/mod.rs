//! The embedded store: one ACID file (redb), for one machine and one process.

mod file;

use std::{
    ops::Bound,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, Table, TableDefinition, WriteTransaction};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Compare, Entry, Event, Events, Lease, Listing, OPERATIONS_MOST, Store, StoreError, Transaction, Write, by_revision,
    lease::Revoke,
};
use file::DatabaseFile;

/// create revision, mod revision, version, lease (0: none), value.
type Row = (u64, u64, u64, u64, &'static [u8]);
const DATA: TableDefinition<'_, &str, Row> = TableDefinition::new("data");
/// (revision, position) → (key, create revision, version (0: deleted), value).
type LogRow = (&'static str, u64, u64, &'static [u8]);
const LOG: TableDefinition<'_, (u64, u64), LogRow> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";
const OLDEST: &str = "oldest";
/// Holds a value only while it is tested whether the disk takes one.
const PROBE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("probe");
const PROBE_BYTES: usize = 64 << 10;

/// Revisions whose history is kept for watchers.
const HISTORY: u64 = 10_000;

/// One file. Each commit is on disk before it is acknowledged.
#[derive(Debug, Clone)]
pub struct EmbeddedStore {
    file: Arc<File>,
}

#[derive(Debug)]
struct File {
    database: DatabaseFile,
    revision: watch::Sender<u64>,
    next_lease: AtomicU64,
    history: u64,
    /// True after a write that failed, until another one has succeeded.
    write_failed: AtomicBool,
}

impl EmbeddedStore {
    /// Opens the file, or makes it. Leases of former processes end here, since those processes are gone.
    ///
    /// # Errors
    /// Another process has it open, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with_history(path, HISTORY)
    }

    /// Opens `state.redb` in a coordinator's data directory, or makes it at the first start.
    ///
    /// `trace` is a file or directory there that the coordinator makes only after the store: where it exists without the
    /// store, this is not the first start, and an empty cell with a new certificate authority would lock all agents and
    /// operators out.
    ///
    /// # Errors
    /// The store is missing although `trace` exists, or as [`EmbeddedStore::open`].
    pub fn open_in(data_dir: &Path, trace: &str) -> Result<Self, StoreError> {
        let path = data_dir.join("state.redb");
        if !path.exists() && data_dir.join(trace).exists() {
            return Err(StoreError::Open(format!(
                "{}: is missing, but {trace} shows that a coordinator ran here; restore a snapshot (docs/backup.md), name \
                 etcd's addresses if the cell is stored there, or remove {trace} to begin with an empty cell and a new \
                 certificate authority",
                path.display()
            )));
        }
        Self::open(&path)
    }

    /// As [`EmbeddedStore::open`], with another number of revisions kept for watchers.
    ///
    /// # Errors
    /// As [`EmbeddedStore::open`].
    pub fn open_with_history(path: &Path, history: u64) -> Result<Self, StoreError> {
        Self::with_file(DatabaseFile::at(path)?, history)
    }

    fn with_file(database: DatabaseFile, history: u64) -> Result<Self, StoreError> {
        let open = database.get()?;
        let file = File {
            database,
            revision: watch::Sender::new(0),
            next_lease: AtomicU64::new(1),
            history,
            write_failed: AtomicBool::new(false),
        };
        let store = Self { file: Arc::new(file) };
        let revision = store.end_leases(&open, |_| true)?;
        store.file.revision.send_replace(revision);
        Ok(store)
    }

    /// Runs on a thread that may block. Where it fails for the file's sake, the file is closed and opened again later.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self, &Database) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        let task = move || {
            let database = store.file.database.get()?;
            let working = || work(&store, &database);
            let outcome = catch_unwind(AssertUnwindSafe(working))
                .unwrap_or_else(|_| Err(StoreError::Unavailable("the store's file is damaged".to_owned())));
            if let Err(StoreError::Unavailable(reason)) = &outcome {
                store.file.database.failed(&database, reason);
            }
            outcome
        };
        tokio::task::spawn_blocking(task).await.map_err(|error| StoreError::Unavailable(error.to_string()))?
    }

    fn write(&self, database: &Database, transaction: &Transaction) -> Result<u64, StoreError> {
        if transaction.operations() > OPERATIONS_MOST {
            return Err(StoreError::TooLarge(transaction.operations()));
        }
        let write = database.begin_write().map_err(unavailable)?;
        let revision = {
            let data = write.open_table(DATA).map_err(unavailable)?;
            for compare in &transaction.compares {
                let row = data.get(compare.key()).map_err(unavailable)?;
                let (created, changed) = row.map_or((0, 0), |row| (row.value().0, row.value().1));
                let holds = match compare {
                    Compare::ModRevision(_, expected) => changed == *expected,
                    Compare::CreateRevision(_, expected) => created == *expected,
                };
                if !holds {
                    return Err(StoreError::Conflict { key: compare.key().to_owned() });
                }
            }
            let meta = write.open_table(META).map_err(unavailable)?;
            meta.get(REVISION).map_err(unavailable)?.map_or(0, |row| row.value()) + 1
        };
        self.apply(&write, revision, &transaction.writes)?;
        write.commit().map_err(unavailable)?;
        self.file.revision.send_replace(revision);
        Ok(revision)
    }

    fn apply(&self, write: &WriteTransaction, revision: u64, writes: &[Write]) -> Result<(), StoreError> {
        let mut data = write.open_table(DATA).map_err(unavailable)?;
        let mut log = write.open_table(LOG).map_err(unavailable)?;
        let mut meta = write.open_table(META).map_err(unavailable)?;
        for (position, change) in (0..).zip(writes) {
            match change {
                Write::Put { key, value, lease } => {
                    let former = data.get(key.as_str()).map_err(unavailable)?;
                    let (created, version) = former.map_or((revision, 1), |row| (row.value().0, row.value().2 + 1));
                    let row = (created, revision, version, lease.unwrap_or(0), value.as_ref());
                    data.insert(key.as_str(), row).map_err(unavailable)?;
                    log.insert((revision, position), (key.as_str(), created, version, value.as_ref()))
                        .map_err(unavailable)?;
                }
                Write::Delete { key } => {
                    if data.remove(key.as_str()).map_err(unavailable)?.is_some() {
                        log.insert((revision, position), (key.as_str(), 0, 0, [].as_slice())).map_err(unavailable)?;
                    }
                }
            }
        }
        meta.insert(REVISION, revision).map_err(unavailable)?;
        compact(&mut log, &mut meta, (revision + 1).saturating_sub(self.file.history))
    }

    /// Removes the keys of leases that have ended; returns the store's revision.
    fn end_leases(&self, database: &Database, ended: impl Fn(u64) -> bool) -> Result<u64, StoreError> {
        let mut keys = Vec::new();
        let write = database.begin_write().map_err(unavailable)?;
        {
            let data = write.open_table(DATA).map_err(unavailable)?;
            write.open_table(LOG).map_err(unavailable)?;
            for row in data.iter().map_err(unavailable)? {
                let (key, row) = row.map_err(unavailable)?;
                if row.value().3 != 0 && ended(row.value().3) {
                    keys.push(Write::Delete { key: key.value().to_owned() });
                }
            }
        }
        let revision = {
            let meta = write.open_table(META).map_err(unavailable)?;
            meta.get(REVISION).map_err(unavailable)?.map_or(0, |row| row.value())
        };
        if !keys.is_empty() {
            self.apply(&write, revision + 1, &keys)?;
        }
        write.commit().map_err(unavailable)?;
        let revision = revision + u64::from(!keys.is_empty());
        self.file.revision.send_if_modified(|current| {
            let newer = revision > *current;
            *current = revision.max(*current);
            newer
        });
        Ok(revision)
    }

    async fn end_lease(&self, id: u64, lost: &CancellationToken) {
        lost.cancel();
        if let Err(error) = self.blocking(move |store, database| store.end_leases(database, |lease| lease == id)).await
        {
            // The next opening of the file removes them.
            tracing::warn!(%error, lease = id, "keys of a lease that has ended are still there");
        }
    }

    fn read_list(database: &Database, prefix: &str) -> Result<Listing, StoreError> {
        let read = database.begin_read().map_err(unavailable)?;
        let data = read.open_table(DATA).map_err(unavailable)?;
        let meta = read.open_table(META).map_err(unavailable)?;
        let revision = meta.get(REVISION).map_err(unavailable)?.map_or(0, |row| row.value());
        let mut entries = Vec::new();
        for row in data.range(prefix..).map_err(unavailable)? {
            let (key, row) = row.map_err(unavailable)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            entries.push(entry(key.value(), row.value()));
        }
        Ok(Listing { entries, revision })
    }

    fn read_log(database: &Database, prefix: &str, from: u64) -> Result<(Vec<Event>, u64), StoreError> {
        let read = database.begin_read().map_err(unavailable)?;
        let meta = read.open_table(META).map_err(unavailable)?;
        let number = |key| Ok(meta.get(key).map_err(unavailable)?.map_or(0, |row| row.value()));
        let (latest, oldest) = (number(REVISION)?, number(OLDEST)?);
        if from < oldest {
            return Err(StoreError::Compacted { oldest });
        }
        let log = read.open_table(LOG).map_err(unavailable)?;
        let mut events = Vec::new();
        for row in log.range((from, 0)..).map_err(unavailable)? {
            let (at, row) = row.map_err(unavailable)?;
            let (revision, _) = at.value();
            let (key, create_revision, version, value) = row.value();
            if !key.starts_with(prefix) {
                continue;
            }
            let key = key.to_owned();
            events.push(match version {
                0 => Event::Delete { key, revision },
                version => Event::Put(Entry {
                    key,
                    value: Bytes::copy_from_slice(value),
                    create_revision,
                    mod_revision: revision,
                    version,
                }),
            });
        }
        Ok((events, latest))
    }
}

/// Forgets the history before `oldest`.
fn compact(
    log: &mut Table<'_, (u64, u64), LogRow>,
    meta: &mut Table<'_, &str, u64>,
    oldest: u64,
) -> Result<(), StoreError> {
    let range = (Bound::Unbounded, Bound::Excluded((oldest, 0)));
    log.retain_in::<(u64, u64), _>(range, |_, _| false).map_err(unavailable)?;
    meta.insert(OLDEST, oldest).map_err(unavailable)?;
    Ok(())
}

fn entry(key: &str, (create_revision, mod_revision, version, _, value): (u64, u64, u64, u64, &[u8])) -> Entry {
    Entry { key: key.to_owned(), value: Bytes::copy_from_slice(value), create_revision, mod_revision, version }
}

/// Writes something that nobody reads, as large as a service with its revisions may be, and removes it again: on a disk
/// that is nearly full a small write still succeeds.
fn probe_writing(database: &Database) -> Result<(), StoreError> {
    for value in [Some([0_u8; PROBE_BYTES]), None] {
        let write = database.begin_write().map_err(unavailable)?;
        {
            let mut probe = write.open_table(PROBE).map_err(unavailable)?;
            match &value {
                Some(value) => probe.insert("", value.as_slice()).map_err(unavailable)?,
                None => probe.remove("").map_err(unavailable)?,
            };
        }
        write.commit().map_err(unavailable)?;
    }
    Ok(())
}

fn unavailable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = key.to_owned();
        self.blocking(move |_, database| {
            let read = database.begin_read().map_err(unavailable)?;
            let data = read.open_table(DATA).map_err(unavailable)?;
            let row = data.get(key.as_str()).map_err(unavailable)?;
            Ok(row.map(|row| entry(&key, row.value())))
        })
        .await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let prefix = prefix.to_owned();
        self.blocking(move |_, database| Self::read_list(database, &prefix)).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        self.blocking(move |store, database| {
            let written = store.write(database, &transaction);
            if let Ok(_) | Err(StoreError::Unavailable(_)) = written {
                store.file.write_failed.store(written.is_err(), Ordering::Relaxed);
            }
            written
        })
        .await
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError> {
        let prefix = prefix.to_owned();
        let first = prefix.clone();
        // An error at the start is the caller's answer, not the stream's first item.
        self.blocking(move |_, database| Self::read_log(database, &first, from_revision).map(drop)).await?;
        let store = self.clone();
        let mut revisions = self.file.revision.subscribe();
        Ok(async_stream::try_stream! {
            let mut next = from_revision;
            loop {
                revisions.borrow_and_update();
                let prefix = prefix.clone();
                let (events, latest) = store.blocking(move |_, database| Self::read_log(database, &prefix, next)).await?;
                for events in by_revision(events) {
                    yield events;
                }
                next = next.max(latest + 1);
                if revisions.changed().await.is_err() {
                    break;
                }
            }
        }
        .boxed())
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let id = self.file.next_lease.fetch_add(1, Ordering::Relaxed);
        let (lost, keep_alive) = (CancellationToken::new(), CancellationToken::new());
        let revoke: Revoke = {
            let (store, lost) = (self.clone(), lost.clone());
            Box::new(move || Box::pin(async move { store.end_lease(id, &lost).await }))
        };
        // A lease that runs out must not keep the file open after its store has gone.
        let (dropped, revoked, file) = (keep_alive.clone(), lost.clone(), Arc::downgrade(&self.file));
        tokio::spawn(async move {
            dropped.cancelled().await;
            tokio::select! {
                () = revoked.cancelled() => {}
                () = tokio::time::sleep(ttl) => match file.upgrade() {
                    Some(file) => Self { file }.end_lease(id, &revoked).await,
                    // The next opening of the file ends it.
                    None => revoked.cancel(),
                },
            }
        });
        Ok(Lease::new(id, lost, keep_alive, revoke))
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.blocking(|store, database| {
            // A full disk can be read: after a failed write only another one shows that it is cured.
            if store.file.write_failed.load(Ordering::Relaxed) {
                probe_writing(database)?;
                store.file.write_failed.store(false, Ordering::Relaxed);
            }
            database.begin_read().map(drop).map_err(unavailable)
        })
        .await
    }

    fn may_commit_late(&self) -> bool {
        false
    }

    fn kind(&self) -> &'static str {
        "embedded"
    }
}
