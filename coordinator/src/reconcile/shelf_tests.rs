//! What operators ask for of models, and what nodes are told of it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase, Rung};

use super::{
    commands::CommandError,
    load::insert_revision,
    routes,
    shelf::{self, ModelChange},
    world::{NodeState, ServiceState, Settings, World},
};
use crate::{
    model::{ModelRecord, NodeRecord, ReplicaRecord, ServiceRecord, WarmRung},
    spec::{self, Auxiliary, AuxiliaryKind, ComponentKind, Data},
};

const URI: &str = "s3://models/m";
const MANIFEST: &str = "apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: m, annotations: {serving.kserve.io/storageSecretName: s3}}
spec:
  predictor:
    minReplicas: 0
    containers: [{name: c, command: [serve], env: [{name: STORAGE_URI, value: 's3://models/m'}]}]
";

fn now() -> Timestamp {
    Timestamp::from_second(1_000).unwrap()
}

/// Two nodes, and a service whose secret is there or not.
fn world(secret: bool) -> World {
    let mut world = World::new(Settings::for_tests());
    for name in ["a", "b"] {
        let record = NodeRecord::new(name, now());
        world.nodes.insert(name.into(), NodeState { heard: true, ..NodeState::unheard(record, now()) });
    }
    let record = ServiceRecord {
        component: ComponentKind::Predictor,
        uid: "1".into(),
        generation: 1,
        created_at: now(),
        latest_revision: 1,
        latest_ready: Some(1),
        latest_rolledout: Some(1),
        previous_rolledout: None,
        revision_names: Default::default(),
        service: spec::tests::service(MANIFEST, true),
    };
    let revision = record.revision(1, true, now());
    world.services.insert(record.key(), ServiceState::new(record));
    insert_revision(&mut world, revision, now());
    if secret {
        let data = Data(BTreeMap::from([("AWS_ACCESS_KEY_ID".to_owned(), b"id".to_vec())]));
        let (kind, namespace, name) = (AuxiliaryKind::Secret, "default".to_owned(), "s3".to_owned());
        world.settings.values.remember(Auxiliary { kind, namespace, name, data });
    }
    world
}

/// As the loop does once the store has taken it.
fn change(world: &mut World, uri: &str, node: Option<&str>, change: ModelChange) -> Result<(), CommandError> {
    for record in shelf::changed(world, uri, node, &change)? {
        let key = (record.node.clone(), record.uri.clone());
        world.asked.remove(&key);
        if record.rung.is_some() || record.pinned {
            world.asked.insert(key, record);
        }
    }
    Ok(())
}

fn warm(rung: WarmRung, service: Option<&str>) -> ModelChange {
    ModelChange::Warm { rung, service: service.map(str::to_owned) }
}

fn told(world: &World, node: &str) -> Vec<fleet::ModelAssignment> {
    routes::assignment(world, &world.nodes[node]).models
}

#[test]
fn only_what_is_fetched_can_be_kept() {
    for uri in ["s3://b/m", "gs://b/m", "hf://o/m:main", "https://h/m.tar", "http://h:1/m"] {
        assert_eq!(shelf::check_address(uri), Ok(()));
    }
    let said = shelf::check_address("pvc://claim/m").unwrap_err();
    assert_eq!(
        said,
        "uri: \"pvc://claim/m\": pvc:// is served in place and not kept; expected one of s3://, gs://, hf://, https://, http://"
    );
    let digest = format!("a@sha256:{}", "0".repeat(64));
    for image in ["a", "registry:5000/a/b:1", &digest] {
        assert_eq!(shelf::check_address(image), Ok(()));
    }
    for uri in ["", "/m", "s3://", "s3:///m", "hdfs://h/m", "s3://b/m m", &format!("s3://{}", "b".repeat(3000))] {
        assert!(shelf::check_address(uri).unwrap_err().starts_with("uri: "), "{uri}");
    }
}

#[test]
fn what_is_asked_of_a_node_and_of_all_adds_up() {
    let mut world = world(true);
    change(&mut world, URI, Some("a"), warm(WarmRung::Staged, None)).unwrap();
    change(&mut world, URI, None, warm(WarmRung::Cached, Some("default/m"))).unwrap();
    change(&mut world, URI, None, ModelChange::Pin(true)).unwrap();
    let [model] = told(&world, "a").try_into().unwrap();
    assert_eq!((model.uri.as_str(), model.rung(), model.pinned), (URI, Rung::Staged, true));
    assert_eq!((model.credentials[0].name.as_str(), model.keep), ("AWS_ACCESS_KEY_ID", u32::MAX));
    assert_eq!(told(&world, "b")[0].rung(), Rung::Cached);

    assert!(matches!(change(&mut world, URI, Some("b"), ModelChange::Forget), Err(CommandError::OnAllNodes(_))));
    let refused = change(&mut world, URI, Some("b"), ModelChange::Pin(false)).unwrap_err();
    assert!(refused.to_string().starts_with("node: s3://models/m is asked for on all nodes"), "{refused}");
    change(&mut world, URI, None, ModelChange::Pin(false)).unwrap();
    assert!(!told(&world, "a")[0].pinned);
    change(&mut world, "s3://other/m", Some("b"), ModelChange::Pin(true)).unwrap();
    change(&mut world, URI, None, ModelChange::Forget).unwrap();
    assert!(told(&world, "a").is_empty(), "what was asked of the node alone is taken back, too");
    let [other] = told(&world, "b").try_into().unwrap();
    assert_eq!((other.rung(), other.pinned), (Rung::Unspecified, true));
    change(&mut world, "s3://other/m", Some("b"), ModelChange::Pin(false)).unwrap();
    assert!(world.asked.is_empty());
}

#[test]
fn images_are_pinned_like_models_and_told_apart() {
    let mut world = world(true);
    let image = "registry/a:1";
    change(&mut world, image, None, ModelChange::Pin(true)).unwrap();
    world.nodes.get_mut("a").unwrap().shelf.images = BTreeMap::from([(image.into(), 3), ("registry/b:1".into(), 4)]);
    let told = |node: &str| routes::assignment(&world, &world.nodes[node]);
    assert!(told("a").models.is_empty());
    let of =
        |image: &str, pinned, keep| fleet::ImageAssignment { image: image.into(), pinned, keep, ..Default::default() };
    assert_eq!(told("a").images, [of(image, true, u32::MAX), of("registry/b:1", false, 4)]);
    assert_eq!(told("b").images, [of(image, true, u32::MAX)]);
    let there = fleet::CachedImage { names: vec![image.into()], digest: "sha256:1".into(), ..Default::default() };
    world.nodes.get_mut("b").unwrap().cached.images = vec![there];
    for name in [image, "sha256:1"] {
        assert_eq!(shelf::holders(&world, name, None).into_iter().collect::<Vec<_>>(), ["b"]);
    }
    assert!(shelf::holders(&world, "registry/b:1", None).is_empty());
}

#[test]
fn an_image_is_pulled_ahead_with_a_services_secrets() {
    let mut world = world(true);
    let data = Data(BTreeMap::from([(".dockerconfigjson".to_owned(), b"{}".to_vec())]));
    let (kind, namespace, name) = (AuxiliaryKind::Secret, "default".to_owned(), "pull".to_owned());
    world.settings.values.remember(Auxiliary { kind, namespace, name, data });
    let revision = world.revisions.get_mut("default/m-predictor-00001").unwrap();
    revision.record.template.image_pull_secrets = vec!["pull".into()];
    let told = |world: &World| routes::assignment(world, &world.nodes["a"]).images.remove(0);
    change(&mut world, "registry/a:1", Some("a"), warm(WarmRung::Cached, None)).unwrap();
    assert_eq!((told(&world).warm, told(&world).registry_configs.len()), (true, 0));
    change(&mut world, "registry/a:1", Some("a"), warm(WarmRung::Cached, Some("default/m"))).unwrap();
    assert_eq!(told(&world).registry_configs, ["{}"]);
    change(&mut world, "registry/a:1", Some("a"), ModelChange::Forget).unwrap();
    assert!(routes::assignment(&world, &world.nodes["a"]).images.is_empty());
}

#[test]
fn a_secret_or_service_that_is_missing_is_said() {
    let mut world = world(false);
    change(&mut world, URI, None, warm(WarmRung::Cached, Some("default/m"))).unwrap();
    let unresolved = |world: &World| told(world, "a")[0].unresolved.clone();
    assert!(unresolved(&world).starts_with("Secret default/s3 is not there"), "{}", unresolved(&world));
    world.services.clear();
    assert_eq!(unresolved(&world), "service default/m is not there; its secrets were to be used");
    change(&mut world, URI, None, warm(WarmRung::Cached, None)).unwrap();
    assert_eq!(unresolved(&world), "");
}

#[test]
fn replicas_that_sleep_with_a_model_are_named() {
    let mut world = world(true);
    let revision = "default/m-predictor-00001".to_owned();
    for (name, node, phase) in
        [("r1", "a", ReplicaPhase::Asleep), ("r2", "a", ReplicaPhase::Ready), ("r3", "b", ReplicaPhase::Asleep)]
    {
        let record = ReplicaRecord {
            name: name.into(),
            namespace: "default".into(),
            service: "m".into(),
            revision: revision.clone(),
            node: node.into(),
            gpu_indices: Vec::new(),
            mig_devices: Vec::new(),
            gpu_class: String::new(),
            created_at: now(),
            draining: false,
            asleep: false,
        };
        world.insert_replica(record, Default::default());
        let status = fleet::ReplicaStatus { replica: name.into(), phase: phase.into(), ..Default::default() };
        world.replicas.get_mut(name).unwrap().status = Some(status);
    }
    assert_eq!(shelf::sleepers(&world, "a", URI), ["r1"]);
    assert!(shelf::sleepers(&world, "a", "s3://other/m").is_empty());
    world.nodes.get_mut("b").unwrap().cached.models =
        vec![fleet::CachedModel { uri: URI.into(), ..Default::default() }];
    assert_eq!(shelf::holders(&world, URI, None).into_iter().collect::<Vec<_>>(), ["b"]);
    assert!(shelf::holders(&world, URI, Some("a")).is_empty());
}

#[test]
fn a_record_is_read_as_it_was_written() {
    let record = ModelRecord {
        uri: URI.into(),
        node: None,
        rung: Some(WarmRung::Staged),
        pinned: true,
        service: Some("default/m".into()),
    };
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<ModelRecord>(&text).unwrap(), record);
    assert_eq!(crate::model::keys::model(None, URI), "models/_all/s3://models/m");
}
