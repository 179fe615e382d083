//! `affinity`: node affinity is kept, the rest is said to have no effect.

use k8s_openapi::api::core::v1::{
    Affinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PreferredSchedulingTerm,
};

use super::{documents::join, names, report::Report};

const REQUIRED: &str = "nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution";

/// Where replicas must and where they would rather be.
pub(super) type NodeAffinity = (Option<NodeSelector>, Vec<PreferredSchedulingTerm>);

/// Reads the affinity at `at`; gives the node affinity.
pub(super) fn read(affinity: Option<&Affinity>, at: &str, report: &mut Report) -> NodeAffinity {
    let Some(affinity) = affinity else { return NodeAffinity::default() };
    for (key, given) in
        [("podAffinity", affinity.pod_affinity.is_some()), ("podAntiAffinity", affinity.pod_anti_affinity.is_some())]
    {
        if given {
            report.unsupported(join(at, key), "replicas are placed without regard to each other's labels");
        }
    }
    let Some(node) = affinity.node_affinity.as_ref() else { return NodeAffinity::default() };
    let preferred = node.preferred_during_scheduling_ignored_during_execution.clone().unwrap_or_default();
    for (index, preference) in preferred.iter().enumerate() {
        let at = format!("{at}.{PREFERRED}[{index}]");
        if !(1..=100).contains(&preference.weight) {
            report.error(join(&at, "weight"), preference.weight, "must be 1 to 100");
        }
        check_term(&preference.preference, &join(&at, "preference"), report);
    }
    let required = node.required_during_scheduling_ignored_during_execution.clone();
    if let Some(required) = &required {
        check(required, &format!("{at}.{REQUIRED}.nodeSelectorTerms"), report);
    }
    (required, preferred)
}

fn check(selector: &NodeSelector, at: &str, report: &mut Report) {
    if selector.node_selector_terms.is_empty() {
        report.error(at, "", "must have at least one term");
    }
    for (index, term) in selector.node_selector_terms.iter().enumerate() {
        check_term(term, &format!("{at}[{index}]"), report);
    }
}

fn check_term(term: &NodeSelectorTerm, at: &str, report: &mut Report) {
    for (index, requirement) in term.match_expressions.iter().flatten().enumerate() {
        let at = format!("{at}.matchExpressions[{index}]");
        names::check_label_key(&requirement.key, &join(&at, "key"), report);
        check_requirement(requirement, &at, report);
    }
    for (index, requirement) in term.match_fields.iter().flatten().enumerate() {
        check_field(requirement, &format!("{at}.matchFields[{index}]"), report);
    }
}

fn check_requirement(requirement: &NodeSelectorRequirement, at: &str, report: &mut Report) {
    let values = requirement.values.as_deref().unwrap_or_default();
    let at_values = join(at, "values");
    match requirement.operator.as_str() {
        "In" | "NotIn" if values.is_empty() => report.error(at_values, "", "must have at least one value"),
        "In" | "NotIn" => {
            for (index, value) in values.iter().enumerate() {
                names::check_label_value(value, &format!("{at_values}[{index}]"), report);
            }
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            report.error(at_values, values.join(", "), "must be empty with Exists and DoesNotExist");
        }
        "Exists" | "DoesNotExist" => {}
        "Gt" | "Lt" if values.len() != 1 || values[0].parse::<i64>().is_err() => {
            report.error(at_values, values.join(", "), "must be one integer with Gt and Lt");
        }
        "Gt" | "Lt" => {}
        other => report.error(join(at, "operator"), other, "must be In, NotIn, Exists, DoesNotExist, Gt or Lt"),
    }
}

/// Kubernetes knows one field of a node: its name, with In or NotIn and one value.
fn check_field(requirement: &NodeSelectorRequirement, at: &str, report: &mut Report) {
    if requirement.key != "metadata.name" {
        report.error(join(at, "key"), &requirement.key, "must be metadata.name");
    }
    if !["In", "NotIn"].contains(&requirement.operator.as_str()) {
        report.error(join(at, "operator"), &requirement.operator, "must be In or NotIn");
    }
    let values = requirement.values.as_deref().unwrap_or_default();
    if values.len() != 1 {
        report.error(join(at, "values"), values.join(", "), "must be one node name");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(yaml: &str) -> (usize, Vec<String>) {
        let affinity: Affinity = serde_norway::from_str(yaml).unwrap();
        let mut report = Report::new(false);
        let (_, preferred) = read(Some(&affinity), "affinity", &mut report);
        (preferred.len(), report.into_findings().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn preferred_terms_are_kept_and_checked() {
        let preferred = |weight: i32, operator: &str| {
            format!(
                "nodeAffinity:\n  preferredDuringSchedulingIgnoredDuringExecution:\n  - weight: {weight}\n    \
                 preference: {{matchExpressions: [{{key: gpu.nvidia.com/class, operator: {operator}, values: [A40]}}]}}\n"
            )
        };
        assert_eq!(findings(&preferred(100, "In")), (1, vec![]));
        let at = "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0]";
        for weight in [0, 101] {
            let (_, found) = findings(&preferred(weight, "In"));
            assert_eq!(found, [format!("{at}.weight: must be 1 to 100 (got {weight})")]);
        }
        let (_, found) = findings(&preferred(1, "Like"));
        assert!(
            found.len() == 1 && found[0].starts_with(&format!("{at}.preference.matchExpressions[0].operator")),
            "{found:?}"
        );
    }
}
