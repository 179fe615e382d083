//! `pilotlight get`.

use clap::ValueEnum;
use pilotlight_proto::control::v1::{
    self as control, GetRequest, ListDecisionsRequest, ListNodesRequest, ListObjectsRequest, ListReplicasRequest,
    ListRequest, ListRevisionsRequest, ListUsageRequest, Service, WatchRequest,
};
use serde_json::Value;

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    json,
    output::{self, Format, Mood, paint},
    table::{Table, age, moment},
};

/// What to list.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kind.
    #[arg(default_value = "services")]
    kind: Kind,
    /// Only this one; for decisions, whose.
    name: Option<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Format.
    #[arg(short, long, default_value = "table")]
    output: Format,
    /// Print each change from now on; services only.
    #[arg(short, long)]
    watch: bool,
}

/// What can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// InferenceServices.
    #[value(alias = "service", alias = "isvc", alias = "inferenceservice", alias = "inferenceservices", alias = "svc")]
    Services,
    /// Nodes.
    #[value(alias = "node", alias = "no")]
    Nodes,
    /// Revisions.
    #[value(alias = "revision", alias = "rev")]
    Revisions,
    /// Replicas.
    #[value(alias = "replica", alias = "pods", alias = "pod", alias = "po")]
    Replicas,
    /// Scaling decisions of one service.
    #[value(alias = "decision")]
    Decisions,
    /// Serving runtimes, built-in ones too.
    #[value(alias = "runtime", alias = "servingruntimes", alias = "clusterservingruntimes")]
    Runtimes,
    /// Secrets, without their values.
    #[value(alias = "secret")]
    Secrets,
    /// Config maps, without their values.
    #[value(alias = "configmap", alias = "cm")]
    Configmaps,
    /// What services used, by hour and GPU class.
    Usage,
}

/// Lists.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let client = connection.client()?;
    let namespace = if args.all_namespaces { String::new() } else { args.namespace.clone() };
    match args.kind {
        Kind::Services if args.watch => watch(client, &args, namespace).await,
        _ if args.watch => Err(anyhow::anyhow!("--watch works for services only").into()),
        Kind::Services => services(client, &args, namespace).await,
        Kind::Nodes => nodes(client, &args).await,
        Kind::Revisions => revisions(client, &args, namespace).await,
        Kind::Replicas => replicas(client, &args, namespace).await,
        Kind::Decisions => decisions(client, &args).await,
        Kind::Usage => usage(client, &args, namespace).await,
        Kind::Runtimes => objects(client, &args, namespace, &["ClusterServingRuntime", "ServingRuntime"]).await,
        Kind::Secrets => objects(client, &args, namespace, &["Secret"]).await,
        Kind::Configmaps => objects(client, &args, namespace, &["ConfigMap"]).await,
    }
}

async fn objects(mut client: Client, args: &Args, namespace: String, kinds: &[&str]) -> Result<(), Failure> {
    let request = ListObjectsRequest { kind: String::new(), namespace };
    let mut objects = client.list_objects(request).await?.into_inner().objects;
    objects.retain(|object| kinds.contains(&object.kind.as_str()) && wanted(args, &object.name));
    if structured(args) {
        return print_items(args, objects.iter().map(json::object).collect());
    }
    if objects.is_empty() {
        return none_found("object", args);
    }
    let mut table = Table::new(&["NAMESPACE", "NAME", "KIND", "BUILT-IN"]);
    for object in objects {
        let built_in = if object.built_in { "yes" } else { "" };
        table.row([object.namespace, object.name, object.kind, built_in.to_owned()]);
    }
    output::print(&table.text())
}

fn structured(args: &Args) -> bool {
    matches!(args.output, Format::Json | Format::Yaml)
}

/// Prints the items whose name was asked for, or says that there is none.
fn print_items(args: &Args, mut items: Vec<Value>) -> Result<(), Failure> {
    match &args.name {
        None => output::print_value(&json::list(items), args.output),
        Some(_) if items.len() == 1 => output::print_value(&items.swap_remove(0), args.output),
        Some(_) => output::print_value(&json::list(items), args.output),
    }
}

fn none_found(what: &str, args: &Args) -> Result<(), Failure> {
    match &args.name {
        Some(name) => Err(anyhow::anyhow!("{what} {name} not found").into()),
        None => {
            use std::io::Write as _;
            writeln!(std::io::stderr(), "No {what}s found.")?;
            Ok(())
        }
    }
}

fn wanted(args: &Args, name: &str) -> bool {
    args.name.as_deref().is_none_or(|wanted| wanted == name)
}

async fn services(mut client: Client, args: &Args, namespace: String) -> Result<(), Failure> {
    let services = match &args.name {
        Some(name) => {
            let request = GetRequest { namespace: args.namespace.clone(), name: name.clone() };
            client.get(request).await?.into_inner().service.into_iter().collect()
        }
        None => client.list(ListRequest { namespace }).await?.into_inner().services,
    };
    if structured(args) {
        return print_items(args, services.iter().map(json::service).collect());
    }
    if services.is_empty() {
        return none_found("service", args);
    }
    output::print(&service_table(&services, args))
}

fn service_table(services: &[Service], args: &Args) -> String {
    // As `kubectl get isvc` has them, and replicas.
    let mut columns = vec![
        "NAME",
        "URL",
        "READY",
        "PREV",
        "LATEST",
        "PREVROLLEDOUTREVISION",
        "LATESTREADYREVISION",
        "REPLICAS",
        "AGE",
    ];
    if args.all_namespaces {
        columns.insert(0, "NAMESPACE");
    }
    if args.output == Format::Wide {
        columns.extend(["WAITING", "MIN", "MAX", "REASON"]);
    }
    let mut table = Table::new(&columns);
    for service in services {
        let mood = match service.ready.as_str() {
            "True" => Mood::Good,
            "False" => Mood::Bad,
            _ => Mood::Waiting,
        };
        let mut row = vec![
            service.name.clone(),
            service.url.clone(),
            paint(&service.ready, mood),
            percent(service.prev_traffic_percent),
            percent(service.latest_traffic_percent),
            service.prev_revision.clone(),
            service.latest_ready_revision.clone(),
            format!("{}/{}", service.ready_replicas, service.desired_replicas),
            age(service.created_at),
        ];
        if args.all_namespaces {
            row.insert(0, service.namespace.clone());
        }
        if args.output == Format::Wide {
            let max = if service.max_replicas == 0 { "none".to_owned() } else { service.max_replicas.to_string() };
            let why = [service.reason.as_str(), service.message.as_str()].join(" ");
            row.extend([service.queue_depth.to_string(), service.min_replicas.to_string(), max, why.trim().to_owned()]);
        }
        table.row(row);
    }
    table.text()
}

fn percent(share: Option<u32>) -> String {
    share.map(|percent| percent.to_string()).unwrap_or_default()
}

/// A line for each change that shows; JSON has each change.
async fn watch(mut client: Client, args: &Args, namespace: String) -> Result<(), Failure> {
    let request = WatchRequest { namespace, name: args.name.clone().unwrap_or_default() };
    let mut changes = client.watch(request).await?.into_inner();
    let mut shown = std::collections::HashMap::new();
    let mut header = true;
    while let Some(change) = changes.message().await? {
        let Some(service) = change.service else { continue };
        if structured(args) {
            output::print(&format!("{}\n", json::service(&service)))?;
            continue;
        }
        let key = format!("{}/{}", service.namespace, service.name);
        let face = (
            service.ready.clone(),
            service.ready_replicas,
            service.desired_replicas,
            service.latest_ready_revision.clone(),
            (service.prev_traffic_percent, service.latest_traffic_percent),
        );
        if !change.deleted && shown.get(&key) == Some(&face) {
            continue;
        }
        shown.insert(key, face);
        let table = service_table(&[service], args);
        let mut lines = table.lines();
        let columns = lines.next().unwrap_or_default();
        if header {
            output::print(&format!("{columns}\n"))?;
            header = false;
        }
        let gone = if change.deleted { "   (deleted)" } else { "" };
        for line in lines {
            output::print(&format!("{line}{gone}\n"))?;
        }
    }
    Ok(())
}

async fn nodes(mut client: Client, args: &Args) -> Result<(), Failure> {
    let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
    let nodes: Vec<_> = nodes.into_iter().filter(|node| wanted(args, &node.name)).collect();
    if structured(args) {
        return print_items(args, nodes.iter().map(json::node).collect());
    }
    if nodes.is_empty() {
        return none_found("node", args);
    }
    let mut table = Table::new(&["NAME", "STATE", "GPUS", "REPLICAS", "PRODUCT", "INGRESS", "VERSION"]);
    for node in nodes {
        let held = node.gpus.iter().filter(|gpu| !gpu.replica.is_empty()).count();
        let product = node.gpus.first().map(|gpu| gpu.product.clone()).unwrap_or_default();
        let mood = match node.state.as_str() {
            "Ready" if node.availability() == control::NodeAvailability::Open => Mood::Good,
            "Ready" => Mood::Waiting,
            _ => Mood::Bad,
        };
        let simulated = if node.simulated { " (simulated)" } else { "" };
        table.row([
            node.name.clone(),
            paint(&crate::node::state(&node), mood),
            format!("{held}/{}", node.gpus.len()),
            node.replicas.to_string(),
            format!("{product}{simulated}"),
            node.ingress_address,
            node.agent_version,
        ]);
    }
    output::print(&table.text())
}

async fn revisions(mut client: Client, args: &Args, namespace: String) -> Result<(), Failure> {
    let request = ListRevisionsRequest { namespace, service: String::new() };
    let revisions = client.list_revisions(request).await?.into_inner().revisions;
    let revisions: Vec<_> = revisions.into_iter().filter(|revision| wanted(args, &revision.name)).collect();
    if structured(args) {
        return print_items(args, revisions.iter().map(json::revision).collect());
    }
    if revisions.is_empty() {
        return none_found("revision", args);
    }
    let mut table = Table::new(&["NAME", "SERVICE", "READY", "TRAFFIC", "REPLICAS", "AGE", "MESSAGE"]);
    for revision in revisions {
        table.row([
            revision.name,
            revision.service,
            paint(
                if revision.ready { "True" } else { "False" },
                if revision.ready { Mood::Good } else { Mood::Waiting },
            ),
            format!("{}%", revision.traffic_percent),
            format!("{}/{}", revision.ready_replicas, revision.desired_replicas),
            age(revision.created_at),
            revision.message,
        ]);
    }
    output::print(&table.text())
}

async fn replicas(mut client: Client, args: &Args, namespace: String) -> Result<(), Failure> {
    let request = ListReplicasRequest { namespace, service: String::new() };
    let replicas = client.list_replicas(request).await?.into_inner().replicas;
    let replicas: Vec<_> = replicas.into_iter().filter(|replica| wanted(args, &replica.name)).collect();
    if structured(args) {
        return print_items(args, replicas.iter().map(json::replica).collect());
    }
    if replicas.is_empty() {
        return none_found("replica", args);
    }
    output::print(&replica_table(&replicas))
}

/// Also part of `describe`.
pub fn replica_table(replicas: &[control::Replica]) -> String {
    let mut table = Table::new(&["NAME", "NODE", "GPUS", "PHASE", "RESTARTS", "AGE", "MESSAGE"]);
    for replica in replicas {
        let mood = match replica.phase.as_str() {
            "Ready" => Mood::Good,
            "Failed" => Mood::Bad,
            _ => Mood::Waiting,
        };
        let gpus: Vec<_> = replica.gpu_indices.iter().map(ToString::to_string).collect();
        table.row([
            replica.name.clone(),
            replica.node.clone(),
            gpus.join(","),
            paint(&replica.phase, mood),
            replica.restarts.to_string(),
            age(replica.created_at),
            if says_more(replica) { replica.message.clone() } else { rung(replica) },
        ]);
    }
    table.text()
}

/// Returns `true` if the message is worth more than how the replica came to be where it is: a sleeping replica's is not.
fn says_more(replica: &control::Replica) -> bool {
    !replica.message.is_empty() && (replica.phase != "Asleep" || replica.rung.is_empty())
}

/// How a replica came to be where it is, and what it holds while it sleeps.
fn rung(replica: &control::Replica) -> String {
    if replica.rung.is_empty() {
        return String::new();
    }
    let took = std::time::Duration::try_from(replica.rung_took.unwrap_or_default()).unwrap_or_default();
    let millis = std::time::Duration::from_millis(took.as_millis() as u64);
    let way = format!("{} to {} in {}", replica.rung_before, replica.rung, humantime::format_duration(millis));
    if replica.phase != "Asleep" {
        return way;
    }
    let gpu = match (replica.gpu_indices.is_empty(), replica.holds_gpu_memory) {
        (true, _) => "",
        (false, true) => ", keeps its GPU memory",
        (false, false) => ", without GPU memory",
    };
    format!("{way}; {} of main memory{gpu}", bytesize::ByteSize(replica.memory_bytes))
}

async fn decisions(mut client: Client, args: &Args) -> Result<(), Failure> {
    let name = args.name.clone().ok_or_else(|| anyhow::anyhow!("whose? pilotlight get decisions NAME"))?;
    let request = ListDecisionsRequest { namespace: args.namespace.clone(), name, limit: 0 };
    let decisions = client.list_decisions(request).await?.into_inner().decisions;
    if structured(args) {
        return output::print_value(&json::list(decisions.iter().map(json::decision).collect()), args.output);
    }
    output::print(&decision_table(&decisions))
}

/// Also part of `describe`.
pub fn decision_table(decisions: &[control::Decision]) -> String {
    let mut table = Table::new(&[
        "TIME", "REVISION", "READY", "LOADING", "STABLE", "PANIC", "TARGET", "WANTED", "APPLIED", "MODE", "WHY",
    ]);
    for decision in decisions {
        let wanted = if decision.desired < 0 { "unknown".to_owned() } else { decision.desired.to_string() };
        table.row([
            moment(decision.time),
            decision.revision.clone(),
            decision.ready.to_string(),
            decision.starting.to_string(),
            format!("{:.2}", decision.stable_value),
            format!("{:.2}", decision.panic_value),
            format!("{:.2}", decision.target),
            wanted,
            decision.applied.to_string(),
            if decision.panic { "panic" } else { "stable" }.to_owned(),
            decision.reason.clone(),
        ]);
    }
    table.text()
}

async fn usage(mut client: Client, args: &Args, namespace: String) -> Result<(), Failure> {
    let request = ListUsageRequest { from: None, to: None, namespace };
    let usage = client.list_usage(request).await?.into_inner().usage;
    let usage: Vec<_> = usage.into_iter().filter(|usage| wanted(args, &usage.service)).collect();
    if structured(args) {
        return output::print_value(&json::list(usage.iter().map(json::usage).collect()), args.output);
    }
    let mut table = Table::new(&["HOUR", "NAMESPACE", "SERVICE", "GPUCLASS", "REPLICA-MINUTES", "GPU-MINUTES"]);
    for usage in usage {
        table.row([
            moment(usage.hour),
            usage.namespace.clone(),
            usage.service.clone(),
            usage.gpu_class.clone(),
            format!("{:.1}", json::seconds(&usage.replica_time) / 60.0),
            format!("{:.1}", json::seconds(&usage.gpu_time) / 60.0),
        ]);
    }
    output::print(&table.text())
}
