//! What clients may do, and for how long.

use std::time::Duration;

use ipnet::IpNet;

use super::progress::BodyLimits;

/// Upper bound of connections per listener, whatever the file limit is.
const MAX_CONNECTIONS: usize = 20_000;
/// File descriptors that are kept for everything but clients: files, replicas' pipes, other nodes.
const RESERVED_FILES: u64 = 256;

/// Limits for the connections and requests of clients.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// A new connection must complete its first request's head (HTTP/2: its preface and settings) within this
    /// time, and so must every later head once its first byte has arrived.
    pub header_timeout: Duration,
    /// A connection without requests is closed after this time.
    pub idle_timeout: Duration,
    /// How fast request bodies must arrive.
    pub body: BodyLimits,
    /// A client that accepts nothing of a response for this long, although bytes are ready, is disconnected.
    pub response_write_timeout: Duration,
    /// Connections at the same time, per listener. Idle ones are closed when nine tenths of this are open.
    pub max_connections: usize,
    /// Proxies whose `X-Forwarded-*` headers are kept.
    pub trusted_proxies: Vec<IpNet>,
    /// `true`: an answer that no service was found lists the known hosts.
    pub list_known_hosts: bool,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            body: BodyLimits { idle_timeout: Duration::from_secs(30), min_bytes_per_second: 1024 },
            response_write_timeout: Duration::from_secs(60),
            max_connections: MAX_CONNECTIONS,
            trusted_proxies: Vec::new(),
            list_known_hosts: false,
        }
    }
}

/// Client connections that a process with this file limit can serve: each may need another descriptor for its
/// way to the replica.
pub fn max_connections(file_limit: u64) -> usize {
    let usable = file_limit.saturating_sub(RESERVED_FILES.min(file_limit / 4));
    usize::try_from(usable / 2).unwrap_or(usize::MAX).clamp(1, MAX_CONNECTIONS)
}
