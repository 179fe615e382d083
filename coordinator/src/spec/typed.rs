//! From JSON to a typed value: unknown fields and type errors become findings with their full path.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serde_path_to_error::{Segment, Track};

use super::{
    documents::join,
    field_names, fields,
    report::{Report, show},
};

/// Type errors reported for one part of a document; more than this and the rest is not looked at.
const TYPE_ERROR_LIMIT: usize = 64;

/// A step from a value to one inside it.
#[derive(Clone)]
enum Step {
    Key(String),
    Index(usize),
}

/// Reads `value`, which stands at `at` in the document. A part of the wrong type is reported, taken out
/// of `value`, and the rest is read again, so that one pass finds all type errors.
pub(super) fn read<T: DeserializeOwned + Default>(value: &mut Value, at: &str, report: &mut Report) -> T {
    let mut patched = BTreeMap::new();
    for _ in 0..TYPE_ERROR_LIMIT {
        let mut track = Track::new();
        let mut unknown = Vec::new();
        let tracked = serde_path_to_error::Deserializer::new(&*value, &mut track);
        match serde_ignored::deserialize::<_, _, T>(tracked, |path| unknown.push(ignored_steps(&path))) {
            Ok(typed) => {
                for steps in unknown {
                    report.unknown(render(&steps, at), suggestion::<T>(&steps));
                }
                return typed;
            }
            Err(error) => {
                let steps = error_steps(&track.path());
                let field = render(&steps, at);
                // A second error at one place comes from the placeholder put there, not from the manifest.
                if !patched.contains_key(&field) {
                    let given = lookup(value, &steps).map(show).unwrap_or_default();
                    report.error(&field, given, error.to_string());
                }
                if !take_out(value, &steps, patched.entry(field).or_insert(0)) {
                    break;
                }
            }
        }
    }
    T::default()
}

/// Numbers where Kubernetes takes a quantity become text: `cpu: 3` means `"3"`.
pub(super) fn quantities_to_text(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(quantities_to_text),
        Value::Object(object) => {
            for (key, value) in object {
                match (key.as_str(), value) {
                    ("limits" | "requests" | "overhead", Value::Object(amounts)) => {
                        amounts.values_mut().for_each(number_to_text);
                    }
                    ("sizeLimit", value) => number_to_text(value),
                    (_, value) => quantities_to_text(value),
                }
            }
        }
        _ => {}
    }
}

fn number_to_text(value: &mut Value) {
    if let Value::Number(number) = value {
        *value = Value::String(number.to_string());
    }
}

fn render(steps: &[Step], at: &str) -> String {
    steps.iter().fold(at.to_owned(), |path, step| match step {
        Step::Key(key) => join(&path, key),
        Step::Index(index) => format!("{path}[{index}]"),
    })
}

fn ignored_steps(path: &serde_ignored::Path<'_>) -> Vec<Step> {
    use serde_ignored::Path;
    let (parent, step) = match path {
        Path::Root => return Vec::new(),
        Path::Seq { parent, index } => (parent, Some(Step::Index(*index))),
        Path::Map { parent, key } => (parent, Some(Step::Key(key.clone()))),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => (parent, None),
    };
    let mut steps = ignored_steps(parent);
    steps.extend(step);
    steps
}

/// The field of the same struct that the last of these steps is probably a misspelling of.
fn suggestion<T: DeserializeOwned>(steps: &[Step]) -> Option<&'static str> {
    let keys: Vec<&str> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Key(key) => Some(key.as_str()),
            Step::Index(_) => None,
        })
        .collect();
    let (name, parents) = keys.split_last()?;
    let own = field_names::suggest::<T>(parents, name);
    // A component's own fields and those of its pod are read apart.
    own.or_else(|| fields::suggest(name).filter(|_| parents.is_empty()))
}

fn error_steps(path: &serde_path_to_error::Path) -> Vec<Step> {
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(Step::Index(*index)),
            Segment::Map { key } => Some(Step::Key(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

fn lookup<'a>(value: &'a Value, steps: &[Step]) -> Option<&'a Value> {
    steps.iter().try_fold(value, |value, step| match step {
        Step::Key(key) => value.get(key),
        Step::Index(index) => value.get(index),
    })
}

fn lookup_mut<'a>(value: &'a mut Value, steps: &[Step]) -> Option<&'a mut Value> {
    steps.iter().try_fold(value, |value, step| match step {
        Step::Key(key) => value.get_mut(key),
        Step::Index(index) => value.get_mut(index),
    })
}

/// Takes the offending part out. A list's element is replaced by an empty one of some type instead, so
/// that the others keep their numbers; when none fits, the whole list goes. False: nothing left to try.
fn take_out(value: &mut Value, steps: &[Step], attempts: &mut usize) -> bool {
    let Some((last, parents)) = steps.split_last() else {
        return false;
    };
    match (lookup_mut(value, parents), last) {
        (Some(Value::Object(object)), Step::Key(key)) => object.remove(key).is_some(),
        (Some(Value::Array(values)), Step::Index(index)) => {
            let placeholder = [json!(""), json!({})].into_iter().nth(*attempts);
            *attempts += 1;
            match (placeholder, values.get_mut(*index)) {
                (Some(placeholder), Some(element)) => {
                    *element = placeholder;
                    true
                }
                _ => take_out(value, parents, &mut 0),
            }
        }
        _ => false,
    }
}
