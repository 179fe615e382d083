//! `pilotlight wait`.

use std::time::Duration;

use anyhow::anyhow;
use pilotlight_proto::control::v1::{GetRequest, ListNodesRequest, WatchRequest};
use serde_json::Value;
use tonic::Code;

use crate::{
    apply,
    connect::{Client, ConnectionArgs},
    failure::Failure,
    follow::{self, Reached, follow},
    get::Kind,
    json, output,
    target::Target,
};

/// Between looks at what cannot be watched.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// What to wait for.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Services or nodes: KIND NAME…, KIND/NAME…, or NAME of a service.
    #[arg(required = true, value_name = "KIND/NAME")]
    words: Vec<String>,
    /// condition=NAME, condition=NAME=STATUS (True, False or Unknown), or delete.
    #[arg(long = "for", value_name = "WHAT", value_parser = goal)]
    goal: Goal,
    /// How long to wait for each.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    timeout: Duration,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Goal {
    Condition { name: String, status: String },
    Delete,
}

fn goal(text: &str) -> Result<Goal, String> {
    if text.eq_ignore_ascii_case("delete") {
        return Ok(Goal::Delete);
    }
    let condition = text.strip_prefix("condition=").filter(|condition| !condition.is_empty());
    let condition = condition.ok_or("expected condition=NAME, condition=NAME=STATUS or delete")?;
    let (name, status) = condition.split_once('=').unwrap_or((condition, "True"));
    let known = ["True", "False", "Unknown"].into_iter().find(|known| known.eq_ignore_ascii_case(status));
    let status = known.ok_or("expected the status True, False or Unknown")?.to_owned();
    Ok(Goal::Condition { name: name.to_owned(), status })
}

impl Goal {
    /// Returns `true` if a service, in KServe's shape, meets the goal.
    fn met_by(&self, object: &Value) -> bool {
        let Self::Condition { name, status } = self else { return false };
        let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
        let mut named = conditions.filter(|condition| condition["type"].as_str() == Some(name));
        named.any(|condition| condition["status"].as_str() == Some(status))
    }
}

/// Waits. Exit status 1: the time has passed, or there is nothing to wait for.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let target = Target::parse(&args.words)?;
    if target.names.is_empty() {
        return Err(anyhow!("whose? pilotlight wait --for=condition=Ready isvc/NAME").into());
    }
    for name in &target.names {
        let shown = match target.kind {
            Kind::Services => format!("{}/{name}", apply::resource("InferenceService")),
            Kind::Nodes => format!("node/{name}"),
            _ => return Err(anyhow!("services and nodes can be waited for: pilotlight wait isvc/NAME").into()),
        };
        let session = async |client: Client, reached: &mut Reached| match target.kind {
            Kind::Services => service(client, &args, name, reached).await,
            _ => node(client, &args.goal, name, reached).await,
        };
        let waiting = follow(&connection, args.timeout, session);
        let waiting = tokio::time::timeout(args.timeout, waiting).await;
        waiting.map_err(|_| anyhow!("timed out after {:?} waiting for {shown}", args.timeout))??;
        let met = if args.goal == Goal::Delete { "deleted" } else { "condition met" };
        output::print(&format!("{shown} {met}\n"))?;
    }
    Ok(())
}

async fn service(mut client: Client, args: &Args, name: &str, reached: &mut Reached) -> Result<(), Failure> {
    let request = GetRequest { namespace: args.namespace.clone(), name: name.to_owned() };
    // A watch of a service that is not there would wait for it.
    match client.get(request.clone()).await {
        Err(status) if status.code() == Code::NotFound && args.goal == Goal::Delete => return Ok(()),
        first => drop(first?),
    }
    reached.set();
    let request_watch = WatchRequest { namespace: args.namespace.clone(), name: name.to_owned() };
    let mut changes = client.watch(request_watch).await?.into_inner();
    if args.goal == Goal::Delete
        && let Err(status) = client.get(request).await
        && status.code() == Code::NotFound
    {
        // It went before the watch began.
        return Ok(());
    }
    while let Some(change) = changes.message().await? {
        match (change.deleted, change.service) {
            (true, _) if args.goal == Goal::Delete => return Ok(()),
            (true, _) => return Err(anyhow!("inferenceservice {}/{name} was deleted", args.namespace).into()),
            (false, Some(service)) if args.goal.met_by(&json::service(&service)) => return Ok(()),
            _ => {}
        }
    }
    Err(follow::ended())
}

async fn node(mut client: Client, goal: &Goal, name: &str, reached: &mut Reached) -> Result<(), Failure> {
    loop {
        let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
        reached.set();
        let found = nodes.iter().find(|node| node.name == name);
        let met = match (goal, found) {
            (Goal::Delete, found) => found.is_none(),
            (Goal::Condition { .. }, None) => return Err(anyhow!("node {name} not found").into()),
            (Goal::Condition { name: condition, status }, Some(node)) => {
                let ready = match node.state.as_str() {
                    "Ready" => "True",
                    "Lost" => "False",
                    _ => "Unknown",
                };
                if condition != "Ready" {
                    return Err(anyhow!("{condition:?}: the condition of nodes is Ready").into());
                }
                status == ready
            }
        };
        if met {
            return Ok(());
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_condition_is_met_by_its_status() {
        let object = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        assert!(!goal("condition=Ready").unwrap().met_by(&object));
        assert!(goal("condition=Ready=false").unwrap().met_by(&object));
        assert!(!goal("condition=Other=False").unwrap().met_by(&object));
    }

    #[test]
    fn a_goal_that_is_not_known_is_refused() {
        for bad in ["", "ready", "condition=", "condition=Ready=maybe", "jsonpath={.a}"] {
            assert!(goal(bad).is_err(), "{bad}");
        }
        assert_eq!(goal("delete"), Ok(Goal::Delete));
    }
}
