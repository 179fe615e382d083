//! A replica that is awake: probed until it is ready, and then for as long as it takes requests.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaPhase, Rung, Transition};
use prost_types::Timestamp;
use tokio::{sync::watch, time::Instant};
use tracing::{Span, info, info_span, warn};

use super::{
    asleep::Tired,
    failure::Failure,
    health::{Health, Unhealthy},
    question::{Question, Refusal},
    replica::{End, Life, Stage, TIMEOUT, duration, told},
    rung::{Cold, transition},
    waiting::{Waiting, find_address, listens_elsewhere},
};
use crate::{
    endpoint::LocalReplica,
    runtime::{Running, probe::Prober},
};

/// Until it is ready it is asked again after one part in so many of the time that it has taken so far: what
/// the questions add to its start is small beside it, and a request that waits does not wait long for the next one.
const PART_OF_START: u32 = 1000;
/// But not sooner than this,
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
/// and not sooner than so many times what the last question took: it may be the thread that loads which answers.
const ANSWERS: u32 = 4;

/// How a replica came to be awake.
pub(super) enum Begin {
    /// Its process was started.
    Started(Cold),
    /// It was so when this agent process took it over.
    Adopted,
    /// It slept until it was told to wake, at that time.
    Woken(Instant),
    /// It was to sleep, and is not to any more before it does.
    Kept,
}

impl Begin {
    /// True where it has loaded before: it owes nobody a delay or a startup probe.
    fn has_loaded(&self) -> bool {
        matches!(self, Self::Woken(_) | Self::Kept)
    }

    /// What is still to be asked before it may become ready.
    fn question(&mut self) -> Question {
        match self {
            Self::Started(cold) => std::mem::take(&mut cold.question),
            Self::Adopted | Self::Woken(_) | Self::Kept => Question::default(),
        }
    }

    /// What has come to its end now that it is ready.
    fn transition(self) -> Option<Transition> {
        match self {
            Self::Started(Cold { look, began, .. }) => Some(transition(look.rung(), Rung::Serving, began.elapsed())),
            Self::Woken(told) => Some(transition(Rung::Asleep, Rung::Serving, told.elapsed())),
            Self::Adopted | Self::Kept => None,
        }
    }
}

/// The questions to a replica's readiness probe, and what they come to.
struct Readiness {
    prober: Prober,
    ready: bool,
    /// Of the same kind, in a row.
    answers: (u32, u32),
    /// Successes that it needs to become ready.
    needed: u32,
    /// True where it has loaded before.
    has_loaded: bool,
    /// When it was first asked, or would have been.
    since: Instant,
}

impl Readiness {
    fn new(prober: Prober, begin: &Begin) -> Self {
        // It was ready until it was told to sleep.
        let needed = if matches!(begin, Begin::Kept) { 1 } else { prober.success_threshold() };
        let has_loaded = begin.has_loaded();
        Self { prober, ready: false, answers: (0, 0), needed, has_loaded, since: Instant::now() }
    }

    /// Before the first question.
    fn first_pause(&self) -> Duration {
        if self.has_loaded { Duration::ZERO } else { self.prober.initial_delay() }
    }

    /// Before the next one; the last one took so long.
    fn pause(&self, took: Duration) -> Duration {
        let period = self.prober.period(self.ready);
        if self.ready {
            return period;
        }
        (self.since.elapsed() / PART_OF_START).max(SHORTEST_PAUSE).max(took * ANSWERS).min(period)
    }

    /// True where it has become ready.
    fn succeeded(&mut self) -> bool {
        self.answers = (self.answers.0 + 1, 0);
        let becomes = !self.ready && self.answers.0 >= self.needed;
        if becomes {
            self.ready = true;
            self.needed = self.prober.success_threshold();
        }
        becomes
    }

    /// True where it is ready no more.
    fn failed(&mut self) -> bool {
        self.answers = (0, self.answers.1 + 1);
        let ends = self.ready && self.answers.1 >= self.prober.failure_threshold();
        if ends {
            self.ready = false;
            self.since = Instant::now();
        }
        ends
    }
}

impl Life {
    /// Probes a running replica, and tells the data path, until it is to sleep. `span` ends when it is ready. A
    /// process that listens on its containerPort instead of the port that it was given is reached there from then on.
    pub(super) async fn awake(&mut self, running: &mut Running, mut begin: Begin, span: Span) -> Result<Stage, End> {
        // One that is kept is still told to drain, and ready in a moment.
        let mut offered = matches!(begin, Begin::Kept);
        let adopted = matches!(begin, Begin::Adopted);
        let container = running.assignment.container.clone().unwrap_or_default();
        let probe = container.readiness_probe.clone().unwrap_or_default();
        let prober = Prober::new(probe, running, Arc::clone(&self.runtime));
        if !offered {
            self.starts(&begin, &prober);
        }
        let mut spans = Some((info_span!(parent: &span, "replica.load", otel.kind = "internal"), span));
        let waiting = Arc::new(Waiting::new(self.statuses.clone(), running.replica.clone()));
        let (confirm, confirmed) = watch::channel(false);
        let refused = begin.question().refused(confirm);
        tokio::pin!(refused);
        let (unhealthy, has_started) = self.watch_health(&container, running, begin.has_loaded(), adopted, &waiting);
        tokio::pin!(unhealthy);
        let mut gates = Gates { has_started, confirmed };
        let mut readiness = Readiness::new(prober, &begin);
        let mut begin = Some(begin);
        let elsewhere = listens_elsewhere(Arc::clone(&self.runtime), running.clone(), Arc::clone(&waiting));
        tokio::pin!(elsewhere);
        let mut moved = false;
        let (runtime, started) = (Arc::clone(&self.runtime), running.clone());
        let exited = runtime.exited(&started);
        tokio::pin!(exited);
        let mut pause = readiness.first_pause();
        loop {
            let answer = tokio::select! {
                exit = &mut exited => return Err(self.ended(running, exit)),
                desired = told(&mut self.desired, |desired| desired.leave || offered && desired.assignment.asleep) => {
                    if desired.leave {
                        return Err(End::Leave);
                    }
                    return Ok(Stage::Tired(Tired::of_ready(desired.assignment.sleep_paths)));
                }
                why = &mut unhealthy => return Err(End::Failed(self.restart(running, why).await)),
                refusal = &mut refused => return Err(self.refused(running, refusal).await),
                address = &mut elsewhere, if begin.is_some() && !moved => {
                    moved = true;
                    self.move_to(running, address, &mut readiness, &waiting);
                    let has_started = *gates.has_started.borrow();
                    let (again, started) = self.watch_health(&container, running, has_started, adopted, &waiting);
                    unhealthy.set(again);
                    gates.has_started = started;
                    continue;
                }
                answer = gates.ask(&readiness.prober, pause) => answer,
            };
            let took = answer.took;
            match answer.said {
                Ok(()) => {
                    if readiness.succeeded() {
                        if begin.is_some() && !moved && !readiness.prober.connects_to_address() {
                            // What the probe has found is not what requests are sent to.
                            if let Some(address) = find_address(&*runtime, running, &waiting).await {
                                self.move_to(running, address, &mut readiness, &waiting);
                            }
                        }
                        // What follows is no part of the start.
                        spans.take();
                        let begin = begin.take();
                        let assignment = self.assignment();
                        if assignment.asleep && !offered {
                            return Ok(Stage::Tired(Tired::of_loaded(begin, assignment.sleep_paths)));
                        }
                        offered = true;
                        self.ready(running, begin.and_then(Begin::transition));
                    }
                }
                Err(reason) => {
                    if readiness.failed() {
                        self.endpoints.not_ready(&running.replica);
                        warn!(replica = %running.replica, %reason, "not ready any more");
                    }
                    if !readiness.ready {
                        waiting.probe_failed(&format!("readiness probe {}: {reason}", readiness.prober.describe()));
                    }
                }
            }
            pause = readiness.pause(took);
        }
    }

    /// Ends a container that was found unhealthy. It gets nothing new, and may end what it has.
    async fn restart(&self, running: &Running, why: Unhealthy) -> Failure {
        self.endpoints.not_ready(&running.replica);
        self.update(|status| status.set_phase(ReplicaPhase::Starting));
        self.give_up(running, Failure::of_unhealthy(why.reason, why.message), why.grace).await
    }

    /// Ends a replica that has started with a model that it may not have.
    async fn refused(&self, running: &Running, refusal: Refusal) -> End {
        match refusal {
            Refusal::Failed(failure) => End::Failed(self.give_up(running, failure, None).await),
            Refusal::Changed { uri } => {
                info!(replica = %running.replica, %uri, "the model has changed in its store; starts anew");
                self.update(|status| status.message = format!("{uri} has changed in its store; starts anew"));
                self.runtime.stop(running, self.grace()).await;
                End::Anew
            }
        }
    }

    fn ready(&mut self, running: &Running, transition: Option<Transition>) {
        self.ready_since.get_or_insert_with(Instant::now);
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
            if transition.is_some() {
                status.transition = transition;
            }
        });
    }

    /// Reports that the replica has been started or woken, and for what it waits now.
    fn starts(&self, begin: &Begin, prober: &Prober) {
        let what = if begin.has_loaded() { "woken" } else { "started" };
        let message = format!("{what}; waiting for the readiness probe {}", prober.describe());
        self.update(|status| {
            status.set_phase(ReplicaPhase::Starting);
            status.ready_at = None;
            status.message = message;
            status.reason.clear();
        });
    }

    /// Resolves when the container must be restarted; the receiver becomes true once its startup probe has passed.
    fn watch_health(
        &self,
        container: &ContainerSpec,
        running: &Running,
        has_started: bool,
        adopted: bool,
        waiting: &Arc<Waiting>,
    ) -> (impl Future<Output = Unhealthy> + Send + use<>, watch::Receiver<bool>) {
        let (started, starts) = watch::channel(false);
        let health = Health::new(container, running, &self.runtime);
        let health = if has_started { health.of_started() } else { health };
        let container = (Arc::clone(&self.runtime), running.clone());
        (health.fails_or_loses_gpus(started, Arc::clone(waiting), container, adopted), starts)
    }

    /// From now on the replica is reached at this address, by later agent processes, too.
    fn move_to(&self, running: &mut Running, address: SocketAddr, readiness: &mut Readiness, waiting: &Waiting) {
        info!(replica = %running.replica, port = %running.address, %address, "listens on its containerPort, not on PORT");
        running.address = address;
        readiness.prober.set_address(address);
        waiting.found();
        if let Err(error) = self.runtime.record_address(running) {
            warn!(replica = %running.replica, %error, "a later agent process will look for it at its PORT");
        }
    }
}

/// What a replica must have behind it before it may be ready.
struct Gates {
    /// Its startup probe.
    has_started: watch::Receiver<bool>,
    /// The question whether its models are still the right ones.
    confirmed: watch::Receiver<bool>,
}

impl Gates {
    /// Asks the readiness probe after `pause`. A success counts once all else is behind the replica, too.
    async fn ask(&mut self, prober: &Prober, pause: Duration) -> Answer {
        passed(&mut self.has_started).await;
        tokio::time::sleep(pause).await;
        let asked = Instant::now();
        let said = prober.ask().await;
        let took = asked.elapsed();
        if said.is_ok() {
            passed(&mut self.confirmed).await;
        }
        Answer { said, took }
    }
}

/// What a readiness probe has said.
struct Answer {
    said: Result<(), String>,
    /// How long it took to say so.
    took: Duration,
}

/// Waits for true.
async fn passed(gate: &mut watch::Receiver<bool>) {
    // An error means that the container is about to be stopped.
    if gate.wait_for(|passed| *passed).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use pilotlight_proto::fleet::v1::Probe;

    use super::*;
    use crate::runtime::ProcessRuntime;

    fn readiness(begin: &Begin, period: Option<u64>) -> Readiness {
        let running = Running {
            replica: "a".to_owned(),
            pid: 0,
            address: (Ipv4Addr::LOCALHOST, 1).into(),
            started_at: 0,
            assignment: Default::default(),
            container: None,
            ports: Default::default(),
        };
        let seconds = |seconds| prost_types::Duration::try_from(Duration::from_secs(seconds)).ok();
        let probe = Probe {
            initial_delay: seconds(9),
            period: period.and_then(seconds),
            success_threshold: 2,
            ..Default::default()
        };
        let runtime = Arc::new(ProcessRuntime::new("/nowhere".as_ref(), "/nowhere".into()));
        Readiness::new(Prober::new(probe, &running, runtime), begin)
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_asked_after_a_small_part_of_the_time_it_has_taken() {
        let mut woken = readiness(&Begin::Woken(Instant::now()), None);
        assert_eq!(woken.first_pause(), Duration::ZERO);
        assert_eq!(woken.pause(Duration::ZERO), Duration::from_millis(2));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(woken.pause(Duration::ZERO), Duration::from_millis(10));
        let slow = readiness(&Begin::Woken(Instant::now()), Some(1));
        let dear = Duration::from_millis(30);
        assert_eq!(slow.pause(dear), Duration::from_millis(120), "such as a command in a container");
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(woken.pause(Duration::ZERO), Duration::from_millis(50), "no less often than the probe says");
        assert_eq!(slow.pause(Duration::ZERO), Duration::from_millis(60));
        assert!(!woken.failed() && !woken.succeeded() && woken.succeeded(), "its threshold is 2");
        assert_eq!(woken.pause(Duration::ZERO), Duration::from_secs(10));

        let mut kept = readiness(&Begin::Kept, None);
        assert_eq!(kept.first_pause(), Duration::ZERO);
        assert!(kept.succeeded(), "once is enough");
        assert!(!kept.failed() && !kept.failed() && kept.failed());
        assert_eq!(kept.pause(Duration::ZERO), Duration::from_millis(2), "it may be back at any moment");
        assert!(!kept.succeeded() && kept.succeeded(), "from then on as any other");

        let started = readiness(&Begin::Adopted, None);
        assert_eq!(
            (started.first_pause(), started.pause(Duration::ZERO)),
            (Duration::from_secs(9), Duration::from_millis(2))
        );
    }
}
