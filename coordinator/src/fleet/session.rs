//! One gRPC stream per agent: authenticates it, reads what it says, writes what the loop tells it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use pilotlight_identity::{Member, MemberCertificate};
use pilotlight_proto::fleet::v1::{
    AgentMessage, Hello, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{EvictHub, Followed, LiveSessions, LogHub, RouteFeed, outbox::Outbox, wire::ToAgentStream};
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

    pub(crate) fn silence(&self) -> Duration {
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
    followed: Followed,
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
        followed: Followed,
        stopping: CancellationToken,
    ) -> Self {
        let next_session = AtomicU64::new(1);
        Self { handle, logs, evictions, access, sessions, followed, next_session, stopping }
    }
}

impl FleetService {
    /// Opens the session of one agent: the messages to it.
    pub(super) async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<ToAgentStream>, Status> {
        let caller = self.access.caller(&request)?;
        let remote = request.remote_addr().map(|address| address.ip());
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_WITHIN, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello within 10 s"))??;
        let Some(FromAgent::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("the first message of a session must be hello"));
        };
        check_node(caller.as_ref(), &hello.node_name)?;
        let hello = Hello { peer_address: reachable(hello.peer_address, remote), ..hello };

        let session = SessionHandle {
            node: hello.node_name.clone(),
            id: self.next_session.fetch_add(1, Ordering::Relaxed),
            outbox: Outbox::new(),
            closed: self.stopping.child_token(),
            heard: Heard::now(),
        };
        let fingerprint = caller.as_ref().map(|certificate| certificate.fingerprint.as_str());
        self.sessions.admit(
            &session.node,
            fingerprint,
            &hello.boot_id,
            session.closed.clone(),
            session.heard.clone(),
        )?;
        info!(node = %session.node, session = session.id, version = %hello.agent_version, "agent connected");
        let stopped = |_| {
            session.close();
            Status::unavailable("the coordinator is stopping")
        };
        self.handle
            .send(Input::Connected { session: session.clone(), hello: Box::new(hello) })
            .await
            .map_err(stopped)?;
        let messages = session.outbox.clone().stream(session.closed.clone()).map(Ok);
        let listener = Listener {
            session,
            handle: self.handle.clone(),
            logs: Arc::clone(&self.logs),
            evictions: Arc::clone(&self.evictions),
            sessions: Arc::clone(&self.sessions),
            followed: self.followed.clone(),
        };
        tokio::spawn(listener.run(inbound));
        Ok(Response::new(Box::pin(messages)))
    }
}

/// The coordinator's end of a session: reads what the agent says, and tells it who may be trusted.
struct Listener {
    session: SessionHandle,
    handle: Handle,
    logs: Arc<LogHub>,
    evictions: Arc<EvictHub>,
    sessions: Arc<LiveSessions>,
    followed: Followed,
}

impl Listener {
    /// Runs until either side ends the session.
    async fn run(mut self, mut inbound: Streaming<AgentMessage>) {
        self.followed.mark_changed();
        loop {
            let goes_on = tokio::select! {
                () = self.session.closed.cancelled() => false,
                news = self.followed.changed() => self.session.tell(news),
                message = inbound.message() => self.heard(message).await,
            };
            if !goes_on {
                break;
            }
        }
        let Self { session, handle, .. } = self;
        session.close();
        info!(node = %session.node, session = session.id, "agent disconnected");
        // The loop may have ended first; then nobody needs to know.
        let _ = handle.send(Input::Disconnected { node: session.node, session: session.id }).await;
    }

    /// Returns `true` if the session goes on.
    async fn heard(&self, message: Result<Option<AgentMessage>, Status>) -> bool {
        let session = &self.session;
        session.note_message();
        let message = match message {
            Ok(Some(message)) => message.message,
            Ok(None) => return false,
            Err(status) => {
                warn!(node = %session.node, %status, "session broke");
                return false;
            }
        };
        match message {
            Some(FromAgent::LogChunk(chunk)) => self.logs.deliver(chunk),
            Some(FromAgent::ModelEvicted(answer)) => self.evictions.deliver(answer),
            Some(FromAgent::TrustApplied(applied)) => self.sessions.trusts(&session.node, applied),
            Some(message) => {
                let input = Input::Heard { node: session.node.clone(), session: session.id, message };
                return self.handle.send(input).await.is_ok();
            }
            // A message kind that this version does not know: a newer agent.
            None => {}
        }
        true
    }
}

/// The address at which other nodes reach an agent: the one that it states, unless it listens on all addresses; then the
/// one that its connection comes from, with the port that it states.
fn reachable(stated: String, remote: Option<IpAddr>) -> String {
    match (stated.parse::<SocketAddr>(), remote) {
        (Ok(address), Some(remote)) if address.ip().is_unspecified() => {
            SocketAddr::new(remote.to_canonical(), address.port()).to_string()
        }
        _ => stated,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_listens_on_all_addresses_is_reached_where_it_comes_from() {
        let reached = |stated: &str, remote: Option<&str>| {
            reachable(stated.to_owned(), remote.map(|remote| remote.parse().unwrap()))
        };
        assert_eq!(reached("0.0.0.0:7444", Some("10.0.0.7")), "10.0.0.7:7444");
        assert_eq!(reached("[::]:7444", Some("fd00::7")), "[fd00::7]:7444");
        assert_eq!(reached("[::]:7444", Some("::ffff:10.0.0.7")), "10.0.0.7:7444");
        assert_eq!(reached("10.0.0.9:7444", Some("10.0.0.7")), "10.0.0.9:7444", "as it was told to state");
        assert_eq!(reached("gpu-7.example:7444", Some("10.0.0.7")), "gpu-7.example:7444");
        assert_eq!(reached("0.0.0.0:7444", None), "0.0.0.0:7444");
    }
}
