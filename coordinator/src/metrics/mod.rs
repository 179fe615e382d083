//! What a coordinator measures, named by the conventions of Prometheus and OpenTelemetry. docs/metrics.md lists all.

mod grpc;
mod state;

use std::time::Duration;

use pilotlight_identity::AcceptMetrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{reconcile::scale::DecisionCounts, store::StoreError};
pub use grpc::GrpcMetricsLayer;
pub use state::{StateCounts, StateGauges};

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Labels of a store operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
}

/// Labels of a failed store operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StoreErrorLabels {
    operation: &'static str,
    error_type: &'static str,
}

/// Labels of a scaling decision.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    direction: &'static str,
}

/// Labels of a finished gRPC call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    rpc_method: String,
    rpc_response_status_code: String,
}

/// A coordinator's metrics. Clones share their values.
#[derive(Debug, Clone)]
pub struct CoordinatorMetrics {
    leader: Gauge,
    leader_transitions: Counter,
    store_duration: Histograms<OperationLabels>,
    store_errors: Family<StoreErrorLabels, Counter>,
    control_loop_duration: Histogram,
    inputs_waiting: Gauge,
    decisions: Family<DecisionLabels, Counter>,
    route_pushes: Counter,
    route_push_bytes: Counter,
    calls: Histograms<CallLabels>,
    /// TLS connections that were refused.
    pub accepts: AcceptMetrics,
    /// Gauges of nodes, services and replicas.
    pub state: StateGauges,
}

impl Default for CoordinatorMetrics {
    fn default() -> Self {
        // 0.1 ms to 26 s for what should be fast, 1 ms to about 9 minutes for calls, some of which stream.
        let fast = || Histogram::new(exponential_buckets(0.0001, 4.0, 10));
        Self {
            leader: Gauge::default(),
            leader_transitions: Counter::default(),
            store_duration: Family::new_with_constructor(fast),
            store_errors: Family::default(),
            control_loop_duration: fast(),
            inputs_waiting: Gauge::default(),
            decisions: Family::default(),
            route_pushes: Counter::default(),
            route_push_bytes: Counter::default(),
            calls: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 4.0, 10))),
            accepts: AcceptMetrics::default(),
            state: StateGauges::default(),
        }
    }
}

impl CoordinatorMetrics {
    /// Registers all of them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "coordinator_leader",
            "1 while this coordinator leads its cell, otherwise 0",
            self.leader.clone(),
        );
        registry.register(
            "coordinator_leader_transitions",
            "Times this coordinator became the leader or ceased to be it",
            self.leader_transitions.clone(),
        );
        registry.register_with_unit(
            "coordinator_store_operation_duration",
            "Time that store operations take, by operation",
            Unit::Seconds,
            self.store_duration.clone(),
        );
        registry.register(
            "coordinator_store_errors",
            "Store operations that failed, by operation and error",
            self.store_errors.clone(),
        );
        registry.register_with_unit(
            "coordinator_control_loop_duration",
            "Time that one pass of the control loop takes",
            Unit::Seconds,
            self.control_loop_duration.clone(),
        );
        registry.register(
            "coordinator_control_loop_inputs_waiting",
            "Messages that wait for the control loop",
            self.inputs_waiting.clone(),
        );
        registry.register(
            "coordinator_autoscaler_decisions",
            "Decisions of the autoscaler, by whether they changed the desired replicas",
            self.decisions.clone(),
        );
        registry.register("coordinator_route_pushes", "Route updates sent to agents", self.route_pushes.clone());
        registry.register_with_unit(
            "coordinator_route_push",
            "Encoded size of the route updates sent to agents",
            Unit::Bytes,
            self.route_push_bytes.clone(),
        );
        registry.register_with_unit(
            "rpc_server_call_duration",
            "Time until gRPC calls end, streams included, by method and status code",
            Unit::Seconds,
            self.calls.clone(),
        );
        self.accepts.register(registry);
        self.state.register(registry);
    }

    /// Records whether this coordinator leads. A repetition is no transition.
    pub fn set_leader(&self, leads: bool) {
        if self.leader.set(i64::from(leads)) != i64::from(leads) {
            self.leader_transitions.inc();
        }
    }

    /// Records a store operation, such as `commit`, that took this long.
    pub fn record_store(&self, operation: &'static str, took: Duration, error: Option<&StoreError>) {
        self.store_duration.get_or_create(&OperationLabels { operation }).observe(took.as_secs_f64());
        if let Some(error) = error {
            let labels = StoreErrorLabels { operation, error_type: error_type(error) };
            self.store_errors.get_or_create(&labels).inc();
        }
    }

    /// Records a pass of the control loop, and how many inputs wait after it.
    pub fn record_loop(&self, took: Duration, inputs_waiting: usize) {
        self.control_loop_duration.observe(took.as_secs_f64());
        self.inputs_waiting.set(i64::try_from(inputs_waiting).unwrap_or(i64::MAX));
    }

    /// Adds decisions of the autoscaler.
    pub fn record_decisions(&self, made: DecisionCounts) {
        for (direction, count) in [("up", made.up), ("down", made.down), ("none", made.unchanged)] {
            self.decisions.get_or_create(&DecisionLabels { direction }).inc_by(count);
        }
    }

    /// Records one route update of this many bytes that is sent to this many agents.
    pub fn record_route_push(&self, bytes: u64, agents: u64) {
        self.route_pushes.inc_by(agents);
        self.route_push_bytes.inc_by(bytes * agents);
    }

    /// Records a gRPC call that has ended.
    fn record_call(&self, method: &str, code: tonic::Code, took: Duration) {
        // Callers choose the paths of calls that are not implemented.
        let method = if code == tonic::Code::Unimplemented { "_OTHER" } else { method };
        let labels =
            CallLabels { rpc_method: method.to_owned(), rpc_response_status_code: grpc::code_name(code).to_owned() };
        self.calls.get_or_create(&labels).observe(took.as_secs_f64());
    }
}

fn error_type(error: &StoreError) -> &'static str {
    match error {
        StoreError::Conflict { .. } => "conflict",
        StoreError::Fenced => "fenced",
        StoreError::Compacted { .. } => "compacted",
        StoreError::TooLarge(_) => "too_large",
        StoreError::Unavailable(_) => "unavailable",
        StoreError::Unreadable { .. } => "unreadable",
        StoreError::Open(_) => "open",
        #[allow(unreachable_patterns, reason = "other branches may add errors")]
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_of_leadership_are_transitions() {
        let metrics = CoordinatorMetrics::default();
        metrics.set_leader(false);
        metrics.set_leader(true);
        metrics.set_leader(true);
        assert_eq!((metrics.leader.get(), metrics.leader_transitions.get()), (1, 1));
        metrics.set_leader(false);
        assert_eq!((metrics.leader.get(), metrics.leader_transitions.get()), (0, 2));
    }

    #[test]
    fn paths_that_are_not_implemented_make_no_series_of_their_own() {
        let metrics = CoordinatorMetrics::default();
        for path in ["/a", "/b"] {
            metrics.record_call(path, tonic::Code::Unimplemented, Duration::ZERO);
        }
        let labels =
            CallLabels { rpc_method: "_OTHER".to_owned(), rpc_response_status_code: "UNIMPLEMENTED".to_owned() };
        assert!(metrics.calls.get(&labels).is_some());
        let labels = CallLabels { rpc_method: "/a".to_owned(), ..labels };
        assert!(metrics.calls.get(&labels).is_none());
    }
}
