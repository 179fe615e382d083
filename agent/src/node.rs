//! Puts an agent together and runs it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::StreamExt as _;
use pilotlight_identity::{
    AcceptMetrics, Coordinators, IdentityError, LiveIdentity, RevocationList, Revocations, Trust,
};
use pilotlight_proto::fleet::v1::{
    self as fleet, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent,
};
use pilotlight_telemetry::Metrics;
use rustix::process::{Resource, getrlimit};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::{Config, RuntimeChoice, Security},
    gateway::{self, ClientSettings, DataPath, GatewayMetrics, Setup},
    gpu::{self, GpuMetrics, GpuMonitor, MonitorSettings},
    inventory::{self, InventoryError},
    listeners::Inherited,
    membership::{self, Membership, ToldBundle},
    models::{Models, Shelf},
    peer_connector::{connector, is_good_node},
    reconcile::Reconciler,
    runtime::{AnyRuntime, DockerRuntime, EndedLogs, ProcessRuntime, RunAs, Runtime, RuntimeError, logs},
    session::{Outbound, Session, Told},
};

/// Demands that may wait for the session.
const DEMANDS_WAITING: usize = 1024;
/// How often logs are looked at for their size.
const LOG_CARE: Duration = Duration::from_secs(10);

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Plaintext is for this machine alone.
    #[error("{what}: {address} is not a loopback address; without TLS only loopback is allowed")]
    PlaintextOffLoopback {
        /// Which setting.
        what: &'static str,
        /// Its value.
        address: SocketAddr,
    },
    /// The node has no certificate and no token to get one.
    #[error("no certificate in {0} and no token to join with; make one by `pilotlight token create`")]
    NoToken(PathBuf),
    /// The coordinator did not let the node join.
    #[error("cannot join: {0}")]
    Join(tonic::Status),
    /// An address cannot be listened on.
    #[error("{what}: cannot listen on {address}: {error}")]
    Listen {
        /// Which setting.
        what: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// Only root can start processes of other users.
    #[error("run-as: only an agent that runs as root can run replicas as another user")]
    RunAs,
    /// The agent's own program cannot be found.
    #[error("cannot find the running program: {0}")]
    OwnBinary(io::Error),
    /// Certificates cannot be read or used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The model cache cannot be used.
    #[error("model cache in {path}: {error}")]
    Models {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The inventory cannot be made.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The runtime cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// Runs an agent until `stopping`.
///
/// # Errors
/// A setting cannot be used, or the node may not join.
pub async fn run(config: Config, stopping: CancellationToken) -> Result<(), AgentError> {
    pilotlight_identity::check_label(&config.node_name)?;
    if !matches!(config.security, Security::Mtls { .. }) && !config.listen_peer.ip().is_loopback() {
        return Err(AgentError::PlaintextOffLoopback { what: "listen-peer", address: config.listen_peer });
    }
    make_data_dir(&config)?;
    let _lock = pilotlight_identity::lock_dir(&config.data_dir)?;
    let mut inventory = inventory::discover(&config)?;
    let mut sockets = Inherited::from_env();
    let ingress = sockets.listen("listen-ingress", config.listen_ingress).await?;
    let peers = sockets.listen("listen-peer", config.listen_peer).await?;
    let http = sockets.listen("listen-http", config.listen_http).await?;
    sockets.warn_of_unused();
    drop(sockets);
    // Port 0 asks for any; others must be told which.
    let ingress_address = ingress.local_addr().unwrap_or(config.listen_ingress);
    let peer_address = peers.local_addr().unwrap_or(config.listen_peer);
    let (identity, trust) = match &config.security {
        Security::Token(token) => (None, Trust::Bearer(token.clone())),
        Security::Mtls { token } => {
            let identity = membership::identity(&config, token.as_deref()).await?;
            (Some(Arc::clone(&identity)), Trust::Cell(identity))
        }
    };
    let revocations: Arc<Revocations> = Arc::default();
    let coordinators = Arc::new(Coordinators::new(&config.coordinators, trust)?);

    let metrics = Metrics::new("pilotlight-agent", env!("CARGO_PKG_VERSION"));
    let (demands, demanded) = mpsc::channel(DEMANDS_WAITING);
    let mut counted = None;
    let refusals = AcceptMetrics::default();
    metrics.register(|registry| {
        counted = Some((GatewayMetrics::register(registry), GpuMetrics::register(registry)));
        refusals.register(registry);
    });
    let Some((gateway_metrics, gpu_metrics)) = counted else { return Ok(()) };
    // Each connection of a client needs file descriptors.
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let max_connections = config.clients.max_connections.min(gateway::max_connections(files));
    info!(max_connections, files, "limits of the gateway");
    let data_path = DataPath::new(Setup {
        node: config.node_name.clone(),
        max_request_body: config.max_request_body,
        connect: connector(identity.clone(), &revocations)?,
        demands,
        metrics: gateway_metrics,
        clients: ClientSettings { max_connections, ..config.clients.clone() },
    });
    let own_binary = std::env::current_exe().map_err(AgentError::OwnBinary)?;
    let runtime = runtime(&config, own_binary, &mut inventory).await?;
    let endpoints: Arc<dyn crate::endpoint::Endpoints> = Arc::clone(data_path.sidecar()) as _;
    let egress = Arc::new(gateway::Gateway(Arc::clone(&data_path)));
    let path = config.data_dir.join("models");
    let models = Models::open(path.clone(), config.docker.claims.clone(), config.fetch_stall, config.cache_budget)
        .map_err(|error| AgentError::Models { path, error })?
        .with_peers(Arc::clone(&data_path) as _);
    let models = if config.allow_local_storage { models } else { models.refusing_local_storage() };
    let models = match runtime.images() {
        Some(images) => models.with_images(images),
        None => models,
    };
    let cached = models.report();
    let shelf = Shelf::new(models.clone(), inventory.warm_memory_bytes);
    let reconciler = Reconciler::adopt(runtime, endpoints, egress, models.clone(), shelf.clone()).await?;

    let (connected, is_connected) = watch::channel(false);
    tokio::spawn(follow_session(Arc::clone(&data_path), is_connected.clone()));
    let session = is_connected.clone();
    pilotlight_telemetry::notify_service_manager(move || readiness(*session.borrow()), stopping.clone());
    let status = pilotlight_telemetry::http_router(&metrics, move || readiness(*is_connected.borrow()));
    tokio::spawn(pilotlight_telemetry::serve_status(http, status, stopping.clone()));
    tokio::spawn(care_for_logs(Arc::clone(&reconciler), stopping.clone()));
    let (trust_bundles, told_bundles) = watch::channel(None);
    if let Some(identity) = &identity {
        let membership = Membership::new(
            &config,
            Arc::clone(identity),
            Arc::clone(&coordinators),
            Arc::clone(&revocations),
            Arc::clone(&data_path),
        );
        tokio::spawn(membership.run(told_bundles, stopping.clone()));
    }
    let peers_served = serve_peers(&data_path, identity.as_ref(), &revocations, peers, refusals, models, &stopping)?;

    let (gpu_reports, gpus) = watch::channel(None);
    let _monitor = monitor(&config, &inventory, reconciler.statuses(), gpu_metrics, gpu_reports);
    let (_inventory, inventory) = watch::channel(inventory);
    let (path, replicas) = (Arc::clone(&data_path), Arc::clone(&reconciler));
    let ended_logs = EndedLogs::new(&config.data_dir);
    let told = Node {
        data_path: path,
        reconciler: replicas,
        shelf,
        ended_logs,
        revocations,
        trust_bundles,
        logs: Mutex::default(),
    };
    let session = Session {
        coordinators,
        hello: hello(&config, ingress_address, peer_address),
        inventory,
        gpus,
        statuses: reconciler.statuses(),
        histories: reconciler.histories(),
        cached,
        demands: demanded,
        told: Arc::new(told),
        connected,
    };
    // The session outlives the gateway's last requests: what they ask for may still be started.
    let session_stopping = CancellationToken::new();
    let talking = tokio::spawn(session.run(session_stopping.clone()));
    info!(node = %config.node_name, ingress = %config.listen_ingress, "agent runs");
    data_path.serve_ingress(ingress, stopping).await;
    // It has drained meanwhile, too.
    let _ = peers_served.await;
    reconciler.shutdown(config.stop_replicas_on_exit).await;
    session_stopping.cancel();
    // It ends at once.
    let _ = talking.await;
    Ok(())
}

/// Watches the health of the driver's GPUs, if there is a driver. An agent that cannot do so still serves.
fn monitor(
    config: &Config,
    inventory: &fleet::Inventory,
    replicas: watch::Receiver<fleet::ReplicaStatuses>,
    metrics: GpuMetrics,
    reports: watch::Sender<Option<fleet::GpuReport>>,
) -> Option<GpuMonitor> {
    let has_driver = !inventory.gpus.is_empty() || !inventory.driver_version.is_empty();
    if inventory.simulated || !has_driver {
        return None;
    }
    let (library, gpus) = (config.nvml_library.clone(), inventory.gpus.clone());
    let settings = MonitorSettings { library, gpus, interval: gpu::SAMPLE_INTERVAL };
    let started = GpuMonitor::start(settings, replicas, metrics, reports);
    started.map_err(|error| warn!(%error, "the health of GPUs is not watched")).ok()
}

/// Creates the data directory, which only its owner may read. Replicas that run as another user may pass through it to
/// the models, and read nothing else.
fn make_data_dir(config: &Config) -> Result<(), AgentError> {
    let Some(run_as) = &config.run_as else {
        return Ok(pilotlight_identity::private_dir(&config.data_dir)?);
    };
    if !run_as.is_permitted() {
        return Err(AgentError::RunAs);
    }
    pilotlight_identity::passable_dir(&config.data_dir)?;
    for secret in ["replicas", "ended-logs", "identity"] {
        pilotlight_identity::private_dir(&config.data_dir.join(secret))?;
    }
    Ok(())
}

/// The runtime that the configuration asks for; the inventory gets to know what it can run.
async fn runtime(
    config: &Config,
    own_binary: PathBuf,
    inventory: &mut fleet::Inventory,
) -> Result<Arc<dyn Runtime>, AgentError> {
    let process = ProcessRuntime::new(&config.data_dir, own_binary).with_run_as(config.run_as.clone());
    let is_root = config.run_as.as_ref().map_or(rustix::process::geteuid().is_root(), RunAs::is_root);
    if config.runtime != RuntimeChoice::Docker && is_root {
        warn!(
            "replicas that are processes run as root: whoever may apply a manifest runs commands as root here; \
             --run-as names another user"
        );
    }
    let (runtime, names): (Arc<dyn Runtime>, _) = match (config.runtime, engine(config, inventory).await) {
        (RuntimeChoice::Process, _) | (RuntimeChoice::Auto, Ok(None)) => (Arc::new(process), vec!["process"]),
        (_, Err(error)) => return Err(error.into()),
        (RuntimeChoice::Docker, Ok(None)) => return Ok(Arc::new(process)),
        (RuntimeChoice::Docker, Ok(Some(docker))) => (Arc::new(docker), vec!["docker"]),
        (RuntimeChoice::Auto, Ok(Some(docker))) => {
            (Arc::new(AnyRuntime::new(process, docker)), vec!["docker", "process"])
        }
    };
    inventory.runtimes = names.into_iter().map(str::to_owned).collect();
    Ok(runtime)
}

/// The container engine, where one is asked for. Without one an agent that may do without goes on, unless
/// containers of its own may be running there.
async fn engine(config: &Config, inventory: &fleet::Inventory) -> Result<Option<DockerRuntime>, RuntimeError> {
    if config.runtime == RuntimeChoice::Process {
        return Ok(None);
    }
    let mut settings = config.docker.clone();
    if !inventory.simulated {
        settings.gpus = inventory.gpus.iter().map(|gpu| (gpu.index, gpu.uuid.clone())).collect();
    }
    match DockerRuntime::connect(&config.node_name, &config.data_dir, settings).await {
        Ok(docker) => Ok(Some(docker)),
        Err(error) if config.runtime == RuntimeChoice::Auto && !DockerRuntime::was_used(&config.data_dir) => {
            info!(%error, "no container engine: replicas run as processes");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn readiness(is_connected: bool) -> Result<String, String> {
    if is_connected { Ok("ok".to_owned()) } else { Err("no session with the coordinator".to_owned()) }
}

fn hello(config: &Config, ingress: SocketAddr, peers: SocketAddr) -> fleet::Hello {
    fleet::Hello {
        node_name: config.node_name.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        peer_address: config.advertise_peer.clone().unwrap_or_else(|| peers.to_string()),
        ingress_address: ingress.to_string(),
        boot_id: uuid::Uuid::new_v4().to_string(),
        ..fleet::Hello::default()
    }
}

fn serve_peers(
    data_path: &Arc<DataPath>,
    identity: Option<&Arc<LiveIdentity>>,
    revocations: &Arc<Revocations>,
    listener: TcpListener,
    refusals: AcceptMetrics,
    models: Models,
    stopping: &CancellationToken,
) -> Result<JoinHandle<()>, AgentError> {
    let (path, stopping) = (Arc::clone(data_path), stopping.clone());
    Ok(match identity {
        Some(identity) => {
            let config = identity.server_config(&[b"h2"])?;
            let accepted = pilotlight_identity::accept_tls(listener, config, Arc::clone(revocations), refusals);
            let revocations = Arc::clone(revocations);
            let nodes = accepted.filter(move |stream| {
                let accepted = stream.as_ref().is_ok_and(|stream| is_good_node(stream, &revocations));
                std::future::ready(accepted)
            });
            tokio::spawn(path.serve_peers(nodes, models, stopping))
        }
        None => {
            let accepted = TcpListenerStream::new(listener);
            tokio::spawn(path.serve_peers(accepted, models, stopping))
        }
    })
}

/// Lets the data path know whether there is a session with the coordinator, until the session's task ends.
async fn follow_session(data_path: Arc<DataPath>, mut connected: watch::Receiver<bool>) {
    loop {
        let is_connected = *connected.borrow_and_update();
        data_path.set_connected(is_connected);
        if connected.changed().await.is_err() {
            return;
        }
    }
}

async fn care_for_logs(reconciler: Arc<Reconciler>, stopping: CancellationToken) {
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(LOG_CARE) => {}
        }
        for path in reconciler.log_files() {
            let cut = tokio::task::spawn_blocking(move || logs::cut_down(&path)).await;
            if let Ok(Err(error)) = cut
                && error.kind() != io::ErrorKind::NotFound
            {
                warn!(%error, "a log cannot be cut down");
            }
        }
    }
}

/// What the session talks to.
struct Node {
    data_path: Arc<DataPath>,
    reconciler: Arc<Reconciler>,
    shelf: Shelf,
    /// Output of replicas that have ended.
    ended_logs: EndedLogs,
    /// Nodes whose connections are refused and closed.
    revocations: Arc<Revocations>,
    /// Takes whom this node must trust.
    trust_bundles: watch::Sender<Option<ToldBundle>>,
    /// Log requests that are being answered.
    logs: Mutex<HashMap<u64, CancellationToken>>,
}

impl Told for Node {
    fn session_opened(&self) {
        self.data_path.session_opened();
        self.reconciler.session_opened();
        for (_, open) in self.logs.lock().unwrap_or_else(PoisonError::into_inner).drain() {
            open.cancel();
        }
    }

    fn take(&self, message: ToAgent, say: &Outbound) {
        match message {
            ToAgent::Assignment(assignment) => self.reconciler.assign(assignment),
            ToAgent::Routes(routes) => self.data_path.apply_routes(routes),
            ToAgent::LogRequest(request) => self.log(request, say.clone()),
            ToAgent::EvictModel(request) => {
                tokio::spawn(evict(self.shelf.clone(), request, say.clone()));
            }
            ToAgent::Revocations(list) => self.revocations.replace(revocation_list(list)),
            ToAgent::TrustBundle(bundle) => {
                self.trust_bundles.send_replace(Some(ToldBundle { bundle, say: say.clone() }));
            }
            ToAgent::Welcome(_) => {}
        }
    }

    fn report(&self) -> fleet::QueueReport {
        self.data_path.report()
    }

    fn counters(&self) -> Option<fleet::RequestCounters> {
        self.data_path.sidecar().served().take_changed()
    }

    fn counters_unsent(&self) {
        self.data_path.sidecar().served().resend();
    }
}

fn revocation_list(list: fleet::Revocations) -> RevocationList {
    let revoked = list.revocations.into_iter();
    revoked.map(|one| (one.subject, one.issued_until.map_or(i64::MAX, |until| until.seconds))).collect()
}

impl Node {
    fn log(&self, request: fleet::LogRequest, say: Outbound) {
        let mut open = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, reading| !reading.is_cancelled());
        if request.cancel {
            if let Some(reading) = open.remove(&request.request_id) {
                reading.cancel();
            }
            return;
        }
        let reading = CancellationToken::new();
        open.insert(request.request_id, reading.clone());
        let files = if request.previous {
            self.previous_logs(&request)
        } else {
            vec![(String::new(), self.reconciler.log_file(&request.replica))]
        };
        tokio::spawn(async move {
            tokio::select! {
                () = reading.cancelled() => {}
                () = send_logs(files, &request, &say) => reading.cancel(),
            }
        });
    }

    /// Previous output by replica: first of those that have ended, then of those that were restarted.
    fn previous_logs(&self, request: &fleet::LogRequest) -> Vec<(String, PathBuf)> {
        let (namespace, service) = (&request.namespace, &request.service);
        let ended = self.ended_logs.of_service(namespace, service).into_iter().map(|log| (log.replica, log.path));
        let restarted = self.reconciler.previous_log_files(namespace, service);
        let wanted = |replica: &str| request.replica.is_empty() || request.replica == replica;
        ended.chain(restarted).filter(|(replica, _)| wanted(replica)).collect()
    }
}

async fn evict(shelf: Shelf, request: fleet::EvictModel, say: Outbound) {
    let (freed_bytes, error) = match shelf.evict(&request.uri).await {
        Ok(freed) => (freed, String::new()),
        Err(reason) => (0, reason),
    };
    say.send(FromAgent::ModelEvicted(fleet::ModelEvicted { request_id: request.request_id, freed_bytes, error })).await;
}

/// Sends these files one after another, each as the output of its replica, and then the end.
async fn send_logs(files: Vec<(String, PathBuf)>, request: &fleet::LogRequest, say: &Outbound) {
    let chunk = fleet::LogChunk { request_id: request.request_id, ..Default::default() };
    for (replica, path) in files {
        let mut chunks = std::pin::pin!(logs::read(path, request.tail_lines, request.follow));
        while let Some(read) = chunks.next().await {
            let (message, failed) = match read {
                Ok(data) => (fleet::LogChunk { data: data.to_vec(), ..chunk.clone() }, false),
                // It has printed nothing yet, or its output was removed because newer output needed the space.
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => (fleet::LogChunk { end: true, error: error.to_string(), ..chunk.clone() }, true),
            };
            let message = fleet::LogChunk { replica: replica.clone(), ..message };
            if !say.send(FromAgent::LogChunk(message)).await || failed {
                return;
            }
        }
    }
    say.send(FromAgent::LogChunk(fleet::LogChunk { end: true, ..chunk })).await;
}
