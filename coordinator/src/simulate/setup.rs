//! A scenario, put into a cell.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{Scenario, ScenarioError, service::VirtualService};
use crate::{
    autoscaler::ScalerConfig,
    model::ServiceRecord,
    reconcile::{
        load::insert_revision,
        world::{ServiceState, Settings, World},
    },
    spec::{ComponentKind, IdleReplicas, InferenceService, PlacementPolicy},
};

pub(super) fn settings(scenario: &Scenario) -> Settings {
    Settings {
        cell: "simulated".into(),
        domain: "localhost".into(),
        ingress_port: 80,
        queue_limit: scenario.queue_limit as u32,
        scaling: scenario.scaling.clone(),
        placement_policy: PlacementPolicy::BinPack,
        // Cold starts are what is looked at here; `warmth` is about the rungs between.
        idle_replicas: IdleReplicas::Stop,
        // Virtual nodes are never silent.
        node_lease: Duration::MAX,
        values: Arc::default(),
    }
}

/// The service that the trace means by this name.
pub(super) fn named(scenario: &Scenario, asked: &str) -> Result<usize, ScenarioError> {
    if scenario.services.is_empty() {
        return Err(ScenarioError::NoService);
    }
    let full = |service: &InferenceService| format!("{}/{}", service.namespace, service.name);
    let found = scenario.services.iter().position(|service| service.name == asked || full(service) == asked);
    match found {
        Some(index) => Ok(index),
        None if asked.is_empty() => Ok(0),
        None => Err(ScenarioError::UnknownService {
            asked: asked.to_owned(),
            known: scenario.services.iter().map(full).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// Puts a service into the world: its one revision has been ready before.
pub(super) fn add(
    world: &mut World,
    service: &InferenceService,
    now: Timestamp,
) -> Result<VirtualService, ScenarioError> {
    let predictor = &service.predictor;
    if let Err(findings) =
        ScalerConfig::resolve(&world.settings.scaling, &predictor.template.annotations, &predictor.scaling)
    {
        let findings: Vec<_> = findings.iter().map(ToString::to_string).collect();
        return Err(ScenarioError::Settings(format!("{}: {}", service.name, findings.join("; "))));
    }
    let record = ServiceRecord {
        component: ComponentKind::Predictor,
        uid: "simulated".into(),
        generation: 1,
        created_at: now,
        latest_revision: 1,
        latest_ready: Some(1),
        latest_rolledout: Some(1),
        previous_rolledout: None,
        revision_names: Default::default(),
        service: service.clone(),
    };
    let revision = record.revision(1, true, now);
    let key = revision.key();
    world.services.insert(record.key(), ServiceState::new(record));
    insert_revision(world, revision, now);
    let concurrency = predictor.scaling.container_concurrency.max(0) as u32;
    Ok(VirtualService::new(key, concurrency, predictor.timeout))
}
