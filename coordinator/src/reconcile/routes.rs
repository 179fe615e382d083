//! What agents are told: where requests go, and what each node shall run. Pure.

use std::time::Duration;

use pilotlight_proto::fleet::v1 as fleet;

use super::{
    storage,
    world::{NodeState, RevisionState, ServiceState, World},
};
use crate::{
    spec::{Probe, ProbeHandler, RevisionTemplate},
    values::Values,
};

/// The host names of a service: `<name>.<namespace>.<domain>`, and KServe's name of its predictor.
pub fn hosts(world: &World, namespace: &str, name: &str) -> Vec<String> {
    let domain = &world.settings.domain;
    vec![format!("{name}.{namespace}.{domain}"), format!("{name}-predictor.{namespace}.{domain}")]
}

/// Where one service's requests go: its shares, the newest first, and then the revisions without a share
/// that still have replicas, since requests may wait or run there.
pub fn service_route(world: &World, service: &ServiceState) -> fleet::ServiceRoute {
    let spec = &service.record.service;
    let targets = world.destinations(service);
    let shares = targets.iter().filter_map(|target| {
        let tag = target.tag.map(|tag| tag.to_string()).unwrap_or_default();
        Some(revision_route(world, world.revision_of(service, target.revision)?, target.percent, tag))
    });
    let others = service.revisions.iter().filter(|number| targets.iter().all(|target| target.revision != **number));
    let left = others
        .filter_map(|number| world.revision_of(service, *number))
        .filter(|revision| !revision.replicas.is_empty())
        .map(|revision| revision_route(world, revision, 0, String::new()));
    fleet::ServiceRoute {
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        hosts: hosts(world, &spec.namespace, &spec.name),
        revisions: shares.chain(left).collect(),
        sticky_header: world.policy(service).sticky_header.unwrap_or_default(),
    }
}

fn revision_route(world: &World, revision: &RevisionState, percent: u8, tag: String) -> fleet::RevisionRoute {
    let record = &revision.record;
    fleet::RevisionRoute {
        revision: record.key(),
        traffic_percent: u32::from(percent),
        tag,
        container_concurrency: record.scaling.container_concurrency as u32,
        timeout: Some(duration(record.timeout)),
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
        .map(|node| fleet::PeerNode { name: node.record.name.clone(), peer_address: node.hello.peer_address.clone() })
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
            let revision = &revision.record;
            Some(fleet::ReplicaAssignment {
                replica: replica.record.name.clone(),
                revision: replica.record.revision.clone(),
                namespace: replica.record.namespace.clone(),
                service: replica.record.service.clone(),
                container: Some(container(&world.settings.values, &revision.namespace, &revision.template)),
                gpu_indices: replica.record.gpu_indices.clone(),
                mig_devices: replica.record.mig_devices.clone(),
                models: storage::models(world, revision),
                container_concurrency: revision.scaling.container_concurrency as u32,
                timeout: Some(duration(revision.timeout)),
                draining: replica.record.draining,
                traceparent: replica.trace.traceparent.clone(),
                tracestate: replica.trace.tracestate.clone(),
            })
        })
        .collect();
    fleet::Assignment { version: node.assignment_version, replicas }
}

/// The resolved main container, as agents get it. Secrets are filled in here and nowhere before; one that
/// is missing keeps the replica from being started.
fn container(values: &Values, namespace: &str, template: &RevisionTemplate) -> fleet::ContainerSpec {
    let container = &template.container;
    let (env, unresolved) = match values.resolve(namespace, &container.env) {
        Ok(env) => (env, String::new()),
        Err(missing) => (Vec::new(), missing),
    };
    let env = env.into_iter().map(|(name, value)| fleet::EnvVar { name, value });
    fleet::ContainerSpec {
        image: container.image.clone(),
        command: container.command.clone(),
        args: container.args.clone(),
        env: env.collect(),
        unresolved,
        working_dir: container.working_dir.clone(),
        port: container.port.map_or(0, u32::from),
        h2c: container.h2c,
        readiness_probe: Some(probe(&container.readiness)),
        termination_grace_period: Some(duration(template.termination_grace_period)),
    }
}

fn probe(probe: &Probe) -> fleet::Probe {
    use fleet::probe::Handler;
    let number = |port: &Option<u16>| port.map_or(0, u32::from);
    let handler = match &probe.handler {
        ProbeHandler::HttpGet { path, port, headers } => Handler::HttpGet(fleet::HttpGet {
            path: path.clone(),
            port: number(port),
            headers: headers.clone().into_iter().collect(),
        }),
        ProbeHandler::TcpSocket { port } => Handler::TcpSocket(fleet::TcpSocket { port: number(port) }),
        ProbeHandler::Exec { command } => Handler::Exec(fleet::Exec { command: command.clone() }),
        ProbeHandler::Grpc { port, service } => {
            Handler::Grpc(fleet::Grpc { port: number(port), service: service.clone() })
        }
    };
    fleet::Probe {
        handler: Some(handler),
        initial_delay: Some(duration(probe.initial_delay)),
        period: Some(duration(probe.period)),
        timeout: Some(duration(probe.timeout)),
        success_threshold: probe.success_threshold,
        failure_threshold: probe.failure_threshold,
    }
}

/// A protobuf duration. Durations here are config values, far below protobuf's limit.
pub fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or_default()
}
