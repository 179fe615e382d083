//! Prometheus metrics and the small HTTP listener that every process has.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Router,
    http::{StatusCode, header},
    routing::get,
};
use prometheus_client::{encoding::text::encode, metrics::info::Info, registry::Registry};

/// A process's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// A registry with `target_info`, as OpenTelemetry's Prometheus form has it.
    pub fn new(service_name: &'static str, version: &'static str) -> Self {
        let mut registry = Registry::default();
        let target = Info::new(vec![("service_name", service_name), ("service_version", version)]);
        registry.register("target", "Target metadata", target);
        Self { registry: Arc::new(Mutex::new(registry)) }
    }

    /// Registers metrics.
    pub fn register(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// All metrics as OpenMetrics text.
    ///
    /// # Errors
    /// A metric cannot be written.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }
}

/// `/metrics`, `/healthz` (the process answers) and `/readyz` (it can do its work). `readiness` says in words that it
/// can, or why it cannot.
pub fn http_router(
    metrics: &Metrics,
    readiness: impl Fn() -> Result<String, String> + Clone + Send + Sync + 'static,
) -> Router {
    const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let metrics = metrics.clone();
    let scrape = move || async move {
        match metrics.text() {
            Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, OPENMETRICS)], text),
            Err(error) => {
                (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string())
            }
        }
    };
    let readiness = move || async move {
        match readiness() {
            Ok(state) => (StatusCode::OK, format!("{state}\n")),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
        }
    };
    Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, body::to_bytes, http::Request};
    use prometheus_client::metrics::counter::Counter;
    use tower::ServiceExt as _;

    use super::*;

    async fn get(router: Router, path: &str) -> (StatusCode, String) {
        let response = router.oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn metrics_and_health_are_served() {
        let metrics = Metrics::new("pilotlight-test", "1.2.3");
        let counter: Counter = Counter::default();
        counter.inc_by(3);
        metrics.register(|registry| registry.register("things", "Things seen", counter.clone()));
        let router = http_router(&metrics, || Err("no session".to_owned()));
        let (status, text) = get(router.clone(), "/metrics").await;
        assert_eq!(status, StatusCode::OK);
        assert!(text.contains("things_total 3\n") && text.ends_with("# EOF\n"), "{text}");
        assert!(text.contains(r#"target_info{service_name="pilotlight-test",service_version="1.2.3"} 1"#), "{text}");
        assert_eq!(get(router.clone(), "/healthz").await.0, StatusCode::OK);
        let (status, text) = get(router, "/readyz").await;
        assert_eq!((status, text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not ready: no session\n"));
    }
}
