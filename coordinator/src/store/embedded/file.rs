//! The database file: opened with a check, closed after an error, and opened again when it is next used.
//!
//! After one failed write redb refuses all further ones. A disk that was full for a moment must not need a restart:
//! what failed is closed, and the next use opens it again, which repairs it. Nothing that was acknowledged is lost.

use std::{
    fmt, fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use redb::{Builder, Database, DatabaseError};
use tracing::{info, warn};

use super::super::StoreError;

/// Time between two attempts to open a file that failed.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// Opens the database.
type Open = Box<dyn Fn() -> Result<Database, StoreError> + Send + Sync>;

/// A database that can be opened again.
pub(super) struct DatabaseFile {
    open: Open,
    state: Mutex<State>,
}

struct State {
    database: Option<Arc<Database>>,
    /// Why it was closed, or could not be opened, and when.
    failure: Option<(Instant, String)>,
}

impl fmt::Debug for DatabaseFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseFile").finish_non_exhaustive()
    }
}

impl DatabaseFile {
    /// Opens the file at `path`, or makes it.
    ///
    /// # Errors
    /// It is empty, damaged, in use, or cannot be read.
    pub(super) fn at(path: &Path) -> Result<Self, StoreError> {
        refuse_empty(path)?;
        let database = open(path, Builder::create)?;
        let path = path.to_owned();
        // Never made again: a file that has been removed must not become an empty store under a running coordinator.
        Ok(Self::new(database, Box::new(move || open(&path, Builder::open))))
    }

    /// `database` is open already; `open` opens it again.
    pub(super) fn new(database: Database, open: Open) -> Self {
        Self { open, state: Mutex::new(State { database: Some(Arc::new(database)), failure: None }) }
    }

    /// The open database; opens it again where it was closed.
    ///
    /// # Errors
    /// It cannot be opened now.
    pub(super) fn get(&self) -> Result<Arc<Database>, StoreError> {
        let mut state = self.lock();
        if let Some(database) = &state.database {
            return Ok(Arc::clone(database));
        }
        match &state.failure {
            Some((at, reason)) if at.elapsed() < REOPEN_INTERVAL => {
                return Err(StoreError::Unavailable(reason.clone()));
            }
            _ => {}
        }
        match (self.open)() {
            Ok(database) => {
                info!("the store's file is open again");
                let database = Arc::new(database);
                *state = State { database: Some(Arc::clone(&database)), failure: None };
                Ok(database)
            }
            Err(error) => {
                let reason = error.to_string();
                state.failure = Some((Instant::now(), reason.clone()));
                Err(StoreError::Unavailable(reason))
            }
        }
    }

    /// Closes the database after an operation on it failed, for this reason.
    pub(super) fn failed(&self, database: &Arc<Database>, reason: &str) {
        let mut state = self.lock();
        if state.database.as_ref().is_some_and(|open| Arc::ptr_eq(open, database)) {
            warn!(reason, "the store's file cannot be used; it is opened again");
            *state = State { database: None, failure: Some((Instant::now(), reason.to_owned())) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An empty file is no new store: something has truncated it.
fn refuse_empty(path: &Path) -> Result<(), StoreError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() == 0 => Err(StoreError::Open(format!(
            "{}: is empty, so it was truncated; restore a snapshot (docs/backup.md), or remove it to begin with an empty cell and a new \
             certificate authority",
            path.display()
        ))),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreError::Open(format!("{}: {error}", path.display()))),
    }
}

/// Opens the file with `open`: [`Builder::create`] or [`Builder::open`].
fn open(path: &Path, open: fn(&Builder, PathBuf) -> Result<Database, DatabaseError>) -> Result<Database, StoreError> {
    let shown = path.display();
    // With the check, damage is an error and not a panic later on; the files are small.
    let is_new = !path.exists();
    let private = |error: pilotlight_identity::IdentityError| StoreError::Open(error.to_string());
    pilotlight_identity::private_file(path).map_err(private)?;
    let opening = || open(Database::builder().set_check_integrity_on_open(true), path.to_owned());
    match catch_unwind(AssertUnwindSafe(opening)) {
        Ok(Ok(database)) => {
            if is_new {
                let failed = |error| StoreError::Open(format!("{shown}: {error}"));
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
            }
            Ok(database)
        }
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(StoreError::InUse(shown.to_string())),
        Ok(Err(error)) => Err(StoreError::Open(format!("{shown}: {error}{}", advice(&error)))),
        Err(_) => Err(StoreError::Open(format!("{shown}: is damaged; restore a snapshot (docs/backup.md)"))),
    }
}

fn advice(error: &DatabaseError) -> &'static str {
    match error {
        DatabaseError::Storage(redb::StorageError::Corrupted(_)) => {
            "; the file is damaged, restore a snapshot (docs/backup.md)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        sync::atomic::{AtomicBool, Ordering},
    };

    use redb::{StorageBackend, backends::FileBackend};

    use super::*;
    use crate::store::{Store as _, Transaction, embedded::EmbeddedStore};

    /// A file on a disk that can be full.
    #[derive(Debug)]
    struct SmallDisk {
        file: FileBackend,
        full: Arc<AtomicBool>,
    }

    impl SmallDisk {
        fn check(&self) -> Result<(), std::io::Error> {
            if self.full.load(Ordering::SeqCst) { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }

    impl StorageBackend for SmallDisk {
        fn len(&self) -> Result<u64, std::io::Error> {
            self.file.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
            self.file.read(offset, out)
        }
        fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
            self.check()?;
            self.file.set_len(len)
        }
        fn sync_data(&self) -> Result<(), std::io::Error> {
            self.check()?;
            self.file.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
            self.check()?;
            self.file.write(offset, data)
        }
    }

    #[tokio::test]
    async fn a_store_whose_disk_was_full_takes_writes_again_without_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.redb");
        let full = Arc::new(AtomicBool::new(false));
        let disk_full = Arc::clone(&full);
        let open = move || {
            let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
            let backend = SmallDisk { file: FileBackend::new(file).unwrap(), full: Arc::clone(&disk_full) };
            Database::builder().create_with_backend(backend).map_err(|error| StoreError::Open(error.to_string()))
        };
        let file = DatabaseFile::new(open().unwrap(), Box::new(open));
        let store = EmbeddedStore::with_file(file, 100).unwrap();
        store.commit(Transaction::new().put("before", "1")).await.unwrap();

        full.store(true, Ordering::SeqCst);
        let failed = store.commit(Transaction::new().put("during", "1")).await.unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable(_)), "{failed:?}");
        assert!(store.ping().await.is_err(), "it is not healthy meanwhile");
        tokio::time::sleep(REOPEN_INTERVAL * 3 / 2).await;
        assert!(store.ping().await.is_err(), "nor after another attempt to open it");

        full.store(false, Ordering::SeqCst);
        // The file is opened again at most once a second.
        while store.ping().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        store.commit(Transaction::new().put("after", "1")).await.unwrap();
        let keys: HashSet<_> = store.list("").await.unwrap().entries.into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, HashSet::from(["before".to_owned(), "after".to_owned()]), "what failed has not happened");
    }

    #[test]
    fn a_file_that_is_removed_or_truncated_while_it_is_closed_does_not_become_an_empty_store() {
        type Damage = fn(&Path);
        let damages: [(Damage, &str); 2] = [
            (|path| fs::remove_file(path).unwrap(), "No such file"),
            (|path| fs::write(path, "").unwrap(), "is empty"),
        ];
        for (damage, reason) in damages {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("state.redb");
            let file = DatabaseFile::at(&path).unwrap();
            let database = file.get().unwrap();
            file.failed(&database, "the disk is full");
            drop(database);
            damage(&path);
            file.lock().failure = None;
            let error = file.get().unwrap_err();
            assert!(matches!(&error, StoreError::Unavailable(text) if text.contains(reason)), "{error}");
        }
    }

    #[test]
    fn an_empty_file_is_refused_with_advice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.redb");
        fs::write(&path, "").unwrap();
        let error = EmbeddedStore::open(&path).unwrap_err().to_string();
        assert!(error.contains("is empty") && error.contains("restore"), "{error}");
    }

    #[test]
    fn a_missing_file_where_a_coordinator_ran_is_refused_with_advice() {
        let directory = tempfile::tempdir().unwrap();
        let open = || EmbeddedStore::open_in(directory.path(), "operator");
        drop(open().unwrap());
        fs::create_dir(directory.path().join("operator")).unwrap();
        drop(open().unwrap());
        fs::remove_file(directory.path().join("state.redb")).unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("is missing") && error.contains("restore"), "{error}");
        assert!(!directory.path().join("state.redb").exists(), "no file is made");
    }

    #[tokio::test]
    async fn a_file_with_a_zeroed_page_is_refused_with_advice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.redb");
        let store = EmbeddedStore::open(&path).unwrap();
        for n in 0..200 {
            store.commit(Transaction::new().put(&format!("key/{n}"), vec![7_u8; 2000])).await.unwrap();
        }
        drop(store);
        let mut bytes = fs::read(&path).unwrap();
        let used: Vec<_> =
            (4096..bytes.len() - 4096).step_by(4096).filter(|at| bytes[*at..at + 4096] != [0; 4096]).collect();
        let mut refused = 0;
        for at in used.iter().step_by(5) {
            let page = bytes[*at..at + 4096].to_vec();
            bytes[*at..at + 4096].fill(0);
            let damaged = directory.path().join("damaged.redb");
            fs::write(&damaged, &bytes).unwrap();
            bytes[*at..at + 4096].copy_from_slice(&page);
            if let Err(error) = EmbeddedStore::open(&damaged) {
                assert!(error.to_string().contains("damaged"), "{error}");
                refused += 1;
            }
        }
        assert!(refused > 0, "pages in use were zeroed");
    }
}
