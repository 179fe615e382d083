//! From which rung of warmth a replica starts, and how its way to another is told.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use pilotlight_proto::fleet::v1::{Rung, Transition};
use prost_types::Timestamp;
use tokio::time::Instant;

use crate::warmth::page_cache;

/// Longest look at the page cache before a start; it takes some milliseconds per GiB.
const LOOK: Duration = Duration::from_millis(200);

/// A start from below.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cold {
    /// Where it began.
    pub(super) rung: Rung,
    /// When.
    pub(super) began: Instant,
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

/// The rung of a replica that is about to be started. `fetched`: something of it was not on the node.
/// `folders` are those of its models. Where the page cache does not tell in time, they count as not in it.
pub(super) async fn before_start(fetched: bool, folders: &[PathBuf]) -> Rung {
    if fetched {
        return Rung::Absent;
    }
    let all_resident = async {
        for folder in folders {
            if !page_cache::residency(folder).await.is_ok_and(|residency| residency.whole()) {
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
        assert_eq!(before_start(false, &folders).await, Rung::Cached);
        cache.stage(&folders[0]).await.unwrap();
        assert_eq!(before_start(false, &folders).await, Rung::Staged);
        assert_eq!(before_start(true, &folders).await, Rung::Absent);
        let with_another = [folders[0].clone(), "/nowhere".into()];
        assert_eq!(before_start(false, &with_another).await, Rung::Cached);
        assert_eq!(before_start(false, &[]).await, Rung::Cached, "there is nothing that could be staged");
    }
}
