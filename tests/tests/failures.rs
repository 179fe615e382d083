//! Requests for services that cannot serve are answered with the reason, well before their deadline.

use std::time::{Duration, Instant};

use pilotlight_tests::{
    cell::{Cell, Dev},
    eventually,
    http::Answer,
    manifest::{Iris, TWO_FLOWERS, to_zero},
};

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";
/// The service's own timeout, before which all answers come.
const TIMEOUT: Duration = Duration::from_secs(300);

fn service(command: &str) -> String {
    to_zero("iris", &[], &format!("    containers: [{{name: kserve-container, command: [sh, -c, '{command}']}}]\n"))
}

fn is_failure(answer: &Answer, reason: &str, texts: &[&str]) {
    assert_eq!(answer.status, 503, "{}", answer.body);
    let retry_after = answer.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap();
    assert!((1..=300).contains(&retry_after), "{retry_after}");
    for text in texts.iter().chain([&reason]) {
        assert!(answer.body.contains(text), "{text} in {}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_a_service_whose_process_ends_at_once_is_answered_with_the_reason() {
    let dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&service("echo no weights at /mnt; exit 3"), &[]).code, 0);
    let begun = Instant::now();
    let texts = ["exit code 3", "no weights at /mnt"];
    is_failure(&dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap(), "Error", &texts);
    is_failure(&dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap(), "Error", &texts);
    assert!(begun.elapsed() < TIMEOUT);

    // Nobody waits: the failed replica goes. A later request starts another one.
    let failed = dev.operator.replicas("iris");
    eventually("the failed replica is gone", || async { dev.operator.replicas("iris").is_empty().then_some(()) }).await;
    eventually("a request starts another replica", || async {
        is_failure(&dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap(), "Error", &texts);
        let replicas = dev.operator.replicas("iris");
        replicas.iter().any(|replica| failed.iter().all(|failed| failed["name"] != replica["name"])).then_some(())
    })
    .await;

    // What is applied next has no part in the failure.
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    eventually("the next revision serves", || async {
        (dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap().status == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_needs_a_start_is_answered_with_the_reason_while_etcd_is_away() {
    let mut cell = Cell::start(vec![]).await;
    let agent = cell.agent("a", 0).await;
    assert_eq!(cell.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    eventually("the gateway knows the service", || async {
        (agent.gateway.get(HOST, "/").await.unwrap().status != 404).then_some(())
    })
    .await;
    cell.operator.replicas_are("iris", 0, "").await;
    cell.kill_9_etcd();
    let begun = Instant::now();
    let answer = agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(begun.elapsed() < TIMEOUT);
    let reasons = ["StoreUnavailable", "CoordinatorUnavailable"];
    assert!(reasons.iter().any(|reason| answer.body.contains(reason)), "{}", answer.body);
}
