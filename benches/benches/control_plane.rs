//! What a fleet costs the coordinator, measured from outside: a coordinator process with the embedded store, and agents
//! that are real sessions, each with its own certificate and its own connection over mutual TLS. Bytes are those that
//! agents read from their connections, within TLS. CPU time and memory are the coordinator's alone, from `/proc`.
//!
//! The claims, at 1,000 agents: a push of routes to all takes at most 0.2 MB and 0.1 CPU-s, an assignment follows a
//! demand within 30 ms (median), all agents are back within 5 s, and an idle agent takes at most 64 KB.
//!
//! `PILOTLIGHT_BENCH_AGENTS` gives the sizes of the fleet. The coordinator is this program, started again;
//! `PILOTLIGHT_TEST_BINARY` names another one, such as an earlier version.
#![allow(clippy::print_stdout, clippy::print_stderr, missing_docs, reason = "a benchmark prints its result")]

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pilotlight_benches::{from_environment, median};
use pilotlight_coordinator::config::{Config, Security};
use pilotlight_identity::{Authority, LiveIdentity, Member, Role, Trust, channel, connect_tls};
use pilotlight_proto::{
    control::v1::{ApplyRequest, control_client::ControlClient},
    fleet::v1::{
        self as fleet, AgentMessage, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent,
        fleet_client::FleetClient,
    },
};
use pilotlight_tests::{free_port, process::Process};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

const CELL: &str = "main";
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
const SERVICES: u64 = 100;
const PUSHES: usize = 20;
const DEMANDS: usize = 40;
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Linux counts CPU time in these, whatever the kernel's own timer does.
const TICKS_PER_SECOND: f64 = 100.0;
/// Longest wait for anything.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The coordinator process.
struct Coordinator {
    _process: Process,
    pid: u32,
    address: String,
}

impl Coordinator {
    async fn start(directory: &Path, authority: &Authority) -> Self {
        let (grpc, http) = (free_port(), free_port());
        let (certificate, key) = (directory.join("ca.pem"), directory.join("ca.key"));
        std::fs::write(&certificate, authority.certificate_pem()).unwrap();
        std::fs::write(&key, authority.key_pem()).unwrap();
        let args = [
            "coordinator".to_owned(),
            format!("--listen=127.0.0.1:{grpc}"),
            format!("--listen-http=127.0.0.1:{http}"),
            format!("--data-dir={}", directory.join("coordinator").display()),
            format!("--ca-cert={}", certificate.display()),
            format!("--ca-key={}", key.display()),
        ];
        let process = Process::start(&program(), directory, "coordinator", args, &[]);
        let pid = process.id();
        Self { _process: process, pid, address: format!("127.0.0.1:{grpc}") }
    }

    /// User and system time so far.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        // The name of the process may contain spaces; fields are counted after it.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        ticks as f64 / TICKS_PER_SECOND
    }

    /// Bytes of a line of `/proc/<pid>/status`.
    fn memory(&self, line: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find(|found| found.starts_with(line)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Starts to measure the peak (`VmHWM`) from now on.
    fn reset_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "5").unwrap();
    }

    /// CPU-s per second without any change.
    async fn idle_cpu(&self) -> f64 {
        const TIME: Duration = Duration::from_secs(5);
        let (before, started) = (self.cpu(), Instant::now());
        sleep(TIME).await;
        (self.cpu() - before) / started.elapsed().as_secs_f64()
    }
}

/// A replica in an assignment.
struct Assigned {
    agent: usize,
    replica: String,
    revision: String,
    at: Instant,
}

/// What all agents have in common.
struct Fleet {
    address: String,
    assigned: mpsc::UnboundedSender<Assigned>,
    /// Bytes that all agents have read.
    bytes: Arc<AtomicU64>,
}

/// One agent, over all its sessions.
struct Agent {
    fleet: Arc<Fleet>,
    number: usize,
    identity: Arc<LiveIdentity>,
    seen: Arc<Seen>,
}

/// What an agent has received in this session.
#[derive(Default)]
struct Seen {
    /// Version of the last routes, plus 1; 0 before the full ones.
    version: AtomicU64,
    /// Ready replicas in the routes of service 0.
    ready: AtomicU64,
}

/// An open session.
struct Session {
    say: mpsc::Sender<FromAgent>,
    stopping: CancellationToken,
}

impl Agent {
    fn name(&self) -> String {
        format!("node-{}", self.number)
    }

    fn start(self: &Arc<Self>) -> Session {
        let (say, outbox) = mpsc::channel(64);
        let stopping = CancellationToken::new();
        self.seen.version.store(0, Relaxed);
        let (agent, until) = (Arc::clone(self), stopping.clone());
        tokio::spawn(until.run_until_cancelled_owned(async move {
            if let Err(error) = agent.session(outbox).await {
                eprintln!("{}: {error}", agent.name());
            }
        }));
        Session { say, stopping }
    }

    async fn session(
        &self,
        mut outbox: mpsc::Receiver<FromAgent>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let config = Arc::new(self.identity.client_config(&[b"h2"])?);
        let (address, bytes) = (self.fleet.address.clone(), Arc::clone(&self.fleet.bytes));
        let connect = service_fn(move |_: Uri| {
            let (config, address, bytes) = (Arc::clone(&config), address.clone(), Arc::clone(&bytes));
            async move {
                let stream = connect_tls(&address, &Member::Coordinator, config).await?;
                Ok::<_, io::Error>(TokioIo::new(Counted { stream, bytes }))
            }
        });
        let channel = Endpoint::from_static("http://coordinator").connect_with_connector(connect).await?;
        let (say, receiver) = mpsc::channel(64);
        let message = |message| AgentMessage { message: Some(message) };
        let hello = fleet::Hello {
            node_name: self.name(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            peer_address: format!("10.{}.{}.1:7446", self.number / 256, self.number % 256),
            ingress_address: "10.0.0.1:8080".to_owned(),
            boot_id: "1".to_owned(),
            ..fleet::Hello::default()
        };
        let gpu = |index| fleet::Gpu {
            index,
            uuid: format!("GPU-{}-{index}", self.number),
            product: "NVIDIA H100 80GB HBM3".to_owned(),
            memory_bytes: 80 << 30,
            ..Default::default()
        };
        let inventory = fleet::Inventory {
            gpus: (0..8).map(gpu).collect(),
            cpu_cores: 64,
            memory_bytes: 512 << 30,
            simulated: true,
            runtimes: vec!["process".to_owned()],
            ..Default::default()
        };
        say.send(message(FromAgent::Hello(hello))).await?;
        say.send(message(FromAgent::Inventory(inventory))).await?;
        say.send(message(FromAgent::ReplicaStatuses(fleet::ReplicaStatuses::default()))).await?;
        let mut inbound = FleetClient::new(channel).session(ReceiverStream::new(receiver)).await?.into_inner();
        let mut reports = interval(REPORT_INTERVAL);
        loop {
            tokio::select! {
                Some(out) = outbox.recv() => say.send(message(out)).await?,
                _ = reports.tick() => {
                    let interval = prost_types::Duration::try_from(REPORT_INTERVAL).ok();
                    say.send(message(FromAgent::QueueReport(fleet::QueueReport { interval, revisions: vec![] }))).await?;
                }
                received = inbound.message() => match received?.ok_or("the session ended")?.message {
                    Some(ToAgent::Routes(routes)) => {
                        let version = routes.version;
                        if self.take_routes(routes) {
                            say.send(message(FromAgent::RoutesApplied(fleet::RoutesApplied { version }))).await?;
                        }
                    }
                    Some(ToAgent::Assignment(assignment)) => self.take_assignment(assignment),
                    _ => {}
                },
            }
        }
    }

    /// True if these were the last of their version.
    fn take_routes(&self, routes: fleet::Routes) -> bool {
        for service in routes.services.iter().filter(|service| service.name == "s-0") {
            let replicas = service.revisions.iter().flat_map(|revision| &revision.replicas);
            self.seen.ready.store(replicas.filter(|replica| replica.ready).count() as u64, Relaxed);
        }
        if !routes.more {
            self.seen.version.store(routes.version + 1, Relaxed);
        }
        !routes.more
    }

    fn take_assignment(&self, assignment: fleet::Assignment) {
        let at = Instant::now();
        for replica in assignment.replicas {
            let (replica, revision) = (replica.replica, replica.revision);
            let _ = self.fleet.assigned.send(Assigned { agent: self.number, replica, revision, at });
        }
    }
}

/// A connection that counts what is read.
struct Counted<S> {
    stream: S,
    bytes: Arc<AtomicU64>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.bytes.fetch_add((buffer.filled().len() - before) as u64, Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn revision(service: usize) -> String {
    format!("default/s-{service}-predictor-00001")
}

fn status(replica: &str, revision: &str, ready: bool) -> FromAgent {
    let phase = if ready { fleet::ReplicaPhase::Ready } else { fleet::ReplicaPhase::Starting };
    let (replica, revision) = (replica.to_owned(), revision.to_owned());
    let status = fleet::ReplicaStatus { replica, revision, phase: phase.into(), ..Default::default() };
    FromAgent::ReplicaStatuses(fleet::ReplicaStatuses { replicas: vec![status] })
}

async fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(TIMEOUT, waiting).await.unwrap_or_else(|_| panic!("not within {TIMEOUT:?}: {what}"));
}

async fn apply_services(coordinator: &Coordinator, authority: &Authority) {
    let operator = Member::operator("bench", Role::Admin, None).unwrap();
    let identity = LiveIdentity::new(&authority.issue(&operator, &[], LIFETIME).unwrap()).unwrap();
    let channel = channel(&format!("https://{}", coordinator.address), &Trust::Cell(identity)).unwrap();
    let mut control = ControlClient::new(channel);
    let service = |number| {
        format!(
            "---\napiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: s-{number}\n  \
             annotations:\n    autoscaling.knative.dev/initial-scale: \"0\"\nspec:\n  predictor:\n    minReplicas: 0\n    \
             containers:\n    - name: main\n      image: none\n      command: [\"true\"]\n      resources:\n        \
             limits:\n          nvidia.com/gpu: \"1\"\n"
        )
    };
    let manifest: String = (0..from_environment("PILOTLIGHT_BENCH_SERVICES", SERVICES)).map(service).collect();
    let started = Instant::now();
    loop {
        let request = ApplyRequest { manifest: manifest.clone(), source: "bench".to_owned(), ..Default::default() };
        match control.apply(request).await {
            Ok(applied) => {
                let applied = applied.into_inner();
                assert!(!format!("{applied:?}").contains("Refused"), "{applied:?}");
                return;
            }
            Err(error) if started.elapsed() > TIMEOUT => panic!("{error}"),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

struct Bench {
    coordinator: Coordinator,
    agents: Vec<Arc<Agent>>,
    sessions: Vec<Session>,
    assigned: mpsc::UnboundedReceiver<Assigned>,
    bytes: Arc<AtomicU64>,
}

impl Bench {
    /// Connects all agents, and waits until each has its full routes.
    async fn connect_all(&mut self) -> Duration {
        let started = Instant::now();
        self.sessions = self.agents.iter().map(Agent::start).collect();
        wait_until("all agents have routes", || self.agents.iter().all(|agent| agent.seen.version.load(Relaxed) > 0))
            .await;
        started.elapsed()
    }

    /// Milliseconds from a demand to the assignment that follows, and the replica of service 0.
    async fn demands(&mut self) -> (Vec<f64>, Assigned) {
        let (mut times, mut first) = (Vec::new(), None);
        for number in 0..DEMANDS {
            let from = number * 7 % self.agents.len();
            let started = Instant::now();
            let demand = fleet::Demand { revision: revision(number), waiting: 1, ..Default::default() };
            self.sessions[from].say.send(FromAgent::Demand(demand)).await.unwrap();
            let assigned = loop {
                let assigned = timeout(TIMEOUT, self.assigned.recv()).await.expect("an assignment").unwrap();
                if assigned.revision == revision(number) {
                    break assigned;
                }
            };
            times.push(assigned.at.duration_since(started).as_secs_f64() * 1e3);
            first.get_or_insert(assigned);
            sleep(Duration::from_millis(100)).await;
        }
        times.sort_by(f64::total_cmp);
        (times, first.expect("there were demands"))
    }

    /// Bytes and CPU-s of one push, by changes of one replica that all agents learn.
    async fn pushes(&mut self, replica: &Assigned, idle_cpu: f64) -> (f64, f64, f64) {
        let (bytes, cpu, started) = (self.bytes.load(Relaxed), self.coordinator.cpu(), Instant::now());
        let mut times = Vec::new();
        for push in 0..PUSHES {
            let ready = push % 2 == 0;
            let pushed = Instant::now();
            let report = status(&replica.replica, &replica.revision, ready);
            self.sessions[replica.agent].say.send(report).await.unwrap();
            let arrived = |agent: &Arc<Agent>| agent.seen.ready.load(Relaxed) == u64::from(ready);
            wait_until("a push reaches all agents", || self.agents.iter().all(arrived)).await;
            times.push(pushed.elapsed().as_secs_f64() * 1e3);
            sleep(Duration::from_millis(200)).await;
        }
        let cpu = self.coordinator.cpu() - cpu - idle_cpu * started.elapsed().as_secs_f64();
        let bytes = self.bytes.load(Relaxed) - bytes;
        (bytes as f64 / PUSHES as f64, cpu / PUSHES as f64, median(times))
    }
}

async fn measure(count: usize) {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::generate(CELL).unwrap();
    let coordinator = Coordinator::start(directory.path(), &authority).await;
    apply_services(&coordinator, &authority).await;
    let (assigned, receiver) = mpsc::unbounded_channel();
    let bytes = Arc::new(AtomicU64::new(0));
    let fleet = Arc::new(Fleet { address: coordinator.address.clone(), assigned, bytes: Arc::clone(&bytes) });
    let agent = |number| {
        let member = Member::node(&format!("node-{number}")).unwrap();
        let identity = LiveIdentity::new(&authority.issue(&member, &[], LIFETIME).unwrap()).unwrap();
        Arc::new(Agent { fleet: Arc::clone(&fleet), number, identity, seen: Arc::default() })
    };
    let agents = (0..count).map(agent).collect();
    let empty = coordinator.memory("VmRSS");
    let mut bench = Bench { coordinator, agents, sessions: vec![], assigned: receiver, bytes };

    let joined = bench.connect_all().await;
    sleep(Duration::from_secs(5)).await;
    let idle_memory = bench.coordinator.memory("VmRSS").saturating_sub(empty);
    let (times, first) = bench.demands().await;
    let idle_cpu = bench.coordinator.idle_cpu().await;
    let (push_bytes, push_cpu, push_time) = bench.pushes(&first, idle_cpu).await;

    bench.sessions.iter().for_each(|session| session.stopping.cancel());
    sleep(Duration::from_secs(2)).await;
    bench.coordinator.reset_peak();
    let (before, cpu) = (bench.coordinator.memory("VmRSS"), bench.coordinator.cpu());
    let bytes = bench.bytes.load(Relaxed);
    let back = bench.connect_all().await;
    let back_cpu = bench.coordinator.cpu() - cpu;
    sleep(Duration::from_secs(3)).await;
    let back_bytes = bench.bytes.load(Relaxed) - bytes;
    let peak = bench.coordinator.memory("VmHWM").saturating_sub(before);
    let p99 = times[(times.len() * 99).div_ceil(100) - 1];
    println!(
        "{count:6}  {:9.3}  {push_cpu:9.4}  {push_time:9.1}  {:7.1}  {p99:7.1}  {:6.1}  {:9.2}  {:9.2}  {:9.1}  {:9.1}  {:8.1}  {idle_cpu:8.3}",
        push_bytes / 1e6,
        times[times.len() / 2],
        joined.as_secs_f64(),
        back.as_secs_f64(),
        back_cpu,
        back_bytes as f64 / 1e6,
        peak as f64 / 1e6,
        idle_memory as f64 / count as f64 / 1e3,
    );
    // Sessions end before the coordinator does, so that none of them reports an error.
    bench.sessions.iter().for_each(|session| session.stopping.cancel());
    sleep(Duration::from_secs(1)).await;
}

/// What is started as the coordinator.
fn program() -> PathBuf {
    let given = std::env::var_os("PILOTLIGHT_TEST_BINARY").map(PathBuf::from);
    given.unwrap_or_else(|| std::env::current_exe().expect("this program knows its path"))
}

/// Runs the coordinator with the arguments of [`Coordinator::start`], of which there are no others.
async fn run_coordinator(args: &[String]) {
    let value = |flag: &str| {
        let value = args.iter().find_map(|arg| arg.strip_prefix(flag)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{flag} is missing"))
    };
    let ca = Some((value("--ca-cert").into(), value("--ca-key").into()));
    let config = Config {
        listen: value("--listen").parse().expect("an address"),
        listen_http: value("--listen-http").parse().expect("an address"),
        data_dir: value("--data-dir").into(),
        security: Security::Mtls { names: vec!["127.0.0.1".to_owned()], ca },
        ..Config::default()
    };
    pilotlight_coordinator::run(config, CancellationToken::new()).await.expect("the coordinator runs");
}

/// Two sockets per agent are open in this process and the coordinator's, which inherits the limit.
fn raise_file_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit is readable");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the soft limit may be raised to the hard one");
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "coordinator") {
        return run_coordinator(&args).await;
    }
    raise_file_limit();
    let sizes = std::env::var("PILOTLIGHT_BENCH_AGENTS").unwrap_or_else(|_| "100,300,1000".to_owned());
    println!("coordinator: {}", program().display());
    println!(
        "{:>6}  {:>9}  {:>9}  {:>9}  {:>7}  {:>7}  {:>6}  {:>9}  {:>9}  {:>9}  {:>9}  {:>8}  {:>8}",
        "agents",
        "push MB",
        "push CPU",
        "push ms",
        "p50 ms",
        "p99 ms",
        "join s",
        "back s",
        "back CPU",
        "back MB",
        "peak MB",
        "KB/agent",
        "idle CPU"
    );
    for size in sizes.split(',') {
        measure(size.trim().parse().expect("PILOTLIGHT_BENCH_AGENTS: numbers, separated by commas")).await;
    }
}
