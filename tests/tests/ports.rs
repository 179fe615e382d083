//! Processes that listen on another port than `$PORT`.

use pilotlight_tests::{cell::Dev, eventually, free_port, manifest::TWO_FLOWERS};
use serde_json::json;

const HOST: &str = "fixed.default.localhost";

/// A server that listens on `port`, whatever `$PORT` says.
fn fixed(port: u16, declared: u16, replicas: u8) -> String {
    format!(
        r#"
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {{name: fixed}}
spec:
  predictor:
    minReplicas: {replicas}
    containers:
      - name: kserve-container
        command: [pilotlight, example-server, iris, --port={port}]
        ports: [{{containerPort: {declared}}}]
        readinessProbe: {{httpGet: {{path: /v1/models/iris, port: {declared}}}}}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_listens_on_its_container_port_serves_there() {
    let mut dev = Dev::start(&[], vec![]).await;
    let port = free_port();
    let applied = dev.operator.apply(&fixed(port, port, 1), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let before = dev.operator.replicas_are("fixed", 1, "Ready").await;
    let answer = dev.gateway.post(HOST, "/v1/models/iris:predict", TWO_FLOWERS).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"predictions": [1, 1]})));

    dev.kill_9();
    dev.restart().await;
    let after = eventually("the replica is adopted", || async {
        let replica = dev.operator.replicas("fixed").into_iter().next()?;
        (replica["phase"] == "Ready" && replica["adopted"] == true).then_some(replica)
    })
    .await;
    assert_eq!(after["pid"], before[0]["pid"]);
    let answer = eventually("the adopted replica answers", || async {
        let answer = dev.gateway.post(HOST, "/v1/models/iris:predict", TWO_FLOWERS).await.ok()?;
        (answer.status == 200).then_some(answer)
    })
    .await;
    assert_eq!(answer.json(), json!({"predictions": [1, 1]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_listens_elsewhere_is_shown_with_its_open_ports() {
    let dev = Dev::start(&[], vec![]).await;
    let (port, declared) = (free_port(), free_port());
    let applied = dev.operator.apply(&fixed(port, declared, 1), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let expected = format!("connection refused; the process listens on 127.0.0.1:{port}, not on $PORT");
    let message = eventually("its message names the open port", || async {
        let replica = dev.operator.replicas("fixed").into_iter().next()?;
        let message = replica["message"].as_str().unwrap_or_default().to_owned();
        (replica["phase"] == "Starting" && message.ends_with(&expected)).then_some(message)
    })
    .await;
    assert!(message.starts_with("waiting for the readiness probe GET /v1/models/iris at 127.0.0.1:"), "{message}");
    assert!(message.contains(" (PORT): "), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_listens_nowhere_says_so_and_that_its_container_port_is_in_use() {
    let dev = Dev::start(&[], vec![]).await;
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let declared = other.local_addr().unwrap().port();
    let silent = fixed(0, declared, 1).replace("pilotlight, example-server, iris, --port=0", "sleep, '1000'");
    let applied = dev.operator.apply(&silent, &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let expected = format!("the process listens on no port; its containerPort {declared} is in use by another process");
    eventually("its message says so", || async {
        let replica = dev.operator.replicas("fixed").into_iter().next()?;
        replica["message"].as_str().unwrap_or_default().contains(&expected).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_processes_with_one_fixed_port_the_second_says_that_the_port_is_in_use() {
    let dev = Dev::start(&[], vec![]).await;
    let port = free_port();
    let applied = dev.operator.apply(&fixed(port, port, 2), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    eventually("one is ready and the other one has failed for its port", || async {
        let replicas = dev.operator.replicas("fixed");
        let ready = replicas.iter().any(|replica| replica["phase"] == "Ready");
        let failed = replicas.iter().any(|replica| {
            let message = replica["message"].as_str().unwrap_or_default();
            replica["phase"] == "Failed" && message.contains("another process of this node uses the port that it wants")
        });
        (ready && failed).then_some(())
    })
    .await;
}
