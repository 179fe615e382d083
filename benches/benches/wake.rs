//! How long a request waits for the same model of 1 GiB, by the rung of the ladder on which it finds it, and
//! Pilotlight's own share of that: what is left without fetching, and without what the model's server takes for
//! itself. Where it is started, that is what this very process says of itself: the processor time that it took to
//! become a process that listens (what it waited for meanwhile is in the own share), and the time from there until its
//! model was there; where it was asleep or serving, what the same server takes when it is halted and continued, woken,
//! or asked by hand in the same round.
//!
//! The model comes from an S3 server on this machine; the server is the example server, which reads all of it
//! into memory before it is ready, as a process. Nothing here has a GPU. `MODEL_MIB` is another size than 1024,
//! `ROUNDS` another number of rounds than 5. TMPDIR must be on a disk: what lies in memory only has no page cache
//! to be dropped from.
#![allow(clippy::print_stdout, missing_docs, reason = "a benchmark prints its result")]

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pilotlight_agent::warmth::{PageCache, page_cache::residency};
use pilotlight_benches::{SHARDS, from_environment, median, ready_memory, upload_model};
use pilotlight_tests::{
    cell::Dev,
    eventually, free_port,
    http::Gateway,
    manifest::{TWO_FLOWERS, to_zero},
    process::pilotlight,
    s3::S3,
};
use serde_json::Value;

const URI: &str = "s3://models/large";
const PREDICT: &str = "/v1/models/iris:predict";

/// Where the model is when the request comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rung {
    Absent,
    Cached,
    Staged,
    /// By pausing.
    Paused,
    /// By the server's own endpoints.
    Asleep,
    Serving,
}

const RUNGS: [Rung; 6] = [Rung::Absent, Rung::Cached, Rung::Staged, Rung::Paused, Rung::Asleep, Rung::Serving];

impl Rung {
    fn name(self) -> &'static str {
        match self {
            Self::Absent => "Absent",
            Self::Cached => "Cached",
            Self::Staged => "Staged",
            Self::Paused => "Asleep (paused)",
            Self::Asleep => "Asleep (own endpoints)",
            Self::Serving => "Serving",
        }
    }
}

/// Times of one rung, seconds.
#[derive(Debug, Clone, Default)]
struct Times {
    /// From request to answer.
    waited: Vec<f64>,
    /// Of that, fetching.
    fetched: Vec<f64>,
    /// The server's own, from the same rung.
    server: Vec<f64>,
}

impl Times {
    fn own(&self) -> Vec<f64> {
        let all = self.waited.iter().zip(&self.fetched).zip(&self.server);
        all.map(|((waited, fetched), server)| waited - fetched - server).collect()
    }
}

/// A service of the model, on one of the ways to keep it warm.
fn manifest(name: &str, further: &[(&str, &str)]) -> String {
    let predictor = format!(
        "    minReplicas: 0\n    maxReplicas: 1\n    containers:\n    - name: kserve-container\n      image: pilotlight:dev\n      \
         command: [pilotlight, example-server, iris, --load, /mnt/models]\n      \
         readinessProbe: {{httpGet: {{path: /v1/models/iris, port: 8080}}}}\n      \
         ports: [{{containerPort: 8080, name: http1}}]\n      env: [{{name: STORAGE_URI, value: \"{URI}\"}}]\n"
    );
    to_zero(name, further, &predictor)
}

/// A fleet of one node whose agent may read from the store by its own environment.
async fn dev(server: &S3, flags: &[&str]) -> Dev {
    Dev::start(flags, server.env()).await
}

async fn ask(gateway: &Gateway, host: &str) -> f64 {
    let begun = Instant::now();
    let answer = gateway.post(host, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    begun.elapsed().as_secs_f64()
}

fn model(dev: &Dev) -> Option<Value> {
    let list = dev.operator.json(&["cache", "ls"]);
    list["items"].as_array()?.iter().find(|model| model["uri"] == URI).cloned()
}

fn folder(dev: &Dev) -> std::path::PathBuf {
    let key = model(dev).expect("the model is on the disk")["key"].as_str().unwrap().to_owned();
    dev.data().join("agent/models/trees").join(key).join("files")
}

/// Out of the page cache.
async fn drop_pages(folder: &Path) {
    std::sync::Arc::new(PageCache::new(0)).unstage(folder).await.unwrap();
    let left = residency(folder).await.unwrap();
    assert!(left.resident * 100 < left.total, "{left:?}: is TMPDIR on a disk?");
}

/// Wholly in the page cache.
async fn read_pages(folder: &Path) {
    std::sync::Arc::new(PageCache::new(u64::MAX)).stage(folder).await.unwrap();
}

/// The server without Pilotlight.
struct Alone {
    child: Child,
    gateway: Gateway,
}

impl Alone {
    /// Starts it and asks until it answers.
    async fn start(folder: &Path) -> Self {
        let port = free_port();
        let mut command = Command::new(pilotlight());
        command.args(["example-server", "iris", "--port", &port.to_string(), "--load"]).arg(folder);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let gateway = Gateway::at(port);
        loop {
            match gateway.post("alone", PREDICT, TWO_FLOWERS).await {
                Ok(answer) if answer.status == 200 => break,
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        Self { child, gateway }
    }

    /// Halted and continued.
    async fn paused(&self) -> f64 {
        let pid = Pid::from_raw(self.child.id() as i32);
        kill(pid, Signal::SIGSTOP).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        kill(pid, Signal::SIGCONT).unwrap();
        ask(&self.gateway, "alone").await;
        begun.elapsed().as_secs_f64()
    }

    /// Asleep and awake by its own endpoints.
    async fn slept(&self) -> f64 {
        self.gateway.post("alone", "/sleep?level=1", "").await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        self.gateway.post("alone", "/wake_up", "").await.unwrap();
        ask(&self.gateway, "alone").await;
        begun.elapsed().as_secs_f64()
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One fleet per way to keep it warm: in each the request finds the model where it shall.
struct Fleets {
    /// Idle replicas stop, and nothing is kept in the page cache.
    cold: Dev,
    /// Idle replicas stop, and weights are kept in the page cache.
    staged: Dev,
    /// Idle replicas sleep.
    asleep: Dev,
}

impl Fleets {
    /// Waits until no replica runs or goes to sleep, and nothing is read ahead: what one rung leaves to be done must not
    /// be on the next one's account.
    async fn at_rest(&self) {
        self.cold.operator.replicas_are("cold", 0, "").await;
        self.staged.operator.replicas_are("staged", 0, "").await;
        eventually("the weights are in the page cache", || async {
            let model = model(&self.staged)?;
            (model["rung"] == "Staged" && model["residentBytes"] == model["bytes"]).then_some(())
        })
        .await;
        for sleeps in ["paused", "asleep"] {
            self.asleep.operator.replicas_are(sleeps, 1, "Asleep").await;
        }
    }
}

async fn round(fleets: &Fleets, rung: Rung, bytes: u64, times: &mut Times) {
    let (dev, service) = match rung {
        Rung::Absent | Rung::Cached => (&fleets.cold, "cold"),
        Rung::Staged => (&fleets.staged, "staged"),
        Rung::Paused => (&fleets.asleep, "paused"),
        Rung::Asleep | Rung::Serving => (&fleets.asleep, "asleep"),
    };
    let host = format!("{service}.default.localhost");
    if rung <= Rung::Staged {
        fleets.at_rest().await;
    }
    match rung {
        Rung::Absent => {
            dev.operator.must(&["cache", "evict", URI]);
        }
        Rung::Cached => {
            // What lies below this machine's disk has a cache of its own, as the store's files are in memory, too.
            read_pages(&folder(dev)).await;
            drop_pages(&folder(dev)).await;
        }
        Rung::Staged => {}
        Rung::Paused | Rung::Asleep => {
            dev.operator.replicas_are(service, 1, "Asleep").await;
        }
        Rung::Serving => {
            ask(&dev.gateway, &host).await;
        }
    }
    if rung <= Rung::Staged {
        // For the model's files, for the server that is started, and what else they take.
        ready_memory(bytes * 5 / 2);
    }
    times.waited.push(ask(&dev.gateway, &host).await);
    let fetched = model(dev).and_then(|model| model["fetchSeconds"].as_f64()).filter(|_| rung == Rung::Absent);
    times.fetched.push(fetched.unwrap_or(0.0));
    times.server.push(match rung {
        Rung::Absent | Rung::Cached | Rung::Staged => loading(&dev.gateway, &host).await,
        Rung::Paused | Rung::Asleep | Rung::Serving => by_hand(&folder(dev), rung).await,
    });
}

/// How long the service's replica says that it started and loaded.
async fn loading(gateway: &Gateway, host: &str) -> f64 {
    let answer = gateway.get(host, "/stats").await.unwrap();
    let stats: Value = serde_json::from_str(&answer.body).unwrap();
    let took = ["startMicroseconds", "loadMicroseconds"].map(|part| stats[part].as_f64().filter(|took| *took > 0.0));
    took.iter().map(|part| part.expect("it has loaded") / 1e6).sum()
}

/// What the same server takes from a rung on which it is loaded.
async fn by_hand(folder: &Path, rung: Rung) -> f64 {
    let server = Alone::start(folder).await;
    match rung {
        Rung::Paused => server.paused().await,
        Rung::Asleep => server.slept().await,
        _ => ask(&server.gateway, "alone").await,
    }
}

async fn measure() {
    let (mib, rounds) = (from_environment("MODEL_MIB", 1024), from_environment("ROUNDS", 5));
    let server = S3::start().await;
    let bytes = mib << 20;
    upload_model(&server, bytes / SHARDS).await;
    let fleets = Fleets {
        cold: dev(&server, &["--idle-replicas=stop", "--warm-memory=0B"]).await,
        staged: dev(&server, &["--idle-replicas=stop", "--warm-memory=8GiB"]).await,
        asleep: dev(&server, &["--warm-memory=8GiB"]).await,
    };
    let paths = [
        ("pilotlight.dev/sleep-path", "/sleep?level=1"),
        ("pilotlight.dev/wake-path", "/wake_up"),
        ("pilotlight.dev/is-sleeping-path", "/is_sleeping"),
    ];
    let services = [
        (&fleets.cold, "cold", &[][..]),
        (&fleets.staged, "staged", &[]),
        (&fleets.asleep, "paused", &[]),
        (&fleets.asleep, "asleep", &paths),
    ];
    for (dev, name, further) in services {
        let applied = dev.operator.apply(&manifest(name, further), &[]);
        assert_eq!(applied.code, 0, "{}", applied.err);
        ask(&dev.gateway, &format!("{name}.default.localhost")).await;
    }
    let mut times = RUNGS.map(|_| Times::default());
    for number in 0..rounds {
        print!("round {number}:");
        for (rung, times) in RUNGS.into_iter().zip(&mut times) {
            round(&fleets, rung, bytes, times).await;
            let last = |of: &[f64]| of.last().map_or(0.0, |seconds| seconds * 1e3);
            print!(" {} {:.1} ({:.1} own),", rung.name(), last(&times.waited), last(&times.own()));
        }
        println!();
    }
    println!("{mib} MiB, medians of {rounds} rounds, milliseconds\n");
    println!("| rung | request to answer | fetching | the server's own | Pilotlight's share | its worst |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for (rung, times) in RUNGS.into_iter().zip(&times) {
        let own = times.own();
        let worst = own.iter().copied().fold(f64::MIN, f64::max) * 1e3;
        let [waited, fetched, server, own] =
            [&times.waited, &times.fetched, &times.server, &own].map(|all| median(all.iter().copied()) * 1e3);
        println!("| {} | {waited:.1} | {fetched:.1} | {server:.1} | {own:.1} | {worst:.1} |", rung.name());
    }
}

fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Runtime::new().unwrap().block_on(measure());
}
