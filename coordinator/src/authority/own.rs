//! The certificates that a coordinator issues to itself and to its first operator.

use std::{path::PathBuf, sync::Arc, time::Duration};

use pilotlight_identity::{Credentials, LiveIdentity, Member, Revocations, Role};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Authorities, LiveAuthorities};
use crate::{config::Config, server::CoordinatorError};

/// Certificates of the coordinator and its first operator; renewed at each start.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
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
        issue(authorities, Member::operator("admin", Role::Admin, None)?, &[])?.save(&operator_dir)?;
        info!(directory = %operator_dir.display(), "operator's certificate written; use it by --credentials");
        let identity = LiveIdentity::new(&issue(authorities, Member::Coordinator, names)?)?;
        Ok(Self { names: names.to_vec(), operator_dir, identity })
    }

    /// For the gRPC listener.
    pub(crate) fn identity(&self) -> Arc<LiveIdentity> {
        Arc::clone(&self.identity)
    }

    /// Issues both anew after each change of the authorities, and closes connections whose authority is trusted no
    /// longer; until `shutdown`.
    pub(crate) async fn follow(
        self,
        authorities: LiveAuthorities,
        revocations: Arc<Revocations>,
        shutdown: CancellationToken,
    ) {
        let mut changes = authorities.subscribe();
        // They may have changed since the certificates were issued.
        changes.mark_changed();
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            }
            let current = Arc::clone(&changes.borrow_and_update());
            if let Err(error) = self.renew(&current) {
                warn!(%error, "cannot issue the coordinator's certificate by the new authority");
            }
            revocations.close_untrusted(&current.trusted());
        }
    }

    fn renew(&self, authorities: &Authorities) -> Result<(), CoordinatorError> {
        self.identity.replace(&issue(authorities, Member::Coordinator, &self.names)?)?;
        issue(authorities, Member::operator("admin", Role::Admin, None)?, &[])?.save(&self.operator_dir)?;
        Ok(())
    }
}

fn issue(authorities: &Authorities, member: Member, names: &[String]) -> Result<Credentials, CoordinatorError> {
    let issued = authorities.signer.issue(&member, names, LIFETIME)?;
    Ok(Credentials { ca_pem: authorities.bundle(), ..issued })
}
