//! One replica's life: pending, starting, ready, draining, stopped; failed and again.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use pilotlight_proto::fleet::v1::{ReplicaAssignment, ReplicaPhase, ReplicaStatus, SleepPaths};
use pilotlight_telemetry::TraceContext;
use prost_types::Timestamp;
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument as _, Span, info, info_span, warn};

use super::{
    Statuses,
    asleep::Tired,
    awake::Begin,
    backoff::CrashBackoff,
    failure::{CACHE_FULL, Failure, SLEEP_FAILED, in_backoff},
    models,
    question::Question,
    rung::{Cold, Look},
    way_back::WayBack,
};
use crate::{
    endpoint::Endpoints,
    models::{Held, Models},
    runtime::{Exit, Running, Runtime, SleepMark, logs},
};

/// Grace where the assignment names none; Kubernetes' default.
const GRACE: Duration = Duration::from_secs(30);
/// Longest request where the assignment names none; Knative's default.
pub(super) const TIMEOUT: Duration = Duration::from_secs(300);

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
    /// Its models and its image stay on the node while it lives.
    pub(super) _held: Held,
    pub(super) statuses: Statuses,
    pub(super) desired: watch::Receiver<Desired>,
    /// Changes whenever the node's cache may have room that it had not before.
    pub(super) room: watch::Receiver<u64>,
    /// When the process that runs now became ready for the first time; `None` if it has not been ready.
    pub(super) ready_since: Option<Instant>,
    /// What it has started last, for [`super::orphan`].
    pub(super) running: Arc<Mutex<Option<Running>>>,
}

/// Where a replica is whose process lives.
pub(super) enum Stage {
    /// It loads, or takes requests. The span ends when it is ready.
    Awake(Begin, Span),
    /// It is loaded, and is to sleep.
    Tired(Tired),
    /// It sleeps, by its server's own endpoints or else paused.
    Asleep(Option<SleepPaths>),
}

/// Why a running replica is not tended any more.
pub(super) enum End {
    /// It is to leave.
    Leave,
    /// It has been stopped, to start again at once with what is right now.
    Anew,
    /// Nothing runs any more.
    Failed(Failure),
}

impl Life {
    /// The status that it begins with. An adopted one is in the first report of this agent process: a coordinator that
    /// missed it there would take it for ended.
    pub(super) fn begin_status(&self, adopted: Option<&Running>) {
        let first = self.assignment();
        self.update(|status| {
            status.revision.clone_from(&first.revision);
            status.set_phase(ReplicaPhase::Pending);
            status.adopted = adopted.is_some();
            status.started_at = adopted.map(|running| Timestamp { seconds: running.started_at, nanos: 0 });
            let message = if adopted.is_some() { "taken over from the previous agent process" } else { "accepted" };
            status.message = message.to_owned();
        });
    }

    /// Lives until it is to leave and has stopped.
    pub(super) async fn run(mut self, adopted: Option<Running>) {
        let mut backoff = CrashBackoff::default();
        let mut present = self.take_over(adopted).await;
        while !self.leaving() {
            let span = self.start_span();
            let started = match present.take() {
                Some(running) => Ok((running, Begin::Adopted)),
                None => match self.start(&span).await {
                    Some(started) => started.map(|(running, cold)| (running, Begin::Started(cold))),
                    None => break,
                },
            };
            let failure = match started {
                Ok((mut running, begin)) => match self.tend(&mut running, begin, span).await {
                    End::Leave => return self.leave(&running).await,
                    End::Anew => continue,
                    End::Failed(failure) => failure.with_output(self.last_log_lines().await, &running),
                },
                Err(failure) => failure,
            };
            if failure.reason == SLEEP_FAILED {
                self.refused_to_sleep(failure).await;
            } else {
                let ready = self.ready_since.take().map(|since| since.elapsed());
                let pause = backoff.after(ready.unwrap_or_default());
                // What has been ready may be so again: requests wait for the next attempt.
                let failure = Failure { permanent: failure.permanent && ready.is_none(), ..failure };
                self.failed(failure, pause, backoff.failures()).await;
            }
        }
        self.stopped().await;
    }

    /// Sees a replica whose process lives from one stage to the next, until it ends or is to leave.
    async fn tend(&mut self, running: &mut Running, begin: Begin, span: Span) -> End {
        self.update(|status| {
            status.pid = running.pid;
            status.started_at = Some(Timestamp { seconds: running.started_at, nanos: 0 });
        });
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(running.clone());
        let mark = self.runtime.sleep_mark(&running.replica).filter(|_| matches!(begin, Begin::Adopted));
        let mut stage = match mark {
            None => Ok(Stage::Awake(begin, span)),
            Some(SleepMark { paths, settled: true }) => {
                // At once: nobody shall take it for one that is to come.
                self.update(|status| status.set_phase(ReplicaPhase::Asleep));
                self.sleeps(running, paths, |_| {}).await
            }
            Some(SleepMark { paths, settled: false }) => Ok(Stage::Tired(Tired::of_former(paths))),
        };
        loop {
            stage = match stage {
                Ok(Stage::Awake(begin, span)) => self.awake(running, begin, span).await,
                Ok(Stage::Tired(tired)) => self.fall_asleep(running, tired).await,
                Ok(Stage::Asleep(paths)) => self.sleep(running, paths).await,
                Err(end) => return end,
            };
        }
    }

    /// Gets what it needs, image and models, and starts it. `None`: it is to leave instead.
    async fn start(&mut self, span: &Span) -> Option<Result<(Running, Cold), Failure>> {
        let began = Instant::now();
        self.room.mark_unchanged();
        self.begin_attempt();
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
            let image = assignment.container.as_ref().map_or("", |container| &container.image);
            models.settled(image).await;
            let pulled = runtime.prepare(&assignment, &say).await.map_err(|error| Failure::of_error(&error))?;
            let (got, versions) = match models::as_before(&models, &assignment) {
                Some(before) => before,
                None => {
                    let got = models::fetch(&models, &assignment, &statuses).await;
                    (got.map_err(|error| Failure::of_model(&error))?, Vec::new())
                }
            };
            let look = Look::begin(pulled || got.fetched, got.folders);
            Ok((got.mounts, Cold { look, began, question: Question(versions) }))
        };
        let got = tokio::select! {
            got = getting.instrument(span.clone()) => got,
            () = left(&mut self.desired) => return None,
        };
        let (mounts, cold) = match got {
            Ok(got) => got,
            Err(failure) => return Some(Err(failure)),
        };
        // The runtime keeps the assignment on disk, where credentials have no business.
        assignment.models.iter_mut().for_each(|model| model.credentials.clear());
        assignment.registry_configs.clear();
        let ip = runtime.host_address(&assignment);
        let starting = async {
            let assignment = self.way_back.prepare(assignment, ip).await?;
            // A former process of it may have ended in its sleep.
            runtime.mark_sleep(&assignment.replica, None)?;
            runtime.start(&assignment, &mounts).instrument(span.clone()).await
        };
        let started = starting.await;
        Some(started.map(|running| (running, cold)).map_err(|error| Failure::of_error(&error)))
    }

    /// Reports that a replica which has failed is started again.
    fn begin_attempt(&mut self) {
        self.ready_since = None;
        self.update(|status| {
            if status.phase() == ReplicaPhase::Failed {
                status.set_phase(ReplicaPhase::Pending);
                status.message = format!("starting again; failed before: {}", status.failure_reason);
                status.reason.clear();
                status.next_attempt_at = None;
            }
        });
    }

    /// An adopted replica goes on, unless what it calls cannot be given back to it: then it starts anew.
    async fn take_over(&mut self, adopted: Option<Running>) -> Option<Running> {
        let running = adopted?;
        let Err(error) = self.way_back.reopen(&running.assignment).await else { return Some(running) };
        warn!(replica = %running.replica, %error, "has lost its way to the predictor; starts anew");
        self.runtime.stop(&running, GRACE).await;
        self.update(|status| status.adopted = false);
        None
    }

    pub(super) fn assignment(&self) -> ReplicaAssignment {
        self.desired.borrow().assignment.clone()
    }

    fn leaving(&self) -> bool {
        self.desired.borrow().leave
    }

    pub(super) fn name(&self) -> String {
        self.desired.borrow().assignment.replica.clone()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut ReplicaStatus)) {
        self.statuses.update(&self.name(), change);
    }

    /// From the start to ready, as part of the trace of the request that asked for it.
    fn start_span(&self) -> Span {
        let span = info_span!("replica.start", otel.kind = "internal", pilotlight.replica = %self.name());
        self.join_trace(span)
    }

    /// The same, from the moment it is told to wake.
    pub(super) fn wake_span(&self) -> Span {
        let span = info_span!("replica.wake", otel.kind = "internal", pilotlight.replica = %self.name());
        self.join_trace(span)
    }

    fn join_trace(&self, span: Span) -> Span {
        let ReplicaAssignment { traceparent, tracestate, .. } = self.assignment();
        pilotlight_telemetry::set_parent(&span, &TraceContext { traceparent, tracestate });
        span
    }

    /// It has ended by itself: nothing more is sent there.
    pub(super) fn ended(&self, running: &Running, exit: Exit) -> End {
        self.endpoints.remove(&running.replica);
        End::Failed(Failure::of_exit(exit))
    }

    /// Stops a running replica that has failed. `grace` as the manifest says, where it is not given.
    pub(super) async fn give_up(&self, running: &Running, failure: Failure, grace: Option<Duration>) -> Failure {
        warn!(replica = %running.replica, reason = failure.reason, message = %failure.message, "is stopped");
        self.update(|status| {
            status.reason = failure.reason.to_owned();
            status.message.clone_from(&failure.message);
        });
        self.runtime.stop(running, grace.unwrap_or_else(|| self.grace())).await;
        self.endpoints.remove(&running.replica);
        failure
    }

    pub(super) fn grace(&self) -> Duration {
        let container = self.assignment().container;
        container.and_then(|container| duration(container.termination_grace_period)).unwrap_or(GRACE)
    }

    /// The last lines that a run which has ended has printed.
    async fn last_log_lines(&self) -> Vec<String> {
        let replica = self.name();
        self.runtime.flush_output(&replica).await;
        let path = self.runtime.log_file(&replica);
        tokio::task::spawn_blocking(move || logs::last_lines(&path)).await.unwrap_or_default()
    }

    /// Reports a failure, and waits until the next attempt or until the replica is to leave.
    async fn failed(&mut self, failure: Failure, pause: Duration, consecutive_failures: u32) {
        warn!(replica = %self.name(), reason = failure.reason, message = %failure.message, ?pause, "replica failed");
        let looping = !pause.is_zero();
        self.update(|status| {
            status.set_phase(ReplicaPhase::Failed);
            status.pid = 0;
            status.holds_gpu_memory = false;
            status.exit_code = failure.exit_code;
            status.lacking_bytes = failure.lacking_bytes;
            status.last_log_lines = failure.last_log_lines;
            status.failure_reason = failure.reason.to_owned();
            status.failure_permanent = failure.permanent;
            status.consecutive_failures = consecutive_failures;
            status.next_attempt_at = looping.then(|| Timestamp::from(SystemTime::now() + pause));
            status.restarts += 1;
            status.reason = if looping { in_backoff(failure.reason) } else { failure.reason }.to_owned();
            status.message =
                if looping { format!("{}; started again in {pause:?}", failure.message) } else { failure.message };
        });
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = left(&mut self.desired) => {}
            // Somebody may have left for its sake.
            Ok(()) = self.room.changed(), if failure.reason == CACHE_FULL => {}
        }
    }

    /// It was to sleep, did not, and is stopped: whether it is worth another start is not for its node to
    /// say. One that is to be awake is started again.
    async fn refused_to_sleep(&mut self, failure: Failure) {
        self.update(|status| {
            status.set_phase(ReplicaPhase::Failed);
            status.pid = 0;
            status.reason = failure.reason.to_owned();
            status.message = failure.message;
            status.last_log_lines = failure.last_log_lines;
        });
        told(&mut self.desired, |desired| desired.leave || !desired.assignment.asleep).await;
    }

    /// Drains, stops and forgets.
    async fn leave(self, running: &Running) {
        self.endpoints.drain(&running.replica);
        self.drains("finishes its requests before it stops".to_owned());
        let timeout = duration(self.assignment().timeout).unwrap_or(TIMEOUT);
        tokio::select! {
            () = self.endpoints.drained(&running.replica) => {}
            () = tokio::time::sleep(timeout) => warn!(replica = %running.replica, "not drained in time"),
            _ = self.runtime.exited(running) => {}
        }
        let grace = self.grace();
        self.drains(format!("asked to stop; is killed after {grace:?}"));
        self.runtime.stop(running, grace).await;
        self.endpoints.remove(&running.replica);
        info!(replica = %running.replica, "stopped");
        self.stopped().await;
    }

    /// Reports that it takes no more requests, and what it waits for now.
    pub(super) fn drains(&self, message: String) {
        self.update(|status| {
            status.set_phase(ReplicaPhase::Draining);
            status.message = message;
            status.reason.clear();
        });
    }

    async fn stopped(&self) {
        self.runtime.remove(&self.name()).await;
        self.update(|status| {
            status.set_phase(ReplicaPhase::Stopped);
            status.pid = 0;
            status.holds_gpu_memory = false;
        });
    }
}

/// What the replica shall be, as soon as that is `enough`.
pub(super) async fn told(desired: &mut watch::Receiver<Desired>, enough: impl FnMut(&Desired) -> bool) -> Desired {
    let now = desired.wait_for(enough).await.map(|desired| desired.clone());
    match now {
        Ok(now) => now,
        // The reconciler is gone, and the task about to be ended.
        Err(_) => std::future::pending().await,
    }
}

/// Resolves when the replica is to leave.
pub(super) async fn left(desired: &mut watch::Receiver<Desired>) {
    told(desired, |desired| desired.leave).await;
}

pub(super) fn duration(given: Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(given?).ok()
}
