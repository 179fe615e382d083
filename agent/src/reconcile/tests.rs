//! How a replica leaves, on a paused clock: a runtime that starts nothing, and the real data path's slots.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use async_trait::async_trait;
use pilotlight_proto::fleet::v1::ContainerSpec;
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    runtime::{Exit, Mount, Running},
    sidecar::{Grant, Limits, RevisionQueue, Sidecar},
};

const KEY: &str = "default/iris-00001";
const TIMEOUT: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(7);

/// "Processes" that run until they are stopped, or until the test ends them.
struct Fake {
    address: SocketAddr,
    ends: Mutex<HashMap<String, CancellationToken>>,
    /// Replica, time since the start of the test, and grace of each stop.
    stops: Mutex<Vec<(String, Duration, Duration)>>,
    began: Instant,
}

impl Fake {
    fn end(&self, replica: &str) -> CancellationToken {
        self.ends.lock().unwrap().entry(replica.to_owned()).or_default().clone()
    }
}

#[async_trait]
impl Runtime for Fake {
    async fn start(&self, assignment: &ReplicaAssignment, _: &[Mount]) -> Result<Running, RuntimeError> {
        let assignment = assignment.clone();
        Ok(Running { replica: assignment.replica.clone(), pid: 1, address: self.address, started_at: 0, assignment })
    }

    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError> {
        Ok(Vec::new())
    }

    async fn exited(&self, running: &Running) -> Exit {
        self.end(&running.replica).cancelled_owned().await;
        Exit { code: Some(0), signal: None }
    }

    async fn stop(&self, running: &Running, grace: Duration) {
        self.stops.lock().unwrap().push((running.replica.clone(), self.began.elapsed(), grace));
        self.end(&running.replica).cancel();
    }

    async fn remove(&self, _: &str) {}

    fn log_file(&self, _: &str) -> PathBuf {
        PathBuf::new()
    }
}

struct Node {
    fake: Arc<Fake>,
    sidecar: Arc<Sidecar>,
    queue: Arc<RevisionQueue>,
    reconciler: Arc<Reconciler>,
    /// Answers the probes.
    _listener: TcpListener,
}

impl Node {
    /// A node with two ready replicas, "a" and "b", that take one request each.
    async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ends, stops) = (Mutex::default(), Mutex::default());
        let fake = Arc::new(Fake { address, ends, stops, began: Instant::now() });
        let sidecar = Sidecar::new();
        let queue = sidecar.revision(KEY);
        queue.route(Limits { queue: 10, timeout: TIMEOUT, concurrency: 1 }, BTreeMap::new());
        let cache = tempfile::tempdir().unwrap();
        let models = Models::open(cache.path().to_owned(), BTreeMap::new(), Duration::from_secs(1)).unwrap();
        let runtime: Arc<dyn Runtime> = Arc::clone(&fake) as _;
        let endpoints: Arc<dyn Endpoints> = Arc::clone(&sidecar) as _;
        let reconciler = Reconciler::adopt(runtime, endpoints, models).await.unwrap();
        let node = Self { fake, sidecar, queue, reconciler, _listener: listener };
        node.assign(1, &[("a", false), ("b", false)]);
        node.phases(&[ReplicaPhase::Ready, ReplicaPhase::Ready]).await;
        node
    }

    /// The whole assignment: replicas, and whether they drain.
    fn assign(&self, version: u64, replicas: &[(&str, bool)]) {
        let replicas = replicas.iter().map(|(name, draining)| ReplicaAssignment {
            replica: (*name).to_owned(),
            revision: KEY.to_owned(),
            container: Some(ContainerSpec {
                termination_grace_period: prost_types::Duration::try_from(GRACE).ok(),
                ..Default::default()
            }),
            container_concurrency: 1,
            timeout: prost_types::Duration::try_from(TIMEOUT).ok(),
            draining: *draining,
            ..Default::default()
        });
        self.reconciler.assign(Assignment { version, replicas: replicas.collect() });
    }

    /// Waits until the replicas, by name, are in these phases.
    async fn phases(&self, phases: &[ReplicaPhase]) {
        let mut statuses = self.reconciler.statuses();
        let reached = |all: &ReplicaStatuses| all.replicas.iter().map(ReplicaStatus::phase).eq(phases.iter().copied());
        statuses.wait_for(reached).await.unwrap();
    }

    /// A request that runs, and on which replica.
    async fn request(&self) -> (String, Grant) {
        let grant = self.queue.enter(false).unwrap().granted().await.unwrap();
        let crate::sidecar::Target::Local { replica, .. } = &grant.target else { panic!("{grant:?}") };
        (replica.clone(), grant)
    }

    /// Stops so far, and the time since `since` of each.
    fn stops(&self, since: Instant) -> Vec<(String, Duration, Duration)> {
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
