//! Logs to standard error, spans to an OTLP receiver where one is named.

use std::{env, time::Duration};

use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer, layer::SubscriberExt as _, registry::LookupSpan, util::SubscriberInitExt as _,
};

/// How logs look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What a process says of itself.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `service.name`, unless `OTEL_SERVICE_NAME` says otherwise.
    pub service_name: &'static str,
    /// `service.version`.
    pub version: &'static str,
    /// How logs look.
    pub format: LogFormat,
    /// `tracing-subscriber` filter, such as `info` or `pilotlight_agent=debug,info`.
    pub filter: String,
    /// Colours; for terminals.
    pub colour: bool,
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log filter cannot be read.
    #[error("log filter {filter:?}: {error}; expected a level or target=level, comma separated")]
    Filter {
        /// As given.
        filter: String,
        /// Why.
        error: tracing_subscriber::filter::ParseError,
    },
    /// Another subscriber is installed already.
    #[error("telemetry is set up already: {0}")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Why spans are not exported although the standard variables ask for it.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("{name}={value:?}: expected {expected}")]
    Variable { name: &'static str, value: String, expected: &'static str },
    #[error("OTLP exporter: {0}")]
    Exporter(#[from] ExporterBuildError),
}

/// Longest wait for the receiver when a process ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends what is left when it is shut down.
#[derive(Debug)]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Guard {
    /// Sends spans that wait. Blocks for at most 2 s.
    pub fn shutdown(self) {
        if let Some(provider) = self.provider
            && let Err(error) = provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT)
        {
            tracing::warn!(%error, "some spans were not sent");
        }
    }
}

/// Installs the process's subscriber.
///
/// Honours `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER` (`otlp`, `none`), `OTEL_EXPORTER_OTLP_ENDPOINT`,
/// `OTEL_EXPORTER_OTLP_PROTOCOL` (`http/protobuf`, `http/json`, `grpc`) and their `_TRACES_` forms, and by the SDK
/// itself `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_EXPORTER_OTLP_TIMEOUT`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
/// `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*`.
///
/// A value of these that cannot be used is logged as a warning, and the process runs without export: telemetry never
/// keeps a process from starting. gRPC needs a Tokio runtime.
///
/// # Errors
/// The filter cannot be read, or a subscriber is installed already.
pub fn init(settings: Settings) -> Result<Guard, TelemetryError> {
    let filter = EnvFilter::try_new(&settings.filter)
        .map_err(|error| TelemetryError::Filter { filter: settings.filter.clone(), error })?;
    let (provider, failure) = match provider(&settings) {
        Ok(provider) => (provider, None),
        Err(error) => (None, Some(error)),
    };
    let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(settings.colour);
    let logs = match settings.format {
        LogFormat::Text => logs.boxed(),
        LogFormat::Json => logs.json().boxed(),
    };
    let spans = provider.as_ref().map(|provider| otlp_layer(provider).with_filter(spans_of_interest()));
    tracing_subscriber::registry().with(logs.with_filter(filter)).with(spans).try_init()?;
    if let Some(error) = failure {
        tracing::warn!(%error, "traces are not exported");
    }
    Ok(Guard { provider })
}

/// A layer that records spans with `provider`.
pub fn otlp_layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    tracing_opentelemetry::layer().with_tracer(provider.tracer("pilotlight"))
}

/// Ours, at info; the exporter's own requests must not make spans, or it would never come to rest.
fn spans_of_interest() -> EnvFilter {
    EnvFilter::new(
        "off,pilotlight=info,pilotlight_agent=info,pilotlight_coordinator=info,pilotlight_example_server=info",
    )
}

/// The tracer provider, if the standard variables ask for export.
fn provider(settings: &Settings) -> Result<Option<SdkTracerProvider>, ExportError> {
    let Some(protocol) = protocol(variable)? else { return Ok(None) };
    // The HTTP client takes the process's default provider. Another one may be installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let exporter = match protocol {
        Protocol::Grpc => SpanExporter::builder().with_tonic().build()?,
        http => SpanExporter::builder().with_http().with_protocol(http).build()?,
    };
    let mut resource = Resource::builder().with_attribute(KeyValue::new("service.version", settings.version));
    if variable("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(settings.service_name);
    }
    Ok(Some(SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter).build()))
}

/// How spans are sent by the standard variables; `None` if they do not ask for export.
fn protocol(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Protocol>, ExportError> {
    const EXPORTER: &str = "OTEL_TRACES_EXPORTER";
    const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    const PROTOCOLS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let given = ENDPOINTS.iter().any(|name| variable(name).is_some());
    let exports = match variable(EXPORTER) {
        None => given,
        Some(name) if name == "otlp" => given,
        Some(name) if name == "none" => false,
        Some(value) => return Err(ExportError::Variable { name: EXPORTER, value, expected: "otlp or none" }),
    };
    if disabled || !exports {
        return Ok(None);
    }
    let Some((name, value)) = PROTOCOLS.into_iter().find_map(|name| Some((name, variable(name)?))) else {
        return Ok(Some(Protocol::HttpBinary));
    };
    match value.as_str() {
        "http/protobuf" => Ok(Some(Protocol::HttpBinary)),
        "http/json" => Ok(Some(Protocol::HttpJson)),
        "grpc" => Ok(Some(Protocol::Grpc)),
        _ => Err(ExportError::Variable { name, value, expected: "grpc, http/protobuf or http/json" }),
    }
}

/// A variable's value; empty counts as unset, as OpenTelemetry has it.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");

    fn protocol_of(variables: &[(&str, &str)]) -> Result<Option<Protocol>, String> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        protocol(find).map_err(|error| error.to_string())
    }

    #[test]
    fn export_is_off_unless_an_endpoint_is_given() {
        assert_eq!(protocol_of(&[]), Ok(None));
        assert_eq!(protocol_of(&[ENDPOINT]), Ok(Some(Protocol::HttpBinary)));
        assert_eq!(protocol_of(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c")]), Ok(Some(Protocol::HttpBinary)));
        assert_eq!(protocol_of(&[ENDPOINT, ("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        assert_eq!(protocol_of(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
    }

    #[test]
    fn the_protocol_of_traces_wins_over_the_one_of_all_signals() {
        let all = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        assert_eq!(protocol_of(&[ENDPOINT, all]), Ok(Some(Protocol::Grpc)));
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json");
        assert_eq!(protocol_of(&[ENDPOINT, all, traces]), Ok(Some(Protocol::HttpJson)));
    }

    #[test]
    fn an_unknown_value_is_named_with_its_variable_and_what_is_allowed() {
        let error = protocol_of(&[ENDPOINT, ("OTEL_EXPORTER_OTLP_PROTOCOL", "smtp")]).unwrap_err();
        assert_eq!(error, "OTEL_EXPORTER_OTLP_PROTOCOL=\"smtp\": expected grpc, http/protobuf or http/json");
        let error = protocol_of(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "zipkin")]).unwrap_err();
        assert_eq!(error, "OTEL_TRACES_EXPORTER=\"zipkin\": expected otlp or none");
    }
}
