//! The one loop: observe, decide, write, push.
//!
//! [`world`] is what the loop knows, [`plan`] and [`routes`] are pure functions of it, [`run`] is the
//! loop itself, [`commands`] what operators ask of it, and [`view`] how it is shown to them.

mod apply;
pub mod clock;
pub mod commands;
pub mod meter;
mod nodes;
pub mod observe;
pub mod plan;
pub mod record;
pub mod routes;
pub mod run;
pub mod scale;
pub mod view;
pub mod world;

pub use commands::{Applied, CommandError, Handle};
pub use run::Reconciler;
pub use world::World;
