//! A revision that cannot serve: who is answered with its failure, and who waits for the next attempt.
//!
//! A request that arrives while the replica is in back-off is answered at once. Any other request waits, and demands a
//! replica: an attempt is due, even if the last one failed. Who waits is answered with the next failure, but not with
//! the one that was known on arrival.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use pilotlight_proto::fleet::v1::RevisionFailure;
use tokio::sync::watch;

use super::answer::Answer;
use crate::sidecar::RevisionQueue;

/// Returns `true` if the next attempt is yet to come, by this node's clock. The time is the clock's of another node: if
/// they differ by more than the back-off, requests wait for an attempt instead of being answered at once.
pub(super) fn backs_off(failure: &RevisionFailure) -> bool {
    !failure.may_pass && remaining(failure).is_some()
}

/// The answer to a request that got no slot in time, with the reason if it is known.
pub(super) fn overdue(queue: &RevisionQueue, seconds: u64) -> Answer {
    match queue.failure().borrow().as_deref() {
        Some(failure) => {
            let cause = format!("{}: {}", failure.reason, failure.message);
            Answer::NotReady { seconds, cause }
        }
        None => Answer::Timeout { seconds, waiting: true },
    }
}

/// Time until the next attempt; `None` if it is due, or none is planned before the next request.
fn remaining(failure: &RevisionFailure) -> Option<Duration> {
    let next = SystemTime::try_from(failure.next_attempt_at?).ok()?;
    next.duration_since(SystemTime::now()).ok().filter(|remaining| !remaining.is_zero())
}

/// Waits for a failure that waiting does not cure, other than the one that is known.
pub(super) async fn next(
    failures: &mut watch::Receiver<Option<Arc<RevisionFailure>>>,
    known: Option<Arc<RevisionFailure>>,
) -> Arc<RevisionFailure> {
    let known = known.map(|known| known.attempt);
    let is_new = |failure: &Option<Arc<RevisionFailure>>| {
        failure.as_ref().is_some_and(|failure| !failure.may_pass && Some(failure.attempt) != known)
    };
    let failure = failures.wait_for(is_new).await.ok().and_then(|failure| failure.clone());
    match failure {
        Some(failure) => failure,
        // The queue is gone, and with it the request's place in it.
        None => std::future::pending().await,
    }
}

/// What the client is told.
pub(super) fn answer(failure: &RevisionFailure) -> Answer {
    let mut message = failure.message.clone();
    if !failure.last_log_lines.is_empty() {
        message += &format!("; last output: {}", failure.last_log_lines.join(" | "));
    }
    let retry_after = remaining(failure).map_or(1, |remaining| remaining.as_secs_f64().ceil() as u64);
    Answer::ReplicaFailed { reason: failure.reason.clone(), message, retry_after }
}
