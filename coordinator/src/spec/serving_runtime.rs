//! `ServingRuntime` and `ClusterServingRuntime`: how servers of a model format are run.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{container, documents::join, names, pod, report::Report, typed};

/// `apiVersion` of both kinds.
pub(super) const API_VERSION: &str = "serving.kserve.io/v1alpha1";
/// Says which server a runtime starts, for the rules about image tags.
const SERVER_TYPE: &str = "serving.kserve.io/server-type";
/// Other names by which a service may ask for a runtime, separated by commas.
const ALIASES: &str = "pilotlight.dev/aliases";

/// Fields of a runtime's `spec` that are its own; the rest is the pod's.
const OWN: [&str; 7] =
    ["supportedModelFormats", "protocolVersions", "multiModel", "disabled", "workerSpec", "labels", "annotations"];
/// Pod fields that KServe takes from a runtime.
const POD: [&str; 9] = [
    "containers",
    "volumes",
    "nodeSelector",
    "affinity",
    "tolerations",
    "imagePullSecrets",
    "schedulerName",
    "resourceClaims",
    "hostIPC",
];
/// Fields for ModelMesh.
const MODEL_MESH: [&str; 6] =
    ["builtInAdapter", "grpcEndpoint", "grpcDataEndpoint", "httpDataEndpoint", "replicas", "storageHelper"];

/// What a model server speaks, the lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// KServe V1 over HTTP.
    #[serde(rename = "v1")]
    V1,
    /// Open Inference Protocol over HTTP.
    #[serde(rename = "v2")]
    V2,
    /// TensorFlow Serving's gRPC.
    #[serde(rename = "grpc-v1")]
    GrpcV1,
    /// Open Inference Protocol over gRPC.
    #[serde(rename = "grpc-v2")]
    GrpcV2,
}

impl Protocol {
    /// The names as manifests write them.
    pub const NAMES: &str = "v1, v2, grpc-v1 or grpc-v2";

    /// From its name in a manifest.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::V1, Self::V2, Self::GrpcV1, Self::GrpcV2].into_iter().find(|protocol| protocol.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::GrpcV1 => "grpc-v1",
            Self::GrpcV2 => "grpc-v2",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A model format that a runtime serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SupportedFormat {
    /// Such as `sklearn`.
    pub name: String,
    /// Compared as text: "1" is not "1.0".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// True: taken for models that name no runtime.
    pub auto_select: bool,
    /// The highest wins among runtimes for one format; none is below all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
}

/// A validated ServingRuntime or ClusterServingRuntime.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServingRuntime {
    /// `None`: a ClusterServingRuntime.
    pub namespace: Option<String>,
    /// A DNS name.
    pub name: String,
    /// Other names, by annotation.
    pub aliases: Vec<String>,
    /// What it serves.
    pub formats: Vec<SupportedFormat>,
    /// What it speaks; empty is anything.
    pub protocols: Vec<Protocol>,
    /// True: never used.
    pub disabled: bool,
    /// True: for ModelMesh, never used here.
    pub multi_model: bool,
    /// True: a replica spans nodes, never used here.
    pub multi_node: bool,
    /// Which server it starts, by annotation or name; empty where unknown.
    pub server_type: String,
    /// For its replicas.
    pub labels: BTreeMap<String, String>,
    /// For its replicas.
    pub annotations: BTreeMap<String, String>,
    /// The pod fields as given, to be merged with those of a service.
    pub pod: Map<String, Value>,
    /// The object as applied.
    pub manifest: Value,
}

impl ServingRuntime {
    /// The lowest protocol; none where it lists none.
    pub fn lowest_protocol(&self) -> Option<Protocol> {
        self.protocols.iter().min().copied()
    }

    /// Whether it speaks this; a runtime that lists no protocol speaks any.
    pub fn speaks(&self, protocol: Protocol) -> bool {
        self.protocols.is_empty() || self.protocols.contains(&protocol)
    }

    /// Priority for a format: that of its first entry, as in KServe.
    pub fn priority(&self, format: &str) -> Option<i32> {
        self.formats.iter().find(|entry| entry.name == format)?.priority
    }

    /// Whether it serves a format; `by_choice`: the model named no runtime, so that only entries with
    /// `autoSelect` count. A version must equal the entry's as text.
    pub fn serves(&self, format: &str, version: Option<&str>, by_choice: bool) -> bool {
        self.formats
            .iter()
            .filter(|entry| entry.name == format && (entry.auto_select || !by_choice))
            .any(|entry| version.is_none() || version == entry.version.as_deref())
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Own {
    supported_model_formats: Option<Vec<SupportedFormat>>,
    protocol_versions: Option<Vec<String>>,
    multi_model: Option<bool>,
    disabled: Option<bool>,
    worker_spec: Option<Value>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads a runtime. What it gives is to be used only where the report has no error. `namespace`: `None`
/// for the cluster's kind.
pub(super) fn read(
    root: &Map<String, Value>,
    namespace: Option<&str>,
    metadata: ObjectMeta,
    report: &mut Report,
) -> ServingRuntime {
    let name = metadata.name.unwrap_or_default();
    let annotations = metadata.annotations.unwrap_or_default();
    let empty = Map::new();
    let spec = root.get("spec").and_then(Value::as_object).unwrap_or_else(|| {
        report.error("spec", "", "must be a mapping with containers");
        &empty
    });
    let (own, pod) = split(spec, report);
    let own: Own = typed::read(&mut Value::Object(own), "spec", report);
    check_pod(&pod, report);
    let listed = annotations.get(ALIASES).map(String::as_str).unwrap_or_default();
    let formats = own.supported_model_formats.unwrap_or_default();
    check_formats(&formats, report);
    let multi_model = own.multi_model.unwrap_or(false);
    if multi_model {
        report.unsupported("spec.multiModel", "a runtime for several models is kept, but no service uses it");
    }
    if own.worker_spec.is_some() {
        report.unsupported("spec.workerSpec", "a runtime over several nodes is kept, but no service uses it");
    }
    ServingRuntime {
        namespace: namespace.map(ToOwned::to_owned),
        server_type: server_type(&annotations, &name),
        aliases: listed.split(',').map(str::trim).filter(|alias| !alias.is_empty()).map(Into::into).collect(),
        name,
        formats,
        protocols: read_protocols(&own.protocol_versions.unwrap_or_default(), report),
        disabled: own.disabled.unwrap_or(false),
        multi_model,
        multi_node: own.worker_spec.is_some(),
        labels: own.labels.unwrap_or_default(),
        annotations: own.annotations.unwrap_or_default(),
        pod,
        manifest: Value::Object(root.clone()),
    }
}

/// The annotation, else what the name says, KServe's own names with or without their prefix.
fn server_type(annotations: &BTreeMap<String, String>, name: &str) -> String {
    annotations.get(SERVER_TYPE).cloned().unwrap_or_else(|| name.strip_prefix("kserve-").unwrap_or(name).to_owned())
}

fn split(spec: &Map<String, Value>, report: &mut Report) -> (Map<String, Value>, Map<String, Value>) {
    let (mut own, mut pod) = (Map::new(), Map::new());
    for (key, value) in spec.iter().filter(|(_, value)| !value.is_null()) {
        match key.as_str() {
            key if OWN.contains(&key) => drop(own.insert(key.into(), value.clone())),
            key if POD.contains(&key) => drop(pod.insert(key.into(), value.clone())),
            key if MODEL_MESH.contains(&key) => report.unsupported(join("spec", key), "it is for ModelMesh"),
            key => report.unknown(join("spec", key), None),
        }
    }
    (own, pod)
}

/// What can be said of the pod before it is merged with a service's.
fn check_pod(fields: &Map<String, Value>, report: &mut Report) {
    let read = pod::read(Value::Object(fields.clone()), "spec", pod::Main::Named, report);
    let mains = read.pod.containers.iter().filter(|container| container.name == container::MAIN).count();
    if mains != 1 {
        report.error("spec.containers", "", format!("must have exactly one container named {}", container::MAIN));
    }
}

fn check_formats(formats: &[SupportedFormat], report: &mut Report) {
    let mut priorities = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (index, format) in formats.iter().enumerate() {
        let at = format!("spec.supportedModelFormats[{index}]");
        if format.name.is_empty() {
            report.error(join(&at, "name"), "", "must be given");
        }
        if format.priority.is_some_and(|priority| priority < 1) {
            report.error(join(&at, "priority"), format.priority.unwrap_or_default(), "must be at least 1");
        }
        if !seen.insert((&format.name, &format.version)) {
            report.warning(&at, &format.name, "is listed twice");
        }
        let first = priorities.entry(&format.name).or_insert(format.priority);
        if *first != format.priority {
            let given = format.priority.map_or_else(String::new, |priority| priority.to_string());
            report.error(join(&at, "priority"), given, format!("must be the same in all entries of {}", format.name));
        }
    }
}

fn read_protocols(given: &[String], report: &mut Report) -> Vec<Protocol> {
    let mut protocols = Vec::new();
    for (index, name) in given.iter().enumerate() {
        match Protocol::parse(name) {
            Some(protocol) => protocols.push(protocol),
            None => {
                report.error(format!("spec.protocolVersions[{index}]"), name, format!("must be {}", Protocol::NAMES))
            }
        }
    }
    protocols
}

/// Names of runtimes: DNS names, unlike services.
pub(super) fn check_name(name: &str, report: &mut Report) {
    names::check_dns_name(name, "metadata.name", report);
}
