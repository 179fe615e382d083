//! How a replica sleeps and wakes, on a paused clock: with [`super::tests`]' runtime that starts nothing.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use pilotlight_proto::fleet::v1::{self as fleet, ContainerSpec, Rung, SleepPaths, Transition};
use tokio::{net::TcpListener, time::Instant};

use super::{
    tests::{GRACE, KEY, MEMORY, Node, Pausing, TIMEOUT, closed_port, listens, node_models},
    *,
};
use crate::{runtime::SleepMark, sidecar::Grant};

const PAUSED: SleepMark = SleepMark { paths: None, settled: true };

fn replica(asleep: bool) -> ReplicaAssignment {
    let termination_grace_period = prost_types::Duration::try_from(GRACE).ok();
    ReplicaAssignment {
        replica: "a".to_owned(),
        revision: KEY.to_owned(),
        container: Some(ContainerSpec { termination_grace_period, ..Default::default() }),
        container_concurrency: 1,
        timeout: prost_types::Duration::try_from(TIMEOUT).ok(),
        asleep,
        ..Default::default()
    }
}

impl Node {
    pub(super) fn tell(&self, replicas: impl IntoIterator<Item = ReplicaAssignment>) {
        let replicas = replicas.into_iter().collect();
        let version = self.reconciler.lock().version.unwrap_or(0) + 1;
        self.reconciler.assign(Assignment { version, replicas, ..Default::default() });
    }

    async fn awake() -> Self {
        let node = Self::empty().await;
        node.tell([replica(false)]);
        node.phases(&[ReplicaPhase::Ready]).await;
        node
    }

    async fn asleep() -> Self {
        let node = Self::awake().await;
        node.tell([replica(true)]);
        node.phases(&[ReplicaPhase::Asleep]).await;
        node
    }

    async fn taken_over(former: ReplicaAssignment, mark: Option<SleepMark>) -> Self {
        let cache = tempfile::tempdir().unwrap();
        let marks: HashMap<_, _> = mark.map(|mark| ("a".to_owned(), mark)).into_iter().collect();
        Self::with_asleep(node_models(cache.path()), vec![former], marks).await
    }

    fn status(&self) -> ReplicaStatus {
        self.reconciler.statuses().borrow().replicas[0].clone()
    }

    fn done(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.fake.done.lock().unwrap())
    }

    /// Waits until it is in this phase for this reason.
    async fn said(&self, phase: ReplicaPhase, reason: &str) -> ReplicaStatus {
        let mut statuses = self.reconciler.statuses();
        let is = |all: &ReplicaStatuses| {
            all.replicas.iter().any(|status| status.reason == reason && status.phase() == phase)
        };
        statuses.wait_for(is).await.unwrap().replicas[0].clone()
    }

    /// A request that has to wait.
    async fn waits(&self) -> impl Future<Output = Grant> + use<> {
        let waiting = self.queue.enter(false).unwrap();
        let mut granted = Box::pin(async move { waiting.granted().await.unwrap() });
        tokio::select! {
            biased;
            _ = &mut granted => panic!("there is no slot"),
            () = tokio::task::yield_now() => {}
        }
        granted
    }
}

/// Both ends of a transition, and how long it took.
fn way(transition: Option<Transition>) -> (Rung, Rung, Duration) {
    let transition = transition.expect("a transition has ended");
    assert!(transition.ended_at.is_some());
    (transition.from(), transition.to(), transition.took.unwrap().try_into().unwrap())
}

#[tokio::test(start_paused = true)]
async fn an_idle_replica_is_put_to_sleep_and_woken() {
    let node = Node::awake().await;
    let (from, to, _) = way(node.status().transition);
    assert_eq!((from, to), (Rung::Cached, Rung::Serving));
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Asleep]).await;
    let status = node.status();
    assert!(status.holds_gpu_memory && status.memory_bytes == MEMORY && status.ready_at.is_none(), "{status:?}");
    assert_eq!(way(status.transition).0, Rung::Serving);
    assert_eq!(node.done(), ["start", "unsettled", "pause", "settled"]);
    assert_eq!(node.fake.marks.lock().unwrap()["a"], PAUSED);

    let request = node.waits().await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let status = node.status();
    assert_eq!((status.phase(), status.message.as_str()), (ReplicaPhase::Asleep, "asleep until a request needs it"));
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    request.await;
    let status = node.status();
    assert!(!status.holds_gpu_memory && status.memory_bytes == MEMORY && status.ready_at.is_some(), "{status:?}");
    let (from, to, took) = way(status.transition);
    assert_eq!((from, to), (Rung::Asleep, Rung::Serving));
    assert!(took < Duration::from_millis(5), "{took:?}");
    assert_eq!(node.done(), ["unsettled", "resume", "unmarked"]);
    assert_eq!((status.restarts, node.stops(Instant::now()).len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn requests_end_before_it_sleeps() {
    let node = Node::awake().await;
    let (_, running) = node.request().await;
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Draining]).await;
    let _waiting = node.waits().await;
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert_eq!(node.done(), ["start"], "a request still runs");
    drop(running);
    node.phases(&[ReplicaPhase::Asleep]).await;

    let node = Node::awake().await;
    let (_, _never_ends) = node.request().await;
    let began = Instant::now();
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Asleep]).await;
    assert_eq!(began.elapsed(), TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_wanted_again_while_it_drains_takes_requests_at_once() {
    let container = ContainerSpec {
        readiness_probe: Some(fleet::Probe {
            initial_delay: prost_types::Duration::try_from(Duration::from_secs(100)).ok(),
            success_threshold: 5,
            ..Default::default()
        }),
        ..Default::default()
    };
    let replica = |asleep| ReplicaAssignment { container: Some(container.clone()), ..replica(asleep) };
    let node = Node::empty().await;
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    let (_, running) = node.request().await;
    let transition = node.status().transition;
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Draining]).await;
    let next = node.waits().await;
    let began = Instant::now();
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    assert_eq!(node.queue.report(Instant::now()).unwrap().draining_concurrency, 0.0);
    drop(running);
    next.await;
    assert!(began.elapsed() < Duration::from_millis(5), "{:?}", began.elapsed());
    assert_eq!((node.done(), node.status().transition), (vec!["start"], transition), "it has never slept");
}

#[tokio::test(start_paused = true)]
async fn one_that_is_told_to_leave_does_so_from_sleep_and_on_the_way_there() {
    let node = Node::asleep().await;
    let began = Instant::now();
    node.tell([ReplicaAssignment { draining: true, ..replica(true) }]);
    node.phases(&[ReplicaPhase::Stopped]).await;
    assert_eq!(node.stops(began), [("a".to_owned(), Duration::ZERO, GRACE)]);
    assert!(!node.status().holds_gpu_memory);
    assert_eq!(node.done(), ["start", "unsettled", "pause", "settled"], "it is stopped as it is");

    let node = Node::awake().await;
    let (_, running) = node.request().await;
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Draining]).await;
    node.tell([]);
    drop(running);
    node.phases(&[ReplicaPhase::Stopped]).await;
    assert_eq!(node.done(), ["start"]);

    let node = Node::awake().await;
    *node.fake.pausing.lock().unwrap() = Pausing::NeverEnds;
    node.tell([replica(true)]);
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    node.tell([]);
    node.phases(&[ReplicaPhase::Stopped]).await;
    assert!(began.elapsed() < Duration::from_secs(2), "it does not wait for a pause");
}

#[tokio::test(start_paused = true)]
async fn one_that_is_to_sleep_before_it_has_started_is_loaded_first_and_never_offered() {
    let node = Node::empty().await;
    let waiting = node.waits().await;
    let loaded = closed_port().await;
    let readiness_probe = listens(loaded);
    let container = ContainerSpec { readiness_probe, ..Default::default() };
    let replica = |asleep| ReplicaAssignment { container: Some(container.clone()), ..replica(asleep) };
    node.tell([replica(true)]);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!((node.status().phase(), node.done()), (ReplicaPhase::Starting, vec!["start"]));
    let mut statuses = node.reconciler.statuses();
    let mut seen = Vec::new();
    let _loaded = TcpListener::bind((Ipv4Addr::LOCALHOST, loaded)).await.unwrap();
    while node.status().phase() != ReplicaPhase::Asleep {
        statuses.changed().await.unwrap();
        seen.push(statuses.borrow_and_update().replicas[0].phase());
    }
    assert!(seen.iter().all(|phase| matches!(phase, ReplicaPhase::Starting | ReplicaPhase::Asleep)), "{seen:?}");
    let load = node.queue.report(Instant::now()).unwrap();
    assert_eq!((load.running, load.queue_depth), (0, 1), "the request still waits");
    let (from, to, took) = way(node.status().transition);
    assert_eq!((from, to), (Rung::Cached, Rung::Asleep));
    assert!(took >= Duration::from_secs(20), "from the start on: {took:?}");

    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    waiting.await;
    let (from, to, _) = way(node.status().transition);
    assert_eq!((from, to), (Rung::Asleep, Rung::Serving));
}

#[tokio::test(start_paused = true)]
async fn one_that_ends_in_its_sleep_is_started_again_to_sleep() {
    let node = Node::asleep().await;
    node.fake.end("a").cancel();
    let status = node.restarted(1).await;
    assert_eq!((status.exit_code, status.holds_gpu_memory), (Some(0), false));
    let _waiting = node.waits().await;
    node.phases(&[ReplicaPhase::Asleep]).await;
    assert_eq!(node.done()[4..], ["unmarked", "start", "unsettled", "pause", "settled"]);
    let (from, to, _) = way(node.status().transition);
    assert_eq!((from, to), (Rung::Cached, Rung::Asleep));

    let began = Instant::now();
    node.fake.end("a").cancel();
    assert_eq!(node.restarted(2).await.reason, "CrashLoopBackOff");
    node.phases(&[ReplicaPhase::Asleep]).await;
    assert!(began.elapsed() >= Duration::from_secs(10), "back-off as ever");
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_fall_asleep_is_stopped_and_started_only_to_be_awake() {
    for (pausing, within, message) in [
        (Pausing::Fails, Duration::from_secs(1), "did not fall asleep: cannot pause a: it refuses"),
        (Pausing::NeverEnds, Duration::from_secs(61), "did not fall asleep: pause: not done within 60s"),
    ] {
        let node = Node::awake().await;
        *node.fake.pausing.lock().unwrap() = pausing;
        let began = Instant::now();
        node.tell([replica(true)]);
        let status = node.said(ReplicaPhase::Failed, "SleepFailed").await;
        assert!(began.elapsed() < within, "{:?}", began.elapsed());
        assert_eq!((status.message.as_str(), status.pid, status.restarts), (message, 0, 0));
        assert_eq!(node.stops(began).len(), 1);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(node.status().phase(), ReplicaPhase::Failed);
        assert_eq!(node.done(), ["start", "unsettled", "pause"]);
        node.tell([replica(false)]);
        node.phases(&[ReplicaPhase::Ready]).await;
        assert_eq!((node.done(), node.status().reason.as_str()), (vec!["unmarked", "start"], ""));

        node.tell([replica(true)]);
        node.said(ReplicaPhase::Failed, "SleepFailed").await;
        node.tell([]);
        node.phases(&[ReplicaPhase::Stopped]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_wake_is_started_anew() {
    let node = Node::asleep().await;
    *node.fake.pausing.lock().unwrap() = Pausing::Fails;
    node.done();
    node.tell([replica(false)]);
    // The first time it is started again at once.
    let status = node.said(ReplicaPhase::Starting, "WakeFailed").await;
    assert_eq!(status.message, "did not wake: cannot resume a: it refuses");
    node.phases(&[ReplicaPhase::Ready]).await;
    assert_eq!(node.status().restarts, 1);
    assert_eq!(node.done(), ["unsettled", "resume", "unmarked", "start"]);
    assert_eq!(way(node.status().transition).0, Rung::Cached);
}

#[tokio::test(start_paused = true)]
async fn a_wake_waits_for_no_delay_and_no_startup_probe() {
    let seconds = |seconds| prost_types::Duration::try_from(Duration::from_secs(seconds)).ok();
    let started = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let probe = listens(started.local_addr().unwrap().port());
    let late = probe.clone().map(|probe| fleet::Probe { initial_delay: seconds(100), ..probe });
    let alive = probe.clone().map(|probe| fleet::Probe { initial_delay: seconds(1000), ..probe });
    let container = ContainerSpec {
        readiness_probe: probe,
        startup_probe: late,
        liveness_probe: alive,
        ..ContainerSpec::default()
    };
    let replica = |asleep| ReplicaAssignment { container: Some(container.clone()), ..replica(asleep) };
    let node = Node::empty().await;
    let began = Instant::now();
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Asleep]).await;
    assert!(began.elapsed() >= Duration::from_secs(100), "it has to start first");
    let began = Instant::now();
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    assert!(began.elapsed() < Duration::from_millis(5), "{:?}", began.elapsed());
    // Liveness is asked anew.
    drop(started);
    let began = Instant::now();
    node.restarted(1).await;
    assert!(began.elapsed() >= Duration::from_secs(1000), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_former_agents_sleeper_sleeps_on_and_wakes_when_told() {
    // Told to be awake when it was started, and not probed: nobody listens where its probes ask.
    let nobody = listens(closed_port().await);
    let container = ContainerSpec { liveness_probe: nobody.clone(), startup_probe: nobody, ..Default::default() };
    let former = ReplicaAssignment { container: Some(container), ..replica(false) };
    let node = Node::taken_over(former, Some(PAUSED)).await;
    node.phases(&[ReplicaPhase::Asleep]).await;
    let status = node.status();
    assert!(status.adopted && status.holds_gpu_memory, "{status:?}");
    assert_eq!((status.memory_bytes, status.transition), (MEMORY, None));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!((node.status().phase(), node.done()), (ReplicaPhase::Asleep, vec![]));
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    assert_eq!(node.done(), ["unsettled", "resume", "unmarked"]);
    assert_eq!(way(node.status().transition).0, Rung::Asleep);
}

#[tokio::test(start_paused = true)]
async fn a_former_agents_replica_that_was_in_between_is_put_to_sleep() {
    let node = Node::taken_over(replica(false), Some(SleepMark { settled: false, ..PAUSED })).await;
    node.phases(&[ReplicaPhase::Asleep]).await;
    assert_eq!((node.done(), node.status().transition), (vec!["unsettled", "pause", "settled"], None));

    // One that was started to sleep and has been woken since is awake.
    let node = Node::taken_over(replica(true), None).await;
    node.phases(&[ReplicaPhase::Ready]).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!((node.status().phase(), node.done()), (ReplicaPhase::Ready, vec![]));
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Asleep]).await;
}

#[tokio::test(start_paused = true)]
async fn a_later_agent_finds_a_sleeper_as_it_was_left() {
    let node = Node::asleep().await;
    node.done();
    node.reconciler.shutdown(false).await;
    assert_eq!((node.done(), node.stops(Instant::now()).len()), (vec![], 0));
    assert_eq!(node.fake.marks.lock().unwrap()["a"], PAUSED);
}

/// A server that can sleep, unless it is told to refuse. Its readiness is the opposite of its sleep.
async fn server() -> (std::net::SocketAddr, Arc<(AtomicBool, AtomicBool)>) {
    let state = Arc::new((AtomicBool::new(false), AtomicBool::new(false)));
    let turn = |asleep: bool| {
        post(async move |State(state): State<Arc<(AtomicBool, AtomicBool)>>| {
            if state.1.load(SeqCst) {
                return StatusCode::CONFLICT;
            }
            state.0.store(asleep, SeqCst);
            StatusCode::OK
        })
    };
    let says = async |State(state): State<Arc<(AtomicBool, AtomicBool)>>| {
        format!("{{\"is_sleeping\": {}}}", state.0.load(SeqCst))
    };
    let ready = async |State(state): State<Arc<(AtomicBool, AtomicBool)>>| {
        if state.0.load(SeqCst) { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
    };
    let routes = Router::new()
        .route("/sleep", turn(true))
        .route("/wake_up", turn(false))
        .route("/is_sleeping", get(says))
        .route("/ready", get(ready))
        .with_state(Arc::clone(&state));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (address, state)
}

// The clock runs here: a server that answers by itself cannot be waited for on a paused one.
#[tokio::test]
async fn a_server_with_endpoints_of_its_own_is_asked_to_sleep_and_frees_its_gpu() {
    let (address, state) = server().await;
    let [sleep, wake, is_sleeping] = ["/sleep", "/wake_up", "/is_sleeping"].map(str::to_owned);
    let get = fleet::HttpGet { path: "/ready".into(), ..Default::default() };
    let readiness_probe =
        Some(fleet::Probe { handler: Some(fleet::probe::Handler::HttpGet(get)), ..Default::default() });
    let container = ContainerSpec { readiness_probe, ..Default::default() };
    let replica = |asleep| ReplicaAssignment {
        container: Some(container.clone()),
        sleep_paths: Some(SleepPaths { sleep: sleep.clone(), wake: wake.clone(), is_sleeping: is_sleeping.clone() }),
        ..replica(asleep)
    };
    let node = Node::empty_at(address).await;
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    node.tell([replica(true)]);
    node.phases(&[ReplicaPhase::Asleep]).await;
    let status = node.status();
    assert!(!status.holds_gpu_memory && status.memory_bytes == MEMORY, "{status:?}");
    assert!(state.0.load(SeqCst));
    assert_eq!(node.done(), ["start", "unsettled", "settled"]);
    node.tell([replica(false)]);
    node.phases(&[ReplicaPhase::Ready]).await;
    assert!(!state.0.load(SeqCst));

    state.1.store(true, SeqCst);
    node.tell([replica(true)]);
    assert_eq!(
        node.said(ReplicaPhase::Failed, "SleepFailed").await.message,
        "did not fall asleep: /sleep: HTTP status 409 Conflict"
    );
}
