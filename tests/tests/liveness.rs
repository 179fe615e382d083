//! A server that answers but is not well is started again.

use pilotlight_tests::{cell::Dev, eventually};

/// Well until somebody says otherwise; a new process is well again.
const SERVICE: &str = r#"
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: moody}
spec:
  predictor:
    minReplicas: 1
    containers:
      - name: kserve-container
        command: [pilotlight, example-server, iris]
        readinessProbe: {httpGet: {path: /v1/models/iris}}
        startupProbe: {httpGet: {path: /v1/models/iris}, periodSeconds: 1, failureThreshold: 60}
        livenessProbe:
          exec: {command: [sh, -c, "test ! -e UNWELL || ! rm UNWELL"]}
          periodSeconds: 1
          failureThreshold: 1
          terminationGracePeriodSeconds: 1
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_well_is_started_again() {
    let unwell = tempfile::tempdir().unwrap();
    let unwell = unwell.path().join("unwell");
    let dev = Dev::start(&[], vec![]).await;
    let applied = dev.operator.apply(&SERVICE.replace("UNWELL", &unwell.display().to_string()), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let before = dev.operator.replicas_are("moody", 1, "Ready").await[0].clone();

    std::fs::write(&unwell, "").unwrap();
    let after = eventually("another process serves", || async {
        let replica = dev.operator.replicas("moody").into_iter().next()?;
        (replica["phase"] == "Ready" && replica["pid"] != before["pid"]).then_some(replica)
    })
    .await;
    assert_eq!((&after["name"], after["restarts"].as_u64()), (&before["name"], Some(1)));
    let events = dev.operator.must(&["describe", "isvc", "moody"]);
    assert!(events.contains("liveness probe failed 1 times in a row"), "{events}");
}
