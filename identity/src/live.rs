//! Credentials in use, which can be exchanged while connections go on.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption, WebPkiServerVerifier,
        danger::{ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};

use crate::{CaCertificate, Credentials, IdentityError, signatures::signature_methods};

/// A member's credentials in use. New connections take what was last put in.
#[derive(Debug)]
pub struct LiveIdentity {
    certified: Arc<Certified>,
    verifiers: Arc<Verifiers>,
}

#[derive(Debug)]
struct Certified(ArcSwap<CertifiedKey>);

impl LiveIdentity {
    /// Takes credentials into use.
    ///
    /// # Errors
    /// Certificate or key cannot be read, or do not belong together.
    pub fn new(credentials: &Credentials) -> Result<Arc<Self>, IdentityError> {
        let certified = Arc::new(Certified(ArcSwap::from_pointee(certified(credentials)?)));
        let verifiers = Arc::new(Verifiers(ArcSwap::from_pointee(Trusted::new(&credentials.ca_pem)?)));
        Ok(Arc::new(Self { certified, verifiers }))
    }

    /// Exchanges the certificate, the key and the trusted authorities for new connections.
    ///
    /// # Errors
    /// As [`LiveIdentity::new`]; the old ones then stay in use.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), IdentityError> {
        let (certified, trusted) = (certified(credentials)?, Trusted::new(&credentials.ca_pem)?);
        self.certified.0.store(Arc::new(certified));
        self.verifiers.0.store(Arc::new(trusted));
        Ok(())
    }

    /// The authorities that new connections trust.
    pub fn trusted(&self) -> Vec<CaCertificate> {
        self.verifiers.0.load().authorities.clone()
    }

    /// Serves members of the cell only.
    ///
    /// # Errors
    /// TLS refuses its own defaults.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<ServerConfig, IdentityError> {
        self.server(alpn, true)
    }

    /// Serves members of the cell, and strangers without a certificate, who must be told apart later.
    /// A certificate of another authority is refused.
    ///
    /// # Errors
    /// TLS refuses its own defaults.
    pub fn server_config_optional_client(&self, alpn: &[&[u8]]) -> Result<ServerConfig, IdentityError> {
        self.server(alpn, false)
    }

    fn server(&self, alpn: &[&[u8]], mandatory: bool) -> Result<ServerConfig, IdentityError> {
        let verifier = ClientVerifier { verifiers: Arc::clone(&self.verifiers), mandatory };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::clone(&self.certified) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // A resumed session is not verified again: it would outlive the trust in its authority.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// Trusts the cell's authorities and presents this member's certificate.
    ///
    /// # Errors
    /// TLS refuses its own defaults.
    pub fn client_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&self.verifiers) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(Arc::clone(&self.certified) as Arc<dyn ResolvesClientCert>);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificate and its key, for TLS.
///
/// # Errors
/// They cannot be read, or do not belong together.
pub(crate) fn certified(credentials: &Credentials) -> Result<CertifiedKey, IdentityError> {
    Ok(CertifiedKey::from_der(credentials.chain()?, credentials.key()?, &provider())?)
}

impl ResolvesServerCert for Certified {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl ResolvesClientCert for Certified {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Verifies peers by the authorities that are trusted when the handshake takes place.
#[derive(Debug)]
struct Verifiers(ArcSwap<Trusted>);

#[derive(Debug)]
struct Trusted {
    authorities: Vec<CaCertificate>,
    servers: Arc<WebPkiServerVerifier>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Trusted {
    fn new(ca_pem: &str) -> Result<Self, IdentityError> {
        let authorities = CaCertificate::bundle(ca_pem)?;
        let mut roots = RootCertStore::empty();
        for authority in &authorities {
            roots.add(authority.der().clone())?;
        }
        let (roots, provider) = (Arc::new(roots), provider());
        let bad = |reason: String| IdentityError::Pem { what: "authority's certificate", reason };
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build();
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
        Ok(Self {
            authorities,
            servers: servers.map_err(|error| bad(error.to_string()))?,
            clients: clients.map_err(|error| bad(error.to_string()))?,
        })
    }
}

impl ServerCertVerifier for Verifiers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let trusted = self.0.load();
        trusted.servers.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    signature_methods!();
}

#[derive(Debug)]
struct ClientVerifier {
    verifiers: Arc<Verifiers>,
    /// Whether a client must present a certificate.
    mandatory: bool,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    /// None: the authorities change, and a member has one certificate to choose from.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verifiers.0.load().clients.verify_client_cert(end_entity, intermediates, now)
    }

    signature_methods!();
}
