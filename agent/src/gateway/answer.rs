//! The gateway's own answers: small JSON, with what to do, in the form that the caller's client library shows.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use serde_json::{Map, Value, json};

use super::error_format::ErrorFormat;

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// Any body.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Why the gateway answers by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// No service has this host or path.
    UnknownService {
        /// Host asked for.
        host: String,
        /// Path asked for.
        path: String,
        /// Some that are known; empty unless the agent's configuration allows to list them.
        known: Vec<String>,
    },
    /// This node has not heard yet which services there are.
    NoRoutes,
    /// The service has no revision yet.
    NoRevision {
        /// `<namespace>/<name>`.
        service: String,
    },
    /// The request's body is too large.
    BodyTooLarge {
        /// Bytes allowed.
        limit: u64,
    },
    /// As many requests wait as may.
    QueueFull {
        /// That many.
        limit: usize,
    },
    /// No answer in time.
    Timeout {
        /// Seconds allowed.
        seconds: u64,
        /// True where it never got a slot.
        waiting: bool,
    },
    /// No replica was ready in time, and why.
    NotReady {
        /// Seconds allowed.
        seconds: u64,
        /// Reason and message.
        cause: String,
    },
    /// The replica could not be reached, or broke off before it answered.
    BadGateway {
        /// Why.
        reason: String,
    },
    /// No replica is ready, and the last attempt to start one failed for a reason that waiting does not cure.
    ReplicaFailed {
        /// CamelCase, such as `Error` or `ErrImagePull`.
        reason: String,
        /// Why, with the exit code and the last lines of output, if there are any.
        message: String,
        /// Seconds until the next attempt, at least 1.
        retry_after: u64,
    },
    /// No replica is ready, and no coordinator is there to start or wake one.
    CoordinatorUnavailable {
        /// Seconds for which there has been none.
        seconds: u64,
    },
    /// The agent stops, and the request still waited for a replica.
    Stopping,
    /// Upgrades are not passed on.
    Upgrade,
    /// The request is malformed.
    BadRequest {
        /// What is wrong with it.
        reason: String,
    },
    /// The method is not one that a gateway serves.
    MethodNotAllowed,
    /// The client did not send its request's body in time.
    RequestTimeout {
        /// What it failed to do.
        reason: String,
    },
}

impl Answer {
    /// Status code.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::UnknownService { .. } => StatusCode::NOT_FOUND,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::QueueFull { .. }
            | Self::NoRevision { .. }
            | Self::NoRoutes
            | Self::ReplicaFailed { .. }
            | Self::CoordinatorUnavailable { .. }
            | Self::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout { .. } | Self::NotReady { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::BadGateway { .. } => StatusCode::BAD_GATEWAY,
            Self::Upgrade => StatusCode::NOT_IMPLEMENTED,
            Self::BadRequest { .. } => StatusCode::BAD_REQUEST,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RequestTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
        }
    }

    /// CamelCase reason, for programs.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::UnknownService { .. } => "UnknownService",
            Self::NoRoutes => "NoRoutes",
            Self::NoRevision { .. } => "NoRevision",
            Self::BodyTooLarge { .. } => "BodyTooLarge",
            Self::QueueFull { .. } => "QueueFull",
            Self::Timeout { .. } | Self::NotReady { .. } => "Timeout",
            Self::BadGateway { .. } => "BadGateway",
            Self::ReplicaFailed { reason, .. } => reason,
            Self::CoordinatorUnavailable { .. } => "CoordinatorUnavailable",
            Self::Stopping => "NodeStopping",
            Self::Upgrade => "UpgradeNotSupported",
            Self::BadRequest { .. } => "BadRequest",
            Self::MethodNotAllowed => "MethodNotAllowed",
            Self::RequestTimeout { .. } => "RequestTimeout",
        }
    }

    /// What happened, for people.
    pub(super) fn message(&self) -> String {
        match self {
            Self::UnknownService { host, path, .. } => format!("no service for host {host:?} and path {path:?}"),
            Self::NoRoutes => "this node has not heard from the coordinator yet which services there are".to_owned(),
            Self::NoRevision { service } => format!("service {service} has no revision that takes traffic"),
            Self::BodyTooLarge { limit } => format!("request body is larger than {limit} bytes"),
            Self::QueueFull { limit } => format!("{limit} requests wait for this service already"),
            Self::Timeout { seconds, waiting: true } => format!("no replica was free within {seconds} s"),
            Self::Timeout { seconds, waiting: false } => format!("the replica did not answer within {seconds} s"),
            Self::NotReady { seconds, cause } => format!("no replica was ready within {seconds} s: {cause}"),
            Self::BadGateway { reason } => format!("the replica did not answer: {reason}"),
            Self::ReplicaFailed { message, .. } => format!("no replica of the service can serve: {message}"),
            Self::CoordinatorUnavailable { seconds } => format!(
                "no replica of the service is ready, and the coordinator, which starts and wakes them, has been away for \
                 {seconds} s"
            ),
            Self::Stopping => "this node's agent is stopping; send the request again, or to another node".to_owned(),
            Self::Upgrade => "protocol upgrades such as WebSocket are not passed on by this version".to_owned(),
            Self::BadRequest { reason } | Self::RequestTimeout { reason } => reason.clone(),
            Self::MethodNotAllowed => "this gateway is no forward proxy: CONNECT is not allowed".to_owned(),
        }
    }

    /// The response, with a plain JSON body.
    pub fn response(&self) -> Response<Body> {
        self.response_for(ErrorFormat::Json)
    }

    /// The response in the form that the caller's client library understands.
    pub fn response_for(&self, format: ErrorFormat) -> Response<Body> {
        let content = match format {
            ErrorFormat::Grpc => return super::error_format::grpc_response(self),
            ErrorFormat::OpenAi => super::error_format::openai_content(self),
            ErrorFormat::Json => self.json_content(),
        };
        let body = Full::from(content.to_string() + "\n").map_err(|never| match never {}).boxed_unsync();
        let mut response = Response::new(body);
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            let seconds = if let Self::ReplicaFailed { retry_after, .. } = self { *retry_after } else { 1 };
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if *self == Self::MethodNotAllowed {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
        }
        response
    }

    fn json_content(&self) -> Value {
        let mut content = Map::from_iter([
            ("error".to_owned(), Value::from(self.message())),
            ("reason".to_owned(), Value::from(self.reason())),
        ]);
        if let Self::UnknownService { known, .. } = self {
            let mut routing = json!({
                "byHost": "Host: <service>.<namespace>.<domain>",
                "byPath": "/serving/<namespace>/<service>/<path at the model server>",
            });
            if !known.is_empty() {
                routing["knownHosts"] = Value::from(known.as_slice());
            }
            content.insert("routing".to_owned(), routing);
        }
        Value::Object(content)
    }
}
