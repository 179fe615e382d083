//! What the session tells the node and asks of it.

use pilotlight_proto::fleet::v1::{self as fleet, coordinator_message::Message as ToAgent};

use super::Outbound;

/// The node's side of a session.
pub trait Told: Send + Sync {
    /// A new session: versions start over.
    fn session_opened(&self);
    /// The coordinator said something. Must not block.
    fn take(&self, message: ToAgent, say: &Outbound);
    /// The load since the last report.
    fn report(&self) -> fleet::QueueReport;
    /// Counters of requests that have changed since the last call in this session, all of them in the first one.
    fn counters(&self) -> Option<fleet::RequestCounters>;
    /// The last counters were not sent.
    fn counters_unsent(&self);
}
