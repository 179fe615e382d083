//! Processes die without warning; replicas and applied services do not.

use pilotlight_tests::{
    cell::{Cell, Dev},
    eventually,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::json;

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

#[tokio::test(flavor = "multi_thread")]
async fn coordinator_and_agent_are_killed_and_replicas_are_adopted() {
    let mut cell = Cell::start(vec![]).await;
    let mut agent = cell.agent("gpu-1", 2).await;
    let warm = Iris { min_replicas: 1, gpus: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&warm.yaml(), &[]).code, 0);
    let before = cell.operator.replicas_are("iris", 1, "Ready").await;

    cell.kill_9_coordinator();
    let alone = agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(alone.json(), json!({"predictions": [1, 1]}), "the gateway goes on with its last routes");

    cell.start_coordinator().await;
    let after = cell.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(after[0]["name"], before[0]["name"]);
    assert_eq!(after[0]["pid"], before[0]["pid"]);

    agent.kill_9();
    agent.restart(&cell.operator).await;
    let adopted = eventually("the replica is adopted", || async {
        let replicas = cell.operator.replicas("iris");
        (replicas.len() == 1 && replicas[0]["phase"] == "Ready" && replicas[0]["adopted"] == true).then_some(replicas)
    })
    .await;
    assert_eq!(adopted[0]["name"], before[0]["name"]);
    assert_eq!(adopted[0]["pid"], before[0]["pid"], "the same process, not another one");
    assert_eq!(adopted[0]["restarts"], 0);
    let answer = eventually("the adopted replica answers", || async {
        let answer = agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.ok()?;
        (answer.status == 200).then_some(answer)
    })
    .await;
    assert_eq!(answer.json(), json!({"predictions": [1, 1]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_starts_before_its_store_waits_for_it() {
    let cell = Cell::start_without_store().await;
    let nodes = cell.operator.json(&["get", "nodes"]);
    assert_eq!(nodes["items"], serde_json::json!([]), "it answers, and knows of nobody yet");
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_is_killed_and_finds_everything_again() {
    let mut dev = Dev::start(&[], vec![]).await;
    let warm = Iris { min_replicas: 2, ..Iris::default() };
    assert_eq!(dev.operator.apply(&warm.yaml(), &[]).code, 0);
    let pids = |replicas: Vec<serde_json::Value>| {
        let mut pids: Vec<_> = replicas.iter().map(|replica| replica["pid"].as_u64().unwrap()).collect();
        pids.sort_unstable();
        pids
    };
    let before = pids(dev.operator.replicas_are("iris", 2, "Ready").await);
    dev.kill_9();
    dev.restart().await;
    assert_eq!(pids(dev.operator.replicas_are("iris", 2, "Ready").await), before);
    assert_eq!(dev.operator.apply(&warm.yaml(), &[]).out, "inferenceservice.serving.kserve.io/iris unchanged\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_dies_is_started_again() {
    let dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris { min_replicas: 1, ..Iris::default() }.yaml(), &[]).code, 0);
    let before = dev.operator.replicas_are("iris", 1, "Ready").await;
    let pid = before[0]["pid"].as_i64().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    let after = eventually("another process runs", || async {
        let replicas = dev.operator.replicas("iris");
        let replica = replicas.first()?.clone();
        (replica["phase"] == "Ready" && replica["pid"] != before[0]["pid"]).then_some(replica)
    })
    .await;
    assert_eq!(after["restarts"], 1);
    assert_eq!(after["name"], before[0]["name"]);
}
