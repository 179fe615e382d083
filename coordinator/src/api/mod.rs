//! The operators' gRPC API and who may use what.

pub mod access;
mod audit;
mod authorities;
mod cache;
pub mod control;
mod logs;
mod members;
mod nodes;
pub mod objects;
mod snapshot;
mod usage;

pub use control::ControlService;
pub use objects::Objects;
