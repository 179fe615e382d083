//! How a replica leaves, on a paused clock: a runtime that starts nothing, and the real data path's slots.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use async_trait::async_trait;
use futures::future::BoxFuture;
use pilotlight_proto::fleet::v1::{self as fleet, ContainerSpec};
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    endpoint::EgressListener,
    runtime::{Exit, GpuAccess, Mount, Running, Say, SleepMark},
    sidecar::{Grant, Limits, RevisionQueue, Sidecar},
};

pub(super) const KEY: &str = "default/iris-00001";
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);
pub(super) const GRACE: Duration = Duration::from_secs(7);
/// Main memory of each "process", bytes.
pub(super) const MEMORY: u64 = 5 << 20;

/// What comes of pausing a "process", and of letting it go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pausing {
    Works,
    Fails,
    NeverEnds,
}

/// "Processes" that run until they are stopped, or until the test ends them.
pub(super) struct Fake {
    address: SocketAddr,
    ends: Mutex<HashMap<String, CancellationToken>>,
    /// Replica, time since the start of the test, and grace of each stop.
    stops: Mutex<Vec<(String, Duration, Duration)>>,
    began: Instant,
    /// What a former agent has left running.
    former: Vec<ReplicaAssignment>,
    pub(super) marks: Mutex<HashMap<String, SleepMark>>,
    pub(super) pausing: Mutex<Pausing>,
    /// What has been done, in order: "start", "pause", "resume", and the marks in between.
    pub(super) done: Mutex<Vec<&'static str>>,
    /// Whether "processes" can use their GPUs.
    pub(super) gpu_access: Mutex<GpuAccess>,
    /// Folders of the models of each start.
    pub(super) folders: Mutex<Vec<Vec<PathBuf>>>,
}

impl Fake {
    fn running(&self, assignment: ReplicaAssignment) -> Running {
        Running {
            replica: assignment.replica.clone(),
            pid: 1,
            address: self.address,
            started_at: 0,
            assignment,
            container: Some("c".to_owned()),
            ports: BTreeMap::new(),
        }
    }

    pub(super) fn end(&self, replica: &str) -> CancellationToken {
        self.ends.lock().unwrap().entry(replica.to_owned()).or_default().clone()
    }

    fn did(&self, what: &'static str) {
        self.done.lock().unwrap().push(what);
    }

    async fn halt(&self, running: &Running, what: &'static str) -> Result<(), RuntimeError> {
        self.did(what);
        let pausing = *self.pausing.lock().unwrap();
        match pausing {
            Pausing::Works => Ok(()),
            Pausing::Fails => {
                let (replica, reason) = (running.replica.clone(), "it refuses".to_owned());
                Err(RuntimeError::Pause { what, replica, reason })
            }
            Pausing::NeverEnds => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Runtime for Fake {
    /// An image that is no image is the reason to fail.
    async fn prepare(&self, assignment: &ReplicaAssignment, _: Say<'_>) -> Result<bool, RuntimeError> {
        let image = assignment.container.as_ref().map(|container| container.image.as_str());
        assert_ne!(image, Some("panic"), "as told");
        match ["CacheFull", "DiskFull"].into_iter().find(|reason| image == Some(reason)) {
            Some(reason) => Err(RuntimeError::Container { reason, message: "as told".to_owned() }),
            None => Ok(false),
        }
    }

    async fn start(&self, assignment: &ReplicaAssignment, mounts: &[Mount]) -> Result<Running, RuntimeError> {
        let assignment = assignment.clone();
        self.did("start");
        self.folders.lock().unwrap().push(mounts.iter().map(|mount| mount.source.clone()).collect());
        self.ends.lock().unwrap().insert(assignment.replica.clone(), CancellationToken::new());
        Ok(self.running(assignment))
    }

    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError> {
        Ok(self.former.iter().cloned().map(|assignment| self.running(assignment)).collect())
    }

    async fn exited(&self, running: &Running) -> Exit {
        self.end(&running.replica).cancelled_owned().await;
        Exit { code: Some(0), ..Exit::default() }
    }

    async fn stop(&self, running: &Running, grace: Duration) {
        self.stops.lock().unwrap().push((running.replica.clone(), self.began.elapsed(), grace));
        // A real one takes its time, in which the status before is seen.
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.end(&running.replica).cancel();
    }

    async fn pause(&self, running: &Running) -> Result<(), RuntimeError> {
        self.halt(running, "pause").await
    }

    async fn resume(&self, running: &Running) -> Result<(), RuntimeError> {
        self.halt(running, "resume").await
    }

    async fn memory(&self, _: &Running) -> u64 {
        MEMORY
    }

    fn mark_sleep(&self, replica: &str, mark: Option<&SleepMark>) -> Result<(), RuntimeError> {
        let mut marks = self.marks.lock().unwrap();
        let former = marks.remove(replica);
        match mark {
            Some(mark) => {
                self.did(if mark.settled { "settled" } else { "unsettled" });
                marks.insert(replica.to_owned(), mark.clone());
            }
            None if former.is_some() => self.did("unmarked"),
            None => {}
        }
        Ok(())
    }

    fn sleep_mark(&self, replica: &str) -> Option<SleepMark> {
        self.marks.lock().unwrap().get(replica).cloned()
    }

    async fn gpu_access(&self, _: &Running) -> GpuAccess {
        self.gpu_access.lock().unwrap().clone()
    }

    async fn remove(&self, _: &str) {}

    fn log_file(&self, _: &str) -> PathBuf {
        PathBuf::new()
    }
}

/// Asks each ten seconds whether something listens at `port`; the third failure is one too many.
pub(super) fn listens(port: u16) -> Option<fleet::Probe> {
    Some(fleet::Probe {
        handler: Some(fleet::probe::Handler::TcpSocket(fleet::TcpSocket { port: port.into() })),
        termination_grace_period: prost_types::Duration::try_from(Duration::from_secs(2)).ok(),
        ..Default::default()
    })
}

/// A port at which nothing listens.
pub(super) async fn closed_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port()
}

#[tokio::test(start_paused = true)]
async fn a_replicas_models_are_held_until_it_has_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let models = node_models(cache.path());
    // As it is there from before.
    let record = crate::models::cache::TreeRecord { uri: "s3://b/m".into(), objects: vec![], blobs: vec![] };
    models.cache().publish("key", &record, None).unwrap();
    drop(models);
    let models = node_models(cache.path());
    let in_use = |report: &fleet::CacheReport| report.models[0].in_use;
    let mut report = models.report();
    assert!(!in_use(&report.borrow()));
    let model = fleet::ModelMount { uri: "s3://b/m".into(), ..Default::default() };
    let former =
        ReplicaAssignment { replica: "a".into(), revision: KEY.into(), models: vec![model], ..Default::default() };
    let node = Node::with(models, vec![former]).await;
    report.wait_for(in_use).await.unwrap();
    node.phases(&[ReplicaPhase::Ready]).await;
    assert!(in_use(&report.borrow()), "taken over with its models");
    node.reconciler.assign(Assignment { version: 1, replicas: vec![], ..Default::default() });
    report.wait_for(|report| !in_use(report)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn one_that_lacks_room_is_tried_again_as_soon_as_somebody_has_left() {
    for (reason, pause) in [("CacheFull", 0), ("DiskFull", 10)] {
        let cache = tempfile::tempdir().unwrap();
        let models = node_models(cache.path());
        let node = Node::with(models.clone(), Vec::new()).await;
        let held = models.hold("another", ["s3://b/m".to_owned()]);
        node.assign_container(1, &[("a", false)], ContainerSpec { image: reason.into(), ..Default::default() });
        node.restarted(2).await;
        let began = Instant::now();
        drop(held);
        node.restarted(3).await;
        assert_eq!(began.elapsed(), Duration::from_secs(pause), "{reason}");
        node.restarted(4).await;
        assert_eq!(began.elapsed(), Duration::from_secs(pause + 20), "{reason}: nobody else leaves");
    }
}

pub(super) fn node_models(root: &std::path::Path) -> Models {
    Models::open(root.to_owned(), BTreeMap::new(), Duration::from_secs(1), None).unwrap()
}

/// These replicas call nobody.
struct NoWayBack;

impl Egress for NoWayBack {
    fn open(&self, _: &str, _: SocketAddr) -> BoxFuture<'static, std::io::Result<EgressListener>> {
        Box::pin(async { Err(std::io::ErrorKind::Unsupported.into()) })
    }
}

pub(super) struct Node {
    pub(super) fake: Arc<Fake>,
    sidecar: Arc<Sidecar>,
    pub(super) queue: Arc<RevisionQueue>,
    pub(super) reconciler: Arc<Reconciler>,
    /// Answers the probes.
    _listener: Option<TcpListener>,
}

impl Node {
    /// A node with two ready replicas, "a" and "b", that take one request each.
    async fn start() -> Self {
        let node = Self::empty().await;
        node.assign(1, &[("a", false), ("b", false)]);
        node.phases(&[ReplicaPhase::Ready, ReplicaPhase::Ready]).await;
        node
    }

    /// A node without replicas.
    pub(super) async fn empty() -> Self {
        let cache = tempfile::tempdir().unwrap();
        Self::with(node_models(cache.path()), Vec::new()).await
    }

    /// A node whose replicas all serve at this address.
    pub(super) async fn empty_at(address: SocketAddr) -> Self {
        let cache = tempfile::tempdir().unwrap();
        Self::at(address, node_models(cache.path()), Vec::new(), HashMap::new(), None).await
    }

    /// A node with these models and what a former agent has left running.
    pub(super) async fn with(models: Models, former: Vec<ReplicaAssignment>) -> Self {
        Self::with_asleep(models, former, HashMap::new()).await
    }

    /// The same; some of what runs sleeps.
    pub(super) async fn with_asleep(
        models: Models,
        former: Vec<ReplicaAssignment>,
        marks: HashMap<String, SleepMark>,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        Self::at(address, models, former, marks, Some(listener)).await
    }

    async fn at(
        address: SocketAddr,
        models: Models,
        former: Vec<ReplicaAssignment>,
        marks: HashMap<String, SleepMark>,
        listener: Option<TcpListener>,
    ) -> Self {
        let fake = Arc::new(Fake {
            address,
            ends: Mutex::default(),
            stops: Mutex::default(),
            began: Instant::now(),
            former,
            marks: Mutex::new(marks),
            pausing: Mutex::new(Pausing::Works),
            done: Mutex::default(),
            gpu_access: Mutex::new(GpuAccess::Unknown),
            folders: Mutex::default(),
        });
        let sidecar = Sidecar::new();
        let queue = sidecar.revision(KEY);
        queue.route(Limits { queue: 10, timeout: TIMEOUT, concurrency: 1 }, BTreeMap::new());
        let runtime: Arc<dyn Runtime> = Arc::clone(&fake) as _;
        let endpoints: Arc<dyn Endpoints> = Arc::clone(&sidecar) as _;
        let reconciler =
            Reconciler::adopt(runtime, endpoints, Arc::new(NoWayBack), models.clone(), Shelf::new(models, 0))
                .await
                .unwrap();
        Self { fake, sidecar, queue, reconciler, _listener: listener }
    }

    /// The whole assignment: replicas, and whether they drain.
    fn assign(&self, version: u64, replicas: &[(&str, bool)]) {
        self.assign_container(version, replicas, ContainerSpec::default());
    }

    /// The same, with probes.
    pub(super) fn assign_container(&self, version: u64, replicas: &[(&str, bool)], mut container: ContainerSpec) {
        container.termination_grace_period = prost_types::Duration::try_from(GRACE).ok();
        let replicas = replicas.iter().map(|(name, draining)| ReplicaAssignment {
            replica: (*name).to_owned(),
            revision: KEY.to_owned(),
            container: Some(container.clone()),
            container_concurrency: 1,
            timeout: prost_types::Duration::try_from(TIMEOUT).ok(),
            draining: *draining,
            ..Default::default()
        });
        self.reconciler.assign(Assignment { version, replicas: replicas.collect(), ..Default::default() });
    }

    /// Waits until the replicas, by name, are in these phases.
    pub(super) async fn phases(&self, phases: &[ReplicaPhase]) {
        let mut statuses = self.reconciler.statuses();
        let reached = |all: &ReplicaStatuses| all.replicas.iter().map(ReplicaStatus::phase).eq(phases.iter().copied());
        statuses.wait_for(reached).await.unwrap();
    }

    /// Waits until the first replica has been started again so many times; what was last said of it.
    pub(super) async fn restarted(&self, times: u32) -> ReplicaStatus {
        let mut statuses = self.reconciler.statuses();
        let restarted = |all: &ReplicaStatuses| all.replicas.iter().any(|status| status.restarts == times);
        statuses.wait_for(restarted).await.unwrap().replicas[0].clone()
    }

    /// Waits until a probe has found the first replica unhealthy; what the probe said.
    pub(super) async fn unhealthy(&self) -> String {
        let mut statuses = self.reconciler.statuses();
        let unhealthy = |all: &ReplicaStatuses| all.replicas.iter().any(|status| status.reason == "Unhealthy");
        statuses.wait_for(unhealthy).await.unwrap().replicas[0].message.clone()
    }

    /// A request that runs, and on which replica.
    pub(super) async fn request(&self) -> (String, Grant) {
        let grant = self.queue.enter(false).unwrap().granted().await.unwrap();
        let crate::sidecar::Target::Local { replica, .. } = &grant.target else { panic!("{grant:?}") };
        (replica.clone(), grant)
    }

    /// Stops so far, and the time since `since` of each.
    pub(super) fn stops(&self, since: Instant) -> Vec<(String, Duration, Duration)> {
        let before = since.duration_since(self.fake.began);
        let stops = self.fake.stops.lock().unwrap();
        stops.iter().map(|(replica, at, grace)| (replica.clone(), *at - before, *grace)).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_leaving_replica_ends_its_request_first() {
    let node = Node::start().await;
    let (leaver, running) = node.request().await;
    assert_eq!(leaver, "a");
    let began = Instant::now();
    node.assign(2, &[("a", true), ("b", false)]);
    node.phases(&[ReplicaPhase::Draining, ReplicaPhase::Ready]).await;
    let (elsewhere, _grant) = node.request().await;
    assert_eq!(elsewhere, "b", "a leaving replica takes nothing new");

    tokio::time::sleep(Duration::from_secs(40)).await;
    assert!(node.stops(began).is_empty(), "a request still runs");
    assert_eq!(node.queue.report(Instant::now()).unwrap().draining_concurrency.round(), 1.0);
    drop(running);
    node.phases(&[ReplicaPhase::Stopped, ReplicaPhase::Ready]).await;
    assert_eq!(node.stops(began), [("a".to_owned(), Duration::from_secs(40), GRACE)], "as soon as it has ended");
}

#[tokio::test(start_paused = true)]
async fn a_replica_whose_task_panics_has_failed_and_can_be_deleted() {
    let node = Node::start().await;
    let container = ContainerSpec { image: "panic".into(), ..Default::default() };
    node.assign_container(2, &[("a", false), ("b", false), ("c", false)], container.clone());
    node.phases(&[ReplicaPhase::Ready, ReplicaPhase::Ready, ReplicaPhase::Failed]).await;
    let status = node.reconciler.statuses().borrow().replicas[2].clone();
    assert_eq!(status.reason, "InternalError");
    assert!(status.message.contains("as told"), "{}", status.message);
    node.assign_container(3, &[("a", false), ("b", false), ("c", true)], container);
    node.phases(&[ReplicaPhase::Ready, ReplicaPhase::Ready, ReplicaPhase::Stopped]).await;
    node.assign(4, &[("a", false), ("b", false)]);
    node.phases(&[ReplicaPhase::Ready, ReplicaPhase::Ready]).await;
}

#[tokio::test(start_paused = true)]
async fn each_state_that_lasts_has_a_message() {
    let node = Node::start().await;
    let mut statuses = node.reconciler.statuses();
    let seen = tokio::spawn(async move {
        let mut seen = std::collections::BTreeSet::new();
        while statuses.changed().await.is_ok() {
            let all = statuses.borrow_and_update().clone();
            seen.extend(all.replicas.into_iter().map(|status| (status.phase, status.message)));
            // Of the last replica: the first one is stopped.
            if seen.iter().any(|(phase, _)| *phase == i32::from(ReplicaPhase::Failed)) {
                break;
            }
        }
        seen
    });
    let (_, running) = node.request().await;
    node.assign(2, &[("a", true), ("b", false)]);
    node.phases(&[ReplicaPhase::Draining, ReplicaPhase::Ready]).await;
    drop(running);
    node.phases(&[ReplicaPhase::Stopped, ReplicaPhase::Ready]).await;
    // Never ready, and then it ends.
    let never = ContainerSpec { readiness_probe: listens(closed_port().await), ..Default::default() };
    node.assign_container(3, &[("c", false)], never);
    node.phases(&[ReplicaPhase::Stopped, ReplicaPhase::Starting]).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    // The second failure lasts, until the back-off is over.
    for _ in 0..2 {
        node.fake.end("c").cancel();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let seen = seen.await.unwrap();
    let messages: Vec<_> =
        seen.iter().map(|(phase, message)| (ReplicaPhase::try_from(*phase).unwrap(), message)).collect();
    for (phase, message) in &messages {
        let well = matches!(phase, ReplicaPhase::Ready | ReplicaPhase::Stopped);
        assert!(well || !message.is_empty(), "{phase:?} in {messages:?}");
    }
    let reported = |expected, text: &str| {
        let found = messages.iter().any(|(phase, message)| *phase == expected && message.contains(text));
        assert!(found, "{expected:?} {text:?} in {messages:?}");
    };
    reported(ReplicaPhase::Draining, "finishes its requests before it stops");
    reported(ReplicaPhase::Draining, "asked to stop; is killed after 7s");
    reported(ReplicaPhase::Starting, "waiting for the readiness probe TCP connection at 127.0.0.1:");
    reported(ReplicaPhase::Starting, ": connection refused");
    reported(ReplicaPhase::Failed, "the process ended");
}

#[tokio::test(start_paused = true)]
async fn a_drain_lasts_no_longer_than_the_services_timeout() {
    let node = Node::start().await;
    let (leaver, _never_ends) = node.request().await;
    assert_eq!(leaver, "a");
    let began = Instant::now();
    node.assign(2, &[("a", true), ("b", false)]);
    node.phases(&[ReplicaPhase::Stopped, ReplicaPhase::Ready]).await;
    assert_eq!(node.stops(began), [("a".to_owned(), TIMEOUT, GRACE)]);
    // Nothing is waited for any more.
    node.sidecar.drained("a").await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_replica_leaves_at_once_and_one_that_is_not_assigned_drains_too() {
    let node = Node::start().await;
    let (busy, running) = node.request().await;
    assert_eq!(busy, "a");
    let began = Instant::now();
    node.assign(2, &[]);
    node.phases(&[ReplicaPhase::Draining, ReplicaPhase::Stopped]).await;
    assert_eq!(node.stops(began), [("b".to_owned(), Duration::ZERO, GRACE)]);
    drop(running);
    node.phases(&[ReplicaPhase::Stopped, ReplicaPhase::Stopped]).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_with_its_process() {
    let node = Node::start().await;
    let (_, _running) = node.request().await;
    let began = Instant::now();
    node.assign(2, &[("a", true), ("b", false)]);
    node.phases(&[ReplicaPhase::Draining, ReplicaPhase::Ready]).await;
    node.fake.end("a").cancel();
    node.phases(&[ReplicaPhase::Stopped, ReplicaPhase::Ready]).await;
    assert!(began.elapsed() < TIMEOUT, "there is nothing left to wait for");
}

#[tokio::test(start_paused = true)]
async fn a_replica_in_back_off_reports_its_failure_and_when_it_is_started_again() {
    let node = Node::empty().await;
    let port = closed_port().await;
    node.assign_container(1, &[("a", false)], ContainerSpec { readiness_probe: listens(port), ..Default::default() });
    node.phases(&[ReplicaPhase::Starting]).await;
    node.fake.end("a").cancel();
    let first = node.restarted(1).await;
    assert_eq!((first.consecutive_failures, first.next_attempt_at), (1, None), "the second attempt follows at once");

    node.phases(&[ReplicaPhase::Starting]).await;
    let before = std::time::SystemTime::now();
    node.fake.end("a").cancel();
    let second = node.restarted(2).await;
    assert_eq!((second.phase(), second.reason.as_str()), (ReplicaPhase::Failed, "CrashLoopBackOff"));
    assert_eq!((second.failure_reason.as_str(), second.failure_permanent), ("Completed", true));
    assert_eq!(second.consecutive_failures, 2);
    let next = std::time::SystemTime::try_from(second.next_attempt_at.unwrap()).unwrap();
    assert!(next >= before + Duration::from_secs(10), "{second:?}");

    // One that has been ready may be so again.
    let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    node.phases(&[ReplicaPhase::Ready]).await;
    assert_eq!(node.reconciler.statuses().borrow().replicas[0].next_attempt_at, None);
    node.fake.end("a").cancel();
    let third = node.restarted(3).await;
    assert_eq!((third.consecutive_failures, third.failure_permanent), (3, false));
}

#[tokio::test(start_paused = true)]
async fn only_time_that_it_was_ready_earns_a_replica_a_fresh_back_off() {
    let node = Node::empty().await;
    // Loads for 20 minutes, and fails.
    let port = closed_port().await;
    let readiness_probe = listens(port);
    node.assign_container(1, &[("a", false)], ContainerSpec { readiness_probe, ..Default::default() });
    for failures in 1..=2 {
        node.phases(&[ReplicaPhase::Starting]).await;
        tokio::time::sleep(Duration::from_secs(1200)).await;
        node.fake.end("a").cancel();
        assert_eq!(node.restarted(failures).await.consecutive_failures, failures);
    }
    // Serves for 10 minutes, and fails.
    let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    node.phases(&[ReplicaPhase::Ready]).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    node.fake.end("a").cancel();
    let status = node.restarted(3).await;
    assert_eq!((status.consecutive_failures, status.next_attempt_at), (1, None), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_replica_leaves_at_once_while_its_models_store_says_nothing() {
    // Accepts connections, and never answers.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let uri = format!("http://{}/model.bin", silent.local_addr().unwrap());
    let node = Node::empty().await;
    let model = fleet::ModelMount { uri: uri.clone(), ..Default::default() };
    let (replica, revision) = ("a".to_owned(), KEY.to_owned());
    let wanted = ReplicaAssignment { replica, revision, models: vec![model], ..Default::default() };
    node.reconciler.assign(Assignment { version: 1, replicas: vec![wanted.clone()], ..Default::default() });
    let mut statuses = node.reconciler.statuses();
    let asks = |all: &ReplicaStatuses| all.replicas.iter().any(|status| status.message.contains(&uri));
    statuses.wait_for(asks).await.unwrap();
    let _connection = silent.accept().await.unwrap();

    let began = Instant::now();
    let leaves = ReplicaAssignment { draining: true, ..wanted };
    node.reconciler.assign(Assignment { version: 2, replicas: vec![leaves], ..Default::default() });
    node.phases(&[ReplicaPhase::Stopped]).await;
    assert_eq!(began.elapsed(), Duration::ZERO, "there is nothing to wait for");
}
