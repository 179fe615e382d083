//! The Open Inference Protocol (V2) over REST.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Prediction, Server,
    error::Refusal,
    tensor::{self, Content, Datatype, Form, INPUT, OUTPUTS},
};

/// Length of a body's JSON part, where tensors in binary follow it.
const JSON_LENGTH: &str = "inference-header-content-length";

pub(crate) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models", get(models))
        .route("/v2/models/{model}", get(metadata))
        .route("/v2/models/{model}/ready", get(model_ready))
        .route("/v2/models/{model}/infer", post(infer))
}

async fn server_metadata() -> Json<Value> {
    Json(json!({ "name": "pilotlight-example-server", "version": env!("CARGO_PKG_VERSION"), "extensions": [] }))
}

async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

async fn ready(State(server): State<Arc<Server>>) -> Response {
    let ready = server.ready();
    (ready_status(ready), Json(json!({ "ready": ready }))).into_response()
}

fn ready_status(ready: bool) -> StatusCode {
    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({ "models": [server.model_name] }))
}

async fn metadata(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Json<Value>, Refusal> {
    server.check_name(&name)?;
    Ok(Json(json!({
        "name": name,
        "versions": [],
        "platform": "linfa",
        "inputs": [INPUT],
        "outputs": OUTPUTS,
    })))
}

async fn model_ready(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    server.check_name(&name)?;
    let ready = server.ready();
    Ok((ready_status(ready), Json(json!({ "name": name, "ready": ready }))).into_response())
}

#[derive(Debug, Deserialize)]
struct InferRequest {
    id: Option<String>,
    inputs: Vec<InputTensor>,
    #[serde(default)]
    outputs: Vec<WantedOutput>,
}

#[derive(Debug, Deserialize)]
struct InputTensor {
    name: String,
    shape: Vec<i64>,
    datatype: String,
    /// Absent where the values follow the JSON part.
    data: Option<Value>,
    #[serde(default)]
    parameters: TensorParameters,
}

#[derive(Debug, Default, Deserialize)]
struct TensorParameters {
    binary_data_size: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct WantedOutput {
    name: String,
}

#[derive(Debug, Serialize)]
struct OutputTensor {
    name: &'static str,
    shape: Vec<i64>,
    datatype: &'static str,
    data: Value,
}

async fn infer(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let in_flight = server.begin();
    let answer = inference(&server, &name, &headers, &body).await.into_response();
    in_flight.answered();
    answer
}

async fn inference(server: &Server, name: &str, headers: &HeaderMap, body: &[u8]) -> Result<Json<Value>, Refusal> {
    server.check_name(name)?;
    let classifier = server.classifier()?;
    let (json, binary) = parts(headers, body)?;
    let request: InferRequest =
        serde_json::from_slice(json).map_err(|error| Refusal::field("body", error.to_string()))?;
    let [input] = request.inputs.as_slice() else {
        return Err(Refusal::field("inputs", format!("expected one tensor, got {}", request.inputs.len())));
    };
    let flowers = flowers(input, binary)?;
    let wanted = tensor::wanted(request.outputs.iter().map(|output| output.name.as_str()))?;
    tokio::time::sleep(server.request_time).await;
    let prediction = classifier.predict(&flowers);
    let outputs: Vec<_> = wanted.into_iter().map(|form| output(form, &prediction)).collect();
    let mut answer = json!({ "model_name": name, "outputs": outputs });
    if let Some(id) = request.id {
        answer["id"] = Value::String(id);
    }
    Ok(Json(answer))
}

fn output(form: &Form, prediction: &Prediction) -> OutputTensor {
    let data = match form.content {
        Content::Probabilities => json!(prediction.probabilities),
        _ => json!(prediction.classes),
    };
    OutputTensor { name: form.name, shape: form.shape_for(prediction.classes.len()), datatype: form.datatype, data }
}

/// The JSON part of a body, and the tensors in binary that follow it.
fn parts<'a>(headers: &HeaderMap, body: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), Refusal> {
    let Some(length) = headers.get(JSON_LENGTH) else { return Ok((body, &[])) };
    let length = length.to_str().ok().and_then(|length| length.parse().ok());
    length.and_then(|length| body.split_at_checked(length)).ok_or_else(|| {
        let message = format!("{JSON_LENGTH}: expected a number of bytes, {} at most", body.len());
        Refusal::field("body", message)
    })
}

/// Checks the tensor's shape and type against its data and this model.
fn flowers(input: &InputTensor, binary: &[u8]) -> Result<Array2<f64>, Refusal> {
    let rows = tensor::rows(&input.shape)?;
    let datatype = Datatype::parse(&input.datatype, &input.name)?;
    let values = match (&input.data, input.parameters.binary_data_size) {
        (Some(data), None) => {
            let mut values = Vec::new();
            flatten(data, datatype == Datatype::Int64, "inputs[0].data", &mut values)?;
            values
        }
        (None, Some(size)) if size == binary.len() => tensor::raw_values(binary, datatype, "inputs[0].data")?,
        (None, Some(size)) => {
            let message = format!("expected as many bytes as follow the JSON part ({}), got {size}", binary.len());
            return Err(Refusal::field("inputs[0].parameters.binary_data_size", message));
        }
        _ => return Err(Refusal::field("inputs[0].data", "expected either it or parameters.binary_data_size")),
    };
    tensor::flowers(rows, values)
}

/// The protocol allows flat and nested lists, both row by row.
fn flatten(data: &Value, integers: bool, field: &str, into: &mut Vec<f64>) -> Result<(), Refusal> {
    match data {
        Value::Array(items) => items
            .iter()
            .enumerate()
            .try_for_each(|(index, item)| flatten(item, integers, &format!("{field}[{index}]"), into)),
        Value::Number(number) if !integers || number.is_i64() => {
            into.extend(number.as_f64());
            Ok(())
        }
        other => {
            let kind = if integers { "an integer (datatype INT64)" } else { "a number" };
            Err(Refusal::field(field, format!("expected {kind}, got {other}")))
        }
    }
}
