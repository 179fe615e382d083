//! The validated model: what the rest of the coordinator works with, and what is stored.
//!
//! All types are stored as JSON. A field added later needs `#[serde(default)]` and must be left out of
//! the JSON where it has its default, so that [`RevisionTemplate::digest`] of an unchanged service stays
//! the same across versions.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::{NodeSelector, PreferredSchedulingTerm};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A validated object of a kind that this version knows.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    /// `serving.kserve.io/v1beta1`, `InferenceService`.
    InferenceService(Box<InferenceService>),
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
    pub predictor: Predictor,
    /// The object as applied: `apiVersion` normalised to `serving.kserve.io/v1beta1`, the namespace
    /// filled in, `status` and the fields of `metadata` that a server sets left out.
    pub manifest: Value,
}

/// The component that serves the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Predictor {
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

/// The main container, named `kserve-container` whatever the manifest calls it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// One environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvVar {
    /// Not empty, no `=`.
    pub name: String,
    /// May be empty.
    pub value: String,
}

/// A readiness probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What is asked.
    pub handler: ProbeHandler,
    /// From the start of the container to the first probe.
    pub initial_delay: Duration,
    /// Between probes; zero is the agent's own pace (fast until ready, slow after).
    pub period: Duration,
    /// Answer expected within; at least 1 s. Default 1 s, as Kubernetes.
    pub timeout: Duration,
    /// Successes in a row that make it ready, at least 1. Default 1.
    pub success_threshold: u32,
    /// Failures in a row that make it unready, at least 1. Default 3.
    pub failure_threshold: u32,
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
