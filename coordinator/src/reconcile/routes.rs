//! What agents are told: where requests go, and what each node shall run. Pure.

use std::time::Duration;

use pilotlight_proto::fleet::v1 as fleet;

use super::world::{NodeState, RevisionState, ServiceState, World};
use crate::spec::{ProbeHandler, RevisionTemplate};

/// The host names of a service: `<name>.<namespace>.<domain>`, and KServe's name of its predictor.
pub fn hosts(world: &World, namespace: &str, name: &str) -> Vec<String> {
    let domain = &world.settings.domain;
    vec![format!("{name}.{namespace}.{domain}"), format!("{name}-predictor.{namespace}.{domain}")]
}

/// Where one service's requests go.
pub fn service_route(world: &World, service: &ServiceState) -> fleet::ServiceRoute {
    let spec = &service.record.service;
    fleet::ServiceRoute {
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        hosts: hosts(world, &spec.namespace, &spec.name),
        revisions: world.routed(service).map(|revision| revision_route(world, revision, 100)).into_iter().collect(),
    }
}

fn revision_route(world: &World, revision: &RevisionState, traffic_percent: u32) -> fleet::RevisionRoute {
    let template = &revision.record.template;
    fleet::RevisionRoute {
        revision: revision.record.key(),
        traffic_percent,
        tag: String::new(),
        container_concurrency: template.container_concurrency,
        timeout: Some(duration(template.timeout)),
        queue_limit: world.settings.queue_limit,
        replicas: revision
            .replicas
            .iter()
            .filter_map(|name| world.replicas.get(name))
            .map(|replica| fleet::ReplicaRoute {
                replica: replica.record.name.clone(),
                node: replica.record.node.clone(),
                ready: replica.ready(),
            })
            .collect(),
    }
}

/// Where every node's peer listener is.
pub fn peer_nodes(world: &World) -> Vec<fleet::PeerNode> {
    world
        .nodes
        .values()
        .filter(|node| !node.hello.peer_address.is_empty())
        .map(|node| fleet::PeerNode {
            name: node.record.name.clone(),
            peer_address: node.hello.peer_address.clone(),
        })
        .collect()
}

/// The whole desired state of one node, as of the node's assignment version.
pub fn assignment(world: &World, node: &NodeState) -> fleet::Assignment {
    let replicas = node
        .replicas
        .iter()
        .filter_map(|name| world.replicas.get(name))
        .filter_map(|replica| {
            let revision = world.revisions.get(&replica.record.revision)?;
            let template = &revision.record.template;
            Some(fleet::ReplicaAssignment {
                replica: replica.record.name.clone(),
                revision: replica.record.revision.clone(),
                namespace: replica.record.namespace.clone(),
                service: replica.record.service.clone(),
                container: Some(container(template)),
                gpu_indices: replica.record.gpu_indices.clone(),
                container_concurrency: template.container_concurrency,
                timeout: Some(duration(template.timeout)),
                draining: replica.record.draining,
                traceparent: replica.trace.traceparent.clone(),
                tracestate: replica.trace.tracestate.clone(),
            })
        })
        .collect();
    fleet::Assignment { version: node.assignment_version, replicas }
}

/// The resolved main container, as agents get it.
fn container(template: &RevisionTemplate) -> fleet::ContainerSpec {
    template.to_container_spec()
}

/// A protobuf duration. Durations here are config values, far below protobuf's limit.
pub fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or_default()
}
