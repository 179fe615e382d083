//! One component: extension fields, pod fields and one implementation, all at one level.

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    ParseOptions, annotations, container,
    documents::join,
    fields::{EXTENSION, EXTENSION_REFUSED, EXTENSION_UNSUPPORTED},
    framework::{self, Model},
    model::{Component, Resources, RevisionTemplate, RuntimeUse, Scaling, Storage},
    names, placing,
    pod::{self, Around, Main, ReadMain, ReadPod, seconds},
    report::{Report, replace_prefix},
    resolve,
    storage::{self, StorageUri},
    typed, warmth,
};

/// Knative's default `timeoutSeconds` of a revision.
const DEFAULT_TIMEOUT_SECONDS: i64 = 300;
/// Knative's default upper limit.
const CONTAINER_CONCURRENCY_LIMIT: i64 = 1000;

/// Which component; only the predictor may be a model for a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Predictor,
    /// Transformer or explainer.
    Beside,
}

/// The service that a component is part of.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) name: &'a str,
    pub(super) namespace: &'a str,
    pub(super) labels: &'a BTreeMap<String, String>,
    pub(super) annotations: &'a BTreeMap<String, String>,
    pub(super) options: ParseOptions<'a>,
}

/// Fields that KServe adds to every component.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Extension {
    min_replicas: Option<i64>,
    max_replicas: Option<i64>,
    scale_target: Option<i64>,
    scale_metric: Option<String>,
    scale_metric_type: Option<String>,
    container_concurrency: Option<i64>,
    timeout: Option<i64>,
    canary_traffic_percent: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    storage_uris: Option<Vec<StorageUri>>,
    logger: Option<Logger>,
    batcher: Option<Batcher>,
    deployment_strategy: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Logger {
    mode: Option<String>,
    storage: Option<Map<String, Value>>,
    #[serde(rename = "url")]
    _url: Option<String>,
    #[serde(rename = "metadataHeaders")]
    _metadata_headers: Option<Vec<String>>,
    #[serde(rename = "metadataAnnotations")]
    _metadata_annotations: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Batcher {
    max_batch_size: Option<i64>,
    max_latency: Option<i64>,
    timeout: Option<i64>,
}

/// What stands for a component that could not be read at all.
pub(super) fn absent() -> Component {
    Component {
        scaling: Scaling::default(),
        timeout: Duration::ZERO,
        canary_traffic_percent: None,
        template: RevisionTemplate {
            container: container::absent(),
            resources: no_resources(),
            termination_grace_period: Duration::ZERO,
            node_selector: BTreeMap::new(),
            node_affinity: None,
            preferred_node_affinity: Vec::new(),
            sidecars: Vec::new(),
            volumes: Vec::new(),
            image_pull_secrets: Vec::new(),
            storage: Vec::new(),
            runtime: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        },
    }
}

fn no_resources() -> Resources {
    Resources {
        gpus: 0,
        gpu_memory_bytes: None,
        mig: None,
        cpu_millis: 0,
        cpu_limit_millis: 0,
        memory_bytes: 0,
        memory_limit_bytes: 0,
    }
}

/// Reads the component at `at`. What it gives is to be used only where the report has no error.
pub(super) fn read(
    fields: &Map<String, Value>,
    at: &str,
    role: Role,
    context: Context<'_>,
    report: &mut Report,
) -> Component {
    let (extension, models, pod) = split(fields, at, role, report);
    let mut extension: Extension = typed::read(&mut Value::Object(extension), at, report);
    check_unsupported(&extension, at, context, report);
    let model = choose_implementation(&models, &pod, at, role, report);

    let labels = extension.labels.take().unwrap_or_default();
    names::check_labels(&labels, &join(at, "labels"), report);
    let given_annotations = extension.annotations.take().unwrap_or_default();
    let own_annotations = given_annotations.clone();
    let annotations =
        annotations::of_revision(context.annotations, given_annotations, &join(at, "annotations"), report);
    placing::check(&annotations, report);
    let around = Around {
        gpu_memory_bytes: annotations::gpu_memory(&annotations, report),
        writable: !storage::read_only(context.annotations),
    };

    let uris = extension.storage_uris.take().unwrap_or_default();
    let by_uris = storage::by_uris(&uris, &join(at, "storageUris"), !around.writable, report);
    let main = if models.is_empty() { Main::Custom } else { Main::Elsewhere };
    let own = pod::read_within(Value::Object(pod.clone()), at, main, around, report);
    let mut template = match model {
        Some((key, model)) => {
            let made = resolve::read(model, &join(at, key), &pod, at, around, context, report);
            made.map_or_else(
                || absent().template,
                |made| RevisionTemplate {
                    // The service's own win.
                    annotations: made.annotations,
                    ..template(made.pod, Some(made.runtime), made.storage)
                },
            )
        }
        None => template(own, None, Vec::new()),
    };
    if !by_uris.is_empty() && !template.storage.is_empty() {
        report.error(join(at, "storageUris"), "", "must not be given together with storageUri, storage or STORAGE_URI");
    }
    template.storage.extend(by_uris);
    template.labels.extend(labels);
    template.annotations.extend(annotations);
    warmth::check_paths(&template.annotations, report);
    component(extension, template, at, &own_annotations, context, report)
}

fn component(
    extension: Extension,
    template: RevisionTemplate,
    at: &str,
    own_annotations: &BTreeMap<String, String>,
    context: Context<'_>,
    report: &mut Report,
) -> Component {
    let scaling = read_scaling(&extension, at, report);
    // The autoscaler's own rules for annotations and metric are plugged in here, and only here. It does
    // not know which component it is asked about, nor which annotations are the component's own.
    let mark = report.mark();
    report.add((context.options.validate_scaling)(&template.annotations, &scaling));
    report.relocate(mark, |path| {
        let annotation = path.strip_prefix("metadata.annotations[").and_then(|rest| rest.strip_suffix(']'));
        match annotation {
            Some(key) if own_annotations.contains_key(key) => join(&join(at, "annotations"), key),
            _ => replace_prefix(path, &[("spec.predictor", at)]),
        }
    });
    Component {
        scaling,
        timeout: seconds(extension.timeout, DEFAULT_TIMEOUT_SECONDS, 1, &join(at, "timeout"), report),
        canary_traffic_percent: read_canary(extension.canary_traffic_percent, at, report),
        template,
    }
}

/// The template without labels and annotations of the service.
fn template(pod: ReadPod, runtime: Option<RuntimeUse>, storage: Vec<Storage>) -> RevisionTemplate {
    let main = pod.main.unwrap_or_else(|| ReadMain {
        at: String::new(),
        container: container::absent(),
        resources: no_resources(),
        storage: None,
    });
    RevisionTemplate {
        container: main.container,
        resources: main.resources,
        termination_grace_period: pod.termination_grace_period,
        node_selector: pod.node_selector,
        node_affinity: pod.node_affinity,
        preferred_node_affinity: pod.preferred_node_affinity,
        sidecars: pod.sidecars,
        volumes: pod.volumes,
        image_pull_secrets: pod.image_pull_secrets,
        storage: storage.into_iter().chain(main.storage).collect(),
        runtime,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
    }
}

type Fields = Map<String, Value>;

/// Tells extension fields, models and pod fields apart; says what has no effect.
fn split(fields: &Fields, at: &str, role: Role, report: &mut Report) -> (Fields, Fields, Fields) {
    let (mut extension, mut models, mut pod) = (Map::new(), Map::new(), Map::new());
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if EXTENSION.contains(&key.as_str()) {
            extension.insert(key.clone(), value.clone());
        } else if let Some((_, consequence)) = EXTENSION_UNSUPPORTED.iter().find(|(name, _)| name == key) {
            report.unsupported(join(at, key), consequence);
        } else if let Some((_, reason)) = EXTENSION_REFUSED.iter().find(|(name, _)| name == key) {
            report.error(join(at, key), "", *reason);
        } else if role == Role::Predictor && framework::is_key(key) {
            models.insert(key.clone(), value.clone());
        } else {
            pod.insert(key.clone(), value.clone());
        }
    }
    (extension, models, pod)
}

/// Exactly one implementation. Containers count as one where one of them is the main one, or where there
/// is nothing else, as in KServe.
fn choose_implementation<'a>(
    models: &'a Fields,
    pod: &Fields,
    at: &str,
    role: Role,
    report: &mut Report,
) -> Option<(&'a str, Model)> {
    let containers = pod.get("containers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let only_transformer =
        role == Role::Predictor && containers.iter().all(|container| container["name"] == container::TRANSFORMER);
    let has_main = containers.iter().any(|container| container["name"] == container::MAIN);
    let custom = has_main || (models.is_empty() && !only_transformer && !containers.is_empty());
    let mut given: Vec<&str> = models.keys().map(String::as_str).collect();
    given.extend(custom.then_some("containers"));
    if given.len() != 1 {
        let known = match role {
            Role::Predictor => format!("one of: containers, {}", framework::keys()),
            Role::Beside => "containers".to_owned(),
        };
        report.error(at, given.join(", "), format!("must have exactly one implementation, {known}"));
    }
    let read: Vec<_> = models
        .iter()
        .filter_map(|(key, value)| Some((key.as_str(), framework::read(key, value, &join(at, key), report)?)))
        .collect();
    read.into_iter().next()
}

/// Fields that are checked as KServe does, and then have no effect.
fn check_unsupported(extension: &Extension, at: &str, context: Context<'_>, report: &mut Report) {
    if let Some(logger) = &extension.logger {
        let at = join(at, "logger");
        let mode = logger.mode.as_deref().unwrap_or_default();
        if !["all", "request", "response"].contains(&mode) {
            report.error(join(&at, "mode"), mode, "must be all, request or response");
        }
        for key in ["path", "parameters", "key"] {
            if logger.storage.as_ref().is_some_and(|storage| !storage.contains_key(key)) {
                report.error(format!("{at}.storage.{key}"), "", "must be given with storage");
            }
        }
        report.unsupported(at, "payloads are not logged");
    }
    if let Some(batcher) = &extension.batcher {
        let at = join(at, "batcher");
        for (key, value) in [
            ("maxBatchSize", batcher.max_batch_size),
            ("maxLatency", batcher.max_latency),
            ("timeout", batcher.timeout),
        ] {
            if let Some(value) = value.filter(|value| *value < 0) {
                report.error(join(&at, key), value, "must not be negative");
            }
        }
        report.unsupported(at, "requests are not batched");
    }
    if extension.deployment_strategy.is_some() {
        let at = join(at, "deploymentStrategy");
        if annotations::is_standard_mode(context.annotations) {
            report.unsupported(at, "a new revision takes over when it is ready");
        } else {
            report.error(at, "", "must be given only with serving.kserve.io/deploymentMode: Standard");
        }
    }
    if let Some(given) = &extension.scale_metric_type {
        let at = join(at, "scaleMetricType");
        if !["Utilization", "Value", "AverageValue"].contains(&given.as_str()) {
            report.error(&at, given, "must be Utilization, Value or AverageValue");
        }
        report.unsupported(at, "the metric's value is averaged over replicas");
    }
}

fn read_scaling(extension: &Extension, at: &str, report: &mut Report) -> Scaling {
    let replicas = 0..=i64::from(i32::MAX);
    let min_replicas = extension.min_replicas;
    let max_replicas = extension.max_replicas.unwrap_or(0);
    let mut check = |name: &str, value: i64, range: &std::ops::RangeInclusive<i64>| {
        if !range.contains(&value) {
            report.error(join(at, name), value, format!("must be {} to {}", range.start(), range.end()));
        }
    };
    check("minReplicas", min_replicas.unwrap_or(0), &replicas);
    check("maxReplicas", max_replicas, &replicas);
    check("scaleTarget", extension.scale_target.unwrap_or(1), &(1..=i64::from(i32::MAX)));
    let container_concurrency = extension.container_concurrency.unwrap_or(0);
    check("containerConcurrency", container_concurrency, &(0..=CONTAINER_CONCURRENCY_LIMIT));
    if let Some(min) = min_replicas.filter(|min| max_replicas > 0 && *min > max_replicas) {
        report.error(
            join(at, "minReplicas"),
            min,
            format!("must be at most maxReplicas, which is {max_replicas}; maxReplicas 0 is no limit"),
        );
    }
    Scaling {
        min_replicas,
        max_replicas,
        scale_target: extension.scale_target,
        scale_metric: extension.scale_metric.clone(),
        container_concurrency,
    }
}

fn read_canary(given: Option<i64>, at: &str, report: &mut Report) -> Option<u8> {
    let at = join(at, "canaryTrafficPercent");
    let percent = u8::try_from(given?).ok().filter(|percent| *percent <= 100);
    if percent.is_none() {
        report.error(at, given.unwrap_or_default(), "must be 0 to 100");
    }
    percent
}
