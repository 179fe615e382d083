//! Accepts TLS connections, and closes those that do nothing.

use std::{
    collections::VecDeque,
    future::Future as _,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use pilotlight_telemetry::RateLimit;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use rustix::process::{Resource, getrlimit};
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::{AbortHandle, JoinSet},
    time::{Instant, Sleep},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::{Connected, TcpConnectInfo, TlsConnectInfo};
use tracing::{debug, warn};

use crate::{Revocations, revocations::Revoked, transport::first};

/// A client must complete its TLS handshake within this time.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After the handshake a client must send its first bytes within this time.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);
/// A client without a certificate has this long for what it may do: join, or ask for health.
const UNAUTHENTICATED_LIFETIME: Duration = Duration::from_secs(60);
/// Connections without a certificate at the same time; the oldest one makes room for the next.
const MAX_UNAUTHENTICATED: usize = 128;
/// Handshakes at the same time, at most; the oldest one makes room for the next.
const MAX_HANDSHAKES: usize = 1024;
/// Pause after an accept that failed, so that connections can end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Labels of a refused connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reason: &'static str,
}

/// Counts TLS connections that were refused. Clones share their values.
#[derive(Debug, Clone, Default)]
pub struct AcceptMetrics(Family<RefusalLabels, Counter>);

impl AcceptMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("tls_connections_refused", "TLS connections that were refused", self.0.clone());
    }

    fn count(&self, reason: &'static str) {
        self.0.get_or_create(&RefusalLabels { reason }).inc();
    }
}

/// Accepts TLS connections. Handshakes run as tasks of their own: a slow or failing one delays nobody else and ends
/// nothing. Errors of the listener are logged, and the oldest handshakes are given up.
///
/// A connection whose client's certificate is revoked while it is open is closed. One whose certificate is revoked
/// already is handed on: the caller refuses it in words that the client can read.
pub fn accept_tls(
    listener: TcpListener,
    config: ServerConfig,
    revocations: Arc<Revocations>,
    metrics: AcceptMetrics,
) -> impl Stream<Item = io::Result<TlsConnection>> {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let accept_log = RateLimit::default();
    async_stream::stream! {
        let mut handshakes = Handshakes { metrics: metrics.clone(), ..Handshakes::default() };
        let mut unauthenticated = Unauthenticated { metrics: metrics.clone(), ..Unauthenticated::default() };
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => handshakes.start(acceptor.clone(), stream, peer),
                    Err(error) => {
                        metrics.count("accept_failed");
                        let running = handshakes.running.len();
                        if accept_log.allow() {
                            warn!(%error, handshakes = running, "cannot accept a TLS connection");
                        }
                        handshakes.abort_oldest(running / 2);
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(ended) = handshakes.running.join_next() => {
                    if let Ok(Some(stream)) = ended {
                        yield Ok(unauthenticated.watch(stream, &revocations));
                    }
                }
            }
        }
    }
}

/// Handshakes that run.
#[derive(Default)]
struct Handshakes {
    running: JoinSet<Option<TlsStream<TcpStream>>>,
    /// The oldest first; some may have ended.
    by_age: VecDeque<AbortHandle>,
    metrics: AcceptMetrics,
}

impl Handshakes {
    fn start(&mut self, acceptor: TlsAcceptor, stream: TcpStream, peer: SocketAddr) {
        while self.by_age.front().is_some_and(AbortHandle::is_finished) {
            self.by_age.pop_front();
        }
        if self.running.len() >= max_handshakes() {
            self.abort_oldest(1);
        }
        self.by_age.push_back(self.running.spawn(handshake(acceptor, stream, peer, self.metrics.clone())));
    }

    fn abort_oldest(&mut self, count: usize) {
        let mut aborted = 0;
        while aborted < count
            && let Some(oldest) = self.by_age.pop_front()
        {
            if !oldest.is_finished() {
                aborted += 1;
                self.metrics.count("too_many_handshakes");
            }
            oldest.abort();
        }
    }
}

/// At most a quarter of the file descriptors that the process may have.
fn max_handshakes() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files / 4).unwrap_or(usize::MAX).clamp(1, MAX_HANDSHAKES)
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    metrics: AcceptMetrics,
) -> Option<TlsStream<TcpStream>> {
    // Without it only latency suffers.
    let _ = stream.set_nodelay(true);
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            debug!(%peer, %error, "TLS handshake refused");
            metrics.count("handshake_failed");
            None
        }
        Err(_) => {
            debug!(%peer, "no TLS handshake within 10 s");
            metrics.count("handshake_timeout");
            None
        }
    }
}

/// Connections without a certificate, the oldest first; each ends when its sender is dropped.
#[derive(Default)]
struct Unauthenticated {
    connections: VecDeque<oneshot::Sender<()>>,
    metrics: AcceptMetrics,
}

impl Unauthenticated {
    fn watch(&mut self, stream: TlsStream<TcpStream>, revocations: &Revocations) -> TlsConnection {
        let certificate = first(stream.get_ref().1.peer_certificates()).ok();
        let revoked = certificate.and_then(|certificate| revocations.watch(&certificate));
        let is_authenticated = stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty());
        let evicted = (!is_authenticated).then(|| {
            self.connections.retain(|connection| !connection.is_closed());
            if self.connections.len() >= MAX_UNAUTHENTICATED {
                self.connections.pop_front();
                self.metrics.count("too_many_unauthenticated");
            }
            let (evict, evicted) = oneshot::channel();
            self.connections.push_back(evict);
            evicted
        });
        let accepted = Instant::now();
        let first_bytes = Box::pin(tokio::time::sleep_until(accepted + FIRST_BYTES_TIMEOUT));
        TlsConnection { stream, accepted, has_read: false, deadline: Some(first_bytes), evicted, revoked }
    }
}

/// An accepted TLS connection. Reading fails if the client sends nothing at first, or if it has no certificate and
/// has been connected for too long.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    accepted: Instant,
    has_read: bool,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Only for a client without a certificate.
    evicted: Option<oneshot::Receiver<()>>,
    /// Resolves once the client's certificate is revoked.
    revoked: Option<Revoked>,
}

impl TlsConnection {
    pub(crate) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.stream.get_ref().1.peer_certificates()
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if let Some(revoked) = &mut self.revoked
            && revoked.poll_revoked(cx).is_ready()
        {
            return Poll::Ready(Revoked::error());
        }
        if let Some(evicted) = &mut self.evicted
            && Pin::new(evicted).poll(cx).is_ready()
        {
            let reason = "too many connections without a certificate";
            return Poll::Ready(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        let Some(deadline) = &mut self.deadline else { return Poll::Pending };
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the client was connected for too long to no purpose"))
    }

    /// Bytes have arrived: a member of the cell may stay.
    fn read_first(&mut self) {
        self.has_read = true;
        if self.evicted.is_none() {
            self.deadline = None;
        } else if let Some(deadline) = &mut self.deadline {
            deadline.as_mut().reset(self.accepted + UNAUTHENTICATED_LIFETIME);
        }
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if !self.has_read && buffer.filled().len() > before {
            self.read_first();
        }
        if let Poll::Ready(error) = self.poll_closed(cx) {
            return Poll::Ready(Err(error));
        }
        read
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = TlsConnectInfo<TcpConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}
