//! What there is to say about a manifest: errors and warnings by field path.

use std::fmt;

/// Whether a finding refuses its document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The document is accepted; the user should know.
    Warning,
    /// The document is refused.
    Error,
}

/// One thing to say about a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Error or warning.
    pub severity: Severity,
    /// Path such as `spec.predictor.minReplicas`; empty where the whole document is meant.
    pub field: String,
    /// The value as given, empty where there is none.
    pub value: String,
    /// What is wrong and what is allowed, lower case, no full stop.
    pub message: String,
    /// Line and column in the file, from 1, where known.
    pub position: Option<(u32, u32)>,
}

impl Finding {
    /// An error at `field`.
    pub fn error(field: impl Into<String>, value: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, field, value, message)
    }

    /// A warning at `field`.
    pub fn warning(field: impl Into<String>, value: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, field, value, message)
    }

    fn new(severity: Severity, field: impl Into<String>, value: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { severity, field: field.into(), value: value.to_string(), message: message.into(), position: None }
    }

    /// True where the finding refuses its document.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        if !self.value.is_empty() {
            write!(f, " (got {})", self.value)?;
        }
        Ok(())
    }
}
