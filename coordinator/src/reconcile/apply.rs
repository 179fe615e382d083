//! Applying and deleting services.

use jiff::Timestamp;
use tracing::info;

use super::{
    admission,
    commands::{Applied, Change, CommandError},
    load::{insert_revision, scaling_of},
    record::Entry,
    run::Reconciler,
    view,
    world::{Event, ServiceState},
};
use crate::{
    autoscaler::ScalerConfig,
    model::{RevisionRecord, ServiceKey, ServiceRecord, keys, owner, service_key},
    spec::{Component, ComponentKind, InferenceService},
    store::Transaction,
};

/// Revisions kept of one service beside those that have replicas or take traffic.
const REVISIONS_KEPT: usize = 10;

/// One component of an applied service: its next record and its newest revision.
struct Next {
    record: ServiceRecord,
    revision: RevisionRecord,
    /// Numbers of old revisions that go.
    expired: Vec<u32>,
}

/// What all components of a service have in common.
struct Common {
    uid: String,
    generation: u64,
    created_at: Timestamp,
    service: InferenceService,
}

impl Reconciler {
    /// Stores a service; a changed template makes a new revision of its component.
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
        let refusals = admission::check(&self.world, &service);
        if !refusals.is_empty() {
            return Err(CommandError::Refused(refusals));
        }
        let outcome = if former.is_some() { Applied::Configured } else { Applied::Created };
        if dry_run {
            return Ok(outcome);
        }
        let common = common(former, service, now);
        let next: Vec<_> =
            common.service.components().map(|(kind, component)| self.next(kind, component, &common, now)).collect();
        let former = self.world.services.get(&key);
        let gone = former.into_iter().flat_map(|former| self.world.components(former));
        let gone = gone.filter(|state| common.service.component(state.record.component).is_none());
        let gone: Vec<ServiceKey> = gone.map(|state| state.record.key()).collect();

        let mut write = next.iter().fold(Transaction::new(), write_next);
        for key in &gone {
            write = self.write_gone(key, write);
        }
        self.commit(write).await?;
        for next in next {
            self.take_over(next, now);
        }
        for key in gone {
            self.retire(&key);
        }
        info!(service = %key, ?outcome, "applied");
        Ok(outcome)
    }

    /// A component's next record, and its newest revision, which is a new one where the template differs.
    fn next(&self, kind: ComponentKind, component: &Component, common: &Common, now: Timestamp) -> Next {
        let key = service_key(&common.service.namespace, &common.service.name, kind);
        let former = self.world.services.get(&key).map(|state| &state.record);
        let mut record = ServiceRecord {
            component: kind,
            uid: common.uid.clone(),
            generation: common.generation,
            created_at: common.created_at,
            latest_revision: former.map_or(0, |former| former.latest_revision),
            latest_ready: former.and_then(|former| former.latest_ready),
            latest_rolledout: former.and_then(|former| former.latest_rolledout),
            previous_rolledout: former.and_then(|former| former.previous_rolledout),
            revision_names: former.map(|former| former.revision_names.clone()).unwrap_or_default(),
            service: common.service.clone(),
        };
        let (scaling, timeout) = (component.scaling.clone(), component.timeout);
        let latest = self.world.revisions.get(&record.revision_key(record.latest_revision));
        let same = latest.filter(|latest| latest.record.template == component.template);
        let revision = match same {
            // The revision stays, with what may change in it.
            Some(latest) => RevisionRecord { scaling, timeout, ..latest.record.clone() },
            None => {
                record.latest_revision += 1;
                // Knative: a revision that is born at zero needs no replica to prove itself.
                let defaults = &self.world.settings.scaling;
                let been_ready = ScalerConfig::resolve(defaults, &component.template.annotations, &scaling)
                    .is_ok_and(|(config, _)| config.initial_scale() == 0 && config.min_scale() == 0);
                if been_ready {
                    record.latest_ready = Some(record.latest_revision);
                }
                record.revision(record.latest_revision, been_ready, now)
            }
        };
        if let Some(name) = record.service.revision_name.clone().filter(|_| kind.is_predictor()) {
            record.revision_names.insert(name, record.latest_revision);
        }
        record.settle();
        let expired = self.expired(&record);
        record.revision_names.retain(|_, number| !expired.contains(number));
        Next { record, revision, expired }
    }

    /// A component becomes what has been written of it.
    fn take_over(&mut self, next: Next, now: Timestamp) {
        let Next { record, revision, expired } = next;
        let key = record.key();
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
        self.credentials_changed(|service| service == owner(&key));
        self.relabel_usage(owner(&key));
        self.dirty.services.insert(key);
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
            self.dirty.urgent.insert(key.clone());
            // How many of its replicas sleep may have changed, though as many serve.
            self.dirty.revisions.insert(key);
        }
    }

    /// Nodes get their assignments anew, so that a replica that lacked a secret can start. Those that run
    /// keep what they were started with.
    pub(super) fn values_changed(&mut self, namespace: &str) {
        let replicas = self.world.replicas.values().filter(|replica| replica.record.namespace == namespace);
        self.dirty.nodes.extend(replicas.map(|replica| replica.record.node.clone()));
        self.credentials_changed(|service| service.split('/').next() == Some(namespace));
    }

    /// Old revisions past the limit that hold nothing and take no traffic.
    fn expired(&self, record: &ServiceRecord) -> Vec<u32> {
        let Some(state) = self.world.services.get(&record.key()) else { return Vec::new() };
        let idle = state.revisions.iter().copied().filter(|number| {
            !record.needs(*number)
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

    /// Deletes a service with all its components; their replicas drain.
    pub(super) async fn delete(&mut self, key: &str) -> Result<(), CommandError> {
        let state = self.world.services.get(key).filter(|state| state.record.component.is_predictor());
        let state = state.ok_or_else(|| CommandError::NotFound(key.to_owned()))?;
        let last = view::service(&self.world, state);
        let components: Vec<_> = self.world.components(state).map(|component| component.record.key()).collect();
        let write = Transaction::new().delete(&keys::conditions(key));
        let write = components.iter().fold(write, |write, key| self.write_gone(key, write));
        self.commit(write).await?;
        for component in components {
            self.retire(&component);
        }
        info!(service = %key, "deleted");
        // Nobody may be watching.
        let _ = self.changes.send(Change::Deleted(Box::new(last)));
        Ok(())
    }

    /// Adds to a write that a component goes, with its revisions.
    fn write_gone(&self, key: &str, mut write: Transaction) -> Transaction {
        write = write.delete(&keys::service(key));
        let Some(state) = self.world.services.get(key) else { return write };
        for number in &state.revisions {
            write = write.delete(&keys::revision(&state.record.revision_key(*number)));
        }
        write
    }

    /// A component that has been deleted: its revisions stay in memory until their last replica has drained.
    fn retire(&mut self, key: &str) {
        let Some(state) = self.world.services.remove(key) else { return };
        for number in state.revisions {
            let revision = state.record.revision_key(number);
            match self.world.revisions.get_mut(&revision) {
                Some(state) if state.replicas.is_empty() => {
                    self.world.revisions.remove(&revision);
                }
                Some(state) => {
                    state.wanted = 0;
                    self.dirty.revisions.insert(revision);
                }
                None => {}
            }
        }
        self.credentials_changed(|service| service == key);
        self.dirty.services.insert(key.to_owned());
    }
}

/// What the components of a service are to share, given the service's former record.
fn common(former: Option<&ServiceRecord>, service: InferenceService, now: Timestamp) -> Common {
    let Some(former) = former else {
        return Common { uid: uuid::Uuid::new_v4().to_string(), generation: 1, created_at: now, service };
    };
    // As in Kubernetes, only the specification has generations.
    let changed = former.service.manifest.get("spec") != service.manifest.get("spec");
    Common {
        uid: former.uid.clone(),
        generation: former.generation + u64::from(changed),
        created_at: former.created_at,
        service,
    }
}

/// Adds to a write what becomes of a component.
fn write_next(write: Transaction, next: &Next) -> Transaction {
    let write = write
        .put_json(&keys::service(&next.record.key()), &next.record)
        .put_json(&keys::revision(&next.revision.key()), &next.revision);
    next.expired.iter().fold(write, |write, number| write.delete(&keys::revision(&next.record.revision_key(*number))))
}
