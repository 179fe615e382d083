//! KServe's V1 protocol.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::get,
};
use ndarray::Array2;
use serde_json::{Value, json};

use crate::{FEATURES, Server, error::Refusal};

pub(crate) fn routes() -> Router<Arc<Server>> {
    // The colon of `iris:predict` is part of the last path segment.
    Router::new().route("/v1/models", get(models)).route("/v1/models/{model}", get(model).post(predict))
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({ "models": [server.model_name] }))
}

async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    server.check_name(&name)?;
    let ready = server.ready();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, Json(json!({ "name": name, "ready": ready }))).into_response())
}

async fn predict(State(server): State<Arc<Server>>, Path(target): Path<String>, body: Bytes) -> Response {
    let in_flight = server.begin();
    let answer = predictions(&server, &target, &body).await.into_response();
    in_flight.answered();
    answer
}

async fn predictions(server: &Server, target: &str, body: &[u8]) -> Result<Json<Value>, Refusal> {
    let (name, verb) = target.rsplit_once(':').unwrap_or((target, ""));
    server.check_name(name)?;
    if verb != "predict" {
        return Err(Refusal::not_found(format!("{target:?}: expected {name}:predict; this model explains nothing")));
    }
    let classifier = server.classifier()?;
    let flowers = flowers(body)?;
    tokio::time::sleep(server.request_time).await;
    Ok(Json(json!({ "predictions": classifier.predict(&flowers).classes })))
}

/// Reads `{"instances": [[4 numbers], …]}`.
fn flowers(body: &[u8]) -> Result<Array2<f64>, Refusal> {
    let body: Value = serde_json::from_slice(body).map_err(|error| Refusal::field("body", error.to_string()))?;
    let expected = "expected a list of flowers, each a list of 4 numbers";
    let instances = match body.get("instances") {
        Some(Value::Array(instances)) if !instances.is_empty() => instances,
        Some(Value::Array(_)) => return Err(Refusal::field("instances", format!("{expected}, got an empty list"))),
        Some(_) => return Err(Refusal::field("instances", expected)),
        None => return Err(Refusal::field("instances", format!("missing; {expected}"))),
    };
    let mut values = Vec::with_capacity(instances.len() * FEATURES.len());
    for (index, flower) in instances.iter().enumerate() {
        let field = format!("instances[{index}]");
        let Some(numbers) = flower.as_array() else {
            return Err(Refusal::field(field, format!("expected a list of 4 numbers ({})", FEATURES.join(", "))));
        };
        if numbers.len() != FEATURES.len() {
            let message = format!("expected 4 numbers ({}), got {}", FEATURES.join(", "), numbers.len());
            return Err(Refusal::field(field, message));
        }
        for (position, number) in numbers.iter().enumerate() {
            let number = number.as_f64().ok_or_else(|| {
                Refusal::field(format!("{field}[{position}]"), format!("expected a number, got {number}"))
            })?;
            values.push(number);
        }
    }
    Array2::from_shape_vec((instances.len(), FEATURES.len()), values)
        .map_err(|error| Refusal::field("instances", error.to_string()))
}
