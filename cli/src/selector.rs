//! Label selectors, as kubectl takes them by `-l`.

use std::{collections::BTreeMap, str::FromStr};

/// Requirements that all have to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    /// The label is there and has one of these values.
    In(String, Vec<String>),
    /// The label is not there, or has none of these values.
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

impl Selector {
    /// Returns `true` if these labels meet all requirements.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
        })
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parts(text).into_iter().map(|part| requirement(part.trim())).collect::<Result<_, _>>().map(Self)
    }
}

/// Splits at the commas that are not in parentheses.
fn parts(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0_i32, 0, Vec::new());
    for (at, sign) in text.char_indices() {
        match sign {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let key = |key: &str| {
        let key = key.trim();
        let good = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
        let named = !key.is_empty() && key.chars().all(good);
        named.then(|| key.to_owned()).ok_or_else(|| format!("{text:?}: {key:?} is no label's key"))
    };
    for (sign, equal) in [("!=", false), ("==", true), ("=", true)] {
        if let Some((name, value)) = text.split_once(sign) {
            let (name, values) = (key(name)?, vec![value.trim().to_owned()]);
            return Ok(if equal { Requirement::In(name, values) } else { Requirement::NotIn(name, values) });
        }
    }
    if let Some(absent) = text.strip_prefix('!') {
        return Ok(Requirement::Absent(key(absent)?));
    }
    if let Some((head, values)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) {
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        return match head.trim().rsplit_once(' ') {
            Some((name, "in")) => Ok(Requirement::In(key(name)?, values)),
            Some((name, "notin")) => Ok(Requirement::NotIn(key(name)?, values)),
            _ => Err(format!("{text:?}: expected KEY in (VALUE, …) or KEY notin (VALUE, …)")),
        };
    }
    Ok(Requirement::Exists(key(text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(selector: &str) -> bool {
        let labels = [("team", "vision"), ("tier", "gold")];
        let labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        selector.parse::<Selector>().unwrap().matches(&labels)
    }

    #[test]
    fn all_requirements_of_a_selector_have_to_hold() {
        for good in ["team=vision", "team==vision,tier", "team!=text", "!none", "tier in (gold, silver)", "a notin (b)"]
        {
            assert!(matches(good), "{good}");
        }
        for bad in ["team=text", "team=vision,none", "!team", "tier in (silver)", "tier notin (gold,x)"] {
            assert!(!matches(bad), "{bad}");
        }
    }

    #[test]
    fn a_selector_that_cannot_be_read_is_refused() {
        for bad in ["", "a b", "=x", "a in gold)", "a,,b"] {
            assert!(bad.parse::<Selector>().is_err(), "{bad}");
        }
    }
}
