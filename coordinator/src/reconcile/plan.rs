//! From wanted replica counts to what must change: which replicas to place, wake, put to sleep, drain and
//! forget. Pure.

mod nodes;
mod place;
#[cfg(test)]
pub(super) mod tests;

use std::{cmp::Reverse, collections::BTreeSet};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::ReplicaPhase;

use super::{
    failures, storage,
    world::{RevisionState, World},
};
use crate::{
    model::{Availability, RevisionKey},
    placement::PlacementRequest,
};
pub use nodes::fleet_view;

/// What must change, and why some wishes stay open.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Replicas to place.
    pub create: Vec<Create>,
    /// Names of replicas that sleep and shall serve.
    pub wake: Vec<String>,
    /// Names of replicas that shall finish and sleep, since there are too many.
    pub sleep: Vec<String>,
    /// Names of idle replicas that shall sleep, each with the revision that gets its GPUs meanwhile.
    pub yields: Vec<(String, RevisionKey)>,
    /// Names of replicas that shall finish and stop, since there are too many.
    pub drain: Vec<String>,
    /// Names of replicas that must finish and stop, since their node drains or one of their GPUs is quarantined.
    pub move_off: Vec<String>,
    /// Names of replicas that fail again and again and are replaced on another node.
    pub replace: Vec<String>,
    /// Names of sleepers that shall stop, since their node's room for idle models does not suffice.
    pub cool: Vec<String>,
    /// Names of idle replicas that shall stop, each with the revision that gets its place.
    pub evict: Vec<(String, RevisionKey)>,
    /// Names of replicas that are gone, each with the reason.
    pub forget: Vec<(String, Gone)>,
    /// For each planned revision: why some wanted replicas have no place.
    pub unplaced: Vec<(RevisionKey, Option<String>)>,
}

/// A replica to place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// Key of its revision.
    pub revision: RevisionKey,
    /// Where it goes.
    pub node: String,
    /// Which GPUs it gets.
    pub gpu_indices: Vec<u32>,
    /// Which MIG devices it gets.
    pub mig_devices: Vec<String>,
    /// True: it is loaded and then sleeps.
    pub asleep: bool,
}

/// Why a replica shall finish and stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leaving {
    /// There are too many.
    ScaledDown,
    /// Its node drains, or one of its GPUs is quarantined.
    MovedOff,
    /// It fails again and again, and another node may do better.
    Failing,
    /// It sleeps, and its node's room for idle models does not suffice.
    Cooled,
    /// It is idle, and this revision of higher priority gets its place.
    Evicted(RevisionKey),
}

/// Why a replica is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// It drained and stopped.
    Stopped,
    /// Its node is lost.
    NodeLost,
    /// An operator has deleted its node.
    NodeDeleted,
}

impl Plan {
    /// True where nothing changes in the store.
    pub fn is_empty(&self) -> bool {
        let stays = self.sleep.is_empty() && self.yields.is_empty() && self.wake.is_empty();
        stays && self.create.is_empty() && self.forget.is_empty() && self.leaving().next().is_none()
    }

    /// Revisions of which replicas are to be started or woken.
    pub fn starting(&self, world: &World) -> BTreeSet<RevisionKey> {
        let woken = self.wake.iter().filter_map(|name| Some(world.replicas.get(name)?.record.revision.clone()));
        self.create.iter().map(|create| create.revision.clone()).chain(woken).collect()
    }

    /// All replicas that shall finish and stop, each with the reason.
    pub fn leaving(&self) -> impl Iterator<Item = (&String, Leaving)> {
        let drained = self.drain.iter().map(|name| (name, Leaving::ScaledDown));
        let moved = self.move_off.iter().map(|name| (name, Leaving::MovedOff));
        let replaced = self.replace.iter().map(|name| (name, Leaving::Failing));
        let cooled = self.cool.iter().map(|name| (name, Leaving::Cooled));
        drained
            .chain(moved)
            .chain(replaced)
            .chain(cooled)
            .chain(self.evict.iter().map(|(name, by)| (name, Leaving::Evicted(by.clone()))))
    }

    /// Lets every replica stay as it is, or wake.
    pub fn keep_all(&mut self) {
        self.sleep.clear();
        self.yields.clear();
        self.drain.clear();
        self.move_off.clear();
        self.replace.clear();
        self.cool.clear();
        self.evict.clear();
    }
}

/// A revision's open wish.
struct Wish<'a> {
    revision: &'a RevisionState,
    /// Replicas that shall serve, and are missing.
    count: u32,
    /// Replicas that sleep and could serve, the best first.
    sleepers: Vec<&'a str>,
    /// Replicas that shall sleep, and are missing.
    asleep: u32,
    /// Replicas that have to move, and stay until others are ready in their stead.
    stand_in: Vec<&'a str>,
    /// Replicas that fail again and again, and stay unless another node fits.
    failing: Vec<&'a str>,
}

/// Plans for the given revisions; the others are left as they are.
///
/// Scale-down takes replicas that are not ready first, then the one with the fewest running
/// requests, then the newest; the last one that is ready sleeps rather than stops ([`World::sleepers`]).
/// Scale-up wakes those that sleep first. A replica on a lost node is forgotten and counts no more. One on a
/// draining node, or on a quarantined GPU, counts no more either, but stays until another one is ready, or nowhere to be
/// placed. If its GPU is broken so that it cannot go on, it leaves at once.
pub fn plan(world: &World, revisions: &BTreeSet<RevisionKey>, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let mut wishes: Vec<Wish<'_>> = Vec::new();
    for key in revisions {
        wishes.extend(wish(world, key, now, &mut plan));
    }
    // Whoever waits for a place already has a say when places are given: a place that comes free is
    // not for the revision that happens to be looked at first.
    if wishes.iter().any(Wish::is_open) {
        let waiting =
            world.revisions.iter().filter(|(key, state)| state.unplaced.is_some() && !revisions.contains(*key));
        for (key, _) in waiting {
            wishes.extend(wish(world, key, now, &mut plan));
        }
    }
    place::place(world, wishes, now, &mut plan);
    plan
}

impl Wish<'_> {
    fn is_open(&self) -> bool {
        self.count > 0 || self.asleep > 0
    }
}

/// Sorts out the revision's replicas; gives what it lacks, unless it has too many.
fn wish<'a>(world: &'a World, key: &RevisionKey, now: Timestamp, plan: &mut Plan) -> Option<Wish<'a>> {
    let revision = world.revisions.get(key)?;
    let live = sort_out(world, revision, now, plan);
    let wanted = revision.allowed() as usize;
    let (moving, live): (Vec<_>, Vec<_>) = live.into_iter().partition(|name| has_to_move(world, name));
    let (broken, moving): (Vec<_>, Vec<_>) = moving.into_iter().partition(|name| cannot_go_on(world, name));
    plan.move_off.extend(broken.into_iter().map(str::to_owned));
    let sleeps = |name: &&str| world.replicas[*name].record.asleep;
    let (mut asleep, mut staying): (Vec<_>, Vec<_>) = live.into_iter().partition(sleeps);
    let (stopping, moving): (Vec<_>, Vec<_>) = moving.into_iter().partition(sleeps);
    plan.move_off.extend(stopping.into_iter().map(str::to_owned));
    let surplus = staying.len().saturating_sub(wanted);
    sort_for_leaving(world, &mut staying);
    let (leaving, staying) = staying.split_at(surplus);
    let count = (wanted - staying.len()) as u32;
    let missing = keep_warm(world, revision, leaving, &mut asleep, count, plan);
    let ready = staying.iter().filter(|name| world.replicas[**name].ready()).count();
    let stand_in = stand_ins(world, moving, wanted.saturating_sub(ready), plan);
    if surplus > 0 {
        plan.unplaced.push((key.clone(), None));
        return None;
    }
    let failing = staying.iter().copied().filter(|name| failures::is_to_move(&world.replicas[*name]));
    let failing = failing.collect();
    Some(Wish { revision, count, sleepers: asleep, asleep: missing, stand_in, failing })
}

/// Of replicas that are too many some sleep, and the others leave; so do sleepers that are too many. Sorts
/// those that stay, whoever serves soonest first, and says how many are missing.
fn keep_warm(
    world: &World,
    revision: &RevisionState,
    leaving: &[&str],
    asleep: &mut Vec<&str>,
    to_wake: u32,
    plan: &mut Plan,
) -> u32 {
    let sleepers = world.sleepers(revision, revision.allowed());
    sort_for_waking(world, asleep);
    let failed = |name: &&str| world.replicas[*name].phase() == ReplicaPhase::Failed;
    // One that has failed is kept for a promise alone: there it is tried again, or shows why it is not.
    let most = if asleep.iter().any(failed) { sleepers.promised } else { sleepers.most };
    let excess = asleep.split_off(asleep.len().min((most + to_wake) as usize));
    plan.drain.extend(excess.into_iter().map(str::to_owned));
    let open = (sleepers.most as usize).saturating_sub(asleep.len());
    // The last ones have the most to lose, and only what is loaded can be kept loaded.
    let ready = leaving.iter().filter(|name| can_sleep(world, name)).count();
    let (gone, kept) = leaving.split_at(leaving.len() - open.min(ready));
    plan.drain.extend(gone.iter().map(|name| (*name).to_owned()));
    plan.sleep.extend(kept.iter().map(|name| (*name).to_owned()));
    (sleepers.promised as usize).saturating_sub(asleep.len() + kept.len()) as u32
}

/// True for one that is ready, on a node with memory for idle models.
fn can_sleep(world: &World, name: &str) -> bool {
    let replica = &world.replicas[name];
    let node = world.nodes.get(&replica.record.node).and_then(|node| node.inventory.as_ref());
    replica.ready() && node.is_some_and(|inventory| inventory.warm_memory_bytes > 0)
}

/// Whoever serves soonest, first.
fn sort_for_waking(world: &World, names: &mut [&str]) {
    names.sort_by_key(|name| {
        let order = match world.replicas[*name].phase() {
            // Not asleep yet.
            ReplicaPhase::Ready | ReplicaPhase::Draining => 0,
            ReplicaPhase::Asleep => 1,
            ReplicaPhase::Starting => 2,
            ReplicaPhase::Fetching | ReplicaPhase::Pending | ReplicaPhase::Unspecified => 3,
            ReplicaPhase::Failed | ReplicaPhase::Stopped => 4,
        };
        (order, *name)
    });
}

/// Returns `true` if the replica's node drains, or one of its GPUs is quarantined.
fn has_to_move(world: &World, replica: &str) -> bool {
    let Some(replica) = world.replicas.get(replica) else { return false };
    world.nodes.get(&replica.record.node).is_some_and(|node| {
        node.record.availability == Availability::Draining || node.quarantine_of(&replica.record).is_some()
    })
}

/// Returns `true` if one of the replica's GPUs is quarantined for an error that stops its work.
fn cannot_go_on(world: &World, replica: &str) -> bool {
    let Some(replica) = world.replicas.get(replica) else { return false };
    let quarantine = world.nodes.get(&replica.record.node).and_then(|node| node.quarantine_of(&replica.record));
    quarantine.is_some_and(|(_, quarantine)| quarantine.stops_work)
}

/// Of the replicas that have to move, those that are needed a little longer; the others leave.
fn stand_ins<'a>(world: &World, mut moving: Vec<&'a str>, needed: usize, plan: &mut Plan) -> Vec<&'a str> {
    sort_for_leaving(world, &mut moving);
    let leaving = moving.len().saturating_sub(needed);
    plan.move_off.extend(moving.drain(..leaving).map(str::to_owned));
    moving
}

/// The revision's replicas that go on living; those that are gone are put into the plan.
fn sort_out<'a>(world: &'a World, revision: &'a RevisionState, now: Timestamp, plan: &mut Plan) -> Vec<&'a str> {
    let mut live = Vec::new();
    for name in &revision.replicas {
        let Some(replica) = world.replicas.get(name) else { continue };
        let node = world.nodes.get(&replica.record.node);
        if node.is_none_or(|node| node.lost(world.settings.node_lease, now)) {
            plan.forget.push((name.clone(), Gone::NodeLost));
        } else if replica.phase() == ReplicaPhase::Stopped {
            // Without having been asked to leave, where the store was restored to a time before that.
            plan.forget.push((name.clone(), Gone::Stopped));
        } else if !replica.record.draining {
            live.push(name.as_str());
        }
    }
    live
}

/// Whoever shall leave first, first: of those that are not ready, else of those with the least to do, the
/// newest.
pub(super) fn sort_for_leaving(world: &World, names: &mut [&str]) {
    names.sort_by_key(|name| {
        let replica = &world.replicas[*name];
        (replica.ready(), replica.running, Reverse(replica.record.created_at), *name)
    });
}

/// What a replica of this revision asks for.
pub fn request(revision: &RevisionState, index: u32) -> PlacementRequest {
    PlacementRequest::of(&revision.record.template, &revision.record.key(), index)
}

/// The same, with the model's address where a secret tells it, and the nodes on which it has failed lately.
fn placing(world: &World, revision: &RevisionState, index: u32, now: Timestamp) -> PlacementRequest {
    let request = request(revision, index);
    let model = request.model.clone().or_else(|| storage::first_address(world, &revision.record));
    let awaited = revision.awaited();
    PlacementRequest { model, awaited, avoid: revision.failures.nodes(now), ..request }
}
