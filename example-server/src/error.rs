//! What a client is told when a request cannot be answered.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde_json::json;

/// A refusal, as both protocols have it: `{"error": "…"}`, here with the field it is about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    /// Path in the request's body, such as `instances[1]`; empty where none is meant.
    pub(crate) field: String,
    pub(crate) message: String,
}

impl Refusal {
    /// 400: `field` of the body is not as `message` wants it.
    pub(crate) fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, field: field.into(), message: message.into() }
    }

    /// 404: there is no such model or path.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, field: String::new(), message: message.into() }
    }

    /// 503: the model is on its way.
    pub(crate) fn loading(model: &str) -> Self {
        let message = format!("model {model} is loading");
        Self { status: StatusCode::SERVICE_UNAVAILABLE, field: String::new(), message }
    }

    /// 503: the model sleeps until it is woken.
    pub(crate) fn asleep(model: &str) -> Self {
        let message = format!("model {model} sleeps");
        Self { status: StatusCode::SERVICE_UNAVAILABLE, field: String::new(), message }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = if self.field.is_empty() {
            json!({ "error": self.message })
        } else {
            json!({ "error": format!("{}: {}", self.field, self.message), "field": self.field })
        };
        let mut response = (self.status, Json(body)).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
