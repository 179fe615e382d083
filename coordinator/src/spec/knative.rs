//! `serving.knative.dev/v1` `Service`: its template is a predictor.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    ParseOptions,
    component::{self, Context, Role},
    documents::join,
    inference_service::{ServiceHead, read_service_head},
    model::{Component, InferenceService, TrafficShare},
    names,
    report::{Report, replace_prefix, show},
    typed,
};

/// `apiVersion` of the kind.
pub(super) const API_VERSION: &str = "serving.knative.dev/v1";
const POD: &str = "spec.template.spec";
const METADATA: &str = "spec.template.metadata";
/// Fields of a revision that have no effect here.
const UNSUPPORTED: [(&str, &str); 2] = [
    ("responseStartTimeoutSeconds", "timeoutSeconds counts for the whole request"),
    ("idleTimeoutSeconds", "timeoutSeconds counts for the whole request"),
];

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Target {
    revision_name: Option<String>,
    latest_revision: Option<bool>,
    percent: Option<i64>,
    tag: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TemplateMetadata {
    name: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads a Knative `Service`. What it gives is to be used only where the report has no error.
pub(super) fn read(
    mut root: Map<String, Value>,
    namespace: &str,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> InferenceService {
    let ServiceHead { name, labels, annotations, stopped } = read_service_head(&mut root, namespace, report);
    for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with("autoscaling.knative.dev/")) {
        let at = join("metadata.annotations", key);
        report.warning(at, value, "has no effect there: set it in spec.template.metadata.annotations");
    }
    let empty = Map::new();
    let spec = root.get("spec").and_then(Value::as_object).unwrap_or_else(|| {
        report.error("spec", "", "must be a mapping with a template");
        &empty
    });
    for key in spec.keys().filter(|key| !["template", "traffic"].contains(&key.as_str())) {
        report.unknown(join("spec", key), None);
    }
    // Annotations of the service itself do not reach its revisions.
    let none = BTreeMap::new();
    let context = Context { name: &name, namespace, labels: &labels, annotations: &none, options };
    let (predictor, revision_name) = match spec.get("template") {
        Some(Value::Object(template)) => read_template(template, context, report),
        given => {
            report.error("spec.template", given.map(show).unwrap_or_default(), "must be a mapping");
            (component::absent(), None)
        }
    };
    let traffic = read_traffic(spec.get("traffic"), report);
    InferenceService {
        namespace: namespace.to_owned(),
        name,
        labels,
        annotations,
        stopped,
        predictor,
        transformer: None,
        explainer: None,
        traffic,
        revision_name,
        manifest: Value::Object(root),
    }
}

/// The predictor, and the name that its revision is given.
fn read_template(
    template: &Map<String, Value>,
    context: Context<'_>,
    report: &mut Report,
) -> (Component, Option<String>) {
    for key in template.keys().filter(|key| !["metadata", "spec"].contains(&key.as_str())) {
        report.unknown(join("spec.template", key), None);
    }
    let mut metadata = template.get("metadata").cloned().unwrap_or_else(|| json!({}));
    let metadata: TemplateMetadata = typed::read(&mut metadata, METADATA, report);
    let suffix = metadata.name.as_deref().map(|name| name.strip_prefix(context.name)?.strip_prefix('-'));
    if let Some(name) = &metadata.name
        && !(suffix.flatten().is_some_and(|suffix| !suffix.is_empty()) && names::is_dns_label(name))
    {
        report.error(join(METADATA, "name"), name, format!("must be a DNS label that begins with {}-", context.name));
    }
    let mut fields = match template.get("spec") {
        Some(Value::Object(fields)) => fields.clone(),
        given => {
            report.error(POD, given.map(show).unwrap_or_default(), "must be a mapping with containers");
            return (component::absent(), metadata.name);
        }
    };
    for (key, consequence) in UNSUPPORTED {
        if fields.remove(key).is_some() {
            report.unsupported(join(POD, key), consequence);
        }
    }
    // Fields that only KServe has at this place would otherwise be taken for its own.
    for key in ["timeout", "minReplicas", "maxReplicas", "labels", "annotations", "scaleTarget", "scaleMetric"] {
        if fields.remove(key).is_some() {
            report.unknown(join(POD, key), None);
        }
    }
    let mut annotations = metadata.annotations.unwrap_or_default();
    // Unlike KServe, Knative lets a service go to zero where nothing is said.
    let min = take_scale(&mut annotations, ["min-scale", "minScale"], report).unwrap_or(0);
    let max = take_scale(&mut annotations, ["max-scale", "maxScale"], report);
    fields.insert("minReplicas".into(), json!(min));
    fields.extend(max.map(|max| ("maxReplicas".to_owned(), json!(max))));
    if let Some(timeout) = fields.remove("timeoutSeconds") {
        fields.insert("timeout".into(), timeout);
    }
    fields.insert("labels".into(), json!(metadata.labels.unwrap_or_default()));
    fields.insert("annotations".into(), json!(annotations));
    let mark = report.mark();
    let component = component::read(&fields, POD, Role::Beside, context, report);
    report.relocate(mark, |path| {
        let annotation = |name: &str| format!("{METADATA}.annotations[autoscaling.knative.dev/{name}]");
        replace_prefix(
            path,
            &[
                (&join(POD, "minReplicas"), &annotation("min-scale")),
                (&join(POD, "maxReplicas"), &annotation("max-scale")),
                (&join(POD, "timeout"), &join(POD, "timeoutSeconds")),
                (&join(POD, "labels"), &join(METADATA, "labels")),
                (&join(POD, "annotations"), &join(METADATA, "annotations")),
            ],
        )
    });
    (component, metadata.name)
}

/// Takes a scale out of the annotations; the dashed key wins over the older one.
fn take_scale(annotations: &mut BTreeMap<String, String>, names: [&str; 2], report: &mut Report) -> Option<i64> {
    let mut scale = None;
    for name in names {
        let key = format!("autoscaling.knative.dev/{name}");
        let Some(given) = annotations.remove(&key) else { continue };
        match given.parse::<i64>() {
            Ok(number) => scale = scale.or(Some(number)),
            Err(_) => report.error(format!("{METADATA}.annotations[{key}]"), given, "must be a whole number"),
        }
    }
    scale
}

fn read_traffic(given: Option<&Value>, report: &mut Report) -> Vec<TrafficShare> {
    let Some(given) = given.filter(|given| !given.is_null()) else { return Vec::new() };
    let targets: Vec<Target> = typed::read(&mut given.clone(), "spec.traffic", report);
    let mut tags = BTreeSet::new();
    let mut shares = Vec::new();
    for (index, target) in targets.into_iter().enumerate() {
        let at = format!("spec.traffic[{index}]");
        let revision = target.revision_name.filter(|name| !name.is_empty());
        match (&revision, target.latest_revision) {
            (Some(name), Some(true)) => {
                report.error(join(&at, "latestRevision"), name, "must not be true together with revisionName");
            }
            (None, Some(false)) => report.error(join(&at, "latestRevision"), "false", "needs a revisionName"),
            _ => {}
        }
        let tag = target.tag.unwrap_or_default();
        if !tag.is_empty() && (!names::is_dns_label(&tag) || !tags.insert(tag.clone())) {
            report.error(join(&at, "tag"), &tag, "must be a DNS label, and be unique");
        }
        let percent = target.percent.unwrap_or(0);
        let percent = u8::try_from(percent).ok().filter(|percent| *percent <= 100).unwrap_or_else(|| {
            report.error(join(&at, "percent"), percent, "must be 0 to 100");
            0
        });
        shares.push(TrafficShare { revision, percent, tag });
    }
    let sum: u32 = shares.iter().map(|share| u32::from(share.percent)).sum();
    if !shares.is_empty() && sum != 100 {
        report.error("spec.traffic", sum, "percents must add up to 100");
    }
    shares
}
