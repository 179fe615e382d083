//! Follows a part of the store: loads it, and loads it again after each change.

use std::{fmt::Display, future::Future, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::store::{Store, StoreError};

/// Pause before the part is loaded again after the store failed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Calls `load` now and after each change of a key with this prefix, until `shutdown`. `load` returns the revision of the
/// store that it has read.
pub(crate) async fn follow<F, E>(
    store: Arc<dyn Store>,
    prefix: &'static str,
    load: impl Fn() -> F,
    shutdown: CancellationToken,
) where
    F: Future<Output = Result<u64, E>>,
    E: From<StoreError> + Display,
{
    let following = async {
        loop {
            if let Err(error) = follow_once(&store, prefix, &load).await {
                warn!(%error, prefix, "cannot follow a part of the store; trying again");
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    };
    tokio::select! {
        () = following => {}
        () = shutdown.cancelled() => {}
    }
}

async fn follow_once<F, E>(store: &Arc<dyn Store>, prefix: &str, load: &impl Fn() -> F) -> Result<(), E>
where
    F: Future<Output = Result<u64, E>>,
    E: From<StoreError>,
{
    let revision = load().await?;
    let mut events = store.watch(prefix, revision + 1).await?;
    while let Some(change) = events.next().await {
        change?;
        load().await?;
    }
    Ok(())
}
