//! Situations of a roll-out, and what is made of them.

use std::time::Duration;

use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase};

use super::*;
use crate::{
    fleet::SessionHandle,
    model::{NodeRecord, ReplicaRecord},
    reconcile::{
        load::insert_revision,
        observe::{self, Dirty},
        record::Recorder,
        world::{NodeState, Settings},
    },
    spec,
};

const SERVICE: &str = "default/iris";

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

/// A node with `gpus` and a service whose first revision has been ready, while the second is new.
fn world(gpus: u32, min: u32, annotations: &str) -> World {
    let manifest = format!(
        "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\n\
         metadata: {{name: iris, annotations: {{{annotations}}}}}\n\
         spec: {{predictor: {{minReplicas: {min}, containers: [{{name: kserve-container, command: [x], \
         resources: {{limits: {{nvidia.com/gpu: 1}}}}}}]}}}}"
    );
    let service = spec::tests::service(&manifest, true);
    let mut world = World::new(Settings::for_tests());
    let record = NodeRecord::new("node", at(0));
    let gpus = (0..gpus).map(|index| fleet::Gpu { index, product: "A40".into(), ..Default::default() }).collect();
    let node = NodeState {
        session: Some(SessionHandle::to_nobody("node")),
        inventory: Some(fleet::Inventory { gpus, ..Default::default() }),
        heard: true,
        ..NodeState::unheard(record, at(0))
    };
    world.nodes.insert("node".into(), node);
    let record = ServiceRecord {
        component: spec::ComponentKind::Predictor,
        uid: "1".into(),
        generation: 2,
        created_at: at(0),
        latest_revision: 2,
        latest_ready: Some(1),
        latest_rolledout: Some(1),
        previous_rolledout: None,
        revision_names: Default::default(),
        service,
    };
    world.services.insert(SERVICE.into(), ServiceState::new(record.clone()));
    for number in [1, 2] {
        let revision = record.revision(number, number == 1, at(0));
        insert_revision(&mut world, revision, at(0));
        let key = record.revision_key(number);
        world.revisions.get_mut(&key).unwrap().wanted = min.max(1);
    }
    world
}

fn key(number: u32) -> String {
    world(0, 1, "").services[SERVICE].record.revision_key(number)
}

/// Places a replica on a GPU.
fn place(world: &mut World, number: u32, gpu: u32) -> String {
    let name = format!("r{number}-{gpu}");
    let record = ReplicaRecord {
        name: name.clone(),
        namespace: "default".into(),
        service: "iris".into(),
        revision: key(number),
        node: "node".into(),
        gpu_indices: vec![gpu],
        mig_devices: Vec::new(),
        gpu_class: "A40".into(),
        created_at: at(i64::from(gpu)),
        draining: false,
        asleep: false,
    };
    world.insert_replica(record, Default::default());
    name
}

/// The node's agent speaks of its replicas.
fn says(world: &mut World, now: Timestamp, replicas: &[(&str, ReplicaPhase, &str, u32)]) {
    let status = |(name, phase, message, restarts): &(&str, ReplicaPhase, &str, u32)| fleet::ReplicaStatus {
        replica: (*name).to_owned(),
        phase: (*phase).into(),
        message: (*message).to_owned(),
        restarts: *restarts,
        exit_code: (*phase == ReplicaPhase::Failed).then_some(3),
        ..Default::default()
    };
    let statuses = fleet::ReplicaStatuses { replicas: replicas.iter().map(status).collect() };
    let message = fleet::agent_message::Message::ReplicaStatuses(statuses);
    observe::hear(world, "node", message, now, &mut Recorder::default(), &mut Dirty::default());
}

fn overdue_at(world: &World, seconds: i64) -> Option<RevisionFailure> {
    overdue(world, at(seconds)).pop().map(|(_, failure)| failure)
}

#[test]
fn the_deadline_counts_from_the_last_sign_of_progress() {
    let mut world = world(2, 1, "");
    let name = place(&mut world, 2, 0);
    says(&mut world, at(10), &[(&name, ReplicaPhase::Starting, "", 0)]);
    assert_eq!(overdue_at(&world, 610), None);
    says(&mut world, at(500), &[(&name, ReplicaPhase::Starting, "loaded 3 of 9 shards", 0)]);
    says(&mut world, at(900), &[(&name, ReplicaPhase::Starting, "loaded 6 of 9 shards", 0)]);
    assert_eq!(overdue_at(&world, 1_500), None, "far past 600 s from the start");
    assert!(overdue_at(&world, 1_501).unwrap().message.contains("no sign of progress for 10m"));
}

#[test]
fn a_process_that_crashes_again_and_again_makes_no_progress() {
    let mut world = world(2, 1, "serving.knative.dev/progress-deadline: 60s");
    let name = place(&mut world, 2, 0);
    for restarts in 0..10 {
        let now = i64::from(restarts) * 10;
        // Each process gets another port.
        let waits = format!("readiness probe at 127.0.0.1:{}: connection refused", 40_000 + restarts);
        says(&mut world, at(now), &[(&name, ReplicaPhase::Starting, &waits, restarts)]);
        let message = format!("exit code 3; started again in {restarts}s");
        says(&mut world, at(now + 5), &[(&name, ReplicaPhase::Failed, &message, restarts + 1)]);
    }
    let failure = overdue_at(&world, 61).unwrap();
    assert!(failure.message.contains("for 1m: exit code 3"), "{}", failure.message);
    assert_eq!((failure.replica, failure.exit_code), (name, Some(3)));
}

#[test]
fn who_has_no_place_at_all_waits_for_one() {
    let mut world = world(0, 1, "");
    assert_eq!(overdue_at(&world, 1_000_000), None);
    // And one that was ready once is none of the roll-out's business.
    world.revisions.get_mut(&key(2)).unwrap().record.been_ready = true;
    let name = place(&mut world, 2, 0);
    says(&mut world, at(1), &[(&name, ReplicaPhase::Starting, "", 0)]);
    assert_eq!(overdue_at(&world, 1_000_000), None);
}

#[test]
fn a_failed_revision_shall_have_nothing_and_the_condition_says_why() {
    let mut world = world(2, 1, "");
    let failed = RevisionFailure { at: at(9), message: "no sign".into(), replica: "r".into(), exit_code: Some(3) };
    world.revisions.get_mut(&key(2)).unwrap().record.failed = Some(failed);
    assert!(world.retired(&world.revisions[&key(2)]));
    let service = &world.services[SERVICE];
    assert_eq!(percents(&world.destinations(service)), [(1, 100)]);
    let conditions = conditions::of(&world, service);
    let find = |name| conditions.iter().find(|condition| condition.name == name).unwrap();
    assert_eq!(find("PredictorReady").reason, DEADLINE_EXCEEDED);
    assert_eq!(find("PredictorReady").message, "no sign");
    assert_eq!(find("IngressReady").status, spec::ConditionStatus::True);
    assert_eq!(find("Ready").status, spec::ConditionStatus::False);
    let names: Vec<_> = conditions.iter().map(|condition| condition.name).collect();
    assert!(names.is_sorted(), "as Knative keeps them: {names:?}");
}

#[test]
fn conditions_keep_their_time_until_their_status_changes() {
    let mut world = world(2, 1, "");
    let first = conditions::changed(&world, &world.services[SERVICE], at(100)).unwrap();
    world.services.get_mut(SERVICE).unwrap().conditions = first;
    assert_eq!(conditions::changed(&world, &world.services[SERVICE], at(200)), None, "nothing has changed");
    world.revisions.get_mut(&key(2)).unwrap().record.been_ready = true;
    let second = conditions::changed(&world, &world.services[SERVICE], at(300)).unwrap();
    world.services.get_mut(SERVICE).unwrap().conditions = second;
    let since = |name| {
        let all = conditions::of(&world, &world.services[SERVICE]);
        all.into_iter().find(|condition| condition.name == name).unwrap().last_transition
    };
    assert_eq!((since("IngressReady"), since("PredictorReady"), since("Ready")), (at(100), at(300), at(300)));
}

#[test]
fn an_old_replica_goes_only_where_that_makes_room() {
    let mut world = world(2, 2, "");
    for gpu in [0, 1] {
        place(&mut world, 1, gpu);
    }
    says(&mut world, at(1), &[("r1-0", ReplicaPhase::Ready, "", 0), ("r1-1", ReplicaPhase::Ready, "", 0)]);
    assert_eq!(step(&world, &world.services[SERVICE], at(2)).victim, None, "it was not yet tried to place it");
    world.revisions.get_mut(&key(2)).unwrap().unplaced = Some("no room".into());
    let decided = step(&world, &world.services[SERVICE], at(2));
    assert_eq!(decided.victim, Some(("r1-1".into(), key(1))), "the newest, since none has anything to do");
    assert_eq!(decided.in_place, Some(key(2)));
    assert_eq!(decided.most, [(1, 2)]);

    // Two GPUs each: one free place helps nobody.
    world.revisions.get_mut(&key(2)).unwrap().record.template.resources.gpus = 4;
    assert_eq!(step(&world, &world.services[SERVICE], at(2)).victim, None);
}

#[test]
fn the_last_promised_replica_stays_and_the_condition_says_what_to_do() {
    let mut world = world(1, 1, "");
    place(&mut world, 1, 0);
    says(&mut world, at(1), &[("r1-0", ReplicaPhase::Ready, "", 0)]);
    world.revisions.get_mut(&key(2)).unwrap().unplaced = Some("no room".into());
    let decided = step(&world, &world.services[SERVICE], at(2));
    assert_eq!((decided.victim, decided.kept_out), (None, Some(2)));
    world.revisions.get_mut(&key(2)).unwrap().kept_out = true;
    let conditions = conditions::of(&world, &world.services[SERVICE]);
    let predictor = conditions.iter().find(|condition| condition.name == "PredictorReady").unwrap();
    assert!(predictor.message.contains("pilotlight.dev/max-unavailable"), "{}", predictor.message);
}

#[test]
fn records_from_before_there_were_canaries_still_load() {
    let mut json = serde_json::to_value(&world(0, 1, "").services[SERVICE].record).unwrap();
    let fields = json.as_object_mut().unwrap();
    assert!(fields.remove("latest_rolledout").is_some());
    fields.remove("previous_rolledout");
    let record: ServiceRecord = serde_json::from_value(json).unwrap();
    assert_eq!(record.upgraded().latest_rolledout, Some(1), "the newest ready one had everything");
    let revision = &world(0, 1, "").revisions[&key(1)].record;
    let json = serde_json::to_value(revision).unwrap();
    assert!(json.get("failed").is_none() && json.get("in_place").is_none(), "old and new read the same: {json}");
}

#[test]
fn annotations_of_the_roll_out_make_no_revision() {
    let with = "pilotlight.dev/sticky-header: x-user, pilotlight.dev/max-surge: '1', \
                pilotlight.dev/max-unavailable: '1', serving.kserve.io/enable-tag-routing: 'true', \
                serving.knative.dev/progress-deadline: 20m";
    let (plain, annotated) = (world(0, 1, ""), world(0, 1, with));
    let template = |world: &World| world.services[SERVICE].record.service.predictor.template.clone();
    assert_eq!(template(&plain), template(&annotated));
    let policy = annotated.policy(&annotated.services[SERVICE]);
    assert_eq!((policy.max_unavailable, policy.progress_deadline), (Some(1), Duration::from_secs(1200)));
    let tag_latest = rollout::policy::tag_latest(annotated.services[SERVICE].record.annotations());
    assert!(tag_latest && policy.sticky_header.as_deref() == Some("x-user"));
}
