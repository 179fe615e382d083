//! Logs to standard error, spans to an OTLP receiver where one is named.

use std::env;

use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
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
    /// A variable has a value that is not supported.
    #[error("{name}={value:?}: expected {expected}")]
    Variable {
        /// Which.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The exporter cannot be made.
    #[error("OTLP exporter: {0}")]
    Exporter(#[from] ExporterBuildError),
    /// Another subscriber is installed already.
    #[error("telemetry is set up already: {0}")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Sends what is left when it is shut down.
#[derive(Debug)]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Guard {
    /// Sends spans that wait. Blocks for as long as the exporter's timeout (10 s by default).
    pub fn shutdown(self) {
        if let Some(provider) = self.provider
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "some spans were not sent");
        }
    }
}

/// Installs the process's subscriber.
///
/// Honours `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER` (`otlp`, `none`), `OTEL_EXPORTER_OTLP_ENDPOINT`,
/// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, `OTEL_EXPORTER_OTLP_PROTOCOL` (`http/protobuf`, `grpc`), and by
/// the SDK itself `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*`.
///
/// # Errors
/// A variable or the filter has a value that cannot be used, or a subscriber is installed already.
pub fn init(settings: Settings) -> Result<Guard, TelemetryError> {
    let filter = EnvFilter::try_new(&settings.filter)
        .map_err(|error| TelemetryError::Filter { filter: settings.filter.clone(), error })?;
    let provider = provider(&settings)?;
    let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(settings.colour);
    let logs = match settings.format {
        LogFormat::Text => logs.boxed(),
        LogFormat::Json => logs.json().boxed(),
    };
    let spans = provider.as_ref().map(|provider| otlp_layer(provider).with_filter(spans_of_interest()));
    tracing_subscriber::registry().with(logs.with_filter(filter)).with(spans).try_init()?;
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

/// The tracer provider, where the standard variables ask for export.
fn provider(settings: &Settings) -> Result<Option<SdkTracerProvider>, TelemetryError> {
    let asked = variable("OTEL_EXPORTER_OTLP_ENDPOINT").or_else(|| variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"));
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let exporter = match variable("OTEL_TRACES_EXPORTER").as_deref() {
        None | Some("otlp") => asked.is_some(),
        Some("none") => false,
        Some(other) => {
            let (name, value) = ("OTEL_TRACES_EXPORTER", other.to_owned());
            return Err(TelemetryError::Variable { name, value, expected: "otlp or none" });
        }
    };
    if disabled || !exporter {
        return Ok(None);
    }
    let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL").or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"));
    let exporter = match protocol.as_deref() {
        None | Some("http/protobuf") => SpanExporter::builder().with_http().build()?,
        Some("grpc") => SpanExporter::builder().with_tonic().build()?,
        Some(other) => {
            let (name, value) = ("OTEL_EXPORTER_OTLP_PROTOCOL", other.to_owned());
            return Err(TelemetryError::Variable { name, value, expected: "http/protobuf or grpc" });
        }
    };
    let mut resource = Resource::builder().with_attribute(KeyValue::new("service.version", settings.version));
    if variable("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(settings.service_name);
    }
    Ok(Some(SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter).build()))
}

/// A variable's value; empty counts as unset, as OpenTelemetry has it.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
