//! Roll-outs, carried out: revisions become ready or fail, old replicas make room for new ones.
//!
//! What to do is decided by [`crate::rollout`]; here it is fed with what is seen, written down and told.

use std::collections::BTreeSet;

use jiff::Timestamp;
use tracing::{info, warn};

use super::{
    conditions::{self, DEADLINE_EXCEEDED},
    plan::{self, Plan},
    run::Reconciler,
    world::{Event, RevisionState, ServiceState, World, since},
};
use crate::{
    model::{ConditionsRecord, RevisionFailure, RevisionRecord, ServiceRecord, keys},
    placement::{self, Outcome},
    rollout::{self, Scene, Side, Target, progress},
    store::{StoreError, Transaction},
};

impl Reconciler {
    /// Revisions that have reached their initial scale take their share of the requests.
    pub(super) async fn promote(&mut self, now: Timestamp) {
        let ready: Vec<_> = self.dirty.revisions.iter().filter(|key| is_ready(&self.world, key)).cloned().collect();
        for key in ready {
            if let Err(error) = self.promote_one(&key, now).await {
                warn!(revision = %key, %error, "cannot record that the revision is ready; will be tried again");
                self.dirty.revisions.insert(key);
            }
        }
    }

    async fn promote_one(&mut self, key: &str, now: Timestamp) -> Result<(), StoreError> {
        let Some(revision) = self.world.revisions.get(key) else { return Ok(()) };
        let record = RevisionRecord { been_ready: true, in_place: false, ..revision.record.clone() };
        let Some(service) = self.world.services.get(&record.service_key()) else { return Ok(()) };
        let mut of = service.record.clone();
        of.latest_ready = of.latest_ready.max(Some(record.number));
        of.settle();
        let object = format!("Revision/{}", record.name);
        self.record(record, Some(of)).await?;
        let service = self.world.revisions[key].record.service_key();
        let message = "has reached its initial scale".to_owned();
        self.world.note(&service, Event { time: now, warning: false, reason: "RevisionReady", object, message });
        Ok(())
    }

    /// Writes a revision and, where it changes too, its service; the world follows.
    async fn record(&mut self, record: RevisionRecord, service: Option<ServiceRecord>) -> Result<(), StoreError> {
        let (key, service_key) = (record.key(), record.service_key());
        let mut write = Transaction::new().put_json(&keys::revision(&key), &record);
        if let Some(service) = &service {
            write = write.put_json(&keys::service(&service_key), service);
        }
        self.commit(write).await?;
        if let Some(revision) = self.world.revisions.get_mut(&key) {
            revision.record = record;
        }
        if let (Some(state), Some(service)) = (self.world.services.get_mut(&service_key), service) {
            state.record = service;
        }
        self.dirty.revision(&self.world, &key);
        Ok(())
    }

    /// Gives up on new revisions that have shown no progress for too long. What runs of them stops, and
    /// the last good one, which has had the requests all along, gets its room back.
    pub(super) async fn give_up(&mut self, now: Timestamp) {
        if !self.world.settled(now) {
            return;
        }
        for (key, failure) in overdue(&self.world, now) {
            let Some(revision) = self.world.revisions.get(&key) else { continue };
            let (service, object) = (revision.record.service_key(), format!("Revision/{}", revision.record.name));
            let message = failure.message.clone();
            let record = RevisionRecord { failed: Some(failure), in_place: false, ..revision.record.clone() };
            if let Err(error) = self.record(record, None).await {
                warn!(revision = %key, %error, "cannot record that the revision has failed; will be tried again");
                continue;
            }
            info!(revision = %key, %message, "failed");
            if let Some(revision) = self.world.revisions.get_mut(&key) {
                revision.wanted = 0;
                revision.scaler = None;
            }
            let event = Event { time: now, warning: true, reason: DEADLINE_EXCEEDED, object, message };
            self.world.note(&service, event);
        }
    }

    /// Tells of changed shares. Whoever has another share now is looked at by the autoscaler at once.
    pub(super) fn note_shares(&mut self, now: Timestamp) {
        for key in &self.dirty.services {
            let Some(service) = self.world.services.get(key) else { continue };
            let shares = self.world.targets(service);
            if shares == service.shares {
                continue;
            }
            let numbers = shares.iter().chain(&service.shares).map(|target| target.revision);
            self.dirty.urgent.extend(numbers.map(|number| service.record.revision_key(number)));
            let told = percents(&shares) != percents(&service.shares);
            let message = describe(service, &shares);
            let object = format!("InferenceService/{}", service.record.service.name);
            if let Some(service) = self.world.services.get_mut(key) {
                service.shares = shares;
            }
            if told {
                self.world.note(key, Event { time: now, warning: false, reason: "TrafficChanged", object, message });
            }
        }
    }

    /// Lets old replicas go where a new revision finds no place.
    pub(super) async fn make_room(&mut self, services: BTreeSet<String>, now: Timestamp) {
        if !self.world.settled(now) {
            return;
        }
        for key in services {
            let Some(service) = self.world.services.get(&key).filter(|service| service.revisions.len() > 1) else {
                continue;
            };
            let step = step(&self.world, service, now);
            self.limit(service.record.clone(), &step);
            if let Err(error) = self.take_step(step, &key, now).await {
                warn!(service = %key, %error, "cannot make room for the new revision; will be tried again");
            }
        }
    }

    /// Sets how many replicas each revision of a service may have.
    fn limit(&mut self, service: ServiceRecord, step: &Step) {
        let numbers = self.world.services.get(&service.key()).map(|state| state.revisions.clone()).unwrap_or_default();
        for number in numbers {
            let key = service.revision_key(number);
            let Some(revision) = self.world.revisions.get_mut(&key) else { continue };
            let most = step.most.iter().find(|(of, _)| *of == number).map(|(_, most)| *most);
            let kept_out = step.kept_out == Some(number);
            if revision.most != most || revision.kept_out != kept_out {
                (revision.most, revision.kept_out) = (most, kept_out);
                self.dirty.revision(&self.world, &key);
            }
        }
    }

    async fn take_step(&mut self, step: Step, service: &str, now: Timestamp) -> Result<(), StoreError> {
        if let Some(revision) = step.in_place.and_then(|key| self.world.revisions.get(&key)) {
            let record = RevisionRecord { in_place: true, ..revision.record.clone() };
            self.record(record, None).await?;
        }
        let Some((name, former)) = step.victim else { return Ok(()) };
        self.carry_out(Plan { drain: vec![name.clone()], ..Plan::default() }, now).await?;
        if let Some(revision) = self.world.revisions.get_mut(&former) {
            // It must not come back before the place has been used.
            revision.most = revision.most.map(|most| most.saturating_sub(1));
        }
        let message = "gives its place to a replica of the new revision".to_owned();
        let object = format!("Replica/{name}");
        self.world.note(service, Event { time: now, warning: false, reason: "MakingRoom", object, message });
        Ok(())
    }

    /// Keeps the times at which conditions changed.
    pub(super) async fn remember_conditions(&mut self, now: Timestamp) {
        let changed: Vec<_> = self
            .dirty
            .services
            .iter()
            .filter_map(|key| {
                let service = self.world.services.get(key).filter(|service| service.record.component.is_predictor())?;
                let conditions = conditions::changed(&self.world, service, now)?;
                Some(ConditionsRecord { service: key.clone(), conditions })
            })
            .collect();
        for record in changed {
            let write = Transaction::new().put_json(&keys::conditions(&record.service), &record);
            if let Err(error) = self.commit(write).await {
                // They hold all the same; after a restart the change would merely look newer.
                warn!(service = %record.service, %error, "cannot record when conditions changed");
            }
            if let Some(service) = self.world.services.get_mut(&record.service) {
                service.conditions = record.conditions;
            }
        }
    }
}

/// True where a revision has just become ready.
fn is_ready(world: &World, key: &str) -> bool {
    let Some(revision) = world.revisions.get(key) else { return false };
    if revision.record.been_ready || world.retired(revision) {
        return false;
    }
    let needed = match world.services.get(&revision.record.service_key()) {
        Some(service) if revision.record.in_place => {
            progress::needed_in_place(revision.needed(), service.record.canary())
        }
        _ => revision.needed(),
    };
    world.counts(revision).ready >= needed
}

/// New revisions whose deadline has passed. One that holds no place at all waits for one as long as it
/// takes: it costs nobody anything, and its condition says what is missing.
fn overdue(world: &World, now: Timestamp) -> Vec<(String, RevisionFailure)> {
    let mut overdue = Vec::new();
    for service in world.services.values() {
        let Some(revision) = world.newest(service).filter(|revision| !revision.record.been_ready) else { continue };
        if world.retired(revision) || world.counts(revision).live() == 0 {
            continue;
        }
        let deadline = world.policy(service).progress_deadline;
        if !progress::overdue(since(revision.progress_at, now), deadline) {
            continue;
        }
        let (replica, said) = match conditions::failure(world, revision) {
            Some((replica, status)) => (replica.record.name.clone(), Some(status.clone())),
            None => (String::new(), None),
        };
        let why = match (&said, &revision.unplaced) {
            (Some(status), _) => conditions::failure_message(status),
            (None, Some(unplaced)) => unplaced.clone(),
            (None, None) => "its replicas do not become ready".to_owned(),
        };
        let failure = RevisionFailure {
            at: now,
            message: format!("no sign of progress for {}: {why}", humantime::format_duration(deadline)),
            replica,
            exit_code: said.and_then(|status| status.exit_code),
        };
        overdue.push((revision.record.key(), failure));
    }
    overdue
}

fn percents(shares: &[Target]) -> Vec<(u32, u8)> {
    shares.iter().map(|target| (target.revision, target.percent)).collect()
}

/// Shares in words.
fn describe(service: &ServiceState, shares: &[Target]) -> String {
    if shares.is_empty() {
        return "no revision takes requests".to_owned();
    }
    let share = |target: &Target| format!("{}% to {}", target.percent, service.record.revision_name(target.revision));
    shares.iter().map(share).collect::<Vec<_>>().join(", ")
}

/// What is to be done so that a revision finds its place.
#[derive(Debug, Default, PartialEq, Eq)]
struct Step {
    /// Number of a revision, and how many replicas it may have.
    most: Vec<(u32, u32)>,
    /// The revision that only the promise of a warm replica keeps out.
    kept_out: Option<u32>,
    /// Key of the revision that begins to take the places of others.
    in_place: Option<String>,
    /// The replica that goes, and its revision.
    victim: Option<(String, String)>,
}

/// Decides the next step of one service's roll-out. Pure.
fn step(world: &World, service: &ServiceState, now: Timestamp) -> Step {
    let targets = world.targets(service);
    let Some(needy) = needy(world, service, &targets) else { return Step::default() };
    let counts = world.counts(needy);
    let (sides, draining) = sides(world, service, needy, &targets);
    let record = &needy.record;
    let policy = world.policy(service);
    let room = rollout::room::room(&Scene {
        wanted: needy.wanted,
        enough: enough(service, needy),
        live: counts.live(),
        starting: counts.starting,
        unplaced: needy.unplaced.is_some(),
        in_place: needy.replaces_in_place(),
        proven: record.been_ready,
        others: &sides,
        draining: draining + counts.draining,
        policy: &policy,
    });
    let victim = room.give.iter().find_map(|number| victim(world, world.revision_of(service, *number)?, needy, now));
    let begins = !record.been_ready && !record.in_place && (room.partial || victim.is_some());
    let own = room.most.map(|most| (record.number, most));
    Step {
        most: room.others_most.into_iter().chain(own).collect(),
        kept_out: room.kept_warm.then_some(record.number),
        in_place: begins.then(|| record.key()),
        victim,
    }
}

/// The revision for which others should give way: the new one, else the one that is short of replicas
/// for the largest share.
fn needy<'a>(world: &'a World, service: &ServiceState, targets: &[Target]) -> Option<&'a RevisionState> {
    let newest = world.newest(service)?;
    if !newest.record.been_ready && !world.retired(newest) {
        return Some(newest);
    }
    let serving = targets.iter().filter(|target| target.percent > 0);
    let short = serving.filter_map(|target| {
        let revision = world.revision_of(service, target.revision)?;
        (world.counts(revision).live() < enough(service, revision)).then_some((target.percent, revision))
    });
    short.max_by_key(|(percent, revision)| (*percent, revision.record.number)).map(|(_, revision)| revision)
}

/// Replicas for which others should give way. A canary's minimum is as large as everybody's, its share
/// is not; more than the minimum is there for its load.
fn enough(service: &ServiceState, revision: &RevisionState) -> u32 {
    let newest = revision.record.number == service.record.latest_revision;
    if !newest || revision.wanted > revision.needed() {
        return revision.wanted;
    }
    progress::needs(revision.wanted, service.record.canary(), 100).max(revision.wanted.min(1))
}

/// The service's other revisions, and how many of their replicas drain.
fn sides(world: &World, service: &ServiceState, needy: &RevisionState, targets: &[Target]) -> (Vec<Side>, u32) {
    let steady = world.steady_targets(service);
    let share = |of: &[Target], number: u32| of.iter().find(|t| t.revision == number).map_or(0, |t| t.percent);
    let mut draining = 0;
    let mut sides = Vec::new();
    let others = service.revisions.iter().filter(|number| **number != needy.record.number);
    for revision in others.filter_map(|number| world.revision_of(service, *number)) {
        let counts = world.counts(revision);
        draining += counts.draining;
        let number = revision.record.number;
        sides.push(Side {
            number,
            wanted: revision.wanted,
            live: counts.live(),
            share: share(targets, number),
            full_share: share(&steady, number),
            min: revision.scaling.min_scale(),
        });
    }
    sides.retain(|side| side.live > 0);
    (sides, draining)
}

/// The replica of `former` whose place a replica of `needy` could take: of those, one that is not ready,
/// else the one with the least to do, else the newest.
fn victim(world: &World, former: &RevisionState, needy: &RevisionState, now: Timestamp) -> Option<(String, String)> {
    let stays = |name: &&str| world.replicas.get(*name).is_some_and(|replica| !replica.record.draining);
    let mut candidates: Vec<&str> = former.replicas.iter().map(String::as_str).filter(stays).collect();
    plan::sort_for_leaving(world, &mut candidates);
    let fits = |name: &str| {
        let fleet = plan::fleet_view(world, &BTreeSet::from([name]), now);
        let placed = placement::place(&fleet, &[plan::request(needy, 0)]);
        matches!(placed.first().map(|placement| &placement.outcome), Some(Outcome::Placed { .. }))
    };
    let found = candidates.into_iter().find(|name| fits(name))?;
    Some((found.to_owned(), former.record.key()))
}

#[cfg(test)]
mod tests;
