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
use pilotlight_tests::{cell::Dev, eventually};

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
    eventually("three ranges are noted", || async {
        let partial = std::fs::read_dir(dev.data().join("agent/models/partial")).ok()?.next()?.ok()?.path();
        (std::fs::read_to_string(partial.join("0.done")).ok()?.lines().count() == 3).then_some(())
    })
    .await;

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
