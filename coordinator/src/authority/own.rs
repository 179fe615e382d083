//! The certificates that a coordinator issues to itself and to its first operator.

use std::{path::PathBuf, sync::Arc, time::Duration};

use pilotlight_identity::{Credentials, LiveIdentity, Member, Revocations, Role};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Authorities, LiveAuthorities};
use crate::{config::Config, server::CoordinatorError};

/// Certificates of the coordinator and its first operator; renewed at each start.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Pause before the operator's certificate is written again after the disk has refused it.
const WRITE_PAUSE: Duration = Duration::from_secs(10);
/// Time for answers that are under way before connections of a retired authority are closed.
const CLOSE_PAUSE: Duration = Duration::from_secs(1);
/// Directory below the data directory for the first operator's certificate.
pub(crate) const OPERATOR_DIR: &str = "operator";

/// Who a coordinator is, and where its first operator's credentials are.
pub(crate) struct OwnIdentity {
    /// Names and addresses in the coordinator's certificate.
    names: Vec<String>,
    operator_dir: PathBuf,
    identity: Arc<LiveIdentity>,
}

impl OwnIdentity {
    /// Issues both certificates, and writes the operator's where the CLI finds it.
    pub(crate) fn issue(
        config: &Config,
        authorities: &Authorities,
        names: &[String],
    ) -> Result<Self, CoordinatorError> {
        let operator_dir = config.data_dir.join(OPERATOR_DIR);
        let identity = LiveIdentity::new(&issue(authorities, Member::Coordinator, names)?)?;
        let own = Self { names: names.to_vec(), operator_dir, identity };
        own.write_operator(authorities);
        Ok(own)
    }

    /// For the gRPC listener.
    pub(crate) fn identity(&self) -> Arc<LiveIdentity> {
        Arc::clone(&self.identity)
    }

    /// Issues both again after each change of the authorities, and closes connections whose authority is trusted no
    /// longer; until `shutdown`. An operator's certificate that could not be written is written later.
    pub(crate) async fn follow(
        self,
        authorities: LiveAuthorities,
        revocations: Arc<Revocations>,
        shutdown: CancellationToken,
    ) {
        let mut changes = authorities.subscribe();
        // They may have changed since the certificates were issued.
        changes.mark_changed();
        let mut is_written = true;
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(WRITE_PAUSE), if !is_written => {}
                () = shutdown.cancelled() => return,
            }
            let current = Arc::clone(&changes.borrow_and_update());
            if let Err(error) = self.renew(&current) {
                warn!(%error, "cannot issue the coordinator's certificate by the new authority");
            }
            is_written = self.write_operator(&current);
            let (authorities, revocations) = (authorities.clone(), Arc::clone(&revocations));
            tokio::spawn(async move {
                // Whoever has retired the authority gets the answer first.
                tokio::time::sleep(CLOSE_PAUSE).await;
                revocations.close_untrusted(&authorities.current().trusted());
            });
        }
    }

    fn renew(&self, authorities: &Authorities) -> Result<(), CoordinatorError> {
        Ok(self.identity.replace(&issue(authorities, Member::Coordinator, &self.names)?)?)
    }

    /// Issues and writes the first operator's credentials. Returns `false` if they cannot be written, such as on a full
    /// disk: the coordinator serves without them.
    fn write_operator(&self, authorities: &Authorities) -> bool {
        let directory = self.operator_dir.display();
        let written = Member::operator("admin", Role::Admin, None)
            .map_err(CoordinatorError::from)
            .and_then(|member| issue(authorities, member, &[]))
            .and_then(|credentials| Ok(credentials.save(&self.operator_dir)?));
        match &written {
            Ok(()) => info!(%directory, "operator's certificate written; use it by --credentials"),
            Err(error) => warn!(%directory, %error, "cannot write the operator's certificate; trying again"),
        }
        written.is_ok()
    }
}

fn issue(authorities: &Authorities, member: Member, names: &[String]) -> Result<Credentials, CoordinatorError> {
    let issued = authorities.signer.issue(&member, names, LIFETIME)?;
    Ok(Credentials { ca_pem: authorities.bundle(), ..issued })
}
