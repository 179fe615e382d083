//! Manifests that are made to take long: nobody but their sender notices.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use pilotlight_tests::{cluster::Cluster, manifest::Iris, steady::SteadyLoad};

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

/// Manifests of up to 600 KB that nest, multiply or repeat something.
fn bombs() -> Vec<String> {
    let line = |n: usize, of: &str| format!("a{n}: &a{n} [{}]\n", [of].repeat(9).join(","));
    let aliases = (1..9).fold(line(0, "x"), |text, n| text + &line(n, &format!("*a{}", n - 1)));
    vec![
        "[".repeat(195_000),
        "{\"a\":".repeat(58_000),
        "- ".repeat(200_000),
        format!("{aliases}pad: [{}]\n", "1,".repeat(100_000)),
        "---\na: 1\n".repeat(50_000),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_bombs_break_no_session_and_delay_no_request() {
    let cluster = Cluster::start(1, 1).await;
    let agents = [cluster.agent("a", 1).await, cluster.agent("b", 1).await];
    assert_eq!(cluster.operator.apply(&Iris { min_replicas: 1, ..Iris::default() }.yaml(), &[]).code, 0);
    let before = cluster.operator.replicas_are("iris", 1, "Ready").await;
    let gateways = agents.iter().map(|agent| agent.gateway.clone()).collect();
    let load = SteadyLoad::start(gateways, HOST, PREDICT);

    let (done, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let senders: Vec<_> = bombs()
        .into_iter()
        .map(|bomb| {
            let (operator, done, refused) = (cluster.operator.clone(), Arc::clone(&done), Arc::clone(&refused));
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_ne!(operator.apply(&bomb, &[]).code, 0, "a bomb is refused");
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    // Another operator is answered meanwhile.
    for _ in 0..20 {
        let operator = cluster.operator.clone();
        let nodes = tokio::task::spawn_blocking(move || operator.must(&["get", "nodes"])).await.unwrap();
        assert_eq!(nodes.matches("Ready").count(), 2, "{nodes}");
    }
    pilotlight_tests::eventually("each bomb was refused", || async {
        (refused.load(Ordering::Relaxed) >= 10).then_some(())
    })
    .await;
    done.store(true, Ordering::Relaxed);
    for sender in senders {
        tokio::task::spawn_blocking(move || sender.join().unwrap()).await.unwrap();
    }

    load.stop().await.assert_all_answered("while manifest bombs are parsed");
    let after = cluster.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!((&after[0]["name"], &after[0]["pid"]), (&before[0]["name"], &before[0]["pid"]));
    let log = std::fs::read_to_string(cluster.directory().join("coordinator-0.log")).unwrap();
    assert!(!log.contains("agent disconnected"), "no session broke:\n{log}");
}
