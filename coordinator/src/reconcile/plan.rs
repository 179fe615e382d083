//! From wanted replica counts to what must change: which replicas to place, drain and forget. Pure.

#[cfg(test)]
mod tests;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase};

use super::{
    cached, storage,
    world::{NodeState, ReplicaState, RevisionState, World},
};
use crate::{
    model::{Availability, RevisionKey},
    placement::{self, FleetView, Gpu, MigDevice, Node, Outcome, PlacementRequest, Prospect, Taken},
};

/// What must change, and why some wishes stay open.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Replicas to place.
    pub create: Vec<Create>,
    /// Names of replicas that shall finish and stop, since there are too many.
    pub drain: Vec<String>,
    /// Names of replicas that shall finish and stop, since their node drains.
    pub move_off: Vec<String>,
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
}

/// Why a replica shall finish and stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leaving {
    /// There are too many.
    ScaledDown,
    /// Its node drains.
    NodeDrained,
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
}

impl Plan {
    /// True where nothing changes in the store.
    pub fn is_empty(&self) -> bool {
        self.create.is_empty() && self.forget.is_empty() && self.leaving().next().is_none()
    }

    /// All replicas that shall finish and stop, each with the reason.
    pub fn leaving(&self) -> impl Iterator<Item = (&String, Leaving)> {
        let drained = self.drain.iter().map(|name| (name, Leaving::ScaledDown));
        let moved = self.move_off.iter().map(|name| (name, Leaving::NodeDrained));
        drained.chain(moved).chain(self.evict.iter().map(|(name, by)| (name, Leaving::Evicted(by.clone()))))
    }

    /// Lets every replica stay.
    pub fn keep_all(&mut self) {
        self.drain.clear();
        self.move_off.clear();
        self.evict.clear();
    }
}

/// A revision's open wish.
struct Wish<'a> {
    revision: &'a RevisionState,
    /// Replicas to place.
    count: u32,
    /// Replicas on draining nodes that stay until others are ready in their stead.
    stand_in: Vec<&'a str>,
}

/// Plans for the given revisions; the others are left as they are.
///
/// Scale-down takes replicas that are not ready first, then the one with the fewest running
/// requests, then the newest. A replica on a lost node is forgotten and counts no more. One on a
/// draining node counts no more either, but stays until another one is ready, or nowhere to be placed.
pub fn plan(world: &World, revisions: &BTreeSet<RevisionKey>, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let mut wishes: Vec<Wish<'_>> = Vec::new();
    for key in revisions {
        wishes.extend(wish(world, key, now, &mut plan));
    }
    // Whoever waits for a place already has a say when places are given: a place that comes free is
    // not for the revision that happens to be looked at first.
    if wishes.iter().any(|wish| wish.count > 0) {
        let waiting =
            world.revisions.iter().filter(|(key, state)| state.unplaced.is_some() && !revisions.contains(*key));
        for (key, _) in waiting {
            wishes.extend(wish(world, key, now, &mut plan));
        }
    }
    place(world, wishes, now, &mut plan);
    plan
}

/// Sorts out the revision's replicas; gives what it lacks, unless it has too many.
fn wish<'a>(world: &'a World, key: &RevisionKey, now: Timestamp, plan: &mut Plan) -> Option<Wish<'a>> {
    let revision = world.revisions.get(key)?;
    let live = sort_out(world, revision, now, plan);
    let wanted = revision.allowed() as usize;
    let (moving, mut staying): (Vec<_>, Vec<_>) = live.into_iter().partition(|name| on_draining_node(world, name));
    let surplus = staying.len().saturating_sub(wanted);
    sort_for_leaving(world, &mut staying);
    let (leaving, staying) = staying.split_at(surplus);
    plan.drain.extend(leaving.iter().map(|name| (*name).to_owned()));
    let ready = staying.iter().filter(|name| world.replicas[**name].ready()).count();
    let stand_in = stand_ins(world, moving, wanted.saturating_sub(ready), plan);
    let count = (wanted - staying.len()) as u32;
    if surplus > 0 {
        plan.unplaced.push((key.clone(), None));
        return None;
    }
    Some(Wish { revision, count, stand_in })
}

fn on_draining_node(world: &World, replica: &str) -> bool {
    let node = world.replicas.get(replica).and_then(|replica| world.nodes.get(&replica.record.node));
    node.is_some_and(|node| node.record.availability == Availability::Draining)
}

/// Of the replicas on draining nodes, those that are needed a little longer; the others leave.
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
        } else if replica.record.draining {
            if replica.phase() == ReplicaPhase::Stopped {
                plan.forget.push((name.clone(), Gone::Stopped));
            }
        } else {
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

fn place(world: &World, wishes: Vec<Wish<'_>>, now: Timestamp, plan: &mut Plan) {
    if wishes.iter().all(|wish| wish.count == 0) {
        plan.unplaced.extend(wishes.iter().map(|wish| (wish.revision.record.key(), None)));
        return;
    }
    let gone: BTreeSet<&str> = plan.forget.iter().map(|(name, _)| name.as_str()).collect();
    let mut fleet = fleet_view(world, &gone, now);
    let requests: Vec<_> =
        wishes.iter().flat_map(|wish| (0..wish.count).map(|index| placing(world, wish.revision, index))).collect();
    let placements = placement::place(&fleet, &requests);
    let mut placed = Vec::new();
    let (mut nowhere, mut reasons) = (Vec::new(), Vec::new());
    for (placement, request) in placements.into_iter().zip(&requests) {
        match placement.outcome {
            Outcome::Placed { node, gpu_indices, mig_devices } => {
                placed.push((node.clone(), request.taking(gpu_indices.clone(), mig_devices.clone())));
                plan.create.push(Create { revision: request.revision.clone(), node, gpu_indices, mig_devices });
            }
            Outcome::Unplaced(why) => {
                nowhere.push(request.clone());
                reasons.push(why.to_string());
            }
        }
    }
    put(&mut fleet, placed);
    let prospects = placement::make_room(&fleet, &nowhere);
    // For each revision, why the last of its replicas has no place, and how many have none in sight.
    let mut open: BTreeMap<&str, (String, usize)> = BTreeMap::new();
    for ((request, reason), prospect) in nowhere.iter().zip(reasons).zip(prospects) {
        let (why, hopeless) = open.entry(&request.revision).or_default();
        *why = match prospect {
            Prospect::None => {
                *hopeless += 1;
                reason
            }
            Prospect::Waits => format!("{reason}; waits for replicas that drain"),
            Prospect::Preempts(preemption) => {
                let by = &request.revision;
                plan.evict.extend(preemption.victims.into_iter().map(|name| (name, by.clone())));
                format!("{reason}; idle replicas of lower priority on {} make room", preemption.node)
            }
        };
    }
    let everyone_there = everyone_there(world, now);
    for mut wish in wishes {
        let key = wish.revision.record.key();
        let (why, hopeless) = open.remove(key.as_str()).unzip();
        // The operator wants the node empty: whoever has nowhere else to go leaves without a successor.
        if everyone_there {
            let leaving = wish.stand_in.len().min(hopeless.unwrap_or(0));
            plan.move_off.extend(wish.stand_in.drain(..leaving).map(str::to_owned));
        }
        plan.unplaced.push((key, why));
    }
}

/// Notes what has been placed.
fn put(fleet: &mut FleetView, placed: Vec<(String, Taken)>) {
    let mut by_node: BTreeMap<String, Vec<Taken>> = BTreeMap::new();
    for (node, taken) in placed {
        by_node.entry(node).or_default().push(taken);
    }
    for node in &mut fleet.nodes {
        node.taken.extend(by_node.remove(&node.name).unwrap_or_default());
    }
}

/// True where no node is missing that may come back at any moment, with room.
fn everyone_there(world: &World, now: Timestamp) -> bool {
    let there = |node: &NodeState| node.session.is_some() && node.inventory.is_some();
    world.nodes.values().all(|node| there(node) || node.lost(world.settings.node_lease, now))
}

/// What a replica of this revision asks for.
pub fn request(revision: &RevisionState, index: u32) -> PlacementRequest {
    PlacementRequest::of(&revision.record.template, &revision.record.key(), index)
}

/// The same, with the model's address where a secret tells it.
fn placing(world: &World, revision: &RevisionState, index: u32) -> PlacementRequest {
    let request = request(revision, index);
    let model = request.model.clone().or_else(|| storage::first_address(world, &revision.record));
    PlacementRequest { model, ..request }
}

/// The nodes that replicas may be placed on now, and what is taken there.
pub fn fleet_view(world: &World, gone: &BTreeSet<&str>, now: Timestamp) -> FleetView {
    let nodes = world
        .nodes
        .values()
        .filter(|node| node.session.is_some() && !node.lost(world.settings.node_lease, now))
        .filter_map(|node| node_view(world, node, gone))
        .collect();
    FleetView { nodes, policy: world.settings.placement_policy }
}

fn node_view(world: &World, node: &NodeState, gone: &BTreeSet<&str>) -> Option<Node> {
    let inventory = node.inventory.as_ref()?;
    let taken = node
        .replicas
        .iter()
        .filter(|name| !gone.contains(name.as_str()))
        .filter_map(|name| world.replicas.get(name))
        .filter_map(|replica| taken(world, replica))
        .collect();
    Some(Node {
        name: node.record.name.clone(),
        schedulable: node.record.availability == Availability::Open,
        labels: inventory.labels.clone().into_iter().collect(),
        gpus: inventory.gpus.iter().map(gpu_view).collect(),
        cached: cached::addresses(&node.cached),
        // Requests for CPU and memory are taken as hints, not limits: the process runtime does not
        // enforce them, and KServe's default of one core would fill a small machine with idle replicas.
        cpu_millis: None,
        memory_bytes: None,
        taken,
    })
}

fn gpu_view(gpu: &fleet::Gpu) -> Gpu {
    let device = |device: &fleet::MigDevice| MigDevice { uuid: device.uuid.clone(), profile: device.profile.clone() };
    Gpu {
        index: gpu.index,
        product: gpu.product.clone(),
        memory_bytes: gpu.memory_bytes,
        nvlink_group: gpu.nvlink_group,
        mig_enabled: gpu.mig_enabled,
        mig_devices: gpu.mig_devices.iter().map(device).collect(),
    }
}

fn taken(world: &World, replica: &ReplicaState) -> Option<Taken> {
    let record = &replica.record;
    let revision = world.revisions.get(&record.revision)?;
    let settled = matches!(replica.phase(), ReplicaPhase::Ready | ReplicaPhase::Failed);
    let awaited = revision.waiting.values().any(|waiting| *waiting > 0);
    let template = &revision.record.template;
    Some(Taken {
        mig_devices: record.mig_devices.clone(),
        idle: settled && replica.running == 0 && !awaited,
        leaving: record.draining,
        ..Taken::of(template, &record.name, &record.revision, record.gpu_indices.clone())
    })
}
