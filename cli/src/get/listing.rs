//! What there is of each kind, as rows of a table and as objects.

use std::collections::BTreeMap;

use anyhow::anyhow;
use pilotlight_proto::control::v1::{
    self as control, GetRequest, ListDecisionsRequest, ListNodesRequest, ListObjectsRequest, ListReplicasRequest,
    ListRequest, ListRevisionsRequest, ListUsageRequest, Service,
};
use serde_json::Value;

use super::{Kind, Query};
use crate::{
    connect::Client,
    failure::Failure,
    json,
    output::{Mood, paint},
    table::{Table, age, moment},
};

/// Label of what belongs to a service, as KServe sets it.
const SERVICE_LABEL: &str = "serving.kserve.io/inferenceservice";

/// Rows of one kind.
#[derive(Debug)]
pub struct Listing {
    /// Headers of the table.
    pub columns: Vec<&'static str>,
    /// What there is.
    pub rows: Vec<Row>,
}

/// One object.
#[derive(Debug)]
pub struct Row {
    /// Name, by which it is asked for.
    pub name: String,
    /// Unique among the rows.
    pub key: String,
    /// Labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// As many as there are columns.
    pub cells: Vec<String>,
    /// The object.
    pub value: Value,
}

/// Lists one kind.
pub(super) async fn list(client: &mut Client, query: &Query) -> Result<Listing, Failure> {
    let namespace = query.namespace.clone();
    match query.kind {
        Kind::Services => {
            let services = match query.names.as_slice() {
                [name] if !query.all_namespaces() => one_service(client, namespace, name.clone()).await?,
                _ => client.list(ListRequest { namespace }).await?.into_inner().services,
            };
            Ok(service_listing(services, query))
        }
        Kind::Nodes => nodes(client).await,
        Kind::Revisions => revisions(client, namespace).await,
        Kind::Replicas => replicas(client, namespace).await,
        Kind::Decisions => decisions(client, query).await,
        Kind::Usage => usage(client, namespace).await,
        Kind::Runtimes => objects(client, namespace, &["ClusterServingRuntime", "ServingRuntime"]).await,
        Kind::Secrets => objects(client, namespace, &["Secret"]).await,
        Kind::Configmaps => objects(client, namespace, &["ConfigMap"]).await,
    }
}

/// One service, or none.
async fn one_service(client: &mut Client, namespace: String, name: String) -> Result<Vec<Service>, Failure> {
    match client.get(GetRequest { namespace, name }).await {
        Err(status) if status.code() == tonic::Code::NotFound => Ok(Vec::new()),
        answer => Ok(answer?.into_inner().service.into_iter().collect()),
    }
}

/// Labels of an object's manifest.
fn labels(value: &Value) -> BTreeMap<String, String> {
    let labels = value["metadata"]["labels"].as_object().into_iter().flatten();
    labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn of_service(service: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(SERVICE_LABEL.to_owned(), service.to_owned())])
}

async fn objects(client: &mut Client, namespace: String, kinds: &[&str]) -> Result<Listing, Failure> {
    let request = ListObjectsRequest { kind: String::new(), namespace };
    let objects = client.list_objects(request).await?.into_inner().objects;
    let rows = objects.into_iter().filter(|object| kinds.contains(&object.kind.as_str())).map(|object| {
        let value = json::object(&object);
        let built_in = if object.built_in { "yes" } else { "" };
        Row {
            name: object.name.clone(),
            key: format!("{}/{}/{}", object.kind, object.namespace, object.name),
            labels: labels(&value),
            cells: vec![object.namespace, object.name, object.kind, built_in.to_owned()],
            value,
        }
    });
    Ok(Listing { columns: vec!["NAMESPACE", "NAME", "KIND", "BUILT-IN"], rows: rows.collect() })
}

/// Rows of services, with the columns of `kubectl get isvc`, and replicas.
pub(super) fn service_listing(services: Vec<Service>, query: &Query) -> Listing {
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
    if query.all_namespaces() {
        columns.insert(0, "NAMESPACE");
    }
    if query.is_wide() {
        columns.extend(["WAITING", "MIN", "MAX", "REASON"]);
    }
    let rows = services.into_iter().map(|service| {
        let value = json::service(&service);
        Row {
            name: service.name.clone(),
            key: format!("{}/{}", service.namespace, service.name),
            labels: labels(&value),
            cells: service_cells(service, query),
            value,
        }
    });
    Listing { rows: rows.collect(), columns }
}

fn service_cells(service: Service, query: &Query) -> Vec<String> {
    let mood = match service.ready.as_str() {
        "True" => Mood::Good,
        "False" => Mood::Bad,
        _ => Mood::Waiting,
    };
    let mut cells = vec![
        service.name,
        service.url,
        paint(&service.ready, mood),
        percent(service.prev_traffic_percent),
        percent(service.latest_traffic_percent),
        service.prev_revision,
        service.latest_ready_revision,
        format!("{}/{}", service.ready_replicas, service.desired_replicas),
        age(service.created_at),
    ];
    if query.all_namespaces() {
        cells.insert(0, service.namespace);
    }
    if query.is_wide() {
        let max = if service.max_replicas == 0 { "none".to_owned() } else { service.max_replicas.to_string() };
        let why = [service.reason.as_str(), service.message.as_str()].join(" ");
        cells.extend([service.queue_depth.to_string(), service.min_replicas.to_string(), max, why.trim().to_owned()]);
    }
    cells
}

fn percent(share: Option<u32>) -> String {
    share.map(|percent| percent.to_string()).unwrap_or_default()
}

async fn nodes(client: &mut Client) -> Result<Listing, Failure> {
    let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
    let rows = nodes.into_iter().map(|node| {
        let held = node.gpus.iter().filter(|gpu| !gpu.replica.is_empty()).count();
        let product = node.gpus.first().map(|gpu| gpu.product.clone()).unwrap_or_default();
        let mood = match node.state.as_str() {
            "Ready" if node.availability() == control::NodeAvailability::Open => Mood::Good,
            "Ready" => Mood::Waiting,
            _ => Mood::Bad,
        };
        let simulated = if node.simulated { " (simulated)" } else { "" };
        Row {
            name: node.name.clone(),
            key: node.name.clone(),
            labels: node.labels.clone().into_iter().collect(),
            value: json::node(&node),
            cells: vec![
                node.name.clone(),
                paint(&crate::node::state(&node), mood),
                format!("{held}/{}", node.gpus.len()),
                node.replicas.to_string(),
                format!("{product}{simulated}"),
                node.ingress_address.clone(),
                node.agent_version.clone(),
                crate::gpu::problems(&node).join("; "),
            ],
        }
    });
    let columns = vec!["NAME", "STATE", "GPUS", "REPLICAS", "PRODUCT", "INGRESS", "VERSION", "MESSAGE"];
    Ok(Listing { columns, rows: rows.collect() })
}

async fn revisions(client: &mut Client, namespace: String) -> Result<Listing, Failure> {
    let request = ListRevisionsRequest { namespace, service: String::new() };
    let revisions = client.list_revisions(request).await?.into_inner().revisions;
    let rows = revisions.into_iter().map(|revision| {
        let (ready, mood) = if revision.ready { ("True", Mood::Good) } else { ("False", Mood::Waiting) };
        Row {
            name: revision.name.clone(),
            key: format!("{}/{}", revision.namespace, revision.name),
            labels: of_service(&revision.service),
            value: json::revision(&revision),
            cells: vec![
                revision.name,
                revision.service,
                paint(ready, mood),
                format!("{}%", revision.traffic_percent),
                format!("{}/{}", revision.ready_replicas, revision.desired_replicas),
                age(revision.created_at),
                revision.message,
            ],
        }
    });
    let columns = vec!["NAME", "SERVICE", "READY", "TRAFFIC", "REPLICAS", "AGE", "MESSAGE"];
    Ok(Listing { columns, rows: rows.collect() })
}

const REPLICA_COLUMNS: [&str; 7] = ["NAME", "NODE", "GPUS", "PHASE", "RESTARTS", "AGE", "MESSAGE"];

async fn replicas(client: &mut Client, namespace: String) -> Result<Listing, Failure> {
    let request = ListReplicasRequest { namespace, service: String::new() };
    let replicas = client.list_replicas(request).await?.into_inner().replicas;
    let rows = replicas.into_iter().map(|replica| Row {
        name: replica.name.clone(),
        key: replica.name.clone(),
        labels: of_service(&replica.service),
        value: json::replica(&replica),
        cells: replica_cells(&replica),
    });
    Ok(Listing { columns: REPLICA_COLUMNS.to_vec(), rows: rows.collect() })
}

/// Also part of `describe`.
pub fn replica_table(replicas: &[control::Replica]) -> String {
    let mut table = Table::new(&REPLICA_COLUMNS);
    replicas.iter().for_each(|replica| table.row(replica_cells(replica)));
    table.text()
}

fn replica_cells(replica: &control::Replica) -> Vec<String> {
    let mood = match replica.phase.as_str() {
        "Ready" => Mood::Good,
        "Failed" => Mood::Bad,
        _ => Mood::Waiting,
    };
    let gpus: Vec<_> = replica.gpu_indices.iter().map(ToString::to_string).collect();
    vec![
        replica.name.clone(),
        replica.node.clone(),
        gpus.join(","),
        paint(&replica.phase, mood),
        replica.restarts.to_string(),
        age(replica.created_at),
        if says_more(replica) { replica.message.clone() } else { rung(replica) },
    ]
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

async fn decisions(client: &mut Client, query: &Query) -> Result<Listing, Failure> {
    let [name] = query.names.as_slice() else {
        return Err(anyhow!("whose? pilotlight get decisions NAME").into());
    };
    let request = ListDecisionsRequest { namespace: query.namespace.clone(), name: name.clone(), limit: 0 };
    let decisions = client.list_decisions(request).await?.into_inner().decisions;
    let rows = decisions.into_iter().map(|decision| Row {
        name: name.clone(),
        key: format!("{} {}", decision.revision, moment(decision.time)),
        labels: of_service(name),
        value: json::decision(&decision),
        cells: decision_cells(&decision),
    });
    Ok(Listing { columns: DECISION_COLUMNS.to_vec(), rows: rows.collect() })
}

const DECISION_COLUMNS: [&str; 11] =
    ["TIME", "REVISION", "READY", "LOADING", "STABLE", "PANIC", "TARGET", "WANTED", "APPLIED", "MODE", "WHY"];

/// Also part of `describe`.
pub fn decision_table(decisions: &[control::Decision]) -> String {
    let mut table = Table::new(&DECISION_COLUMNS);
    decisions.iter().for_each(|decision| table.row(decision_cells(decision)));
    table.text()
}

fn decision_cells(decision: &control::Decision) -> Vec<String> {
    let wanted = if decision.desired < 0 { "unknown".to_owned() } else { decision.desired.to_string() };
    vec![
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
    ]
}

async fn usage(client: &mut Client, namespace: String) -> Result<Listing, Failure> {
    let request = ListUsageRequest { namespace, ..ListUsageRequest::default() };
    let usage = client.list_usage(request).await?.into_inner().usage;
    let rows = usage.into_iter().map(|usage| Row {
        name: usage.service.clone(),
        key: format!(
            "{}/{} {} {} {}",
            usage.namespace,
            usage.revision,
            moment(usage.hour),
            usage.gpu_class,
            usage.state
        ),
        labels: of_service(&usage.service),
        value: json::usage(&usage),
        cells: vec![
            moment(usage.hour),
            usage.namespace.clone(),
            usage.service.clone(),
            usage.revision.clone(),
            usage.gpu_class.clone(),
            usage.state.clone(),
            format!("{:.1}", json::seconds(&usage.replica_time) / 60.0),
            format!("{:.1}", json::seconds(&usage.gpu_time) / 60.0),
        ],
    });
    let columns =
        vec!["HOUR", "NAMESPACE", "SERVICE", "REVISION", "GPUCLASS", "STATE", "REPLICA-MINUTES", "GPU-MINUTES"];
    Ok(Listing { columns, rows: rows.collect() })
}
