//! Connections that do nothing are closed, and do not keep others out.

use super::{
    slow_clients::{OK, get, http_replica, one_slot, send},
    *,
};

const PREFACE: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: &str = "\0\0\0\x04\0\0\0\0\0";

/// How long the gateway keeps a connection over which `sent` comes and nothing else.
async fn kept_for(sent: &str) -> Duration {
    let node = Node::start("edge").await;
    let mut client = send(node.ingress, sent).await;
    let begun = tokio::time::Instant::now();
    let mut bytes = Vec::new();
    // A reset is an end, too.
    let _ = client.0.read_to_end(&mut bytes).await;
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn connections_that_never_ask_are_closed() {
    let settings = ClientSettings::default();
    for sent in ["", "P", "PRI * HTTP/2.0\r\n", PREFACE, "GET / HTTP/1.1\r\nhost: x\r\n"] {
        let kept = kept_for(sent).await;
        assert!(kept <= settings.header_timeout + SECOND, "{sent:?}: {kept:?}");
    }
    let settled = kept_for(&format!("{PREFACE}{EMPTY_SETTINGS}")).await;
    assert!(settled <= settings.idle_timeout, "a client that answers no ping: {settled:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_requests_is_closed_after_the_idle_timeout() {
    let (address, _requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings::default()).await;
    let settings = ClientSettings::default();
    let mut client = send(node.ingress, &get("/", "")).await;
    client.read("ok").await;
    tokio::time::sleep(settings.idle_timeout - 2 * SECOND).await;
    client.1.clear();
    client.0.write_all(get("/", "").as_bytes()).await.unwrap();
    assert!(client.read("ok").await.contains("200 OK"), "it is kept between requests");
    let begun = tokio::time::Instant::now();
    client.read("never sent").await;
    let idle = begun.elapsed();
    assert!(idle >= settings.idle_timeout - SECOND && idle <= settings.idle_timeout + SECOND, "{idle:?}");
}

#[tokio::test(start_paused = true)]
async fn http2_clients_that_answer_pings_are_closed_after_the_idle_timeout() {
    let node = Node::start("edge").await;
    let stream = TcpStream::connect(node.ingress).await.unwrap();
    let (client, connection) =
        hyper::client::conn::http2::handshake::<_, _, Full<Bytes>>(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let begun = tokio::time::Instant::now();
    connection.await.unwrap();
    let idle = begun.elapsed();
    let settings = ClientSettings::default();
    assert!(idle >= settings.idle_timeout - SECOND && idle <= settings.idle_timeout + SECOND, "{idle:?}");
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn at_the_limit_the_oldest_idle_connections_make_room() {
    let (address, _requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings { max_connections: 20, ..ClientSettings::default() }).await;
    let mut idle = Vec::new();
    let begun = tokio::time::Instant::now();
    for _ in 0..100 {
        idle.push(send(node.ingress, PREFACE).await);
    }
    let mut client = send(node.ingress, &get("/", "")).await;
    assert!(client.read("ok").await.starts_with("HTTP/1.1 200"));
    assert!(node.path.metrics.open_connections.get() <= 20);
    // What the gateway sends before is HTTP/2's.
    let _ = idle[0].0.read_to_end(&mut Vec::new()).await;
    assert!(begun.elapsed() < SECOND, "not by their own timeout: {:?}", begun.elapsed());
}

#[test]
fn the_connection_limit_follows_the_file_limit() {
    use crate::gateway::max_connections;
    assert_eq!(max_connections(1024), 384);
    assert_eq!(max_connections(1 << 20), 20_000);
    assert!(max_connections(8) >= 1);
}
