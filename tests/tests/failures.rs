//! Requests for services that cannot serve are answered with the reason, well before their deadline.

use std::time::{Duration, Instant};

use pilotlight_tests::{
    cell::{Cell, Dev},
    eventually,
    http::Answer,
    manifest::{Iris, TWO_FLOWERS, to_zero},
    process::pilotlight,
};

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";
/// The service's own timeout, before which all answers come.
const TIMEOUT: Duration = Duration::from_secs(300);

fn service(command: &str) -> String {
    let container = format!(
        "    minReplicas: 0\n    containers:\n    - name: kserve-container\n      command: [sh, -c, '{command}']\n      \
         readinessProbe: {{httpGet: {{path: /v1/models/iris, port: 8080}}}}\n      ports: [{{containerPort: 8080}}]\n"
    );
    to_zero("iris", &[], &container)
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

    // What is applied next has no part in the failure.
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    eventually("the next revision serves", || async {
        (dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap().status == 200).then_some(())
    })
    .await;
    eventually("the replaced revision, which has never served, gives up its replica", || async {
        let replicas = dev.operator.replicas("iris");
        let of_newest = |replica: &serde_json::Value| replica["name"].as_str().unwrap().contains("-00002-");
        replicas.iter().all(of_newest).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_has_failed_serves_again_once_the_cause_is_cured() {
    let dev = Dev::start(&[], vec![]).await;
    let works = dev.data().join("works");
    std::fs::write(&works, "").unwrap();
    let server = format!("[ -e {} ] && exec {} example-server iris; exit 3", works.display(), pilotlight().display());
    assert_eq!(dev.operator.apply(&service(&server), &[]).code, 0);
    let answer = dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);

    // Its process ends in its sleep, and cannot be started again.
    let asleep = dev.operator.replicas_are("iris", 1, "Asleep").await;
    std::fs::remove_file(&works).unwrap();
    let group = nix::unistd::Pid::from_raw(-i32::try_from(asleep[0]["pid"].as_i64().unwrap()).unwrap());
    nix::sys::signal::kill(group, nix::sys::signal::Signal::SIGKILL).unwrap();
    eventually("the failed replica is gone", || async { dev.operator.replicas("iris").is_empty().then_some(()) }).await;

    let answer = dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    is_failure(&answer, "Error", &["exit code 3"]);

    // Once the cause is cured, the next attempt succeeds.
    std::fs::write(&works, "").unwrap();
    eventually("the service serves again", || async {
        (dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap().status == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_needs_a_start_is_answered_with_the_reason_while_etcd_is_away() {
    let mut cell = Cell::start(vec![]).await;
    let agent = cell.agent("a", 0).await;
    assert_eq!(cell.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    assert_eq!(agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
    cell.operator.replicas_are("iris", 1, "Asleep").await;
    cell.kill_9_etcd();
    let begun = Instant::now();
    let answer = agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(begun.elapsed() < TIMEOUT);
    let reasons = ["StoreUnavailable", "CoordinatorUnavailable"];
    assert!(reasons.iter().any(|reason| answer.body.contains(reason)), "{}", answer.body);
}
