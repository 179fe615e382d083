//! Models that are kept on disk and in the page cache, pinned, and evicted.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path as UrlPath, State},
    http::{Method, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::any,
};
use pilotlight_proto::fleet::v1::{CachedModel, EnvVar, ModelAssignment, Rung};
use pilotlight_tests::eventually;

use super::*;
use crate::models::tests::settled;
use crate::warmth::page_cache::{PageCache, residency};

const MIB: usize = 1 << 20;
const LOOK: Duration = Duration::from_millis(50);

/// What the server says of all its files.
#[derive(Default)]
struct Says {
    /// To how many requests more: that it is not there.
    missing: AtomicU64,
    changed: AtomicBool,
    /// Content never comes.
    hangs: AtomicBool,
}

async fn answer(
    State(says): State<Arc<Says>>,
    UrlPath((_, bytes)): UrlPath<(String, usize)>,
    method: Method,
) -> Response {
    if says.missing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
        return StatusCode::NOT_FOUND.into_response();
    }
    let etag = if says.changed.load(Ordering::SeqCst) { "\"2\"" } else { "\"1\"" };
    if method == Method::HEAD {
        let length = bytes.to_string();
        return ([(header::CONTENT_LENGTH, length.as_str()), (header::ETAG, etag)], Body::empty()).into_response();
    }
    if says.hangs.load(Ordering::SeqCst) {
        return Body::from_stream(futures::stream::pending::<io::Result<Bytes>>()).into_response();
    }
    let seed = usize::from(says.changed.load(Ordering::SeqCst));
    (0..bytes).map(|n| ((n + seed) % 241) as u8).collect::<Vec<_>>().into_response()
}

/// A web server whose files are named by their sizes; equal sizes have equal content.
async fn serve() -> (Arc<Says>, String) {
    let says = Arc::new(Says::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/{name}/{bytes}", any(answer)).with_state(Arc::clone(&says));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (says, format!("http://{address}"))
}

/// On a disk: pages of what is in memory only, as many a /tmp, cannot be let go of.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
}

fn open(root: &Path, budget: Option<u64>, memory: usize) -> (Models, Shelf) {
    let models = Models::open(root.to_owned(), BTreeMap::new(), Duration::from_secs(30), budget).unwrap();
    (models.clone(), Shelf::looking_each(models, memory as u64, LOOK))
}

fn ask(uri: &str, rung: Rung, keep: u32) -> ModelAssignment {
    ModelAssignment { uri: uri.to_owned(), rung: rung.into(), keep, ..Default::default() }
}

fn reported(models: &Models, uri: &str) -> Vec<CachedModel> {
    models.report().borrow().models.iter().filter(|model| model.uri == uri).cloned().collect()
}

async fn one(models: &Models, uri: &str, what: &str, is: impl Fn(&CachedModel) -> bool) -> CachedModel {
    eventually(what, || async {
        let mut found = reported(models, uri);
        (found.len() == 1 && is(&found[0])).then(|| found.remove(0))
    })
    .await
}

#[tokio::test]
async fn what_is_asked_for_is_fetched_and_what_cannot_be_is_tried_again() {
    let (says, server) = serve().await;
    let directory = directory();
    let (models, shelf) = open(directory.path(), None, 0);
    let uri = format!("{server}/m/1000");
    let unresolved = ModelAssignment { unresolved: "no such secret".into(), ..ask(&uri, Rung::Cached, 0) };
    shelf.assign(vec![unresolved.clone(), ask(&format!("{server}/left/10"), Rung::Unspecified, 0)], vec![]);
    // The first try fails, the second follows at once.
    says.missing.store(1, Ordering::SeqCst);
    let other = format!("{server}/other/20");
    shelf.assign(vec![unresolved, ask(&other, Rung::Cached, 0)], vec![]);
    one(&models, &other, "it is fetched", |_| true).await;
    assert_eq!(says.missing.load(Ordering::SeqCst), 0);
    assert!(reported(&models, &uri).is_empty(), "not without its secret");
    shelf.assign(vec![ask(&uri, Rung::Cached, 0)], vec![]);
    let model = one(&models, &uri, "the other one, too", |_| true).await;
    assert!(model.fetch_took.is_some() && !model.staged && !model.in_use, "{model:?}");
    assert!(reported(&models, &format!("{server}/left/10")).is_empty());
}

#[tokio::test]
async fn a_staged_model_stays_in_the_page_cache_until_nobody_needs_it() {
    let (_, server) = serve().await;
    let directory = directory();
    let (models, shelf) = open(directory.path(), None, 3 * MIB);
    let uri = format!("{server}/m/{}", 2 * MIB);
    shelf.assign(vec![ask(&uri, Rung::Staged, 0)], vec![]);
    let whole = |model: &CachedModel| model.staged && model.resident_bytes == model.bytes;
    let model = one(&models, &uri, "it is staged", whole).await;
    assert!(model.stage_took.is_some());

    // As the kernel does where memory is short.
    let folder = models.cache().files(&model.key);
    let kernel = PageCache::new(0);
    assert!(!kernel.unstage(&folder).await.unwrap().whole());
    eventually("it is read again", || async { residency(&folder).await.unwrap().whole().then_some(()) }).await;

    let held = models.hold("r", [uri.clone()]);
    one(&models, &uri, "a replica has it", |model| model.in_use).await;
    shelf.assign(vec![ask(&uri, Rung::Cached, 0)], vec![]);
    let other = format!("{server}/other/{}", 2 * MIB + 1);
    shelf.assign(vec![ask(&other, Rung::Staged, 0)], vec![]);
    one(&models, &other, "the other one is on the disk, past the budget", |_| true).await;
    assert!(residency(&folder).await.unwrap().whole(), "the replica needs its pages");
    assert!(reported(&models, &uri)[0].staged && !reported(&models, &other)[0].staged);
    drop(held);
    one(&models, &uri, "it is let go of", |model| !model.staged && model.resident_bytes < model.bytes / 2).await;
    one(&models, &other, "the other one has its room", whole).await;
}

#[tokio::test]
async fn pins_hold_for_all_versions_and_outlive_the_process() {
    let (says, server) = serve().await;
    let directory = directory();
    let uri = format!("{server}/m/1000");
    let (models, shelf) = open(directory.path(), None, 0);
    models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
    shelf.assign(vec![ModelAssignment { pinned: true, ..ask(&uri, Rung::Unspecified, 0) }], vec![]);
    assert!(reported(&models, &uri)[0].pinned);
    says.changed.store(true, Ordering::SeqCst);
    settled(&models).await;
    drop((models, shelf));
    // The coordinator is away; a replica fetches the new version.
    let (models, shelf) = open(directory.path(), None, 0);
    models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
    let both: Vec<_> = reported(&models, &uri).into_iter().map(|model| model.pinned).collect();
    assert_eq!(both, [true, true]);
    assert_eq!(shelf.evict(&uri).await.unwrap_err(), "it is pinned");
    shelf.assign(vec![], vec![]);
    assert!(reported(&models, &uri).iter().all(|model| !model.pinned));
    assert_eq!(shelf.evict(&uri).await.unwrap(), 2000);
}

#[tokio::test]
async fn an_evicted_model_is_gone_with_all_that_was_left_of_it() {
    let (says, server) = serve().await;
    let directory = directory();
    let (models, shelf) = open(directory.path(), None, MIB);
    let (uri, twin) = (format!("{server}/m/1000"), format!("{server}/twin/1000"));
    models.ensure(&twin, &Credentials::new(), |_| {}).await.unwrap();
    shelf.assign(vec![ask(&uri, Rung::Staged, 0)], vec![]);
    one(&models, &uri, "it is staged", |model| model.staged).await;
    settled(&models).await;
    let held = models.hold("m-00001-abc", [uri.clone()]);
    assert_eq!(shelf.evict(&uri).await.unwrap_err(), "in use by m-00001-abc");
    drop(held);
    shelf.assign(vec![], vec![]);
    assert_eq!(shelf.evict(&uri).await.unwrap(), 0, "its twin has the content, too");
    assert_eq!(shelf.evict(&uri).await.unwrap(), 0, "it was not there");
    assert_eq!(shelf.evict(&twin).await.unwrap(), 1000);
    for folder in ["blobs", "trees", "partial"] {
        assert_eq!(std::fs::read_dir(directory.path().join(folder)).unwrap().count(), 0, "{folder}");
    }

    says.hangs.store(true, Ordering::SeqCst);
    shelf.assign(vec![ask(&uri, Rung::Cached, 0)], vec![]);
    eventually("its fetch has begun", || async { (models.cache().partials().len() == 1).then_some(()) }).await;
    assert_eq!(shelf.evict(&uri).await.unwrap_err(), "it is being fetched");
    shelf.assign(vec![], vec![]);
    shelf.evict(&uri).await.unwrap();
    assert!(models.cache().partials().is_empty());
}

#[tokio::test]
async fn what_nobody_waits_for_displaces_only_what_is_kept_less() {
    let (_, server) = serve().await;
    let directory = directory();
    let (models, shelf) = open(directory.path(), Some(100), 0);
    let uri = |name: &str, bytes: u32| format!("{server}/{name}/{bytes}");
    let none = Credentials::new();
    models.ensure(&uri("unasked", 60), &none, |_| {}).await.unwrap();
    let (first, second) = (uri("first", 61), uri("second", 62));
    shelf.assign(vec![ask(&first, Rung::Cached, 7)], vec![]);
    one(&models, &first, "it takes the room of what nobody asked for", |_| true).await;
    assert!(reported(&models, &uri("unasked", 60)).is_empty());
    shelf.assign(vec![ask(&first, Rung::Cached, 7), ask(&second, Rung::Cached, 7)], vec![]);
    let error = models.ensure(&second, &none, |_| {}).await.unwrap_err();
    assert_eq!(error.reason(), "CacheFull");
    assert!(error.to_string().contains("kept before it"), "{error}");
    let held = models.hold("r", [second.clone()]);
    models.ensure(&second, &none, |_| {}).await.unwrap();
    assert!(reported(&models, &first).is_empty(), "a replica waited for it");
    drop(held);
    let error = models.ensure(&first, &none, |_| {}).await.unwrap_err();
    assert_eq!(error.reason(), "CacheFull", "the first does not take it back");
    // It comes back once there is room.
    shelf.assign(vec![ask(&first, Rung::Cached, 7)], vec![]);
    shelf.evict(&second).await.unwrap();
    one(&models, &first, "the first is back", |_| true).await;
    shelf.assign(vec![ask(&first, Rung::Cached, 7), ask(&second, Rung::Cached, 8)], vec![]);
    one(&models, &second, "what is kept more takes its room", |_| true).await;
    assert!(reported(&models, &first).is_empty());
}

#[test]
fn a_task_goes_on_where_only_its_rank_changes() {
    let shelf_wish = ask("s3://b/m", Rung::Cached, 1);
    let ranked = ModelAssignment { keep: 2, pinned: true, peers: vec!["n".into()], ..shelf_wish.clone() };
    assert!(shelf::same_task(&shelf_wish, &ranked));
    let secret = EnvVar { name: "HF_TOKEN".into(), value: "t".into() };
    assert!(!shelf::same_task(&shelf_wish, &ModelAssignment { credentials: vec![secret], ..shelf_wish.clone() }));
    assert!(!shelf::same_task(&shelf_wish, &ask("s3://b/m", Rung::Staged, 1)));
}
