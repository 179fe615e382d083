//! Which reader a document's kind needs.

use serde_json::{Map, Value};

use super::{
    API_VERSION, ParseOptions,
    auxiliary::{self, AuxiliaryKind},
    documents::Source,
    inference_service::{self, read_head},
    knative,
    model::Resource,
    namespace_of,
    report::{Report, show},
    serving_runtime::{self, ServingRuntime},
    text_at, v1alpha2,
};

/// The group as it was called before KServe had its name.
const API_VERSION_ALIAS: &str = "serving.kubeflow.org/v1beta1";
/// What KServe called its first version.
const TOO_OLD: [&str; 2] = ["serving.kserve.io/v1alpha2", "serving.kubeflow.org/v1alpha2"];
/// The kinds of this fleet, for messages.
const KNOWN: &str = "InferenceService (serving.kserve.io/v1beta1), ServingRuntime and ClusterServingRuntime \
                     (serving.kserve.io/v1alpha1), Service (serving.knative.dev/v1), Secret, ConfigMap, \
                     PersistentVolumeClaim and ServiceAccount (v1)";

/// Reads a document by its kind. What it gives is to be used only where the report has no error.
pub(super) fn read(
    mut root: Map<String, Value>,
    kind: &str,
    namespace: &str,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> Option<Resource> {
    let version = text_at(&root, "apiVersion");
    let service = |service| Some(Resource::InferenceService(Box::new(service)));
    match (kind, version.as_str()) {
        ("InferenceService", API_VERSION | API_VERSION_ALIAS) => {
            service(inference_service::read(root, namespace, options, report))
        }
        ("InferenceService", version) if TOO_OLD.contains(&version) => {
            service(v1alpha2::read(root, namespace, options, report))
        }
        ("Service", knative::API_VERSION) => service(knative::read(root, namespace, options, report)),
        ("ServingRuntime" | "ClusterServingRuntime", serving_runtime::API_VERSION) => {
            let runtime = read_runtime(&mut root, kind, namespace, report);
            Some(Resource::ServingRuntime(Box::new(runtime)))
        }
        ("InferenceService", _) => {
            wrong_version(&root, &format!("{API_VERSION} or {API_VERSION_ALIAS}"), report);
            None
        }
        ("ServingRuntime" | "ClusterServingRuntime", _) => {
            wrong_version(&root, serving_runtime::API_VERSION, report);
            None
        }
        ("", _) => {
            let given = root.get("kind").map(show).unwrap_or_default();
            report.error("kind", given, format!("must be given as text; known are: {KNOWN}"));
            None
        }
        (kind, "v1") if AuxiliaryKind::parse(kind).is_some() => {
            let kind = AuxiliaryKind::parse(kind)?;
            let metadata = read_head(&mut root, namespace, auxiliary::fields(kind), report);
            metadata.name.iter().for_each(|name| auxiliary::check_name(name, report));
            let object = auxiliary::read(kind, &root, namespace, metadata, report);
            Some(Resource::Auxiliary(Box::new(object)))
        }
        (kind, version) => {
            let group = if version.is_empty() { String::new() } else { format!(" of {version}") };
            let message = format!("{kind}{group} is not a kind this fleet serves; known are: {KNOWN}");
            report.error("kind", kind, message);
            None
        }
    }
}

/// The runtime that a document holds, without a word about what is wrong in it.
pub(super) fn runtime_of(source: &Source, options: ParseOptions<'_>) -> Option<ServingRuntime> {
    let Ok(Value::Object(root)) = &source.content else { return None };
    let kind = text_at(root, "kind");
    let is_runtime = ["ServingRuntime", "ClusterServingRuntime"].contains(&kind.as_str());
    if !is_runtime || text_at(root, "apiVersion") != serving_runtime::API_VERSION {
        return None;
    }
    let mut report = Report::new(options.strict);
    let runtime = read_runtime(&mut root.clone(), &kind, &namespace_of(root, options), &mut report);
    (!report.has_errors()).then_some(runtime)
}

fn read_runtime(root: &mut Map<String, Value>, kind: &str, namespace: &str, report: &mut Report) -> ServingRuntime {
    let metadata = read_head(root, namespace, &["spec"], report);
    metadata.name.iter().for_each(|name| serving_runtime::check_name(name, report));
    let namespace = (kind == "ServingRuntime").then_some(namespace);
    if namespace.is_none() {
        root.get_mut("metadata").and_then(Value::as_object_mut).map(|metadata| metadata.remove("namespace"));
    }
    serving_runtime::read(root, namespace, metadata, report)
}

fn wrong_version(root: &Map<String, Value>, expected: &str, report: &mut Report) {
    let given = root.get("apiVersion").map(show).unwrap_or_default();
    report.error("apiVersion", given, format!("must be {expected}"));
}
