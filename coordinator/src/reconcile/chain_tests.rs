//! A service with transformer and explainer: its components in routes, conditions and demands.

use jiff::Timestamp;
use pilotlight_proto::fleet::v1 as fleet;
use pilotlight_telemetry::TraceContext;

use super::{
    conditions,
    load::insert_revision,
    observe::{self, Dirty},
    record::{Entry, Recorder},
    routes, scale,
    world::{NodeState, ServiceState, Settings, World},
};
use crate::{
    model::{NodeRecord, ReplicaRecord, ServiceRecord, owner},
    spec::{self, ComponentKind, ConditionStatus},
};

const MANIFEST: &str = "apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: iris}
spec:
  predictor: {minReplicas: 0, containers: [{name: c, command: [serve]}]}
  transformer: {minReplicas: 0, containers: [{name: c, command: [serve]}]}
  explainer: {minReplicas: 0, containers: [{name: c, command: [serve]}]}
";

fn now() -> Timestamp {
    Timestamp::from_second(1_000).unwrap()
}

/// The service at zero; its components have been ready, but for those named.
fn world(new: &[ComponentKind]) -> World {
    let service = spec::tests::service(MANIFEST, true);
    let mut world = World::new(Settings::for_tests());
    let record = NodeRecord::new("node", now());
    world.nodes.insert("node".into(), NodeState { heard: true, ..NodeState::unheard(record, now()) });
    for (kind, _) in service.components() {
        let been_ready = !new.contains(&kind);
        let record = ServiceRecord {
            component: kind,
            uid: "1".into(),
            generation: 1,
            created_at: now(),
            latest_revision: 1,
            latest_ready: been_ready.then_some(1),
            latest_rolledout: been_ready.then_some(1),
            previous_rolledout: None,
            revision_names: Default::default(),
            service: service.clone(),
        };
        let revision = record.revision(1, been_ready, now());
        world.services.insert(record.key(), ServiceState::new(record));
        insert_revision(&mut world, revision, now());
    }
    world
}

fn status(world: &World, name: &str) -> ConditionStatus {
    let all = conditions::of(world, &world.services["default/iris"]);
    all.iter().find(|condition| condition.name == name).unwrap_or_else(|| panic!("no {name}")).status
}

#[test]
fn the_services_own_host_leads_to_the_transformer() {
    let world = world(&[]);
    let route = |key: &str| routes::service_route(&world, &world.services[key]);
    let [predictor, transformer, explainer] =
        ["default/iris", "default/iris/transformer", "default/iris/explainer"].map(route);
    assert_eq!(predictor.hosts, ["iris-predictor.default.test"]);
    assert_eq!(transformer.hosts, ["iris.default.test", "iris-transformer.default.test"]);
    assert_eq!(explainer.hosts, ["iris-explainer.default.test"]);
    assert_eq!(explainer.explains, ["iris.default.test"]);
    assert_eq!(
        [predictor, transformer, explainer].map(|route| route.revisions[0].revision.clone()),
        ["default/iris-predictor-00001", "default/iris-transformer-00001", "default/iris-explainer-00001"]
    );
    assert_eq!(owner("default/iris/explainer"), "default/iris");
    assert_eq!(owner("default/iris"), "default/iris");
}

#[test]
fn only_those_that_call_the_predictor_are_told_its_host() {
    let mut world = world(&[]);
    for kind in ComponentKind::ALL {
        let replica = ReplicaRecord {
            name: format!("{kind}"),
            namespace: "default".into(),
            service: "iris".into(),
            revision: format!("default/iris-{kind}-00001"),
            node: "node".into(),
            gpu_indices: Vec::new(),
            mig_devices: Vec::new(),
            gpu_class: String::new(),
            created_at: now(),
            draining: false,
            asleep: false,
        };
        assert!(world.component_of(&replica).starts_with("default/iris"));
        world.insert_replica(replica, TraceContext::default());
    }
    let assignment = routes::assignment(&world, &world.nodes["node"]);
    let told: Vec<_> = assignment.replicas.iter().map(|r| (r.replica.as_str(), r.predictor_host.as_str())).collect();
    let host = "iris-predictor.default.test";
    assert_eq!(told, [("explainer", host), ("predictor", ""), ("transformer", host)]);
}

#[test]
fn a_transformer_that_is_not_ready_holds_back_the_way_in_and_nothing_else() {
    let world = world(&[ComponentKind::Transformer]);
    for name in ["PredictorReady", "ExplainerReady", "ExplainerRoutesReady"] {
        assert_eq!(status(&world, name), ConditionStatus::True, "{name}");
    }
    for name in ["TransformerReady", "TransformerRouteReady", "IngressReady", "RoutesReady", "Ready"] {
        assert_eq!(status(&world, name), ConditionStatus::Unknown, "{name}");
    }
}

#[test]
fn a_request_for_the_transformer_wakes_its_predictor_at_the_same_time() {
    let mut world = world(&[]);
    let (mut recorder, mut dirty) = (Recorder::in_memory(), Dirty::default());
    // Scalers are made at the first decision.
    scale::decide_all(&mut world, now(), &mut recorder, &mut Dirty::default());
    let demand = fleet::Demand { revision: "default/iris-transformer-00001".into(), waiting: 1, ..Default::default() };
    let message = fleet::agent_message::Message::Demand(demand);
    observe::hear(&mut world, "node", message, now(), &mut recorder, &mut dirty);
    let awake = ["default/iris-predictor-00001", "default/iris-transformer-00001"];
    assert!(dirty.urgent.iter().eq(awake), "{:?}", dirty.urgent);
    let poked = recorder.lines().into_iter().filter(|line| line.entry == Entry::Poke).map(|line| line.revision);
    assert_eq!(poked.collect::<std::collections::BTreeSet<_>>(), awake.map(str::to_owned).into());
}
