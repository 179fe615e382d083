//! Answers that end early, and where their requests and tokens are counted meanwhile.

mod correctness;
mod failures;
mod idle_connections;
mod slow_clients;
mod stopping;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header, request::Parts};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pilotlight_proto::fleet::v1 as fleet;
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ClientSettings, Connect, DataPath, GatewayMetrics, PeerStream, Setup,
    answer::{Answer, BoxError},
    body::Replay,
    ingress::{EARLY, ROUTES_WITHIN},
    split::Destination,
};
use crate::{
    endpoint::{Endpoints as _, LocalReplica},
    models::{Models, STALL},
    sidecar::RevisionQueue,
};

const KEY: &str = "default/echo-00001";
const HOST: &str = "echo.default.localhost";
const CHAT: &str = "/v1/chat/completions";
const SECOND: Duration = Duration::from_secs(1);

/// Waits for what is about to happen. The bound is no expectation: it only ends a test that hangs.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let asking = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(120 * SECOND, asking).await.is_ok(), "gave up waiting until {what}");
}

fn path(node: &str, connect: Arc<dyn Connect>) -> Arc<DataPath> {
    path_with(node, connect, ClientSettings::default())
}

fn path_with(node: &str, connect: Arc<dyn Connect>, clients: ClientSettings) -> Arc<DataPath> {
    let metrics = GatewayMetrics::register(&mut Registry::default());
    let (demands, _) = mpsc::channel(8);
    DataPath::new(Setup { node: node.to_owned(), max_request_body: 1 << 20, connect, demands, metrics, clients })
}

/// One service, whose revision has one replica: `replica` on `node`.
fn routes(node: &str, timeout: Duration, nodes: &[(&str, String)], concurrency: u32) -> fleet::Routes {
    let replica = fleet::ReplicaRoute { replica: "replica".to_owned(), node: node.to_owned(), ready: true };
    let revision = fleet::RevisionRoute {
        revision: KEY.to_owned(),
        traffic_percent: 100,
        container_concurrency: concurrency,
        timeout: prost_types::Duration::try_from(timeout).ok(),
        queue_limit: 10,
        replicas: vec![replica],
        ..Default::default()
    };
    let service = fleet::ServiceRoute {
        namespace: "default".to_owned(),
        name: "echo".to_owned(),
        hosts: vec![HOST.to_owned()],
        revisions: vec![revision],
        ..Default::default()
    };
    let nodes =
        nodes.iter().map(|(name, address)| fleet::PeerNode { name: (*name).to_owned(), peer_address: address.clone() });
    fleet::Routes { version: 1, full: true, services: vec![service], nodes: nodes.collect(), ..Default::default() }
}

// ── Before the first routes ──────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_request_that_comes_before_the_routes_waits_for_them() {
    let (address, say) = replica().await;
    let node = Node::start("edge").await;
    let mut client = Client::ask(node.ingress).await;
    eventually("it waits", || node.path.early.available_permits() == EARLY - 1).await;
    // What is not full does not say what there is.
    let part = fleet::Routes { full: false, services: Vec::new(), ..routes("edge", SECOND, &[], 1) };
    node.path.apply_routes(part);
    assert!(!node.path.routes.is_loaded());
    node.has(address, false);
    node.path.apply_routes(routes("edge", 60 * SECOND, &[], 1));
    say.send(CHUNKED).unwrap();
    say.send("0\r\n\r\n").unwrap();
    let answer = client.read("\r\n0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");

    // Another session knows what the former one said.
    node.path.session_opened();
    assert!(node.path.routes.is_loaded() && node.path.routes.by_host(HOST).is_some());
    assert_eq!(node.path.early.available_permits(), EARLY);
}

#[tokio::test(start_paused = true)]
async fn without_routes_it_is_503_in_the_end_and_at_once_where_too_many_wait() {
    let path = path("edge", Arc::new(Plain));
    let begun = tokio::time::Instant::now();
    let answers = (0..=EARLY).map(|_| async { (path.wait_for_routes().await.unwrap_err(), begun.elapsed()) });
    let answers = futures::future::join_all(answers).await;
    let (at_once, waited) = (answers.last().unwrap(), &answers[..EARLY]);
    assert_eq!(*at_once, (Answer::NoRoutes, Duration::ZERO));
    assert!(waited.iter().all(|answer| *answer == (Answer::NoRoutes, ROUTES_WITHIN)));
    let response = Answer::NoRoutes.response();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()[header::RETRY_AFTER], "1");
}

// ── In memory, on a paused clock: deadlines ──────────────────────────────────────────────────────────────

/// Hands out one end of a pipe, after it has refused so many times; the other end goes to the test.
struct Pipes {
    far: mpsc::UnboundedSender<DuplexStream>,
    refusals: AtomicU32,
}

#[async_trait]
impl Connect for Pipes {
    async fn connect(&self, _: &str, _: &str) -> io::Result<Box<dyn PeerStream>> {
        if self.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = duplex(64 << 10);
        self.far.send(far).map_err(io::Error::other)?;
        Ok(Box::new(near))
    }
}

type Frames = mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>;

/// A gateway and a node elsewhere that answers each request with what is sent to the receiver's next.
/// Without a `Frames` for it, a request gets no answer at all.
fn gateway_and_node() -> (Arc<DataPath>, Arc<RevisionQueue>, mpsc::UnboundedReceiver<Frames>) {
    gateway_and_unreachable_node(0, SECOND)
}

/// The same; the node refuses the first `refusals` connections.
fn gateway_and_unreachable_node(
    refusals: u32,
    timeout: Duration,
) -> (Arc<DataPath>, Arc<RevisionQueue>, mpsc::UnboundedReceiver<Frames>) {
    let (far, mut piped) = mpsc::unbounded_channel();
    let (answers, answering) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(pipe) = piped.recv().await {
            let answers = answers.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let answers = answers.clone();
                async move {
                    if request.uri().path() == "/silent" {
                        std::future::pending::<()>().await;
                    }
                    let (frames, stream) = mpsc::unbounded_channel();
                    // The test may be over.
                    let _ = answers.send(frames);
                    Ok::<_, Infallible>(Response::new(StreamBody::new(UnboundedReceiverStream::new(stream))))
                }
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(pipe), service));
        }
    });
    let path = path("edge", Arc::new(Pipes { far, refusals: AtomicU32::new(refusals) }));
    path.apply_routes(routes("far", timeout, &[("far", "far:1".to_owned())], 0));
    let queue = path.sidecar().revision(KEY);
    (path, queue, answering)
}

async fn hold(path: &DataPath, queue: &Arc<RevisionQueue>, at: &str) -> Result<Response<super::answer::Body>, Answer> {
    let (parts, body) = Request::post(at).body(Full::from("{}")).unwrap().into_parts();
    let (service, tagged) = path.routes.by_host(HOST).unwrap();
    let destination = Destination::new(service, tagged, &parts.headers);
    path.hold(&destination, Arc::clone(queue), parts, Replay::new(body, 100)).await
}

#[tokio::test(start_paused = true)]
async fn without_an_answer_in_time_it_is_504_and_nothing_stays_counted() {
    let (path, queue, _answers) = gateway_and_node();
    let begun = tokio::time::Instant::now();
    let answer = hold(&path, &queue, "/silent").await.err().unwrap();
    assert_eq!(answer, Answer::Timeout { seconds: 1, waiting: false });
    assert_eq!((answer.status(), begun.elapsed()), (StatusCode::GATEWAY_TIMEOUT, SECOND));

    queue.route(queue.limits(), BTreeMap::new());
    let answer = hold(&path, &queue, CHAT).await.err().unwrap();
    assert_eq!(answer, Answer::Timeout { seconds: 1, waiting: true });
    assert_eq!(queue.tokens().in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_no_replica_has_seen_is_sent_again_until_its_deadline() {
    let (path, queue, mut answers) = gateway_and_unreachable_node(20, 60 * SECOND);
    let (answer, _frames) = tokio::join!(hold(&path, &queue, "/v1/x"), answers.recv());
    assert_eq!(answer.unwrap().status(), StatusCode::OK, "the node came back in time");

    let (path, queue, _answers) = gateway_and_unreachable_node(u32::MAX, 60 * SECOND);
    let begun = tokio::time::Instant::now();
    let answer = hold(&path, &queue, "/v1/x").await.err().unwrap();
    assert!(matches!(&answer, Answer::BadGateway { reason } if reason.contains("node far")), "{answer:?}");
    let waited = begun.elapsed();
    assert!(waited > 58 * SECOND && waited <= 60 * SECOND, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn the_deadline_is_for_the_first_byte_and_cuts_no_stream() {
    let (path, queue, mut answers) = gateway_and_node();
    let (answer, frames) = tokio::join!(hold(&path, &queue, "/v1/stream"), answers.recv());
    let (mut body, frames) = (answer.unwrap().into_body(), frames.unwrap());
    for event in ["data: a\n\n", "data: b\n\n"] {
        tokio::time::sleep(3600 * SECOND).await;
        frames.send(Ok(Frame::data(Bytes::from(event)))).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), event);
    }
    drop(frames);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "", "a proper end");
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_another_node_that_fails_ends_with_an_error() {
    let (path, queue, mut answers) = gateway_and_node();
    let (answer, frames) = tokio::join!(hold(&path, &queue, "/v1/stream"), answers.recv());
    let (mut body, frames) = (answer.unwrap().into_body(), frames.unwrap());
    frames.send(Ok(Frame::data(Bytes::from("data: a\n\n")))).unwrap();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "data: a\n\n");
    frames.send(Err("the replica is gone".into())).unwrap();
    assert!(body.frame().await.unwrap().is_err(), "no bytes, no proper end");
}

// ── Over sockets: what a client sees, and who counts ─────────────────────────────────────────────────────

struct Plain;

#[async_trait]
impl Connect for Plain {
    async fn connect(&self, _: &str, address: &str) -> io::Result<Box<dyn PeerStream>> {
        Ok(Box::new(TcpStream::connect(address).await?))
    }
}

/// A node that serves clients and other nodes.
struct Node {
    path: Arc<DataPath>,
    ingress: SocketAddr,
    peers: SocketAddr,
    _models: tempfile::TempDir,
    stopping: DropGuard,
}

impl Node {
    async fn start(name: &str) -> Self {
        Self::start_with(name, ClientSettings::default()).await
    }

    async fn start_with(name: &str, clients: ClientSettings) -> Self {
        let path = path_with(name, Arc::new(Plain), clients);
        let stopping = CancellationToken::new();
        let ingress = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peers = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let models = Models::open(directory.path().to_owned(), BTreeMap::new(), STALL, None).unwrap();
        let node = Self {
            ingress: ingress.local_addr().unwrap(),
            peers: peers.local_addr().unwrap(),
            path: Arc::clone(&path),
            _models: directory,
            stopping: stopping.clone().drop_guard(),
        };
        tokio::spawn(Arc::clone(&path).serve_ingress(ingress, stopping.clone()));
        tokio::spawn(path.serve_peers(TcpListenerStream::new(peers), models, stopping));
        node
    }

    fn has(&self, address: SocketAddr, h2c: bool) {
        self.path.sidecar().ready(LocalReplica {
            name: "replica".to_owned(),
            revision: KEY.to_owned(),
            address,
            h2c,
            container_concurrency: 1,
            timeout: 60 * SECOND,
        });
    }

    fn tokens(&self) -> u64 {
        self.path.sidecar().revision(KEY).tokens().in_flight()
    }

    fn load(&self) -> fleet::RevisionLoad {
        self.path.report().revisions.into_iter().next().unwrap_or_default()
    }
}

/// The edge, which has no replica, and the node that has it.
async fn two_nodes(address: SocketAddr, h2c: bool) -> (Node, Node) {
    let (edge, far) = (Node::start("edge").await, Node::start("far").await);
    let nodes = [("edge", edge.peers.to_string()), ("far", far.peers.to_string())];
    for node in [&edge, &far] {
        node.path.apply_routes(routes("far", 60 * SECOND, &nodes, 1));
    }
    far.has(address, h2c);
    (edge, far)
}

/// A server that takes one request and then writes what it is told. It breaks off when the sender is dropped.
async fn replica() -> (SocketAddr, mpsc::UnboundedSender<&'static str>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (say, mut said) = mpsc::unbounded_channel::<&str>();
    tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
            assert_ne!(connection.read_buf(&mut request).await.unwrap(), 0);
        }
        while let Some(text) = said.recv().await {
            connection.write_all(text.as_bytes()).await.unwrap();
        }
    });
    (address, say)
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const SIZED: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 1000\r\n\r\n";
const EVENT: &str = "9\r\ndata: a\n\n\r\n";

/// Sends a chat of 40 bytes, and reads until `until` has come or the connection has ended.
struct Client(TcpStream, String);

impl Client {
    async fn ask(ingress: SocketAddr) -> Self {
        let mut connection = TcpStream::connect(ingress).await.unwrap();
        let body = r#"{"messages": [], "stream": true, "x": 1}"#;
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all((head + body).as_bytes()).await.unwrap();
        Self(connection, String::new())
    }

    async fn read(&mut self, until: &str) -> &str {
        let mut bytes = [0; 1024];
        while !self.1.contains(until) {
            // A reset is an end, too.
            let count = self.0.read(&mut bytes).await.unwrap_or(0);
            if count == 0 {
                break;
            }
            self.1.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        &self.1
    }
}

/// What follows the head of an answer when its replica breaks off, as the client of `ingress` gets it.
async fn broken_off(
    ingress: SocketAddr,
    say: mpsc::UnboundedSender<&'static str>,
    script: [&'static str; 2],
) -> String {
    let mut client = Client::ask(ingress).await;
    for text in script {
        say.send(text).unwrap();
    }
    client.read("data: a").await;
    drop(say);
    let whole = client.read("never said").await;
    assert!(whole.starts_with("HTTP/1.1 200 OK\r\n"), "{whole}");
    whole.split_once("\r\n\r\n").unwrap().1.to_owned()
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_cut_and_nothing_is_added() {
    for (script, expected) in [([CHUNKED, EVENT], EVENT), ([SIZED, "data: a\n\n"], "data: a\n\n")] {
        let (address, say) = replica().await;
        let node = Node::start("edge").await;
        node.path.apply_routes(routes("edge", 60 * SECOND, &[], 1));
        node.has(address, false);
        assert_eq!(broken_off(node.ingress, say, script).await, expected, "no last chunk, no text");

        let (address, say) = replica().await;
        let (edge, _far) = two_nodes(address, false).await;
        assert_eq!(broken_off(edge.ingress, say, script).await, expected, "through another node");
    }
}

#[tokio::test]
async fn over_http2_an_answer_that_breaks_off_is_reset() {
    let (address, say) = replica().await;
    let node = Node::start("edge").await;
    node.path.apply_routes(routes("edge", 60 * SECOND, &[], 1));
    node.has(address, false);
    let stream = TcpStream::connect(node.ingress).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("http://{HOST}/v1/stream")).body(Full::<Bytes>::from("{}")).unwrap();
    say.send(CHUNKED).unwrap();
    say.send(EVENT).unwrap();
    let mut body = sender.send_request(request).await.unwrap().into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "data: a\n\n");
    drop(say);
    assert!(body.frame().await.unwrap().is_err(), "reset, not ended");
}

#[tokio::test]
async fn tokens_are_counted_where_the_request_runs_and_go_back_to_zero() {
    let (address, say) = replica().await;
    let (edge, far) = two_nodes(address, false).await;
    let mut client = Client::ask(edge.ingress).await;
    say.send(CHUNKED).unwrap();
    say.send(EVENT).unwrap();
    client.read("data: a").await;
    assert_eq!((edge.tokens(), far.tokens()), (0, 11), "40 bytes by estimate, and one generated");
    assert_eq!((edge.load().running, far.load().running), (0, 1));
    say.send("3f\r\ndata: {\"usage\": {\"prompt_tokens\": 5, \"completion_tokens\": 3}}\n\n\r\n").unwrap();
    client.read("usage").await;
    assert_eq!((edge.tokens(), far.tokens()), (0, 8), "exact");
    say.send("0\r\n\r\n").unwrap();
    assert!(client.read("\r\n0\r\n\r\n").await.ends_with("\r\n0\r\n\r\n"), "a proper end");
    eventually("it is counted as completed", || far.load().completed_count == 1).await;
    assert_eq!((edge.tokens(), far.tokens(), edge.load().completed_count), (0, 0, 0));
    assert_eq!(far.load().running, 0);
}

#[tokio::test]
async fn a_client_that_hangs_up_or_waits_in_vain_leaves_no_tokens() {
    let (address, say) = replica().await;
    let (edge, far) = two_nodes(address, false).await;
    let mut client = Client::ask(edge.ingress).await;
    say.send(CHUNKED).unwrap();
    say.send(EVENT).unwrap();
    client.read("data: a").await;
    let second = Client::ask(edge.ingress).await;
    eventually("the second one waits", || edge.tokens() == 10).await;
    assert_eq!(far.tokens(), 11, "its prompt is counted where it waits");
    drop(second);
    eventually("the second one has left", || edge.tokens() == 0).await;
    drop(client);
    // Whether a client is gone or has only closed its side shows when bytes are sent to it.
    say.send(EVENT).unwrap();
    eventually("the stream is given up", || far.tokens() == 0).await;
    eventually("its slot, too", || far.load().running == 0).await;
}

#[tokio::test]
async fn what_nodes_tell_each_other_stays_between_them() {
    let (address, say) = replica().await;
    let (edge, far) = two_nodes(address, false).await;
    far.path.sidecar().revision(KEY).tokens().learn(64.0);
    let mut client = Client::ask(edge.ingress).await;
    say.send(CHUNKED).unwrap();
    say.send("0\r\n\r\n").unwrap();
    let answer = client.read("0\r\n\r\n").await.to_lowercase();
    assert!(answer.contains(header::CONTENT_TYPE.as_str()) && !answer.contains("pilotlight"), "{answer}");
    let learned = edge.path.sidecar().revision(KEY).tokens().bytes_per_token();
    assert!((learned - 6.4).abs() < 1e-9, "4 + 0.2 · (16 - 4), and there 4 + 0.2 · (64 - 4): {learned}");
}

// ── HTTP/2 all the way, as gRPC needs it ─────────────────────────────────────────────────────────────────

/// A server of HTTP/2 with prior knowledge. Each answer has a status in its trailers.
async fn grpc_replica() -> (SocketAddr, mpsc::UnboundedReceiver<Parts>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heard, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let heard = heard.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let heard = heard.clone();
                async move {
                    let (head, body) = request.into_parts();
                    assert_eq!(body.collect().await.unwrap().to_bytes(), "question");
                    heard.send(head).unwrap();
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", HeaderValue::from_static("5"));
                    let frames =
                        [Ok::<_, Infallible>(Frame::data(Bytes::from("answer"))), Ok(Frame::trailers(trailers))];
                    Ok::<_, Infallible>(Response::new(StreamBody::new(tokio_stream::iter(frames))))
                }
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
        }
    });
    (address, requests)
}

#[tokio::test]
async fn grpc_passes_one_node_and_two() {
    let (address, mut requests) = grpc_replica().await;
    let (edge, far) = two_nodes(address, true).await;
    for ingress in [far.ingress, edge.ingress] {
        let stream = TcpStream::connect(ingress).await.unwrap();
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut client, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        let request = Request::post(format!("http://{HOST}/inference.GRPCInferenceService/ModelInfer"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .body(Full::<Bytes>::from("question"));
        let answer = client.send_request(request.unwrap()).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(answer.trailers().unwrap()["grpc-status"], "5");
        assert_eq!(answer.to_bytes(), "answer");

        let head = requests.recv().await.unwrap();
        assert_eq!((head.version, &head.headers[header::TE]), (Version::HTTP_2, &HeaderValue::from_static("trailers")));
        // A Host beside an :authority that differs would be malformed to some servers.
        assert_eq!(
            (head.uri.authority().unwrap().as_str(), head.headers.get(header::HOST)),
            (&*address.to_string(), None)
        );
        assert_eq!(head.headers["x-forwarded-host"], HOST);
    }
}
