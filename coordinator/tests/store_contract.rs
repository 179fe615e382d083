//! What every store promises, held against the embedded one and a real etcd.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, future::join_all};
use pilotlight_coordinator::{
    config::EtcdConfig,
    leader::{self, LeaderRecord},
    store::{Event, Store, StoreError, StoreExt as _, Transaction, embedded::EmbeddedStore, etcd::EtcdStore},
};
use tempfile::TempDir;

/// A store, and what has to stay as long as it is used.
struct Subject {
    store: Arc<dyn Store>,
    _directory: TempDir,
    _etcd: Option<Etcd>,
}

/// An etcd of its own; ends with the test.
struct Etcd(Child);

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn embedded() -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(EmbeddedStore::open(&directory.path().join("state.redb")).unwrap());
    Subject { store, _directory: directory, _etcd: None }
}

async fn etcd() -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (client, peer) = (format!("http://127.0.0.1:{}", port()), format!("http://127.0.0.1:{}", port()));
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.path().join("etcd"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test needs etcd; scripts/test.sh installs it (Debian: etcd-server)");
    let etcd = Etcd(child);
    let config = EtcdConfig { endpoints: vec![client], ..Default::default() };
    // It takes a moment to listen; each attempt is bounded by the store's own time-out.
    for _ in 0..200 {
        if let Ok(store) = EtcdStore::connect(&config, "/pilotlight/test/").await {
            return Subject { store: Arc::new(store), _directory: directory, _etcd: Some(etcd) };
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("etcd does not answer");
}

/// Runs each promise on both stores.
macro_rules! contract {
    ($($promise:ident)*) => {
        mod on_embedded {
            $(#[tokio::test]
            async fn $promise() {
                super::$promise(super::embedded().await.store).await;
            })*
        }
        mod on_etcd {
            $(#[tokio::test]
            async fn $promise() {
                let subject = super::etcd().await;
                super::$promise(Arc::clone(&subject.store)).await;
            })*
            use std::sync::Arc;
        }
    };
}

contract! {
    keys_remember_their_history
    a_conflict_applies_nothing_and_names_its_key
    a_list_is_sorted_and_complete
    a_transaction_has_a_limit
    a_watch_misses_nothing_and_repeats_nothing
    compare_and_swap_counts_exactly
    a_lease_that_is_revoked_takes_its_keys
    a_lease_that_is_dropped_runs_out
    json_that_cannot_be_read_names_its_key
    one_leader_at_a_time
    a_process_that_led_before_leads_again_at_once
}

async fn keys_remember_their_history(store: Arc<dyn Store>) {
    store.ping().await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), None);
    let first = store.commit(Transaction::new().put("a", "1")).await.unwrap();
    let second = store.commit(Transaction::new().put("a", "2").put("b", "x")).await.unwrap();
    assert!(second > first);
    let entry = store.get("a").await.unwrap().unwrap();
    assert_eq!((entry.value.as_ref(), entry.version), (b"2".as_slice(), 2));
    assert_eq!((entry.create_revision, entry.mod_revision), (first, second));
    store.commit(Transaction::new().delete("a").delete("never")).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), None);
    let again = store.commit(Transaction::new().put("a", "3")).await.unwrap();
    let entry = store.get("a").await.unwrap().unwrap();
    assert_eq!((entry.create_revision, entry.version), (again, 1));
}

async fn a_conflict_applies_nothing_and_names_its_key(store: Arc<dyn Store>) {
    let revision = store.commit(Transaction::new().put("a", "1").put("b", "1")).await.unwrap();
    let cases = [
        (Transaction::new().expect_absent("a"), Some("a")),
        (Transaction::new().expect_revision("a", revision).expect_revision("b", revision + 7), Some("b")),
        (Transaction::new().expect_created("a", revision + 7), Some("a")),
        (Transaction::new().expect_absent("c").expect_revision("a", revision).expect_created("b", revision), None),
    ];
    for (expected, conflict) in cases {
        let outcome = store.commit(expected.put("new", "x")).await;
        match conflict {
            Some(at) => {
                assert!(matches!(&outcome, Err(StoreError::Conflict { key }) if key == at), "{outcome:?}");
                assert_eq!(store.get("new").await.unwrap(), None);
            }
            None => assert!(outcome.is_ok(), "{outcome:?}"),
        }
    }
}

async fn a_list_is_sorted_and_complete(store: Arc<dyn Store>) {
    const KEYS: usize = 2_345;
    for chunk in (0..KEYS).collect::<Vec<_>>().chunks(100) {
        let write = chunk.iter().rev().fold(Transaction::new(), |write, n| write.put(&format!("list/{n:05}"), "v"));
        store.commit(write).await.unwrap();
    }
    let last = store.commit(Transaction::new().put("lisu", "after").put("list", "before")).await.unwrap();
    let listing = store.list("list/").await.unwrap();
    let keys: Vec<_> = listing.entries.iter().map(|entry| entry.key.clone()).collect();
    assert_eq!(keys, (0..KEYS).map(|n| format!("list/{n:05}")).collect::<Vec<_>>());
    assert_eq!(listing.revision, last);
    assert!(store.list("none/").await.unwrap().entries.is_empty());
}

async fn a_transaction_has_a_limit(store: Arc<dyn Store>) {
    let write = |count| (0..count).fold(Transaction::new(), |write, n| write.put(&format!("k{n}"), "v"));
    assert!(store.commit(write(128)).await.is_ok());
    assert!(matches!(store.commit(write(129)).await, Err(StoreError::TooLarge(129))));
}

async fn a_watch_misses_nothing_and_repeats_nothing(store: Arc<dyn Store>) {
    const WRITES: usize = 300;
    let from = store.commit(Transaction::new().put("w/0", "first").put("other/0", "x")).await.unwrap();
    let mut watch = store.watch("w/", from).await.unwrap();
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        for n in 1..WRITES {
            let write = Transaction::new().put(&format!("w/{n}"), n.to_string()).put("other/n", "x");
            writer.commit(write.delete(&format!("w/{}", n - 1))).await.unwrap();
        }
    });
    let (mut put, mut deleted, mut last) = (0, 0, 0);
    while deleted < WRITES - 1 {
        let events = watch.next().await.unwrap().unwrap();
        let revision = events[0].revision();
        assert!(revision > last && events.iter().all(|event| event.revision() == revision), "in order, together");
        last = revision;
        for event in events {
            match event {
                Event::Put(entry) => {
                    assert_eq!(entry.key, format!("w/{put}"));
                    put += 1;
                }
                Event::Delete { key, .. } => {
                    assert_eq!(key, format!("w/{deleted}"));
                    deleted += 1;
                }
            }
        }
    }
    assert_eq!(put, WRITES);
    writing.await.unwrap();
}

async fn compare_and_swap_counts_exactly(store: Arc<dyn Store>) {
    store.commit(Transaction::new().put_json("count", &0u32)).await.unwrap();
    let count_to_50 = |store: Arc<dyn Store>| async move {
        for _ in 0..50 {
            loop {
                let entry = store.get("count").await.unwrap().unwrap();
                let count: u32 = serde_json::from_slice(&entry.value).unwrap();
                let write =
                    Transaction::new().expect_revision("count", entry.mod_revision).put_json("count", &(count + 1));
                match store.commit(write).await {
                    Ok(_) => break,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    join_all((0..8).map(|_| tokio::spawn(count_to_50(Arc::clone(&store))))).await;
    assert_eq!(store.get_json::<u32>("count").await.unwrap(), Some(400));
}

async fn a_lease_that_is_revoked_takes_its_keys(store: Arc<dyn Store>) {
    let lease = store.lease(Duration::from_secs(60)).await.unwrap();
    let write = Transaction::new().put_with_lease("l/1", "x", lease.id()).put_with_lease("l/2", "x", lease.id());
    let revision = store.commit(write.put("l/3", "stays")).await.unwrap();
    let mut watch = store.watch("l/", revision + 1).await.unwrap();
    lease.revoke().await;
    let events = watch.next().await.unwrap().unwrap();
    let mut gone: Vec<_> = events.iter().map(|event| (matches!(event, Event::Delete { .. }), event.key())).collect();
    gone.sort_unstable();
    assert_eq!(gone, [(true, "l/1"), (true, "l/2")]);
    assert_eq!(store.list("l/").await.unwrap().entries.len(), 1);
}

async fn a_lease_that_is_dropped_runs_out(store: Arc<dyn Store>) {
    let lease = store.lease(Duration::from_secs(1)).await.unwrap();
    let revision = store.commit(Transaction::new().put_with_lease("d", "x", lease.id())).await.unwrap();
    let mut watch = store.watch("d", revision + 1).await.unwrap();
    // Held for longer than its time to live, it is kept alive.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(store.get("d").await.unwrap().is_some());
    drop(lease);
    let events = watch.next().await.unwrap().unwrap();
    assert!(matches!(&events[..], [Event::Delete { key, .. }] if key == "d"));
}

async fn json_that_cannot_be_read_names_its_key(store: Arc<dyn Store>) {
    store.commit(Transaction::new().put("bad/1", "{").put_json("good", &vec![1, 2])).await.unwrap();
    assert_eq!(store.get_json::<Vec<u8>>("good").await.unwrap(), Some(vec![1, 2]));
    assert_eq!(store.get_json::<Vec<u8>>("none").await.unwrap(), None);
    let error = store.list_json::<Vec<u8>>("bad/").await.unwrap_err();
    assert!(error.to_string().contains("bad/1"), "{error}");
}

fn candidate(address: &str) -> LeaderRecord {
    LeaderRecord::of_this_process(address.to_owned())
}

async fn one_leader_at_a_time(store: Arc<dyn Store>) {
    let ttl = Duration::from_secs(60);
    let first = leader::campaign(Arc::clone(&store), &candidate("one"), ttl, |_| {}).await.unwrap();
    let fenced = first.fenced();
    fenced.commit(Transaction::new().put("decision", "1")).await.unwrap();
    let mut second = tokio::spawn({
        let store = Arc::clone(&store);
        async move { leader::campaign(store, &candidate("two"), ttl, |_| {}).await }
    });
    // It has seen that another leads, and waits.
    tokio::time::timeout(Duration::from_millis(500), &mut second).await.expect_err("two must not lead at once");
    first.resign().await;
    let second = second.await.unwrap().unwrap();
    let late = fenced.commit(Transaction::new().put("decision", "2")).await;
    assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    second.fenced().commit(Transaction::new().put("decision", "3")).await.unwrap();
    assert_eq!(store.get("decision").await.unwrap().unwrap().value.as_ref(), b"3");
}

async fn a_process_that_led_before_leads_again_at_once(store: Arc<dyn Store>) {
    let (ttl, me) = (Duration::from_secs(60), candidate("one"));
    let first = leader::campaign(Arc::clone(&store), &me, ttl, |_| {}).await.unwrap();
    let former = first.fenced();
    former.commit(Transaction::new().put("decision", "1")).await.unwrap();
    // The key and its lease stay: the store could not be told.
    let second = leader::campaign(Arc::clone(&store), &me, ttl, |_| {}).await.unwrap();
    let late = former.commit(Transaction::new().put("decision", "late")).await;
    assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    second.fenced().commit(Transaction::new().put("decision", "2")).await.unwrap();
    assert_eq!(store.get("decision").await.unwrap().unwrap().value.as_ref(), b"2");
    drop(first);
}

#[tokio::test]
async fn the_embedded_store_outlives_its_process_and_its_leases_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&path).unwrap());
    let lease = store.lease(Duration::from_secs(60)).await.unwrap();
    let write = Transaction::new().put("a", "1").put_with_lease("leased", "x", lease.id());
    let revision = store.commit(write).await.unwrap();
    let twice = EmbeddedStore::open(&path).unwrap_err();
    assert!(twice.to_string().contains("in use by another coordinator"), "{twice}");
    // As when the process dies: nobody revokes anything.
    drop(store);
    tokio::task::yield_now().await;
    drop(lease);
    let store = reopen(&path).await;
    let entry = store.get("a").await.unwrap().unwrap();
    assert_eq!((entry.value.as_ref(), entry.mod_revision), (b"1".as_slice(), revision));
    assert_eq!(store.get("leased").await.unwrap(), None);
    assert!(store.commit(Transaction::new().put("b", "2")).await.unwrap() > revision);
}

/// The lease's task lets go of the file a moment after its handle is dropped.
async fn reopen(path: &std::path::Path) -> EmbeddedStore {
    loop {
        match EmbeddedStore::open(path) {
            Ok(store) => return store,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test]
async fn history_that_is_gone_is_said_to_be() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open_with_history(&directory.path().join("state.redb"), 5).unwrap();
    for n in 0..20 {
        store.commit(Transaction::new().put("k", n.to_string())).await.unwrap();
    }
    let Err(StoreError::Compacted { oldest }) = store.watch("k", 3).await.map(drop) else {
        panic!("history of revision 3 must be gone");
    };
    let mut watch = store.watch("k", oldest).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap()[0].revision(), oldest);
}

#[test]
fn a_damaged_file_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    std::fs::write(&path, "this is no database, and long enough to be looked at ".repeat(200)).unwrap();
    assert!(EmbeddedStore::open(&path).unwrap_err().to_string().contains("state.redb"));
}

mod model {
    use proptest::prelude::*;

    use super::*;

    /// Keys and what happens to them: `None` deletes.
    fn transactions() -> impl Strategy<Value = Vec<Vec<(u8, Option<u8>)>>> {
        let writes = proptest::collection::btree_map(0u8..6, prop::option::of(any::<u8>()), 1..4);
        proptest::collection::vec(writes.prop_map(|writes| writes.into_iter().collect()), 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_embedded_store_is_a_map(transactions in transactions()) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let subject = embedded().await;
                let mut model = BTreeMap::new();
                for writes in transactions {
                    let mut transaction = Transaction::new();
                    for (key, value) in writes {
                        let key = format!("k{key}");
                        match value {
                            Some(value) => {
                                transaction = transaction.put(&key, value.to_string());
                                model.insert(key, value.to_string());
                            }
                            None => {
                                transaction = transaction.delete(&key);
                                model.remove(&key);
                            }
                        }
                    }
                    subject.store.commit(transaction).await.unwrap();
                }
                let listing = subject.store.list("k").await.unwrap();
                let stored: BTreeMap<_, _> = listing
                    .entries
                    .into_iter()
                    .map(|entry| (entry.key, String::from_utf8(entry.value.to_vec()).unwrap()))
                    .collect();
                assert_eq!(stored, model);
            });
        }
    }
}
