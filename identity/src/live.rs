//! Credentials in use, which can be exchanged while connections go on.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::ResolvesClientCert,
    crypto::{CryptoProvider, ring},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};

use crate::{Credentials, IdentityError};

/// A member's credentials in use. New connections take what was last put in.
#[derive(Debug)]
pub struct LiveIdentity {
    certified: Arc<Certified>,
    roots: Arc<RootCertStore>,
}

#[derive(Debug)]
struct Certified(ArcSwap<CertifiedKey>);

impl LiveIdentity {
    /// Takes credentials into use. The authority stays the same for good.
    ///
    /// # Errors
    /// Certificate or key cannot be read, or do not belong together.
    pub fn new(credentials: &Credentials) -> Result<Arc<Self>, IdentityError> {
        let mut roots = RootCertStore::empty();
        for authority in credentials.authorities()? {
            roots.add(authority)?;
        }
        let certified = Arc::new(Certified(ArcSwap::from_pointee(certified(credentials)?)));
        Ok(Arc::new(Self { certified, roots: Arc::new(roots) }))
    }

    /// Exchanges the certificate and key for new connections.
    ///
    /// # Errors
    /// As [`LiveIdentity::new`]; the old ones then stay in use.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), IdentityError> {
        self.certified.0.store(Arc::new(certified(credentials)?));
        Ok(())
    }

    /// Serves members of the cell only.
    ///
    /// # Errors
    /// TLS refuses the authority.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<ServerConfig, IdentityError> {
        self.server(alpn, false)
    }

    /// Serves members of the cell, and strangers without a certificate, who must be told apart later.
    /// A certificate of another authority is refused.
    ///
    /// # Errors
    /// TLS refuses the authority.
    pub fn server_config_optional_client(&self, alpn: &[&[u8]]) -> Result<ServerConfig, IdentityError> {
        self.server(alpn, true)
    }

    fn server(&self, alpn: &[&[u8]], strangers: bool) -> Result<ServerConfig, IdentityError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), provider());
        let verifier = if strangers { verifier.allow_unauthenticated() } else { verifier };
        let verifier = verifier
            .build()
            .map_err(|error| IdentityError::Pem { what: "authority's certificate", reason: error.to_string() })?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&self.certified) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }

    /// Trusts the cell's authority and presents this member's certificate.
    ///
    /// # Errors
    /// TLS refuses its own defaults.
    pub fn client_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_cert_resolver(Arc::clone(&self.certified) as Arc<dyn ResolvesClientCert>);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certified(credentials: &Credentials) -> Result<CertifiedKey, IdentityError> {
    Ok(CertifiedKey::from_der(credentials.chain()?, credentials.key()?, &provider())?)
}

impl ResolvesServerCert for Certified {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl ResolvesClientCert for Certified {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
