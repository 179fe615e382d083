use pilotlight_proto::fleet::v1::ReplicaPhase;

use super::{super::plan::tests::Cell, *};
use crate::spec;

const GIB: u64 = 1 << 30;
const NOW: i64 = 10_000;

/// One node whose idle models may fill 10 GiB of memory.
fn cell() -> Cell {
    let mut cell = Cell::sleepy(&[8]);
    node(&mut cell).inventory.as_mut().unwrap().warm_memory_bytes = 10 * GIB;
    cell
}

fn node(cell: &mut Cell) -> &mut NodeState {
    cell.world.nodes.get_mut("a").unwrap()
}

/// A replica that sleeps with so much memory.
fn sleeper(cell: Cell, service: &str, gib: u64, annotations: &str) -> Cell {
    let name = format!("{service}-1");
    let gpu = cell.world.replicas.len() as u32;
    let mut cell = cell.applied(service, 0, annotations).sleeper(&name, "a", gpu, ReplicaPhase::Asleep, true);
    cell.world.replicas.get_mut(&name).unwrap().status.as_mut().unwrap().memory_bytes = gib * GIB;
    cell
}

/// A service at zero whose model is on the disk.
fn cached(cell: Cell, service: &str, gib: u64, staged: bool) -> Cell {
    let mut cell = cell.applied(service, 0, "");
    let template = &mut cell.world.revisions.get_mut(&format!("default/{service}")).unwrap().record.template;
    template.storage.push(spec::Storage {
        source: spec::StorageSource::Uri(format!("s3://b/{service}")),
        mount_path: "/mnt/models".into(),
        read_only: true,
        claim_root: None,
    });
    let uri = format!("s3://b/{service}");
    let model = fleet::CachedModel { uri, bytes: gib * GIB, staged, ..Default::default() };
    node(&mut cell).cached.models.push(model);
    cell
}

/// Requests for a service, seconds ago.
fn asked(mut cell: Cell, service: &str, ago: &[i64]) -> Cell {
    let arrivals = &mut cell.world.revisions.get_mut(&format!("default/{service}")).unwrap().arrivals;
    for ago in ago {
        arrivals.observe(Duration::from_secs((NOW - ago) as u64));
    }
    cell
}

fn look_at(cell: &Cell) -> Look {
    let now = Timestamp::from_second(NOW).unwrap();
    look(&cell.world, &cell.world.nodes["a"], &users(&cell.world), now)
}

fn staged(cell: &Cell) -> Vec<String> {
    look_at(cell).shelf.staged.into_iter().collect()
}

#[test]
fn sleepers_that_are_worth_least_leave_until_the_rest_fits() {
    let cell = sleeper(sleeper(cell(), "often", 6, ""), "rarely", 6, "");
    let cell = asked(asked(cell, "rarely", &[9_000]), "often", &[90, 60, 30]);
    assert_eq!(look_at(&cell).leave, ["rarely-1"]);
    let promised = sleeper(sleeper(self::cell(), "often", 6, ""), "rarely", 6, "pilotlight.dev/warm-replicas: \"1\"");
    let promised = asked(asked(promised, "rarely", &[9_000]), "often", &[90, 60, 30]);
    assert_eq!(look_at(&promised).leave, ["often-1"]);
    assert!(look_at(&sleeper(self::cell(), "m", 10, "")).leave.is_empty(), "all of it may be used");
}

#[test]
fn models_on_disk_are_staged_while_memory_lasts() {
    let two = |staged| cached(cached(cell(), "often", 6, false), "rarely", 6, staged);
    let asked_for = |cell| asked(asked(cell, "rarely", &[9_000]), "often", &[90, 60, 30]);
    assert_eq!(staged(&asked_for(two(false))), ["s3://b/often"]);
    assert_eq!(staged(&asked_for(two(true))), ["s3://b/often"], "far more probable to be needed");
    let alike = |staged| asked(asked(two(staged), "rarely", &[95, 65, 36]), "often", &[90, 60, 30]);
    assert_eq!(staged(&alike(false)), ["s3://b/often"]);
    assert_eq!(staged(&alike(true)), ["s3://b/rarely"], "what is there already stays");
    let asleep = sleeper(cached(cell(), "m", 6, false), "s", 6, "");
    assert_eq!((staged(&asleep).len(), look_at(&asleep).leave.len()), (0, 0), "a sleeper saves more by the byte");
    let served = cached(cell(), "m", 6, false).served("m-1", "a", 0);
    assert!(staged(&served).is_empty(), "its process has it");
    let mut stopped = cached(cell(), "m", 6, false);
    stopped.world.services.get_mut("default/m").unwrap().record.service.stopped = true;
    assert!(staged(&stopped).is_empty());
}

#[test]
fn what_is_needed_soonest_leaves_the_disk_last() {
    let cell = cached(cached(cached(cell(), "often", 6, false), "rarely", 6, false), "small", 1, false);
    let cell = asked(asked(asked(cell, "rarely", &[9_000]), "often", &[90, 60, 30]), "small", &[90, 60, 30]);
    let keep = look_at(&cell).shelf.keep;
    let of = |name: &str| keep[&format!("s3://b/{name}")];
    assert!(of("small") >= of("often") && of("often") > of("rarely") && of("rarely") > 0, "{keep:?}");
}

#[test]
fn measured_times_count() {
    let mut cell = asked(asked(sleeper(sleeper(cell(), "slow", 6, ""), "fast", 6, ""), "slow", &[60]), "fast", &[60]);
    for (service, seconds) in [("slow", 100), ("fast", 3)] {
        let revision = cell.world.revisions.get_mut(&format!("default/{service}")).unwrap();
        for (from, seconds) in [(fleet::Rung::Cached, seconds), (fleet::Rung::Asleep, 1)] {
            let took = Some(prost_types::Duration { seconds, nanos: 0 });
            let transition = fleet::Transition { took, ..Default::default() };
            measure(revision, &fleet::Transition { from: from.into(), to: fleet::Rung::Serving.into(), ..transition });
        }
    }
    let look = look_at(&cell);
    assert_eq!(look.leave, ["fast-1"]);
    let worth: BTreeMap<_, _> = look.worth.into_iter().collect();
    assert!(worth["slow-1"] > worth["fast-1"], "{worth:?}");
}

#[test]
fn a_model_that_finds_no_room_on_the_disk_gets_it_from_a_sleeper() {
    let two = cached(cached(cell(), "often", 2, false), "rarely", 2, false);
    let two = asked(asked(two, "rarely", &[9_000]), "often", &[90, 60, 30]);
    let two = two.sleeper("often-1", "a", 0, ReplicaPhase::Asleep, true);
    let mut cell = two.sleeper("rarely-1", "a", 1, ReplicaPhase::Asleep, true).applied("new", 1, "");
    assert!(look_at(&cell).leave.is_empty());
    cell = cell.replica("new-1", "a", 2, ReplicaPhase::Failed);
    cell.world.replicas.get_mut("new-1").unwrap().status.as_mut().unwrap().reason = "CacheFull".into();
    assert_eq!(look_at(&cell).leave, ["rarely-1"]);
    cell.world.replicas.get_mut("rarely-1").unwrap().record.draining = true;
    assert!(look_at(&cell).leave.is_empty(), "one leaves already");
    cell.world.remove_replica("rarely-1");
    assert_eq!(look_at(&cell).leave, ["often-1"]);
}

#[test]
fn an_image_is_kept_by_who_needs_it_and_what_its_pull_took() {
    let mut cell = cell();
    for service in ["often", "rarely", "slow"] {
        cell = cell.applied(service, 0, "");
        let revision = cell.world.revisions.get_mut(&format!("default/{service}")).unwrap();
        revision.record.template.container.image = format!("registry/{service}:1");
        let pull_took = Some(prost_types::Duration { seconds: if service == "slow" { 100 } else { 10 }, nanos: 0 });
        let names = vec![format!("registry/{service}:1")];
        node(&mut cell).cached.images.push(fleet::CachedImage { names, bytes: GIB, pull_took, ..Default::default() });
    }
    let other = fleet::CachedImage { names: vec!["registry/nobody:1".into()], bytes: GIB, ..Default::default() };
    node(&mut cell).cached.images.push(other);
    let cell = asked(asked(asked(cell, "rarely", &[9_000]), "often", &[90, 60, 30]), "slow", &[90, 60, 30]);
    let keep = look_at(&cell).shelf.images;
    let of = |name: &str| keep[&format!("registry/{name}:1")];
    assert!(of("slow") > of("often") && of("often") > of("rarely") && of("rarely") > 0, "{keep:?}");
    assert_eq!(keep.len(), 3, "nobody needs the other: it counts as 0");
}

#[test]
fn no_sleeper_leaves_the_disk_in_vain() {
    let two = cached(cached(cell(), "often", 2, false), "rarely", 3, false);
    let two = asked(asked(two, "rarely", &[9_000]), "often", &[90, 60, 30]);
    let two = two.sleeper("often-1", "a", 0, ReplicaPhase::Asleep, true);
    let mut cell = two.sleeper("rarely-1", "a", 1, ReplicaPhase::Asleep, true).applied("new", 1, "");
    cell = cell.replica("new-1", "a", 2, ReplicaPhase::Failed);
    let lacks = |cell: &mut Cell, gib: u64| {
        let status = cell.world.replicas.get_mut("new-1").unwrap().status.as_mut().unwrap();
        (status.reason, status.lacking_bytes) = (CACHE_FULL.into(), gib * GIB);
    };
    lacks(&mut cell, 6);
    assert!(look_at(&cell).leave.is_empty(), "both together are 5 GiB");
    lacks(&mut cell, 5);
    assert_eq!(look_at(&cell).leave, ["rarely-1"]);
    // A model that is pinned stays, whoever leaves.
    node(&mut cell).cached.models[1].pinned = true;
    assert!(look_at(&cell).leave.is_empty());
    lacks(&mut cell, 2);
    assert_eq!(look_at(&cell).leave, ["often-1"]);
    // So does one that somebody serves.
    let mut cell = cell.served("often-2", "a", 3);
    assert!(look_at(&cell).leave.is_empty());
    // Its image is room, too, unless others have it or it is pinned.
    let image = |cell: &mut Cell, service: &str| {
        let revision = cell.world.revisions.get_mut(&format!("default/{service}")).unwrap();
        revision.record.template.container.image = "registry/one:1".to_owned();
    };
    image(&mut cell, "rarely");
    let one = fleet::CachedImage { names: vec!["registry/one:1".into()], bytes: 2 * GIB, ..Default::default() };
    node(&mut cell).cached.images.push(one);
    assert_eq!(look_at(&cell).leave, ["rarely-1"]);
    node(&mut cell).cached.images[0].pinned = true;
    assert!(look_at(&cell).leave.is_empty());
    node(&mut cell).cached.images[0].pinned = false;
    image(&mut cell, "often");
    assert!(look_at(&cell).leave.is_empty());
}

#[test]
fn a_node_costs_what_is_on_its_disk_however_many_models_the_fleet_has() {
    let mut cell = cached(cell(), "here", 6, false);
    for number in 0..100 {
        cell = cached(cell, &format!("elsewhere-{number}"), 6, false);
    }
    node(&mut cell).cached.models.truncate(1);
    let users = users(&cell.world);
    assert_eq!(users.models.len(), 101);
    look(&cell.world, &cell.world.nodes["a"], &users, Timestamp::from_second(NOW).unwrap());
    assert_eq!(users.looked_up.get(), 2, "once for the page cache, once for the disk");
}
