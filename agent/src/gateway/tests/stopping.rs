//! An agent that stops: what becomes of requests that run and of those that wait.

use super::*;

#[tokio::test]
async fn an_answer_from_a_node_that_stops_is_sent_to_its_end() {
    let (address, say) = replica().await;
    let (edge, far) = two_nodes(address, false).await;
    let mut client = Client::ask(edge.ingress).await;
    say.send(CHUNKED).unwrap();
    say.send(EVENT).unwrap();
    client.read("data: a").await;
    drop(far.stopping);
    // The node has told the gateway meanwhile that it takes no more requests.
    tokio::time::sleep(Duration::from_millis(200)).await;
    say.send("9\r\ndata: b\n\n\r\n0\r\n\r\n").unwrap();
    let whole = client.read("0\r\n\r\n").await;
    assert!(whole.contains("data: b") && whole.ends_with("0\r\n\r\n"), "{whole}");
}

#[tokio::test]
async fn an_answer_through_a_gateway_that_stops_is_sent_to_its_end() {
    let (address, say) = replica().await;
    let (edge, _far) = two_nodes(address, false).await;
    let mut client = Client::ask(edge.ingress).await;
    say.send(CHUNKED).unwrap();
    client.read("chunked").await;
    drop(edge.stopping);
    tokio::time::sleep(Duration::from_millis(200)).await;
    say.send(EVENT).unwrap();
    say.send("0\r\n\r\n").unwrap();
    let whole = client.read("0\r\n\r\n").await;
    assert!(whole.contains("data: a") && whole.ends_with("0\r\n\r\n"), "{whole}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_still_waits_when_its_gateway_stops_is_told_to_try_again() {
    let node = Node::start("edge").await;
    node.path.apply_routes(routes("edge", 600 * SECOND, &[], 0));
    let mut client = Client::ask(node.ingress).await;
    while node.path.report().revisions.iter().all(|load| load.queue_depth == 0) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let begun = tokio::time::Instant::now();
    drop(node.stopping);
    let answer = client.read("NodeStopping").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(begun.elapsed() <= 11 * SECOND, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_client_that_connected_just_before_its_gateway_stops_is_answered() {
    let (address, say) = replica().await;
    let node = Node::start("edge").await;
    node.path.apply_routes(routes("edge", 60 * SECOND, &[], 1));
    node.has(address, false);
    let mut connection = TcpStream::connect(node.ingress).await.unwrap();
    // The gateway has accepted the connection, and nothing has come by it.
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(node.stopping);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let request = format!("GET /v1/models/m HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    say.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
    let mut client = Client(connection, String::new());
    let answer = client.read("ok\u{0}").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
}
