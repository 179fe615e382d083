//! What containers see and may do, as agents get it. Secrets are filled in here.

use k8s_openapi::api::core::v1::{KeyToPath, Volume, VolumeMount};
use pilotlight_proto::fleet::v1::{self as fleet, volume::Source};

use crate::{
    spec::{AuxiliaryKind, Container, Security, default_pull_policy, quantity},
    values::Values,
};

/// Key of a Secret of type `kubernetes.io/dockerconfigjson`.
const REGISTRY_CONFIG: &str = ".dockerconfigjson";

/// When the image is pulled, said in full.
pub(super) fn pull_policy(container: &Container) -> String {
    let given = container.image_pull_policy.clone();
    given.unwrap_or_else(|| default_pull_policy(&container.image).to_owned())
}

pub(super) fn security(security: &Security) -> fleet::SecurityContext {
    fleet::SecurityContext {
        run_as_user: security.run_as_user,
        run_as_group: security.run_as_group,
        run_as_non_root: security.run_as_non_root,
        read_only_root_filesystem: security.read_only_root_filesystem,
        add_capabilities: security.add_capabilities.clone(),
        supplemental_groups: security.supplemental_groups.clone(),
    }
}

pub(super) fn mount(mount: &VolumeMount) -> fleet::VolumeMount {
    fleet::VolumeMount {
        volume: mount.name.clone(),
        path: mount.mount_path.clone(),
        sub_path: mount.sub_path.clone().unwrap_or_default(),
        read_only: mount.read_only == Some(true),
    }
}

/// The contents of the secrets that are there; an image that needs one that is not cannot be pulled, and
/// then its registry says so.
pub(super) fn registry_configs(values: &Values, namespace: &str, secrets: &[String]) -> Vec<String> {
    let config = |name: &String| {
        let secret = values.get(AuxiliaryKind::Secret, namespace, name)?;
        String::from_utf8(secret.data.0.get(REGISTRY_CONFIG)?.clone()).ok()
    };
    secrets.iter().filter_map(config).collect()
}

pub(super) fn volumes(values: &Values, namespace: &str, volumes: &[Volume]) -> Vec<fleet::Volume> {
    volumes.iter().map(|given| volume(values, namespace, given)).collect()
}

fn volume(values: &Values, namespace: &str, given: &Volume) -> fleet::Volume {
    let mut volume = fleet::Volume { name: given.name.clone(), ..Default::default() };
    let files = |kind, name: &str, items: &Option<Vec<KeyToPath>>, optional: Option<bool>| {
        files(values, kind, namespace, name, items.as_deref(), optional == Some(true))
    };
    let source = if let Some(directory) = &given.empty_dir {
        let size_limit = directory.size_limit.as_ref().and_then(|limit| quantity::units(&limit.0).ok());
        Ok(Source::EmptyDir(fleet::EmptyDir {
            memory: directory.medium.as_deref() == Some("Memory"),
            size_limit: size_limit.unwrap_or(0),
        }))
    } else if let Some(host) = &given.host_path {
        let create = host.type_.as_deref() == Some("DirectoryOrCreate");
        Ok(Source::HostPath(fleet::HostPath { path: host.path.clone(), create }))
    } else if let Some(claim) = &given.persistent_volume_claim {
        volume.read_only = claim.read_only == Some(true);
        Ok(Source::Claim(claim.claim_name.clone()))
    } else if let Some(secret) = &given.secret {
        let name = secret.secret_name.as_deref().unwrap_or_default();
        files(AuxiliaryKind::Secret, name, &secret.items, secret.optional)
    } else if let Some(map) = &given.config_map {
        files(AuxiliaryKind::ConfigMap, &map.name, &map.items, map.optional)
    } else {
        Err("has no source".to_owned())
    };
    // Values are not the container's to change.
    volume.read_only |= matches!(source, Ok(Source::Files(_)));
    match source {
        Ok(source) => volume.source = Some(source),
        Err(missing) => volume.unresolved = missing,
    }
    volume
}

/// The values as files: all of them by their keys, or those of `items` at their paths.
fn files(
    values: &Values,
    kind: AuxiliaryKind,
    namespace: &str,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: bool,
) -> Result<Source, String> {
    let what = format!("{kind} {namespace}/{name}");
    let files = match (values.get(kind, namespace, name), items) {
        (None, _) if optional => Default::default(),
        (None, _) => return Err(format!("{what} is not there")),
        (Some(object), None) => object.data.0.clone().into_iter().collect(),
        (Some(object), Some(items)) => {
            let mut files = std::collections::HashMap::new();
            for item in items {
                match object.data.0.get(&item.key) {
                    Some(value) => drop(files.insert(item.path.clone(), value.clone())),
                    None if optional => {}
                    None => return Err(format!("{what} has no key {}", item.key)),
                }
            }
            files
        }
    };
    Ok(Source::Files(fleet::Files { files }))
}
