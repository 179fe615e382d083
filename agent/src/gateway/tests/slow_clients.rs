//! Clients that send or read slowly, or not at all, hold no slot.

use futures::StreamExt as _;

use super::*;
use crate::gateway::progress::{BodyLimits, RequestProgress};

/// A replica that answers each request with `response`; what it reads is sent to the test. Without a response
/// it does not wait for the request's body, and never answers.
pub(super) async fn http_replica(response: &'static str) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while let Ok(1..) = connection.read_buf(&mut request).await {
                    let text = String::from_utf8_lossy(&request).into_owned();
                    // The only length that tests announce.
                    let awaits_body = text.contains("content-length: 10\r\n") && !text.contains("0123456789");
                    if text.contains("\r\n\r\n") && (response.is_empty() || !awaits_body) {
                        // The test may be over.
                        let _ = seen.send(text);
                        request.clear();
                        if connection.write_all(response.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    (address, requests)
}

pub(super) const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// A gateway with one local replica, which has one slot.
pub(super) async fn one_slot(address: SocketAddr, clients: ClientSettings) -> Node {
    let node = Node::start_with("edge", clients).await;
    node.path.apply_routes(routes("edge", 300 * SECOND, &[], 1));
    node.has(address, false);
    node
}

/// Sends `request` over a connection of its own.
pub(super) async fn send(ingress: SocketAddr, request: &str) -> Client {
    let mut connection = TcpStream::connect(ingress).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    Client(connection, String::new())
}

pub(super) fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: {HOST}\r\n{headers}\r\n")
}

fn post(headers: &str) -> String {
    format!("POST /v1/x HTTP/1.1\r\nhost: {HOST}\r\n{headers}\r\n")
}

const NEVER: &str = "never sent";

#[tokio::test]
async fn posts_whose_bodies_never_arrive_hold_no_slot() {
    let (address, _requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings::default()).await;
    let _first = send(node.ingress, &post("content-length: 10\r\n")).await;
    let mut second = send(node.ingress, &post("content-length: 10\r\nexpect: 100-continue\r\n")).await;
    second.read("100 Continue").await;
    let mut other = send(node.ingress, &get("/", "")).await;
    assert!(other.read("ok").await.starts_with("HTTP/1.1 200"));
    second.0.write_all(b"0123456789").await.unwrap();
    assert!(second.read("ok").await.contains("HTTP/1.1 200"), "it is served once it has sent its body");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stops_arriving_is_408_and_its_slot_comes_back() {
    let (address, mut requests) = http_replica("").await;
    let node = one_slot(address, ClientSettings::default()).await;
    let mut client = send(node.ingress, &(post("transfer-encoding: chunked\r\n") + "2\r\n01\r\n")).await;
    requests.recv().await.unwrap();
    assert_eq!(node.load().running, 1);
    let begun = tokio::time::Instant::now();
    let answer = client.read(NEVER).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 408") && answer.contains("connection: close"), "{answer}");
    assert!(!answer.contains("replica"), "{answer}");
    assert!(begun.elapsed() < 60 * SECOND, "long before the timeout of 300 s");
    eventually("its slot is free", || node.load().running == 0).await;
    assert_eq!(node.path.metrics.request_body_timeouts.get(), 1);
}

#[tokio::test]
async fn a_body_of_known_length_holds_no_slot_until_it_has_arrived() {
    let (address, _requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings::default()).await;
    let mut slow = send(node.ingress, &(post("content-length: 10\r\n") + "01")).await;
    let _large = send(node.ingress, &(post("content-length: 1000000\r\n") + &"x".repeat(32 << 10))).await;
    let mut other = send(node.ingress, &get("/", "")).await;
    assert!(other.read("ok").await.starts_with("HTTP/1.1 200"));
    slow.0.write_all(b"23456789").await.unwrap();
    assert!(slow.read("ok").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_begins_is_408() {
    let (address, mut requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings::default()).await;
    let mut client = send(node.ingress, &post("transfer-encoding: chunked\r\n")).await;
    let answer = client.read(NEVER).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(requests.try_recv().is_err(), "the replica has not seen it");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_while_the_body_is_missing_does_not_blame_the_replica() {
    let (address, mut requests) = http_replica("").await;
    let node = Node::start("edge").await;
    node.path.apply_routes(routes("edge", 5 * SECOND, &[], 1));
    node.has(address, false);
    let mut client = send(node.ingress, &(post("transfer-encoding: chunked\r\n") + "2\r\n01\r\n")).await;
    requests.recv().await.unwrap();
    let answer = client.read(NEVER).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("within 5 s"), "{answer}");
}

/// A body whose bytes the test sends.
fn channel_body() -> (mpsc::UnboundedSender<Bytes>, impl http_body::Body<Data = Bytes, Error = BoxError> + Send + Unpin)
{
    let (sender, receiver) = mpsc::unbounded_channel();
    let frames = UnboundedReceiverStream::new(receiver).map(|bytes| Ok::<_, BoxError>(Frame::data(bytes)));
    (sender, StreamBody::new(frames))
}

const LIMITS: BodyLimits = BodyLimits { idle_timeout: Duration::from_secs(30), min_bytes_per_second: 1024 };

#[tokio::test(start_paused = true)]
async fn a_body_that_trickles_is_too_slow_and_a_fast_one_is_not() {
    for (bytes_per_second, is_ok) in [(1500, true), (100, false)] {
        let (sender, body) = channel_body();
        let (body, _limits) = RequestProgress::new(body, LIMITS);
        tokio::spawn(async move {
            for _ in 0..60 {
                tokio::time::sleep(SECOND).await;
                if sender.send(Bytes::from(vec![0; bytes_per_second])).is_err() {
                    return;
                }
            }
        });
        let read = body.collect().await;
        assert_eq!(read.is_ok(), is_ok, "{bytes_per_second} bytes/s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_reads_slowly_is_not_the_clients_fault() {
    let (sender, body) = channel_body();
    let (mut body, _limits) = RequestProgress::new(body, LIMITS);
    for _ in 0..3 {
        sender.send(Bytes::from("x")).unwrap();
        tokio::time::sleep(3600 * SECOND).await;
        assert!(body.frame().await.unwrap().is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_answer_has_begun_may_be_silent() {
    let (sender, body) = channel_body();
    let (mut body, limits) = RequestProgress::new(body, LIMITS);
    limits.lift();
    tokio::spawn(async move {
        tokio::time::sleep(3600 * SECOND).await;
        let _ = sender.send(Bytes::from("x"));
    });
    assert!(body.frame().await.unwrap().is_ok());
}

#[tokio::test]
async fn the_length_that_a_client_announced_reaches_the_replica() {
    let (address, mut requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings::default()).await;
    let mut client = send(node.ingress, &(post("content-length: 10\r\n") + "0123456789")).await;
    client.read("ok").await;
    let request = requests.recv().await.unwrap().to_lowercase();
    assert!(request.contains("content-length: 10") && !request.contains("chunked"), "{request}");
}

// ── Readers ──────────────────────────────────────────────────────────────────────────────────────────────

/// A replica that answers with bytes without end; the head first.
async fn endless_replica() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    if connection.read_buf(&mut request).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
                let mut written = connection.write_all(head.as_bytes()).await;
                let block = "data: x\n\n".repeat(4096);
                while written.is_ok() {
                    written = connection.write_all(block.as_bytes()).await;
                }
            });
        }
    });
    address
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_reads_its_response_loses_its_slot() {
    let node = one_slot(endless_replica().await, ClientSettings::default()).await;
    let _silent = send(node.ingress, &get("/", "")).await;
    eventually("it has the slot", || node.load().running == 1).await;
    eventually("it is disconnected", || node.path.metrics.response_write_timeouts.get() == 1).await;
    eventually("its slot is free", || node.load().running == 0).await;
}

#[tokio::test(start_paused = true)]
async fn an_http2_stream_whose_window_stays_closed_loses_its_slot_and_others_go_on() {
    let node = one_slot(endless_replica().await, ClientSettings::default()).await;
    let stream = TcpStream::connect(node.ingress).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let ask = || Request::get(format!("http://{HOST}/v1/stream")).body(Full::<Bytes>::default()).unwrap();
    let mut unread = client.send_request(ask()).await.unwrap().into_body();
    assert_eq!(node.load().running, 1);
    eventually("its stream is reset", || node.path.metrics.response_write_timeouts.get() == 1).await;
    eventually("its slot is free", || node.load().running == 0).await;
    let mut other = client.send_request(ask()).await.unwrap().into_body();
    assert!(other.frame().await.unwrap().is_ok(), "the connection serves others");
    while let Some(Ok(_)) = unread.frame().await {}
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_replica_is_quiet_is_not_cut() {
    let (address, say) = replica().await;
    let node = one_slot(address, ClientSettings::default()).await;
    let mut client = Client::ask(node.ingress).await;
    say.send(CHUNKED).unwrap();
    say.send(EVENT).unwrap();
    client.read("data: a").await;
    tokio::time::sleep(3600 * SECOND).await;
    say.send("9\r\ndata: b\n\n\r\n").unwrap();
    assert!(client.read("data: b").await.contains("data: b"));
}
