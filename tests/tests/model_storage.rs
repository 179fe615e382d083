//! Models: fetched before a replica starts, kept on the node, resumed after a crash, and refused with a
//! reason.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use pilotlight_tests::{
    cell::{Cell, Dev},
    eventually,
    s3::{KEY, S3, SECRET},
    store::{noted, settled},
};

/// A service whose model no network leads to.
const UNREACHABLE: &str = r#"
apiVersion: serving.kserve.io/v1alpha1
kind: ClusterServingRuntime
metadata: {name: unreachable}
spec:
  supportedModelFormats: [{name: sklearn, version: "1", autoSelect: true}]
  containers: [{name: kserve-container, command: [pilotlight, example-server, iris]}]
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: unreachable}
spec:
  predictor:
    minReplicas: 1
    model: {modelFormat: {name: sklearn}, storageUri: "gs://pilotlight-no-such-bucket/model"}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_an_unreachable_store_says_so_and_its_service_can_be_deleted() {
    // Nobody listens there: as without a network.
    let proxy = || "http://127.0.0.1:1".to_owned();
    let dev = Dev::start(&[], vec![("HTTP_PROXY", proxy()), ("HTTPS_PROXY", proxy())]).await;
    let applied = dev.operator.apply(UNREACHABLE, &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let message = eventually("the failure is reported", || async {
        let replica = dev.operator.replicas("unreachable").into_iter().next()?;
        (replica["phase"] == "Failed").then(|| replica["message"].as_str().unwrap_or_default().to_owned())
    })
    .await;
    assert!(message.contains("gs://pilotlight-no-such-bucket/model") && !message.contains("internal"), "{message}");
    dev.operator.must(&["delete", "isvc", "unreachable"]);
    eventually("its replica is gone", || async { dev.operator.replicas("unreachable").is_empty().then_some(()) }).await;
}

const RANGE: u64 = 16 << 20;

/// A web server with one file, which holds back what comes after `limit` bytes have been sent.
struct Web {
    content: Bytes,
    sent: AtomicU64,
    limit: AtomicU64,
}

async fn answer(State(web): State<Arc<Web>>, method: Method, headers: HeaderMap) -> Response {
    if method == Method::HEAD {
        let length = web.content.len().to_string();
        return ([(header::CONTENT_LENGTH, length.as_str()), (header::ETAG, "\"1\"")], Body::empty()).into_response();
    }
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok()).and_then(|range| {
        let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some(from.parse::<usize>().ok()?..to.parse::<usize>().ok()? + 1)
    });
    let Some(range) = range else { return StatusCode::BAD_REQUEST.into_response() };
    let part = web.content.slice(range);
    let length = part.len() as u64;
    if web.sent.fetch_add(length, Ordering::SeqCst) + length > web.limit.load(Ordering::SeqCst) {
        web.sent.fetch_sub(length, Ordering::SeqCst);
        return (StatusCode::PARTIAL_CONTENT, Body::from_stream(futures::stream::pending::<std::io::Result<Bytes>>()))
            .into_response();
    }
    (StatusCode::PARTIAL_CONTENT, part).into_response()
}

async fn serve(bytes: u64, limit: u64) -> (Arc<Web>, SocketAddr) {
    let content = (0..bytes).map(|n| b'a' + (n % 23) as u8).collect::<Vec<_>>().into();
    let web = Arc::new(Web { content, sent: AtomicU64::new(0), limit: AtomicU64::new(limit) });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(answer).with_state(Arc::clone(&web));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (web, address)
}

/// A service that serves the files of its model.
fn files(name: &str, uri: &str) -> String {
    format!(
        "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {{name: {name}}}\nspec:\n  predictor:\n    \
         minReplicas: 1\n    containers:\n    - name: kserve-container\n      image: none\n      \
         command: [python3, -m, http.server, $(PORT), --bind, 127.0.0.1, --directory, /mnt/models]\n      \
         env: [{{name: STORAGE_URI, value: \"{uri}\"}}]\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_after_a_crash_and_is_not_repeated() {
    let bytes = 3 * RANGE + 7;
    // Two whole ranges and the short last one; the third stays away.
    let (web, address) = serve(bytes, 2 * RANGE + 7).await;
    let mut dev = Dev::start(&["--fetch-stall=1s"], vec![]).await;
    let uri = format!("http://{address}/m/model.bin");
    assert_eq!(dev.operator.apply(&files("first", &uri), &[]).code, 0);
    eventually("half of it is there", || async {
        let replicas = dev.operator.replicas("first");
        let replica = replicas.first()?;
        let message = replica["message"].as_str()?;
        (replica["phase"] == "Fetching" && message.contains("66% of 48 MiB")).then_some(())
    })
    .await;
    let described = dev.operator.must(&["describe", "isvc", "first"]);
    assert!(described.contains("Fetching") && described.contains("66% of 48 MiB"), "{described}");
    let trees = dev.data().join("agent/models/trees");
    assert_eq!(std::fs::read_dir(&trees).unwrap().count(), 0, "a half model is not seen");
    // What is fetched is noted a moment after it is counted.
    let store = dev.data().join("agent/models");
    eventually("three ranges are noted", || async { (noted(&store) == 3).then_some(()) }).await;

    dev.kill_9();
    web.sent.store(0, Ordering::SeqCst);
    web.limit.store(u64::MAX, Ordering::SeqCst);
    dev.restart().await;
    dev.operator.replicas_are("first", 1, "Ready").await;
    assert_eq!(web.sent.load(Ordering::SeqCst), RANGE, "what was on disk is not read again");

    let answer = dev.gateway.get("first.default.localhost", "/model.bin").await.unwrap();
    assert!(answer.body.as_bytes() == &web.content[..], "the replica serves the model");
    assert_eq!(dev.operator.apply(&files("second", &uri), &[]).code, 0);
    dev.operator.replicas_are("second", 1, "Ready").await;
    assert_eq!(web.sent.load(Ordering::SeqCst), RANGE, "another service finds it on the node");
}

/// All files below a directory.
fn below(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { below(&path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_warmed_goes_on_after_its_agent_was_killed() {
    let bytes = 3 * RANGE + 7;
    let (web, address) = serve(bytes, 2 * RANGE + 7).await;
    let cell = Cell::start(vec![("PILOTLIGHT_FETCH_STALL", "1s".to_owned())]).await;
    let mut agent = cell.agent("gpu-1", 0).await;
    let uri = format!("http://{address}/m/model.bin");
    cell.operator.must(&["cache", "warm", &uri]);
    let store = cell.directory().join("gpu-1/models");
    eventually("three ranges are noted", || async { (noted(&store) == 3).then_some(()) }).await;
    agent.kill_9();
    assert_eq!(below(&store.join("trees")).len() + below(&store.join("blobs")).len(), 0, "a half model is not seen");
    assert!(cached(&cell, &[]).is_empty());

    web.sent.store(0, Ordering::SeqCst);
    web.limit.store(u64::MAX, Ordering::SeqCst);
    agent.restart(&cell.operator).await;
    eventually("it is whole", || async { (cached(&cell, &[]).len() == 1).then_some(()) }).await;
    assert_eq!(web.sent.load(Ordering::SeqCst), RANGE, "what was on disk is not read again");
    settled(&store).await;
    let [blob] = below(&store.join("blobs")).try_into().unwrap();
    assert!(std::fs::read(blob).unwrap() == web.content[..]);
    let left: Vec<_> = below(&store)
        .into_iter()
        .filter(|path| !path.starts_with(store.join("blobs")) && !path.starts_with(store.join("trees")))
        .collect();
    assert_eq!(left, [""; 0].map(std::path::PathBuf::from), "nothing is left of the fetch");
    cell.operator.must(&["cache", "evict", &uri]);
    assert!(below(&store).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_served_in_place_and_what_is_missing_is_named() {
    let weights = tempfile::tempdir().unwrap();
    std::fs::create_dir(weights.path().join("m")).unwrap();
    std::fs::write(weights.path().join("m/model.bin"), "weights").unwrap();
    let volume = format!("--claim=weights={}", weights.path().display());
    let dev = Dev::start(&[&volume], vec![]).await;
    assert_eq!(dev.operator.apply(&files("there", "pvc://weights/m"), &[]).code, 0);
    dev.operator.replicas_are("there", 1, "Ready").await;
    let answer = dev.gateway.get("there.default.localhost", "/model.bin").await.unwrap();
    assert_eq!(answer.body, "weights");
    std::fs::write(weights.path().join("m/model.bin"), "changed").unwrap();
    let answer = dev.gateway.get("there.default.localhost", "/model.bin").await.unwrap();
    assert_eq!(answer.body, "changed", "not a copy");

    assert_eq!(dev.operator.apply(&files("missing", "pvc://wights/m"), &[]).code, 0);
    let said = eventually("the replica fails", || async {
        let replicas = dev.operator.replicas("missing");
        let replica = replicas.first().filter(|replica| replica["phase"] == "Failed")?;
        replica["message"].as_str().map(ToOwned::to_owned)
    })
    .await;
    assert!(said.contains("persistentVolumeClaim \"wights\" is not known on this node; known are: weights"), "{said}");
}

/// A service that serves the files of its model from an S3 store, with the secret that it needs.
fn from_s3(name: &str, uri: &str, endpoint: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: s3}}\nstringData: {{AWS_ACCESS_KEY_ID: {KEY}, \
         AWS_SECRET_ACCESS_KEY: {SECRET}, AWS_REGION: us-east-1, AWS_ENDPOINT_URL: \"{endpoint}\"}}\n---\n{}",
        files(name, uri).replace(
            &format!("{{name: {name}}}"),
            &format!("{{name: {name}, annotations: {{serving.kserve.io/storageSecretName: s3}}}}")
        )
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_comes_from_s3_and_a_bucket_that_is_missing_is_said() {
    let s3 = S3::start().await;
    let dev = Dev::start(&[], vec![]).await;
    let applied = dev.operator.apply(&from_s3("flowers", "s3://models/flowers", &s3.endpoint()), &[]);
    assert_eq!(applied.code, 0, "{}{}", applied.out, applied.err);
    let status = eventually("the service says so, and that it is tried again", || async {
        let status = dev.operator.json(&["get", "isvc", "flowers"])["status"].clone();
        let message = status["modelStatus"]["lastFailureInfo"]["message"].as_str()?;
        message.contains("started again in").then_some(status)
    })
    .await;
    let conditions = status["conditions"].as_array().unwrap();
    let ready = conditions.iter().find(|condition| condition["type"] == "PredictorReady").unwrap();
    assert_eq!((&ready["status"], &ready["reason"]), (&"False".into(), &"ModelNotFound".into()), "{ready}");
    let said = ready["message"].as_str().unwrap();
    assert!(said.contains("s3://models/flowers") && said.contains("the bucket is not there"), "{said}");

    s3.put("models", "flowers/petals/model.bin", b"weights");
    dev.operator.replicas_are("flowers", 1, "Ready").await;
    let answer = dev.gateway.get("flowers.default.localhost", "/petals/model.bin").await.unwrap();
    assert_eq!(answer.body, "weights");
}

fn cached(cell: &Cell, more: &[&str]) -> Vec<(String, String, u64, bool)> {
    let list = cell.operator.json(&[&["cache", "ls"], more].concat());
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let of = |model: &serde_json::Value| {
        (text(&model["node"]), text(&model["uri"]), model["bytes"].as_u64().unwrap(), model["inUse"] == true)
    };
    let whole = |model: &&serde_json::Value| !["Pending", "Failed"].contains(&text(&model["rung"]).as_str());
    list["items"].as_array().unwrap().iter().filter(whole).map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_go_where_their_model_is() {
    let s3 = S3::start().await;
    s3.put("models", "one/model.bin", b"weights");
    s3.put("models", "two/model.bin", b"others");
    let mut cell = Cell::start(vec![]).await;
    let _first = cell.agent("gpu-1", 0).await;
    let _second = cell.agent("gpu-2", 0).await;
    let one = from_s3("one", "s3://models/one", &s3.endpoint());
    let there =
        one.replace("    minReplicas: 1\n", "    minReplicas: 1\n    nodeSelector: {kubernetes.io/hostname: gpu-2}\n");
    assert_eq!(cell.operator.apply(&there, &[]).code, 0);
    assert_eq!(cell.operator.replicas_are("one", 1, "Ready").await[0]["node"], "gpu-2");
    let listed = eventually("the model is listed", || async {
        let listed = cached(&cell, &[]);
        listed.first().is_some_and(|model| model.3).then_some(listed)
    })
    .await;
    assert_eq!(listed, [("gpu-2".to_owned(), "s3://models/one".to_owned(), 7, true)]);
    assert!(cached(&cell, &["--node", "gpu-1"]).is_empty());
    let table = cell.operator.must(&["cache", "ls", "--node", "gpu-2"]);
    assert!(table.contains("s3://models/one") && table.contains("7 B"), "{table}");
    assert_ne!(cell.operator.run(&["cache", "ls", "--node", "gpu-3"]).code, 0);

    // Where nothing draws it the first node by name is taken.
    assert_eq!(cell.operator.apply(&from_s3("two", "s3://models/two", &s3.endpoint()), &[]).code, 0);
    assert_eq!(cell.operator.replicas_are("two", 1, "Ready").await[0]["node"], "gpu-1");
    let again = from_s3("again", "s3://models/one", &s3.endpoint());
    assert_eq!(cell.operator.apply(&again, &[]).code, 0);
    assert_eq!(cell.operator.replicas_are("again", 1, "Ready").await[0]["node"], "gpu-2");

    for name in ["one", "again"] {
        cell.operator.must(&["delete", "isvc", name]);
    }
    eventually("nobody uses it any more, and it is still there", || async {
        let listed = cached(&cell, &["--node", "gpu-2"]);
        (listed.len() == 1 && !listed[0].3).then_some(())
    })
    .await;
    cell.kill_9_coordinator();
    cell.start_coordinator().await;
    eventually("a new coordinator is told", || async { (cached(&cell, &[]).len() == 2).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_node_has_the_others_take_from_there() {
    let s3 = S3::start().await;
    let weights: Vec<u8> = (0..RANGE + 7).map(|n| b'a' + (n % 23) as u8).collect();
    s3.put("models", "large/model.bin", &weights);
    let cell = Cell::start(vec![]).await;
    let names = ["gpu-1", "gpu-2", "gpu-3"];
    let mut agents = Vec::new();
    for name in names {
        agents.push(cell.agent(name, 0).await);
    }
    for (number, node) in names.into_iter().enumerate() {
        let service = format!("on-{node}");
        let manifest = from_s3(&service, "s3://models/large", &s3.endpoint()).replace(
            "    minReplicas: 1\n",
            &format!("    minReplicas: 1\n    nodeSelector: {{kubernetes.io/hostname: {node}}}\n"),
        );
        assert_eq!(cell.operator.apply(&manifest, &[]).code, 0);
        assert_eq!(cell.operator.replicas_are(&service, 1, "Ready").await[0]["node"], node);
        assert_eq!(s3.ranges(), 2, "only the first node reads the store");
        let answer = agents[number].gateway.get(&format!("{service}.default.localhost"), "/model.bin").await.unwrap();
        assert!(answer.body.as_bytes() == weights, "{node} has the model");
        eventually("the coordinator knows", || async { (!cached(&cell, &["--node", node]).is_empty()).then_some(()) })
            .await;
        // Before its contents have their names others are told to come later.
        settled(&cell.directory().join(node).join("models")).await;
    }
}
