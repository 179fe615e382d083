//! The pod fields of a component or of a runtime.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::api::core::v1::{
    Container as K8sContainer, NodeSelector, PodSecurityContext, PodSpec, PreferredSchedulingTerm, Volume,
};
use serde_json::Value;

use super::{
    affinity,
    container::{self, MAIN, Part, Place, TRANSFORMER},
    documents::join,
    env,
    fields::{POD_REFUSED, POD_UNSUPPORTED},
    model::{Container, Resources, Sidecar, Storage},
    names,
    report::Report,
    resources::{self, Defaults},
    typed, volumes,
};

/// Longest time of a request and longest grace period: one day.
const DAY_SECONDS: i64 = 86_400;
/// Kubernetes' default `terminationGracePeriodSeconds`.
const DEFAULT_GRACE_SECONDS: i64 = 30;

/// Which container of a pod is the main one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Main {
    /// A custom server: the one named `kserve-container`, or the only one, or the only one with a port.
    Custom,
    /// None: the main one comes from a runtime.
    Elsewhere,
    /// A runtime's own pod: the one with the name, to be merged with a service's.
    Named,
    /// Runtime and service merged: the one with the name.
    Merged,
}

/// A pod as read.
#[derive(Default)]
pub(super) struct ReadPod {
    /// As given.
    pub(super) pod: PodSpec,
    /// The main container, where there is one.
    pub(super) main: Option<ReadMain>,
    pub(super) sidecars: Vec<Sidecar>,
    pub(super) volumes: Vec<Volume>,
    pub(super) image_pull_secrets: Vec<String>,
    pub(super) node_selector: BTreeMap<String, String>,
    pub(super) node_affinity: Option<NodeSelector>,
    pub(super) preferred_node_affinity: Vec<PreferredSchedulingTerm>,
    pub(super) termination_grace_period: Duration,
}

/// The main container as read.
pub(super) struct ReadMain {
    /// Such as `spec.predictor.containers[0]`.
    pub(super) at: String,
    pub(super) container: Container,
    pub(super) resources: Resources,
    /// By `STORAGE_URI`.
    pub(super) storage: Option<Storage>,
}

/// What reading a pod needs from around it.
#[derive(Clone, Copy, Default)]
pub(super) struct Around {
    /// By annotation.
    pub(super) gpu_memory_bytes: Option<u64>,
    /// Models are mounted so that the server can write.
    pub(super) writable: bool,
}

/// Reads the pod fields at `at` with nothing around them.
pub(super) fn read(raw: Value, at: &str, main: Main, report: &mut Report) -> ReadPod {
    read_within(raw, at, main, Around::default(), report)
}

/// Reads the pod fields at `at`.
pub(super) fn read_within(mut raw: Value, at: &str, main: Main, around: Around, report: &mut Report) -> ReadPod {
    typed::quantities_to_text(&mut raw);
    let pod: PodSpec = typed::read(&mut raw, at, report);
    check_fields(&raw, at, report);
    for (index, container) in pod.init_containers.iter().flatten().enumerate() {
        env::check_blocked(container, &format!("{at}.initContainers[{index}]"), report);
    }
    let at_volumes = join(at, "volumes");
    let volumes = volumes::read(pod.volumes.as_deref().unwrap_or_default(), &raw["volumes"], &at_volumes, report);
    let node_selector = pod.node_selector.clone().unwrap_or_default();
    names::check_labels(&node_selector, &join(at, "nodeSelector"), report);
    let (node_affinity, preferred_node_affinity) = affinity::read(pod.affinity.as_ref(), &join(at, "affinity"), report);
    let grace = pod.termination_grace_period_seconds;
    let mut read = ReadPod {
        termination_grace_period: seconds(
            grace,
            DEFAULT_GRACE_SECONDS,
            0,
            &join(at, "terminationGracePeriodSeconds"),
            report,
        ),
        volumes,
        image_pull_secrets: pod.image_pull_secrets.iter().flatten().map(|secret| secret.name.clone()).collect(),
        node_selector,
        node_affinity,
        preferred_node_affinity,
        ..ReadPod::default()
    };
    let at = join(at, "containers");
    let security = pod.security_context.as_ref();
    read_containers(&pod.containers, &raw["containers"], &at, main, around, security, &mut read, report);
    read.pod = pod;
    read
}

#[allow(clippy::too_many_arguments)]
fn read_containers(
    containers: &[K8sContainer],
    raw: &Value,
    at: &str,
    main: Main,
    around: Around,
    security: Option<&PodSecurityContext>,
    read: &mut ReadPod,
    report: &mut Report,
) {
    check_names(containers, at, report);
    let main_index = main_index(containers, main, at, report);
    // Where several have no name to tell them apart, KServe finds none to give the model to.
    let sole = containers.iter().filter(|container| container.name != TRANSFORMER).count() == 1;
    for (index, given) in containers.iter().enumerate() {
        let at = format!("{at}[{index}]");
        let is_main = main_index == Some(index);
        let part = match main {
            Main::Named => Part::Fragment,
            Main::Merged if is_main => Part::Merged,
            _ if is_main && (sole || given.name == MAIN) => Part::Main,
            _ => Part::Beside,
        };
        let place = Place { part, at: &at, volumes: &read.volumes, read_only: !around.writable, security };
        let (container, storage) = container::read(given, &raw[index], place, report);
        if is_main {
            let resources =
                resources::read(given.resources.as_ref(), around.gpu_memory_bytes, Defaults::KServe, &at, report);
            read.main = Some(ReadMain { at, container, resources, storage });
        } else {
            let resources = resources::read(given.resources.as_ref(), None, Defaults::None, &at, report);
            if main != Main::Named {
                let consequence = match given.name.as_str() {
                    TRANSFORMER => "it is not run, so that requests reach the predictor as they are",
                    _ => "only the main container is run",
                };
                report.unsupported(&at, consequence);
            }
            read.sidecars.push(Sidecar { name: given.name.clone(), container, resources });
        }
    }
}

fn main_index(containers: &[K8sContainer], main: Main, at: &str, report: &mut Report) -> Option<usize> {
    let named = containers.iter().position(|container| container.name == MAIN);
    if main == Main::Elsewhere {
        return None;
    }
    if named.is_some() || main != Main::Custom || containers.is_empty() {
        return named;
    }
    let candidates: Vec<usize> = (0..containers.len()).filter(|index| containers[*index].name != TRANSFORMER).collect();
    if let [only] = candidates[..] {
        return Some(only);
    }
    let serving = |index: &usize| containers[*index].ports.as_ref().is_some_and(|ports| !ports.is_empty());
    let serving: Vec<usize> = candidates.into_iter().filter(serving).collect();
    if let [only] = serving[..] {
        return Some(only);
    }
    report.error(at, "", format!("of several containers one must be named {MAIN}, or only one have a port"));
    None
}

fn check_names(containers: &[K8sContainer], at: &str, report: &mut Report) {
    let mut seen = BTreeSet::new();
    for (index, container) in containers.iter().enumerate() {
        let at = format!("{at}[{index}].name");
        if containers.len() > 1 && container.name.is_empty() {
            report.error(at, "", "must be given where there are several containers");
        } else if !seen.insert(&container.name) {
            report.error(at, &container.name, "must be unique among containers");
        }
    }
}

fn check_fields(raw: &Value, at: &str, report: &mut Report) {
    for (key, _) in raw.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        if let Some((_, consequence)) = POD_UNSUPPORTED.iter().find(|(name, _)| name == key) {
            report.unsupported(join(at, key), consequence);
        } else if let Some((_, reason)) = POD_REFUSED.iter().find(|(name, _)| name == key) {
            report.error(join(at, key), "", *reason);
        }
    }
}

/// Seconds from a field, within `min` and a day.
pub(super) fn seconds(given: Option<i64>, default: i64, min: i64, at: &str, report: &mut Report) -> Duration {
    let value = given.unwrap_or(default);
    if !(min..=DAY_SECONDS).contains(&value) {
        report.error(at, value, format!("must be {min} to {DAY_SECONDS} seconds"));
    }
    Duration::from_secs(u64::try_from(value).unwrap_or_default())
}
