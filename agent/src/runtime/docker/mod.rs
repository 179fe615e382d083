//! Replicas as containers of a Docker Engine, or of Podman by its Docker API.

mod answers;
mod create;
mod exec;
mod gpus;
mod image;
mod layers;
mod logs;
mod pulled;
mod settings;
#[cfg(test)]
mod stop_tests;
mod volumes;

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error,
    models::ContainerInspectResponse,
    query_parameters::{
        CreateContainerOptionsBuilder, KillContainerOptionsBuilder, ListContainersOptionsBuilder,
        RemoveContainerOptionsBuilder, StatsOptionsBuilder, WaitContainerOptionsBuilder,
    },
};
use futures::StreamExt as _;
use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::{
    Exit, GpuAccess, Mount, Running, Runtime, RuntimeError, Say, SleepMark, resolved, sockets,
    state::{Directories, LOG, ReplicaState},
    unix_now,
};
use crate::models::Images;
use answers::{exit_of, gateway, is_missing, lives, published, resident};
use create::{Parts, Place};
use pulled::Pulled;
pub use settings::{DockerSettings, GpuMode};
use volumes::Places;

/// Whose containers they are: an agent touches its own only.
const SCOPE: &str = "pilotlight.dev/scope";
const REPLICA: &str = "pilotlight.dev/replica";
/// Longest wait for an engine's answer, seconds.
const ANSWER_SECONDS: u64 = 120;
/// How often the end of a container is looked for where the engine did not tell it.
const LOOK: Duration = Duration::from_millis(200);
/// Longest wait for the last output of a container that has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(5);

/// Runs replicas as containers.
pub struct DockerRuntime {
    docker: Docker,
    settings: DockerSettings,
    directories: Directories,
    places: Places,
    pulled: Arc<Pulled>,
    scope: String,
    host: IpAddr,
    podman: bool,
    /// False once the engine has said that it may not raise limits of processes.
    ulimits: AtomicBool,
    /// Tasks that copy output, by replica.
    followers: Mutex<HashMap<String, JoinHandle<()>>>,
}

impl Drop for DockerRuntime {
    fn drop(&mut self) {
        let followers = self.followers.get_mut().unwrap_or_else(PoisonError::into_inner);
        followers.values().for_each(JoinHandle::abort);
    }
}

impl DockerRuntime {
    /// Connects to the engine. Records and output are kept below `data_dir`; containers are this node's
    /// and this directory's.
    ///
    /// # Errors
    /// The engine does not answer, or has no such network.
    pub async fn connect(node: &str, data_dir: &Path, settings: DockerSettings) -> Result<Self, RuntimeError> {
        let socket = settings.socket.clone();
        let failed = |error: String| RuntimeError::Engine { socket: socket.clone(), error };
        let docker = Docker::connect_with_unix(&settings.socket, ANSWER_SECONDS, API_DEFAULT_VERSION);
        let docker = docker.map_err(|error| failed(error.to_string()))?;
        let docker = docker.negotiate_version().await.map_err(|error| failed(error.to_string()))?;
        let version = docker.version().await.map_err(|error| failed(error.to_string()))?;
        let podman = version.components.iter().flatten().any(|component| component.name.contains("Podman"));
        let network = docker.inspect_network(&settings.network, None).await;
        let network = network.map_err(|error| failed(format!("docker-network {:?}: {error}", settings.network)))?;
        let host = gateway(&network).ok_or_else(|| {
            failed(format!("docker-network {:?} has no gateway by which containers reach this node", settings.network))
        })?;
        let real = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned());
        let scope = xxhash_rust::xxh3::xxh3_64(format!("{node}\0{}", real.display()).as_bytes());
        let scope = format!("{scope:016x}");
        let memory = Path::new(volumes::SHM);
        let secrets =
            if memory.is_dir() { memory.join(format!("pilotlight-{scope}")) } else { data_dir.join("secrets") };
        let places = Places { host_roots: settings.host_path_roots.clone(), claims: settings.claims.clone(), secrets };
        info!(socket, version = version.version.unwrap_or_default(), podman, %host, "container engine answers");
        let directories = Directories::new(data_dir);
        let pulled = Arc::new(Pulled::open(docker.clone(), data_dir, settings.registry_config.clone()));
        Ok(Self {
            docker,
            pulled,
            settings,
            directories,
            places,
            scope,
            host,
            podman,
            ulimits: AtomicBool::new(true),
            followers: Mutex::default(),
        })
    }

    /// True where records below `data_dir` speak of containers.
    pub fn was_used(data_dir: &Path) -> bool {
        Directories::new(data_dir).read_all().iter().any(|(_, state)| state.contained)
    }

    fn name_of(&self, replica: &str) -> String {
        format!("pilotlight-{}-{replica}", self.scope)
    }

    /// Creates the replica's container, and gives its id.
    async fn create(
        &self,
        assignment: &ReplicaAssignment,
        container: &ContainerSpec,
        models: &[Mount],
    ) -> Result<String, RuntimeError> {
        let failed = |error: Error| RuntimeError::Container {
            reason: "CreateContainerError",
            message: format!("cannot create the container: {error}"),
        };
        let image = self.docker.inspect_image(&container.image).await.map_err(failed)?;
        let image_user = image::user_of(&image);
        let own = self.directories.make(&assignment.replica)?;
        let user = create::user_number(container.security.as_ref(), &image_user);
        let mut volumes = self.places.mounts(assignment, container, &own, user)?;
        let models = models.iter().map(|model| volumes::bind(&model.source, &model.target, model.read_only));
        volumes.mounts.extend(models);
        let labels = [
            (SCOPE, self.scope.clone()),
            (REPLICA, assignment.replica.clone()),
            ("pilotlight.dev/revision", assignment.revision.clone()),
            ("pilotlight.dev/namespace", assignment.namespace.clone()),
            ("pilotlight.dev/service", assignment.service.clone()),
            ("pilotlight.dev/image", container.image.clone()),
        ];
        let parts = Parts {
            image: image.id.unwrap_or_else(|| container.image.clone()),
            image_user,
            mounts: volumes.mounts,
            shm_size: volumes.shm_size,
            labels: labels.map(|(name, value)| (name.to_owned(), value)).into(),
        };
        let place = Place {
            network: &self.settings.network,
            gpu_mode: self.settings.gpu_mode,
            gpus: &self.settings.gpus,
            podman: self.podman,
            ulimits: self.ulimits.load(Ordering::Relaxed),
        };
        let body = create::body(assignment, container, parts, &place)?;
        let options = CreateContainerOptionsBuilder::default().name(&self.name_of(&assignment.replica)).build();
        Ok(self.docker.create_container(Some(options), body).await.map_err(failed)?.id)
    }

    async fn launch(&self, id: &str) -> Result<(), RuntimeError> {
        let Err(error) = self.docker.start_container(id, None).await else { return Ok(()) };
        let state = self.inspect(id).await.and_then(|found| found.state).unwrap_or_default();
        // 126 and 127: the command cannot be run, or is not there.
        let reason = match state.exit_code {
            Some(126 | 127) => "ContainerCannotRun",
            _ => "RunContainerError",
        };
        let why = state.error.filter(|why| !why.is_empty()).unwrap_or_else(|| error.to_string());
        self.discard(id).await;
        Err(RuntimeError::Container { reason, message: format!("cannot start the container: {why}") })
    }

    async fn inspect(&self, id: &str) -> Option<ContainerInspectResponse> {
        self.docker.inspect_container(id, None).await.ok()
    }

    /// Whether it is paused; `None` where it does not live.
    async fn paused(&self, id: &str) -> Option<bool> {
        self.inspect(id).await?.state.filter(lives)?.paused
    }

    async fn discard(&self, id: &str) {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        match self.docker.remove_container(id, Some(options)).await {
            Err(error) if !is_missing(&error) => warn!(container = id, %error, "cannot remove a container"),
            _ => {}
        }
    }

    /// Own containers, running or not: id and replica.
    async fn containers(&self, replica: Option<&str>) -> Result<Vec<(String, String)>, RuntimeError> {
        let mut labels = vec![format!("{SCOPE}={}", self.scope)];
        labels.extend(replica.map(|replica| format!("{REPLICA}={replica}")));
        let filters = HashMap::from([("label".to_owned(), labels)]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let found = self
            .docker
            .list_containers(Some(options))
            .await
            .map_err(|error| RuntimeError::Engine { socket: self.settings.socket.clone(), error: error.to_string() })?;
        let named = found.into_iter().filter_map(|container| {
            let replica = container.labels?.remove(REPLICA)?;
            Some((container.id?, replica))
        });
        Ok(named.collect())
    }

    /// Waits for what is left of a former container's output, and removes it.
    async fn clear(&self, replica: &str) -> Result<(), RuntimeError> {
        self.last_output(replica).await;
        for (id, _) in self.containers(Some(replica)).await? {
            self.discard(&id).await;
        }
        Ok(())
    }

    async fn last_output(&self, replica: &str) {
        let follower = self.followers.lock().unwrap_or_else(PoisonError::into_inner).remove(replica);
        if let Some(mut follower) = follower
            && tokio::time::timeout(LAST_OUTPUT, &mut follower).await.is_err()
        {
            follower.abort();
        }
    }

    fn follow(&self, replica: &str, id: &str) {
        let task = logs::follow(self.docker.clone(), id.to_owned(), self.directories.of(replica));
        let handle = tokio::spawn(task);
        let former = self.followers.lock().unwrap_or_else(PoisonError::into_inner).insert(replica.to_owned(), handle);
        if let Some(former) = former {
            former.abort();
        }
    }

    fn running(
        &self,
        id: String,
        found: &ContainerInspectResponse,
        started_at: i64,
        assignment: ReplicaAssignment,
    ) -> Running {
        let ports = published(found);
        let container = assignment.container.clone().unwrap_or_default();
        let port = ports.get(&create::serving_port(&container)).copied().unwrap_or(0);
        let pid = found.state.as_ref().and_then(|state| u32::try_from(state.pid?).ok()).unwrap_or(0);
        Running {
            replica: assignment.replica.clone(),
            pid,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            started_at,
            assignment,
            container: Some(id),
            ports,
        }
    }
}

fn cannot(what: &'static str, running: &Running, error: &Error) -> RuntimeError {
    RuntimeError::Pause { what, replica: running.replica.clone(), reason: error.to_string() }
}

#[async_trait]
impl Runtime for DockerRuntime {
    async fn prepare(&self, assignment: &ReplicaAssignment, say: Say<'_>) -> Result<bool, RuntimeError> {
        let container = assignment.container.clone().unwrap_or_default();
        if container.image.is_empty() {
            return Err(RuntimeError::Specification {
                field: "spec.predictor.containers[0].image",
                reason: "must be given: this node runs containers only".to_owned(),
            });
        }
        let own = self.settings.registry_config.as_deref();
        let credentials = image::credentials(&container.image, &assignment.registry_configs, own);
        image::ensure(&self.docker, &self.pulled, &container.image, &container.image_pull_policy, credentials, say)
            .await
    }

    fn images(&self) -> Option<Arc<dyn Images>> {
        Some(Arc::clone(&self.pulled) as _)
    }

    async fn start(&self, assignment: &ReplicaAssignment, models: &[Mount]) -> Result<Running, RuntimeError> {
        let container = resolved(assignment)?;
        self.clear(&assignment.replica).await?;
        let started_at = unix_now();
        // First the intent: should this process die now, the next one knows what the container is for.
        let state = ReplicaState {
            pid: 0,
            start_ticks: 0,
            port: 0,
            address: None,
            started_at,
            assignment: ReplicaState::encode(assignment),
            contained: true,
        };
        self.directories.write(&assignment.replica, &state)?;
        self.directories.rotate_log(&assignment.replica)?;
        let mut id = self.create(assignment, &container, models).await?;
        match self.launch(&id).await {
            // An engine without CAP_SYS_RESOURCE, rootless or in a container itself, has its own limits.
            Err(error) if error.to_string().contains("rlimit") => {
                self.ulimits.store(false, Ordering::Relaxed);
                warn!(%error, "the engine cannot raise limits of processes; containers get its own");
                id = self.create(assignment, &container, models).await?;
                self.launch(&id).await?;
            }
            launched => launched?,
        }
        self.follow(&assignment.replica, &id);
        let found = self.docker.inspect_container(&id, None).await.map_err(|error| RuntimeError::Container {
            reason: "RunContainerError",
            message: format!("the container cannot be inspected: {error}"),
        })?;
        info!(replica = %assignment.replica, container = %id, "container started");
        Ok(self.running(id, &found, started_at, assignment.clone()))
    }

    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError> {
        let mut states: HashMap<_, _> = self.directories.read_all().into_iter().collect();
        let mut adopted = Vec::new();
        for (id, replica) in self.containers(None).await? {
            let found = self.inspect(&id).await;
            let alive = found.as_ref().and_then(|found| found.state.as_ref()).is_some_and(lives);
            let state = states.remove(&replica).filter(|state| state.contained);
            let known = state.and_then(|state| Some((state.started_at, state.assignment()?)));
            match (found, known) {
                (Some(found), Some((started_at, assignment))) if alive => {
                    info!(%replica, container = %id, "replica adopted");
                    self.follow(&replica, &id);
                    adopted.push(self.running(id, &found, started_at, assignment));
                }
                (_, known) => {
                    // It never started, ended while no agent looked, or nobody knows what it is for. Its
                    // output stays until the coordinator decides.
                    if known.is_some() {
                        self.follow(&replica, &id);
                        self.last_output(&replica).await;
                    }
                    info!(%replica, container = %id, "container removed: it does not run, or is not known");
                    self.discard(&id).await;
                }
            }
        }
        Ok(adopted)
    }

    async fn exited(&self, running: &Running) -> Exit {
        let Some(id) = &running.container else { return Exit::default() };
        loop {
            let options = WaitContainerOptionsBuilder::default().condition("not-running").build();
            // What it says is not needed: inspection tells all, and the truth where the engine was restarted.
            let _ = std::pin::pin!(self.docker.wait_container(id, Some(options))).next().await;
            match self.docker.inspect_container(id, None).await {
                Ok(found) => match found.state {
                    Some(state) if lives(&state) => {}
                    state => return exit_of(&state.unwrap_or_default()),
                },
                Err(error) if is_missing(&error) => return Exit::default(),
                Err(error) => warn!(replica = %running.replica, %error, "container cannot be inspected"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn stop(&self, running: &Running, grace: Duration) {
        let Some(id) = &running.container else { return };
        let signal = self.inspect(id).await.and_then(|found| found.config?.stop_signal);
        let signal = signal.filter(|signal| !signal.is_empty()).unwrap_or_else(|| "SIGTERM".to_owned());
        let kill = async |signal: &str| {
            let options = KillContainerOptionsBuilder::default().signal(signal).build();
            // It may have ended by itself.
            let _ = self.docker.kill_container(id, Some(options)).await;
        };
        // Before the signal: some engines refuse to send one to a paused container, and the grace period would then
        // end without effect. A container that is not paused makes this an error that means nothing.
        let _ = self.docker.unpause_container(id).await;
        kill(&signal).await;
        if tokio::time::timeout(grace, self.exited(running)).await.is_err() {
            warn!(replica = %running.replica, ?grace, "did not end in time; killed");
            kill("SIGKILL").await;
            self.exited(running).await;
        }
        self.last_output(&running.replica).await;
    }

    async fn pause(&self, running: &Running) -> Result<(), RuntimeError> {
        let id = running.container.as_deref().unwrap_or_default();
        match self.docker.pause_container(id).await {
            // Engines take a second pause for an error.
            Err(error) if self.paused(id).await != Some(true) => Err(cannot("pause", running, &error)),
            _ => Ok(()),
        }
    }

    async fn resume(&self, running: &Running) -> Result<(), RuntimeError> {
        let id = running.container.as_deref().unwrap_or_default();
        match self.docker.unpause_container(id).await {
            Err(error) if self.paused(id).await != Some(false) => Err(cannot("resume", running, &error)),
            _ => Ok(()),
        }
    }

    async fn memory(&self, running: &Running) -> u64 {
        let id = running.container.as_deref().unwrap_or_default();
        let options = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
        match std::pin::pin!(self.docker.stats(id, Some(options))).next().await {
            Some(Ok(stats)) => stats.memory_stats.as_ref().map_or(0, resident),
            Some(Err(error)) => {
                warn!(replica = %running.replica, %error, "the engine does not say how much memory it has");
                0
            }
            None => 0,
        }
    }

    fn mark_sleep(&self, replica: &str, mark: Option<&SleepMark>) -> Result<(), RuntimeError> {
        self.directories.mark_sleep(replica, mark)
    }

    fn sleep_mark(&self, replica: &str) -> Option<SleepMark> {
        self.directories.sleep_mark(replica)
    }

    async fn remove(&self, replica: &str) {
        if let Err(error) = self.clear(replica).await {
            warn!(replica, %error, "containers cannot be listed");
        }
        self.places.remove(replica);
        self.directories.remove(replica);
    }

    fn log_file(&self, replica: &str) -> PathBuf {
        self.directories.of(replica).join(LOG)
    }

    async fn listeners(&self, running: &Running) -> Option<Vec<SocketAddr>> {
        let pid = running.pid;
        let listeners = tokio::task::spawn_blocking(move || sockets::of_network(pid)).await.ok()?;
        // Leave out the engine's name server.
        let own = listeners.into_iter().filter(|listener| !listener.ip().to_string().starts_with("127.0.0.11"));
        Some(own.collect())
    }

    async fn flush_output(&self, replica: &str) {
        self.last_output(replica).await;
    }

    fn remove_others(&self, keep: &dyn Fn(&str) -> bool) {
        self.places.remove_others(keep);
        self.directories.remove_others(keep);
    }

    async fn exec(&self, running: &Running, command: &[String]) -> Result<(), String> {
        exec::exec(&self.docker, running, command).await
    }

    async fn gpu_access(&self, running: &Running) -> GpuAccess {
        gpus::access(&self.docker, &self.settings.gpus, running).await
    }

    fn host_address(&self, _: &ReplicaAssignment) -> IpAddr {
        self.host
    }
}
