//! Whom members may trust, as agents are told: on connect and after each change.

use std::sync::Arc;

use pilotlight_identity::{RevocationList, Revocations};
use pilotlight_proto::fleet::v1::{self as fleet, coordinator_message::Message as ToAgent};
use tokio::sync::watch;

use crate::authority::{Authorities, LiveAuthorities};

/// What one session has been told. Cheap to clone.
#[derive(Clone)]
pub struct Followed {
    revocations: watch::Receiver<Arc<RevocationList>>,
    /// `None` without TLS.
    authorities: Option<watch::Receiver<Arc<Authorities>>>,
}

impl Followed {
    pub(crate) fn new(revocations: &Revocations, authorities: Option<&LiveAuthorities>) -> Self {
        Self { revocations: revocations.subscribe(), authorities: authorities.map(LiveAuthorities::subscribe) }
    }

    /// What there is now has not been told yet.
    pub(super) fn mark_changed(&mut self) {
        self.revocations.mark_changed();
        if let Some(authorities) = &mut self.authorities {
            authorities.mark_changed();
        }
    }

    /// The next message to the agent.
    pub(super) async fn changed(&mut self) -> ToAgent {
        let Self { revocations, authorities } = self;
        let authorities_changed = async {
            let Some(authorities) = authorities else { return std::future::pending().await };
            if authorities.changed().await.is_err() {
                // The coordinator ends, and the session with it.
                return std::future::pending().await;
            }
            trust_bundle(&authorities.borrow_and_update())
        };
        tokio::select! {
            Ok(()) = revocations.changed() => revocation_list(&revocations.borrow_and_update()),
            bundle = authorities_changed => bundle,
        }
    }
}

fn revocation_list(list: &RevocationList) -> ToAgent {
    let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
    let revocations = list.iter().map(|(subject, issued_until)| fleet::Revocation {
        subject: subject.clone(),
        issued_until: Some(at(*issued_until)),
    });
    ToAgent::Revocations(fleet::Revocations { revocations: revocations.collect() })
}

fn trust_bundle(authorities: &Authorities) -> ToAgent {
    // The one that signs comes first.
    let signer = authorities.trusted().into_iter().next();
    let signer_sha256 = signer.map(|signer| signer.sha256).unwrap_or_default();
    ToAgent::TrustBundle(fleet::TrustBundle { ca_pem: authorities.bundle(), signer_sha256 })
}
