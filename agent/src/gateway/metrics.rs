//! What the gateway counts, named by OpenTelemetry's conventions in Prometheus' form.

use http::StatusCode;
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
use tokio::time::Instant;

/// Labels of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// `<namespace>/<name>`; empty where no service was found.
    pub service: String,
    /// Status code.
    pub http_response_status_code: u16,
}

/// Why the gateway closed a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// No complete head of a request arrived in time.
    HeaderTimeout,
    /// It had no request for too long.
    IdleTimeout,
    /// It was among the oldest idle ones when few connections were left until the limit.
    Shed,
}

impl CloseReason {
    /// The label's value.
    fn label(self) -> &'static str {
        match self {
            Self::HeaderTimeout => "header_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::Shed => "shed",
        }
    }
}

/// Labels of a closed connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CloseLabels {
    /// `header_timeout`, `idle_timeout` or `shed`.
    pub reason: &'static str,
}

/// Counters and times. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GatewayMetrics {
    duration: Family<RequestLabels, Histogram, fn() -> Histogram>,
    active: Gauge,
    /// Requests sent again.
    pub retries: Counter,
    /// Requests refused since too many waited.
    pub shed: Counter,
    /// Requests whose body did not arrive in time.
    pub request_body_timeouts: Counter,
    /// Responses that their reader did not take.
    pub response_write_timeouts: Counter,
    /// Connections that could not be accepted.
    pub accept_errors: Counter,
    /// Connections of clients.
    pub open_connections: Gauge,
    connections_closed: Family<CloseLabels, Counter>,
}

impl GatewayMetrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        // 1 ms to about 9 minutes.
        let metrics = Self {
            duration: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 20))),
            active: Gauge::default(),
            retries: Counter::default(),
            shed: Counter::default(),
            request_body_timeouts: Counter::default(),
            response_write_timeouts: Counter::default(),
            accept_errors: Counter::default(),
            open_connections: Gauge::default(),
            connections_closed: Family::default(),
        };
        registry.register_with_unit(
            "http_server_request_duration",
            "Time from a request's arrival to the head of its answer, waiting included",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register("http_server_active_requests", "Requests waiting or being answered", metrics.active.clone());
        registry.register("gateway_retries", "Requests sent again", metrics.retries.clone());
        registry.register("gateway_requests_shed", "Requests refused by a full queue", metrics.shed.clone());
        metrics.register_clients(registry);
        metrics
    }

    fn register_clients(&self, registry: &mut Registry) {
        registry.register("http_server_open_connections", "Connections of clients", self.open_connections.clone());
        let closed = self.connections_closed.clone();
        registry.register("gateway_connections_closed", "Connections of clients that the gateway closed", closed);
        let errors = self.accept_errors.clone();
        registry.register("gateway_accept_errors", "Connections of clients that could not be accepted", errors);
        registry.register(
            "gateway_request_body_timeouts",
            "Requests whose body stopped arriving or arrived too slowly",
            self.request_body_timeouts.clone(),
        );
        registry.register(
            "gateway_response_write_timeouts",
            "Responses and connections cut off since the client accepted nothing",
            self.response_write_timeouts.clone(),
        );
    }

    /// The gateway closes a client's connection.
    pub fn count_closed(&self, reason: CloseReason) {
        self.connections_closed.get_or_create(&CloseLabels { reason: reason.label() }).inc();
    }

    /// A request begins.
    pub fn begin(&self) -> Timed<'_> {
        self.active.inc();
        Timed { metrics: self, began: Instant::now() }
    }
}

/// A request that runs.
pub struct Timed<'a> {
    metrics: &'a GatewayMetrics,
    began: Instant,
}

impl Timed<'_> {
    /// Its answer has begun.
    pub fn end(&self, service: &str, status: StatusCode) {
        let labels = RequestLabels { service: service.to_owned(), http_response_status_code: status.as_u16() };
        self.metrics.duration.get_or_create(&labels).observe(self.began.elapsed().as_secs_f64());
    }
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.metrics.active.dec();
    }
}
