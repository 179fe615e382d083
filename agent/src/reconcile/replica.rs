//! One replica's life: pending, starting, ready, draining, stopped; failed and again.

use std::{sync::Arc, time::Duration};

use pilotlight_proto::fleet::v1::{ReplicaAssignment, ReplicaPhase, ReplicaStatus};
use pilotlight_telemetry::TraceContext;
use prost_types::Timestamp;
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument as _, Span, info, info_span, warn};

use super::{
    Statuses,
    backoff::CrashBackoff,
    health::{Health, Unhealthy},
    models,
    way_back::WayBack,
};
use crate::{
    endpoint::{Endpoints, LocalReplica},
    models::{Held, ModelError, Models},
    runtime::{Exit, Running, Runtime, RuntimeError, probe::Prober, unix_now},
};

/// Grace where the assignment names none; Kubernetes' default.
const GRACE: Duration = Duration::from_secs(30);
/// Reason of a replica that a probe has had restarted; the name of Kubernetes' event.
const UNHEALTHY: &str = "Unhealthy";
/// Longest request where the assignment names none; Knative's default.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What a replica shall be.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Desired {
    pub(super) assignment: ReplicaAssignment,
    /// True: drain and stop.
    pub(super) leave: bool,
}

/// All that a replica's task has.
pub(super) struct Life {
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) endpoints: Arc<dyn Endpoints>,
    pub(super) way_back: WayBack,
    pub(super) models: Models,
    /// Its models stay on the node while it lives.
    pub(super) _held: Held,
    pub(super) statuses: Statuses,
    pub(super) desired: watch::Receiver<Desired>,
}

/// Why a running replica is not tended any more.
enum Turn {
    Ended(Exit),
    Unhealthy(Unhealthy),
    Leave,
}

impl Life {
    /// Lives until it is to leave and has stopped.
    pub(super) async fn run(mut self, adopted: Option<Running>) {
        let first = self.assignment();
        let taken_over = adopted.is_some();
        self.update(|status| {
            status.revision.clone_from(&first.revision);
            status.set_phase(ReplicaPhase::Pending);
            status.adopted = taken_over;
        });
        let mut backoff = CrashBackoff::default();
        let mut present = self.take_over(adopted).await;
        while !self.leaving() {
            let span = self.start_span();
            let started = match present.take() {
                Some(running) => Ok(running),
                None => match self.start(&span).await {
                    Some(started) => started,
                    None => break,
                },
            };
            // An adopted one has run for longer than this process has known it.
            let before = started.as_ref().map_or(Duration::ZERO, ran_before);
            let begun = Instant::now();
            let failure = match started {
                Ok(running) => match self.tend(&running, span).await {
                    Turn::Leave => return self.leave(&running).await,
                    Turn::Unhealthy(why) => self.restart(&running, why).await,
                    Turn::Ended(exit) => {
                        self.endpoints.remove(&running.replica);
                        Failure::of_exit(exit)
                    }
                },
                Err(failure) => failure,
            };
            self.failed(failure, backoff.after(before + begun.elapsed())).await;
        }
        self.stopped().await;
    }

    /// Gets what it needs, image and models, and starts it. `None`: it is to leave instead.
    async fn start(&mut self, span: &Span) -> Option<Result<Running, Failure>> {
        let mut assignment = self.assignment();
        let (runtime, models, statuses) = (Arc::clone(&self.runtime), self.models.clone(), self.statuses.clone());
        let say = |message: String| {
            statuses.update(&assignment.replica, |status| {
                status.set_phase(ReplicaPhase::Pending);
                status.reason = "Pulling".to_owned();
                status.message = message;
            });
        };
        let getting = async {
            runtime.prepare(&assignment, &say).await.map_err(|error| Failure::of_error(&error))?;
            models::fetch(&models, &assignment, &statuses).await.map_err(|error| Failure::of_model(&error))
        };
        let mounts = tokio::select! {
            mounts = getting.instrument(span.clone()) => mounts,
            () = left(&mut self.desired) => return None,
        };
        let mounts = match mounts {
            Ok(mounts) => mounts,
            Err(failure) => return Some(Err(failure)),
        };
        // The runtime keeps the assignment on disk, where credentials have no business.
        assignment.models.iter_mut().for_each(|model| model.credentials.clear());
        let ip = runtime.host_address(&assignment);
        let started = match self.way_back.prepare(assignment, ip).await {
            Ok(assignment) => runtime.start(&assignment, &mounts).instrument(span.clone()).await,
            Err(error) => Err(error),
        };
        Some(started.map_err(|error| Failure::of_error(&error)))
    }

    /// An adopted replica goes on, unless what it calls cannot be given back to it: then it starts anew.
    async fn take_over(&mut self, adopted: Option<Running>) -> Option<Running> {
        let running = adopted?;
        let Err(error) = self.way_back.reopen(&running.assignment).await else { return Some(running) };
        warn!(replica = %running.replica, %error, "has lost its way to the predictor; starts anew");
        self.runtime.stop(&running, GRACE).await;
        None
    }

    fn assignment(&self) -> ReplicaAssignment {
        self.desired.borrow().assignment.clone()
    }

    fn leaving(&self) -> bool {
        self.desired.borrow().leave
    }

    fn update(&self, change: impl FnOnce(&mut ReplicaStatus)) {
        let name = self.desired.borrow().assignment.replica.clone();
        self.statuses.update(&name, change);
    }

    /// From the start to ready, as part of the trace of the request that asked for it.
    fn start_span(&self) -> Span {
        let assignment = self.desired.borrow().assignment.clone();
        let span = info_span!("replica.start", otel.kind = "internal", pilotlight.replica = %assignment.replica);
        let context = TraceContext { traceparent: assignment.traceparent, tracestate: assignment.tracestate };
        pilotlight_telemetry::set_parent(&span, &context);
        span
    }

    /// Probes a running replica, and tells the data path, until it ends or is to leave.
    async fn tend(&mut self, running: &Running, span: Span) -> Turn {
        self.update(|status| {
            status.set_phase(ReplicaPhase::Starting);
            status.pid = running.pid;
            status.started_at = Some(Timestamp { seconds: running.started_at, nanos: 0 });
            status.ready_at = None;
            status.message.clear();
            status.reason.clear();
        });
        let mut loading = Some(info_span!(parent: &span, "replica.load", otel.kind = "internal"));
        let mut starting = Some(span);
        let container = running.assignment.container.clone().unwrap_or_default();
        let (started, mut has_started) = watch::channel(false);
        let unhealthy = Health::new(&container, running, &self.runtime).fails(started);
        tokio::pin!(unhealthy);
        let prober = Prober::new(container.readiness_probe.unwrap_or_default(), running, Arc::clone(&self.runtime));
        let runtime = Arc::clone(&self.runtime);
        let exited = runtime.exited(running);
        tokio::pin!(exited);
        let (mut ready, mut successes, mut failures) = (false, 0, 0);
        let mut pause = prober.initial_delay();
        loop {
            let answer = tokio::select! {
                exit = &mut exited => return Turn::Ended(exit),
                () = left(&mut self.desired) => return Turn::Leave,
                why = &mut unhealthy => return Turn::Unhealthy(why),
                answer = ask(&prober, pause, &mut has_started) => answer,
            };
            match answer {
                Ok(()) => {
                    (successes, failures) = (successes + 1, 0);
                    if !ready && successes >= prober.success_threshold() {
                        ready = true;
                        // The spans end here: what follows is no part of the start.
                        loading.take();
                        starting.take();
                        self.ready(running);
                    }
                }
                Err(reason) => {
                    (successes, failures) = (0, failures + 1);
                    if ready && failures >= prober.failure_threshold() {
                        ready = false;
                        self.endpoints.not_ready(&running.replica);
                        warn!(replica = %running.replica, %reason, "not ready any more");
                        self.update(|status| status.set_phase(ReplicaPhase::Starting));
                    }
                    if !ready {
                        self.not_yet(&reason);
                    }
                }
            }
            pause = prober.period(ready);
        }
    }

    /// Ends a container that a probe has found unhealthy. It gets nothing new, and may end what it has.
    async fn restart(&self, running: &Running, why: Unhealthy) -> Failure {
        warn!(replica = %running.replica, message = %why.message, "is restarted");
        self.endpoints.not_ready(&running.replica);
        self.update(|status| {
            status.set_phase(ReplicaPhase::Starting);
            status.reason = UNHEALTHY.to_owned();
            status.message.clone_from(&why.message);
        });
        let container = self.assignment().container.unwrap_or_default();
        let grace = why.grace.or_else(|| duration(container.termination_grace_period)).unwrap_or(GRACE);
        self.runtime.stop(running, grace).await;
        self.endpoints.remove(&running.replica);
        Failure { reason: UNHEALTHY, message: why.message, exit_code: None }
    }

    fn ready(&self, running: &Running) {
        let assignment = self.assignment();
        self.endpoints.ready(LocalReplica {
            name: running.replica.clone(),
            revision: assignment.revision.clone(),
            address: running.address,
            h2c: assignment.container.as_ref().is_some_and(|container| container.h2c),
            container_concurrency: assignment.container_concurrency,
            timeout: duration(assignment.timeout).unwrap_or(TIMEOUT),
        });
        info!(replica = %running.replica, "ready");
        self.update(|status| {
            status.set_phase(ReplicaPhase::Ready);
            status.ready_at = Some(Timestamp::from(std::time::SystemTime::now()));
            status.message.clear();
            status.reason.clear();
        });
    }

    /// Says what the probe said, where that is new.
    fn not_yet(&self, reason: &str) {
        let message = format!("not ready yet: {reason}");
        let name = self.desired.borrow().assignment.replica.clone();
        let told = self.statuses.0.borrow().replicas.iter().any(|s| s.replica == name && s.message == message);
        if !told {
            self.update(|status| {
                status.message = message;
                status.reason = "ProbeFailed".to_owned();
            });
        }
    }

    async fn failed(&mut self, failure: Failure, pause: Duration) {
        let name = self.desired.borrow().assignment.replica.clone();
        warn!(replica = %name, reason = failure.reason, message = %failure.message, ?pause, "replica failed");
        let looping = !pause.is_zero();
        self.update(|status| {
            status.set_phase(ReplicaPhase::Failed);
            status.pid = 0;
            status.exit_code = failure.exit_code;
            status.restarts += 1;
            status.reason = if looping { in_backoff(failure.reason) } else { failure.reason }.to_owned();
            status.message =
                if looping { format!("{}; started again in {pause:?}", failure.message) } else { failure.message };
        });
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = left(&mut self.desired) => {}
        }
    }

    /// Drains, stops and forgets.
    async fn leave(self, running: &Running) {
        self.endpoints.drain(&running.replica);
        self.update(|status| status.set_phase(ReplicaPhase::Draining));
        let assignment = self.assignment();
        let timeout = duration(assignment.timeout).unwrap_or(TIMEOUT);
        tokio::select! {
            () = self.endpoints.drained(&running.replica) => {}
            () = tokio::time::sleep(timeout) => warn!(replica = %running.replica, "not drained in time"),
            _ = self.runtime.exited(running) => {}
        }
        let grace = assignment.container.and_then(|container| duration(container.termination_grace_period));
        self.runtime.stop(running, grace.unwrap_or(GRACE)).await;
        self.endpoints.remove(&running.replica);
        info!(replica = %running.replica, "stopped");
        self.stopped().await;
    }

    async fn stopped(&self) {
        let name = self.desired.borrow().assignment.replica.clone();
        self.runtime.remove(&name).await;
        self.update(|status| {
            status.set_phase(ReplicaPhase::Stopped);
            status.pid = 0;
        });
    }
}

/// Resolves when the replica is to leave, or nobody is there any more to say so.
async fn left(desired: &mut watch::Receiver<Desired>) {
    // An error means that the reconciler is gone; then the task is about to be ended.
    if desired.wait_for(|desired| desired.leave).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn ask(prober: &Prober, pause: Duration, has_started: &mut watch::Receiver<bool>) -> Result<(), String> {
    // An error means that the container is about to be restarted.
    if has_started.wait_for(|started| *started).await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(pause).await;
    prober.ask().await
}

fn duration(given: Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(given?).ok()
}

/// Why a replica failed.
struct Failure {
    reason: &'static str,
    message: String,
    exit_code: Option<i32>,
}

impl Failure {
    fn of_exit(exit: Exit) -> Self {
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
        Self { reason, message, exit_code: exit.code }
    }

    fn of_model(error: &ModelError) -> Self {
        Self { reason: error.reason(), message: error.to_string(), exit_code: None }
    }

    fn of_error(error: &RuntimeError) -> Self {
        Self { reason: error.reason(), message: error.to_string(), exit_code: None }
    }
}

/// What Kubernetes calls the pause after this reason: images have a name of their own for it, and what
/// cannot be created or fetched stays what it is.
fn in_backoff(reason: &'static str) -> &'static str {
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
        | "CacheFull"
        | "DiskFull"
        | "VolumeNotFound" => reason,
        _ => "CrashLoopBackOff",
    }
}

/// How long it ran before this process knew it, to the second.
fn ran_before(running: &Running) -> Duration {
    // The clock's start is no start.
    if running.started_at == 0 {
        return Duration::ZERO;
    }
    Duration::from_secs(u64::try_from(unix_now() - running.started_at).unwrap_or_default())
}
