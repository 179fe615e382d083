//! How an agent is set up.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use crate::{
    gateway::ClientSettings,
    runtime::{DockerSettings, RunAs},
};

/// Settings of one agent process.
#[derive(Debug, Clone)]
pub struct Config {
    /// Unique in the cell, a DNS label.
    pub node_name: String,
    /// `https://host:port` of each coordinator, at least one; `http://` only with [`Security::Token`].
    pub coordinators: Vec<String>,
    /// How this agent proves who it is.
    pub security: Security,
    /// Directory for the node's key, replica records and logs; made where missing.
    pub data_dir: PathBuf,
    /// Where clients connect: HTTP/1.1 and HTTP/2 with prior knowledge.
    pub listen_ingress: SocketAddr,
    /// Where other agents connect: HTTP/2, mutual TLS.
    pub listen_peer: SocketAddr,
    /// HTTP: `/metrics`, `/healthz`, `/readyz`.
    pub listen_http: SocketAddr,
    /// host:port that other agents use, where it is not `listen_peer`.
    pub advertise_peer: Option<String>,
    /// Where the GPU inventory comes from.
    pub inventory: InventorySource,
    /// The NVIDIA driver's library, `libnvidia-ml.so`; `None` is the system's.
    pub nvml_library: Option<PathBuf>,
    /// The operator's own node labels.
    pub labels: BTreeMap<String, String>,
    /// Largest request body the gateway takes, bytes.
    pub max_request_body: u64,
    /// What clients of the gateway may do, and for how long.
    pub clients: ClientSettings,
    /// A part of a model of which no byte comes for this long is asked for again.
    pub fetch_stall: std::time::Duration,
    /// Bytes that all fetched models and pulled images together may take on disk; `None`: as many as the disk has.
    pub cache_budget: Option<u64>,
    /// Bytes of main memory that models without requests may fill, asleep or in the page cache; `None`: half of it.
    pub warm_memory: Option<u64>,
    /// The user that replicas which are processes run as; `None` is the agent's own.
    pub run_as: Option<RunAs>,
    /// Whether models may be fetched from loopback, link-local and unspecified addresses.
    pub allow_local_storage: bool,
    /// True: replicas end with the agent (as `dev` wants it). False: they outlive it and are adopted.
    pub stop_replicas_on_exit: bool,
    /// What replicas run as.
    pub runtime: RuntimeChoice,
    /// The container engine; `gpus` are filled in from the inventory.
    pub docker: DockerSettings,
}

/// What replicas run as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RuntimeChoice {
    /// Processes of this machine.
    #[default]
    Process,
    /// Containers; the agent does not start without an engine.
    Docker,
    /// Images as containers where an engine answers when the agent starts, else processes.
    Auto,
}

/// How an agent proves who it is.
#[derive(Debug, Clone)]
pub enum Security {
    /// In plaintext with this bearer token; for `dev`.
    Token(String),
    /// A certificate kept in `data_dir`; got with the token where there is none yet.
    Mtls {
        /// As printed by `pilotlight token create`.
        token: Option<String>,
    },
}

/// Where the GPU inventory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InventorySource {
    /// NVML where the driver's library loads, else none.
    Nvml,
    /// NVML where the driver's library loads, else two simulated GPUs (what `dev` uses).
    NvmlOrSimulated,
    /// This many simulated GPUs of one product.
    Simulated {
        /// 0 to 64.
        count: u32,
        /// Such as `NVIDIA A100-SXM4-80GB`.
        product: String,
        /// Memory of each, bytes.
        memory_bytes: u64,
        /// MIG profiles that each is divided into, such as `1g.10gb`; empty: none is divided.
        mig_profiles: Vec<String>,
    },
    /// A YAML file that lists them.
    SimulatedFile(PathBuf),
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: "node".into(),
            coordinators: vec!["https://127.0.0.1:7443".into()],
            security: Security::Mtls { token: None },
            data_dir: "/var/lib/pilotlight/agent".into(),
            listen_ingress: SocketAddr::from(([0, 0, 0, 0], 8080)),
            listen_peer: SocketAddr::from(([0, 0, 0, 0], 7444)),
            listen_http: SocketAddr::from(([127, 0, 0, 1], 7481)),
            advertise_peer: None,
            inventory: InventorySource::Nvml,
            nvml_library: None,
            labels: BTreeMap::new(),
            max_request_body: 256 << 20,
            clients: ClientSettings::default(),
            fetch_stall: crate::models::STALL,
            cache_budget: None,
            warm_memory: None,
            run_as: None,
            allow_local_storage: false,
            stop_replicas_on_exit: false,
            runtime: RuntimeChoice::default(),
            docker: DockerSettings::default(),
        }
    }
}

/// The directory of this node that a PersistentVolumeClaim stands for, by `<namespace>/<name>` or else by name.
///
/// # Errors
/// There is none; those that there are, for people.
pub fn claim<'a>(
    claims: &'a BTreeMap<String, PathBuf>,
    namespace: &str,
    name: &str,
) -> Result<&'a std::path::Path, String> {
    let found = claims.get(&format!("{namespace}/{name}")).or_else(|| claims.get(name));
    found.map(PathBuf::as_path).ok_or_else(|| {
        let known: Vec<_> = claims.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        format!("persistentVolumeClaim {name:?} is not known on this node; known are: {known}; see --claim")
    })
}
