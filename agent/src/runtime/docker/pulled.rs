//! Images that this agent has pulled: which they are is noted on disk, so that a later agent process knows
//! them, too. Ours is what was not here in any form before it was pulled; all others are not touched.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bollard::{
    Docker,
    errors::Error,
    models::{ContainerSummary, ImageInspect},
    query_parameters::{ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder},
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    super::state::write_json,
    image::{canonical, credentials, digest_of, ensure},
    is_missing, layers,
};
use crate::models::{Image, Images};

/// As noted on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Notes {
    /// By id.
    images: BTreeMap<String, Note>,
    /// Pulls that go on, or were cut off: the ids that were here before.
    pulling: BTreeMap<String, BTreeSet<String>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Note {
    /// Names that it was pulled by, and by which replicas have asked for it since.
    names: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    took: Option<Duration>,
    last_used: SystemTime,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pinned: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pulled {
    docker: Docker,
    path: PathBuf,
    /// File with the node's own credentials.
    registry_config: Option<PathBuf>,
    notes: Mutex<Notes>,
    /// Pulls of this process that go on, by name.
    running: Mutex<HashMap<String, usize>>,
    /// Layers do not change.
    layers: Mutex<HashMap<String, BTreeMap<String, u64>>>,
    changes: watch::Sender<u64>,
}

impl Pulled {
    /// Reads what a former agent process has noted.
    pub(super) fn open(docker: Docker, data_dir: &Path, registry_config: Option<PathBuf>) -> Self {
        let path = data_dir.join("images.json");
        let notes = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                warn!(path = %path.display(), %error, "what was pulled before cannot be read, and is not removed");
                Notes::default()
            }),
            Err(_) => Notes::default(),
        };
        let (running, layers, changes) = Default::default();
        Self { docker, path, registry_config, notes: Mutex::new(notes), running, layers, changes }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the notes whole or not at all. `now`: onto the disk before it returns.
    fn write(&self, notes: &Notes, now: bool) {
        if let Err(error) = write_json(&self.path, notes, now) {
            warn!(path = %self.path.display(), %error, "what was pulled cannot be noted; a later agent will not remove it");
        }
    }

    /// An image that is here is asked for by this name. One that somebody else has given it is not ours.
    pub(super) fn asked_for(&self, name: &str, id: &str) {
        let mut notes = self.notes();
        let Some(note) = notes.images.get_mut(id) else { return };
        let pulled = canonical(name);
        let ours = name.contains('@') || note.names.iter().any(|name| canonical(name) == pulled);
        if ours && note.names.insert(name.to_owned()) {
            self.write(&notes, false);
            self.changed();
        }
    }

    /// Notes that a pull is about to begin. It has ended when the answer is dropped.
    pub(super) async fn begin(self: &Arc<Self>, name: &str) -> Result<Pull, Error> {
        let all = ListImagesOptionsBuilder::default().all(true).build();
        let before = self.docker.list_images(Some(all)).await?.into_iter().map(|image| image.id).collect();
        *self.running().entry(name.to_owned()).or_default() += 1;
        let mut notes = self.notes();
        // What a pull of the same name has brought meanwhile is ours all the same.
        notes.pulling.entry(name.to_owned()).or_insert(before);
        self.write(&notes, true);
        Ok(Pull { pulled: Arc::clone(self), name: name.to_owned() })
    }

    /// Sees what pulls that have ended, or were cut off, have brought.
    async fn settle(&self) -> Result<(), Error> {
        let over = {
            let (notes, running) = (self.notes(), self.running());
            let over = notes.pulling.keys().filter(|name| !running.contains_key(*name));
            over.cloned().collect::<Vec<_>>()
        };
        for name in over {
            self.came(&name, None).await?;
            let mut notes = self.notes();
            if !self.running().contains_key(&name) {
                notes.pulling.remove(&name);
                self.write(&notes, true);
            }
        }
        Ok(())
    }

    /// Takes what a name stands for now for ours, where it was not here before the pull.
    async fn came(&self, name: &str, took: Option<Duration>) -> Result<(), Error> {
        let Some(id) = self.find(name).await?.and_then(|found| found.id) else { return Ok(()) };
        let mut notes = self.notes();
        let new = notes.pulling.get(name).is_some_and(|before| !before.contains(&id));
        if !new && !notes.images.contains_key(&id) {
            return Ok(());
        }
        for (_, note) in notes.images.iter_mut().filter(|(other, _)| **other != id) {
            note.names.remove(name);
        }
        let last_used = SystemTime::now();
        let note = notes.images.entry(id).or_insert(Note { names: BTreeSet::new(), took, last_used, pinned: false });
        note.names.insert(name.to_owned());
        self.write(&notes, true);
        Ok(())
    }

    async fn find(&self, name: &str) -> Result<Option<ImageInspect>, Error> {
        match self.docker.inspect_image(name).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn forget(&self, id: &str) {
        let mut notes = self.notes();
        if notes.images.remove(id).is_some() {
            self.write(&notes, true);
        }
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    async fn containers(&self) -> Result<Vec<ContainerSummary>, Error> {
        let all = ListContainersOptionsBuilder::default().all(true).build();
        self.docker.list_containers(Some(all)).await
    }

    async fn layers(&self, id: &str, found: &ImageInspect) -> BTreeMap<String, u64> {
        let known = || self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known().get(id) {
            return known.clone();
        }
        // Without it the image counts as a whole.
        let history = self.docker.image_history(id).await.unwrap_or_default();
        let bytes = |size: i64| u64::try_from(size).unwrap_or(0);
        let steps: Vec<_> = history.iter().map(|step| (step.created_by.as_str(), bytes(step.size))).collect();
        let names = found.root_fs.as_ref().and_then(|root| root.layers.clone()).unwrap_or_default();
        let layers = layers::bytes(id, bytes(found.size.unwrap_or(0)), &names, &steps);
        known().insert(id.to_owned(), layers.clone());
        layers
    }

    /// Removes a name, and the image with its last one.
    async fn untag(&self, name: &str) -> Result<(), Error> {
        // What it was made from may be others'.
        let options = RemoveImageOptionsBuilder::default().force(false).noprune(true).build();
        match self.docker.remove_image(name, Some(options), None).await {
            Err(error) if !is_missing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes it by its id, and where the engine wants its names gone first, those one by one.
    async fn delete(&self, id: &str, found: &ImageInspect) -> Result<(), Error> {
        let names: Vec<String> = found.repo_tags.iter().chain(&found.repo_digests).flatten().cloned().collect();
        match self.untag(id).await {
            Err(Error::DockerResponseServerError { status_code: 409, .. }) if names.len() > 1 => {
                for name in &names {
                    self.untag(name).await?;
                }
                self.untag(id).await
            }
            removed => removed,
        }
    }
}

/// Who keeps an image, beside replicas: a container, or a name that is not ours.
fn kept_by(id: &str, found: &ImageInspect, note: &Note, containers: &[ContainerSummary]) -> Option<String> {
    let of = |container: &&ContainerSummary| container.image_id.as_deref() == Some(id);
    if let Some(container) = containers.iter().find(of) {
        let name = container.names.iter().flatten().next().map(|name| name.trim_start_matches('/').to_owned());
        return Some(format!("in use by container {}", name.or_else(|| container.id.clone()).unwrap_or_default()));
    }
    let ours: BTreeSet<String> = note.names.iter().map(|name| canonical(name)).collect();
    let tags = found.repo_tags.iter().flatten().filter(|tag| !tag.contains('<'));
    let other = tags.into_iter().find(|tag| !ours.contains(&canonical(tag)));
    other.map(|other| format!("it is also named {other}"))
}

/// A pull that goes on.
#[derive(Debug)]
pub(super) struct Pull {
    pulled: Arc<Pulled>,
    name: String,
}

impl Pull {
    /// It has ended well. `took`: how long, where bytes came.
    pub(super) async fn done(self, took: Option<Duration>) {
        if let Err(error) = self.pulled.came(&self.name, took).await {
            // Tried again at the next look.
            info!(image = %self.name, %error, "the engine does not say what was pulled");
        }
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        let mut running = self.pulled.running();
        if let Some(count) = running.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.name);
            }
        }
        drop(running);
        self.pulled.changed();
    }
}

#[async_trait]
impl Images for Pulled {
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn list(&self) -> Result<Vec<Image>, String> {
        let failed = |error: Error| error.to_string();
        self.settle().await.map_err(failed)?;
        let noted = self.notes().images.clone();
        if noted.is_empty() {
            return Ok(Vec::new());
        }
        let containers = self.containers().await.map_err(failed)?;
        let mut images = Vec::new();
        for (id, note) in noted {
            let Some(found) = self.find(&id).await.map_err(failed)? else {
                self.forget(&id);
                continue;
            };
            let layers = self.layers(&id, &found).await;
            images.push(Image {
                digest: digest_of(&found, &note.names),
                bytes: layers.values().sum(),
                layers,
                kept_by: kept_by(&id, &found, &note, &containers),
                last_used: note.last_used,
                pinned: note.pinned,
                took: note.took,
                names: note.names,
                id,
            });
        }
        Ok(images)
    }

    async fn pull(self: Arc<Self>, name: &str, registry_configs: &[String]) -> Result<(), String> {
        let credentials = credentials(name, registry_configs, self.registry_config.as_deref());
        let got = ensure(&self.docker, &self, name, "IfNotPresent", credentials, &|_| {}).await;
        got.map(drop).map_err(|error| error.to_string())
    }

    async fn remove(&self, id: &str) -> Result<(), String> {
        let failed = |error: Error| format!("the container engine: {error}");
        let note = self.notes().images.get(id).cloned();
        let note = note.ok_or_else(|| "it was not pulled by this agent".to_owned())?;
        if let Some(found) = self.find(id).await.map_err(failed)? {
            let containers = self.containers().await.map_err(failed)?;
            if let Some(why) = kept_by(id, &found, &note, &containers) {
                return Err(why);
            }
            self.delete(id, &found).await.map_err(failed)?;
        }
        self.forget(id);
        Ok(())
    }

    fn note(&self, id: &str, last_used: SystemTime, pinned: bool) {
        let mut notes = self.notes();
        if let Some(note) = notes.images.get_mut(id) {
            (note.last_used, note.pinned) = (last_used, pinned);
            self.write(&notes, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_and_names_that_are_not_ours_keep_an_image() {
        let note = |names: &[&str]| Note {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            took: None,
            last_used: SystemTime::UNIX_EPOCH,
            pinned: false,
        };
        let tagged = |tags: &[&str]| ImageInspect {
            repo_tags: Some(tags.iter().map(|tag| (*tag).to_owned()).collect()),
            ..ImageInspect::default()
        };
        let ours = note(&["docker.io/library/a:1", "a@sha256:00"]);
        assert_eq!(kept_by("id", &tagged(&["a:1"]), &ours, &[]), None);
        assert_eq!(kept_by("id", &tagged(&["<none>:<none>"]), &note(&[]), &[]), None, "a newer one has its name");
        let why = kept_by("id", &tagged(&["a:1", "theirs:2"]), &ours, &[]).unwrap();
        assert_eq!(why, "it is also named theirs:2");
        let container = |image: &str| ContainerSummary {
            image_id: Some(image.to_owned()),
            names: Some(vec!["/theirs".to_owned()]),
            ..ContainerSummary::default()
        };
        let why = kept_by("id", &tagged(&["a:1"]), &ours, &[container("other"), container("id")]).unwrap();
        assert_eq!(why, "in use by container theirs");
    }
}
