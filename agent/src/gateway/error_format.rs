//! The forms that errors have, depending on who asks: plain JSON, OpenAI's error objects, gRPC statuses.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt as _, Empty};
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::answer::{Answer, Body};

/// Paths of OpenAI's API, with whatever prefix a client's base URL has.
const OPENAI_PATHS: [&str; 13] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/models",
    "/v1/moderations",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/rerank",
    "/v1/score",
];

/// How the gateway's own errors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorFormat {
    /// `{"error": "<message>", "reason": "<Reason>"}`.
    Json,
    /// `{"error": {"message", "type", "code", "param"}}`, which OpenAI's SDKs show.
    OpenAi,
    /// A gRPC status in the headers of an answer without a body ("trailers-only").
    Grpc,
}

impl ErrorFormat {
    /// The format for a client's request, by its content type and path.
    pub fn for_request(parts: &Parts) -> Self {
        let content_type = parts.headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        let path = parts.uri.path().trim_end_matches('/');
        if content_type.get(..16).is_some_and(|start| start.eq_ignore_ascii_case(b"application/grpc")) {
            Self::Grpc
        } else if OPENAI_PATHS.iter().any(|known| path.ends_with(known)) {
            Self::OpenAi
        } else {
            Self::Json
        }
    }
}

/// OpenAI's error object. Its SDKs show `message`; programs look at `type` and `code`.
pub(super) fn openai_content(answer: &Answer) -> Value {
    let kind = match answer.status() {
        StatusCode::NOT_FOUND => "not_found_error",
        status if status.is_client_error() => "invalid_request_error",
        StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        _ => "server_error",
    };
    json!({"error": {"message": answer.message(), "type": kind, "code": answer.reason(), "param": null}})
}

/// A response that has only headers, among them the gRPC status.
pub(super) fn grpc_response(answer: &Answer) -> Response<Body> {
    let code = match answer {
        Answer::BodyTooLarge { .. } => Code::ResourceExhausted,
        _ => grpc_code(answer.status()),
    };
    let status = Status::new(code, format!("{}: {}", answer.reason(), answer.message()));
    let body = Empty::<Bytes>::new().map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    // It fails only for metadata that is no header, and there is none.
    let _ = status.add_header(headers);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The code that says the same as an HTTP status. Unlike gRPC's table for statuses of proxies, a missing service
/// is `NOT_FOUND`: `UNIMPLEMENTED` is a replica's to say.
fn grpc_code(status: StatusCode) -> Code {
    match status {
        StatusCode::BAD_REQUEST => Code::InvalidArgument,
        StatusCode::NOT_FOUND => Code::NotFound,
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Code::Unimplemented,
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Code::DeadlineExceeded,
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
        _ => Code::Unknown,
    }
}
