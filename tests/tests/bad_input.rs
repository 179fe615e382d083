//! What is wrong is refused with the field, the value and what is allowed; nothing is half applied.

use hyper::Request;
use pilotlight_tests::{
    cell::Dev,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::Value;

const HOST: &str = "iris.default.localhost";

#[tokio::test(flavor = "multi_thread")]
async fn bad_manifests_are_refused_by_field() {
    let dev = Dev::start(&[], vec![]).await;
    let good = Iris::default().yaml();
    let cases = [
        (good.replace("kind: InferenceService", "kind: [unclosed"), vec![".yaml:3:9: error", "line 2 column 7"]),
        (good.replace("kind: InferenceService", "kind: Job"), vec!["Job", "InferenceService"]),
        (good.replace("minReplicas: 0", "minReplicas: -1"), vec!["spec.predictor.minReplicas", "-1"]),
        (good.replace("minReplicas: 0", "minReplicas: 9"), vec!["maxReplicas", "9", "4"]),
        (
            good.replace("containerConcurrency: 10", "containerConcurrency: 5000"),
            vec!["containerConcurrency", "5000", "1000"],
        ),
        (
            good.replace("window: \"6s\"", "window: \"5s\""),
            vec!["autoscaling.knative.dev/window", "5s", "6s <= value <= 1h"],
        ),
        (String::new(), vec!["empty"]),
    ];
    for (manifest, expected) in cases {
        let printed = dev.operator.apply(&manifest, &[]);
        assert_eq!(printed.code, 1, "{manifest}");
        for part in expected {
            assert!(printed.err.contains(part), "{part:?} in {:?}", printed.err);
        }
    }
    let listed = dev.operator.json(&["get"]);
    assert_eq!(listed["items"], Value::Array(vec![]), "nothing was applied");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_field_is_a_warning_or_with_strict_an_error() {
    let dev = Dev::start(&[], vec![]).await;
    let misspelt = Iris::default().yaml().replace("minReplicas: 0", "minReplicas: 0\n    minReplica: 1");
    let strict = dev.operator.apply(&misspelt, &["--strict"]);
    assert_eq!(strict.code, 1);
    assert!(strict.err.contains("error: spec.predictor.minReplica"), "{}", strict.err);
    let dry = dev.operator.apply(&misspelt, &["--dry-run"]);
    assert_eq!((dry.code, dry.out.contains("dry run")), (0, true));
    assert_eq!(dev.operator.json(&["get"])["items"].as_array().unwrap().len(), 0);
    let lenient = dev.operator.apply(&misspelt, &[]);
    assert_eq!(lenient.code, 0);
    assert!(lenient.err.contains("warning: spec.predictor.minReplica"), "{}", lenient.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_answered_by_the_gateway() {
    let dev = Dev::start(&["--max-request-body=1KiB"], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    let large = format!("{{\"instances\": [{}]}}", "[1, 2, 3, 4],".repeat(200));
    let answer = dev.gateway.post(HOST, "/v1/models/iris:predict", &large).await.unwrap();
    assert_eq!(answer.status, 413);
    assert!(answer.body.contains("1024 bytes"), "{}", answer.body);
    assert!(dev.operator.replicas("iris").is_empty(), "nothing was started for it");

    let unknown = dev.gateway.post("nobody.default.localhost", "/", TWO_FLOWERS).await.unwrap();
    assert_eq!(unknown.status, 404);
    let routing = &unknown.json()["routing"];
    assert_eq!(routing["knownHosts"][0], HOST);
    assert!(routing["byPath"].as_str().unwrap().starts_with("/serving/"));

    let upgrade = Request::get("/").header("connection", "upgrade").header("upgrade", "websocket");
    assert_eq!(dev.gateway.send(HOST, upgrade, "").await.unwrap().status, 501);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_run_says_so() {
    let dev = Dev::start(&[], vec![]).await;
    let broken = Iris { min_replicas: 1, ..Iris::default() }.yaml().replace("\"pilotlight\"", "\"/no/such/program\"");
    assert_eq!(dev.operator.apply(&broken, &[]).code, 0);
    pilotlight_tests::eventually("the failure is in the status", || async {
        let service = dev.operator.json(&["get", "isvc", "iris"]);
        service["status"].to_string().contains("/no/such/program").then_some(())
    })
    .await;
    let missing = dev.operator.run(&["get", "isvc", "nothing"]);
    assert_eq!(missing.code, 1);
    assert!(missing.err.contains("default/nothing not found"), "{}", missing.err);
    assert_eq!(dev.operator.run(&["get", "--no-such-flag"]).code, 2);
}
