//! Holds a request until there is a slot for it, sends it, and tries again where no replica saw it.

use std::{sync::Arc, time::Duration};

use http::{Request, Response, request::Parts};
use http_body_util::BodyExt as _;
use pilotlight_proto::fleet::v1::Demand;
use pilotlight_telemetry::TraceContext;
use tokio::time::Instant;
use tracing::{Instrument as _, Span, field, info_span};

use super::{
    DataPath,
    answer::{Answer, Body},
    body::{Holding, Replay},
    failure,
    forward::Failure,
    split::Destination,
    tokens,
};
use crate::sidecar::{Grant, Permit, Refusal, RevisionQueue, Target, TokenCount};

/// Pause before a request that no replica has seen is sent again; doubles up to [`MAX_RETRY_PAUSE`].
const INITIAL_RETRY_PAUSE: Duration = Duration::from_millis(20);
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(1);
/// An agent notices the exit of a process within this time.
pub(super) const EXIT_NOTICE_TIME: Duration = Duration::from_millis(200);
const SENT_IN_PART: &str = "the connection broke while the request was sent";

impl DataPath {
    /// Sends a request to a replica of the revision, as soon as one is free; or to another one's, where
    /// the revision has meanwhile lost its share and all its replicas.
    pub(super) async fn hold(
        &self,
        destination: &Destination,
        mut queue: Arc<RevisionQueue>,
        parts: Parts,
        body: Replay,
    ) -> Result<Response<Body>, Answer> {
        let limits = queue.limits();
        let deadline = Instant::now() + limits.timeout;
        let seconds = limits.timeout.as_secs();
        let (mut pause, mut again) = (INITIAL_RETRY_PAUSE, false);
        let counts = tokens::counts(&parts);
        // A client that sends nothing must not hold a slot.
        let begun = tokio::time::timeout_at(deadline, body.wait_until_begun()).await;
        begun.map_err(|_| slow_client(seconds))??;
        loop {
            let content = body.attempt().ok_or_else(|| Answer::BadGateway { reason: SENT_IN_PART.to_owned() })?;
            let mut count = counts.then(|| queue.tokens().begin(body.bytes()));
            let counted = Arc::clone(&queue);
            let granted = tokio::time::timeout_at(deadline, self.slot(destination, &mut queue, again)).await;
            if !Arc::ptr_eq(&counted, &queue) {
                // Another revision took it over, and counts it from now on.
                count = counts.then(|| queue.tokens().begin(body.bytes()));
            }
            let grant = granted.map_err(|_| failure::overdue(&queue, seconds))??;
            if matches!(grant.target, Target::Peer { .. }) {
                // From here on that node counts it.
                count = None;
            }
            let request = Request::from_parts(parts.clone(), content);
            let sending = body.unless_client_fails(self.proxy(&grant, request));
            let sent = tokio::time::timeout_at(deadline, sending).await;
            match sent.map_err(|_| overdue(&body, seconds))?? {
                Ok(mut response) => {
                    if counts && count.is_none() {
                        tokens::heard(response.headers_mut(), queue.tokens());
                    }
                    return Ok(answered(response, &body, count, grant.permit));
                }
                Err(_) if let Some(fault) = body.client_fault() => return Err(fault.into()),
                Err(Failure::Unseen(reason)) => {
                    if let Target::Peer { node, .. } = &grant.target {
                        queue.penalize(node);
                    }
                    drop(grant);
                    if body.attempt().is_none() || Instant::now() + pause >= deadline {
                        return Err(Answer::BadGateway { reason });
                    }
                }
                Err(Failure::Broken(reason)) => {
                    release_after_exit(grant);
                    return Err(Answer::BadGateway { reason });
                }
            }
            self.metrics.retries.inc();
            tokio::time::sleep(pause).await;
            (pause, again) = ((2 * pause).min(MAX_RETRY_PAUSE), true);
        }
    }

    /// A slot of the revision, or of the one that takes its place while the request waits.
    async fn slot(
        &self,
        destination: &Destination,
        queue: &mut Arc<RevisionQueue>,
        again: bool,
    ) -> Result<Grant, Answer> {
        loop {
            let granted = tokio::select! {
                biased;
                granted = self.slot_of(queue, again) => Some(granted),
                () = destination.lost(queue) => None,
            };
            match granted {
                Some(Ok(grant)) => return Ok(grant),
                // One that is left behind may hold nobody any more.
                Some(Err(answer)) if !destination.left_behind(queue) => return Err(answer),
                _ => {}
            }
            let next = destination.pick().filter(|next| next.key() != queue.key());
            *queue = next.ok_or_else(|| Answer::NoRevision { service: destination.service().to_owned() })?;
        }
    }

    /// A slot, at once where one is free; else the wait is a span of its own.
    async fn slot_of(&self, queue: &Arc<RevisionQueue>, again: bool) -> Result<Grant, Answer> {
        let mut waiting = queue.enter(again).map_err(|Refusal::Full { limit }| {
            self.metrics.shed.inc();
            Answer::QueueFull { limit }
        })?;
        if let Some(grant) = waiting.now() {
            return Ok(grant);
        }
        let mut failures = queue.failure();
        let known = failures.borrow_and_update().clone();
        let span = info_span!("gateway.wait", otel.kind = "internal", revision = queue.key());
        if !queue.any_ready() {
            if let Some(failure) = known.as_deref().filter(|failure| failure::backs_off(failure)) {
                return Err(failure::answer(failure));
            }
            let context = TraceContext::of(&span);
            let demand = Demand {
                revision: queue.key().to_owned(),
                waiting: 1,
                traceparent: context.traceparent,
                tracestate: context.tracestate,
            };
            // Where the channel is full, the next report says the same.
            let _ = self.demands.try_send(demand);
        }
        let grant = tokio::select! {
            biased;
            grant = waiting.granted().instrument(span) => grant,
            failure = failure::next(&mut failures, known) => return Err(failure::answer(&failure)),
            away = self.coordinator.unavailable_for(queue) => {
                return Err(Answer::CoordinatorUnavailable { seconds: away.as_secs() });
            }
            () = self.wait_ended.cancelled() => return Err(Answer::Stopping),
        };
        grant.ok_or(Answer::Stopping)
    }

    /// The hop to the replica, or to the node that has it.
    pub(super) async fn proxy(&self, grant: &Grant, mut request: Request<Body>) -> Result<Response<Body>, Failure> {
        let (node, replica) = match &grant.target {
            Target::Local { replica, .. } => (&self.node, replica),
            Target::Peer { node, replica, .. } => (node, replica),
        };
        let span = info_span!(
            "gateway.proxy",
            otel.kind = "client",
            server.address = %node,
            pilotlight.replica = %replica,
            http.request.method = %request.method(),
            http.response.status_code = field::Empty,
            otel.status_code = field::Empty,
        );
        pilotlight_telemetry::inject(&span, request.headers_mut());
        let sending = async {
            let outcome = self.forwarder.send(&grant.target, request).await;
            match &outcome {
                Ok(response) => {
                    Span::current().record("http.response.status_code", response.status().as_u16());
                }
                Err(_) => {
                    Span::current().record("otel.status_code", "ERROR");
                }
            }
            outcome
        };
        sending.instrument(span).await
    }
}

/// Gives a slot back once an exit of its replica has been noticed: the next request must not be sent to a process that
/// has just ended. A replica that lives loses one slot for this moment.
pub(super) fn release_after_exit(grant: Grant) {
    tokio::spawn(async move {
        tokio::time::sleep(EXIT_NOTICE_TIME).await;
        drop(grant);
    });
}

/// Why there is no answer at the deadline.
fn overdue(body: &Replay, seconds: u64) -> Answer {
    if body.is_awaiting_client() { slow_client(seconds) } else { Answer::Timeout { seconds, waiting: false } }
}

/// The client has not sent its body within the service's timeout; the replica is not to blame.
fn slow_client(seconds: u64) -> Answer {
    Answer::RequestTimeout { reason: format!("the request body did not arrive within {seconds} s") }
}

/// An answer on its way: its slot and its tokens are given back when it has ended, or its reader has gone.
pub(super) fn answered(
    response: Response<Body>,
    request: &Replay,
    count: Option<TokenCount>,
    permit: Permit,
) -> Response<Body> {
    let (head, mut body) = response.into_parts();
    if let Some(mut count) = count {
        count.body(request.bytes());
        if head.status.is_success() {
            count.answered();
        }
        body = tokens::counted(body, &head.headers, count);
    }
    Response::from_parts(head, Holding::new(body, permit.answered()).boxed_unsync())
}
