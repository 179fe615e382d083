//! Where clients connect: HTTP/1.1, and HTTP/2 with prior knowledge.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{Method, Request, Response, Version, header, uri::PathAndQuery};
use hyper::{body::Body as _, body::Incoming};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span, debug, field, info_span};

use super::{
    DataPath,
    answer::{Answer, Body},
    body::Replay,
    error_format::ErrorFormat,
    forwarded::{effective_host, is_trusted, set_forwarded},
    listener::Listener,
    progress::RequestProgress,
    routes::Found,
    split::Destination,
};

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
        Listener::new(self, host).serve(listener, stopping).await;
    }

    /// Answers one request.
    pub(super) async fn serve(
        &self,
        client: SocketAddr,
        host: Option<&str>,
        request: Request<Incoming>,
    ) -> Response<Body> {
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
            let (parts, body) = request.into_parts();
            let format = ErrorFormat::for_request(&parts);
            let outcome = self.route(client, host, parts, body, &mut service).await;
            let (status, response) = match outcome {
                Ok(response) => (response.status(), response),
                Err(answer) => (answer.status(), self.refuse(&answer, format, http10_or_11)),
            };
            let span = Span::current();
            span.record("http.response.status_code", status.as_u16());
            if status.is_server_error() {
                span.record("otel.status_code", "ERROR");
            }
            timed.end(&service, status);
            response
        };
        let mut response = answering.instrument(span).await;
        *response.version_mut() = if http10_or_11 { Version::HTTP_11 } else { Version::HTTP_2 };
        response
    }

    /// The response for a request that the gateway answers by itself. Its status over HTTP is what is counted,
    /// even if a gRPC client gets 200 and a gRPC status.
    fn refuse(&self, answer: &Answer, format: ErrorFormat, http1: bool) -> Response<Body> {
        debug!(?answer, "answered by the gateway");
        let mut response = answer.response_for(format);
        if matches!(answer, Answer::RequestTimeout { .. }) {
            self.metrics.request_body_timeouts.inc();
            if http1 {
                response.headers_mut().insert(header::CONNECTION, http::HeaderValue::from_static("close"));
            }
        }
        response
    }

    /// Finds the service and hands the request on.
    async fn route(
        &self,
        client: SocketAddr,
        fixed_host: Option<&str>,
        mut parts: http::request::Parts,
        body: Incoming,
        name: &mut String,
    ) -> Result<Response<Body>, Answer> {
        if parts.method == Method::CONNECT {
            return Err(Answer::MethodNotAllowed);
        }
        let asked_host = effective_host(&mut parts)?;
        let host = fixed_host.map_or(asked_host, str::to_owned);
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
        // Replicas of this node that ask through their own listener may pass on what they were asked.
        let trusted = fixed_host.is_some() || is_trusted(client.ip(), &self.clients.trusted_proxies);
        set_forwarded(&mut parts, client, &host, trusted);
        let (body, limits) = RequestProgress::new(body, self.clients.body);
        let response = self.hold(&destination, queue, parts, Replay::new(body, limit)).await?;
        limits.lift();
        Ok(response)
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
            known: if self.clients.list_known_hosts { self.routes.known_hosts(HOSTS_NAMED) } else { Vec::new() },
        })?;
        replace_path(parts, rest);
        Ok((service, None))
    }
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
