//! How an agent is set up.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

/// Settings of one agent process.
#[derive(Debug, Clone)]
pub struct Config {
    /// Unique in the cell, a DNS label.
    pub node_name: String,
    /// `https://host:port` of the coordinator; `http://` only with [`Security::Plaintext`].
    pub coordinator: String,
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
    /// The operator's own node labels.
    pub labels: BTreeMap<String, String>,
    /// Largest request body the gateway takes, bytes.
    pub max_request_body: u64,
    /// What `pvc://` names mean on this node: folders, served in place.
    pub volumes: BTreeMap<String, PathBuf>,
    /// A part of a model of which no byte comes for this long is asked for again.
    pub fetch_stall: std::time::Duration,
    /// True: replicas end with the agent (as `dev` wants it). False: they outlive it and are adopted.
    pub stop_replicas_on_exit: bool,
}

/// How an agent proves who it is.
#[derive(Debug, Clone)]
pub enum Security {
    /// Not at all; for `dev`, where the coordinator is on this machine's loopback.
    Plaintext,
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
            coordinator: "https://127.0.0.1:7443".into(),
            security: Security::Mtls { token: None },
            data_dir: "/var/lib/pilotlight/agent".into(),
            listen_ingress: SocketAddr::from(([0, 0, 0, 0], 8080)),
            listen_peer: SocketAddr::from(([0, 0, 0, 0], 7444)),
            listen_http: SocketAddr::from(([127, 0, 0, 1], 7481)),
            advertise_peer: None,
            inventory: InventorySource::Nvml,
            labels: BTreeMap::new(),
            max_request_body: 256 << 20,
            volumes: BTreeMap::new(),
            fetch_stall: crate::models::STALL,
            stop_replicas_on_exit: false,
        }
    }
}
