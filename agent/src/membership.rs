//! The node's certificate, and whom the node trusts: joins, renews, and follows the cell's authorities.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use pilotlight_identity::{
    CaCertificate, Coordinators, Credentials, IdentityError, JoinToken, LiveIdentity, Revocations, Trust, new_csr,
};
use pilotlight_proto::fleet::v1::{
    JoinRequest, RenewRequest, TrustApplied, TrustBundle, agent_message::Message as FromAgent,
    enrollment_client::EnrollmentClient,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{config::Config, gateway::DataPath, node::AgentError, session::Outbound};

/// Pause before a renewal that failed is tried again.
const RENEW_PAUSE: Duration = Duration::from_secs(5);
/// Time for running requests to end on connections whose authority is trusted no longer. It is the default timeout of a
/// request.
const CLOSE_UNTRUSTED_AFTER: Duration = Duration::from_secs(300);

/// The node's certificate: kept from before, or got by the token.
///
/// # Errors
/// There is neither, or the node may not join.
pub async fn identity(config: &Config, token: Option<&str>) -> Result<Arc<LiveIdentity>, AgentError> {
    let directory = directory(config);
    let still_valid =
        Credentials::exist(&directory) && Credentials::load(&directory)?.validity()?.1 > SystemTime::now();
    let credentials = match token {
        _ if still_valid => Credentials::load(&directory)?,
        Some(token) => {
            let credentials = join(config, token).await?;
            credentials.save(&directory)?;
            info!(node = %config.node_name, "joined the cell");
            credentials
        }
        None => return Err(AgentError::NoToken(directory)),
    };
    Ok(LiveIdentity::new(&credentials)?)
}

fn directory(config: &Config) -> PathBuf {
    config.data_dir.join("identity")
}

async fn join(config: &Config, token: &str) -> Result<Credentials, AgentError> {
    let token: JoinToken = token.parse()?;
    let coordinators = Coordinators::new(&config.coordinators, Trust::Pinned(token.pin()))?;
    let (key_pem, csr_pem) = new_csr()?;
    let request = JoinRequest { token: token.to_string(), node_name: config.node_name.clone(), csr_pem };
    let join = |channel| {
        let request = request.clone();
        async move { EnrollmentClient::new(channel).join(request).await }
    };
    let answer = coordinators.call(join).await.map_err(AgentError::Join)?.into_inner();
    Ok(Credentials { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem })
}

/// What the coordinator has said of whom to trust, and where the answer goes.
#[derive(Debug, Clone)]
pub struct ToldBundle {
    /// What it has said.
    pub bundle: TrustBundle,
    /// The session that it came by.
    pub say: Outbound,
}

/// Keeps the certificate valid, and the trusted authorities those of the cell.
pub struct Membership {
    directory: PathBuf,
    identity: Arc<LiveIdentity>,
    coordinators: Arc<Coordinators>,
    /// Closes open connections.
    revocations: Arc<Revocations>,
    /// Opens new connections to other nodes.
    data_path: Arc<DataPath>,
}

impl Membership {
    /// Of a node that has joined. After a change, new requests to other nodes use new connections, and old connections
    /// end.
    pub fn new(
        config: &Config,
        identity: Arc<LiveIdentity>,
        coordinators: Arc<Coordinators>,
        revocations: Arc<Revocations>,
        data_path: Arc<DataPath>,
    ) -> Self {
        Self { directory: directory(config), identity, coordinators, revocations, data_path }
    }

    /// Renews the certificate after two thirds of its life, and when another authority signs; until `stopping`.
    pub async fn run(self, mut bundles: watch::Receiver<Option<ToldBundle>>, stopping: CancellationToken) {
        let mut told: Option<ToldBundle> = None;
        let mut not_before = Instant::now();
        loop {
            let due = not_before.max(Instant::now() + self.until_renewal(told.as_ref()));
            tokio::select! {
                () = stopping.cancelled() => return,
                Ok(()) = bundles.changed() => {
                    told = bundles.borrow_and_update().clone();
                    let Some(told) = &told else { continue };
                    match self.trust(&told.bundle) {
                        Ok(()) => self.answer(told).await,
                        Err(error) => warn!(%error, "cannot take the authorities into use that the coordinator names"),
                    }
                }
                () = tokio::time::sleep_until(due) => match self.renew().await {
                    Ok(()) => if let Some(told) = &told { self.answer(told).await },
                    Err(error) => {
                        warn!(%error, "certificate not renewed; trying again");
                        not_before = Instant::now() + RENEW_PAUSE;
                    }
                }
            }
        }
    }

    /// Time until the certificate must be renewed; none if another authority signs now.
    fn until_renewal(&self, told: Option<&ToldBundle>) -> Duration {
        let Ok(credentials) = Credentials::load(&self.directory) else { return RENEW_PAUSE };
        let signer = told.and_then(|told| {
            self.identity.trusted().into_iter().find(|authority| authority.sha256 == told.bundle.signer_sha256)
        });
        if signer.is_some_and(|signer| !signer.key_id.is_empty() && !credentials.is_issued_by(&signer)) {
            return Duration::ZERO;
        }
        let due = credentials.renew_at();
        due.map_or(RENEW_PAUSE, |due| due.duration_since(SystemTime::now()).unwrap_or_default())
    }

    /// Stores the authorities and takes them into use.
    fn trust(&self, bundle: &TrustBundle) -> Result<(), AgentError> {
        let trusted = CaCertificate::bundle(&bundle.ca_pem)?;
        if trusted == self.identity.trusted() {
            return Ok(());
        }
        let credentials = Credentials { ca_pem: bundle.ca_pem.clone(), ..Credentials::load(&self.directory)? };
        self.take_into_use(&credentials)?;
        info!(authorities = trusted.len(), "trusted authorities changed");
        Ok(())
    }

    async fn renew(&self) -> Result<(), AgentError> {
        let (key_pem, csr_pem) = new_csr()?;
        let renew = |channel| {
            let request = RenewRequest { csr_pem: csr_pem.clone() };
            async move { EnrollmentClient::new(channel).renew(request).await }
        };
        let answer = self.coordinators.call(renew).await.map_err(AgentError::Join)?.into_inner();
        let credentials = Credentials { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem };
        self.take_into_use(&credentials)?;
        info!("certificate renewed");
        Ok(())
    }

    fn take_into_use(&self, credentials: &Credentials) -> Result<(), IdentityError> {
        credentials.save(&self.directory)?;
        self.identity.replace(credentials)?;
        self.data_path.refresh_peer_connections();
        let (identity, revocations) = (Arc::clone(&self.identity), Arc::clone(&self.revocations));
        tokio::spawn(async move {
            tokio::time::sleep(CLOSE_UNTRUSTED_AFTER).await;
            revocations.close_untrusted(&identity.trusted());
        });
        Ok(())
    }

    /// Tells the coordinator whom this node trusts, and who issued its certificate.
    async fn answer(&self, told: &ToldBundle) {
        let trusted = self.identity.trusted();
        let issuer = Credentials::load(&self.directory).ok().and_then(|credentials| {
            trusted.iter().find(|authority| credentials.is_issued_by(authority)).map(|issuer| issuer.sha256.clone())
        });
        let applied = TrustApplied {
            trusted_sha256: trusted.into_iter().map(|authority| authority.sha256).collect(),
            issuer_sha256: issuer.unwrap_or_default(),
        };
        told.say.send(FromAgent::TrustApplied(applied)).await;
    }
}
