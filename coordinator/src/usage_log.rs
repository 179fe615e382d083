//! Stored usage: reads segments, and merges old ones while this process leads.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    store::{Store, StoreError, Transaction},
    usage::{
        Clock,
        retention::{Merge, merges},
        segment::{LOG, Segment, SegmentKey},
    },
};

/// Time between two looks for segments that are old enough to be merged.
const MERGE_INTERVAL: Duration = Duration::from_secs(600);

/// All stored segments.
///
/// # Errors
/// The store does not answer, or holds a segment that cannot be read.
pub async fn read(store: &dyn Store) -> Result<Vec<(SegmentKey, Segment)>, StoreError> {
    let entries = store.list(LOG).await?.entries.into_iter();
    let segments = entries.filter_map(|entry| Some((SegmentKey::parse(&entry.key)?, entry)));
    let read = segments.map(|(key, entry)| {
        let segment = serde_json::from_slice(&entry.value)
            .map_err(|error| StoreError::Unreadable { key: entry.key.clone(), reason: error.to_string() })?;
        Ok((key, segment))
    });
    read.collect()
}

/// Merges what is old enough, again and again. `store` must be the leader's, so that it stops with the leader.
pub async fn keep_merging(store: Arc<dyn Store>, stopping: CancellationToken) {
    loop {
        if let Err(error) = merge(&*store, Timestamp::now().as_millisecond()).await {
            warn!(%error, "cannot merge old usage; will be tried again");
        }
        tokio::select! {
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(MERGE_INTERVAL) => {}
        }
    }
}

/// Merges what is old enough at `now`. Each merge is one transaction.
///
/// # Errors
/// As [`read`]; what was merged before stays merged.
pub async fn merge(store: &dyn Store, now: Clock) -> Result<(), StoreError> {
    let merges = merges(read(store).await?, now);
    if !merges.is_empty() {
        info!(merges = merges.len(), "merging old usage");
    }
    for Merge { inputs, key, segment } in merges {
        let write = inputs.iter().fold(Transaction::new(), |write, input| write.delete(&input.key()));
        store.commit(write.put_json(&key.key(), &segment)).await?;
    }
    Ok(())
}
