//! Slow request bodies: a client must send its request within reasonable time.

use std::{
    future::Future as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::answer::BoxError;

/// A request body may be waited for this long in total before the minimum rate applies.
pub const MIN_RATE_GRACE: Duration = Duration::from_secs(10);

/// How fast a request body must arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyLimits {
    /// Longest wait for the next bytes.
    pub idle_timeout: Duration,
    /// Minimum average rate after [`MIN_RATE_GRACE`], bytes per second; 0: none.
    pub min_bytes_per_second: u64,
}

/// The client sent its request's body too slowly.
#[derive(Debug, thiserror::Error)]
pub enum TooSlow {
    /// Nothing arrived.
    #[error("no bytes of the request body arrived for {0} s")]
    Idle(u64),
    /// Something arrived, but too slowly.
    #[error("the request body arrived more slowly than {0} bytes/s")]
    Rate(u64),
}

/// A request body that fails with [`TooSlow`] if it makes no progress.
///
/// Only time during which a reader waits for the client counts: a replica that reads slowly is not the
/// client's fault. The limits end with [`LimitsGuard::lift`], since a call that streams in both directions may
/// be silent for as long as it likes once its answer has begun.
pub struct RequestProgress<B> {
    source: B,
    limits: BodyLimits,
    lifted: Arc<AtomicBool>,
    /// Since when a reader waits for the next bytes.
    waiting_since: Option<Instant>,
    waited: Duration,
    read_bytes: u64,
    timer: Option<Pin<Box<Sleep>>>,
}

/// Ends the limits of a [`RequestProgress`].
#[derive(Debug, Clone)]
pub struct LimitsGuard(Arc<AtomicBool>);

impl LimitsGuard {
    /// From now on the body may take as long as it likes.
    pub fn lift(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<B> RequestProgress<B> {
    /// Applies `limits` to a body.
    pub fn new(source: B, limits: BodyLimits) -> (Self, LimitsGuard) {
        let lifted = Arc::new(AtomicBool::new(false));
        let guard = LimitsGuard(Arc::clone(&lifted));
        let body =
            Self { source, limits, lifted, waiting_since: None, waited: Duration::ZERO, read_bytes: 0, timer: None };
        (body, guard)
    }

    /// How long the body may be waited for in total, given the bytes that have arrived.
    fn total_wait_allowed(&self) -> Duration {
        match self.limits.min_bytes_per_second {
            0 => Duration::MAX,
            rate => MIN_RATE_GRACE.max(Duration::from_secs(self.read_bytes / rate)),
        }
    }

    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<TooSlow> {
        if self.lifted.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        let now = Instant::now();
        let since = *self.waiting_since.get_or_insert(now);
        let for_rate = self.total_wait_allowed().saturating_sub(self.waited);
        let wait = self.limits.idle_timeout.min(for_rate);
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(since + wait)));
        if timer.as_mut().poll(cx).is_pending() || self.lifted.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        Poll::Ready(if for_rate < self.limits.idle_timeout {
            TooSlow::Rate(self.limits.min_bytes_per_second)
        } else {
            TooSlow::Idle(self.limits.idle_timeout.as_secs())
        })
    }
}

impl<B> HttpBody for RequestProgress<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.source).poll_frame(cx) else {
            return self.poll_limits(cx).map(|slow| Some(Err(slow.into())));
        };
        self.timer = None;
        if let Some(since) = self.waiting_since.take() {
            self.waited += since.elapsed();
        }
        if let Some(Ok(frame)) = &frame {
            self.read_bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.source.size_hint()
    }
}
