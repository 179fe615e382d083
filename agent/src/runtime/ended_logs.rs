//! Output of replicas that have ended: `<data>/ended-logs/<namespace>/<service>/<replica>.log`, within a budget.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    time::SystemTime,
};

/// Ended replicas of one node whose output is kept, at most.
pub const MAX_ENDED_LOGS: usize = 200;
/// Bytes that the output of all ended replicas of one node takes, at most.
pub const MAX_ENDED_LOG_BYTES: u64 = 256 << 20;

const SUFFIX: &str = ".log";

/// The output that one ended replica has left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedLog {
    /// Name of the replica.
    pub replica: String,
    /// File with the output of its last run.
    pub path: PathBuf,
    ended_at: SystemTime,
    bytes: u64,
}

/// The output of a node's ended replicas. The directories are its only state, so that it survives the agent.
#[derive(Debug, Clone)]
pub struct EndedLogs {
    root: PathBuf,
    max_logs: usize,
    max_bytes: u64,
}

impl EndedLogs {
    /// Those of the agent whose data is in `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self { root: data_dir.join("ended-logs"), max_logs: MAX_ENDED_LOGS, max_bytes: MAX_ENDED_LOG_BYTES }
    }

    /// Moves the output of a replica that has ended here, and removes the oldest output that exceeds the budget.
    ///
    /// # Errors
    /// A name cannot be part of a path, or the files cannot be moved.
    pub(super) fn keep(&self, namespace: &str, service: &str, replica: &str, log: &Path) -> io::Result<()> {
        let directory = self.directory(namespace, service)?;
        let path = directory.join(checked(replica)?.to_owned() + SUFFIX);
        fs::create_dir_all(&directory)?;
        fs::rename(log, &path)?;
        // Its age is counted from its end, not from the last line that it printed.
        fs::File::options().append(true).open(&path)?.set_modified(SystemTime::now())?;
        self.remove_oldest()
    }

    /// The output of a service's ended replicas, the one that ended last at the end.
    pub fn of_service(&self, namespace: &str, service: &str) -> Vec<EndedLog> {
        self.directory(namespace, service).map(|directory| logs_in(&directory)).unwrap_or_default()
    }

    fn directory(&self, namespace: &str, service: &str) -> io::Result<PathBuf> {
        Ok(self.root.join(checked(namespace)?).join(checked(service)?))
    }

    fn remove_oldest(&self) -> io::Result<()> {
        let services = directories_in(&self.root).into_iter().flat_map(|namespace| directories_in(&namespace));
        let mut logs: Vec<_> = services.flat_map(|service| logs_in(&service)).collect();
        logs.sort_by_key(|log| std::cmp::Reverse(log.ended_at));
        let mut bytes = 0;
        for (index, log) in logs.iter().enumerate() {
            bytes += log.bytes;
            if index >= self.max_logs || bytes > self.max_bytes {
                fs::remove_file(&log.path)?;
                // The directories of its service and namespace stay if they hold other output.
                let parents = log.path.ancestors().skip(1).take(2);
                let _ = parents.map(fs::remove_dir).take_while(Result::is_ok).count();
            }
        }
        Ok(())
    }
}

/// A name that is one plain part of a path.
fn checked(name: &str) -> io::Result<&str> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(name),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot be the name of a file"))),
    }
}

fn directories_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn logs_in(directory: &Path) -> Vec<EndedLog> {
    let log = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        Some(EndedLog {
            replica: name.strip_suffix(SUFFIX)?.to_owned(),
            path: entry.path(),
            ended_at: metadata.modified().ok()?,
            bytes: metadata.len(),
        })
    };
    let mut logs: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().filter_map(log).collect();
    logs.sort_by_key(|log| log.ended_at);
    logs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(logs: &EndedLogs, service: &str) -> Vec<String> {
        logs.of_service("default", service).into_iter().map(|log| log.replica).collect()
    }

    #[test]
    fn output_of_ended_replicas_is_kept_within_its_budget_and_the_oldest_goes_first() {
        let data = tempfile::tempdir().unwrap();
        let logs = EndedLogs { max_logs: 3, max_bytes: 100, ..EndedLogs::new(data.path()) };
        let keep = |service: &str, replica: &str, bytes: usize| {
            let log = data.path().join("output.log");
            fs::write(&log, vec![b'x'; bytes]).unwrap();
            logs.keep("default", service, replica, &log).unwrap();
            assert!(!log.exists());
        };
        for replica in ["a", "b", "c"] {
            keep("iris", replica, 10);
        }
        assert_eq!(names(&logs, "iris"), ["a", "b", "c"]);
        keep("other", "d", 10);
        assert_eq!((names(&logs, "iris"), names(&logs, "other")), (vec!["b".into(), "c".into()], vec!["d".into()]));
        keep("other", "e", 85);
        // Another agent process finds the same.
        let logs = EndedLogs::new(data.path());
        assert_eq!((names(&logs, "iris"), names(&logs, "other")), (vec![], vec!["d".into(), "e".into()]));
        assert!(!data.path().join("ended-logs/default/iris").exists(), "no empty directory is left");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let data = tempfile::tempdir().unwrap();
        let logs = EndedLogs::new(data.path());
        for name in ["", ".", "..", "a/b", "/etc", "a/"] {
            assert!(logs.keep("default", name, "a", &data.path().join("log")).is_err(), "{name:?}");
            assert!(logs.of_service(name, "iris").is_empty());
        }
    }
}
