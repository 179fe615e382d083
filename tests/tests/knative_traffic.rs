//! A Knative `Service` whose `traffic` names its revisions.

use std::collections::BTreeMap;

use pilotlight_tests::{cell::Dev, eventually};

const HOST: &str = "hello.default.localhost";

/// Revision `hello-<version>`, whose answers say so.
fn manifest(version: &str, traffic: &str) -> String {
    format!(
        r#"
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {{name: hello}}
spec:
  template:
    metadata:
      name: hello-{version}
      annotations: {{autoscaling.knative.dev/min-scale: "1", autoscaling.knative.dev/window: 6s}}
    spec:
      containers:
        - command: [pilotlight, example-server, iris, --served-by, {version}]
          readinessProbe: {{httpGet: {{path: /v1/models/iris}}}}
  traffic: {traffic}
"#
    )
}

async fn served_by(dev: &Dev, host: &str) -> String {
    let answer = dev.gateway.get(host, "/v1/models/iris").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.headers["x-served-by"].to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_and_tags_lead_to_the_revisions_they_name() {
    let dev = Dev::start(&[], vec![]).await;
    let latest = "[{latestRevision: true, percent: 100}]";
    assert_eq!(dev.operator.apply(&manifest("one", latest), &["--strict"]).code, 0);
    dev.operator.replicas_are("hello", 1, "Ready").await;
    assert_eq!(served_by(&dev, HOST).await, "one");

    let split = "[{revisionName: hello-one, percent: 75, tag: old}, {revisionName: hello-two, percent: 25, tag: new}]";
    let applied = dev.operator.apply(&manifest("two", split), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    dev.operator.replicas_are("hello", 2, "Ready").await;
    eventually("the second takes its share", || async {
        let service = dev.operator.json(&["get", "isvc", "hello"]);
        (service["status"]["traffic"][1]["revisionName"] == "hello-predictor-00002").then_some(())
    })
    .await;
    let mut answers = BTreeMap::new();
    for _ in 0..200 {
        *answers.entry(served_by(&dev, HOST).await).or_insert(0) += 1;
    }
    let two = answers["two"];
    assert!((48..=52).contains(&two), "a quarter of 200, but for what was under way: {answers:?}");
    assert_eq!(served_by(&dev, "old-hello.default.localhost").await, "one");
    assert_eq!(served_by(&dev, "new-hello.default.localhost").await, "two");

    let refused = dev.operator.apply(&manifest("three", "[{revisionName: hello-nine, percent: 100}]"), &[]);
    assert_ne!(refused.code, 0);
    assert!(refused.err.contains("spec.traffic[0].revisionName"), "{}{}", refused.out, refused.err);
    assert_eq!(dev.operator.replicas("hello").len(), 2, "nothing of it was applied");

    // Back to the first alone; the second goes to zero, and its name stays its own.
    let pinned = "[{revisionName: hello-one, percent: 100}]";
    assert_eq!(dev.operator.apply(&manifest("two", pinned), &[]).code, 0);
    eventually("all goes to the first", || async {
        let mut all = true;
        for _ in 0..8 {
            all &= served_by(&dev, HOST).await == "one";
        }
        all.then_some(())
    })
    .await;
}
