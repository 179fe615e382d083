//! From a manifest to a validated model.
//!
//! [`parse`] takes YAML or JSON and gives one [`Document`] per document in it, each with everything
//! there is to say about it and, where nothing forbids it, the validated [`Resource`]. Nothing in a
//! manifest is dropped in silence: what is unknown or not honoured yet is a finding, except for what a
//! server sets (`status`, `metadata.uid` and the like), so that the answer of `get` can be applied again.
//!
//! | file | what it reads |
//! | --- | --- |
//! | `documents` | text to documents |
//! | `kinds` | which reader a document's kind needs |
//! | `typed` | JSON to typed values, with the path of each unknown field and type error |
//! | `inference_service`, `v1alpha2`, `knative`, `annotations`, `placing`, `warmth` | the service |
//! | `component`, `fields` | one component: implementation, extension fields and pod fields at one level |
//! | `chain` | what a transformer or explainer is told of its predictor |
//! | `framework`, `storage` | `model`, the older keys, and where weights come from |
//! | `serving_runtime`, `runtimes` | runtimes, and which of them a model gets |
//! | `resolve`, `merge`, `placeholders`, `image` | model and runtime become one pod |
//! | `pod`, `container`, `env`, `expand`, `probe`, `resources`, `quantity`, `affinity`, `volumes` | the pod |
//! | `auxiliary` | secrets, config maps, claims and service accounts |
//! | `object` | the way back, to KServe's shape with status |

mod affinity;
mod annotations;
mod auxiliary;
mod chain;
mod component;
mod container;
mod depth;
mod documents;
mod env;
mod expand;
mod field_names;
mod fields;
mod framework;
mod image;
mod inference_service;
mod kinds;
mod knative;
mod merge;
mod model;
mod names;
mod object;
mod placeholders;
mod placing;
mod pod;
mod probe;
pub mod quantity;
mod report;
mod resolve;
mod resources;
mod runtimes;
mod security;
mod serving_runtime;
mod storage;
#[cfg(test)]
pub(crate) mod tests;
mod typed;
mod v1alpha2;
mod volumes;
mod warmth;

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

pub use self::{
    auxiliary::Data,
    image::check as check_image,
    model::{
        Auxiliary, AuxiliaryKind, Component, ComponentKind, Container, EnvSource, EnvVar, InferenceService, MigRequest,
        Probe, ProbeHandler, Protocol, Resource, Resources, RevisionTemplate, RuntimeUse, Scaling, Security,
        ServingRuntime, Sidecar, Storage, StorageSource, SupportedFormat, TrafficShare, default_pull_policy,
    },
    object::{
        ComponentView, Condition, ConditionStatus, FailureInfo, ModelState, ModelStatus, StatusView, TrafficTarget,
        TransitionStatus, to_object,
    },
    placing::{PlacementPolicy, placement_policy, priority},
    runtimes::{NoRuntime, Runtimes},
    storage::check_address as check_storage_uri,
    warmth::{IdleReplicas, SleepPaths, sleep_paths, warm_replicas},
};
use self::{
    documents::Source,
    report::{Report, show},
};
use crate::finding::Finding;

/// `apiVersion` of an InferenceService; older group names are normalised to it.
pub const API_VERSION: &str = "serving.kserve.io/v1beta1";
/// Checks annotations and scaling fields together; the autoscaler's validation is plugged in here.
pub type ValidateScaling<'a> = dyn Fn(&BTreeMap<String, String>, &Scaling) -> Vec<Finding> + 'a;

/// How to read a manifest.
#[derive(Clone, Copy)]
pub struct ParseOptions<'a> {
    /// Namespace for documents that name none; empty is `default`.
    pub default_namespace: &'a str,
    /// Unknown fields, and known ones that have no effect in this version, are errors.
    pub strict: bool,
    /// Called once for each predictor with its effective annotations (those of the revision template)
    /// and its scaling fields.
    pub validate_scaling: &'a ValidateScaling<'a>,
    /// Runtimes that models may use, beside those that the manifest itself holds.
    pub runtimes: &'a Runtimes,
}

impl fmt::Debug for ParseOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParseOptions")
            .field("default_namespace", &self.default_namespace)
            .field("strict", &self.strict)
            .finish_non_exhaustive()
    }
}

/// What came of one document of a manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Place in the manifest from 0; empty documents count, but are not in the answer.
    pub index: usize,
    /// `kind` as given; empty where it could not be read.
    pub kind: String,
    /// The document's namespace, else the default one; empty where it could not be read.
    pub namespace: String,
    /// `metadata.name` as given; empty where it could not be read.
    pub name: String,
    /// Everything there is to say, in the order of the checks.
    pub findings: Vec<Finding>,
    /// The validated object; `None` if and only if a finding is an error.
    pub object: Option<Resource>,
}

impl Document {
    fn refused(index: usize, finding: Finding) -> Self {
        Self {
            index,
            kind: String::new(),
            namespace: String::new(),
            name: String::new(),
            findings: vec![finding],
            object: None,
        }
    }
}

/// Reads a manifest: one or more YAML documents, or JSON. Never fails as a whole: an empty manifest is
/// one refused document, and so is the place where the syntax ends to make sense.
pub fn parse(manifest: &str, options: ParseOptions<'_>) -> Vec<Document> {
    let sources = documents::read(manifest);
    if sources.is_empty() {
        return vec![Document::refused(
            0,
            Finding::error("", "", "the manifest is empty, at least one document is needed"),
        )];
    }
    // Runtimes first, wherever they stand: in Kubernetes, too, the order of a file's objects does not count.
    let mut runtimes = options.runtimes.clone();
    for source in &sources {
        if let Some(runtime) = kinds::runtime_of(source, options) {
            runtimes.insert(runtime, None);
        }
    }
    let options = ParseOptions { runtimes: &runtimes, ..options };
    sources.into_iter().map(|source| parse_document(source, options)).collect()
}

fn parse_document(source: Source, options: ParseOptions<'_>) -> Document {
    let Source { index, content } = source;
    let object = match content {
        Ok(Value::Object(object)) => object,
        Ok(other) => {
            return Document::refused(index, Finding::error("", show(&other), "a document must be a mapping"));
        }
        Err(finding) => return Document::refused(index, finding),
    };
    let (kind, name) = (text_at(&object, "kind"), name_of(&object));
    let namespace = namespace_of(&object, options);
    let mut report = Report::new(options.strict);
    let resource = kinds::read(object, &kind, &namespace, options, &mut report);
    let object = resource.filter(|_| !report.has_errors());
    Document { index, kind, namespace, name, findings: report.into_findings(), object }
}

fn name_of(object: &Map<String, Value>) -> String {
    object.get("metadata").and_then(Value::as_object).map(|metadata| text_at(metadata, "name")).unwrap_or_default()
}

/// The document's namespace, else the default one.
fn namespace_of(object: &Map<String, Value>, options: ParseOptions<'_>) -> String {
    let default = if options.default_namespace.is_empty() { "default" } else { options.default_namespace };
    let metadata = object.get("metadata").and_then(Value::as_object);
    let namespace = metadata.map(|metadata| text_at(metadata, "namespace")).filter(|given| !given.is_empty());
    namespace.unwrap_or_else(|| default.to_owned())
}

fn text_at(object: &Map<String, Value>, key: &str) -> String {
    object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}
