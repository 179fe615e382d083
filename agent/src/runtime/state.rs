//! What is kept on disk of each replica, so that a later agent process finds it again.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use pilotlight_proto::fleet::v1::{ReplicaAssignment, SleepPaths};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{RuntimeError, ended_logs::EndedLogs};

const STATE: &str = "state.json";
const SLEEP: &str = "sleep.json";
/// Output of the current run, or of the last one if none runs.
pub(super) const LOG: &str = "output.log";
/// Output of the run before that.
pub(super) const PREVIOUS_LOG: &str = "previous.log";

/// A replica's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReplicaState {
    /// Process id; also the number of its process group. 0 before it was started.
    pub pid: u32,
    /// Start time of that process in clock ticks since boot: tells it from a later one with its number.
    pub start_ticks: u64,
    /// Port it was told to listen on.
    pub port: u16,
    /// Where it listens if that is not this port of the loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Seconds since the Unix epoch.
    pub started_at: i64,
    /// The assignment, protobuf, hexadecimal.
    pub assignment: String,
    /// True: it runs in a container, and the engine knows the rest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contained: bool,
}

impl ReplicaState {
    /// Where a process is reached.
    pub(super) fn process_address(&self) -> SocketAddr {
        self.address.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)))
    }

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

/// What is kept on disk of a replica that sleeps, is about to, or is being woken: how it does so.
#[derive(Debug, Clone, PartialEq)]
pub struct SleepMark {
    /// Its server's own endpoints; `None`: it is paused.
    pub paths: Option<SleepPaths>,
    /// True once it sleeps for certain; false on the way into sleep and out of it.
    pub settled: bool,
}

/// The mark as it is in its file.
#[derive(Serialize, Deserialize)]
struct SleepFile {
    /// Sleep, wake, is-sleeping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    paths: Option<(String, String, String)>,
    settled: bool,
}

/// Writes a file whole or not at all. `now`: onto the disk before it returns.
pub(super) fn write_json(path: &Path, value: &impl Serialize, now: bool) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(&mut file, value)?;
    if now {
        file.as_file().sync_all()?;
    }
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// The directories of all replicas.
#[derive(Debug, Clone)]
pub(super) struct Directories {
    root: PathBuf,
    ended_logs: EndedLogs,
}

impl Directories {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { root: data_dir.join("replicas"), ended_logs: EndedLogs::new(data_dir) }
    }

    pub(super) fn of(&self, replica: &str) -> PathBuf {
        self.root.join(replica)
    }

    pub(super) fn make(&self, replica: &str) -> Result<PathBuf, RuntimeError> {
        let directory = self.of(replica);
        fs::create_dir_all(&directory).map_err(|error| RuntimeError::File { path: directory.clone(), error })?;
        Ok(directory)
    }

    /// Writes the record whole or not at all. This is on the way of starting, so it is not forced onto the
    /// disk: what ends the machine ends its replicas, too, and a record that is not whole is none.
    pub(super) fn write(&self, replica: &str, state: &ReplicaState) -> Result<(), RuntimeError> {
        let directory = self.make(replica)?;
        let path = directory.join(STATE);
        write_json(&path, state, false).map_err(|error| RuntimeError::File { path: path.clone(), error })
    }

    /// Writes how a replica sleeps, whole or not at all; removes it where it does not. This is on the way of
    /// waking, so it is not forced onto the disk: what ends the machine ends its replicas, too.
    pub(super) fn mark_sleep(&self, replica: &str, mark: Option<&SleepMark>) -> Result<(), RuntimeError> {
        let path = self.of(replica).join(SLEEP);
        let write = || -> io::Result<()> {
            let Some(SleepMark { paths, settled }) = mark.cloned() else {
                let removed = fs::remove_file(&path);
                return removed
                    .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) });
            };
            let paths = paths.map(|SleepPaths { sleep, wake, is_sleeping }| (sleep, wake, is_sleeping));
            write_json(&path, &SleepFile { paths, settled }, false)
        };
        write().map_err(|error| RuntimeError::File { path: path.clone(), error })
    }

    /// How a replica sleeps, or is about to; `None` where it does not.
    pub(super) fn sleep_mark(&self, replica: &str) -> Option<SleepMark> {
        let path = self.of(replica).join(SLEEP);
        let text = fs::read(&path).ok()?;
        match serde_json::from_slice(&text) {
            Ok(SleepFile { paths, settled }) => {
                let paths = paths.map(|(sleep, wake, is_sleeping)| SleepPaths { sleep, wake, is_sleeping });
                Some(SleepMark { paths, settled })
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot be read; the replica is taken for awake");
                None
            }
        }
    }

    /// Changes where a process is reached in its record.
    pub(super) fn record_address(&self, replica: &str, address: SocketAddr) -> Result<(), RuntimeError> {
        let path = self.of(replica).join(STATE);
        let write = || -> io::Result<()> {
            let state: ReplicaState = serde_json::from_slice(&fs::read(&path)?)?;
            write_json(&path, &ReplicaState { address: Some(address), ..state }, false)
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

    /// Prepares the output file of a new run: what the last run printed becomes the previous output.
    pub(super) fn rotate_log(&self, replica: &str) -> Result<PathBuf, RuntimeError> {
        let directory = self.make(replica)?;
        let path = directory.join(LOG);
        let rotate = || -> io::Result<()> {
            // A run that printed nothing, such as one whose program is missing, leaves nothing to keep.
            if fs::metadata(&path).is_ok_and(|log| log.len() > 0) {
                fs::rename(&path, directory.join(PREVIOUS_LOG))?;
            }
            // Now, so that whoever follows the output finds the next file.
            fs::File::options().create(true).append(true).open(&path).map(drop)
        };
        rotate().map_err(|error| RuntimeError::File { path: path.clone(), error })?;
        Ok(path)
    }

    /// Keeps the last output of a replica that is about to be removed.
    fn keep_log(&self, replica: &str) -> io::Result<()> {
        let directory = self.of(replica);
        let printed = |name: &&str| fs::metadata(directory.join(name)).is_ok_and(|log| log.len() > 0);
        let Some(log) = [LOG, PREVIOUS_LOG].into_iter().find(printed) else { return Ok(()) };
        let state: ReplicaState = serde_json::from_slice(&fs::read(directory.join(STATE))?)?;
        let Some(assignment) = state.assignment() else { return Ok(()) };
        self.ended_logs.keep(&assignment.namespace, &assignment.service, replica, &directory.join(log))
    }

    /// Removes what is left of replicas that are not to be kept.
    pub(super) fn remove_others(&self, keep: &dyn Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        for name in names.filter(|name| !keep(name)) {
            self.remove(&name);
        }
    }

    /// Removes a replica's files; its last output is kept with that of other ended replicas.
    pub(super) fn remove(&self, replica: &str) {
        let directory = self.of(replica);
        if let Err(error) = self.keep_log(replica) {
            tracing::warn!(directory = %directory.display(), %error, "cannot keep the output of an ended replica");
        }
        if let Err(error) = fs::remove_dir_all(&directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %directory.display(), %error, "cannot remove a replica's files");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_replica_sleeps_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let directories = Directories::new(folder.path());
        directories.make("a").unwrap();
        assert_eq!(directories.sleep_mark("a"), None);
        directories.mark_sleep("a", None).unwrap();
        let paths = SleepPaths { sleep: "/sleep?level=1".into(), wake: "/wake_up".into(), is_sleeping: String::new() };
        for (paths, settled) in [(None, false), (None, true), (Some(paths), true)] {
            let mark = SleepMark { paths, settled };
            directories.mark_sleep("a", Some(&mark)).unwrap();
            assert_eq!(directories.sleep_mark("a"), Some(mark));
        }
        directories.mark_sleep("a", None).unwrap();
        assert_eq!(directories.sleep_mark("a"), None);
        assert_eq!(fs::read_dir(directories.of("a")).unwrap().count(), 0, "nothing is left over");
        let nowhere = SleepMark { paths: None, settled: true };
        assert!(directories.mark_sleep("b", Some(&nowhere)).unwrap_err().to_string().contains("b/sleep.json"));
    }
}
