//! Between nodes: how slots are asked for and offered, and requests that other nodes send here.

use std::{collections::BTreeMap, convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use pilotlight_proto::peer::v1::{
    self as peer, BindRequest, BindResponse, bind_request, bind_response,
    slots_client::SlotsClient,
    slots_server::{Slots, SlotsServer},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, Streaming, service::Routes, transport::Endpoint};
use tower::{ServiceExt as _, service_fn as tower_service};
use tracing::{Instrument as _, debug, info_span};

use super::{
    DataPath,
    answer::{Answer, Body, BoxError},
    body::Replay,
    forward::{Connect, Failure, OFFER, PeerStream, REPLICA, UNSEEN},
    hold, tokens, weights,
};
use crate::{
    models::{Models, lend},
    sidecar::{Grant, Sidecar},
};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A standing request for slots at another node. Closed when dropped.
pub struct Binding {
    address: String,
    _closing: DropGuard,
}

impl Binding {
    /// Opens the stream to a node and keeps it open.
    pub fn open(node: &str, address: &str, sidecar: Arc<Sidecar>, connect: Arc<dyn Connect>) -> Self {
        let closing = CancellationToken::new();
        let closed = closing.clone();
        let (node, place) = (node.to_owned(), address.to_owned());
        tokio::spawn(async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = bind(&node, &place, &sidecar, &connect) => {}
            }
        });
        Self { address: address.to_owned(), _closing: closing.drop_guard() }
    }

    /// Where the node is.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// Opens the stream again and again, with growing pauses while it fails.
async fn bind(node: &str, address: &str, sidecar: &Arc<Sidecar>, connect: &Arc<dyn Connect>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let began = tokio::time::Instant::now();
        if let Err(status) = bind_once(node, address, sidecar, connect).await {
            debug!(%node, %status, "no stream for slots; trying again");
        }
        pause = if began.elapsed() > LONGEST_PAUSE { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        tokio::time::sleep(pause).await;
    }
}

async fn bind_once(
    node: &str,
    address: &str,
    sidecar: &Arc<Sidecar>,
    connect: &Arc<dyn Connect>,
) -> Result<(), Status> {
    let (connect, name, place) = (Arc::clone(connect), node.to_owned(), address.to_owned());
    let connector = tower_service(move |_| {
        let (connect, name, place) = (Arc::clone(&connect), name.clone(), place.clone());
        async move { connect.connect(&name, &place).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://peer.pilotlight.internal")
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_while_idle(true);
    let channel =
        endpoint.connect_with_connector(connector).await.map_err(|error| Status::unavailable(error.to_string()))?;
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut offers = SlotsClient::new(channel).bind(UnboundedReceiverStream::new(receiver)).await?.into_inner();
    for queue in sidecar.revisions() {
        queue.bound_anew(node);
    }
    let mut changes = sidecar.wants();
    // What was last said, so that only changes are.
    let mut told: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    loop {
        for queue in sidecar.revisions() {
            let Some((waiting, offers_seen)) = queue.want(node) else { continue };
            let last = told.get(queue.key()).copied().unwrap_or_default();
            if last != (waiting, offers_seen) {
                told.insert(queue.key().to_owned(), (waiting, offers_seen));
                let want = peer::Want { revision: queue.key().to_owned(), waiting, offers_seen };
                say(&sender, bind_request::Message::Want(want))?;
            }
        }
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_| Status::unavailable("the agent is stopping"))?,
            offer = offers.message() => {
                let Some(message) = offer? else { return Ok(()) };
                let Some(bind_response::Message::Offer(offer)) = message.message else { continue };
                if !sidecar.revision(&offer.revision).offered(node, offer.replica, offer.offer) {
                    say(&sender, bind_request::Message::Decline(peer::Decline { offer: offer.offer }))?;
                }
            }
        }
    }
}

fn say(sender: &mpsc::UnboundedSender<BindRequest>, message: bind_request::Message) -> Result<(), Status> {
    sender
        .send(BindRequest { message: Some(message) })
        .map_err(|_| Status::unavailable("the stream for slots is closed"))
}

/// The server's side of [`Binding`].
struct SlotsService {
    sidecar: Arc<Sidecar>,
}

#[tonic::async_trait]
impl Slots for SlotsService {
    type BindStream = Pin<Box<dyn Stream<Item = Result<BindResponse, Status>> + Send>>;

    async fn bind(
        &self,
        request: tonic::Request<Streaming<BindRequest>>,
    ) -> Result<tonic::Response<Self::BindStream>, Status> {
        let mut wants = request.into_inner();
        // As many offers as there are free slots at most.
        let (sender, receiver) = mpsc::unbounded_channel();
        let sidecar = Arc::clone(&self.sidecar);
        let gateway = sidecar.new_gateway();
        tokio::spawn(async move {
            while let Ok(Some(message)) = wants.message().await {
                match message.message {
                    Some(bind_request::Message::Want(want)) => sidecar.wanted(gateway, &want, &sender),
                    Some(bind_request::Message::Decline(decline)) => sidecar.decline(decline.offer),
                    None => {}
                }
            }
            sidecar.gateway_gone(gateway);
        });
        Ok(tonic::Response::new(Box::pin(UnboundedReceiverStream::new(receiver).map(Ok))))
    }
}

impl DataPath {
    /// Serves other nodes until `stopping`, and lends them this node's models. The streams are authenticated
    /// already.
    pub async fn serve_peers<S, T>(self: Arc<Self>, connections: S, models: Models, stopping: CancellationToken)
    where
        S: Stream<Item = std::io::Result<T>>,
        T: PeerStream + 'static,
    {
        let slots = SlotsServer::new(SlotsService { sidecar: Arc::clone(&self.sidecar) });
        let slots = Routes::new(slots).prepare();
        let mut server = auto::Builder::new(TokioExecutor::new()).http2_only();
        server.http2().timer(TokioTimer::new()).max_concurrent_streams(10_000).adaptive_window(true);
        let mut connections = std::pin::pin!(connections);
        loop {
            let connection = tokio::select! {
                () = stopping.cancelled() => return,
                connection = connections.next() => connection,
            };
            let Some(connection) = connection else { return };
            let Ok(stream) = connection else { continue };
            let (path, slots, models) = (Arc::clone(&self), slots.clone(), models.clone());
            let service = service_fn(move |request: Request<Incoming>| {
                let (path, slots, models) = (Arc::clone(&path), slots.clone(), models.clone());
                async move { Ok::<_, Infallible>(path.serve_peer(request, slots, &models).await) }
            });
            let connection = server.serve_connection(TokioIo::new(stream), service).into_owned();
            let stopping = stopping.clone();
            tokio::spawn(async move {
                tokio::select! {
                    outcome = connection => if let Err(error) = outcome {
                        debug!(%error, "connection from node ended");
                    },
                    () = stopping.cancelled() => {}
                }
            });
        }
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
            Err(Failure::Broken(reason)) => Answer::BadGateway { reason }.response(),
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
