//! Gauges of nodes, GPUs, services and replicas, counted in the control loop from time to time.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio_util::sync::CancellationToken;

use crate::{
    reconcile::{Handle, World, view},
    spec::ConditionStatus,
};

/// Between counts.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// Labels of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NodeLabels {
    state: &'static str,
}

/// Labels of services.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    condition: String,
    status: &'static str,
}

/// Labels of replicas.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReplicaLabels {
    phase: &'static str,
}

/// Labels of GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GpuLabels {
    state: &'static str,
}

/// States of GPUs.
const GPU_STATES: [&str; 2] = ["Available", "Quarantined"];

/// How many nodes, GPUs, services and replicas are in which state.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct StateCounts {
    sessions: i64,
    nodes: BTreeMap<&'static str, i64>,
    gpus: BTreeMap<&'static str, i64>,
    services: BTreeMap<(String, &'static str), i64>,
    replicas: BTreeMap<&'static str, i64>,
}

impl StateCounts {
    /// Counts what there is. Takes time linear in the number of nodes, services and replicas.
    pub fn of(world: &World, now: Timestamp) -> Self {
        let mut counts = Self::default();
        for node in world.nodes.values() {
            counts.sessions += i64::from(node.session.is_some());
            *counts.nodes.entry(view::node_state(world, node, now)).or_default() += 1;
            for gpu in node.inventory.iter().flat_map(|inventory| &inventory.gpus) {
                let is_quarantined = node.quarantine(gpu.index).is_some();
                *counts.gpus.entry(GPU_STATES[usize::from(is_quarantined)]).or_default() += 1;
            }
        }
        for service in world.services.values() {
            for (name, condition) in &service.conditions {
                let status = match condition.status {
                    ConditionStatus::True => "True",
                    ConditionStatus::False => "False",
                    ConditionStatus::Unknown => "Unknown",
                };
                *counts.services.entry((name.clone(), status)).or_default() += 1;
            }
        }
        for replica in world.replicas.values() {
            *counts.replicas.entry(view::phase_name(world, replica)).or_default() += 1;
        }
        counts
    }
}

/// What [`StateCounts`] are shown as.
#[derive(Debug, Clone, Default)]
pub struct StateGauges {
    sessions: Gauge,
    nodes: Family<NodeLabels, Gauge>,
    gpus: Family<GpuLabels, Gauge>,
    services: Family<ServiceLabels, Gauge>,
    replicas: Family<ReplicaLabels, Gauge>,
}

impl StateGauges {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("coordinator_agent_sessions", "Agents that are connected", self.sessions.clone());
        registry.register("coordinator_nodes", "Nodes that have joined, by state", self.nodes.clone());
        registry.register("coordinator_gpus", "GPUs of nodes, by state", self.gpus.clone());
        registry.register(
            "coordinator_services",
            "InferenceServices by condition and the condition's status",
            self.services.clone(),
        );
        registry.register("coordinator_replicas", "Replicas by phase", self.replicas.clone());
    }

    /// Shows new counts. States that nothing is in any more show 0.
    pub fn set(&self, counts: &StateCounts) {
        self.sessions.set(counts.sessions);
        for state in ["Ready", "Unknown", "Lost"] {
            self.nodes.get_or_create(&NodeLabels { state }).set(counts.nodes.get(state).copied().unwrap_or(0));
        }
        for state in GPU_STATES {
            self.gpus.get_or_create(&GpuLabels { state }).set(counts.gpus.get(state).copied().unwrap_or(0));
        }
        let conditions: Vec<_> = counts.services.keys().map(|(condition, _)| condition.clone()).collect();
        self.services.clear();
        for condition in conditions {
            for status in ["True", "False", "Unknown"] {
                let count = counts.services.get(&(condition.clone(), status)).copied().unwrap_or(0);
                self.services.get_or_create(&ServiceLabels { condition: condition.clone(), status }).set(count);
            }
        }
        for phase in view::PHASES {
            self.replicas.get_or_create(&ReplicaLabels { phase }).set(counts.replicas.get(phase).copied().unwrap_or(0));
        }
    }

    /// Counts every 5 s until `shutdown` or until the control loop has ended.
    pub async fn follow(self, handle: Handle, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(COUNT_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let Ok(counts) = handle.read(StateCounts::of).await else { return };
            self.set(&counts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_nothing_is_in_any_more_shows_zero() {
        let gauges = StateGauges::default();
        let ready = StateCounts { replicas: BTreeMap::from([("Ready", 2)]), ..StateCounts::default() };
        gauges.set(&ready);
        assert_eq!(gauges.replicas.get_or_create(&ReplicaLabels { phase: "Ready" }).get(), 2);
        gauges.set(&StateCounts::default());
        assert_eq!(gauges.replicas.get_or_create(&ReplicaLabels { phase: "Ready" }).get(), 0);
    }
}
