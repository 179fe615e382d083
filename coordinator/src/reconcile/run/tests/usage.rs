//! What the loop meters, writes, and continues from.

use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase, agent_message::Message};

use super::*;
use crate::{
    usage::{
        Amounts, Clock, Gap, Period,
        report::{Query, select},
    },
    usage_log,
};

impl Case {
    /// One replica "m-1" that is placed now, and has not been reported.
    async fn placed() -> Self {
        let mut cell = Case::world(true);
        cell.world.settings.node_lease = LEASE;
        let replica = cell.world.replicas.get_mut("m-1").unwrap();
        (replica.record.asleep, replica.status) = (false, None);
        cell.world.revisions.get_mut(KEY).unwrap().wanted = 1;
        let mut case = Self::start(cell).await;
        let now = case.reconciler.clock.now();
        let record = &mut case.reconciler.world.replicas.get_mut("m-1").unwrap().record;
        record.created_at = now;
        let write = Transaction::new().put_json(&keys::replica("m-1"), record);
        case.store.commit(write).await.unwrap();
        case
    }

    /// Node "a" reports all that "m-1" did: seconds ago, and what from then on.
    async fn report(&mut self, changes: &[(u64, ReplicaPhase)]) {
        let change = |(sequence, (age, phase)): (u64, &(u64, ReplicaPhase))| fleet::PhaseChange {
            sequence,
            age: Some(routes::duration(Duration::from_secs(*age))),
            phase: (*phase).into(),
            holds_gpu_memory: false,
        };
        let changes = (1..).zip(changes).map(change).collect();
        let history = fleet::ReplicaHistory { replica: "m-1".into(), changes };
        let phase = history.changes.last().map_or(ReplicaPhase::Unspecified, fleet::PhaseChange::phase);
        self.hear(Message::ReplicaHistories(fleet::ReplicaHistories { replicas: vec![history] })).await;
        let status = fleet::ReplicaStatus {
            replica: "m-1".into(),
            revision: KEY.into(),
            phase: phase.into(),
            ..Default::default()
        };
        self.hear(Message::ReplicaStatuses(fleet::ReplicaStatuses { replicas: vec![status] })).await;
        self.reconciler.act().await;
    }

    async fn hear(&mut self, message: Message) {
        self.reconciler.world.nodes["a"].session.as_ref().unwrap().note_message();
        self.reconciler.take(Input::Heard { node: "a".into(), session: 0, message }).await;
    }

    /// Lets time pass in which the agent talks.
    async fn talk(&mut self, time: Duration) {
        for _ in 0..time.as_secs() / 2 {
            tokio::time::advance(Duration::from_secs(2)).await;
            self.reconciler.world.nodes["a"].session.as_ref().unwrap().note_message();
            self.step().await;
        }
    }

    /// All usage, and what is not known.
    async fn usage(&mut self) -> (Amounts, Vec<Gap>) {
        let now = self.reconciler.clock.now();
        let live = self.reconciler.live_usage(now);
        let stored = usage_log::read(&*self.store).await.unwrap();
        let query = Query { from: Clock::MIN, to: Clock::MAX, period: Period::Month, namespace: String::new() };
        let report = select(&query, stored, live);
        let sum = report.rows.iter().fold(Amounts::default(), |mut sum, row| {
            sum += row.amounts;
            sum
        });
        (sum, report.gaps)
    }

    /// A new leader reads what is stored, as far as usage goes.
    async fn fail_over(&mut self) {
        let now = self.reconciler.clock.now();
        self.reconciler.meter = metering::resume(&*self.store, &self.reconciler.world, now).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_usage_of_a_replica_is_stored_in_the_transaction_that_removes_it() {
    let mut case = Case::placed().await;
    case.report(&[(0, ReplicaPhase::Starting)]).await;
    case.talk(Duration::from_secs(90)).await;
    case.reconciler.world.replicas.get_mut("m-1").unwrap().record.draining = true;
    case.store.fails.store(true, Ordering::Relaxed);
    case.report(&[(95, ReplicaPhase::Starting), (3, ReplicaPhase::Stopped)]).await;
    assert!(case.reconciler.world.replicas.contains_key("m-1"), "the store has not taken it");
    let (before, _) = case.usage().await;

    case.store.fails.store(false, Ordering::Relaxed);
    case.step().await;
    assert!(!case.reconciler.world.replicas.contains_key("m-1"));
    case.fail_over().await;
    let (after, gaps) = case.usage().await;
    assert_eq!((after, gaps), (before, vec![]));
    assert_eq!(after.replica_ms, 87_000, "up to when its container stopped");
    assert!((2..=3).contains(&after.minutes), "{after:?}");
    assert_eq!(after.gpu_us, after.replica_ms * 1000);
}

#[tokio::test(start_paused = true)]
async fn usage_is_written_once_a_minute_and_what_is_not_is_settled_by_the_agent() {
    let mut case = Case::placed().await;
    case.report(&[(0, ReplicaPhase::Ready)]).await;
    case.talk(Duration::from_secs(150)).await;
    let segments = usage_log::read(&*case.store).await.unwrap().len();
    assert!((2..=3).contains(&segments), "{segments}");
    case.fail_over().await;
    let (stored, _) = case.usage().await;
    assert!((85_000..150_000).contains(&stored.replica_ms), "{stored:?}");
    case.report(&[(150, ReplicaPhase::Ready)]).await;
    let (settled, gaps) = case.usage().await;
    assert_eq!((settled.replica_ms, gaps), (150_000, vec![]));
}

#[tokio::test(start_paused = true)]
async fn requests_of_a_node_are_counted_once() {
    let mut case = Case::placed().await;
    let counters = |requests| {
        let revision =
            fleet::RevisionCounters { revision: KEY.into(), requests, prompt_tokens: 7, ..Default::default() };
        Message::RequestCounters(fleet::RequestCounters { revisions: vec![revision] })
    };
    case.hear(counters(5)).await;
    case.hear(counters(5)).await;
    case.step().await;
    case.fail_over().await;
    case.hear(counters(9)).await;
    let (sum, _) = case.usage().await;
    assert_eq!((sum.requests, sum.prompt_tokens), (9, 7));
}
