//! Sessions with agents: what they report, what they are told.

pub mod enrollment;
pub mod logs;
pub mod session;

pub use logs::LogHub;
pub use session::{FleetService, SessionHandle};
