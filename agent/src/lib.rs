//! Pilotlight's agent: inventory, runtime, gateway and sidecar of one node.

pub mod config;
pub mod endpoint;
pub mod gateway;
pub mod gpu;
pub mod inventory;
mod listeners;
mod membership;
pub mod models;
mod node;
mod peer_connector;
pub mod reconcile;
pub mod runtime;
pub mod session;
pub mod sidecar;
pub mod warmth;

pub use node::{AgentError, run};
