//! A cache with a budget, and a disk that is full.

use std::{path::Path, process::Command, time::Instant};

use axum::{Router, body::Bytes, extract::Path as UrlPath, routing::any};

use super::{plan::Object, room::Room, tests::settled, *};

/// A web server whose files are named by their sizes; equal sizes have equal content.
async fn serve() -> String {
    async fn answer(UrlPath((_, bytes)): UrlPath<(String, usize)>) -> Bytes {
        (0..bytes).map(|n| (n % 241) as u8).collect::<Vec<_>>().into()
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/{name}/{bytes}", any(answer));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}")
}

fn models(root: &Path, budget: Option<u64>) -> Models {
    Models::open(root.to_owned(), BTreeMap::new(), Duration::from_secs(30), budget).unwrap()
}

/// Addresses of what is there, by the server's names.
fn there(models: &Models) -> Vec<String> {
    let mut found: Vec<_> =
        models.report().borrow().models.iter().map(|m| m.uri.split('/').nth(3).unwrap().to_owned()).collect();
    let on_disk = models.cache().trees().len();
    assert_eq!(on_disk, found.len(), "the report is what is on disk");
    found.sort();
    found
}

#[tokio::test]
async fn what_nobody_uses_goes_for_what_is_asked_for() {
    let server = serve().await;
    let uri = |name: &str, bytes: u32| format!("{server}/{name}/{bytes}");
    let directory = tempfile::tempdir().unwrap();
    let models = models(directory.path(), Some(100));
    let none = Credentials::new();
    let get = async |name: &str, bytes: u32| models.ensure(&uri(name, bytes), &none, |_| {}).await;
    let held = models.hold("r", [uri("used", 40)]);
    get("used", 40).await.unwrap();
    get("old", 30).await.unwrap();
    get("mid", 20).await.unwrap();
    // Used again: the other one is now the oldest.
    get("old", 30).await.unwrap();
    get("new", 25).await.unwrap();
    assert_eq!(there(&models), ["new", "old", "used"]);
    settled(&models).await;
    let blobs = std::fs::read_dir(directory.path().join("blobs")).unwrap().count();
    assert_eq!(blobs, 3, "its content is gone, too");

    let error = get("large", 61).await.unwrap_err();
    assert_eq!(error.reason(), "CacheFull");
    let said = error.to_string();
    assert!(said.contains("has 61 bytes") && said.contains("budget of 100, of which 40 are in use"), "{said}");
    assert_eq!(get("huge", 101).await.unwrap_err().reason(), "CacheFull");
    assert_eq!(there(&models), ["new", "old", "used"], "nothing goes for what does not fit anyhow");
    drop(held);
    get("large", 61).await.unwrap();
    assert_eq!(there(&models).len(), 2, "one of 30 or 25 has stayed with it: {:?}", there(&models));

    // Pinned: by a file beside it.
    let key = models.report().borrow().models.iter().find(|m| m.uri == uri("large", 61)).unwrap().key.clone();
    std::fs::write(directory.path().join("trees").join(key).join("pinned"), "").unwrap();
    assert_eq!(get("other", 40).await.unwrap_err().reason(), "CacheFull");
    get("other", 39).await.unwrap();
    assert_eq!(there(&models), ["large", "other"]);
}

#[tokio::test]
async fn equal_content_counts_once_and_survives_the_other_model() {
    let server = serve().await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(directory.path(), Some(100));
    let none = Credentials::new();
    models.ensure(&format!("{server}/a/60"), &none, |_| {}).await.unwrap();
    let folder = models.ensure(&format!("{server}/b/40"), &none, |_| {}).await.unwrap();
    let _held = models.hold("r", [format!("{server}/b/40")]);
    // "c" is equal to "b", which its server does not say: room for it is made, and not needed after all.
    models.ensure(&format!("{server}/c/40"), &none, |_| {}).await.unwrap();
    settled(&models).await;
    assert_eq!(there(&models), ["b", "c"]);
    models.ensure(&format!("{server}/d/60"), &none, |_| {}).await.unwrap();
    assert_eq!(there(&models), ["b", "c", "d"], "40 and 60 bytes, not 140");
    assert!(folder.join("40").exists());
}

#[tokio::test]
async fn the_order_of_use_outlives_the_process() {
    let server = serve().await;
    let directory = tempfile::tempdir().unwrap();
    let none = Credentials::new();
    let first = models(directory.path(), Some(100));
    for name in ["a", "b"] {
        first.ensure(&format!("{server}/{name}/{}", if name == "a" { 40 } else { 41 }), &none, |_| {}).await.unwrap();
    }
    first.ensure(&format!("{server}/a/40"), &none, |_| {}).await.unwrap();
    settled(&first).await;
    drop(first);
    let again = models(directory.path(), Some(100));
    again.ensure(&format!("{server}/c/42"), &none, |_| {}).await.unwrap();
    assert_eq!(there(&again), ["a", "c"]);
}

fn object(size: u64) -> [Object; 1] {
    [Object { path: "m".into(), location: "m".into(), size, etag: None, sha256: None, md5: None }]
}

#[tokio::test]
async fn fetches_that_go_on_have_their_room_and_those_that_were_cut_off_give_it_up() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path().to_owned()).unwrap();
    let room = Room::open(cache.clone(), Some(100 << 10));
    let first = room.reserve("u:1", "k1", &object(60 << 10), Instant::now()).await.unwrap();
    assert_eq!(room.reserve("u:2", "k2", &object(60 << 10), Instant::now()).await.unwrap_err().reason(), "CacheFull");
    let part = cache.part("k1", 0, 60 << 10).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&part.data, &[1; 60 << 10], 0).unwrap();
    part.note(&[0]).unwrap();
    drop(first);
    assert_eq!(cache.partials().len(), 1, "it could go on");
    // Goes on: its own bytes do not stand in its way.
    drop(room.reserve("u:1", "k1", &object(60 << 10), Instant::now()).await.unwrap());
    assert_eq!(cache.partials().len(), 1);
    let second = room.reserve("u:2", "k2", &object(60 << 10), Instant::now()).await.unwrap();
    let left: Vec<_> = cache.partials().into_iter().map(|left| left.key).collect();
    assert_eq!(left, ["k2"], "nobody went on with the first, and its room is needed");
    drop(second);
    assert!(cache.partials().is_empty(), "nothing of the second has come");
}

#[tokio::test]
async fn what_has_come_of_a_version_that_is_no_more_goes_with_the_next_one() {
    let server = serve().await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(directory.path(), None);
    let uri = format!("{server}/m/40");
    for (key, uri) in [("former", uri.as_str()), ("other", "http://x/other")] {
        models.cache().begin(key, uri).unwrap();
        models.cache().part(key, 0, 7).unwrap();
    }
    models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
    let left: Vec<_> = models.cache().partials().into_iter().map(|part| part.key).collect();
    assert_eq!(left, ["other"]);
}

#[tokio::test]
async fn room_is_made_by_those_who_leave_and_not_by_those_who_fail() {
    let server = serve().await;
    let directory = tempfile::tempdir().unwrap();
    let models = models(directory.path(), Some(100));
    let uri = |name: &str, bytes: u32| format!("{server}/{name}/{bytes}");
    let held = models.hold("r", [uri("used", 60)]);
    models.ensure(&uri("used", 60), &Credentials::new(), |_| {}).await.unwrap();
    let mut made = models.room_made();
    let error = models.ensure(&uri("new", 50), &Credentials::new(), |_| {}).await.unwrap_err();
    assert_eq!(error.reason(), "CacheFull");
    assert!(!made.has_changed().unwrap(), "who fails would else try again at once, for ever");
    drop(held);
    assert!(made.has_changed().unwrap());
    made.mark_unchanged();
    models.ensure(&uri("new", 50), &Credentials::new(), |_| {}).await.unwrap();
    assert!(!made.has_changed().unwrap());
}

/// Unmounts, whatever becomes of the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking(), "not unmounted");
    }
}

#[tokio::test]
#[allow(clippy::print_stderr, reason = "says why it was skipped")]
async fn a_full_disk_is_said_and_the_fetch_goes_on_when_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(directory.path()).output();
    if !mount.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no tmpfs can be mounted here: {mount:?}");
        return;
    }
    let _mounted = Mounted(directory.path());
    let server = serve().await;
    let filler = directory.path().join("filler");
    std::fs::write(&filler, vec![0; 2 << 20]).unwrap();
    let models = models(&directory.path().join("cache"), None);
    let uri = format!("{server}/model/{}", 3 << 20);
    let error = models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap_err();
    assert_eq!(error.reason(), "DiskFull", "{error}");
    assert!(error.to_string().contains(&uri), "{error}");
    assert!(there(&models).is_empty());
    assert!(error.to_string().contains("3145728 bytes more are needed, and "), "{error}");
    assert!(models.cache().partials().is_empty(), "nothing is begun that cannot end");
    std::fs::remove_file(filler).unwrap();
    let folder = models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
    assert_eq!(there(&models), ["model"]);
    // Who has it on its way to the disk keeps its room.
    while folder.with_file_name("unsettled").exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    // What a cut-off fetch has left goes where it is in the way, unless somebody wants it.
    assert_eq!(models.room.evict(&uri), Ok(3 << 20));
    models.cache().begin("key", "http://x/left").unwrap();
    let part = models.cache().part("key", 0, 2 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&part.data, &vec![1; 2 << 20], 0).unwrap();
    drop(part);
    let held = models.hold("r", ["http://x/left".to_owned()]);
    assert_eq!(models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap_err().reason(), "DiskFull");
    drop(held);
    models.ensure(&uri, &Credentials::new(), |_| {}).await.unwrap();
    assert!(models.cache().partials().is_empty());
}
