//! Models that are kept on this node beside what its replicas need: on its disk, and in its page cache.
//!
//! One task per model brings it to where the last assignment wants it. None is let go of while a replica
//! has it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use pilotlight_proto::fleet::v1::{CacheReport, ImageAssignment, ModelAssignment, Rung};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use super::{Credentials, ModelError, Models, room::Wish, warm_images::WarmImages};
use crate::{
    reconcile::backoff::CrashBackoff,
    warmth::page_cache::{PageCache, StageError, Staged, residency},
};

/// Between looks at the pages of a model that is kept in the page cache.
const LOOK: Duration = Duration::from_secs(30);
/// All others are looked at after this many such times: a terabyte has 250 million pages.
const LOOKS_AT_OTHERS: u32 = 10;

/// Models that are kept on this node. Cheap to clone.
#[derive(Clone)]
pub struct Shelf(Arc<Shared>);

struct Shared {
    models: Models,
    pages: Arc<PageCache>,
    /// One model is read at a time: a disk gives no more to two.
    reading: tokio::sync::Mutex<()>,
    look: Duration,
    places: Mutex<HashMap<String, Place>>,
    images: WarmImages,
}

/// The task of one model.
#[derive(Debug)]
struct Place {
    /// `None`: nobody asks for it any more.
    wish: watch::Sender<Option<ModelAssignment>>,
    /// Cancelled once the task has let go of the model.
    over: CancellationToken,
}

impl Shelf {
    /// A shelf of which staged models may fill this many bytes of main memory. Must be called in a runtime.
    pub fn new(models: Models, memory: u64) -> Self {
        Self::looking_each(models, memory, LOOK)
    }

    /// With other pauses between looks.
    pub(super) fn looking_each(models: Models, memory: u64, look: Duration) -> Self {
        let pages = Arc::new(PageCache::new(memory));
        let (reading, places, images) = Default::default();
        let shared = Shared { models, pages, reading, look, places, images };
        let shelf = Self(Arc::new(shared));
        tokio::spawn(survey(Arc::clone(&shelf.0)));
        shelf
    }

    /// Takes in what is to become of all models and images: whatever is not named may go. The model to be
    /// kept most is seen to first.
    pub fn assign(&self, mut wanted: Vec<ModelAssignment>, images: Vec<ImageAssignment>) {
        let models = wanted.iter().map(|model| (model.uri.clone(), Wish { pinned: model.pinned, keep: model.keep }));
        let wishes = images.iter().map(|image| {
            let wish = Wish { pinned: image.pinned, keep: image.keep };
            (image.image.clone(), wish)
        });
        self.0.models.room.wish(models.chain(wishes).collect());
        self.0.images.assign(&self.0.models, &images);
        let mut places = self.0.places();
        let named: HashSet<&str> = wanted.iter().map(|model| model.uri.as_str()).collect();
        for (_, place) in places.iter().filter(|(uri, _)| !named.contains(uri.as_str())) {
            place.wish.send_if_modified(|wish| wish.take().is_some());
        }
        wanted.sort_by_key(|model| std::cmp::Reverse(model.keep));
        for model in wanted {
            match places.get(&model.uri) {
                Some(place) => {
                    place.wish.send_if_modified(|wish| {
                        let changed = wish.as_ref().is_none_or(|wish| !same_task(wish, &model));
                        *wish = Some(model);
                        changed
                    });
                }
                None if wants(&model) == Want::Nothing => {}
                None => {
                    let uri = model.uri.clone();
                    let (wish, told) = watch::channel(Some(model));
                    let over = CancellationToken::new();
                    let task = Task::new(Arc::clone(&self.0), uri.clone(), over.clone().drop_guard());
                    tokio::spawn(task.run(told));
                    places.insert(uri, Place { wish, over });
                }
            }
        }
    }

    /// Removes all versions of a model, or an image, from the disk; bytes that the disk has back.
    ///
    /// # Errors
    /// Why it stays: replicas that have it, by name, a fetch that goes on, a pin, the disk or the engine.
    pub async fn evict(&self, uri: &str) -> Result<u64, String> {
        if !uri.contains("://") {
            return self.0.models.room.evict_image(uri).await;
        }
        let leaving = {
            let places = self.0.places();
            places.get(uri).filter(|place| place.wish.borrow().is_none()).map(|place| place.over.clone())
        };
        if let Some(over) = leaving {
            // A task lets go of its model once no replica has it: one that does refuses it below.
            let mut report = self.0.models.report();
            tokio::select! {
                () = over.cancelled() => {}
                _ = report.wait_for(|report| in_use(report, uri)) => {}
            }
        }
        let (room, uri) = (self.0.models.room.clone(), uri.to_owned());
        tokio::task::spawn_blocking(move || room.evict(&uri)).await.unwrap_or_else(|error| Err(error.to_string()))
    }
}

impl Shared {
    fn places(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures a model's pages. `None` where it is gone meanwhile.
    async fn measure(&self, key: &str, folder: &Path) -> Option<bool> {
        let measured = residency(folder).await.ok()?;
        self.models.room.note_pages(key, |pages| pages.resident = measured.resident);
        Some(measured.whole())
    }
}

/// Measures models that nobody keeps in the page cache, from time to time: their pages may be there all the same.
async fn survey(shared: Arc<Shared>) {
    loop {
        for (key, folder) in shared.models.room.unstaged() {
            shared.measure(&key, &folder).await;
        }
        tokio::time::sleep(shared.look * LOOKS_AT_OTHERS).await;
    }
}

/// Whether a replica has a model that is on the disk.
fn in_use(report: &CacheReport, uri: &str) -> bool {
    report.models.iter().any(|model| model.uri == uri && model.in_use)
}

/// What a model's task has to see to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Nothing,
    OnDisk,
    InMemory,
}

fn wants(model: &ModelAssignment) -> Want {
    match model.rung() {
        Rung::Cached => Want::OnDisk,
        Rung::Staged => Want::InMemory,
        // Replicas have their own assignments.
        Rung::Unspecified | Rung::Absent | Rung::Asleep | Rung::Serving => Want::Nothing,
    }
}

/// True where the task has nothing to begin anew: pins and ranks are the disk's, and peers come and go.
pub(super) fn same_task(one: &ModelAssignment, other: &ModelAssignment) -> bool {
    (one.rung, &one.credentials, &one.unresolved) == (other.rung, &other.credentials, &other.unresolved)
}

/// Brings one model to where it is wanted.
struct Task {
    shared: Arc<Shared>,
    uri: String,
    /// Versions that are kept in the page cache.
    staged: BTreeMap<String, PathBuf>,
    backoff: CrashBackoff,
    /// What was last said of why it is not where it shall be.
    said: String,
    _over: DropGuard,
}

impl Task {
    fn new(shared: Arc<Shared>, uri: String, over: DropGuard) -> Self {
        let (staged, backoff, said) = (BTreeMap::new(), CrashBackoff::default(), String::new());
        Self { shared, uri, staged, backoff, said, _over: over }
    }

    async fn run(mut self, mut told: watch::Receiver<Option<ModelAssignment>>) {
        loop {
            let wish = told.borrow_and_update().clone();
            let changed = tokio::select! {
                changed = told.changed() => changed,
                () = self.bring(wish.as_ref()) => {
                    let mut places = self.shared.places();
                    // It may have been asked for again in this very moment.
                    if wish.is_none() && !told.has_changed().unwrap_or_default() {
                        places.remove(&self.uri);
                        return;
                    }
                    drop(places);
                    told.changed().await
                }
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Ends where nothing more is to be done until the wish changes.
    async fn bring(&mut self, wish: Option<&ModelAssignment>) {
        let want = wish.map_or(Want::Nothing, wants);
        if want != Want::InMemory {
            self.let_go().await;
        }
        let Some(wish) = wish.filter(|_| want != Want::Nothing) else { return };
        loop {
            let Some((key, folder)) = self.fetch(wish).await else { return };
            let began = Instant::now();
            let known = self.versions();
            let (mut report, uri) = (self.shared.models.report(), self.uri.clone());
            let changes = report.wait_for(|report| versions(report, &uri) != known);
            tokio::select! {
                // The report ends with the node.
                changed = changes => if changed.is_err() { return },
                () = self.keep(&key, &folder), if want == Want::InMemory => {}
            }
            if !self.versions().contains(&key) {
                self.forget(&key).await;
                // Another one needed its room, and may need it still.
                tokio::time::sleep(self.backoff.after(began.elapsed())).await;
            }
        }
    }

    fn versions(&self) -> HashSet<String> {
        versions(&self.shared.models.report().borrow(), &self.uri)
    }

    /// Has the model on the disk: its newest version, or where that cannot be had one that is there. `None`:
    /// it may not be fetched.
    async fn fetch(&mut self, wish: &ModelAssignment) -> Option<(String, PathBuf)> {
        let given = wish.credentials.iter().map(|given| (given.name.clone(), given.value.clone()));
        let credentials: Credentials = given.collect();
        loop {
            let began = Instant::now();
            let before = in_the_way(&self.shared.models.report().borrow());
            let mut full = false;
            let reason = if wish.unresolved.is_empty() {
                match self.shared.models.ensure_from(&self.uri, &credentials, &wish.peers, |_| {}).await {
                    Ok(folder) => {
                        self.clear_failure();
                        let found = self.shared.models.room.versions(&self.uri);
                        if let Some((key, folder)) = found.into_iter().find(|(_, files)| *files == folder) {
                            self.shared.measure(&key, &folder).await;
                            return Some((key, folder));
                        }
                        "it was removed as soon as it was there".to_owned()
                    }
                    Err(error) => {
                        full = matches!(error, ModelError::CacheFull { .. });
                        error.to_string()
                    }
                }
            } else {
                wish.unresolved.clone()
            };
            self.say(reason);
            if let Some(there) = self.shared.models.room.versions(&self.uri).pop() {
                return Some(there);
            }
            if !wish.unresolved.is_empty() {
                return None;
            }
            let mut report = self.shared.models.report();
            tokio::select! {
                () = tokio::time::sleep(self.backoff.after(began.elapsed())) => {}
                // There may be room now.
                _ = report.wait_for(|report| in_the_way(report) != before), if full => {}
            }
        }
    }

    /// Keeps a version in the page cache: reads it, looks from time to time, and reads it again where the
    /// kernel has dropped pages. Never ends.
    async fn keep(&mut self, key: &str, folder: &Path) {
        let mut short = CrashBackoff::default();
        loop {
            let staged = {
                let _turn = self.shared.reading.lock().await;
                self.shared.pages.stage(folder).await
            };
            let mut pause = self.shared.look;
            match staged {
                Ok(Staged { residency, took }) => {
                    if self.staged.insert(key.to_owned(), folder.to_owned()).is_none() {
                        info!(uri = %self.uri, bytes = residency.resident, ?took, "model read into the page cache");
                    }
                    self.shared.models.room.note_pages(key, |pages| {
                        (pages.resident, pages.staged, pages.took) = (residency.resident, true, Some(took));
                    });
                    if residency.whole() {
                        self.clear_failure();
                        short = CrashBackoff::default();
                    } else {
                        // Reading it again and again would take from others what they need.
                        let gone = residency.total - residency.resident;
                        self.say(format!("the kernel keeps {gone} bytes of it out of the page cache"));
                        pause = pause.max(short.after(took));
                    }
                }
                // Asked again later: what is staged now may be let go of.
                Err(error @ StageError::PastBudget { .. }) => self.say(error.to_string()),
                Err(error) => {
                    self.say(error.to_string());
                    pause = pause.max(short.after(Duration::ZERO));
                }
            }
            loop {
                self.let_go_of_others(key).await;
                tokio::time::sleep(pause).await;
                if !self.staged.contains_key(key) || self.shared.measure(key, folder).await != Some(true) {
                    break;
                }
            }
        }
    }

    /// Lets go of all pages, once no replica needs them.
    async fn let_go(&mut self) {
        if self.staged.is_empty() {
            return;
        }
        let mut report = self.shared.models.report();
        // The report ends with the node.
        let _ = report.wait_for(|report| !in_use(report, &self.uri)).await;
        for key in self.staged.keys().cloned().collect::<Vec<_>>() {
            self.forget(&key).await;
        }
    }

    /// Lets go of former versions' pages, unless a replica may have them.
    async fn let_go_of_others(&mut self, key: &str) {
        if in_use(&self.shared.models.report().borrow(), &self.uri) {
            return;
        }
        for other in self.staged.keys().filter(|other| *other != key).cloned().collect::<Vec<_>>() {
            self.forget(&other).await;
        }
    }

    async fn forget(&mut self, key: &str) {
        let Some(folder) = self.staged.get(key) else { return };
        // Where its files are gone their pages are, too.
        let left = self.shared.pages.unstage(folder).await.unwrap_or_default();
        self.shared.models.room.note_pages(key, |pages| (pages.resident, pages.staged) = (left.resident, false));
        self.staged.remove(key);
        info!(uri = %self.uri, "model's page cache let go of");
    }

    /// Once per change: it may stay so for long.
    fn say(&mut self, reason: String) {
        if self.said != reason {
            warn!(uri = %self.uri, %reason, "model is not kept as asked for; it is tried again");
            self.shared.models.room.record_failure(&self.uri, Some(reason.clone()));
            self.said = reason;
        }
    }

    fn clear_failure(&mut self) {
        self.said.clear();
        self.shared.models.room.record_failure(&self.uri, None);
    }
}

/// What keeps room from others, and how firmly.
fn in_the_way(report: &CacheReport) -> HashSet<(String, bool, bool)> {
    let models = report.models.iter().map(|model| (model.key.clone(), model.in_use, model.pinned));
    let images = report.images.iter().map(|image| (image.id.clone(), image.in_use, image.pinned));
    models.chain(images).collect()
}

fn versions(report: &CacheReport, uri: &str) -> HashSet<String> {
    report.models.iter().filter(|model| model.uri == uri).map(|model| model.key.clone()).collect()
}
