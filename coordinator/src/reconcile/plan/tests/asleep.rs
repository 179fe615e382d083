//! Who sleeps, who wakes, and who gives GPUs to whom.

use super::*;
use crate::{model::ServiceRecord, reconcile::world::ServiceState, spec::IdleReplicas};

const PATHS: &str = "pilotlight.dev/sleep-path: /sleep, pilotlight.dev/wake-path: /wake";
const ASLEEP: ReplicaPhase = ReplicaPhase::Asleep;

impl Cell {
    /// Nodes with memory for idle models, where the last replica sleeps.
    pub(in crate::reconcile) fn sleepy(gpus: &[u32]) -> Self {
        let mut cell = Self::of(gpus);
        cell.world.settings.idle_replicas = IdleReplicas::Sleep;
        for node in cell.world.nodes.values_mut() {
            node.inventory.as_mut().unwrap().warm_memory_bytes = 1 << 30;
        }
        cell
    }

    /// An applied service with a revision of this name that was ready.
    pub(in crate::reconcile) fn applied(self, name: &str, wanted: u32, annotations: &str) -> Self {
        let mut cell = self.service(name, wanted, annotations);
        let manifest = format!(
            "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: {name}\n  \
             annotations: {{{annotations}}}\nspec: {{predictor: {{containers: [{{name: c, image: i}}]}}}}\n"
        );
        let record = ServiceRecord {
            component: spec::ComponentKind::Predictor,
            uid: "1".into(),
            generation: 1,
            created_at: Timestamp::UNIX_EPOCH,
            latest_revision: 1,
            latest_ready: Some(1),
            latest_rolledout: Some(1),
            previous_rolledout: None,
            revision_names: Default::default(),
            service: spec::tests::service(&manifest, false),
        };
        cell.world.services.insert(format!("default/{name}"), ServiceState::new(record));
        cell
    }

    /// A replica that shall sleep, and is in this phase.
    pub(in crate::reconcile) fn sleeper(
        self,
        name: &str,
        node: &str,
        gpu: u32,
        phase: ReplicaPhase,
        holds_gpu_memory: bool,
    ) -> Self {
        let mut cell = self.replica(name, node, gpu, phase);
        let replica = cell.world.replicas.get_mut(name).unwrap();
        replica.record.asleep = true;
        replica.record.draining = false;
        replica.status.as_mut().unwrap().holds_gpu_memory = holds_gpu_memory;
        cell
    }

    fn awaited(mut self, name: &str) -> Self {
        self.world.revisions.get_mut(&format!("default/{name}")).unwrap().waiting.insert("a".into(), 1);
        self
    }

    /// A ready replica that has served for a while.
    pub(in crate::reconcile) fn served(self, name: &str, node: &str, gpu: u32) -> Self {
        let mut cell = self.replica(name, node, gpu, READY);
        let status = cell.world.replicas.get_mut(name).unwrap().status.as_mut().unwrap();
        status.ready_at = Some(prost_types::Timestamp { seconds: -60, nanos: 0 });
        cell
    }

    fn sleeps_on_request(&self, name: &str) -> bool {
        self.world.sleeps_on_request(&self.world.replicas[name])
    }
}

#[test]
fn the_last_replica_sleeps_and_the_others_leave() {
    let cell = || Cell::sleepy(&[3]).applied("m", 0, "").replica("m-1", "a", 0, READY);
    let plan = cell().plan();
    assert_eq!((plan.sleep, plan.drain.len()), (vec!["m-1".to_owned()], 0));

    let plan = cell().replica("m-2", "a", 1, STARTING).plan();
    assert_eq!((plan.sleep, plan.drain), (vec!["m-1".to_owned()], vec!["m-2".to_owned()]), "what is not loaded leaves");
    let plan = Cell::sleepy(&[1]).applied("m", 0, "").replica("m-1", "a", 0, STARTING).plan();
    assert_eq!((plan.sleep.len(), plan.drain.len()), (0, 1));
    let plan = cell().sleeper("m-2", "a", 1, ASLEEP, true).plan();
    assert_eq!((plan.sleep.len(), plan.drain), (0, vec!["m-1".to_owned()]), "one sleeps already");
    let plan = Cell::sleepy(&[1]).applied("m", 0, "").sleeper("m-1", "a", 0, ASLEEP, true).plan();
    assert!(plan.is_empty(), "{plan:?}");
}

#[test]
fn where_idle_replicas_stop_nobody_sleeps() {
    let asked = Cell::sleepy(&[1]).applied("m", 0, "pilotlight.dev/warm-replicas: \"0\"").replica("m-1", "a", 0, READY);
    assert_eq!(asked.plan().drain, ["m-1"]);
    let mut fleet = Cell::sleepy(&[1]).applied("m", 0, "").replica("m-1", "a", 0, READY);
    fleet.world.settings.idle_replicas = IdleReplicas::Stop;
    assert_eq!(fleet.plan().drain, ["m-1"]);
    let mut no_memory = Cell::sleepy(&[1]).applied("m", 0, "").replica("m-1", "a", 0, READY);
    no_memory.world.nodes.get_mut("a").unwrap().inventory.as_mut().unwrap().warm_memory_bytes = 0;
    assert_eq!(no_memory.plan().drain, ["m-1"]);
    let mut deleted = Cell::sleepy(&[1]).applied("m", 0, "").sleeper("m-1", "a", 0, ASLEEP, true);
    deleted.world.services.clear();
    assert_eq!(deleted.plan().drain, ["m-1"]);
    let drained = Cell::sleepy(&[1]).applied("m", 0, "").sleeper("m-1", "a", 0, ASLEEP, true).draining("a");
    assert_eq!(drained.plan().move_off, ["m-1"]);
}

#[test]
fn whoever_sleeps_wakes_first() {
    let cell = || Cell::sleepy(&[3]).applied("m", 1, "").sleeper("m-1", "a", 0, ASLEEP, true);
    let plan = cell().plan();
    assert_eq!((plan.wake, plan.create.len()), (vec!["m-1".to_owned()], 0));
    let falling = cell().sleeper("m-0", "a", 1, DRAINING, true).plan();
    assert_eq!(falling.wake, ["m-0"], "one that does not sleep yet is sooner ready");
    let failed = Cell::sleepy(&[2]).applied("m", 0, "").sleeper("m-1", "a", 0, ReplicaPhase::Failed, false).plan();
    assert_eq!(failed.drain, ["m-1"]);
}

#[test]
fn promised_sleepers_are_started_and_kept() {
    let two = "pilotlight.dev/warm-replicas: \"2\"";
    let plan = Cell::sleepy(&[4]).applied("m", 0, two).plan();
    assert_eq!(plan.create.iter().map(|create| create.asleep).collect::<Vec<_>>(), [true, true]);
    let plan = Cell::sleepy(&[4]).applied("m", 1, two).plan();
    assert_eq!(plan.create.iter().map(|create| create.asleep).collect::<Vec<_>>(), [false, true]);
    let plan = Cell::sleepy(&[4]).applied("m", 1, two).served("m-1", "a", 0).served("m-2", "a", 1).plan();
    assert_eq!((plan.sleep.len(), plan.drain.len(), plan.create.len()), (1, 0, 0), "what is loaded already sleeps");
    let full = || {
        Cell::sleepy(&[1]).applied("m", 0, "pilotlight.dev/warm-replicas: \"1\"").sleeper("m-1", "a", 0, ASLEEP, true)
    };
    assert!(full().applied("n", 1, "").awaited("n").plan().leaving().next().is_none(), "a promise holds among equals");
    let urgent = full().applied("n", 1, "pilotlight.dev/priority: \"1\"").awaited("n").plan();
    assert_eq!(urgent.evict, [("m-1".to_owned(), "default/n".to_owned())]);
}

#[test]
fn a_paused_one_makes_room_for_anybody() {
    let cell =
        Cell::sleepy(&[1]).applied("m", 0, "pilotlight.dev/priority: \"9\"").sleeper("m-1", "a", 0, ASLEEP, true);
    let plan = cell.applied("n", 1, "").plan();
    assert_eq!((plan.evict, plan.create.len()), (vec![("m-1".to_owned(), "default/n".to_owned())], 0));
}

#[test]
fn gpus_of_one_that_has_released_them_are_for_others() {
    let shared = || Cell::sleepy(&[1]).applied("m", 0, PATHS).sleeper("m-1", "a", 0, ASLEEP, false);
    let plan = shared().applied("n", 1, "").plan();
    assert_eq!((created(&plan), plan.leaving().count()), (vec![("default/n", "a")], 0));
    let taken =
        || Cell::sleepy(&[1]).applied("m", 1, PATHS).sleeper("m-1", "a", 0, ASLEEP, false).applied("n", 1, PATHS);

    let busy = taken().awaited("m").replica("n-1", "a", 0, READY).plan();
    assert!(busy.wake.is_empty() && busy.yields.is_empty(), "it has only just begun: {busy:?}");
    let why = busy.unplaced.iter().find(|(key, _)| key == "default/m").unwrap().1.clone().unwrap();
    assert!(why.ends_with("; a replica sleeps whose GPUs others have"), "{why}");

    let idle = taken().awaited("m").served("n-1", "a", 0).plan();
    assert_eq!(idle.yields, [("n-1".to_owned(), "default/m".to_owned())]);
    assert!(idle.wake.is_empty() && idle.leaving().next().is_none());
    let mut going = taken().awaited("m").sleeper("n-1", "a", 0, DRAINING, false);
    going.world.replicas.get_mut("n-1").unwrap().yielded = true;
    let going = going.plan();
    assert!(going.is_empty(), "it waits for the GPU: {going:?}");
    let free = taken().awaited("m").sleeper("n-1", "a", 0, ASLEEP, false).plan();
    assert_eq!(free.wake, ["m-1"]);

    let nobody_waits = taken().served("n-1", "a", 0).plan();
    assert!(nobody_waits.is_empty(), "{nobody_waits:?}");
    assert!(nobody_waits.unplaced.iter().all(|(_, why)| why.is_none()), "{nobody_waits:?}");
}

#[test]
fn one_that_cannot_free_its_gpus_or_is_promised_does_not_take_turns() {
    let awaited = || Cell::sleepy(&[1]).applied("m", 1, PATHS).awaited("m");
    let paused = awaited().applied("n", 1, "").served("n-1", "a", 0).plan();
    assert!(paused.yields.is_empty() && paused.leaving().next().is_none(), "{paused:?}");
    let mut promised = awaited().applied("n", 1, PATHS).served("n-1", "a", 0);
    let scaling = &mut promised.world.revisions.get_mut("default/n").unwrap().record.scaling;
    scaling.min_replicas = Some(1);
    let record = promised.world.revisions["default/n"].record.clone();
    promised.world.revisions.get_mut("default/n").unwrap().scaling =
        crate::reconcile::load::scaling_of(&promised.world, &record);
    assert!(promised.plan().yields.is_empty());
    let elsewhere =
        Cell::sleepy(&[1, 1]).applied("m", 1, PATHS).awaited("m").applied("n", 1, PATHS).served("n-1", "a", 0);
    let plan = elsewhere.sleeper("m-1", "a", 0, ASLEEP, false).plan();
    assert_eq!((created(&plan), plan.yields.len()), (vec![("default/m", "b")], 0), "a free GPU is better");
}

#[test]
fn nobody_sleeps_or_yields_before_the_fleet_has_settled() {
    let mut plan = Cell::sleepy(&[1]).applied("m", 0, "").replica("m-1", "a", 0, READY).plan();
    plan.keep_all();
    assert!(plan.is_empty());
}

#[test]
fn only_sleepers_that_a_service_asks_for_sleep_on_request() {
    let cell = Cell::sleepy(&[4]).applied("m", 0, PATHS).sleeper("m-1", "a", 0, ASLEEP, true);
    assert!(!cell.sleeps_on_request("m-1"));
    let promised = "pilotlight.dev/warm-replicas: \"1\"";
    let cell = Cell::sleepy(&[4]).applied("m", 0, promised).sleeper("m-1", "a", 0, ASLEEP, true);
    assert!(cell.sleeps_on_request("m-1"));
}
