//! `v1alpha2`, which KServe does not serve any more: read as `v1beta1`, with a warning.

use serde_json::{Map, Value, json};

use super::{
    API_VERSION, ParseOptions, inference_service,
    model::InferenceService,
    report::{Report, replace_prefix, show},
};

const TOO_OLD: &str = "v1alpha2 is too old for KServe and is read as v1beta1: spec.default.predictor is spec.predictor, \
                       custom.container is containers[0], parallelism is containerConcurrency; write it so";
const COMPONENTS: [&str; 3] = ["predictor", "transformer", "explainer"];

/// Reads an InferenceService of `v1alpha2`.
pub(super) fn read(
    mut root: Map<String, Value>,
    namespace: &str,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> InferenceService {
    report.unsupported("apiVersion", TOO_OLD);
    let spec = root.remove("spec").unwrap_or_default();
    let converted = convert(&spec, report);
    root.insert("spec".into(), converted);
    root.insert("apiVersion".into(), json!(API_VERSION));
    let mark = report.mark();
    let service = inference_service::read(root, namespace, options, report);
    report.relocate(mark, |path| COMPONENTS.iter().fold(path.to_owned(), |path, component| back(&path, component)));
    service
}

fn convert(spec: &Value, report: &mut Report) -> Value {
    let mut converted = Map::new();
    for (key, value) in spec.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        match key.as_str() {
            "default" => {}
            "canary" | "canaryTrafficPercent" => report.error(
                format!("spec.{key}"),
                show(value),
                "v1alpha2's canary is a second specification; apply the new one with canaryTrafficPercent of v1beta1",
            ),
            other => drop(converted.insert(other.to_owned(), value.clone())),
        }
    }
    match spec.get("default") {
        Some(Value::Object(endpoint)) => {
            let components = endpoint.iter().map(|(name, fields)| (name.clone(), component(fields)));
            converted.extend(components);
        }
        given => {
            report.error("spec.default", given.map(show).unwrap_or_default(), "must be a mapping with a predictor")
        }
    }
    Value::Object(converted)
}

fn component(given: &Value) -> Value {
    let Value::Object(fields) = given else { return given.clone() };
    let mut converted = fields.clone();
    if let Some(parallelism) = converted.remove("parallelism") {
        converted.insert("containerConcurrency".into(), parallelism);
    }
    if let Some(triton) = converted.remove("tensorrt") {
        converted.insert("triton".into(), triton);
    }
    if let Some(container) = fields.get("custom").and_then(|custom| custom.get("container")) {
        converted.remove("custom");
        converted.insert("containers".into(), json!([container]));
    }
    Value::Object(converted)
}

/// The document's own path.
fn back(path: &str, component: &str) -> String {
    let (new, old) = (format!("spec.{component}"), format!("spec.default.{component}"));
    replace_prefix(
        path,
        &[
            (&format!("{new}.containers[0]"), &format!("{old}.custom.container")),
            (&format!("{new}.containers"), &format!("{old}.custom")),
            (&format!("{new}.containerConcurrency"), &format!("{old}.parallelism")),
            (&format!("{new}.triton"), &format!("{old}.tensorrt")),
            (&new, &old),
        ],
    )
}
