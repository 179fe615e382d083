//! Hands out node certificates: for a join token once, then again to whoever holds one.

use std::sync::Arc;

use jiff::Timestamp;
use pilotlight_identity::{JoinToken, Member, MemberCertificate, TokenRecord};
use pilotlight_proto::fleet::v1::{
    JoinRequest, JoinResponse, RenewRequest, RenewResponse, enrollment_server::Enrollment,
};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::LiveSessions;
use crate::{
    api::access::Access,
    authority::LiveAuthorities,
    members::{self, JoinRecord, MAX_JOINS, NodeJoins},
    model::keys,
    store::{Store, StoreError, Transaction},
};

/// One message for every unusable token, so that guessing learns nothing.
const REFUSED: &str = "join token is unknown, used or expired; make a new one with `pilotlight token create`";

/// The gRPC service.
pub struct EnrollmentService {
    authorities: LiveAuthorities,
    store: Arc<dyn Store>,
    access: Access,
    sessions: Arc<LiveSessions>,
}

/// A token that may be used, and what is known of the node's name.
struct Admission {
    token: TokenRecord,
    token_revision: u64,
    /// Joins under this name so far, and their revision in the store.
    joins: NodeJoins,
    joins_revision: Option<u64>,
    /// Whether a node of this name has joined before.
    is_known: bool,
}

impl EnrollmentService {
    /// Signs what tokens in `store` allow.
    pub(crate) fn new(
        authorities: LiveAuthorities,
        store: Arc<dyn Store>,
        access: Access,
        sessions: Arc<LiveSessions>,
    ) -> Self {
        Self { authorities, store, access, sessions }
    }

    /// Checks that the token lets a node of this name join.
    async fn admit(&self, token: &JoinToken, node: &str) -> Result<Admission, Status> {
        let key = keys::token(token.id());
        let entry = self.store.get(&key).await.map_err(unavailable)?;
        let entry = entry.ok_or_else(|| Status::unauthenticated(REFUSED))?;
        let record: TokenRecord =
            serde_json::from_slice(&entry.value).map_err(|error| Status::internal(format!("{key}: {error}")))?;
        if !record.admits(token, now_unix()) {
            return Err(Status::unauthenticated(REFUSED));
        }
        let joins_key = keys::joins(node);
        let joins = self.store.get(&joins_key).await.map_err(unavailable)?;
        let joins_revision = joins.as_ref().map(|entry| entry.mod_revision);
        let joins = match &joins {
            Some(entry) => serde_json::from_slice(&entry.value)
                .map_err(|error| Status::internal(format!("{joins_key}: {error}")))?,
            None => NodeJoins { node: node.to_owned(), joins: Vec::new() },
        };
        // Nodes that joined with an earlier version have no record of it.
        let is_known =
            joins_revision.is_some() || self.store.get(&keys::node(node)).await.map_err(unavailable)?.is_some();
        check_name(&record, node, is_known)?;
        Ok(Admission { token: record, token_revision: entry.mod_revision, joins, joins_revision, is_known })
    }

    /// Marks the token used and records the join. Of two requests with one token or one name, the store lets only one
    /// through.
    async fn redeem(&self, admission: Admission, join: JoinRecord) -> Result<(), Status> {
        let Admission { token, token_revision, mut joins, joins_revision, .. } = admission;
        let (token_key, joins_key) = (keys::token(&token.id), keys::joins(&joins.node));
        joins.joins.push(join);
        let excess = joins.joins.len().saturating_sub(MAX_JOINS);
        joins.joins.drain(..excess);
        let write = Transaction::new().expect_revision(&token_key, token_revision).delete(&token_key);
        let write = match joins_revision {
            Some(revision) => write.expect_revision(&joins_key, revision),
            None => write.expect_absent(&joins_key),
        };
        match self.store.commit(write.put_json(&joins_key, &joins)).await {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict { key }) if key == joins_key => {
                Err(Status::aborted(format!("node_name: {:?} is joining with another token", joins.node)))
            }
            Err(StoreError::Conflict { .. }) => Err(Status::unauthenticated(REFUSED)),
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn try_join(&self, request: &JoinRequest, token: &JoinToken, remote: String) -> Result<String, Status> {
        let member = Member::node(&request.node_name)
            .map_err(|error| Status::invalid_argument(format!("node_name: {error}")))?;
        // The CSR is checked first: a typing error must not use up the token.
        self.authorities
            .current()
            .signer
            .check_csr(&request.csr_pem)
            .map_err(|error| Status::invalid_argument(format!("csr_pem: {error}")))?;
        let admission = self.admit(token, &request.node_name).await?;
        let (certificate_pem, certificate) = self.sign(&request.csr_pem, &member).await?;
        let join = JoinRecord {
            time: Timestamp::now(),
            token_id: token.id().to_owned(),
            token_created_by: admission.token.created_by.clone(),
            certificate_sha256: certificate.fingerprint,
            remote_address: remote,
            replaced: admission.is_known,
        };
        self.redeem(admission, join).await?;
        Ok(certificate_pem)
    }

    async fn sign(&self, csr_pem: &str, member: &Member) -> Result<(String, MemberCertificate), Status> {
        let subject = member.subject().unwrap_or_default();
        let issued_at = members::issue_time(&self.store, &subject).await.map_err(unavailable)?;
        let certificate_pem = self
            .authorities
            .current()
            .signer
            .sign(csr_pem, member, pilotlight_identity::NODE_LIFETIME, issued_at)
            .map_err(|error| Status::invalid_argument(format!("csr_pem: {error}")))?;
        let certificate =
            MemberCertificate::from_pem(&certificate_pem).map_err(|error| Status::internal(error.to_string()))?;
        Ok((certificate_pem, certificate))
    }
}

/// Checks that the token is for this name.
fn check_name(token: &TokenRecord, node: &str, is_known: bool) -> Result<(), Status> {
    let replace = if is_known { " --replace" } else { "" };
    let command = format!("`pilotlight token create --node {node}{replace}`");
    if !token.covers(node) {
        let pattern = token.node.as_deref().unwrap_or_default();
        return Err(Status::permission_denied(format!(
            "node_name: {node:?}, but the token is for {pattern:?}; make another one with {command}"
        )));
    }
    if is_known && !token.replace {
        return Err(Status::permission_denied(format!(
            "node_name: {node:?} has joined before; to replace that node, make a token with {command}"
        )));
    }
    Ok(())
}

#[tonic::async_trait]
impl Enrollment for EnrollmentService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let remote = request.remote_addr().map(|address| address.to_string()).unwrap_or_default();
        let request = request.into_inner();
        let token: JoinToken =
            request.token.parse().map_err(|error| Status::invalid_argument(format!("token: {error}")))?;
        let (node, id) = (request.node_name.as_str(), token.id());
        match self.try_join(&request, &token, remote.clone()).await {
            Ok(certificate_pem) => {
                info!(target: "audit", action = "join", node, token = id, remote, outcome = "done");
                let ca_pem = self.authorities.current().bundle();
                Ok(Response::new(JoinResponse { certificate_pem, ca_pem }))
            }
            Err(status) => {
                let reason = status.message();
                warn!(target: "audit", action = "join", node, token = id, remote, outcome = "failed", reason);
                Err(status)
            }
        }
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let Some(MemberCertificate { member: member @ Member::Node(_), fingerprint, .. }) =
            self.access.caller(&request)?
        else {
            return Err(Status::permission_denied("only a node may renew a node's certificate"));
        };
        let (certificate_pem, renewed) = self.sign(&request.into_inner().csr_pem, &member).await?;
        if let Member::Node(name) = &member {
            self.sessions.renewed(name, &fingerprint, &renewed.fingerprint);
        }
        info!(%member, "certificate renewed");
        Ok(Response::new(RenewResponse { certificate_pem, ca_pem: self.authorities.current().bundle() }))
    }
}

fn unavailable(error: StoreError) -> Status {
    Status::unavailable(error.to_string())
}

/// Seconds since the epoch, as token records keep it.
pub fn now_unix() -> i64 {
    Timestamp::now().as_second()
}
