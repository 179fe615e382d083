//! Starting, probing, adopting and stopping replicas.

mod expand;
pub mod logs;
pub mod probe;
pub mod process;
mod state;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use async_trait::async_trait;
use pilotlight_proto::fleet::v1::ReplicaAssignment;

pub use process::ProcessRuntime;

/// A replica that runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    /// Its name.
    pub replica: String,
    /// Process id.
    pub pid: u32,
    /// Where its server listens, or will.
    pub address: SocketAddr,
    /// When it was started, seconds since the Unix epoch.
    pub started_at: i64,
    /// What it was started from.
    pub assignment: ReplicaAssignment,
}

/// How a replica ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, where known: not for replicas of a former agent process.
    pub code: Option<i32>,
    /// Signal that ended it, where known.
    pub signal: Option<i32>,
}

/// Why a runtime did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The specification cannot be run here.
    #[error("{field}: {reason}")]
    Specification {
        /// Which part.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// The process cannot be started.
    #[error("cannot start {program}: {error}")]
    Start {
        /// Which program.
        program: String,
        /// Why.
        error: std::io::Error,
    },
    /// A file of the replica cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The replica cannot be paused or resumed.
    #[error("cannot {what} {replica}: {reason}")]
    Pause {
        /// "pause" or "resume".
        what: &'static str,
        /// Which replica.
        replica: String,
        /// Why.
        reason: String,
    },
}

/// Runs replicas. What it starts outlives this process and is found again by [`Runtime::adopt`].
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Starts a replica.
    async fn start(&self, assignment: &ReplicaAssignment) -> Result<Running, RuntimeError>;
    /// What runs already, started by this or a former process.
    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError>;
    /// Resolves when the replica has ended.
    async fn exited(&self, running: &Running) -> Exit;
    /// Asks it to end, and makes it after `grace`. Returns when it has.
    async fn stop(&self, running: &Running, grace: Duration);
    /// Halts it where it is; it keeps all its memory, that of GPUs too. [`Runtime::stop`] works on it as ever.
    async fn pause(&self, running: &Running) -> Result<(), RuntimeError> {
        let (replica, reason) = (running.replica.clone(), "this runtime cannot".to_owned());
        Err(RuntimeError::Pause { what: "pause", replica, reason })
    }
    /// Lets it go on where it was.
    async fn resume(&self, running: &Running) -> Result<(), RuntimeError> {
        let (replica, reason) = (running.replica.clone(), "this runtime cannot".to_owned());
        Err(RuntimeError::Pause { what: "resume", replica, reason })
    }
    /// Forgets a replica that has ended, with its files.
    async fn remove(&self, replica: &str);
    /// Where its output is.
    fn log_file(&self, replica: &str) -> PathBuf;
}
