//! The fleet as placement sees it.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::ReplicaPhase;

use super::super::{
    cached, gpu_view,
    world::{NodeState, ReplicaState, RevisionState, World, since},
};
use crate::{
    model::Availability,
    placement::{FleetView, Node, Taken, Yields},
    spec,
};

/// A replica that has just become ready serves for so long before it yields its GPUs to equals: models that
/// share one take turns, and do not do nothing but change.
const TURN: Duration = Duration::from_secs(5);

/// The nodes that replicas may be placed on now, and what is taken there.
pub fn fleet_view(world: &World, gone: &BTreeSet<&str>, now: Timestamp) -> FleetView {
    let nodes = world
        .nodes
        .values()
        .filter(|node| node.session.is_some() && !node.lost(world.settings.node_lease, now))
        .filter_map(|node| node_view(world, node, gone, now))
        .collect();
    FleetView { nodes, policy: world.settings.placement_policy }
}

fn node_view(world: &World, node: &NodeState, gone: &BTreeSet<&str>, now: Timestamp) -> Option<Node> {
    let inventory = node.inventory.as_ref()?;
    let taken = node
        .replicas
        .iter()
        .filter(|name| !gone.contains(name.as_str()))
        .filter_map(|name| world.replicas.get(name))
        .filter_map(|replica| taken(world, replica, now))
        .collect();
    Some(Node {
        name: node.record.name.clone(),
        schedulable: node.record.availability == Availability::Open,
        labels: inventory.labels.clone().into_iter().collect(),
        gpus: inventory.gpus.iter().filter_map(|gpu| gpu_view::placeable(node, gpu)).collect(),
        cached: cached::addresses(&node.cached),
        // Requests for CPU and memory are taken as hints, not limits: the process runtime does not
        // enforce them, and KServe's default of one core would fill a small machine with idle replicas.
        cpu_millis: None,
        memory_bytes: None,
        taken,
    })
}

fn taken(world: &World, replica: &ReplicaState, now: Timestamp) -> Option<Taken> {
    let revision = world.revisions.get(&replica.record.revision)?;
    if replica.has_released_gpu() {
        return None;
    }
    let settled = matches!(replica.phase(), ReplicaPhase::Ready | ReplicaPhase::Failed | ReplicaPhase::Asleep);
    // What is about to sleep and frees its GPUs by it is as good as gone.
    let going = replica.record.asleep
        && matches!(replica.phase(), ReplicaPhase::Ready | ReplicaPhase::Draining)
        && spec::sleep_paths(&revision.record.template.annotations).is_some();
    Some(Taken {
        idle: settled && replica.running == 0 && !revision.awaited(),
        leaving: replica.record.draining || going,
        yields: yields(world, revision, replica, now),
        worth: replica.worth,
        ..of(revision, replica)
    })
}

/// What a replica holds, or held before it slept.
pub(super) fn of(revision: &RevisionState, replica: &ReplicaState) -> Taken {
    let record = &replica.record;
    Taken {
        mig_devices: record.mig_devices.clone(),
        ..Taken::of(&revision.record.template, &record.name, &record.revision, record.gpu_indices.clone())
    }
}

fn yields(world: &World, revision: &RevisionState, replica: &ReplicaState, now: Timestamp) -> Yields {
    if replica.record.asleep {
        return if world.keeps_promise(revision, replica) { Yields::ToHigher } else { Yields::ToAll };
    }
    let ready_at = replica.status.as_ref().and_then(|status| status.ready_at);
    let served = ready_at.and_then(|at| Timestamp::new(at.seconds, at.nanos).ok()).map(|at| since(at, now));
    let had_its_turn = replica.ready() && served.is_some_and(|served| served >= TURN);
    if had_its_turn && can_yield(world, revision) { Yields::ToAwaited } else { Yields::ToHigher }
}

/// True where a replica of the revision can sleep so that others have its GPUs, and nothing promises that
/// it serves.
pub(super) fn can_yield(world: &World, revision: &RevisionState) -> bool {
    revision.scaling.min_scale() == 0
        && spec::sleep_paths(&revision.record.template.annotations).is_some()
        && world.sleepers(revision, 0).most > 0
}
