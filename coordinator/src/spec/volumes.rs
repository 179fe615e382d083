//! `volumes` and `volumeMounts`.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1 as k8s;
use serde_json::Value;

use super::{documents::join, quantity, report::Report};

/// Sources of volumes that the fleet knows.
const KNOWN: [&str; 5] = ["persistentVolumeClaim", "hostPath", "emptyDir", "secret", "configMap"];

/// Checks the volumes at `at` and gives those that could be had.
pub(super) fn read(given: &[k8s::Volume], raw: &Value, at: &str, report: &mut Report) -> Vec<k8s::Volume> {
    let mut names = BTreeSet::new();
    for (index, volume) in given.iter().enumerate() {
        let at = format!("{at}[{index}]");
        if volume.name.is_empty() || !names.insert(&volume.name) {
            report.error(join(&at, "name"), &volume.name, "must be given, and be unique among the volumes");
        }
        let fields = raw[index].as_object();
        let sources: Vec<&str> =
            fields.into_iter().flatten().map(|(key, _)| key.as_str()).filter(|key| *key != "name").collect();
        match sources[..] {
            [source] if KNOWN.contains(&source) => check_source(volume, &at, report),
            [source] => report.error(join(&at, source), "", format!("is not one of the known: {}", KNOWN.join(", "))),
            [] => report.error(&at, "", format!("must have a source: {}", KNOWN.join(", "))),
            _ => report.error(&at, sources.join(", "), "must have one source"),
        }
    }
    given.to_vec()
}

fn check_source(volume: &k8s::Volume, at: &str, report: &mut Report) {
    if let Some(claim) = &volume.persistent_volume_claim
        && claim.claim_name.is_empty()
    {
        report.error(join(at, "persistentVolumeClaim.claimName"), "", "must be given");
    }
    if let Some(path) = &volume.host_path
        && (!path.path.starts_with('/') || path.path.split('/').any(|part| part == ".."))
    {
        report.error(format!("{at}.hostPath.path"), &path.path, "must be absolute and without ..");
    }
    if let Some(directory) = &volume.empty_dir {
        let medium = directory.medium.as_deref().unwrap_or_default();
        if !["", "Memory"].contains(&medium) {
            report.error(format!("{at}.emptyDir.medium"), medium, "must be Memory, or be left out");
        }
        if let Some(limit) = &directory.size_limit
            && let Err(error) = quantity::units(&limit.0)
        {
            report.error(format!("{at}.emptyDir.sizeLimit"), &limit.0, error.to_string());
        }
    }
    if let Some(secret) = &volume.secret
        && secret.secret_name.as_deref().unwrap_or_default().is_empty()
    {
        report.error(format!("{at}.secret.secretName"), "", "must be given");
    }
    if let Some(map) = &volume.config_map
        && map.name.is_empty()
    {
        report.error(format!("{at}.configMap.name"), "", "must be given");
    }
}

/// Checks one container's mounts against the pod's volumes.
pub(super) fn read_mounts(
    container: &k8s::Container,
    volumes: &[k8s::Volume],
    at: &str,
    report: &mut Report,
) -> Vec<k8s::VolumeMount> {
    let mounts = container.volume_mounts.clone().unwrap_or_default();
    let mut paths = BTreeMap::new();
    for (index, mount) in mounts.iter().enumerate() {
        let at = format!("{at}[{index}]");
        if !volumes.iter().any(|volume| volume.name == mount.name) {
            report.error(join(&at, "name"), &mount.name, "must be the name of one of the volumes");
        }
        if !mount.mount_path.starts_with('/') || mount.mount_path.contains(':') {
            report.error(join(&at, "mountPath"), &mount.mount_path, "must be absolute and hold no ':'");
        }
        if paths.insert(&mount.mount_path, index).is_some() {
            report.error(join(&at, "mountPath"), &mount.mount_path, "must be used once only");
        }
        let sub_path = mount.sub_path.as_deref().unwrap_or_default();
        if sub_path.starts_with('/') || sub_path.split('/').any(|part| part == "..") {
            report.error(join(&at, "subPath"), sub_path, "must be relative and without ..");
        }
        if mount.sub_path_expr.as_deref().is_some_and(|path| !path.is_empty()) {
            report.error(join(&at, "subPathExpr"), "", "is not supported; use subPath");
        }
    }
    mounts
}
