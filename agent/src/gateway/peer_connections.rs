//! Connections to other nodes: one each, opened when a request first needs the node, and closed after an idle period.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    answer::{Body, BoxError},
    forward::Connect,
};

/// How often either end of a connection between nodes pings the other, and how long it waits for the answer.
pub(super) const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Shorter than the time in which an offer lapses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes that one stream between nodes may have unread. It bounds the memory of a slow reader.
pub(super) const STREAM_WINDOW: u32 = 1 << 20;
/// Bytes that all streams of a connection may have unread: HTTP/2's maximum, so that one stream whose reader is slow
/// cannot block the others, among them the one for slots.
pub(super) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// A connection on which no request was started for this long is closed once the running ones have ended.
pub(super) const CONNECTION_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to each node that requests have needed.
pub struct PeerConnectionPool {
    connect: Arc<dyn Connect>,
    nodes: Mutex<HashMap<String, Arc<PeerNode>>>,
}

/// A node whose address is known.
struct PeerNode {
    name: String,
    address: String,
    slot: tokio::sync::Mutex<ConnectionSlot>,
    /// Attempts to connect that failed.
    failures: AtomicU64,
    /// Cancelled when the node is gone or has another address.
    gone: CancellationToken,
    /// Cancelled with it, and when new requests are to use new connections.
    stale: CancellationToken,
}

impl PeerNode {
    fn new(name: &str, address: &str) -> Arc<Self> {
        let gone = CancellationToken::new();
        Arc::new(Self {
            name: name.to_owned(),
            address: address.to_owned(),
            slot: Default::default(),
            failures: AtomicU64::new(0),
            stale: gone.child_token(),
            gone,
        })
    }
}

#[derive(Default)]
struct ConnectionSlot {
    connection: Option<Connection>,
    /// Why the last attempt to connect failed.
    failure: String,
}

struct Connection {
    sender: PeerSender,
    last_used: Instant,
}

impl Connection {
    /// When it may be closed, unless it is used again.
    fn idle_at(&self) -> Instant {
        // A stream for slots holds its sender as long as it is open.
        let is_held = Arc::strong_count(&self.sender.in_use) > 1;
        if is_held { Instant::now() + CONNECTION_IDLE_TIMEOUT } else { self.last_used + CONNECTION_IDLE_TIMEOUT }
    }
}

/// Sends requests on a connection. The connection is not idle while this exists.
#[derive(Clone)]
pub struct PeerSender {
    requests: http2::SendRequest<Body>,
    in_use: Arc<()>,
}

impl PeerSender {
    /// The sender of requests.
    pub fn requests(&self) -> http2::SendRequest<Body> {
        self.requests.clone()
    }
}

impl PeerConnectionPool {
    /// No nodes are known yet.
    pub fn new(connect: Arc<dyn Connect>) -> Self {
        Self { connect, nodes: Mutex::default() }
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<String, Arc<PeerNode>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the addresses (`host:port`) of all nodes. Connections to other addresses take no new requests.
    pub fn set_addresses(&self, addresses: &BTreeMap<String, String>) {
        let mut nodes = self.nodes();
        nodes.retain(|name, node| {
            let is_known = addresses.get(name).is_some_and(|address| *address == node.address);
            if !is_known {
                node.gone.cancel();
            }
            is_known
        });
        for (name, address) in addresses {
            nodes.entry(name.clone()).or_insert_with(|| PeerNode::new(name, address));
        }
    }

    /// Opens new connections for new requests, because the certificates that connections were opened with are out of
    /// date. Running requests end on the connections that they have.
    pub fn refresh(&self) {
        for node in self.nodes().values_mut() {
            node.stale.cancel();
            *node = PeerNode::new(&node.name, &node.address);
        }
    }

    /// Cancelled when a long-lived stream to the node must move to another connection, because the node is gone, has
    /// another address, or its connections are out of date; `None` if the node is not known.
    pub fn cancellation(&self, node: &str) -> Option<CancellationToken> {
        self.nodes().get(node).map(|node| node.stale.clone())
    }

    /// The connection to a node, opened if there is none.
    ///
    /// # Errors
    /// The node is not known, or does not answer within [`CONNECT_TIMEOUT`].
    pub async fn sender(&self, node: &str) -> io::Result<PeerSender> {
        let known = self.nodes().get(node).cloned();
        let known = known.ok_or_else(|| io::Error::other(format!("node {node} is not known")))?;
        let failures = known.failures.load(Ordering::Relaxed);
        let mut slot = known.slot.lock().await;
        if let Some(connection) = slot.connection.as_mut().filter(|open| !open.sender.requests.is_closed()) {
            connection.last_used = Instant::now();
            return Ok(connection.sender.clone());
        }
        // An attempt that failed while this call waited for its turn speaks for this one, too.
        if known.failures.load(Ordering::Relaxed) > failures {
            return Err(io::Error::other(slot.failure.clone()));
        }
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, self.connect(&known));
        let connected = tokio::select! {
            connected = connecting => connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
            () = known.gone.cancelled() => Err(io::Error::other("the node is gone or has another address")),
        };
        match connected {
            Ok(sender) => {
                slot.connection = Some(Connection { sender: sender.clone(), last_used: Instant::now() });
                Ok(sender)
            }
            Err(error) => {
                let error = format!("cannot connect to node {node} at {}: {error}", known.address);
                slot.failure.clone_from(&error);
                known.failures.fetch_add(1, Ordering::Relaxed);
                Err(io::Error::other(error))
            }
        }
    }

    async fn connect(&self, node: &Arc<PeerNode>) -> io::Result<PeerSender> {
        let stream = self.connect.connect(&node.name, &node.address).await?;
        let (requests, serving) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let node = Arc::clone(node);
        tokio::spawn(async move {
            let mut serving = std::pin::pin!(serving);
            let ended = tokio::select! {
                ended = &mut serving => ended,
                // The running requests keep the connection open until they end.
                () = close_when_idle(&node) => serving.await,
            };
            if let Err(error) = ended {
                tracing::debug!(node = %node.name, %error, "connection to node ended");
            }
        });
        Ok(PeerSender { requests, in_use: Arc::default() })
    }
}

/// Drops the pool's handle to the connection once it is idle.
async fn close_when_idle(node: &PeerNode) {
    loop {
        let idle_at = match &node.slot.lock().await.connection {
            Some(connection) => connection.idle_at(),
            None => return,
        };
        tokio::time::sleep_until(idle_at).await;
        let mut slot = node.slot.lock().await;
        if slot.connection.as_ref().is_some_and(|connection| connection.idle_at() <= Instant::now()) {
            slot.connection = None;
            return;
        }
    }
}

/// Calls gRPC services of a node on the connection that requests use.
#[derive(Debug, Clone)]
pub struct PeerChannel(http2::SendRequest<Body>);

impl PeerChannel {
    /// On this connection.
    pub fn new(sender: http2::SendRequest<Body>) -> Self {
        Self(sender)
    }
}

impl tower::Service<Request<tonic::body::Body>> for PeerChannel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let request = request.map(|body| body.map_err(|status| Box::new(status) as BoxError).boxed_unsync());
        Box::pin(self.0.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::atomic::AtomicUsize};

    use async_trait::async_trait;
    use bytes::Bytes;
    use futures::future::join_all;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use hyper::service::service_fn;

    use super::*;
    use crate::gateway::PeerStream;

    /// A node that takes no connection and refuses none.
    #[derive(Default)]
    struct Silent(AtomicUsize);

    #[async_trait]
    impl Connect for Silent {
        async fn connect(&self, _: &str, _: &str) -> io::Result<Box<dyn PeerStream>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            std::future::pending().await
        }
    }

    fn addresses(port: u16) -> BTreeMap<String, String> {
        [("far".to_owned(), format!("far:{port}"))].into()
    }

    #[tokio::test(start_paused = true)]
    async fn requests_to_a_silent_node_share_one_attempt_to_connect() {
        let silent = Arc::new(Silent::default());
        let pool = PeerConnectionPool::new(Arc::clone(&silent) as _);
        pool.set_addresses(&addresses(1));
        let began = Instant::now();
        let outcomes = join_all((0..50).map(|_| pool.sender("far"))).await;
        assert!(outcomes.iter().all(Result::is_err));
        assert_eq!(began.elapsed(), CONNECT_TIMEOUT);
        assert_eq!(silent.0.load(Ordering::Relaxed), 1);
        assert!(pool.sender("far").await.is_err());
        assert_eq!(silent.0.load(Ordering::Relaxed), 2, "a later request tries again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_moves_ends_the_attempt_to_connect_to_its_previous_address() {
        let pool = PeerConnectionPool::new(Arc::new(Silent::default()));
        pool.set_addresses(&addresses(1));
        let began = Instant::now();
        let (outcome, ()) = tokio::join!(pool.sender("far"), async { pool.set_addresses(&addresses(2)) });
        assert!(outcome.is_err());
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    /// Connects to a server that sends an endless answer for `/endless` and a short one for everything else.
    struct Endless;

    #[async_trait]
    impl Connect for Endless {
        async fn connect(&self, _: &str, _: &str) -> io::Result<Box<dyn PeerStream>> {
            let (near, far) = tokio::io::duplex(64 << 10);
            let service = service_fn(|request: Request<Incoming>| async move {
                let frame = || Ok::<_, BoxError>(Frame::data(Bytes::from_static(&[b'x'; 16 << 10])));
                let count = if request.uri().path() == "/endless" { usize::MAX } else { 1 };
                let frames = futures::stream::iter(std::iter::repeat_with(frame).take(count));
                Ok::<_, Infallible>(Response::new(StreamBody::new(frames)))
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(far), service));
            Ok(Box::new(near))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_refresh_new_requests_use_a_new_connection_and_the_old_one_ends_when_idle() {
        let pool = PeerConnectionPool::new(Arc::new(Endless));
        pool.set_addresses(&addresses(1));
        let cancelled = pool.cancellation("far").unwrap();
        let old = pool.sender("far").await.unwrap().requests();
        pool.refresh();
        assert!(cancelled.is_cancelled() && !pool.cancellation("far").unwrap().is_cancelled());
        let _new = pool.sender("far").await.unwrap();
        let body = http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync();
        let mut sender = old.clone();
        let answer = sender.send_request(Request::get("https://far/short").body(body).unwrap()).await.unwrap();
        assert_eq!(answer.collect().await.unwrap().to_bytes().len(), 16 << 10, "a running request is not cut");
        drop((old, sender));
        tokio::time::sleep(CONNECTION_IDLE_TIMEOUT * 2).await;
        let fresh = pool.sender("far").await.unwrap();
        assert!(!fresh.requests().is_closed());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_reads_does_not_block_other_requests_to_the_node() {
        let pool = PeerConnectionPool::new(Arc::new(Endless));
        pool.set_addresses(&addresses(1));
        let ask = async |path: &str| {
            let body = http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync();
            let request = Request::get(format!("https://far{path}")).body(body).unwrap();
            pool.sender("far").await.unwrap().requests().send_request(request).await.unwrap()
        };
        let _unread = ask("/endless").await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let answer = tokio::time::timeout(Duration::from_secs(60), ask("/short").await.collect()).await;
        assert_eq!(answer.expect("it is not blocked").unwrap().to_bytes().len(), 16 << 10);
    }
}
