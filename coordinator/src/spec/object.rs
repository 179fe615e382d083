//! The object in KServe's shape, as `get -o yaml` shows it.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    API_VERSION,
    model::{ComponentKind, InferenceService},
};

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not known yet.
    Unknown,
}

impl fmt::Display for ConditionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One condition of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its type, such as `PredictorReady`.
    pub name: &'static str,
    /// True where `Ready` does not depend on it.
    pub informative: bool,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// CamelCase; empty where it holds.
    pub reason: String,
    /// For people; empty where there is nothing to say.
    pub message: String,
    /// When `status` last changed.
    pub last_transition: Timestamp,
}

/// One share of a service's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrafficTarget {
    /// Name without the namespace.
    pub revision: String,
    /// 0 to 100; a service's targets add up to 100.
    pub percent: u8,
    /// True where this target follows the latest ready revision.
    pub latest: bool,
    /// Such as `prev`; empty for none.
    pub tag: String,
    /// Where this target alone is reached; only with a tag.
    pub url: Option<String>,
}

/// How far the newest model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransitionStatus {
    /// The active model is the wanted one.
    UpToDate,
    /// The wanted one is on its way.
    InProgress,
    /// The wanted one does not load; the one before still serves, if there was one.
    BlockedByFailedLoad,
    /// The specification cannot be carried out.
    InvalidSpec,
}

/// State of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelState {
    /// Not placed yet.
    Pending,
    /// Placed on nothing now; loads on demand (scaled to zero).
    Standby,
    /// Loading.
    Loading,
    /// At least one copy is loaded.
    Loaded,
    /// Every copy failed to load.
    FailedToLoad,
}

/// The last failure of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureInfo {
    /// KServe's reasons: `ModelLoadFailed`, `RuntimeUnhealthy`, …
    pub reason: String,
    /// For people.
    pub message: String,
    /// Where: the replica's name.
    pub location: String,
    /// Revision of that replica, without the namespace.
    pub revision: String,
    /// When.
    pub time: Timestamp,
    /// Exit code where the process ended.
    pub exit_code: Option<i32>,
}

/// `status.modelStatus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelStatus {
    /// How far the newest model is.
    pub transition: TransitionStatus,
    /// State of the model that serves; `None` where none ever did.
    pub active: Option<ModelState>,
    /// State of the wanted model.
    pub target: ModelState,
    /// Replicas that failed to load.
    pub failed_copies: u32,
    /// Replicas that loaded.
    pub total_copies: u32,
    /// The last failure, where there was one.
    pub last_failure: Option<FailureInfo>,
}

/// What the coordinator knows about a service, for [`to_object`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusView {
    /// Unique for ever.
    pub uid: String,
    /// Grows by one with each change of the specification, from 1.
    pub generation: u64,
    /// The generation that the rest of this status speaks of.
    pub observed_generation: u64,
    /// When the service was first applied.
    pub created_at: Timestamp,
    /// Where clients reach the service; `None` until it was first ready.
    pub url: Option<String>,
    /// Where other services reach it.
    pub address_url: Option<String>,
    /// All conditions, sorted by name, as Knative keeps them.
    pub conditions: Vec<Condition>,
    /// Its components, the predictor first.
    pub components: Vec<ComponentView>,
    /// State of the model.
    pub model: ModelStatus,
}

/// One entry of `status.components`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComponentView {
    /// Which.
    pub kind: ComponentKind,
    /// Where clients reach it; `None` until it was first ready.
    pub url: Option<String>,
    /// Revision names without the namespace; empty where there is none yet.
    pub latest_created_revision: String,
    /// The newest revision that was ready.
    pub latest_ready_revision: String,
    /// The newest revision that ever had all requests.
    pub latest_rolledout_revision: String,
    /// The one rolled out before it.
    pub previous_rolledout_revision: String,
    /// Shares of requests.
    pub traffic: Vec<TrafficTarget>,
}

/// The service as KServe's API would give it: metadata, `spec` as applied, and status.
pub fn to_object(service: &InferenceService, view: &StatusView) -> Value {
    let mut metadata = json!({
        "name": service.name,
        "namespace": service.namespace,
        "uid": view.uid,
        "generation": view.generation,
        "creationTimestamp": time(view.created_at),
    });
    for (key, map) in [("labels", &service.labels), ("annotations", &service.annotations)] {
        if !map.is_empty() {
            metadata[key] = json!(map);
        }
    }
    // A Knative `Service` is shown as it was applied, so that it can be applied again.
    let given = |key: &str, default: &str| service.manifest.get(key).cloned().unwrap_or_else(|| json!(default));
    json!({
        "apiVersion": given("apiVersion", API_VERSION),
        "kind": given("kind", "InferenceService"),
        "metadata": metadata,
        "spec": service.manifest.get("spec").cloned().unwrap_or(Value::Null),
        "status": match service.manifest.get("kind").and_then(Value::as_str) {
            Some("Service") => knative_status(view),
            _ => status(view),
        },
    })
}

fn status(view: &StatusView) -> Value {
    let conditions: Vec<_> = view.conditions.iter().map(condition).collect();
    let components: Map<_, _> = view.components.iter().map(|of| (of.kind.to_string(), component(of))).collect();
    let mut status = json!({
        "deploymentMode": "Knative",
        "observedGeneration": view.observed_generation,
        "conditions": conditions,
        "components": components,
        "modelStatus": model(&view.model),
    });
    if let Some(url) = &view.url {
        status["url"] = json!(url);
    }
    if let Some(url) = &view.address_url {
        status["address"] = json!({ "url": url });
    }
    status
}

/// A Knative `Service`'s own fields, beside KServe's.
fn knative_status(view: &StatusView) -> Value {
    let mut status = status(view);
    let predictor = view.components.first();
    if let (Some(predictor), Some(fields)) = (predictor, status.as_object_mut()) {
        put_text(fields, "latestCreatedRevisionName", &predictor.latest_created_revision);
        put_text(fields, "latestReadyRevisionName", &predictor.latest_ready_revision);
        fields.insert("traffic".into(), predictor.traffic.iter().map(traffic).collect());
    }
    status
}

fn component(view: &ComponentView) -> Value {
    let mut component = Map::new();
    for (key, revision) in [
        ("latestCreatedRevision", &view.latest_created_revision),
        ("latestReadyRevision", &view.latest_ready_revision),
        ("latestRolledoutRevision", &view.latest_rolledout_revision),
        ("previousRolledoutRevision", &view.previous_rolledout_revision),
    ] {
        put_text(&mut component, key, revision);
    }
    component.insert("traffic".into(), view.traffic.iter().map(traffic).collect());
    if let Some(url) = &view.url {
        component.insert("url".into(), json!(url));
        component.insert("address".into(), json!({ "url": url }));
    }
    Value::Object(component)
}

fn condition(condition: &Condition) -> Value {
    let mut object = Map::new();
    object.insert("type".into(), json!(condition.name));
    if condition.informative {
        object.insert("severity".into(), json!("Info"));
    }
    object.insert("status".into(), json!(condition.status.to_string()));
    put_text(&mut object, "reason", &condition.reason);
    put_text(&mut object, "message", &condition.message);
    object.insert("lastTransitionTime".into(), json!(time(condition.last_transition)));
    Value::Object(object)
}

fn traffic(target: &TrafficTarget) -> Value {
    let mut object = Map::new();
    object.insert("revisionName".into(), json!(target.revision));
    object.insert("percent".into(), json!(target.percent));
    object.insert("latestRevision".into(), json!(target.latest));
    put_text(&mut object, "tag", &target.tag);
    put_text(&mut object, "url", target.url.as_deref().unwrap_or_default());
    Value::Object(object)
}

fn model(model: &ModelStatus) -> Value {
    let mut states = Map::new();
    put_text(&mut states, "activeModelState", &model.active.map(|state| format!("{state:?}")).unwrap_or_default());
    put_text(&mut states, "targetModelState", &format!("{:?}", model.target));
    let mut object = json!({
        "transitionStatus": format!("{:?}", model.transition),
        "states": states,
        "copies": { "failedCopies": model.failed_copies, "totalCopies": model.total_copies },
    });
    if let Some(failure) = &model.last_failure {
        let mut info = Map::new();
        put_text(&mut info, "reason", &failure.reason);
        put_text(&mut info, "message", &failure.message);
        put_text(&mut info, "location", &failure.location);
        put_text(&mut info, "modelRevisionName", &failure.revision);
        info.insert("time".into(), json!(time(failure.time)));
        if let Some(code) = failure.exit_code {
            info.insert("exitCode".into(), json!(code));
        }
        object["lastFailureInfo"] = Value::Object(info);
    }
    object
}

fn put_text(object: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        object.insert(key.into(), json!(text));
    }
}

/// RFC 3339 in whole seconds, as Kubernetes writes times.
fn time(timestamp: Timestamp) -> String {
    timestamp.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
