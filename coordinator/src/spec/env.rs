//! Environment variables of the main container.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as k8s;

use super::{documents::join, expand::expand, model::EnvVar, report::Report};

/// Reads `env` and `envFrom` of the container at `at`. A variable that cannot be filled is an error,
/// unless the manifest calls it optional, since a server without its credentials does not work.
pub(super) fn read(container: &k8s::Container, at: &str, report: &mut Report) -> Vec<EnvVar> {
    for (index, source) in container.env_from.iter().flatten().enumerate() {
        let optional = source.secret_ref.as_ref().and_then(|from| from.optional) == Some(true)
            || source.config_map_ref.as_ref().and_then(|from| from.optional) == Some(true);
        missing(format!("{at}.envFrom[{index}]"), "secrets and config maps", optional, report);
    }
    let mut variables: Vec<EnvVar> = Vec::new();
    let mut known = BTreeMap::new();
    for (index, given) in container.env.iter().flatten().enumerate() {
        let at = format!("{at}.env[{index}]");
        if given.name.is_empty() || given.name.contains(['=', '\0']) {
            report.error(join(&at, "name"), &given.name, "must be given and hold neither '=' nor a zero byte");
        }
        if given.name == "STORAGE_URI" {
            report.error(
                &at,
                given.value.as_deref().unwrap_or_default(),
                "downloading models is not supported by this version, and /mnt/models would be empty; \
                 have the model in the image or let the server fetch it",
            );
        }
        if let Some(source) = &given.value_from {
            check_source(source, given.value.as_deref().unwrap_or_default(), &join(&at, "valueFrom"), report);
            continue;
        }
        let value = expand(given.value.as_deref().unwrap_or_default(), &known);
        if value.contains('\0') {
            report.error(join(&at, "value"), "", "must not hold a zero byte");
        }
        if known.insert(given.name.clone(), value.clone()).is_some() {
            report.warning(join(&at, "name"), &given.name, "is given more than once: the last value counts");
            variables.retain(|variable| variable.name != given.name);
        }
        variables.push(EnvVar { name: given.name.clone(), value });
    }
    variables
}

fn check_source(source: &k8s::EnvVarSource, value: &str, at: &str, report: &mut Report) {
    if !value.is_empty() {
        report.error(at, value, "must not be given together with value");
    }
    let sources: [(&str, &str, Option<Option<bool>>); 5] = [
        ("secretKeyRef", "secrets", source.secret_key_ref.as_ref().map(|from| from.optional)),
        ("configMapKeyRef", "config maps", source.config_map_key_ref.as_ref().map(|from| from.optional)),
        ("fileKeyRef", "files from volumes", source.file_key_ref.as_ref().map(|from| from.optional)),
        ("fieldRef", "fields of the pod", source.field_ref.as_ref().map(|_| None)),
        ("resourceFieldRef", "resource fields of the pod", source.resource_field_ref.as_ref().map(|_| None)),
    ];
    let given: Vec<_> = sources.into_iter().filter_map(|(key, what, from)| Some((key, what, from?))).collect();
    if given.len() != 1 {
        report.error(at, "", "must have exactly one source");
    }
    for (key, what, optional) in given {
        missing(join(at, key), what, optional == Some(true), report);
    }
}

fn missing(at: String, what: &str, optional: bool, report: &mut Report) {
    if optional {
        report.unsupported(at, "the optional variable is left out");
    } else {
        report.error(at, "", format!("variables from {what} are not supported by this version; give the value"));
    }
}
