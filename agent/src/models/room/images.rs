//! A container engine's images: they take room as models do, and go as models do. The engine removes them,
//! which takes its time and may be refused; until it has answered they are still here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use pilotlight_proto::fleet::v1 as fleet;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    super::{
        ModelError,
        budget::{Entry, Full, victims},
        plan::Object,
    },
    Inner, Reserved, Room, micros,
};

/// Keys of images begin with it; no key of a model does.
const IMAGE: &str = "image/";
/// Between looks at images of which nothing is heard: others may have removed them.
const LOOK: Duration = Duration::from_secs(60);

/// The images that this agent has pulled to a container engine. What others have pulled, and what was there
/// before, is never among them.
#[async_trait]
pub trait Images: Debug + Send + Sync + 'static {
    /// Changes whenever one may have come.
    fn changes(&self) -> watch::Receiver<u64>;
    /// Those that are here.
    ///
    /// # Errors
    /// The engine does not answer.
    async fn list(&self) -> Result<Vec<Image>, String>;
    /// Has an image here, pulled where it is not, with credentials as in `ReplicaAssignment.registry_configs`.
    ///
    /// # Errors
    /// Why it cannot be had.
    async fn pull(self: Arc<Self>, name: &str, registry_configs: &[String]) -> Result<(), String>;
    /// Removes one, never by force.
    ///
    /// # Errors
    /// Why it stays.
    async fn remove(&self, id: &str) -> Result<(), String>;
    /// Notes for a later agent process when an image was used last, and whether an operator keeps it.
    fn note(&self, id: &str, last_used: SystemTime, pinned: bool);
}

/// An image that this agent has pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// As the engine names it.
    pub id: String,
    /// As replicas ask for it.
    pub names: BTreeSet<String>,
    /// Of its manifest in the registry; empty where unknown.
    pub digest: String,
    /// Bytes of all of it.
    pub bytes: u64,
    /// The same by layer: one that several images have takes its bytes once.
    pub layers: BTreeMap<String, u64>,
    /// Who else keeps it, such as a container, whoever's.
    pub kept_by: Option<String>,
    /// When it was last used.
    pub last_used: SystemTime,
    /// An operator keeps it.
    pub pinned: bool,
    /// How long it took to pull.
    pub took: Option<Duration>,
}

impl Image {
    fn is(&self, name: &str) -> bool {
        self.names.contains(name) || self.id == name || (!self.digest.is_empty() && self.digest == name)
    }
}

/// What is to be done before a model has its room.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing: it has it.
    Done(Reserved),
    /// These images are to go first.
    Images(Vec<String>),
}

impl Room {
    /// Keeps images within the budget, too. Must be called in a runtime.
    pub(in super::super) fn with_images(self, images: Arc<dyn Images>) -> Self {
        let room = Self { images: Some(Arc::clone(&images)), ..self };
        tokio::spawn(room.clone().tend(images));
        room
    }

    /// Where images are.
    pub(in super::super) fn images(&self) -> Option<Arc<dyn Images>> {
        self.images.clone()
    }

    /// Looks at images whenever one may have come or is let go of, and has the budget kept then.
    async fn tend(self, images: Arc<dyn Images>) {
        let (mut changes, mut let_go) = (images.changes(), self.let_go.subscribe());
        let mut fit = false;
        loop {
            changes.mark_unchanged();
            self.look(&*images).await;
            if fit {
                self.fit().await;
            }
            fit = tokio::select! {
                Ok(()) = changes.changed() => true,
                Ok(()) = let_go.changed() => true,
                () = tokio::time::sleep(LOOK) => false,
            };
        }
    }

    async fn look(&self, images: &dyn Images) {
        loop {
            let before = *self.answers.borrow();
            match images.list().await {
                // One that went meanwhile is listed still.
                Ok(_) if before != *self.answers.borrow() => {}
                Ok(list) => return self.see(list),
                Err(error) => return warn!(%error, "images cannot be listed"),
            }
        }
    }

    /// Takes in which images are here.
    fn see(&self, list: Vec<Image>) {
        let mut inner = self.lock();
        let mut former = std::mem::take(&mut inner.images);
        for mut image in list {
            if let Some(former) = former.remove(&image.id) {
                image.last_used = image.last_used.max(former.last_used);
            }
            inner.images.insert(image.id.clone(), image);
        }
        self.pin_images(&mut inner);
        self.tell(&inner);
    }

    /// From now on what is let go of is not held for unused: its replicas may outlive this process.
    pub(in super::super) fn close(&self) {
        self.lock().closed = true;
    }

    /// Has what is past the budget go, as far as it can. An image's size is known only once it is here, so
    /// that this comes after its pull.
    pub(in super::super) async fn fit(&self) {
        let Some(budget) = self.budget else { return };
        let _turn = self.turn.lock().await;
        let mut stays = BTreeSet::new();
        loop {
            let (room, refused) = (self.clone(), stays.clone());
            let step = tokio::task::spawn_blocking(move || room.try_to_fit(budget, &refused)).await;
            match step {
                Ok(images) if images.is_empty() => return,
                Ok(images) => self.remove_images(images, &mut stays).await,
                Err(error) => return warn!(%error, "the cache's budget cannot be kept"),
            }
        }
    }

    /// Removes models that are to go, unless images are to go first: those, by id. Blocks.
    fn try_to_fit(&self, budget: u64, stays: &BTreeSet<String>) -> Vec<String> {
        let mut inner = self.lock();
        if inner.closed {
            return Vec::new();
        }
        let entries = self.entries(&inner, None, stays);
        let gone = match victims(&entries, 0, budget) {
            Ok(gone) => gone,
            Err(Full { kept }) => {
                warn!(kept, budget, "models and images in use or pinned are more than the cache's budget");
                victims(&entries, 0, kept).unwrap_or_default()
            }
        };
        let images = leaving(&mut inner, &gone);
        if images.is_empty() {
            for name in &gone {
                if let Err(error) = self.remove(&mut inner, name, "the cache is past its budget") {
                    warn!(%error, "a model cannot be removed");
                }
            }
            self.tell(&inner);
        }
        images
    }

    /// Makes room for a model, whose unused bytes other models and images give up. `began` is when its store was
    /// first asked.
    ///
    /// # Errors
    /// It does not fit; or the disk refuses.
    pub(in super::super) async fn reserve(
        &self,
        uri: &str,
        key: &str,
        objects: &[Object],
        began: Instant,
    ) -> Result<Reserved, ModelError> {
        // One at a time: what one has asked images to leave for is not taken by another.
        let _turn = self.turn.lock().await;
        let mut stays = BTreeSet::new();
        loop {
            let (room, refused) = (self.clone(), stays.clone());
            let (of, name, all) = (uri.to_owned(), key.to_owned(), objects.to_owned());
            let step = move || room.try_to_reserve(&of, &name, &all, began, &refused);
            let step = tokio::task::spawn_blocking(step).await;
            let failed = |error| ModelError::Disk { uri: uri.to_owned(), error: std::io::Error::other(error) };
            match step.map_err(failed)?? {
                Step::Done(reserved) => return Ok(reserved),
                Step::Images(images) => self.remove_images(images, &mut stays).await,
            }
        }
    }

    /// Has the engine remove images that are marked as leaving. Those that it keeps are in use from now on,
    /// whatever it knows of them.
    async fn remove_images(&self, ids: Vec<String>, stays: &mut BTreeSet<String>) {
        for id in ids {
            if self.remove_image(&id).await.is_err() {
                stays.insert(id);
            }
        }
    }

    async fn remove_image(&self, id: &str) -> Result<(), String> {
        let (room, id) = (self.clone(), id.to_owned());
        // The engine goes on whoever waits for it.
        let removing = tokio::spawn(async move {
            let removed = match &room.images {
                Some(images) => images.remove(&id).await,
                None => Err("there is no container engine".to_owned()),
            };
            room.answered(&id, &removed);
            removed
        });
        removing.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    fn answered(&self, id: &str, removed: &Result<(), String>) {
        let mut inner = self.lock();
        inner.leaving.remove(id);
        match removed {
            Ok(()) => {
                let image = inner.images.remove(id);
                let (names, bytes) = image.map(|image| (image.names, image.bytes)).unwrap_or_default();
                info!(%id, ?names, bytes, "image removed");
            }
            Err(why) => {
                info!(%id, %why, "image stays");
                if let Some(image) = inner.images.get_mut(id) {
                    image.kept_by = Some(why.clone());
                }
            }
        }
        self.answers.send_modify(|count| *count += 1);
        self.tell(&inner);
    }

    /// Waits until no image of this name is being removed: whoever looks for it then finds the truth. One
    /// that is held is not chosen any more.
    pub(in super::super) async fn settled(&self, name: &str) {
        let mut answers = self.answers.subscribe();
        loop {
            answers.mark_unchanged();
            {
                let inner = self.lock();
                if !inner.images.values().any(|image| image.is(name) && inner.leaving.contains(&image.id)) {
                    return;
                }
            }
            // The sender lives as long as the room.
            if answers.changed().await.is_err() {
                return;
            }
        }
    }

    /// Removes an image; bytes that the disk has back.
    ///
    /// # Errors
    /// Why it stays: replicas that have it, by name, a pin, or what the engine says.
    pub(in super::super) async fn evict_image(&self, name: &str) -> Result<u64, String> {
        let _turn = self.turn.lock().await;
        let mut freed = Ok(0);
        for (id, bytes) in self.leave(name)? {
            freed = self.remove_image(&id).await.and_then(|()| Ok(freed? + bytes));
        }
        freed
    }

    /// Marks images of a name as leaving: their ids, and bytes that no other one has.
    fn leave(&self, name: &str) -> Result<Vec<(String, u64)>, String> {
        let mut inner = self.lock();
        let found: Vec<_> = inner.images.values().filter(|image| image.is(name)).cloned().collect();
        for image in &found {
            let replicas: BTreeSet<_> = image.names.iter().flat_map(|name| inner.replicas(name)).collect();
            if !replicas.is_empty() {
                return Err(format!("in use by {}", replicas.into_iter().collect::<Vec<_>>().join(", ")));
            }
            if image.pinned {
                return Err("it is pinned".to_owned());
            }
        }
        let others = |image: &Image, layer: &String| {
            inner.images.values().any(|other| other.id != image.id && other.layers.contains_key(layer))
        };
        let own = |image: &Image| {
            let layers = image.layers.iter().filter(|(layer, _)| !others(image, layer));
            (image.id.clone(), layers.map(|(_, bytes)| bytes).sum())
        };
        let own: Vec<(String, u64)> = found.iter().map(own).collect();
        inner.leaving.extend(own.iter().map(|(id, _)| id.clone()));
        Ok(own)
    }

    /// Images as what takes room. `before` says whether something of this rank goes before what needs it.
    pub(super) fn image_entries(
        inner: &Inner,
        before: impl Fn(u32) -> bool,
        stays: &BTreeSet<String>,
    ) -> impl Iterator<Item = Entry> {
        inner.images.values().map(move |image| {
            let keep = inner.keep_image(image);
            let held = image.names.iter().any(|name| inner.held.contains_key(name));
            let kept = image.kept_by.is_some() || inner.leaving.contains(&image.id) || stays.contains(&image.id);
            Entry {
                key: format!("{IMAGE}{}", image.id),
                blobs: image.layers.clone(),
                keep,
                last_used: micros(image.last_used),
                in_use: held || kept || before(keep),
                pinned: image.pinned,
            }
        })
    }

    /// Notes that images of these names are used now.
    pub(super) fn touch_images(&self, inner: &mut Inner, names: &BTreeSet<String>) {
        let Some(engine) = &self.images else { return };
        let now = SystemTime::now();
        for image in inner.images.values_mut().filter(|image| !image.names.is_disjoint(names)) {
            image.last_used = now;
            engine.note(&image.id, now, image.pinned);
        }
    }

    /// Brings pins to where the coordinator wants them; before it has said so they stay as they are.
    pub(super) fn pin_images(&self, inner: &mut Inner) {
        let (Some(engine), Some(wishes)) = (&self.images, &inner.wishes) else { return };
        for image in inner.images.values_mut() {
            let pinned = image.names.iter().any(|name| wishes.get(name).is_some_and(|wish| wish.pinned));
            if pinned != image.pinned {
                image.pinned = pinned;
                engine.note(&image.id, image.last_used, pinned);
            }
        }
    }
}

impl Inner {
    fn keep_image(&self, image: &Image) -> u32 {
        let wishes = image.names.iter().filter_map(|name| self.wishes.as_ref()?.get(name));
        wishes.map(|wish| wish.keep).max().unwrap_or_default()
    }

    /// As the coordinator is told.
    pub(super) fn images_told(&self) -> Vec<fleet::CachedImage> {
        let held = |image: &Image| image.names.iter().any(|name| !self.replicas(name).is_empty());
        let of = |image: &Image| fleet::CachedImage {
            id: image.id.clone(),
            names: image.names.iter().cloned().collect(),
            digest: image.digest.clone(),
            bytes: image.bytes,
            in_use: image.kept_by.is_some() || held(image),
            pinned: image.pinned,
            last_used: Some(image.last_used.into()),
            pull_took: image.took.and_then(|took| took.try_into().ok()),
        };
        self.images.values().map(of).collect()
    }
}

/// Ids of the images among those that are to go, which are marked as leaving.
pub(super) fn leaving(inner: &mut Inner, gone: &[String]) -> Vec<String> {
    let images: Vec<String> = gone.iter().filter_map(|name| name.strip_prefix(IMAGE)).map(str::to_owned).collect();
    inner.leaving.extend(images.iter().cloned());
    images
}
