//! How one version of a service follows another: KServe's canary rules as pure functions.
//!
//! [`history`] remembers which revisions were ready and which had all requests, [`traffic`] splits
//! requests from that and `canaryTrafficPercent`, [`progress`] says when a revision has had its chance,
//! [`room`] lets old replicas go where a new one finds no place, and [`policy`] reads the annotations.
//!
//! # The rules
//! - A revision takes requests once it has been ready. Until then the last good one has them all.
//! - `canaryTrafficPercent: N` gives N % to the newest ready revision and the rest to the one that last
//!   had everything (`prev`). 0 pins that one; an absent field gives everything to the newest.
//! - Lowering the percent of a revision that had everything goes one step back in history.
//! - A revision whose replicas show no sign of progress within the deadline has failed. It goes to zero
//!   and stays there; another template is another try.
//! - Where a new revision finds no place, old replicas are drained one at a time, each only if that makes
//!   room, and requests move over in proportion. What is left of the old revision is never more than
//!   `pilotlight.dev/max-unavailable` (1) below what its share needs. The last replica of a service with
//!   `minReplicas` of 1 or more stays until the new revision is ready, unless that annotation is given:
//!   a service that may be at zero promises nobody a warm replica, one with a minimum does.

pub mod history;
pub mod policy;
pub mod progress;
pub mod room;
#[cfg(test)]
mod tests;
pub mod traffic;

pub use history::History;
pub use policy::Policy;
pub use progress::Signs;
pub use room::{Room, Scene, Side};
pub use traffic::{Share, Tag, Target, by_shares, shift, split};
