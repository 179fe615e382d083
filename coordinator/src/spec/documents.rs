//! From text to documents: several YAML documents, or JSON, in one manifest.

use serde::Deserialize;
use serde_json::{Map, Number, Value};

use super::report::show;
use crate::finding::Finding;

/// One document of a manifest, or why it could not be read.
pub(super) struct Source {
    /// Place in the manifest from 0, empty documents counted.
    pub(super) index: usize,
    pub(super) content: Result<Value, Finding>,
}

/// Reads the documents of a manifest, without the empty ones. Reading ends at the first syntax error,
/// since what follows it cannot be told apart with certainty.
pub(super) fn read(manifest: &str) -> Vec<Source> {
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
    for (index, document) in serde_norway::Deserializer::from_str(manifest).enumerate() {
        let parsed = serde_norway::Value::deserialize(document).and_then(|mut value| {
            value.apply_merge()?;
            Ok(value)
        });
        match parsed {
            Ok(serde_norway::Value::Null) => {}
            Ok(value) => sources.push(Source { index, content: to_json(value, "") }),
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

fn to_json(value: serde_norway::Value, at: &str) -> Result<Value, Finding> {
    use serde_norway::Value as Yaml;
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(value) => Value::Bool(value),
        Yaml::String(value) => Value::String(value),
        Yaml::Number(value) => {
            Value::Number(number(&value).ok_or_else(|| Finding::error(at, &value, "must be a finite number"))?)
        }
        Yaml::Sequence(values) => Value::Array(
            values
                .into_iter()
                .enumerate()
                .map(|(index, value)| to_json(value, &format!("{at}[{index}]")))
                .collect::<Result<_, _>>()?,
        ),
        Yaml::Mapping(entries) => {
            let mut object = Map::new();
            for (key, value) in entries {
                let key = key_of(key, at)?;
                let value = to_json(value, &join(at, &key))?;
                if object.insert(key.clone(), value).is_some() {
                    return Err(Finding::error(join(at, &key), "", "is given twice"));
                }
            }
            Value::Object(object)
        }
        Yaml::Tagged(tagged) => return Err(Finding::error(at, &tagged.tag, "YAML tags have no meaning here")),
    })
}

fn number(value: &serde_norway::Number) -> Option<Number> {
    match (value.as_u64(), value.as_i64()) {
        (Some(value), _) => Some(value.into()),
        (None, Some(value)) => Some(value.into()),
        (None, None) => Number::from_f64(value.as_f64()?),
    }
}

/// Numbers and booleans as keys become text, as in Kubernetes' own conversion.
fn key_of(key: serde_norway::Value, at: &str) -> Result<String, Finding> {
    match to_json(key, at)? {
        key @ (Value::String(_) | Value::Number(_) | Value::Bool(_)) => Ok(show(&key)),
        other => Err(Finding::error(at, other, "a key must be text")),
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
