//! Writing for the user.

use std::{
    io::{IsTerminal, Write as _, stdout},
    str::FromStr,
};

use crate::{failure::Failure, jsonpath::Template};

/// How lists look.
#[derive(Debug, Clone, Default)]
pub enum Format {
    /// Columns.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// `KIND/NAME` lines.
    Name,
    /// A JSONPath template, filled in.
    JsonPath(Template),
}

impl Format {
    /// Returns `true` if whole objects are printed, or parts of them.
    pub fn is_structured(&self) -> bool {
        matches!(self, Self::Json | Self::Yaml | Self::JsonPath(_))
    }

    /// Returns `true` for tables with more columns.
    pub fn is_wide(&self) -> bool {
        matches!(self, Self::Wide)
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("jsonpath", template)) => return Ok(Self::JsonPath(template.parse()?)),
            Some(_) => {}
            None => match text {
                "table" => return Ok(Self::Table),
                "wide" => return Ok(Self::Wide),
                "json" => return Ok(Self::Json),
                "yaml" => return Ok(Self::Yaml),
                "name" => return Ok(Self::Name),
                _ => {}
            },
        }
        Err("expected table, wide, json, yaml, name or jsonpath=TEMPLATE".to_owned())
    }
}

/// Prints text.
pub fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

/// Prints bytes as they are.
pub fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Prints a value as JSON or YAML, or what a template makes of it.
pub fn print_value(value: &serde_json::Value, format: &Format) -> Result<(), Failure> {
    match format {
        // As kubectl: no line break but the template's own.
        Format::JsonPath(template) => print(&template.render(value)),
        Format::Yaml => print(&serde_norway::to_string(value).map_err(anyhow::Error::from)?),
        _ => print(&format!("{value:#}\n")),
    }
}

/// True where colours are welcome: on a terminal, unless NO_COLOR is set.
pub fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A word in green, yellow or red where colours are welcome on standard output.
pub fn paint(word: &str, mood: Mood) -> String {
    if !colours(&stdout()) {
        return word.to_owned();
    }
    let code = match mood {
        Mood::Good => 32,
        Mood::Waiting => 33,
        Mood::Bad => 31,
    };
    format!("\u{1b}[{code}m{word}\u{1b}[0m")
}

/// What a word stands for.
#[derive(Debug, Clone, Copy)]
pub enum Mood {
    /// All is well.
    Good,
    /// It may become well.
    Waiting,
    /// It is not well.
    Bad,
}
