//! The members of an etcd cluster, and calls that any of them may answer.
//!
//! etcd-client balances over its endpoints at random and waits for a member that does not answer. Here each member has
//! a channel of its own, a call goes to the member that answered last, and to the next one where that does not answer
//! in time.

use std::{
    fs,
    future::Future,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use etcd_client::{Certificate, Channel, Client, ConnectOptions, Identity, TlsOptions};
use tokio::{sync::OnceCell, time::Instant};
use tonic::transport::Endpoint;
use tracing::{info, warn};

use super::super::StoreError;
use crate::config::EtcdConfig;

/// A call that no member has answered after this time has failed.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time that one of several members has to answer before the next one is asked.
const MEMBER_TIMEOUT: Duration = Duration::from_millis(1500);
/// Time for a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Silence after which a connection is pinged, and time for the answer.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Pause after no member has answered.
const ROUND_PAUSE: Duration = Duration::from_millis(100);

/// All members of one cluster.
pub(super) struct Members {
    members: Vec<Member>,
    options: ConnectOptions,
    /// Index of the member that is asked first.
    preferred: AtomicUsize,
}

struct Member {
    endpoint: String,
    channel: tonic::transport::Channel,
    /// Made at the first call: with a user name it asks the member for a token.
    client: OnceCell<Client>,
}

impl Members {
    /// Members at the configured endpoints. Connects when they are first asked.
    ///
    /// # Errors
    /// There is no endpoint, one is not a URL, or a PEM file cannot be read.
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
        if let Some((user, password)) = &config.user {
            options = options.with_user(user, password);
        }
        let tls = tls(config)?;
        let members = config.endpoints.iter().map(|endpoint| Member::new(endpoint, tls.as_ref()));
        let members = members.collect::<Result<Vec<_>, _>>()?;
        if members.is_empty() {
            return Err(StoreError::Open("etcd-endpoints: expected at least one URL".to_owned()));
        }
        Ok(Self { members, options, preferred: AtomicUsize::new(0) })
    }

    /// Asks one member after another until one answers, for at most [`CALL_TIMEOUT`]. The call may take place several
    /// times: it must be idempotent.
    pub(super) async fn ask<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + CALL_TIMEOUT;
        loop {
            let mut unreachable = String::new();
            for _ in 0..self.members.len() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                match self.once(&call, left.min(self.member_timeout())).await {
                    Err(StoreError::Unavailable(reason)) => unreachable = reason,
                    answered => return answered,
                }
            }
            if Instant::now() + ROUND_PAUSE >= deadline {
                return Err(StoreError::Unavailable(unreachable));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    /// Asks the preferred member once. Where it does not answer within `timeout`, the next call goes to the next member.
    pub(super) async fn once<T, F>(&self, call: impl Fn(Client) -> F, timeout: Duration) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let index = self.preferred.load(Ordering::Relaxed);
        let member = &self.members[index % self.members.len()];
        let asking = async { call(member.client(&self.options).await?).await };
        let reason = match tokio::time::timeout(timeout, asking).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) if is_final(&error) => return Err(StoreError::Open(format!("etcd refuses: {error}"))),
            Ok(Err(error)) => reason(&error),
            Err(_) => format!("no answer within {timeout:.1?}"),
        };
        let reason = format!("etcd is unreachable: {}: {reason}", member.endpoint);
        self.leave(index);
        Err(StoreError::Unavailable(reason))
    }

    /// Time for one member to answer: all of the time where there is no other one.
    pub(super) fn member_timeout(&self) -> Duration {
        if self.members.len() > 1 { MEMBER_TIMEOUT } else { CALL_TIMEOUT }
    }

    /// Number of members.
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Prefers the member after this one, unless another call has already done so.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let left = self.preferred.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if left && self.members.len() > 1 {
            let (from, to) = (&self.members[index].endpoint, &self.members[next].endpoint);
            info!(%from, %to, "an etcd member does not answer; asking the next one");
        }
    }
}

impl Member {
    fn new(endpoint: &str, tls: Option<&TlsOptions>) -> Result<Self, StoreError> {
        let bad = |reason: String| StoreError::Open(format!("etcd-endpoints: {endpoint:?}: {reason}"));
        let url = match (endpoint.split_once("://"), tls) {
            (Some(_), _) => endpoint.to_owned(),
            (None, Some(_)) => format!("https://{endpoint}"),
            (None, None) => format!("http://{endpoint}"),
        };
        let is_tls = url.starts_with("https://");
        let mut channel = Endpoint::from_shared(url).map_err(|error| bad(error.to_string()))?;
        match (is_tls, tls) {
            (true, tls) => {
                let tls = tls.cloned().unwrap_or_default();
                channel = channel.tls_config(tls).map_err(|error| bad(error.to_string()))?;
            }
            (false, Some(_)) => return Err(bad("etcd-ca and etcd-cert need an https URL".to_owned())),
            (false, None) => {}
        }
        let channel = channel
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_lazy();
        Ok(Self { endpoint: endpoint.to_owned(), channel, client: OnceCell::new() })
    }

    async fn client(&self, options: &ConnectOptions) -> Result<Client, etcd_client::Error> {
        let connect = || Client::from_channel(Channel::Tonic(self.channel.clone()), Some(options.clone()));
        self.client.get_or_try_init(connect).await.cloned()
    }
}

/// Returns `true` if another member, or another attempt, gets the same answer.
fn is_final(error: &etcd_client::Error) -> bool {
    use tonic::Code;
    match error {
        etcd_client::Error::GRpcStatus(status) => matches!(
            status.code(),
            Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated | Code::NotFound | Code::OutOfRange
        ),
        etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => true,
        _ => false,
    }
}

/// What is wrong, without the layers that only say that something is.
fn reason(error: &etcd_client::Error) -> String {
    let etcd_client::Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    let mut text = status.message().to_owned();
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    if text.is_empty() {
        warn!(?status, "etcd gives no reason");
        return status.code().description().to_owned();
    }
    text
}

fn tls(config: &EtcdConfig) -> Result<Option<TlsOptions>, StoreError> {
    if config.ca.is_none() && config.identity.is_none() {
        return Ok(None);
    }
    let read =
        |path: &Path| fs::read(path).map_err(|error| StoreError::Open(format!("etcd: {}: {error}", path.display())));
    let mut tls = TlsOptions::new();
    if let Some(ca) = &config.ca {
        tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
    }
    if let Some((certificate, key)) = &config.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(Some(tls))
}
