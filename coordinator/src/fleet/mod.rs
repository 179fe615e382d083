//! Sessions with agents: what they report, what they are told.

pub mod enrollment;
pub mod evictions;
pub mod live_sessions;
pub mod logs;
pub mod session;

pub use evictions::EvictHub;
pub use live_sessions::LiveSessions;
pub use logs::LogHub;
pub use session::{FleetService, SessionHandle};
