//! Which models and images are on this node, which of them are in use, and the room they may take.
//!
//! All that makes or removes a model or a blob happens under one lock, so that what a fetch counts on is
//! not removed under its hands.

mod fetching;
mod images;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pilotlight_proto::fleet::v1 as fleet;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    cache::{Cache, TreeRecord},
    report::worth_telling,
};
pub(super) use fetching::Reserved;
use fetching::{Fetching, PARTIAL};
pub use images::{Image, Images};

/// The node's models and images, and the bytes they may take. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Room {
    cache: Cache,
    budget: Option<u64>,
    /// Where images are; `None`: nowhere.
    images: Option<Arc<dyn Images>>,
    inner: Arc<Mutex<Inner>>,
    report: watch::Sender<fleet::CacheReport>,
    /// Whose turn it is to have others go.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Counts what was let go of.
    let_go: watch::Sender<u64>,
    /// Counts what the engine has answered.
    answers: watch::Sender<u64>,
    /// Counts how often room may have been made.
    made: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    trees: BTreeMap<String, Tree>,
    /// Images, by id, and which of them the engine was asked to remove.
    images: BTreeMap<String, Image>,
    leaving: BTreeSet<String>,
    /// The agent is about to end.
    closed: bool,
    /// Who has a model, by its address, or an image, by its name: no name is an address.
    held: HashMap<String, Vec<Holder>>,
    /// What goes on, by the key of its model.
    fetching: HashMap<String, Fetching>,
    /// What is to become of models and images, by address or name; `None` before the coordinator has said so.
    wishes: Option<BTreeMap<String, Wish>>,
    /// Why models and images are not kept as asked for, by address or name.
    failures: BTreeMap<String, String>,
}

/// Who has a model or an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Holder {
    /// A replica, by name.
    Replica(String),
    /// A fetch that goes on.
    Fetch,
}

/// What is to become of a model or an image on disk, whoever uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    /// It stays.
    pub(super) pinned: bool,
    /// Of those that may go, the one of the least goes first.
    pub(super) keep: u32,
}

/// A model's pages, as last measured.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pages {
    /// Bytes in the page cache.
    pub(super) resident: u64,
    /// True while they are kept there.
    pub(super) staged: bool,
    /// How long reading them took the last time.
    pub(super) took: Option<Duration>,
}

#[derive(Debug)]
struct Tree {
    uri: String,
    bytes: u64,
    blobs: BTreeMap<String, u64>,
    last_used: SystemTime,
    fetch_took: Option<Duration>,
    pages: Pages,
}

impl Room {
    /// Looks at what is there. `budget` is in bytes; `None`: as much as the disk has.
    pub(super) fn open(cache: Cache, budget: Option<u64>) -> Self {
        let trees = cache.trees().into_iter().map(|(key, record)| {
            let last_used = cache.last_used(&key);
            (key, Tree::of(&record, last_used))
        });
        let inner = Inner { trees: trees.collect(), ..Inner::default() };
        let room = Self {
            cache,
            budget,
            images: None,
            inner: Arc::new(Mutex::new(inner)),
            report: watch::Sender::default(),
            turn: Arc::default(),
            let_go: watch::Sender::default(),
            answers: watch::Sender::default(),
            made: watch::Sender::default(),
        };
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

    /// See [`super::Models::room_made`].
    pub(super) fn made(&self) -> watch::Receiver<u64> {
        self.made.subscribe()
    }

    fn say_made(&self) {
        self.made.send_modify(|times| *times += 1);
    }

    /// Keeps the models of these addresses, and images of these names, for as long as the answer lives.
    pub(super) fn hold(&self, holder: Holder, uris: impl IntoIterator<Item = String>) -> Held {
        let uris: BTreeSet<String> = uris.into_iter().collect();
        let mut inner = self.lock();
        for uri in &uris {
            inner.held.entry(uri.clone()).or_default().push(holder.clone());
        }
        self.touch(&mut inner, &uris);
        Held { room: self.clone(), holder, uris }
    }

    /// Takes in what is to become of models and images; those that are not named may go. Pins are marks on
    /// the disk, and outlive the process.
    pub(super) fn wish(&self, wishes: BTreeMap<String, Wish>) {
        let mut inner = self.lock();
        if inner.wishes.as_ref() == Some(&wishes) {
            return;
        }
        let mut unpinned = false;
        for (key, tree) in &inner.trees {
            let pinned = wishes.get(&tree.uri).is_some_and(|wish| wish.pinned);
            unpinned |= !pinned && self.cache.pinned(key);
            if let Err(error) = self.cache.pin(key, pinned) {
                warn!(uri = %tree.uri, %error, "the model's pin cannot be changed");
            }
        }
        inner.failures.retain(|uri, _| wishes.contains_key(uri));
        inner.wishes = Some(wishes);
        self.pin_images(&mut inner);
        self.tell(&inner);
        if unpinned {
            self.say_made();
        }
    }

    /// Reports why a model or an image is not kept as asked for; `None` once it is.
    pub(super) fn record_failure(&self, uri: &str, failure: Option<String>) {
        let mut inner = self.lock();
        let changed = match failure {
            // A task may fail after the assignment that it was started by has been replaced.
            Some(_) if !inner.wishes.as_ref().is_some_and(|wishes| wishes.contains_key(uri)) => false,
            Some(message) => inner.failures.insert(uri.to_owned(), message.clone()) != Some(message),
            None => inner.failures.remove(uri).is_some(),
        };
        if changed {
            self.tell(&inner);
        }
    }

    /// Folders of the whole versions of a model, by key, the one that was used last at the end.
    pub(super) fn versions(&self, uri: &str) -> Vec<(String, PathBuf)> {
        let inner = self.lock();
        let mut found: Vec<_> = inner.trees.iter().filter(|(_, tree)| tree.uri == uri).collect();
        found.sort_by_key(|(_, tree)| tree.last_used);
        found.into_iter().map(|(key, _)| (key.clone(), self.cache.files(key))).collect()
    }

    /// Folders of all whole models whose pages are not kept, by key.
    pub(super) fn unstaged(&self) -> Vec<(String, PathBuf)> {
        let inner = self.lock();
        let found = inner.trees.iter().filter(|(_, tree)| !tree.pages.staged);
        found.map(|(key, _)| (key.clone(), self.cache.files(key))).collect()
    }

    /// Notes what has become of a model's pages.
    pub(super) fn note_pages(&self, key: &str, change: impl FnOnce(&mut Pages)) {
        let mut inner = self.lock();
        if let Some(tree) = inner.trees.get_mut(key) {
            change(&mut tree.pages);
            self.tell(&inner);
        }
    }

    /// Removes all versions of a model, and what fetches of it have left. Bytes that the disk has back.
    /// Blocks.
    ///
    /// # Errors
    /// Why it stays: replicas that have it, by name, a fetch, a pin, or the disk.
    pub(super) fn evict(&self, uri: &str) -> Result<u64, String> {
        let mut inner = self.lock();
        let replicas = inner.replicas(uri);
        if !replicas.is_empty() {
            return Err(format!("in use by {}", replicas.join(", ")));
        }
        if inner.held.contains_key(uri) || inner.fetching.values().any(|fetching| fetching.uri == uri) {
            return Err("it is being fetched".to_owned());
        }
        let keys = inner.trees.iter().filter(|(_, tree)| tree.uri == uri).map(|(key, _)| key.clone());
        let keys: Vec<String> = keys.collect();
        if keys.iter().any(|key| self.cache.pinned(key)) {
            return Err("it is pinned".to_owned());
        }
        let left = self.cache.partials().into_iter().filter(|left| left.uri.as_deref() == Some(uri));
        let mut freed = 0;
        for left in left {
            self.cache.discard(&left.key);
            freed += left.bytes;
        }
        let mut removed = Ok(());
        for key in keys {
            match self.remove(&mut inner, &key, "it is evicted") {
                Ok(bytes) => freed += bytes,
                Err(error) => removed = Err(format!("the disk: {error}")),
            }
        }
        self.tell(&inner);
        self.say_made();
        removed.map(|()| freed)
    }

    /// Notes that these are used now.
    fn touch(&self, inner: &mut Inner, uris: &BTreeSet<String>) {
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
        self.touch_images(inner, uris);
        self.tell(inner);
    }

    /// Removes what an entry stands for; bytes of whole contents that the disk has back.
    fn remove(&self, inner: &mut Inner, name: &str, why: &str) -> io::Result<u64> {
        if let Some(key) = name.strip_prefix(PARTIAL) {
            self.cache.discard(key);
            return Ok(0);
        }
        let Some(tree) = inner.trees.remove(name) else { return Ok(0) };
        info!(uri = %tree.uri, bytes = tree.bytes, "model removed: {why}");
        self.cache.remove_tree(name)?;
        let counted_on = |blob: &String| inner.fetching.values().any(|fetching| fetching.known.contains_key(blob));
        let unused = tree.blobs.keys().filter(|blob| !counted_on(blob));
        unused.map(|blob| self.cache.drop_unused(blob)).sum()
    }

    /// Takes in finished files, by path and their contents' names, and makes the model visible. Blocks.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn publish(
        &self,
        key: &str,
        record: &TreeRecord,
        came: &[(std::path::PathBuf, String)],
        boot: Option<&str>,
    ) -> io::Result<()> {
        let mut inner = self.lock();
        for (path, name) in came {
            self.cache.adopt(path, name)?;
        }
        self.cache.publish(key, record, boot)?;
        let began = inner.fetching.get(key).and_then(|fetching| fetching.began);
        let tree = Tree { fetch_took: began.map(|began| began.elapsed()), ..Tree::of(record, SystemTime::now()) };
        let pinned = match &inner.wishes {
            Some(wishes) => wishes.get(&tree.uri).is_some_and(|wish| wish.pinned),
            // A new version is as the former ones are, until the coordinator says what is to become of it.
            None => inner.trees.iter().any(|(key, other)| other.uri == tree.uri && self.cache.pinned(key)),
        };
        // One that was there already keeps what is known of it.
        inner.trees.entry(key.to_owned()).or_insert(tree);
        self.cache.pin(key, pinned)?;
        self.tell(&inner);
        // Of a version that its store does not list any more nobody goes on with what has come.
        let parts = self.cache.partials().into_iter().filter(|part| part.uri.as_ref() == Some(&record.uri));
        let stale = parts.filter(|part| !inner.fetching.contains_key(&part.key));
        stale.for_each(|part| self.cache.discard(&part.key));
        Ok(())
    }

    /// Gives contents of a model their own names, by those that they had until now. Two that turn out to be one take
    /// the room of one. Blocks.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn rename(&self, key: &str, names: &BTreeMap<String, String>) -> io::Result<()> {
        let mut inner = self.lock();
        let Some(record) = self.cache.rename(key, names)? else { return Ok(()) };
        let before = inner.bytes();
        if let Some(tree) = inner.trees.get_mut(key) {
            tree.blobs = blobs(&record);
        }
        if inner.bytes() < before {
            self.say_made();
        }
        Ok(())
    }

    /// Takes a model away that the disk has refused; replicas that have it keep what memory has.
    pub(super) fn lost(&self, key: &str, error: &io::Error) {
        warn!(key, %error, "the disk has refused a model that is shown already");
        let mut inner = self.lock();
        if let Err(error) = self.remove(&mut inner, key, "the disk has refused it") {
            warn!(key, %error, "it cannot be removed, either");
        }
        self.tell(&inner);
    }

    fn tell(&self, inner: &Inner) {
        let models = inner.trees.iter().map(|(key, tree)| fleet::CachedModel {
            key: key.clone(),
            uri: tree.uri.clone(),
            bytes: tree.bytes,
            in_use: !inner.replicas(&tree.uri).is_empty(),
            pinned: self.cache.pinned(key),
            last_used: Some(tree.last_used.into()),
            resident_bytes: tree.pages.resident,
            staged: tree.pages.staged,
            fetch_took: tree.fetch_took.and_then(|took| took.try_into().ok()),
            stage_took: tree.pages.took.and_then(|took| took.try_into().ok()),
        });
        let failures = inner.failures.iter();
        let failures =
            failures.map(|(uri, message)| fleet::CacheFailure { uri: uri.clone(), message: message.clone() });
        let report =
            fleet::CacheReport { models: models.collect(), images: inner.images_told(), failures: failures.collect() };
        self.report.send_if_modified(|last| {
            let changed = worth_telling(last, &report);
            if changed {
                *last = report;
            }
            changed
        });
    }
}

impl Inner {
    /// All that whole models take: of equal contents, one.
    fn bytes(&self) -> u64 {
        self.trees.values().flat_map(|tree| &tree.blobs).collect::<BTreeMap<_, _>>().values().copied().sum()
    }

    fn replicas(&self, uri: &str) -> Vec<String> {
        let holders = self.held.get(uri).into_iter().flatten();
        let names = holders.filter_map(|holder| if let Holder::Replica(name) = holder { Some(name) } else { None });
        names.cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }
}

impl Tree {
    fn of(record: &TreeRecord, last_used: SystemTime) -> Self {
        let (uri, bytes, blobs) = (record.uri.clone(), record.bytes(), blobs(record));
        Self { uri, bytes, blobs, last_used, fetch_took: None, pages: Pages::default() }
    }
}

/// Bytes of each content of a model.
fn blobs(record: &TreeRecord) -> BTreeMap<String, u64> {
    record.blobs.iter().cloned().zip(record.objects.iter().map(|object| object.size)).collect()
}

fn micros(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

/// Models of these addresses, and images of these names, stay on the node until this is dropped.
#[derive(Debug)]
pub struct Held {
    room: Room,
    holder: Holder,
    uris: BTreeSet<String>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut inner = self.room.lock();
        for uri in &self.uris {
            let Some(holders) = inner.held.get_mut(uri) else { continue };
            if let Some(at) = holders.iter().position(|holder| *holder == self.holder) {
                holders.swap_remove(at);
            }
            if holders.is_empty() {
                inner.held.remove(uri);
            }
        }
        self.room.touch(&mut inner, &self.uris);
        drop(inner);
        if matches!(self.holder, Holder::Replica(_)) {
            self.room.let_go.send_modify(|count| *count += 1);
        }
        // A fetch that ends in vain makes none.
        if !self.uris.is_empty() && self.holder != Holder::Fetch {
            self.room.say_made();
        }
    }
}
