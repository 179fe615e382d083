//! Desired state, read from the store into the world.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use pilotlight_telemetry::TraceContext;
use tracing::{error, info};

use super::{
    clock::{Clock, scaler_time},
    failures::Failures,
    metering,
    observe::Dirty,
    push::RoutePush,
    run::{Reconciler, Setup},
    world::{NodeState, RevisionState, ServiceState, World},
};
use crate::{
    autoscaler::ScalerConfig,
    eviction::{Arrivals, Costs, Footprint},
    model::{ConditionsRecord, ModelRecord, NodeRecord, ReplicaRecord, RevisionRecord, ServiceRecord, keys},
    store::{StoreError, StoreExt as _},
};

impl Reconciler {
    /// Reads the whole desired state.
    ///
    /// # Errors
    /// The store cannot be reached, or holds a record that cannot be read.
    pub async fn load(setup: Setup) -> Result<Self, StoreError> {
        let clock = Clock::start();
        let now = clock.now();
        let store = setup.store;
        let mut world = World::new(setup.settings);
        for record in store.list_json::<NodeRecord>(keys::NODES).await? {
            world.nodes.insert(record.name.clone(), NodeState::unheard(record, now));
        }
        for record in store.list_json::<ServiceRecord>(keys::SERVICES).await? {
            world.services.insert(record.key(), ServiceState::new(record.upgraded()));
        }
        for record in store.list_json::<ConditionsRecord>(keys::CONDITIONS).await? {
            if let Some(service) = world.services.get_mut(&record.service) {
                service.conditions = record.conditions;
            }
        }
        for record in store.list_json::<RevisionRecord>(keys::REVISIONS).await? {
            insert_revision(&mut world, record, now);
        }
        for record in store.list_json::<ReplicaRecord>(keys::REPLICAS).await? {
            let key = record.revision.clone();
            let counts = !record.draining && !record.asleep;
            world.insert_replica(record, TraceContext::default());
            if let Some(revision) = world.revisions.get_mut(&key) {
                revision.wanted += u32::from(counts);
            }
        }
        for record in store.list_json::<ModelRecord>(keys::MODELS).await? {
            world.asked.insert((record.node.clone(), record.uri.clone()), record);
        }
        resume(&mut world);
        let meter = metering::resume(&*store, &world, now).await?;
        info!(
            services = world.services.len(),
            replicas = world.replicas.len(),
            nodes = world.nodes.len(),
            "desired state loaded"
        );
        let mut routes = RoutePush::default();
        routes.publish_all(&world);
        Ok(Self {
            world,
            store,
            clock,
            dirty: Dirty::default(),
            changes: setup.changes,
            recorder: setup.recorder,
            metrics: Default::default(),
            meter,
            warmed_at: now,
            looked_at: now,
            routes,
            tick: setup.tick,
            report_interval: setup.report_interval,
            inputs: setup.inputs,
            unanswered: Vec::new(),
        })
    }
}

/// What follows from what was loaded: shares, and the replicas that unfinished revisions still need.
fn resume(world: &mut World) {
    let services: Vec<_> =
        world.services.values().map(|service| (service.record.key(), world.targets(service))).collect();
    for (key, shares) in services {
        let Some(service) = world.services.get_mut(&key) else { continue };
        service.shares = shares;
        let newest = service.record.revision_key(service.record.latest_revision);
        let unfinished = world.revisions.get(&newest).filter(|revision| !revision.record.been_ready);
        let Some(needed) = unfinished.filter(|revision| !world.retired(revision)).map(RevisionState::needed) else {
            continue;
        };
        if let Some(revision) = world.revisions.get_mut(&newest) {
            revision.wanted = revision.wanted.max(needed);
        }
    }
}

/// Puts a revision into the world and its service's index.
pub(crate) fn insert_revision(world: &mut World, record: RevisionRecord, now: Timestamp) {
    let scaling = scaling_of(world, &record);
    if let Some(service) = world.services.get_mut(&record.service_key()) {
        service.revisions.insert(record.number);
    }
    let state = RevisionState {
        scaling,
        scaler: None,
        wanted: 0,
        load_time: Duration::ZERO,
        arrivals: Arrivals::since(scaler_time(now)),
        costs: Costs::estimated(&Footprint::default()),
        decisions: Default::default(),
        replicas: Default::default(),
        unplaced: None,
        failures: Failures::default(),
        most: None,
        kept_out: false,
        progress_at: now,
        waiting: BTreeMap::new(),
        trace: TraceContext::default(),
        record,
    };
    world.revisions.insert(state.record.key(), state);
}

/// The autoscaler's settings for a revision. They were validated when the service was applied; fleet
/// defaults that have changed since may contradict them, and then the defaults alone hold.
pub(crate) fn scaling_of(world: &World, record: &RevisionRecord) -> ScalerConfig {
    let defaults = &world.settings.scaling;
    match ScalerConfig::resolve(defaults, &record.template.annotations, &record.scaling) {
        Ok((config, _)) => config,
        Err(findings) => {
            let reasons: Vec<_> = findings.iter().map(ToString::to_string).collect();
            error!(revision = %record.key(), ?reasons, "stored scaling settings are not valid; using the defaults");
            ScalerConfig::of_defaults(defaults)
        }
    }
}
