//! The Open Inference Protocol (V2) over REST.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{FEATURES, Prediction, Server, error::Refusal};

const CLASSES: usize = 3;

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
        "inputs": [{ "name": "input-0", "datatype": "FP64", "shape": [-1, FEATURES.len()] }],
        "outputs": [
            { "name": "output-0", "datatype": "INT64", "shape": [-1] },
            { "name": "predict", "datatype": "INT64", "shape": [-1, 1] },
            { "name": "predict_proba", "datatype": "FP64", "shape": [-1, CLASSES] },
        ],
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
    shape: Vec<usize>,
    datatype: String,
    data: Value,
}

#[derive(Debug, Deserialize)]
struct WantedOutput {
    name: String,
}

#[derive(Debug, Serialize)]
struct OutputTensor {
    name: String,
    shape: Vec<usize>,
    datatype: &'static str,
    data: Value,
}

async fn infer(State(server): State<Arc<Server>>, Path(name): Path<String>, body: Bytes) -> Response {
    let in_flight = server.begin();
    let answer = inference(&server, &name, &body).await.into_response();
    in_flight.answered();
    answer
}

async fn inference(server: &Server, name: &str, body: &[u8]) -> Result<Json<Value>, Refusal> {
    server.check_name(name)?;
    let classifier = server.classifier()?;
    let request: InferRequest =
        serde_json::from_slice(body).map_err(|error| Refusal::field("body", error.to_string()))?;
    let [input] = request.inputs.as_slice() else {
        return Err(Refusal::field("inputs", format!("expected one tensor, got {}", request.inputs.len())));
    };
    let flowers = flowers(input)?;
    // KServe's sklearn server calls its output `output-0`, MLServer calls it `predict`.
    let wanted: Vec<&str> = match request.outputs.as_slice() {
        [] => vec!["output-0"],
        outputs => outputs.iter().map(|output| output.name.as_str()).collect(),
    };
    tokio::time::sleep(server.request_time).await;
    let prediction = classifier.predict(&flowers);
    let outputs = wanted.iter().enumerate().map(|(index, name)| output(index, name, &prediction));
    let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
    let mut answer = json!({ "model_name": name, "outputs": outputs });
    if let Some(id) = request.id {
        answer["id"] = Value::String(id);
    }
    Ok(Json(answer))
}

fn output(index: usize, name: &str, prediction: &Prediction) -> Result<OutputTensor, Refusal> {
    let rows = prediction.classes.len();
    let (shape, datatype, data) = match name {
        "output-0" => (vec![rows], "INT64", json!(prediction.classes)),
        "predict" => (vec![rows, 1], "INT64", json!(prediction.classes)),
        "predict_proba" => (vec![rows, CLASSES], "FP64", json!(prediction.probabilities)),
        _ => {
            let message = format!("expected output-0, predict or predict_proba, got {name:?}");
            return Err(Refusal::field(format!("outputs[{index}].name"), message));
        }
    };
    Ok(OutputTensor { name: name.to_owned(), shape, datatype, data })
}

/// Checks the tensor's shape and type against its data and this model.
fn flowers(input: &InputTensor) -> Result<Array2<f64>, Refusal> {
    let at = |part: &str| format!("inputs[0].{part}");
    let [rows, columns] = *input.shape.as_slice() else {
        return Err(Refusal::field(at("shape"), format!("expected [n, 4], got {:?}", input.shape)));
    };
    if columns != FEATURES.len() || rows == 0 {
        return Err(Refusal::field(
            at("shape"),
            format!("expected [n, 4] with n of 1 or more, got [{rows}, {columns}]"),
        ));
    }
    let integers = match input.datatype.as_str() {
        "FP32" | "FP64" => false,
        "INT64" => true,
        other => {
            let message = format!("expected FP32, FP64 or INT64, got {other:?} (tensor {:?})", input.name);
            return Err(Refusal::field(at("datatype"), message));
        }
    };
    let mut values = Vec::new();
    flatten(&input.data, integers, &at("data"), &mut values)?;
    let got = values.len();
    // The product cannot be trusted to fit: the shape comes from the client.
    if rows.checked_mul(columns) != Some(got) {
        return Err(Refusal::field(at("data"), format!("shape [{rows}, {columns}] does not fit {got} values")));
    }
    Array2::from_shape_vec((rows, columns), values).map_err(|error| Refusal::field(at("data"), error.to_string()))
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
