//! One etcd, one coordinator, two agents: a node is taken out of use while requests come in.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pilotlight_tests::{
    cell::{Cell, Operator},
    eventually,
    http::Gateway,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::Value;

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

/// Sends one request after the other until told to stop; gives the count and what went wrong.
async fn keep_asking(gateway: Gateway, stop: Arc<AtomicBool>) -> (u32, Vec<String>) {
    let (mut count, mut failures) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        match gateway.post(HOST, PREDICT, TWO_FLOWERS).await {
            Ok(answer) if answer.status == 200 => {}
            Ok(answer) => failures.push(format!("{}: {}", answer.status, answer.body)),
            Err(error) => failures.push(error.to_string()),
        }
        count += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (count, failures)
}

fn node(operator: &Operator, name: &str) -> Value {
    let nodes = operator.json(&["get", "nodes"]);
    nodes["items"].as_array().into_iter().flatten().find(|node| node["name"] == name).cloned().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_nodes_replicas_move_without_a_failed_request() {
    let mut cell = Cell::start(vec![]).await;
    let first = cell.agent("gpu-1", 1).await;
    let iris = Iris { gpus: 1, min_replicas: 1, max_replicas: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&iris.yaml(), &[]).code, 0);
    let before = cell.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(before[0]["node"], "gpu-1");
    let second = cell.agent("gpu-2", 1).await;
    eventually("the second node knows the service", || async {
        let answer = second.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;

    let stop = Arc::new(AtomicBool::new(false));
    let asking: Vec<_> = [&first.gateway, &second.gateway]
        .map(|gateway| tokio::spawn(keep_asking(gateway.clone(), Arc::clone(&stop))))
        .into();
    let printed = cell.operator.must(&["node", "drain", "gpu-1"]);
    assert!(printed.starts_with("node/gpu-1 draining\n") && printed.ends_with("node/gpu-1 drained\n"), "{printed}");
    let after = cell.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(after[0]["node"], "gpu-2");
    assert_ne!(after[0]["name"], before[0]["name"]);
    stop.store(true, Ordering::Relaxed);
    for asking in asking {
        let (count, failures) = asking.await.unwrap();
        assert!(count > 0 && failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    }

    let table = cell.operator.must(&["get", "nodes"]);
    assert!(table.lines().any(|line| line.starts_with("gpu-1") && line.contains("Ready,Drained")), "{table}");
    cell.kill_9_coordinator();
    cell.start_coordinator().await;
    eventually("both nodes are back", || async {
        let ready = |name| node(&cell.operator, name)["state"] == "Ready";
        (ready("gpu-1") && ready("gpu-2")).then_some(())
    })
    .await;
    assert_eq!(node(&cell.operator, "gpu-1")["availability"], "Draining", "it survives the coordinator");

    // A drained node takes nothing, however free it is.
    let other = Iris { name: "other", ..iris.clone() };
    assert_eq!(cell.operator.apply(&other.yaml(), &[]).code, 0);
    eventually("the other service says why it has no place", || async {
        let described = cell.operator.must(&["describe", "isvc", "other"]);
        described.contains("0/2 nodes fit: 1 cordoned, 1 with fewer than 1 free GPUs").then_some(())
    })
    .await;
    assert_eq!(cell.operator.must(&["node", "cordon", "gpu-2"]), "node/gpu-2 cordoned\n");
    assert_eq!(cell.operator.must(&["node", "uncordon", "gpu-1"]), "node/gpu-1 uncordoned\n");
    assert_eq!(cell.operator.replicas_are("other", 1, "Ready").await[0]["node"], "gpu-1");
    let stayed = cell.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(stayed[0]["name"], after[0]["name"], "a cordoned node keeps what it has");

    let refused = cell.operator.run(&["node", "drain", "gpu-9"]);
    assert!(refused.code == 1 && refused.err.contains("node gpu-9 not found"), "{}", refused.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_elsewhere_a_drained_nodes_replica_leaves_and_comes_back() {
    let cell = Cell::start(vec![]).await;
    let _agent = cell.agent("gpu-1", 1).await;
    let iris = Iris { gpus: 1, min_replicas: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&iris.yaml(), &[]).code, 0);
    cell.operator.replicas_are("iris", 1, "Ready").await;
    cell.operator.must(&["node", "drain", "gpu-1"]);
    assert!(cell.operator.replicas("iris").is_empty());
    assert_eq!(node(&cell.operator, "gpu-1")["replicas"], 0);
    cell.operator.must(&["node", "uncordon", "gpu-1"]);
    cell.operator.replicas_are("iris", 1, "Ready").await;
}
