//! `pilotlight diff`.

use std::io::{Write as _, stderr};

use pilotlight_proto::control::v1::{ApplyOutcome, ApplyRequest, ApplyResult};
use serde_json::Value;
use similar::TextDiff;

use crate::{
    apply,
    connect::ConnectionArgs,
    failure::Failure,
    manifests::{Files, Manifest},
    output,
};

/// What to compare.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// Namespace for documents that name none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Compares objects as they are with what an apply would make of them. Nothing is changed.
///
/// # Errors
/// They differ ([`Failure::Differs`]), or they cannot be compared ([`Failure::NotCompared`]).
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    match compare(connection, args).await {
        Ok(false) => Ok(()),
        Ok(true) => Err(Failure::Differs),
        Err(Failure::Error(error) | Failure::Disconnected(error)) => Err(Failure::NotCompared(Some(error))),
        Err(Failure::Refused) => Err(Failure::NotCompared(None)),
        Err(other) => Err(other),
    }
}

async fn compare(connection: ConnectionArgs, args: Args) -> Result<bool, Failure> {
    let mut client = connection.client()?;
    let (mut differs, mut refused) = (false, false);
    for Manifest { source, text } in args.files.read()? {
        let request = ApplyRequest {
            manifest: text,
            source: source.clone(),
            namespace: args.namespace.clone(),
            strict: false,
            dry_run: true,
        };
        for result in client.apply(request).await?.into_inner().results {
            if result.outcome() == ApplyOutcome::Refused {
                refused = true;
                apply::report_findings(&source, &result)?;
                continue;
            }
            let diff = unified(&result)?;
            differs |= !diff.is_empty();
            output::print(&diff)?;
        }
    }
    if refused {
        writeln!(stderr(), "error: what is refused cannot be compared")?;
        return Err(Failure::Refused);
    }
    Ok(differs)
}

/// The difference in lines, empty where there is none.
fn unified(result: &ApplyResult) -> Result<String, Failure> {
    let (stored, object) = (yaml(&result.stored_json)?, yaml(&result.object_json)?);
    if result.outcome() == ApplyOutcome::NotKept || stored == object {
        return Ok(String::new());
    }
    let name = format!("{}/{}/{}", result.kind, result.namespace, result.name);
    let (before, after) = (format!("stored/{name}"), format!("applied/{name}"));
    Ok(TextDiff::from_lines(&stored, &object).unified_diff().header(&before, &after).to_string())
}

fn yaml(json: &str) -> Result<String, Failure> {
    if json.is_empty() {
        return Ok(String::new());
    }
    let value: Value = serde_json::from_str(json).map_err(anyhow::Error::from)?;
    Ok(serde_norway::to_string(&value).map_err(anyhow::Error::from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_shown() {
        let mut result = ApplyResult {
            kind: "Secret".into(),
            namespace: "default".into(),
            name: "s".into(),
            object_json: r#"{"a": 1, "b": 2}"#.into(),
            stored_json: r#"{"b": 2, "a": 1}"#.into(),
            ..ApplyResult::default()
        };
        assert_eq!(unified(&result).unwrap(), "", "the order of keys does not count");
        result.stored_json = r#"{"a": 1, "b": 3}"#.into();
        let expected =
            "--- stored/Secret/default/s\n+++ applied/Secret/default/s\n@@ -1,2 +1,2 @@\n a: 1\n-b: 3\n+b: 2\n";
        assert_eq!(unified(&result).unwrap(), expected);
        result.stored_json.clear();
        assert!(unified(&result).unwrap().ends_with("+a: 1\n+b: 2\n"));
    }
}
