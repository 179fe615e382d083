//! What stands before the iris classifier in a chain: a transformer and an explainer.
//!
//! Both take the arguments that KServe gives such containers, speak its V1 protocol and ask the predictor
//! at `--predictor_host`.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, Request, StatusCode, header},
    routing::get,
};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{FEATURES, ServerError, error::Refusal};

/// Names of the classes, by number.
const SPECIES: [&str; 3] = ["setosa", "versicolor", "virginica"];
/// Trace context that a chain passes on.
const TRACE: [HeaderName; 2] = [HeaderName::from_static("traceparent"), HeaderName::from_static("tracestate")];

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Around {
    /// `:predict`: flowers by the names of their measures in, names of species out.
    Transformer,
    /// `:explain`: which measures of a flower, set to the mean of all flowers, change its class (occlusion).
    Explainer,
}

/// Settings of either.
#[derive(Debug, Clone)]
pub struct AroundOptions {
    /// Which.
    pub kind: Around,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0 lets the system choose.
    pub port: u16,
    /// Name of the model, here and at the predictor.
    pub model_name: String,
    /// `host:port` of the predictor.
    pub predictor_host: String,
}

struct Server {
    options: AroundOptions,
    client: Client<HttpConnector, Full<Bytes>>,
    /// Mean of each measure.
    means: Vec<f64>,
}

/// Serves until `shutdown`; requests in flight are then answered first.
///
/// # Errors
/// The address cannot be listened on.
pub async fn run_around(
    options: AroundOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServerError> {
    let address = (options.host, options.port).into();
    let listener = TcpListener::bind(address).await.map_err(|error| ServerError::Listen { address, error })?;
    tracing::info!(%address, kind = ?options.kind, predictor = options.predictor_host, "listening");
    let serving = axum::serve(listener, around(options)).with_graceful_shutdown(shutdown);
    serving.await.map_err(ServerError::Serve)
}

/// Its paths.
pub(crate) fn around(options: AroundOptions) -> Router {
    let data = linfa_datasets::iris();
    let means = data.records.mean_axis(ndarray::Axis(0)).map(|means| means.to_vec()).unwrap_or_default();
    let client = Client::builder(TokioExecutor::new()).build_http();
    Router::new().route("/v1/models/{model}", get(model).post(ask)).with_state(Arc::new(Server {
        options,
        client,
        means,
    }))
}

/// Ready at once: it loads nothing, and a predictor at zero wakes when it is asked.
async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Json<Value>, Refusal> {
    server.check(&name, "")?;
    Ok(Json(json!({ "name": name, "ready": true })))
}

async fn ask(
    State(server): State<Arc<Server>>,
    Path(target): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Refusal> {
    let body: Value = serde_json::from_slice(&body).map_err(|error| Refusal::field("body", error.to_string()))?;
    let instances = body["instances"].as_array().filter(|instances| !instances.is_empty());
    let instances = instances.ok_or_else(|| Refusal::field("instances", "expected a list of flowers"))?;
    match server.options.kind {
        Around::Transformer => {
            server.check(&target, ":predict")?;
            let flowers = instances.iter().enumerate().map(by_name).collect::<Result<_, _>>()?;
            let classes = server.classes(flowers, &headers).await?;
            let names: Vec<_> = classes.into_iter().map(species).collect();
            Ok(Json(json!({ "predictions": names })))
        }
        Around::Explainer => {
            server.check(&target, ":explain")?;
            let flowers = instances.iter().enumerate().map(by_position).collect::<Result<_, _>>()?;
            Ok(Json(json!({ "explanations": server.explain(flowers, &headers).await? })))
        }
    }
}

/// A flower as `{"sepal length": 5.1, …}`; `_` may stand for the blank.
fn by_name((index, flower): (usize, &Value)) -> Result<Vec<f64>, Refusal> {
    let measure = |name: &&str| {
        let value = flower.get(*name).or_else(|| flower.get(name.replace(' ', "_")));
        value
            .and_then(Value::as_f64)
            .ok_or_else(|| Refusal::field(format!("instances[{index}].{name}"), "expected a number"))
    };
    FEATURES.iter().map(measure).collect()
}

/// A flower as the predictor takes it.
fn by_position((index, flower): (usize, &Value)) -> Result<Vec<f64>, Refusal> {
    let numbers: Option<Vec<f64>> = flower.as_array().and_then(|flower| flower.iter().map(Value::as_f64).collect());
    let numbers = numbers.filter(|numbers| numbers.len() == FEATURES.len());
    numbers.ok_or_else(|| Refusal::field(format!("instances[{index}]"), "expected a list of 4 numbers"))
}

fn species(class: u64) -> &'static str {
    usize::try_from(class).ok().and_then(|class| SPECIES.get(class)).copied().unwrap_or("unknown")
}

impl Server {
    fn check(&self, target: &str, verb: &str) -> Result<(), Refusal> {
        let expected = format!("{}{verb}", self.options.model_name);
        if target == expected { Ok(()) } else { Err(Refusal::not_found(format!("{target:?}: expected {expected}"))) }
    }

    /// The class of each flower, by the predictor.
    async fn classes(&self, flowers: Vec<Vec<f64>>, headers: &HeaderMap) -> Result<Vec<u64>, Refusal> {
        let AroundOptions { predictor_host, model_name, .. } = &self.options;
        let unreachable = |why: String| Refusal {
            status: StatusCode::BAD_GATEWAY,
            field: String::new(),
            message: format!("predictor at {predictor_host}: {why}"),
        };
        let mut request = Request::post(format!("http://{predictor_host}/v1/models/{model_name}:predict"))
            .header(header::CONTENT_TYPE, "application/json");
        for (name, value) in TRACE.into_iter().filter_map(|name| headers.get(&name).map(|value| (name, value))) {
            request = request.header(name, value);
        }
        let request = request.body(Full::from(json!({ "instances": flowers }).to_string()));
        let request = request.map_err(|error| unreachable(error.to_string()))?;
        let answer = self.client.request(request).await.map_err(|error| unreachable(error.to_string()))?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(|error| unreachable(error.to_string()))?.to_bytes();
        if !status.is_success() {
            return Err(unreachable(format!("{status}: {}", String::from_utf8_lossy(&body))));
        }
        let answer: Value = serde_json::from_slice(&body).map_err(|error| unreachable(error.to_string()))?;
        let classes = answer["predictions"].as_array().and_then(|classes| classes.iter().map(Value::as_u64).collect());
        classes.ok_or_else(|| unreachable(format!("expected a list of classes, got {answer}")))
    }

    /// For each flower its species, and what it would be with one measure set to the mean of all.
    async fn explain(&self, flowers: Vec<Vec<f64>>, headers: &HeaderMap) -> Result<Vec<Value>, Refusal> {
        let mut asked = Vec::with_capacity(flowers.len() * (1 + FEATURES.len()));
        for flower in flowers {
            let occluded = (0..FEATURES.len()).zip(&self.means).map(|(feature, mean)| {
                let mut flower = flower.clone();
                flower[feature] = *mean;
                flower
            });
            let occluded: Vec<_> = occluded.collect();
            asked.push(flower);
            asked.extend(occluded);
        }
        let classes = self.classes(asked, headers).await?;
        let explained = classes.chunks_exact(1 + FEATURES.len()).map(|classes| {
            let without: serde_json::Map<_, _> = FEATURES
                .iter()
                .zip(&classes[1..])
                .map(|(name, class)| ((*name).to_owned(), species(*class).into()))
                .collect();
            json!({ "prediction": species(classes[0]), "without": without })
        });
        Ok(explained.collect())
    }
}
