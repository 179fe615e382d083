//! Listening, loading, stopping.

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderName, HeaderValue},
    middleware::{self, Next},
    response::Response,
    routing::get,
};
use tokio::net::TcpListener;
use tracing::info;

use crate::{Classifier, Server, Stats, error::Refusal, grpc, openai, sleep, stream, v1, v2, weights::Weights};

/// Settings of one server.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0 lets the system choose.
    pub port: u16,
    /// Name under which the model is served.
    pub model_name: String,
    /// Time that loading takes at least; the server listens meanwhile and answers 503.
    pub load_time: Duration,
    /// A file, or a folder with all below it, that is read into memory before the model is ready, and kept.
    pub load: Option<PathBuf>,
    /// Time that each answer takes at least.
    pub request_time: Duration,
    /// Value of the header `x-served-by` of each answer, so that callers can tell versions apart.
    pub served_by: Option<HeaderValue>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8080,
            model_name: "iris".into(),
            load_time: Duration::ZERO,
            load: None,
            request_time: Duration::ZERO,
            served_by: None,
        }
    }
}

/// Why a server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// As given.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The model cannot be fitted.
    #[error("cannot load the model: {0}")]
    Load(#[from] linfa_logistic::error::Error),
    /// What is to be loaded cannot be read.
    #[error("cannot load {}: {error}", path.display())]
    Weights {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Loading ended without a result.
    #[error("loading the model was cut off: {0}")]
    LoadCutOff(#[from] tokio::task::JoinError),
    /// Accepting connections failed.
    #[error("cannot serve: {0}")]
    Serve(std::io::Error),
}

/// Listens as `options` say and serves until `shutdown`; requests in flight are then answered first.
///
/// # Errors
/// The address cannot be listened on, or the model cannot be fitted.
pub async fn run(options: Options, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServerError> {
    let address = SocketAddr::new(options.host, options.port);
    let listener = TcpListener::bind(address).await.map_err(|error| ServerError::Listen { address, error })?;
    serve(listener, options, shutdown).await
}

/// As [`run`], on a listener that is there already; `options.host` and `options.port` are not looked at.
///
/// # Errors
/// The model cannot be fitted.
pub async fn serve(
    listener: TcpListener,
    options: Options,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServerError> {
    let address = listener.local_addr().map_err(ServerError::Serve)?;
    info!(%address, model = options.model_name, "listening");
    let server = Arc::new(Server::new(&options.model_name, options.request_time));
    let mut router = router(Arc::clone(&server));
    if let Some(served_by) = options.served_by {
        router = router.layer(middleware::map_response(move |mut response: Response| {
            response.headers_mut().insert(HeaderName::from_static("x-served-by"), served_by.clone());
            std::future::ready(response)
        }));
    }
    let serving = axum::serve(listener, router).with_graceful_shutdown(shutdown);
    let serving = async { serving.await.map_err(ServerError::Serve) };
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return ended,
        loaded = load(&server, options.load_time, options.load) => loaded?,
    }
    info!(model = options.model_name, "ready");
    serving.await
}

/// Reads weights and fits the model off the threads that answer requests.
async fn load(server: &Server, load_time: Duration, weights: Option<PathBuf>) -> Result<(), ServerError> {
    tokio::time::sleep(load_time).await;
    if let Some(path) = weights {
        let begun = std::time::Instant::now();
        let weights = tokio::task::spawn_blocking(move || Weights::read(&path)).await??;
        info!(bytes = weights.bytes(), took = ?begun.elapsed(), "weights read");
        server.keep(weights);
    }
    server.loaded(tokio::task::spawn_blocking(Classifier::train).await??);
    Ok(())
}

/// All paths of `server`, those of gRPC too.
pub fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/", get(|| async { "pilotlight-example-server\n" }))
        .route("/stats", get(stats))
        .merge(v1::routes())
        .merge(v2::routes())
        .merge(stream::routes())
        .merge(openai::routes())
        .merge(sleep::routes())
        .route_service(grpc::PATHS, grpc::service(Arc::clone(&server)))
        .fallback(
            |request: Request| async move { Refusal::not_found(format!("no path {:?} here", request.uri().path())) },
        )
        .layer(middleware::from_fn(echo_traceparent))
        .with_state(server)
}

async fn stats(State(server): State<Arc<Server>>) -> Json<Stats> {
    Json(server.stats())
}

/// Shows the caller which W3C trace context reached the model server.
async fn echo_traceparent(request: Request, next: Next) -> Response {
    let received = request.headers().get("traceparent").cloned();
    let mut response = next.run(request).await;
    if let Some(received) = received {
        response.headers_mut().insert(HeaderName::from_static("x-received-traceparent"), received);
    }
    response
}
