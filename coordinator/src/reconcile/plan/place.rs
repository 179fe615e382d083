//! Where open wishes find their places: sleepers wake, replicas are placed, and idle ones make room.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use jiff::Timestamp;

use super::{
    super::world::{NodeState, ReplicaState, RevisionState, World},
    Create, Plan, Wish,
    nodes::{self, fleet_view},
    placing,
};
use crate::{
    model::RevisionKey,
    placement::{self, FleetView, Outcome, PlacementRequest, Preemption, Prospect, Taken},
    spec,
};

/// Gives every wish its place, or says why it has none.
pub(super) fn place(world: &World, mut wishes: Vec<Wish<'_>>, now: Timestamp, plan: &mut Plan) {
    if !wishes.iter().any(|wish| wish.is_open() || !wish.failing.is_empty()) {
        plan.unplaced.extend(wishes.iter().map(|wish| (wish.revision.record.key(), None)));
        return;
    }
    let gone: BTreeSet<&str> = plan.forget.iter().map(|(name, _)| name.as_str()).collect();
    let mut places = Places { world, fleet: fleet_view(world, &gone, now), open: BTreeMap::new() };
    wishes.sort_by_key(|wish| Reverse(spec::priority(&wish.revision.record.template.annotations)));
    wishes.iter_mut().for_each(|wish| places.wake(wish, plan));
    let serving =
        |wish: &Wish<'_>| (0..wish.count).map(|at| placing(world, wish.revision, at, now)).collect::<Vec<_>>();
    let nowhere = places.create(wishes.iter().flat_map(serving).collect(), false, plan);
    // Who is to sleep takes only what is left.
    let asleep =
        |wish: &Wish<'_>| (0..wish.asleep).map(|at| placing(world, wish.revision, at, now)).collect::<Vec<_>>();
    let left_out = places.create(wishes.iter().flat_map(asleep).collect(), true, plan);
    let homes: Homes<'_> = wishes
        .iter()
        .filter(|wish| !wish.sleepers.is_empty())
        .map(|wish| (wish.revision.record.key(), (wish.revision, &*wish.sleepers)))
        .collect();
    let (at_home, nowhere): (Vec<_>, Vec<_>) =
        nowhere.into_iter().partition(|(request, _)| homes.contains_key(&request.revision));
    let rest = places.come_home(&homes, at_home, plan);
    places.make_room(nowhere.into_iter().chain(rest).chain(left_out).collect(), plan);
    if world.settled(now) {
        wishes.iter().for_each(|wish| places.replace_failing(wish, now, plan));
    }
    let mut open = places.open;
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

/// A request without a place, and why.
type Nowhere = (PlacementRequest, String);
/// Revisions with replicas that sleep on, and these.
type Homes<'a> = BTreeMap<RevisionKey, (&'a RevisionState, &'a [&'a str])>;

/// The fleet while places are given.
struct Places<'a> {
    world: &'a World,
    fleet: FleetView,
    /// For each revision, why the last of its replicas has no place, and how many have none in sight.
    open: BTreeMap<String, (String, usize)>,
}

impl Places<'_> {
    /// Wakes sleepers whose devices can be had, as many as are wanted; the others stay in the wish. As long as
    /// nobody waits for an answer they stand for those that are wanted: others need the devices more, and
    /// whoever has yielded does not take its own back.
    fn wake(&mut self, wish: &mut Wish<'_>, plan: &mut Plan) {
        let mut others = Vec::new();
        let awaited = wish.revision.awaited();
        for name in std::mem::take(&mut wish.sleepers) {
            let replica = &self.world.replicas[name];
            let held = nodes::of(wish.revision, replica);
            let node = self.fleet.nodes.iter_mut().find(|node| node.name == replica.record.node);
            let may = wish.count > 0 && (awaited || !replica.yielded);
            match node.filter(|node| may && placement::can_have(node, &held)) {
                Some(node) => {
                    node.taken.retain(|taken| taken.replica != name);
                    node.taken.push(held);
                    plan.wake.push(name.to_owned());
                    wish.count -= 1;
                }
                None => others.push(name),
            }
        }
        if !awaited {
            wish.count = wish.count.saturating_sub(others.len() as u32);
        }
        wish.sleepers = others;
    }

    /// Places replicas; those that have no place come back.
    fn create(&mut self, requests: Vec<PlacementRequest>, asleep: bool, plan: &mut Plan) -> Vec<Nowhere> {
        let (mut placed, mut nowhere) = (Vec::new(), Vec::new());
        for (placement, request) in placement::place(&self.fleet, &requests).into_iter().zip(requests) {
            match placement.outcome {
                Outcome::Placed { node, gpu_indices, mig_devices } => {
                    placed.push((node.clone(), request.taking(gpu_indices.clone(), mig_devices.clone())));
                    plan.create.push(Create { revision: request.revision, node, gpu_indices, mig_devices, asleep });
                }
                Outcome::Unplaced(why) => nowhere.push((request, why.to_string())),
            }
        }
        self.put(placed);
        nowhere
    }

    /// Replaces replicas that fail again and again by ones on nodes on which the revision has not failed lately, as far
    /// as they fit there without anybody making room.
    fn replace_failing(&mut self, wish: &Wish<'_>, now: Timestamp, plan: &mut Plan) {
        let failing = wish.failing.iter().filter(|name| {
            // It may be about to be preempted.
            !plan.evict.iter().any(|(victim, _)| victim == *name)
        });
        let failing: Vec<_> = failing.map(|name| (*name).to_owned()).collect();
        for (at, name) in (0..).zip(failing) {
            let request = placing(self.world, wish.revision, at, now);
            let Some(placement) = placement::place(&self.fleet, std::slice::from_ref(&request)).pop() else { return };
            let Outcome::Placed { node, gpu_indices, mig_devices } = placement.outcome else { return };
            if request.avoid.contains(&node) || self.world.replicas[&name].record.node == node {
                return;
            }
            self.put(vec![(node.clone(), request.taking(gpu_indices.clone(), mig_devices.clone()))]);
            let revision = request.revision;
            plan.create.push(Create { revision, node, gpu_indices, mig_devices, asleep: false });
            plan.replace.push(name);
        }
    }

    /// For revisions that sleep where others have their GPUs now: those make room, where they can.
    fn come_home(&mut self, homes: &Homes<'_>, requests: Vec<Nowhere>, plan: &mut Plan) -> Vec<Nowhere> {
        let mut rest = Vec::new();
        let mut used = BTreeSet::new();
        for (request, reason) in requests {
            let reason = format!("{reason}; a replica sleeps whose GPUs others have");
            let prospect = homes.get(&request.revision).and_then(|(revision, sleepers)| {
                sleepers.iter().filter(|name| !used.contains(*name)).find_map(|name| {
                    let replica = &self.world.replicas[*name];
                    let prospect = self.prospect_at(replica, &request);
                    (prospect != Prospect::None).then(|| (*name, prospect, nodes::of(revision, replica)))
                })
            });
            let Some((name, prospect, held)) = prospect else {
                rest.push((request, reason));
                continue;
            };
            used.insert(name);
            let node = self.world.replicas[name].record.node.clone();
            self.promise(&node, held, &prospect);
            self.note(&request, reason, prospect, plan);
        }
        rest
    }

    /// How a sleeper would get its own devices back.
    fn prospect_at(&self, replica: &ReplicaState, request: &PlacementRequest) -> Prospect {
        let record = &replica.record;
        let Some(node) = self.fleet.nodes.iter().find(|node| node.name == record.node) else { return Prospect::None };
        let mut node = node.clone();
        node.gpus.retain(|gpu| record.gpu_indices.contains(&gpu.index));
        for gpu in &mut node.gpus {
            gpu.mig_devices.retain(|device| record.mig_devices.contains(&device.uuid));
        }
        // It is there already, whatever the node takes.
        node.schedulable = true;
        node.taken.retain(|taken| taken.replica != record.name);
        let fleet = FleetView { nodes: vec![node], policy: self.fleet.policy };
        placement::make_room(&fleet, std::slice::from_ref(request)).pop().unwrap_or(Prospect::None)
    }

    /// Others shall not count on what has been promised.
    fn promise(&mut self, node: &str, held: Taken, prospect: &Prospect) {
        let Some(node) = self.fleet.nodes.iter_mut().find(|other| other.name == node) else { return };
        if let Prospect::Preempts(Preemption { victims, .. }) = prospect {
            node.taken.iter_mut().filter(|taken| victims.contains(&taken.replica)).for_each(|it| it.leaving = true);
        }
        node.taken.retain(|taken| taken.replica != held.replica);
        node.taken.push(held);
    }

    /// Lets idle replicas make room for those that have no place.
    fn make_room(&mut self, nowhere: Vec<Nowhere>, plan: &mut Plan) {
        let (requests, reasons): (Vec<_>, Vec<_>) = nowhere.into_iter().unzip();
        let prospects = placement::make_room(&self.fleet, &requests);
        for ((request, reason), prospect) in requests.iter().zip(reasons).zip(prospects) {
            self.note(request, reason, prospect, plan);
        }
    }

    fn note(&mut self, request: &PlacementRequest, reason: String, prospect: Prospect, plan: &mut Plan) {
        let without_hope = usize::from(prospect == Prospect::None);
        let why = match prospect {
            Prospect::None => reason,
            Prospect::Waits => format!("{reason}; waits for replicas that drain"),
            Prospect::Preempts(preemption) => {
                let by = &request.revision;
                let (yielding, leaving): (Vec<_>, Vec<_>) =
                    preemption.victims.into_iter().partition(|name| self.falls_asleep(name));
                plan.yields.extend(yielding.into_iter().map(|name| (name, by.clone())));
                plan.evict.extend(leaving.into_iter().map(|name| (name, by.clone())));
                format!("{reason}; idle replicas on {} make room", preemption.node)
            }
        };
        let (last, hopeless) = self.open.entry(request.revision.clone()).or_default();
        (*last, *hopeless) = (why, *hopeless + without_hope);
    }

    /// True where a replica makes room by sleeping; else it has to stop.
    fn falls_asleep(&self, name: &str) -> bool {
        let replica = &self.world.replicas[name];
        let revision = self.world.revisions.get(&replica.record.revision);
        replica.ready() && revision.is_some_and(|revision| nodes::can_yield(self.world, revision))
    }

    /// Notes what has been placed.
    fn put(&mut self, placed: Vec<(String, Taken)>) {
        let mut by_node: BTreeMap<String, Vec<Taken>> = BTreeMap::new();
        for (node, taken) in placed {
            by_node.entry(node).or_default().push(taken);
        }
        for node in &mut self.fleet.nodes {
            node.taken.extend(by_node.remove(&node.name).unwrap_or_default());
        }
    }
}

/// True where no node is missing that may come back at any moment, with room.
fn everyone_there(world: &World, now: Timestamp) -> bool {
    let there = |node: &NodeState| node.session.is_some() && node.inventory.is_some();
    world.nodes.values().all(|node| there(node) || node.lost(world.settings.node_lease, now))
}
