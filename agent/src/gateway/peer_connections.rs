//! Connections to other nodes: one each, opened when a request first needs the node, and closed after an idle period.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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

const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A connection on which no request was started for this long is closed once the running ones have ended.
pub(super) const CONNECTION_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to each node that requests have needed.
pub struct PeerConnectionPool {
    connect: Arc<dyn Connect>,
    nodes: Mutex<HashMap<String, Arc<PeerNode>>>,
}

/// A node whose address is known.
struct PeerNode {
    address: String,
    connection: tokio::sync::Mutex<Option<Connection>>,
    /// Cancelled when the node is gone or has another address.
    gone: CancellationToken,
}

struct Connection {
    sender: http2::SendRequest<Body>,
    last_used: Instant,
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
            nodes.entry(name.clone()).or_insert_with(|| {
                let gone = CancellationToken::new();
                Arc::new(PeerNode { address: address.clone(), connection: Default::default(), gone })
            });
        }
    }

    /// Cancelled when the node is gone or has another address; `None` if the node is not known.
    pub fn gone(&self, node: &str) -> Option<CancellationToken> {
        self.nodes().get(node).map(|node| node.gone.clone())
    }

    /// The connection to a node, opened if there is none.
    ///
    /// # Errors
    /// The node is not known, or does not answer.
    pub async fn sender(&self, node: &str) -> io::Result<http2::SendRequest<Body>> {
        let known = self.nodes().get(node).cloned();
        let known = known.ok_or_else(|| io::Error::other(format!("node {node} is not known")))?;
        let mut slot = known.connection.lock().await;
        if let Some(connection) = slot.as_mut().filter(|connection| !connection.sender.is_closed()) {
            connection.last_used = Instant::now();
            return Ok(connection.sender.clone());
        }
        let stream = self.connect.connect(node, &known.address).await?;
        let (sender, serving) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_INTERVAL)
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let (name, idle) = (node.to_owned(), Arc::clone(&known));
        tokio::spawn(async move {
            let closing = close_when_idle(&idle);
            let mut serving = std::pin::pin!(serving);
            let ended = tokio::select! {
                ended = &mut serving => ended,
                // The running requests keep the connection open until they end.
                () = closing => serving.await,
            };
            if let Err(error) = ended {
                tracing::debug!(node = %name, %error, "connection to node ended");
            }
        });
        *slot = Some(Connection { sender: sender.clone(), last_used: Instant::now() });
        Ok(sender)
    }
}

/// Drops the pool's handle to the connection once no request was started for [`CONNECTION_IDLE_TIMEOUT`].
async fn close_when_idle(node: &PeerNode) {
    loop {
        let idle_at = match node.connection.lock().await.as_ref() {
            Some(connection) => connection.last_used + CONNECTION_IDLE_TIMEOUT,
            None => Instant::now() + CONNECTION_IDLE_TIMEOUT,
        };
        tokio::time::sleep_until(idle_at).await;
        let mut connection = node.connection.lock().await;
        if connection.as_ref().is_none_or(|connection| connection.last_used.elapsed() >= CONNECTION_IDLE_TIMEOUT) {
            *connection = None;
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
