//! What a cell stores is saved and restored.

use pilotlight_tests::{
    cell::Dev,
    cluster::Cluster,
    manifest::Iris,
    process::{output, pilotlight},
};

fn snapshot(args: &[&str]) -> (bool, String) {
    let output = output(pilotlight(), [&["snapshot"], args].concat());
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.success(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_on_etcd_comes_back_from_a_snapshot_with_the_same_authority() {
    let mut cluster = Cluster::start(1, 1).await;
    let _agent = cluster.agent("a", 1).await;
    assert_eq!(cluster.operator.apply(&Iris { min_replicas: 1, ..Iris::default() }.yaml(), &[]).code, 0);
    let before = cluster.operator.replicas_are("iris", 1, "Ready").await;
    let file = cluster.directory().join("cell.snapshot").display().to_string();
    let etcd = format!("--etcd-endpoints={}", cluster.etcd_url(0));
    let (saved, text) = snapshot(&["save", &file, &etcd]);
    assert!(saved && text.contains("services: 1"), "{text}");
    let (again, text) = snapshot(&["save", &file, &etcd]);
    assert!(!again && text.contains("exists"), "a snapshot is not overwritten: {text}");

    let (restored, text) = snapshot(&["restore", &file, &etcd, "--force"]);
    assert!(!restored && text.contains("a coordinator leads this cell"), "{text}");
    assert!(cluster.coordinators[0].terminate());
    let (restored, text) = snapshot(&["restore", &file, &etcd]);
    assert!(!restored && text.contains("--force"), "{text}");
    assert!(snapshot(&["restore", &file, &etcd, "--force"]).0);
    cluster.start_coordinator(0);
    cluster.ready(0).await;
    let after = cluster.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!((&after[0]["name"], &after[0]["pid"]), (&before[0]["name"], &before[0]["pid"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_coordinator_saves_a_snapshot_of_its_store() {
    let mut dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    let file = dev.data().join("cell.snapshot").display().to_string();
    let saved = dev.operator.must(&["snapshot", "save", &file]);
    assert!(saved.contains("services: 1") && saved.contains("store format version: 1"), "{saved}");
    let again = dev.operator.run(&["snapshot", "save", &file]);
    assert!(again.code == 1 && again.err.contains("exists already"), "{again:?}");
    assert!(snapshot(&["inspect", &file]).1.contains("services: 1"));

    dev.operator.must(&["delete", "isvc", "iris"]);
    dev.terminate();
    let place = format!("--data-dir={}", dev.data().join("coordinator").display());
    assert!(snapshot(&["restore", &file, &place, "--force"]).0);
    dev.restart().await;
    assert!(dev.operator.must(&["get", "isvc"]).contains("iris"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_store_that_was_truncated_is_refused_and_restored() {
    let mut dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    let data = dev.data().join("coordinator");
    let (file, place) = (dev.data().join("cell.snapshot"), format!("--data-dir={}", data.display()));
    let file = file.display().to_string();
    let (saved, text) = snapshot(&["save", &file, &place]);
    assert!(!saved && text.contains("in use"), "{text}");
    dev.terminate();
    assert!(snapshot(&["save", &file, &place]).0);
    assert!(snapshot(&["inspect", &file]).1.contains("services: 1"));

    std::fs::write(data.join("state.redb"), "").unwrap();
    let refused = output(pilotlight(), ["dev", &format!("--data-dir={}", dev.data().display())]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("snapshot"), "{text}");
    assert!(snapshot(&["restore", &file, &place, "--force"]).0);
    dev.restart().await;
    assert!(dev.operator.must(&["get", "isvc"]).contains("iris"));
}
