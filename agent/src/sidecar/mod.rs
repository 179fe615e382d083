//! Per revision on this node: replicas and their slots, requests that wait, offers to other gateways.
//!
//! A request waits at the gateway it entered by and is bound to a replica only when one has a free
//! slot. Slots of this node's replicas go, in order of arrival, to requests that wait here and to
//! gateways elsewhere that have said how many wait there ([`queue`]). [`load`] counts it all.

pub mod load;
pub mod queue;
mod registry;

pub use queue::{Grant, Permit, Refusal, RevisionQueue, Target};
pub use registry::{Demands, OfferSink, Sidecar};
