//! What each replica has done since this agent process knows it, for metering. Times are on the monotonic clock.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use pilotlight_proto::fleet::v1::{PhaseChange, ReplicaHistories, ReplicaHistory, ReplicaPhase, ReplicaStatus};
use tokio::time::Instant;

/// Changes kept of one replica; a coordinator that was away for longer has a gap.
const MAX_CHANGES: usize = 64;
/// Ended replicas whose histories are kept.
const MAX_ENDED: usize = 256;

/// All replicas' changes of phase. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Histories(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// Bumped with each change.
    version: u64,
    replicas: BTreeMap<String, History>,
    /// Those that have ended and are not assigned any more, oldest first.
    ended: VecDeque<String>,
}

#[derive(Debug, Default)]
struct History {
    changes: VecDeque<Change>,
}

#[derive(Debug, Clone, Copy)]
struct Change {
    sequence: u64,
    at: Instant,
    phase: ReplicaPhase,
    holds_gpu_memory: bool,
}

impl Histories {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a replica's status as of now.
    pub(super) fn record(&self, status: &ReplicaStatus) {
        let mut inner = self.lock();
        let history = inner.replicas.entry(status.replica.clone()).or_default();
        let last = history.changes.back().map(|change| (change.phase, change.holds_gpu_memory));
        let (phase, at) = match (status.phase(), last) {
            // Its container runs already. It is not known in which phase an earlier agent left it.
            (ReplicaPhase::Pending, None) if status.adopted => (ReplicaPhase::Unspecified, started(status)),
            (ReplicaPhase::Pending, Some((ReplicaPhase::Unspecified, _))) if status.adopted => return,
            (phase, _) => (phase, Instant::now()),
        };
        let holds_gpu_memory = phase == ReplicaPhase::Asleep && status.holds_gpu_memory;
        if last != Some((phase, holds_gpu_memory)) {
            history.add(at, phase, holds_gpu_memory);
            inner.version += 1;
        }
    }

    /// A replica is not assigned any more; it has ended.
    pub(super) fn end(&self, replica: &str) {
        let mut inner = self.lock();
        let Some(history) = inner.replicas.get_mut(replica) else { return };
        if history.changes.back().is_none_or(|last| last.phase != ReplicaPhase::Stopped) {
            history.add(Instant::now(), ReplicaPhase::Stopped, false);
            inner.version += 1;
        }
        inner.ended.retain(|other| other != replica);
        inner.ended.push_back(replica.to_owned());
        while inner.ended.len() > MAX_ENDED {
            let Some(oldest) = inner.ended.pop_front() else { return };
            inner.replicas.remove(&oldest);
        }
    }

    /// Everything that is known, unless that is still of `version`; and its version.
    pub fn since(&self, version: Option<u64>) -> Option<(u64, ReplicaHistories)> {
        let inner = self.lock();
        if version == Some(inner.version) {
            return None;
        }
        let now = Instant::now();
        let replicas = inner.replicas.iter().map(|(replica, history)| ReplicaHistory {
            replica: replica.clone(),
            changes: history.changes.iter().map(|change| change.message(now)).collect(),
        });
        Some((inner.version, ReplicaHistories { replicas: replicas.collect() }))
    }
}

impl History {
    fn add(&mut self, at: Instant, phase: ReplicaPhase, holds_gpu_memory: bool) {
        let sequence = self.changes.back().map_or(1, |last| last.sequence + 1);
        self.changes.push_back(Change { sequence, at, phase, holds_gpu_memory });
        if self.changes.len() > MAX_CHANGES {
            self.changes.pop_front();
        }
    }
}

impl Change {
    fn message(&self, now: Instant) -> PhaseChange {
        PhaseChange {
            sequence: self.sequence,
            age: prost_types::Duration::try_from(now.duration_since(self.at)).ok(),
            phase: self.phase.into(),
            holds_gpu_memory: self.holds_gpu_memory,
        }
    }
}

/// When an adopted replica's container started, as its record says. Only here the node's wall clock counts.
fn started(status: &ReplicaStatus) -> Instant {
    let seconds = status.started_at.map_or(0, |started| u64::try_from(started.seconds).unwrap_or(0));
    let started = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let age = SystemTime::now().duration_since(started).unwrap_or_default();
    let now = Instant::now();
    now.checked_sub(age).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: ReplicaPhase) -> ReplicaStatus {
        let mut status = ReplicaStatus { replica: "r".into(), ..ReplicaStatus::default() };
        status.set_phase(phase);
        status
    }

    /// Sequence, age in seconds and phase.
    fn changes(histories: &Histories) -> Vec<(u64, i64, ReplicaPhase)> {
        let (_, message) = histories.since(None).unwrap();
        let changes = message.replicas.iter().flat_map(|replica| &replica.changes);
        changes.map(|change| (change.sequence, change.age.unwrap().seconds, change.phase())).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn changes_have_ages_and_numbers_and_what_changes_nothing_is_none() {
        let histories = Histories::default();
        histories.record(&status(ReplicaPhase::Pending));
        tokio::time::advance(Duration::from_secs(5)).await;
        histories.record(&status(ReplicaPhase::Starting));
        let (version, _) = histories.since(None).unwrap();
        histories.record(&ReplicaStatus { message: "still".into(), ..status(ReplicaPhase::Starting) });
        assert!(histories.since(Some(version)).is_none());
        tokio::time::advance(Duration::from_secs(2)).await;
        histories.end("r");
        let expected = [(1, 7, ReplicaPhase::Pending), (2, 2, ReplicaPhase::Starting), (3, 0, ReplicaPhase::Stopped)];
        assert_eq!(changes(&histories), expected);
    }

    #[tokio::test]
    async fn an_adopted_replica_has_run_since_its_container_started() {
        let histories = Histories::default();
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64 - 2;
        let started_at = Some(prost_types::Timestamp { seconds, nanos: 0 });
        let adopted = |phase| ReplicaStatus { adopted: true, started_at, ..status(phase) };
        histories.record(&adopted(ReplicaPhase::Pending));
        histories.record(&adopted(ReplicaPhase::Pending));
        histories.record(&adopted(ReplicaPhase::Ready));
        histories.record(&adopted(ReplicaPhase::Failed));
        histories.record(&adopted(ReplicaPhase::Pending));
        let phases: Vec<_> = changes(&histories).into_iter().map(|(.., phase)| phase).collect();
        let expected = [ReplicaPhase::Unspecified, ReplicaPhase::Ready, ReplicaPhase::Failed, ReplicaPhase::Pending];
        assert_eq!(phases, expected);
        // A machine that was started less than two seconds ago cannot tell.
        assert!((2..=3).contains(&changes(&histories)[0].1));
    }

    #[tokio::test]
    async fn what_has_ended_is_kept_for_a_while() {
        let histories = Histories::default();
        for number in 0..1000 {
            let replica = format!("r-{number}");
            histories.record(&ReplicaStatus { replica: replica.clone(), ..status(ReplicaPhase::Ready) });
            histories.end(&replica);
        }
        (0..200).for_each(|turn| {
            histories.record(&status(if turn % 2 == 0 { ReplicaPhase::Ready } else { ReplicaPhase::Asleep }))
        });
        let (_, message) = histories.since(None).unwrap();
        assert_eq!(message.replicas.len(), MAX_ENDED + 1);
        let alive = message.replicas.iter().find(|history| history.replica == "r").unwrap();
        assert_eq!((alive.changes.len(), alive.changes[0].sequence), (MAX_CHANGES, 137));
    }
}
