//! Why a replica failed, in the words of Kubernetes.

use crate::{
    models::ModelError,
    runtime::{Exit, Running, RuntimeError},
};

/// Reason of a replica that a probe has had restarted; the name of Kubernetes' event.
pub(super) const UNHEALTHY: &str = "Unhealthy";
/// Reason of one that was to sleep and did not.
pub(super) const SLEEP_FAILED: &str = "SleepFailed";
/// Reason of one that was to wake and did not.
pub(super) const WAKE_FAILED: &str = "WakeFailed";

/// Reason of one whose model has no room in the node's cache.
pub(super) const CACHE_FULL: &str = "CacheFull";

/// Why a replica failed.
#[derive(Default)]
pub(super) struct Failure {
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) exit_code: Option<i32>,
    /// Bytes in the node's cache that would have to leave for its model.
    pub(super) lacking_bytes: u64,
    /// The last lines that the failed run printed, if one was started.
    pub(super) last_log_lines: Vec<String>,
}

impl Failure {
    pub(super) fn of_exit(exit: Exit) -> Self {
        let (reason, message) = match (exit.code, exit.signal) {
            _ if exit.oom_killed => {
                ("OOMKilled", "the container was killed: it used more memory than its limit".to_owned())
            }
            (Some(0), _) => ("Completed", "the process ended with exit code 0".to_owned()),
            (Some(code), Some(signal)) => {
                ("Error", format!("the process ended with exit code {code}, that is by signal {signal}"))
            }
            (Some(code), None) => ("Error", format!("the process ended with exit code {code}")),
            (None, Some(signal)) => ("Error", format!("the process was ended by signal {signal}")),
            (None, None) => ("Error", "the process ended".to_owned()),
        };
        Self { reason, message, exit_code: exit.code, ..Self::default() }
    }

    /// Adds the last lines that the failed run printed. They may name a cause that the exit code does not show.
    pub(super) fn with_output(mut self, last_log_lines: Vec<String>, running: &Running) -> Self {
        let in_use = |line: &String| {
            let line = line.to_ascii_lowercase();
            line.contains("address already in use") || line.contains("eaddrinuse")
        };
        if running.container.is_none() && last_log_lines.iter().any(in_use) {
            let port = running.address.port();
            self.message += &format!(
                "; another process of this node uses the port that it wants: replicas that are processes must listen on \
                 $PORT ({port} for this one), since they share the node's ports"
            );
        }
        Self { last_log_lines, ..self }
    }

    pub(super) fn of_model(error: &ModelError) -> Self {
        let lacking_bytes = match error {
            ModelError::CacheFull { bytes, budget, kept, .. } => bytes.saturating_add(*kept).saturating_sub(*budget),
            _ => 0,
        };
        Self { reason: error.reason(), message: error.to_string(), lacking_bytes, ..Self::default() }
    }

    pub(super) fn of_error(error: &RuntimeError) -> Self {
        Self { reason: error.reason(), message: error.to_string(), ..Self::default() }
    }
}

/// What Kubernetes calls the pause after this reason: images have a name of their own for it, and what
/// cannot be created or fetched stays what it is.
pub(super) fn in_backoff(reason: &'static str) -> &'static str {
    match reason {
        "ErrImagePull" => "ImagePullBackOff",
        "InvalidImageName"
        | "ErrImageNeverPull"
        | "ImageInspectError"
        | "CreateContainerConfigError"
        | "CreateContainerError"
        | "ModelNotFound"
        | "ModelFetchFailed"
        | "ModelChecksumMismatch"
        | "ModelCacheFailed"
        | CACHE_FULL
        | "DiskFull"
        | "VolumeNotFound" => reason,
        _ => "CrashLoopBackOff",
    }
}
