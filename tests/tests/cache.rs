//! Models that operators keep on nodes: warmed before anybody needs them, pinned, staged and evicted.

use std::path::Path;

use pilotlight_tests::{
    cell::{Cell, Operator},
    eventually,
    s3::{KEY, S3, SECRET},
    store::settled,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A service that serves the files of its model, on one node or on any.
fn files(name: &str, uri: &str, node: Option<&str>) -> String {
    let node = node.map(|node| format!("    nodeSelector: {{kubernetes.io/hostname: {node}}}\n")).unwrap_or_default();
    format!(
        "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {{name: {name}}}\nspec:\n  predictor:\n    \
         minReplicas: 1\n{node}    containers:\n    - name: kserve-container\n      image: none\n      \
         command: [python3, -m, http.server, $(PORT), --bind, 127.0.0.1, --directory, /mnt/models]\n      \
         env: [{{name: STORAGE_URI, value: \"{uri}\"}}]\n"
    )
}

/// A cell whose agents read from the server with their own environment.
async fn cell(s3: &S3) -> Cell {
    let mut env = s3.env();
    env.push(("PILOTLIGHT_CACHE_BUDGET", "12MiB".to_owned()));
    Cell::start(env).await
}

fn models(operator: &Operator, node: &str) -> Vec<Value> {
    let list = operator.json(&["cache", "ls", "--node", node]);
    let mut models = list["items"].as_array().cloned().unwrap_or_default();
    // What is asked for and not there yet is listed, too.
    models.retain(|model| model["rung"] == "Cached" || model["rung"] == "Staged");
    models
}

fn model(operator: &Operator, node: &str, uri: &str) -> Option<Value> {
    models(operator, node).into_iter().find(|model| model["uri"] == uri)
}

async fn model_is(operator: &Operator, node: &str, uri: &str, is: impl Fn(&Value) -> bool) -> Value {
    eventually(&format!("{uri} is on {node} as wanted"), || async { model(operator, node, uri).filter(&is) }).await
}

fn count(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_warmed_pinned_and_evicted() {
    let s3 = S3::start().await;
    for (name, mib) in [("one", 4), ("two", 5), ("three", 6)] {
        s3.put("models", &format!("{name}/model.bin"), &vec![mib as u8; mib * MIB]);
    }
    let cell = cell(&s3).await;
    let _first = cell.agent("gpu-1", 0).await;
    let _second = cell.agent("gpu-2", 0).await;
    let operator = &cell.operator;
    let [one, two, three] = ["one", "two", "three"].map(|name| format!("s3://models/{name}"));

    // Before any service exists.
    let said = operator.must(&["cache", "warm", &one, "--node", "gpu-2"]);
    assert_eq!(said, "s3://models/one is to be kept cached on node gpu-2; see pilotlight cache ls\n");
    operator.must(&["cache", "warm", &two, "--node", "gpu-2"]);
    operator.must(&["cache", "pin", &two]);
    model_is(operator, "gpu-2", &two, |model| model["pinned"] == true).await;
    let there = model_is(operator, "gpu-2", &one, |model| model["rung"] == "Cached").await;
    assert_eq!((&there["inUse"], &there["pinned"]), (&Value::Bool(false), &Value::Bool(false)));
    assert!(models(operator, "gpu-1").is_empty());

    // The service goes where its model is, though the other node has the first name, and nothing is fetched.
    let ranges = s3.ranges();
    assert_eq!(operator.apply(&files("one", &one, None), &[]).code, 0);
    let replica = operator.replicas_are("one", 1, "Ready").await.remove(0);
    assert_eq!(replica["node"], "gpu-2");
    assert_eq!(s3.ranges(), ranges);

    model_is(operator, "gpu-2", &one, |model| model["inUse"] == true).await;
    let refused = operator.run(&["cache", "evict", &one]);
    assert_eq!((refused.code, refused.out.as_str()), (1, ""));
    let name = replica["name"].as_str().unwrap();
    assert_eq!(refused.err, format!("error: node/gpu-2 keeps {one}: in use by {name}\n"));
    assert!(model(operator, "gpu-2", &one).is_some());
    operator.must(&["cache", "warm", &one, "--node", "gpu-2"]);
    operator.must(&["delete", "isvc", "one"]);
    model_is(operator, "gpu-2", &one, |model| model["inUse"] == false).await;

    // A replica needs room: of two that are kept the one that is not pinned goes.
    assert_eq!(operator.apply(&files("three", &three, Some("gpu-2")), &[]).code, 0);
    operator.replicas_are("three", 1, "Ready").await;
    eventually("the unpinned one is gone", || async { model(operator, "gpu-2", &one).is_none().then_some(()) }).await;
    assert!(model(operator, "gpu-2", &two).is_some_and(|model| model["pinned"] == true));

    // Its room makes the first come back, which is still asked for.
    let freed = operator.must(&["cache", "evict", &two]);
    assert_eq!(freed, format!("node/gpu-2 evicted {two}, 5.0 MiB freed\n"));
    model_is(operator, "gpu-2", &one, |_| true).await;
    let cache = cell.directory().join("gpu-2/models");
    settled(&cache).await;
    assert_eq!((count(&cache.join("blobs")), count(&cache.join("trees")), count(&cache.join("partial"))), (2, 2, 0));
    operator.must(&["cache", "evict", &one, "--node", "gpu-2"]);
    assert_eq!((count(&cache.join("blobs")), count(&cache.join("trees"))), (1, 1));
    let again = operator.run(&["cache", "evict", &one]);
    assert_eq!((again.code, again.err), (0, format!("{one} is on no node.\n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_staged_on_all_nodes_and_what_is_asked_for_outlives_the_coordinator() {
    let s3 = S3::start().await;
    s3.put("models", "m/model.bin", &vec![7; 3 * MIB + 5]);
    let mut cell = cell(&s3).await;
    let _first = cell.agent("gpu-1", 0).await;
    let uri = "s3://models/m";
    cell.operator.must(&["cache", "warm", uri, "--rung", "staged"]);
    let staged = |model: &Value| model["rung"] == "Staged" && model["residentBytes"] == model["bytes"];
    model_is(&cell.operator, "gpu-1", uri, staged).await;
    assert!(cell.operator.must(&["cache", "ls", "-o", "wide"]).contains("100%"));
    cell.kill_9_coordinator();
    cell.start_coordinator().await;
    // One that joins later is a node like all others.
    let _second = cell.agent("gpu-2", 0).await;
    model_is(&cell.operator, "gpu-2", uri, staged).await;
    model_is(&cell.operator, "gpu-1", uri, staged).await;

    let refused = cell.operator.run(&["cache", "evict", uri, "--node", "gpu-1"]);
    assert!(refused.code == 1 && refused.err.contains("is asked for on all nodes"), "{refused:?}");
    let freed = cell.operator.must(&["cache", "evict", uri]);
    assert_eq!(freed.lines().count(), 2, "{freed}");
    for node in ["gpu-1", "gpu-2"] {
        let cache = cell.directory().join(node).join("models");
        assert_eq!((count(&cache.join("blobs")), count(&cache.join("trees"))), (0, 0), "{node}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_fetched_with_a_services_secrets_once_they_are_there() {
    let s3 = S3::start().await;
    for name in ["own", "other"] {
        s3.put("models", &format!("{name}/model.bin"), b"weights");
    }
    let cell = Cell::start(vec![]).await;
    let _agent = cell.agent("gpu-1", 0).await;
    let operator = &cell.operator;
    let service = files("own", "s3://models/own", None)
        .replace("{name: own}", "{name: own, annotations: {serving.kserve.io/storageSecretName: s3}}");
    assert_eq!(operator.apply(&service, &[]).code, 0);
    operator.must(&["cache", "warm", "s3://models/other", "--service", "own"]);
    eventually("the service misses its secret", || async {
        let replicas = operator.replicas("own");
        replicas.first()?["message"].as_str()?.contains("Secret default/s3 is not there").then_some(())
    })
    .await;
    assert!(models(operator, "gpu-1").is_empty());
    let secret = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: s3}}\nstringData: {{AWS_ACCESS_KEY_ID: {KEY}, \
         AWS_SECRET_ACCESS_KEY: {SECRET}, AWS_REGION: us-east-1, AWS_ENDPOINT_URL: \"{}\"}}\n",
        s3.endpoint()
    );
    assert_eq!(operator.apply(&secret, &[]).code, 0);
    model_is(operator, "gpu-1", "s3://models/other", |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_asked_for_is_refused() {
    let s3 = S3::start().await;
    let cell = cell(&s3).await;
    let _agent = cell.agent("gpu-1", 0).await;
    let refused = |args: &[&str], code: i32, said: &str| {
        let printed = cell.operator.run(&[&["cache"], args].concat());
        assert_eq!(printed.code, code, "{args:?}: {printed:?}");
        assert!(printed.err.contains(said), "{args:?}: {}", printed.err);
    };
    refused(&["warm", "pvc://claim/m"], 1, "expected one of s3://, gs://, hf://, https://, http://");
    refused(&["pin", "/models/m"], 1, "uri: \"/models/m\": expected an address");
    refused(&["warm", "s3://b/m", "--node", "gpu-9"], 1, "node gpu-9 not found");
    refused(&["evict", "s3://b/m", "--node", "gpu-9"], 1, "node gpu-9 not found");
    refused(&["warm", "s3://b/m", "--service", "none"], 1, "inferenceservice default/none not found");
    refused(&["warm", "s3://b/m", "--service", "a/b/c"], 1, "expected <namespace>/<name>");
    refused(&["warm", "s3://b/m", "--rung", "asleep"], 2, "possible values: cached, staged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeper_leaves_where_its_model_is_evicted_unless_it_is_promised() {
    let s3 = S3::start().await;
    s3.put("models", "slept/model.bin", &vec![7; MIB]);
    let cell = cell(&s3).await;
    let agent = cell.agent("gpu-1", 0).await;
    let (operator, uri) = (&cell.operator, "s3://models/slept");
    let manifest = |warm: &str| {
        let windows = "autoscaling.knative.dev/initial-scale: \"0\", autoscaling.knative.dev/window: 6s, \
                       autoscaling.knative.dev/scale-to-zero-pod-retention-period: 0s, \
                       autoscaling.knative.dev/scale-down-delay: 0s";
        let metadata = format!("{{name: slept, annotations: {{{windows}{warm}}}}}");
        files("slept", uri, None).replace("{name: slept}", &metadata).replace("minReplicas: 1", "minReplicas: 0")
    };
    assert_eq!(operator.apply(&manifest(""), &[]).code, 0);
    assert_eq!(agent.gateway.get("slept.default.localhost", "/").await.unwrap().status, 200);
    operator.replicas_are("slept", 1, "Asleep").await;
    operator.must(&["cache", "evict", uri]);
    operator.replicas_are("slept", 0, "").await;
    assert!(model(operator, "gpu-1", uri).is_none());

    assert_eq!(operator.apply(&manifest(", pilotlight.dev/warm-replicas: \"1\""), &[]).code, 0);
    let promised = operator.replicas_are("slept", 1, "Asleep").await.remove(0);
    let refused = operator.run(&["cache", "evict", uri]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains(promised["name"].as_str().unwrap()), "{refused:?}");
}
