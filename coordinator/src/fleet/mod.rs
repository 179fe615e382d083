//! Sessions with agents: what they report, what they are told.

pub mod enrollment;
pub mod evictions;
pub mod feed;
mod followed;
pub mod live_sessions;
pub mod logs;
mod outbox;
pub mod session;
pub mod wire;

pub use evictions::EvictHub;
pub use feed::RouteFeed;
pub use followed::Followed;
pub use live_sessions::LiveSessions;
pub use logs::LogHub;
pub use session::{FleetService, SessionHandle};
pub use wire::SessionServer;
