//! `pilotlight describe`.

use std::fmt::Write as _;

use anyhow::anyhow;
use bytesize::ByteSize;
use pilotlight_proto::control::v1::{
    DescribeRequest, DescribeResponse, Event, ListNodesRequest, ListReplicasRequest, Node, Replica,
};

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
    /// isvc NAME, isvc/NAME, or NAME of a service; node NAME or node/NAME.
    #[arg(required = true, value_name = "KIND/NAME")]
    words: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Shows all about a service, and why it has the replicas it has; or all about a node and its GPUs.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let target = Target::parse(&args.words)?;
    let text = match (target.kind, target.name()?) {
        (Kind::Services, Some(name)) => {
            let request = DescribeRequest { namespace: args.namespace, name: name.to_owned() };
            text(&connection.client()?.describe(request).await?.into_inner())
        }
        (Kind::Nodes, Some(name)) => describe_node(connection, name).await?,
        (Kind::Services, None) => return Err(anyhow!("which one? pilotlight describe isvc NAME").into()),
        (Kind::Nodes, None) => return Err(anyhow!("which one? pilotlight describe node NAME").into()),
        _ => {
            return Err(anyhow!(
                "only services and nodes can be described: pilotlight describe isvc NAME, pilotlight describe node NAME"
            )
            .into());
        }
    };
    output::print(&text.map_err(anyhow::Error::from)?)
}

async fn describe_node(connection: ConnectionArgs, name: &str) -> Result<Result<String, std::fmt::Error>, Failure> {
    let mut client = connection.client()?;
    let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
    let Some(node) = nodes.into_iter().find(|node| node.name == name) else {
        return Err(anyhow!("node {name} not found: no node of this name has joined").into());
    };
    let request = ListReplicasRequest::default();
    let mut replicas = client.list_replicas(request).await?.into_inner().replicas;
    replicas.retain(|replica| replica.node == name);
    Ok(node_text(&node, &replicas))
}

fn node_text(node: &Node, replicas: &[Replica]) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(text, "Name:       {}", node.name)?;
    writeln!(text, "State:      {}", crate::node::state(node))?;
    writeln!(text, "Ingress:    {}", node.ingress_address)?;
    writeln!(text, "Peer:       {}", node.peer_address)?;
    writeln!(text, "Version:    {}", node.agent_version)?;
    writeln!(text, "Capacity:   {} CPU cores, {} of memory", node.cpu_cores, ByteSize(node.memory_bytes))?;
    writeln!(text, "Last seen:  {}", moment(node.last_seen))?;
    for problem in crate::gpu::problems(node) {
        writeln!(text, "Problem:    {problem}")?;
    }
    writeln!(text, "\nLabels:")?;
    let mut labels: Vec<_> = node.labels.iter().collect();
    labels.sort_unstable();
    labels.into_iter().try_for_each(|(key, value)| writeln!(text, "  {key}={value}"))?;
    section(&mut text, "GPUs", crate::gpu::table(std::slice::from_ref(node)), node.gpus.is_empty())?;
    section(&mut text, "Replicas", replica_table(replicas), replicas.is_empty())?;
    gpu_memory(&mut text, replicas)?;
    events(&mut text, &node.events)?;
    Ok(without_trailing_spaces(&text))
}

/// GPU memory that replicas use, beside what was set aside for them.
fn gpu_memory(text: &mut String, replicas: &[Replica]) -> std::fmt::Result {
    let mut table = Table::new(&["REPLICA", "USED", "REQUESTED"]);
    let with_gpus: Vec<_> = replicas.iter().filter(|replica| replica.gpu_memory_requested_bytes > 0).collect();
    for replica in &with_gpus {
        let used = replica.gpu_memory_bytes.map_or("unknown".to_owned(), |bytes| ByteSize(bytes).to_string());
        table.row([replica.name.clone(), used, ByteSize(replica.gpu_memory_requested_bytes).to_string()]);
    }
    if with_gpus.is_empty() { Ok(()) } else { section(text, "GPU memory", table.text(), false) }
}

fn events(text: &mut String, events: &[Event]) -> std::fmt::Result {
    let mut table = Table::new(&["TIME", "TYPE", "REASON", "OBJECT", "MESSAGE"]);
    for event in events {
        let cells = [moment(event.time), event.r#type.clone(), event.reason.clone(), event.object.clone()];
        table.row(cells.into_iter().chain([event.message.clone()]));
    }
    section(text, "Events", table.text(), events.is_empty())
}

fn without_trailing_spaces(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
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
    gpu_memory(&mut text, &answer.replicas)?;
    section(&mut text, "Scaling decisions", decision_table(&answer.decisions), answer.decisions.is_empty())?;
    events(&mut text, &answer.events)?;
    Ok(without_trailing_spaces(&text))
}

fn section(text: &mut String, title: &str, table: String, empty: bool) -> std::fmt::Result {
    if empty {
        return writeln!(text, "\n{title}: none");
    }
    writeln!(text, "\n{title}:")?;
    table.lines().try_for_each(|line| writeln!(text, "  {line}"))
}
