//! The loop with a store that fails.

mod quarantine;
mod usage;

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use pilotlight_proto::fleet::v1::RevisionFailure;

use super::{
    super::{load::insert_revision, plan::tests::Cell, view},
    *,
};
use crate::{
    model::ReplicaRecord,
    store::{Entry, Events, Lease, Listing, embedded::EmbeddedStore},
};

/// An embedded store whose commits can be made to fail.
#[derive(Debug)]
struct Failing {
    inner: EmbeddedStore,
    fails: AtomicBool,
}

#[async_trait]
impl Store for Failing {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.inner.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(StoreError::Unavailable("etcd: no answer within 5 s".to_owned()));
        }
        self.inner.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError> {
        self.inner.watch(prefix, from_revision).await
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.lease(ttl).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.inner.ping().await
    }

    fn kind(&self) -> &'static str {
        "failing"
    }
}

const KEY: &str = "default/m-predictor-00001";

struct Case {
    reconciler: Reconciler,
    store: Arc<Failing>,
    /// The session of node "a".
    agent: SessionHandle,
    _directory: tempfile::TempDir,
}

impl Case {
    /// The loop with this world, in which node "a" is connected.
    async fn start(cell: Cell) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let inner = EmbeddedStore::open(&directory.path().join("state.redb")).unwrap();
        let store = Arc::new(Failing { inner, fails: AtomicBool::new(false) });
        let (_, inputs, changes) = super::super::commands::Handle::new();
        let settings = Settings::for_tests();
        let (tick, report_interval) = (Duration::from_secs(2), Duration::from_secs(1));
        let recorder = Recorder::default();
        let store_of_loop = Arc::clone(&store) as _;
        let setup = Setup { store: store_of_loop, settings, tick, report_interval, recorder, inputs, changes };
        let mut reconciler = Reconciler::load(setup).await.unwrap();
        reconciler.world = cell.world;
        let agent = SessionHandle::for_tests("a");
        agent.follow_routes(reconciler.routes.feed());
        let now = reconciler.clock.now();
        let node = reconciler.world.nodes.get_mut("a").unwrap();
        (node.session, node.heard, node.last_seen) = (Some(agent.clone()), true, now);
        Self { reconciler, store, agent, _directory: directory }
    }

    /// A service at zero whose revision has been ready, and maybe a replica of it that sleeps.
    fn world(asleep: bool) -> Cell {
        let mut cell = Cell::sleepy(&[1]).applied("m", 0, "");
        cell.world.revisions.clear();
        let record = cell.world.services["default/m"].record.revision(1, true, Timestamp::UNIX_EPOCH);
        insert_revision(&mut cell.world, record, Timestamp::UNIX_EPOCH);
        if !asleep {
            return cell;
        }
        let mut cell = cell.sleeper("m-1", "a", 0, fleet::ReplicaPhase::Asleep, false);
        let record = cell.world.remove_replica("m-1").unwrap();
        cell.world.insert_replica(ReplicaRecord { revision: KEY.into(), ..record }, Default::default());
        let replica = cell.world.replicas.get_mut("m-1").unwrap();
        replica.status = Some(fleet::ReplicaStatus { phase: fleet::ReplicaPhase::Asleep.into(), ..Default::default() });
        cell
    }

    /// A request waits for the revision.
    async fn demand(&mut self) {
        let demand = fleet::Demand { revision: KEY.into(), waiting: 1, ..Default::default() };
        let message = fleet::agent_message::Message::Demand(demand);
        self.reconciler.take(Input::Heard { node: "a".into(), session: 0, message }).await;
        self.reconciler.act().await;
    }

    /// The failure in the routes that the agent received last.
    fn failure(&mut self) -> Option<RevisionFailure> {
        let mut last = None;
        while let Some(message) = self.agent.received() {
            if let ToAgent::Routes(routes) = message {
                let revisions = routes.services.into_iter().flat_map(|service| service.revisions);
                last = revisions.into_iter().find(|revision| revision.revision == KEY);
            }
        }
        last.expect("the agent has received routes").failure
    }
}

#[tokio::test]
async fn requests_learn_that_the_store_cannot_record_a_start() {
    let mut case = Case::start(Case::world(false)).await;
    case.store.fails.store(true, Ordering::Relaxed);
    case.demand().await;
    let failure = case.failure().expect("no replica can be started");
    assert_eq!(failure.reason, "StoreUnavailable");
    assert!(failure.message.ends_with("store unavailable: etcd: no answer within 5 s"), "{}", failure.message);
    assert!(failure.next_attempt_at.is_some());

    case.reconciler.act().await;
    assert!(case.failure().unwrap().attempt > failure.attempt, "it has been tried again");

    case.store.fails.store(false, Ordering::Relaxed);
    case.reconciler.act().await;
    assert_eq!(case.failure(), None);
    assert_eq!(case.reconciler.world.replicas.len(), 1);
}

#[tokio::test]
async fn requests_learn_that_the_store_cannot_record_a_wake() {
    let mut case = Case::start(Case::world(true)).await;
    case.store.fails.store(true, Ordering::Relaxed);
    case.demand().await;
    assert_eq!(case.failure().unwrap().reason, "StoreUnavailable");

    case.store.fails.store(false, Ordering::Relaxed);
    case.reconciler.act().await;
    assert_eq!(case.failure(), None);
    assert!(!case.reconciler.world.replicas["m-1"].record.asleep);
}

/// Node "a" reports that these replicas are ready.
fn ready(replicas: &[&str]) -> Input {
    let status = |replica: &&str| fleet::ReplicaStatus {
        replica: (*replica).into(),
        revision: KEY.into(),
        phase: fleet::ReplicaPhase::Ready.into(),
        ..Default::default()
    };
    let statuses = fleet::ReplicaStatuses { replicas: replicas.iter().map(status).collect() };
    let message = fleet::agent_message::Message::ReplicaStatuses(statuses);
    Input::Heard { node: "a".into(), session: 0, message }
}

impl Case {
    /// A world with one ready replica "m-1" on node "a", whose lease is 20 s.
    async fn serving() -> Self {
        let mut cell = Case::world(true);
        cell.world.settings.node_lease = LEASE;
        let replica = cell.world.replicas.get_mut("m-1").unwrap();
        replica.record.asleep = false;
        cell.world.revisions.get_mut(KEY).unwrap().wanted = 1;
        let mut case = Self::start(cell).await;
        case.reconciler.take(ready(&["m-1"])).await;
        case.reconciler.act().await;
        assert!(case.reconciler.world.replicas["m-1"].ready());
        case
    }

    /// Lets time pass in steps in which the loop runs.
    async fn pass(&mut self, time: Duration) {
        let mut left = time;
        while !left.is_zero() {
            let step = left.min(Duration::from_secs(2));
            tokio::time::advance(step).await;
            left -= step;
            self.step().await;
        }
    }

    async fn step(&mut self) {
        self.reconciler.observe_silence(self.reconciler.clock.now());
        self.reconciler.on_tick().await;
        self.reconciler.act().await;
    }

    fn state(&self) -> String {
        let world = &self.reconciler.world;
        super::super::view::node(world, &world.nodes["a"], self.reconciler.clock.now()).state
    }
}

const LEASE: Duration = Duration::from_secs(20);

#[tokio::test(start_paused = true)]
async fn a_node_is_lost_once_it_is_silent_for_its_lease_although_its_session_is_open() {
    let mut case = Case::serving().await;
    case.pass(Duration::from_secs(18)).await;
    assert_eq!((case.state().as_str(), case.reconciler.world.replicas.len()), ("Ready", 1));
    case.pass(Duration::from_secs(4)).await;
    assert_eq!(case.state(), "Lost");
    assert!(!case.reconciler.world.replicas.contains_key("m-1"), "its replicas are placed anew");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_talks_is_not_lost_while_the_loop_is_busy() {
    let mut case = Case::serving().await;
    for _ in 0..10 {
        tokio::time::advance(Duration::from_secs(5)).await;
        case.reconciler.world.nodes["a"].session.as_ref().unwrap().note_message();
        case.step().await;
    }
    assert_eq!((case.state().as_str(), case.reconciler.world.replicas.len()), ("Ready", 1));
}

#[tokio::test(start_paused = true)]
async fn all_leases_begin_anew_after_the_loop_stood_still() {
    let mut case = Case::serving().await;
    tokio::time::advance(Duration::from_secs(60)).await;
    case.step().await;
    assert_eq!((case.state().as_str(), case.reconciler.world.replicas.len()), ("Ready", 1));
    case.pass(Duration::from_secs(22)).await;
    assert_eq!(case.state(), "Lost");
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_removes_no_replica_before_the_lease_of_its_node_counted_from_the_takeover() {
    let mut case = Case::serving().await;
    // As a new leader reads it: placed there, never heard of.
    let now = case.reconciler.clock.now();
    let node = case.reconciler.world.nodes.get_mut("a").unwrap();
    (node.session, node.heard, node.last_seen) = (None, false, now);
    case.reconciler.world.replicas.get_mut("m-1").unwrap().status = None;
    case.reconciler.world.revisions.get_mut(KEY).unwrap().wanted = 0;
    let phase = |world: &World| view::phase_name(world, &world.replicas["m-1"]);
    assert_eq!(phase(&case.reconciler.world), "Unknown", "nothing says that it has yet to start");
    case.pass(Duration::from_secs(18)).await;
    assert!(case.reconciler.world.replicas.contains_key("m-1"));
    case.pass(Duration::from_secs(4)).await;
    assert!(!case.reconciler.world.replicas.contains_key("m-1"));
}

#[tokio::test(start_paused = true)]
async fn replicas_that_still_run_are_adopted_when_their_lost_node_returns() {
    let mut case = Case::serving().await;
    case.pass(Duration::from_secs(22)).await;
    assert!(!case.reconciler.world.replicas.contains_key("m-1"));
    case.reconciler.world.nodes["a"].session.as_ref().unwrap().note_message();
    case.reconciler.take(ready(&["m-1"])).await;
    case.reconciler.act().await;
    assert!(case.reconciler.world.replicas["m-1"].ready());
    let stored = case.store.get(&keys::replica("m-1")).await.unwrap();
    assert!(stored.is_some(), "the next leader knows it, too");
    case.step().await;
    let names: Vec<_> = case.reconciler.world.replicas.keys().collect();
    assert_eq!(names, ["m-1"], "nothing is started in its stead");
}

#[tokio::test(start_paused = true)]
async fn an_adopted_replica_has_the_last_status_of_several_that_come_together() {
    let mut case = Case::serving().await;
    case.pass(Duration::from_secs(22)).await;
    case.reconciler.world.nodes["a"].session.as_ref().unwrap().note_message();
    let mut first = ready(&["m-1"]);
    if let Input::Heard { message: fleet::agent_message::Message::ReplicaStatuses(statuses), .. } = &mut first {
        statuses.replicas[0].set_phase(fleet::ReplicaPhase::Pending);
    }
    case.reconciler.take(first).await;
    case.reconciler.take(ready(&["m-1"])).await;
    case.reconciler.act().await;
    assert!(case.reconciler.world.replicas["m-1"].ready());
}

#[tokio::test(start_paused = true)]
async fn a_replica_of_a_lost_node_is_not_adopted_where_another_one_is_ready() {
    let mut case = Case::serving().await;
    case.pass(Duration::from_secs(22)).await;
    let now = case.reconciler.clock.now();
    let record = case.reconciler.world.nodes["a"].left_behind["m-1"].clone();
    let other = ReplicaRecord { name: "m-2".into(), gpu_indices: vec![], ..record };
    case.reconciler.world.insert_replica(other, Default::default());
    let node = case.reconciler.world.nodes.get_mut("a").unwrap();
    node.last_seen = now;
    node.session.as_ref().unwrap().note_message();
    case.reconciler.take(ready(&["m-2", "m-1"])).await;
    case.reconciler.act().await;
    assert!(!case.reconciler.world.replicas.contains_key("m-1"));
}

impl Case {
    /// A node connects, and is sent what is due.
    async fn connect(&mut self, name: &str, peer_address: &str) -> SessionHandle {
        let session = SessionHandle::for_tests(name);
        let hello = fleet::Hello { peer_address: peer_address.into(), ..Default::default() };
        self.reconciler.take(Input::Connected { session: session.clone(), hello: Box::new(hello) }).await;
        self.reconciler.act().await;
        session
    }

    /// Routes that the agent of node "a" has received since the last time.
    fn routes(&mut self) -> Vec<fleet::Routes> {
        let received = std::iter::from_fn(|| self.agent.received());
        let routes = received.filter_map(|message| match message {
            ToAgent::Routes(routes) => Some(routes),
            _ => None,
        });
        routes.collect()
    }

    async fn pass_time_of_a_push(&mut self) {
        tokio::time::advance(Duration::from_millis(100)).await;
        self.reconciler.act().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_connect_with_an_unchanged_address_pushes_to_nobody_else() {
    let mut case = Case::start(Case::world(true)).await;
    case.connect("b", "10.0.0.2:7446").await;
    case.pass_time_of_a_push().await;
    assert_eq!(case.routes().pop().unwrap().nodes.len(), 1);
    let again = case.connect("b", "10.0.0.2:7446").await;
    case.pass_time_of_a_push().await;
    assert_eq!(case.routes(), []);
    let received: Vec<_> = std::iter::from_fn(|| again.received()).collect();
    assert!(matches!(received[0], ToAgent::Welcome(_)));
    assert!(matches!(&received[1], ToAgent::Routes(routes) if routes.full && routes.nodes.len() == 1));
}

#[tokio::test(start_paused = true)]
async fn nodes_that_connect_together_are_one_push_of_their_addresses() {
    let mut case = Case::start(Case::world(true)).await;
    assert!(case.routes()[0].full);
    for number in 0..50 {
        case.connect(&format!("n-{number}"), &format!("10.0.0.{number}:7446")).await;
        tokio::time::advance(Duration::from_millis(1)).await;
    }
    assert_eq!(case.routes(), []);
    case.pass_time_of_a_push().await;
    let routes = case.routes();
    assert_eq!(routes.len(), 1);
    assert_eq!((routes[0].nodes.len(), routes[0].full), (50, false));
}

#[tokio::test(start_paused = true)]
async fn a_large_fleet_receives_changes_that_follow_each_other_together() {
    let mut case = Case::serving().await;
    for number in 0..300 {
        case.connect(&format!("n-{number}"), "10.0.0.9:7446").await;
    }
    case.pass_time_of_a_push().await;
    case.routes();
    case.pass_time_of_a_push().await;
    for turn in 0..11 {
        case.reconciler.take(if turn % 2 == 0 { ready(&[]) } else { ready(&["m-1"]) }).await;
        case.reconciler.act().await;
    }
    assert_eq!(case.routes().len(), 1, "the first change is sent at once");
    case.pass_time_of_a_push().await;
    assert!(case.routes().len() <= 1);
}
