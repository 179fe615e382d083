//! One client's connection: what it is doing, how long it may, and when it is closed.
//!
//! Two clocks watch a response that its reader does not take. On the socket, [`ClientIo`] measures the time during
//! which a write is pending; that covers HTTP/1.1, and HTTP/2 if nothing at all is read. An HTTP/2 stream whose own
//! flow-control window stays closed blocks no write, so [`WatchedBody`] measures the time between "a frame was given
//! to hyper" and "hyper asks for the next one": hyper asks only when the previous frame was accepted. While the
//! replica is merely quiet, neither clock runs.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::Version;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

use super::{
    answer::{Body, BoxError},
    clients::ClientSettings,
    metrics::{CloseReason, GatewayMetrics},
};

const HTTP2_PREFACE_START: &[u8] = b"PRI";
/// Bytes of HTTP/2's preface and of an empty SETTINGS frame: less is no handshake.
const HTTP2_HANDSHAKE_BYTES: usize = 24 + 9;
/// Sent to a client that has closed its side while it waits for its answer. Clients must be able to parse interim
/// responses, and skip this one; but the kernel of one that is gone answers with a reset.
const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// How often such a client is probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);

/// What a connection is doing. Shared by its socket, its requests and its driver.
#[derive(Debug)]
pub(super) struct ConnectionState {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    accepted: Instant,
    /// First bytes that were read.
    start: Vec<u8>,
    /// Requests whose response has not ended.
    active: usize,
    /// `true` once the head of a request was complete.
    has_requested: bool,
    /// Since when there is no request.
    idle_since: Instant,
    /// Since when the head of the next request is incomplete.
    head_since: Option<Instant>,
    /// `true` while an HTTP/1.1 request waits for the head of its response.
    awaits_response: bool,
    /// `true` while bytes were given to the socket and not flushed.
    unflushed: bool,
    write_timed_out: bool,
}

impl Inner {
    fn is_http2(&self) -> bool {
        self.start.starts_with(HTTP2_PREFACE_START)
    }
}

impl ConnectionState {
    pub(super) fn new() -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            inner: Mutex::new(Inner {
                accepted: now,
                start: Vec::new(),
                active: 0,
                has_requested: false,
                idle_since: now,
                head_since: None,
                awaits_response: false,
                unflushed: false,
                write_timed_out: false,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The head of a request has arrived. It counts until the guard is dropped.
    pub(super) fn begin_request(self: &Arc<Self>, version: Version) -> RequestGuard {
        let mut inner = self.lock();
        inner.active += 1;
        inner.has_requested = true;
        inner.head_since = None;
        // HTTP/1.0 knows no interim responses, so such a client cannot be probed.
        inner.awaits_response = version == Version::HTTP_11;
        RequestGuard(Arc::clone(self))
    }

    /// The head of the response is complete.
    pub(super) fn response_began(&self) {
        self.lock().awaits_response = false;
    }

    /// Returns `true` once the head of a request was complete.
    pub(super) fn has_requested(&self) -> bool {
        self.lock().has_requested
    }

    /// Since when it has had no request; `None` while it has one.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let inner = self.lock();
        (inner.active == 0 && !inner.unflushed).then_some(inner.idle_since)
    }

    /// When it is closed and why, if nothing changes; `None` while it has a request.
    fn expires(&self, settings: &ClientSettings) -> Option<(Instant, CloseReason)> {
        let inner = self.lock();
        if inner.active > 0 || inner.unflushed {
            return None;
        }
        let is_open_http2 = inner.is_http2() && inner.start.len() >= HTTP2_HANDSHAKE_BYTES;
        let has_begun = inner.has_requested || is_open_http2;
        let head_since = if has_begun { inner.head_since } else { Some(inner.accepted) };
        Some(match head_since {
            Some(since) => (since + settings.header_timeout, CloseReason::HeaderTimeout),
            None => (inner.idle_since + settings.idle_timeout, CloseReason::IdleTimeout),
        })
    }

    /// Waits until it must be closed.
    pub(super) async fn expired(&self, settings: &ClientSettings) -> CloseReason {
        loop {
            let now = Instant::now();
            let expires = self.expires(settings);
            if let Some((at, reason)) = expires
                && at <= now
            {
                return reason;
            }
            // A head may begin at any time, so its timeout is also how often this looks.
            let look = now + settings.header_timeout;
            tokio::time::sleep_until(expires.map_or(look, |(at, _)| at.min(look))).await;
        }
    }

    fn read(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        if inner.start.len() < HTTP2_HANDSHAKE_BYTES {
            let missing = HTTP2_HANDSHAKE_BYTES - inner.start.len();
            inner.start.extend(&bytes[..missing.min(bytes.len())]);
        }
        if inner.active == 0 && !inner.is_http2() {
            inner.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// Returns `true` if an interim response may be written between two polls of the connection.
    fn can_probe(&self) -> bool {
        let inner = self.lock();
        inner.awaits_response && !inner.unflushed && !inner.is_http2()
    }

    pub(super) fn write_timed_out(&self) -> bool {
        self.lock().write_timed_out
    }
}

/// A request of a connection, until its response has ended.
#[derive(Debug)]
pub(super) struct RequestGuard(Arc<ConnectionState>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.active -= 1;
        inner.idle_since = Instant::now();
        inner.awaits_response = false;
    }
}

/// Waits until an HTTP/1.1 client is gone that has a request here. One that has only closed its side of the
/// connection still gets its response. TCP cannot tell the two apart until something is written, so such a client is
/// probed with an interim response; once its response has begun, the next bytes of it do the same.
pub(super) async fn client_gone(stream: &TcpStream, state: &ConnectionState) {
    // Readiness is never an error on Linux while the runtime lives; without it nothing is known.
    if stream.ready(Interest::PRIORITY).await.is_err() {
        return std::future::pending().await;
    }
    loop {
        if stream.take_error().ok().flatten().is_some() {
            return;
        }
        if state.can_probe() {
            match stream.try_write(PROBE) {
                Ok(written) if written == PROBE.len() => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A part of a probe makes the rest unreadable.
                _ => return,
            }
        }
        tokio::select! {
            _ = stream.ready(Interest::ERROR) => return,
            () = tokio::time::sleep(PROBE_INTERVAL) => {}
        }
    }
}

/// A client's socket, which fails if a write makes no progress for the response write timeout.
pub(super) struct ClientIo {
    stream: Arc<TcpStream>,
    state: Arc<ConnectionState>,
    write_timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl ClientIo {
    pub(super) fn new(stream: Arc<TcpStream>, state: Arc<ConnectionState>, write_timeout: Duration) -> Self {
        Self { stream, state, write_timeout, stalled: None }
    }

    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        self.state.lock().unflushed = true;
        while self.stream.poll_write_ready(cx)?.is_ready() {
            match write(&self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    self.stalled = None;
                    return Poll::Ready(written);
                }
            }
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stalled.as_mut().poll(cx));
        self.state.lock().write_timed_out = true;
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its response")))
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let before = buffer.filled().len();
            match self.stream.try_read_buf(buffer) {
                Ok(_) => {
                    self.state.read(&buffer.filled()[before..]);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |stream| stream.try_write_vectored(buffers))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state.lock().unflushed = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Write).map_err(Into::into))
    }
}

tokio::task_local! {
    /// The HTTP/2 stream whose request the task serves.
    static STREAM: Arc<StreamWatch>;
}

/// Since when an HTTP/2 stream has not taken a frame.
#[derive(Debug, Default)]
struct StreamWatch(Mutex<Option<Instant>>);

impl StreamWatch {
    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a frame has not been taken for `timeout`.
    async fn stalled(&self, timeout: Duration) {
        loop {
            let now = Instant::now();
            let due = self.lock().unwrap_or(now) + timeout;
            if due <= now {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// Runs each HTTP/2 stream as a task that ends, and thereby resets the stream, when its client does not take its
/// response.
#[derive(Debug, Clone)]
pub(super) struct StreamExecutor {
    pub(super) write_timeout: Duration,
    pub(super) metrics: GatewayMetrics,
}

impl<F> hyper::rt::Executor<F> for StreamExecutor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let Self { write_timeout, metrics } = self.clone();
        tokio::spawn(async move {
            let watch = Arc::<StreamWatch>::default();
            tokio::select! {
                biased;
                _ = STREAM.scope(Arc::clone(&watch), stream) => {}
                () = watch.stalled(write_timeout) => { metrics.response_write_timeouts.inc(); }
            }
        });
    }
}

/// A response on its way to a client.
pub(super) struct WatchedBody {
    body: Body,
    _request: RequestGuard,
    watch: Option<Arc<StreamWatch>>,
}

impl WatchedBody {
    /// Wraps the body of the request that this task serves.
    pub(super) fn new(body: Body, request: RequestGuard) -> Self {
        Self { body, _request: request, watch: STREAM.try_with(Arc::clone).ok() }
    }
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(watch) = &self.watch {
            *watch.lock() = None;
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(watch), Some(Ok(_))) = (&self.watch, &frame) {
            *watch.lock() = Some(Instant::now());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
