//! One replica's life: pending, starting, ready, draining, stopped; failed and again.

use std::{sync::Arc, time::Duration};

use pilotlight_proto::fleet::v1::{ReplicaAssignment, ReplicaPhase, ReplicaStatus};
use pilotlight_telemetry::TraceContext;
use prost_types::Timestamp;
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument as _, Span, info, info_span, warn};

use super::{Statuses, backoff::CrashBackoff, models};
use crate::{
    endpoint::{Endpoints, LocalReplica},
    models::{ModelError, Models},
    runtime::{Exit, Running, Runtime, RuntimeError, probe::Prober},
};

/// Grace where the assignment names none; Kubernetes' default.
const GRACE: Duration = Duration::from_secs(30);
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
    pub(super) models: Models,
    pub(super) statuses: Statuses,
    pub(super) desired: watch::Receiver<Desired>,
}

/// Why a running replica is not tended any more.
enum Turn {
    Ended(Exit),
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
        let mut present = adopted;
        while !self.leaving() {
            let span = self.start_span();
            let begun = Instant::now();
            let running = match present.take() {
                Some(running) => Ok(running),
                None => match self.start(&span).await {
                    Some(started) => started,
                    None => break,
                },
            };
            let failure = match running {
                Ok(running) => match self.tend(&running, span).await {
                    Turn::Leave => return self.leave(&running).await,
                    Turn::Ended(exit) => {
                        self.endpoints.remove(&running.replica);
                        Failure::of_exit(exit)
                    }
                },
                Err(failure) => failure,
            };
            self.failed(failure, backoff.after(begun.elapsed())).await;
        }
        self.stopped().await;
    }

    /// Has its models in place, and starts it. `None`: it is to leave instead.
    async fn start(&mut self, span: &Span) -> Option<Result<Running, Failure>> {
        let mut assignment = self.assignment();
        let (models, statuses) = (self.models.clone(), self.statuses.clone());
        let mounts = tokio::select! {
            mounts = models::fetch(&models, &assignment, &statuses).instrument(span.clone()) => mounts,
            () = left(&mut self.desired) => return None,
        };
        // The runtime keeps the assignment on disk, where credentials have no business.
        assignment.models.iter_mut().for_each(|model| model.credentials.clear());
        Some(match mounts {
            Ok(mounts) => {
                let started = self.runtime.start(&assignment, &mounts).instrument(span.clone()).await;
                started.map_err(|error| Failure::of_error(&error))
            }
            Err(error) => Err(Failure::of_model(&error)),
        })
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
        let probe = running.assignment.container.clone().and_then(|container| container.readiness_probe);
        let prober = Prober::new(probe.unwrap_or_default(), running.address);
        let runtime = Arc::clone(&self.runtime);
        let exited = runtime.exited(running);
        tokio::pin!(exited);
        let (mut ready, mut successes, mut failures) = (false, 0, 0);
        let mut pause = prober.initial_delay();
        loop {
            let answer = tokio::select! {
                exit = &mut exited => return Turn::Ended(exit),
                () = left(&mut self.desired) => return Turn::Leave,
                answer = ask(&prober, pause) => answer,
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
            status.reason = if looping { "CrashLoopBackOff" } else { failure.reason }.to_owned();
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

async fn ask(prober: &Prober, pause: Duration) -> Result<(), String> {
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
            (Some(0), _) => ("Completed", "the process ended with exit code 0".to_owned()),
            (Some(code), _) => ("Error", format!("the process ended with exit code {code}")),
            (None, Some(signal)) => ("Error", format!("the process was ended by signal {signal}")),
            (None, None) => ("Error", "the process ended".to_owned()),
        };
        Self { reason, message, exit_code: exit.code }
    }

    fn of_model(error: &ModelError) -> Self {
        Self { reason: error.reason(), message: error.to_string(), exit_code: None }
    }

    fn of_error(error: &RuntimeError) -> Self {
        Self { reason: "StartError", message: error.to_string(), exit_code: None }
    }
}
