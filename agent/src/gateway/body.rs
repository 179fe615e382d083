//! Bodies on their way: limited in size, sent again where that is safe, and told when they end.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::sync::Notify;

use super::{
    answer::{Answer, Body, BoxError},
    progress::TooSlow,
};

/// Bytes of a request that are kept so that it can be sent again. A larger one can be sent again only
/// until its first byte has been read.
const KEPT_MOST: usize = 64 << 10;

/// The body has more bytes than it may.
#[derive(Debug, thiserror::Error)]
#[error("request body is larger than {0} bytes")]
pub struct TooLarge(pub u64);

/// Why a request's body can never be sent completely. The client is the cause, not the replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientFault {
    /// The body has more than this many bytes.
    TooLarge(u64),
    /// The body arrived too slowly, or stopped arriving.
    TooSlow(String),
    /// The body is malformed, or the client broke off.
    Malformed(String),
}

impl From<ClientFault> for Answer {
    fn from(fault: ClientFault) -> Self {
        match fault {
            ClientFault::TooLarge(limit) => Self::BodyTooLarge { limit },
            ClientFault::TooSlow(reason) => Self::RequestTimeout { reason },
            ClientFault::Malformed(reason) => Self::BadRequest { reason: format!("request body: {reason}") },
        }
    }
}

/// A request's body, which several attempts may read one after the other.
#[derive(Clone)]
pub struct Replay {
    shared: Arc<Mutex<Shared>>,
    failure: Arc<Failure>,
}

/// The first fault of the body, and who waits for it.
#[derive(Default)]
struct Failure {
    fault: OnceLock<ClientFault>,
    changed: Notify,
}

impl Failure {
    fn set(&self, fault: ClientFault) {
        // Only the first fault counts.
        let _ = self.fault.set(fault);
        self.changed.notify_waiters();
    }
}

struct Shared {
    source: Body,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// `false` once more has been read than is kept.
    complete: bool,
    ended: bool,
    /// `true` while a reader waits for bytes that the client has not sent.
    awaiting_client: bool,
    trailers: Option<http::HeaderMap>,
    read_bytes: u64,
    /// Length that the client has announced, bytes.
    announced_bytes: u64,
    /// Exact length, bytes; `None` if the client has not announced it.
    exact_bytes: Option<u64>,
    limit: u64,
}

impl Shared {
    /// Reads the next frame from the client and keeps its bytes if there is room, or if `keep` is `true`.
    fn poll_source(
        &mut self,
        cx: &mut Context<'_>,
        failure: &Failure,
        keep: bool,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.source).poll_frame(cx);
        self.awaiting_client = polled.is_pending();
        let frame = match ready!(polled) {
            None => {
                self.ended = true;
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                self.complete = false;
                failure.set(classify(&error));
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => frame,
        };
        match frame.into_data() {
            Ok(bytes) => Poll::Ready(Some(self.take_in(bytes, failure, keep))),
            Err(frame) => {
                self.ended = true;
                self.trailers = frame.into_trailers().ok();
                Poll::Ready(self.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn take_in(&mut self, bytes: Bytes, failure: &Failure, keep: bool) -> Result<Frame<Bytes>, BoxError> {
        self.read_bytes += bytes.len() as u64;
        if self.read_bytes > self.limit {
            self.complete = false;
            failure.set(ClientFault::TooLarge(self.limit));
            return Err(Box::new(TooLarge(self.limit)));
        }
        if self.complete && (keep || self.kept_bytes + bytes.len() <= KEPT_MOST) {
            self.kept_bytes += bytes.len();
            self.kept.push(bytes.clone());
        } else {
            self.complete = false;
            self.kept = Vec::new();
        }
        Ok(Frame::data(bytes))
    }
}

fn classify(error: &BoxError) -> ClientFault {
    match error.downcast_ref::<TooSlow>() {
        Some(slow) => ClientFault::TooSlow(slow.to_string()),
        None => ClientFault::Malformed(super::forward::chain(error.as_ref())),
    }
}

impl Replay {
    /// Wraps a body; more than `limit` bytes end it with [`TooLarge`].
    pub fn new<B>(body: B, limit: u64) -> Self
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let hint = body.size_hint();
        let shared = Shared {
            source: body.map_err(Into::into).boxed_unsync(),
            kept: Vec::new(),
            kept_bytes: 0,
            complete: true,
            ended: false,
            awaiting_client: false,
            trailers: None,
            read_bytes: 0,
            announced_bytes: hint.lower(),
            exact_bytes: hint.exact(),
            limit,
        };
        Self { shared: Arc::new(Mutex::new(shared)), failure: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so much of the body has arrived that the request may take a slot: all of it, or its first 64 KiB. Of a
    /// body whose length the client has not announced the first bytes are enough, because the client may wait for an
    /// answer before it sends more, as gRPC streams do. What arrives is kept for [`Self::attempt`].
    ///
    /// # Errors
    /// The client sent them too slowly, malformed, or broke off.
    pub async fn wait_until_begun(&self) -> Result<(), ClientFault> {
        poll_fn(|cx| {
            let mut shared = self.lock();
            let enough = shared.exact_bytes.map_or(1, |exact| exact.min(KEPT_MOST as u64));
            while shared.read_bytes < enough && !shared.ended && !shared.source.is_end_stream() {
                let Some(Ok(_)) = ready!(shared.poll_source(cx, &self.failure, true)) else { break };
            }
            Poll::Ready(())
        })
        .await;
        self.client_fault().map_or(Ok(()), Err)
    }

    /// The body for one attempt, or `None` if what was read is not kept.
    pub fn attempt(&self) -> Option<Body> {
        let complete = self.lock().complete;
        complete.then(|| {
            Attempt {
                shared: Arc::clone(&self.shared),
                failure: Arc::clone(&self.failure),
                next: 0,
                sent_bytes: 0,
                done: false,
            }
            .boxed_unsync()
        })
    }

    /// Bytes that it has, as far as is known: announced, or read so far.
    pub fn bytes(&self) -> u64 {
        let shared = self.lock();
        shared.announced_bytes.max(shared.read_bytes)
    }

    /// Returns `true` if a replica waits for bytes that the client has not sent yet.
    pub fn is_awaiting_client(&self) -> bool {
        self.lock().awaiting_client
    }

    /// Why the body can never be sent completely, if the client is the cause.
    pub fn client_fault(&self) -> Option<ClientFault> {
        self.failure.fault.get().cloned()
    }

    /// Waits for `sending`, which is dropped at once if the client turns out to be unable to send the body.
    ///
    /// # Errors
    /// The client's fault.
    pub async fn unless_client_fails<F: Future>(&self, sending: F) -> Result<F::Output, ClientFault> {
        let failed = async {
            loop {
                let changed = self.failure.changed.notified();
                if let Some(fault) = self.client_fault() {
                    return fault;
                }
                changed.await;
            }
        };
        tokio::select! {
            biased;
            fault = failed => Err(fault),
            sent = sending => Ok(sent),
        }
    }
}

struct Attempt {
    shared: Arc<Mutex<Shared>>,
    failure: Arc<Failure>,
    /// The next of the kept frames.
    next: usize,
    sent_bytes: u64,
    done: bool,
}

impl HttpBody for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.done {
            return Poll::Ready(None);
        }
        let (shared, failure) = (Arc::clone(&self.shared), Arc::clone(&self.failure));
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = shared.kept.get(self.next) {
            self.next += 1;
            self.sent_bytes += bytes.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
        }
        if shared.ended {
            self.done = true;
            return Poll::Ready(shared.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(shared.poll_source(cx, &failure, false));
        self.next = shared.kept.len();
        self.done = shared.ended;
        if let Some(Ok(frame)) = &frame {
            self.sent_bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let at_end = if shared.ended { shared.trailers.is_none() } else { shared.source.is_end_stream() };
        self.done || (self.next >= shared.kept.len() && at_end)
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared
            .exact_bytes
            .map_or_else(SizeHint::default, |exact| SizeHint::with_exact(exact.saturating_sub(self.sent_bytes)))
    }
}

/// A response body that holds on to something until it ends.
pub struct Holding<T> {
    body: Body,
    held: Option<T>,
}

impl<T: Send + Unpin + 'static> Holding<T> {
    /// `held` is dropped when the body has ended, or its reader has gone.
    pub fn new(body: Body, held: T) -> Self {
        Self { body, held: Some(held) }
    }
}

impl<T: Send + Unpin + 'static> HttpBody for Holding<T> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if matches!(frame, None | Some(Err(_))) {
            self.held = None;
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
