//! The operators' gRPC API and who may use what.

pub mod access;
pub mod control;

pub use control::ControlService;
