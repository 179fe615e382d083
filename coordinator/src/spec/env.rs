//! Environment variables of a container.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as k8s;

use super::{
    auxiliary::AuxiliaryKind,
    documents::join,
    expand::{Budget, EXPANDED_MAX},
    model::{EnvSource, EnvVar},
    names,
    report::Report,
};

/// KServe blocks it, since one could put code before the server's own by it.
const BLOCKED: &str = "PYTHONPATH";

/// Reads `env` and `envFrom` of the container at `at`.
pub(super) fn read(container: &k8s::Container, at: &str, report: &mut Report) -> Vec<EnvVar> {
    let mut variables = Vec::new();
    for (index, given) in container.env_from.iter().flatten().enumerate() {
        let source = read_source_of_all(given, &format!("{at}.envFrom[{index}]"), report);
        let name = given.prefix.clone().unwrap_or_default();
        variables.extend(source.map(|from| EnvVar { name, value: String::new(), from: Some(from) }));
    }
    let mut known = BTreeMap::new();
    let mut budget = Budget::default();
    for (index, given) in container.env.iter().flatten().enumerate() {
        let at = format!("{at}.env[{index}]");
        check_name(&given.name, &join(&at, "name"), report);
        let again = |variable: &EnvVar| variable.name == given.name && !takes_all(variable);
        if variables.iter().any(again) {
            report.warning(join(&at, "name"), &given.name, "is given more than once: the last value counts");
            variables.retain(|variable| !again(variable));
        }
        let text = given.value.as_deref().unwrap_or_default();
        if let Some(source) = &given.value_from {
            known.remove(&given.name);
            let from = read_source(source, text, &join(&at, "valueFrom"), report);
            variables.extend(from.map(|from| EnvVar {
                name: given.name.clone(),
                value: String::new(),
                from: Some(from),
            }));
            continue;
        }
        let Some(value) = budget.expand(text, &known) else {
            let message = format!("the values expand to more than {EXPANDED_MAX} bytes together");
            report.error(join(&at, "value"), "", message);
            break;
        };
        if value.contains('\0') {
            report.error(join(&at, "value"), "", "must not hold a zero byte");
        }
        known.insert(given.name.clone(), value.clone());
        variables.push(EnvVar { name: given.name.clone(), value, from: None });
    }
    variables
}

fn takes_all(variable: &EnvVar) -> bool {
    variable.from.as_ref().is_some_and(|from| from.key.is_empty())
}

fn check_name(name: &str, at: &str, report: &mut Report) {
    if name.is_empty() || name.contains(['=', '\0']) {
        report.error(at, name, "must be given and hold neither '=' nor a zero byte");
    }
    if name == BLOCKED {
        report.error(at, name, "must not be set");
    }
}

/// Reports blocked variables of a container that is not read further.
pub(super) fn check_blocked(container: &k8s::Container, at: &str, report: &mut Report) {
    for (index, variable) in container.env.iter().flatten().enumerate() {
        if variable.name == BLOCKED {
            report.error(format!("{at}.env[{index}].name"), &variable.name, "must not be set");
        }
    }
}

fn read_source_of_all(given: &k8s::EnvFromSource, at: &str, report: &mut Report) -> Option<EnvSource> {
    let secret = given.secret_ref.as_ref().map(|from| (AuxiliaryKind::Secret, &from.name, from.optional));
    let map = given.config_map_ref.as_ref().map(|from| (AuxiliaryKind::ConfigMap, &from.name, from.optional));
    let (kind, name, optional) = match (secret, map) {
        (Some(only), None) | (None, Some(only)) => only,
        _ => {
            report.error(at, "", "must have exactly one of secretRef and configMapRef");
            return None;
        }
    };
    names::check_dns_name(
        name,
        &join(at, if secret.is_some() { "secretRef.name" } else { "configMapRef.name" }),
        report,
    );
    Some(EnvSource { kind, name: name.clone(), key: String::new(), optional: optional == Some(true) })
}

fn read_source(source: &k8s::EnvVarSource, value: &str, at: &str, report: &mut Report) -> Option<EnvSource> {
    if !value.is_empty() {
        report.error(at, value, "must not be given together with value");
    }
    let mut sources = Vec::new();
    if let Some(from) = &source.secret_key_ref {
        sources.push(("secretKeyRef", AuxiliaryKind::Secret, &from.name, &from.key, from.optional));
    }
    if let Some(from) = &source.config_map_key_ref {
        sources.push(("configMapKeyRef", AuxiliaryKind::ConfigMap, &from.name, &from.key, from.optional));
    }
    for (key, given) in [
        ("fileKeyRef", source.file_key_ref.is_some()),
        ("fieldRef", source.field_ref.is_some()),
        ("resourceFieldRef", source.resource_field_ref.is_some()),
    ] {
        if given {
            report.error(join(at, key), "", "is not supported by this version; give the value");
            return None;
        }
    }
    let [(field, kind, name, key, optional)] = sources[..] else {
        report.error(at, "", "must have exactly one source");
        return None;
    };
    let at = join(at, field);
    names::check_dns_name(name, &join(&at, "name"), report);
    if key.is_empty() {
        report.error(join(&at, "key"), "", "must be given");
    }
    Some(EnvSource { kind, name: name.clone(), key: key.clone(), optional: optional == Some(true) })
}
