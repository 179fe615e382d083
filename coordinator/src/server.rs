//! Puts a coordinator together and runs it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use pilotlight_identity::Authority;
use pilotlight_proto::{
    FILE_DESCRIPTOR_SET,
    control::v1::control_server::ControlServer,
    fleet::v1::{enrollment_server::EnrollmentServer, fleet_server::FleetServer},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};
use tracing::{error, info, warn};

use crate::{
    api::{ControlService, Objects, access::Access},
    authority,
    config::{Config, Security, StoreConfig},
    fleet::{EvictHub, FleetService, LogHub, enrollment::EnrollmentService},
    leader,
    metrics::{CoordinatorMetrics, GrpcMetricsLayer},
    reconcile::{Handle, Reconciler, record::Recorder, run::Setup, world::Settings},
    store::{Measured, Store, StoreError, embedded::EmbeddedStore, etcd::EtcdStore},
    values::{Values, ValuesError, Vault},
};

/// How long a leader's claim outlives its process; a successor waits this long after a crash.
const LEADER_TTL: Duration = Duration::from_secs(5);
/// Pause before an etcd that does not answer at the start is asked again.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// File below the data directory for the key that secrets are sealed with.
const SECRETS_KEY: &str = "secrets.key";

/// Why a coordinator could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Plaintext is for this machine alone.
    #[error("listen: {0} is not a loopback address; without TLS only loopback is allowed")]
    PlaintextOffLoopback(SocketAddr),
    /// Autoscaler settings are out of range.
    #[error("{0}")]
    Scaling(String),
    /// The data directory cannot be made.
    #[error("data-dir: {0}: {1}")]
    DataDir(std::path::PathBuf, std::io::Error),
    /// An address cannot be listened on.
    #[error("{what}: cannot listen on {address}: {error}")]
    Listen {
        /// Which setting.
        what: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The recording cannot be made.
    #[error("record: {0}")]
    Record(std::io::Error),
    /// Certificates cannot be made or read.
    #[error(transparent)]
    Identity(#[from] pilotlight_identity::IdentityError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Secrets cannot be opened.
    #[error(transparent)]
    Values(#[from] ValuesError),
    /// The gRPC server failed.
    #[error("grpc: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// Another coordinator has taken over.
    #[error("leadership of cell {0} was lost; another coordinator leads now")]
    LeadershipLost(String),
}

/// Runs a coordinator until `stopping`.
///
/// # Errors
/// A setting cannot be used, the store cannot be opened, or leadership is lost.
pub async fn run(config: Config, stopping: CancellationToken) -> Result<(), CoordinatorError> {
    if matches!(config.security, Security::Plaintext) && !config.listen.ip().is_loopback() {
        return Err(CoordinatorError::PlaintextOffLoopback(config.listen));
    }
    config.scaling.validate().map_err(|wrong| CoordinatorError::Scaling(wrong.join("; ")))?;
    std::fs::create_dir_all(&config.data_dir)
        .map_err(|error| CoordinatorError::DataDir(config.data_dir.clone(), error))?;
    let listener = listen("listen", config.listen).await?;
    let http = listen("listen-http", config.listen_http).await?;
    let metrics = pilotlight_telemetry::Metrics::new("pilotlight-coordinator", env!("CARGO_PKG_VERSION"));
    let measures = CoordinatorMetrics::default();
    metrics.register(|registry| measures.register(registry));
    let leading = tokio_util::sync::CancellationToken::new();
    let ready = leading.clone();
    let status = pilotlight_telemetry::http_router(&metrics, move || ready.is_cancelled());
    tokio::spawn(pilotlight_telemetry::serve_status(http, status, stopping.clone()));
    let store = tokio::select! {
        store = open_store(&config) => store?,
        () = stopping.cancelled() => return Ok(()),
    };
    let store: Arc<dyn Store> = Arc::new(Measured::new(store, measures.clone()));

    let identity = config.listen.to_string();
    let leadership = tokio::select! {
        leadership = leader::campaign(Arc::clone(&store), &identity, LEADER_TTL) => leadership?,
        () = stopping.cancelled() => return Ok(()),
    };
    info!(cell = %config.cell, store = store.kind(), "leading");
    measures.set_leader(true);
    let outcome = lead(&config, leadership.fenced(), listener, &leading, &leadership, &measures, stopping).await;
    measures.set_leader(false);
    leadership.resign().await;
    outcome
}

/// Serves as the leader until `stopping`, or until leadership is lost.
async fn lead(
    config: &Config,
    store: Arc<dyn Store>,
    listener: TcpListener,
    leading: &CancellationToken,
    leadership: &leader::Leadership,
    measures: &CoordinatorMetrics,
    stopping: CancellationToken,
) -> Result<(), CoordinatorError> {
    // Whatever ends the loop ends the server, and the other way round.
    let ending = stopping.child_token();
    let (access, authority) = match &config.security {
        Security::Plaintext => (Access::Open, None),
        Security::Mtls { ca, .. } => {
            let ca = ca.as_ref().map(|(certificate, key)| (certificate.as_path(), key.as_path()));
            (Access::Certified, Some(Arc::new(authority::open(&store, &config.cell, ca).await?)))
        }
    };
    let (handle, inputs, changes) = Handle::new();
    let vault = Arc::new(match &config.secrets_key {
        Some(file) => Vault::with_key_file(file, false)?,
        None => Vault::with_key_file(&config.data_dir.join(SECRETS_KEY), true)?,
    });
    let recorder = match &config.record {
        Some(path) => Recorder::create(path).map_err(CoordinatorError::Record)?,
        None => Recorder::default(),
    };
    let setup = Setup {
        store: Arc::clone(&store),
        settings: settings(config, vault.values()),
        tick: config.tick,
        report_interval: config.report_interval,
        recorder,
        inputs,
        changes,
    };
    vault.load(&store).await?;
    let reconciler = Reconciler::load(setup).await?.with_metrics(measures.clone());
    let looping = tokio::spawn(reconciler.run(ending.clone()));
    leading.cancel();
    tokio::spawn(measures.state.clone().follow(handle.clone(), ending.clone()));

    let services = services(config, &store, &vault, handle, access, authority.clone(), &ending).await;
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .trace_fn(|request| tracing::debug_span!("grpc", path = request.uri().path()))
        .layer(GrpcMetricsLayer(measures.clone()))
        .add_routes(services);
    let serving = async {
        match (&config.security, authority) {
            (Security::Mtls { names, .. }, Some(authority)) => {
                let live = authority::own_identity(config, &authority, names)?;
                let incoming = pilotlight_identity::accept_tls(listener, live.server_config_optional_client(&[b"h2"])?);
                server.serve_with_incoming_shutdown(incoming, ending.cancelled()).await?;
            }
            _ => {
                let incoming = TcpListenerStream::new(listener);
                server.serve_with_incoming_shutdown(incoming, ending.cancelled()).await?;
            }
        }
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = serving => outcome,
        () = leadership.lost() => Err(CoordinatorError::LeadershipLost(config.cell.clone())),
    };
    ending.cancel();
    if let Err(error) = looping.await {
        error!(%error, "the loop ended badly");
    }
    outcome
}

async fn services(
    config: &Config,
    store: &Arc<dyn Store>,
    vault: &Arc<Vault>,
    handle: Handle,
    access: Access,
    authority: Option<Arc<Authority>>,
    ending: &CancellationToken,
) -> Routes {
    let (logs, evictions) = (Arc::new(LogHub::default()), Arc::new(EvictHub::default()));
    let control = ControlService {
        handle: handle.clone(),
        store: Arc::clone(store),
        objects: Objects::new(Arc::clone(store), Arc::clone(vault), handle.clone()),
        authority: authority.clone(),
        access,
        scaling: config.scaling.clone(),
        cell: config.cell.clone(),
        logs: Arc::clone(&logs),
        evictions: Arc::clone(&evictions),
    };
    let fleet = FleetService::new(handle, logs, evictions, access, ending.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ControlServer<ControlService>>().await;
    health.set_serving::<FleetServer<FleetService>>().await;
    let mut routes =
        Routes::new(health_service).add_service(ControlServer::new(control)).add_service(FleetServer::new(fleet));
    if let Some(authority) = authority {
        let enrollment = EnrollmentService::new(authority, Arc::clone(store), access);
        routes = routes.add_service(EnrollmentServer::new(enrollment));
    }
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1();
    match reflection {
        Ok(reflection) => routes.add_service(reflection),
        Err(error) => {
            error!(%error, "no gRPC reflection");
            routes
        }
    }
}

fn settings(config: &Config, values: &Arc<Values>) -> Settings {
    Settings {
        cell: config.cell.clone(),
        domain: config.domain.clone(),
        ingress_port: config.ingress_port,
        queue_limit: config.queue_limit,
        scaling: config.scaling.clone(),
        node_lease: config.node_lease,
        placement_policy: config.placement_policy,
        idle_replicas: config.idle_replicas,
        values: Arc::clone(values),
    }
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, CoordinatorError> {
    TcpListener::bind(address).await.map_err(|error| CoordinatorError::Listen { what, address, error })
}

/// Opens the store; waits for an etcd that does not answer yet, since machines start in any order.
async fn open_store(config: &Config) -> Result<Arc<dyn Store>, CoordinatorError> {
    let etcd = match &config.store {
        StoreConfig::Embedded => return Ok(Arc::new(EmbeddedStore::open(&config.data_dir.join("state.redb"))?)),
        StoreConfig::Etcd(etcd) => etcd,
    };
    loop {
        match EtcdStore::connect(etcd, &format!("/pilotlight/{}/", config.cell)).await {
            Ok(store) => return Ok(Arc::new(store)),
            Err(StoreError::Unavailable(reason)) => {
                warn!(%reason, endpoints = ?etcd.endpoints, "etcd does not answer; trying again");
                tokio::time::sleep(STORE_PAUSE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
