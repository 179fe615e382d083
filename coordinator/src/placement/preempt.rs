//! Room for those that need it more: which idle replicas of lower priority, or asleep, leave.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use super::{
    FleetView, Node, Outcome, PlacementRequest, Taken, Yields, filters,
    grant::{self, Grant},
    ledger::Ledger,
    place,
};

/// Sets of replicas that are tried on one node before the search for the smallest ends.
const TRIES: usize = 4096;

/// What has to leave so that a request fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preemption {
    /// The node that then has room.
    pub node: String,
    /// The GPUs that the request would get there.
    pub gpu_indices: Vec<u32>,
    /// The MIG devices that it would get there.
    pub mig_devices: Vec<String>,
    /// Names of the replicas that leave.
    pub victims: Vec<String>,
}

/// Which node is best to make room on. The fields, in order, are the policy; less is better.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// Of the victims, those that serve.
    serving: usize,
    victims: usize,
    /// The dearest of them is the cheapest there is.
    highest: Rank,
    /// By name, so that the answer is always the same.
    order: usize,
}

/// How dear a replica is; the lesser one leaves. Who sleeps anyhow is missed by nobody now, and counts less
/// than all others; among equals goes the one with the least to lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    priority: Option<i32>,
    /// The bits of a number that is not negative are in the number's order.
    worth: u64,
}

impl Rank {
    fn of(taken: &Taken) -> Self {
        let priority = (!taken.makes_way()).then_some(taken.priority);
        Self { priority, worth: taken.worth.max(0.0).to_bits() }
    }
}

/// For a request that has no place: the smallest set of idle replicas that yield to it ([`Yields`]), all on
/// one node, without which it would have one. Replicas that are leaving count as gone. On a node where the
/// search ends early (many small replicas), none of the set can be left out, but a smaller one may exist.
pub fn preempt(fleet: &FleetView, request: &PlacementRequest) -> Option<Preemption> {
    let mut nodes: Vec<&Node> = fleet.nodes.iter().filter(|node| evictable(node, request).next().is_some()).collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    let mut best: Option<(Cost, Preemption)> = None;
    for (order, node) in nodes.into_iter().enumerate() {
        // More of those that sleep are better than one that serves.
        let bound = best.as_ref().filter(|(cost, _)| cost.serving == 0 || !node.taken.iter().any(Taken::makes_way));
        let most = bound.map_or(usize::MAX, |(cost, _)| cost.victims);
        let Some((victims, grant)) = smallest(node, request, most) else { continue };
        let highest = victims.iter().map(|victim| Rank::of(victim)).max();
        let highest = highest.unwrap_or(Rank { priority: None, worth: 0 });
        let serving = victims.iter().filter(|victim| !victim.makes_way()).count();
        let cost = Cost { serving, victims: victims.len(), highest, order };
        if best.as_ref().is_none_or(|(best, _)| cost < *best) {
            let Grant { gpu_indices, mig_devices } = grant;
            let victims = victims.into_iter().map(|victim| victim.replica.clone()).collect();
            best = Some((cost, Preemption { node: node.name.clone(), gpu_indices, mig_devices, victims }));
        }
    }
    best.map(|(_, preemption)| preemption)
}

/// Replicas on the node that would leave for the request.
fn evictable<'a>(node: &'a Node, request: &PlacementRequest) -> impl Iterator<Item = &'a Taken> {
    let (priority, awaited) = (request.priority, request.awaited);
    node.taken.iter().filter(move |taken| {
        let yields = match taken.yields {
            Yields::ToHigher => taken.priority < priority,
            Yields::ToAwaited => taken.priority < priority || (awaited && taken.priority == priority),
            Yields::ToAll => true,
        };
        taken.idle && !taken.leaving && yields
    })
}

/// The smallest set of at most `most`, and what the request then gets.
fn smallest<'a>(node: &'a Node, request: &PlacementRequest, most: usize) -> Option<(Vec<&'a Taken>, Grant)> {
    filters::admits(node, request).ok()?;
    let mut candidates: Vec<&Taken> = evictable(node, request).collect();
    candidates.sort_by(|a, b| (Rank::of(a), &a.replica).cmp(&(Rank::of(b), &b.replica)));
    let without = |victims: &[&Taken]| {
        let leaves = |taken: &Taken| taken.leaving || victims.iter().any(|victim| victim.replica == taken.replica);
        grant::of(&Ledger::but(node, |taken| !leaves(taken)), request).ok()
    };
    without(&candidates)?;
    let asleep: Vec<&Taken> = candidates.iter().filter(|taken| taken.makes_way()).copied().collect();
    if !asleep.is_empty() && without(&asleep).is_some() {
        candidates = asleep;
    }
    let mut search = Search { tries: TRIES, chosen: Vec::new(), test: &without };
    for size in 0..=candidates.len().min(most) {
        if let Some(grant) = search.among(&candidates, size) {
            search.chosen.reverse();
            return Some((search.chosen, grant));
        }
    }
    if search.tries > 0 {
        return None;
    }
    // Too many to try: from the dearest down, whoever can stay does.
    for index in (0..candidates.len()).rev() {
        let mut fewer = candidates.clone();
        fewer.remove(index);
        if without(&fewer).is_some() {
            candidates = fewer;
        }
    }
    let grant = without(&candidates)?;
    (candidates.len() <= most).then_some((candidates, grant))
}

/// Tries sets of replicas, a limited number of them.
struct Search<'a, 't> {
    tries: usize,
    chosen: Vec<&'a Taken>,
    test: &'t dyn Fn(&[&'a Taken]) -> Option<Grant>,
}

impl<'a> Search<'a, '_> {
    /// The first set of this size that passes, in the order of its last, and so dearest, member; it is
    /// left in `chosen`.
    fn among(&mut self, candidates: &[&'a Taken], size: usize) -> Option<Grant> {
        let Some(before) = size.checked_sub(1) else {
            self.tries -= 1;
            return (self.test)(&self.chosen);
        };
        for last in before..candidates.len() {
            if self.tries == 0 {
                return None;
            }
            self.chosen.push(candidates[last]);
            let found = self.among(&candidates[..last], before);
            if found.is_some() {
                return found;
            }
            self.chosen.pop();
        }
        None
    }
}

/// How requests that have no place now will get one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prospect {
    /// There is room once the replicas that are leaving have left.
    Waits,
    /// There is room once these replicas have left, too.
    Preempts(Preemption),
    /// There is none in sight.
    None,
}

/// For requests that have no place now: who waits for what, in the order of the requests.
pub fn make_room(fleet: &FleetView, requests: &[PlacementRequest]) -> Vec<Prospect> {
    let mut prospects = vec![Prospect::None; requests.len()];
    let highest = requests.iter().max_by_key(|request| request.priority);
    let Some(highest) = highest else { return prospects };
    let leaving = |node: &Node| node.taken.iter().any(|taken| taken.leaving);
    // To whom the highest gets nothing, nobody gets anything; but for those of its own kind that are awaited.
    let most = PlacementRequest { awaited: requests.iter().any(|request| request.awaited), ..highest.clone() };
    if !fleet.nodes.iter().any(|node| leaving(node) || evictable(node, &most).next().is_some()) {
        return prospects;
    }
    let mut future = fleet.clone();
    future.nodes.iter_mut().for_each(|node| node.taken.retain(|taken| !taken.leaving));
    let places: BTreeMap<String, usize> =
        future.nodes.iter().enumerate().map(|(at, node)| (node.name.clone(), at)).collect();
    let mut wanting = Vec::new();
    for (at, placement) in place(&future, requests).into_iter().enumerate() {
        match placement.outcome {
            Outcome::Placed { node, gpu_indices, mig_devices } => {
                future.nodes[places[&node]].taken.push(requests[at].taking(gpu_indices, mig_devices));
                prospects[at] = Prospect::Waits;
            }
            Outcome::Unplaced(_) => wanting.push(at),
        }
    }
    wanting.sort_by_key(|at| Reverse(requests[*at].priority));
    // What cannot be had for one replica of a revision cannot be had for the next.
    let mut hopeless: BTreeSet<&str> = BTreeSet::new();
    for at in wanting {
        let request = &requests[at];
        if hopeless.contains(request.revision.as_str()) {
            continue;
        }
        let Some(preemption) = preempt(&future, request) else {
            hopeless.insert(&request.revision);
            continue;
        };
        let node = &mut future.nodes[places[&preemption.node]];
        node.taken.retain(|taken| !preemption.victims.contains(&taken.replica));
        node.taken.push(request.taking(preemption.gpu_indices.clone(), preemption.mig_devices.clone()));
        prospects[at] = Prospect::Preempts(preemption);
    }
    prospects
}
