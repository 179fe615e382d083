use proptest::prelude::*;

use super::*;
use crate::placement::{
    filters, grant,
    ledger::Ledger,
    score::{Candidate, Score},
};

const PROFILES: [&str; 2] = ["1g.10gb", "3g.40gb"];

prop_compose! {
    fn any_node()(
        gpus in 0u32..5, labels in 0u8..8, cpu in prop::option::of(0u64..8_000), memory in prop::option::of(0u64..8),
        mig in prop::collection::vec(0usize..2, 0..3), groups in prop::collection::vec(0u32..3, 4),
        schedulable in prop::bool::weighted(0.9), cached in any::<bool>(),
    ) -> Node {
        let profiles: Vec<_> = mig.into_iter().map(|at| PROFILES[at]).collect();
        let mut node = if profiles.is_empty() { node("", gpus) } else { divided("", gpus, &profiles) };
        // The first GPU of a divided node stays whole.
        if let Some(first) = node.gpus.first_mut() {
            (first.mig_enabled, first.mig_devices) = (false, Vec::new());
        }
        for (gpu, group) in node.gpus.iter_mut().zip(groups) {
            gpu.nvlink_group = group;
        }
        (node.cpu_millis, node.memory_bytes, node.schedulable) = (cpu, memory, schedulable);
        let named = [("class", "A40"), ("region", "ORD1"), ("memory", "48")];
        let set = named.into_iter().enumerate().filter(|(bit, _)| labels & (1 << bit) != 0);
        node.labels = set.map(|(_, (key, value))| (key.to_owned(), value.to_owned())).collect();
        node.cached = cached.then(|| "hf://m".to_owned()).into_iter().collect();
        node
    }
}

/// Names, and UUIDs by name, are given last.
fn any_nodes() -> impl Strategy<Value = Vec<Node>> {
    let name = |(at, mut node): (usize, Node)| {
        node.name = format!("n{at}");
        for gpu in &mut node.gpus {
            for device in &mut gpu.mig_devices {
                device.uuid = format!("n{at}{}", device.uuid);
            }
        }
        node
    };
    prop::collection::vec(any_node(), 0..6).prop_map(move |nodes| nodes.into_iter().enumerate().map(name).collect())
}

fn any_term() -> impl Strategy<Value = NodeSelectorTerm> {
    let value = |key: usize| ["A40", "ORD1", "48"][key];
    let requirement = (0usize..3, 0usize..6).prop_map(move |(key, operator)| {
        let operator = ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"][operator];
        let values: &[&str] = match operator {
            "In" | "NotIn" => &[value(key)],
            "Gt" | "Lt" => &["47"],
            _ => &[],
        };
        term(["class", "region", "memory"][key], operator, values).match_expressions.unwrap().swap_remove(0)
    });
    let named = prop::option::weighted(0.1, (0usize..6).prop_map(|at| format!("n{at}")));
    (prop::collection::vec(requirement, 0..3), named).prop_map(|(requirements, name)| NodeSelectorTerm {
        match_expressions: Some(requirements),
        match_fields: name.map(|name| term("metadata.name", "In", &[&name]).match_expressions.unwrap()),
    })
}

prop_compose! {
    fn any_request()(
        amount in 0u32..10, share in 1u64..60, cpu in 0u64..3_000, memory in 0u64..3, revision in 0u8..3,
        picky in prop::bool::weighted(0.2), spreads in prop::option::of(any::<bool>()), priority in 0i32..3,
        required in prop::option::weighted(0.4, prop::collection::vec(any_term(), 1..3)),
        preferred in prop::collection::vec((1i32..100, any_term()), 0..3), model in any::<bool>(),
    ) -> PlacementRequest {
        let base = match amount {
            0..=3 => wants(amount),
            4..=6 => PlacementRequest { gpu_memory_bytes: Some(share * GIB), ..wants(1) },
            _ => wants_mig(PROFILES[amount as usize % 2], amount - 6),
        };
        PlacementRequest {
            revision: format!("default/m{revision}"),
            cpu_millis: cpu,
            memory_bytes: memory,
            node_selector: picky.then(|| ("class".to_owned(), "A40".to_owned())).into_iter().collect(),
            required_affinity: required.map(|node_selector_terms| NodeSelector { node_selector_terms }),
            preferred_affinity: preferred
                .into_iter()
                .map(|(weight, preference)| PreferredSchedulingTerm { weight, preference })
                .collect(),
            policy: spreads.map(|spreads| if spreads { PlacementPolicy::Spread } else { PlacementPolicy::BinPack }),
            priority,
            model: model.then(|| "hf://m".to_owned()),
            ..base
        }
    }
}

fn any_requests() -> impl Strategy<Value = Vec<PlacementRequest>> {
    prop::collection::vec(any_request(), 0..14)
}

/// Some of what was placed is there already when the rest comes.
fn occupied(nodes: Vec<Node>, requests: &[PlacementRequest]) -> FleetView {
    let mut fleet = fleet(nodes);
    for (placement, request) in place(&fleet, requests).into_iter().zip(requests) {
        if let Outcome::Placed { node, gpu_indices, mig_devices } = placement.outcome {
            let node = fleet.nodes.iter_mut().find(|it| it.name == node).unwrap();
            let at = node.taken.len();
            let taken = request.taking(gpu_indices, mig_devices);
            node.taken.push(Taken { replica: format!("{}-{at}", node.name), idle: at % 3 != 0, ..taken });
        }
    }
    fleet
}

/// Panics where the node holds more than it has, or a device twice.
fn check_capacity(node: &Node) {
    let mut memory: BTreeMap<u32, u64> = BTreeMap::new();
    let mut devices = BTreeSet::new();
    for taken in &node.taken {
        for uuid in &taken.mig_devices {
            let gpu = node.gpus.iter().find(|gpu| gpu.mig_devices.iter().any(|device| device.uuid == *uuid)).unwrap();
            assert!(taken.gpu_indices.contains(&gpu.index), "a device of another GPU");
            assert!(devices.insert(uuid), "{uuid} is given twice");
        }
        for index in taken.gpu_indices.iter().filter(|_| taken.mig_devices.is_empty()) {
            let gpu = node.gpus.iter().find(|gpu| gpu.index == *index).unwrap();
            assert!(!gpu.mig_enabled, "a divided GPU is given as a whole");
            let held = memory.entry(*index).or_default();
            *held += taken.gpu_memory_bytes.unwrap_or(gpu.memory_bytes);
            assert!(*held <= gpu.memory_bytes, "{held} bytes of GPU {index}");
        }
    }
    let sum = |amount: fn(&Taken) -> u64| node.taken.iter().map(amount).sum::<u64>();
    assert!(node.cpu_millis.is_none_or(|limit| sum(|taken| taken.cpu_millis) <= limit));
    assert!(node.memory_bytes.is_none_or(|limit| sum(|taken| taken.memory_bytes) <= limit));
}

/// Kubernetes' rules once more, told apart from the code under test.
fn affinity_holds(request: &PlacementRequest, node: &Node) -> bool {
    let holds = |requirement: &NodeSelectorRequirement, actual: Option<&String>| {
        let values = requirement.values.clone().unwrap_or_default();
        let number = |text: &String| text.parse::<i64>().ok();
        let pair = || actual.and_then(number).zip(values.first().and_then(number));
        match (requirement.operator.as_str(), actual) {
            ("In", Some(actual)) => values.contains(actual),
            ("NotIn", Some(actual)) => !values.contains(actual),
            ("Exists", Some(_)) | ("NotIn" | "DoesNotExist", None) => true,
            ("Gt", _) => pair().is_some_and(|(actual, bound)| actual > bound),
            ("Lt", _) => pair().is_some_and(|(actual, bound)| actual < bound),
            _ => false,
        }
    };
    let Some(selector) = &request.required_affinity else { return true };
    selector.node_selector_terms.iter().any(|term| {
        let (labels, fields) = (term.match_expressions.clone().unwrap(), term.match_fields.clone().unwrap_or_default());
        !(labels.is_empty() && fields.is_empty())
            && labels.iter().all(|requirement| holds(requirement, node.labels.get(&requirement.key)))
            && fields.iter().all(|requirement| holds(requirement, Some(&node.name)))
    })
}

/// Node, GPUs, MIG devices.
type Place = (String, Vec<u32>, Vec<String>);

/// What the index spares: every node for every request.
fn one_by_one(fleet: &FleetView, requests: &[PlacementRequest]) -> Vec<Option<Place>> {
    let mut ledgers: Vec<_> = fleet.nodes.iter().map(Ledger::of).collect();
    ledgers.sort_by(|a, b| a.node.name.cmp(&b.node.name));
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|at| (Reverse(requests[*at].priority), Reverse(requests[*at].size())));
    let mut found = vec![None; requests.len()];
    for at in order {
        let request = &requests[at];
        let scored = ledgers.iter().enumerate().filter_map(|(order, ledger)| {
            let preference = filters::admits(ledger.node, request).ok()?;
            let grant = grant::of(ledger, request).ok()?;
            let candidate = Candidate { ledger, grant: &grant, preference, order };
            Some((Score::of(&candidate, request, request.policy.unwrap_or(fleet.policy)), order, grant))
        });
        let Some((_, node, grant)) = scored.min_by(|a, b| a.0.cmp(&b.0)) else { continue };
        ledgers[node].take(request, &grant);
        found[at] = Some((ledgers[node].node.name.clone(), grant.gpu_indices, grant.mig_devices));
    }
    found
}

fn shape(placement: Placement) -> Option<Place> {
    match placement.outcome {
        Outcome::Placed { node, gpu_indices, mig_devices } => Some((node, gpu_indices, mig_devices)),
        Outcome::Unplaced(_) => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn never_over_capacity(nodes in any_nodes(), before in any_requests(), requests in any_requests()) {
        let mut fleet = occupied(nodes, &before);
        for (placement, request) in place(&fleet, &requests).into_iter().zip(&requests) {
            let Some((name, gpu_indices, mig_devices)) = shape(placement) else { continue };
            let mig = request.mig.as_ref().map_or(0, |mig| mig.count as usize);
            prop_assert_eq!(mig_devices.len(), mig);
            prop_assert!(mig > 0 || gpu_indices.len() == request.gpus as usize);
            let node = fleet.nodes.iter_mut().find(|node| node.name == name).unwrap();
            for uuid in &mig_devices {
                let mut devices = node.gpus.iter().flat_map(|gpu| &gpu.mig_devices);
                let device = devices.find(|device| device.uuid == *uuid).unwrap();
                prop_assert_eq!(&device.profile, &request.mig.as_ref().unwrap().profile);
            }
            node.taken.push(request.taking(gpu_indices, mig_devices));
        }
        fleet.nodes.iter().for_each(check_capacity);
    }

    #[test]
    fn affinity_selectors_and_cordons_are_never_violated(nodes in any_nodes(), requests in any_requests()) {
        let fleet = fleet(nodes);
        for (placement, request) in place(&fleet, &requests).into_iter().zip(&requests) {
            let Some((name, ..)) = shape(placement) else { continue };
            let node = fleet.nodes.iter().find(|node| node.name == name).unwrap();
            prop_assert!(node.schedulable);
            prop_assert!(request.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value)));
            prop_assert!(affinity_holds(request, node));
        }
    }

    #[test]
    fn the_index_finds_what_looking_at_every_node_finds(
        nodes in any_nodes(), before in any_requests(), requests in any_requests(), spread in any::<bool>(),
    ) {
        let mut fleet = occupied(nodes, &before);
        fleet.policy = if spread { PlacementPolicy::Spread } else { PlacementPolicy::BinPack };
        let found: Vec<_> = place(&fleet, &requests).into_iter().map(shape).collect();
        prop_assert_eq!(found, one_by_one(&fleet, &requests));
    }

    #[test]
    fn every_node_counts_for_one_reason(nodes in any_nodes(), requests in any_requests()) {
        let fleet = fleet(nodes);
        for placement in place(&fleet, &requests) {
            let Outcome::Unplaced(why) = placement.outcome else { continue };
            prop_assert_eq!(why.nodes, fleet.nodes.len());
            prop_assert_eq!(why.misfits.values().sum::<usize>(), why.nodes);
        }
    }

    #[test]
    fn the_order_of_nodes_does_not_matter_and_the_answer_is_always_the_same(
        nodes in any_nodes(), before in any_requests(), requests in any_requests(), turn in 0usize..6,
    ) {
        let view = occupied(nodes, &before);
        let mut turned = view.clone();
        turned.nodes.reverse();
        let middle = turn.min(turned.nodes.len());
        turned.nodes.rotate_left(middle);
        let answer = place(&view, &requests);
        prop_assert_eq!(&answer, &place(&view, &requests));
        prop_assert_eq!(&answer, &place(&turned, &requests));
        prop_assert_eq!(make_room(&view, &requests), make_room(&turned, &requests));
    }

    #[test]
    fn capacity_is_what_can_be_placed(nodes in any_nodes(), before in any_requests(), request in any_request()) {
        let fleet = occupied(nodes, &before);
        let room = capacity(&fleet, &request);
        prop_assume!(room < 100);
        let requests = vec![request; room as usize + 1];
        let placed = place(&fleet, &requests).into_iter().filter_map(shape).count();
        prop_assert_eq!(placed, room as usize);
    }

    #[test]
    fn preemption_takes_as_few_as_can_be_and_makes_room(
        nodes in any_nodes(), before in any_requests(), request in any_request(),
    ) {
        let fleet = occupied(nodes, &before);
        prop_assume!(placed(&fleet, &request).is_none());
        let without = |node: &Node, set: u32| {
            let mut fewer = node.clone();
            let mut at = 0;
            fewer.taken.retain(|_| { at += 1; set & (1 << (at - 1)) == 0 });
            fewer
        };
        let may_leave = |node: &Node, set: u32| {
            node.taken.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0)
                .all(|(_, taken)| taken.idle && taken.priority < request.priority)
        };
        let sets = fleet.nodes.iter().flat_map(|node| (0u32..1 << node.taken.len()).map(move |set| (node, set)));
        let fitting = sets
            .filter(|(node, set)| may_leave(node, *set))
            .filter(|(node, set)| placed(&super::fleet([without(node, *set)]), &request).is_some());
        let fewest = fitting.map(|(_, set)| set.count_ones() as usize).min();
        let found = preempt(&fleet, &request);
        prop_assert_eq!(found.as_ref().map(|found| found.victims.len()), fewest);
        if let Some(found) = found {
            let mut node = fleet.nodes.iter().find(|node| node.name == found.node).unwrap().clone();
            node.taken.retain(|taken| !found.victims.contains(&taken.replica));
            node.taken.push(request.taking(found.gpu_indices, found.mig_devices));
            check_capacity(&node);
        }
    }
}
