//! Fetches one model: ranges in parallel, each tried again where it stalls or breaks.

use std::{io, ops::Range, os::unix::fs::FileExt as _, sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    ModelError,
    archive::{self, ArchiveError},
    cache::{Cache, Part, TreeRecord},
    checksum::{self, Checksums, Mismatch},
    plan::{self, Object},
    room::{Reserved, Room},
    source::Source,
};

/// Ranges fetched at the same time; with the chunks in flight this bounds memory, too.
const PARALLEL: usize = 16;
/// Tries of one range, the first included.
const TRIES: u32 = 6;
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
    pub(super) cache: Cache,
    pub(super) room: Room,
    /// Silence after which a range is asked for again.
    pub(super) stall: Duration,
    pub(super) progress: watch::Sender<Progress>,
}

impl Fetch {
    /// Fetches the model and gives the key of its folder. What is here already is not fetched.
    pub(super) async fn run(&self) -> Result<String, ModelError> {
        let mut objects = self.source.list().await?;
        plan::check(&self.uri, &objects)?;
        let key = plan::tree_key(&self.uri, &objects);
        let total = objects.iter().map(|object| object.size).sum();
        if self.cache.record(&key).is_some() {
            self.progress.send_replace(Progress { done: total, total });
            return Ok(key);
        }
        self.progress.send_replace(Progress { done: 0, total });
        let asking: Vec<_> = objects.iter().map(|object| self.source.checksums(object)).collect();
        let known: Vec<Checksums> = futures::stream::iter(asking).buffered(PARALLEL).try_collect().await?;
        for (object, Checksums { sha256, md5 }) in objects.iter_mut().zip(known) {
            (object.sha256, object.md5) = (sha256, md5);
        }
        // Until it is published, or has failed.
        let _reserved = self.reserve(&key, objects.clone()).await?;
        let mut blobs = Vec::new();
        let mut files = Vec::new();
        for (number, object) in objects.iter().enumerate() {
            let known = object.sha256.as_ref().filter(|sha256| self.cache.blob(sha256).exists());
            if known.is_some() {
                self.add(object.size);
            } else {
                let part = self.cache.part(&key, number, object.size).map_err(|error| self.disk(error))?;
                let left: u64 =
                    plan::missing(object.size, &part.done).iter().map(|range| range.end - range.start).sum();
                self.add(object.size - left);
                files.push((object, Arc::new(part)));
            }
            blobs.push(known.cloned());
        }
        let mut ranges = Vec::new();
        for (object, part) in &files {
            for range in plan::missing(object.size, &part.done) {
                ranges.push(self.range(object, Arc::clone(part), range).boxed());
            }
        }
        let begun = tokio::time::Instant::now();
        futures::stream::iter(ranges).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        info!(uri = %self.uri, bytes = total, took = ?begun.elapsed(), "model fetched; checking it");
        let (cache, room, uri, name) = (self.cache.clone(), self.room.clone(), self.uri.clone(), key.clone());
        let paths: Vec<_> = files.into_iter().map(|(_, part)| part.path.clone()).collect();
        let finished =
            tokio::task::spawn_blocking(move || finish(&cache, &room, &uri, &name, objects, blobs, paths)).await;
        finished.unwrap_or_else(|error| Err(self.disk(io::Error::other(error))))?;
        Ok(key)
    }

    async fn reserve(&self, key: &str, objects: Vec<Object>) -> Result<Reserved, ModelError> {
        let (room, uri, key) = (self.room.clone(), self.uri.clone(), key.to_owned());
        let reserved = tokio::task::spawn_blocking(move || room.reserve(&uri, &key, &objects)).await;
        reserved.unwrap_or_else(|error| Err(self.disk(io::Error::other(error))))
    }

    fn add(&self, bytes: u64) {
        self.progress.send_modify(|progress| progress.done += bytes);
    }

    fn disk(&self, error: io::Error) -> ModelError {
        ModelError::Disk { uri: self.uri.clone(), error }
    }

    async fn range(&self, object: &Object, part: Arc<Part>, range: Range<u64>) -> Result<(), ModelError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let before = self.progress.borrow().done;
            let reason = match self.range_once(object, &part, range.clone()).await {
                Ok(()) => break,
                Err(Trouble::Disk(error)) => return Err(self.disk(error)),
                Err(Trouble::Source { reason, took }) => {
                    self.progress.send_modify(|progress| progress.done = progress.done.saturating_sub(took));
                    reason
                }
            };
            if attempt >= TRIES {
                let reason = format!("{}: {reason}; tried {TRIES} times", object.path);
                return Err(ModelError::Source { uri: self.uri.clone(), reason });
            }
            warn!(uri = %self.uri, file = %object.path, ?range, %reason, ?pause, before, "range not fetched; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        let start = range.start;
        let noted = tokio::task::spawn_blocking(move || part.note(start)).await.map_err(io::Error::other);
        noted.and_then(|noted| noted).map_err(|error| self.disk(error))
    }

    async fn range_once(&self, object: &Object, part: &Part, range: Range<u64>) -> Result<(), Trouble> {
        let mut at = range.start;
        let trouble = |reason: String, at: u64| Trouble::Source { reason, took: at - range.start };
        let stalled = || format!("no byte came for {:?}", self.stall);
        let opening = tokio::time::timeout(self.stall, self.source.read(object, range.clone())).await;
        let mut content = opening.map_err(|_| trouble(stalled(), at))?.map_err(|reason| trouble(reason, at))?;
        loop {
            let chunk = tokio::time::timeout(self.stall, content.next()).await.map_err(|_| trouble(stalled(), at))?;
            let Some(chunk) = chunk else { break };
            let chunk = chunk.map_err(|reason| trouble(reason, at))?;
            if at + chunk.len() as u64 > range.end {
                return Err(trouble("more bytes came than were asked for".to_owned(), at));
            }
            // Short writes to the page cache.
            part.data.write_all_at(&chunk, at).map_err(Trouble::Disk)?;
            at += chunk.len() as u64;
            self.add(chunk.len() as u64);
        }
        if at < range.end {
            return Err(trouble(format!("the answer ended {} bytes early", range.end - at), at));
        }
        Ok(())
    }
}

enum Trouble {
    Disk(io::Error),
    Source { reason: String, took: u64 },
}

/// Checks what came, takes it in and makes it visible.
fn finish(
    cache: &Cache,
    room: &Room,
    uri: &str,
    key: &str,
    objects: Vec<Object>,
    known: Vec<Option<String>>,
    paths: Vec<std::path::PathBuf>,
) -> Result<(), ModelError> {
    let disk = |error| ModelError::Disk { uri: uri.to_owned(), error };
    let mut paths = paths.into_iter();
    let mut blobs = Vec::new();
    let mut came = Vec::new();
    for (object, known) in objects.iter().zip(known) {
        if let Some(known) = known {
            blobs.push(known);
            continue;
        }
        let Some(path) = paths.next() else { break };
        let found = checksum::of_file(&path, object.md5.is_some()).map_err(disk)?;
        let expected = Checksums { sha256: object.sha256.clone(), md5: object.md5.clone() };
        if let Some(Mismatch { kind, expected, found }) = expected.differ(&found) {
            cache.discard(key);
            return Err(ModelError::Checksum { uri: uri.to_owned(), file: object.path.clone(), kind, expected, found });
        }
        let sha256 = found.sha256.unwrap_or_default();
        came.push((path, sha256.clone()));
        blobs.push(sha256);
    }
    if let (Some(kind), [(path, _)]) = (archive::kind(uri), came.as_slice()) {
        return unpack(cache, room, uri, key, kind, path, &objects);
    }
    let record = TreeRecord { uri: uri.to_owned(), objects, blobs };
    room.publish(key, &record, &came).map_err(disk)
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
    let _reserved = room.reserve(uri, key, &[objects.as_slice(), archived].concat())?;
    archive::unpack(path, kind, |number| cache.unpacked(key, number)).map_err(failed)?;
    let mut came = Vec::new();
    for (number, object) in objects.iter_mut().enumerate() {
        let path = cache.unpacked(key, number);
        object.sha256 = checksum::of_file(&path, false).map_err(disk)?.sha256;
        came.push((path, object.sha256.clone().unwrap_or_default()));
    }
    let blobs = came.iter().map(|(_, sha256)| sha256.clone()).collect();
    let record = TreeRecord { uri: uri.to_owned(), objects, blobs };
    room.publish(key, &record, &came).map_err(disk)
}
