//! Runs the autoscaler for one revision and keeps what it decided.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::{
    clock::scaler_time,
    plan,
    record::{Entry, Recorder},
    world::{DECISIONS_KEPT, World},
};
use crate::{
    autoscaler::{Observation, Scaler},
    placement,
};

/// Decides how many replicas a revision shall have. True where that has changed.
///
/// Before the fleet has settled (`World::settled`), replicas that run may be unknown: then a revision
/// that somebody waits for is woken, and everything else stays as it is.
pub fn decide(world: &mut World, key: &str, now: Timestamp, recorder: &mut Recorder) -> bool {
    let settled = world.settled(now);
    let Some(revision) = world.revisions.get(key) else { return false };
    let counts = world.counts(revision);
    let reachable = world.reachable(revision);
    if !settled {
        let waited_for = revision.waiting.values().any(|waiting| *waiting > 0);
        if revision.wanted > 0 || !waited_for {
            return false;
        }
    }
    let capacity = revision.scaling.wants_capacity().then(|| capacity(world, key, now));
    let observation = Observation {
        ready: Some(counts.ready),
        starting: counts.starting,
        draining: counts.draining,
        current: revision.wanted,
        reachable,
        capacity,
    };
    let Some(revision) = world.revisions.get_mut(key) else { return false };
    let time = scaler_time(now);
    let scaler = match &mut revision.scaler {
        Some(scaler) => scaler,
        none => {
            recorder.write(now, key, || Entry::New { config: revision.scaling.clone(), ready: observation.ready });
            let mut scaler = Scaler::new(revision.scaling.clone(), time, observation.ready);
            if revision.waiting.values().any(|waiting| *waiting > 0) {
                recorder.write(now, key, || Entry::Poke);
                scaler.poke(time);
            }
            none.insert(scaler)
        }
    };
    let decision = scaler.decide(time, &observation);
    recorder.write(now, key, || Entry::Decide { observation: observation.clone(), decision: decision.clone() });
    let changed = decision.applied != revision.wanted;
    revision.wanted = decision.applied;
    // Quiet repetitions would push out the decisions that explain something.
    if revision.decisions.back().is_none_or(|(_, last)| !last.same_but_for_time(&decision)) {
        revision.decisions.push_back((now, decision));
        if revision.decisions.len() > DECISIONS_KEPT {
            revision.decisions.pop_front();
        }
    }
    changed
}

/// How many replicas of this revision the fleet's GPUs could hold, those that it has included.
fn capacity(world: &World, key: &str, now: Timestamp) -> u32 {
    let Some(revision) = world.revisions.get(key) else { return 0 };
    let own: BTreeSet<&str> = revision.replicas.iter().map(String::as_str).collect();
    let fleet = plan::fleet_view(world, &own, now);
    placement::capacity(&fleet, &plan::request(revision, 0))
}
