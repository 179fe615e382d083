//! What becomes of ranges once they are written: synced and noted many at a time, and hashed in order, on
//! threads of their own, while others are still on their way.

use std::{collections::BTreeSet, io, os::unix::fs::FileExt as _, sync::Arc, thread};

use md5::{Digest as _, Md5};
use tokio::sync::{mpsc, oneshot};

use super::{
    cache::Part,
    checksum::Checksums,
    content::{self, Named},
    plan::{self, Object, RANGE_BYTES},
};

/// Ranges that wait to be synced, at most: beyond them the disk sets the pace, and not memory.
const UNSYNCED: usize = 64;
/// Of these, synced at once and noted then: what a crash costs.
const BATCH: usize = 16;
/// Threads that hash, at most; one does what a fast network brings, unless there is an MD5 to compute, too.
const HASHERS: usize = 4;
/// Bytes hashed at once.
const CHUNK: usize = 256 << 10;

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
    fn named(&self) -> Named {
        let told = self.told.as_deref().and_then(content::parse).map(|(named, _)| named);
        if self.object.sha256.is_some() { Named::Sha256 } else { told.unwrap_or(Named::Blake3) }
    }
}

/// A range that is written: its file, by its place among those that are fetched, and its start.
type Written = (usize, u64);

/// What a thread's work comes to.
type Outcome<T> = oneshot::Receiver<io::Result<T>>;

/// Takes in ranges that are written. Cheap to clone.
#[derive(Clone)]
pub(super) struct Runway {
    to_sync: mpsc::Sender<Written>,
    to_hash: Vec<mpsc::UnboundedSender<Written>>,
}

impl Runway {
    /// A range is written. Waits while too many are not synced; false: the disk refuses, and
    /// [`Syncing::ended`] says why.
    pub(super) async fn written(&self, file: usize, start: u64) -> bool {
        let hashes = self.to_hash[file % self.to_hash.len()].send((file, start)).is_ok();
        self.to_sync.send((file, start)).await.is_ok() && hashes
    }
}

/// Takes care of ranges that are written.
pub(super) struct Landing {
    syncing: Syncing,
    hashing: Vec<Outcome<Vec<(usize, Checksums)>>>,
}

impl Landing {
    /// What is on disk of these files already is hashed, too.
    pub(super) fn start(files: &Arc<Vec<File>>) -> (Runway, Self) {
        let (to_sync, written) = mpsc::channel(UNSYNCED);
        let of_sync = Arc::clone(files);
        let syncing = apart(move || sync(&of_sync, written));
        let threads = thread::available_parallelism().map_or(1, usize::from).min(HASHERS).min(files.len().max(1));
        let hashers = (0..threads).map(|thread| {
            let (to_hash, written) = mpsc::unbounded_channel();
            let files = Arc::clone(files);
            (to_hash, apart(move || hash(&files, thread, threads, written)))
        });
        let (to_hash, hashing) = hashers.unzip();
        (Runway { to_sync, to_hash }, Self { syncing: Syncing(syncing), hashing })
    }

    /// Waits until every [`Runway`] is gone and all that was written is hashed, and gives each file's checksums:
    /// its MD5 only where the source gave one. Those of files that are not whole say nothing. Syncing may go on.
    pub(super) async fn hashed(self) -> (io::Result<Vec<Checksums>>, Syncing) {
        let mut all = Vec::new();
        for hashing in self.hashing {
            match hashing.await.map_err(io::Error::other).flatten() {
                Ok(some) => all.extend(some),
                Err(error) => return (Err(error), self.syncing),
            }
        }
        all.sort_by_key(|(file, _)| *file);
        (Ok(all.into_iter().map(|(_, checksums)| checksums).collect()), self.syncing)
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
fn apart<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Outcome<T> {
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

fn sync(files: &[File], mut written: mpsc::Receiver<Written>) -> io::Result<()> {
    let mut batch: Vec<Written> = Vec::new();
    while written.blocking_recv_many(&mut batch, BATCH) > 0 {
        batch.sort_unstable();
        for of_file in batch.chunk_by(|(a, _), (b, _)| a == b) {
            let starts: Vec<u64> = of_file.iter().map(|(_, start)| *start).collect();
            files[of_file[0].0].part.note(&starts)?;
        }
        batch.clear();
    }
    Ok(())
}

/// Hashes every `threads`th file, beginning with the one of this number.
fn hash(
    files: &[File],
    thread: usize,
    threads: usize,
    mut written: mpsc::UnboundedReceiver<Written>,
) -> io::Result<Vec<(usize, Checksums)>> {
    let mut buffer = vec![0; CHUNK];
    let mut running: Vec<Running<'_>> = files.iter().skip(thread).step_by(threads).map(Running::new).collect();
    for running in &mut running {
        running.go_on(&mut buffer)?;
    }
    while let Some((file, start)) = written.blocking_recv() {
        let running = &mut running[file / threads];
        running.ready.insert(start);
        running.go_on(&mut buffer)?;
    }
    let numbers = (thread..).step_by(threads);
    Ok(numbers.zip(running.into_iter().map(Running::checksums)).collect())
}

/// The checksums of a file as far as it is there from its start.
struct Running<'f> {
    file: &'f File,
    at: u64,
    /// Starts of ranges that are written and not hashed.
    ready: BTreeSet<u64>,
    name: Name,
    md5: Option<Md5>,
}

/// What becomes a content's name.
enum Name {
    Sha256(Box<ring::digest::Context>),
    Blake3(Box<blake3::Hasher>),
}

impl Name {
    fn new(named: Named) -> Self {
        match named {
            Named::Sha256 => Self::Sha256(Box::new(ring::digest::Context::new(&ring::digest::SHA256))),
            Named::Blake3 => Self::Blake3(Box::default()),
        }
    }

    fn update(&mut self, content: &[u8]) {
        match self {
            Self::Sha256(context) => context.update(content),
            Self::Blake3(hasher) => drop(hasher.update(content)),
        }
    }

    fn checksums(self) -> Checksums {
        match self {
            Self::Sha256(context) => {
                Checksums { sha256: Some(plan::hex(context.finish().as_ref())), ..Checksums::default() }
            }
            Self::Blake3(hasher) => {
                Checksums { blake3: Some(hasher.finalize().to_hex().to_string()), ..Checksums::default() }
            }
        }
    }
}

impl<'f> Running<'f> {
    fn new(file: &'f File) -> Self {
        let name = Name::new(file.named());
        let md5 = file.object.md5.as_ref().map(|_| Md5::new());
        Self { file, at: 0, ready: file.part.done.clone(), name, md5 }
    }

    /// Just written, most of it is read from memory.
    fn go_on(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        while self.ready.remove(&self.at) {
            let end = (self.at + RANGE_BYTES).min(self.file.object.size);
            while self.at < end {
                let chunk = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(buffer.len());
                self.file.part.data.read_exact_at(&mut buffer[..chunk], self.at)?;
                self.name.update(&buffer[..chunk]);
                if let Some(md5) = &mut self.md5 {
                    md5.update(&buffer[..chunk]);
                }
                self.at += chunk as u64;
            }
        }
        Ok(())
    }

    fn checksums(self) -> Checksums {
        Checksums { md5: self.md5.map(|md5| plan::hex(&md5.finalize())), ..self.name.checksums() }
    }
}
