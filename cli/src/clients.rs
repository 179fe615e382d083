//! Flags for what clients of the gateway may do, and for how long.

use std::time::Duration;

use bytesize::ByteSize;
use ipnet::IpNet;
use pilotlight_agent::gateway::{ClientSettings, progress::BodyLimits};

/// Limits for clients of the gateway.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// Largest request body.
    #[arg(long, env = "PILOTLIGHT_MAX_REQUEST_BODY", default_value = "256MiB")]
    pub max_request_body: ByteSize,
    /// Close a client's connection whose first request, or a later one that has begun, has no complete head after
    /// this time, 1s to 1h.
    #[arg(long, env = "PILOTLIGHT_REQUEST_HEADER_TIMEOUT", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    request_header_timeout: Duration,
    /// Answer 408 to a request whose body sends no bytes for this long, 1s to 1h.
    #[arg(long, env = "PILOTLIGHT_REQUEST_BODY_IDLE_TIMEOUT", default_value = "30s", value_parser = duration, value_name = "DURATION")]
    request_body_idle_timeout: Duration,
    /// Answer 408 to a request whose body arrives more slowly than this per second on average, after 10 s of
    /// waiting for it; 0B for no minimum.
    #[arg(long, env = "PILOTLIGHT_REQUEST_BODY_MIN_RATE", default_value = "1KiB", value_name = "SIZE")]
    request_body_min_rate: ByteSize,
    /// Disconnect a client that accepts nothing of its response for this long although bytes are ready, 1s to 1h.
    #[arg(long, env = "PILOTLIGHT_RESPONSE_WRITE_TIMEOUT", default_value = "60s", value_parser = duration, value_name = "DURATION")]
    response_write_timeout: Duration,
    /// Close a client's connection that has had no request for this long, 1s to 1h.
    #[arg(long, env = "PILOTLIGHT_CONNECTION_IDLE_TIMEOUT", default_value = "2m", value_parser = duration, value_name = "DURATION")]
    connection_idle_timeout: Duration,
    /// Connections of clients at the same time; the oldest idle ones are closed when nine tenths are open. At most,
    /// and by default, what the limit of open files allows, up to 20000.
    #[arg(long, env = "PILOTLIGHT_MAX_CONNECTIONS", value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    max_connections: Option<u32>,
    /// Networks of proxies whose X-Forwarded-* headers are kept, such as 10.0.0.0/8; may be given again. Those of
    /// other clients are replaced.
    #[arg(long, env = "PILOTLIGHT_TRUSTED_PROXIES", value_delimiter = ',', value_name = "CIDR")]
    trusted_proxies: Vec<IpNet>,
    /// List the known hosts in the answer to a request for an unknown one; dev always does.
    #[arg(long, env = "PILOTLIGHT_LIST_KNOWN_HOSTS")]
    list_known_hosts: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let given = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(3600);
    if allowed.contains(&given) { Ok(given) } else { Err("expected 1s to 1h".to_owned()) }
}

impl ClientArgs {
    /// What these flags say; the rest is as in `defaults`.
    pub fn settings(self, defaults: &ClientSettings) -> ClientSettings {
        ClientSettings {
            header_timeout: self.request_header_timeout,
            idle_timeout: self.connection_idle_timeout,
            body: BodyLimits {
                idle_timeout: self.request_body_idle_timeout,
                min_bytes_per_second: self.request_body_min_rate.as_u64(),
            },
            response_write_timeout: self.response_write_timeout,
            max_connections: self.max_connections.map_or(defaults.max_connections, |limit| limit as usize),
            trusted_proxies: self.trusted_proxies,
            list_known_hosts: self.list_known_hosts || defaults.list_known_hosts,
        }
    }
}
