//! What containers see at paths: volumes of the assignment as mounts of this node.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown},
    path::{Component, Path, PathBuf},
};

use bollard::models::{Mount, MountTmpfsOptions, MountType};
use pilotlight_proto::fleet::v1::{
    ContainerSpec, EmptyDir, Files, HostPath, ReplicaAssignment, Volume, volume::Source,
};

use super::RuntimeError;

/// Where the size of shared memory is what matters.
pub(super) const SHM: &str = "/dev/shm";

/// Where this node keeps what volumes are made of.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// `hostPath` volumes must be below one of these.
    pub(super) host_roots: Vec<PathBuf>,
    /// Directory by name of a claim, or by `<namespace>/<name>`.
    pub(super) claims: BTreeMap<String, PathBuf>,
    /// For files of secrets; in memory where the node has such a place.
    pub(super) secrets: PathBuf,
}

/// A container's mounts.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Mounts {
    /// All but shared memory.
    pub(super) mounts: Vec<Mount>,
    /// Bytes of shared memory, where a volume in memory is mounted there.
    pub(super) shm_size: Option<u64>,
}

/// A directory or file of this node, seen at `target`.
pub(super) fn bind(source: &Path, target: &str, read_only: bool) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(source.to_string_lossy().into_owned()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        ..Mount::default()
    }
}

fn refused(volume: &str, why: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Specification { field: "spec.predictor.volumes", reason: format!("volume {volume:?}: {why}") }
}

impl Places {
    /// The mounts of `container`, made where they must be. `own` is the replica's directory; `user` is who
    /// reads the files of secrets, where known.
    pub(super) fn mounts(
        &self,
        assignment: &ReplicaAssignment,
        container: &ContainerSpec,
        own: &Path,
        user: Option<u32>,
    ) -> Result<Mounts, RuntimeError> {
        let mut mounts = Mounts::default();
        for mount in &container.mounts {
            let name = &mount.volume;
            let volume = assignment.volumes.iter().find(|volume| volume.name == *name);
            let volume = volume.ok_or_else(|| refused(name, "is mounted, and not among the volumes"))?;
            if !volume.unresolved.is_empty() {
                return Err(refused(name, &volume.unresolved));
            }
            if let Some(Source::EmptyDir(EmptyDir { memory: true, size_limit })) = volume.source {
                if !mount.sub_path.is_empty() {
                    return Err(refused(name, "subPath has no meaning for an emptyDir in memory"));
                }
                if mount.path == SHM && !mount.read_only {
                    mounts.shm_size = Some(size_limit);
                } else {
                    mounts.mounts.push(in_memory(&mount.path, size_limit, mount.read_only));
                }
                continue;
            }
            let root = self.directory(volume, assignment, own, user)?;
            let source = below(&root, &mount.sub_path).map_err(|why| refused(name, why))?;
            mounts.mounts.push(bind(&source, &mount.path, mount.read_only || volume.read_only));
        }
        Ok(mounts)
    }

    fn directory(
        &self,
        volume: &Volume,
        assignment: &ReplicaAssignment,
        own: &Path,
        user: Option<u32>,
    ) -> Result<PathBuf, RuntimeError> {
        let refuse = |why: String| refused(&volume.name, why);
        let usable = plain(&volume.name);
        let name = usable.ok_or_else(|| refuse("the name must be a plain word".to_owned()))?;
        match &volume.source {
            Some(Source::EmptyDir(_)) => {
                let path = own.join("volumes").join(name);
                fs::create_dir_all(&path)
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o777)))
                    .map_err(|error| RuntimeError::File { path: path.clone(), error })?;
                Ok(path)
            }
            Some(Source::HostPath(host)) => self.host_path(host).map_err(refuse),
            Some(Source::Claim(claim)) => self.claim(&assignment.namespace, claim).map_err(refuse),
            Some(Source::Files(files)) => {
                let path = self.secrets.join(&assignment.replica).join(name);
                write_files(&path, files, user).map_err(|error| RuntimeError::File { path: path.clone(), error })?;
                Ok(path)
            }
            None => Err(refuse("has no source that this agent knows".to_owned())),
        }
    }

    fn host_path(&self, host: &HostPath) -> Result<PathBuf, String> {
        let path = Path::new(&host.path);
        let shown = path.display();
        let roots = || match self.host_roots.as_slice() {
            [] => "this node allows none; see --host-path-root".to_owned(),
            roots => format!(
                "must be below one of this node's: {}",
                roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", ")
            ),
        };
        let allowed = |path: &Path| self.host_roots.iter().any(|root| path.starts_with(root));
        let plain = path.is_absolute() && path.components().all(|part| part != Component::ParentDir);
        if !plain || !allowed(path) {
            return Err(format!("hostPath {shown}: {}", roots()));
        }
        if host.create {
            fs::create_dir_all(path).map_err(|error| format!("hostPath {shown}: {error}"))?;
        }
        // A link may lead out again.
        let real = path.canonicalize().map_err(|error| format!("hostPath {shown}: {error}"))?;
        let real_roots: Vec<_> = self.host_roots.iter().filter_map(|root| root.canonicalize().ok()).collect();
        if !real_roots.iter().any(|root| real.starts_with(root)) {
            return Err(format!("hostPath {shown} leads to {}: {}", real.display(), roots()));
        }
        Ok(real)
    }

    fn claim(&self, namespace: &str, claim: &str) -> Result<PathBuf, String> {
        let path = crate::config::claim(&self.claims, namespace, claim)?;
        path.canonicalize().map_err(|error| format!("persistentVolumeClaim {claim:?}: {}: {error}", path.display()))
    }

    /// Removes the files of a replica's secrets.
    pub(super) fn remove(&self, replica: &str) {
        let path = self.secrets.join(replica);
        if let Err(error) = fs::remove_dir_all(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove a replica's secrets");
        }
    }

    /// Removes the files of secrets of replicas that are not to be kept.
    pub(super) fn remove_others(&self, keep: &dyn Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(&self.secrets) else { return };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| !keep(name)).for_each(|name| self.remove(&name));
    }
}

fn in_memory(target: &str, size: u64, read_only: bool) -> Mount {
    let size_bytes = i64::try_from(size).ok().filter(|size| *size > 0);
    Mount {
        typ: Some(MountType::TMPFS),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        tmpfs_options: Some(MountTmpfsOptions { size_bytes, mode: Some(0o1777), ..MountTmpfsOptions::default() }),
        ..Mount::default()
    }
}

/// A name that is one component of a path.
fn plain(name: &str) -> Option<&str> {
    let mut components = Path::new(name).components();
    let one = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    one.then_some(name)
}

/// A part of a volume that is there and does not lead out of it.
fn below(root: &Path, sub_path: &str) -> Result<PathBuf, String> {
    if sub_path.is_empty() {
        return Ok(root.to_owned());
    }
    let real = root.canonicalize().map_err(|error| format!("{}: {error}", root.display()))?;
    let path = real.join(sub_path);
    if !Path::new(sub_path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(format!("subPath {sub_path:?} must be relative and without .."));
    }
    let found = path.canonicalize().map_err(|error| format!("subPath {sub_path:?}: {error}"))?;
    if found.starts_with(&real) { Ok(found) } else { Err(format!("subPath {sub_path:?} leads out of the volume")) }
}

/// Writes the files anew, readable by `user` alone, where known; nobody else of this node gets to them,
/// since the directory above is closed.
fn write_files(directory: &Path, files: &Files, user: Option<u32>) -> io::Result<()> {
    if let Some(parent) = directory.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o755).create(directory)?;
    for (name, content) in &files.files {
        let relative = Path::new(name);
        if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(io::Error::other(format!("{name:?} must be relative and without ..")));
        }
        let path = directory.join(relative);
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        fs::write(&path, content)?;
        // Only root may give files away; another agent's containers are of its own user.
        let given = user.is_some_and(|user| chown(&path, Some(user), None).is_ok());
        fs::set_permissions(&path, fs::Permissions::from_mode(if given { 0o400 } else { 0o444 }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use pilotlight_proto::fleet::v1::VolumeMount;

    use super::*;

    fn places(root: &Path) -> Places {
        Places {
            host_roots: vec![root.join("allowed")],
            claims: BTreeMap::from([
                ("models".to_owned(), root.join("models")),
                ("team/models".to_owned(), root.join("theirs")),
            ]),
            secrets: root.join("secrets"),
        }
    }

    /// The mounts of one volume, mounted at `path`.
    fn mounted(root: &Path, source: Source, path: &str, sub_path: &str) -> Result<Mounts, String> {
        let volume = Volume { name: "v".into(), source: Some(source), ..Default::default() };
        let assignment = ReplicaAssignment {
            replica: "r".into(),
            namespace: "default".into(),
            volumes: vec![volume],
            ..Default::default()
        };
        let mount =
            VolumeMount { volume: "v".into(), path: path.into(), sub_path: sub_path.into(), ..Default::default() };
        let container = ContainerSpec { mounts: vec![mount], ..Default::default() };
        let own = root.join("replica");
        places(root).mounts(&assignment, &container, &own, Some(1000)).map_err(|error| error.to_string())
    }

    #[test]
    fn host_paths_stay_below_what_the_node_allows() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("allowed/data")).unwrap();
        symlink("/etc", root.join("allowed/link")).unwrap();
        let at = |path: PathBuf| Source::HostPath(HostPath { path: path.to_string_lossy().into(), create: false });
        let found = mounted(&root, at(root.join("allowed/data")), "/data", "").unwrap();
        assert_eq!(found.mounts, [bind(&root.join("allowed/data"), "/data", false)]);
        for bad in ["allowed/link", "other", "allowed/../other", "allowed/none"] {
            let error = mounted(&root, at(root.join(bad)), "/data", "").unwrap_err();
            assert!(error.contains("hostPath"), "{bad}: {error}");
        }
        let made = Source::HostPath(HostPath { path: root.join("allowed/new").to_string_lossy().into(), create: true });
        mounted(&root, made, "/data", "").unwrap();
    }

    #[test]
    fn claims_are_found_by_namespace_first_and_a_missing_one_lists_the_known() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("models/a")).unwrap();
        symlink("/etc", root.join("models/link")).unwrap();
        let claim = |name: &str| Source::Claim(name.to_owned());
        let found = mounted(&root, claim("models"), "/m", "a").unwrap();
        assert_eq!(found.mounts, [bind(&root.join("models/a"), "/m", false)]);
        let error = mounted(&root, claim("none"), "/m", "").unwrap_err();
        assert!(error.contains("known are: models, team/models"), "{error}");
        assert!(mounted(&root, claim("models"), "/m", "link").unwrap_err().contains("leads out"));
        assert!(mounted(&root, claim("models"), "/m", "../x").unwrap_err().contains("without .."));
        assert!(
            places(&root).claim("team", "models").unwrap_err().contains("theirs"),
            "the namespace's own comes first"
        );
    }

    #[test]
    fn memory_at_dev_shm_is_its_size_and_elsewhere_a_mount() {
        let directory = tempfile::tempdir().unwrap();
        let memory = || Source::EmptyDir(EmptyDir { memory: true, size_limit: 1 << 20 });
        let shm = mounted(directory.path(), memory(), SHM, "").unwrap();
        assert_eq!(shm, Mounts { mounts: vec![], shm_size: Some(1 << 20) });
        let elsewhere = mounted(directory.path(), memory(), "/cache", "").unwrap();
        assert_eq!(elsewhere.mounts[0].tmpfs_options.as_ref().unwrap().size_bytes, Some(1 << 20));
        assert_eq!(elsewhere.shm_size, None);
    }

    #[test]
    fn secrets_are_files_that_only_the_container_reads() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files { files: [("a/token".to_owned(), b"x".to_vec())].into() };
        let source = Source::Files(files.clone());
        mounted(directory.path(), source.clone(), "/s", "").unwrap();
        // Again: the container was started anew.
        let found = mounted(directory.path(), source, "/s", "").unwrap();
        let root = PathBuf::from(found.mounts[0].source.clone().unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let file = root.join("a/token");
        assert_eq!(fs::read(&file).unwrap(), b"x");
        // Given away where this test runs as root.
        let uid = fs::metadata(&file).unwrap().uid();
        assert_eq!(mode(&file), if uid == 1000 { 0o400 } else { 0o444 });
        assert_eq!(mode(root.parent().unwrap()), 0o700);
        let leads_out = Files { files: [("../x".to_owned(), Vec::new())].into() };
        assert!(mounted(directory.path(), Source::Files(leads_out), "/s", "").is_err());
        places(directory.path()).remove_others(&|_| false);
        assert!(!root.exists());
    }
}
