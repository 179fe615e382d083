//! One component: extension fields, pod fields and one implementation, all at one level.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::PodSpec;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    ParseOptions, affinity, annotations, container,
    documents::join,
    model::{Predictor, Resources, RevisionTemplate, Scaling},
    names, placing,
    report::Report,
    resources, typed,
};

/// KServe's fields of a component that this version honours; see [`Extension`].
const EXTENSION: [&str; 9] = [
    "minReplicas",
    "maxReplicas",
    "scaleTarget",
    "scaleMetric",
    "containerConcurrency",
    "timeout",
    "canaryTrafficPercent",
    "labels",
    "annotations",
];

/// KServe's fields of a component that have no effect here, and what happens instead.
const EXTENSION_UNSUPPORTED: [(&str, &str); 7] = [
    ("scaleMetricType", "the metric's value is averaged over replicas"),
    ("autoScaling", "use scaleMetric, scaleTarget and autoscaling.knative.dev annotations"),
    ("logger", "payloads are not logged"),
    ("batcher", "requests are not batched"),
    ("deploymentStrategy", "a new revision takes over when it is ready"),
    ("storageContainerName", "nothing is downloaded"),
    ("name", "there is one predictor"),
];

/// KServe's fields of a component without which the model could not work.
const EXTENSION_REFUSED: [(&str, &str); 2] = [
    ("workerSpec", "a replica on several nodes is not supported by this version"),
    (
        "storageUris",
        "downloading models is not supported by this version; have them in the image or let the server fetch them",
    ),
];

/// Implementations that need a serving runtime.
const IMPLEMENTATIONS: [&str; 11] = [
    "model",
    "sklearn",
    "xgboost",
    "tensorflow",
    "pytorch",
    "triton",
    "onnx",
    "huggingface",
    "pmml",
    "lightgbm",
    "paddle",
];

/// Fields of `model` that are not the container's.
const MODEL: [&str; 7] =
    ["modelFormat", "runtime", "runtimeVersion", "storageUri", "storage", "protocolVersion", "confidential"];

/// Pod fields that have no effect here, and what happens instead.
pub(super) const POD_UNSUPPORTED: [(&str, &str); 36] = [
    ("activeDeadlineSeconds", "a replica may live for any time"),
    ("automountServiceAccountToken", "there are no service accounts"),
    ("dnsConfig", "the node's resolver is used"),
    ("dnsPolicy", "the node's resolver is used"),
    ("enableServiceLinks", "no variables are set for other services"),
    ("ephemeralContainers", "only the main container is run"),
    ("hostAliases", "the node's hosts file is used"),
    ("hostIPC", "the runtime decides"),
    ("hostNetwork", "the runtime decides"),
    ("hostPID", "the runtime decides"),
    ("hostUsers", "the runtime decides"),
    ("hostname", "the runtime decides"),
    ("hostnameOverride", "the runtime decides"),
    ("imagePullSecrets", "images are pulled with the node's own credentials"),
    ("nodeName", "use nodeSelector or nodeAffinity by metadata.name"),
    ("os", "every node runs Linux"),
    ("overhead", "only the container's own requests count"),
    ("preemptionPolicy", "idle replicas of lower priority may be evicted"),
    ("priority", "use annotation pilotlight.dev/priority, an integer"),
    ("priorityClassName", "there are no priority classes; use annotation pilotlight.dev/priority, an integer"),
    ("readinessGates", "the readiness probe decides alone"),
    ("resourceClaims", "use nvidia.com/gpu"),
    ("resources", "use the container's resources"),
    ("restartPolicy", "a replica that ends is always started again"),
    ("runtimeClassName", "the node's runtime is used"),
    ("schedulerName", "there is one scheduler"),
    ("schedulingGates", "a replica is placed at once"),
    ("securityContext", "the node's runtime settings apply"),
    ("serviceAccount", "there are no service accounts"),
    ("serviceAccountName", "there are no service accounts"),
    ("setHostnameAsFQDN", "the runtime decides"),
    ("shareProcessNamespace", "only the main container is run"),
    ("subdomain", "replicas have no names of their own"),
    ("tolerations", "the only taints are cordon's and drain's, which nothing tolerates"),
    ("topologySpreadConstraints", "use annotation pilotlight.dev/placement-policy: spread"),
    ("volumes", "nothing is mounted"),
];

/// Pod fields without which the model could not work.
pub(super) const POD_REFUSED: [(&str, &str); 1] =
    [("initContainers", "init containers are not supported by this version, and what they prepare would be missing")];

/// Longest time of a request and longest grace period: one day.
const DAY_SECONDS: i64 = 86_400;
/// Knative's default `timeoutSeconds` of a revision.
const DEFAULT_TIMEOUT_SECONDS: i64 = 300;
/// Kubernetes' default `terminationGracePeriodSeconds`.
const DEFAULT_GRACE_SECONDS: i64 = 30;
/// Knative's default upper limit.
const CONTAINER_CONCURRENCY_LIMIT: i64 = 1000;

/// Fields that KServe adds to every component.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Extension {
    min_replicas: Option<i64>,
    max_replicas: Option<i64>,
    scale_target: Option<i64>,
    scale_metric: Option<String>,
    container_concurrency: Option<i64>,
    timeout: Option<i64>,
    canary_traffic_percent: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// What stands for a component that could not be read at all.
pub(super) fn absent() -> Predictor {
    Predictor {
        scaling: Scaling::default(),
        timeout: Duration::ZERO,
        canary_traffic_percent: None,
        template: RevisionTemplate {
            container: container::absent(),
            resources: Resources {
                gpus: 0,
                gpu_memory_bytes: None,
                mig: None,
                cpu_millis: 0,
                cpu_limit_millis: 0,
                memory_bytes: 0,
                memory_limit_bytes: 0,
            },
            termination_grace_period: Duration::ZERO,
            node_selector: BTreeMap::new(),
            node_affinity: None,
            preferred_node_affinity: Vec::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        },
    }
}

/// Reads the component at `at`. What it gives is to be used only where the report has no error.
pub(super) fn read(
    fields: &Map<String, Value>,
    at: &str,
    service_annotations: &BTreeMap<String, String>,
    options: ParseOptions<'_>,
    report: &mut Report,
) -> Predictor {
    let (extension, implementations, pod) = split(fields, at, report);
    let mut extension = Value::Object(extension);
    let mut extension: Extension = typed::read(&mut extension, at, report);
    let mut pod_value = Value::Object(pod);
    typed::quantities_to_text(&mut pod_value);
    let pod: PodSpec = typed::read(&mut pod_value, at, report);
    check_pod_fields(&pod_value, at, report);
    check_implementations(&implementations, &pod, at, report);

    let labels = extension.labels.take().unwrap_or_default();
    names::check_labels(&labels, &join(at, "labels"), report);
    let own_annotations = extension.annotations.take().unwrap_or_default();
    let annotations = annotations::of_revision(service_annotations, own_annotations, &join(at, "annotations"), report);
    let gpu_memory = annotations::gpu_memory(&annotations, report);
    placing::check(&annotations, report);

    let main = container::read(&pod, &pod_value, at, !implementations.is_empty(), report);
    let resources =
        resources::read(main.given.and_then(|given| given.resources.as_ref()), gpu_memory, &main.at, report);
    let node_selector = pod.node_selector.clone().unwrap_or_default();
    names::check_labels(&node_selector, &join(at, "nodeSelector"), report);
    let (node_affinity, preferred_node_affinity) = affinity::read(pod.affinity.as_ref(), &join(at, "affinity"), report);
    let template = RevisionTemplate {
        container: main.container,
        resources,
        termination_grace_period: seconds(
            pod.termination_grace_period_seconds,
            DEFAULT_GRACE_SECONDS,
            0,
            &join(at, "terminationGracePeriodSeconds"),
            report,
        ),
        node_selector,
        node_affinity,
        preferred_node_affinity,
        labels,
        annotations,
    };

    let scaling = read_scaling(&extension, at, report);
    // The autoscaler's own rules for annotations and metric are plugged in here, and only here.
    report.add((options.validate_scaling)(&template.annotations, &scaling));
    Predictor {
        scaling,
        timeout: seconds(extension.timeout, DEFAULT_TIMEOUT_SECONDS, 1, &join(at, "timeout"), report),
        canary_traffic_percent: read_canary(extension.canary_traffic_percent, at, report),
        template,
    }
}

type Fields = Map<String, Value>;

/// Tells extension fields, implementations and pod fields apart; says what has no effect.
fn split(fields: &Fields, at: &str, report: &mut Report) -> (Fields, Fields, Fields) {
    let (mut extension, mut implementations, mut pod) = (Map::new(), Map::new(), Map::new());
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if EXTENSION.contains(&key.as_str()) {
            extension.insert(key.clone(), value.clone());
        } else if let Some((_, consequence)) = EXTENSION_UNSUPPORTED.iter().find(|(name, _)| name == key) {
            report.unsupported(join(at, key), consequence);
        } else if let Some((_, reason)) = EXTENSION_REFUSED.iter().find(|(name, _)| name == key) {
            report.error(join(at, key), "", *reason);
        } else if IMPLEMENTATIONS.contains(&key.as_str()) {
            implementations.insert(key.clone(), value.clone());
        } else {
            pod.insert(key.clone(), value.clone());
        }
    }
    (extension, implementations, pod)
}

fn check_pod_fields(pod: &Value, at: &str, report: &mut Report) {
    for (key, _) in pod.as_object().into_iter().flatten() {
        if let Some((_, consequence)) = POD_UNSUPPORTED.iter().find(|(name, _)| name == key) {
            report.unsupported(join(at, key), consequence);
        } else if let Some((_, reason)) = POD_REFUSED.iter().find(|(name, _)| name == key) {
            report.error(join(at, key), "", *reason);
        }
    }
}

/// Exactly one implementation. `containers` counts as one unless it holds nothing but a transformer.
fn check_implementations(implementations: &Fields, pod: &PodSpec, at: &str, report: &mut Report) {
    let custom = pod.containers.iter().any(|container| container.name != container::TRANSFORMER);
    let mut names: Vec<&str> = implementations.keys().map(String::as_str).collect();
    names.extend(custom.then_some("containers"));
    if names.len() != 1 {
        report.error(
            at,
            names.join(", "),
            format!("must have exactly one implementation, one of: containers, {}", IMPLEMENTATIONS.join(", ")),
        );
    }
    for (key, value) in implementations {
        check_model(key, value, &join(at, key), report);
        report.error(
            join(at, key),
            "",
            "needs a ServingRuntime, which this version does not have; \
             give the server's image and command in spec.predictor.containers",
        );
    }
}

/// `model`, or a legacy key with the same fields: what can be said without a runtime.
fn check_model(key: &str, value: &Value, at: &str, report: &mut Report) {
    let Value::Object(fields) = value else {
        report.error(at, super::report::show(value), "must be a mapping");
        return;
    };
    let mut container: Fields = fields.clone();
    let format = fields.get("modelFormat").and_then(|format| format.get("name")).and_then(Value::as_str);
    if key == "model" && format.is_none_or(str::is_empty) {
        report.error(join(at, "modelFormat.name"), "", "must be given");
    }
    MODEL.iter().for_each(|name| drop(container.remove(*name)));
    if container.remove("name").is_some() {
        report.error(join(at, "name"), "", "must not be given");
    }
    let mut container = Value::Object(container);
    typed::quantities_to_text(&mut container);
    let container: k8s_openapi::api::core::v1::Container = typed::read(&mut container, at, report);
    container::check_blocked_env(&container, at, report);
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

fn seconds(given: Option<i64>, default: i64, min: i64, at: &str, report: &mut Report) -> Duration {
    let value = given.unwrap_or(default);
    if !(min..=DAY_SECONDS).contains(&value) {
        report.error(at, value, format!("must be {min} to {DAY_SECONDS} seconds"));
    }
    Duration::from_secs(u64::try_from(value).unwrap_or_default())
}
