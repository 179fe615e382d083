//! Runs the autoscaler and keeps what it decided. The loop and the simulator both call it.

use std::cmp::Ordering;

use jiff::Timestamp;

use super::{
    clock::scaler_time,
    observe::Dirty,
    record::{Entry, Recorder},
    world::{DECISIONS_KEPT, World},
};
use crate::{
    autoscaler::{Class, Observation, Reason, Scaler},
    placement::{self, FleetView},
    reconcile::{plan, world::RevisionState},
};

/// Decides for every revision; those whose number of replicas has changed are dirty then.
/// Returns what was decided.
pub fn decide_all(world: &mut World, now: Timestamp, recorder: &mut Recorder, dirty: &mut Dirty) -> DecisionCounts {
    let keys: Vec<_> = world.revisions.keys().cloned().collect();
    let mut pass = Pass::default();
    for key in keys {
        if decide(world, &key, now, recorder, &mut pass) {
            dirty.revision(world, &key);
        }
    }
    pass.decisions
}

/// How many decisions of the autoscaler raised the desired replicas, lowered them, or left them as they were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecisionCounts {
    /// More replicas than before.
    pub up: u64,
    /// Fewer replicas than before.
    pub down: u64,
    /// As many as before.
    pub unchanged: u64,
}

impl DecisionCounts {
    fn add(&mut self, before: u32, after: u32) {
        match after.cmp(&before) {
            Ordering::Greater => self.up += 1,
            Ordering::Less => self.down += 1,
            Ordering::Equal => self.unchanged += 1,
        }
    }
}

/// What is the same for all decisions of one moment; looked at once, and only where somebody asks.
#[derive(Debug, Default)]
pub struct Pass {
    /// Decisions made so far.
    pub decisions: DecisionCounts,
    settled: Option<bool>,
    /// The fleet's free places.
    fleet: Option<FleetView>,
}

impl Pass {
    fn settled(&mut self, world: &World, now: Timestamp) -> bool {
        *self.settled.get_or_insert_with(|| world.settled(now))
    }

    /// Replicas of the revision that the fleet could hold, those that have a place included. `None` where
    /// it does not matter: for Knative's class, and where all that is wanted has a place.
    fn fits(&mut self, world: &World, revision: &RevisionState, live: u32, now: Timestamp) -> Option<u32> {
        let held_back = |reason: &Reason| matches!(reason, Reason::Capacity(_));
        let was_capped = revision.decisions.back().is_some_and(|(_, last)| last.reasons.iter().any(held_back));
        if revision.scaling.class != Class::Gpu || (revision.wanted <= live && !was_capped) {
            return None;
        }
        let fleet = self.fleet.get_or_insert_with(|| plan::fleet_view(world, &Default::default(), now));
        Some(placement::capacity(fleet, &plan::request(revision, 0)).saturating_add(live))
    }
}

/// Decides how many replicas a revision shall have. True where that has changed.
///
/// Before the fleet has settled (`World::settled`), replicas that run may be unknown: then a revision
/// that somebody waits for is woken, and everything else stays as it is.
pub fn decide(world: &mut World, key: &str, now: Timestamp, recorder: &mut Recorder, pass: &mut Pass) -> bool {
    let settled = pass.settled(world, now);
    let Some(revision) = world.revisions.get(key) else { return false };
    if world.retired(revision) {
        return retire(world, key);
    }
    let counts = world.counts(revision);
    let reachable = world.reachable(revision);
    if !settled && (revision.wanted > 0 || !revision.awaited()) {
        return false;
    }
    let observation = Observation {
        ready: Some(counts.ready),
        starting: counts.starting,
        current: revision.wanted,
        fits: pass.fits(world, revision, counts.ready + counts.starting, now),
        reachable,
        initial_scale_reached: revision.record.been_ready,
        load_time: revision.load_time,
    };
    let listening = settled && counts.ready + counts.starting > 0;
    let Some(revision) = world.revisions.get_mut(key) else { return false };
    let awaited = revision.awaited();
    let time = scaler_time(now);
    let scaler = match &mut revision.scaler {
        Some(scaler) => scaler,
        none => {
            recorder.write(now, key, || Entry::New { config: revision.scaling.clone(), ready: observation.ready });
            let mut scaler = Scaler::new(revision.scaling.clone(), time, observation.ready);
            if awaited {
                recorder.write(now, key, || Entry::Poke);
                scaler.poke(time);
            }
            none.insert(scaler)
        }
    };
    if listening {
        recorder.write(now, key, || Entry::Silence);
        scaler.silence(time);
    }
    let decision = scaler.decide(time, &observation);
    recorder.write(now, key, || Entry::Decide { observation, decision: decision.clone() });
    let mut wanted = decision.applied;
    if reachable {
        // Knative's scaler says nothing without load; one that takes traffic again needs its minimum at
        // once. And one that was never ready is given up by the roll-out, which sees its progress.
        let proven = revision.record.been_ready;
        wanted = wanted.max(if proven { revision.scaling.min_scale() } else { revision.needed() });
    }
    if !reachable && observation.ready == Some(0) && !awaited {
        // Another revision has its traffic, and no request waits: it is not waited for until it is ready.
        wanted = 0;
    }
    pass.decisions.add(revision.wanted, wanted);
    let changed = wanted != revision.wanted;
    revision.wanted = wanted;
    if wanted == 0 {
        for name in &revision.replicas {
            if let Some(replica) = world.replicas.get_mut(name) {
                // What is asked for next is asked for anew.
                replica.yielded = false;
            }
        }
    }
    // Quiet repetitions would push out the decisions that explain something.
    if revision.decisions.back().is_none_or(|(_, last)| !last.same_but_for_time(&decision)) {
        revision.decisions.push_back((now, decision));
        if revision.decisions.len() > DECISIONS_KEPT {
            revision.decisions.pop_front();
        }
    }
    changed
}

/// A revision that shall have no replicas needs no autoscaler.
fn retire(world: &mut World, key: &str) -> bool {
    world.revisions.get_mut(key).is_some_and(|revision| {
        revision.scaler = None;
        std::mem::take(&mut revision.wanted) > 0
    })
}
