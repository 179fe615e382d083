//! Where clients connect: HTTP/1.1, and HTTP/2 with prior knowledge.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, Version, header, uri::PathAndQuery};
use hyper::{body::Body as _, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span, debug, field, info_span};

use super::{
    DataPath,
    answer::{Answer, Body},
    body::Replay,
    routes::Found,
    split::Destination,
};

/// Connections at the same time; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 20_000;
/// A client must have sent its headers within this time.
const HEADERS_WITHIN: Duration = Duration::from_secs(30);
/// Requests that run get this long when the agent stops.
const DRAIN_WITHIN: Duration = Duration::from_secs(30);
/// Requests that wait for this node's first routes at the same time; further ones are answered 503.
pub(super) const EARLY: usize = 1000;
/// How long they wait: an agent that starts again has its routes within milliseconds, and a coordinator that
/// starts again is back within this time.
pub(super) const ROUTES_WITHIN: Duration = Duration::from_secs(10);
/// Hosts named to a client that asked for an unknown one.
const HOSTS_NAMED: usize = 20;

impl DataPath {
    /// Serves clients until `stopping`; requests that run then may end.
    pub async fn serve_ingress(self: Arc<Self>, listener: TcpListener, stopping: CancellationToken) {
        self.serve_listener(listener, None, stopping).await;
    }

    /// The same; with `host`, every request is for that host, whatever it says itself.
    pub(super) async fn serve_listener(
        self: Arc<Self>,
        listener: TcpListener,
        host: Option<Arc<str>>,
        stopping: CancellationToken,
    ) {
        let mut server = auto::Builder::new(TokioExecutor::new());
        server.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
        server.http2().timer(TokioTimer::new()).max_concurrent_streams(1000).adaptive_window(true);
        let graceful = GracefulShutdown::new();
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = stopping.cancelled() => break,
                accepted = accept(&listener, &room) => accepted,
            };
            let Some((stream, client, place)) = accepted else { continue };
            let (path, host) = (Arc::clone(&self), host.clone());
            let service = service_fn(move |request| {
                let (path, host) = (Arc::clone(&path), host.clone());
                async move { Ok::<_, Infallible>(path.serve(client, host.as_deref(), request).await) }
            });
            let connection = server.serve_connection(TokioIo::new(stream), service).into_owned();
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    debug!(%client, %error, "connection ended");
                }
                drop(place);
            });
        }
        // What has not ended by then is cut off by the end of the process.
        let _ = tokio::time::timeout(DRAIN_WITHIN, graceful.shutdown()).await;
    }

    /// Answers one request.
    async fn serve(&self, client: SocketAddr, host: Option<&str>, request: Request<Incoming>) -> Response<Body> {
        let span = info_span!(
            "gateway.request",
            otel.kind = "server",
            otel.name = field::Empty,
            http.request.method = %request.method(),
            url.path = request.uri().path(),
            http.response.status_code = field::Empty,
            otel.status_code = field::Empty,
        );
        pilotlight_telemetry::extract(request.headers(), &span);
        let timed = self.metrics.begin();
        let http10_or_11 = request.version() < Version::HTTP_2;
        let answering = async {
            let mut service = String::new();
            let outcome = self.route(client, host, request, &mut service).await;
            let response = outcome.unwrap_or_else(|answer| {
                debug!(?answer, "answered by the gateway");
                answer.response()
            });
            let span = Span::current();
            span.record("http.response.status_code", response.status().as_u16());
            if response.status().is_server_error() {
                span.record("otel.status_code", "ERROR");
            }
            timed.end(&service, response.status());
            response
        };
        let mut response = answering.instrument(span).await;
        *response.version_mut() = if http10_or_11 { Version::HTTP_11 } else { Version::HTTP_2 };
        response
    }

    /// Finds the service and hands the request on.
    async fn route(
        &self,
        client: SocketAddr,
        fixed_host: Option<&str>,
        request: Request<Incoming>,
        name: &mut String,
    ) -> Result<Response<Body>, Answer> {
        let (mut parts, body) = request.into_parts();
        let host = fixed_host.unwrap_or_else(|| host_of(&parts)).to_owned();
        self.wait_for_routes().await?;
        let (service, tagged) = match fixed_host {
            Some(host) => self.routes.by_host(host).ok_or_else(|| Answer::NoRevision { service: host.to_owned() })?,
            None => self.find(&host, &mut parts)?,
        };
        name.clone_from(&service.name);
        if parts.headers.contains_key(header::UPGRADE) && parts.version < Version::HTTP_2 {
            // curl and others offer h2c by this header; that offer may be ignored, others may not.
            let only_h2c = parts.headers[header::UPGRADE].as_bytes().eq_ignore_ascii_case(b"h2c");
            if !only_h2c {
                return Err(Answer::Upgrade);
            }
        }
        let limit = self.max_request_body;
        if body.size_hint().lower() > limit {
            return Err(Answer::BodyTooLarge { limit });
        }
        let destination = Destination::new(service, tagged, &parts.headers);
        let queue = destination.pick().ok_or_else(|| Answer::NoRevision { service: name.clone() })?;
        queue.arrived();
        forwarded(&mut parts, client, &host);
        self.hold(&destination, queue, parts, Replay::new(body, limit)).await
    }
}

impl DataPath {
    /// Holds a request that has come before this node knew any route: nobody may be told that a service does
    /// not exist because the agent has just started.
    pub(super) async fn wait_for_routes(&self) -> Result<(), Answer> {
        if self.routes.is_loaded() {
            return Ok(());
        }
        let _place = self.early.try_acquire().map_err(|_| Answer::NoRoutes)?;
        tokio::time::timeout(ROUTES_WITHIN, self.routes.loaded()).await.map_err(|_| Answer::NoRoutes)
    }

    /// The service that a client's request is for, by its host or else by its path, and the revision where
    /// the host names its tag. A prefix that named the service is taken off the path.
    fn find(&self, host: &str, parts: &mut http::request::Parts) -> Result<Found, Answer> {
        if let Some(explainer) = self.routes.explainer(host, parts.uri.path()) {
            return Ok((explainer, None));
        }
        if let Some(found) = self.routes.by_host(host) {
            return Ok(found);
        }
        let path = parts.uri.path().to_owned();
        let (service, rest) = self.routes.by_path(&path).ok_or_else(|| Answer::UnknownService {
            host: host.to_owned(),
            path: path.clone(),
            known: self.routes.known_hosts(HOSTS_NAMED),
        })?;
        replace_path(parts, rest);
        Ok((service, None))
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> Option<(tokio::net::TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(room).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, client)) => {
            // Without it only latency suffers.
            let _ = stream.set_nodelay(true);
            Some((stream, client, place))
        }
        Err(error) => {
            // Out of file descriptors, mostly; a pause lets connections end.
            debug!(%error, "cannot accept");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

fn host_of(parts: &http::request::Parts) -> &str {
    let header = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    header.or_else(|| parts.uri.authority().map(|authority| authority.as_str())).unwrap_or_default()
}

/// Takes the prefix off the path; the query stays.
fn replace_path(parts: &mut http::request::Parts, path: &str) {
    let path = if path.is_empty() { "/" } else { path };
    let full = match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.path_and_query = PathAndQuery::try_from(full).ok();
    parts.uri = http::Uri::from_parts(uri).unwrap_or_default();
}

/// Says who asked for what, as proxies do; what only gateways may say is taken out.
fn forwarded(parts: &mut http::request::Parts, client: SocketAddr, host: &str) {
    let ours: Vec<_> = parts.headers.keys().filter(|name| name.as_str().starts_with("pilotlight-")).cloned().collect();
    for name in ours {
        parts.headers.remove(name);
    }
    let via = parts.headers.get("x-forwarded-for").and_then(|via| via.to_str().ok());
    let via = via.map_or_else(|| client.ip().to_string(), |via| format!("{via}, {}", client.ip()));
    for (name, value) in [("x-forwarded-for", via.as_str()), ("x-forwarded-host", host), ("x-forwarded-proto", "http")]
    {
        if let Ok(value) = HeaderValue::from_str(value) {
            parts.headers.insert(name, value);
        }
    }
}
