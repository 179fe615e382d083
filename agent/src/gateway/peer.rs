//! Requests, streams for slots and requests for models that other nodes send here.

use std::{convert::Infallible, sync::Arc};

use futures::{Stream, StreamExt as _};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use pilotlight_proto::peer::v1::slots_server::SlotsServer;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tower::ServiceExt as _;
use tracing::{Instrument as _, debug, info_span};

use super::{
    DataPath,
    answer::{Answer, Body, BoxError},
    body::Replay,
    error_format::ErrorFormat,
    forward::{Failure, OFFER, PeerStream, REPLICA, UNSEEN},
    hold,
    listener::DRAIN_TIMEOUT,
    peer_connections::{CONNECTION_WINDOW, KEEP_ALIVE_INTERVAL, STREAM_WINDOW},
    slot_stream::SlotsService,
    tokens, weights,
};
use crate::{
    models::{Models, lend},
    sidecar::Grant,
};

impl DataPath {
    /// Serves other nodes until `stopping`, and lends them this node's models. The streams are authenticated
    /// already. Requests that run then may end; slots are given no more.
    pub async fn serve_peers<S, T>(self: Arc<Self>, connections: S, models: Models, stopping: CancellationToken)
    where
        S: Stream<Item = std::io::Result<T>>,
        T: PeerStream + 'static,
    {
        let slots = SlotsServer::new(SlotsService { sidecar: Arc::clone(&self.sidecar), stopping: stopping.clone() });
        let slots = Routes::new(slots).prepare();
        let mut server = auto::Builder::new(TokioExecutor::new()).http2_only();
        server
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(10_000)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_INTERVAL);
        let mut connections = std::pin::pin!(connections.take_until(stopping.cancelled()));
        let running = TaskTracker::new();
        while let Some(connection) = connections.next().await {
            let Ok(stream) = connection else { continue };
            let (path, slots, models) = (Arc::clone(&self), slots.clone(), models.clone());
            let service = service_fn(move |request: Request<Incoming>| {
                let (path, slots, models) = (Arc::clone(&path), slots.clone(), models.clone());
                async move { Ok::<_, Infallible>(path.serve_peer(request, slots, &models).await) }
            });
            let connection = server.serve_connection(TokioIo::new(stream), service).into_owned();
            let stopping = stopping.clone();
            running.spawn(async move {
                let mut connection = std::pin::pin!(connection);
                let outcome = tokio::select! {
                    outcome = connection.as_mut() => outcome,
                    () = stopping.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = outcome {
                    debug!(%error, "connection from node ended");
                }
            });
        }
        running.close();
        // What has not ended by then is cut off by the end of the process.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, running.wait()).await;
    }

    async fn serve_peer(&self, request: Request<Incoming>, slots: Routes, models: &Models) -> Response<Body> {
        if !request.headers().contains_key(REPLICA) {
            if request.uri().path().starts_with(lend::PREFIX) {
                return weights::serve(models, &request).await;
            }
            return match slots.oneshot(request).await {
                Ok(response) => response.map(|body| body.map_err(|status| Box::new(status) as BoxError).boxed_unsync()),
                Err(never) => match never {},
            };
        }
        let Some(grant) = self.grant_for(&request) else { return unseen() };
        let span = info_span!("sidecar.request", otel.kind = "server", url.path = request.uri().path());
        pilotlight_telemetry::extract(request.headers(), &span);
        let (mut parts, body) = request.into_parts();
        let format = ErrorFormat::for_request(&parts);
        parts.headers.remove(REPLICA);
        parts.headers.remove(OFFER);
        let body = Replay::new(body, self.max_request_body);
        let Some(content) = body.attempt() else { return unseen() };
        let queue = if tokens::counts(&parts) { grant.permit.queue() } else { None };
        let load = queue.map(|queue| Arc::clone(queue.tokens()));
        let count = load.as_ref().map(|load| load.begin(body.bytes()));
        let sent = self.proxy(&grant, Request::from_parts(parts, content)).instrument(span).await;
        match sent {
            Ok(mut response) => {
                if let Some(load) = load {
                    tokens::tell(response.headers_mut(), &load);
                }
                hold::answered(response, &body, count, grant.permit)
            }
            Err(Failure::Unseen(reason)) => {
                debug!(%reason, "the replica has not seen the request");
                unseen()
            }
            Err(Failure::Broken(reason)) => {
                hold::release_after_exit(grant);
                Answer::BadGateway { reason }.response_for(format)
            }
        }
    }

    fn grant_for(&self, request: &Request<Incoming>) -> Option<Grant> {
        let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
        match text(OFFER) {
            Some(offer) => self.sidecar.use_offer(offer.parse().ok()?),
            None => self.sidecar.admit(text(REPLICA)?),
        }
    }
}

/// Tells the other gateway that it may send the request again.
fn unseen() -> Response<Body> {
    let mut response = Answer::BadGateway { reason: "no slot any more".to_owned() }.response();
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(UNSEEN, http::HeaderValue::from_static("1"));
    response
}
