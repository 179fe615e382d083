//! TLS for gRPC and between agents: connecting, accepting, and who is at the other end.

use std::{io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    client::{
        WebPkiServerVerifier,
        danger::{ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{self, Endpoint, Uri, server::TcpConnectInfo, server::TlsConnectInfo},
};
use tower::service_fn;

use crate::{
    IdentityError, LiveIdentity, Member, MemberCertificate, Revocable, Revocations, accept::TlsConnection, authority,
    live::provider, signatures::signature_methods,
};

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// A coordinator that is silent for this long is pinged; one that does not answer for as long again is gone. Twice this
/// is well below the lease of a node, so that nodes find a new leader before it holds them for lost.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A gRPC channel that presents a bearer token if it has one.
pub type Channel = InterceptedService<transport::Channel, BearerToken>;

/// Adds a bearer token to each call, if there is one.
#[derive(Clone)]
pub struct BearerToken(Option<MetadataValue<Ascii>>);

impl std::fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BearerToken").field(&self.0.is_some()).finish()
    }
}

impl BearerToken {
    fn new(trust: &Trust) -> Result<Self, IdentityError> {
        let Trust::Bearer(token) = trust else { return Ok(Self(None)) };
        // The value must not appear in logs.
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {token}").parse().map_err(|_| IdentityError::BearerToken)?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl Interceptor for BearerToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Whom a connection trusts, and what it shows of itself.
#[derive(Clone)]
pub enum Trust {
    /// Nobody and nothing: plaintext.
    Plaintext,
    /// Plaintext on this machine's loopback, with this token in each call. For `dev`.
    Bearer(String),
    /// The cell's authority; shows the member's certificate.
    Cell(Arc<LiveIdentity>),
    /// Only an authority with this SHA-256; shows nothing. For joining.
    Pinned([u8; 32]),
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plaintext => "Plaintext",
            Self::Bearer(_) => "Bearer",
            Self::Cell(_) => "Cell",
            Self::Pinned(_) => "Pinned",
        })
    }
}

/// A gRPC channel to the coordinator at `address`. Connects when it is first used, and again as needed.
///
/// # Errors
/// The address is no URL, or its scheme does not fit `trust`.
pub fn channel(address: &str, trust: &Trust) -> Result<Channel, IdentityError> {
    let bad = |reason: &str| IdentityError::Address { address: address.to_owned(), reason: reason.to_owned() };
    let uri: Uri = address.parse().map_err(|error: http::uri::InvalidUri| bad(&error.to_string()))?;
    let plaintext = matches!(trust, Trust::Plaintext | Trust::Bearer(_));
    let bearer = BearerToken::new(trust)?;
    match uri.scheme_str() {
        Some("http") if plaintext => {}
        Some("https") if !plaintext => {}
        Some("http") => return Err(bad("plaintext, but there is a certificate or token to use")),
        Some("https") => return Err(bad("https needs credentials")),
        _ => return Err(bad("there is no scheme")),
    }
    let authority =
        uri.authority().map(|authority| authority.as_str().to_owned()).ok_or_else(|| bad("there is no host"))?;
    if uri.port_u16().is_none() {
        return Err(bad("there is no port"));
    }
    // The connector below does TLS by itself; tonic must see plain HTTP/2.
    let plain = Uri::builder().scheme("http").authority(authority.clone()).path_and_query("/").build();
    let endpoint = Endpoint::from(plain.map_err(|error| bad(&error.to_string()))?)
        .connect_timeout(CONNECT_WITHIN)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    let config = match trust {
        Trust::Plaintext | Trust::Bearer(_) => {
            return Ok(InterceptedService::new(endpoint.connect_lazy(), bearer));
        }
        Trust::Cell(identity) => identity.client_config(&[b"h2"])?,
        Trust::Pinned(pin) => pinned_config(*pin)?,
    };
    let config = Arc::new(config);
    let channel = endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| {
        let (config, authority) = (Arc::clone(&config), authority.clone());
        async move { connect_tls(&authority, &Member::Coordinator, config).await.map(TokioIo::new) }
    }));
    Ok(InterceptedService::new(channel, bearer))
}

/// Connects to `address` (host:port), where `member` must be.
///
/// # Errors
/// The connection or the handshake failed, or took longer than 10 s.
pub async fn connect_tls(
    address: &str,
    member: &Member,
    config: Arc<ClientConfig>,
) -> io::Result<client::TlsStream<TcpStream>> {
    let name = ServerName::try_from(member.dns_name()).map_err(io::Error::other)?;
    let connecting = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, stream).await
    };
    tokio::time::timeout(HANDSHAKE_WITHIN, connecting)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("{address}: no TLS handshake within 10 s")))?
}

/// Connects to a node as [`connect_tls`] does. The connection is refused if the node's certificate is revoked, and
/// closed once it is.
///
/// # Errors
/// As [`connect_tls`], or the certificate is revoked.
pub async fn connect_node(
    address: &str,
    node: &str,
    config: Arc<ClientConfig>,
    revocations: &Revocations,
) -> io::Result<Revocable<client::TlsStream<TcpStream>>> {
    let member = Member::node(node).map_err(io::Error::other)?;
    let stream = connect_tls(address, &member, config).await?;
    let certificate = first(stream.get_ref().1.peer_certificates()).map_err(io::Error::other)?;
    let revoked = revocations.watch(&certificate).ok_or_else(|| {
        io::Error::new(io::ErrorKind::PermissionDenied, format!("the certificate of node {node} is revoked"))
    })?;
    Ok(Revocable::new(stream, revoked))
}

/// The certificate of the member at the other end of a gRPC call.
///
/// # Errors
/// There was no certificate, or it names no member.
pub fn peer_of<T>(request: &Request<T>) -> Result<MemberCertificate, IdentityError> {
    let info = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = info.and_then(TlsConnectInfo::peer_certs);
    first(certificates.as_ref().map(|certificates| certificates.as_slice()))
}

/// The certificate of the member at the other end of an accepted connection.
///
/// # Errors
/// There was no certificate, or it names no member.
pub fn member_of(connection: &TlsConnection) -> Result<MemberCertificate, IdentityError> {
    first(connection.peer_certificates())
}

pub(crate) fn first(certificates: Option<&[CertificateDer<'_>]>) -> Result<MemberCertificate, IdentityError> {
    let certificate = certificates.and_then(<[_]>::first);
    MemberCertificate::from_der(certificate.ok_or_else(|| IdentityError::Member("none was presented".into()))?)
}

pub(crate) fn pinned_config(pin: [u8; 32]) -> Result<ClientConfig, IdentityError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Trusts a chain that the pinned authority, which must be part of it, has signed.
#[derive(Debug)]
struct Pinned {
    pin: [u8; 32],
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates.iter().find(|certificate| authority::pin(certificate) == self.pin);
        let authority = authority.ok_or_else(|| {
            rustls::Error::General("the coordinator's authority is not the one that made the join token".into())
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    signature_methods!();
}
