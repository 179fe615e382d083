//! Kubernetes' `$(NAME)` references in commands, arguments and environment values.

use std::collections::BTreeMap;

/// Bytes of all environment values, or of the command and all arguments of a container, after expansion. References
/// multiply: a kilobyte of text can ask for gigabytes. Linux takes 2 MiB for both together.
pub(super) const EXPANDED_MAX: usize = 1 << 20;

/// Bytes that a container's texts may still take.
#[derive(Debug)]
pub(super) struct Budget(usize);

impl Default for Budget {
    fn default() -> Self {
        Self(EXPANDED_MAX)
    }
}

impl Budget {
    /// As [`expand`]; `None` if the result exceeds what is left, which is told from lengths alone.
    pub(super) fn expand(&mut self, text: &str, variables: &BTreeMap<String, String>) -> Option<String> {
        // A reference takes at least four bytes and is replaced by at most the longest value.
        let longest = variables.values().map(String::len).max().unwrap_or(0);
        let bound = text.len() + text.matches("$(").count() * longest;
        let expanded = if bound <= self.0 { expand(text, variables) } else { expand_within(text, variables, self.0)? };
        self.0 = self.0.checked_sub(expanded.len())?;
        Some(expanded)
    }
}

/// Expands a text whose result may be longer than `limit` bytes; `None` if it is.
fn expand_within(text: &str, variables: &BTreeMap<String, String>, limit: usize) -> Option<String> {
    let mut expanded = String::new();
    // Each piece ends with a reference, so that it grows by at most one value.
    for piece in text.split_inclusive(')') {
        expanded.push_str(&expand(piece, variables));
        if expanded.len() > limit {
            return None;
        }
    }
    Some(expanded)
}

/// Replaces `$(NAME)` by the variable's value. An unknown name stays as it is (the agent's `PORT` is
/// known only where the replica runs), and `$$` is a literal `$`.
pub(super) fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix("$(").and_then(|after| after.split_once(')')) {
            match variables.get(name) {
                Some(value) => expanded.push_str(value),
                None => expanded.extend(["$(", name, ")"]),
            }
            rest = after;
        } else {
            expanded.push('$');
            rest = &rest[1..];
        }
    }
    expanded.push_str(rest);
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_expands_to_more_than_the_limit_is_told_without_expanding_it() {
        let variables = BTreeMap::from([("A".to_owned(), "x".repeat(1000)), ("B".to_owned(), "$".to_owned())]);
        let mut budget = Budget::default();
        assert_eq!(budget.expand(&"$(A)".repeat(1048), &variables).map(|text| text.len()), Some(1_048_000));
        assert_eq!(budget.expand(&"$(A)".repeat(10), &variables), None, "the budget is for all texts together");
        assert_eq!(Budget::default().expand(&"$(A)".repeat(250_000), &variables), None);
        let mixed = format!("{}$$(A)$(B)(A)$(NONE)", "$(A)".repeat(1000));
        let exact = expand(&mixed, &variables);
        assert_eq!(expand_within(&mixed, &variables, exact.len()), Some(exact));
    }

    #[test]
    fn expands_as_kubernetes_does() {
        let variables = BTreeMap::from([("A".into(), "one".into()), ("B".into(), "$(A)".into())]);
        for (text, expected) in [
            ("$(A)", "one"),
            ("x-$(A)-$(A)-y", "x-one-one-y"),
            ("$(B)", "$(A)"),
            ("$(NONE)", "$(NONE)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$one"),
            ("$(A", "$(A"),
            ("$A ${A} $", "$A ${A} $"),
            ("$(é) €$(A)", "$(é) €one"),
            ("", ""),
        ] {
            assert_eq!(expand(text, &variables), expected, "{text:?}");
        }
    }
}
