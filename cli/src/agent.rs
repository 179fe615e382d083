//! `pilotlight agent`.

use std::{net::SocketAddr, path::PathBuf};

use bytesize::ByteSize;
use pilotlight_agent::{
    config::{Config, InventorySource, RuntimeChoice, Security},
    runtime::{DockerSettings, GpuMode, RunAs},
};
use tokio_util::sync::CancellationToken;

use crate::clients::ClientArgs;

/// Settings of an agent.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of this node, unique in the cell, a DNS label.
    #[arg(long, env = "PILOTLIGHT_NODE_NAME")]
    node_name: String,
    /// Address of a coordinator; give all of them, separated by commas or with further flags. The agent finds the
    /// one that leads.
    #[arg(
        long,
        env = "PILOTLIGHT_COORDINATOR",
        default_value = "https://127.0.0.1:7443",
        value_delimiter = ',',
        value_name = "URL"
    )]
    coordinator: Vec<String>,
    /// Join token; needed once, for a node that has no certificate yet.
    #[arg(long, env = "PILOTLIGHT_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Directory for the node's key, replica records and logs.
    #[arg(long, env = "PILOTLIGHT_DATA_DIR", default_value = "/var/lib/pilotlight/agent", value_name = "DIR")]
    data_dir: PathBuf,
    /// Where clients connect.
    #[arg(long, env = "PILOTLIGHT_LISTEN_INGRESS", default_value = "0.0.0.0:8080", value_name = "ADDRESS")]
    listen_ingress: SocketAddr,
    /// Where other agents connect, with mutual TLS.
    #[arg(long, env = "PILOTLIGHT_LISTEN_PEER", default_value = "0.0.0.0:7444", value_name = "ADDRESS")]
    listen_peer: SocketAddr,
    /// HTTP for /metrics, /healthz and /readyz.
    #[arg(long, env = "PILOTLIGHT_LISTEN_HTTP", default_value = "127.0.0.1:7481", value_name = "ADDRESS")]
    listen_http: SocketAddr,
    /// host:port by which other agents reach this one. Default: --listen-peer; if that is all addresses, the one that
    /// this agent reaches the coordinator from.
    #[arg(long, env = "PILOTLIGHT_ADVERTISE_PEER", value_name = "ADDRESS")]
    advertise_peer: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
}

/// What agents have in common, `dev` included.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// Pretend to have this many GPUs, 0 to 64.
    #[arg(long, env = "PILOTLIGHT_SIMULATE_GPUS", value_name = "N")]
    simulate_gpus: Option<u32>,
    /// Product of the pretended GPUs.
    #[arg(long, env = "PILOTLIGHT_SIMULATE_GPU_PRODUCT", default_value = "NVIDIA A40")]
    simulate_gpu_product: String,
    /// Memory of each.
    #[arg(long, env = "PILOTLIGHT_SIMULATE_GPU_MEMORY", default_value = "48GiB")]
    simulate_gpu_memory: ByteSize,
    /// MIG profile that each pretended GPU is divided into, such as 1g.10gb; may be given again.
    #[arg(long, env = "PILOTLIGHT_SIMULATE_GPU_MIG", value_delimiter = ',', value_name = "PROFILE")]
    simulate_gpu_mig: Vec<String>,
    /// YAML file that lists pretended GPUs.
    #[arg(long, env = "PILOTLIGHT_SIMULATE_GPUS_FILE", value_name = "FILE", conflicts_with = "simulate_gpus")]
    simulate_gpus_file: Option<PathBuf>,
    /// The NVIDIA driver's library, libnvidia-ml.so. Default: the system's.
    #[arg(long, env = "PILOTLIGHT_NVML_LIBRARY", value_name = "FILE", hide = true)]
    nvml_library: Option<PathBuf>,
    /// Label of this node, key=value; may be given again.
    #[arg(long, env = "PILOTLIGHT_LABELS", value_delimiter = ',', value_parser = label, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,
    /// What replicas run as: process, docker, or auto, which runs images as containers where an engine
    /// answers. Default: auto for an agent, process for dev.
    #[arg(long, env = "PILOTLIGHT_RUNTIME", value_parser = runtime, value_name = "RUNTIME")]
    runtime: Option<RuntimeChoice>,
    /// Unix socket of the Docker Engine, or of Podman.
    #[arg(long, env = "PILOTLIGHT_DOCKER_SOCKET", default_value = "/var/run/docker.sock", value_name = "PATH")]
    docker_socket: String,
    /// Network of the engine that containers are in; Podman's is "podman".
    #[arg(long, env = "PILOTLIGHT_DOCKER_NETWORK", default_value = "bridge", value_name = "NAME")]
    docker_network: String,
    /// How containers get their GPUs: device-request, or cdi.
    #[arg(long, env = "PILOTLIGHT_GPU_MODE", default_value = "device-request", value_parser = gpu_mode, value_name = "MODE")]
    gpu_mode: GpuMode,
    /// Directory below which containers may mount hostPath volumes; may be given again. Default: none.
    #[arg(long, env = "PILOTLIGHT_HOST_PATH_ROOTS", value_delimiter = ',', value_name = "DIR")]
    host_path_root: Vec<PathBuf>,
    /// Directory of this node that a PersistentVolumeClaim stands for, name=dir or namespace/name=dir; may
    /// be given again.
    #[arg(long, env = "PILOTLIGHT_CLAIMS", value_delimiter = ',', value_parser = label, value_name = "NAME=DIR")]
    claim: Vec<(String, String)>,
    /// File with this node's credentials for registries, as `docker login` writes it.
    #[arg(long, env = "PILOTLIGHT_REGISTRY_CONFIG", value_name = "FILE")]
    registry_config: Option<PathBuf>,
    /// Ask again for a part of a model of which no byte comes for this long, 1s to 1h.
    #[arg(long, env = "PILOTLIGHT_FETCH_STALL", default_value = "30s", value_parser = stall, value_name = "DURATION")]
    fetch_stall: std::time::Duration,
    /// User that replicas which are processes run as, by name or number; only root can use another one than its own.
    /// Default: the agent's own user.
    #[arg(long, env = "PILOTLIGHT_RUN_AS", value_name = "USER[:GROUP]")]
    run_as: Option<RunAs>,
    /// Fetch models from loopback, link-local and unspecified addresses, too, such as a store on this machine. Whoever
    /// may apply a manifest then reaches this machine's own services and its cloud's metadata.
    #[arg(long, env = "PILOTLIGHT_ALLOW_LOCAL_STORAGE")]
    allow_local_storage: bool,
    /// Bytes that fetched models and pulled container images may take on disk, such as 500GiB; those that no
    /// replica uses go to make room, what nobody asked to keep first, the one used longest ago before others.
    /// Default: no limit but the disk's.
    #[arg(long, env = "PILOTLIGHT_CACHE_BUDGET", value_parser = cache_budget, value_name = "SIZE")]
    cache_budget: Option<ByteSize>,
    /// Main memory that models without requests may fill: replicas that sleep, and weights in the page
    /// cache; such as 64GiB, 0B for none. Default: half of the node's main memory.
    #[arg(long, env = "PILOTLIGHT_WARM_MEMORY", value_name = "SIZE")]
    warm_memory: Option<ByteSize>,
    #[command(flatten)]
    clients: ClientArgs,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected key=value")?;
    if key.is_empty() {
        return Err("the key must not be empty".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn runtime(text: &str) -> Result<RuntimeChoice, String> {
    match text {
        "process" => Ok(RuntimeChoice::Process),
        "docker" => Ok(RuntimeChoice::Docker),
        "auto" => Ok(RuntimeChoice::Auto),
        _ => Err("expected process, docker or auto".to_owned()),
    }
}

fn gpu_mode(text: &str) -> Result<GpuMode, String> {
    match text {
        "device-request" => Ok(GpuMode::DeviceRequest),
        "cdi" => Ok(GpuMode::Cdi),
        _ => Err("expected device-request or cdi".to_owned()),
    }
}

fn stall(text: &str) -> Result<std::time::Duration, String> {
    let given = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let allowed = std::time::Duration::from_secs(1)..=std::time::Duration::from_secs(3600);
    if allowed.contains(&given) { Ok(given) } else { Err("expected 1s to 1h".to_owned()) }
}

fn cache_budget(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>()? {
        ByteSize(0) => Err("expected at least one byte".to_owned()),
        budget => Ok(budget),
    }
}

impl NodeArgs {
    /// Returns `true` if replicas run as another user, who must reach the models.
    pub fn runs_as_another_user(&self) -> bool {
        self.run_as.is_some()
    }

    /// Fills in what these flags say; `otherwise` is the inventory where none is pretended.
    pub fn fill(self, config: Config, otherwise: InventorySource) -> Config {
        let inventory = match (self.simulate_gpus_file, self.simulate_gpus) {
            (Some(file), _) => InventorySource::SimulatedFile(file),
            (None, Some(count)) => InventorySource::Simulated {
                count,
                product: self.simulate_gpu_product,
                memory_bytes: self.simulate_gpu_memory.as_u64(),
                mig_profiles: self.simulate_gpu_mig,
            },
            (None, None) => otherwise,
        };
        Config {
            inventory,
            nvml_library: self.nvml_library,
            labels: self.label.into_iter().collect(),
            max_request_body: self.clients.max_request_body.as_u64(),
            clients: self.clients.settings(&config.clients),
            runtime: self.runtime.unwrap_or(config.runtime),
            docker: DockerSettings {
                socket: self.docker_socket,
                network: self.docker_network,
                gpu_mode: self.gpu_mode,
                host_path_roots: self.host_path_root,
                claims: self.claim.into_iter().map(|(name, path)| (name, path.into())).collect(),
                registry_config: self.registry_config,
                ..DockerSettings::default()
            },
            run_as: self.run_as,
            allow_local_storage: self.allow_local_storage,
            fetch_stall: self.fetch_stall,
            cache_budget: self.cache_budget.map(|budget| budget.as_u64()),
            warm_memory: self.warm_memory.map(|budget| budget.as_u64()),
            ..config
        }
    }
}

/// Runs an agent.
pub async fn run(args: Args, stopping: CancellationToken) -> anyhow::Result<()> {
    let config = Config {
        node_name: args.node_name,
        coordinators: args.coordinator,
        security: Security::Mtls { token: args.token },
        data_dir: args.data_dir,
        listen_ingress: args.listen_ingress,
        listen_peer: args.listen_peer,
        listen_http: args.listen_http,
        advertise_peer: args.advertise_peer,
        runtime: RuntimeChoice::Auto,
        ..Config::default()
    };
    Ok(pilotlight_agent::run(args.node.fill(config, InventorySource::Nvml), stopping).await?)
}
