//! What a commit expects and what it does.

use bytes::Bytes;
use serde::Serialize;

/// What must hold for a transaction to take place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key was last changed in this revision; 0: it does not exist.
    ModRevision(String, u64),
    /// The key was made in this revision; 0: it does not exist.
    CreateRevision(String, u64),
}

impl Compare {
    /// The key compared.
    pub fn key(&self) -> &str {
        match self {
            Self::ModRevision(key, _) | Self::CreateRevision(key, _) => key,
        }
    }
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a value, bound to a lease or not.
    Put {
        /// Where.
        key: String,
        /// What.
        value: Bytes,
        /// Lease id.
        lease: Option<u64>,
    },
    /// Removes a key; one that is not there is no error.
    Delete {
        /// Which.
        key: String,
    },
}

impl Write {
    /// The key written.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// Compares and writes that take place together or not at all. No key may be written twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    pub(super) compares: Vec<Compare>,
    pub(super) writes: Vec<Write>,
}

impl Transaction {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only where the key does not exist.
    pub fn expect_absent(self, key: &str) -> Self {
        self.expect_revision(key, 0)
    }

    /// Only where the key was last changed in this revision.
    pub fn expect_revision(mut self, key: &str, mod_revision: u64) -> Self {
        self.compares.push(Compare::ModRevision(key.to_owned(), mod_revision));
        self
    }

    /// Only where the key was made in this revision.
    pub fn expect_created(mut self, key: &str, create_revision: u64) -> Self {
        self.compares.push(Compare::CreateRevision(key.to_owned(), create_revision));
        self
    }

    /// Sets a value.
    pub fn put(mut self, key: &str, value: impl Into<Bytes>) -> Self {
        self.writes.push(Write::Put { key: key.to_owned(), value: value.into(), lease: None });
        self
    }

    /// Sets a value that vanishes with a lease.
    pub fn put_with_lease(mut self, key: &str, value: impl Into<Bytes>, lease: u64) -> Self {
        self.writes.push(Write::Put { key: key.to_owned(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Sets a value as JSON.
    ///
    /// # Panics
    /// The value's type cannot be written as JSON, which is an error in the program: records have no
    /// maps with keys that are not strings.
    pub fn put_json(self, key: &str, value: &impl Serialize) -> Self {
        let json = serde_json::to_vec(value).expect("records can be written as JSON");
        self.put(key, json)
    }

    /// Removes a key.
    pub fn delete(mut self, key: &str) -> Self {
        self.writes.push(Write::Delete { key: key.to_owned() });
        self
    }

    /// True where it writes nothing.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Number of compares and writes.
    pub fn operations(&self) -> usize {
        self.compares.len() + self.writes.len()
    }
}
