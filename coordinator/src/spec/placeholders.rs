//! The part of Go's templates that runtimes use: `{{.Name}}`, `{{.Labels.x}}`, `{{index .Annotations "x"}}`.
//!
//! KServe runs the merged main container through a Go template with the service's metadata. Known here
//! are the fields `Name`, `Namespace`, `Labels` and `Annotations`, `index`, quoted text, and `{{-` `-}}`.
//! Anything else, a missing label too, is an error: Go would write `<no value>` into a command line.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{documents::join, report::Report};

/// What placeholders may refer to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metadata<'a> {
    pub(super) name: &'a str,
    pub(super) namespace: &'a str,
    pub(super) labels: &'a BTreeMap<String, String>,
    pub(super) annotations: &'a BTreeMap<String, String>,
}

const KNOWN: &str =
    "known are {{.Name}}, {{.Namespace}}, {{.Labels.x}}, {{.Annotations.x}} and {{index .Labels \"x\"}}";

/// Fills the placeholders in every text of `value`, which stands at `at`.
pub(super) fn fill_all(value: &mut Value, at: &str, metadata: Metadata<'_>, report: &mut Report) {
    match value {
        Value::String(text) if text.contains("{{") => match fill(text, metadata) {
            Ok(filled) => *text = filled,
            Err(error) => report.error(at, &*text, format!("InvalidPredictorSpec: {error}")),
        },
        Value::Array(values) => {
            for (index, value) in values.iter_mut().enumerate() {
                fill_all(value, &format!("{at}[{index}]"), metadata, report);
            }
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                fill_all(value, &join(at, key), metadata, report);
            }
        }
        _ => {}
    }
}

fn fill(text: &str, metadata: Metadata<'_>) -> Result<String, String> {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let end = closing(after).ok_or_else(|| format!("placeholder without an end: {{{{{after}"))?;
        let (inner, mut following) = (&after[..end], &after[end + 2..]);
        let trimmed = inner.strip_prefix("- ").unwrap_or(inner);
        filled.push_str(if trimmed.len() < inner.len() { before.trim_end() } else { before });
        let expression = trimmed.strip_suffix(" -").unwrap_or(trimmed);
        if expression.len() < trimmed.len() {
            following = following.trim_start();
        }
        filled.push_str(&evaluate(expression, metadata)?);
        rest = following;
    }
    filled.push_str(rest);
    Ok(filled)
}

/// Where the `}}` stands that ends a placeholder, quoted ones left out.
fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    for (place, sign) in text.char_indices() {
        match quote {
            None if text[place..].starts_with("}}") => return Some(place),
            None if sign == '"' || sign == '`' => quote = Some(sign),
            Some(open) if open == sign => quote = None,
            _ => {}
        }
    }
    None
}

fn evaluate(expression: &str, metadata: Metadata<'_>) -> Result<String, String> {
    let expression = expression.trim();
    if expression.starts_with("/*") && expression.ends_with("*/") {
        return Ok(String::new());
    }
    if let Some(text) = quoted(expression) {
        return Ok(text.to_owned());
    }
    if let Some(arguments) = expression.strip_prefix("index ") {
        let (map, key) = arguments.trim().split_once(char::is_whitespace).unwrap_or((arguments, ""));
        let key =
            quoted(key.trim()).ok_or_else(|| format!("index needs a map and a quoted key: {expression}; {KNOWN}"))?;
        return look_up(map.strip_prefix('.').unwrap_or_default(), key, metadata);
    }
    match expression.strip_prefix('.').unwrap_or_default().split_once('.') {
        Some((map, key)) if is_field(key) => look_up(map, key, metadata),
        None if expression == ".Name" => Ok(metadata.name.to_owned()),
        None if expression == ".Namespace" => Ok(metadata.namespace.to_owned()),
        _ => Err(format!("placeholder {{{{{expression}}}}} is not known; {KNOWN}")),
    }
}

fn quoted(text: &str) -> Option<&str> {
    ['"', '`'].into_iter().find_map(|quote| {
        let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
        (!inner.contains(quote)).then_some(inner)
    })
}

fn is_field(key: &str) -> bool {
    !key.is_empty() && key.chars().all(|sign| sign.is_alphanumeric() || sign == '_')
}

fn look_up(map: &str, key: &str, metadata: Metadata<'_>) -> Result<String, String> {
    let (map, what) = match map {
        "Labels" => (metadata.labels, "label"),
        "Annotations" => (metadata.annotations, "annotation"),
        other => return Err(format!("placeholder field .{other} is not known; {KNOWN}")),
    };
    map.get(key).cloned().ok_or_else(|| format!("the service has no {what} {key}, which a placeholder names"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_what_runtimes_use() {
        let map = BTreeMap::from([("x".to_owned(), "1".to_owned()), ("a.b/c".to_owned(), "2".to_owned())]);
        let metadata = Metadata { name: "n", namespace: "ns", labels: &map, annotations: &map };
        for (text, expected) in [
            ("--model_name={{.Name}}", "--model_name=n"),
            ("{{ .Namespace }}/{{.Name}}", "ns/n"),
            ("{{.Labels.x}}", "1"),
            ("{{index .Annotations \"a.b/c\"}}", "2"),
            ("{{index .Labels `x`}}", "1"),
            ("a {{- .Name -}} b", "anb"),
            ("{{\"}}\"}}{{/* nothing */}}", "}}"),
            ("no placeholder }}", "no placeholder }}"),
        ] {
            assert_eq!(fill(text, metadata).as_deref(), Ok(expected), "{text}");
        }
        for text in [
            "{{.Name",
            "{{.Spec.x}}",
            "{{.Labels.none}}",
            "{{range .Labels}}",
            "{{messages}}",
            "{{}}",
            "{{.}}",
            "{{index .Labels x}}",
            "{{.Labels.a.b}}",
            "{{index . \"x\"}}",
        ] {
            assert!(fill(text, metadata).is_err(), "{text}");
        }
    }
}
