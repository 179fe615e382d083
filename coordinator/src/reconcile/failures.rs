//! What is remembered of a revision's failures: why the last attempt to start a replica failed, for gateways, and on
//! which nodes replicas failed again and again, for placement. In memory only: agents report failures again after a
//! restart of the coordinator.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase, ReplicaStatus};

use super::{
    view::timestamp,
    world::{ReplicaState, RevisionState, World, since},
};

/// Failures in a row after which a replica is replaced by one on another node, if one fits there. The first is
/// followed by the next attempt at once, the second after 10 s.
pub const MAX_FAILURES_ON_NODE: u32 = 3;
/// For how long other nodes are preferred to a node on which a replica failed that often. Longer than the longest
/// back-off of a replica (5 min), so that replicas do not move faster than they would be started again.
pub const FAILED_NODE_EXPIRY: Duration = Duration::from_secs(600);
/// Time after which a write that the store has refused is tried again at the latest.
const STORE_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Reasons of replicas whose image or model could not be fetched.
const FETCH_FAILURES: [&str; 2] = ["ErrImagePull", "ModelFetchFailed"];
/// Reason of a revision of which no replica can be started or woken, since the store cannot record it.
const STORE_UNAVAILABLE: &str = "StoreUnavailable";

/// Failures of one revision.
#[derive(Debug, Default)]
pub struct Failures {
    /// The last attempt, if it failed for a reason that waiting does not cure and the next one does not follow at once.
    /// Kept when the replica is removed, so that requests which wait at a gateway get to know it.
    last: Option<fleet::RevisionFailure>,
    /// The start or wake that the store has refused to record; cleared by the next write that succeeds.
    unrecorded: Option<fleet::RevisionFailure>,
    /// Number of the last failure; grows with each one.
    attempt: u64,
    /// Nodes on which a replica has failed [`MAX_FAILURES_ON_NODE`] times in a row, and when it last did.
    nodes: BTreeMap<String, Timestamp>,
}

impl Failures {
    /// Takes in the status of a replica that has failed on `node`.
    pub fn record(&mut self, status: &ReplicaStatus, node: &str, now: Timestamp) {
        if status.consecutive_failures >= MAX_FAILURES_ON_NODE {
            self.nodes.retain(|_, at| since(*at, now) < FAILED_NODE_EXPIRY);
            self.nodes.insert(node.to_owned(), now);
        }
        if !backs_off(status) {
            self.last = None;
            return;
        }
        let attempt = self.next_attempt(now);
        self.last = Some(fleet::RevisionFailure {
            reason: status.failure_reason.clone(),
            message: status.message.clone(),
            exit_code: status.exit_code,
            last_log_lines: status.last_log_lines.clone(),
            next_attempt_at: status.next_attempt_at,
            attempt,
            ..Default::default()
        });
    }

    /// A replica is being started, or is ready: the last failure is over.
    pub fn clear(&mut self) {
        self.last = None;
    }

    /// The store cannot record that a replica is to start or to wake.
    pub fn record_unrecorded(&mut self, error: &str, now: Timestamp) {
        let attempt = self.next_attempt(now);
        self.unrecorded = Some(fleet::RevisionFailure {
            reason: STORE_UNAVAILABLE.to_owned(),
            message: format!("the coordinator cannot record that a replica is to start: {error}"),
            next_attempt_at: now.checked_add(STORE_RETRY_INTERVAL).ok().map(timestamp),
            attempt,
            ..Default::default()
        });
    }

    /// The store has recorded what was to be recorded. Returns `true` if it had refused before.
    pub fn clear_unrecorded(&mut self) -> bool {
        self.unrecorded.take().is_some()
    }

    /// Nodes on which the revision has failed lately.
    pub fn nodes(&self, now: Timestamp) -> BTreeSet<String> {
        let recent = self.nodes.iter().filter(|(_, at)| since(**at, now) < FAILED_NODE_EXPIRY);
        recent.map(|(node, _)| node.clone()).collect()
    }

    /// Numbers begin with the time, so that those of a new coordinator are not those of the previous one.
    fn next_attempt(&mut self, now: Timestamp) -> u64 {
        self.attempt = (self.attempt + 1).max(u64::try_from(now.as_second()).unwrap_or_default());
        self.attempt
    }
}

/// Returns `true` for a replica that waits for its next attempt after a failure that waiting does not cure. What could
/// not be fetched several times in a row, from a registry or store that does not answer, counts as such.
fn backs_off(status: &ReplicaStatus) -> bool {
    let keeps_failing =
        status.consecutive_failures >= MAX_FAILURES_ON_NODE && FETCH_FAILURES.contains(&status.failure_reason.as_str());
    let is_permanent = status.failure_permanent || keeps_failing;
    status.phase() == ReplicaPhase::Failed && is_permanent && status.next_attempt_at.is_some()
}

/// Why the revision cannot serve, for gateways. `None` if a replica of it is ready, is being started, or sleeps and can
/// be woken.
pub fn current(world: &World, revision: &RevisionState) -> Option<fleet::RevisionFailure> {
    let replicas = revision.replicas.iter().filter_map(|name| world.replicas.get(name));
    let live: Vec<&ReplicaState> = replicas.filter(|replica| !replica.record.draining).collect();
    if live.iter().any(|replica| replica.ready()) {
        return None;
    }
    let Failures { last, unrecorded, .. } = &revision.failures;
    unrecorded.clone().or_else(|| permanent(last.as_ref()?, &live)).or_else(|| passing(revision, &live))
}

/// The last failure, if all replicas wait for their next attempt after one that waiting does not cure.
fn permanent(last: &fleet::RevisionFailure, live: &[&ReplicaState]) -> Option<fleet::RevisionFailure> {
    if !live.iter().all(|replica| replica.status.as_ref().is_some_and(backs_off)) {
        return None;
    }
    // If the replica that was to be started again is gone, the next request starts another one.
    let next_attempt_at = last.next_attempt_at.filter(|_| !live.is_empty());
    Some(fleet::RevisionFailure { next_attempt_at, ..last.clone() })
}

/// Why no replica is ready, if waiting may cure it: all have failed, or none can be placed.
fn passing(revision: &RevisionState, live: &[&ReplicaState]) -> Option<fleet::RevisionFailure> {
    let failed = |replica: &&ReplicaState| replica.status.clone().filter(|it| it.phase() == ReplicaPhase::Failed);
    let statuses: Option<Vec<ReplicaStatus>> = live.iter().map(failed).collect();
    let (reason, message) = match statuses?.into_iter().next() {
        Some(status) => (status.failure_reason, status.message),
        None => ("Unschedulable".to_owned(), revision.unplaced.clone()?),
    };
    Some(fleet::RevisionFailure { reason, message, may_pass: true, ..Default::default() })
}

/// Returns `true` for a replica that is to be replaced by one on another node, if one fits there.
pub fn is_to_move(replica: &ReplicaState) -> bool {
    let waits = |status: &ReplicaStatus| {
        status.phase() == ReplicaPhase::Failed
            && status.next_attempt_at.is_some()
            && status.consecutive_failures >= MAX_FAILURES_ON_NODE
    };
    replica.status.as_ref().is_some_and(waits)
}
