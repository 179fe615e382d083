//! `pilotlight apply`.

use std::{
    io::{Read as _, Write as _, stderr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use pilotlight_proto::control::v1::{ApplyOutcome, ApplyRequest, ApplyResult};

use crate::{connect::ConnectionArgs, failure::Failure, output};

/// What to apply, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File, directory or - for standard input; may be given again.
    #[arg(short = 'f', long = "filename", required = true, value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Namespace for documents that name none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Refuse unknown and unsupported fields instead of warning.
    #[arg(long)]
    strict: bool,
    /// Only say what would happen.
    #[arg(long, default_value = "none", default_missing_value = "server", num_args = 0..=1, require_equals = true)]
    dry_run: DryRun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DryRun {
    None,
    Server,
}

/// Applies each file; a refused document does not keep the others from being applied.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let mut client = connection.client()?;
    let mut refused = false;
    for (source, manifest) in read(&args.files)? {
        let request = ApplyRequest {
            manifest,
            source: source.clone(),
            namespace: args.namespace.clone(),
            strict: args.strict,
            dry_run: args.dry_run == DryRun::Server,
        };
        for result in client.apply(request).await?.into_inner().results {
            refused |= result.outcome() == ApplyOutcome::Refused;
            report(&source, &result, args.dry_run)?;
        }
    }
    if refused { Err(Failure::Refused) } else { Ok(()) }
}

fn report(source: &str, result: &ApplyResult, dry_run: DryRun) -> Result<(), Failure> {
    for finding in &result.findings {
        let level = if finding.error { "error" } else { "warning" };
        let place = match (finding.line, finding.column) {
            (0, _) => source.to_owned(),
            (line, column) => format!("{source}:{line}:{column}"),
        };
        let field = if finding.field.is_empty() { String::new() } else { format!("{}: ", finding.field) };
        let value = if finding.value.is_empty() { String::new() } else { format!(" (got {})", finding.value) };
        writeln!(stderr(), "{place}: {level}: {field}{}{value}", finding.message)?;
    }
    let outcome = match result.outcome() {
        ApplyOutcome::Created => "created",
        ApplyOutcome::Configured => "configured",
        ApplyOutcome::Unchanged => "unchanged",
        ApplyOutcome::Refused | ApplyOutcome::Unspecified => return Ok(()),
    };
    let dry = if dry_run == DryRun::Server { " (server dry run)" } else { "" };
    output::print(&format!("inferenceservice.serving.kserve.io/{} {outcome}{dry}\n", result.name))
}

/// Names and contents of the files, those of directories included.
pub fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<(String, String)>> {
    let mut read = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            read.push(("standard input".to_owned(), text));
        } else if path.is_dir() {
            let mut files: Vec<PathBuf> = std::fs::read_dir(path)
                .with_context(|| path.display().to_string())?
                .flatten()
                .map(|entry| entry.path())
                .filter(|file| file.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json"))
                .collect();
            files.sort();
            if files.is_empty() {
                bail!("{}: no .yaml, .yml or .json file in it", path.display());
            }
            read.extend(self::read(&files)?);
        } else {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            read.push((path.display().to_string(), text));
        }
    }
    Ok(read)
}
