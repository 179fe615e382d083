//! Which models are on this node, which of them are in use, and the room they may take.
//!
//! All that makes or removes a model or a blob happens under one lock, so that what a fetch counts on is
//! not removed under its hands.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use pilotlight_proto::fleet::v1 as fleet;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    ModelError,
    budget::{Entry, Full, victims},
    cache::{Cache, TreeRecord},
    plan::Object,
};

/// The node's models and the bytes they may take. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Room {
    cache: Cache,
    budget: Option<u64>,
    inner: Arc<Mutex<Inner>>,
    report: watch::Sender<fleet::CacheReport>,
}

#[derive(Debug, Default)]
struct Inner {
    trees: BTreeMap<String, Tree>,
    /// Replicas and fetches that have a model, by its address.
    held: HashMap<String, usize>,
    /// What goes on, by the key of its model.
    fetching: HashMap<String, Fetching>,
}

#[derive(Debug)]
struct Tree {
    uri: String,
    bytes: u64,
    blobs: BTreeMap<String, u64>,
    last_used: SystemTime,
}

#[derive(Debug, Default)]
struct Fetching {
    /// Contents that are here already and that it counts on.
    known: BTreeMap<String, u64>,
    /// Bytes still to come.
    missing: u64,
}

impl Room {
    /// Looks at what is there. `budget` is in bytes; `None`: as much as the disk has.
    pub(super) fn open(cache: Cache, budget: Option<u64>) -> Self {
        let trees = cache.trees().into_iter().map(|(key, record)| {
            let last_used = cache.last_used(&key);
            (key, Tree::of(&record, last_used))
        });
        let inner = Inner { trees: trees.collect(), ..Inner::default() };
        let room = Self { cache, budget, inner: Arc::new(Mutex::new(inner)), report: watch::Sender::default() };
        room.tell(&room.lock());
        room
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on this node, now and on each change.
    pub(super) fn report(&self) -> watch::Receiver<fleet::CacheReport> {
        self.report.subscribe()
    }

    /// Keeps the models of these addresses for as long as the answer lives.
    pub(super) fn hold(&self, uris: impl IntoIterator<Item = String>) -> Held {
        let uris: BTreeSet<String> = uris.into_iter().collect();
        let mut inner = self.lock();
        for uri in &uris {
            *inner.held.entry(uri.clone()).or_default() += 1;
        }
        self.touch(&mut inner, &uris);
        Held { room: self.clone(), uris }
    }

    /// Notes that these are used now.
    fn touch(&self, inner: &mut Inner, uris: &BTreeSet<String>) {
        // Most replicas have none, and change nothing that is told.
        if uris.is_empty() {
            return;
        }
        let now = SystemTime::now();
        for (key, tree) in inner.trees.iter_mut().filter(|(_, tree)| uris.contains(&tree.uri)) {
            tree.last_used = now;
            if let Err(error) = self.cache.touch(key, now) {
                // After a restart it is taken for older than it is.
                warn!(uri = %tree.uri, %error, "when the model was used cannot be noted");
            }
        }
        self.tell(inner);
    }

    /// Makes room for a model, whose unused bytes others give up. Blocks.
    ///
    /// # Errors
    /// It does not fit; or the disk refuses.
    pub(super) fn reserve(&self, uri: &str, key: &str, objects: &[Object]) -> Result<Reserved, ModelError> {
        let mut inner = self.lock();
        let mut fetching = Fetching::default();
        for object in objects {
            match object.sha256.as_ref().filter(|sha256| self.cache.blob(sha256).exists()) {
                Some(sha256) => drop(fetching.known.insert(sha256.clone(), object.size)),
                None => fetching.missing += object.size,
            }
        }
        let missing = fetching.missing;
        inner.fetching.insert(key.to_owned(), fetching);
        // Gives it back where it does not fit.
        let reserved = Reserved { room: self.clone(), key: key.to_owned() };
        let Some(budget) = self.budget else { return Ok(reserved) };
        let known: u64 = inner.fetching.get(key).map(|fetching| fetching.known.values().sum()).unwrap_or_default();
        let entries = self.entries(&inner, key);
        match victims(&entries, missing, budget) {
            Ok(gone) => {
                let removed = gone.iter().try_for_each(|name| self.remove(&mut inner, name));
                self.tell(&inner);
                drop(inner);
                removed.map_err(|error| ModelError::Disk { uri: uri.to_owned(), error })?;
                Ok(reserved)
            }
            Err(Full { kept }) => {
                drop(inner);
                // What it has already is part of it.
                Err(ModelError::CacheFull {
                    uri: uri.to_owned(),
                    bytes: known + missing,
                    budget,
                    kept: kept.saturating_sub(known),
                })
            }
        }
    }

    /// All that takes room. Bytes to come of `key` itself are what is asked for.
    fn entries(&self, inner: &Inner, key: &str) -> Vec<Entry> {
        let whole = inner.trees.iter().map(|(key, tree)| Entry {
            key: key.clone(),
            blobs: tree.blobs.clone(),
            last_used: millis(tree.last_used),
            in_use: inner.held.contains_key(&tree.uri),
            pinned: self.cache.pinned(key),
        });
        let coming = inner.fetching.iter().map(|(name, fetching)| {
            let mut blobs = fetching.known.clone();
            if name != key {
                blobs.insert(partial(name), fetching.missing);
            }
            Entry { key: partial(name), blobs, in_use: true, ..Entry::default() }
        });
        let left = self.cache.partials().into_iter().filter(|left| !inner.fetching.contains_key(&left.key));
        let left = left.map(|left| Entry {
            key: partial(&left.key),
            blobs: BTreeMap::from([(partial(&left.key), left.bytes)]),
            last_used: millis(left.changed),
            ..Entry::default()
        });
        whole.chain(coming).chain(left).collect()
    }

    fn remove(&self, inner: &mut Inner, name: &str) -> io::Result<()> {
        if let Some(key) = name.strip_prefix(PARTIAL) {
            self.cache.discard(key);
            return Ok(());
        }
        let Some(tree) = inner.trees.remove(name) else { return Ok(()) };
        info!(uri = %tree.uri, bytes = tree.bytes, "model removed: another one needs its room");
        self.cache.remove_tree(name)?;
        let counted_on = |blob: &String| inner.fetching.values().any(|fetching| fetching.known.contains_key(blob));
        tree.blobs.keys().filter(|blob| !counted_on(blob)).try_for_each(|blob| self.cache.drop_unused(blob))
    }

    /// Takes in finished files, by path and SHA-256, and makes the model visible. Blocks.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn publish(
        &self,
        key: &str,
        record: &TreeRecord,
        came: &[(std::path::PathBuf, String)],
    ) -> io::Result<()> {
        let mut inner = self.lock();
        for (path, sha256) in came {
            self.cache.adopt(path, sha256)?;
        }
        self.cache.publish(key, record)?;
        inner.trees.insert(key.to_owned(), Tree::of(record, SystemTime::now()));
        self.tell(&inner);
        Ok(())
    }

    fn tell(&self, inner: &Inner) {
        let models = inner.trees.iter().map(|(key, tree)| fleet::CachedModel {
            key: key.clone(),
            uri: tree.uri.clone(),
            bytes: tree.bytes,
            in_use: inner.held.contains_key(&tree.uri),
            pinned: self.cache.pinned(key),
            last_used: Some(tree.last_used.into()),
            ..Default::default()
        });
        let report = fleet::CacheReport { models: models.collect() };
        self.report.send_if_modified(|last| {
            let changed = *last != report;
            *last = report;
            changed
        });
    }
}

impl Tree {
    fn of(record: &TreeRecord, last_used: SystemTime) -> Self {
        let sizes = record.objects.iter().map(|object| object.size);
        let blobs = record.blobs.iter().cloned().zip(sizes).collect();
        Self { uri: record.uri.clone(), bytes: record.bytes(), blobs, last_used }
    }
}

/// Keys of what is not whole begin with it; no key of a whole model does.
const PARTIAL: &str = "partial/";

fn partial(key: &str) -> String {
    format!("{PARTIAL}{key}")
}

fn millis(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Models of these addresses stay on the node until this is dropped.
#[derive(Debug)]
pub struct Held {
    room: Room,
    uris: BTreeSet<String>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut inner = self.room.lock();
        for uri in &self.uris {
            if let Some(count) = inner.held.get_mut(uri) {
                *count -= 1;
                if *count == 0 {
                    inner.held.remove(uri);
                }
            }
        }
        self.room.touch(&mut inner, &self.uris);
    }
}

/// Room for a model that is being fetched, until this is dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    room: Room,
    key: String,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.room.lock().fetching.remove(&self.key);
    }
}
