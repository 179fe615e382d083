//! The validated model: what the rest of the coordinator works with, and what is stored.
//!
//! All types are stored as JSON. A field added later needs `#[serde(default)]` and must be left out of
//! the JSON where it has its default, so that [`RevisionTemplate::digest`] of an unchanged service stays
//! the same across versions.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::{NodeSelector, PreferredSchedulingTerm, Volume, VolumeMount};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use super::{
    auxiliary::{Auxiliary, AuxiliaryKind},
    security::{Security, default_pull_policy},
    serving_runtime::{Protocol, ServingRuntime, SupportedFormat},
};

/// A validated object of a kind that this version knows.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    /// `serving.kserve.io/v1beta1`, `InferenceService`; also what a Knative `Service` becomes.
    InferenceService(Box<InferenceService>),
    /// `serving.kserve.io/v1alpha1`, `ServingRuntime` or `ClusterServingRuntime`.
    ServingRuntime(Box<ServingRuntime>),
    /// `v1`: objects that services refer to.
    Auxiliary(Box<Auxiliary>),
}

/// A validated InferenceService.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferenceService {
    /// A DNS label.
    pub namespace: String,
    /// `[a-z]([-a-z0-9]*[a-z0-9])?`, at most 53 characters.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// True by annotation `serving.kserve.io/stop: "true"`: no replica runs, the object stays.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
    /// The component that serves the model.
    pub predictor: Component,
    /// Pre- and post-processing in replicas of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transformer: Option<Component>,
    /// Explanations in replicas of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explainer: Option<Component>,
    /// `spec.traffic` of a Knative `Service`; empty for all to the newest ready revision.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traffic: Vec<TrafficShare>,
    /// `spec.template.metadata.name` of a Knative `Service`: by which `traffic` may name the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision_name: Option<String>,
    /// The object as applied: an older `apiVersion` rewritten to `serving.kserve.io/v1beta1`, the
    /// namespace filled in, `status` and the fields of `metadata` that a server sets left out.
    pub manifest: Value,
}

impl InferenceService {
    /// One of its components; `None` where it has no such part.
    pub fn component(&self, kind: ComponentKind) -> Option<&Component> {
        match kind {
            ComponentKind::Predictor => Some(&self.predictor),
            ComponentKind::Transformer => self.transformer.as_ref(),
            ComponentKind::Explainer => self.explainer.as_ref(),
        }
    }

    /// The components that it has, the predictor first.
    pub fn components(&self) -> impl Iterator<Item = (ComponentKind, &Component)> {
        ComponentKind::ALL.into_iter().filter_map(|kind| Some((kind, self.component(kind)?)))
    }
}

/// One entry of a Knative `Service`'s `traffic`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficShare {
    /// `None`: the newest ready revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// 0 to 100; the entries of a service add up to 100.
    pub percent: u8,
    /// Empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tag: String,
}

/// Which part of a service a component is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ComponentKind {
    /// Serves the model.
    #[default]
    Predictor,
    /// Takes the service's requests and asks the predictor.
    Transformer,
    /// Takes the service's `:explain` requests and asks the predictor.
    Explainer,
}

impl ComponentKind {
    /// All, the predictor first.
    pub const ALL: [Self; 3] = [Self::Predictor, Self::Transformer, Self::Explainer];

    /// As in `spec`, in names of revisions and in hosts: `predictor`, `transformer`, `explainer`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Predictor => "predictor",
            Self::Transformer => "transformer",
            Self::Explainer => "explainer",
        }
    }

    /// True for what every service has.
    pub fn is_predictor(&self) -> bool {
        *self == Self::Predictor
    }
}

impl std::fmt::Display for ComponentKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One component of a service: predictor, transformer or explainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Component {
    /// Replica bounds and target.
    pub scaling: Scaling,
    /// Longest time a request may take in total, 1 s to 24 h. Default 300 s, as Knative's revision timeout.
    pub timeout: Duration,
    /// Percent of requests for the newest revision, 0 to 100; `None` and 100 mean all. 0 is not `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary_traffic_percent: Option<u8>,
    /// What a revision is made of.
    pub template: RevisionTemplate,
}

/// The component's scaling fields as given; the autoscaler joins them with its defaults and annotations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaling {
    /// Replicas at least, 0 to 2^31-1. `None`: the manifest does not say (KServe's default is 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_replicas: Option<i64>,
    /// Replicas at most, 0 to 2^31-1; 0 is no limit of its own, and what an absent field means.
    #[serde(default)]
    pub max_replicas: i64,
    /// Load per replica in the metric's own unit, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_target: Option<i64>,
    /// Name of the metric, unchecked here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_metric: Option<String>,
    /// Requests that a replica runs at the same time, 0 to 1000; 0 is no limit.
    #[serde(default)]
    pub container_concurrency: i64,
}

/// Everything whose change makes a new revision. Equal templates are the same revision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevisionTemplate {
    /// The main container.
    pub container: Container,
    /// What one replica needs.
    pub resources: Resources,
    /// Between the polite signal and the kill, 0 s to 24 h. Default 30 s, as Kubernetes.
    pub termination_grace_period: Duration,
    /// Labels that a node must carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// `affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution`, checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_affinity: Option<NodeSelector>,
    /// `affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution`, checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preferred_node_affinity: Vec<PreferredSchedulingTerm>,
    /// Containers beside the main one, such as a `transformer-container`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sidecars: Vec<Sidecar>,
    /// Volumes by name, checked: claims, `hostPath`, `emptyDir`, secrets and config maps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// Secrets with credentials for registries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
    /// Models to have in place before the container starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub storage: Vec<Storage>,
    /// The serving runtime that the main container was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeUse>,
    /// The component's own labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The component's own annotations and, below them, the service's `autoscaling.knative.dev/*` and
    /// `pilotlight.dev/*`; without min-scale and max-scale, which the fields of [`Scaling`] replace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl RevisionTemplate {
    /// SHA-256 of the template's JSON, in lower-case hex. The same template gives the same digest in
    /// every process and version; maps are ordered by key, so the manifest's order does not matter.
    pub fn digest(&self) -> String {
        // The types hold strings, numbers and string-keyed maps only, all of which JSON can express.
        let json = serde_json::to_vec(self).unwrap_or_default();
        let digest = ring::digest::digest(&ring::digest::SHA256, &json);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A container beside the main one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Unique in its replica.
    pub name: String,
    /// What it runs.
    pub container: Container,
    /// What it needs.
    pub resources: Resources,
}

/// What a component took from a serving runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeUse {
    /// Its name.
    pub name: String,
    /// True: a `ClusterServingRuntime`, or one that is built in.
    pub cluster: bool,
    /// `modelFormat.name`.
    pub format: String,
    /// What the server speaks; `None` where neither service nor runtime says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Name of the model in the server's URLs.
    pub model_name: String,
}

/// A model that is to lie at a path of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    /// Where it comes from.
    pub source: StorageSource,
    /// Absolute path in the container.
    pub mount_path: String,
    /// False by annotation `storage.kserve.io/readonly: "false"`.
    pub read_only: bool,
    /// Where the whole claim is seen besides, as KFServing did: `/mnt/pvc`. Only for `pvc://` by
    /// `STORAGE_URI` or `storageUri`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim_root: Option<String>,
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StorageSource {
    /// `storageUri`, an entry of `storageUris`, or the variable `STORAGE_URI`.
    Uri(String),
    /// `storage`: an entry of the secret `storage-config`.
    Entry {
        /// Key in the secret; empty: the default entry.
        key: String,
        /// Relative to the bucket.
        path: String,
        /// Override the entry's.
        parameters: BTreeMap<String, String>,
        /// Relative to the bucket; empty for none.
        schema_path: String,
    },
}

/// A container; the main one is named `kserve-container` whatever the manifest calls it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Container {
    /// Image reference; may be empty where `command` is given (the process runtime needs no image).
    pub image: String,
    /// Replaces the image's entry point; `$(NAME)` is expanded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Arguments; `$(NAME)` is expanded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment in the manifest's order, each name once; `$(NAME)` is expanded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    /// Empty: the image's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Declared serving port; `None`: the runtime chooses (KServe's default is 8080).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// True where the port speaks HTTP/2 with prior knowledge (port name `h2c`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub h2c: bool,
    /// When the replica counts as ready.
    pub readiness: Probe,
    /// When a replica that was ready is started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
    /// What must pass once before the other probes are asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup: Option<Probe>,
    /// Where the template's volumes are seen, checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_mounts: Vec<VolumeMount>,
    /// What it may do.
    #[serde(default, skip_serializing_if = "Security::is_default")]
    pub security: Security,
    /// `Always`, `IfNotPresent` or `Never`; `None`: see [`default_pull_policy`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
}

/// One environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvVar {
    /// No `=`; not empty, except as the prefix of all keys of a source.
    pub name: String,
    /// May be empty.
    pub value: String,
    /// Where the value is taken from when a replica is assigned; `value` is empty then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<EnvSource>,
}

/// A key of a `Secret` or `ConfigMap` in the service's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvSource {
    /// Which kind.
    pub kind: AuxiliaryKind,
    /// Object name.
    pub name: String,
    /// Key in its data. Empty: every key that can be a variable's name, with `EnvVar::name` before it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// True: where the object or key is missing the variable is left out; else the replica fails.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// A probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What is asked.
    pub handler: ProbeHandler,
    /// From the start of the container to the first probe.
    pub initial_delay: Duration,
    /// Between probes; zero is the agent's own pace (readiness: fast until ready; else 10 s, as Kubernetes).
    pub period: Duration,
    /// Answer expected within; at least 1 s. Default 1 s, as Kubernetes.
    pub timeout: Duration,
    /// Successes in a row that make it ready, at least 1. Default 1.
    pub success_threshold: u32,
    /// Failures in a row that make it unready or have it restarted, at least 1. Default 3.
    pub failure_threshold: u32,
    /// Between the polite signal and the kill when this probe has it restarted; `None` is the replica's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_grace_period: Option<Duration>,
}

/// What a probe asks. A port of `None` is the serving port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProbeHandler {
    /// GET answers 200 to 399.
    HttpGet {
        /// Begins with `/`.
        path: String,
        /// `None` is the serving port.
        port: Option<u16>,
        /// Extra request headers.
        headers: BTreeMap<String, String>,
    },
    /// A connection is accepted.
    TcpSocket {
        /// `None` is the serving port.
        port: Option<u16>,
    },
    /// A command ends with 0.
    Exec {
        /// Not empty.
        command: Vec<String>,
    },
    /// `grpc.health.v1` answers SERVING.
    Grpc {
        /// `None` is the serving port.
        port: Option<u16>,
        /// Empty: the server as a whole.
        service: String,
    },
}

/// What one replica needs and may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// `nvidia.com/gpu`, whole GPUs on one node. With `gpu_memory_bytes` it is 1 and means a share of one.
    pub gpus: u32,
    /// Annotation `pilotlight.dev/gpu-memory`: bytes of one GPU that may be shared with other replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_bytes: Option<u64>,
    /// `nvidia.com/mig-<profile>`: parts of GPUs that are divided by MIG, instead of GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mig: Option<MigRequest>,
    /// Requested CPU, thousandths of a core. Default 1000 (at most the limit).
    pub cpu_millis: u64,
    /// CPU limit, thousandths of a core. Default 1000 (at least the request).
    pub cpu_limit_millis: u64,
    /// Requested memory, bytes. Default 2 GiB (at most the limit).
    pub memory_bytes: u64,
    /// Memory limit, bytes. Default 2 GiB (at least the request).
    pub memory_limit_bytes: u64,
}

/// MIG devices that one replica needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigRequest {
    /// Such as `1g.10gb`.
    pub profile: String,
    /// How many, 1 to 64, all on one node.
    pub count: u32,
}
