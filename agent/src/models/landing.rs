//! What becomes of ranges once they are written: noted, synced many at a time, and hashed, while others are still on
//! their way.
//!
//! Only a file of which its store or another node says a checksum is hashed here, to be compared before its model is
//! shown. Of any other the hash is a name and no more: see [`super::settle`].

use std::{collections::BTreeMap, io, sync::Arc, thread, time::Duration};

use tokio::sync::{mpsc, oneshot};

use super::{
    checksum::Checksums,
    content::{self, Named},
    hashing::{Buffer, Hashing},
    part::Part,
    plan::Object,
};

/// How long what came may lie in memory alone, while more comes: what a crash of the machine costs. As often the
/// kernel's own write-back wakes. Syncing takes time from what comes, and most models come sooner.
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// Threads that hash, at most; one does what a fast network brings, unless there is an MD5 to compute, too.
const HASHERS: usize = 4;

/// One file on its way.
pub(super) struct File {
    /// Its place in the listing.
    pub(super) number: usize,
    pub(super) object: Object,
    pub(super) part: Part,
    /// Its name by another node's word, where bytes may have come from one.
    pub(super) told: Option<String>,
}

impl File {
    /// By which hash its content will be named.
    pub(super) fn named(&self) -> Named {
        let told = self.told.as_deref().and_then(content::parse).map(|(named, _)| named);
        if self.object.sha256.is_some() { Named::Sha256 } else { told.unwrap_or(Named::Blake3) }
    }

    /// True where there is a checksum to compare with.
    fn is_checked(&self) -> bool {
        self.object.sha256.is_some() || self.object.md5.is_some() || self.told.is_some()
    }
}

/// A range that is written: its file, by its place among those that are fetched, and its start.
type Written = (usize, u64);

/// What work comes to that goes on beside others.
type Outcome<T> = oneshot::Receiver<io::Result<T>>;

/// Checksums of some files, by their places.
type Hashed = BTreeMap<usize, Checksums>;

/// Takes in ranges that are written. Cheap to clone.
#[derive(Clone)]
pub(super) struct Runway {
    files: Arc<Vec<File>>,
    to_sync: mpsc::UnboundedSender<Written>,
    /// For each file that is to be compared.
    to_hash: Arc<BTreeMap<usize, mpsc::UnboundedSender<Written>>>,
}

impl Runway {
    /// A range is written.
    ///
    /// # Errors
    /// The disk refuses; of what was written before, [`Syncing::ended`] says why.
    pub(super) fn written(&self, file: usize, start: u64) -> io::Result<()> {
        self.files[file].part.came(start)?;
        let hashes = self.to_hash.get(&file).is_none_or(|to_hash| to_hash.send((file, start)).is_ok());
        let syncs = self.to_sync.send((file, start)).is_ok();
        if hashes && syncs { Ok(()) } else { Err(io::Error::other("what came cannot be synced or read")) }
    }
}

/// Takes care of ranges that are written.
pub(super) struct Landing {
    checking: Vec<Outcome<Hashed>>,
    syncing: Syncing,
}

impl Landing {
    /// What is there of these files already is hashed, too.
    pub(super) fn start(files: &Arc<Vec<File>>) -> (Runway, Self) {
        let (to_sync, written) = mpsc::unbounded_channel();
        let (tell, syncing) = oneshot::channel();
        let syncs = sync(Arc::clone(files), written);
        // Goes on where the fetch is given up: nobody hears of it then.
        tokio::spawn(async move { tell.send(syncs.await) });

        let checked: Vec<usize> = (0..files.len()).filter(|file| files[*file].is_checked()).collect();
        let threads = thread::available_parallelism().map_or(1, usize::from).min(HASHERS).min(checked.len());
        let mut to_hash = BTreeMap::new();
        let checking = (0..threads).map(|thread| {
            let share: Vec<usize> = checked.iter().copied().skip(thread).step_by(threads).collect();
            let (sender, written) = mpsc::unbounded_channel();
            to_hash.extend(share.iter().map(|file| (*file, sender.clone())));
            let files = Arc::clone(files);
            apart(move || hash(&files, share, written))
        });
        let checking = checking.collect();
        let runway = Runway { files: Arc::clone(files), to_sync, to_hash: Arc::new(to_hash) };
        (runway, Self { checking, syncing: Syncing(syncing) })
    }

    /// Waits until every [`Runway`] is gone and all that was written and is to be compared is hashed, and gives the
    /// checksums of files by their places: an MD5 only where the source gave one. Those of files that are not whole
    /// say nothing. Syncing may go on.
    pub(super) async fn checked(self) -> (io::Result<Hashed>, Syncing) {
        let mut all = Hashed::new();
        for checking in self.checking {
            match checking.await.map_err(io::Error::other).flatten() {
                Ok(some) => all.extend(some),
                Err(error) => return (Err(error), self.syncing),
            }
        }
        (Ok(all), self.syncing)
    }
}

/// Ranges on their way to the disk.
pub(super) struct Syncing(Outcome<()>);

impl Syncing {
    /// One that the disk has refused.
    #[cfg(test)]
    pub(super) fn refused() -> Self {
        Self(apart(|| Err(io::ErrorKind::StorageFull.into())))
    }

    /// Waits until all that was written is synced and noted.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) async fn ended(self) -> io::Result<()> {
        self.0.await.map_err(io::Error::other)?
    }
}

/// Does work on a thread of its own. Where there can be none, the outcome is an error.
pub(super) fn apart<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Outcome<T> {
    let (tell, outcome) = oneshot::channel();
    let work = move || {
        // Nobody hears it where the fetch was given up.
        let _ = tell.send(work());
    };
    if let Err(error) = thread::Builder::new().name("landing".to_owned()).spawn(work) {
        tracing::error!(%error, "no thread for what is fetched");
    }
    outcome
}

async fn sync(files: Arc<Vec<File>>, mut written: mpsc::UnboundedReceiver<Written>) -> io::Result<()> {
    let mut more = true;
    while more {
        let mut batch: Vec<Written> = Vec::new();
        let gathering = async {
            while let Some(range) = written.recv().await {
                batch.push(range);
            }
        };
        more = tokio::time::timeout(SYNC_EVERY, gathering).await.is_err();
        batch.sort_unstable();
        let noting = batch.chunk_by(|(a, _), (b, _)| a == b).map(|of_file| {
            let (files, file) = (Arc::clone(&files), of_file[0].0);
            let starts: Vec<u64> = of_file.iter().map(|(_, start)| *start).collect();
            tokio::task::spawn_blocking(move || files[file].part.note(&starts))
        });
        let noting: Vec<_> = noting.collect();
        for noted in noting {
            noted.await.map_err(io::Error::other).flatten()?;
        }
    }
    Ok(())
}

/// Hashes some of the files, by their places.
fn hash(files: &[File], share: Vec<usize>, mut written: mpsc::UnboundedReceiver<Written>) -> io::Result<Hashed> {
    let mut buffer = Buffer::new();
    let mut all = BTreeMap::new();
    for file in share {
        all.insert(file, Hashing::begin(&files[file], &mut buffer)?);
    }
    while let Some((file, start)) = written.blocking_recv() {
        if let Some(hashing) = all.get_mut(&file) {
            hashing.written(start, &mut buffer)?;
        }
    }
    Ok(all.into_iter().map(|(file, hashing)| (file, hashing.checksums())).collect())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;
    use crate::models::{cache::Cache, plan::RANGE_BYTES};

    /// A file of two ranges that are written, and the journal of it.
    fn written(root: &std::path::Path) -> (Arc<Vec<File>>, PathBuf) {
        let size = RANGE_BYTES + 1;
        let part = Cache::open(root.to_owned()).unwrap().part("k", 0, size).unwrap();
        let journal = part.path.with_extension("done");
        let object = Object { path: "m".into(), location: "m".into(), size, etag: None, sha256: None, md5: None };
        (Arc::new(vec![File { number: 0, object, part, told: None }]), journal)
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_is_noted_at_once_and_synced_while_more_comes() {
        let root = tempfile::tempdir().unwrap();
        let (files, journal) = written(root.path());
        let boot = crate::models::settle::boot_id().unwrap();
        let (runway, landing) = Landing::start(&files);
        let noted = || fs::read_to_string(&journal).unwrap();
        runway.written(0, 0).unwrap();
        assert_eq!(noted(), format!("0 {boot}\n"));
        tokio::time::sleep(SYNC_EVERY / 2).await;
        assert_eq!(noted(), format!("0 {boot}\n"), "syncing takes time from what comes");
        while noted().lines().count() < 2 {
            tokio::time::sleep(SYNC_EVERY).await;
        }
        assert_eq!(noted(), format!("0 {boot}\n0\n"));
        // The last one, and the end: nothing is waited for.
        let before = tokio::time::Instant::now();
        runway.written(0, RANGE_BYTES).unwrap();
        drop(runway);
        let (found, syncing) = landing.checked().await;
        syncing.ended().await.unwrap();
        assert!(before.elapsed() < SYNC_EVERY);
        assert_eq!(noted(), format!("0 {boot}\n0\n{RANGE_BYTES} {boot}\n{RANGE_BYTES}\n"));
        assert!(found.unwrap().is_empty(), "there is nothing to compare it with");
    }

    #[tokio::test]
    async fn what_the_disk_refuses_ends_the_fetch() {
        let root = tempfile::tempdir().unwrap();
        let (mut files, _) = written(root.path());
        // A file that cannot be read.
        let written_only = fs::File::options().write(true).open(&files[0].part.path).unwrap();
        let file = Arc::get_mut(&mut files).unwrap();
        file[0].part.data = written_only;
        file[0].object.sha256 = Some("0".repeat(64));
        let (runway, landing) = Landing::start(&files);
        runway.written(0, 0).unwrap();
        drop(runway);
        assert!(landing.checked().await.0.is_err());
    }
}
