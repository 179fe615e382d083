//! The one loop: observe, decide, write, push.
//!
//! [`world`] is what the loop knows, [`plan`], [`routes`] and [`conditions`] are pure functions of it,
//! [`run`] is the loop itself, `load`, `apply`, `carry_out` and `rolling` parts of it, [`commands`] what operators ask of it,
//! and [`view`] how it is shown to them.

mod admission;
mod answer;
mod apply;
pub mod cached;
mod carry_out;
#[cfg(test)]
mod chain_tests;
pub mod clock;
pub mod commands;
pub mod conditions;
pub mod failures;
mod gpu_view;
mod gpus;
mod ingress;
pub(crate) mod load;
pub mod metering;
mod mounted;
mod node_state;
mod nodes;
pub mod observe;
pub mod plan;
mod push;
pub mod record;
mod returned;
mod rolling;
pub mod routes;
pub mod run;
pub mod scale;
pub mod shelf;
#[cfg(test)]
mod shelf_tests;
mod storage;
mod suspended;
pub mod view;
mod warmth;
pub mod world;

pub use commands::{Applied, CommandError, Handle};
pub use run::Reconciler;
pub use world::World;
