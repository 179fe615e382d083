//! Replicas that fail again and again, and what gateways get to know of them.

use super::*;
use crate::reconcile::{
    failures,
    observe::{self, Dirty},
    record::Recorder,
};

const KEY: &str = "default/m";

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

/// A status after so many failures in a row by exit code 3.
fn failed(replica: &str, consecutive_failures: u32) -> fleet::ReplicaStatus {
    let next = prost_types::Timestamp { seconds: 1_000, nanos: 0 };
    fleet::ReplicaStatus {
        replica: replica.into(),
        phase: ReplicaPhase::Failed.into(),
        reason: "CrashLoopBackOff".into(),
        failure_reason: "Error".into(),
        message: "the process ended with exit code 3".into(),
        exit_code: Some(3),
        failure_permanent: true,
        consecutive_failures,
        restarts: consecutive_failures,
        next_attempt_at: (consecutive_failures > 1).then_some(next),
        last_log_lines: vec!["no CUDA device".into()],
        ..Default::default()
    }
}

fn in_phase(replica: &str, phase: ReplicaPhase) -> fleet::ReplicaStatus {
    fleet::ReplicaStatus { replica: replica.into(), phase: phase.into(), ..Default::default() }
}

impl Cell {
    /// The agent of a node reports its replicas.
    fn reports(&mut self, node: &str, now: Timestamp, statuses: &[fleet::ReplicaStatus]) {
        let statuses = fleet::ReplicaStatuses { replicas: statuses.to_vec() };
        let message = fleet::agent_message::Message::ReplicaStatuses(statuses);
        observe::hear(&mut self.world, node, message, now, &mut Recorder::default(), &mut Dirty::default());
    }

    /// All nodes have reported what runs there.
    fn settled(mut self) -> Self {
        self.world.nodes.values_mut().for_each(|node| node.heard = true);
        self
    }

    fn plan_at(&self, now: Timestamp) -> Plan {
        plan(&self.world, &self.world.revisions.keys().cloned().collect(), now)
    }

    fn failure(&self) -> Option<fleet::RevisionFailure> {
        failures::current(&self.world, &self.world.revisions[KEY])
    }
}

fn failing_on_a(gpus: &[u32]) -> Cell {
    Cell::of(gpus).revision("m", 1, 0).replica("m-1", "a", 0, STARTING).settled()
}

#[test]
fn a_replica_that_failed_three_times_is_replaced_on_another_node() {
    let mut cell = failing_on_a(&[1, 1]);
    cell.reports("a", at(10), &[failed("m-1", 2)]);
    assert!(cell.plan_at(at(10)).is_empty(), "twice is not enough");
    cell.reports("a", at(20), &[failed("m-1", 3)]);
    let plan = cell.plan_at(at(20));
    assert_eq!((created(&plan), plan.replace.as_slice()), (vec![(KEY, "b")], ["m-1".to_owned()].as_slice()));
}

#[test]
fn a_failing_replica_stays_if_no_other_node_fits() {
    let mut cell = failing_on_a(&[2, 1]).revision("other", 1, 0).replica("other-1", "b", 0, READY);
    cell.reports("a", at(20), &[failed("m-1", 3)]);
    assert!(cell.plan_at(at(20)).is_empty(), "{:?}", cell.plan_at(at(20)));
}

#[test]
fn a_failing_replica_does_not_return_to_a_node_on_which_it_failed_lately() {
    let mut cell = failing_on_a(&[1, 1]);
    cell.reports("a", at(20), &[failed("m-1", 3)]);
    cell.world.remove_replica("m-1");
    let mut cell = cell.replica("m-2", "b", 0, STARTING).settled();
    cell.reports("b", at(60), &[failed("m-2", 3)]);
    assert!(cell.plan_at(at(60)).is_empty(), "it failed on a 40 s ago");
    cell.reports("b", at(630), &[failed("m-2", 5)]);
    assert_eq!(created(&cell.plan_at(at(630))), [(KEY, "a")], "that was long ago");
}

#[test]
fn a_new_replica_goes_to_a_node_on_which_its_revision_has_not_failed_if_one_fits() {
    for (gpus, node) in [(&[1, 1][..], "b"), (&[1, 0][..], "a")] {
        let mut cell = failing_on_a(gpus);
        cell.reports("a", at(20), &[failed("m-1", 3)]);
        cell.world.remove_replica("m-1");
        assert_eq!(created(&cell.plan_at(at(30))), [(KEY, node)]);
    }
}

#[test]
fn the_failure_of_the_last_attempt_is_known_until_the_next_one() {
    let mut cell = failing_on_a(&[1]);
    assert_eq!(cell.failure(), None);
    cell.reports("a", at(10), &[failed("m-1", 1)]);
    assert!(cell.failure().unwrap().may_pass, "the second attempt follows at once");
    cell.reports("a", at(20), &[failed("m-1", 2)]);
    let first = cell.failure().unwrap();
    assert_eq!((first.reason.as_str(), first.exit_code), ("Error", Some(3)));
    assert_eq!(
        (first.last_log_lines.as_slice(), first.next_attempt_at.is_some()),
        (["no CUDA device".into()].as_slice(), true)
    );

    cell.reports("a", at(30), &[in_phase("m-1", STARTING)]);
    assert_eq!(cell.failure(), None, "a later attempt clears it");
    cell.reports("a", at(40), &[failed("m-1", 3)]);
    assert!(cell.failure().unwrap().attempt > first.attempt);
    cell.reports("a", at(50), &[in_phase("m-1", READY)]);
    assert_eq!(cell.failure(), None);
}

#[test]
fn a_failure_outlives_its_replica_at_zero() {
    let mut cell = failing_on_a(&[1]);
    cell.reports("a", at(20), &[failed("m-1", 2)]);
    cell.world.replicas.get_mut("m-1").unwrap().record.draining = true;
    assert!(cell.failure().is_some());
    cell.reports("a", at(21), &[in_phase("m-1", ReplicaPhase::Stopped)]);
    cell.world.remove_replica("m-1");
    let failure = cell.failure().unwrap();
    assert_eq!(failure.next_attempt_at, None, "the next request starts another replica at once");
}

#[test]
fn a_failure_is_no_answer_while_another_replica_starts_or_waiting_may_cure_it() {
    let mut cell = failing_on_a(&[2]).replica("m-2", "a", 1, STARTING);
    let starting = in_phase("m-2", STARTING);
    cell.reports("a", at(20), &[failed("m-1", 2), starting.clone()]);
    assert_eq!(cell.failure(), None);
    cell.reports("a", at(30), &[failed("m-1", 2), failed("m-2", 2)]);
    assert!(cell.failure().is_some());

    let transient = |name| fleet::ReplicaStatus { failure_permanent: false, restarts: 9, ..failed(name, 3) };
    cell.reports("a", at(40), &[transient("m-1"), transient("m-2")]);
    assert!(cell.failure().unwrap().may_pass);

    // A registry that does not answer three times in a row is not waited for.
    let unpulled = |name| fleet::ReplicaStatus { failure_reason: "ErrImagePull".into(), ..transient(name) };
    cell.reports("a", at(50), &[unpulled("m-1"), unpulled("m-2")]);
    assert!(!cell.failure().unwrap().may_pass);
}
