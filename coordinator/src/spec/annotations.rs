//! Annotations and labels that change how a service is run.

use std::collections::BTreeMap;

use super::{documents::join, quantity, report::Report, warmth};
use crate::rollout::policy;

const AUTOSCALING: &str = "autoscaling.knative.dev/";
const OWN: &str = "pilotlight.dev/";
const KSERVE: &str = "serving.kserve.io/";
/// The group as it was called before KServe had its name.
const KUBEFLOW: &str = "serving.kubeflow.org/";
const MODE: &str = "serving.kserve.io/deploymentMode";
/// Bytes of one GPU that a replica needs; the GPU is shared by memory.
pub(super) const GPU_MEMORY: &str = "pilotlight.dev/gpu-memory";

/// Checks the service's annotations and labels; true where the service is stopped.
pub(super) fn check_service(
    annotations: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
    report: &mut Report,
) -> bool {
    report.add(policy::check(annotations, "metadata.annotations"));
    warmth::check_replicas(annotations, "metadata.annotations", report);
    for (key, value) in annotations {
        let at = join("metadata.annotations", key);
        if let Some(name) = key.strip_prefix(KSERVE).or_else(|| key.strip_prefix(KUBEFLOW)) {
            check_kserve(name, value, &at, report);
        } else if key == "serving.knative.dev/rollout-duration" || key == "serving.knative.dev/rolloutDuration" {
            report.warning(at, value, "not honoured by this version: a new revision takes its requests at once");
        } else if key == "storage.kserve.io/readonly" {
            if !["true", "false"].contains(&value.as_str()) {
                report.warning(at, value, "means true; must be true or false");
            }
        } else if key.starts_with("storage.kserve.io/") {
            report.warning(at, value, "not honoured by this version: has no effect");
        }
    }
    if let Some(value) = labels.get("networking.knative.dev/visibility") {
        report.error(
            join("metadata.labels", "networking.knative.dev/visibility"),
            value,
            "not supported by this version: every service has a route from outside, which this label forbids",
        );
    }
    annotations.get("serving.kserve.io/stop").is_some_and(|value| value.eq_ignore_ascii_case("true"))
}

fn check_kserve(name: &str, value: &str, at: &str, report: &mut Report) {
    match name {
        "stop" if value.eq_ignore_ascii_case("true") || value.eq_ignore_ascii_case("false") => {}
        // The roll-out's own, checked there.
        "enable-tag-routing" => {}
        // Read when a replica is assigned.
        "storageSecretName" => {}
        "stop" => report.warning(at, value, "means false; must be true or false"),
        "deploymentMode" => match value {
            "Knative" | "Serverless" => {}
            "Standard" | "RawDeployment" => report.warning(
                at,
                value,
                "this fleet runs every service in Knative mode: revisions, and scale to zero where minReplicas is 0",
            ),
            _ => report.error(at, value, "must be Knative, Serverless, Standard or RawDeployment"),
        },
        "autoscalerClass" => match value {
            "kpa" => {}
            "hpa" | "external" | "keda" | "none" => report.warning(
                at,
                value,
                "not honoured by this version: the service is scaled as Knative's kpa class does",
            ),
            _ => report.error(at, value, "must be hpa, external, keda or none"),
        },
        "gke-accelerator" => {
            report.warning(at, value, "not honoured: use nodeAffinity with gpu.nvidia.com/class");
        }
        _ => report.warning(at, value, "not honoured by this version: has no effect"),
    }
}

/// True where the service asks for Deployments instead of Knative.
pub(super) fn is_standard_mode(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(MODE).is_some_and(|mode| mode == "Standard" || mode == "RawDeployment")
}

/// Annotations of a revision: the component's own and, below them, the service's that concern revisions.
/// min-scale and max-scale are taken out, since minReplicas and maxReplicas replace them.
pub(super) fn of_revision(
    service: &BTreeMap<String, String>,
    component: BTreeMap<String, String>,
    at: &str,
    report: &mut Report,
) -> BTreeMap<String, String> {
    for (path, annotations) in [("metadata.annotations", service), (at, &component)] {
        for (key, field) in annotations.keys().filter_map(|key| Some((key, replaced_by(key)?))) {
            report.warning(join(path, key), &annotations[key], format!("has no effect: use {field}, as KServe does"));
        }
    }
    report.add(policy::check(&component, at));
    warmth::check_replicas(&component, at, report);
    for (key, value) in component.iter().filter(|(key, _)| key.starts_with(KSERVE)) {
        report.warning(join(at, key), value, "has no effect on a component: set it in metadata.annotations");
    }
    let mut merged: BTreeMap<String, String> = service
        .iter()
        .filter(|(key, _)| key.starts_with(AUTOSCALING) || key.starts_with(OWN))
        // What concerns the service alone makes no revision.
        .filter(|(key, _)| !policy::OF_SERVICE.contains(&key.as_str()) && *key != warmth::WARM_REPLICAS)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    merged.extend(component);
    merged.retain(|key, _| replaced_by(key).is_none());
    merged
}

fn replaced_by(annotation: &str) -> Option<&'static str> {
    match annotation.strip_prefix(AUTOSCALING)? {
        "min-scale" | "minScale" => Some("minReplicas"),
        "max-scale" | "maxScale" => Some("maxReplicas"),
        _ => None,
    }
}

/// Value of [`GPU_MEMORY`], in bytes.
pub(super) fn gpu_memory(annotations: &BTreeMap<String, String>, report: &mut Report) -> Option<u64> {
    let given = annotations.get(GPU_MEMORY)?;
    let at = join("metadata.annotations", GPU_MEMORY);
    match quantity::units(given) {
        Ok(0) => report.error(at, given, "must be at least 1 byte"),
        Ok(bytes) => return Some(bytes),
        Err(error) => report.error(at, given, error.to_string()),
    }
    None
}
