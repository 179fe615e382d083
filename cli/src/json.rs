//! The control API's messages as JSON.

use pilotlight_proto::control::v1::{
    Decision, GpuHealth, GpuProcess, GpuQuarantine, Node, NodeAvailability, NodeGpu, NodeMigDevice, Object, Replica,
    Revision, Service, Usage, XidEvent,
};
use serde_json::{Value, json};

use crate::table::moment;

/// As kubectl wraps several objects.
pub fn list(items: Vec<Value>) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

/// In KServe's shape.
pub fn service(service: &Service) -> Value {
    serde_json::from_str(&service.object_json).unwrap_or_default()
}

/// As it was applied.
pub fn object(object: &Object) -> Value {
    serde_json::from_str(&object.object_json).unwrap_or_default()
}

/// A node.
pub fn node(node: &Node) -> Value {
    let gpus: Vec<_> = node.gpus.iter().map(gpu).collect();
    let availability = match node.availability() {
        NodeAvailability::Unspecified | NodeAvailability::Open => "Open",
        NodeAvailability::Cordoned => "Cordoned",
        NodeAvailability::Draining => "Draining",
    };
    json!({
        "name": node.name, "state": node.state, "agentVersion": node.agent_version,
        "peerAddress": node.peer_address, "ingressAddress": node.ingress_address, "gpus": gpus,
        "labels": node.labels, "simulated": node.simulated, "cpuCores": node.cpu_cores,
        "memoryBytes": node.memory_bytes, "lastSeen": moment(node.last_seen),
        "availability": availability, "replicas": node.replicas, "gpuError": node.gpu_error,
    })
}

fn gpu(gpu: &NodeGpu) -> Value {
    let device =
        |device: &NodeMigDevice| json!({"uuid": device.uuid, "profile": device.profile, "replica": device.replica});
    json!({
        "index": gpu.index, "product": gpu.product, "memoryBytes": gpu.memory_bytes, "replica": gpu.replica,
        "replicas": gpu.replicas, "migDevices": gpu.mig_devices.iter().map(device).collect::<Vec<_>>(),
        "uuid": gpu.uuid, "quarantine": gpu.quarantine.as_ref().map(quarantine), "health": gpu.health.as_ref().map(health),
    })
}

fn quarantine(quarantine: &GpuQuarantine) -> Value {
    json!({"since": moment(quarantine.since), "reason": quarantine.reason, "message": quarantine.message})
}

fn health(health: &GpuHealth) -> Value {
    let xid = |xid: &XidEvent| json!({"xid": xid.xid, "count": xid.count, "lastAt": moment(xid.last_at)});
    let process =
        |process: &GpuProcess| json!({"pid": process.pid, "name": process.name, "memoryBytes": process.memory_bytes});
    json!({
        "lost": health.lost, "xids": health.xids.iter().map(xid).collect::<Vec<_>>(),
        "eccUncorrectableErrors": health.ecc_uncorrectable_errors, "rowRemapPending": health.row_remap_pending,
        "rowRemapFailed": health.row_remap_failed, "nvlinksActive": health.nvlinks_active,
        "nvlinksExpected": health.nvlinks_expected, "throttleReasons": health.throttle_reasons,
        "temperatureCelsius": health.temperature_celsius, "utilizationPercent": health.utilization_percent,
        "memoryUsedBytes": health.memory_used_bytes, "foreignMemoryBytes": health.foreign_memory_bytes,
        "foreignProcesses": health.foreign_processes.iter().map(process).collect::<Vec<_>>(),
        "unreadable": health.unreadable,
    })
}

/// A revision.
pub fn revision(revision: &Revision) -> Value {
    json!({
        "namespace": revision.namespace, "name": revision.name, "service": revision.service,
        "generation": revision.generation, "ready": revision.ready, "message": revision.message,
        "trafficPercent": revision.traffic_percent, "readyReplicas": revision.ready_replicas,
        "desiredReplicas": revision.desired_replicas, "createdAt": moment(revision.created_at),
    })
}

/// A replica.
pub fn replica(replica: &Replica) -> Value {
    json!({
        "namespace": replica.namespace, "name": replica.name, "service": replica.service,
        "revision": replica.revision, "node": replica.node, "gpuIndices": replica.gpu_indices,
        "migDevices": replica.mig_devices,
        "phase": replica.phase, "message": replica.message, "restarts": replica.restarts,
        "createdAt": moment(replica.created_at), "readyAt": moment(replica.ready_at), "pid": replica.pid,
        "adopted": replica.adopted, "holdsGpuMemory": replica.holds_gpu_memory, "memoryBytes": replica.memory_bytes,
        "gpuMemoryBytes": replica.gpu_memory_bytes, "gpuMemoryRequestedBytes": replica.gpu_memory_requested_bytes,
        "rung": replica.rung, "rungBefore": replica.rung_before, "rungSeconds": seconds(&replica.rung_took),
    })
}

/// A scaling decision.
pub fn decision(decision: &Decision) -> Value {
    json!({
        "time": moment(decision.time), "revision": decision.revision, "ready": decision.ready, "starting": decision.starting,
        "desired": decision.desired, "applied": decision.applied, "stableValue": decision.stable_value,
        "panicValue": decision.panic_value, "target": decision.target, "panic": decision.panic,
        "excessBurstCapacity": decision.excess_burst_capacity, "reason": decision.reason,
    })
}

/// Usage of an hour.
pub fn usage(usage: &Usage) -> Value {
    json!({
        "namespace": usage.namespace, "service": usage.service, "hour": moment(usage.hour),
        "revision": usage.revision, "state": usage.state, "requests": usage.requests, "gpuClass": usage.gpu_class, "replicaSeconds": seconds(&usage.replica_time), "gpuSeconds": seconds(&usage.gpu_time),
    })
}

/// Seconds of a duration.
pub fn seconds(duration: &Option<prost_types::Duration>) -> f64 {
    duration.as_ref().map_or(0.0, |duration| duration.seconds as f64 + f64::from(duration.nanos) / 1e9)
}
