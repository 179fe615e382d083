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
    /// As [`expand`], within what is left; `None` if the result is longer.
    pub(super) fn expand(&mut self, text: &str, variables: &BTreeMap<String, String>) -> Option<String> {
        let expanded = expand(text, variables, self.0)?;
        self.0 -= expanded.len();
        Some(expanded)
    }
}

/// Replaces `$(NAME)` by the variable's value. An unknown name stays as it is (the agent's `PORT` is
/// known only where the replica runs), and `$$` is a literal `$`. `None` if the result exceeds `limit` bytes.
fn expand(text: &str, variables: &BTreeMap<String, String>, limit: usize) -> Option<String> {
    let mut expanded = String::new();
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
        if expanded.len() > limit {
            return None;
        }
    }
    expanded.push_str(rest);
    (expanded.len() <= limit).then_some(expanded)
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
        let exact = expand(&mixed, &variables, usize::MAX).unwrap();
        assert_eq!(expand(&mixed, &variables, exact.len() - 1), None);
        assert_eq!(expand(&mixed, &variables, exact.len()), Some(exact));
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
            assert_eq!(expand(text, &variables, usize::MAX).as_deref(), Some(expected), "{text:?}");
        }
    }
}
