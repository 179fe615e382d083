use super::*;

fn held(replica: &str, gpu_indices: &[u32], priority: i32) -> Taken {
    Taken {
        replica: replica.into(),
        revision: format!("default/{replica}"),
        gpu_indices: gpu_indices.to_vec(),
        priority,
        idle: true,
        ..Default::default()
    }
}

fn with(name: &str, gpus: u32, taken: Vec<Taken>) -> Node {
    Node { taken, ..node(name, gpus) }
}

fn urgent(gpus: u32) -> PlacementRequest {
    PlacementRequest { priority: 10, revision: "default/urgent".into(), ..wants(gpus) }
}

fn victims(fleet: &FleetView, request: &PlacementRequest) -> Option<(String, Vec<String>)> {
    preempt(fleet, request).map(|preemption| (preemption.node, preemption.victims))
}

fn on(node: &str, victims: &[&str]) -> Option<(String, Vec<String>)> {
    Some((node.to_owned(), victims.iter().map(ToString::to_string).collect()))
}

#[test]
fn the_fewest_and_then_the_lowest_leave() {
    let pair = with("a", 2, vec![held("s", &[0], 0), held("t", &[1], 0)]);
    let gang = with("b", 2, vec![held("g", &[0, 1], 5)]);
    assert_eq!(victims(&fleet([pair.clone(), gang.clone()]), &urgent(2)), on("b", &["g"]), "one is fewer than two");
    assert_eq!(victims(&fleet([pair, gang]), &urgent(1)), on("a", &["s"]), "of those that free one, the lowest");
    let layered = with("c", 2, vec![held("high", &[0], 9), held("low", &[1], 1)]);
    assert_eq!(victims(&fleet([layered]), &urgent(1)), on("c", &["low"]));
}

#[test]
fn only_idle_replicas_of_lower_priority_leave() {
    let busy = Taken { idle: false, ..held("busy", &[0], 0) };
    assert_eq!(victims(&fleet([with("a", 1, vec![busy])]), &urgent(1)), None);
    assert_eq!(victims(&fleet([with("a", 1, vec![held("equal", &[0], 10)])]), &urgent(1)), None);
    let mut cordoned = with("a", 1, vec![held("low", &[0], 0)]);
    cordoned.schedulable = false;
    assert_eq!(victims(&fleet([cordoned]), &urgent(1)), None);
    let picky = PlacementRequest { node_selector: BTreeMap::from([("class".into(), "H100".into())]), ..urgent(1) };
    assert_eq!(victims(&fleet([with("a", 1, vec![held("low", &[0], 0)])]), &picky), None);
}

#[test]
fn all_who_share_a_gpu_leave_it() {
    let part = |name: &str, gpu, gib| Taken { gpu_memory_bytes: Some(gib * GIB), ..held(name, &[gpu], 0) };
    let shared =
        with("a", 2, vec![part("p", 0, 8), part("q", 0, 8), part("r", 0, 8), part("s", 1, 8), part("t", 1, 8)]);
    assert_eq!(victims(&fleet([shared.clone()]), &urgent(1)), on("a", &["s", "t"]));
    let large = PlacementRequest { gpu_memory_bytes: Some(36 * GIB), ..urgent(1) };
    assert_eq!(victims(&fleet([shared]), &large), on("a", &["s"]), "a part of it needs less than all of it");
}

#[test]
fn a_mig_device_is_freed() {
    let mut node = divided("a", 1, &["1g.10gb", "3g.40gb"]);
    let device = |name: &str, at: u32| Taken { mig_devices: vec![format!("MIG-a-0-{at}")], ..held(name, &[0], 0) };
    node.taken = vec![device("small", 0), device("large", 1)];
    let request = PlacementRequest { priority: 1, ..wants_mig("3g.40gb", 1) };
    let preemption = preempt(&fleet([node]), &request).unwrap();
    assert_eq!((preemption.victims, preemption.mig_devices), (vec!["large".into()], vec!["MIG-a-0-1".into()]));
}

#[test]
fn with_very_many_small_replicas_nobody_leaves_in_vain() {
    let part = |at: u32| Taken { gpu_memory_bytes: Some(GIB), ..held(&format!("p{at:02}"), &[at / 16], 0) };
    let crowded = with("a", 3, (0..48).map(part).collect());
    let (_, victims) = victims(&fleet([crowded.clone()]), &urgent(2)).unwrap();
    assert_eq!(victims.len(), 32, "two of the three GPUs are emptied");
    for spared in &victims {
        let mut node = crowded.clone();
        node.taken.retain(|taken| taken.replica == *spared || !victims.contains(&taken.replica));
        assert!(placed(&fleet([node]), &urgent(2)).is_none(), "{spared}");
    }
}

#[test]
fn who_fits_once_the_leaving_have_left_waits() {
    let leaving = Taken { leaving: true, ..held("leaving", &[0], 0) };
    let fleet = fleet([with("a", 2, vec![leaving, held("low", &[1], 0)])]);
    let prospects = make_room(&fleet, &[urgent(1), urgent(1), urgent(1), wants(1)]);
    let Prospect::Preempts(preemption) = &prospects[1] else { panic!("{prospects:?}") };
    assert_eq!(preemption.victims, ["low"]);
    assert_eq!([&prospects[0], &prospects[2], &prospects[3]], [&Prospect::Waits, &Prospect::None, &Prospect::None]);
}

#[test]
fn nothing_leaves_for_requests_of_no_priority() {
    let fleet = fleet([with("a", 1, vec![held("other", &[0], 0)])]);
    assert_eq!(make_room(&fleet, &[wants(1)]), [Prospect::None]);
    assert_eq!(make_room(&fleet, &[]), []);
}

#[test]
fn who_sleeps_goes_first_whatever_its_priority_and_of_several_the_one_of_least_worth() {
    let asleep = |name: &str, gpu, worth| Taken { yields: Yields::ToAll, worth, ..held(name, &[gpu], 50) };
    let served = with("a", 1, vec![held("idle", &[0], 0)]);
    let asleep_there = with("b", 2, vec![asleep("s", 0, 3.0), asleep("t", 1, 2.0)]);
    assert_eq!(victims(&fleet([served.clone(), asleep_there.clone()]), &urgent(1)), on("b", &["t"]));
    assert_eq!(
        victims(&fleet([served.clone(), asleep_there]), &wants(1)),
        on("b", &["t"]),
        "to equals and lower ones too"
    );
    let pair = with("c", 2, vec![asleep("s", 0, 3.0), asleep("t", 1, 2.0)]);
    let gang = with("d", 2, vec![held("gang", &[0, 1], 0)]);
    assert_eq!(
        victims(&fleet([gang, pair]), &urgent(2)),
        on("c", &["t", "s"]),
        "two that sleep rather than one that serves"
    );
    let promised = Taken { yields: Yields::ToHigher, ..asleep("p", 0, 0.0) };
    assert_eq!(victims(&fleet([with("a", 1, vec![promised])]), &urgent(1)), None);
}

#[test]
fn who_can_sleep_yields_to_its_equals_that_somebody_waits_for() {
    let idle = || Taken { yields: Yields::ToAwaited, ..held("idle", &[0], 10) };
    let awaited = PlacementRequest { awaited: true, ..urgent(1) };
    assert_eq!(victims(&fleet([with("a", 1, vec![idle()])]), &awaited), on("a", &["idle"]));
    assert_eq!(victims(&fleet([with("a", 1, vec![idle()])]), &urgent(1)), None, "nobody waits");
    let higher = Taken { priority: 11, ..idle() };
    assert_eq!(victims(&fleet([with("a", 1, vec![higher])]), &awaited), None);
    let busy = Taken { idle: false, ..idle() };
    assert_eq!(victims(&fleet([with("a", 1, vec![busy])]), &awaited), None);
}

#[test]
fn a_sleeper_can_have_its_devices_back_where_nobody_else_holds_them() {
    let mine = held("mine", &[0], 0);
    assert!(can_have(&with("a", 2, vec![mine.clone(), held("other", &[1], 0)]), &mine));
    assert!(!can_have(&with("a", 2, vec![held("other", &[0], 0)]), &mine));
    assert!(!can_have(&with("a", 0, vec![]), &mine), "the GPU is gone");
    let part = |name: &str, gib| Taken { gpu_memory_bytes: Some(gib * GIB), ..held(name, &[0], 0) };
    assert!(can_have(&with("a", 1, vec![part("other", 40)]), &part("mine", 8)));
    assert!(!can_have(&with("a", 1, vec![part("other", 41)]), &part("mine", 8)));
}

#[test]
fn what_sleeps_counts_as_room() {
    let asleep = Taken { yields: Yields::ToAll, ..held("s", &[0], 0) };
    assert_eq!(capacity(&fleet([with("a", 2, vec![asleep])]), &wants(1)), 2);
    assert_eq!(capacity(&fleet([with("a", 2, vec![held("idle", &[0], 0)])]), &wants(1)), 1);
}
