//! Per revision on this node: replicas and their slots, requests that wait, offers to other gateways.
//!
//! A request waits at the gateway it entered by and is bound to a replica only when one has a free slot. Slots of this
//! node's replicas go, in order of arrival, to requests that wait here and to gateways elsewhere that have announced
//! how many wait there.
//!
//! - [`slots`] decides who gets which slot, without I/O; it is made of [`line`], the order of arrival, [`credit`], the
//!   flow control of offers between nodes (see `peer.proto`), and [`peer_nodes`], the replicas of other nodes.
//! - [`queue`] is one revision: its slots under a lock. [`registry`] is all of them, and the offers that are open.
//! - [`links`] says which streams to other nodes have something to announce.
//! - [`load`] counts requests, [`tokens`] counts tokens, for scaling; [`served`] counts both for billing.

mod credit;
pub mod grant;
mod line;
pub mod links;
pub mod load;
mod peer_nodes;
#[cfg(test)]
mod protocol_tests;
pub mod queue;
mod registry;
mod served;
#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests;
mod slots;
mod sync;
#[cfg(test)]
mod tests;
pub mod tokens;

pub use credit::Credit;
pub use grant::{Grant, Permit, Refusal, Slot, Target, Waiting};
pub use links::{Announcer, Link, OpenStream};
pub use queue::RevisionQueue;
pub use registry::{Demands, GatewayStream, OFFER_LAPSE, OfferSender, Sidecar};
pub use served::{Served, ServedRevisions};
pub use slots::Limits;
pub use tokens::{TokenCount, TokenLoad};
