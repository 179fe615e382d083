use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};
use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn node(name: &str, gpus: u32) -> Node {
    Node {
        name: name.into(),
        schedulable: true,
        labels: BTreeMap::from([("kubernetes.io/hostname".into(), name.into())]),
        gpus: (0..gpus)
            .map(|index| Gpu { index, product: "A40".into(), memory_bytes: 48 * GIB, nvlink_group: 0 })
            .collect(),
        ..Default::default()
    }
}

fn fleet(nodes: impl IntoIterator<Item = Node>) -> FleetView {
    FleetView { nodes: nodes.into_iter().collect() }
}

fn wants(gpus: u32) -> PlacementRequest {
    PlacementRequest { replica: "r".into(), revision: "default/m".into(), gpus, ..Default::default() }
}

fn placed(fleet: &FleetView, request: &PlacementRequest) -> Option<(String, Vec<u32>)> {
    match place(fleet, std::slice::from_ref(request)).swap_remove(0).outcome {
        Outcome::Placed { node, gpu_indices } => Some((node, gpu_indices)),
        Outcome::Unplaced(_) => None,
    }
}

fn affinity(key: &str, operator: &str, values: &[&str]) -> PlacementRequest {
    let requirement = NodeSelectorRequirement {
        key: key.into(),
        operator: operator.into(),
        values: Some(values.iter().map(ToString::to_string).collect()),
    };
    let term = NodeSelectorTerm { match_expressions: Some(vec![requirement]), match_fields: None };
    PlacementRequest { required_affinity: Some(NodeSelector { node_selector_terms: vec![term] }), ..wants(0) }
}

#[test]
fn replicas_of_one_revision_spread_and_then_fill_up() {
    let fleet = fleet([node("a", 2), node("b", 2)]);
    let nodes: Vec<_> = place(&fleet, &[wants(1), wants(1), wants(1), wants(1), wants(1)])
        .into_iter()
        .map(|placement| match placement.outcome {
            Outcome::Placed { node, gpu_indices } => format!("{node}{gpu_indices:?}"),
            Outcome::Unplaced(why) => why.to_string(),
        })
        .collect();
    assert_eq!(nodes, ["a[0]", "b[0]", "a[1]", "b[1]", "0/2 nodes fit: 2 with fewer than 1 free GPUs"]);
}

#[test]
fn other_revisions_are_packed_onto_the_fullest_node() {
    let mut busy = node("z", 4);
    busy.taken = vec![Taken { gpu_indices: vec![0, 1], revision: "default/other".into(), ..Default::default() }];
    assert_eq!(placed(&fleet([node("a", 4), busy]), &wants(2)), Some(("z".into(), vec![2, 3])));
}

#[test]
fn gangs_stay_within_an_nvlink_group() {
    let mut linked = node("a", 4);
    for (gpu, group) in linked.gpus.iter_mut().zip([0, 1, 1, 0]) {
        gpu.nvlink_group = group;
    }
    assert_eq!(placed(&fleet([node("b", 2), linked]), &wants(2)), Some(("a".into(), vec![1, 2])));
}

#[test]
fn parts_of_a_gpu_share_it_and_whole_ones_stay_whole() {
    let part = PlacementRequest { gpu_memory_bytes: Some(20 * GIB), ..wants(1) };
    let fleet = fleet([node("a", 2)]);
    let requests = [part.clone(), part.clone(), wants(1), part];
    let gpus: Vec<_> = place(&fleet, &requests).into_iter().map(|placement| placement.outcome).collect();
    let on = |index| Outcome::Placed { node: "a".into(), gpu_indices: vec![index] };
    assert_eq!(gpus[..3], [on(0), on(0), on(1)]);
    assert!(matches!(gpus[3], Outcome::Unplaced(_)));
}

#[test]
fn each_failed_test_is_counted() {
    let mut cordoned = node("a", 8);
    cordoned.schedulable = false;
    let mut small = node("b", 1);
    small.labels.insert("gpu.nvidia.com/class".into(), "A40".into());
    let request =
        PlacementRequest { node_selector: BTreeMap::from([("gpu.nvidia.com/class".into(), "A40".into())]), ..wants(2) };
    let Outcome::Unplaced(why) = &place(&fleet([cordoned, small, node("c", 8)]), &[request])[0].outcome else {
        panic!("must not fit");
    };
    assert_eq!(
        why.to_string(),
        "0/3 nodes fit: 1 cordoned, 1 did not match nodeSelector gpu.nvidia.com/class=A40, 1 with fewer than 2 free GPUs"
    );
}

#[test]
fn all_six_operators_hold() {
    let mut labelled = node("a", 0);
    labelled.labels.extend([("class".into(), "A40".into()), ("memory".into(), "48".into())]);
    let fleet = fleet([labelled]);
    let fits = |key, operator, values: &[&str]| placed(&fleet, &affinity(key, operator, values)).is_some();
    assert!(fits("class", "In", &["A100", "A40"]) && !fits("class", "In", &["A100"]) && !fits("none", "In", &["x"]));
    assert!(fits("class", "NotIn", &["A100"]) && !fits("class", "NotIn", &["A40"]) && fits("none", "NotIn", &["x"]));
    assert!(fits("class", "Exists", &[]) && !fits("none", "Exists", &[]));
    assert!(fits("none", "DoesNotExist", &[]) && !fits("class", "DoesNotExist", &[]));
    assert!(fits("memory", "Gt", &["47"]) && !fits("memory", "Gt", &["48"]) && !fits("class", "Gt", &["1"]));
    assert!(fits("memory", "Lt", &["49"]) && !fits("memory", "Lt", &["48"]) && !fits("none", "Lt", &["1"]));
}

#[test]
fn capacity_counts_what_fits_beside_what_is_taken() {
    let mut busy = node("a", 4);
    busy.taken = vec![Taken { gpu_indices: vec![0], ..Default::default() }];
    assert_eq!(capacity(&fleet([busy, node("b", 1)]), &wants(2)), 1);
    assert_eq!(capacity(&FleetView::default(), &wants(1)), 0);
}

fn any_fleet() -> impl Strategy<Value = Vec<Node>> {
    let sizes = proptest::collection::vec((0u32..5, any::<bool>(), prop::option::of(0u64..8_000)), 0..5);
    sizes.prop_map(|sizes| {
        let make = |(index, (gpus, labelled, cpu)): (usize, (u32, bool, Option<u64>))| {
            let mut node = node(&format!("n{index}"), gpus);
            node.cpu_millis = cpu;
            if labelled {
                node.labels.insert("class".into(), "A40".into());
            }
            node
        };
        sizes.into_iter().enumerate().map(make).collect()
    })
}

fn any_requests() -> impl Strategy<Value = Vec<PlacementRequest>> {
    let wishes = (0u32..4, prop::option::of(1u64..60), any::<bool>(), 0u64..3_000);
    proptest::collection::vec(wishes, 0..12).prop_map(|wishes| {
        let make = |(index, (gpus, share, picky, cpu)): (usize, (u32, Option<u64>, bool, u64))| PlacementRequest {
            replica: format!("r{index}"),
            revision: format!("default/m{}", index % 3),
            gpu_memory_bytes: share.filter(|_| gpus == 1).map(|gib| gib * GIB),
            cpu_millis: cpu,
            node_selector: picky.then(|| ("class".to_owned(), "A40".to_owned())).into_iter().collect(),
            ..wants(gpus)
        };
        wishes.into_iter().enumerate().map(make).collect()
    })
}

proptest! {
    #[test]
    fn never_over_capacity_and_selectors_hold(nodes in any_fleet(), requests in any_requests()) {
        let mut memory: BTreeMap<(String, u32), u64> = BTreeMap::new();
        let mut cpu: BTreeMap<String, u64> = BTreeMap::new();
        let fleet = fleet(nodes.clone());
        for (placement, request) in place(&fleet, &requests).into_iter().zip(&requests) {
            let Outcome::Placed { node: name, gpu_indices } = placement.outcome else { continue };
            let node = nodes.iter().find(|node| node.name == name).unwrap();
            prop_assert!(request.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value)));
            prop_assert_eq!(gpu_indices.len(), request.gpus as usize);
            for index in gpu_indices {
                let held = memory.entry((name.clone(), index)).or_default();
                *held += request.gpu_memory_bytes.unwrap_or(48 * GIB);
                prop_assert!(*held <= 48 * GIB);
            }
            let held = cpu.entry(name).or_default();
            *held += request.cpu_millis;
            prop_assert!(node.cpu_millis.is_none_or(|limit| *held <= limit));
        }
    }

    #[test]
    fn the_order_of_nodes_does_not_matter(nodes in any_fleet(), requests in any_requests()) {
        let mut reversed = nodes.clone();
        reversed.reverse();
        prop_assert_eq!(place(&fleet(nodes), &requests), place(&fleet(reversed), &requests));
    }
}
