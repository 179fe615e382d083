//! `pilotlight rollout`: watch a roll-out, go back, go on.

use std::{io::Write as _, time::Duration};

use anyhow::{Context as _, anyhow};
use pilotlight_proto::control::v1::{
    ApplyOutcome, ApplyRequest, GetRequest, ListRevisionsRequest, Service, WatchRequest,
};
use serde_json::{Value, json};

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    json, output,
    table::{Table, moment},
};

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Wait until what was applied last serves; exit status 1 where it has failed.
    Status(StatusArgs),
    /// Send all requests back to the revision that had them before (canaryTrafficPercent: 0).
    Undo(Args),
    /// Send all requests to the newest revision (without canaryTrafficPercent).
    Promote(Args),
    /// Replace all replicas: makes a new revision that differs by an annotation only, and rolls it out.
    Restart(Args),
    /// List the revisions that there are, the newest first.
    History(Args),
}

/// Annotation whose value tells restarts apart, as kubectl sets it.
const RESTARTED_AT: &str = "kubectl.kubernetes.io/restartedAt";

/// Whose roll-out.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Service; `isvc/NAME` is the same.
    name: String,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Whose roll-out, and for how long to wait.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    of: Args,
    /// Only say how it is now.
    #[arg(long)]
    no_watch: bool,
    /// Give up waiting after this long.
    #[arg(long, value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

impl Args {
    fn name(&self) -> &str {
        self.name.rsplit_once('/').map_or(&self.name, |(_, name)| name)
    }
}

/// Does it.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let client = connection.client()?;
    match command {
        Command::Status(args) => match args.timeout {
            None => status(client, &args).await,
            Some(timeout) => tokio::time::timeout(timeout, status(client, &args))
                .await
                .map_err(|_| anyhow!("{} is not rolled out after {timeout:?}", args.of.name()))?,
        },
        Command::Undo(args) => undo(client, &args).await,
        Command::Promote(args) => promote(client, &args).await,
        Command::Restart(args) => restart(client, &args).await,
        Command::History(args) => history(client, &args).await,
    }
}

/// How far a roll-out is.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Done(String),
    Failed(String),
    Waiting(String),
}

fn stage(service: &Service) -> Stage {
    let object = json::service(service);
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let predictor = conditions.into_iter().find(|condition| condition["type"] == "PredictorReady").unwrap_or_default();
    let text = |key: &str| predictor[key].as_str().unwrap_or_default().to_owned();
    let newest = &service.latest_created_revision;
    match (text("status").as_str(), text("reason").as_str()) {
        ("True", _) if *newest == service.latest_ready_revision => {
            Stage::Done(format!("{newest}: {}", shares(&object)))
        }
        (_, "ProgressDeadlineExceeded" | "Stopped") => Stage::Failed(format!("{newest}: {}", text("message"))),
        _ => Stage::Waiting(format!("{newest}: {} {}", text("reason"), text("message")).trim().to_owned()),
    }
}

/// The shares in words.
fn shares(object: &Value) -> String {
    let traffic = object["status"]["components"]["predictor"]["traffic"].as_array().cloned().unwrap_or_default();
    let share =
        |target: &Value| format!("{}% to {}", target["percent"], target["revisionName"].as_str().unwrap_or("?"));
    traffic.iter().map(share).collect::<Vec<_>>().join(", ")
}

async fn status(mut client: Client, args: &StatusArgs) -> Result<(), Failure> {
    let (namespace, name) = (args.of.namespace.clone(), args.of.name().to_owned());
    // A watch of a service that is not there would wait for it.
    let first = client.get(GetRequest { namespace: namespace.clone(), name: name.clone() }).await?.into_inner();
    if args.no_watch {
        return told(stage(&first.service.unwrap_or_default()));
    }
    let mut changes = client.watch(WatchRequest { namespace, name }).await?.into_inner();
    let mut said = String::new();
    while let Some(change) = changes.message().await? {
        if change.deleted {
            return Err(anyhow!("{} was deleted", args.of.name()).into());
        }
        match stage(&change.service.unwrap_or_default()) {
            Stage::Waiting(message) if message == said => {}
            Stage::Waiting(message) => {
                writeln!(std::io::stderr(), "waiting for {message}")?;
                said = message;
            }
            over => return told(over),
        }
    }
    Err(anyhow!("the coordinator has ended the watch").into())
}

fn told(stage: Stage) -> Result<(), Failure> {
    match stage {
        Stage::Done(message) => output::print(&format!("rolled out: {message}\n")),
        Stage::Waiting(message) => output::print(&format!("waiting for {message}\n")),
        Stage::Failed(message) => Err(anyhow!("failed: {message}").into()),
    }
}

async fn undo(mut client: Client, args: &Args) -> Result<(), Failure> {
    let mut object = object(&mut client, args).await?;
    let predictor = &object["status"]["components"]["predictor"];
    let (ready, rolledout) = (&predictor["latestReadyRevision"], &predictor["latestRolledoutRevision"]);
    let newest = &predictor["latestCreatedRevision"];
    if ready == rolledout && ready == newest && predictor["previousRolledoutRevision"].is_null() {
        return Err(anyhow!("{} has no former revision to go back to", args.name()).into());
    }
    object["spec"]["predictor"]["canaryTrafficPercent"] = json!(0);
    apply(&mut client, args, &object).await?;
    report(&mut client, args, "rolled back").await
}

async fn promote(mut client: Client, args: &Args) -> Result<(), Failure> {
    let mut object = object(&mut client, args).await?;
    let removed = object["spec"]["predictor"].as_object_mut().and_then(|spec| spec.remove("canaryTrafficPercent"));
    if removed.is_none() {
        return Err(anyhow!("{} has no canaryTrafficPercent; its newest revision has all requests", args.name()).into());
    }
    apply(&mut client, args, &object).await?;
    report(&mut client, args, "promoted").await
}

async fn restart(mut client: Client, args: &Args) -> Result<(), Failure> {
    let mut object = object(&mut client, args).await?;
    set_restarted_at(&mut object, &jiff::Timestamp::now().to_string());
    apply(&mut client, args, &object).await?;
    output::print(&format!("inferenceservice.serving.kserve.io/{} restarted\n", args.name()))
}

/// Annotates all components of a service, so that each gets a new revision.
fn set_restarted_at(object: &mut Value, time: &str) {
    for component in ["predictor", "transformer", "explainer"] {
        if object["spec"][component].is_object() {
            object["spec"][component]["annotations"][RESTARTED_AT] = json!(time);
        }
    }
}

async fn history(mut client: Client, args: &Args) -> Result<(), Failure> {
    let request = ListRevisionsRequest { namespace: args.namespace.clone(), service: args.name().to_owned() };
    let mut revisions = client.list_revisions(request).await?.into_inner().revisions;
    if revisions.is_empty() {
        return Err(anyhow!("service {} has no revision in namespace {}", args.name(), args.namespace).into());
    }
    revisions.sort_by_key(|revision| std::cmp::Reverse(revision.created_at.map(|time| (time.seconds, time.nanos))));
    let mut table = Table::new(&["REVISION", "GENERATION", "READY", "TRAFFIC", "CREATED", "MESSAGE"]);
    for revision in revisions {
        table.row([
            revision.name,
            revision.generation.to_string(),
            if revision.ready { "True" } else { "False" }.to_owned(),
            format!("{}%", revision.traffic_percent),
            moment(revision.created_at),
            revision.message,
        ]);
    }
    output::print(&table.text())
}

async fn object(client: &mut Client, args: &Args) -> Result<Value, Failure> {
    let request = GetRequest { namespace: args.namespace.clone(), name: args.name().to_owned() };
    let service = client.get(request).await?.into_inner().service.context("no answer")?;
    Ok(json::service(&service))
}

async fn apply(client: &mut Client, args: &Args, object: &Value) -> Result<(), Failure> {
    let request = ApplyRequest {
        manifest: object.to_string(),
        source: "rollout".to_owned(),
        namespace: args.namespace.clone(),
        ..Default::default()
    };
    let results = client.apply(request).await?.into_inner().results;
    let refused = results.iter().find(|result| result.outcome() == ApplyOutcome::Refused);
    let errors = refused.map(|result| result.findings.iter().filter(|finding| finding.error));
    match errors {
        None => Ok(()),
        Some(errors) => {
            let errors: Vec<_> = errors.map(|finding| format!("{}: {}", finding.field, finding.message)).collect();
            Err(anyhow!("refused: {}", errors.join("; ")).into())
        }
    }
}

async fn report(client: &mut Client, args: &Args, what: &str) -> Result<(), Failure> {
    let object = object(client, args).await?;
    output::print(&format!("inferenceservice.serving.kserve.io/{} {what}: {}\n", args.name(), shares(&object)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(status: &str, reason: &str, ready: &str) -> Service {
        let object = json!({"status": {
            "conditions": [{"type": "PredictorReady", "status": status, "reason": reason, "message": "why"}],
            "components": {"predictor": {"traffic": [
                {"percent": 10, "revisionName": "iris-predictor-00002"},
                {"percent": 90, "revisionName": "iris-predictor-00001"},
            ]}},
        }});
        Service {
            latest_created_revision: "iris-predictor-00002".into(),
            latest_ready_revision: ready.into(),
            object_json: object.to_string(),
            ..Default::default()
        }
    }

    #[test]
    fn a_restart_changes_each_component_that_there_is() {
        let mut object = json!({"spec": {"predictor": {"annotations": {"a": "b"}}, "transformer": {}}});
        set_restarted_at(&mut object, "now");
        let spec = json!({
            "predictor": {"annotations": {"a": "b", RESTARTED_AT: "now"}},
            "transformer": {"annotations": {RESTARTED_AT: "now"}},
        });
        assert_eq!(object["spec"], spec);
    }

    #[test]
    fn stages() {
        let done = stage(&service("True", "", "iris-predictor-00002"));
        let shares = "iris-predictor-00002: 10% to iris-predictor-00002, 90% to iris-predictor-00001";
        assert_eq!(done, Stage::Done(shares.into()));
        let failed = stage(&service("False", "ProgressDeadlineExceeded", "iris-predictor-00001"));
        assert_eq!(failed, Stage::Failed("iris-predictor-00002: why".into()));
        let crashing = stage(&service("False", "CrashLoopBackOff", "iris-predictor-00001"));
        assert_eq!(crashing, Stage::Waiting("iris-predictor-00002: CrashLoopBackOff why".into()));
    }
}
