//! Why a replica failed, in the words of Kubernetes.

use crate::{
    models::ModelError,
    runtime::{Exit, Running, RuntimeError},
};

/// Reason of a replica that a probe has had restarted; the name of Kubernetes' event.
pub(super) const UNHEALTHY: &str = "Unhealthy";
/// Reason of one that has lost access to its GPUs while it ran.
pub(super) const GPU_ACCESS_LOST: &str = "GpuAccessLost";
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
    /// `true` if waiting does not cure it; see [`is_permanent`].
    pub(super) permanent: bool,
}

/// Whether waiting does not cure a failure with this reason, so that requests are answered with it instead of waiting
/// for the next attempt.
///
/// Permanent are failures that the service's owner has to cure: the process ended or was found unhealthy, it or its
/// image, volume or model is not there, or the configuration or a checksum is wrong. Not permanent are those that may
/// end by themselves: a cache or disk that is full (others may leave), a registry, store or container engine that does
/// not answer, and a replica that did not fall asleep or wake (it is started instead). An unknown reason is not
/// permanent. What one reason cannot tell apart is decided by [`Failure::of_error`] and [`Failure::of_model`]. Lost
/// nodes and preempted replicas do not fail, and so have no reason here. A run that was ready before it failed does not
/// fail permanently, whatever the reason ([`super::replica`]): the next one will probably be ready, too.
fn is_permanent(reason: &str) -> bool {
    matches!(
        reason,
        "Error"
            | "Completed"
            | "OOMKilled"
            | UNHEALTHY
            | "StartError"
            | "RunContainerError"
            | "CreateContainerError"
            | "CreateContainerConfigError"
            | "InvalidImageName"
            | "ErrImageNeverPull"
            | "ModelNotFound"
            | "ModelChecksumMismatch"
            | "VolumeNotFound"
    )
}

/// Returns `true` if a registry has answered, and does not have the image or does not give it to these credentials.
/// The container engine passes on the registry's words only.
fn is_image_refused(message: &str) -> bool {
    const ANSWERS: [&str; 7] = [
        "not found",
        "manifest unknown",
        "does not exist",
        "denied",
        "unauthorized",
        "forbidden",
        "no matching manifest",
    ];
    let message = message.to_ascii_lowercase();
    ANSWERS.iter().any(|answer| message.contains(answer))
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
        Self { reason, message, exit_code: exit.code, permanent: is_permanent(reason), ..Self::default() }
    }

    /// The replica was found unhealthy, by a probe or since it has lost its GPUs.
    pub(super) fn of_unhealthy(reason: &'static str, message: String) -> Self {
        Self { reason, message, permanent: is_permanent(reason), ..Self::default() }
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
        let permanent = is_permanent(error.reason()) || matches!(error, ModelError::Rejected { .. });
        Self { reason: error.reason(), message: error.to_string(), lacking_bytes, permanent, ..Self::default() }
    }

    pub(super) fn of_error(error: &RuntimeError) -> Self {
        let permanent = match error {
            RuntimeError::Engine { .. } => false,
            RuntimeError::Container { reason: "ErrImagePull", message } => is_image_refused(message),
            _ => is_permanent(error.reason()),
        };
        Self { reason: error.reason(), message: error.to_string(), permanent, ..Self::default() }
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

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    fn model(error: ModelError) -> bool {
        Failure::of_model(&error).permanent
    }

    fn runtime(error: RuntimeError) -> bool {
        Failure::of_error(&error).permanent
    }

    fn pull(message: &str) -> bool {
        runtime(RuntimeError::Container { reason: "ErrImagePull", message: message.to_owned() })
    }

    #[test]
    fn only_what_waiting_does_not_cure_is_a_permanent_failure() {
        let (uri, reason) = (|| "s3://b/m".to_owned(), || "why".to_owned());
        assert!(Failure::of_exit(Exit { code: Some(3), ..Exit::default() }).permanent);
        assert!(Failure::of_exit(Exit { oom_killed: true, ..Exit::default() }).permanent);
        assert!(Failure::of_unhealthy(UNHEALTHY, reason()).permanent);
        assert!(!Failure::of_unhealthy(GPU_ACCESS_LOST, reason()).permanent);

        assert!(model(ModelError::NotFound { uri: uri(), reason: reason() }));
        assert!(model(ModelError::Rejected { uri: uri(), reason: reason() }));
        assert!(!model(ModelError::Source { uri: uri(), reason: "connection refused".to_owned() }));
        assert!(!model(ModelError::CacheFull { uri: uri(), bytes: 2, budget: 1, kept: 0 }));
        assert!(!model(ModelError::Disk { uri: uri(), error: ErrorKind::StorageFull.into() }));

        let (program, socket, error) = ("serve".to_owned(), "/s".to_owned(), ErrorKind::NotFound.into());
        assert!(runtime(RuntimeError::Start { program, error }));
        assert!(runtime(RuntimeError::Specification { field: "command", reason: reason() }));
        assert!(!runtime(RuntimeError::Engine { socket, error: "connection refused".to_owned() }));

        assert!(pull("cannot pull image a/b: manifest for a/b:latest not found: manifest unknown"));
        assert!(pull("cannot pull image a/b: pull access denied for a/b, repository does not exist"));
        assert!(!pull("cannot pull image a/b: dial tcp 10.0.0.1:443: connect: connection refused"));
        assert!(!pull("cannot pull image a/b: toomanyrequests: rate limit"));
    }
}
