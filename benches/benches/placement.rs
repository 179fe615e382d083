//! What placement costs in a pass over 10,000 nodes, and how well it packs: GPUs placed against the best
//! possible, found by trying everything on small fleets, beside plain first-fit in the same run.
#![allow(clippy::print_stdout, reason = "a benchmark prints")]

use std::{collections::BTreeMap, hint::black_box, time::Instant};

use pilotlight_coordinator::placement::{FleetView, Gpu, Node, Outcome, Placement, PlacementRequest, Taken, place};

const GIB: u64 = 1 << 30;
const CLASSES: [(&str, u64); 3] = [("A40", 48), ("A100_NVLINK_80GB", 80), ("H100_NVLINK_80GB", 80)];
const CLASS: &str = "gpu.nvidia.com/class";

/// SplitMix64: the same fleets in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

fn node(name: String, class: usize, gpus: u32) -> Node {
    let (class, gib) = CLASSES[class];
    let gpu = |index| Gpu { index, product: class.into(), memory_bytes: gib * GIB, ..Default::default() };
    Node {
        labels: BTreeMap::from([("kubernetes.io/hostname".into(), name.clone()), (CLASS.into(), class.into())]),
        name,
        schedulable: true,
        gpus: (0..gpus).map(gpu).collect(),
        ..Default::default()
    }
}

fn request(at: usize, revision: usize, gpus: u32, class: Option<usize>) -> PlacementRequest {
    PlacementRequest {
        replica: format!("r{at}"),
        revision: format!("default/m{revision}"),
        gpus,
        node_selector: class.map(|class| (CLASS.to_owned(), CLASSES[class].0.to_owned())).into_iter().collect(),
        ..Default::default()
    }
}

/// Two to four nodes of 2 to 8 GPUs, and replicas that ask for somewhat more than there is.
fn small(random: &mut Random) -> (FleetView, Vec<PlacementRequest>) {
    let classes = 2;
    let count = 2 + random.below(3);
    let nodes: Vec<Node> = (0..count)
        .map(|at| node(format!("n{at}"), random.below(classes) as usize, [2, 4, 8][random.below(3) as usize]))
        .collect();
    let gpus: u32 = nodes.iter().map(|node| node.gpus.len() as u32).sum();
    let (mut requests, mut asked) = (Vec::new(), 0);
    while asked < gpus + 2 && requests.len() < 12 {
        let wanted = [1, 1, 2, 3, 4, 6][random.below(6) as usize];
        let class = (random.below(3) == 0).then(|| random.below(classes) as usize);
        requests.push(request(requests.len(), requests.len(), wanted, class));
        asked += wanted;
    }
    (FleetView { nodes, ..Default::default() }, requests)
}

fn admits(node: &Node, request: &PlacementRequest) -> bool {
    request.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value))
}

/// The most GPUs that any choice of nodes places.
fn best_possible(fleet: &FleetView, requests: &[PlacementRequest]) -> u32 {
    fn search(fleet: &FleetView, rest: &[PlacementRequest], free: &mut [u32], placed: u32, best: &mut u32) {
        *best = (*best).max(placed);
        let Some((request, rest)) = rest.split_first() else { return };
        let open: u32 = request.gpus + rest.iter().map(|request| request.gpus).sum::<u32>();
        if placed + open.min(free.iter().sum()) <= *best {
            return;
        }
        for at in 0..free.len() {
            if free[at] >= request.gpus && admits(&fleet.nodes[at], request) {
                free[at] -= request.gpus;
                search(fleet, rest, free, placed + request.gpus, best);
                free[at] += request.gpus;
            }
        }
        search(fleet, rest, free, placed, best);
    }
    let mut free: Vec<u32> = fleet.nodes.iter().map(|node| node.gpus.len() as u32).collect();
    // Large ones first find a good answer soon, which then cuts the search short.
    let mut requests = requests.to_vec();
    requests.sort_by_key(|request| std::cmp::Reverse(request.gpus));
    let mut best = 0;
    search(fleet, &requests, &mut free, 0, &mut best);
    best
}

/// The peer: the first node with enough free GPUs, request by request.
fn first_fit(fleet: &FleetView, requests: &[PlacementRequest]) -> u32 {
    let mut free: Vec<u32> = fleet.nodes.iter().map(|node| node.gpus.len() as u32).collect();
    let mut placed = 0;
    for request in requests {
        let fits = |at: &usize| free[*at] >= request.gpus && admits(&fleet.nodes[*at], request);
        if let Some(at) = (0..free.len()).find(fits) {
            free[at] -= request.gpus;
            placed += request.gpus;
        }
    }
    placed
}

fn gpus_placed(placements: &[Placement]) -> u32 {
    let count = |placement: &Placement| match &placement.outcome {
        Outcome::Placed { gpu_indices, .. } => gpu_indices.len() as u32,
        Outcome::Unplaced(_) => 0,
    };
    placements.iter().map(count).sum()
}

/// Requests that come one at a time, each placed before the next is known.
fn one_at_a_time(mut fleet: FleetView, requests: &[PlacementRequest]) -> u32 {
    let mut placed = 0;
    for request in requests {
        let placement = place(&fleet, std::slice::from_ref(request)).swap_remove(0);
        if let Outcome::Placed { node, gpu_indices, mig_devices } = placement.outcome {
            placed += gpu_indices.len() as u32;
            let taken: Taken = request.taking(gpu_indices, mig_devices);
            fleet.nodes.iter_mut().filter(|it| it.name == node).for_each(|node| node.taken.push(taken.clone()));
        }
    }
    placed
}

fn packing(fleets: u32) {
    let mut random = Random(1);
    let (mut best, mut pass, mut single, mut peer) = (0, 0, 0, 0);
    let (mut pass_perfect, mut peer_perfect) = (0, 0);
    for _ in 0..fleets {
        let (fleet, requests) = small(&mut random);
        let possible = best_possible(&fleet, &requests);
        let (ours, theirs) = (gpus_placed(&place(&fleet, &requests)), first_fit(&fleet, &requests));
        best += possible;
        pass += ours;
        peer += theirs;
        single += one_at_a_time(fleet, &requests);
        pass_perfect += u32::from(ours == possible);
        peer_perfect += u32::from(theirs == possible);
    }
    let ratio = |placed: u32| f64::from(placed) / f64::from(best);
    let share = |perfect: u32| 100.0 * f64::from(perfect) / f64::from(fleets);
    println!("packing: GPUs placed against the best possible, {fleets} random fleets");
    println!("  one pass        {:.4}   best possible in {:.1} % of fleets", ratio(pass), share(pass_perfect));
    println!("  one at a time   {:.4}", ratio(single));
    println!("  first-fit       {:.4}   best possible in {:.1} % of fleets", ratio(peer), share(peer_perfect));
}

/// 10,000 nodes of 8 GPUs, partly taken, so that hardly two have the same GPUs free.
fn large(random: &mut Random) -> FleetView {
    let nodes = (0..10_000).map(|at| {
        let mut node = node(format!("node-{at:05}"), random.below(3) as usize, 8);
        let region = if at % 2 == 0 { "ORD1" } else { "LAS1" };
        node.labels.insert("topology.kubernetes.io/region".into(), region.into());
        for index in 0..8 {
            if random.below(3) == 0 {
                continue;
            }
            let revision = format!("default/m{}", random.below(2_000));
            node.taken.push(Taken { gpu_indices: vec![index], revision, ..Default::default() });
        }
        node
    });
    FleetView { nodes: nodes.collect(), ..Default::default() }
}

fn pass(what: &str, fleet: &FleetView, requests: &[PlacementRequest]) {
    let mut fastest = f64::INFINITY;
    let mut placed = 0;
    for _ in 0..5 {
        let start = Instant::now();
        let placements = black_box(place(black_box(fleet), black_box(requests)));
        fastest = fastest.min(start.elapsed().as_secs_f64());
        placed = gpus_placed(&placements);
    }
    println!("  {what:<44} {:>8.1} ms, {placed} GPUs placed", fastest * 1e3);
}

fn passes() {
    let mut random = Random(2);
    let fleet = large(&mut random);
    println!("pass over {} nodes, best of 5", fleet.nodes.len());
    let mut requests = |revisions: u64, count: usize| -> Vec<PlacementRequest> {
        (0..count)
            .map(|at| {
                let class = (random.below(2) == 0).then(|| random.below(3) as usize);
                request(at, random.below(revisions) as usize, [1, 1, 2, 4][random.below(4) as usize], class)
            })
            .collect()
    };
    pass("1 request", &fleet, &requests(1, 1));
    pass("1,000 requests of 10 revisions", &fleet, &requests(10, 1_000));
    let many = requests(1_000, 1_000);
    pass("1,000 requests of 1,000 revisions", &fleet, &many);
    let parts =
        |at: usize| PlacementRequest { gpu_memory_bytes: Some((1 + at as u64 % 37) * GIB), ..request(at, at, 1, None) };
    let parts: Vec<_> = (0..1_000).map(parts).collect();
    pass("1,000 requests of parts of a GPU", &fleet, &parts);
    let mut full = fleet;
    for node in &mut full.nodes {
        node.taken = vec![Taken { gpu_indices: (0..8).collect(), ..Default::default() }];
    }
    pass("1,000 requests that fit nowhere", &full, &many);
}

fn main() {
    packing(2_000);
    passes();
}
