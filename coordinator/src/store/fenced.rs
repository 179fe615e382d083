//! A store whose commits hold only while one key is the one that it was.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{Entry, Events, Lease, Listing, Store, StoreError, Transaction};

/// Adds a compare to each commit: the fence key must still have been made in the given revision.
#[derive(Debug)]
pub struct Fenced {
    inner: Arc<dyn Store>,
    key: String,
    create_revision: u64,
}

impl Fenced {
    /// Fences `inner` by `key`.
    pub fn new(inner: Arc<dyn Store>, key: &str, create_revision: u64) -> Self {
        Self { inner, key: key.to_owned(), create_revision }
    }
}

#[async_trait]
impl Store for Fenced {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.inner.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        let fenced = transaction.expect_created(&self.key, self.create_revision);
        match self.inner.commit(fenced).await {
            Err(StoreError::Conflict { key }) if key == self.key => Err(StoreError::Fenced),
            outcome => outcome,
        }
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError> {
        self.inner.watch(prefix, from_revision).await
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.lease(ttl).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.inner.ping().await
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
}
