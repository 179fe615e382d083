//! A load through two gateways while replicas sleep, wake, crash, drain and move: every request is answered. It takes a
//! minute; `PILOTLIGHT_SOAK_SECONDS=600 cargo test -p pilotlight-tests --test soak -- --nocapture` takes ten.
#![allow(clippy::print_stdout, reason = "a long run reports what it counted")]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pilotlight_tests::{
    cell::{Agent, Cell, Operator},
    eventually,
    http::Gateway,
    manifest::{Iris, TWO_FLOWERS},
};

const PREDICT: &str = "/v1/models/iris:predict";
const PER_SECOND: u32 = 100;
const SERVICES: [&str; 3] = ["first", "second", "third"];
/// Longer than a service's window for scale to zero, so that a service sleeps before its turn comes again.
const TURN: Duration = Duration::from_secs(6);
const CONCURRENCY: i64 = 4;
/// What allocators and connection pools may add to an agent between the first third and the end.
const MEMORY_SLACK: u64 = 16 << 20;

/// What became of the requests.
#[derive(Debug, Default)]
struct Tally {
    sent: u32,
    answered: u32,
    /// Answers other than 200, and broken connections, by their text.
    failures: BTreeMap<String, u32>,
}

impl Tally {
    fn failed(&self) -> u32 {
        self.failures.values().sum()
    }

    fn in_flight(&self) -> u32 {
        self.sent - self.answered - self.failed()
    }
}

#[derive(Debug, Clone, Default)]
struct Load(Arc<Mutex<Tally>>);

impl Load {
    fn tally<T>(&self, change: impl FnOnce(&mut Tally) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn send(&self, gateway: &Gateway, service: &str) {
        self.tally(|tally| tally.sent += 1);
        let (load, gateway, host) = (self.clone(), gateway.clone(), format!("{service}.default.localhost"));
        tokio::spawn(async move {
            let failure = match gateway.post(&host, PREDICT, TWO_FLOWERS).await {
                Ok(answer) if answer.status == 200 => None,
                Ok(answer) => Some(format!("{host} {} {}", answer.status, answer.body)),
                Err(error) => Some(format!("{error:#}")),
            };
            load.tally(|tally| match failure {
                None => tally.answered += 1,
                Some(failure) => *tally.failures.entry(failure).or_default() += 1,
            });
        });
    }

    /// Sends [`PER_SECOND`] requests a second to one service, alternately through both gateways, whether they are
    /// answered or not.
    async fn constant(&self, gateways: [&Gateway; 2], service: &str, duration: Duration) {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / PER_SECOND);
        for turn in 0..(duration.as_secs_f64() * f64::from(PER_SECOND)) as usize {
            ticks.tick().await;
            self.send(gateways[turn % 2], service);
        }
    }
}

/// Kills one process of the service; its replica is started again. Returns `false` if none was ready.
fn crash(operator: &Operator, service: &str) -> bool {
    let replicas = operator.replicas(service);
    let Some(running) = replicas.iter().find(|replica| replica["phase"] == "Ready") else { return false };
    let pid = running["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 1);
    pid.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
}

/// Moves all replicas off one of the nodes, and lets it take replicas again.
fn drain(operator: &Operator, agent: &str) {
    operator.must(&["node", "drain", agent]);
    operator.must(&["node", "uncordon", agent]);
}

/// Runs commands of the CLI while the load continues.
async fn with_operator<T: Send + 'static>(cell: &Cell, run: impl FnOnce(&Operator) -> T + Send + 'static) -> T {
    let operator = cell.operator.clone();
    tokio::task::spawn_blocking(move || run(&operator)).await.expect("the commands succeed")
}

async fn apply_services(cell: &Cell, agents: [&Agent; 2]) {
    for name in SERVICES {
        let iris = Iris { name, gpus: 1, max_replicas: 2, container_concurrency: CONCURRENCY, ..Iris::default() };
        assert_eq!(cell.operator.apply(&iris.yaml(), &[]).code, 0);
        for agent in agents {
            eventually("the gateway knows the service", || async {
                let host = format!("{name}.default.localhost");
                let answer = agent.gateway.post(&host, PREDICT, TWO_FLOWERS).await.ok()?;
                (answer.status == 200).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_or_hangs_while_replicas_sleep_wake_crash_drain_and_move() {
    let seconds = std::env::var("PILOTLIGHT_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let cell = Cell::start(vec![]).await;
    let (a, b) = (cell.agent("a", 2).await, cell.agent("b", 2).await);
    let gateways = [&a.gateway, &b.gateway];
    apply_services(&cell, [&a, &b]).await;

    let (load, began) = (Load::default(), Instant::now());
    let (mut crashes, mut turn, mut memory) = (0, 0, None);
    while began.elapsed() < Duration::from_secs(seconds) {
        let service = SERVICES[turn % SERVICES.len()];
        load.constant(gateways, service, TURN / 3).await;
        let drains = ["a", "b"][turn % 2];
        if turn % 3 == 1 {
            crashes += u32::from(with_operator(&cell, |operator| crash(operator, service)).await);
        } else if turn % 3 == 2 {
            let draining = with_operator(&cell, move |operator| drain(operator, drains));
            tokio::join!(load.constant(gateways, service, TURN / 3), draining);
        }
        load.constant(gateways, service, TURN / 3).await;
        turn += 1;
        if memory.is_none() && began.elapsed() > Duration::from_secs(seconds / 3) {
            memory = Some([a.resident_bytes(), b.resident_bytes()]);
        }
    }
    eventually("every request is answered", || async { (load.tally(|tally| tally.in_flight()) == 0).then_some(()) })
        .await;

    let after = [a.resident_bytes(), b.resident_bytes()];
    load.tally(|tally| {
        println!("{} sent, {} answered, {crashes} crashes", tally.sent, tally.answered);
        println!("failed: {:#?}\nmemory after a third: {memory:?}, at the end: {after:?}", tally.failures);
        // What ran on a replica that was killed gets one clean 502, and nothing else fails.
        let cut_off = tally.failures.iter().filter(|(text, _)| text.contains("502 Bad Gateway"));
        let cut_off: u32 = cut_off.map(|(_, count)| count).sum();
        assert_eq!(tally.failed(), cut_off, "{:#?}", tally.failures);
        assert!(cut_off <= crashes * CONCURRENCY as u32, "{cut_off} after {crashes} crashes: {:#?}", tally.failures);
        assert!(crashes > 0 && tally.answered > 0);
    });
    for (before, after) in memory.expect("it took longer than a third").into_iter().zip(after) {
        assert!(after <= before + MEMORY_SLACK, "memory grew from {before} to {after} bytes");
    }
}
