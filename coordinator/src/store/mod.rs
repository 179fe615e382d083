//! Desired state, durable: the [`Store`] trait, embedded and etcd.
//!
//! Revisions are those of etcd: each commit makes one, keys remember in which they were made and last
//! changed, and a watch goes on from any revision whose history is still kept.

pub mod embedded;
pub mod etcd;
mod fenced;
pub mod format;
mod lease;
mod measured;
pub mod snapshot;
mod transaction;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use serde::de::DeserializeOwned;

pub use fenced::{COMMIT_KEY, Fenced};
pub use lease::Lease;
pub use measured::Measured;
pub use transaction::{Compare, Transaction, Write};

/// Operations in one transaction, compares included; etcd's own default.
pub const OPERATIONS_MOST: usize = 128;

/// A key's value and history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// Revision in which it was made.
    pub create_revision: u64,
    /// Revision in which it was last changed.
    pub mod_revision: u64,
    /// Changes since it was made, that one included.
    pub version: u64,
}

/// All keys below a prefix at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Sorted by key.
    pub entries: Vec<Entry>,
    /// The store's revision that this is the state of.
    pub revision: u64,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The key has this value now.
    Put(Entry),
    /// The key is gone.
    Delete {
        /// Which.
        key: String,
        /// Revision in which it went.
        revision: u64,
    },
}

impl Event {
    /// The revision that made it.
    pub fn revision(&self) -> u64 {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Changes, those of one transaction together.
pub type Events = BoxStream<'static, Result<Vec<Event>, StoreError>>;

/// Why the store did not do as asked. Unless it says otherwise, nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A key is not as the transaction expected it.
    #[error("key {key} was changed by someone else")]
    Conflict {
        /// Which.
        key: String,
    },
    /// Another coordinator leads now.
    #[error("another coordinator leads this cell now")]
    Fenced,
    /// The history from there on is not kept any more.
    #[error("history before revision {oldest} is not kept; list again and watch from there")]
    Compacted {
        /// The oldest revision that is.
        oldest: u64,
    },
    /// A transaction is too large.
    #[error("transaction has {0} operations, at most {OPERATIONS_MOST} are allowed")]
    TooLarge(usize),
    /// The store cannot be reached now; whether a commit took place is not known.
    #[error("store unavailable: {0}")]
    Unavailable(String),
    /// A stored value is not what it should be.
    #[error("stored value of {key} cannot be read: {reason}")]
    Unreadable {
        /// Which.
        key: String,
        /// Why.
        reason: String,
    },
    /// The store cannot be opened.
    #[error("{0}")]
    Open(String),
    /// Another process has the store's file, which this is, open.
    #[error("{0}: in use by another coordinator")]
    InUse(String),
}

/// A durable, ordered map with transactions, watches and leases.
#[async_trait]
pub trait Store: Send + Sync + std::fmt::Debug {
    /// One key.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;
    /// All keys below a prefix, at one moment.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;
    /// Does all of a transaction or nothing; returns its revision. Durable when it returns.
    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError>;
    /// Changes below a prefix from a revision on (inclusive): in order, none left out, none twice.
    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError>;
    /// A lease that is kept alive while its handle is held. Keys bound to it vanish when it ends; a
    /// process that dies lets go of it after `ttl` at the latest.
    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError>;
    /// Returns `true` if a commit that failed with [`StoreError::Unavailable`] may have taken place, or may still do so.
    fn may_commit_late(&self) -> bool {
        true
    }
    /// Whether the store answers.
    async fn ping(&self) -> Result<(), StoreError>;
    /// "embedded" or "etcd".
    fn kind(&self) -> &'static str;
}

/// Values as JSON.
#[async_trait]
pub trait StoreExt {
    /// One value.
    async fn get_json<T: DeserializeOwned + Send>(&self, key: &str) -> Result<Option<T>, StoreError>;
    /// All values below a prefix, sorted by key.
    async fn list_json<T: DeserializeOwned + Send>(&self, prefix: &str) -> Result<Vec<T>, StoreError>;
}

#[async_trait]
impl StoreExt for Arc<dyn Store> {
    async fn get_json<T: DeserializeOwned + Send>(&self, key: &str) -> Result<Option<T>, StoreError> {
        self.get(key).await?.map(|entry| read(&entry)).transpose()
    }

    async fn list_json<T: DeserializeOwned + Send>(&self, prefix: &str) -> Result<Vec<T>, StoreError> {
        self.list(prefix).await?.entries.iter().map(read).collect()
    }
}

fn read<T: DeserializeOwned>(entry: &Entry) -> Result<T, StoreError> {
    serde_json::from_slice(&entry.value)
        .map_err(|error| StoreError::Unreadable { key: entry.key.clone(), reason: error.to_string() })
}

/// Puts events of one revision together; they come in order.
fn by_revision(events: impl IntoIterator<Item = Event>) -> impl Iterator<Item = Vec<Event>> {
    let mut revisions: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
    for event in events {
        revisions.entry(event.revision()).or_default().push(event);
    }
    revisions.into_values()
}
