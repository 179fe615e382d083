//! `SaveSnapshot`: a snapshot of the store that a running coordinator uses.

use std::sync::Arc;

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use pilotlight_proto::control::v1 as control;
use tonic::Status;

use super::control::{Streamed, unavailable};
use crate::store::{Store, snapshot::Snapshot};

/// Bytes of the file in one message.
const CHUNK_BYTES: usize = 256 * 1024;

/// The file, in chunks.
///
/// # Errors
/// `UNAVAILABLE` if the store does not answer.
pub(super) async fn save(
    store: &Arc<dyn Store>,
    cell: &str,
) -> Result<Streamed<control::SaveSnapshotResponse>, Status> {
    let snapshot = Snapshot::take(store, cell, Timestamp::now()).await.map_err(unavailable)?;
    let file = snapshot.encode().map_err(|error| Status::internal(error.to_string()))?;
    let chunks: Vec<_> = file
        .as_bytes()
        .chunks(CHUNK_BYTES)
        .map(|data| Ok(control::SaveSnapshotResponse { data: data.to_vec() }))
        .collect();
    Ok(stream::iter(chunks).boxed())
}
