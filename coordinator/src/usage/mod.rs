//! Usage: what replicas held, for how long, and what they answered. Invoices are made from it.
//!
//! - [`span`] is one replica over time: a state machine that turns what its agent reports into usage. It never counts time
//!   for which there is no evidence: such time is a [`Gap`].
//! - [`Meter`] is all spans and request counters of a cell, in shards that are written once a minute, and with the
//!   removal of a replica.
//! - [`segment`] is what is stored, [`retention`] merges old segments into longer periods.
//! - [`report`] selects, [`prices`] turns usage into money, [`statement`] adds up, [`focus`] writes CSV with FOCUS's
//!   column names.
//!
//! Pure: time is an argument, in milliseconds of UTC. `reconcile::metering` feeds the meter and writes what it returns.

mod counters;
pub mod focus;
#[cfg(test)]
mod invoice_tests;
mod meter;
mod period;
pub mod prices;
pub mod report;
pub mod retention;
pub mod segment;
mod series;
mod span;
pub mod statement;
#[cfg(test)]
mod tests;

pub use counters::Counts;
pub use meter::{Checkpoint, Live, Meter, Placement, ShardState, shard_of};
pub use period::{Clock, Period};
pub use segment::{Gap, GapReason, Row};
pub use series::{Amounts, Series, UsageState, Workload};
pub use span::{Activity, Change};
