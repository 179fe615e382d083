//! Fetches one model: ranges in parallel, each tried again where it stalls or breaks, from other nodes where
//! these have it and from its store otherwise.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use backon::{ExponentialBuilder, Retryable as _};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::{runtime::Handle, sync::watch};
use tracing::{Instrument as _, info, warn};
use uuid::Uuid;

use super::{
    ModelError,
    archive::{self, ArchiveError},
    cache::{Cache, TreeRecord},
    checksum::{self, Checksums, Mismatch},
    content,
    hands::Hands,
    hashing,
    landing::{File, Landing, Runway, Syncing},
    peers::{Ask, PATIENCE, Peers, Refusal},
    plan::{self, Object, RANGE_BYTES},
    room::Room,
    settle,
    source::{Content, Source},
};

/// Ranges fetched at the same time; with the chunks in flight this bounds memory, too.
const PARALLEL: usize = 16;
/// Tries of one range at the store, the first included.
const TRIES: usize = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// How far a fetch is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes on this node, those from before a crash included.
    pub done: u64,
    /// Bytes of the whole model; 0 before its source has listed it.
    pub total: u64,
}

/// One fetch and all that it needs.
pub(super) struct Fetch {
    pub(super) uri: String,
    pub(super) source: Arc<dyn Source>,
    /// Nodes that may have it, and how to ask them.
    pub(super) peers: Vec<String>,
    pub(super) ask: Option<Arc<dyn Ask>>,
    pub(super) cache: Cache,
    pub(super) room: Room,
    pub(super) hands: Hands,
    /// Silence after which a range is asked for again.
    pub(super) stall: Duration,
    pub(super) progress: watch::Sender<Progress>,
}

/// What is to be fetched, and what is here: the name of each content that is.
struct Plan {
    files: Arc<Vec<File>>,
    known: Vec<Option<String>>,
}

/// What a source has, as a folder can hold it, and the key of that folder. A source that says nothing for as
/// long as `stall` is not waited for.
pub(super) async fn list(source: &dyn Source, uri: &str, stall: Duration) -> Result<(String, Vec<Object>), ModelError> {
    let objects = in_time(source.list(), source.address(), uri, stall).await?;
    plan::check(uri, &objects)?;
    Ok((plan::tree_key(uri, &objects), objects))
}

async fn in_time<T>(
    asking: impl Future<Output = Result<T, ModelError>>,
    address: &str,
    uri: &str,
    stall: Duration,
) -> Result<T, ModelError> {
    let late = || ModelError::Source {
        uri: uri.to_owned(),
        reason: format!("{address} has not said within {stall:?} what is there"),
    };
    tokio::time::timeout(stall, asking).await.unwrap_or_else(|_| Err(late()))
}

impl Fetch {
    /// Fetches the model and gives the key of its folder. What is here already is not fetched.
    pub(super) async fn run(self: Arc<Self>) -> Result<String, ModelError> {
        let began = Instant::now();
        let (key, mut objects) = list(&*self.source, &self.uri, self.stall).await?;
        let total = objects.iter().map(|object| object.size).sum();
        if self.cache.record(&key).is_some() {
            self.progress.send_replace(Progress { done: total, total });
            return Ok(key);
        }
        self.progress.send_replace(Progress { done: 0, total });
        let ask = |object| in_time(self.source.checksums(object), self.source.address(), &self.uri, self.stall);
        let asking: Vec<_> = objects.iter().map(ask).collect();
        let known: Vec<Checksums> = futures::stream::iter(asking).buffered(PARALLEL).try_collect().await?;
        for (object, Checksums { sha256, md5, .. }) in objects.iter_mut().zip(known) {
            (object.sha256, object.md5) = (sha256, md5);
        }
        // Until it is published, or has failed.
        let _reserved = self.room.reserve(&self.uri, &key, &objects, began).await?;
        let boot = self.expect(&key).await?;
        let mut peers = match &self.ask {
            Some(ask) => Peers::find(ask, &self.peers, &key, &objects).await.map(Arc::new),
            None => None,
        };
        let (plan, found, syncing) = loop {
            let plan = self.plan(&key, &objects, peers.as_deref())?;
            let begun = Instant::now();
            let (found, syncing) = self.content(&plan.files, peers.take()).await?;
            if self.fits(&key, &plan.files, &found)? {
                info!(uri = %self.uri, bytes = total, took = ?begun.elapsed(), "model fetched");
                break (plan, found, syncing);
            }
            syncing.ended().await.map_err(|error| self.disk(error))?;
        };
        let names = found.iter().filter_map(|(place, found)| Some((*place, found.name()?))).collect();
        let arrival = Arrival { uri: self.uri.clone(), key: key.clone(), objects, plan, names, boot };
        // To its end, though nobody may wait any more: what is shown must be settled.
        let showing = tokio::spawn(arrival.show(self.cache.clone(), self.room.clone(), syncing));
        showing.await.map_err(|error| self.disk(io::Error::other(error)))??;
        Ok(key)
    }

    /// Marks the model that is to come with this boot; `None` where there is no telling boots apart.
    async fn expect(&self, key: &str) -> Result<Option<String>, ModelError> {
        let Some(boot) = self.cache.boot().map(ToOwned::to_owned) else { return Ok(None) };
        let (cache, key, marked) = (self.cache.clone(), key.to_owned(), boot.clone());
        let marking = tokio::task::spawn_blocking(move || cache.expect(&key, &marked)).await;
        marking.map_err(io::Error::other).flatten().map_err(|error| self.disk(error))?;
        Ok(Some(boot))
    }

    /// Opens the files that are not here. Once other nodes are asked for one, what they say of it is noted.
    fn plan(&self, key: &str, objects: &[Object], peers: Option<&Peers>) -> Result<Plan, ModelError> {
        let (mut files, mut known, mut done) = (Vec::new(), Vec::new(), 0);
        for (number, object) in objects.iter().enumerate() {
            let here = object.sha256.as_ref().filter(|sha256| self.cache.blob(sha256).exists());
            known.push(here.cloned());
            done += object.size;
            if here.is_some() {
                continue;
            }
            let part = self.cache.part(key, number, object.size).map_err(|error| self.disk(error))?;
            let missing = plan::missing(object.size, &part.done);
            let left: u64 = missing.iter().map(|range| range.end - range.start).sum();
            done -= left;
            let mut told = part.told.clone();
            if let (None, Some(name), true) = (&told, peers.and_then(|peers| peers.blob(number)), left > 0) {
                part.tell(name).map_err(|error| self.disk(error))?;
                told = Some(name.to_owned());
            }
            files.push(File { number, object: object.clone(), part, told });
        }
        self.progress.send_modify(|progress| progress.done = done);
        Ok(Plan { files: Arc::new(files), known })
    }

    /// Has all files in place, on their way to the disk, and gives the checksums of those that are to be compared, by
    /// their places. Each range is a task of its own: one task for all of them would have no more than one processor.
    async fn content(
        self: &Arc<Self>,
        files: &Arc<Vec<File>>,
        peers: Option<Arc<Peers>>,
    ) -> Result<(BTreeMap<usize, Checksums>, Syncing), ModelError> {
        let (runway, landing) = Landing::start(files);
        let places = files.iter().enumerate();
        let mut ranges: Vec<(usize, Range<u64>)> = places
            .flat_map(|(place, file)| {
                plan::missing(file.object.size, &file.part.done).into_iter().map(move |r| (place, r))
            })
            .collect();
        // All files side by side: who writes to one file waits for others that do.
        ranges.sort_by_key(|(_, range)| range.start);
        let came = futures::stream::iter(ranges)
            .map(|(place, range)| {
                let (fetch, files, peers) = (Arc::clone(self), Arc::clone(files), peers.clone());
                let coming = fetch.land(files, place, range, peers, runway.clone());
                self.hands.spawn(coming.in_current_span())
            })
            .buffer_unordered(PARALLEL)
            .map(|ended| ended.unwrap_or_else(|error| Err(self.disk(io::Error::other(error)))))
            .try_collect::<()>()
            .await;
        // Tasks that were cut off give theirs back.
        drop(runway);
        let (found, syncing) = landing.checked().await;
        if let Err(why) = came {
            // Where the disk is to blame, it says more; and what came is noted.
            syncing.ended().await.map_err(|error| self.disk(error))?;
            return Err(why);
        }
        Ok((found.map_err(|error| self.disk(error))?, syncing))
    }

    /// Has one range in its place, and lets it be synced and hashed.
    async fn land(
        self: Arc<Self>,
        files: Arc<Vec<File>>,
        place: usize,
        range: Range<u64>,
        peers: Option<Arc<Peers>>,
        runway: Runway,
    ) -> Result<(), ModelError> {
        let start = range.start;
        self.range(&files[place], range, peers.as_deref()).await?;
        runway.written(place, start).map_err(|error| self.disk(error))
    }

    /// Compares what came with what the source says, and with what other nodes said of what came from them.
    /// False: some of theirs is not right, and is forgotten.
    fn fits(&self, key: &str, files: &[File], found: &BTreeMap<usize, Checksums>) -> Result<bool, ModelError> {
        let mut fit = true;
        for (file, found) in found.iter().map(|(place, found)| (&files[*place], found)) {
            let listed = Checksums::listed(&file.object);
            let told = Checksums::of_name(file.told.as_deref());
            let Some(mismatch) = listed.differ(found).or_else(|| told.differ(found)) else { continue };
            let Mismatch { kind, expected, found } = mismatch;
            let path = file.object.path.clone();
            if file.told.is_none() {
                self.cache.discard(key);
                return Err(ModelError::Checksum { uri: self.uri.clone(), file: path, kind, expected, found });
            }
            warn!(uri = %self.uri, file = %path, kind, %expected, %found, "another node sent something else; fetching it from the store");
            file.part.reset().map_err(|error| self.disk(error))?;
            fit = false;
        }
        Ok(fit)
    }

    fn disk(&self, error: io::Error) -> ModelError {
        ModelError::Disk { uri: self.uri.clone(), error }
    }

    /// Writes one range to its place, from wherever it comes.
    async fn range(&self, file: &File, range: Range<u64>, peers: Option<&Peers>) -> Result<(), ModelError> {
        let coming = Coming::new(file, range);
        if let Some(peers) = peers {
            self.ask_peers(peers, &coming).await.map_err(|error| self.disk(error))?;
        }
        if coming.left().is_empty() {
            return Ok(());
        }
        let waits = ExponentialBuilder::default()
            .with_min_delay(FIRST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .with_max_times(TRIES - 1);
        let path = &file.object.path;
        let copied = (|| self.copy(self.source.read(&file.object, coming.left()), &coming))
            .retry(waits)
            .when(|trouble| matches!(trouble, Trouble::Source(_)))
            .notify(|trouble, pause| {
                let left = coming.left();
                warn!(uri = %self.uri, file = %path, ?left, %trouble, ?pause, "range not fetched; trying again");
            });
        copied.await.map_err(|trouble| match trouble {
            Trouble::Disk(error) => self.disk(error),
            Trouble::Source(reason) => {
                let reason = format!("{path}: {reason}; tried {TRIES} times");
                ModelError::Source { uri: self.uri.clone(), reason }
            }
        })
    }

    /// As much of a range as other nodes give, one after another.
    async fn ask_peers(&self, peers: &Peers, coming: &Coming<'_>) -> io::Result<()> {
        // Only what is noted as theirs; a file may have been begun by the word of others.
        let Some(name) = peers.blob(coming.file.number) else { return Ok(()) };
        if coming.file.told.as_deref() != Some(name) {
            return Ok(());
        }
        let first = coming.file.number + usize::try_from(coming.range.start / RANGE_BYTES).unwrap_or_default();
        for peer in peers.order(first) {
            let Some(_turn) = peer.turn().await else { continue };
            let copying = async {
                match peers.read(peer, name, coming.left()).await {
                    Ok(content) => self.copy(std::future::ready(Ok(content)), coming).await.map(|()| true),
                    Err(Refusal::Busy) => Ok(false),
                    Err(Refusal::Unfit(reason)) => Err(Trouble::Source(reason)),
                }
            };
            let patience = PATIENCE.min(self.stall);
            let copied = tokio::time::timeout(patience, copying).await;
            match copied.unwrap_or_else(|_| Err(Trouble::Source(format!("not whole within {patience:?}")))) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(Trouble::Disk(error)) => return Err(error),
                Err(Trouble::Source(reason)) => {
                    warn!(uri = %self.uri, node = %peer.name, %reason, left = ?coming.left(), "range not fetched from the node; not asking it any more");
                    peer.unfit();
                }
            }
        }
        Ok(())
    }

    /// Writes what comes to its place, up to the range's end.
    async fn copy(
        &self,
        opening: impl Future<Output = Result<Content, String>>,
        coming: &Coming<'_>,
    ) -> Result<(), Trouble> {
        let stalled = |_| Trouble::Source(format!("no byte came for {:?}", self.stall));
        let opened = tokio::time::timeout(self.stall, opening).await.map_err(stalled)?;
        let mut content = opened.map_err(Trouble::Source)?;
        while let Some(chunk) = tokio::time::timeout(self.stall, content.next()).await.map_err(stalled)? {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(_) if coming.left().is_empty() => break,
                Err(reason) => return Err(Trouble::Source(reason)),
            };
            let left = coming.left();
            if chunk.len() as u64 > left.end - left.start {
                self.progress.send_modify(|progress| progress.done -= left.start - coming.range.start);
                coming.forget();
                return Err(Trouble::Source("more bytes came than were asked for".to_owned()));
            }
            coming.take(&chunk).map_err(Trouble::Disk)?;
            self.progress.send_modify(|progress| progress.done += chunk.len() as u64);
        }
        let left = coming.left();
        if left.is_empty() {
            return Ok(());
        }
        Err(Trouble::Source(format!("the answer ended {} bytes early", left.end - left.start)))
    }
}

/// A range on its way: what has come of it stays when the next try begins.
struct Coming<'f> {
    file: &'f File,
    range: Range<u64>,
    /// What has come ends here, in the file.
    to: AtomicU64,
}

impl<'f> Coming<'f> {
    fn new(file: &'f File, range: Range<u64>) -> Self {
        Self { file, to: AtomicU64::new(range.start), range }
    }

    fn left(&self) -> Range<u64> {
        self.to.load(Ordering::Relaxed)..self.range.end
    }

    /// Writes what follows to its place. Blocks, shortly: the page cache takes it.
    fn take(&self, chunk: &[u8]) -> io::Result<()> {
        self.file.part.data.write_all_at(chunk, self.left().start)?;
        self.to.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Has it begin anew.
    fn forget(&self) {
        self.to.store(self.range.start, Ordering::Relaxed);
    }
}

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{0}")]
    Disk(io::Error),
    #[error("{0}")]
    Source(String),
}

/// A model all of whose bytes have come.
struct Arrival {
    uri: String,
    key: String,
    objects: Vec<Object>,
    plan: Plan,
    /// Of the plan's files, by their places, those of which they are known.
    names: BTreeMap<usize, String>,
    /// This boot, where it is still to be synced.
    boot: Option<String>,
}

impl Arrival {
    /// Makes the model visible, whose bytes go on to the disk meanwhile, and some of whose contents have no names yet;
    /// where there is no telling boots apart, once both is done.
    async fn show(mut self, cache: Cache, room: Room, syncing: Syncing) -> Result<(), ModelError> {
        let (uri, key) = (self.uri.clone(), self.key.clone());
        let disk = |error| ModelError::Disk { uri: uri.clone(), error };
        let later = match &self.boot {
            Some(_) => Some(syncing),
            None => {
                syncing.ended().await.map_err(disk)?;
                None
            }
        };
        let (of, to) = (cache.clone(), room.clone());
        let publishing = move || {
            // What an archive is called does not matter.
            if self.boot.is_none() && archive::kind(&self.uri).is_none() {
                self.name()?;
            }
            self.publish(&of, &to)
        };
        let published = tokio::task::spawn_blocking(publishing).await;
        published.unwrap_or_else(|error| Err(disk(io::Error::other(error))))?;
        if let Some(syncing) = later {
            tokio::spawn(settle::settle(cache, room, key, syncing));
        }
        Ok(())
    }

    /// Gives names to those contents that have none yet. Blocks.
    fn name(&mut self) -> Result<(), ModelError> {
        let unnamed: Vec<usize> = (0..self.plan.files.len()).filter(|place| !self.names.contains_key(place)).collect();
        let files: Vec<_> = unnamed.iter().map(|place| self.plan.files[*place].part.path.clone()).collect();
        let named = hashing::names(&files).map_err(|error| ModelError::Disk { uri: self.uri.clone(), error })?;
        self.names.extend(unnamed.into_iter().zip(named));
        Ok(())
    }

    /// Takes in what came and makes it visible. Blocks.
    fn publish(self, cache: &Cache, room: &Room) -> Result<(), ModelError> {
        let Self { uri, key, objects, plan, mut names, boot } = self;
        let fetch = Uuid::new_v4().simple().to_string();
        let came = plan.files.iter().enumerate().map(|(place, file)| {
            let name = names.remove(&place).unwrap_or_else(|| content::unnamed(&fetch, file.number));
            (file.part.path.clone(), name)
        });
        let came: Vec<_> = came.collect();
        if let (Some(kind), [(path, _)]) = (archive::kind(&uri), came.as_slice()) {
            return unpack(cache, room, &uri, &key, kind, path, &objects);
        }
        let mut new = came.iter().map(|(_, name)| name.clone());
        let blobs = plan.known.iter().filter_map(|known| known.clone().or_else(|| new.next())).collect();
        let record = TreeRecord { uri: uri.clone(), objects, blobs };
        let published = room.publish(&key, &record, &came, boot.as_deref());
        published.map_err(|error| ModelError::Disk { uri, error })
    }
}

/// The model is what is in the archive.
fn unpack(
    cache: &Cache,
    room: &Room,
    uri: &str,
    key: &str,
    kind: archive::Kind,
    path: &std::path::Path,
    archived: &[Object],
) -> Result<(), ModelError> {
    let disk = |error| ModelError::Disk { uri: uri.to_owned(), error };
    let failed = |error| match error {
        ArchiveError::Disk(error) => disk(error),
        ArchiveError::Bad(reason) => {
            // The next try must not find the same bytes again.
            cache.discard(key);
            ModelError::Source { uri: uri.to_owned(), reason: format!("the archive cannot be unpacked: {reason}") }
        }
    };
    let of = |(path, size): (String, u64)| Object {
        location: path.clone(),
        path,
        size,
        etag: None,
        sha256: None,
        md5: None,
    };
    let mut objects: Vec<Object> = archive::list(path, kind).map_err(failed)?.into_iter().map(of).collect();
    plan::check(uri, &objects).inspect_err(|_| cache.discard(key))?;
    // For a moment the archive and its files are both there.
    let objects_and_archive = [objects.as_slice(), archived].concat();
    let _reserved = Handle::current().block_on(room.reserve(uri, key, &objects_and_archive, Instant::now()))?;
    archive::unpack(path, kind, |number| cache.unpacked(key, number)).map_err(failed)?;
    let mut came = Vec::new();
    for (number, object) in objects.iter_mut().enumerate() {
        let path = cache.unpacked(key, number);
        object.sha256 = checksum::of_file(&path, false).map_err(disk)?.sha256;
        came.push((path, object.sha256.clone().unwrap_or_default()));
    }
    let blobs = came.iter().map(|(_, name)| name.clone()).collect();
    let record = TreeRecord { uri: uri.to_owned(), objects, blobs };
    // Each file is synced as it is unpacked.
    room.publish(key, &record, &came, None).map_err(disk)
}
