//! Tracing, OTLP export, W3C context and Prometheus metrics, set up alike in every process.
//!
//! Export is switched on by OpenTelemetry's standard variables and off otherwise. With export off no
//! span data is made at all: an incoming `traceparent` then passes through the gateway untouched.

mod context;
mod metrics;
mod rate_limit;
mod service_manager;
mod setup;
mod status_server;
mod text_format;

pub use context::{TraceContext, extract, inject, set_parent};
pub use metrics::{Metrics, http_router};
pub use rate_limit::RateLimit;
pub use service_manager::notify_service_manager;
pub use setup::{Guard, LogFormat, Settings, TelemetryError, init, otlp_layer};
pub use status_server::serve_status;
