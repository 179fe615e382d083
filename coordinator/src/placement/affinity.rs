//! Kubernetes' node affinity: terms are OR, what is in a term is AND, operators are six.

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};

use super::{Node, PlacementRequest};

/// Something of a node that a request looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key<'a> {
    /// `metadata.name`, the only field that Kubernetes knows.
    Name,
    /// The label of this name.
    Label(&'a str),
}

impl Key<'_> {
    pub(super) fn of<'n>(&self, node: &'n Node) -> Option<&'n str> {
        match self {
            Self::Name => Some(&node.name),
            Self::Label(label) => node.labels.get(*label).map(String::as_str),
        }
    }
}

/// All that the request looks at, each once and in order. Nodes that agree in it are equal for
/// [`super::filters::admits`].
pub(super) fn keys(request: &PlacementRequest) -> Vec<Key<'_>> {
    let required = request.required_affinity.iter().flat_map(|selector| &selector.node_selector_terms);
    let preferred = request.preferred_affinity.iter().map(|preferred| &preferred.preference);
    let mut keys: Vec<_> = request.node_selector.keys().map(|label| Key::Label(label)).collect();
    for term in required.chain(preferred) {
        keys.extend(term.match_expressions.iter().flatten().map(|requirement| Key::Label(&requirement.key)));
        keys.extend(term.match_fields.iter().flatten().map(|_| Key::Name));
    }
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// True where one of the terms matches.
pub(super) fn selects(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| matches_term(term, node))
}

/// Sum of the weights of preferred terms that match.
pub(super) fn preference(request: &PlacementRequest, node: &Node) -> i64 {
    let matching = request.preferred_affinity.iter().filter(|preferred| matches_term(&preferred.preference, node));
    matching.map(|preferred| i64::from(preferred.weight)).sum()
}

/// A term without expressions and fields matches nothing.
fn matches_term(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let by_label = |requirement: &NodeSelectorRequirement| matches(requirement, Key::Label(&requirement.key).of(node));
    let by_field = |requirement: &NodeSelectorRequirement| {
        requirement.key == "metadata.name" && matches(requirement, Key::Name.of(node))
    };
    expressions.iter().all(by_label) && fields.iter().all(by_field)
}

fn matches(requirement: &NodeSelectorRequirement, actual: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let among = |actual: &str| values.iter().any(|value| value == actual);
    let compare = |holds: fn(i64, i64) -> bool| {
        let bound = values.first().and_then(|value| value.parse().ok());
        let actual = actual.and_then(|value| value.parse().ok());
        actual.zip(bound).is_some_and(|(actual, bound)| holds(actual, bound))
    };
    match requirement.operator.as_str() {
        "In" => actual.is_some_and(among),
        "NotIn" => !actual.is_some_and(among),
        "Exists" => actual.is_some(),
        "DoesNotExist" => actual.is_none(),
        "Gt" => compare(|actual, bound| actual > bound),
        "Lt" => compare(|actual, bound| actual < bound),
        _ => false,
    }
}
