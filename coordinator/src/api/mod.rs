//! The operators' gRPC API and who may use what.

pub mod access;
mod audit;
mod cache;
pub mod control;
mod logs;
mod members;
pub mod objects;
mod snapshot;
mod usage;

pub use control::ControlService;
pub use objects::Objects;
