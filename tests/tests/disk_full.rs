//! The disk of the embedded store is full for a while.
#![allow(clippy::print_stderr, reason = "says why the story is left out")]

use std::process::Command;

use pilotlight_tests::{
    cell::Dev,
    disk::SmallDisk,
    eventually,
    http::Gateway,
    manifest::{Iris, TWO_FLOWERS},
    steady::SteadyLoad,
};

async fn readiness(status: &Gateway) -> Option<(u16, String)> {
    let answer = status.get("localhost", "/readyz").await.ok()?;
    Some((answer.status.as_u16(), answer.body))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_no_warm_service_and_writes_work_once_there_is_room() {
    let disk = match SmallDisk::mount("16m") {
        Ok(disk) => disk,
        Err(reason) => return eprintln!("left out: {reason}"),
    };
    let dev = Dev::start_in(tempfile::tempdir_in(disk.path()).unwrap(), &[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris { min_replicas: 1, ..Iris::default() }.yaml(), &[]).code, 0);
    dev.operator.replicas_are("iris", 1, "Ready").await;
    eventually("the gateway serves", || async {
        let answer = dev.gateway.post("iris.default.localhost", "/v1/models/iris:predict", TWO_FLOWERS).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
    let load = SteadyLoad::start(vec![dev.gateway.clone()], "iris.default.localhost", "/v1/models/iris:predict");
    let status = Gateway::at(dev.http);
    assert_eq!(readiness(&status).await.unwrap().0, 200);

    // `dd` ends once nothing more fits.
    let filler = disk.path().join("filler");
    let _ = Command::new("dd").arg("if=/dev/zero").arg(format!("of={}", filler.display())).arg("bs=4096").output();
    let mut refused = None;
    for size in 0..200 {
        let other = Iris { name: "other", max_replicas: 2 + size, ..Iris::default() };
        let applied = dev.operator.apply(&other.yaml(), &[]);
        if applied.code != 0 {
            refused = Some(applied.err);
            break;
        }
    }
    let refused = refused.expect("a write fails on a full disk");
    assert!(refused.contains("store unavailable"), "{refused}");
    eventually("/readyz says so", || async {
        let (code, body) = readiness(&status).await?;
        (code == 503 && body.contains("not ready")).then_some(())
    })
    .await;
    assert!(dev.operator.must(&["get", "isvc"]).contains("iris"), "reads still work");

    std::fs::remove_file(&filler).unwrap();
    eventually("a write succeeds", || async {
        (dev.operator.apply(&Iris { name: "later", ..Iris::default() }.yaml(), &[]).code == 0).then_some(())
    })
    .await;
    eventually("/readyz is 200 again", || async { (readiness(&status).await?.0 == 200).then_some(()) }).await;
    load.stop().await.assert_all_answered("while the disk is full");
}
