//! Prometheus metrics and the small HTTP listener that every process has.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Router,
    http::{HeaderMap, StatusCode, header},
    routing::get,
};
use prometheus_client::{encoding::text::encode, metrics::info::Info, registry::Registry};

use crate::text_format;

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

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `/metrics`, `/healthz` (the process answers) and `/readyz` (it can do its work). `readiness` says in words that it
/// can, or why it cannot.
///
/// Metrics are in Prometheus' text format 0.0.4, or in OpenMetrics if the request's `Accept` header names it.
pub fn http_router(
    metrics: &Metrics,
    readiness: impl Fn() -> Result<String, String> + Clone + Send + Sync + 'static,
) -> Router {
    let metrics = metrics.clone();
    let scrape = move |headers: HeaderMap| async move {
        let openmetrics = accepts_openmetrics(&headers);
        match metrics.text() {
            Ok(text) if openmetrics => (StatusCode::OK, [(header::CONTENT_TYPE, OPENMETRICS)], text),
            Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, PLAIN_TEXT)], text_format::from_openmetrics(&text)),
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

/// Returns `true` if a media type of `Accept` is OpenMetrics' and is not ruled out by `q=0`.
fn accepts_openmetrics(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("application/openmetrics-text"));
        let refused = parts.any(|part| part.strip_prefix("q=").and_then(|q| q.parse::<f32>().ok()) == Some(0.0));
        named && !refused
    })
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, body::to_bytes, http::Request};
    use prometheus_client::metrics::counter::Counter;
    use tower::ServiceExt as _;

    use super::*;

    async fn get(router: Router, path: &str) -> (StatusCode, String) {
        let (status, _, text) = get_accepting(router, path, "*/*").await;
        (status, text)
    }

    async fn get_accepting(router: Router, path: &str, accept: &str) -> (StatusCode, String, String) {
        let request = Request::get(path).header(header::ACCEPT, accept).body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        let status = response.status();
        let media_type = response.headers().get(header::CONTENT_TYPE).map_or("", |value| value.to_str().unwrap());
        let media_type = media_type.to_owned();
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, media_type, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn openmetrics_is_served_only_if_it_is_asked_for() {
        let router = http_router(&Metrics::new("pilotlight-test", "1.2.3"), || Ok("ok".to_owned()));
        let (_, media_type, text) = get_accepting(router.clone(), "/metrics", "*/*").await;
        assert!(media_type.starts_with("text/plain; version=0.0.4") && !text.contains("EOF"), "{media_type} {text}");
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let (_, media_type, text) = get_accepting(router.clone(), "/metrics", prometheus).await;
        assert!(media_type.starts_with("application/openmetrics-text; version=1.0.0"), "{media_type}");
        assert!(text.ends_with("# EOF\n"), "{text}");
        let (_, media_type, _) = get_accepting(router, "/metrics", "application/openmetrics-text;q=0").await;
        assert!(media_type.starts_with("text/plain"), "{media_type}");
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
        assert!(text.contains("# TYPE things_total counter\nthings_total 3\n"), "{text}");
        assert!(text.contains(r#"target_info{service_name="pilotlight-test",service_version="1.2.3"} 1"#), "{text}");
        assert_eq!(get(router.clone(), "/healthz").await.0, StatusCode::OK);
        let (status, text) = get(router, "/readyz").await;
        assert_eq!((status, text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not ready: no session\n"));
    }
}
