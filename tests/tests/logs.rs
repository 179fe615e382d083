//! Output of replicas that were restarted or have ended.

use pilotlight_tests::{
    cell::{Cell, Dev},
    eventually,
    manifest::Iris,
};

/// Prints where it is, and ends with an error.
fn crashing(word: &str, deadline: &str) -> String {
    format!(
        r#"
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: crashing
  annotations: {{serving.knative.dev/progress-deadline: {deadline}}}
spec:
  predictor:
    minReplicas: 1
    containers:
      - name: kserve-container
        command: [sh, -c, "echo loading {word}; echo no such tensor: {word} >&2; exit 7"]
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn output_of_a_failed_rollout_is_shown_by_logs_previous_and_in_the_failure_condition() {
    let mut dev = Dev::start(&[], vec![]).await;
    let applied = dev.operator.apply(&crashing("weights", "1s"), &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    eventually("the rollout has failed and its replicas are gone", || async {
        let service = dev.operator.json(&["get", "isvc", "crashing"]).to_string();
        (service.contains("ProgressDeadlineExceeded") && dev.operator.replicas("crashing").is_empty()).then_some(())
    })
    .await;
    let service = dev.operator.json(&["get", "isvc", "crashing"]);
    let conditions = service["status"]["conditions"].as_array().unwrap();
    let failed = conditions.iter().find(|condition| condition["reason"] == "ProgressDeadlineExceeded").unwrap();
    let message = failed["message"].as_str().unwrap();
    assert!(message.contains("exit code 7") && message.contains("no such tensor: weights"), "{message}");

    let now = dev.operator.run(&["logs", "crashing"]);
    assert_eq!(now.code, 1);
    assert!(now.err.contains("`pilotlight logs crashing -n default --previous`"), "{}", now.err);

    let previous = dev.operator.must(&["logs", "crashing", "--previous"]);
    assert!(previous.starts_with("==> crashing-"), "{previous}");
    assert!(previous.contains("loading weights\nno such tensor: weights\n"), "{previous}");
    let tail = dev.operator.must(&["logs", "crashing", "--previous", "--tail=1"]);
    assert!(tail.contains("no such tensor") && !tail.contains("loading"), "{tail}");

    // Output outlives the service and the agent.
    dev.operator.must(&["delete", "isvc", "crashing"]);
    dev.terminate();
    dev.restart().await;
    assert_eq!(dev.operator.must(&["logs", "crashing", "--previous"]), previous);
    let other = dev.operator.run(&["logs", "other", "-p"]);
    assert_eq!(other.code, 1);
    assert!(other.err.contains("no connected node keeps previous output of other"), "{}", other.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_of_the_run_before_the_last_restart_is_shown_by_logs_previous() {
    let dev = Dev::start(&[], vec![]).await;
    let applied = dev.operator.apply(&crashing("weights", "10m"), &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let failed = eventually("it has failed twice", || async {
        let replica = dev.operator.replicas("crashing").into_iter().next()?;
        (replica["restarts"].as_u64()? >= 2 && replica["phase"] == "Failed").then_some(replica)
    })
    .await;
    let name = failed["name"].as_str().unwrap();
    for flags in [&["logs", "crashing"][..], &["logs", "crashing", "--previous", "--replica", name]] {
        let printed = dev.operator.must(flags);
        assert_eq!(printed, "loading weights\nno such tensor: weights\n", "one run's output: {flags:?}");
    }
    let service = dev.operator.must(&["describe", "isvc", "crashing"]);
    assert!(service.contains("no such tensor: weights"), "{service}");
}

#[tokio::test(flavor = "multi_thread")]
async fn previous_output_is_found_on_each_node_that_keeps_some() {
    let cell = Cell::start(vec![]).await;
    let _agents = [cell.agent("gpu-1", 1).await, cell.agent("gpu-2", 1).await];
    let two = crashing("weights", "5s").replace("minReplicas: 1", "minReplicas: 2");
    let applied = cell.operator.apply(&format!("{two}        resources: {{limits: {{nvidia.com/gpu: 1}}}}\n"), &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let mut nodes = std::collections::BTreeSet::new();
    eventually("both replicas have been there and are gone", || {
        let replicas = cell.operator.replicas("crashing");
        nodes.extend(replicas.iter().map(|replica| replica["node"].to_string()));
        std::future::ready((nodes.len() == 2 && replicas.is_empty()).then_some(()))
    })
    .await;
    let previous = cell.operator.must(&["logs", "crashing", "--previous"]);
    assert_eq!(previous.matches("==> crashing-").count(), 2, "{previous}");
    assert_eq!(previous.matches("no such tensor: weights").count(), 2, "{previous}");
}

#[tokio::test(flavor = "multi_thread")]
async fn following_one_replica_ends_with_an_error_when_the_node_disconnects() {
    let cell = Cell::start(vec![]).await;
    let mut agent = cell.agent("gpu-1", 1).await;
    let iris = Iris { min_replicas: 1, ..Iris::default() };
    assert_eq!(cell.operator.apply(&iris.yaml(), &[]).code, 0);
    let replica = cell.operator.replicas_are("iris", 1, "Ready").await.remove(0);
    let (operator, name) = (cell.operator.clone(), replica["name"].as_str().unwrap().to_owned());
    let following = tokio::task::spawn_blocking(move || operator.run(&["logs", "iris", "-f", "--replica", &name]));
    // It has been answered, or is about to be: both end with the session.
    eventually("the output is there", || async {
        cell.operator.run(&["logs", "iris"]).out.contains("listening").then_some(())
    })
    .await;
    agent.kill_9();
    let printed = following.await.unwrap();
    assert_eq!(printed.code, 1, "{printed:?}");
    assert!(printed.err.contains("connected"), "{}", printed.err);
}
