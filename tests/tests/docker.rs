//! Services whose replicas are containers. Left out, with a message, where no Docker Engine answers.

use std::time::Duration;

use pilotlight_tests::{
    cell::Dev,
    container::{IMAGE, docker, image, labelled},
    eventually,
    manifest::to_zero,
};
use serde_json::Value;

/// A service of the image, with further fields of its container.
fn manifest(name: &str, min_replicas: u32, container: &str) -> String {
    let predictor = format!(
        "    minReplicas: {min_replicas}\n    maxReplicas: 1\n    containers:\n      - name: kserve-container\n        {container}\n"
    );
    to_zero(name, &[], &predictor)
}

/// Another name for each run: containers are the whole machine's.
fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

fn containers(service: &str) -> Vec<String> {
    labelled(&format!("pilotlight.dev/service={service}"))
}

fn replica(dev: &Dev, service: &str) -> Value {
    dev.operator.replicas(service).into_iter().next().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_wakes_for_a_request_and_goes() {
    if image().is_none() {
        return;
    }
    let dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let name = unique("wakes");
    let args =
        format!("image: {IMAGE}\n        args: [hello, $(GREETING)]\n        env: [{{name: GREETING, value: you}}]");
    let applied = dev.operator.apply(&manifest(&name, 0, &args), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    assert!(containers(&name).is_empty(), "born at zero");

    let answer = dev.gateway.get(&format!("{name}.default.localhost"), "/").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.body.starts_with("args=hello you\n"), "{}", answer.body);
    assert_eq!(containers(&name).len(), 1);
    assert!(dev.operator.must(&["logs", &name]).contains("listening"));

    dev.operator.replicas_are(&name, 1, "Asleep").await;
    let container = containers(&name);
    assert_eq!(docker(&["inspect", "--format", "{{.State.Status}}", &container[0]]).1.trim(), "paused");
    let answer = dev.gateway.get(&format!("{name}.default.localhost"), "/").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(containers(&name), container, "it was woken, not started again");

    dev.operator.replicas_are(&name, 1, "Asleep").await;
    dev.operator.must(&["delete", "isvc", &name]);
    dev.operator.replicas_are(&name, 0, "").await;
    assert!(containers(&name).is_empty(), "nothing is left of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_sleeps_outlives_its_agent() {
    if image().is_none() {
        return;
    }
    let mut dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let name = unique("sleeps");
    let host = format!("{name}.default.localhost");
    assert_eq!(dev.operator.apply(&manifest(&name, 0, &format!("image: {IMAGE}")), &[]).code, 0);
    assert_eq!(dev.gateway.get(&host, "/").await.unwrap().status, 200);
    dev.operator.replicas_are(&name, 1, "Asleep").await;
    let container = containers(&name);
    dev.kill_9();
    dev.restart().await;
    eventually("it is adopted, and still sleeps", || async {
        let replica = replica(&dev, &name);
        (replica["adopted"] == true && replica["phase"] == "Asleep").then_some(())
    })
    .await;
    assert_eq!(dev.gateway.get(&host, "/").await.unwrap().status, 200);
    assert_eq!(containers(&name), container);
    dev.operator.must(&["delete", "isvc", &name]);
    eventually("its container is gone", || async { containers(&name).is_empty().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_at_any_time_of_a_start_leaks_nothing() {
    if image().is_none() {
        return;
    }
    let mut dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let name = unique("killed");
    for delay in [0, 30, 80, 150, 300, 600] {
        let applied = dev.operator.apply(&manifest(&name, 1, &format!("image: {IMAGE}")), &[]);
        assert_eq!(applied.code, 0, "{}", applied.err);
        tokio::time::sleep(Duration::from_millis(delay)).await;
        dev.kill_9();
        dev.restart().await;
        dev.operator.replicas_are(&name, 1, "Ready").await;
        assert_eq!(containers(&name).len(), 1, "killed after {delay} ms");
        let answer = dev.gateway.get(&format!("{name}.default.localhost"), "/").await.unwrap();
        assert_eq!(answer.status, 200, "killed after {delay} ms: {}", answer.body);
        dev.operator.must(&["delete", "isvc", &name]);
        dev.operator.replicas_are(&name, 0, "").await;
        eventually("its container is gone", || async { containers(&name).is_empty().then_some(()) }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transformer_in_a_container_finds_its_predictor() {
    if image().is_none() {
        return;
    }
    let mut dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let name = unique("chain");
    let predictor = manifest(&name, 0, &format!("image: {IMAGE}\n        args: [predictor]"));
    let transformer = format!(
        "  transformer:\n    minReplicas: 0\n    containers: [{{name: t, image: \"{IMAGE}\", args: [relay]}}]\n"
    );
    let applied = dev.operator.apply(&(predictor.trim_end().to_owned() + "\n" + &transformer), &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let host = format!("{name}.default.localhost");
    let answer = dev.gateway.get(&host, "/").await.unwrap();
    assert!(answer.body.starts_with("args=predictor\n"), "{}", answer.body);
    assert_eq!(containers(&name).len(), 2);

    // The way back outlives the agent, as its containers do.
    dev.kill_9();
    dev.restart().await;
    let answer = dev.gateway.get(&host, "/").await.unwrap();
    assert!(answer.body.starts_with("args=predictor\n"), "{}", answer.body);
    dev.operator.must(&["delete", "isvc", &name]);
    eventually("its containers are gone", || async { containers(&name).is_empty().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_why() {
    if image().is_none() {
        return;
    }
    let dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let limit = "resources: {limits: {memory: 64Mi}}";
    let cases = [
        ("absent", "image: registry.invalid/none:1".to_owned(), "ErrImagePull", "registry.invalid/none"),
        ("never", "image: none:1\n        imagePullPolicy: Never".to_owned(), "ErrImageNeverPull", "none:1"),
        ("ends", format!("image: {IMAGE}\n        args: [exit, '7']"), "Error", "exit code 7"),
        ("eats", format!("image: {IMAGE}\n        args: [eat]\n        {limit}"), "OOMKilled", "memory"),
    ];
    for (name, container, reason, said) in cases {
        let name = unique(name);
        let applied = dev.operator.apply(&manifest(&name, 1, &container), &[]);
        assert_eq!(applied.code, 0, "{}", applied.err);
        eventually(&format!("{name} says {said}"), || async {
            let service = dev.operator.json(&["get", "isvc", &name]);
            let why = service["status"]["conditions"].to_string() + &replica(&dev, &name).to_string();
            // The reason itself, or the name of the pause that follows it.
            let named = [reason, "ImagePullBackOff", "CrashLoopBackOff"].iter().any(|reason| why.contains(reason));
            (why.contains(said) && named).then_some(())
        })
        .await;
        dev.operator.must(&["delete", "isvc", &name]);
        eventually("its container is gone", || async { containers(&name).is_empty().then_some(()) }).await;
    }
}
