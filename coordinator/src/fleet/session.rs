//! One gRPC stream per agent: authenticates it, reads what it says, writes what the loop tells it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use pilotlight_identity::{Member, MemberCertificate, RevocationList, Revocations};
use pilotlight_proto::fleet::v1::{
    self as fleet, AgentMessage, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{EvictHub, LiveSessions, LogHub, RouteFeed, outbox::Outbox, wire::ToAgentStream};
use crate::{
    api::access::Access,
    reconcile::{Handle, commands::Input},
};

/// An agent that opens a stream and says nothing is let go after this time.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// The loop's end of a session.
#[derive(Debug, Clone)]
pub struct SessionHandle {
    /// Node name, as certified.
    pub node: String,
    /// Tells sessions of one node apart; grows.
    pub id: u64,
    outbox: Outbox,
    closed: CancellationToken,
    /// When the last message came; known even while the loop is busy.
    heard: Heard,
}

/// When the last message of a session came. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    started: Instant,
    /// Milliseconds after `started`; [`Heard::ALWAYS`] for sessions of virtual nodes.
    at: Arc<AtomicU64>,
}

impl Heard {
    const ALWAYS: u64 = u64::MAX;

    /// Now.
    pub(crate) fn now() -> Self {
        Self { started: Instant::now(), at: Arc::default() }
    }

    fn always() -> Self {
        Self { at: Arc::new(AtomicU64::new(Self::ALWAYS)), ..Self::now() }
    }

    /// A message has come.
    fn note(&self) {
        self.at.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        match self.at.load(Ordering::Relaxed) {
            Self::ALWAYS => Duration::ZERO,
            at => self.started.elapsed().saturating_sub(Duration::from_millis(at)),
        }
    }
}

impl SessionHandle {
    /// A message has come.
    pub(crate) fn note_message(&self) {
        self.heard.note();
    }

    /// Time since the last message came.
    pub fn silence(&self) -> Duration {
        self.heard.silence()
    }

    /// Sends a message; an assignment replaces one that has not been sent yet. Returns `false` if the session has ended,
    /// or ends because too many requests wait.
    #[must_use]
    pub fn tell(&self, message: ToAgent) -> bool {
        let sent = !self.closed.is_cancelled() && self.outbox.push(message);
        if !sent {
            self.close();
        }
        sent
    }

    /// Sends all routes, and their changes from now on.
    pub fn follow_routes(&self, feed: RouteFeed) {
        self.outbox.follow(feed);
    }

    /// There are newer routes in the feed.
    pub fn notify_routes(&self) {
        self.outbox.notify_routes();
    }

    /// A session that nobody listens to, for virtual nodes.
    pub fn to_nobody(node: &str) -> Self {
        let (outbox, closed) = (Outbox::new(), CancellationToken::new());
        Self { node: node.to_owned(), id: 0, outbox, closed, heard: Heard::always() }
    }

    /// A session whose messages are taken with [`SessionHandle::received`].
    #[cfg(test)]
    pub(crate) fn for_tests(node: &str) -> Self {
        Self { heard: Heard::now(), ..Self::to_nobody(node) }
    }

    /// The next message that the agent receives, if there is one.
    #[cfg(test)]
    pub(crate) fn received(&self) -> Option<ToAgent> {
        use prost::Message as _;
        let bytes = self.outbox.take()?;
        pilotlight_proto::fleet::v1::CoordinatorMessage::decode(bytes).unwrap().message
    }

    /// Ends the session.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Resolves once the session has ended.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

/// The gRPC service.
pub struct FleetService {
    handle: Handle,
    logs: Arc<LogHub>,
    evictions: Arc<EvictHub>,
    access: Access,
    sessions: Arc<LiveSessions>,
    revocations: Arc<Revocations>,
    next_session: AtomicU64,
    stopping: CancellationToken,
}

impl FleetService {
    /// Serves sessions until `stopping`.
    pub fn new(
        handle: Handle,
        logs: Arc<LogHub>,
        evictions: Arc<EvictHub>,
        access: Access,
        sessions: Arc<LiveSessions>,
        revocations: Arc<Revocations>,
        stopping: CancellationToken,
    ) -> Self {
        let next_session = AtomicU64::new(1);
        Self { handle, logs, evictions, access, sessions, revocations, next_session, stopping }
    }
}

impl FleetService {
    /// Opens the session of one agent: the messages to it.
    pub(super) async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<ToAgentStream>, Status> {
        let caller = self.access.caller(&request)?;
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_WITHIN, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello within 10 s"))??;
        let Some(FromAgent::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("the first message of a session must be hello"));
        };
        check_node(caller.as_ref(), &hello.node_name)?;

        let session = SessionHandle {
            node: hello.node_name.clone(),
            id: self.next_session.fetch_add(1, Ordering::Relaxed),
            outbox: Outbox::new(),
            closed: self.stopping.child_token(),
            heard: Heard::now(),
        };
        let fingerprint = caller.as_ref().map(|certificate| certificate.fingerprint.as_str());
        self.sessions.admit(&session.node, fingerprint, &hello.boot_id, session.closed.clone())?;
        info!(node = %session.node, session = session.id, version = %hello.agent_version, "agent connected");
        let stopped = |_| {
            session.close();
            Status::unavailable("the coordinator is stopping")
        };
        self.handle
            .send(Input::Connected { session: session.clone(), hello: Box::new(hello) })
            .await
            .map_err(stopped)?;
        let (logs, evictions) = (Arc::clone(&self.logs), Arc::clone(&self.evictions));
        let revocations = self.revocations.subscribe();
        let messages = session.outbox.clone().stream(session.closed.clone()).map(Ok);
        tokio::spawn(listen(inbound, session, self.handle.clone(), logs, evictions, revocations));
        Ok(Response::new(Box::pin(messages)))
    }
}

/// Reads what the agent says until either side ends the session.
async fn listen(
    mut inbound: Streaming<AgentMessage>,
    session: SessionHandle,
    handle: Handle,
    logs: Arc<LogHub>,
    evictions: Arc<EvictHub>,
    mut revocations: watch::Receiver<Arc<RevocationList>>,
) {
    // The agent gets the list that there is now, too.
    revocations.mark_changed();
    loop {
        let message = tokio::select! {
            () = session.closed.cancelled() => break,
            Ok(()) = revocations.changed() => {
                let list = revocation_list(&revocations.borrow_and_update());
                if session.tell(ToAgent::Revocations(list)) {
                    continue;
                }
                break;
            }
            message = inbound.message() => message,
        };
        session.note_message();
        match message {
            Ok(Some(AgentMessage { message: Some(FromAgent::LogChunk(chunk)) })) => logs.deliver(chunk),
            Ok(Some(AgentMessage { message: Some(FromAgent::ModelEvicted(answer)) })) => evictions.deliver(answer),
            Ok(Some(AgentMessage { message: Some(message) })) => {
                let input = Input::Heard { node: session.node.clone(), session: session.id, message };
                if handle.send(input).await.is_err() {
                    break;
                }
            }
            // A message kind that this version does not know: a newer agent.
            Ok(Some(AgentMessage { message: None })) => {}
            Ok(None) => break,
            Err(status) => {
                warn!(node = %session.node, %status, "session broke");
                break;
            }
        }
    }
    session.close();
    info!(node = %session.node, session = session.id, "agent disconnected");
    // The loop may have ended first; then nobody needs to know.
    let _ = handle.send(Input::Disconnected { node: session.node, session: session.id }).await;
}

fn revocation_list(list: &RevocationList) -> fleet::Revocations {
    let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
    let revocations = list.iter().map(|(subject, issued_until)| fleet::Revocation {
        subject: subject.clone(),
        issued_until: Some(at(*issued_until)),
    });
    fleet::Revocations { revocations: revocations.collect() }
}

/// Refuses a session that speaks for another node than its certificate names.
fn check_node(caller: Option<&MemberCertificate>, node: &str) -> Result<(), Status> {
    match caller.map(|certificate| &certificate.member) {
        None => Ok(()),
        Some(Member::Node(name)) if name == node => Ok(()),
        Some(other) => {
            Err(Status::permission_denied(format!("hello names node {node:?}, but the certificate is for {other}")))
        }
    }
}
