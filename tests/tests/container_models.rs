//! Containers and their models from an S3 store: from zero, warmed, asleep and awake, and over an agent's
//! crash at any moment. Left out, with a message, where no Docker Engine answers.

use pilotlight_tests::{
    container::docker,
    eventually,
    store::{Disk, Service, Store, uri},
};

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_wakes_with_its_model_and_sleeps_with_it() {
    let Some(store) = Store::start().await else { return };
    let files = store.put("flowers", 3, MIB + 7);
    let dev = store.dev(&["--simulate-gpus=1"]).await;
    let (operator, service, disk) = (&dev.operator, Service::of("flowers"), Disk::of(&dev));
    service.apply(operator);
    assert_eq!((service.containers().len(), store.s3.ranges()), (0, 0), "born at zero");

    service.serves(&dev.gateway, &files).await;
    assert_eq!(store.s3.ranges(), 3);
    disk.has_whole(1);
    assert_eq!(operator.replicas_are(&service.name, 1, "Ready").await[0]["rungBefore"], "Absent");
    let written = service.get(&dev.gateway, "write").await;
    assert_eq!(written, format!("{:?}", [Err::<(), _>(std::io::ErrorKind::ReadOnlyFilesystem); 3]));
    service.serves(&dev.gateway, &files).await;

    let container = service.asleep(operator).await;
    service.serves(&dev.gateway, &files).await;
    assert_eq!(service.containers(), std::slice::from_ref(&container), "it was woken, not started again");
    assert_eq!(operator.replicas_are(&service.name, 1, "Ready").await[0]["rungBefore"], "Asleep");
    assert_eq!(service.asleep(operator).await, container);
    assert_eq!(store.s3.ranges(), 3, "nothing was fetched again");

    // Who sleeps leaves, and takes its time to.
    operator.must(&["cache", "evict", &uri("flowers")]);
    operator.replicas_are(&service.name, 0, "").await;
    assert!(service.containers().is_empty());
    disk.has_whole(0);
    service.serves(&dev.gateway, &files).await;
    assert_eq!(store.s3.ranges(), 6, "from nothing once more");
    service.delete(operator).await;
    disk.has_whole(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_whose_model_is_warm_fetches_nothing() {
    let Some(store) = Store::start().await else { return };
    let files = store.put("warm", 2, MIB);
    let dev = store.dev(&["--simulate-gpus=1"]).await;
    let (operator, service) = (&dev.operator, Service::of("warm"));
    operator.must(&["cache", "warm", &service.uri, "--rung", "staged"]);
    eventually("it is staged", || async {
        let list = operator.json(&["cache", "ls"]);
        (list["items"][0]["rung"] == "Staged").then_some(())
    })
    .await;
    assert_eq!(store.s3.ranges(), 2);
    service.apply(operator);
    service.serves(&dev.gateway, &files).await;
    assert_eq!(operator.replicas_are(&service.name, 1, "Ready").await[0]["rungBefore"], "Staged");
    assert_eq!(store.s3.ranges(), 2, "all of it was here");
    service.delete(operator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_in_the_middle_of_a_download_goes_on_where_it_was() {
    const FILES: usize = 40;
    let Some(store) = Store::start().await else { return };
    let mut dev = store.dev(&["--simulate-gpus=1"]).await;
    let disk = Disk::of(&dev);
    // Before anything is said, while it is listed, and with a part of it here: sixteen at most are on their way.
    for (model, bytes, least) in
        [("none", 0, 0), ("listed", 20 << 10, 0), ("half", 20 * MIB, 4), ("most", 38 * MIB, 20)]
    {
        let files = store.put(model, FILES, MIB);
        let service = Service::up(model);
        store.relay.hold_after(bytes as u64);
        service.apply(&dev.operator);
        store.relay.holds().await;
        eventually("what is here is noted", || async { (disk.noted() >= least).then_some(()) }).await;
        dev.kill_9();
        disk_has_nothing(&disk, model);
        assert!(service.containers().is_empty(), "{model}");
        let (noted, before) = (disk.noted(), store.settled_ranges().await);
        store.relay.release();
        dev.restart().await;
        dev.operator.replicas_are(&service.name, 1, "Ready").await;
        assert_eq!(store.s3.ranges() - before, (FILES - noted) as u64, "{model}: what was here is not read again");
        assert_eq!(service.containers().len(), 1, "{model}");
        service.serves(&dev.gateway, &files).await;
        disk.has_whole(1);
        service.delete(&dev.operator).await;
        dev.operator.must(&["cache", "evict", &service.uri]);
        disk.has_whole(0);
    }
}

/// Of the model that is on its way nothing is seen.
fn disk_has_nothing(disk: &Disk, model: &str) {
    assert!(disk.names("trees").is_empty() && disk.names("blobs").is_empty(), "{model}: a half model is not seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_in_the_middle_of_a_start_has_one_container_and_no_second_download() {
    let Some(store) = Store::start().await else { return };
    let mut dev = store.dev(&["--simulate-gpus=1"]).await;
    let disk = Disk::of(&dev);
    for moment in ["published", "created", "running", "ready"] {
        let files = store.put(moment, 4, MIB);
        let before = store.s3.ranges();
        let service = Service { args: vec!["files", "2"], ..Service::up(moment) };
        service.apply(&dev.operator);
        eventually(moment, || async {
            let [container] = &service.containers()[..] else {
                return (moment == "published" && !disk.names("trees").is_empty()).then_some(());
            };
            let state = || docker(&["inspect", "--format", "{{.State.Status}}", container]).1;
            let phase = || dev.operator.replicas(&service.name)[0]["phase"].clone();
            match moment {
                "running" => state().trim() == "running" && phase() == "Starting",
                "ready" => phase() == "Ready",
                _ => true,
            }
            .then_some(())
        })
        .await;
        dev.kill_9();
        dev.restart().await;
        dev.operator.replicas_are(&service.name, 1, "Ready").await;
        assert_eq!(service.containers().len(), 1, "{moment}");
        service.serves(&dev.gateway, &files).await;
        assert_eq!(store.s3.ranges() - before, 4, "{moment}");
        disk.has_whole(1);
        service.delete(&dev.operator).await;
        dev.operator.must(&["cache", "evict", &service.uri]);
        disk.has_whole(0);
    }
}
