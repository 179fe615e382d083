//! A replica's models: fetched before it starts, with progress in its status.

use std::{collections::HashSet, path::PathBuf};

use pilotlight_proto::fleet::v1::{ReplicaAssignment, ReplicaPhase};

use super::Statuses;
use crate::{
    models::{ModelError, Models, Progress, source::Credentials},
    runtime::Mount,
};

/// A replica's models, in place.
#[derive(Debug, Default)]
pub(super) struct Got {
    /// Where the replica sees them.
    pub(super) mounts: Vec<Mount>,
    /// Where each is on this node.
    pub(super) folders: Vec<PathBuf>,
    /// True where one was not here whole before.
    pub(super) fetched: bool,
}

/// Has all models of a replica in place, one after another.
pub(super) async fn fetch(
    models: &Models,
    assignment: &ReplicaAssignment,
    statuses: &Statuses,
) -> Result<Got, ModelError> {
    let mut got = Got::default();
    for model in &assignment.models {
        if !model.unresolved.is_empty() {
            return Err(ModelError::Source { uri: model.uri.clone(), reason: model.unresolved.clone() });
        }
        let mut add = |source, target: &str| {
            let target = target.trim_end_matches('/').to_owned();
            got.mounts.push(Mount { source, target, read_only: model.read_only });
        };
        if model.uri.starts_with("pvc://") {
            let (root, below) = models.volume(&assignment.namespace, &model.uri)?;
            add(below.clone(), &model.mount_path);
            if !model.claim_root.is_empty() {
                add(root, &model.claim_root);
            }
            got.folders.push(below);
            continue;
        }
        let credentials: Credentials =
            model.credentials.iter().map(|given| (given.name.clone(), given.value.clone())).collect();
        let tell = |progress: Progress| {
            statuses.update(&assignment.replica, |status| {
                status.set_phase(ReplicaPhase::Fetching);
                status.fetched_bytes = progress.done;
                status.fetch_total_bytes = progress.total;
                status.message = message(progress);
                status.reason.clear();
            });
        };
        let here = whole(models);
        let folder = models.ensure_from(&model.uri, &credentials, &model.peers, tell).await?;
        add(folder.clone(), &model.mount_path);
        got.fetched |= !here.contains(&folder);
        got.folders.push(folder);
    }
    Ok(got)
}

/// Folders of all models that are here whole.
fn whole(models: &Models) -> HashSet<PathBuf> {
    models.report().borrow().models.iter().map(|model| models.cache().files(&model.key)).collect()
}

/// In whole percent: each new one is a sign of progress, and there are at most a hundred.
fn message(progress: Progress) -> String {
    match (progress.done * 100).checked_div(progress.total) {
        Some(percent) => format!("fetching model: {percent}% of {} MiB", progress.total >> 20),
        None => "fetching model: looking at what there is".to_owned(),
    }
}
