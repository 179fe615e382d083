//! Where the agent listens: on sockets that systemd has opened, else on its own.

use std::net::SocketAddr;

use listenfd::ListenFd;
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::node::AgentError;

/// Sockets that systemd has opened for this process (`LISTEN_FDS`). Connections wait in them while the agent restarts.
pub struct Inherited(Vec<std::net::TcpListener>);

impl Inherited {
    /// Takes them over; there may be none. Sockets of other kinds are left alone.
    pub fn from_env() -> Self {
        let mut sockets = ListenFd::from_env();
        let listeners = (0..sockets.len()).filter_map(|index| sockets.take_tcp_listener(index).ok().flatten());
        Self(listeners.collect())
    }

    /// The inherited socket with the port of this address, else a new one.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn listen(&mut self, what: &'static str, address: SocketAddr) -> Result<TcpListener, AgentError> {
        let failed = |error| AgentError::Listen { what, address, error };
        let has_port =
            |socket: &std::net::TcpListener| socket.local_addr().is_ok_and(|local| local.port() == address.port());
        let Some(index) = self.0.iter().position(has_port) else {
            return TcpListener::bind(address).await.map_err(failed);
        };
        let socket = self.0.swap_remove(index);
        info!(what, %address, "listening on the socket that systemd has opened");
        socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket)).map_err(failed)
    }

    /// Warns of sockets that nothing listens on: the port in the unit is not the one in the configuration.
    pub fn warn_of_unused(&self) {
        for socket in &self.0 {
            let address = socket.local_addr().map(|address| address.to_string()).unwrap_or_default();
            warn!(address, "systemd has opened a socket on a port that this agent is not configured for; it is closed");
        }
    }
}
