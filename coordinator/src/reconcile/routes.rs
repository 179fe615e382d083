//! What agents are told: where requests go, and what each node shall run. Pure.

use std::time::Duration;

use pilotlight_proto::fleet::v1 as fleet;

use super::{
    failures, mounted, shelf, storage,
    world::{NodeState, RevisionState, ServiceState, World},
};
use crate::{
    spec::{self, ComponentKind, InferenceService, Probe, ProbeHandler, RevisionTemplate},
    values::Values,
};

/// The host name of a service: `<name>.<namespace>.<domain>`.
pub fn host(world: &World, namespace: &str, name: &str) -> String {
    format!("{name}.{namespace}.{}", world.settings.domain)
}

/// KServe's host name of one component of a service: `<name>-<component>.<namespace>.<domain>`.
pub fn component_host(world: &World, namespace: &str, name: &str, component: ComponentKind) -> String {
    host(world, namespace, &format!("{name}-{component}"))
}

/// All host names that lead to one component. The one that takes the service's requests has the service's
/// own host, as the first.
pub fn component_hosts(world: &World, service: &InferenceService, component: ComponentKind) -> Vec<String> {
    let entrance = if service.transformer.is_some() { ComponentKind::Transformer } else { ComponentKind::Predictor };
    let outer = (component == entrance).then(|| host(world, &service.namespace, &service.name));
    outer.into_iter().chain([component_host(world, &service.namespace, &service.name, component)]).collect()
}

/// Where one component's requests go: its shares, the newest first, and then the revisions without a share
/// that still have replicas, since requests may wait or run there.
pub fn service_route(world: &World, service: &ServiceState) -> fleet::ServiceRoute {
    let (spec, component) = (&service.record.service, service.record.component);
    let explains = (component == ComponentKind::Explainer).then(|| host(world, &spec.namespace, &spec.name));
    let targets = world.destinations(service);
    let shares = targets.iter().filter_map(|target| {
        let tag = target.tag.as_ref().map(ToString::to_string).unwrap_or_default();
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
        component: if component.is_predictor() { String::new() } else { component.to_string() },
        hosts: component_hosts(world, spec, component),
        explains: explains.into_iter().collect(),
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
        failure: failures::current(world, revision),
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
            let predictor = || component_host(world, &revision.namespace, &revision.service, ComponentKind::Predictor);
            let calls = (!revision.component.is_predictor()).then(predictor);
            Some(fleet::ReplicaAssignment {
                predictor_host: calls.unwrap_or_default(),
                replica: replica.record.name.clone(),
                revision: replica.record.revision.clone(),
                namespace: replica.record.namespace.clone(),
                service: replica.record.service.clone(),
                container: Some(container(&world.settings.values, &revision.namespace, &revision.template)),
                gpu_indices: replica.record.gpu_indices.clone(),
                mig_devices: replica.record.mig_devices.clone(),
                models: storage::models_for(world, revision, &node.record.name),
                container_concurrency: revision.scaling.container_concurrency as u32,
                timeout: Some(duration(revision.timeout)),
                draining: replica.record.draining,
                asleep: replica.record.asleep,
                sleep_paths: spec::sleep_paths(&revision.template.annotations).map(|paths| fleet::SleepPaths {
                    sleep: paths.sleep,
                    wake: paths.wake,
                    is_sleeping: paths.is_sleeping.unwrap_or_default(),
                }),
                traceparent: replica.trace.traceparent.clone(),
                tracestate: replica.trace.tracestate.clone(),
                volumes: mounted::volumes(&world.settings.values, &revision.namespace, &revision.template.volumes),
                registry_configs: mounted::registry_configs(
                    &world.settings.values,
                    &revision.namespace,
                    &revision.template.image_pull_secrets,
                ),
            })
        })
        .collect();
    let (models, images) = (shelf::models(world, node), shelf::images(world, node));
    fleet::Assignment { version: node.assignment_version, replicas, models, images }
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
        liveness_probe: container.liveness.as_ref().map(probe),
        startup_probe: container.startup.as_ref().map(probe),
        termination_grace_period: Some(duration(template.termination_grace_period)),
        image_pull_policy: mounted::pull_policy(container),
        limits: Some(fleet::Limits {
            cpu_millis: template.resources.cpu_limit_millis,
            memory_bytes: template.resources.memory_limit_bytes,
        }),
        security: Some(mounted::security(&container.security)),
        mounts: container.volume_mounts.iter().map(mounted::mount).collect(),
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
        termination_grace_period: probe.termination_grace_period.map(duration),
    }
}

/// A protobuf duration. Durations here are config values, far below protobuf's limit.
pub fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or_default()
}
