use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header::RETRY_AFTER},
    response::Response,
};
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use tower::ServiceExt as _;

use crate::{Classifier, Options, Server, router, serve};

/// KServe's own sample: two versicolors.
const TWO_FLOWERS: &str = r#"{"instances": [[6.8, 2.8, 4.8, 1.4], [6.0, 3.4, 4.5, 1.6]]}"#;

fn loaded() -> Arc<Server> {
    let server = Server::new("iris", Duration::ZERO);
    server.loaded(Classifier::train().unwrap());
    Arc::new(server)
}

async fn send(server: &Arc<Server>, method: Method, path: &str, body: &str) -> Response {
    let request = Request::builder().method(method).uri(path).body(Body::from(body.to_owned())).unwrap();
    router(Arc::clone(server)).oneshot(request).await.unwrap()
}

async fn json_of(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{error}: {bytes:?}")))
}

async fn get(server: &Arc<Server>, path: &str) -> (StatusCode, Value) {
    json_of(send(server, Method::GET, path, "").await).await
}

async fn post(server: &Arc<Server>, path: &str, body: &str) -> (StatusCode, Value) {
    json_of(send(server, Method::POST, path, body).await).await
}

#[tokio::test]
async fn v1_predicts_kserves_sample() {
    let (status, answer) = post(&loaded(), "/v1/models/iris:predict", TWO_FLOWERS).await;
    assert_eq!((status, answer), (StatusCode::OK, json!({ "predictions": [1, 1] })));
}

#[tokio::test]
async fn v1_tells_ready_loading_and_unknown_apart() {
    let (ready, loading) = (loaded(), Arc::new(Server::new("iris", Duration::ZERO)));
    assert_eq!(get(&ready, "/v1/models").await.1, json!({ "models": ["iris"] }));
    assert_eq!(get(&ready, "/v1/models/iris").await, (StatusCode::OK, json!({ "name": "iris", "ready": true })));
    assert_eq!(get(&loading, "/v1/models/iris").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&ready, "/v1/models/rose").await.0, StatusCode::NOT_FOUND);

    let response = send(&loading, Method::POST, "/v1/models/iris:predict", TWO_FLOWERS).await;
    assert_eq!(response.headers()[RETRY_AFTER], "1");
    let (status, answer) = json_of(response).await;
    assert_eq!((status, answer), (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": "model iris is loading" })));
}

#[tokio::test]
async fn v1_names_the_field_that_is_wrong() {
    let cases = [
        ("{", "body"),
        ("{}", "instances"),
        (r#"{"instances": []}"#, "instances"),
        (r#"{"instances": 3}"#, "instances"),
        (r#"{"instances": [[1, 2, 3, 4], [1, 2, 3]]}"#, "instances[1]"),
        (r#"{"instances": [[1, 2, "x", 4]]}"#, "instances[0][2]"),
        (r#"{"instances": [7]}"#, "instances[0]"),
    ];
    for (body, field) in cases {
        let (status, answer) = post(&loaded(), "/v1/models/iris:predict", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer["field"], field, "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().starts_with(field), "{answer}");
    }
}

#[tokio::test]
async fn v1_refuses_other_verbs_and_models() {
    for path in ["/v1/models/iris:explain", "/v1/models/iris", "/v1/models/rose:predict", "/v3"] {
        assert_eq!(post(&loaded(), path, TWO_FLOWERS).await.0, StatusCode::NOT_FOUND, "{path}");
    }
}

#[tokio::test]
async fn v2_infers_and_echoes_the_id() {
    let flat = json!([6.8, 2.8, 4.8, 1.4, 6.0, 3.4, 4.5, 1.6]);
    let nested = json!([[6.8, 2.8, 4.8, 1.4], [6.0, 3.4, 4.5, 1.6]]);
    for (data, datatype) in [(flat, "FP32"), (nested, "FP64")] {
        let request = json!({
            "id": "42",
            "inputs": [{ "name": "input-0", "shape": [2, 4], "datatype": datatype, "data": data }],
        });
        let (status, answer) = post(&loaded(), "/v2/models/iris/infer", &request.to_string()).await;
        let output = json!({ "name": "output-0", "shape": [2], "datatype": "INT64", "data": [1, 1] });
        let expected = json!({ "model_name": "iris", "id": "42", "outputs": [output] });
        assert_eq!((status, answer), (StatusCode::OK, expected));
    }
}

#[tokio::test]
async fn v2_gives_the_outputs_that_are_asked_for() {
    let request = json!({
        "inputs": [{ "name": "x", "shape": [1, 4], "datatype": "INT64", "data": [5, 3, 1, 0] }],
        "outputs": [{ "name": "predict" }, { "name": "predict_proba" }],
    });
    let (status, answer) = post(&loaded(), "/v2/models/iris/infer", &request.to_string()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["outputs"][0], json!({ "name": "predict", "shape": [1, 1], "datatype": "INT64", "data": [0] }));
    assert_eq!(answer["outputs"][1]["shape"], json!([1, 3]));
    assert!(answer["outputs"][1]["data"][0].as_f64().unwrap() > 0.5, "{answer}");
    assert_eq!(answer.get("id"), None);
}

#[tokio::test]
async fn v2_names_the_field_that_is_wrong() {
    let tensor = |shape: Value, datatype: &str, data: Value| json!({ "inputs": [{ "name": "x", "shape": shape, "datatype": datatype, "data": data }] });
    let mut odd_output = tensor(json!([1, 4]), "FP64", json!([1, 2, 3, 4]));
    odd_output["outputs"] = json!([{ "name": "embedding" }]);
    let cases = [
        (json!({ "inputs": [] }), "inputs"),
        (json!({}), "body"),
        (tensor(json!([4]), "FP32", json!([1, 2, 3, 4])), "inputs[0].shape"),
        (tensor(json!([1, 3]), "FP32", json!([1, 2, 3])), "inputs[0].shape"),
        (tensor(json!([0, 4]), "FP32", json!([])), "inputs[0].shape"),
        (tensor(json!([1, 4]), "BYTES", json!([1, 2, 3, 4])), "inputs[0].datatype"),
        (tensor(json!([2, 4]), "FP32", json!([1, 2, 3, 4])), "inputs[0].data"),
        (tensor(json!([i64::MAX, 4]), "FP32", json!([1, 2, 3, 4])), "inputs[0].data"),
        (tensor(json!([1, 4]), "INT64", json!([1, 2, 3.5, 4])), "inputs[0].data[2]"),
        (tensor(json!([1, 4]), "FP32", json!([[1, 2, null, 4]])), "inputs[0].data[0][2]"),
        (odd_output, "outputs[0].name"),
    ];
    for (request, field) in cases {
        let (status, answer) = post(&loaded(), "/v2/models/iris/infer", &request.to_string()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{request}");
        assert_eq!(answer["field"], field, "{request}: {answer}");
    }
}

#[tokio::test]
async fn v2_tells_metadata_and_health() {
    let (ready, loading) = (loaded(), Arc::new(Server::new("iris", Duration::ZERO)));
    assert_eq!(get(&ready, "/v2").await.1["name"], "pilotlight-example-server");
    assert_eq!(get(&ready, "/v2/models/iris").await.1["inputs"][0]["shape"], json!([-1, 4]));
    assert_eq!(get(&loading, "/v2/health/live").await.0, StatusCode::OK);
    for path in ["/v2/health/ready", "/v2/models/iris/ready"] {
        assert_eq!(get(&ready, path).await.0, StatusCode::OK, "{path}");
        assert_eq!(get(&loading, path).await.0, StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    assert_eq!(get(&ready, "/v2/models/rose/ready").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn traceparent_comes_back() {
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let request = Request::builder().uri("/v1/models").header("traceparent", traceparent).body(Body::empty()).unwrap();
    let response = router(loaded()).oneshot(request).await.unwrap();
    assert_eq!(response.headers()["x-received-traceparent"], traceparent);
    let response = send(&loaded(), Method::GET, "/v1/models", "").await;
    assert!(!response.headers().contains_key("x-received-traceparent"));
}

#[tokio::test(start_paused = true)]
async fn counts_what_is_in_flight_at_the_same_time() {
    let slow = Server::new("iris", Duration::from_secs(60));
    slow.loaded(Classifier::train().unwrap());
    let slow = Arc::new(slow);
    let begun = tokio::time::Instant::now();
    let ask = || post(&slow, "/v1/models/iris:predict", TWO_FLOWERS);
    let answers = tokio::join!(ask(), ask(), ask());
    assert_eq!([answers.0.0, answers.1.0, answers.2.0], [StatusCode::OK; 3]);
    assert!(begun.elapsed() >= Duration::from_secs(60), "the request time was not kept");

    // A client that hangs up gets no answer.
    assert!(tokio::time::timeout(Duration::from_secs(1), ask()).await.is_err());
    get(&slow, "/v1/models/iris").await;
    let (_, mut stats) = get(&slow, "/stats").await;
    for took in ["startMicroseconds", "loadMicroseconds"] {
        assert!(stats[took].take().as_u64() > Some(0), "{took}");
    }
    assert_eq!(
        stats,
        json!({
            "received": 4, "answered": 3, "inFlight": 0, "maxInFlight": 3,
            "weightBytes": 0, "startMicroseconds": null, "loadMicroseconds": null, "pid": std::process::id(),
        })
    );
}

#[tokio::test(start_paused = true)]
async fn streams_events_as_they_come() {
    let server = loaded();
    let begun = tokio::time::Instant::now();
    let response = send(&server, Method::GET, "/v1/stream?n=3&interval=10s", "").await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.into_body().into_data_stream();
    let mut events = Vec::new();
    while let Some(chunk) = body.next().await {
        let text = String::from_utf8(chunk.unwrap().to_vec()).unwrap();
        events.push((begun.elapsed().as_secs(), text.trim().to_owned()));
        assert!(server.stats().max_in_flight == 1);
    }
    let expected = [
        (10, r#"data: {"token":0}"#),
        (20, r#"data: {"token":1}"#),
        (30, r#"data: {"token":2}"#),
        (30, "data: [DONE]"),
    ];
    assert_eq!(events, expected.map(|(second, text)| (second, text.to_owned())));
    assert_eq!((server.stats().answered, server.stats().in_flight), (1, 0));
    let refused = get(&server, "/v1/stream?interval=-1s").await;
    assert_eq!((refused.0, &refused.1["field"]), (StatusCode::BAD_REQUEST, &json!("interval")));
}

const CHAT: &str = "/v1/chat/completions";

fn chat_of(content: &str) -> Value {
    json!({ "model": "iris", "messages": [{ "role": "system", "content": "be brief" }, { "role": "user", "content": content }] })
}

#[tokio::test]
async fn the_echo_says_the_last_message_and_counts_its_words() {
    let mut request = chat_of("to be  or not");
    let (status, answer) = post(&loaded(), CHAT, &request.to_string()).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["system_fingerprint"], "echo-of-the-last-message", "it says what it is");
    let choice =
        json!({ "index": 0, "message": { "role": "assistant", "content": "to be or not" }, "finish_reason": "stop" });
    assert_eq!(answer["choices"], json!([choice]));
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10 }));

    request["max_tokens"] = json!(2);
    let (_, short) = post(&loaded(), CHAT, &request.to_string()).await;
    assert_eq!(short["choices"][0]["message"]["content"], "to be");
    assert_eq!(
        (&short["choices"][0]["finish_reason"], &short["usage"]["completion_tokens"]),
        (&json!("length"), &json!(2))
    );

    request["model"] = json!("rose");
    assert_eq!(post(&loaded(), CHAT, &request.to_string()).await.0, StatusCode::NOT_FOUND);
    for body in ["{", r#"{"model": "iris"}"#, r#"{"model": "iris", "messages": []}"#] {
        assert_eq!(post(&loaded(), CHAT, body).await.0, StatusCode::BAD_REQUEST, "{body}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_echo_streams_a_word_an_interval_and_its_usage_where_asked() {
    for with_usage in [false, true] {
        let server = loaded();
        let mut request = chat_of("to be or");
        request["stream"] = json!(true);
        request["stream_options"] = json!({ "include_usage": with_usage });
        let begun = tokio::time::Instant::now();
        let path = format!("{CHAT}?interval=10s");
        let response = send(&server, Method::POST, &path, &request.to_string()).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut body = response.into_body().into_data_stream();
        let (mut words, mut usage, mut events) = (Vec::new(), Value::Null, Vec::new());
        while let Some(chunk) = body.next().await {
            assert_eq!(server.stats().in_flight, 1);
            let text = String::from_utf8(chunk.unwrap().to_vec()).unwrap();
            let data = text.strip_prefix("data: ").unwrap().trim().to_owned();
            let event: Value = serde_json::from_str(&data).unwrap_or_default();
            if let Some(word) = event["choices"][0]["delta"]["content"].as_str() {
                words.push((begun.elapsed().as_secs(), word.to_owned()));
            }
            usage = if event["usage"].is_null() { usage } else { event["usage"].clone() };
            events.push(data);
        }
        assert_eq!(words, [(10, "to".to_owned()), (20, " be".to_owned()), (30, " or".to_owned())]);
        assert_eq!(usage["completion_tokens"], if with_usage { json!(3) } else { Value::Null });
        assert_eq!(events.len(), if with_usage { 6 } else { 5 }, "{events:?}");
        assert_eq!(events.last().unwrap(), "[DONE]");
        assert_eq!((server.stats().answered, server.stats().in_flight), (1, 0));
    }
}

#[tokio::test]
async fn v2_takes_a_tensor_in_binary_after_the_json_part() {
    let infer = async |size: usize, length: Option<&str>| {
        let input =
            json!({ "name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": { "binary_data_size": size } });
        let mut body = json!({ "inputs": [input] }).to_string().into_bytes();
        let length = length.map_or_else(|| body.len().to_string(), str::to_owned);
        body.extend([6.3f32, 3.3, 6.0, 2.5].iter().flat_map(|value| value.to_le_bytes()));
        let request = Request::post("/v2/models/iris/infer").header("inference-header-content-length", length);
        json_of(router(loaded()).oneshot(request.body(Body::from(body)).unwrap()).await.unwrap()).await
    };
    let (status, answer) = infer(16, None).await;
    assert_eq!((status, &answer["outputs"][0]["data"]), (StatusCode::OK, &json!([2])), "{answer}");
    for (size, length, field) in
        [(12, None, "inputs[0].parameters.binary_data_size"), (16, Some("9999"), "body"), (16, Some("x"), "body")]
    {
        let (status, answer) = infer(size, length).await;
        assert_eq!((status, &answer["field"]), (StatusCode::BAD_REQUEST, &json!(field)), "{answer}");
    }
}

#[tokio::test]
async fn stops_once_what_is_in_flight_is_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopping) = oneshot::channel::<()>();
    let options = Options { request_time: Duration::from_millis(200), ..Options::default() };
    let server = tokio::spawn(serve(listener, options, async {
        let _ = stopping.await;
    }));
    let send = async |head: &str, body: &str| {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
        let length = body.len();
        let request =
            format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        answer
    };
    while !send("GET /v2/health/ready", "").await.contains("200 OK") {
        tokio::task::yield_now().await;
    }
    let (answer, ()) = tokio::join!(send("POST /v1/models/iris:predict", TWO_FLOWERS), async {
        while !send("GET /stats", "").await.contains(r#""inFlight":1"#) {
            tokio::task::yield_now().await;
        }
        stop.send(()).unwrap();
    });
    assert!(answer.contains(r#"{"predictions":[1,1]}"#), "{answer}");
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn asleep_it_predicts_nothing_until_it_is_woken() {
    let loading = Arc::new(Server::new("iris", Duration::ZERO));
    assert_eq!(send(&loading, Method::POST, "/sleep", "").await.status(), StatusCode::SERVICE_UNAVAILABLE);
    let server = loaded();
    let status = async |method, path| send(&server, method, path, "").await.status();
    assert_eq!(get(&server, "/is_sleeping").await.1, json!({ "is_sleeping": false }));
    assert_eq!(status(Method::POST, "/sleep?level=1").await, StatusCode::OK);
    assert_eq!(status(Method::POST, "/sleep").await, StatusCode::OK, "again");
    assert_eq!(get(&server, "/is_sleeping").await.1, json!({ "is_sleeping": true }));
    for path in ["/v1/models/iris", "/v2/health/ready", "/v2/models/iris/ready"] {
        assert_eq!(status(Method::GET, path).await, StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    assert_eq!(status(Method::GET, "/v2/health/live").await, StatusCode::OK);
    let (refused, said) = post(&server, "/v1/models/iris:predict", TWO_FLOWERS).await;
    assert_eq!((refused, said), (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": "model iris sleeps" })));
    assert_eq!(status(Method::POST, "/wake_up").await, StatusCode::OK);
    assert_eq!(status(Method::POST, "/wake_up").await, StatusCode::OK, "again");
    assert_eq!(post(&server, "/v1/models/iris:predict", TWO_FLOWERS).await.0, StatusCode::OK);
    let (status, said) = json_of(send(&server, Method::POST, "/sleep?level=2", "").await).await;
    let message = "level: expected 1, the only level of this server, got \"2\"";
    assert_eq!((status, said), (StatusCode::BAD_REQUEST, json!({ "error": message, "field": "level" })));
}

#[tokio::test]
async fn what_is_to_be_loaded_is_loaded_before_it_is_ready_or_named() {
    let folder = std::env::temp_dir().join(format!("pilotlight-load-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("weights"), vec![7; 3 << 20]).unwrap();
    let start = async |path| {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let options = Options { load: Some(path), ..Options::default() };
        (address, tokio::spawn(serve(listener, options, std::future::pending())))
    };
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http::<Body>();
    let (address, server) = start(folder.clone()).await;
    let get = async |path: &str| client.get(format!("http://{address}{path}").parse().unwrap()).await.unwrap();
    while get("/v2/health/ready").await.status() != StatusCode::OK {
        tokio::task::yield_now().await;
    }
    let stats = get("/stats").await.into_body().collect().await.unwrap().to_bytes();
    let stats: Value = serde_json::from_slice(&stats).unwrap();
    assert_eq!(stats["weightBytes"], 3 << 20);
    server.abort();

    let (_, server) = start(folder.join("none")).await;
    let message = server.await.unwrap().unwrap_err().to_string();
    assert!(message.starts_with("cannot load ") && message.contains("/none: No such file"), "{message}");
    std::fs::remove_dir_all(folder).unwrap();
}
