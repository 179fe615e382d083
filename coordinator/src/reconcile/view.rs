//! The world as operators see it. Pure.

use jiff::Timestamp;
use pilotlight_proto::{
    control::v1 as control,
    fleet::v1::{self as fleet, ReplicaPhase},
};

use super::{
    routes,
    world::{Event, NodeState, ReplicaState, RevisionState, ServiceState, World},
};
use crate::{
    autoscaler::Decision,
    model::Availability,
    spec::{
        self, Condition, ConditionStatus, FailureInfo, ModelState, ModelStatus, StatusView, TrafficTarget,
        TransitionStatus,
    },
};

/// A service, with its object in KServe's shape.
pub fn service(world: &World, state: &ServiceState) -> control::Service {
    let record = &state.record;
    let routed = world.routed(state);
    let latest = world.revisions.get(&record.revision_key(record.latest_revision));
    let counts = routed.map(|revision| world.counts(revision)).unwrap_or_default();
    let status = status(world, state);
    let ready = status.ready();
    let spec = &record.service;
    control::Service {
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        url: url(world, &spec.namespace, &spec.name),
        ready: ready.status.to_string(),
        reason: ready.reason,
        message: ready.message,
        latest_created_revision: record.revision_name(record.latest_revision),
        latest_ready_revision: record.latest_ready.map(|n| record.revision_name(n)).unwrap_or_default(),
        ready_replicas: counts.ready,
        starting_replicas: counts.starting,
        desired_replicas: routed.map_or(0, |revision| revision.wanted),
        min_replicas: latest.map_or(0, |revision| revision.scaling.min_scale()),
        max_replicas: latest.map_or(0, |revision| revision.scaling.max_scale()),
        created_at: Some(timestamp(record.created_at)),
        queue_depth: state
            .revisions
            .iter()
            .filter_map(|number| world.revisions.get(&record.revision_key(*number)))
            .flat_map(|revision| revision.waiting.values())
            .sum(),
        object_json: spec::to_object(spec, &status).to_string(),
    }
}

/// The service's address as clients use it.
pub fn url(world: &World, namespace: &str, name: &str) -> String {
    let host = routes::hosts(world, namespace, name).swap_remove(0);
    match world.settings.ingress_port {
        80 => format!("http://{host}"),
        port => format!("http://{host}:{port}"),
    }
}

fn status(world: &World, state: &ServiceState) -> StatusView {
    let record = &state.record;
    let latest = world.revisions.get(&record.revision_key(record.latest_revision));
    let predictor_ready = predictor_condition(world, record.created_at, latest);
    // A newer revision that fails leaves the last good one serving: its route stays ready.
    let routable = record.latest_ready.is_some();
    let ingress_ready = if routable {
        condition(ConditionStatus::True, "", "", record.created_at)
    } else {
        let message = "no revision has been ready yet";
        condition(ConditionStatus::Unknown, "PredictorNotReady", message, record.created_at)
    };
    let address = url(world, &record.service.namespace, &record.service.name);
    let name = |number| record.revision_name(number);
    let traffic = world.routed(state).filter(|_| routable).map(|revision| TrafficTarget {
        revision: revision.record.name.clone(),
        percent: 100,
        latest: revision.record.number == record.latest_revision,
        tag: String::new(),
        url: None,
    });
    StatusView {
        uid: record.uid.clone(),
        generation: record.generation,
        observed_generation: record.generation,
        created_at: record.created_at,
        url: routable.then(|| address.clone()),
        address_url: routable.then_some(address),
        predictor_ready,
        ingress_ready,
        stopped: None,
        latest_created_revision: name(record.latest_revision),
        latest_ready_revision: record.latest_ready.map(name).unwrap_or_default(),
        latest_rolledout_revision: record.latest_ready.map(name).unwrap_or_default(),
        previous_rolledout_revision: String::new(),
        traffic: traffic.into_iter().collect(),
        model: model_status(world, record.latest_ready.is_some(), latest),
    }
}

fn condition(status: ConditionStatus, reason: &str, message: &str, since: Timestamp) -> Condition {
    Condition { status, reason: reason.to_owned(), message: message.to_owned(), last_transition: since }
}

/// The newest replica of a revision that has failed, and what its agent says.
fn failure<'a>(world: &'a World, revision: &'a RevisionState) -> Option<(&'a ReplicaState, &'a fleet::ReplicaStatus)> {
    let replicas = revision.replicas.iter().filter_map(|name| world.replicas.get(name));
    let failed = replicas.filter(|replica| replica.phase() == ReplicaPhase::Failed);
    let newest = failed.max_by_key(|replica| replica.record.created_at)?;
    newest.status.as_ref().map(|status| (newest, status))
}

/// Whether the newest revision can serve, and if not, why.
fn predictor_condition(world: &World, since: Timestamp, latest: Option<&RevisionState>) -> Condition {
    let Some(revision) = latest else {
        return condition(ConditionStatus::Unknown, "RevisionMissing", "no revision yet", since);
    };
    let since = revision.record.created_at;
    if world.counts(revision).ready == 0 {
        if let Some((_, status)) = failure(world, revision) {
            return condition(ConditionStatus::False, &status.reason, &status.message, since);
        }
        if let Some(why) = &revision.unplaced {
            return condition(ConditionStatus::False, "Unschedulable", why, since);
        }
    }
    if revision.record.been_ready {
        return condition(ConditionStatus::True, "", "", since);
    }
    condition(ConditionStatus::Unknown, "Deploying", "waiting for the first replica to be ready", since)
}

fn model_status(world: &World, serves: bool, latest: Option<&RevisionState>) -> ModelStatus {
    let counts = latest.map(|revision| world.counts(revision)).unwrap_or_default();
    let failed = latest.and_then(|revision| failure(world, revision).map(|failure| (revision, failure)));
    let target = match latest {
        _ if counts.ready > 0 => ModelState::Loaded,
        _ if failed.is_some() => ModelState::FailedToLoad,
        _ if counts.starting > 0 => ModelState::Loading,
        Some(revision) if revision.wanted == 0 && revision.record.been_ready => ModelState::Standby,
        _ => ModelState::Pending,
    };
    let transition = match target {
        ModelState::FailedToLoad => TransitionStatus::BlockedByFailedLoad,
        ModelState::Loaded | ModelState::Standby => TransitionStatus::UpToDate,
        ModelState::Loading | ModelState::Pending => TransitionStatus::InProgress,
    };
    ModelStatus {
        transition,
        active: serves.then_some(if target == ModelState::FailedToLoad { ModelState::Standby } else { target }),
        target,
        failed_copies: u32::from(failed.is_some()),
        total_copies: counts.ready,
        last_failure: failed.map(|(revision, (replica, status))| FailureInfo {
            reason: "ModelLoadFailed".to_owned(),
            message: status.message.clone(),
            location: replica.record.name.clone(),
            revision: revision.record.name.clone(),
            time: replica.record.created_at,
            exit_code: status.exit_code,
        }),
    }
}

/// A revision.
pub fn revision(world: &World, state: &RevisionState) -> control::Revision {
    let record = &state.record;
    let counts = world.counts(state);
    let routed = world
        .services
        .get(&record.service_key())
        .and_then(|service| world.routed(service))
        .is_some_and(|routed| routed.record.number == record.number);
    control::Revision {
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        service: record.service.clone(),
        generation: record.generation,
        ready: record.been_ready,
        message: state.unplaced.clone().unwrap_or_default(),
        traffic_percent: if routed { 100 } else { 0 },
        ready_replicas: counts.ready,
        desired_replicas: state.wanted,
        created_at: Some(timestamp(record.created_at)),
    }
}

/// A replica.
pub fn replica(state: &ReplicaState) -> control::Replica {
    let record = &state.record;
    let status = state.status.clone().unwrap_or_default();
    let revision = record.revision.split_once('/').map_or(record.revision.as_str(), |(_, name)| name);
    control::Replica {
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        service: record.service.clone(),
        revision: revision.to_owned(),
        node: record.node.clone(),
        gpu_indices: record.gpu_indices.clone(),
        mig_devices: record.mig_devices.clone(),
        phase: phase_name(record.draining, state.phase()).to_owned(),
        message: status.message,
        restarts: status.restarts,
        created_at: Some(timestamp(record.created_at)),
        ready_at: status.ready_at,
        pid: status.pid,
        adopted: status.adopted,
    }
}

fn phase_name(draining: bool, phase: ReplicaPhase) -> &'static str {
    match phase {
        ReplicaPhase::Stopped => "Stopped",
        _ if draining => "Draining",
        ReplicaPhase::Unspecified | ReplicaPhase::Pending => "Pending",
        ReplicaPhase::Starting => "Starting",
        ReplicaPhase::Ready => "Ready",
        ReplicaPhase::Draining => "Draining",
        ReplicaPhase::Failed => "Failed",
    }
}

/// A node with its GPUs and who holds them.
pub fn node(world: &World, state: &NodeState, now: Timestamp) -> control::Node {
    let inventory = state.inventory.clone().unwrap_or_default();
    let holders: Vec<_> = state.replicas.iter().filter_map(|name| world.replicas.get(name)).collect();
    let state_name = match state {
        _ if state.session.is_some() => "Ready",
        _ if state.lost(world.settings.node_lease, now) => "Lost",
        _ => "Unknown",
    };
    control::Node {
        name: state.record.name.clone(),
        state: state_name.to_owned(),
        agent_version: state.hello.agent_version.clone(),
        peer_address: state.hello.peer_address.clone(),
        ingress_address: state.hello.ingress_address.clone(),
        gpus: inventory.gpus.iter().map(|gpu| node_gpu(gpu, &holders)).collect(),
        labels: inventory.labels,
        simulated: inventory.simulated,
        cpu_cores: inventory.cpu_cores,
        memory_bytes: inventory.memory_bytes,
        last_seen: Some(timestamp(state.last_seen)),
        availability: availability(state.record.availability).into(),
        replicas: holders.len() as u32,
    }
}

fn availability(availability: Availability) -> control::NodeAvailability {
    match availability {
        Availability::Open => control::NodeAvailability::Open,
        Availability::Cordoned => control::NodeAvailability::Cordoned,
        Availability::Draining => control::NodeAvailability::Draining,
    }
}

fn node_gpu(gpu: &fleet::Gpu, replicas: &[&ReplicaState]) -> control::NodeGpu {
    let holding = replicas.iter().map(|replica| &replica.record);
    let holders: Vec<_> = holding.clone().filter(|record| record.gpu_indices.contains(&gpu.index)).collect();
    let device = |device: &fleet::MigDevice| control::NodeMigDevice {
        uuid: device.uuid.clone(),
        profile: device.profile.clone(),
        replica: holding
            .clone()
            .find(|record| record.mig_devices.contains(&device.uuid))
            .map(|record| record.name.clone())
            .unwrap_or_default(),
    };
    control::NodeGpu {
        index: gpu.index,
        product: gpu.product.clone(),
        memory_bytes: gpu.memory_bytes,
        replica: holders.last().map(|record| record.name.clone()).unwrap_or_default(),
        replicas: holders.iter().map(|record| record.name.clone()).collect(),
        mig_devices: gpu.mig_devices.iter().map(device).collect(),
    }
}

/// A scaling decision.
pub fn decision(revision: &str, time: Timestamp, decision: &Decision) -> control::Decision {
    control::Decision {
        time: Some(timestamp(time)),
        revision: revision.to_owned(),
        ready: decision.ready,
        desired: decision.desired,
        applied: decision.applied,
        stable_value: decision.stable_value,
        panic_value: decision.panic_value,
        target: decision.target,
        panic: decision.panic,
        excess_burst_capacity: decision.excess_burst_capacity,
        reason: decision.reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
    }
}

/// The last decisions of all revisions of a service, oldest first; `limit` 0 is all.
pub fn decisions(world: &World, state: &ServiceState, limit: usize) -> Vec<control::Decision> {
    let mut all: Vec<_> = state
        .revisions
        .iter()
        .filter_map(|number| world.revisions.get(&state.record.revision_key(*number)))
        .flat_map(|revision| revision.decisions.iter().map(|(at, made)| (*at, &revision.record.name, made)))
        .collect();
    all.sort_by_key(|(at, ..)| *at);
    let skip = if limit == 0 { 0 } else { all.len().saturating_sub(limit) };
    all.into_iter().skip(skip).map(|(at, name, made)| decision(name, at, made)).collect()
}

/// An event.
pub fn event(event: &Event) -> control::Event {
    control::Event {
        time: Some(timestamp(event.time)),
        r#type: if event.warning { "Warning" } else { "Normal" }.to_owned(),
        reason: event.reason.to_owned(),
        object: event.object.clone(),
        message: event.message.clone(),
    }
}

/// Everything about a service.
pub fn describe(world: &World, state: &ServiceState) -> control::DescribeResponse {
    let revisions: Vec<_> =
        state.revisions.iter().filter_map(|number| world.revisions.get(&state.record.revision_key(*number))).collect();
    control::DescribeResponse {
        service: Some(service(world, state)),
        replicas: revisions
            .iter()
            .flat_map(|revision| &revision.replicas)
            .filter_map(|name| world.replicas.get(name))
            .map(replica)
            .collect(),
        revisions: revisions.iter().map(|state| revision(world, state)).collect(),
        decisions: decisions(world, state, 20),
        events: state.events.iter().map(event).collect(),
    }
}

/// A protobuf timestamp.
pub fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let nanos = time.as_nanosecond();
    let second = 1_000_000_000;
    prost_types::Timestamp { seconds: nanos.div_euclid(second) as i64, nanos: nanos.rem_euclid(second) as i32 }
}
