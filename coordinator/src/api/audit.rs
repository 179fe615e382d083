//! A log record of each call that changes something, or tries to.

use std::future::Future;

use tonic::Status;
use tracing::{info, warn};

use super::access::Caller;

/// Runs a change and logs who made it, what it was, and how it ended; target `audit`.
pub(super) async fn audited<T>(
    caller: &Caller,
    action: &'static str,
    object: &str,
    change: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let outcome = change.await;
    let caller = caller.name.as_str();
    match &outcome {
        Ok(_) => info!(target: "audit", caller, action, object, outcome = "done"),
        Err(status) => {
            let (code, reason) = (status.code(), status.message());
            warn!(target: "audit", caller, action, object, outcome = "failed", ?code, reason);
        }
    }
    outcome
}
