//! Pilotlight's coordinator: desired state, scaling and placement decisions.
//!
//! Pure decisions ([`spec`], [`manifest`], [`autoscaler`], [`placement`], [`quarantine`], [`rollout`], [`eviction`]) are
//! deterministic functions without clock, I/O or randomness; [`store`], [`fleet`] and [`api`] are the
//! effects; [`reconcile`] joins the two.

pub mod api;
mod authority;
pub mod autoscaler;
pub mod config;
pub mod eviction;
pub mod finding;
pub mod fleet;
mod follow;
pub mod leader;
pub mod manifest;
pub mod members;
pub mod metrics;
pub mod model;
pub mod placement;
pub mod quarantine;
pub mod reconcile;
pub mod rollout;
mod server;
pub mod simulate;
pub mod spec;
pub mod store;
mod threads;
pub mod usage;
pub mod usage_log;
pub mod values;

pub use server::{CoordinatorError, run};
