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

/// Counters and times. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GatewayMetrics {
    duration: Family<RequestLabels, Histogram, fn() -> Histogram>,
    active: Gauge,
    /// Requests sent again.
    pub retries: Counter,
    /// Requests refused since too many waited.
    pub shed: Counter,
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
        metrics
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
