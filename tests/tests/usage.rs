//! Usage is what an independent observer of the processes counts, over a fail-over of the coordinator, the crash of an
//! agent, and the loss and return of its node.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hyper::Request;
use pilotlight_tests::{
    cell::{Agent, Operator},
    cluster::Cluster,
    eventually,
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::{Value, json};

const HOST: &str = "metered.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";
/// What a poll of processes, and whole seconds of their start times, may be off by.
const RESOLUTION: f64 = 1.5;

/// Seconds since the Unix epoch.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// A process as the kernel shows it: its state, and seconds since the Unix epoch when it started.
fn process(pid: u64) -> Option<(char, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state, …, and as the 20th the ticks from boot to start.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(19)?.parse().ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some((fields[0].chars().next()?, now() - uptime + ticks / 100.0))
}

/// Watches the processes of an agent's replicas, whoever else knows of them.
#[derive(Clone)]
struct Observer(Arc<Mutex<BTreeMap<u64, Observed>>>);

/// When a process ran, in seconds since the Unix epoch.
#[derive(Debug, Clone, Copy)]
struct Observed {
    started: f64,
    ended: Option<f64>,
}

impl Observer {
    /// Watches the replicas in an agent's directory, until the story ends.
    fn start(agent: &Path) -> Self {
        let observer = Self(Arc::default());
        let (watching, replicas) = (observer.clone(), agent.join("replicas"));
        tokio::spawn(async move {
            loop {
                watching.look(&replicas);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        observer
    }

    fn look(&self, replicas: &PathBuf) {
        let mut all = self.0.lock().unwrap();
        let records = std::fs::read_dir(replicas).into_iter().flatten().flatten();
        for record in records {
            let state = std::fs::read(record.path().join("state.json")).unwrap_or_default();
            let state: Value = serde_json::from_slice(&state).unwrap_or_default();
            let pid = state["pid"].as_u64().unwrap_or_default();
            if let Some((_, started)) = process(pid) {
                all.entry(pid).or_insert(Observed { started, ended: None });
            }
        }
        for (pid, observed) in all.iter_mut().filter(|(_, observed)| observed.ended.is_none()) {
            observed.ended = process(*pid).is_none_or(|(state, _)| state == 'Z').then(now);
        }
    }

    /// All processes, once they have ended.
    async fn ended(&self) -> Vec<(f64, f64)> {
        eventually("all containers have ended", || async {
            let all = self.0.lock().unwrap();
            all.values().map(|observed| Some((observed.started, observed.ended?))).collect()
        })
        .await
    }
}

/// Minutes of UTC between two moments.
fn minutes(from: f64, to: f64) -> i64 {
    (to / 60.0).ceil() as i64 - (from / 60.0).floor() as i64
}

fn usage(operator: &Operator, by: &str) -> Value {
    let args = ["usage", "--period", "minute", "--by", by, "-o", "json"];
    serde_json::from_str(&operator.must(&args)).unwrap()
}

fn sum(usage: &Value, field: &str, of: impl Fn(&Value) -> bool) -> f64 {
    let lines = usage["usage"].as_array().unwrap();
    lines.iter().filter(|line| of(line)).map(|line| line[field].as_f64().unwrap()).sum()
}

/// Sends requests, and waits until they are counted.
async fn ask(agent: &Agent, operator: &Operator, count: u32, all: &mut u32) {
    for _ in 0..count {
        let answer = agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        *all += 1;
    }
    let all = f64::from(*all);
    eventually("all requests are counted", || async {
        (sum(&usage(operator, "state"), "requests", |_| true) == all).then_some(())
    })
    .await;
}

/// Sends a completion request; the tokens by its answer's `usage`, if there is one.
async fn complete(agent: &Agent, stream: bool) -> Option<(u64, u64)> {
    let message = json!({ "role": "user", "content": "one two three four five" });
    let body = json!({ "model": "iris", "messages": [message], "stream": stream }).to_string();
    let head = Request::post("/v1/chat/completions?interval=10ms").header("content-type", "application/json");
    let answer = agent.gateway.send(HOST, head, &body).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer: Value = serde_json::from_str(&answer.body).ok()?;
    Some((answer["usage"]["prompt_tokens"].as_u64()?, answer["usage"]["completion_tokens"].as_u64()?))
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_what_processes_did_over_a_fail_over_and_the_loss_and_return_of_a_node() {
    let mut cluster = Cluster::start(1, 2).await;
    let operator = cluster.operator.clone();
    let mut agent = cluster.agent("a", 2).await;
    let service = Iris { name: "metered", min_replicas: 1, gpus: 2, ..Iris::default() };
    let manifest = service.yaml().replace("  name: metered\n", "  name: metered\n  labels: {team: blue}\n");
    let applied = operator.apply(&manifest, &[]);
    assert_eq!(applied.code, 0, "{}{}", applied.out, applied.err);
    let observer = Observer::start(&cluster.directory().join("a"));
    operator.replicas_are("metered", 1, "Ready").await;
    eventually("the gateway serves", || async {
        (agent.gateway.get(HOST, "/v1/models/iris").await.ok()?.status == 200).then_some(())
    })
    .await;
    let mut requests = 0;
    let counted = || sum(&usage(&operator, "state"), "requests", |_| true);
    eventually("the first requests are counted", || async { (counted() > 0.0).then_some(()) }).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    requests += counted() as u32;
    let (prompt, generated) = complete(&agent, false).await.unwrap();
    assert!(prompt > 0 && generated > 0);
    assert_eq!(complete(&agent, false).await, Some((prompt, generated)));
    assert_eq!(complete(&agent, true).await, None, "a stream has none unless it is asked for");
    requests += 3;
    ask(&agent, &operator, 20, &mut requests).await;

    let leader = cluster.leader().await;
    cluster.coordinators[leader].kill_9();
    // The gateway answers while nobody leads.
    for _ in 0..10 {
        assert_eq!(agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
        requests += 1;
    }
    assert_eq!(cluster.leader().await, 1 - leader);
    ask(&agent, &operator, 10, &mut requests).await;

    let crashed = now();
    agent.kill_9();
    let lost = eventually("the node is lost", || async {
        let usage = usage(&operator, "state");
        usage["gaps"].as_array()?.first().cloned()
    })
    .await;
    assert_eq!((&lost["reason"], &lost["open"], &lost["node"]), (&"NodeLost".into(), &true.into(), &"a".into()));
    assert!(now() - crashed > 15.0, "its lease is 20 s");
    agent.restart(&operator).await;
    // It is taken back, unless another one was placed first; its container has run all the time in either case.
    operator.replicas_are("metered", 1, "Ready").await;
    eventually("the gap is closed", || async {
        usage(&operator, "state")["gaps"].as_array()?.is_empty().then_some(())
    })
    .await;
    ask(&agent, &operator, 5, &mut requests).await;

    operator.must(&["delete", "isvc", "metered"]);
    let observed = observer.ended().await;
    operator.replicas_are("metered", 0, "").await;

    let usage = usage(&operator, "namespace,service,class,state,label:team");
    assert_eq!(usage["gaps"], Value::Array(vec![]));
    let replicas = |line: &Value| line["state"] != "requests";
    for line in usage["usage"].as_array().unwrap() {
        assert_eq!((&line["namespace"], &line["service"]), (&"default".into(), &"metered".into()), "{line}");
        assert_eq!(line["label:team"], "blue");
    }
    assert_eq!(sum(&usage, "requests", |_| true), f64::from(requests));
    let tokens = ["promptTokens", "generatedTokens", "requestsWithoutUsage"].map(|field| sum(&usage, field, |_| true));
    assert_eq!(tokens, [2.0 * prompt as f64, 2.0 * generated as f64, 1.0]);
    let minutes_of = |change: f64| -> i64 {
        observed.iter().map(|(started, ended)| minutes(started - change, ended + change)).sum()
    };
    let (least, most) = (minutes_of(-RESOLUTION), minutes_of(RESOLUTION));
    let counted = sum(&usage, "startedMinutes", replicas) as i64;
    assert!((least..=most).contains(&counted), "{least} <= {counted} <= {most}: {observed:?} {usage:#}");
    let ran: f64 = observed.iter().map(|(started, ended)| ended - started).sum();
    // Before a container starts, its replica has a place.
    let (seconds, of) = (sum(&usage, "replicaSeconds", replicas), 2.0 * RESOLUTION * observed.len() as f64);
    assert!(seconds > ran - of && seconds < ran + of, "{seconds} of {ran}: {observed:?} {usage:#}");
    let served = sum(&usage, "replicaSeconds", |line| line["state"] == "serving");
    assert!(served > ran - of && served < ran + of, "{served} of {ran}: {observed:?} {usage:#}");
    assert!((sum(&usage, "gpuSeconds", replicas) - 2.0 * seconds).abs() < 0.01);

    // Nothing is counted any more, and another leader counts the same.
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.start_coordinator(leader);
    cluster.ready(leader).await;
    assert!(cluster.coordinators[1 - leader].terminate());
    assert_eq!(cluster.leader().await, leader);
    let later = self::usage(&operator, "namespace,service,class,state,label:team");
    assert_eq!(later["usage"], usage["usage"]);
}
