//! Fetches from other nodes that have the model, lie, are busy, die, or keep still.

use std::{
    net::SocketAddr,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use http::StatusCode;

use super::{
    lend::{AT_ONCE, PREFIX, blob_path, tree_path},
    plan::RANGE_BYTES,
    source::Content,
    tests::{Store, content, serve, settled},
    *,
};

/// What a node does when it is asked for content.
#[derive(Clone, Copy)]
enum Does {
    Well,
    Lie,
    /// After one chunk.
    Die,
    KeepStill,
}

/// A node that has what its cache has, asked without a network.
struct Node {
    models: Models,
    does: Does,
    asked: AtomicU64,
}

#[async_trait]
impl Ask for Node {
    async fn get(&self, node: &str, path: &str, range: Option<Range<u64>>) -> Result<(StatusCode, Content), String> {
        if node != "has-it" {
            return Err(format!("node {node} is not known"));
        }
        self.asked.fetch_add(1, Ordering::SeqCst);
        let range = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let (status, content) = self.models.lend(path, range.as_deref()).await;
        if !path.starts_with(&blob_path("")) {
            return Ok((status, content));
        }
        let content = match self.does {
            Does::Well => content,
            Does::Lie => content.map_ok(|chunk| chunk.iter().map(|byte| byte ^ 1).collect::<Bytes>()).boxed(),
            Does::Die => {
                let broken = futures::stream::iter([Err("the connection broke".to_owned())]);
                content.take(1).chain(broken).boxed()
            }
            Does::KeepStill => content.take(1).chain(futures::stream::pending()).boxed(),
        };
        Ok((status, content))
    }
}

fn open(directory: &tempfile::TempDir, stall: Duration) -> Models {
    Models::open(directory.path().to_owned(), BTreeMap::new(), stall, None).unwrap()
}

/// A store, and a node that has fetched the store's model.
struct Cell {
    whole: Bytes,
    store: Arc<Store>,
    uri: String,
    node: Arc<Node>,
    other: tempfile::TempDir,
    _directory: tempfile::TempDir,
}

impl Cell {
    async fn start(whole: Bytes, does: Does) -> Self {
        let (store, address): (_, SocketAddr) = serve(&[("m/model.bin", whole.clone())]).await;
        let directory = tempfile::tempdir().unwrap();
        let models = open(&directory, STALL);
        let uri = format!("http://{address}/m/model.bin");
        models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
        settled(&models).await;
        store.sent.store(0, Ordering::SeqCst);
        let node = Arc::new(Node { models, does, asked: AtomicU64::new(0) });
        Self { whole, store, uri, node, other: tempfile::tempdir().unwrap(), _directory: directory }
    }

    /// Another node wants the model, and is told of a node that is gone and of the one that has it. What it
    /// got is what the store has; gives the bytes that came from the store.
    async fn fetch(&self, stall: Duration) -> u64 {
        let models = open(&self.other, stall).with_peers(Arc::clone(&self.node) as _);
        let peers = ["is-gone".to_owned(), "has-it".to_owned()];
        let folder = models.ensure_from(&self.uri, &Credentials::new(), &peers, |_| {}).await.unwrap();
        assert!(std::fs::read(folder.join("model.bin")).unwrap() == self.whole);
        self.store.sent.load(Ordering::SeqCst)
    }

    fn asked(&self) -> u64 {
        self.node.asked.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn what_another_node_has_does_not_come_from_the_store() {
    let cell = Cell::start(content(5), Does::Well).await;
    assert_eq!(cell.fetch(STALL).await, 0);
    // For the record, and for each range.
    assert_eq!(cell.asked(), 1 + 3);
    assert!(std::fs::read_dir(cell.other.path().join("partial")).unwrap().next().is_none());
}

#[tokio::test]
async fn a_version_that_the_store_does_not_have_any_more_is_not_taken() {
    let mut cell = Cell::start(content(5), Does::Well).await;
    cell.whole = cell.whole.iter().rev().copied().collect();
    let changed = (cell.whole.clone(), "\"2\"".to_owned());
    cell.store.files.lock().unwrap().insert("m/model.bin".to_owned(), changed);
    assert_eq!(cell.fetch(STALL).await, cell.whole.len() as u64);
    assert_eq!(cell.asked(), 1, "for the record alone");
}

#[tokio::test]
async fn wrong_bytes_are_noticed_and_come_from_the_store() {
    let cell = Cell::start(content(5), Does::Lie).await;
    assert_eq!(cell.fetch(STALL).await, cell.whole.len() as u64);
    assert_eq!(cell.asked(), 1 + 3);
}

#[tokio::test]
async fn wrong_bytes_are_noticed_after_a_crash_too() {
    let cell = Cell::start(content(5), Does::Well).await;
    let (key, record) = cell.node.models.cache().trees().remove(0);
    let models = open(&cell.other, STALL);
    let part = models.cache().part(&key, 0, record.bytes()).unwrap();
    // As a process leaves it that is killed after its first range, of zeros, came from a node.
    part.tell(&record.blobs[0]).unwrap();
    part.note(&[0]).unwrap();
    drop((part, models));
    let models = open(&cell.other, STALL);
    let folder = models.ensure(&cell.uri, &Credentials::new(), |_| {}).await.unwrap();
    assert!(std::fs::read(folder.join("model.bin")).unwrap() == cell.whole);
    let twice = 2 * cell.whole.len() as u64 - RANGE_BYTES;
    assert_eq!(cell.store.sent.load(Ordering::SeqCst), twice, "what was missing, and then all");
}

#[tokio::test]
async fn what_cannot_be_compared_with_a_nodes_word_does_not_count() {
    let cell = Cell::start(content(5), Does::Well).await;
    let (key, record) = cell.node.models.cache().trees().remove(0);
    let models = open(&cell.other, STALL);
    let part = models.cache().part(&key, 0, record.bytes()).unwrap();
    part.tell("no name").unwrap();
    part.note(&[0]).unwrap();
    drop((part, models));
    assert_eq!(cell.fetch(STALL).await, 0, "all of it from the other node, by its name");
}

#[tokio::test]
async fn a_node_that_has_enough_to_do_is_left_alone() {
    let cell = Cell::start(content(5), Does::Well).await;
    let all = Arc::clone(&cell.node.models.lent).try_acquire_many_owned(AT_ONCE as u32).unwrap();
    assert_eq!(cell.fetch(STALL).await, cell.whole.len() as u64);
    drop(all);
    let third = tempfile::tempdir().unwrap();
    let models = open(&third, STALL).with_peers(Arc::clone(&cell.node) as _);
    models.ensure_from(&cell.uri, &Credentials::new(), &["has-it".to_owned()], |_| {}).await.unwrap();
    let sent = cell.store.sent.load(Ordering::SeqCst);
    assert_eq!(sent, cell.whole.len() as u64, "turns were given back");
}

#[tokio::test]
async fn a_range_goes_on_at_the_store_where_the_node_died() {
    // One range.
    let cell = Cell::start(content(1), Does::Die).await;
    let chunk = 256 << 10;
    assert_eq!(cell.fetch(STALL).await, cell.whole.len() as u64 - chunk);
}

#[tokio::test]
async fn a_node_that_keeps_still_is_not_waited_for() {
    let cell = Cell::start(content(5), Does::KeepStill).await;
    let sent = cell.fetch(Duration::from_millis(300)).await;
    assert!(sent > 0, "{sent}");
}

#[tokio::test]
async fn only_parts_of_whole_models_are_lent() {
    let cell = Cell::start(content(1), Does::Well).await;
    let models = &cell.node.models;
    let (key, record) = models.cache().trees().remove(0);
    let (blob, none) = (blob_path(&record.blobs[0]), "0".repeat(64));
    let size = record.bytes();
    let past = format!("bytes=0-{size}");
    let lost = blob_path(&"1".repeat(64));
    std::fs::write(models.cache().blob(&"1".repeat(64)), "not linked").unwrap();
    // As it is until its contents are hashed.
    let (fresh, called) = ("2".repeat(64), content::unnamed(&"2".repeat(64), 0));
    std::fs::write(models.cache().blob(&called), "text").unwrap();
    let unnamed = cache::TreeRecord { blobs: vec![called.clone()], ..record.clone() };
    models.cache().begin(&fresh, "u").unwrap();
    models.cache().publish(&fresh, &unnamed, None).unwrap();
    for (path, range, status) in [
        (tree_path(&key), None, StatusCode::OK),
        (tree_path(&none), None, StatusCode::NOT_FOUND),
        (tree_path(&fresh), None, StatusCode::SERVICE_UNAVAILABLE),
        (blob_path(&called), Some("bytes=1-2"), StatusCode::NOT_FOUND),
        (blob.clone(), Some("bytes=1-2"), StatusCode::PARTIAL_CONTENT),
        (blob.clone(), None, StatusCode::RANGE_NOT_SATISFIABLE),
        (blob, Some(past.as_str()), StatusCode::RANGE_NOT_SATISFIABLE),
        (blob_path(&none), Some("bytes=1-2"), StatusCode::NOT_FOUND),
        (lost, Some("bytes=1-2"), StatusCode::NOT_FOUND),
        (format!("{PREFIX}blobs/../trees/{key}/tree.json"), Some("bytes=1-2"), StatusCode::NOT_FOUND),
        (format!("{PREFIX}partial/{key}"), Some("bytes=1-2"), StatusCode::NOT_FOUND),
    ] {
        let (answered, body) = models.lend(&path, range).await;
        assert_eq!(answered, status, "{path} {range:?}");
        let bytes: usize =
            body.map_ok(|chunk| chunk.len()).try_fold(0, |sum, n| async move { Ok(sum + n) }).await.unwrap();
        assert_eq!(bytes > 0, status.is_success(), "{path}");
    }
}
