//! Fetches from a web server that can stall, cut and lie.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use futures::StreamExt as _;

use super::{plan::RANGE_BYTES, *};

/// What the server does to the next requests for content.
#[derive(Default)]
pub(super) struct Store {
    pub(super) files: Mutex<BTreeMap<String, (Bytes, String)>>,
    pub(super) sent: AtomicU64,
    cuts: AtomicU64,
    stalls: AtomicU64,
    down: AtomicBool,
    /// `Content-MD5` of everything.
    md5: Mutex<Option<String>>,
}

async fn answer(
    State(store): State<Arc<Store>>,
    Path(path): Path<String>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let found = store.files.lock().unwrap().get(&path).cloned();
    let Some((content, etag)) = found else { return StatusCode::NOT_FOUND.into_response() };
    if method == Method::HEAD {
        let md5 = store.md5.lock().unwrap().clone().map(|md5| [("content-md5", md5)]);
        let known = [(header::CONTENT_LENGTH, content.len().to_string()), (header::ETAG, etag)];
        return (known, md5.map(axum::response::AppendHeaders), Body::empty()).into_response();
    }
    if store.down.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok()).and_then(|range| {
        let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some(from.parse::<usize>().ok()?..to.parse::<usize>().ok()? + 1)
    });
    let Some(range) = range else { return content.into_response() };
    let part = content.slice(range);
    let take = |count: &AtomicU64| count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
    let half = part.slice(..part.len() / 2);
    let body = match () {
        () if take(&store.cuts) => {
            let broken = Err(std::io::Error::other("cut"));
            Body::from_stream(futures::stream::iter([Ok(half), broken]))
        }
        () if take(&store.stalls) => {
            Body::from_stream(futures::stream::iter([Ok::<_, std::io::Error>(half)]).chain(futures::stream::pending()))
        }
        () => {
            store.sent.fetch_add(part.len() as u64, Ordering::SeqCst);
            Body::from(part)
        }
    };
    (StatusCode::PARTIAL_CONTENT, body).into_response()
}

pub(super) async fn serve(files: &[(&str, Bytes)]) -> (Arc<Store>, SocketAddr) {
    let store = Arc::new(Store::default());
    for (name, content) in files {
        store.files.lock().unwrap().insert((*name).to_owned(), (content.clone(), "\"1\"".to_owned()));
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/{*path}", axum::routing::any(answer)).with_state(Arc::clone(&store));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (store, address)
}

pub(super) fn content(ranges: u64) -> Bytes {
    (0..ranges * RANGE_BYTES / 2 + 5).map(|n| (n % 251) as u8).collect::<Vec<_>>().into()
}

fn models(directory: &tempfile::TempDir) -> Models {
    let volumes = BTreeMap::from([("weights".to_owned(), directory.path().to_owned())]);
    Models::open(directory.path().join("cache"), volumes, Duration::from_millis(300), None).unwrap()
}

/// Waits until all models are on the disk, and their contents have their names.
pub(super) async fn settled(models: &Models) {
    while !models.cache().unsettled().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn blobs(directory: &tempfile::TempDir) -> usize {
    std::fs::read_dir(directory.path().join("cache/blobs")).unwrap().count()
}

#[tokio::test]
async fn a_model_comes_through_cuts_and_stalls() {
    let whole = content(5);
    let (store, address) = serve(&[("m/model.bin", whole.clone())]).await;
    store.cuts.store(1, Ordering::SeqCst);
    store.stalls.store(1, Ordering::SeqCst);
    let directory = tempfile::tempdir().unwrap();
    let last = Mutex::new(Progress::default());
    let uri = format!("http://{address}/m/model.bin");
    let models = models(&directory);
    let folder = models.ensure(&uri, &Credentials::new(), |now| *last.lock().unwrap() = now).await.unwrap();
    assert!(std::fs::read(folder.join("model.bin")).unwrap() == whole);
    assert_eq!(*last.lock().unwrap(), Progress { done: whole.len() as u64, total: whole.len() as u64 });
    assert!(std::fs::read_dir(directory.path().join("cache/partial")).unwrap().next().is_none());
    // It is shown at once, and marked until it is on the disk.
    settled(&models).await;
    assert!(folder.join("model.bin").exists());
}

#[tokio::test]
async fn where_boots_are_not_told_apart_a_model_is_settled_before_it_is_shown() {
    let whole = content(1);
    let (_, address) = serve(&[("a/m.bin", whole.clone())]).await;
    let directory = tempfile::tempdir().unwrap();
    let mut models = models(&directory);
    models.cache = models.cache.without_boot();
    let folder = models.ensure(&format!("http://{address}/a/m.bin"), &Credentials::new(), |_| {}).await.unwrap();
    assert!(models.cache().unsettled().is_empty());
    let (_, record) = models.cache().trees().remove(0);
    assert_eq!(record.blobs, [content::by_blake3(&blake3::hash(&whole).to_hex())]);
    assert!(std::fs::read(folder.join("m.bin")).unwrap() == whole);
}

#[tokio::test]
async fn what_is_there_is_not_read_again() {
    let whole = content(5);
    let (store, address) = serve(&[("model.bin", whole.clone())]).await;
    let uri = format!("http://{address}/model.bin");
    let listed = source::open(&uri, &Credentials::new(), &Clients::default()).unwrap().list().await.unwrap();
    let key = plan::tree_key(&uri, &listed);
    // Written and not synced, in this boot of the machine and in another one, and synced.
    for (noted, counts) in [("memory", true), ("memory of another boot", false), ("disk", true)] {
        let directory = tempfile::tempdir().unwrap();
        let first = models(&directory);
        // As a process leaves it that is killed after its first range.
        let part = first.cache().part(&key, 0, listed[0].size).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&part.data, &whole[..RANGE_BYTES as usize], 0).unwrap();
        match noted {
            "memory" => part.came(0).unwrap(),
            "disk" => part.note(&[0]).unwrap(),
            _ => std::fs::write(part.path.with_extension("done"), "0 another\n").unwrap(),
        }
        drop((part, first));
        let again = models(&directory);
        assert!(!again.cache().files(&key).exists(), "a half model is not seen");
        store.sent.store(0, Ordering::SeqCst);
        let folder = again.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
        assert!(std::fs::read(folder.join("model.bin")).unwrap() == whole);
        let left = whole.len() as u64 - if counts { RANGE_BYTES } else { 0 };
        assert_eq!(store.sent.load(Ordering::SeqCst), left, "{noted}");
        settled(&again).await;
        let name = &again.cache().record(&key).unwrap().blobs[0];
        assert_eq!(*name, content::by_blake3(&blake3::hash(&whole).to_hex()), "{noted}");
    }
}

#[tokio::test]
async fn many_that_want_it_fetch_it_once_and_equal_files_are_one_blob() {
    let whole = content(1);
    let (store, address) = serve(&[("a/m.bin", whole.clone()), ("b/m.bin", whole.clone())]).await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    let (a, b) = (format!("http://{address}/a/m.bin"), format!("http://{address}/b/m.bin"));
    let none = Credentials::new();
    let all = futures::future::join_all((0..4).map(|_| models.ensure(&a, &none, |_| {}))).await;
    assert!(all.iter().all(|folder| folder.as_ref().unwrap() == all[0].as_ref().unwrap()));
    assert_eq!(store.sent.load(Ordering::SeqCst), whole.len() as u64);
    models.ensure(&b, &none, |_| {}).await.unwrap();
    settled(&models).await;
    assert_eq!(blobs(&directory), 1);
    assert_eq!(models.cache().trees().len(), 2);
    // A changed object makes another tree; the first stays.
    store.files.lock().unwrap().insert("a/m.bin".to_owned(), (content(2), "\"2\"".to_owned()));
    let changed = models.ensure(&a, &none, |_| {}).await.unwrap();
    assert_ne!(&changed, all[0].as_ref().unwrap());
    assert!(all[0].as_ref().unwrap().join("m.bin").exists());
}

#[tokio::test(start_paused = false)]
async fn what_is_missing_is_named() {
    let (_, address) = serve(&[]).await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    let none = Credentials::new();
    let error = models.ensure(&format!("http://{address}/none.bin"), &none, |_| {}).await.unwrap_err();
    assert_eq!(error.reason(), "ModelNotFound");
    let error = models.ensure("hdfs://a/b", &none, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("known are s3"), "{error}");
    let error = models.volume("default", "pvc://wights/m").unwrap_err();
    assert_eq!(
        error.to_string(),
        "pvc://wights/m: persistentVolumeClaim \"wights\" is not known on this node; known are: weights; see --claim"
    );
    assert_eq!(models.volume("default", "pvc://weights/none").unwrap_err().reason(), "ModelNotFound");
    assert!(models.volume("default", "pvc://weights/../etc").is_err());
    let (root, below) = models.volume("default", "pvc://weights/cache").unwrap();
    assert_eq!((root.as_path(), below), (directory.path(), directory.path().join("cache")));
}

#[tokio::test]
async fn a_hub_that_lies_about_a_checksum_is_refused() {
    let weights = content(1);
    let sha = |bytes: &[u8]| plan::hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    let listing = |sha256: &str| {
        let files = serde_json::json!([
            {"rfilename": "config.json", "size": 2, "blobId": "b1"},
            {"rfilename": "w/model.safetensors", "size": weights.len(), "blobId": "b2",
             "lfs": {"sha256": sha256, "size": weights.len()}},
        ]);
        Bytes::from(serde_json::json!({"sha": "c0ffee", "siblings": files}).to_string())
    };
    let (store, address) = serve(&[
        ("api/models/o/m/revision/main", listing(&sha(b"other"))),
        ("o/m/resolve/c0ffee/config.json", Bytes::from_static(b"{}")),
        ("o/m/resolve/c0ffee/w/model.safetensors", weights.clone()),
    ])
    .await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    let credentials = Credentials::from([("HF_ENDPOINT".to_owned(), format!("http://{address}"))]);
    let error = models.ensure("hf://o/m", &credentials, |_| {}).await.unwrap_err();
    assert_eq!(error.reason(), "ModelChecksumMismatch");
    assert!(models.cache().trees().is_empty());
    let right = (listing(&sha(&weights)), "\"2\"".to_owned());
    store.files.lock().unwrap().insert("api/models/o/m/revision/main".to_owned(), right);
    let folder = models.ensure("hf://o/m", &credentials, |_| {}).await.unwrap();
    assert!(std::fs::read(folder.join("w/model.safetensors")).unwrap() == weights);
}

#[tokio::test]
async fn a_web_servers_md5_is_checked() {
    let (store, address) = serve(&[("model.bin", Bytes::from_static(b"weights"))]).await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(&directory);
    let uri = format!("http://{address}/model.bin");
    // Of "weighs!" and of "weights".
    for (md5, fits) in [("vhgQbeVc7cYLMJNAinRT2w==", false), ("Y/Tx6bclNw9FlyBXXNX5Uw==", true)] {
        *store.md5.lock().unwrap() = Some(md5.to_owned());
        match models.ensure(&uri, &Credentials::new(), |_| {}).await {
            Ok(_) => assert!(fits),
            Err(error) => {
                assert_eq!(error.reason(), "ModelChecksumMismatch", "{error}");
                assert!(!fits && error.to_string().contains("MD5"), "{error}");
                assert!(models.cache().trees().is_empty() && blobs(&directory) == 0);
            }
        }
    }
}
