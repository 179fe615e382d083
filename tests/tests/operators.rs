//! What operators do with the CLI, beside applying manifests.

use pilotlight_tests::{
    cell::{Cell, Dev},
    eventually,
    manifest::{Iris, TWO_FLOWERS},
    process::{Process, pilotlight},
};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_named_without_its_kind_waited_for_and_printed_in_parts() {
    let dev = Dev::start(&[], vec![]).await;
    let iris = Iris { min_replicas: 1, ..Iris::default() };
    let labelled = iris.yaml().replace("  name: iris\n", "  name: iris\n  labels: {team: vision}\n");
    assert_eq!(dev.operator.apply(&labelled, &[]).code, 0);
    let met = dev.operator.must(&["wait", "--for=condition=Ready", "isvc/iris", "--timeout=2m"]);
    assert_eq!(met, "inferenceservice.serving.kserve.io/iris condition met\n");

    let url = dev.operator.must(&["get", "iris", "-o", "jsonpath={.status.url}"]);
    assert_eq!(url, format!("http://iris.default.localhost:{}", dev.ingress));
    let named = "inferenceservice.serving.kserve.io/iris\n";
    assert_eq!(dev.operator.must(&["get", "isvc", "-l", "team=vision", "-o", "name"]), named);
    assert_eq!(dev.operator.must(&["get", "isvc", "-l", "team!=vision", "-o", "name"]), "");
    assert!(dev.operator.must(&["describe", "iris"]).contains("placed on node dev\n"));
    assert!(dev.operator.must(&["events", "iris"]).contains("Scheduled"));

    dev.operator.must(&["rollout", "restart", "iris"]);
    let history = dev.operator.must(&["rollout", "history", "iris"]);
    let revisions: Vec<_> = history.lines().skip(1).filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(revisions, ["iris-predictor-00002", "iris-predictor-00001"], "{history}");

    dev.operator.must(&["delete", "iris"]);
    let gone = dev.operator.must(&["wait", "--for=delete", "isvc/iris"]);
    assert_eq!(gone, "inferenceservice.serving.kserve.io/iris deleted\n");
    let missing = dev.operator.run(&["wait", "--for=condition=Ready", "iris"]);
    assert_eq!(missing.code, 1, "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_field_is_answered_with_the_one_that_was_meant() {
    let dev = Dev::start(&[], vec![]).await;
    let misspelt =
        Iris::default().yaml().replace("minReplicas", "minReplica").replace("readinessProbe", "readinesProbe");
    let applied = dev.operator.apply(&misspelt, &["--dry-run=server"]);
    let said = format!("{}{}", applied.out, applied.err);
    assert!(said.contains("did you mean minReplicas?"), "{said}");
    assert!(said.contains("did you mean readinessProbe?"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_followed_from_zero_and_on_to_the_next_replica() {
    let dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    let directory = tempfile::tempdir().unwrap();
    let args = ["logs", "iris", "-f", "--server", &dev.operator.server];
    let following = Process::start(pilotlight(), directory.path(), "logs", args, &[]);
    eventually("it waits", || async { following.log().contains("waiting for the next one").then_some(()) }).await;
    for starts in 1..=2 {
        eventually("the service answers", || async {
            let path = "/v1/models/iris:predict";
            let answer = dev.gateway.post("iris.default.localhost", path, TWO_FLOWERS).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
        eventually("its replica's output is there", || async {
            (following.log().matches("listening").count() == starts).then_some(())
        })
        .await;
        if starts == 1 {
            dev.operator.must(&["rollout", "restart", "iris"]);
            dev.operator.must(&["rollout", "status", "iris"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_cannot_be_fetched_are_listed_with_the_reason() {
    let dev = Dev::start(&[], vec![]).await;
    let nowhere = "http://127.0.0.1:1/model.bin";
    dev.operator.must(&["cache", "warm", nowhere]);
    let failed = eventually("it has failed", || async {
        let list = dev.operator.json(&["cache", "ls"]);
        let items = list["items"].as_array()?.clone();
        items.into_iter().find(|model| model["uri"] == nowhere && model["rung"] == "Failed")
    })
    .await;
    assert!(failed["message"].as_str().is_some_and(|message| message.contains("refused")), "{failed}");
    for (address, said) in [("foo", "no node there has a container engine"), ("A:b:c", "the name of an image")] {
        let refused = dev.operator.run(&["cache", "warm", address]);
        assert_eq!(refused.code, 1, "{address}");
        assert!(refused.err.contains(said), "{address}: {}", refused.err);
    }
    dev.operator.must(&["cache", "evict", nowhere]);
    assert_eq!(dev.operator.json(&["cache", "ls"])["items"], Value::Array(vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_is_deleted_and_urls_name_the_port_of_the_agents() {
    let cell = Cell::start(vec![]).await;
    let mut first = cell.agent("gpu-1", 1).await;
    let iris = Iris { min_replicas: 1, gpus: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&iris.yaml(), &[]).code, 0);
    cell.operator.replicas_are("iris", 1, "Ready").await;
    let port = cell.operator.json(&["get", "nodes", "gpu-1"])["ingressAddress"].as_str().unwrap().to_owned();
    let port = port.rsplit_once(':').unwrap().1.to_owned();
    let url = cell.operator.must(&["get", "iris", "-o", "jsonpath={.status.url}"]);
    assert_eq!(url, format!("http://iris.default.localhost:{port}"));

    let refused = cell.operator.run(&["delete", "node", "gpu-1"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.err.contains("node gpu-1 is connected"), "{}", refused.err);
    let _second = cell.agent("gpu-2", 1).await;
    first.kill_9();
    eventually("it is not connected", || async {
        (cell.operator.json(&["get", "nodes", "gpu-1"])["state"] != "Ready").then_some(())
    })
    .await;
    let deleted = cell.operator.must(&["delete", "node", "gpu-1"]);
    assert_eq!(deleted, "node/gpu-1 deleted, and the records of 1 replicas there\n");
    assert_eq!(cell.operator.run(&["get", "node", "gpu-1"]).code, 1);
    let replicas = cell.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(replicas[0]["node"], "gpu-2");
    assert!(cell.operator.must(&["events", "iris"]).contains("NodeDeleted"));
}
