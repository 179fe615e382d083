//! The InferenceService as a whole: metadata and the parts of `spec`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use super::{
    API_VERSION, ParseOptions, annotations, component,
    documents::join,
    model::{InferenceService, Predictor},
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

/// Parts of `spec` beside the predictor. Without the first two, requests would reach the predictor in a
/// shape that it does not expect.
const REFUSED_PARTS: [(&str, &str); 2] = [
    ("transformer", "a transformer is not supported by this version, and without it requests would skip it"),
    ("explainer", "an explainer is not supported by this version"),
];

/// Reads an InferenceService. What it gives is to be used only where the report has no error.
pub(super) fn read(
    mut root: Map<String, Value>,
    namespace: &str,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> InferenceService {
    root.remove("status");
    for key in root.keys().filter(|key| !["apiVersion", "kind", "metadata", "spec"].contains(&key.as_str())) {
        report.unknown(join("", key));
    }
    let metadata = read_metadata(&mut root, namespace, report);
    let labels = metadata.labels.unwrap_or_default();
    let service_annotations = metadata.annotations.unwrap_or_default();
    let stopped = annotations::check_service(&service_annotations, &labels, report);

    root.insert("apiVersion".into(), json!(API_VERSION));
    let predictor = match root.get("spec") {
        Some(Value::Object(spec)) => read_spec(spec, &service_annotations, options, report),
        given => {
            report.error("spec", given.map(show).unwrap_or_default(), "must be a mapping with a predictor");
            component::absent()
        }
    };
    InferenceService {
        namespace: namespace.to_owned(),
        name: metadata.name.unwrap_or_default(),
        labels,
        annotations: service_annotations,
        stopped,
        predictor,
        manifest: Value::Object(root),
    }
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
    match typed.name.as_deref() {
        Some(name) => names::check_service_name(name, report),
        None if metadata.get("name").is_none_or(Value::is_null) => {
            report.error("metadata.name", "", "must be given");
        }
        None => {}
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

fn read_spec(
    spec: &Map<String, Value>,
    annotations: &BTreeMap<String, String>,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> Predictor {
    for (key, _) in spec.iter().filter(|(_, value)| !value.is_null()) {
        if let Some((_, reason)) = REFUSED_PARTS.iter().find(|(refused, _)| refused == key) {
            report.error(format!("spec.{key}"), "", *reason);
        } else if key == "canary" {
            report.unsupported("spec.canary", "all requests go to spec.predictor");
        } else if key != "predictor" {
            report.unknown(join("spec", key));
        }
    }
    match spec.get("predictor") {
        Some(Value::Object(predictor)) => component::read(predictor, "spec.predictor", annotations, options, report),
        given => {
            let given = given.filter(|given| !given.is_null()).map(show).unwrap_or_default();
            report.error("spec.predictor", given, "must be a mapping");
            component::absent()
        }
    }
}
