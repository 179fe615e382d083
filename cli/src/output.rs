//! Writing for the user.

use std::io::{IsTerminal, Write as _, stdout};

use clap::ValueEnum;

use crate::failure::Failure;

/// How lists look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For people with wide screens.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
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

/// Prints a value as JSON or YAML.
pub fn print_value(value: &serde_json::Value, format: Format) -> Result<(), Failure> {
    match format {
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
