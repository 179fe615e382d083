//! The YAML file: one section per command, one key per flag. What it says is put below flags and
//! variables as their default, so that clap alone decides what wins.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, anyhow, bail};
use clap::Command;
use serde_norway::Value;

use crate::failure::Failure;

/// Section for the flags that all commands share.
const SHARED: &str = "client";
/// Sections for commands that have settings.
const SECTIONS: [&str; 4] = [SHARED, "dev", "coordinator", "agent"];

/// Takes the file's settings into the command.
pub fn with_file(command: Command, arguments: &[OsString]) -> Result<Command, Failure> {
    let Some(path) = path(arguments) else { return Ok(command) };
    let text = std::fs::read_to_string(&path).with_context(|| format!("config: {}", path.display()))?;
    Ok(with_text(command, &text).with_context(|| format!("config: {}", path.display()))?)
}

/// The file named by flag or variable, else the user's own if it is there.
fn path(arguments: &[OsString]) -> Option<PathBuf> {
    for (index, argument) in arguments.iter().enumerate() {
        match argument.to_str() {
            Some("--config") => return arguments.get(index + 1).map(PathBuf::from),
            Some("--") => break,
            Some(text) => {
                if let Some(path) = text.strip_prefix("--config=") {
                    return Some(path.into());
                }
            }
            None => {}
        }
    }
    if let Some(path) = std::env::var_os("PILOTLIGHT_CONFIG").filter(|path| !path.is_empty()) {
        return Some(path.into());
    }
    let home = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")))?;
    let own = home.join("pilotlight/config.yaml");
    own.is_file().then_some(own)
}

fn with_text(mut command: Command, text: &str) -> anyhow::Result<Command> {
    let content: Value = serde_norway::from_str(text)?;
    let sections = match content {
        Value::Null => return Ok(command),
        Value::Mapping(sections) => sections,
        _ => bail!("expected a mapping of sections: {}", SECTIONS.join(", ")),
    };
    for (name, section) in sections {
        let name = name.as_str().map(str::to_owned).ok_or_else(|| anyhow!("section names are text"))?;
        if !SECTIONS.contains(&name.as_str()) {
            bail!("unknown section {name:?}{}", suggest(&name, SECTIONS.into_iter()));
        }
        let keys = match section {
            Value::Null => continue,
            Value::Mapping(keys) => keys,
            _ => bail!("{name}: expected a mapping of settings"),
        };
        for (key, value) in keys {
            let key = key.as_str().map(str::to_owned).ok_or_else(|| anyhow!("{name}: keys are text"))?;
            let values = values(&value).with_context(|| format!("{name}.{key}"))?;
            command = if name == SHARED {
                set(command, &name, &key, values)?
            } else {
                let inner = command.find_subcommand(&name).cloned().ok_or_else(|| anyhow!("no command {name}"))?;
                let inner = set(inner, &name, &key, values)?;
                command.mut_subcommand(&name, |_| inner)
            };
        }
    }
    Ok(command)
}

/// Makes the values the default of the flag that the key names.
fn set(command: Command, section: &str, key: &str, values: Vec<String>) -> anyhow::Result<Command> {
    let flags: Vec<(String, String)> = command
        .get_arguments()
        .filter_map(|argument| Some((camel(argument.get_long()?), argument.get_id().to_string())))
        .filter(|(flag, _)| flag != "config")
        .collect();
    let Some((_, id)) = flags.iter().find(|(flag, _)| flag == key) else {
        bail!("{section}: unknown key {key:?}{}", suggest(key, flags.iter().map(|(flag, _)| flag.as_str())));
    };
    Ok(command.mut_arg(id, |argument| argument.default_values(values).required(false)))
}

fn values(value: &Value) -> anyhow::Result<Vec<String>> {
    Ok(match value {
        Value::String(text) => vec![text.clone()],
        Value::Bool(flag) => vec![flag.to_string()],
        Value::Number(number) => vec![number.to_string()],
        Value::Sequence(list) => list.iter().map(values).collect::<anyhow::Result<Vec<_>>>()?.concat(),
        _ => bail!("expected text, a number, true or false, or a list of these"),
    })
}

/// `listen-http` is `listenHttp`.
fn camel(flag: &str) -> String {
    let mut words = flag.split('-');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |camel, word| {
        let (head, tail) = word.split_at(word.len().min(1));
        camel + &head.to_ascii_uppercase() + tail
    })
}

fn suggest<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<_> = known.collect();
    let nearest =
        known.iter().map(|name| (strsim::jaro_winkler(given, name), *name)).max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((likeness, name)) if likeness > 0.8 => format!("; did you mean {name:?}?"),
        _ => format!("; known are: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn command() -> Command {
        let listen = Arg::new("listen_http").long("listen-http").env("PL_TEST_LISTEN").default_value("a").global(false);
        let label = Arg::new("label").long("label").action(clap::ArgAction::Append);
        Command::new("t")
            .arg(Arg::new("server").long("server"))
            .subcommand(Command::new("agent").arg(listen).arg(label))
    }

    fn listens(text: &str, arguments: &[&str]) -> String {
        let matches = with_text(command(), text).unwrap().get_matches_from([&["t", "agent"], arguments].concat());
        matches.subcommand().unwrap().1.get_one::<String>("listen_http").unwrap().clone()
    }

    #[test]
    fn the_file_is_below_flags_and_above_defaults() {
        assert_eq!(listens("", &[]), "a");
        assert_eq!(listens("agent: {listenHttp: b}", &[]), "b");
        assert_eq!(listens("agent: {listenHttp: b}", &["--listen-http", "c"]), "c");
    }

    #[test]
    fn lists_and_shared_settings_are_taken() {
        let matches = with_text(command(), "client: {server: s}\nagent: {label: [x=1, y=2]}").unwrap();
        let matches = matches.get_matches_from(["t", "agent"]);
        assert_eq!(matches.get_one::<String>("server").unwrap(), "s");
        let labels: Vec<_> = matches.subcommand().unwrap().1.get_many::<String>("label").unwrap().collect();
        assert_eq!(labels, ["x=1", "y=2"]);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text| with_text(command(), text).unwrap_err().to_string();
        assert_eq!(error("agent: {listenHtp: b}"), "agent: unknown key \"listenHtp\"; did you mean \"listenHttp\"?");
        assert_eq!(error("agnet: {}"), "unknown section \"agnet\"; did you mean \"agent\"?");
        assert!(error("- a").contains("sections"));
        assert!(
            format!("{:#}", with_text(command(), "agent: {listenHttp: {a: 1}}").unwrap_err())
                .contains("agent.listenHttp")
        );
    }
}
