//! From which rung of warmth a replica starts, and how its way to another is told.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use pilotlight_proto::fleet::v1::{Rung, Transition};
use prost_types::Timestamp;
use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

use super::question::Question;
use crate::warmth::page_cache;

/// Longest look at the page cache beside a start; it takes some milliseconds per GiB.
const LOOK: Duration = Duration::from_secs(10);

/// A start from below.
pub(super) struct Cold {
    /// Where it began.
    pub(super) look: Look,
    /// When.
    pub(super) began: Instant,
    /// What is still to be asked of the models that it starts with.
    pub(super) question: Question,
}

/// The rung from which a start begins. Nothing waits for it: the pages are looked at while the process starts,
/// and faster than it reads them.
pub(super) struct Look {
    told: oneshot::Receiver<Rung>,
    /// What is read ahead is of no use any more once this is gone.
    _reading: DropGuard,
}

impl Look {
    /// Looks at the rung of a replica that is about to be started. `fetched`: something of it was not on the
    /// node. `folders` are those of its models: where they are not wholly in the page cache they are read into
    /// it meanwhile, since most servers do much else before they read their weights.
    pub(super) fn begin(fetched: bool, folders: Vec<PathBuf>) -> Self {
        let (tell, told) = oneshot::channel();
        let reading = CancellationToken::new();
        let stop = reading.clone();
        tokio::spawn(async move {
            let rung = if fetched { Rung::Absent } else { on_disk(&folders).await };
            // One that is not started after all does not ask.
            let _ = tell.send(rung);
            if rung == Rung::Cached {
                for folder in folders {
                    if let Err(error) = page_cache::read_ahead(&folder, stop.clone()).await {
                        debug!(folder = %folder.display(), %error, "not read ahead");
                    }
                }
            }
        });
        Self { told, _reading: reading.drop_guard() }
    }

    /// What was seen; where that was not done in time, models count as not in the page cache.
    pub(super) fn rung(mut self) -> Rung {
        self.told.try_recv().unwrap_or(Rung::Cached)
    }
}

/// A change of rung that has just come to its end.
pub(super) fn transition(from: Rung, to: Rung, took: Duration) -> Transition {
    Transition {
        from: from.into(),
        to: to.into(),
        took: prost_types::Duration::try_from(took).ok(),
        ended_at: Some(Timestamp::from(SystemTime::now())),
    }
}

/// Whether models that are on the disk are wholly in the page cache.
async fn on_disk(folders: &[PathBuf]) -> Rung {
    let all_resident = async {
        for folder in folders {
            if !page_cache::is_resident(folder).await.unwrap_or_default() {
                return false;
            }
        }
        !folders.is_empty()
    };
    match tokio::time::timeout(LOOK, all_resident).await {
        Ok(true) => Rung::Staged,
        _ => Rung::Cached,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::warmth::PageCache;

    #[tokio::test]
    async fn a_start_begins_where_its_models_are() {
        // A folder on a disk: what is in memory only, as many a /tmp, cannot leave it.
        let beside = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(beside.parent().unwrap()).unwrap();
        fs::write(folder.path().join("weights"), vec![7; 4 << 20]).unwrap();
        let folders = [folder.path().to_owned()];
        let cache = std::sync::Arc::new(PageCache::new(8 << 20));
        cache.unstage(&folders[0]).await.unwrap();
        assert_eq!(on_disk(&folders).await, Rung::Cached);
        cache.stage(&folders[0]).await.unwrap();
        assert_eq!(on_disk(&folders).await, Rung::Staged);
        let with_another = [folders[0].clone(), "/nowhere".into()];
        assert_eq!(on_disk(&with_another).await, Rung::Cached);
        assert_eq!(on_disk(&[]).await, Rung::Cached, "there is nothing that could be staged");
    }
}
