//! Rules for names.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{documents::join, report::Report};

/// So that `<name>-predictor` is still a DNS label of at most 63 characters.
const SERVICE_NAME_LIMIT: usize = 53;
/// DNS label, RFC 1123.
const LABEL_LIMIT: usize = 63;
/// DNS name as the prefix of a label's key.
const PREFIX_LIMIT: usize = 253;

/// KServe's rule: `[a-z]([-a-z0-9]*[a-z0-9])?`; digits may not lead.
fn check_service_name(name: &str, report: &mut Report) {
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !is_dns_label(name) || name.len() > SERVICE_NAME_LIMIT {
        report.error(
            "metadata.name",
            name,
            format!("must match [a-z]([-a-z0-9]*[a-z0-9])? and be 1 to {SERVICE_NAME_LIMIT} characters long"),
        );
    }
}

/// As [`check_service_name`], where there is a name.
pub(super) fn check_service_name_of(metadata: &ObjectMeta, report: &mut Report) {
    metadata.name.iter().for_each(|name| check_service_name(name, report));
}

/// A DNS label: `[a-z0-9]([-a-z0-9]*[a-z0-9])?`.
pub(super) fn check_namespace(namespace: &str, report: &mut Report) {
    if !is_dns_label(namespace) {
        report.error(
            "metadata.namespace",
            namespace,
            format!("must match [a-z0-9]([-a-z0-9]*[a-z0-9])? and be 1 to {LABEL_LIMIT} characters long"),
        );
    }
}

/// Kubernetes' syntax of label keys and values.
pub(super) fn check_labels(labels: &BTreeMap<String, String>, at: &str, report: &mut Report) {
    for (key, value) in labels {
        check_label_key(key, &join(at, key), report);
        check_label_value(value, &join(at, key), report);
    }
}

/// `[prefix/]name`: a DNS name and 1 to 63 characters of `[-A-Za-z0-9_.]`.
pub(super) fn check_label_key(key: &str, at: &str, report: &mut Report) {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let prefix_fits = prefix.is_none_or(is_dns_name);
    if !prefix_fits || name.is_empty() || !is_label_text(name) {
        report.error(
            at,
            key,
            "key must be [dns-name/]name, the name 1 to 63 letters, digits, '-', '_' or '.', \
             a letter or digit at both ends",
        );
    }
}

/// Empty, or 1 to 63 characters of `[-A-Za-z0-9_.]`.
pub(super) fn check_label_value(value: &str, at: &str, report: &mut Report) {
    if !is_label_text(value) {
        report.error(
            at,
            value,
            "value must be at most 63 letters, digits, '-', '_' or '.', a letter or digit at both ends",
        );
    }
}

pub(super) fn is_dns_label(text: &str) -> bool {
    (1..=LABEL_LIMIT).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_label_text(text: &str) -> bool {
    let ends_well = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    text.len() <= LABEL_LIMIT
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && ends_well(text.chars().next())
        && ends_well(text.chars().next_back())
}

/// A DNS name: labels with dots between them.
pub(super) fn is_dns_name(text: &str) -> bool {
    text.len() <= PREFIX_LIMIT && text.split('.').all(is_dns_label)
}

/// Kubernetes' rule for the names of most objects.
pub(super) fn check_dns_name(name: &str, at: &str, report: &mut Report) {
    if !is_dns_name(name) {
        report.error(
            at,
            name,
            "must be lower-case letters, digits, '-' and '.', a letter or digit at both ends of each part",
        );
    }
}
