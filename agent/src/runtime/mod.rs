//! Starting, probing, adopting and stopping replicas.

pub mod auto;
pub mod docker;
mod ended_logs;
mod expand;
pub mod logs;
mod mounts;
pub mod probe;
pub mod process;
mod run_as;
mod sockets;
mod state;
mod variables;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment};
use tokio::process::Command;

use crate::models::Images;
pub use auto::AnyRuntime;
pub use docker::{DockerRuntime, DockerSettings, GpuMode};
pub use ended_logs::{EndedLog, EndedLogs};
pub use process::ProcessRuntime;
pub use run_as::RunAs;
pub use state::SleepMark;

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
    /// The container's id; `None` for a process of this machine.
    pub container: Option<String>,
    /// Port of this machine by port of the container, where they differ.
    pub ports: BTreeMap<u16, u16>,
}

/// A folder of the host that a replica sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// On the host, absolute.
    pub source: PathBuf,
    /// In the container, absolute, without a `/` at the end.
    pub target: String,
    /// The replica must not write there.
    pub read_only: bool,
}

/// Whether a replica can use its GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuAccess {
    /// It can.
    Usable,
    /// It may not open their devices; why.
    Denied(String),
    /// It has none, or that cannot be found out.
    Unknown,
}

/// How a replica ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, where known: not for replicas of a former agent process.
    pub code: Option<i32>,
    /// Signal that ended it, where known.
    pub signal: Option<i32>,
    /// True where it was killed for using more memory than its limit.
    pub oom_killed: bool,
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
    /// A container engine does not answer as it should.
    #[error("container engine at {socket}: {error}")]
    Engine {
        /// Where it is asked.
        socket: String,
        /// Why.
        error: String,
    },
    /// An image or container cannot be had.
    #[error("{message}")]
    Container {
        /// As Kubernetes names it, such as `ErrImagePull`.
        reason: &'static str,
        /// For people.
        message: String,
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

impl RuntimeError {
    /// CamelCase, as the reasons of Kubernetes' container states.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Specification { .. } => "CreateContainerConfigError",
            Self::Start { .. } | Self::File { .. } | Self::Engine { .. } => "StartError",
            Self::Pause { .. } => "PauseError",
            Self::Container { reason, .. } => reason,
        }
    }
}

/// What is to be run, where nothing that it needs is missing.
fn resolved(assignment: &ReplicaAssignment) -> Result<ContainerSpec, RuntimeError> {
    let container = assignment.container.clone().unwrap_or_default();
    if container.unresolved.is_empty() {
        return Ok(container);
    }
    Err(RuntimeError::Specification { field: "spec.predictor.containers[0].env", reason: container.unresolved })
}

/// Seconds since the Unix epoch.
pub(crate) fn unix_now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64)
}

/// Told how far a replica's image is.
pub type Say<'a> = &'a (dyn Fn(String) + Send + Sync);

/// Runs replicas. What it starts outlives this process and is found again by [`Runtime::adopt`].
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Gets what the replica needs before it can be started, such as its image; may take long. True where
    /// something had to be fetched.
    async fn prepare(&self, _assignment: &ReplicaAssignment, _say: Say<'_>) -> Result<bool, RuntimeError> {
        Ok(false)
    }
    /// Images that it has pulled; `None`: it has no images.
    fn images(&self) -> Option<Arc<dyn Images>> {
        None
    }
    /// Starts a replica that sees `mounts`.
    async fn start(&self, assignment: &ReplicaAssignment, mounts: &[Mount]) -> Result<Running, RuntimeError>;
    /// What runs already, started by this or a former process.
    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError>;
    /// Resolves when the replica has ended.
    async fn exited(&self, running: &Running) -> Exit;
    /// Asks it to end, and makes it after `grace`. Returns when it has.
    async fn stop(&self, running: &Running, grace: Duration);
    /// Halts it where it is, if it is not halted yet; it keeps all its memory, that of GPUs too.
    /// [`Runtime::stop`] works on it as ever.
    async fn pause(&self, running: &Running) -> Result<(), RuntimeError> {
        let (replica, reason) = (running.replica.clone(), "this runtime cannot".to_owned());
        Err(RuntimeError::Pause { what: "pause", replica, reason })
    }
    /// Lets it go on where it was, if it is halted.
    async fn resume(&self, running: &Running) -> Result<(), RuntimeError> {
        let (replica, reason) = (running.replica.clone(), "this runtime cannot".to_owned());
        Err(RuntimeError::Pause { what: "resume", replica, reason })
    }
    /// Main memory that its processes have now, bytes; 0 where unknown. What processes share counts for each.
    async fn memory(&self, running: &Running) -> u64;
    /// Notes how a replica sleeps for a later agent process; `None`: it does not.
    ///
    /// # Errors
    /// The note cannot be written.
    fn mark_sleep(&self, replica: &str, mark: Option<&SleepMark>) -> Result<(), RuntimeError>;
    /// What was noted last; `None`: it does not sleep.
    fn sleep_mark(&self, replica: &str) -> Option<SleepMark>;
    /// Forgets a replica that has ended, with its files.
    async fn remove(&self, replica: &str);
    /// The file with the output of its current run, or of its last run if none runs.
    fn log_file(&self, replica: &str) -> PathBuf;
    /// The file with the output of the run before that; there is none before the first restart.
    fn previous_log_file(&self, replica: &str) -> PathBuf {
        self.log_file(replica).with_file_name(state::PREVIOUS_LOG)
    }
    /// Addresses on which its processes listen, as they see them, sorted; `None` if that cannot be known.
    async fn listeners(&self, _running: &Running) -> Option<Vec<SocketAddr>> {
        None
    }
    /// Records that it is reached at `running.address`, for a later agent process.
    ///
    /// # Errors
    /// The record cannot be written.
    fn record_address(&self, _running: &Running) -> Result<(), RuntimeError> {
        Ok(())
    }
    /// Waits until all that an ended run has printed is in its log file.
    async fn flush_output(&self, _replica: &str) {}
    /// Removes what replicas have left behind that are not running and not to be kept.
    fn remove_others(&self, _keep: &dyn Fn(&str) -> bool) {}
    /// Runs a command where the replica runs, and waits for its end.
    ///
    /// # Errors
    /// It did not end with 0; why.
    async fn exec(&self, _running: &Running, command: &[String]) -> Result<(), String> {
        let [program, args @ ..] = command else { return Err("no command".to_owned()) };
        match Command::new(program).args(args).kill_on_drop(true).output().await {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("{program}: {}", output.status)),
            Err(error) => Err(format!("{program}: {error}")),
        }
    }
    /// Whether the replica can use its GPUs now. Takes about as long as a command in its container.
    async fn gpu_access(&self, _running: &Running) -> GpuAccess {
        GpuAccess::Unknown
    }
    /// The address by which this replica reaches its agent.
    fn host_address(&self, _assignment: &ReplicaAssignment) -> IpAddr {
        Ipv4Addr::LOCALHOST.into()
    }
}
