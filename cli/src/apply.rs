//! `pilotlight apply`.

use std::io::{Write as _, stderr};

use clap::ValueEnum;
use pilotlight_proto::control::v1::{ApplyOutcome, ApplyRequest, ApplyResult};

use crate::{
    connect::ConnectionArgs,
    dry_run,
    failure::Failure,
    manifests::{Files, Manifest},
    output,
};

/// What to apply, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// Namespace for documents that name none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Refuse unknown and unsupported fields instead of warning, and apply all of a file or nothing.
    #[arg(long)]
    strict: bool,
    /// Only say what would happen: by the coordinator, or by this program alone.
    #[arg(long, default_value = "none", default_missing_value = "server", num_args = 0..=1, require_equals = true)]
    dry_run: DryRun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DryRun {
    None,
    Client,
    Server,
}

/// Applies each file; a refused document does not keep the others from being applied.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let manifests = args.files.read()?;
    if args.dry_run == DryRun::Client {
        return dry_run::run(&manifests, &args.namespace, args.strict);
    }
    let mut client = connection.client()?;
    let mut refused = false;
    for Manifest { source, text } in manifests {
        let request = ApplyRequest {
            manifest: text,
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

/// Tells what there is to say about a document.
pub fn report_findings(source: &str, result: &ApplyResult) -> Result<(), Failure> {
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
    Ok(())
}

fn report(source: &str, result: &ApplyResult, dry_run: DryRun) -> Result<(), Failure> {
    report_findings(source, result)?;
    let outcome = match result.outcome() {
        ApplyOutcome::Created => "created",
        ApplyOutcome::Configured => "configured",
        ApplyOutcome::Unchanged => "unchanged",
        ApplyOutcome::NotKept => "understood, not kept",
        ApplyOutcome::Refused | ApplyOutcome::Unspecified => return Ok(()),
    };
    let dry = if dry_run == DryRun::Server { " (server dry run)" } else { "" };
    output::print(&format!("{}/{} {outcome}{dry}\n", resource(&result.kind), result.name))
}

/// The kind as kubectl writes it, with its group.
pub fn resource(kind: &str) -> String {
    let group = match kind {
        "InferenceService" | "ServingRuntime" | "ClusterServingRuntime" => ".serving.kserve.io",
        "Service" => ".serving.knative.dev",
        _ => "",
    };
    format!("{}{group}", kind.to_lowercase())
}
