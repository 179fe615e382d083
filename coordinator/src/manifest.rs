//! Manifests as a coordinator reads them: [`crate::spec`] with the autoscaler's rules plugged in. Pure,
//! so that the command line can say what a coordinator would say.

use crate::{
    autoscaler::{Defaults, ScalerConfig},
    config::Config,
    spec::{self, Document, ParseOptions, Resource, Runtimes},
};

/// How to read a manifest.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// Namespace for documents that name none; empty is `default`.
    pub namespace: &'a str,
    /// Unknown fields, and known ones that have no effect in this version, are errors.
    pub strict: bool,
    /// Fleet-wide scaling defaults that services are checked against.
    pub scaling: &'a Defaults,
    /// Runtimes that models may use.
    pub runtimes: &'a Runtimes,
}

/// The scaling defaults of a coordinator that is not told otherwise.
pub fn scaling_defaults() -> Defaults {
    Config::default().scaling
}

/// Reads a manifest of one or more documents.
pub fn read(manifest: &str, reading: Reading<'_>) -> Vec<Document> {
    let validate_scaling =
        |annotations: &_, component: &_| match ScalerConfig::resolve(reading.scaling, annotations, component) {
            Ok((_, warnings)) => warnings,
            Err(findings) => findings,
        };
    spec::parse(
        manifest,
        ParseOptions {
            default_namespace: reading.namespace,
            strict: reading.strict,
            validate_scaling: &validate_scaling,
            runtimes: reading.runtimes,
        },
    )
}

/// The runtimes that a manifest holds, added to `runtimes`.
pub fn add_runtimes(manifest: &str, reading: Reading<'_>, runtimes: &mut Runtimes) {
    for document in read(manifest, reading) {
        if let Some(Resource::ServingRuntime(runtime)) = document.object {
            runtimes.insert(*runtime, None);
        }
    }
}
