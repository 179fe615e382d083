//! `pilotlight describe`.

use std::fmt::Write as _;

use anyhow::anyhow;
use pilotlight_proto::control::v1::{DescribeRequest, DescribeResponse};

use crate::{
    connect::ConnectionArgs,
    failure::Failure,
    get::{Kind, decision_table, replica_table},
    output,
    table::{Table, moment},
    target::Target,
};

/// What to show.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// isvc NAME, isvc/NAME, or NAME of a service.
    #[arg(required = true, value_name = "KIND/NAME")]
    words: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Shows all about a service, and why it has the replicas it has.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let target = Target::parse(&args.words)?;
    let name = match (target.kind, target.name()?) {
        (Kind::Services, Some(name)) => name.to_owned(),
        (Kind::Services, None) => return Err(anyhow!("which one? pilotlight describe isvc NAME").into()),
        _ => return Err(anyhow!("only services can be described: pilotlight describe isvc NAME").into()),
    };
    let request = DescribeRequest { namespace: args.namespace, name };
    let answer = connection.client()?.describe(request).await?.into_inner();
    output::print(&text(&answer).map_err(anyhow::Error::from)?)
}

fn text(answer: &DescribeResponse) -> Result<String, std::fmt::Error> {
    let service = answer.service.clone().unwrap_or_default();
    let max = if service.max_replicas == 0 { "no limit".to_owned() } else { service.max_replicas.to_string() };
    let mut text = String::new();
    writeln!(text, "Name:       {}", service.name)?;
    writeln!(text, "Namespace:  {}", service.namespace)?;
    writeln!(text, "URL:        {}", service.url)?;
    writeln!(text, "Ready:      {} {} {}", service.ready, service.reason, service.message)?;
    writeln!(
        text,
        "Replicas:   {} ready, {} starting, {} wanted (min {}, max {max}); {} requests waiting",
        service.ready_replicas,
        service.starting_replicas,
        service.desired_replicas,
        service.min_replicas,
        service.queue_depth
    )?;
    writeln!(text, "Created:    {}", moment(service.created_at))?;
    writeln!(text, "\nRevisions:")?;
    for revision in &answer.revisions {
        let ready = if revision.ready { "ready" } else { "not ready" };
        writeln!(
            text,
            "  {}  {ready}, {}% of requests  {}",
            revision.name, revision.traffic_percent, revision.message
        )?;
    }
    section(&mut text, "Replicas", replica_table(&answer.replicas), answer.replicas.is_empty())?;
    section(&mut text, "Scaling decisions", decision_table(&answer.decisions), answer.decisions.is_empty())?;
    let mut events = Table::new(&["TIME", "TYPE", "REASON", "OBJECT", "MESSAGE"]);
    for event in &answer.events {
        let cells = [moment(event.time), event.r#type.clone(), event.reason.clone(), event.object.clone()];
        events.row(cells.into_iter().chain([event.message.clone()]));
    }
    section(&mut text, "Events", events.text(), answer.events.is_empty())?;
    Ok(text.lines().map(|line| format!("{}\n", line.trim_end())).collect())
}

fn section(text: &mut String, title: &str, table: String, empty: bool) -> std::fmt::Result {
    if empty {
        return writeln!(text, "\n{title}: none");
    }
    writeln!(text, "\n{title}:")?;
    table.lines().try_for_each(|line| writeln!(text, "  {line}"))
}
