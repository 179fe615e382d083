//! What is kept beside services: runtimes, and the values of secrets and config maps.

use std::sync::Arc;

use jiff::Timestamp;
use pilotlight_proto::control::v1 as control;
use serde_json::{Value, json};
use tonic::Status;

use super::control::{status, unavailable};
use crate::{
    finding::Finding,
    model::{RuntimeRecord, keys},
    reconcile::{Applied, Handle, commands::Input},
    spec::{Auxiliary, AuxiliaryKind, Component, ComponentKind, InferenceService, Runtimes, ServingRuntime},
    store::{Store, StoreExt as _, Transaction},
    values::{ValuesError, Vault},
};

/// Applies, lists and deletes such objects.
#[derive(Debug)]
pub struct Objects {
    store: Arc<dyn Store>,
    vault: Arc<Vault>,
    handle: Handle,
}

/// What an apply did, or would do.
#[derive(Debug)]
pub struct Change {
    /// `None`: there is nothing to keep of it.
    applied: Option<Applied>,
    stored: Option<Value>,
    object: Value,
}

impl Change {
    /// Writes the objects into the answer where they are asked for; gives the outcome.
    pub(super) fn describe(self, result: &mut control::ApplyResult, dry_run: bool) -> control::ApplyOutcome {
        if dry_run {
            result.object_json = self.object.to_string();
            result.stored_json = self.stored.map(|stored| stored.to_string()).unwrap_or_default();
        }
        self.applied.map_or(control::ApplyOutcome::NotKept, Into::into)
    }
}

impl Objects {
    /// For a store and the values that are in it.
    pub fn new(store: Arc<dyn Store>, vault: Arc<Vault>, handle: Handle) -> Self {
        Self { store, vault, handle }
    }

    /// The runtimes that services may use: those built in, and over them those applied.
    pub(super) async fn runtimes(&self) -> Result<Runtimes, Status> {
        let mut runtimes = Runtimes::built_in();
        for record in self.store.list_json::<RuntimeRecord>(keys::RUNTIMES).await.map_err(unavailable)? {
            runtimes.insert(record.runtime, Some(record.created_at));
        }
        Ok(runtimes)
    }

    /// Stores a runtime. Services that use it change when they are applied again.
    pub(super) async fn apply_runtime(&self, runtime: ServingRuntime, dry_run: bool) -> Result<Change, Status> {
        let key = keys::runtime(runtime.namespace.as_deref(), &runtime.name);
        let former = self.store.get_json::<RuntimeRecord>(&key).await.map_err(unavailable)?;
        let applied = outcome(former.as_ref().map(|former| &former.runtime), &runtime);
        let change = Change {
            applied: Some(applied),
            object: runtime.manifest.clone(),
            stored: former.as_ref().map(|former| former.runtime.manifest.clone()),
        };
        if !dry_run && applied != Applied::Unchanged {
            let created_at = former.map_or_else(Timestamp::now, |former| former.created_at);
            let write = Transaction::new().put_json(&key, &RuntimeRecord { created_at, runtime });
            self.store.commit(write).await.map_err(unavailable)?;
        }
        Ok(change)
    }

    /// Seals and stores a secret or a config map.
    pub(super) async fn apply_auxiliary(&self, object: Auxiliary, dry_run: bool) -> Result<Change, Status> {
        let kept = matches!(object.kind, AuxiliaryKind::Secret | AuxiliaryKind::ConfigMap);
        let former = self.vault.values().get(object.kind, &object.namespace, &object.name).filter(|_| kept);
        let applied = kept.then(|| outcome(former.as_deref(), &object));
        let stored = former.as_deref().map(|former| shown(former, None));
        let change = Change { applied, stored, object: shown(&object, former.as_deref()) };
        if dry_run || !kept || applied == Some(Applied::Unchanged) {
            return Ok(change);
        }
        let record = self.vault.seal(&object).map_err(internal)?;
        let key = keys::value(object.kind, &object.namespace, &object.name);
        self.store.commit(Transaction::new().put_json(&key, &record)).await.map_err(unavailable)?;
        let namespace = object.namespace.clone();
        self.vault.values().remember(object);
        self.handle.send(Input::ValuesChanged { namespace }).await.map_err(status)?;
        Ok(change)
    }

    /// Warnings about secrets and config maps that a service needs and that are not there yet.
    pub(super) fn missing(&self, service: &InferenceService) -> Vec<Finding> {
        let missing = |(kind, component): (ComponentKind, &Component)| {
            let why = self.vault.values().resolve(&service.namespace, &component.template.container.env).err()?;
            Some(Finding::warning(format!("spec.{kind}"), "", format!("{why}: replicas fail until it is applied")))
        };
        service.components().filter_map(missing).collect()
    }

    /// All objects; secrets and config maps without their values.
    pub(super) async fn list(&self) -> Result<Vec<control::Object>, Status> {
        let applied = self.store.list_json::<RuntimeRecord>(keys::RUNTIMES).await.map_err(unavailable)?;
        let of_runtime = |runtime: &ServingRuntime, built_in| control::Object {
            kind: runtime.manifest["kind"].as_str().unwrap_or_default().to_owned(),
            namespace: runtime.namespace.clone().unwrap_or_default(),
            name: runtime.name.clone(),
            built_in,
            object_json: runtime.manifest.to_string(),
        };
        let replaced = |runtime: &ServingRuntime| {
            applied.iter().any(|record| record.runtime.namespace.is_none() && record.runtime.name == runtime.name)
        };
        let built_in = Runtimes::built_in();
        let mut objects: Vec<_> =
            built_in.iter().filter(|runtime| !replaced(runtime)).map(|runtime| of_runtime(runtime, true)).collect();
        objects.extend(applied.iter().map(|record| of_runtime(&record.runtime, false)));
        objects.extend(self.vault.values().all().iter().map(|object| control::Object {
            kind: object.kind.to_string(),
            namespace: object.namespace.clone(),
            name: object.name.clone(),
            built_in: false,
            object_json: shown(object, None).to_string(),
        }));
        Ok(objects)
    }

    /// Deletes an object.
    pub(super) async fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<(), Status> {
        let values = [AuxiliaryKind::Secret, AuxiliaryKind::ConfigMap];
        let value = values.into_iter().find(|known| known.to_string() == kind);
        let key = match (kind, value) {
            ("ServingRuntime", _) => keys::runtime(Some(namespace), name),
            ("ClusterServingRuntime", _) => keys::runtime(None, name),
            (_, Some(kind)) => keys::value(kind, namespace, name),
            _ => return Err(Status::invalid_argument(format!("kind: {kind} is not kept here"))),
        };
        if self.store.get(&key).await.map_err(unavailable)?.is_none() {
            return Err(Status::not_found(format!("{kind} {name} not found; what is built in cannot be deleted")));
        }
        self.store.commit(Transaction::new().delete(&key)).await.map_err(unavailable)?;
        if let Some(kind) = value {
            self.vault.values().forget(kind, namespace, name);
            let namespace = namespace.to_owned();
            self.handle.send(Input::ValuesChanged { namespace }).await.map_err(status)?;
        }
        Ok(())
    }
}

impl From<Applied> for control::ApplyOutcome {
    fn from(applied: Applied) -> Self {
        match applied {
            Applied::Created => Self::Created,
            Applied::Configured => Self::Configured,
            Applied::Unchanged => Self::Unchanged,
        }
    }
}

fn outcome<T: PartialEq>(former: Option<&T>, wanted: &T) -> Applied {
    match former {
        None => Applied::Created,
        Some(former) if former == wanted => Applied::Unchanged,
        Some(_) => Applied::Configured,
    }
}

/// An object without its values: only whether each is as in `former` can be seen, as in kubectl's diff.
fn shown(object: &Auxiliary, former: Option<&Auxiliary>) -> Value {
    let mask = |(key, value): (&String, &Vec<u8>)| {
        let same = former.is_none_or(|former| former.data.0.get(key).is_none_or(|before| before == value));
        (key.clone(), json!(if same { "***" } else { "*** (changed)" }))
    };
    json!({
        "apiVersion": "v1",
        "kind": object.kind.to_string(),
        "metadata": { "name": object.name, "namespace": object.namespace },
        "data": object.data.0.iter().map(mask).collect::<serde_json::Map<_, _>>(),
    })
}

fn internal(error: ValuesError) -> Status {
    Status::internal(error.to_string())
}
