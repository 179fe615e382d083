//! Bodies on their way: limited in size, sent again where that is safe, and told when they end.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;

use super::answer::{Body, BoxError};

/// Bytes of a request that are kept so that it can be sent again. A larger one can be sent again only
/// until its first byte has been read.
const KEPT_MOST: usize = 64 << 10;

/// The body has more bytes than it may.
#[derive(Debug, thiserror::Error)]
#[error("request body is larger than {0} bytes")]
pub struct TooLarge(pub u64);

/// A request's body, which several attempts may read one after the other.
#[derive(Clone)]
pub struct Replay {
    shared: Arc<Mutex<Shared>>,
    too_large: Arc<AtomicBool>,
}

struct Shared {
    source: Body,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// False once more has been read than is kept.
    complete: bool,
    ended: bool,
    trailers: Option<http::HeaderMap>,
    read_bytes: u64,
    /// What the client has announced.
    announced_bytes: u64,
    limit: u64,
}

impl Replay {
    /// Wraps a body; more than `limit` bytes end it with [`TooLarge`].
    pub fn new<B>(body: B, limit: u64) -> Self
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let announced_bytes = body.size_hint().lower();
        let shared = Shared {
            source: body.map_err(Into::into).boxed_unsync(),
            kept: Vec::new(),
            kept_bytes: 0,
            complete: true,
            ended: false,
            trailers: None,
            read_bytes: 0,
            announced_bytes,
            limit,
        };
        Self { shared: Arc::new(Mutex::new(shared)), too_large: Arc::new(AtomicBool::new(false)) }
    }

    /// The body for one attempt, or `None` where what was read is not kept.
    pub fn attempt(&self) -> Option<Body> {
        let complete = self.shared.lock().unwrap_or_else(PoisonError::into_inner).complete;
        complete.then(|| {
            Attempt { shared: Arc::clone(&self.shared), next: 0, done: false, large: Arc::clone(&self.too_large) }
                .boxed_unsync()
        })
    }

    /// Bytes that it has, as far as is known: announced, or read so far.
    pub fn bytes(&self) -> u64 {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.announced_bytes.max(shared.read_bytes)
    }

    /// True once the body has turned out to be too large.
    pub fn too_large(&self) -> bool {
        self.too_large.load(Ordering::Relaxed)
    }
}

struct Attempt {
    shared: Arc<Mutex<Shared>>,
    next: usize,
    done: bool,
    large: Arc<AtomicBool>,
}

impl HttpBody for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.done {
            return Poll::Ready(None);
        }
        let shared = Arc::clone(&self.shared);
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = shared.kept.get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
        }
        if shared.ended {
            self.done = true;
            return Poll::Ready(shared.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = match ready!(Pin::new(&mut shared.source).poll_frame(cx)) {
            None => {
                shared.ended = true;
                self.done = true;
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                shared.complete = false;
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => frame,
        };
        match frame.into_data() {
            Ok(bytes) => {
                shared.read_bytes += bytes.len() as u64;
                if shared.read_bytes > shared.limit {
                    shared.complete = false;
                    self.large.store(true, Ordering::Relaxed);
                    return Poll::Ready(Some(Err(Box::new(TooLarge(shared.limit)))));
                }
                if shared.complete && shared.kept_bytes + bytes.len() <= KEPT_MOST {
                    shared.kept_bytes += bytes.len();
                    shared.kept.push(bytes.clone());
                    self.next += 1;
                } else {
                    shared.complete = false;
                    shared.kept = Vec::new();
                    self.next = 0;
                }
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    shared.trailers = Some(trailers.clone());
                    shared.ended = true;
                    self.done = true;
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        self.done || (self.next >= shared.kept.len() && !shared.ended && shared.source.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        // Before anything was read, the source knows; afterwards chunks will do.
        if shared.read_bytes == 0 { shared.source.size_hint() } else { SizeHint::default() }
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
