//! Replicas leave quarantined GPUs, and none is placed there or on memory that others hold.

use super::*;
use crate::quarantine::{GpuRecord, Quarantine, Reason};

impl Cell {
    fn quarantine(mut self, node: &str, gpu: u32, stops_work: bool) -> Self {
        let quarantine = Quarantine {
            since: Timestamp::UNIX_EPOCH,
            reason: Reason::XidError,
            message: "XID".into(),
            stops_work,
            reported: Default::default(),
        };
        let record = GpuRecord { quarantine: Some(quarantine), ..Default::default() };
        let node = self.world.nodes.get_mut(node).unwrap();
        let uuid = node.inventory.as_ref().unwrap().gpus[gpu as usize].uuid.clone();
        node.record.gpus.insert(uuid, record);
        self
    }

    fn foreign(mut self, node: &str, gpu: u32, bytes: u64) -> Self {
        let node = self.world.nodes.get_mut(node).unwrap();
        let uuid = node.inventory.as_ref().unwrap().gpus[gpu as usize].uuid.clone();
        let health = fleet::GpuHealth { index: gpu, uuid, foreign_memory_bytes: bytes, ..Default::default() };
        node.gpu_report = Some(fleet::GpuReport { gpus: vec![health], ..Default::default() });
        self
    }
}

#[test]
fn nothing_is_placed_on_a_quarantined_gpu() {
    let cell = Cell::of(&[2]).revision("m", 2, 0).quarantine("a", 0, false);
    let plan = cell.plan();
    assert_eq!(plan.create.iter().map(|create| create.gpu_indices.clone()).collect::<Vec<_>>(), [[1]]);
    assert!(plan.unplaced[0].1.as_ref().unwrap().contains("fewer than 1 free GPUs"), "{:?}", plan.unplaced);
}

#[test]
fn a_replica_on_a_gpu_that_still_works_stays_until_another_one_is_ready() {
    let cell = |phase| {
        let cell = Cell::of(&[2]).revision("m", 1, 0).replica("m-1", "a", 0, READY).quarantine("a", 0, false);
        match phase {
            Some(phase) => cell.replica("m-2", "a", 1, phase),
            None => cell,
        }
    };
    let plan = cell(None).plan();
    assert_eq!((plan.create[0].gpu_indices.clone(), plan.leaving().count()), (vec![1], 0), "{plan:?}");
    assert!(cell(Some(STARTING)).plan().is_empty());
    assert_eq!(cell(Some(READY)).plan().move_off, ["m-1"]);
}

#[test]
fn a_replica_on_a_broken_gpu_leaves_at_once_and_is_replaced() {
    let cell = Cell::of(&[1, 1]).revision("m", 1, 0).replica("m-1", "a", 0, READY).quarantine("a", 0, true);
    let plan = cell.plan();
    assert_eq!((plan.move_off.clone(), created(&plan)), (vec!["m-1".to_owned()], vec![("default/m", "b")]));
    let neighbour = Cell::of(&[2]).revision("m", 1, 0).replica("m-1", "a", 1, READY).quarantine("a", 0, true);
    assert!(neighbour.plan().is_empty(), "its own GPU is well");
}

#[test]
fn a_sleeper_on_a_quarantined_gpu_leaves_and_is_not_woken() {
    let mut cell = Cell::of(&[1, 1]).revision("m", 1, 0).replica("m-1", "a", 0, ReplicaPhase::Asleep);
    cell.world.replicas.get_mut("m-1").unwrap().record.asleep = true;
    let plan = cell.quarantine("a", 0, false).plan();
    assert_eq!((plan.wake.len(), plan.move_off.clone()), (0, vec!["m-1".to_owned()]));
    assert_eq!(created(&plan), [("default/m", "b")]);
}

#[test]
fn a_gpu_whose_memory_others_hold_is_not_given_and_a_little_memory_does_not_count() {
    let held = Cell::of(&[1]).revision("m", 1, 0).foreign("a", 0, 20 << 30).plan();
    assert!(held.create.is_empty(), "{held:?}");
    let display = Cell::of(&[1]).revision("m", 1, 0).foreign("a", 0, 100 << 20).plan();
    assert_eq!(created(&display), [("default/m", "a")]);
    let running = Cell::of(&[1]).revision("m", 1, 0).replica("m-1", "a", 0, READY).foreign("a", 0, 20 << 30);
    assert!(running.plan().is_empty(), "what runs there stays");
}
