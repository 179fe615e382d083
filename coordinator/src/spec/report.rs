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

    /// A field that nobody knows: an error where the caller asked for strictness.
    pub(super) fn unknown(&mut self, field: impl Into<String>) {
        self.lenient(field, "unknown field, ignored");
    }

    /// A field that is known but has no effect; `consequence` says what happens instead.
    pub(super) fn unsupported(&mut self, field: impl Into<String>, consequence: &str) {
        self.lenient(field, &format!("not honoured by this version: {consequence}"));
    }

    pub(super) fn add(&mut self, findings: Vec<Finding>) {
        self.findings.extend(findings);
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

fn shorten(text: &str) -> String {
    if text.chars().count() <= VALUE_LIMIT {
        return text.to_owned();
    }
    text.chars().take(VALUE_LIMIT).chain(['…']).collect()
}
