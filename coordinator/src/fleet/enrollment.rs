//! Hands out node certificates: for a join token once, then again to whoever holds one.

use std::sync::Arc;

use jiff::Timestamp;
use pilotlight_identity::{Authority, JoinToken, Member, TokenRecord};
use pilotlight_proto::fleet::v1::{
    JoinRequest, JoinResponse, RenewRequest, RenewResponse, enrollment_server::Enrollment,
};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::{
    api::access::Access,
    model::keys,
    store::{Store, StoreError, Transaction},
};

/// One message for every unusable token, so that guessing learns nothing.
const REFUSED: &str = "join token is unknown, used or expired; make a new one with `pilotlight token create`";

/// The gRPC service.
pub struct EnrollmentService {
    authority: Arc<Authority>,
    store: Arc<dyn Store>,
    access: Access,
}

impl EnrollmentService {
    /// Signs with `authority` what tokens in `store` allow.
    pub fn new(authority: Arc<Authority>, store: Arc<dyn Store>, access: Access) -> Self {
        Self { authority, store, access }
    }

    /// Marks the token used. Of two requests with one token, the store lets only one through.
    async fn redeem(&self, token: &JoinToken) -> Result<(), Status> {
        let key = keys::token(token.id());
        let entry = self.store.get(&key).await.map_err(unavailable)?;
        let entry = entry.ok_or_else(|| Status::unauthenticated(REFUSED))?;
        let record: TokenRecord =
            serde_json::from_slice(&entry.value).map_err(|error| Status::internal(format!("{key}: {error}")))?;
        if !record.admits(token, now_unix()) {
            return Err(Status::unauthenticated(REFUSED));
        }
        let write = Transaction::new().expect_revision(&key, entry.mod_revision).delete(&key);
        match self.store.commit(write).await {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict { .. }) => Err(Status::unauthenticated(REFUSED)),
            Err(error) => Err(unavailable(error)),
        }
    }
}

#[tonic::async_trait]
impl Enrollment for EnrollmentService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        let token: JoinToken =
            request.token.parse().map_err(|error| Status::invalid_argument(format!("token: {error}")))?;
        let member = Member::node(&request.node_name)
            .map_err(|error| Status::invalid_argument(format!("node_name: {error}")))?;
        // The CSR is checked first: a typing error must not use up the token.
        self.authority
            .check_csr(&request.csr_pem)
            .map_err(|error| Status::invalid_argument(format!("csr_pem: {error}")))?;
        if let Err(status) = self.redeem(&token).await {
            warn!(node = %request.node_name, token = token.id(), "join refused");
            return Err(status);
        }
        let certificate_pem = self.sign(&request.csr_pem, &member)?;
        info!(node = %request.node_name, token = token.id(), "node joined");
        Ok(Response::new(JoinResponse { certificate_pem, ca_pem: self.authority.certificate_pem().to_owned() }))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let Some(member @ Member::Node(_)) = self.access.caller(&request)? else {
            return Err(Status::permission_denied("only a node may renew a node's certificate"));
        };
        let certificate_pem = self.sign(&request.into_inner().csr_pem, &member)?;
        info!(%member, "certificate renewed");
        Ok(Response::new(RenewResponse { certificate_pem, ca_pem: self.authority.certificate_pem().to_owned() }))
    }
}

impl EnrollmentService {
    fn sign(&self, csr_pem: &str, member: &Member) -> Result<String, Status> {
        self.authority
            .sign(csr_pem, member, pilotlight_identity::NODE_LIFETIME, std::time::SystemTime::now())
            .map_err(|error| Status::invalid_argument(format!("csr_pem: {error}")))
    }
}

fn unavailable(error: StoreError) -> Status {
    Status::unavailable(error.to_string())
}

/// Seconds since the epoch, as token records keep it.
pub fn now_unix() -> i64 {
    Timestamp::now().as_second()
}
