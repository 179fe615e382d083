//! Images and models under one budget, with an engine that does as it is told.

use std::{collections::BTreeSet, path::Path, sync::atomic::AtomicBool, time::SystemTime};

use async_trait::async_trait;
use axum::{Router, body::Bytes, extract::Path as UrlPath, routing::any};
use pilotlight_proto::fleet::v1::{CachedImage, ImageAssignment};
use pilotlight_tests::eventually;
use tokio::sync::Notify;

use super::*;

/// An engine whose images all have one layer of 40 bytes in common.
#[derive(Debug, Default)]
struct Engine {
    images: Mutex<Vec<Image>>,
    /// It keeps these, whoever asks.
    keeps: Mutex<BTreeSet<String>>,
    /// Removing one takes until this is told.
    slow: AtomicBool,
    go_on: Notify,
    changes: watch::Sender<u64>,
}

impl Engine {
    /// An image of so many bytes in all has come, used so many seconds after the clock's start.
    fn pulled(&self, id: &str, bytes: u64, used: u64) {
        let layers = [("base".to_owned(), 40), (format!("layer-{id}"), bytes - 40)];
        self.images.lock().unwrap().push(Image {
            id: id.to_owned(),
            names: [format!("registry/{id}:1")].into(),
            digest: format!("sha256:{id}"),
            bytes,
            layers: layers.into(),
            kept_by: None,
            last_used: SystemTime::UNIX_EPOCH + Duration::from_secs(used),
            pinned: false,
            took: Some(Duration::from_secs(2)),
        });
        self.changes.send_modify(|count| *count += 1);
    }

    fn there(&self) -> Vec<String> {
        self.images.lock().unwrap().iter().map(|image| image.id.clone()).collect()
    }

    async fn are(&self, ids: &[&str]) {
        eventually(&format!("{ids:?} are there"), || async { (self.there() == ids).then_some(()) }).await;
    }
}

#[async_trait]
impl Images for Engine {
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn list(&self) -> Result<Vec<Image>, String> {
        Ok(self.images.lock().unwrap().clone())
    }

    async fn pull(self: Arc<Self>, name: &str, registry_configs: &[String]) -> Result<(), String> {
        if registry_configs.is_empty() {
            return Err("unauthorized".to_owned());
        }
        let id = name.trim_start_matches("registry/").trim_end_matches(":1");
        if !self.there().iter().any(|there| there == id) {
            self.pulled(id, 60, 5);
        }
        Ok(())
    }

    async fn remove(&self, id: &str) -> Result<(), String> {
        if self.slow.load(std::sync::atomic::Ordering::SeqCst) {
            self.go_on.notified().await;
        }
        if self.keeps.lock().unwrap().contains(id) {
            return Err("in use by container other".to_owned());
        }
        self.images.lock().unwrap().retain(|image| image.id != id);
        Ok(())
    }

    fn note(&self, id: &str, last_used: SystemTime, pinned: bool) {
        for image in self.images.lock().unwrap().iter_mut().filter(|image| image.id == id) {
            (image.last_used, image.pinned) = (last_used, pinned);
        }
    }
}

/// A web server whose files are named by their sizes.
async fn serve() -> String {
    async fn answer(UrlPath((_, bytes)): UrlPath<(String, usize)>) -> Bytes {
        vec![7; bytes].into()
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/{name}/{bytes}", any(answer));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}")
}

fn models(root: &Path, budget: u64, engine: &Arc<Engine>) -> Models {
    let models = Models::open(root.to_owned(), BTreeMap::new(), Duration::from_secs(30), Some(budget)).unwrap();
    models.with_images(Arc::clone(engine) as _)
}

fn name(id: &str) -> String {
    format!("registry/{id}:1")
}

/// The report once these images are in it.
async fn reported(models: &Models, ids: &[&str]) -> Vec<CachedImage> {
    let mut report = models.report();
    let of = |report: &CacheReport| report.images.iter().map(|image| image.id.clone()).collect::<Vec<_>>();
    report.wait_for(|report| of(report) == ids).await.unwrap().images.clone()
}

#[tokio::test]
async fn a_model_gets_its_room_from_images_that_nobody_uses() {
    let (server, directory, engine) = (serve().await, tempfile::tempdir().unwrap(), Arc::new(Engine::default()));
    engine.pulled("old", 60, 1);
    engine.pulled("used", 70, 2);
    engine.pulled("kept", 60, 3);
    engine.pulled("new", 60, 4);
    engine.keeps.lock().unwrap().insert("kept".to_owned());
    // 40 in common, and 20 + 30 + 20 + 20.
    let models = models(directory.path(), 200, &engine);
    let _held = models.hold("r", [name("used")]);
    reported(&models, &["kept", "new", "old", "used"]).await;
    let get = async |bytes: u64| models.ensure(&format!("{server}/m/{bytes}"), &Credentials::new(), |_| {}).await;
    get(70).await.unwrap();
    assert_eq!(engine.there(), ["old", "used", "kept", "new"], "all fit, since what they share counts once");
    let error = get(200).await.unwrap_err();
    assert!(error.to_string().contains("budget of 200, of which 70 are in use"), "{error}");
    get(40).await.unwrap();
    assert_eq!(engine.there(), ["used", "kept"], "instead of the one that the engine keeps the next one goes");
    let error = get(111).await.unwrap_err();
    assert!(error.to_string().contains("of which 90 are in use"), "{error}");
    assert_eq!(models.report().borrow().models.len(), 2, "no model went in vain");
    let report = reported(&models, &["kept", "used"]).await;
    assert!(report.iter().all(|image| image.in_use), "{report:?}");
}

#[tokio::test]
async fn what_is_past_the_budget_after_a_pull_goes_in_order_of_rank_and_use() {
    let (directory, engine) = (tempfile::tempdir().unwrap(), Arc::new(Engine::default()));
    let models = models(directory.path(), 100, &engine);
    let shelf = Shelf::new(models.clone(), 0);
    for (id, used) in [("a", 1), ("b", 2), ("c", 3)] {
        engine.pulled(id, 60, used);
    }
    reported(&models, &["a", "b", "c"]).await;
    let wish = |id: &str, keep, pinned| ImageAssignment { image: name(id), keep, pinned, ..Default::default() };
    shelf.assign(vec![], vec![wish("a", 7, false)]);
    engine.pulled("d", 60, 4);
    engine.are(&["a", "c", "d"]).await;

    let asleep = models.hold("r", [name("c")]);
    engine.pulled("e", 60, 5);
    engine.are(&["a", "c", "e"]).await;

    // More than the budget is in use or pinned: all else goes.
    shelf.assign(vec![], vec![wish("a", 7, false), wish("e", 0, true)]);
    let _other = models.hold("s", [name("f")]);
    engine.pulled("f", 80, 6);
    engine.are(&["c", "e", "f"]).await;
    drop(asleep);
    engine.are(&["e", "f"]).await;
}

#[tokio::test]
async fn an_agent_that_ends_lets_go_of_nothing() {
    let (directory, engine) = (tempfile::tempdir().unwrap(), Arc::new(Engine::default()));
    let models = models(directory.path(), 50, &engine);
    let (one, other) = (models.hold("r", [name("a")]), models.hold("s", [name("b")]));
    engine.pulled("a", 60, 1);
    engine.pulled("b", 60, 2);
    reported(&models, &["a", "b"]).await;
    drop(one);
    engine.are(&["b"]).await;
    models.close();
    drop(other);
    // Whoever wants room gets it all the same, and by then all that was to come of it has.
    engine.pulled("c", 60, 3);
    reported(&models, &["b", "c"]).await;
    models.room.fit().await;
    assert_eq!(engine.there(), ["b", "c"]);
}

#[tokio::test]
async fn an_image_is_evicted_unless_it_is_needed() {
    let (directory, engine) = (tempfile::tempdir().unwrap(), Arc::new(Engine::default()));
    let models = models(directory.path(), 1000, &engine);
    let shelf = Shelf::new(models.clone(), 0);
    engine.pulled("a", 60, 1);
    engine.pulled("b", 70, 2);
    reported(&models, &["a", "b"]).await;
    let held = models.hold("r-1", [name("a")]);
    assert_eq!(shelf.evict(&name("a")).await.unwrap_err(), "in use by r-1");
    drop(held);
    shelf.assign(vec![], vec![ImageAssignment { image: name("a"), pinned: true, ..Default::default() }]);
    assert_eq!(shelf.evict(&name("a")).await.unwrap_err(), "it is pinned");
    shelf.assign(vec![], vec![]);
    engine.keeps.lock().unwrap().insert("a".to_owned());
    assert_eq!(shelf.evict(&name("a")).await.unwrap_err(), "in use by container other");
    engine.keeps.lock().unwrap().clear();
    assert_eq!(shelf.evict(&name("a")).await, Ok(20), "the other one has the rest");
    assert_eq!(shelf.evict("sha256:b").await, Ok(70));
    assert_eq!(shelf.evict(&name("a")).await, Ok(0), "there is none");
    assert!(engine.there().is_empty());
}

#[tokio::test]
async fn a_replica_waits_for_an_image_that_is_just_being_removed() {
    let (directory, engine) = (tempfile::tempdir().unwrap(), Arc::new(Engine::default()));
    let models = models(directory.path(), 1000, &engine);
    let shelf = Shelf::new(models.clone(), 0);
    engine.pulled("a", 60, 1);
    reported(&models, &["a"]).await;
    models.settled(&name("a")).await;
    engine.slow.store(true, std::sync::atomic::Ordering::SeqCst);
    let image = name("a");
    let evicting = tokio::spawn(async move { shelf.evict(&image).await });
    let _held = eventually("it is about to go", || async {
        let held = models.hold("r", [name("a")]);
        tokio::time::timeout(Duration::from_millis(1), models.settled(&name("a"))).await.is_err().then_some(held)
    })
    .await;
    let settled = async { models.settled(&name("a")).await };
    let goes_on = async { engine.go_on.notify_one() };
    tokio::join!(settled, goes_on);
    assert!(engine.there().is_empty(), "whoever looks now finds that it is gone");
    assert_eq!(evicting.await.unwrap(), Ok(60));
}

#[tokio::test]
async fn an_image_that_is_asked_for_comes_once_with_what_it_takes() {
    let (directory, engine) = (tempfile::tempdir().unwrap(), Arc::new(Engine::default()));
    let models = models(directory.path(), 1000, &engine);
    let shelf = Shelf::new(models.clone(), 0);
    let warm = |configs: &[&str]| {
        let registry_configs = configs.iter().map(|config| (*config).to_owned()).collect();
        vec![ImageAssignment { image: name("a"), warm: true, keep: 9, registry_configs, ..Default::default() }]
    };
    shelf.assign(vec![], warm(&[]));
    shelf.assign(vec![], warm(&["{}"]));
    reported(&models, &["a"]).await;
    assert_eq!(shelf.evict(&name("a")).await, Ok(60));
    shelf.assign(vec![], warm(&["{}", "{}"]));
    assert!(engine.there().is_empty(), "it does not come by itself");
    shelf.assign(vec![], vec![]);
    shelf.assign(vec![], warm(&["{}"]));
    reported(&models, &["a"]).await;
}
