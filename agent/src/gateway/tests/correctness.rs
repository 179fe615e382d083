//! HTTP as its RFCs have it, and errors in the form that clients understand.

use super::{
    slow_clients::{OK, get, http_replica, one_slot, send},
    *,
};

/// The answer to `request`, up to the end of its connection or body.
async fn answer(ingress: SocketAddr, request: &str) -> String {
    let request = request.replacen("\r\n\r\n", "\r\nconnection: close\r\n\r\n", 1);
    send(ingress, &request).await.read("never sent").await.to_owned()
}

async fn node() -> (Node, mpsc::UnboundedReceiver<String>) {
    let (address, requests) = http_replica(OK).await;
    (one_slot(address, ClientSettings::default()).await, requests)
}

#[tokio::test]
async fn malformed_chunks_are_400() {
    let (node, _requests) = node().await;
    let head = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ntransfer-encoding: chunked\r\n\r\n");
    for chunks in ["zz\r\n", "5\r\nhello\r\nzz\r\n", "5\r\nhello world"] {
        let answer = answer(node.ingress, &format!("{head}{chunks}")).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{chunks:?}: {answer}");
    }
    eventually("no slot is held", || node.load().running == 0).await;
}

#[tokio::test]
async fn connect_is_405() {
    let (node, _requests) = node().await;
    let answer = answer(node.ingress, "CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("\r\nallow: "), "{answer}");
}

#[tokio::test]
async fn two_hosts_or_none_are_400() {
    let (node, _requests) = node().await;
    let two = answer(node.ingress, &get("/", "host: other\r\n")).await;
    assert!(two.starts_with("HTTP/1.1 400") && two.contains("more than one Host"), "{two}");
    let none = answer(node.ingress, "GET / HTTP/1.1\r\nx: y\r\n\r\n").await;
    assert!(none.starts_with("HTTP/1.1 400"), "{none}");
}

#[tokio::test]
async fn an_absolute_uri_and_an_authority_win_over_host() {
    let (node, mut requests) = node().await;
    let absolute = format!("GET http://{HOST}/x HTTP/1.1\r\nhost: other.example\r\n\r\n");
    let answer = answer(node.ingress, &absolute).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let seen = requests.recv().await.unwrap().to_lowercase();
    assert!(seen.contains(&format!("host: {HOST}\r\n")) && !seen.contains("other.example"), "{seen}");

    let response = http2(node.ingress, |request| request.header(header::HOST, "other.example")).await;
    assert_eq!(response.status(), StatusCode::OK);
}

/// The response to a request over HTTP/2 for [`HOST`], which `change` completes.
async fn http2(
    ingress: SocketAddr,
    change: impl FnOnce(http::request::Builder) -> http::request::Builder,
) -> Response<Incoming> {
    let stream = TcpStream::connect(ingress).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = change(Request::post(format!("http://{HOST}/x")));
    client.send_request(request.body(Full::<Bytes>::from("{}")).unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_client_that_half_closes_still_gets_its_response() {
    let (address, say) = replica().await;
    let node = one_slot(address, ClientSettings::default()).await;
    let mut client = Client::ask(node.ingress).await;
    client.0.shutdown().await.unwrap();
    eventually("it has its slot", || node.load().running == 1).await;
    // The gateway has noticed that the client closed its side.
    client.read("100 Continue").await;
    say.send(CHUNKED).unwrap();
    say.send(EVENT).unwrap();
    client.read("data: a").await;
    say.send("0\r\n\r\n").unwrap();
    assert!(client.read("never sent").await.ends_with("data: a\n\n\r\n0\r\n\r\n"), "{}", client.1);
}

#[tokio::test]
async fn a_client_that_hangs_up_while_it_waits_is_given_up_at_once() {
    let (address, _say) = replica().await;
    let node = one_slot(address, ClientSettings::default()).await;
    let client = Client::ask(node.ingress).await;
    eventually("it has its slot", || node.load().running == 1).await;
    drop(client);
    eventually("its slot is free", || node.load().running == 0).await;
}

#[tokio::test]
async fn forwarded_headers_are_kept_from_trusted_proxies_and_replaced_otherwise() {
    let headers = "x-forwarded-for: 192.0.2.7\r\nx-forwarded-proto: https\r\nforwarded: for=192.0.2.7\r\n";
    for (proxies, expected) in [
        ("127.0.0.0/8", ["x-forwarded-for: 192.0.2.7, 127.0.0.1\r\n", "x-forwarded-proto: https\r\n"]),
        ("10.0.0.0/8", ["x-forwarded-for: 127.0.0.1\r\n", "x-forwarded-proto: http\r\n"]),
    ] {
        let (address, mut requests) = http_replica(OK).await;
        let trusted_proxies = vec![proxies.parse().unwrap()];
        let node = one_slot(address, ClientSettings { trusted_proxies, ..ClientSettings::default() }).await;
        answer(node.ingress, &get("/", headers)).await;
        let seen = requests.recv().await.unwrap().to_lowercase();
        assert!(expected.iter().all(|line| seen.contains(line)), "{proxies}: {seen}");
        assert_eq!(seen.contains("\r\nforwarded:"), proxies == "127.0.0.0/8", "{seen}");
    }
}

#[tokio::test]
async fn a_404_lists_known_hosts_only_if_it_may() {
    for list_known_hosts in [true, false] {
        let (address, _requests) = http_replica(OK).await;
        let node = one_slot(address, ClientSettings { list_known_hosts, ..ClientSettings::default() }).await;
        let answer = answer(node.ingress, "GET /x HTTP/1.1\r\nhost: nobody\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        assert_eq!(answer.contains(HOST), list_known_hosts, "{answer}");
    }
}

#[tokio::test]
async fn errors_on_openai_paths_are_openais_objects() {
    let (node, _requests) = node().await;
    for path in ["/v1/chat/completions", "/openai/v1/completions", "/serving/default/nothing/v1/embeddings"] {
        let answer = answer(node.ingress, &format!("GET {path} HTTP/1.1\r\nhost: nobody\r\n\r\n")).await;
        let body: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let error = &body["error"];
        assert!(error["message"].as_str().unwrap().contains("no service"), "{body}");
        assert_eq!((error["type"].as_str(), error["code"].as_str()), (Some("not_found_error"), Some("UnknownService")));
    }
    let plain = answer(node.ingress, "GET /v1/x HTTP/1.1\r\nhost: nobody\r\n\r\n").await;
    assert!(plain.contains("\"error\":\"no service"), "{plain}");
}

#[tokio::test]
async fn grpc_callers_get_grpc_statuses() {
    let statuses = [
        (Answer::UnknownService { host: String::new(), path: String::new(), known: vec![] }, "5"),
        (Answer::NoRoutes, "14"),
        (Answer::BadGateway { reason: String::new() }, "14"),
        (Answer::Timeout { seconds: 1, waiting: true }, "4"),
        (Answer::RequestTimeout { reason: String::new() }, "4"),
        (Answer::BodyTooLarge { limit: 1 }, "8"),
        (Answer::BadRequest { reason: String::new() }, "3"),
    ];
    for (answer, code) in statuses {
        let response = answer.response_for(crate::gateway::error_format::ErrorFormat::Grpc);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], code, "{answer:?}");
    }

    let (address, _requests) = http_replica(OK).await;
    let node = one_slot(address, ClientSettings::default()).await;
    node.path.apply_routes(fleet::Routes { version: 2, full: true, ..Default::default() });
    let response = http2(node.ingress, |request| request.header(header::CONTENT_TYPE, "application/grpc+proto")).await;
    assert_eq!(response.headers()["grpc-status"], "5");
    assert!(response.headers()["grpc-message"].to_str().unwrap().starts_with("UnknownService"), "{response:?}");
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/grpc");
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
}

#[tokio::test]
async fn an_error_of_another_node_has_the_form_that_the_caller_understands() {
    let (address, answers) = replica().await;
    let (edge, _far) = two_nodes(address, false).await;
    let mut client = Client::ask(edge.ingress).await;
    // The replica breaks off before it answers.
    drop(answers);
    let answer = client.read("}\n").await;
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains(r#"{"error":{"#), "{answer}");
}
