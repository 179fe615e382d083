//! The world as operators see it. Pure.

use jiff::Timestamp;
use pilotlight_proto::{
    control::v1 as control,
    fleet::v1::{ReplicaPhase, Rung},
};

use super::{
    conditions, gpu_view, routes,
    world::{Event, NodeState, ReplicaState, RevisionState, ServiceState, World},
};
use crate::{
    autoscaler::Decision,
    model::Availability,
    rollout::Tag,
    spec::{self, ComponentView, FailureInfo, ModelState, ModelStatus, StatusView, TrafficTarget, TransitionStatus},
};

/// A service, with its object in KServe's shape.
pub fn service(world: &World, state: &ServiceState) -> control::Service {
    let record = &state.record;
    let latest = world.newest(state);
    let status = status(world, state);
    let ready = status.conditions.iter().find(|condition| condition.name == "Ready");
    let spec = &record.service;
    // The replicas of all that takes traffic, or will: during a canary of both revisions.
    let targets = world.destinations(state);
    let shown =
        |number: &&u32| **number == record.latest_revision || targets.iter().any(|target| target.revision == **number);
    let revisions: Vec<_> =
        state.revisions.iter().filter(shown).filter_map(|number| world.revision_of(state, *number)).collect();
    let counts = revisions.iter().map(|revision| world.counts(revision));
    let (ready_replicas, starting_replicas) =
        counts.fold((0, 0), |(ready, starting), counts| (ready + counts.ready, starting + counts.starting));
    let traffic = status.components.first().map(|predictor| predictor.traffic.as_slice()).unwrap_or_default();
    let latest_share = traffic.iter().find(|target| target.latest);
    let prev_share = traffic.iter().find(|target| target.tag == Tag::Prev.as_str());
    control::Service {
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        url: url(world, &spec.namespace, &spec.name),
        ready: ready.map(|ready| ready.status.to_string()).unwrap_or_default(),
        reason: ready.map(|ready| ready.reason.clone()).unwrap_or_default(),
        message: ready.map(|ready| ready.message.clone()).unwrap_or_default(),
        latest_created_revision: record.revision_name(record.latest_revision),
        latest_ready_revision: record.latest_ready.map(|n| record.revision_name(n)).unwrap_or_default(),
        ready_replicas,
        starting_replicas,
        desired_replicas: revisions.iter().map(|revision| revision.wanted).sum(),
        min_replicas: latest.map_or(0, |revision| revision.scaling.min_scale()),
        max_replicas: latest.map_or(0, |revision| revision.scaling.max_scale()),
        created_at: Some(timestamp(record.created_at)),
        queue_depth: world.revisions_of(state).flat_map(|revision| revision.waiting.values()).sum(),
        latest_traffic_percent: latest_share.map(|target| u32::from(target.percent)),
        prev_traffic_percent: prev_share.map(|target| u32::from(target.percent)),
        prev_revision: prev_share.map(|target| target.revision.clone()).unwrap_or_default(),
        object_json: spec::to_object(spec, &status).to_string(),
    }
}

/// The service's address as clients use it.
pub fn url(world: &World, namespace: &str, name: &str) -> String {
    url_of(world, &routes::host(world, namespace, name))
}

fn url_of(world: &World, host: &str) -> String {
    match world.ingress_port {
        80 => format!("http://{host}"),
        port => format!("http://{host}:{port}"),
    }
}

fn status(world: &World, state: &ServiceState) -> StatusView {
    let record = &state.record;
    let routable = record.latest_ready.is_some() && !record.service.stopped;
    let address = url(world, &record.service.namespace, &record.service.name);
    StatusView {
        uid: record.uid.clone(),
        generation: record.generation,
        observed_generation: record.generation,
        created_at: record.created_at,
        url: routable.then(|| address.clone()),
        address_url: routable.then_some(address),
        components: world.components(state).map(|component| component_view(world, component)).collect(),
        conditions: conditions::of(world, state),
        model: model_status(world, state),
    }
}

fn component_view(world: &World, state: &ServiceState) -> ComponentView {
    let record = &state.record;
    let name = |number| record.revision_name(number);
    // Tags lead to a revision by each host of its component; the one that clients know is named.
    let host = routes::component_hosts(world, &record.service, record.component).swap_remove(0);
    let traffic = world.targets(state).into_iter().map(|target| TrafficTarget {
        revision: name(target.revision),
        percent: target.percent,
        latest: target.latest,
        tag: target.tag.as_ref().map(ToString::to_string).unwrap_or_default(),
        url: target.tag.map(|tag| url_of(world, &format!("{tag}-{host}"))),
    });
    let routable = record.latest_ready.is_some() && !record.service.stopped;
    let own = routes::component_host(world, &record.service.namespace, &record.service.name, record.component);
    ComponentView {
        kind: record.component,
        url: routable.then(|| url_of(world, &own)),
        latest_created_revision: name(record.latest_revision),
        latest_ready_revision: record.latest_ready.map(name).unwrap_or_default(),
        latest_rolledout_revision: record.latest_rolledout.map(name).unwrap_or_default(),
        previous_rolledout_revision: record.previous_rolledout.map(name).unwrap_or_default(),
        traffic: traffic.collect(),
    }
}

/// State of a revision's model.
fn model_state(world: &World, revision: &RevisionState) -> ModelState {
    let counts = world.counts(revision);
    match () {
        () if counts.ready > 0 => ModelState::Loaded,
        () if revision.record.failed.is_some() || conditions::failure(world, revision).is_some() => {
            ModelState::FailedToLoad
        }
        () if counts.starting > 0 => ModelState::Loading,
        () if revision.wanted == 0 && revision.record.been_ready => ModelState::Standby,
        () => ModelState::Pending,
    }
}

fn model_status(world: &World, state: &ServiceState) -> ModelStatus {
    let latest = world.newest(state);
    let target = latest.map_or(ModelState::Pending, |revision| model_state(world, revision));
    let serving = state.record.latest_ready.and_then(|number| world.revision_of(state, number));
    ModelStatus {
        transition: match target {
            ModelState::FailedToLoad => TransitionStatus::BlockedByFailedLoad,
            ModelState::Loaded | ModelState::Standby => TransitionStatus::UpToDate,
            ModelState::Loading | ModelState::Pending => TransitionStatus::InProgress,
        },
        active: serving.map(|revision| model_state(world, revision)),
        target,
        failed_copies: latest.map_or(0, |revision| failed_copies(world, revision)),
        total_copies: latest.map_or(0, |revision| world.counts(revision).ready),
        last_failure: latest.and_then(|revision| last_failure(world, revision)),
    }
}

fn failed_copies(world: &World, revision: &RevisionState) -> u32 {
    let replicas = revision.replicas.iter().filter_map(|name| world.replicas.get(name));
    replicas.filter(|replica| replica.failure.is_some()).count() as u32
}

/// What a replica of the revision said last when it failed, or what was kept of it.
fn last_failure(world: &World, revision: &RevisionState) -> Option<FailureInfo> {
    let name = revision.record.name.clone();
    if let Some(failed) = &revision.record.failed {
        return Some(FailureInfo {
            reason: "ModelLoadFailed".to_owned(),
            message: failed.message.clone(),
            location: failed.replica.clone(),
            revision: name,
            time: failed.at,
            exit_code: failed.exit_code,
        });
    }
    let (replica, status) = conditions::failure(world, revision)?;
    Some(FailureInfo {
        // Loading ends with the first readiness; what fails later is KServe's other reason.
        reason: if status.ready_at.is_some() { "RuntimeUnhealthy" } else { "ModelLoadFailed" }.to_owned(),
        message: conditions::failure_message(status),
        location: replica.record.name.clone(),
        revision: name,
        time: replica.record.created_at,
        exit_code: status.exit_code,
    })
}

/// A revision.
pub fn revision(world: &World, state: &RevisionState) -> control::Revision {
    let record = &state.record;
    let counts = world.counts(state);
    let service = world.services.get(&record.service_key());
    let targets = service.map(|service| world.destinations(service)).unwrap_or_default();
    let share = targets.iter().find(|target| target.revision == record.number).map_or(0, |target| target.percent);
    let failed = record.failed.as_ref().map(|failed| failed.message.clone());
    control::Revision {
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        service: record.service.clone(),
        generation: record.generation,
        ready: record.been_ready,
        message: failed.or_else(|| state.unplaced.clone()).unwrap_or_default(),
        traffic_percent: u32::from(share),
        ready_replicas: counts.ready,
        desired_replicas: state.wanted,
        created_at: Some(timestamp(record.created_at)),
    }
}

/// A replica.
pub fn replica(world: &World, state: &ReplicaState) -> control::Replica {
    let (gpu_memory_bytes, gpu_memory_requested_bytes) = gpu_view::memory_of(world, state);
    let record = &state.record;
    let status = state.status.clone().unwrap_or_default();
    let revision = record.revision.split_once('/').map_or(record.revision.as_str(), |(_, name)| name);
    let transition = status.transition.as_ref();
    control::Replica {
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        service: record.service.clone(),
        revision: revision.to_owned(),
        node: record.node.clone(),
        gpu_indices: record.gpu_indices.clone(),
        mig_devices: record.mig_devices.clone(),
        phase: phase_name(world, state).to_owned(),
        message: status.message,
        restarts: status.restarts,
        created_at: Some(timestamp(record.created_at)),
        ready_at: status.ready_at,
        pid: status.pid,
        adopted: status.adopted,
        holds_gpu_memory: status.holds_gpu_memory,
        memory_bytes: status.memory_bytes,
        rung: transition.map_or("", |it| rung_name(it.to())).to_owned(),
        rung_before: transition.map_or("", |it| rung_name(it.from())).to_owned(),
        rung_took: transition.and_then(|it| it.took),
        gpu_memory_bytes,
        gpu_memory_requested_bytes,
    }
}

/// All phases that replicas are shown in.
pub const PHASES: [&str; 9] =
    ["Pending", "Fetching", "Starting", "Ready", "Draining", "Failed", "Asleep", "Stopped", "Unknown"];

/// The phase that a replica is shown in. It is `Unknown` until its node has been heard from in this coordinator's life.
pub fn phase_name(world: &World, state: &ReplicaState) -> &'static str {
    let node = world.nodes.get(&state.record.node);
    if state.status.is_none() && node.is_some_and(|node| !node.heard) {
        return "Unknown";
    }
    match state.phase() {
        ReplicaPhase::Stopped => "Stopped",
        _ if state.record.draining => "Draining",
        ReplicaPhase::Unspecified | ReplicaPhase::Pending => "Pending",
        ReplicaPhase::Fetching => "Fetching",
        ReplicaPhase::Starting => "Starting",
        ReplicaPhase::Ready => "Ready",
        ReplicaPhase::Draining => "Draining",
        ReplicaPhase::Failed => "Failed",
        ReplicaPhase::Asleep => "Asleep",
    }
}

fn rung_name(rung: Rung) -> &'static str {
    match rung {
        Rung::Unspecified => "",
        Rung::Absent => "Absent",
        Rung::Cached => "Cached",
        Rung::Staged => "Staged",
        Rung::Asleep => "Asleep",
        Rung::Serving => "Serving",
    }
}

/// `Lost` once its lease has run out, else `Ready` while its agent is connected, and `Unknown` in between.
pub fn node_state(world: &World, state: &NodeState, now: Timestamp) -> &'static str {
    match state {
        _ if state.lost(world.settings.node_lease, now) => "Lost",
        _ if state.session.is_some() => "Ready",
        _ => "Unknown",
    }
}

/// A node with its GPUs and who holds them.
pub fn node(world: &World, state: &NodeState, now: Timestamp) -> control::Node {
    let inventory = state.inventory.clone().unwrap_or_default();
    let holders: Vec<_> = state.replicas.iter().filter_map(|name| world.replicas.get(name)).collect();
    control::Node {
        name: state.record.name.clone(),
        state: node_state(world, state, now).to_owned(),
        agent_version: state.hello.agent_version.clone(),
        peer_address: state.hello.peer_address.clone(),
        ingress_address: state.hello.ingress_address.clone(),
        gpus: inventory.gpus.iter().map(|gpu| gpu_view::node_gpu(state, gpu, &holders)).collect(),
        gpu_error: gpu_view::error(state, now),
        events: state.events.iter().map(event).collect(),
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

/// A scaling decision.
pub fn decision(revision: &str, time: Timestamp, decision: &Decision) -> control::Decision {
    control::Decision {
        time: Some(timestamp(time)),
        revision: revision.to_owned(),
        ready: decision.ready,
        starting: decision.starting,
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
    let mut all: Vec<_> = world
        .revisions_of(state)
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

/// Events of services, oldest first; an empty namespace or name is all of them.
pub fn events(world: &World, namespace: &str, name: &str) -> Vec<control::ServiceEvent> {
    let services = world.services.values().filter(|state| {
        let service = &state.record.service;
        (namespace.is_empty() || service.namespace == namespace) && (name.is_empty() || service.name == name)
    });
    let of = |state: &ServiceState, one: &Event| control::ServiceEvent {
        namespace: state.record.service.namespace.clone(),
        service: state.record.service.name.clone(),
        event: Some(event(one)),
    };
    let mut all: Vec<_> =
        services.flat_map(|state| state.events.iter().map(move |one| (one.time, of(state, one)))).collect();
    all.sort_by_key(|(time, _)| *time);
    all.into_iter().map(|(_, event)| event).collect()
}

/// Everything about a service.
pub fn describe(world: &World, state: &ServiceState) -> control::DescribeResponse {
    let revisions: Vec<_> = world.revisions_of(state).collect();
    control::DescribeResponse {
        service: Some(service(world, state)),
        replicas: revisions
            .iter()
            .flat_map(|revision| &revision.replicas)
            .filter_map(|name| world.replicas.get(name))
            .map(|state| replica(world, state))
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
