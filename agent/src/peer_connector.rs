//! How nodes connect to each other, and who may connect.

use std::{io, sync::Arc};

use async_trait::async_trait;
use pilotlight_identity::{LiveIdentity, Member, Revocations, TlsConnection};
use tokio::net::TcpStream;

use crate::{
    gateway::{Connect, PeerStream},
    node::AgentError,
};

/// Connects by mutual TLS; in plaintext if the node has no certificate, as with `dev`.
pub(crate) fn connector(
    identity: Option<Arc<LiveIdentity>>,
    revocations: &Arc<Revocations>,
) -> Result<Arc<dyn Connect>, AgentError> {
    Ok(match identity {
        Some(identity) => {
            let config = Arc::new(identity.client_config(&[b"h2"])?);
            Arc::new(TlsConnect { config, revocations: Arc::clone(revocations) })
        }
        None => Arc::new(PlainConnect),
    })
}

struct TlsConnect {
    config: Arc<rustls::ClientConfig>,
    revocations: Arc<Revocations>,
}

#[async_trait]
impl Connect for TlsConnect {
    async fn connect(&self, node: &str, address: &str) -> io::Result<Box<dyn PeerStream>> {
        let config = Arc::clone(&self.config);
        let stream = pilotlight_identity::connect_node(address, node, config, &self.revocations).await?;
        Ok(Box::new(stream))
    }
}

struct PlainConnect;

#[async_trait]
impl Connect for PlainConnect {
    async fn connect(&self, _: &str, address: &str) -> io::Result<Box<dyn PeerStream>> {
        Ok(Box::new(TcpStream::connect(address).await?))
    }
}

/// Returns `true` if the peer is a node whose certificate is not revoked. Operators hold certificates of the cell, too,
/// but only nodes speak for gateways.
pub(crate) fn is_good_node(stream: &TlsConnection, revocations: &Revocations) -> bool {
    pilotlight_identity::member_of(stream).is_ok_and(|certificate| {
        matches!(certificate.member, Member::Node(_)) && revocations.revoked_at(&certificate).is_none()
    })
}
