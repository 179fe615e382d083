//! Containers and the node's disk: models that do not fit together into the cache's budget, a full disk, and
//! models and containers that cannot be had. Left out, with a message, where no Docker Engine answers.

use pilotlight_tests::{
    container::{image, left_out},
    disk::SmallDisk,
    eventually,
    store::{Disk, Files, Service, Store, uri},
};

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn models_that_do_not_fit_together_take_turns_on_the_disk() {
    let Some(store) = Store::start().await else { return };
    let dev = store.dev(&["--simulate-gpus=4", "--cache-budget=14MiB"]).await;
    let (operator, disk) = (&dev.operator, Disk::of(&dev));
    let watch = disk.watch();
    store.put("pinned", 1, 3 * MIB);
    operator.must(&["cache", "warm", &uri("pinned")]);
    operator.must(&["cache", "pin", &uri("pinned")]);
    let of = |model: &str, args| (Service { args, ..Service::of(model) }, store.put(model, 5, MIB));
    // One that takes its time to start is dear to whoever has to start it again.
    let models = [of("cheap", vec!["files"]), of("dear", vec!["files", "4"]), of("next", vec!["files"])];
    let [(cheap, cheap_files), (dear, dear_files), (next, next_files)] = &models;
    models.iter().for_each(|(service, _)| service.apply(operator));
    cheap.serves(&dev.gateway, cheap_files).await;
    dear.serves(&dev.gateway, dear_files).await;
    cheap.asleep(operator).await;
    let container = dear.asleep(operator).await;
    disk.has_whole(3);

    // The one that is worth least makes room, with its container; nobody else does.
    next.serves(&dev.gateway, next_files).await;
    operator.replicas_are(&cheap.name, 0, "").await;
    assert!(cheap.containers().is_empty());
    assert_eq!(on_disk(&dev, &models), ["dear", "next", "pinned"]);
    assert_eq!(dear.asleep(operator).await, container);
    next.asleep(operator).await;

    // And back, from nothing, while the dear one sleeps on.
    let ranges = store.s3.ranges();
    cheap.serves(&dev.gateway, cheap_files).await;
    assert_eq!(store.s3.ranges(), ranges + 5);
    operator.replicas_are(&next.name, 0, "").await;
    assert!(next.containers().is_empty());
    assert_eq!(on_disk(&dev, &models), ["cheap", "dear", "pinned"]);
    dear.serves(&dev.gateway, dear_files).await;
    assert_eq!((dear.containers(), store.s3.ranges()), (vec![container], ranges + 5));
    disk.has_whole(3);
    assert!(watch.most() > 12 << 20 && watch.most() <= 14 << 20, "{} bytes", watch.most());
    for (service, _) in &models {
        service.delete(operator).await;
    }
    disk.has_whole(3);
}

/// Models on the disk, in order; those of services are in use exactly where they have a container.
fn on_disk(dev: &pilotlight_tests::cell::Dev, models: &[(Service, Files)]) -> Vec<String> {
    let list = dev.operator.json(&["cache", "ls"]);
    let mut names = Vec::new();
    for model in list["items"].as_array().into_iter().flatten() {
        let name = model["uri"].as_str().unwrap_or_default().trim_start_matches("s3://models/").to_owned();
        let service = models.iter().find(|(service, _)| service.uri == uri(&name));
        let has = service.is_some_and(|(service, _)| !service.containers().is_empty());
        assert_eq!(model["inUse"], has, "{list}");
        names.push(name);
    }
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_fit_displaces_nobody() {
    let Some(store) = Store::start().await else { return };
    let dev = store.dev(&["--simulate-gpus=4", "--cache-budget=14MiB"]).await;
    let (operator, disk) = (&dev.operator, Disk::of(&dev));
    store.put("kept", 1, 3 * MIB);
    operator.must(&["cache", "warm", &uri("kept")]);
    operator.must(&["cache", "pin", &uri("kept")]);
    let (slept, files) = (Service::of("slept"), store.put("slept", 5, MIB));
    let (served, _) = (Service::up("served"), store.put("served", 2, MIB));
    slept.apply(operator);
    served.apply(operator);
    slept.serves(&dev.gateway, &files).await;
    operator.replicas_are(&served.name, 1, "Ready").await;
    let container = slept.asleep(operator).await;
    let ranges = store.s3.ranges();

    // More than there is; more than there is beside what is pinned; and beside what serves.
    for (model, files) in [("larger", 20), ("large", 12), ("beside", 10)] {
        store.put(model, files, MIB);
        let service = Service::up(model);
        service.apply(operator);
        for (restarts, pause) in [(2, "10s"), (3, "20s")] {
            let replica = service.fails(operator, "CacheFull", &format!("started again in {pause}")).await;
            assert_eq!(replica["restarts"], restarts, "{replica}");
            let said = replica["message"].as_str().unwrap();
            let bytes = files * MIB;
            assert!(said.contains(&format!("{bytes} bytes")) && said.contains("a budget of 14680064"), "{said}");
        }
        assert_eq!(slept.containers(), std::slice::from_ref(&container), "{model}: nobody leaves in vain");
        disk.has_whole(3);
        service.delete(operator).await;
    }
    assert_eq!(store.s3.ranges(), ranges, "nothing was fetched that cannot stay");
    slept.serves(&dev.gateway, &files).await;
    assert_eq!(slept.containers(), [container]);
    for service in [slept, served] {
        service.delete(operator).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_is_said_and_tried_again_with_growing_pauses() {
    let Some(store) = Store::start().await else { return };
    let dev = store.dev(&["--simulate-gpus=4"]).await;
    let (operator, disk) = (&dev.operator, Disk::of(&dev));
    let nowhere = Service { uri: "s3://nowhere/m".to_owned(), ..Service::up("nowhere") };
    store.s3.upload("models", "rotten/000.bin", b"weights").await;
    // Bits rot behind the server's back.
    store.s3.put("models", "rotten/000.bin", b"weighs!");
    let rotten = Service::up("rotten");
    store.put("ends", 2, MIB);
    let ends = Service { args: vec!["exit", "7"], ..Service::up("ends") };
    let cases = [
        (&nowhere, "ModelNotFound", "s3://nowhere/m: not found: the bucket is not there"),
        (&rotten, "ModelChecksumMismatch", "000.bin: MD5 is "),
        (&ends, "CrashLoopBackOff", "the process ended with exit code 7"),
    ];
    for (service, ..) in cases {
        service.apply(operator);
    }
    for (restarts, pause) in [(2, "10s"), (3, "20s")] {
        for (service, reason, said) in cases {
            let replica = service.fails(operator, reason, &format!("started again in {pause}")).await;
            assert_eq!(replica["restarts"], restarts, "{replica}");
            assert!(replica["message"].as_str().unwrap().contains(said), "{replica}");
        }
    }
    assert_eq!(disk.names("trees").len(), 1, "of the one that is whole");
    disk.has_whole(1);
    assert_eq!(store.s3.ranges(), 2 + 3, "what is whole is not fetched again");
    assert!(nowhere.containers().is_empty() && rotten.containers().is_empty());

    // What was missing comes to be there.
    store.s3.upload("nowhere", "m/000.bin", b"found").await;
    store.s3.put("models", "rotten/000.bin", b"weights");
    for (service, content) in [(&nowhere, "found"), (&rotten, "weights")] {
        operator.replicas_are(&service.name, 1, "Ready").await;
        assert_eq!(service.get(&dev.gateway, "000.bin").await, content);
    }
    for (service, ..) in cases {
        service.delete(operator).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_nothing_else_suffers() {
    if image().is_none() {
        return;
    }
    let small = match SmallDisk::mount("64m") {
        Ok(small) => small,
        Err(reason) => return left_out(&reason, "a full disk"),
    };
    let Some(store) = Store::start().await else { return };
    let dev = store.dev_in(tempfile::tempdir_in(small.path()).unwrap(), &["--simulate-gpus=2"]).await;
    let (operator, disk) = (&dev.operator, Disk::of(&dev));
    let (serves, files) = (Service::up("serves"), store.put("serves", 2, MIB));
    serves.apply(operator);
    serves.serves(&dev.gateway, &files).await;

    // More than the disk has room for.
    store.put("huge", 80, MIB);
    let huge = Service::up("huge");
    huge.apply(operator);
    for (restarts, pause) in [(2, "10s"), (3, "20s")] {
        let replica = huge.fails(operator, "DiskFull", &format!("started again in {pause}")).await;
        assert_eq!(replica["restarts"], restarts, "{replica}");
    }
    assert!(huge.containers().is_empty());
    disk.has_whole(1);
    serves.serves(&dev.gateway, &files).await;
    huge.delete(operator).await;

    // Something else takes the room meanwhile.
    let (late, late_files) = (Service::up("late"), store.put("late", 20, MIB));
    store.relay.hold_after(8 << 20);
    late.apply(operator);
    store.relay.holds().await;
    let filler = small.path().join("filler");
    let _ = std::fs::write(&filler, vec![0; 64 * MIB]);
    store.relay.release();
    late.fails(operator, "DiskFull", "s3://models/late: the node's disk: ").await;
    assert!(late.containers().is_empty());
    serves.serves(&dev.gateway, &files).await;
    std::fs::remove_file(filler).unwrap();
    operator.replicas_are(&late.name, 1, "Ready").await;
    late.serves(&dev.gateway, &late_files).await;
    eventually("nothing is left over", || async { disk.names("partial").is_empty().then_some(()) }).await;
    for service in [serves, late] {
        service.delete(operator).await;
    }
    disk.has_whole(2);
}
