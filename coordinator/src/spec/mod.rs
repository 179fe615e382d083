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
//! | `typed` | JSON to typed values, with the path of each unknown field and type error |
//! | `inference_service`, `annotations`, `placing` | the object |
//! | `component` | one component: implementation, extension fields and pod fields at one level |
//! | `container`, `env`, `expand`, `probe`, `resources`, `quantity`, `affinity` | the pod part |
//! | `object` | the way back, to KServe's shape with status |

mod affinity;
mod annotations;
mod component;
mod container;
mod documents;
mod env;
mod expand;
mod inference_service;
mod model;
mod names;
mod object;
mod placing;
mod probe;
pub mod quantity;
mod report;
mod resources;
#[cfg(test)]
mod tests;
mod typed;

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

use self::{
    documents::Source,
    report::{Report, show},
};
pub use self::{
    model::{
        Container, EnvVar, InferenceService, MigRequest, Predictor, Probe, ProbeHandler, Resource, Resources,
        RevisionTemplate, Scaling,
    },
    object::{
        Condition, ConditionStatus, FailureInfo, ModelState, ModelStatus, StatusView, TrafficTarget, TransitionStatus,
        to_object,
    },
    placing::{PlacementPolicy, placement_policy, priority},
};
use crate::finding::Finding;

/// `apiVersion` of an InferenceService; older group names are normalised to it.
pub const API_VERSION: &str = "serving.kserve.io/v1beta1";
/// The group as it was called before KServe had its name.
const API_VERSION_ALIAS: &str = "serving.kubeflow.org/v1beta1";
/// Kinds that this version knows, for messages.
const KNOWN_KINDS: &str = "InferenceService (serving.kserve.io/v1beta1)";

/// Checks annotations and scaling fields together; the autoscaler's validation is plugged in here.
pub type ValidateScaling = dyn Fn(&BTreeMap<String, String>, &Scaling) -> Vec<Finding>;

/// How to read a manifest.
#[derive(Clone, Copy)]
pub struct ParseOptions<'a> {
    /// Namespace for documents that name none; empty is `default`.
    pub default_namespace: &'a str,
    /// Unknown fields, and known ones that have no effect in this version, are errors.
    pub strict: bool,
    /// Called once for each predictor with its effective annotations (those of the revision template)
    /// and its scaling fields.
    pub validate_scaling: &'a ValidateScaling,
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

    let default = if options.default_namespace.is_empty() { "default" } else { options.default_namespace };
    let kind = text_at(&object, "kind");
    let metadata = object.get("metadata").and_then(Value::as_object);
    let name = metadata.map(|metadata| text_at(metadata, "name")).unwrap_or_default();
    let namespace = metadata.map(|metadata| text_at(metadata, "namespace")).filter(|given| !given.is_empty());
    let namespace = namespace.unwrap_or_else(|| default.to_owned());

    let mut report = Report::new(options.strict);
    let resource = if check_kind(&object, &kind, &mut report) {
        let service = inference_service::read(object, &namespace, options, &mut report);
        Some(Resource::InferenceService(Box::new(service)))
    } else {
        None
    };
    let object = resource.filter(|_| !report.has_errors());
    Document { index, kind, namespace, name, findings: report.into_findings(), object }
}

/// True where `kind` and `apiVersion` name something that this version can read.
fn check_kind(object: &Map<String, Value>, kind: &str, report: &mut Report) -> bool {
    let version = text_at(object, "apiVersion");
    let given = |key: &str| object.get(key).map(show).unwrap_or_default();
    if kind.is_empty() {
        report.error("kind", given("kind"), format!("must be given as text; known are: {KNOWN_KINDS}"));
        return false;
    }
    if kind != "InferenceService" {
        let group = if version.is_empty() { String::new() } else { format!(" of {version}") };
        report.error("kind", kind, format!("kind {kind}{group} is not known; known are: {KNOWN_KINDS}"));
        return false;
    }
    match version.as_str() {
        API_VERSION | API_VERSION_ALIAS => true,
        "serving.kserve.io/v1alpha2" | "serving.kubeflow.org/v1alpha2" => {
            report.error(
                "apiVersion",
                &version,
                format!(
                    "v1alpha2 is too old; use {API_VERSION}, where spec.default.predictor is spec.predictor, \
                     custom.container is containers[0] and parallelism is containerConcurrency"
                ),
            );
            false
        }
        _ => {
            report.error("apiVersion", given("apiVersion"), format!("must be {API_VERSION} or {API_VERSION_ALIAS}"));
            false
        }
    }
}

fn text_at(object: &Map<String, Value>, key: &str) -> String {
    object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}
