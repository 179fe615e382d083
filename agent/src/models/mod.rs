//! Models: fetched once per node, kept by content, and shown to replicas whole or not at all.
//!
//! [`plan`] is pure, [`source`] reads from stores, [`cache`] is the disk, `fetch` joins them; [`Models`]
//! lets replicas that want the same model share one fetch.

mod answers;
mod archive;
#[cfg(test)]
mod archive_tests;
mod budget;
pub mod cache;
mod checksum;
pub mod clients;
mod content;
mod fetch;
mod hands;
mod hashing;
#[cfg(test)]
mod image_tests;
mod landing;
pub mod lend;
mod local_addresses;
mod naming;
mod part;
pub mod peers;
#[cfg(test)]
mod peers_tests;
pub mod plan;
mod report;
mod room;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod s3_tests;
mod settle;
mod shelf;
#[cfg(test)]
mod shelf_tests;
pub mod source;
#[cfg(test)]
mod tests;
mod warm_images;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use pilotlight_proto::fleet::v1::CacheReport;
use tokio::sync::{Semaphore, watch};

pub use answers::Version;
use cache::Cache;
use clients::Clients;
use fetch::Fetch;
pub use fetch::Progress;
use hands::Hands;
use peers::Ask;
pub use room::{Held, Image, Images};
use room::{Holder, Room};
pub use shelf::Shelf;
use source::Credentials;

/// Silence after which a range is asked for again.
pub const STALL: Duration = Duration::from_secs(30);

/// Why a model is not here.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The source says that there is no such thing.
    #[error("{uri}: not found: {reason}")]
    NotFound {
        /// Which model.
        uri: String,
        /// What the source says.
        reason: String,
    },
    /// The source cannot be read.
    #[error("{uri}: {reason}")]
    Source {
        /// Which model.
        uri: String,
        /// Why.
        reason: String,
    },
    /// The address or the credentials are wrong: the source answers the same however often it is asked.
    #[error("{uri}: {reason}")]
    Rejected {
        /// Which model.
        uri: String,
        /// Why.
        reason: String,
    },
    /// What came is not what the source lists.
    #[error("{uri}: {file}: {kind} is {found}, expected {expected}")]
    Checksum {
        /// Which model.
        uri: String,
        /// Which of its files.
        file: String,
        /// Name of the checksum.
        kind: &'static str,
        /// As listed.
        expected: String,
        /// As computed.
        found: String,
    },
    /// The cache's budget has no room for it.
    #[error(
        "{uri}: the model has {bytes} bytes, and the node's cache of models and images a budget of {budget}, of which \
         {kept} are in use, pinned or to be kept before it; see --cache-budget"
    )]
    CacheFull {
        /// Which model.
        uri: String,
        /// Its size.
        bytes: u64,
        /// All that models and images may take on this node.
        budget: u64,
        /// Bytes of it that cannot be freed now.
        kept: u64,
    },
    /// The node's disk refuses.
    #[error("{uri}: the node's disk: {error}")]
    Disk {
        /// Which model.
        uri: String,
        /// Why.
        error: io::Error,
    },
    /// No volume of this name.
    #[error("{uri}: {reason}")]
    Volume {
        /// Which model.
        uri: String,
        /// Names those that it has.
        reason: String,
    },
}

impl ModelError {
    /// CamelCase, for a replica's status.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "ModelNotFound",
            Self::Source { .. } | Self::Rejected { .. } => "ModelFetchFailed",
            Self::Checksum { .. } => "ModelChecksumMismatch",
            Self::CacheFull { .. } => "CacheFull",
            Self::Disk { error, .. } if error.kind() == io::ErrorKind::StorageFull => "DiskFull",
            Self::Disk { .. } => "ModelCacheFailed",
            Self::Volume { .. } => "VolumeNotFound",
        }
    }
}

/// Fetches that go on, by address and credentials.
type Running = HashMap<(String, Credentials), watch::Sender<Progress>>;

/// A node's models. Cheap to clone.
#[derive(Clone)]
pub struct Models {
    cache: Cache,
    room: Room,
    claims: Arc<BTreeMap<String, PathBuf>>,
    stall: Duration,
    running: Arc<Mutex<Running>>,
    answers: answers::Answers,
    clients: Clients,
    hands: Hands,
    turns: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
    /// How other nodes are asked; `None`: they are not.
    ask: Option<Arc<dyn Ask>>,
    /// Turns of other nodes to have content from here.
    lent: Arc<Semaphore>,
}

impl Models {
    /// Opens the cache below `root`. `claims` are what `pvc://` names mean here; `budget` is the bytes that
    /// all models together may take, with images where there are any; `None`: as many as the disk has.
    ///
    /// # Errors
    /// The cache cannot be made or read.
    pub fn open(
        root: PathBuf,
        claims: BTreeMap<String, PathBuf>,
        stall: Duration,
        budget: Option<u64>,
    ) -> io::Result<Self> {
        let cache = Cache::open(root)?;
        let room = Room::open(cache.clone(), budget);
        settle::settle_rest(cache.clone(), room.clone());
        Ok(Self {
            cache,
            room,
            claims: Arc::new(claims),
            stall,
            running: Arc::default(),
            answers: answers::Answers::default(),
            clients: Clients::default(),
            hands: Hands::new()?,
            turns: Arc::default(),
            ask: None,
            lent: Arc::new(Semaphore::new(lend::AT_ONCE)),
        })
    }

    /// Takes models from other nodes, too, where these have them.
    #[must_use]
    pub fn with_peers(self, ask: Arc<dyn Ask>) -> Self {
        Self { ask: Some(ask), ..self }
    }

    /// Refuses to fetch from loopback, link-local and unspecified addresses.
    #[must_use]
    pub fn refusing_local_storage(self) -> Self {
        Self { clients: Clients::refusing_local(), ..self }
    }

    /// Keeps a container engine's images within the budget, too. Must be called in a runtime.
    #[must_use]
    pub fn with_images(self, images: Arc<dyn Images>) -> Self {
        Self { room: self.room.with_images(images), ..self }
    }

    /// What is on this node, now and on each change.
    pub fn report(&self) -> watch::Receiver<CacheReport> {
        self.room.report()
    }

    /// Keeps the models of these addresses, and images of these names, on the node for a replica, for as long
    /// as the answer lives, here or yet to come.
    pub fn hold(&self, replica: &str, uris: impl IntoIterator<Item = String>) -> Held {
        self.room.hold(Holder::Replica(replica.to_owned()), uris)
    }

    /// The agent is about to end: what it lets go of now may still be in use.
    pub fn close(&self) {
        self.room.close();
    }

    /// Waits until an image that is held is not about to be removed any more.
    pub async fn settled(&self, image: &str) {
        self.room.settled(image).await;
    }

    /// Changes whenever there may be room within the budget that was not there before: a replica with a model
    /// has gone, a model was evicted or is not pinned any more, or two contents turned out to be one.
    pub fn room_made(&self) -> watch::Receiver<u64> {
        self.room.made()
    }

    /// What is on disk.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Where a claim of a namespace is, and the folder in it that `pvc://claim[/path]` names. Nothing is copied.
    ///
    /// # Errors
    /// The node has no such volume, or no such path in it.
    pub fn volume(&self, namespace: &str, uri: &str) -> Result<(PathBuf, PathBuf), ModelError> {
        let rest = uri.strip_prefix("pvc://").unwrap_or(uri);
        let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
        let root = crate::config::claim(&self.claims, namespace, name);
        let root = root.map_err(|reason| ModelError::Volume { uri: uri.to_owned(), reason })?.to_owned();
        if path.split('/').any(|part| part == "..") {
            let reason = "the path must be without ..".to_owned();
            return Err(ModelError::Rejected { uri: uri.to_owned(), reason });
        }
        let below = if path.is_empty() { root.clone() } else { root.join(path.trim_start_matches('/')) };
        if !below.exists() {
            let reason = format!("{} is not there", below.display());
            return Err(ModelError::NotFound { uri: uri.to_owned(), reason });
        }
        Ok((root, below))
    }

    /// Has a model in place and gives its folder. Those that want the same model at once fetch it once;
    /// `progress` is told how far it is.
    ///
    /// # Errors
    /// It cannot be fetched; what came so far is kept for the next try.
    pub async fn ensure(
        &self,
        uri: &str,
        credentials: &Credentials,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<PathBuf, ModelError> {
        self.ensure_from(uri, credentials, &[], progress).await
    }

    /// As [`Self::ensure`]; the model's bytes may come from these nodes instead of from its store.
    ///
    /// # Errors
    /// As [`Self::ensure`]; nodes that do not have it are no error.
    pub async fn ensure_from(
        &self,
        uri: &str,
        credentials: &Credentials,
        peers: &[String],
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<PathBuf, ModelError> {
        let id = (uri.to_owned(), credentials.clone());
        let sender = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.retain(|known, sender| sender.receiver_count() > 0 || *known == id);
            running.entry(id).or_default().clone()
        };
        let mut seen = sender.subscribe();
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|known, turn| Arc::strong_count(turn) > 1 || known == uri);
            Arc::clone(turns.entry(uri.to_owned()).or_default())
        };
        let source = source::open(uri, credentials, &self.clients)?;
        let _held = self.room.hold(Holder::Fetch, [uri.to_owned()]);
        let fetch = Arc::new(Fetch {
            uri: uri.to_owned(),
            source,
            peers: peers.to_vec(),
            ask: self.ask.clone(),
            cache: self.cache.clone(),
            room: self.room.clone(),
            hands: self.hands.clone(),
            stall: self.stall,
            progress: sender,
        });
        let mut fetching = async {
            // Whoever comes second finds the model there, after one look at the listing.
            let _turn = turn.lock().await;
            fetch.run().await
        }
        .boxed();
        let mut beat = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                done = &mut fetching => {
                    progress(*seen.borrow());
                    let key = done?;
                    self.answers.note(uri, credentials, &key, |key| self.cache.record(key).is_some());
                    return Ok(self.cache.files(&key));
                }
                _ = beat.tick() => if seen.has_changed().unwrap_or(false) {
                    progress(*seen.borrow_and_update());
                }
            }
        }
    }
}
