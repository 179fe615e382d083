//! Streams for slots between two nodes, see `peer.proto`: this gateway announces how many slots it wants, and the node
//! that has the replicas offers them.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use pilotlight_proto::peer::v1::{
    self as peer, BindRequest, BindResponse, bind_request, bind_response, slots_client::SlotsClient,
    slots_server::Slots,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::debug;

use super::peer_connections::{PeerChannel, PeerConnectionPool};
use crate::sidecar::{Announcer, Credit, GatewayStream, Link, OpenStream, Sidecar};

/// A stream on which nothing was announced for this long is closed.
const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const GONE: &str = "the node is gone or has another address";
const INITIAL_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// How often the node looks for offers that have lapsed.
const LAPSE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Opens streams to nodes as requests need them.
pub struct SlotStreams {
    sidecar: std::sync::Weak<Sidecar>,
    connections: Arc<PeerConnectionPool>,
}

impl std::fmt::Debug for SlotStreams {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SlotStreams").finish_non_exhaustive()
    }
}

impl SlotStreams {
    /// Lets the sidecar's links open streams on these connections.
    pub fn attach(sidecar: &Arc<Sidecar>, connections: Arc<PeerConnectionPool>) {
        let sidecar_of_streams = Arc::downgrade(sidecar);
        sidecar.links().set_opener(Arc::new(Self { sidecar: sidecar_of_streams, connections }));
    }
}

impl OpenStream for SlotStreams {
    fn open(&self, link: Arc<Link>) {
        let Some(sidecar) = self.sidecar.upgrade() else { return };
        let announcer = Announcer::new(Arc::clone(&link), Arc::clone(&sidecar));
        tokio::spawn(LinkClient { link, sidecar, connections: Arc::clone(&self.connections), announcer }.run());
    }
}

/// Serves one link: keeps a stream to its node open while requests need it.
struct LinkClient {
    link: Arc<Link>,
    sidecar: Arc<Sidecar>,
    connections: Arc<PeerConnectionPool>,
    announcer: Announcer,
}

impl LinkClient {
    async fn run(mut self) {
        let mut backoff = INITIAL_BACKOFF;
        loop {
            let opened_at = Instant::now();
            let outcome = self.stream().await;
            if self.announcer.try_close() {
                return;
            }
            let Err(status) = outcome else { continue };
            debug!(node = self.link.node(), %status, "the stream for slots ended");
            backoff = if opened_at.elapsed() > MAX_BACKOFF { INITIAL_BACKOFF } else { (backoff * 2).min(MAX_BACKOFF) };
            tokio::time::sleep(backoff).await;
        }
    }

    /// One stream, until it is idle or broken.
    async fn stream(&mut self) -> Result<(), Status> {
        let node = self.link.node().to_owned();
        let gone = self.connections.cancellation(&node).ok_or_else(|| Status::unavailable("the node is not known"))?;
        let connection =
            self.connections.sender(&node).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let outbound = Outbound(sender);
        let stream = self.sidecar.next_number();
        outbound.announce(self.announcer.announce_all(stream))?;
        let origin = http::Uri::try_from(format!("https://{node}.node.pilotlight.internal"));
        let origin = origin.map_err(|error| Status::internal(error.to_string()))?;
        let mut client = SlotsClient::with_origin(PeerChannel::new(connection.requests()), origin);
        let binding = client.bind(UnboundedReceiverStream::new(receiver));
        let mut offers = tokio::select! {
            bound = binding => bound?.into_inner(),
            () = gone.cancelled() => return Err(Status::unavailable(GONE)),
        };
        let mut idle_at = Instant::now() + STREAM_IDLE_TIMEOUT;
        loop {
            tokio::select! {
                () = self.link.wait_for_mark() => {
                    let credits = self.announcer.announce_marked(stream);
                    if !credits.is_empty() {
                        idle_at = Instant::now() + STREAM_IDLE_TIMEOUT;
                    }
                    outbound.announce(credits)?;
                }
                offer = offers.message() => {
                    let Some(message) = offer? else { return Err(Status::unavailable("the node closed it")) };
                    let Some(bind_response::Message::Offer(offer)) = message.message else { continue };
                    self.accept(offer, &outbound)?;
                }
                () = gone.cancelled() => return Err(Status::unavailable(GONE)),
                () = tokio::time::sleep_until(idle_at) => {
                    if !self.announcer.has_demand() {
                        return Ok(());
                    }
                    idle_at = Instant::now() + STREAM_IDLE_TIMEOUT;
                }
            }
        }
    }

    fn accept(&self, offer: peer::Offer, outbound: &Outbound) -> Result<(), Status> {
        let queue = self.sidecar.existing(&offer.revision);
        let node = self.link.node();
        if queue.is_some_and(|queue| queue.accept_offer(node, offer.replica, offer.offer, offer.epoch)) {
            return Ok(());
        }
        outbound.send(bind_request::Message::Decline(peer::Decline { offer: offer.offer }))
    }
}

/// Messages to the node.
struct Outbound(mpsc::UnboundedSender<BindRequest>);

impl Outbound {
    fn announce(&self, credits: Vec<(Arc<str>, Credit)>) -> Result<(), Status> {
        for (revision, Credit { epoch, limit }) in credits {
            let credit = peer::Credit { revision: revision.to_string(), epoch, limit };
            self.send(bind_request::Message::Credit(credit))?;
        }
        Ok(())
    }

    fn send(&self, message: bind_request::Message) -> Result<(), Status> {
        let request = BindRequest { message: Some(message) };
        self.0.send(request).map_err(|_| Status::unavailable("the stream is closed"))
    }
}

/// The node's end of [`SlotStreams`].
pub(super) struct SlotsService {
    pub(super) sidecar: Arc<Sidecar>,
    /// Ends all streams: this node gives no more slots.
    pub(super) stopping: CancellationToken,
}

#[tonic::async_trait]
impl Slots for SlotsService {
    type BindStream = Pin<Box<dyn Stream<Item = Result<BindResponse, Status>> + Send>>;

    async fn bind(
        &self,
        request: tonic::Request<Streaming<BindRequest>>,
    ) -> Result<tonic::Response<Self::BindStream>, Status> {
        let inbound = request.into_inner();
        // It holds at most as many offers as this node can make until they lapse.
        let (sender, receiver) = mpsc::unbounded_channel();
        let gateway = self.sidecar.open_gateway(sender);
        let serving = serve_gateway(inbound, gateway, Arc::clone(&self.sidecar));
        tokio::spawn(self.stopping.clone().run_until_cancelled_owned(serving));
        Ok(tonic::Response::new(Box::pin(UnboundedReceiverStream::new(receiver).map(Ok))))
    }
}

/// Takes in what a gateway announces, until its stream ends.
async fn serve_gateway(mut inbound: Streaming<BindRequest>, mut gateway: GatewayStream, sidecar: Arc<Sidecar>) {
    let mut lapse_check = tokio::time::interval(LAPSE_CHECK_INTERVAL);
    loop {
        let message = tokio::select! {
            message = inbound.message() => message,
            _ = lapse_check.tick() => {
                sidecar.cancel_lapsed_offers(Instant::now());
                continue;
            }
        };
        let Ok(Some(message)) = message else { return };
        match message.message {
            Some(bind_request::Message::Credit(peer::Credit { revision, epoch, limit })) => {
                gateway.receive_credit(revision, Credit { epoch, limit });
            }
            Some(bind_request::Message::Decline(peer::Decline { offer })) => gateway.decline(offer),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io,
        net::{Ipv4Addr, SocketAddr},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use async_trait::async_trait;
    use tokio::io::{DuplexStream, duplex};

    use super::*;
    use crate::{
        endpoint::{Endpoints as _, LocalReplica},
        gateway::{
            ClientSettings, Connect, DataPath, GatewayMetrics, PeerStream, Setup,
            peer_connections::CONNECTION_IDLE_TIMEOUT,
        },
        models::{Models, STALL},
        sidecar::{Limits, RevisionQueue, Target},
    };

    const KEY: &str = "default/iris-00001";
    const SECOND: Duration = Duration::from_secs(1);

    /// Hands the far ends of its connections to a node, and counts them.
    struct Pipes {
        connected: Arc<AtomicUsize>,
        far: mpsc::UnboundedSender<io::Result<DuplexStream>>,
    }

    #[async_trait]
    impl Connect for Pipes {
        async fn connect(&self, _: &str, _: &str) -> io::Result<Box<dyn PeerStream>> {
            let (near, far) = duplex(64 << 10);
            self.far.send(Ok(far)).map_err(io::Error::other)?;
            self.connected.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(near))
        }
    }

    fn data_path(node: &str, connect: Pipes) -> Arc<DataPath> {
        let metrics = GatewayMetrics::register(&mut prometheus_client::registry::Registry::default());
        let (demands, _) = mpsc::channel(8);
        let connect = Arc::new(connect);
        let clients = ClientSettings::default();
        DataPath::new(Setup { node: node.to_owned(), max_request_body: 1 << 20, connect, demands, metrics, clients })
    }

    struct TwoNodes {
        edge: Arc<DataPath>,
        far: Arc<DataPath>,
        connected: Arc<AtomicUsize>,
        _stopping: tokio_util::sync::DropGuard,
        _models: tempfile::TempDir,
    }

    impl TwoNodes {
        fn start() -> Self {
            let connected = Arc::new(AtomicUsize::new(0));
            let (to_far, at_far) = mpsc::unbounded_channel();
            let (to_edge, _) = mpsc::unbounded_channel();
            let edge = data_path("edge", Pipes { connected: Arc::clone(&connected), far: to_far });
            let far = data_path("far", Pipes { connected: Arc::default(), far: to_edge });
            let directory = tempfile::tempdir().unwrap();
            let models = Models::open(directory.path().to_owned(), BTreeMap::new(), STALL, None).unwrap();
            let stopping = tokio_util::sync::CancellationToken::new();
            let connections = UnboundedReceiverStream::new(at_far);
            tokio::spawn(Arc::clone(&far).serve_peers(connections, models, stopping.clone()));
            edge.peers.set_addresses(&[("far".to_owned(), "far:1".to_owned())].into());
            Self { edge, far, connected, _stopping: stopping.drop_guard(), _models: directory }
        }

        /// The queue at the edge, with a route to the far node's replica while it is ready.
        fn route(&self, ready: bool) -> Arc<RevisionQueue> {
            let queue = self.edge.sidecar().revision(KEY);
            let peers = ready.then(|| ("far".to_owned(), vec!["a".to_owned()]));
            queue.route(Limits { queue: 10, timeout: SECOND, concurrency: 1 }, peers.into_iter().collect());
            queue
        }

        fn ready(&self) {
            self.far.sidecar().ready(LocalReplica {
                name: "a".to_owned(),
                revision: KEY.to_owned(),
                address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
                h2c: false,
                container_concurrency: 1,
                timeout: SECOND,
            });
        }

        /// A request that is granted the far replica's slot reaches it and is answered.
        async fn request(&self, queue: &Arc<RevisionQueue>) {
            let grant = queue.enter(false).unwrap().granted().await.unwrap();
            let Target::Peer { offer: Some(offer), .. } = grant.target else { panic!("{:?}", grant.target) };
            drop(self.far.sidecar().use_offer(offer).unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_opens_with_the_first_request_that_needs_it_and_closes_when_idle() {
        let nodes = TwoNodes::start();
        nodes.ready();
        let queue = nodes.route(true);
        tokio::time::sleep(3600 * SECOND).await;
        assert_eq!(nodes.connected.load(Ordering::Relaxed), 0, "no request has needed it");

        nodes.request(&queue).await;
        nodes.request(&queue).await;
        assert_eq!(nodes.connected.load(Ordering::Relaxed), 1);
        let far = nodes.far.sidecar().existing(KEY).unwrap();
        assert!(far.has_gateways());
        tokio::time::sleep(STREAM_IDLE_TIMEOUT + CONNECTION_IDLE_TIMEOUT + SECOND).await;
        assert!(!far.has_gateways(), "the node holds nothing for it any more");

        nodes.request(&queue).await;
        assert_eq!(nodes.connected.load(Ordering::Relaxed), 2, "the connection was closed, too");
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_gets_slots_again_after_the_only_replica_was_not_ready() {
        let nodes = TwoNodes::start();
        nodes.ready();
        let queue = nodes.route(true);
        for _ in 0..3 {
            nodes.request(&queue).await;
            nodes.far.sidecar().not_ready("a");
            nodes.route(false);
            let waiting = queue.enter(false).unwrap();
            tokio::time::sleep(SECOND).await;
            nodes.ready();
            nodes.route(true);
            drop(waiting.granted().await.unwrap());
            // That request never reached the replica: its offer lapses.
            tokio::time::sleep(crate::sidecar::OFFER_LAPSE + SECOND).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_wait_are_served_after_the_connection_broke() {
        let nodes = TwoNodes::start();
        let queue = nodes.route(true);
        let waiting = queue.enter(false).unwrap();
        tokio::time::sleep(SECOND).await;
        // The node has another address now; the stream to the previous one ends.
        nodes.edge.peers.set_addresses(&[("far".to_owned(), "far:2".to_owned())].into());
        tokio::time::sleep(SECOND).await;
        nodes.ready();
        drop(waiting.granted().await.unwrap());
        assert_eq!(nodes.connected.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_stays_open_while_requests_wait_for_a_slot() {
        let nodes = TwoNodes::start();
        let queue = nodes.route(true);
        let waiting = queue.enter(false).unwrap();
        tokio::time::sleep(10 * (STREAM_IDLE_TIMEOUT + CONNECTION_IDLE_TIMEOUT)).await;
        nodes.ready();
        let grant = waiting.granted().await.unwrap();
        let Target::Peer { offer: Some(offer), .. } = grant.target else { panic!("{:?}", grant.target) };
        assert!(nodes.far.sidecar().use_offer(offer).is_some());
        nodes.edge.peers.sender("far").await.unwrap();
        assert_eq!(nodes.connected.load(Ordering::Relaxed), 1, "offers and requests share it");
    }
}
