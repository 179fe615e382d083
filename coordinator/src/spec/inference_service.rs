//! The InferenceService as a whole: metadata and the parts of `spec`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use super::{
    API_VERSION, ParseOptions, annotations, chain,
    component::{self, Context, Role},
    documents::join,
    fields,
    model::{Component, InferenceService},
    names,
    report::{Report, show},
    typed,
};

/// Fields of `metadata` that a server sets; a manifest may carry them, and they mean nothing there.
const SERVER_METADATA: [&str; 8] = [
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "selfLink",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
];

/// Explainers that KServe runs from images of its own configuration; `alibi` until v0.13.
const EXPLAINERS: [&str; 3] = ["art", "alibi", "aix"];

/// Reads an InferenceService. What it gives is to be used only where the report has no error.
pub(super) fn read(
    mut root: Map<String, Value>,
    namespace: &str,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> InferenceService {
    let ServiceHead { name, labels, annotations, stopped } = read_service_head(&mut root, namespace, report);

    root.insert("apiVersion".into(), json!(API_VERSION));
    let context = Context { name: &name, namespace, labels: &labels, annotations: &annotations, options };
    let (predictor, transformer, explainer) = match root.get("spec") {
        Some(Value::Object(spec)) => read_spec(spec, context, report),
        given => {
            report.error("spec", given.map(show).unwrap_or_default(), "must be a mapping with a predictor");
            (component::absent(), None, None)
        }
    };
    InferenceService {
        namespace: namespace.to_owned(),
        name,
        labels,
        annotations,
        stopped,
        predictor,
        transformer,
        explainer,
        traffic: Vec::new(),
        revision_name: None,
        manifest: Value::Object(root),
    }
}

/// What a service has beside its spec.
pub(super) struct ServiceHead {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    /// By annotation: no replica is to run.
    pub(super) stopped: bool,
}

/// Reads the head of a service, of KServe's kind or Knative's.
pub(super) fn read_service_head(root: &mut Map<String, Value>, namespace: &str, report: &mut Report) -> ServiceHead {
    let metadata = read_head(root, namespace, &["spec"], report);
    names::check_service_name_of(&metadata, report);
    let labels = metadata.labels.unwrap_or_default();
    let annotations = metadata.annotations.unwrap_or_default();
    let stopped = annotations::check_service(&annotations, &labels, report);
    ServiceHead { name: metadata.name.unwrap_or_default(), labels, annotations, stopped }
}

/// Reads what every object has, and says what is unknown beside it and `fields`.
pub(super) fn read_head(
    root: &mut Map<String, Value>,
    namespace: &str,
    fields: &[&str],
    report: &mut Report,
) -> ObjectMeta {
    root.remove("status");
    for key in root.keys() {
        if !["apiVersion", "kind", "metadata"].contains(&key.as_str()) && !fields.contains(&key.as_str()) {
            report.unknown(join("", key), None);
        }
    }
    read_metadata(root, namespace, report)
}

/// Reads `metadata`, and leaves it in `root` without what a server sets and with the namespace.
fn read_metadata(root: &mut Map<String, Value>, namespace: &str, report: &mut Report) -> ObjectMeta {
    let mut metadata = root.remove("metadata").unwrap_or(Value::Null);
    if let Some(fields) = metadata.as_object_mut() {
        SERVER_METADATA.iter().for_each(|key| drop(fields.remove(*key)));
        fields.insert("namespace".into(), namespace_value(fields.get("namespace"), namespace));
    }
    root.insert("metadata".into(), metadata.clone());

    let typed: ObjectMeta = match metadata {
        Value::Object(_) => typed::read(&mut metadata, "metadata", report),
        given => {
            report.error("metadata", show(&given), "must be a mapping with a name");
            return ObjectMeta::default();
        }
    };
    if typed.name.is_none() && metadata.get("name").is_none_or(Value::is_null) {
        report.error("metadata.name", "", "must be given");
    }
    names::check_namespace(namespace, report);
    names::check_labels(typed.labels.as_ref().unwrap_or(&Default::default()), "metadata.labels", report);
    for (key, consequence) in [
        ("generateName", "give metadata.name"),
        ("finalizers", "a deleted service goes when its replicas have drained"),
        ("ownerReferences", "the service stays when its owner goes"),
    ] {
        if metadata.get(key).is_some_and(|value| !value.is_null()) {
            report.unsupported(format!("metadata.{key}"), consequence);
        }
    }
    typed
}

/// The namespace to use, or what stands there where it is no text, so that its type is reported.
fn namespace_value(given: Option<&Value>, namespace: &str) -> Value {
    match given {
        None | Some(Value::Null | Value::String(_)) => json!(namespace),
        Some(other) => other.clone(),
    }
}

type Components = (Component, Option<Component>, Option<Component>);

fn read_spec(spec: &Map<String, Value>, context: Context<'_>, report: &mut Report) -> Components {
    for (key, _) in spec.iter().filter(|(_, value)| !value.is_null()) {
        if key == "canary" {
            report.unsupported("spec.canary", "all requests go to spec.predictor");
        } else if !["predictor", "transformer", "explainer"].contains(&key.as_str()) {
            report.unknown(join("spec", key), fields::suggest(key));
        }
    }
    let predictor = match spec.get("predictor") {
        Some(Value::Object(fields)) => component::read(fields, "spec.predictor", Role::Predictor, context, report),
        given => {
            let given = given.filter(|given| !given.is_null()).map(show).unwrap_or_default();
            report.error("spec.predictor", given, "must be a mapping");
            component::absent()
        }
    };
    let transformer = read_beside(spec.get("transformer"), "spec.transformer", context, report);
    let explainer = spec.get("explainer").filter(|given| !is_foreign_explainer(given, report));
    (predictor, transformer, read_beside(explainer, "spec.explainer", context, report))
}

fn read_beside(given: Option<&Value>, at: &str, context: Context<'_>, report: &mut Report) -> Option<Component> {
    match given? {
        Value::Null => None,
        Value::Object(fields) => {
            if fields.contains_key("custom") {
                report.error(join(at, "custom"), "", "is of v1alpha2; give the container in containers");
            }
            let mut component = component::read(fields, at, Role::Beside, context, report);
            chain::point_at_predictor(&mut component, fields.contains_key("containerConcurrency"), context.name);
            Some(component)
        }
        other => {
            report.error(at, show(other), "must be a mapping");
            None
        }
    }
}

/// True for an explainer without a container of its own. There is no image for it to be run from.
fn is_foreign_explainer(given: &Value, report: &mut Report) -> bool {
    let kind = EXPLAINERS.into_iter().find(|kind| given.get(kind).is_some_and(|value| !value.is_null()));
    let Some(kind) = kind else { return false };
    let at = join("spec.explainer", kind);
    if given.get("containers").is_some() {
        report.error(&at, "containers", "must not be given together with containers");
    }
    report.unsupported(at, "no explainer is run, and :explain is not answered; predictions are as without it");
    true
}
