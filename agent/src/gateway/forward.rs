//! Sends a request to a replica on this node, or to the node that has it.

use std::{io, sync::Arc, time::Duration};

use async_trait::async_trait;
use http::{HeaderName, HeaderValue, Request, Response, Uri, Version, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    answer::{Body, BoxError},
    peer_connections::PeerConnectionPool,
};
use crate::sidecar::Target;

/// Names the replica that a request between nodes is for.
pub const REPLICA: HeaderName = HeaderName::from_static("pilotlight-replica");
/// Names the offer that it uses.
pub const OFFER: HeaderName = HeaderName::from_static("pilotlight-offer");
/// Marks an answer of the other node that the replica has not seen the request.
pub const UNSEEN: HeaderName = HeaderName::from_static("pilotlight-unseen");

/// Connections to one replica that are kept without a request: after a burst the others are closed.
const MAX_IDLE_CONNECTIONS: usize = 64;
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Headers that concern one hop only (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "transfer-encoding",
    "upgrade",
];

/// A connection to another node.
pub trait PeerStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> PeerStream for T {}

/// Connects to other nodes.
#[async_trait]
pub trait Connect: Send + Sync {
    /// To `node`, which listens at `address` (host:port).
    async fn connect(&self, node: &str, address: &str) -> io::Result<Box<dyn PeerStream>>;
}

/// Why a request was not answered.
#[derive(Debug)]
pub enum Failure {
    /// No replica has seen it: it may be sent again.
    Unseen(String),
    /// A replica may have seen it.
    Broken(String),
}

/// Connections to replicas and nodes.
pub struct Forwarder {
    http1: legacy::Client<HttpConnector, Body>,
    h2c: legacy::Client<HttpConnector, Body>,
    nodes: Arc<PeerConnectionPool>,
}

impl Forwarder {
    /// Uses `nodes` for requests to other nodes; no connections to replicas yet.
    pub fn new(nodes: Arc<PeerConnectionPool>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_WITHIN));
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        // Whether a request may be sent again is decided in one place, not here.
        builder.pool_max_idle_per_host(MAX_IDLE_CONNECTIONS).pool_idle_timeout(POOL_IDLE_TIMEOUT);
        builder.pool_timer(TokioTimer::new()).timer(TokioTimer::new()).set_host(false).retry_canceled_requests(false);
        Self { http1: builder.build(connector.clone()), h2c: builder.http2_only(true).build(connector), nodes }
    }

    /// Sends a request to its target and waits for the head of the answer.
    ///
    /// # Errors
    /// There was no answer.
    pub async fn send(&self, target: &Target, request: Request<Body>) -> Result<Response<Body>, Failure> {
        match target {
            Target::Local { address, h2c, .. } => self.local(&address.to_string(), *h2c, request).await,
            Target::Peer { node, replica, offer } => self.peer(node, replica, *offer, request).await,
        }
    }

    async fn local(&self, authority: &str, h2c: bool, mut request: Request<Body>) -> Result<Response<Body>, Failure> {
        let client = if h2c { &self.h2c } else { &self.http1 };
        strip(request.headers_mut(), h2c);
        readdress(&mut request, "http", authority);
        if h2c {
            // HTTP/2 has :authority for it; servers may refuse a Host that differs. X-Forwarded-Host has
            // what the client asked for.
            request.headers_mut().remove(header::HOST);
        }
        *request.version_mut() = if h2c { Version::HTTP_2 } else { Version::HTTP_11 };
        match client.request(request).await {
            Ok(response) => Ok(answer(response)),
            Err(error) if error.is_connect() => Err(Failure::Unseen(chain(&error))),
            Err(error) => Err(Failure::Broken(chain(&error))),
        }
    }

    async fn peer(
        &self,
        node: &str,
        replica: &str,
        offer: Option<u64>,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, Failure> {
        let sender = self.nodes.sender(node).await.map_err(|error| Failure::Unseen(error.to_string()))?;
        strip(request.headers_mut(), true);
        readdress(&mut request, "https", &format!("{node}.node.pilotlight.internal"));
        *request.version_mut() = Version::HTTP_2;
        let headers = request.headers_mut();
        let name = HeaderValue::try_from(replica).map_err(|error| Failure::Unseen(error.to_string()))?;
        headers.insert(REPLICA, name);
        if let Some(offer) = offer {
            headers.insert(OFFER, HeaderValue::from(offer));
        }
        let response = match sender.requests().try_send_request(request).await {
            Ok(response) => response,
            Err(mut error) => {
                let unseen = error.take_message().is_some();
                let reason = chain(&error.into_error());
                return Err(if unseen { Failure::Unseen(reason) } else { Failure::Broken(reason) });
            }
        };
        if response.headers().contains_key(UNSEEN) {
            return Err(Failure::Unseen(format!("node {node} had no slot any more")));
        }
        Ok(answer(response))
    }
}

/// Takes out what concerns the hop before. HTTP/2 keeps `te: trailers`, which gRPC needs.
pub fn strip(headers: &mut http::HeaderMap, http2: bool) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    let trailers = headers.get(header::TE).is_some_and(|value| value == "trailers");
    if !(http2 && trailers) {
        headers.remove(header::TE);
    }
}

/// Points the request at another server; its Host is what the client asked for.
fn readdress<B>(request: &mut Request<B>, scheme: &str, authority: &str) {
    if !request.headers().contains_key(header::HOST)
        && let Some(host) = request.uri().authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok())
    {
        request.headers_mut().insert(header::HOST, host);
    }
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    if let Ok(uri) = Uri::builder().scheme(scheme).authority(authority).path_and_query(path).build() {
        *request.uri_mut() = uri;
    }
}

fn answer(response: Response<Incoming>) -> Response<Body> {
    let mut response = response.map(|body| body.map_err(|error| Box::new(error) as BoxError).boxed_unsync());
    strip(response.headers_mut(), false);
    // The version is the hop's, too.
    *response.version_mut() = Version::HTTP_11;
    response
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
