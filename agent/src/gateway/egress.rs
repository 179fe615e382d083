//! Requests that replicas of this node send, such as a transformer's to its predictor.
//!
//! They need no name service: each such replica gets a listener of its own that stands for one host. Its
//! requests are routed, queued and held as any client's are, so that a predictor may be at zero.

use std::{io, net::SocketAddr, sync::Arc};

use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::DataPath;
use crate::endpoint::{Egress, EgressListener};

/// Gives replicas their way back to this node's gateway.
pub struct Gateway(pub Arc<DataPath>);

impl Egress for Gateway {
    fn open(&self, host: &str, address: SocketAddr) -> BoxFuture<'static, io::Result<EgressListener>> {
        let (path, host) = (Arc::clone(&self.0), Arc::from(host));
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            let closing = CancellationToken::new();
            tokio::spawn(path.serve_listener(listener, Some(host), closing.clone()));
            Ok(EgressListener { address, _open: closing.drop_guard() })
        })
    }
}
