//! Accepts clients' connections, serves them, and closes those that do nothing.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use pilotlight_telemetry::RateLimit;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{
    DataPath,
    connection::{ClientIo, ConnectionState, StreamExecutor, WatchedBody, client_gone},
    metrics::CloseReason,
};

/// Requests that run get this long when the agent stops.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Those that still wait for a replica after this time are answered, so that their clients can ask another node.
const WAIT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that is new when the agent stops has this long for its first request.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection that is closed for doing nothing gets this long for its protocol's farewell.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent HTTP/2 client is pinged after this time, and gone if it does not answer within as much.
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(20);
/// Bytes of one upload that wait here unread.
const HTTP2_STREAM_WINDOW: u32 = 256 << 10;
/// The same of all uploads of a connection. Uploads that wait for a slot must not block the other requests of their
/// connection, and what a client makes the gateway hold must be bounded.
const HTTP2_CONNECTION_WINDOW: u32 = 32 * HTTP2_STREAM_WINDOW;
/// TCP asks a silent client after this time: one that is gone resets the connection.
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after an accept that failed, so that connections can end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listener for clients.
pub(super) struct Listener {
    path: Arc<DataPath>,
    /// With it, every request is for this host.
    host: Option<Arc<str>>,
    connections: Arc<Connections>,
    server: auto::Builder<StreamExecutor>,
    shed_log: RateLimit,
    accept_log: RateLimit,
}

impl Listener {
    pub(super) fn new(path: Arc<DataPath>, host: Option<Arc<str>>) -> Self {
        let write_timeout = path.clients.response_write_timeout;
        let executor = StreamExecutor { write_timeout, metrics: path.metrics.clone() };
        let mut server = auto::Builder::new(executor);
        // The driver below measures the time for heads, and notices clients that are gone; hyper's own timeout for
        // heads would also end idle connections, and its check would cut off clients that only half-close.
        server.http1().timer(TokioTimer::new()).header_read_timeout(None).half_close(true);
        server
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(1000)
            .initial_stream_window_size(HTTP2_STREAM_WINDOW)
            .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
            .keep_alive_interval(HTTP2_PING_INTERVAL)
            .keep_alive_timeout(HTTP2_PING_INTERVAL);
        let connections = Arc::new(Connections::new(path.clients.max_connections));
        Self { path, host, connections, server, shed_log: RateLimit::default(), accept_log: RateLimit::default() }
    }

    /// Serves until `stopping`; then requests that run may end, and those that wait for a replica may still get one.
    pub(super) async fn serve(self, listener: TcpListener, stopping: CancellationToken) {
        let running = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stopping.cancelled() => break,
                accepted = self.accept(&listener) => accepted,
            };
            match accepted {
                Ok((stream, client)) => {
                    running.spawn(self.connection(stream, client, stopping.clone()));
                }
                Err(error) => {
                    self.path.metrics.accept_errors.inc();
                    if self.accept_log.allow() {
                        let open = self.connections.len();
                        warn!(%error, open, "cannot accept a client's connection; closing the oldest idle ones");
                    }
                    self.connections.shed(self.connections.batch());
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        running.close();
        if tokio::time::timeout(WAIT_TIMEOUT, running.wait()).await.is_err() {
            self.path.wait_ended.cancel();
            // What has not ended by then is cut off by the end of the process.
            let _ = tokio::time::timeout(DRAIN_TIMEOUT - WAIT_TIMEOUT, running.wait()).await;
        }
    }

    /// The next connection, as soon as there is room for one.
    async fn accept(&self, listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
        self.make_room().await;
        listener.accept().await
    }

    /// Closes the oldest idle connections when few are left until the limit; waits at the limit.
    async fn make_room(&self) {
        loop {
            let ended = self.connections.ended.notified();
            let (open, limit) = (self.connections.len(), self.connections.limit);
            if open - self.connections.closing.load(Ordering::Relaxed).min(open) >= self.connections.high_water() {
                let shed = self.connections.shed(self.connections.batch());
                if self.shed_log.allow() {
                    warn!(open, limit, shed, "nearly as many connections as allowed: closed the oldest idle ones");
                }
            }
            if open < limit {
                return;
            }
            ended.await;
        }
    }

    /// Serves one connection until it ends, expires or is shed.
    fn connection(
        &self,
        stream: TcpStream,
        client: SocketAddr,
        stopping: CancellationToken,
    ) -> impl Future<Output = ()> + Send + use<> {
        set_options(&stream);
        let (path, host) = (Arc::clone(&self.path), self.host.clone());
        let place = self.connections.add(&path);
        let (stream, state) = (Arc::new(stream), Arc::clone(&place.entry.state));
        let io = ClientIo::new(Arc::clone(&stream), Arc::clone(&state), path.clients.response_write_timeout);
        let (serving, requests) = (Arc::clone(&path), Arc::clone(&state));
        let service = service_fn(move |request| {
            let (path, host, state) = (Arc::clone(&serving), host.clone(), Arc::clone(&requests));
            let guard = state.begin_request(http::Request::version(&request));
            async move {
                let response = path.serve(client, host.as_deref(), request).await;
                state.response_began();
                Ok::<_, Infallible>(response.map(|body| WatchedBody::new(body, guard)))
            }
        });
        let serving = self.server.serve_connection(TokioIo::new(io), service).into_owned();
        async move {
            let mut serving = pin!(serving);
            let reason = tokio::select! {
                biased;
                outcome = serving.as_mut() => {
                    if let Err(error) = outcome {
                        debug!(%client, %error, "connection ended");
                    }
                    if state.write_timed_out() {
                        path.metrics.response_write_timeouts.inc();
                    }
                    return;
                }
                () = stopping.cancelled() => None,
                () = place.entry.shed.cancelled() => Some(CloseReason::Shed),
                () = client_gone(&stream, &state) => {
                    debug!(%client, "the client is gone");
                    return;
                }
                reason = state.expired(&path.clients) => Some(reason),
            };
            if let Some(reason) = reason {
                debug!(%client, ?reason, "connection closed");
                path.metrics.count_closed(reason);
            }
            if reason == Some(CloseReason::HeaderTimeout)
                || (reason == Some(CloseReason::Shed) && !state.has_requested())
            {
                // A farewell would be lost on a client that has not begun.
                return;
            }
            // A client that has just connected is about to send its request, which hyper would cut off.
            if reason.is_none()
                && !state.has_requested()
                && tokio::time::timeout(FIRST_REQUEST_TIMEOUT, serving.as_mut()).await.is_ok()
            {
                return;
            }
            serving.as_mut().graceful_shutdown();
            let patience = if reason.is_some() { CLOSE_TIMEOUT } else { DRAIN_TIMEOUT };
            // A client that has sent a request meanwhile gets its answer.
            while tokio::time::timeout(patience, serving.as_mut()).await.is_err() && state.idle_since().is_none() {}
        }
    }
}

fn set_options(stream: &TcpStream) {
    use rustix::net::sockopt;
    // Without these only latency suffers, or a client that is gone is noticed late.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, TCP_KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(stream, TCP_KEEPALIVE_INTERVAL);
}

/// The connections of one listener.
struct Connections {
    open: Mutex<HashMap<u64, Entry>>,
    next: AtomicU64,
    limit: usize,
    /// Connections that were shed and have not ended yet.
    closing: AtomicUsize,
    /// Notified when a connection has ended.
    ended: Notify,
}

#[derive(Clone)]
struct Entry {
    state: Arc<ConnectionState>,
    shed: CancellationToken,
}

impl Connections {
    fn new(limit: usize) -> Self {
        Self {
            open: Mutex::default(),
            next: AtomicU64::new(0),
            limit,
            closing: AtomicUsize::new(0),
            ended: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn len(&self) -> usize {
        self.lock().len()
    }

    /// From this many connections on, idle ones are closed.
    fn high_water(&self) -> usize {
        (self.limit - self.limit / 10).max(1)
    }

    /// Idle connections that are closed at a time: finding them costs a look at all.
    fn batch(&self) -> usize {
        (self.limit / 20).max(1)
    }

    fn add(self: &Arc<Self>, path: &Arc<DataPath>) -> Place {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Entry { state: ConnectionState::new(), shed: CancellationToken::new() };
        self.lock().insert(id, entry.clone());
        path.metrics.open_connections.inc();
        Place { connections: Arc::clone(self), path: Arc::clone(path), id, entry }
    }

    /// Closes the connections that have been idle for longest, at most `count`. Returns how many.
    fn shed(&self, count: usize) -> usize {
        let mut idle: Vec<(Instant, u64, CancellationToken)> = self
            .lock()
            .iter()
            .filter(|(_, entry)| !entry.shed.is_cancelled())
            .filter_map(|(id, entry)| Some((entry.state.idle_since()?, *id, entry.shed.clone())))
            .collect();
        idle.sort_by_key(|(since, id, _)| (*since, *id));
        idle.truncate(count);
        self.closing.fetch_add(idle.len(), Ordering::Relaxed);
        for (_, _, shed) in &idle {
            shed.cancel();
        }
        idle.len()
    }
}

/// A connection's place among those that are open.
struct Place {
    connections: Arc<Connections>,
    path: Arc<DataPath>,
    id: u64,
    entry: Entry,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
        if self.entry.shed.is_cancelled() {
            self.connections.closing.fetch_sub(1, Ordering::Relaxed);
        }
        self.path.metrics.open_connections.dec();
        self.connections.ended.notify_waiters();
    }
}
