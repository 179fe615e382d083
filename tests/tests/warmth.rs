//! The rungs of the ladder: replicas that sleep instead of stopping, wake, and give way to others.

use pilotlight_tests::{
    cell::{Cell, Dev, Operator},
    eventually,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::Value;

const PREDICT: &str = "/v1/models/iris:predict";
/// The example server's own endpoints, as vLLM has them.
const SLEEP: [(&str, &str); 3] = [
    ("pilotlight.dev/sleep-path", "/sleep?level=1"),
    ("pilotlight.dev/wake-path", "/wake_up"),
    ("pilotlight.dev/is-sleeping-path", "/is_sleeping"),
];

fn host(service: &str) -> String {
    format!("{service}.default.localhost")
}

async fn asleep(operator: &Operator, service: &str) -> Value {
    operator.replicas_are(service, 1, "Asleep").await.remove(0)
}

async fn ready(operator: &Operator, service: &str) -> Value {
    operator.replicas_are(service, 1, "Ready").await.remove(0)
}

fn events(operator: &Operator, service: &str) -> String {
    operator.must(&["describe", "isvc", service])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_replica_sleeps_and_a_request_wakes_it() {
    let dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    let predict = || async { dev.gateway.post(&host("iris"), PREDICT, TWO_FLOWERS).await.unwrap() };
    assert_eq!(predict().await.status, 200);
    let born = ready(&dev.operator, "iris").await;
    assert_eq!((&born["rungBefore"], &born["rung"]), (&"Cached".into(), &"Serving".into()), "{born}");

    let slept = asleep(&dev.operator, "iris").await;
    assert_eq!(slept["pid"], born["pid"], "its process lives");
    assert!(slept["memoryBytes"].as_u64().unwrap() > 1 << 20, "{slept}");
    let state = std::fs::read_to_string(format!("/proc/{}/stat", slept["pid"])).unwrap();
    assert_eq!(state.rsplit(") ").next().unwrap().chars().next(), Some('T'), "it is halted: {state}");
    let service = dev.operator.json(&["get", "isvc", "iris"]);
    assert_eq!(service["status"]["modelStatus"]["states"]["activeModelState"], "Standby", "{service}");

    assert_eq!(predict().await.status, 200);
    let woken = ready(&dev.operator, "iris").await;
    assert_eq!((&woken["pid"], &woken["rungBefore"]), (&born["pid"], &"Asleep".into()), "{woken}");
    let described = events(&dev.operator, "iris");
    assert!(described.contains("Waking") && described.contains("Asleep to Serving in "), "{described}");
    let stats = dev.gateway.get(&host("iris"), "/stats").await.unwrap().json();
    assert_eq!((&stats["received"], &stats["answered"]), (&2.into(), &2.into()), "{stats}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_models_take_turns_on_one_gpu() {
    let dev = Dev::start(&["--simulate-gpus=1"], vec![]).await;
    let annotations = SLEEP.into_iter().chain([("autoscaling.knative.dev/window", "60s")]).collect();
    let one = Iris { name: "one", gpus: 1, annotations, ..Iris::default() };
    let other = Iris { name: "other", ..one.clone() };
    for service in [&one, &other] {
        assert_eq!(dev.operator.apply(&service.yaml(), &[]).code, 0);
    }
    let mut pids = Vec::new();
    // Each wakes while the other one is well within its window: it is idle, and yields.
    for round in 0..2 {
        for (service, second) in [("one", "other"), ("other", "one")] {
            let answer = dev.gateway.post(&host(service), PREDICT, TWO_FLOWERS).await.unwrap();
            assert_eq!(answer.status, 200, "{}", answer.body);
            let served = ready(&dev.operator, service).await;
            pids.push(served["pid"].clone());
            if round > 0 || service == "other" {
                let slept = asleep(&dev.operator, second).await;
                assert_eq!(slept["holdsGpuMemory"], false);
                let gpus = dev.operator.json(&["get", "nodes"]);
                assert_eq!(gpus["items"][0]["gpus"][0]["replicas"], serde_json::json!([served["name"]]), "{gpus}");
            }
        }
    }
    assert_eq!(pids[..2], pids[2..], "no process was started twice");
    let described = events(&dev.operator, "one");
    assert!(described.contains("default/other-predictor-00001 needs its GPUs: sleeps meanwhile"), "{described}");
    let condition = dev.operator.json(&["get", "isvc", "one"]);
    let conditions = condition["status"]["conditions"].as_array().unwrap();
    assert!(conditions.iter().any(|it| it["type"] == "Ready" && it["status"] == "True"), "{condition}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_paused_makes_room_by_leaving() {
    let dev = Dev::start(&["--simulate-gpus=1"], vec![]).await;
    let paused = Iris { name: "paused", gpus: 1, ..Iris::default() };
    assert_eq!(dev.operator.apply(&paused.yaml(), &[]).code, 0);
    assert_eq!(dev.gateway.post(&host("paused"), PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
    assert_eq!(asleep(&dev.operator, "paused").await["holdsGpuMemory"], true);
    let other = Iris { name: "other", gpus: 1, ..Iris::default() };
    assert_eq!(dev.operator.apply(&other.yaml(), &[]).code, 0);
    assert_eq!(dev.gateway.post(&host("other"), PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
    dev.operator.replicas_are("paused", 0, "").await;
    let described = events(&dev.operator, "paused");
    assert!(described.contains("asleep, and default/other-predictor-00001 needs its place"), "{described}");
}

#[tokio::test(flavor = "multi_thread")]
async fn promised_sleepers_are_there_before_anybody_asks_and_outlive_their_agent() {
    let cell = Cell::start(vec![]).await;
    let mut agent = cell.agent("gpu-1", 2).await;
    let mut warm =
        Iris { name: "warm", gpus: 1, annotations: vec![("pilotlight.dev/warm-replicas", "1")], ..Iris::default() };
    assert_eq!(cell.operator.apply(&warm.yaml(), &[]).code, 0);
    let slept = asleep(&cell.operator, "warm").await;
    assert_eq!(slept["rung"], "Asleep", "{slept}");

    agent.kill_9();
    agent.restart(&cell.operator).await;
    let adopted = eventually("the sleeper is adopted", || async {
        let replica = cell.operator.replicas("warm").pop()?;
        (replica["adopted"] == true && replica["phase"] == "Asleep").then_some(replica)
    })
    .await;
    assert_eq!(adopted["pid"], slept["pid"]);
    let answer = agent.gateway.post(&host("warm"), PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(answer.status, 200);
    let woken = cell.operator.replicas("warm").into_iter().find(|replica| replica["phase"] == "Ready").unwrap();
    assert_eq!(woken["pid"], slept["pid"]);
    asleep(&cell.operator, "warm").await;

    // Nobody needs it any more: what was promised is taken back without a new revision.
    warm.annotations = vec![("pilotlight.dev/warm-replicas", "0")];
    assert_eq!(cell.operator.apply(&warm.yaml(), &[]).code, 0);
    cell.operator.replicas_are("warm", 0, "").await;
    assert_eq!(cell.operator.json(&["get", "revisions"])["items"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sleepers_leave_where_memory_for_them_does_not_suffice() {
    // Room for one of two, whatever exactly a server of this build takes.
    let dev = Dev::start(&["--warm-memory=8MiB"], vec![]).await;
    for name in ["one", "other"] {
        let service = Iris { name, ..Iris::default() };
        assert_eq!(dev.operator.apply(&service.yaml(), &[]).code, 0);
        assert_eq!(dev.gateway.post(&host(name), PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
    }
    eventually("a sleeper leaves", || async {
        let cooled = ["one", "other"].iter().any(|name| events(&dev.operator, name).contains("Cooled"));
        cooled.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_replicas_stop_where_the_fleet_or_the_service_says_so() {
    let dev = Dev::start(&["--idle-replicas=stop"], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    assert_eq!(dev.gateway.post(&host("iris"), PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
    ready(&dev.operator, "iris").await;
    dev.operator.replicas_are("iris", 0, "").await;
    let refused = Iris { annotations: vec![("pilotlight.dev/warm-replicas", "one")], ..Iris::default() };
    let refused = dev.operator.apply(&refused.yaml(), &[]);
    assert_eq!(refused.code, 1);
    assert!(format!("{refused:?}").contains("must be a whole number, 0 to 1000"), "{refused:?}");
}
