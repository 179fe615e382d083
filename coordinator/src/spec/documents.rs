//! From text to documents: several YAML documents, or JSON, in one manifest.

use std::{cell::Cell, fmt};

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

use super::depth;
use crate::finding::Finding;

/// Values in one manifest, each entry of a list or mapping counted.
const NODES_MAX: usize = 200_000;

/// One document of a manifest, or why it could not be read.
pub(super) struct Source {
    /// Place in the manifest from 0, empty documents counted.
    pub(super) index: usize,
    pub(super) content: Result<Value, Finding>,
}

/// Reads the documents of a manifest, without the empty ones. Reading ends at the first syntax error,
/// since what follows it cannot be told apart with certainty.
pub(super) fn read(manifest: &str) -> Vec<Source> {
    if let Err(finding) = depth::check(manifest) {
        return vec![Source { index: 0, content: Err(finding) }];
    }
    let sources = read_yaml(manifest);
    if manifest.trim_start().starts_with('{')
        && sources.iter().any(|source| source.content.is_err())
        && let Some(json) = read_json(manifest)
    {
        return json;
    }
    sources
}

fn read_yaml(manifest: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let nodes_left = Cell::new(NODES_MAX);
    for (index, document) in serde_norway::Deserializer::from_str(manifest).enumerate() {
        match (Node { left: &nodes_left }).deserialize(document) {
            Ok(Value::Null) => {}
            Ok(value) => sources.push(Source { index, content: Ok(value) }),
            Err(error) => {
                sources.push(Source { index, content: Err(syntax_error(&error)) });
                break;
            }
        }
    }
    sources
}

/// JSON that is not YAML as the YAML parser reads it (escaped surrogate pairs, several objects in a row).
fn read_json(manifest: &str) -> Option<Vec<Source>> {
    serde_json::Deserializer::from_str(manifest)
        .into_iter::<Value>()
        .enumerate()
        .map(|(index, value)| Some(Source { index, content: Ok(value.ok()?) }))
        .collect()
}

fn syntax_error(error: &serde_norway::Error) -> Finding {
    let mut message = error.to_string();
    let mut position = None;
    if let Some(location) = error.location() {
        let (line, column) = (location.line(), location.column());
        message = message.replacen(&format!(" at line {line} column {column}"), "", 1);
        position = u32::try_from(line).ok().zip(u32::try_from(column).ok());
    }
    let mut finding =
        Finding::error("", "", format!("not valid YAML: {message}; nothing after this place in the file was read"));
    finding.position = position;
    finding
}

/// A YAML node as JSON. Read by a visitor of our own and not through a YAML value, since the parser
/// knows line and column only while it reads.
#[derive(Clone, Copy)]
struct Node<'a> {
    /// Nodes that the manifest may still have: aliases multiply them.
    left: &'a Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None => return Err(D::Error::custom(format!("more than {NODES_MAX} values, those of aliases included"))),
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value without a YAML tag")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom(format!("{value} is not a finite number")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    /// What the parser calls a document without anything in it.
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = entries.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        let mut merged = Vec::new();
        while let Some(key) = entries.next_key_seed(self)? {
            let key = key_of(key).map_err(A::Error::custom)?;
            let value = entries.next_value_seed(self)?;
            if key == "<<" {
                merged.extend(merge_sources(value).map_err(A::Error::custom)?);
            } else if object.insert(key.clone(), value).is_some() {
                return Err(A::Error::custom(format!("{key} is given twice")));
            }
        }
        // YAML's merge key: what the mapping itself says wins, then the earlier source.
        for (key, value) in merged.into_iter().flatten() {
            object.entry(key).or_insert(value);
        }
        Ok(Value::Object(object))
    }
}

fn merge_sources(value: Value) -> Result<Vec<Map<String, Value>>, &'static str> {
    let sources = match value {
        Value::Array(values) => values,
        other => vec![other],
    };
    let mapping = |value| if let Value::Object(object) = value { Some(object) } else { None };
    sources.into_iter().map(mapping).collect::<Option<_>>().ok_or("the merge key << needs a mapping or a list of them")
}

/// Numbers and booleans as keys become text, as in Kubernetes' own conversion. A mapping as a key is
/// mostly an unfilled placeholder, `{{name}}`.
fn key_of(key: Value) -> Result<String, String> {
    match key {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Object(_) => Err("a key must be text, not a mapping; fill placeholders like {{name}} first".to_owned()),
        other => Err(format!("a key must be text, not {other}")),
    }
}

/// `key` below `at`, as field paths are written: `a.b`, or `a[x.y/z]` where the key has other signs.
pub(super) fn join(at: &str, key: &str) -> String {
    if !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
        format!("{at}[{key}]")
    } else if at.is_empty() {
        key.to_owned()
    } else {
        format!("{at}.{key}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(manifest: &str) -> Result<Value, Finding> {
        read(manifest).swap_remove(0).content
    }

    #[test]
    fn keys_and_merges_are_as_in_yaml() {
        let merged = one("base: &b {x: 1, y: 2}\na: {<<: *b, x: 3}\n8: text\ntrue: 1").unwrap();
        assert_eq!(merged, json!({"base": {"x": 1, "y": 2}, "a": {"x": 3, "y": 2}, "8": "text", "true": 1}));
        for text in ["a: 1\na: 2", "a: .nan", "a: !tag b", "a: {[x]: 1}", "a: {<<: 1}"] {
            let error = one(text).unwrap_err();
            assert!(error.position.is_some(), "{text:?} gives {error}");
        }
    }

    #[test]
    fn an_unfilled_placeholder_has_a_place() {
        let error = one("a:\n  command: {{inputs.command}}\n").unwrap_err();
        assert_eq!(error.position, Some((2, 12)), "{error}");
        assert!(error.message.contains("a.command"), "{error}");
        let error = one("a:\n  image: {user}/image:latest\n").unwrap_err();
        assert_eq!(error.position.map(|(line, _)| line), Some(2), "{error}");
    }

    #[test]
    fn aliases_that_multiply_values_are_refused() {
        let line = |n: usize, of: &str| format!("a{n}: &a{n} [{}]\n", [of].repeat(9).join(","));
        let bomb = (1..9).fold(line(0, "x"), |text, n| text + &line(n, &format!("*a{}", n - 1)));
        assert!(one(&bomb).is_err());
        // The parser's own limit grows with the size of the text.
        let padded = bomb + &format!("pad: [{}]\n", "1,".repeat(10_000));
        let error = one(&padded).unwrap_err();
        assert!(error.message.contains("values, those of aliases included"), "{error}");
    }

    #[test]
    fn nothing_is_no_document() {
        for text in ["", "\n", "# nothing\n", "---\n", "---\n---\n# nothing\n", "~"] {
            assert!(read(text).is_empty(), "{text:?}");
        }
    }

    #[test]
    fn documents_are_numbered_and_reading_ends_at_nonsense() {
        let sources = read("---\n---\na: 1\n---\nb: [\n---\nc: 1\n");
        let places: Vec<_> = sources.iter().map(|source| (source.index, source.content.is_ok())).collect();
        assert_eq!(places, [(1, true), (2, false)]);
    }
}
