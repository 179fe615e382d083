//! One GPU, two services: the one of higher priority gets it when the other is idle.

use pilotlight_tests::{cell::Cell, eventually, manifest::Iris};

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_replica_makes_room_for_one_of_higher_priority() {
    let cell = Cell::start(vec![]).await;
    let _agent = cell.agent("gpu-1", 1).await;
    let low = Iris { name: "low", gpus: 1, min_replicas: 1, ..Iris::default() };
    let equal = Iris { name: "equal", ..low.clone() };
    let high = Iris { name: "high", annotations: vec![("pilotlight.dev/priority", "10")], ..low.clone() };
    assert_eq!(cell.operator.apply(&low.yaml(), &[]).code, 0);
    cell.operator.replicas_are("low", 1, "Ready").await;
    assert_eq!(cell.operator.apply(&equal.yaml(), &[]).code, 0);
    eventually("the equal one says why it has no place", || async {
        let described = cell.operator.must(&["describe", "isvc", "equal"]);
        described.contains("0/1 nodes fit: 1 with fewer than 1 free GPUs").then_some(())
    })
    .await;
    cell.operator.replicas_are("low", 1, "Ready").await;

    assert_eq!(cell.operator.apply(&high.yaml(), &[]).code, 0);
    cell.operator.replicas_are("high", 1, "Ready").await;
    let described = cell.operator.must(&["describe", "isvc", "low"]);
    assert!(described.contains("Preempted"), "{described}");
    assert!(described.contains("default/high-predictor-00001 of higher priority needs its place"), "{described}");
    assert!(cell.operator.replicas("low").is_empty() && cell.operator.replicas("equal").is_empty());

    let wrong = Iris { annotations: vec![("pilotlight.dev/priority", "high")], ..low };
    let refused = cell.operator.apply(&wrong.yaml(), &[]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("must be an integer") || refused.out.contains("must be an integer"), "{refused:?}");
}
