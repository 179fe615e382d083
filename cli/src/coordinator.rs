//! `pilotlight coordinator`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use pilotlight_coordinator::{
    config::{Config, EtcdConfig, Security, StoreConfig},
    spec::{IdleReplicas, PlacementPolicy},
};
use tokio_util::sync::CancellationToken;

use crate::scaling::ScalingArgs;

/// Settings of a coordinator.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the cell, a DNS label.
    #[arg(long, env = "PILOTLIGHT_CELL", default_value = "main")]
    cell: String,
    /// gRPC for operators and agents, with mutual TLS.
    #[arg(long, env = "PILOTLIGHT_LISTEN", default_value = "127.0.0.1:7443", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// URL at which agents and operators reach this coordinator, told to those that ask a standby. Default: the
    /// first of --names, with the port of --listen.
    #[arg(long, env = "PILOTLIGHT_ADVERTISE", value_name = "URL")]
    advertise: Option<String>,
    /// HTTP for /metrics, /healthz and /readyz.
    #[arg(long, env = "PILOTLIGHT_LISTEN_HTTP", default_value = "127.0.0.1:7480", value_name = "ADDRESS")]
    listen_http: SocketAddr,
    /// Directory for the embedded store and the first operator's credentials.
    #[arg(long, env = "PILOTLIGHT_DATA_DIR", default_value = "/var/lib/pilotlight/coordinator", value_name = "DIR")]
    data_dir: PathBuf,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Names and addresses by which others reach this coordinator, for its certificate.
    #[arg(long, env = "PILOTLIGHT_NAMES", value_delimiter = ',', default_value = "localhost,127.0.0.1")]
    names: Vec<String>,
    /// An authority of your own, PEM; else one is made and kept in the store.
    #[arg(long, env = "PILOTLIGHT_CA_CERT", value_name = "FILE", requires = "ca_key")]
    ca_cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long, env = "PILOTLIGHT_CA_KEY", value_name = "FILE", requires = "ca_cert")]
    ca_key: Option<PathBuf>,
    /// Key that secrets and the authority's key are sealed with: 32 random bytes in base64. Coordinators that share
    /// etcd need the same. Default: systemd's credential secrets.key, else secrets.key in the data directory, which is
    /// made if missing.
    #[arg(long, env = "PILOTLIGHT_SECRETS_KEY", value_name = "FILE")]
    secrets_key: Option<PathBuf>,
    #[command(flatten)]
    serving: ServingArgs,
}

/// How to reach etcd.
#[derive(Debug, clap::Args)]
pub struct EtcdArgs {
    /// etcd's addresses, those of all members; without any, the embedded store is used.
    #[arg(long, env = "PILOTLIGHT_ETCD_ENDPOINTS", value_delimiter = ',', value_name = "URL")]
    etcd_endpoints: Vec<String>,
    /// etcd user, where it asks for one.
    #[arg(long, env = "PILOTLIGHT_ETCD_USER", requires = "etcd_password")]
    etcd_user: Option<String>,
    /// etcd password; better given by variable than by flag.
    #[arg(long, env = "PILOTLIGHT_ETCD_PASSWORD", requires = "etcd_user", hide_env_values = true)]
    etcd_password: Option<String>,
    /// Authority of etcd's certificate, PEM.
    #[arg(long, env = "PILOTLIGHT_ETCD_CA", value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// Certificate to show etcd, PEM.
    #[arg(long, env = "PILOTLIGHT_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long, env = "PILOTLIGHT_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
}

impl EtcdArgs {
    /// The store that these flags name.
    pub fn store(self) -> StoreConfig {
        if self.etcd_endpoints.is_empty() {
            return StoreConfig::Embedded;
        }
        StoreConfig::Etcd(EtcdConfig {
            endpoints: self.etcd_endpoints,
            user: self.etcd_user.zip(self.etcd_password),
            ca: self.etcd_ca,
            identity: self.etcd_cert.zip(self.etcd_key),
        })
    }
}

/// What coordinators have in common, `dev` included.
#[derive(Debug, clap::Args)]
pub struct ServingArgs {
    /// Time between scaling decisions; Knative's is 2s.
    #[arg(long, env = "PILOTLIGHT_TICK", default_value = "2s", value_parser = humantime::parse_duration)]
    tick: Duration,
    /// How often agents report their queues, 10ms to 60s.
    #[arg(long, env = "PILOTLIGHT_REPORT_INTERVAL", default_value = "1s", value_parser = humantime::parse_duration)]
    report_interval: Duration,
    /// A node that is silent for longer is lost.
    #[arg(long, env = "PILOTLIGHT_NODE_LEASE", default_value = "20s", value_parser = humantime::parse_duration)]
    node_lease: Duration,
    /// Requests that one gateway holds for one revision; further ones get 503.
    #[arg(long, env = "PILOTLIGHT_QUEUE_LIMIT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    queue_limit: u32,
    /// How replicas are placed unless annotation pilotlight.dev/placement-policy says otherwise: binpack or spread.
    #[arg(long, env = "PILOTLIGHT_PLACEMENT_POLICY", default_value_t = PlacementPolicy::BinPack, value_name = "POLICY")]
    placement_policy: PlacementPolicy,
    /// What becomes of a service's last replica once nobody needs it, unless annotation
    /// pilotlight.dev/warm-replicas says: sleep or stop.
    #[arg(long, env = "PILOTLIGHT_IDLE_REPLICAS", default_value_t, value_name = "WHAT")]
    idle_replicas: IdleReplicas,
    /// Services are reached as <service>.<namespace>.<domain>.
    #[arg(long, env = "PILOTLIGHT_DOMAIN", default_value = "localhost")]
    domain: String,
    /// Port that clients use, for a service's URL [default: the port on which agents listen].
    #[arg(long, env = "PILOTLIGHT_INGRESS_PORT")]
    ingress_port: Option<u16>,
    /// File for what the autoscaler sees and decides, as JSON lines.
    #[arg(long, env = "PILOTLIGHT_RECORD", value_name = "FILE")]
    record: Option<PathBuf>,
    #[command(flatten)]
    scaling: ScalingArgs,
}

impl ServingArgs {
    /// A coordinator with these settings, and with `ingress_port` if none was given (0: the port on which agents
    /// listen); all else by default.
    pub fn config(self, ingress_port: u16) -> Config {
        Config {
            domain: self.domain,
            ingress_port: self.ingress_port.unwrap_or(ingress_port),
            tick: self.tick,
            report_interval: self.report_interval,
            node_lease: self.node_lease,
            queue_limit: self.queue_limit,
            placement_policy: self.placement_policy,
            idle_replicas: self.idle_replicas,
            record: self.record,
            scaling: self.scaling.defaults(),
            ..Default::default()
        }
    }
}

/// Runs a coordinator.
pub async fn run(args: Args, stopping: CancellationToken) -> anyhow::Result<()> {
    Ok(pilotlight_coordinator::run(config(args), stopping).await?)
}

fn config(args: Args) -> Config {
    Config {
        cell: args.cell,
        listen: args.listen,
        listen_http: args.listen_http,
        advertise: args.advertise,
        data_dir: args.data_dir,
        store: args.etcd.store(),
        security: Security::Mtls { names: args.names, ca: args.ca_cert.zip(args.ca_key) },
        secrets_key: args.secrets_key,
        ..args.serving.config(0)
    }
}
