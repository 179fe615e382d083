//! How a coordinator is set up.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    autoscaler::Defaults,
    spec::{IdleReplicas, PlacementPolicy},
};

/// Settings of one coordinator process. `Default` is a single machine with mutual TLS.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the cell, a DNS label. It is part of every stored key and every certificate.
    pub cell: String,
    /// gRPC: control, fleet, enrollment, health and reflection.
    pub listen: SocketAddr,
    /// HTTP: `/metrics`, `/healthz`, `/readyz`.
    pub listen_http: SocketAddr,
    /// URL at which agents and operators reach this coordinator; a standby sends them there while this one leads.
    /// `None` means the first of the certificate's names, with the port of `listen`.
    pub advertise: Option<String>,
    /// Directory for the embedded store and the operator's first certificate; made where missing.
    pub data_dir: PathBuf,
    /// Where desired state is kept.
    pub store: StoreConfig,
    /// Who may connect.
    pub security: Security,
    /// Services are reached as `<service>.<namespace>.<domain>`.
    pub domain: String,
    /// Port that clients see, for `status.url`; 80 is left out of it. 0: the port on which agents listen.
    pub ingress_port: u16,
    /// Time between scaling decisions. Knative's is 2 s.
    pub tick: Duration,
    /// How often agents report their queues. Knative's is 1 s.
    pub report_interval: Duration,
    /// A node that is silent for this long is lost, and its replicas are placed anew.
    pub node_lease: Duration,
    /// Requests that one gateway may hold for one revision.
    pub queue_limit: u32,
    /// How replicas are placed unless their annotations say otherwise.
    pub placement_policy: PlacementPolicy,
    /// What becomes of a service's last replica once nobody needs it, unless its annotations say.
    pub idle_replicas: IdleReplicas,
    /// File with the key that secrets are sealed with, 32 bytes in base64; all coordinators of a cell need
    /// the same. `None` means systemd's credential `secrets.key`, else `secrets.key` below `data_dir`, made if missing.
    pub secrets_key: Option<PathBuf>,
    /// Where to write what the autoscaler observes and decides, as JSON lines, for `pilotlight simulate`.
    pub record: Option<PathBuf>,
    /// Fleet-wide autoscaler settings, which annotations of a service win over.
    pub scaling: Defaults,
}

/// Which store.
#[derive(Debug, Clone)]
pub enum StoreConfig {
    /// One ACID file below `data_dir`, for one machine.
    Embedded,
    /// An etcd cluster.
    Etcd(EtcdConfig),
}

/// How to reach etcd.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// Such as `https://10.0.0.1:2379`; at least one.
    pub endpoints: Vec<String>,
    /// User and password, where etcd asks for them.
    pub user: Option<(String, String)>,
    /// Authority to trust, PEM file.
    pub ca: Option<PathBuf>,
    /// Client certificate and key, PEM files.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Who may connect to the gRPC listener.
#[derive(Debug, Clone)]
pub enum Security {
    /// In plaintext, whoever presents this bearer token. Refused on an address that is not loopback.
    Token(String),
    /// Mutual TLS.
    Mtls {
        /// Names and addresses by which agents and operators reach this coordinator, for its certificate.
        names: Vec<String>,
        /// An authority of your own, certificate and key as PEM files; else one is made and kept in the store.
        ca: Option<(PathBuf, PathBuf)>,
    },
}

impl Config {
    /// URL at which agents and operators reach this coordinator.
    pub fn advertised(&self) -> String {
        let port = self.listen.port();
        match (&self.advertise, &self.security) {
            (Some(url), _) => url.clone(),
            (None, Security::Token(_)) => format!("http://{}", self.listen),
            (None, Security::Mtls { names, .. }) => match names.first() {
                Some(name) => format!("https://{name}:{port}"),
                None => format!("https://{}", self.listen),
            },
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cell: "main".into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 7443)),
            listen_http: SocketAddr::from(([127, 0, 0, 1], 7480)),
            advertise: None,
            data_dir: "/var/lib/pilotlight/coordinator".into(),
            store: StoreConfig::Embedded,
            security: Security::Mtls { names: vec!["localhost".into(), "127.0.0.1".into()], ca: None },
            domain: "pilotlight.local".into(),
            ingress_port: 0,
            tick: Duration::from_secs(2),
            report_interval: Duration::from_secs(1),
            node_lease: Duration::from_secs(20),
            queue_limit: 1000,
            placement_policy: PlacementPolicy::BinPack,
            idle_replicas: IdleReplicas::Sleep,
            secrets_key: None,
            record: None,
            // A service may be born at zero, since GPUs are dear.
            scaling: Defaults { allow_zero_initial_scale: true, ..Defaults::default() },
        }
    }
}
