//! From wanted replica counts to what must change: which replicas to place, drain and forget. Pure.

use std::{cmp::Reverse, collections::BTreeSet};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::ReplicaPhase;

use super::world::{NodeState, RevisionState, World};
use crate::{
    model::RevisionKey,
    placement::{self, FleetView, Gpu, Node, Outcome, PlacementRequest, Taken},
};

/// What must change, and why some wishes stay open.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Replicas to place.
    pub create: Vec<Create>,
    /// Names of replicas that shall finish and stop.
    pub drain: Vec<String>,
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
        self.create.is_empty() && self.drain.is_empty() && self.forget.is_empty()
    }
}

/// Plans for the given revisions; the others are left as they are.
///
/// Scale-down takes replicas that are not ready first, then the one with the fewest running
/// requests, then the newest. A replica on a lost node is forgotten and counts no more.
pub fn plan(world: &World, revisions: &BTreeSet<RevisionKey>, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let mut wishes: Vec<(&RevisionState, u32)> = Vec::new();
    for key in revisions {
        let Some(revision) = world.revisions.get(key) else { continue };
        let live = sort_out(world, revision, now, &mut plan);
        let wanted = revision.allowed() as usize;
        if live.len() > wanted {
            plan.drain.extend(leavers(world, live, wanted));
            plan.unplaced.push((key.clone(), None));
        } else {
            wishes.push((revision, (wanted - live.len()) as u32));
        }
    }
    place(world, &wishes, now, &mut plan);
    plan
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

/// Which of the live replicas leave, so that `wanted` stay.
fn leavers<'a>(world: &'a World, mut live: Vec<&'a str>, wanted: usize) -> impl Iterator<Item = String> + 'a {
    live.sort_by_key(|name| {
        let replica = &world.replicas[*name];
        (replica.ready(), replica.running, Reverse(replica.record.created_at), *name)
    });
    let leaving = live.len() - wanted;
    live.into_iter().take(leaving).map(str::to_owned)
}

fn place(world: &World, wishes: &[(&RevisionState, u32)], now: Timestamp, plan: &mut Plan) {
    if wishes.iter().all(|(_, count)| *count == 0) {
        plan.unplaced.extend(wishes.iter().map(|(revision, _)| (revision.record.key(), None)));
        return;
    }
    let gone: BTreeSet<&str> = plan.forget.iter().map(|(name, _)| name.as_str()).collect();
    let fleet = fleet_view(world, &gone, now);
    let mut requests = Vec::new();
    for (revision, count) in wishes {
        for index in 0..*count {
            requests.push(request(revision, index));
        }
    }
    let mut placements = placement::place(&fleet, &requests).into_iter();
    for (revision, count) in wishes {
        let key = revision.record.key();
        let mut why = None;
        for placement in placements.by_ref().take(*count as usize) {
            match placement.outcome {
                Outcome::Placed { node, gpu_indices } => {
                    plan.create.push(Create { revision: key.clone(), node, gpu_indices });
                }
                Outcome::Unplaced(reasons) => why = Some(reasons.to_string()),
            }
        }
        plan.unplaced.push((key, why));
    }
}

/// What a replica of this revision asks for.
pub fn request(revision: &RevisionState, index: u32) -> PlacementRequest {
    PlacementRequest::of(&revision.record.template, &revision.record.key(), index)
}

/// The nodes that replicas may be placed on now, and what is taken there.
pub fn fleet_view(world: &World, gone: &BTreeSet<&str>, now: Timestamp) -> FleetView {
    let nodes = world
        .nodes
        .values()
        .filter(|node| node.session.is_some() && !node.lost(world.settings.node_lease, now))
        .filter_map(|node| node_view(world, node, gone))
        .collect();
    FleetView { nodes }
}

fn node_view(world: &World, node: &NodeState, gone: &BTreeSet<&str>) -> Option<Node> {
    let inventory = node.inventory.as_ref()?;
    let taken = node
        .replicas
        .iter()
        .filter(|name| !gone.contains(name.as_str()))
        .filter_map(|name| world.replicas.get(name))
        .filter_map(|replica| {
            let revision = world.revisions.get(&replica.record.revision)?;
            let record = &replica.record;
            Some(Taken::of(&revision.record.template, &record.name, &record.revision, record.gpu_indices.clone()))
        })
        .collect();
    Some(Node {
        name: node.record.name.clone(),
        schedulable: true,
        labels: inventory.labels.clone().into_iter().collect(),
        gpus: inventory
            .gpus
            .iter()
            .map(|gpu| Gpu {
                index: gpu.index,
                product: gpu.product.clone(),
                memory_bytes: gpu.memory_bytes,
                nvlink_group: gpu.nvlink_group,
            })
            .collect(),
        // Requests for CPU and memory are taken as hints, not limits: the process runtime does not
        // enforce them, and KServe's default of one core would fill a small machine with idle replicas.
        cpu_millis: None,
        memory_bytes: None,
        taken,
    })
}
