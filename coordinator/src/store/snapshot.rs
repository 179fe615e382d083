//! Snapshots: everything that is stored for a cell, in one file with a checksum.
//!
//! The file is text: a header in JSON, one line per key (JSON, values in base64), and the SHA-256 of all lines before the
//! last. Secrets and the authority's key stay sealed: whoever restores a snapshot needs the same secrets key.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use ring::digest;
use serde::{Deserialize, Serialize};

use super::{COMMIT_KEY, OPERATIONS_MOST, Store, StoreError, Transaction, embedded::EmbeddedStore, format};
use crate::leader;

/// First field of the header.
const MAGIC: &str = "pilotlight-snapshot";
/// Version of the file's form.
const VERSION: u32 = 1;
/// Marks a store in which a restore has begun and not ended.
const RESTORING_KEY: &str = "restoring";

/// Why a snapshot cannot be read or restored. Nothing was changed, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file is no snapshot, or not the one that was written.
    #[error("snapshot: {0}")]
    Unreadable(String),
    /// There is something in the store already.
    #[error("the store holds {0} keys already; --force replaces them")]
    NotEmpty(usize),
    /// A coordinator would write meanwhile.
    #[error("a coordinator leads this cell, {0}: stop all coordinators; one that was killed leads for 5 s more")]
    Led(String),
    /// A file cannot be read or written.
    #[error("{0}")]
    File(String),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a snapshot says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    format: String,
    version: u32,
    /// Cell name.
    pub cell: String,
    /// Revision of the store.
    pub revision: u64,
    /// When it was made.
    pub taken_at: Timestamp,
    /// Number of keys.
    pub keys: usize,
}

/// A snapshot in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// What it says of itself.
    pub header: Header,
    entries: Vec<Line>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    key: String,
    /// Base64.
    value: String,
}

impl Snapshot {
    /// Reads all that is stored at one revision, without what belongs to the present leader.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn take(store: &Arc<dyn Store>, cell: &str, now: Timestamp) -> Result<Self, StoreError> {
        let listing = store.list("").await?;
        let lasting = listing.entries.iter().filter(|entry| !is_fleeting(&entry.key));
        let entries: Vec<_> =
            lasting.map(|entry| Line { key: entry.key.clone(), value: STANDARD.encode(&entry.value) }).collect();
        let header = Header {
            format: MAGIC.to_owned(),
            version: VERSION,
            cell: cell.to_owned(),
            revision: listing.revision,
            taken_at: now,
            keys: entries.len(),
        };
        Ok(Self { header, entries })
    }

    /// The file's text.
    ///
    /// # Errors
    /// Never for a snapshot that was taken or parsed.
    pub fn encode(&self) -> Result<String, SnapshotError> {
        let json = |error: serde_json::Error| SnapshotError::Unreadable(error.to_string());
        let mut text = serde_json::to_string(&self.header).map_err(json)? + "\n";
        for line in &self.entries {
            text += &serde_json::to_string(line).map_err(json)?;
            text.push('\n');
        }
        let sum = checksum(&text);
        let _ = writeln!(text, "{{\"sha256\":\"{sum}\"}}");
        Ok(text)
    }

    /// Reads a file's text and verifies it.
    ///
    /// # Errors
    /// It is no snapshot, of a newer version, cut off or changed.
    pub fn parse(text: &str) -> Result<Self, SnapshotError> {
        let bad = |reason: String| SnapshotError::Unreadable(reason);
        let header: Header = text
            .lines()
            .next()
            .and_then(|line| serde_json::from_str(line).ok())
            .filter(|header: &Header| header.format == MAGIC)
            .ok_or_else(|| bad("the file is not a snapshot made by `pilotlight snapshot save`".to_owned()))?;
        if header.version > VERSION {
            return Err(bad(format!("its version is {}; this program reads up to {VERSION}", header.version)));
        }
        let whole = text.strip_suffix('\n').and_then(|text| text.rsplit_once('\n'));
        let (body, last) = whole.ok_or_else(|| bad("the file is cut off".to_owned()))?;
        let body = &text[..=body.len()];
        let sum = last.strip_prefix("{\"sha256\":\"").and_then(|rest| rest.strip_suffix("\"}"));
        match sum {
            None => return Err(bad("the file is cut off: its last line is not a checksum".to_owned())),
            Some(sum) if sum != checksum(body) => {
                return Err(bad("the file was changed: its checksum differs".to_owned()));
            }
            Some(_) => {}
        }
        let entries = body.lines().skip(1).map(serde_json::from_str).collect::<Result<Vec<Line>, _>>();
        let entries = entries.map_err(|error| bad(error.to_string()))?;
        if entries.len() != header.keys || entries.iter().any(|line| STANDARD.decode(&line.value).is_err()) {
            return Err(bad(format!("{} keys were expected, {} can be read", header.keys, entries.len())));
        }
        Ok(Self { header, entries })
    }

    /// Number of keys by kind, which is the first part of a key.
    pub fn counts(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for line in &self.entries {
            *counts.entry(line.key.split('/').next().unwrap_or_default()).or_default() += 1;
        }
        counts
    }

    /// Version of the format of what is stored; `None` if it was stored before versions were.
    ///
    /// # Errors
    /// It is newer than this program's.
    pub fn format_version(&self) -> Result<Option<u32>, SnapshotError> {
        let Some(line) = self.entries.iter().find(|line| line.key == format::KEY) else { return Ok(None) };
        Ok(Some(format::parse(&decode(line)?)?))
    }

    /// Puts everything into a store. No coordinator may run meanwhile; one that is started before the end refuses to.
    ///
    /// # Errors
    /// A newer version has stored this, a coordinator leads the cell, the store holds something and `force` is not
    /// given, or it fails: then it has to be restored again.
    pub async fn restore(&self, store: &Arc<dyn Store>, force: bool) -> Result<(), SnapshotError> {
        self.format_version()?;
        let writes = batches(&self.entries)?;
        let present = store.list("").await?.entries;
        if let Some(leader) = present.iter().find(|entry| entry.key == leader::KEY) {
            return Err(SnapshotError::Led(leader::record_of(leader).address));
        }
        if !present.is_empty() && !force {
            return Err(SnapshotError::NotEmpty(present.len()));
        }
        let step = || Transaction::new().expect_absent(leader::KEY);
        store.commit(step().put(RESTORING_KEY, self.header.taken_at.to_string())).await?;
        let previous = present.iter().filter(|entry| entry.key != RESTORING_KEY).collect::<Vec<_>>();
        for chunk in previous.chunks(OPERATIONS_MOST - 1) {
            store.commit(chunk.iter().fold(step(), |write, entry| write.delete(&entry.key))).await?;
        }
        for batch in writes {
            store.commit(batch.into_iter().fold(step(), |write, (key, value)| write.put(key, value))).await?;
        }
        store.commit(step().delete(RESTORING_KEY)).await?;
        Ok(())
    }

    /// Restores into a new file of the embedded store, and then puts it at `path`: all of it or nothing.
    ///
    /// # Errors
    /// There is a store and `force` is not given, it is in use, or a file cannot be written.
    pub async fn restore_file(&self, path: &Path, force: bool) -> Result<(), SnapshotError> {
        let failed = |error: std::io::Error| SnapshotError::File(format!("{}: {error}", path.display()));
        if path.exists() {
            if !force {
                return Err(SnapshotError::File(format!("{}: exists already; --force replaces it", path.display())));
            }
            // A damaged file is replaced; one that a coordinator has open is not.
            if let Err(error @ StoreError::InUse(_)) = EmbeddedStore::open(path) {
                return Err(error.into());
            }
        }
        let new = path.with_extension("restoring");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        {
            let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&new)?);
            self.restore(&store, false).await?;
        }
        std::fs::rename(&new, path).map_err(failed)?;
        // The new name is on disk, too.
        match path.parent() {
            Some(directory) => {
                std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
            }
            None => Ok(()),
        }
    }
}

/// Bytes in one transaction of a restore, unless one key has more: etcd takes 1.5 MiB in one request.
const MAX_BATCH_BYTES: usize = 1 << 20;

/// What is written in one transaction: keys and their values.
type Batch<'a> = Vec<(&'a str, Vec<u8>)>;

/// The transactions that write these keys.
fn batches(entries: &[Line]) -> Result<Vec<Batch<'_>>, SnapshotError> {
    let (mut batches, mut bytes) = (Vec::<Batch<'_>>::new(), 0);
    for line in entries {
        let value = decode(line)?;
        let size = line.key.len() + value.len();
        match batches.last_mut() {
            Some(batch) if batch.len() < OPERATIONS_MOST - 1 && bytes + size <= MAX_BATCH_BYTES => {
                bytes += size;
                batch.push((&line.key, value));
            }
            _ => {
                bytes = size;
                batches.push(vec![(&line.key, value)]);
            }
        }
    }
    Ok(batches)
}

fn decode(line: &Line) -> Result<Vec<u8>, SnapshotError> {
    STANDARD.decode(&line.value).map_err(|error| SnapshotError::Unreadable(format!("{}: {error}", line.key)))
}

/// Checks that no restore was broken off.
///
/// # Errors
/// One was.
pub(super) async fn check_complete(store: &Arc<dyn Store>) -> Result<(), StoreError> {
    match store.get(RESTORING_KEY).await? {
        None => Ok(()),
        Some(_) => Err(StoreError::Open(
            "a snapshot is being restored, or its restore was broken off; restore it again with --force".to_owned(),
        )),
    }
}

fn is_fleeting(key: &str) -> bool {
    key == leader::KEY || key == COMMIT_KEY || key == RESTORING_KEY
}

fn checksum(text: &str) -> String {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(directory: &Path, name: &str) -> Arc<dyn Store> {
        Arc::new(EmbeddedStore::open(&directory.join(name)).unwrap())
    }

    async fn filled(directory: &Path) -> Arc<dyn Store> {
        let store = open(directory, "a.redb");
        for n in 0..40 {
            store.commit(Transaction::new().put(&format!("services/{n}"), vec![n; 10])).await.unwrap();
        }
        store.commit(Transaction::new().put("authority", "sealed").put("leader", "me")).await.unwrap();
        store
    }

    #[tokio::test]
    async fn a_snapshot_is_restored_as_it_was_without_its_leader() {
        let directory = tempfile::tempdir().unwrap();
        let store = filled(directory.path()).await;
        let snapshot = Snapshot::take(&store, "main", Timestamp::UNIX_EPOCH).await.unwrap();
        let read = Snapshot::parse(&snapshot.encode().unwrap()).unwrap();
        assert_eq!(read, snapshot);
        assert_eq!(read.counts(), BTreeMap::from([("authority", 1), ("services", 40)]));

        let other = open(directory.path(), "b.redb");
        other.commit(Transaction::new().put("services/old", "x")).await.unwrap();
        assert!(matches!(read.restore(&other, false).await, Err(SnapshotError::NotEmpty(1))));
        read.restore(&other, true).await.unwrap();
        let again = Snapshot::take(&other, "main", Timestamp::UNIX_EPOCH).await.unwrap();
        assert_eq!(again.entries, snapshot.entries, "what was there before is gone");
        check_complete(&other).await.unwrap();
    }

    #[tokio::test]
    async fn a_snapshot_is_not_restored_under_a_coordinator_or_from_a_newer_version() {
        let directory = tempfile::tempdir().unwrap();
        let store = filled(directory.path()).await;
        let snapshot = Snapshot::take(&store, "main", Timestamp::UNIX_EPOCH).await.unwrap();
        let before = store.list("").await.unwrap();
        let led = snapshot.restore(&store, true).await.unwrap_err().to_string();
        assert!(led.contains("a coordinator leads this cell"), "{led}");
        assert_eq!(store.list("").await.unwrap(), before, "nothing was changed");

        store.commit(Transaction::new().put(format::KEY, "2")).await.unwrap();
        let newer = Snapshot::take(&store, "main", Timestamp::UNIX_EPOCH).await.unwrap();
        let empty = open(directory.path(), "b.redb");
        let refused = newer.restore(&empty, false).await.unwrap_err().to_string();
        assert!(refused.contains("format version 2") && refused.contains("up to 1"), "{refused}");
        assert!(empty.list("").await.unwrap().entries.is_empty(), "nothing was changed");
    }

    #[test]
    fn a_restore_writes_no_more_at_once_than_etcd_takes() {
        let line = |n: usize, size: usize| Line { key: format!("services/{n}"), value: STANDARD.encode(vec![7; size]) };
        let sizes = |entries: &[Line]| batches(entries).unwrap().iter().map(Vec::len).collect::<Vec<_>>();
        let large: Vec<_> = (0..5).map(|n| line(n, 400_000)).collect();
        assert_eq!(sizes(&large), [2, 2, 1]);
        let huge = [line(0, 10), line(1, 1_400_000), line(2, 10)];
        assert_eq!(sizes(&huge), [1, 1, 1]);
        let small: Vec<_> = (0..300).map(|n| line(n, 10)).collect();
        assert_eq!(sizes(&small), [127, 127, 46], "and the leader's key is compared");
        assert!(sizes(&[]).is_empty());
    }

    #[tokio::test]
    async fn a_restore_that_was_broken_off_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path(), "a.redb");
        store.commit(Transaction::new().put(RESTORING_KEY, "now")).await.unwrap();
        let error = check_complete(&store).await.unwrap_err().to_string();
        assert!(error.contains("restore it again"), "{error}");
    }

    #[tokio::test]
    async fn what_is_cut_off_changed_or_foreign_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = filled(directory.path()).await;
        let text = Snapshot::take(&store, "main", Timestamp::UNIX_EPOCH).await.unwrap().encode().unwrap();
        let refused = |text: &str| Snapshot::parse(text).unwrap_err().to_string();
        assert!(refused("").contains("not a snapshot") && refused("{}\n").contains("not a snapshot"));
        assert!(refused(&text.replacen("\"version\":1", "\"version\":9", 1)).contains("its version is 9"));
        for cut in (0..text.len()).step_by(97) {
            refused(&text[..cut]);
        }
        for at in (0..text.len() - 1).step_by(31) {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(flipped) = String::from_utf8(bytes) {
                refused(&flipped);
            }
        }
    }

    #[tokio::test]
    async fn a_file_is_replaced_only_by_force_and_never_while_it_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.redb");
        let store = filled(directory.path()).await;
        let snapshot = Snapshot::take(&store, "main", Timestamp::UNIX_EPOCH).await.unwrap();
        assert!(snapshot.restore_file(&path, false).await.unwrap_err().to_string().contains("--force"));
        assert!(snapshot.restore_file(&path, true).await.unwrap_err().to_string().contains("in use"));
        drop(store);
        std::fs::write(&path, "damaged").unwrap();
        snapshot.restore_file(&path, true).await.unwrap();
        let restored = open(directory.path(), "a.redb");
        assert_eq!(Snapshot::take(&restored, "main", Timestamp::UNIX_EPOCH).await.unwrap().entries, snapshot.entries);
    }
}
