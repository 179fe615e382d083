//! Tracing, OTLP export, W3C context and Prometheus metrics, set up alike in every process.
