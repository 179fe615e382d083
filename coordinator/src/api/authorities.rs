//! The certificate authorities, and the steps of their rotation.

use std::time::SystemTime;

use jiff::Timestamp;
use pilotlight_identity::{Authority, CaCertificate};
use pilotlight_proto::control::v1 as control;
use tonic::Status;

use super::control::{ControlService, status, unavailable};
use crate::{
    authority::{Authorities, RotationError},
    members::UserRecord,
    model::keys,
    store::StoreExt as _,
};

/// Members and tokens that a refusal names, at most.
const MAX_NAMED: usize = 10;

impl ControlService {
    pub(super) async fn show_authorities(&self) -> Result<control::GetAuthoritiesResponse, Status> {
        let current = self.authorities()?.current();
        let trusted = current.trusted();
        Ok(control::GetAuthoritiesResponse {
            authorities: trusted.iter().map(|authority| shown(&current, authority)).collect(),
            members: self.authority_members().await?,
            ca_pem: current.bundle(),
            external: current.is_external(),
        })
    }

    pub(super) async fn make_next_authority(&self) -> Result<control::Authority, Status> {
        let current = self.authorities()?.current();
        let next = Authority::generate(&self.cell).map_err(|error| Status::internal(error.to_string()))?;
        let following = current.rotate(next).map_err(refused)?;
        let made = following.beside_signer().map(|next| shown(&following, &next));
        self.change(&current, following).await?;
        made.ok_or_else(|| Status::internal("the next authority cannot be read"))
    }

    pub(super) async fn activate_next_authority(&self, force: bool) -> Result<control::Authority, Status> {
        let current = self.authorities()?.current();
        let following = current.activate().map_err(refused)?;
        let next = &following.trusted()[0];
        if !force {
            let members = self.authority_members().await?;
            let behind = members.iter().filter(|member| !member.trusted_sha256.contains(&next.sha256));
            check(
                "do not trust the next authority yet, and could not connect any more",
                "Nodes learn of it while they are connected, users by `pilotlight user renew`; delete nodes that are gone \
                 by `pilotlight delete node NAME`",
                behind.map(|member| member.subject.clone()).collect(),
            )?;
            let tokens = self.usable_tokens().await?;
            check(
                "name the authority that signs now, and would let nobody join any more",
                "Wait until they are used or expire, or revoke them by `pilotlight token revoke ID`",
                tokens.into_iter().map(|token| format!("token/{}", token.id)).collect(),
            )?;
        }
        let activated = shown(&following, next);
        self.change(&current, following).await?;
        Ok(activated)
    }

    pub(super) async fn retire_authority_beside(&self, force: bool) -> Result<control::Authority, Status> {
        let current = self.authorities()?.current();
        let following = current.retire().map_err(refused)?;
        let retired = current.beside_signer().ok_or_else(|| refused(RotationError::NothingToRetire))?;
        let shown = shown(&current, &retired);
        // Nobody holds a certificate of a next authority.
        if !force && current.previous.is_some() {
            let signer = &following.trusted()[0].sha256;
            let members = self.authority_members().await?;
            let behind = members.iter().filter(|member| member.issuer_sha256 != *signer);
            check(
                "hold certificates of the previous authority, and could not connect any more",
                "Nodes renew theirs while they are connected, users by `pilotlight user renew`; delete nodes that are gone \
                 by `pilotlight delete node NAME`",
                behind.map(|member| member.subject.clone()).collect(),
            )?;
        }
        self.change(&current, following).await?;
        Ok(shown)
    }

    async fn change(&self, current: &Authorities, following: Authorities) -> Result<(), Status> {
        self.authorities()?.change(&self.store, &self.vault, current, following).await.map_err(refused)
    }

    /// All nodes, and users whose certificates are valid.
    async fn authority_members(&self) -> Result<Vec<control::AuthorityMember>, Status> {
        let nodes: Vec<String> =
            self.handle.read(|world, _| world.nodes.keys().cloned().collect()).await.map_err(status)?;
        let node = |name: String| {
            let applied = self.sessions.trust_of(&name);
            control::AuthorityMember {
                subject: format!("node/{name}"),
                issuer_sha256: applied.issuer_sha256,
                trusted_sha256: applied.trusted_sha256,
            }
        };
        let users = self.store.list_json::<UserRecord>(keys::USERS).await.map_err(unavailable)?;
        let now = Timestamp::now();
        let user = |user: UserRecord| control::AuthorityMember {
            subject: format!("operator/{}", user.name),
            issuer_sha256: user.trusted.first().cloned().unwrap_or_default(),
            trusted_sha256: user.trusted,
        };
        Ok(nodes.into_iter().map(node).chain(users.into_iter().filter(|user| user.is_valid(now)).map(user)).collect())
    }
}

/// Refuses a step that would lock these out.
fn check(why: &str, remedy: &str, locked_out: Vec<String>) -> Result<(), Status> {
    if locked_out.is_empty() {
        return Ok(());
    }
    let more = locked_out.len().saturating_sub(MAX_NAMED);
    let mut named = locked_out.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 {
        named = format!("{named} and {more} more");
    }
    Err(Status::failed_precondition(format!("{named} {why}. {remedy}; --force goes on without them")))
}

fn refused(error: RotationError) -> Status {
    match error {
        RotationError::Changed => Status::aborted(error.to_string()),
        RotationError::Failed(error) => Status::unavailable(error.to_string()),
        _ => Status::failed_precondition(error.to_string()),
    }
}

fn shown(authorities: &Authorities, authority: &CaCertificate) -> control::Authority {
    let is_signer = authorities.signer.certificate().is_ok_and(|signer| signer.sha256 == authority.sha256);
    let state = match () {
        () if is_signer => control::AuthorityState::Signing,
        () if authorities.next.is_some() => control::AuthorityState::Next,
        () => control::AuthorityState::Previous,
    };
    let at = |time: SystemTime| Some(prost_types::Timestamp::from(time));
    control::Authority {
        sha256: authority.sha256.clone(),
        state: state.into(),
        not_before: at(authority.not_before),
        not_after: at(authority.not_after),
    }
}
