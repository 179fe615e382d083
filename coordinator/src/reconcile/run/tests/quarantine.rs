//! Quarantines of GPUs are durable, and are cleared by operators only.

use super::*;
use crate::reconcile::commands::CommandError;

fn report(errors: u64) -> Input {
    let gpu = fleet::GpuHealth {
        index: 0,
        uuid: "GPU-a-0".into(),
        ecc_uncorrectable_errors: Some(errors),
        ..Default::default()
    };
    let report = fleet::GpuReport { gpus: vec![gpu], ..Default::default() };
    let message = fleet::agent_message::Message::GpuReport(report);
    Input::Heard { node: "a".into(), session: 0, message }
}

impl Case {
    async fn reports(&mut self, errors: u64) {
        self.reconciler.take(report(errors)).await;
        self.reconciler.act().await;
    }

    fn is_quarantined(&self) -> bool {
        self.reconciler.world.nodes["a"].quarantine(0).is_some()
    }

    async fn clear(&mut self, gpu: &str) -> Result<(), CommandError> {
        let now = self.reconciler.clock.now();
        self.reconciler.unquarantine_gpu("a", gpu, now).await
    }
}

#[tokio::test]
async fn a_quarantine_is_written_before_it_holds_and_survives_the_coordinator() {
    let mut case = Case::start(Cell::of(&[1])).await;
    case.reports(0).await;
    assert!(!case.is_quarantined());
    case.store.fails.store(true, Ordering::Relaxed);
    case.reports(2).await;
    assert!(!case.is_quarantined(), "the store has refused");
    case.store.fails.store(false, Ordering::Relaxed);
    case.reconciler.act().await;
    assert!(case.is_quarantined(), "it has been tried again");
    let event = case.reconciler.world.nodes["a"].events.back().unwrap().clone();
    assert_eq!((event.reason, event.object.as_str()), ("GpuQuarantined", "Node/a"));
    assert!(event.message.starts_with("GPU 0 is quarantined: 2 uncorrectable ECC errors"), "{}", event.message);

    let Case { reconciler, store, .. } = case;
    let inventory = reconciler.world.nodes["a"].inventory.clone();
    let (_, inputs, changes) = super::super::super::commands::Handle::new();
    let (tick, report_interval) = (Duration::from_secs(2), Duration::from_secs(1));
    let (settings, recorder) = (Settings::for_tests(), Recorder::default());
    let setup = Setup { store, settings, tick, report_interval, recorder, inputs, changes };
    let mut next = Reconciler::load(setup).await.unwrap();
    next.world.nodes.get_mut("a").unwrap().inventory = inventory;
    assert!(next.world.nodes["a"].quarantine(0).is_some(), "the next leader knows of it");
}

#[tokio::test]
async fn an_operator_clears_a_gpu_by_index_or_uuid_and_only_new_errors_quarantine_it_again() {
    let mut case = Case::start(Cell::of(&[1])).await;
    case.reports(2).await;
    for wrong in ["1", "GPU-b-0"] {
        let error = case.clear(wrong).await.unwrap_err().to_string();
        assert!(error.ends_with("known are 0 (GPU-a-0)"), "{error}");
    }
    case.store.fails.store(true, Ordering::Relaxed);
    assert!(matches!(case.clear("0").await, Err(CommandError::Store(_))));
    assert!(case.is_quarantined());
    case.store.fails.store(false, Ordering::Relaxed);
    case.clear("0").await.unwrap();
    assert!(!case.is_quarantined());
    assert!(matches!(case.clear("0").await, Err(CommandError::GpuNotQuarantined { .. })));
    case.reports(2).await;
    assert!(!case.is_quarantined());
    case.reports(3).await;
    assert!(case.is_quarantined());
    case.clear("GPU-a-0").await.unwrap();
    assert!(!case.is_quarantined());
}
