//! One etcd, one coordinator, two agents: separate processes with mutual TLS.

use futures::future::join_all;
use pilotlight_tests::{
    cell::Cell,
    eventually,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::json;

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_answered_through_the_node_that_has_the_replica() {
    let cell = Cell::start(vec![]).await;
    let with_gpu = cell.agent("gpu-1", 1).await;
    let without = cell.agent("edge-1", 0).await;
    let on_gpu = Iris { gpus: 1, container_concurrency: 2, ..Iris::default() };
    assert_eq!(cell.operator.apply(&on_gpu.yaml(), &[]).code, 0);

    // From zero, entering at the node that cannot run it.
    let answer = eventually("the route has arrived", || async {
        let answer = without.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.ok()?;
        (answer.status != 404).then_some(answer)
    })
    .await;
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"predictions": [1, 1]})));
    let replicas = cell.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(replicas[0]["node"], "gpu-1");
    assert_eq!(replicas[0]["gpuIndices"], json!([0]));

    // Entering at both, past the limit of one replica: all wait their turn.
    let from = |gateway: &pilotlight_tests::http::Gateway| {
        let gateway = gateway.clone();
        (0..40).map(move |_| {
            let gateway = gateway.clone();
            async move { gateway.post(HOST, PREDICT, TWO_FLOWERS).await }
        })
    };
    let answers = join_all(from(&without.gateway).chain(from(&with_gpu.gateway))).await;
    assert!(answers.into_iter().all(|answer| answer.is_ok_and(|answer| answer.status == 200)));
    let stats = with_gpu.gateway.get(HOST, "/stats").await.unwrap().json();
    assert!(stats["maxInFlight"].as_u64().unwrap() <= 2, "{stats}");
    assert_eq!(stats["received"], 81, "each once: {stats}");

    let nodes = cell.operator.json(&["get", "nodes"]);
    assert!(nodes["items"].as_array().unwrap().iter().all(|node| node["simulated"] == true), "{nodes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_fits_nowhere_says_why() {
    let cell = Cell::start(vec![]).await;
    let _agent = cell.agent("gpu-1", 1).await;
    let large = Iris { gpus: 4, min_replicas: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&large.yaml(), &[]).code, 0);
    eventually("the condition says why", || async {
        let service = cell.operator.json(&["get", "isvc", "iris"]);
        let conditions = service["status"]["conditions"].as_array()?.clone();
        let predictor = conditions.into_iter().find(|condition| condition["type"] == "PredictorReady")?;
        (predictor["reason"] == "Unschedulable").then(|| predictor["message"].clone())
    })
    .await;
    let described = cell.operator.must(&["describe", "isvc", "iris"]);
    assert!(described.contains("0/1 nodes fit: 1 with fewer than 4 free GPUs"), "{described}");
}

/// README's walk: through each gateway in turn, with the replica asleep and awake again in between.
#[tokio::test(flavor = "multi_thread")]
async fn both_gateways_are_served_again_after_the_replica_has_slept() {
    let cell = Cell::start(vec![]).await;
    let (a, b) = (cell.agent("a", 1).await, cell.agent("b", 1).await);
    let limited = Iris { gpus: 1, container_concurrency: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&limited.yaml(), &[]).code, 0);
    eventually("the route has arrived", || async {
        let answer = a.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
    for _ in 0..3 {
        for gateway in [&a.gateway, &b.gateway, &a.gateway, &b.gateway] {
            let answer = gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
            assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"predictions": [1, 1]})));
        }
        cell.operator.replicas_are("iris", 1, "Asleep").await;
    }
}
