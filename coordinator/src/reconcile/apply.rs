//! Applying and deleting services.

use jiff::Timestamp;
use tracing::info;

use super::{
    commands::{Applied, Change, CommandError},
    load::{insert_revision, scaling_of},
    record::Entry,
    run::Reconciler,
    view,
    world::{Event, ServiceState},
};
use crate::{
    autoscaler::ScalerConfig,
    model::{RevisionRecord, ServiceRecord, keys},
    spec::InferenceService,
    store::Transaction,
};

/// Revisions kept of one service beside those that have replicas or take traffic.
const REVISIONS_KEPT: usize = 10;

impl Reconciler {
    /// Stores a service; a changed template makes a new revision.
    pub(super) async fn apply(
        &mut self,
        service: InferenceService,
        dry_run: bool,
        now: Timestamp,
    ) -> Result<Applied, CommandError> {
        let key = format!("{}/{}", service.namespace, service.name);
        let former = self.world.services.get(&key).map(|state| &state.record);
        if former.is_some_and(|former| former.service == service) {
            return Ok(Applied::Unchanged);
        }
        let outcome = if former.is_some() { Applied::Configured } else { Applied::Created };
        if dry_run {
            return Ok(outcome);
        }
        let (record, revision) = self.next(former, service, now);
        let mut write = Transaction::new().put_json(&keys::service(&key), &record);
        write = write.put_json(&keys::revision(&revision.key()), &revision);
        let expired = self.expired(&record);
        for number in &expired {
            write = write.delete(&keys::revision(&record.revision_key(*number)));
        }
        self.commit(write).await?;

        let state = self.world.services.entry(key.clone()).or_insert_with(|| ServiceState::new(record.clone()));
        let replaced = state.record.revision_key(state.record.latest_revision);
        state.record = record;
        for number in expired {
            state.revisions.remove(&number);
            let gone = state.record.revision_key(number);
            self.world.revisions.remove(&gone);
        }
        match self.world.revisions.contains_key(&revision.key()) {
            true => self.amend(revision, now),
            false => self.begin(revision, now),
        }
        // What was replaced before it was ready, or is stopped now, goes at once; what is stopped no
        // more comes back.
        let concerned = self.world.services.get(&key).map(|state| state.revisions.clone()).unwrap_or_default();
        let of = |number| self.world.services.get(&key).map(|state| state.record.revision_key(number));
        self.dirty.urgent.extend(concerned.into_iter().filter_map(of));
        self.dirty.urgent.insert(replaced);
        info!(service = %key, ?outcome, "applied");
        self.dirty.services.insert(key);
        Ok(outcome)
    }

    /// The service's next record, and its newest revision, which is a new one where the template differs.
    fn next(
        &self,
        former: Option<&ServiceRecord>,
        service: InferenceService,
        now: Timestamp,
    ) -> (ServiceRecord, RevisionRecord) {
        let template = service.predictor.template.clone();
        let mut record = match former {
            Some(former) => {
                // As in Kubernetes, only the specification has generations.
                let changed = former.service.manifest.get("spec") != service.manifest.get("spec");
                let generation = former.generation + u64::from(changed);
                ServiceRecord { generation, service, ..former.clone() }
            }
            None => ServiceRecord {
                uid: uuid::Uuid::new_v4().to_string(),
                generation: 1,
                created_at: now,
                latest_revision: 0,
                latest_ready: None,
                latest_rolledout: None,
                previous_rolledout: None,
                service,
            },
        };
        let latest = self.world.revisions.get(&record.revision_key(record.latest_revision));
        if let Some(latest) = latest.filter(|latest| latest.record.template == template) {
            // The same template: the revision stays, with what may change in it.
            let predictor = &record.service.predictor;
            let (scaling, timeout) = (predictor.scaling.clone(), predictor.timeout);
            let revision = RevisionRecord { scaling, timeout, ..latest.record.clone() };
            record.settle();
            return (record, revision);
        }
        record.latest_revision += 1;
        // Knative: a revision that is born at zero needs no replica to prove itself.
        let predictor = &record.service.predictor;
        let (scaling, timeout) = (predictor.scaling.clone(), predictor.timeout);
        let starts_at_zero = ScalerConfig::resolve(&self.world.settings.scaling, &template.annotations, &scaling)
            .is_ok_and(|(config, _)| config.initial_scale() == 0 && config.min_scale() == 0);
        if starts_at_zero {
            record.latest_ready = Some(record.latest_revision);
        }
        record.settle();
        let revision = RevisionRecord {
            namespace: record.service.namespace.clone(),
            name: record.revision_name(record.latest_revision),
            service: record.service.name.clone(),
            number: record.latest_revision,
            generation: record.generation,
            created_at: now,
            been_ready: starts_at_zero,
            failed: None,
            in_place: false,
            scaling,
            timeout,
            template,
        };
        (record, revision)
    }

    /// A revision goes on with other bounds, target, concurrency or timeout.
    fn amend(&mut self, record: RevisionRecord, now: Timestamp) {
        let key = record.key();
        let scaling = scaling_of(&self.world, &record);
        if let Some(revision) = self.world.revisions.get_mut(&key) {
            revision.record = record;
            revision.scaling = scaling.clone();
            if let Some(scaler) = &mut revision.scaler {
                self.recorder.write(now, &key, || Entry::Reconfigure { config: scaling.clone() });
                scaler.reconfigure(scaling);
            }
            let nodes = revision.replicas.iter().filter_map(|name| self.world.replicas.get(name));
            self.dirty.nodes.extend(nodes.map(|replica| replica.record.node.clone()));
            self.dirty.urgent.insert(key);
        }
    }

    /// Nodes get their assignments anew, so that a replica that lacked a secret can start. Those that run
    /// keep what they were started with.
    pub(super) fn values_changed(&mut self, namespace: &str) {
        let replicas = self.world.replicas.values().filter(|replica| replica.record.namespace == namespace);
        self.dirty.nodes.extend(replicas.map(|replica| replica.record.node.clone()));
    }

    /// Old revisions past the limit that hold nothing and take no traffic.
    fn expired(&self, record: &ServiceRecord) -> Vec<u32> {
        let Some(state) = self.world.services.get(&record.key()) else { return Vec::new() };
        let idle = state.revisions.iter().copied().filter(|number| {
            !record.history().needs(*number)
                && self.world.revisions.get(&record.revision_key(*number)).is_none_or(|r| r.replicas.is_empty())
        });
        let mut idle: Vec<u32> = idle.collect();
        idle.truncate(idle.len().saturating_sub(REVISIONS_KEPT));
        idle
    }

    /// A new revision starts with its initial scale.
    fn begin(&mut self, record: RevisionRecord, now: Timestamp) {
        let key = record.key();
        let service = record.service_key();
        let object = format!("Revision/{}", record.name);
        insert_revision(&mut self.world, record, now);
        let stopped = self.world.services.get(&service).is_some_and(|state| state.record.service.stopped);
        if let Some(revision) = self.world.revisions.get_mut(&key).filter(|_| !stopped) {
            revision.wanted = revision.scaling.initial_scale().max(revision.scaling.min_scale());
        }
        let message = "made from the applied spec".to_owned();
        self.world.note(&service, Event { time: now, warning: false, reason: "RevisionCreated", object, message });
        self.dirty.revision(&self.world, &key);
    }

    /// Deletes a service and its revisions; its replicas drain.
    pub(super) async fn delete(&mut self, key: &str) -> Result<(), CommandError> {
        let Some(state) = self.world.services.get(key) else {
            return Err(CommandError::NotFound(key.to_owned()));
        };
        let last = view::service(&self.world, state);
        let revisions: Vec<_> = state.revisions.iter().map(|number| state.record.revision_key(*number)).collect();
        let mut write = Transaction::new().delete(&keys::service(key)).delete(&keys::conditions(key));
        for revision in &revisions {
            write = write.delete(&keys::revision(revision));
        }
        self.commit(write).await?;
        self.world.services.remove(key);
        for revision in revisions {
            match self.world.revisions.get_mut(&revision) {
                Some(state) if state.replicas.is_empty() => {
                    self.world.revisions.remove(&revision);
                }
                // Stays in memory until its last replica has drained.
                Some(state) => {
                    state.wanted = 0;
                    self.dirty.revisions.insert(revision);
                }
                None => {}
            }
        }
        info!(service = %key, "deleted");
        self.dirty.services.insert(key.to_owned());
        // Nobody may be watching.
        let _ = self.changes.send(Change::Deleted(Box::new(last)));
        Ok(())
    }
}
