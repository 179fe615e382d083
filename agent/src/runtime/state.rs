//! What is kept on disk of each replica, so that a later agent process finds it again.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use pilotlight_proto::fleet::v1::ReplicaAssignment;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::RuntimeError;

const STATE: &str = "state.json";
pub(super) const LOG: &str = "output.log";

/// A replica's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReplicaState {
    /// Process id; also the number of its process group. 0 before it was started.
    pub pid: u32,
    /// Start time of that process in clock ticks since boot: tells it from a later one with its number.
    pub start_ticks: u64,
    /// Port it was told to listen on.
    pub port: u16,
    /// Seconds since the Unix epoch.
    pub started_at: i64,
    /// The assignment, protobuf, hexadecimal.
    pub assignment: String,
    /// True: it runs in a container, and the engine knows the rest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contained: bool,
}

impl ReplicaState {
    pub(super) fn assignment(&self) -> Option<ReplicaAssignment> {
        let bytes: Option<Vec<u8>> = (0..self.assignment.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(self.assignment.get(at..at + 2)?, 16).ok())
            .collect();
        ReplicaAssignment::decode(bytes?.as_slice()).ok()
    }

    pub(super) fn encode(assignment: &ReplicaAssignment) -> String {
        assignment.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The directories of all replicas.
#[derive(Debug, Clone)]
pub(super) struct Directories {
    root: PathBuf,
}

impl Directories {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { root: data_dir.join("replicas") }
    }

    pub(super) fn of(&self, replica: &str) -> PathBuf {
        self.root.join(replica)
    }

    pub(super) fn make(&self, replica: &str) -> Result<PathBuf, RuntimeError> {
        let directory = self.of(replica);
        fs::create_dir_all(&directory).map_err(|error| RuntimeError::File { path: directory.clone(), error })?;
        Ok(directory)
    }

    /// Writes the record whole or not at all.
    pub(super) fn write(&self, replica: &str, state: &ReplicaState) -> Result<(), RuntimeError> {
        let directory = self.make(replica)?;
        let path = directory.join(STATE);
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&directory)?;
            serde_json::to_writer(&mut file, state)?;
            file.flush()?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(|error| RuntimeError::File { path: path.clone(), error })
    }

    /// All records that can be read, by replica.
    pub(super) fn read_all(&self) -> Vec<(String, ReplicaState)> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        let read = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let text = fs::read(entry.path().join(STATE)).ok()?;
            match serde_json::from_slice(&text) {
                Ok(state) => Some((name, state)),
                Err(error) => {
                    tracing::warn!(replica = %name, %error, "record cannot be read; left alone");
                    None
                }
            }
        };
        entries.flatten().filter_map(read).collect()
    }

    /// Removes what is left of replicas that are not to be kept.
    pub(super) fn remove_others(&self, keep: &dyn Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        for name in names.filter(|name| !keep(name)) {
            self.remove(&name);
        }
    }

    pub(super) fn remove(&self, replica: &str) {
        let directory = self.of(replica);
        if let Err(error) = fs::remove_dir_all(&directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %directory.display(), %error, "cannot remove a replica's files");
        }
    }
}
