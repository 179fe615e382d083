//! A service at zero is woken by its first request, answers, and goes back to zero.

use std::collections::BTreeSet;

use futures::future::join_all;
use pilotlight_tests::{
    cell::Dev,
    eventually,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::json;

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_wakes_a_service_and_silence_lets_it_sleep() {
    let dev = Dev::start(&[], vec![]).await;
    assert_eq!(
        dev.operator.apply(&Iris::default().yaml(), &[]).out,
        "inferenceservice.serving.kserve.io/iris created\n"
    );
    assert!(dev.operator.replicas("iris").is_empty(), "born at zero");

    let answer = dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(answer.json(), json!({"predictions": [1, 1]}));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let service = dev.operator.json(&["get", "isvc", "iris"]);
    assert_eq!(
        service["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap()["status"],
        "True"
    );

    // By path, and by the Open Inference Protocol.
    let by_path = format!("/serving/default/iris{PREDICT}");
    assert_eq!(
        dev.gateway.post("elsewhere", &by_path, TWO_FLOWERS).await.unwrap().json()["predictions"],
        json!([1, 1])
    );
    let tensor = r#"{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP64", "data": [5.1, 3.5, 1.4, 0.2]}]}"#;
    let inferred = dev.gateway.post(HOST, "/v2/models/iris/infer", tensor).await.unwrap().json();
    assert_eq!(inferred["outputs"][0]["data"], json!([0]), "{inferred}");

    dev.operator.replicas_are("iris", 1, "Asleep").await;
    let described = dev.operator.must(&["describe", "isvc", "iris"]);
    assert!(described.contains("inactive from now on"), "describe says why: {described}");
    let again = dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(again.json(), json!({"predictions": [1, 1]}), "and it wakes again");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_applied_can_be_called_at_once() {
    const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let dev = Dev::start(&[], vec![]).await;
    for name in NAMES {
        let manifest = Iris { name, ..Iris::default() }.yaml();
        assert_eq!(dev.operator.apply(&manifest, &[]).code, 0);
        let answer = dev.gateway.post(&format!("{name}.default.localhost"), PREDICT, TWO_FLOWERS).await.unwrap();
        assert_eq!(answer.status, 200, "{name}: {}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_at_once_are_each_answered_once() {
    let dev = Dev::start(&[], vec![]).await;
    let slow = Iris {
        container_concurrency: 20,
        max_replicas: 1,
        flags: vec!["--load-time", "1s", "--request-time", "20ms"],
        ..Iris::default()
    };
    assert_eq!(dev.operator.apply(&slow.yaml(), &[]).code, 0);
    let requests = (0..200).map(|_| dev.gateway.post(HOST, PREDICT, TWO_FLOWERS));
    for answer in join_all(requests).await {
        let answer = answer.unwrap();
        assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"predictions": [1, 1]})));
    }
    let stats = dev.gateway.get(HOST, "/stats").await.unwrap().json();
    // Exactly as many as were sent: none was lost, none was sent twice.
    assert_eq!(stats["received"], 200, "{stats}");
    assert_eq!(stats["answered"], 200, "{stats}");
    assert!(stats["maxInFlight"].as_u64().unwrap() <= 20, "containerConcurrency is a hard limit: {stats}");
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_queue_limit_requests_are_shed() {
    let dev = Dev::start(&["--queue-limit=5"], vec![]).await;
    let slow = Iris { container_concurrency: 1, max_replicas: 1, flags: vec!["--load-time", "2s"], ..Iris::default() };
    assert_eq!(dev.operator.apply(&slow.yaml(), &[]).code, 0);
    let answers = join_all((0..20).map(|_| dev.gateway.post(HOST, PREDICT, TWO_FLOWERS))).await;
    let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    let shed: Vec<_> = answers.iter().filter(|answer| answer.status == 503).collect();
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 5);
    assert_eq!(shed.len(), 15);
    assert!(shed.iter().all(|answer| answer.headers.contains_key("retry-after")));
}

#[tokio::test(flavor = "multi_thread")]
async fn load_on_many_replicas_and_logs_of_each() {
    let dev = Dev::start(&[], vec![]).await;
    let busy =
        Iris { container_concurrency: 1, max_replicas: 3, flags: vec!["--request-time", "200ms"], ..Iris::default() };
    assert_eq!(dev.operator.apply(&busy.yaml(), &[]).code, 0);
    let load = async {
        loop {
            for answer in join_all((0..6).map(|_| dev.gateway.post(HOST, PREDICT, TWO_FLOWERS))).await {
                assert_eq!(answer.unwrap().status, 200, "no request fails while replicas come");
            }
        }
    };
    let replicas = tokio::select! {
        () = load => unreachable!(),
        replicas = dev.operator.replicas_are("iris", 3, "Ready") => replicas,
    };
    let pids: BTreeSet<_> = replicas.iter().map(|replica| replica["pid"].as_u64().unwrap()).collect();
    assert_eq!(pids.len(), 3);
    let logs = dev.operator.must(&["logs", "iris"]);
    assert_eq!(logs.matches("listening").count(), 3, "{logs}");
    eventually("usage is metered", || async {
        let usage = dev.operator.json(&["get", "usage"]);
        let seconds = usage["items"].as_array()?.iter().filter_map(|item| item["replicaSeconds"].as_f64());
        (seconds.sum::<f64>() > 0.0).then_some(())
    })
    .await;
}
