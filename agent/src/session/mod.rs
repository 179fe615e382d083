//! The stream to the coordinator: connects, says hello, reports, and hands on what it is told.
//!
//! While the coordinator is away the node goes on with its last assignment and routes; the session
//! tries again with growing pauses and, once connected, tells the whole truth anew.

mod backoff;
mod reports;

use std::{sync::Arc, time::Duration};

use pilotlight_identity::{Channel, Coordinators};
use pilotlight_proto::fleet::v1::{
    self as fleet, AgentMessage, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent,
    fleet_client::FleetClient,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{info, warn};

use crate::reconcile::Histories;
use backoff::Backoff;
pub use reports::Told;

/// Messages that may wait for the stream. Reports that find it full are skipped: the next one covers them.
const MESSAGES_WAITING: usize = 256;
/// A coordinator that does not answer a hello within this time is left for the next one.
const WELCOME_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of one message of the coordinator. An assignment holds the commands and variables of all replicas of a node.
const MESSAGE_MAX_BYTES: usize = 256 << 20;
/// Times in a row that a session follows the address of a leader without a pause.
const REDIRECTS_MAX: usize = 3;

/// What a session needs of its node.
pub struct Session {
    /// Whom to connect to.
    pub coordinators: Arc<Coordinators>,
    /// Who this node is.
    pub hello: fleet::Hello,
    /// What it has; sent at the start and on change.
    pub inventory: watch::Receiver<fleet::Inventory>,
    /// The health of its GPUs, if it has any; sent at the start and on change.
    pub gpus: watch::Receiver<Option<fleet::GpuReport>>,
    /// What runs; sent at the start and on change.
    pub statuses: watch::Receiver<fleet::ReplicaStatuses>,
    /// What replicas did; sent before their statuses.
    pub histories: Histories,
    /// Which models are on its disk; sent at the start and on change.
    pub cached: watch::Receiver<fleet::CacheReport>,
    /// Requests that wait for a replica.
    pub demands: mpsc::Receiver<fleet::Demand>,
    /// Takes what the coordinator says, and gives the reports.
    pub told: Arc<dyn Told>,
    /// True while connected.
    pub connected: watch::Sender<bool>,
}

impl Session {
    /// Keeps a session open until `stopping`, with whichever coordinator leads.
    pub async fn run(mut self, stopping: CancellationToken) {
        let mut backoff = Backoff::default();
        let mut attempts = Attempts::new(self.coordinators.configured());
        let mut clock = CoordinatorClock::default();
        loop {
            let (address, channel) = self.coordinators.current();
            let outcome = tokio::select! {
                () = stopping.cancelled() => return,
                outcome = self.once(channel, &mut backoff, &mut clock) => outcome,
            };
            if self.connected.send_replace(false) {
                attempts = Attempts::new(self.coordinators.configured());
            }
            let status = outcome.err().unwrap_or_else(|| Status::unavailable("the coordinator ended the session"));
            let redirected = self.coordinators.failed(&address, &status);
            let pause = if attempts.goes_on_at_once(redirected) { Duration::ZERO } else { backoff.next() };
            warn!(%address, ?pause, code = ?status.code(), reason = status.message(), "no session; trying again");
            tokio::select! {
                () = stopping.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One session, from hello to its end.
    async fn once(
        &mut self,
        channel: Channel,
        backoff: &mut Backoff,
        clock: &mut CoordinatorClock,
    ) -> Result<(), Status> {
        let (sender, receiver) = mpsc::channel(MESSAGES_WAITING);
        let say = Outbound(sender);
        say.now(FromAgent::Hello(clock.state_in(self.hello.clone())))?;
        say.now(FromAgent::Inventory(self.inventory.borrow_and_update().clone()))?;
        self.report_gpus(&say)?;
        // Before the statuses: what is placed because of them is placed where the models are.
        say.now(FromAgent::CacheReport(self.cached.borrow_and_update().clone()))?;
        let mut history = None;
        self.say_what_runs(&say, &mut history)?;

        let mut client = FleetClient::new(channel).max_decoding_message_size(MESSAGE_MAX_BYTES);
        let opening = client.session(ReceiverStream::new(receiver));
        let mut inbound = tokio::time::timeout(WELCOME_WITHIN, opening)
            .await
            .map_err(|_| Status::deadline_exceeded("the coordinator did not answer within 5 s"))??
            .into_inner();
        self.told.session_opened();
        let mut reports = tokio::time::interval(Duration::from_secs(1));
        reports.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Demand first: somebody is waiting.
                biased;
                Some(demand) = self.demands.recv() => say.now(FromAgent::Demand(demand))?,
                changed = self.statuses.changed() => {
                    changed.map_err(|_| Status::aborted("the reconciler ended"))?;
                    self.say_what_runs(&say, &mut history)?;
                }
                Ok(()) = self.cached.changed() => {
                    say.now(FromAgent::CacheReport(self.cached.borrow_and_update().clone()))?;
                }
                Ok(()) = self.gpus.changed() => self.report_gpus(&say)?,
                Ok(()) = self.inventory.changed() => {
                    say.now(FromAgent::Inventory(self.inventory.borrow_and_update().clone()))?;
                }
                message = inbound.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    let Some(message) = message.message else { continue };
                    if let ToAgent::Welcome(welcome) = &message {
                        backoff.session_opened();
                        clock.set(welcome);
                        self.connected.send_replace(true);
                        info!(cell = %welcome.cell, "connected to the coordinator");
                        if let Some(interval) = report_interval(welcome) {
                            reports = tokio::time::interval(interval);
                            reports.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                        }
                    }
                    let routes = match &message {
                        ToAgent::Routes(routes) if !routes.more => Some(routes.version),
                        _ => None,
                    };
                    self.told.take(message, &say);
                    if let Some(version) = routes {
                        say.if_room(FromAgent::RoutesApplied(fleet::RoutesApplied { version }));
                    }
                }
                _ = reports.tick() => {
                    say.if_room(FromAgent::QueueReport(self.told.report()));
                    let counters = self.told.counters();
                    if counters.is_some_and(|counters| !say.if_room(FromAgent::RequestCounters(counters))) {
                        self.told.counters_unsent();
                    }
                }
            }
        }
    }

    /// Sends the health of GPUs, if it is known.
    fn report_gpus(&mut self, say: &Outbound) -> Result<(), Status> {
        let report = self.gpus.borrow_and_update().clone();
        report.map_or(Ok(()), |report| say.now(FromAgent::GpuReport(report)))
    }

    /// Sends the statuses, and the histories before them if these are not of the `version` that was sent last.
    fn say_what_runs(&mut self, say: &Outbound, version: &mut Option<u64>) -> Result<(), Status> {
        let statuses = self.statuses.borrow_and_update().clone();
        if let Some((newest, histories)) = self.histories.since(*version) {
            *version = Some(newest);
            say.now(FromAgent::ReplicaHistories(histories))?;
        }
        say.now(FromAgent::ReplicaStatuses(statuses))
    }
}

/// The time that a coordinator stated last, and when.
#[derive(Debug, Default)]
struct CoordinatorClock(Option<(prost_types::Timestamp, Instant)>);

impl CoordinatorClock {
    fn set(&mut self, welcome: &fleet::Welcome) {
        self.0 = welcome.time.map(|time| (time, Instant::now())).or(self.0);
    }

    /// Adds it to a hello.
    fn state_in(&self, hello: fleet::Hello) -> fleet::Hello {
        let Some((time, stated)) = self.0 else { return hello };
        let coordinator_time_age = prost_types::Duration::try_from(stated.elapsed()).ok();
        fleet::Hello { coordinator_time: Some(time), coordinator_time_age, ..hello }
    }
}

/// Attempts since the last pause: each coordinator is asked once before there is another one.
struct Attempts {
    addresses: usize,
    addresses_left: usize,
    redirects_left: usize,
}

impl Attempts {
    fn new(addresses: usize) -> Self {
        // The one that failed counts as asked.
        Self { addresses, addresses_left: addresses.saturating_sub(1), redirects_left: REDIRECTS_MAX }
    }

    /// Returns `true` if the next attempt needs no pause.
    fn goes_on_at_once(&mut self, redirected: bool) -> bool {
        let left = if redirected { &mut self.redirects_left } else { &mut self.addresses_left };
        let more = *left > 0;
        *left = left.saturating_sub(1);
        if !more {
            *self = Self::new(self.addresses);
        }
        more
    }
}

/// The interval asked for, where it makes sense: 10 ms to 60 s.
fn report_interval(welcome: &fleet::Welcome) -> Option<Duration> {
    let interval = Duration::try_from(welcome.report_interval?).ok()?;
    (Duration::from_millis(10)..=Duration::from_secs(60)).contains(&interval).then_some(interval)
}

/// Where messages to the coordinator go. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outbound(mpsc::Sender<AgentMessage>);

impl Outbound {
    /// Sends, or ends the session where the stream is stuck: the next one tells everything anew.
    fn now(&self, message: FromAgent) -> Result<(), Status> {
        self.0
            .try_send(AgentMessage { message: Some(message) })
            .map_err(|_| Status::unavailable("the stream to the coordinator is stuck"))
    }

    /// Sends unless the stream is stuck; returns `true` if it was sent. A report that is skipped costs nothing: the next
    /// one covers its time.
    fn if_room(&self, message: FromAgent) -> bool {
        self.0.try_send(AgentMessage { message: Some(message) }).is_ok()
    }

    /// Sends as soon as there is room. False where the session has ended.
    pub async fn send(&self, message: FromAgent) -> bool {
        self.0.send(AgentMessage { message: Some(message) }).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_coordinator_is_asked_once_and_leaders_are_followed_before_there_is_a_pause() {
        let mut attempts = Attempts::new(3);
        let mut next = |redirected| attempts.goes_on_at_once(redirected);
        assert_eq!([next(false), next(false), next(false)], [true, true, false], "two others, then a pause");
        assert_eq!([next(true), next(false), next(false), next(false)], [true, true, true, false]);
        let mut circle = (0..20).map(|_| next(true));
        assert!(circle.any(|at_once| !at_once), "standbys that name each other do not keep it busy");
        assert!(!Attempts::new(1).goes_on_at_once(false));
    }
}
