mod preemption;
mod properties;

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};

use super::*;

const GIB: u64 = 1 << 30;

fn node(name: &str, gpus: u32) -> Node {
    Node {
        name: name.into(),
        schedulable: true,
        labels: BTreeMap::from([("kubernetes.io/hostname".into(), name.into())]),
        gpus: (0..gpus)
            .map(|index| Gpu { index, product: "A40".into(), memory_bytes: 48 * GIB, ..Default::default() })
            .collect(),
        ..Default::default()
    }
}

/// A node whose GPUs are divided by MIG, each into these profiles.
fn divided(name: &str, gpus: u32, profiles: &[&str]) -> Node {
    let mut node = node(name, gpus);
    for gpu in &mut node.gpus {
        let device = |(at, profile): (usize, &&str)| MigDevice {
            uuid: format!("MIG-{name}-{}-{at}", gpu.index),
            profile: (*profile).to_owned(),
            held_by_others: false,
        };
        gpu.mig_enabled = true;
        gpu.mig_devices = profiles.iter().enumerate().map(device).collect();
    }
    node
}

fn fleet(nodes: impl IntoIterator<Item = Node>) -> FleetView {
    FleetView { nodes: nodes.into_iter().collect(), ..Default::default() }
}

fn spread() -> Option<PlacementPolicy> {
    Some(PlacementPolicy::Spread)
}

fn wants_mig(profile: &str, count: u32) -> PlacementRequest {
    PlacementRequest { mig: Some(MigRequest { profile: profile.into(), count }), ..wants(0) }
}

/// Where each request goes, such as `a[0, 1]`, or why nowhere.
fn outcomes(fleet: &FleetView, requests: &[PlacementRequest]) -> Vec<String> {
    let shown = |placement: Placement| match placement.outcome {
        Outcome::Placed { node, gpu_indices, mig_devices } if mig_devices.is_empty() => {
            format!("{node}{gpu_indices:?}")
        }
        Outcome::Placed { mig_devices, .. } => mig_devices.join(" "),
        Outcome::Unplaced(why) => why.to_string(),
    };
    place(fleet, requests).into_iter().map(shown).collect()
}

fn wants(gpus: u32) -> PlacementRequest {
    PlacementRequest { replica: "r".into(), revision: "default/m".into(), gpus, ..Default::default() }
}

fn placed(fleet: &FleetView, request: &PlacementRequest) -> Option<(String, Vec<u32>)> {
    match place(fleet, std::slice::from_ref(request)).swap_remove(0).outcome {
        Outcome::Placed { node, gpu_indices, .. } => Some((node, gpu_indices)),
        Outcome::Unplaced(_) => None,
    }
}

fn term(key: &str, operator: &str, values: &[&str]) -> NodeSelectorTerm {
    let requirement = NodeSelectorRequirement {
        key: key.into(),
        operator: operator.into(),
        values: Some(values.iter().map(ToString::to_string).collect()),
    };
    NodeSelectorTerm { match_expressions: Some(vec![requirement]), match_fields: None }
}

fn affinity(key: &str, operator: &str, values: &[&str]) -> PlacementRequest {
    let node_selector_terms = vec![term(key, operator, values)];
    PlacementRequest { required_affinity: Some(NodeSelector { node_selector_terms }), ..wants(0) }
}

#[test]
fn spread_goes_round_and_then_fills_up() {
    let fleet = fleet([node("a", 2), node("b", 2)]);
    let one = PlacementRequest { policy: spread(), ..wants(1) };
    let requests = vec![one; 5];
    let last = "0/2 nodes fit: 2 with fewer than 1 free GPUs";
    assert_eq!(outcomes(&fleet, &requests), ["a[0]", "b[0]", "a[1]", "b[1]", last]);
}

#[test]
fn binpack_fills_a_node_before_the_next() {
    let fleet = fleet([node("a", 2), node("b", 2)]);
    assert_eq!(outcomes(&fleet, &[wants(1), wants(1), wants(1)]), ["a[0]", "a[1]", "b[0]"]);
}

#[test]
fn the_fleets_policy_holds_for_requests_that_name_none() {
    let fleet = FleetView { policy: PlacementPolicy::Spread, ..fleet([node("a", 2), node("b", 2)]) };
    let own = PlacementRequest { policy: Some(PlacementPolicy::BinPack), ..wants(1) };
    assert_eq!(outcomes(&fleet, &[wants(1), wants(1)]), ["a[0]", "b[0]"]);
    assert_eq!(outcomes(&fleet, &[own.clone(), own]), ["a[0]", "a[1]"]);
}

#[test]
fn higher_priority_and_larger_requests_are_placed_first() {
    let urgent = PlacementRequest { priority: 1, ..wants(1) };
    let none = "0/1 nodes fit: 1 with fewer than 3 free GPUs";
    assert_eq!(outcomes(&fleet([node("a", 4)]), &[wants(1), wants(3), wants(1)])[..2], ["a[3]", "a[0, 1, 2]"]);
    assert_eq!(outcomes(&fleet([node("a", 3)]), &[wants(3), urgent]), [none, "a[0]"]);
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

fn linked(name: &str, groups: &[u32]) -> Node {
    let mut linked = node(name, groups.len() as u32);
    for (gpu, group) in linked.gpus.iter_mut().zip(groups) {
        gpu.nvlink_group = *group;
    }
    linked
}

#[test]
fn gangs_take_the_group_that_fits_best_or_else_few_groups() {
    let gpus = |groups: &[u32], count| placed(&fleet([linked("a", groups)]), &wants(count)).unwrap().1;
    assert_eq!(gpus(&[1, 1, 1, 1, 2, 2], 2), [4, 5], "the small group is enough");
    assert_eq!(gpus(&[1, 1, 1, 1, 2, 2], 3), [0, 1, 2]);
    assert_eq!(gpus(&[1, 1, 2, 2, 2, 0], 4), [0, 2, 3, 4], "no group is large enough: the largest first");
    assert_eq!(gpus(&[1, 1, 0], 1), [2], "one GPU leaves the pair together");
}

#[test]
fn mig_devices_are_given_by_profile_and_not_as_gpus() {
    let mixed = fleet([divided("a", 2, &["1g.10gb", "1g.10gb", "3g.40gb"])]);
    let requests = [wants_mig("1g.10gb", 1), wants_mig("3g.40gb", 2), wants_mig("1g.10gb", 2), wants_mig("1g.10gb", 2)];
    let expected = [
        // Large ones first: two pairs of one GPU each, and nothing is left for the single one.
        "0/1 nodes fit: 1 with fewer than 1 free nvidia.com/mig-1g.10gb",
        "MIG-a-0-2 MIG-a-1-2",
        "MIG-a-0-0 MIG-a-0-1",
        "MIG-a-1-0 MIG-a-1-1",
    ];
    assert_eq!(outcomes(&mixed, &requests), expected);
    assert_eq!(outcomes(&mixed, &[wants(1)]), ["0/1 nodes fit: 1 with fewer than 1 free GPUs"]);
    let part = PlacementRequest { gpu_memory_bytes: Some(GIB), ..wants(1) };
    assert!(placed(&mixed, &part).is_none(), "memory of a divided GPU cannot be shared");
    assert!(placed(&fleet([node("a", 1)]), &wants_mig("1g.10gb", 1)).is_none());
}

#[test]
fn mig_devices_that_are_taken_are_not_given_again() {
    let mut busy = divided("a", 2, &["1g.10gb", "1g.10gb"]);
    let held = vec!["MIG-a-0-0".to_owned()];
    busy.taken = vec![Taken { gpu_indices: vec![0], mig_devices: held, ..Default::default() }];
    assert_eq!(outcomes(&fleet([busy.clone()]), &[wants_mig("1g.10gb", 1)]), ["MIG-a-0-1"], "the GPU in use");
    assert_eq!(outcomes(&fleet([busy.clone()]), &[wants_mig("1g.10gb", 2)]), ["MIG-a-1-0 MIG-a-1-1"], "together");
    assert_eq!(capacity(&fleet([busy]), &wants_mig("1g.10gb", 1)), 3);
}

#[test]
fn preferred_terms_weigh_but_do_not_forbid() {
    let labelled = |name: &str, class: &str| {
        let mut node = node(name, 1);
        node.labels.insert("class".into(), class.into());
        node
    };
    let prefer = |weight, class| PreferredSchedulingTerm { weight, preference: term("class", "In", &[class]) };
    let fleet = fleet([labelled("a", "A40"), labelled("b", "A100"), labelled("c", "H100")]);
    let request = PlacementRequest {
        preferred_affinity: vec![prefer(10, "A100"), prefer(90, "H100"), prefer(50, "none")],
        ..wants(1)
    };
    let requests = vec![request; 3];
    assert_eq!(outcomes(&fleet, &requests), ["c[0]", "b[0]", "a[0]"]);
}

#[test]
fn terms_are_or_expressions_are_and_and_a_node_has_a_name() {
    let mut labelled = node("a", 0);
    labelled.labels.extend([("x".into(), "1".into()), ("y".into(), "2".into())]);
    let fleet = fleet([labelled]);
    let fits = |terms: Vec<NodeSelectorTerm>| {
        let required_affinity = Some(NodeSelector { node_selector_terms: terms });
        placed(&fleet, &PlacementRequest { required_affinity, ..wants(0) }).is_some()
    };
    let and = |first: NodeSelectorTerm, second: NodeSelectorTerm| NodeSelectorTerm {
        match_expressions: Some([first, second].into_iter().flat_map(|t| t.match_expressions.unwrap()).collect()),
        match_fields: None,
    };
    let named = |operator: &str, name: &str| NodeSelectorTerm {
        match_fields: term("metadata.name", operator, &[name]).match_expressions,
        match_expressions: None,
    };
    let (x, y, z) = (term("x", "In", &["1"]), term("y", "In", &["2"]), term("z", "Exists", &[]));
    assert!(fits(vec![z.clone(), x.clone()]) && fits(vec![and(x.clone(), y)]) && !fits(vec![and(x, z)]));
    assert!(fits(vec![named("In", "a")]) && !fits(vec![named("In", "b")]) && !fits(vec![named("NotIn", "a")]));
    assert!(!fits(vec![NodeSelectorTerm::default()]), "an empty term matches nothing");
}

#[test]
fn weights_on_the_disk_draw_replicas_but_not_all_of_them_where_they_spread() {
    let mut warm = node("b", 2);
    warm.cached.insert("hf://gpt-j".into());
    let fleet = fleet([node("a", 1), warm]);
    let request = PlacementRequest { model: Some("hf://gpt-j".into()), ..wants(1) };
    assert_eq!(placed(&fleet, &request).unwrap().0, "b");
    assert_eq!(placed(&fleet, &wants(1)).unwrap().0, "a", "the fullest where nothing draws");
    let apart = PlacementRequest { policy: spread(), ..request };
    assert_eq!(outcomes(&fleet, &[apart.clone(), apart]), ["b[0]", "a[0]"]);
}

#[test]
fn parts_of_a_gpu_share_it_and_whole_ones_stay_whole() {
    let part = PlacementRequest { gpu_memory_bytes: Some(20 * GIB), ..wants(1) };
    let fleet = fleet([node("a", 2)]);
    let none = format!("0/1 nodes fit: 1 without a GPU that has {} bytes of free memory", 20 * GIB);
    let requests = [part.clone(), part.clone(), wants(1), part];
    assert_eq!(outcomes(&fleet, &requests), ["a[1]", "a[1]", "a[0]", none.as_str()]);
}

#[test]
fn a_part_goes_to_a_shared_gpu_even_on_an_emptier_node() {
    let mut large = node("a", 8);
    let part = PlacementRequest { gpu_memory_bytes: Some(GIB), ..wants(1) };
    large.taken = vec![part.taking(vec![5], Vec::new())];
    assert_eq!(placed(&fleet([large, node("b", 1)]), &part), Some(("a".into(), vec![5])));
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

#[test]
fn memory_that_others_hold_is_not_given() {
    let mut node_a = node("a", 2);
    node_a.gpus[0].foreign_memory_bytes = 20 * GIB;
    let fleet_a = fleet([node_a]);
    assert_eq!(outcomes(&fleet_a, &[wants(1)]), ["a[1]"]);
    assert_eq!(outcomes(&fleet_a, &[wants(2)]), ["0/1 nodes fit: 1 with fewer than 2 free GPUs"]);
    let part = |gib| PlacementRequest { gpu_memory_bytes: Some(gib * GIB), ..wants(0) };
    // The fullest GPU that has room, and then the other one.
    assert_eq!(outcomes(&fleet_a, &[part(28), part(1)]), ["a[0]", "a[1]"]);
    assert_eq!(outcomes(&fleet_a, &[part(29), part(29)])[0], "a[1]");

    let mut node_b = divided("b", 1, &["1g.10gb", "1g.10gb"]);
    node_b.gpus[0].mig_devices[0].held_by_others = true;
    let fleet_b = fleet([node_b]);
    assert_eq!(outcomes(&fleet_b, &[wants_mig("1g.10gb", 1)]), ["MIG-b-0-1"]);
    assert_eq!(
        outcomes(&fleet_b, &[wants_mig("1g.10gb", 2)]),
        ["0/1 nodes fit: 1 with fewer than 2 free nvidia.com/mig-1g.10gb"]
    );
}
