//! W3C trace context: in and out of headers and protobuf fields.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::TraceContextExt as _,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// A trace context as two header values, for messages that are not HTTP.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// W3C `traceparent`, empty where there is none.
    pub traceparent: String,
    /// W3C `tracestate`, often empty.
    pub tracestate: String,
}

impl TraceContext {
    /// The context of a span; empty where the span is not recorded.
    pub fn of(span: &Span) -> Self {
        let mut context = Self::default();
        let otel = span.context();
        if otel.span().span_context().is_valid() {
            TraceContextPropagator::new().inject_context(&otel, &mut context);
        }
        context
    }
}

impl Injector for TraceContext {
    fn set(&mut self, key: &str, value: String) {
        match key {
            "traceparent" => self.traceparent = value,
            "tracestate" => self.tracestate = value,
            _ => {}
        }
    }
}

impl Extractor for TraceContext {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(self.traceparent.as_str()),
            "tracestate" => Some(self.tracestate.as_str()),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// Makes `span` a child of a context that came in a message. Nothing happens where that is empty or
/// unreadable, or where spans are not recorded.
pub fn set_parent(span: &Span, context: &TraceContext) {
    adopt(span, TraceContextPropagator::new().extract(context));
}

/// Makes `span` a child of the context in a request's headers, if there is one.
pub fn extract(headers: &HeaderMap, span: &Span) {
    adopt(span, TraceContextPropagator::new().extract(&Headers(headers)));
}

fn adopt(span: &Span, parent: Context) {
    if parent.span().span_context().is_valid() {
        // Fails where no OpenTelemetry layer is installed; then nobody looks at the span.
        let _ = span.set_parent(parent);
    }
}

/// Puts the span's context into a request's headers. Where spans are not recorded, the headers stay
/// as they came, so that a client's context still reaches the model server.
pub fn inject(span: &Span, headers: &mut HeaderMap) {
    let otel = span.context();
    if otel.span().span_context().is_valid() {
        TraceContextPropagator::new().inject_context(&otel, &mut HeadersMut(headers));
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (key.parse::<HeaderName>(), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
    use tracing::info_span;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_goes_through_headers_and_messages_into_one_trace() {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let subscriber = tracing_subscriber::registry().with(crate::otlp_layer(&provider));
        tracing::subscriber::with_default(subscriber, || {
            let request = info_span!("request");
            let mut headers = HeaderMap::from_iter([("traceparent".parse().unwrap(), PARENT.parse().unwrap())]);
            extract(&headers, &request);
            let message = TraceContext::of(&request);
            let decision = info_span!("decision");
            set_parent(&decision, &message);
            inject(&decision, &mut headers);
            let out = headers["traceparent"].to_str().unwrap();
            assert!(out.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && out != PARENT, "{out}");
        });
        let spans = exporter.get_finished_spans().unwrap();
        let span = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
        assert_eq!(span("request").parent_span_id.to_string(), "b7ad6b7169203331");
        assert_eq!(span("decision").parent_span_id, span("request").span_context.span_id());
    }

    #[test]
    fn with_export_off_headers_stay_as_they_came() {
        let span = info_span!("request");
        let mut headers = HeaderMap::from_iter([("traceparent".parse().unwrap(), PARENT.parse().unwrap())]);
        extract(&headers, &span);
        inject(&span, &mut headers);
        assert_eq!(headers["traceparent"], PARENT);
        assert_eq!(TraceContext::of(&span), TraceContext::default());
    }
}
