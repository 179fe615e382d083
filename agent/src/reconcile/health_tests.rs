//! When a container is restarted, on a paused clock: with [`super::tests`]' runtime that starts nothing.

use std::{net::Ipv4Addr, time::Duration};

use pilotlight_proto::fleet::v1::{self as fleet, ContainerSpec};
use tokio::{net::TcpListener, time::Instant};

use super::{
    tests::{GRACE, Node, closed_port, listens},
    *,
};
use crate::runtime::GpuAccess;

#[tokio::test(start_paused = true)]
async fn a_container_whose_liveness_probe_fails_is_restarted() {
    let node = Node::empty().await;
    let alive = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let liveness_probe = listens(alive.local_addr().unwrap().port());
    node.assign_container(1, &[("a", false)], ContainerSpec { liveness_probe, ..Default::default() });
    node.phases(&[ReplicaPhase::Ready]).await;
    tokio::time::sleep(Duration::from_secs(95)).await;
    let dead = Instant::now();
    assert!(node.stops(dead).is_empty(), "it lives");

    drop(alive);
    let said = node.unhealthy().await;
    assert!(said.starts_with("liveness probe failed 3 times in a row: "), "{said}");
    // Asked at 100, 110 and 120 s.
    node.restarted(1).await;
    assert_eq!(node.stops(dead), [("a".to_owned(), Duration::from_secs(25), Duration::from_secs(2))]);
    // It is started again at once, and after the second time a little later.
    node.phases(&[ReplicaPhase::Ready]).await;
    assert_eq!(node.restarted(2).await.reason, "CrashLoopBackOff");
}

#[tokio::test(start_paused = true)]
async fn until_the_startup_probe_has_passed_nothing_else_is_asked() {
    let node = Node::empty().await;
    let (port, never) = (closed_port().await, closed_port().await);
    let startup_probe = listens(port).map(|probe| fleet::Probe { failure_threshold: 100, ..probe });
    let container = ContainerSpec { startup_probe, liveness_probe: listens(never), ..Default::default() };
    node.assign_container(1, &[("a", false)], container);
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(500)).await;
    node.phases(&[ReplicaPhase::Starting]).await;
    assert!(node.stops(began).is_empty(), "the liveness probe would have failed long ago");

    let _started = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    node.phases(&[ReplicaPhase::Ready]).await;
    let said = node.unhealthy().await;
    assert!(said.starts_with("liveness probe failed"), "{said}");
    assert!(began.elapsed() >= Duration::from_secs(520), "asked at 500, 510 and 520 s");
}

#[tokio::test(start_paused = true)]
async fn a_container_that_does_not_start_in_time_is_restarted() {
    let node = Node::empty().await;
    let startup_probe = listens(closed_port().await);
    node.assign_container(1, &[("a", false)], ContainerSpec { startup_probe, ..Default::default() });
    let began = Instant::now();
    let said = node.unhealthy().await;
    assert!(said.starts_with("startup probe failed 3 times"), "{said}");
    assert_eq!(began.elapsed(), Duration::from_secs(20), "asked at 0, 10 and 20 s");
}

#[tokio::test(start_paused = true)]
async fn a_container_that_has_lost_its_gpus_is_restarted() {
    let node = Node::empty().await;
    *node.fake.gpu_access.lock().unwrap() = GpuAccess::Usable;
    node.assign_container(1, &[("a", false)], ContainerSpec::default());
    node.phases(&[ReplicaPhase::Ready]).await;
    let ready = Instant::now();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(node.stops(ready).is_empty(), "it has them");

    let denied = "nvidia-smi: exit code 255: Failed to initialize NVML: Unknown Error";
    *node.fake.gpu_access.lock().unwrap() = GpuAccess::Denied(denied.to_owned());
    let mut statuses = node.reconciler.statuses();
    let restarting = |all: &ReplicaStatuses| all.replicas[0].reason == "GpuAccessLost";
    let status = statuses.wait_for(restarting).await.unwrap().replicas[0].clone();
    assert_eq!(status.message, format!("the container has lost access to its GPUs: {denied}"));
    *node.fake.gpu_access.lock().unwrap() = GpuAccess::Usable;
    let failed = node.restarted(1).await;
    assert!(!failed.failure_permanent, "requests wait for it");
    // Asked at 605 s and at 610 s.
    assert_eq!(node.stops(ready), [("a".to_owned(), Duration::from_secs(610), GRACE)]);
    node.phases(&[ReplicaPhase::Ready]).await;
}
