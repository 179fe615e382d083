//! Per revision on this node: replicas and their slots, requests that wait, offers to other gateways.
//!
//! A request waits at the gateway it entered by and is bound to a replica only when one has a free
//! slot. Slots of this node's replicas go, in order of arrival, to requests that wait here and to
//! gateways elsewhere that have said how many wait there ([`queue`], with its books in `slots`). [`load`]
//! counts requests, [`tokens`] counts tokens.

pub mod grant;
pub mod load;
pub mod queue;
mod registry;
mod slots;
#[cfg(test)]
mod tests;
pub mod tokens;

pub use grant::{Grant, Permit, Refusal, Slot, Target, Waiting};
pub use queue::RevisionQueue;
pub use registry::{Demands, OfferSink, Sidecar};
pub use slots::Limits;
pub use tokens::{TokenCount, TokenLoad};
