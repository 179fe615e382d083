//! Kubernetes' `$(NAME)` references in commands, arguments and environment values.

use std::collections::BTreeMap;

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
