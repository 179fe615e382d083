pub(in crate::reconcile) mod asleep;
mod failing;
mod quarantine;

use pilotlight_proto::fleet::v1 as fleet;
use pilotlight_telemetry::TraceContext;

use super::{super::load::insert_revision, *};
use crate::{
    fleet::SessionHandle,
    model::{NodeRecord, ReplicaRecord, RevisionRecord},
    reconcile::world::{NodeState, Settings},
    spec,
};

/// A cell in which a test says what there is.
pub(in crate::reconcile) struct Cell {
    pub(in crate::reconcile) world: World,
}

impl Cell {
    /// Connected nodes with these numbers of GPUs, named `a`, `b` and so on.
    pub(in crate::reconcile) fn of(gpus: &[u32]) -> Self {
        let mut world = World::new(Settings::for_tests());
        for (name, gpus) in ["a", "b", "c", "d"].into_iter().zip(gpus) {
            let record = NodeRecord::new(name, Timestamp::UNIX_EPOCH);
            let mut node = NodeState::unheard(record, Timestamp::UNIX_EPOCH);
            node.session = Some(SessionHandle::to_nobody(name));
            let gpu = |index| {
                let uuid = format!("GPU-{name}-{index}");
                fleet::Gpu { index, uuid, memory_bytes: 48 << 30, ..Default::default() }
            };
            node.inventory = Some(fleet::Inventory { gpus: (0..*gpus).map(gpu).collect(), ..Default::default() });
            world.nodes.insert(name.into(), node);
        }
        Self { world }
    }

    /// A revision that wants this many replicas of one GPU each.
    fn revision(self, name: &str, wanted: u32, priority: i32) -> Self {
        self.service(name, wanted, &format!("pilotlight.dev/priority: \"{priority}\""))
    }

    /// The same with any annotations.
    fn service(mut self, name: &str, wanted: u32, annotations: &str) -> Self {
        let manifest = format!(
            "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: {name}\n  \
             annotations: {{{annotations}}}\nspec: {{predictor: {{minReplicas: 0, containers: [{{name: c, image: i, \
             resources: {{limits: {{nvidia.com/gpu: 1}}}}}}]}}}}\n"
        );
        let service = spec::tests::service(&manifest, false);
        let record = RevisionRecord {
            namespace: "default".into(),
            name: name.into(),
            service: name.into(),
            component: spec::ComponentKind::Predictor,
            number: 1,
            generation: 1,
            created_at: Timestamp::UNIX_EPOCH,
            been_ready: true,
            failed: None,
            in_place: false,
            scaling: service.predictor.scaling,
            timeout: service.predictor.timeout,
            template: service.predictor.template,
        };
        insert_revision(&mut self.world, record, Timestamp::UNIX_EPOCH);
        self.world.revisions.get_mut(&format!("default/{name}")).unwrap().wanted = wanted;
        self
    }

    /// A replica `<revision>-<suffix>` on GPU `gpu` of a node.
    pub(in crate::reconcile) fn replica(mut self, name: &str, node: &str, gpu: u32, phase: ReplicaPhase) -> Self {
        let revision = name.split_once('-').unwrap().0;
        let record = ReplicaRecord {
            name: name.into(),
            namespace: "default".into(),
            service: revision.into(),
            revision: format!("default/{revision}"),
            node: node.into(),
            gpu_indices: vec![gpu],
            mig_devices: Vec::new(),
            gpu_class: String::new(),
            created_at: Timestamp::UNIX_EPOCH,
            draining: phase == ReplicaPhase::Draining,
            asleep: false,
        };
        self.world.insert_replica(record, TraceContext::default());
        let mut status = fleet::ReplicaStatus::default();
        status.set_phase(phase);
        self.world.replicas.get_mut(name).unwrap().status = Some(status);
        self
    }

    fn draining(mut self, node: &str) -> Self {
        self.world.nodes.get_mut(node).unwrap().record.availability = Availability::Draining;
        self
    }

    fn plan(&self) -> Plan {
        plan(&self.world, &self.world.revisions.keys().cloned().collect(), Timestamp::UNIX_EPOCH)
    }
}

const READY: ReplicaPhase = ReplicaPhase::Ready;
const STARTING: ReplicaPhase = ReplicaPhase::Starting;
const DRAINING: ReplicaPhase = ReplicaPhase::Draining;

fn created(plan: &Plan) -> Vec<(&str, &str)> {
    plan.create.iter().map(|create| (create.revision.as_str(), create.node.as_str())).collect()
}

#[test]
fn a_replica_that_has_stopped_is_replaced_although_it_was_not_asked_to_leave() {
    let cell = Cell::of(&[2]).revision("m", 1, 0).replica("m-1", "a", 0, ReplicaPhase::Stopped);
    let plan = cell.plan();
    assert_eq!(plan.forget, [("m-1".to_owned(), Gone::Stopped)]);
    assert_eq!(plan.create.len(), 1);
}

#[test]
fn a_draining_nodes_replica_stays_until_another_one_is_ready() {
    let cell = Cell::of(&[1, 1]).revision("m", 1, 0).replica("m-1", "a", 0, READY).draining("a");
    let plan = cell.plan();
    assert_eq!((created(&plan), plan.leaving().count()), (vec![("default/m", "b")], 0));

    let cell = cell.replica("m-2", "b", 0, STARTING);
    assert!(cell.plan().is_empty(), "{:?}", cell.plan());

    let cell = Cell::of(&[1, 1]).revision("m", 1, 0).replica("m-1", "a", 0, READY).draining("a");
    let plan = cell.replica("m-2", "b", 0, READY).plan();
    assert_eq!(plan, Plan { move_off: vec!["m-1".into()], unplaced: plan.unplaced.clone(), ..Plan::default() });
}

#[test]
fn as_many_leave_as_others_are_ready() {
    let mut cell = Cell::of(&[3, 3]).revision("m", 3, 0).draining("a");
    for (gpu, (name, successor, phase)) in
        [("m-1", "m-4", READY), ("m-2", "m-5", STARTING), ("m-3", "m-6", STARTING)].into_iter().enumerate()
    {
        cell = cell.replica(name, "a", gpu as u32, READY).replica(successor, "b", gpu as u32, phase);
    }
    let plan = cell.plan();
    assert_eq!((plan.move_off.len(), plan.drain.len(), plan.create.len()), (1, 0, 0), "{plan:?}");
}

#[test]
fn whoever_has_nowhere_to_go_leaves_all_the_same() {
    let two = || Cell::of(&[2, 1]).revision("m", 2, 0).replica("m-1", "a", 0, READY).replica("m-2", "a", 1, READY);
    let plan = two().draining("a").plan();
    assert_eq!((created(&plan), plan.move_off.len()), (vec![("default/m", "b")], 1), "{plan:?}");

    let mut cell = two().draining("a");
    cell.world.nodes.get_mut("b").unwrap().session = None;
    assert_eq!(cell.plan().leaving().count(), 0, "a node that may come back has room");

    let cell = two().draining("a").revision("other", 0, 0).replica("other-1", "b", 0, DRAINING);
    let plan = cell.plan();
    assert_eq!(plan.move_off.len(), 1, "one waits for the place that comes free: {plan:?}");
    assert!(plan.create.is_empty());
}

#[test]
fn scale_down_during_a_drain_takes_those_on_the_draining_node() {
    let cell = Cell::of(&[2, 2]).revision("m", 1, 0).draining("a");
    let cell = cell.replica("m-1", "a", 0, READY).replica("m-2", "b", 0, READY).replica("m-3", "a", 1, READY);
    let plan = cell.plan();
    assert_eq!((plan.move_off.len(), plan.drain.len()), (2, 0), "{plan:?}");
    let zero = Cell::of(&[1]).revision("m", 0, 0).replica("m-1", "a", 0, READY).draining("a").plan();
    assert_eq!(zero.move_off, ["m-1"]);
}

#[test]
fn an_idle_replica_of_lower_priority_leaves_once() {
    let cell = || Cell::of(&[1]).revision("low", 1, 0).revision("high", 1, 5);
    let plan = cell().replica("low-1", "a", 0, READY).plan();
    assert_eq!(plan.evict, [("low-1".to_owned(), "default/high".to_owned())]);
    let why = &plan.unplaced.iter().find(|(key, _)| key == "default/high").unwrap().1;
    assert!(why.as_ref().unwrap().ends_with("; idle replicas on a make room"), "{why:?}");

    let plan = cell().replica("low-1", "a", 0, DRAINING).plan();
    assert_eq!(plan.leaving().count(), 0, "it leaves already");
    assert!(plan.unplaced.iter().any(|(_, why)| why.as_ref().is_some_and(|why| why.ends_with("replicas that drain"))));
}

#[test]
fn a_replica_that_works_or_is_waited_for_is_not_evicted() {
    let cell = || Cell::of(&[1]).revision("low", 1, 0).revision("high", 1, 5).replica("low-1", "a", 0, READY);
    let mut working = cell();
    working.world.replicas.get_mut("low-1").unwrap().running = 1;
    assert!(working.plan().evict.is_empty());
    let mut awaited = cell();
    awaited.world.revisions.get_mut("default/low").unwrap().waiting.insert("a".into(), 1);
    assert!(awaited.plan().evict.is_empty());
    let starting = Cell::of(&[1]).revision("low", 1, 0).revision("high", 1, 5).replica("low-1", "a", 0, STARTING);
    assert!(starting.plan().evict.is_empty());
}

#[test]
fn the_higher_priority_gets_the_last_place() {
    let plan = Cell::of(&[1]).revision("a-low", 1, 0).revision("z-high", 1, 5).plan();
    assert_eq!(created(&plan), [("default/z-high", "a")]);
    assert!(plan.evict.is_empty());
}

#[test]
fn a_freed_place_is_for_whoever_waits_and_goes_first() {
    // The one that was evicted has stopped, and is planned; the other one has been waiting for that.
    let mut cell = Cell::of(&[1]).revision("low", 1, 0).revision("high", 1, 5).replica("low-1", "a", 0, DRAINING);
    let status = cell.world.replicas.get_mut("low-1").unwrap().status.as_mut().unwrap();
    status.set_phase(ReplicaPhase::Stopped);
    cell.world.revisions.get_mut("default/high").unwrap().unplaced = Some("0/1 nodes fit".into());
    let plan = plan(&cell.world, &BTreeSet::from(["default/low".to_owned()]), Timestamp::UNIX_EPOCH);
    assert_eq!(plan.forget, [("low-1".to_owned(), Gone::Stopped)]);
    assert_eq!(created(&plan), [("default/high", "a")]);
}
