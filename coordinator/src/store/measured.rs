//! A store whose operations are measured.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Entry, Events, Lease, Listing, Store, StoreError, Transaction};
use crate::metrics::CoordinatorMetrics;

/// Records how long each operation of `inner` takes, and why operations fail.
#[derive(Debug)]
pub struct Measured {
    inner: Arc<dyn Store>,
    metrics: CoordinatorMetrics,
}

impl Measured {
    /// Measures `inner`.
    pub fn new(inner: Arc<dyn Store>, metrics: CoordinatorMetrics) -> Self {
        Self { inner, metrics }
    }

    async fn measure<T>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let started = Instant::now();
        let outcome = work.await;
        self.metrics.record_store(operation, started.elapsed(), outcome.as_ref().err());
        outcome
    }
}

#[async_trait]
impl Store for Measured {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.measure("get", self.inner.get(key)).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.measure("list", self.inner.list(prefix)).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        self.measure("commit", self.inner.commit(transaction)).await
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError> {
        self.measure("watch", self.inner.watch(prefix, from_revision)).await
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.measure("lease", self.inner.lease(ttl)).await
    }

    fn may_commit_late(&self) -> bool {
        self.inner.may_commit_late()
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.measure("ping", self.inner.ping()).await
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
}
