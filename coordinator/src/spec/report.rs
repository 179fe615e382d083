//! Collects what there is to say about one document.

use std::fmt;

use serde_json::Value;

use crate::finding::Finding;

/// Characters of a value that a finding repeats.
const VALUE_LIMIT: usize = 80;

/// Findings of one document so far.
pub(super) struct Report {
    strict: bool,
    findings: Vec<Finding>,
}

impl Report {
    pub(super) fn new(strict: bool) -> Self {
        Self { strict, findings: Vec::new() }
    }

    pub(super) fn error(&mut self, field: impl Into<String>, value: impl fmt::Display, message: impl Into<String>) {
        self.findings.push(Finding::error(field, shorten(&value.to_string()), message));
    }

    pub(super) fn warning(&mut self, field: impl Into<String>, value: impl fmt::Display, message: impl Into<String>) {
        self.findings.push(Finding::warning(field, shorten(&value.to_string()), message));
    }

    /// A field that nobody knows: an error if the caller asked for strictness. `suggestion` is the field of the same
    /// place that was probably meant.
    pub(super) fn unknown(&mut self, field: impl Into<String>, suggestion: Option<&str>) {
        let message = match suggestion {
            Some(suggestion) => format!("unknown field, ignored; did you mean {suggestion}?"),
            None => "unknown field, ignored".to_owned(),
        };
        self.lenient(field, &message);
    }

    /// A field that is known but has no effect; `consequence` says what happens instead.
    pub(super) fn unsupported(&mut self, field: impl Into<String>, consequence: &str) {
        self.lenient(field, &format!("not honoured by this version: {consequence}"));
    }

    pub(super) fn add(&mut self, findings: Vec<Finding>) {
        self.findings.extend(findings);
    }

    /// Adds what is wrong in something that was made from the document, and has not been said yet;
    /// `place` gives the document's own path for the made one's.
    pub(super) fn add_errors(&mut self, made: Self, place: impl Fn(&str) -> String) {
        for mut finding in made.findings.into_iter().filter(Finding::is_error) {
            finding.field = place(&finding.field);
            if !self.findings.iter().any(|said| said.field == finding.field && said.is_error()) {
                self.findings.push(finding);
            }
        }
    }

    /// How much has been said so far, for [`Report::relocate`].
    pub(super) fn mark(&self) -> usize {
        self.findings.len()
    }

    /// Takes the values out of what was said since `mark`.
    pub(super) fn conceal(&mut self, mark: usize) {
        for finding in &mut self.findings[mark..] {
            finding.value.clear();
            finding.message = "is not of the right type; its value is not shown".to_owned();
        }
    }

    /// Changes the paths of what was said since `mark`.
    pub(super) fn relocate(&mut self, mark: usize, place: impl Fn(&str) -> String) {
        for finding in &mut self.findings[mark..] {
            finding.field = place(&finding.field);
        }
    }

    pub(super) fn has_errors(&self) -> bool {
        self.findings.iter().any(Finding::is_error)
    }

    pub(super) fn into_findings(self) -> Vec<Finding> {
        self.findings
    }

    fn lenient(&mut self, field: impl Into<String>, message: &str) {
        if self.strict {
            self.error(field, "", format!("{message} (refused because strict is set)"));
        } else {
            self.warning(field, "", message);
        }
    }
}

/// A value as a finding shows it: strings bare, all else as JSON.
pub(super) fn show(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `path` with the first of `prefixes` that it has put in place of another.
pub(super) fn replace_prefix(path: &str, prefixes: &[(&str, &str)]) -> String {
    let fits = |rest: &str| rest.is_empty() || rest.starts_with(['.', '[']);
    let replaced = prefixes.iter().find_map(|(from, to)| {
        let rest = path.strip_prefix(from).filter(|rest| fits(rest))?;
        Some(format!("{to}{rest}"))
    });
    replaced.unwrap_or_else(|| path.to_owned())
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= VALUE_LIMIT {
        return text.to_owned();
    }
    text.chars().take(VALUE_LIMIT).chain(['…']).collect()
}
