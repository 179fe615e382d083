//! A load on two agents goes 1 → n → panic → back → 0; what the autoscaler was told is written down, and
//! told again it decides the very same.
#![allow(clippy::print_stdout, reason = "how near the simulator comes is reported, not asserted")]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::future::join_all;
use jiff::Timestamp;
use pilotlight_tests::{
    cell::{Agent, Cell, Operator},
    eventually,
    http::Gateway,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::Value;

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";
const REQUEST_TIME: &str = "200ms";

/// Clients that each have one request open, until told to stop. Every answer must be good.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn of(clients: usize, gateways: &[Gateway], arrivals: &Arc<Mutex<Vec<f64>>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |index: usize| {
            let (stop, arrivals, gateway) =
                (Arc::clone(&stop), Arc::clone(arrivals), gateways[index % gateways.len()].clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                    arrivals.lock().unwrap().push(now.as_secs_f64());
                    let answer = gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
                    assert_eq!(answer.status, 200, "{}", answer.body);
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, clients }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in join_all(self.clients).await {
            client.unwrap();
        }
    }
}

fn iris() -> Iris {
    Iris {
        container_concurrency: 2,
        max_replicas: 6,
        gpus: 1,
        flags: vec!["--request-time", REQUEST_TIME],
        annotations: vec![
            ("autoscaling.knative.dev/scale-down-delay", "2s"),
            // Three seconds: an average needs more than one report.
            ("autoscaling.knative.dev/panic-window-percentage", "50"),
        ],
        ..Iris::default()
    }
}

async fn routed(agent: &Agent) {
    eventually("the route has arrived", || async {
        let answer = agent.gateway.get(HOST, "/v1/models/iris").await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
}

/// Waits until the service has at least so many ready replicas.
async fn at_least(operator: &Operator, count: usize) -> Vec<Value> {
    eventually(&format!("at least {count} replicas are ready"), || async {
        let replicas = operator.replicas("iris");
        let ready = replicas.iter().filter(|replica| replica["phase"] == "Ready").count();
        (ready >= count).then_some(replicas)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_live_is_decided_again_in_the_simulator() {
    let cell = Cell::start_with(vec![], &["--record={}/autoscaler.jsonl"]).await;
    let (a, b) = (cell.agent("a", 4).await, cell.agent("b", 4).await);
    assert_eq!(cell.operator.apply(&iris().yaml(), &[]).code, 0);
    let arrivals = Arc::new(Mutex::new(Vec::new()));
    let gateways = [a.gateway.clone(), b.gateway.clone()];

    // One client: one replica.
    routed(&a).await;
    routed(&b).await;
    let one = Load::of(1, &gateways, &arrivals);
    at_least(&cell.operator, 1).await;
    one.end().await;
    // Many at once: panic, and as many as are allowed, on both nodes.
    let many = Load::of(24, &gateways, &arrivals);
    let replicas = at_least(&cell.operator, 4).await;
    let nodes: std::collections::BTreeSet<_> = replicas.iter().map(|replica| replica["node"].to_string()).collect();
    many.end().await;
    println!("{} replicas at the top, on nodes {nodes:?}", replicas.len());
    // Nobody: down, and to zero.
    cell.operator.replicas_are("iris", 1, "Asleep").await;

    let decisions = cell.operator.json(&["get", "decisions", "iris"]);
    let recording = cell.directory().join("autoscaler.jsonl");
    let replayed = cell.operator.run(&["simulate", "--replay", recording.to_str().unwrap(), "-o", "json"]);
    assert_eq!(replayed.code, 0, "{}{}", replayed.out, replayed.err);
    let replay: Value = serde_json::from_str(&replayed.out).unwrap();
    assert_eq!(replay["differences"], Value::Array(vec![]), "tick by tick the same");
    assert!(replay["decisions"].as_u64().unwrap() > 10 && replay["inPanic"].as_u64().unwrap() > 0, "{replay}");
    assert!(replay["most"].as_u64().unwrap() >= 4, "{replay}");
    assert!(decisions.to_string().contains("\"panic\":true"), "describe knows of the panic: {decisions}");

    // A recording that was tampered with is found out.
    let text = std::fs::read_to_string(&recording).unwrap();
    let tampered = cell.directory().join("tampered.jsonl");
    std::fs::write(&tampered, text.replacen("\"applied\":1", "\"applied\":2", 1)).unwrap();
    let refused = cell.operator.run(&["simulate", "--replay", tampered.to_str().unwrap()]);
    assert_eq!(refused.code, 1, "{}", refused.out);
    assert!(refused.out.contains("1 differ"), "{}", refused.out);

    near(&cell, &text, &arrivals.lock().unwrap());
}

/// Prints how near the simulator comes to the live run from the arrivals alone. No assertion: machines are noisy.
fn near(cell: &Cell, recording: &str, arrivals: &[f64]) {
    let (trace, service) = (cell.directory().join("arrivals.csv"), cell.directory().join("iris.yaml"));
    let rows: String = arrivals.iter().map(|at| format!("{at:.6}\n")).collect();
    std::fs::write(&trace, format!("arrival\n{rows}")).unwrap();
    std::fs::write(&service, iris().yaml()).unwrap();
    let args = ["simulate", "--trace", trace.to_str().unwrap(), "--service", service.to_str().unwrap()];
    let model = ["--load-time", "300ms", "--request-time", REQUEST_TIME, "--tail", "60s", "-o", "json"];
    let simulated = cell.operator.run(&[&args[..], &model].concat());
    assert_eq!(simulated.code, 0, "{}", simulated.err);
    let outcome: Value = serde_json::from_str(&simulated.out).unwrap();
    let timeline = outcome["runs"][0]["outcome"]["services"][0]["timeline"].as_array().unwrap();
    let wanted_at = |seconds: f64| {
        let before = timeline.iter().take_while(|point| point["seconds"].as_f64().unwrap() <= seconds);
        before.last().map_or(0.0, |point| point["wanted"].as_f64().unwrap())
    };
    let first = Duration::from_secs_f64(arrivals.iter().copied().fold(f64::MAX, f64::min));
    let live: Vec<(f64, f64)> = recording
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["event"] == "decide")
        .filter_map(|line| {
            let at: Timestamp = line["at"].as_str()?.parse().ok()?;
            let since_epoch = Duration::try_from(at.duration_since(Timestamp::UNIX_EPOCH)).ok()?;
            Some((since_epoch.checked_sub(first)?.as_secs_f64(), line["decision"]["applied"].as_f64()?))
        })
        .collect();
    let differences: Vec<f64> = live.iter().map(|(at, applied)| (applied - wanted_at(*at)).abs()).collect();
    let mean = differences.iter().sum::<f64>() / differences.len().max(1) as f64;
    let most = live.iter().map(|(_, applied)| *applied).fold(0.0, f64::max);
    let simulated_most = timeline.iter().map(|point| point["wanted"].as_f64().unwrap()).fold(0.0, f64::max);
    println!(
        "from the arrivals alone, over {} decisions: replicas wanted differ by {mean:.2} on average; \
         at most {most} live and {simulated_most} simulated",
        live.len()
    );
}
