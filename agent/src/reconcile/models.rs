//! A replica's models: fetched before it starts, with progress in its status.

use std::{collections::HashSet, path::PathBuf};

use pilotlight_proto::fleet::v1::{ModelMount, ReplicaAssignment, ReplicaPhase};

use super::Statuses;
use crate::{
    models::{ModelError, Models, Progress, Version, source::Credentials},
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

impl Got {
    fn add(&mut self, model: &ModelMount, source: PathBuf, target: &str) {
        let target = target.trim_end_matches('/').to_owned();
        self.mounts.push(Mount { source, target, read_only: model.read_only });
    }

    /// Adds a model that lies in a volume of the node, where it stays. False where it is none.
    fn add_volume(&mut self, models: &Models, namespace: &str, model: &ModelMount) -> Result<bool, ModelError> {
        if !model.uri.starts_with("pvc://") {
            return Ok(false);
        }
        let (root, below) = models.volume(namespace, &model.uri)?;
        self.add(model, below.clone(), &model.mount_path);
        if !model.claim_root.is_empty() {
            self.add(model, root, &model.claim_root);
        }
        self.folders.push(below);
        Ok(true)
    }

    fn add_folder(&mut self, model: &ModelMount, folder: PathBuf) {
        self.add(model, folder.clone(), &model.mount_path);
        self.folders.push(folder);
    }
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
            return Err(ModelError::Rejected { uri: model.uri.clone(), reason: model.unresolved.clone() });
        }
        if got.add_volume(models, &assignment.namespace, model)? {
            continue;
        }
        let tell = |progress: Progress| {
            statuses.update(&assignment.replica, |status| {
                status.set_phase(ReplicaPhase::Fetching);
                status.fetched_bytes = progress.done;
                status.fetch_total_bytes = progress.total;
                status.message = message(progress);
                status.reason.clear();
            });
        };
        statuses.update(&assignment.replica, |status| {
            status.set_phase(ReplicaPhase::Pending);
            status.message = format!("asking for the files of {}", model.uri);
            status.reason.clear();
        });
        let here = whole(models);
        let folder = models.ensure_from(&model.uri, &credentials(model), &model.peers, tell).await?;
        got.fetched |= !here.contains(&folder);
        got.add_folder(model, folder);
    }
    Ok(got)
}

/// All models of a replica as they were when it, or another one with the same credentials, had them last:
/// no store is asked. `None` where one is not here, or was not asked for since this process began.
pub(super) fn as_before(models: &Models, assignment: &ReplicaAssignment) -> Option<(Got, Vec<Version>)> {
    let (mut got, mut versions) = (Got::default(), Vec::new());
    for model in &assignment.models {
        if !model.unresolved.is_empty() {
            return None;
        }
        if got.add_volume(models, &assignment.namespace, model).ok()? {
            continue;
        }
        let (version, folder) = models.before(&model.uri, &credentials(model))?;
        got.add_folder(model, folder);
        versions.push(version);
    }
    Some((got, versions))
}

fn credentials(model: &ModelMount) -> Credentials {
    model.credentials.iter().map(|given| (given.name.clone(), given.value.clone())).collect()
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
