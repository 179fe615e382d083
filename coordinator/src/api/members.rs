//! Join tokens, joins, users and revocations.

use std::time::Duration;

use jiff::Timestamp;
use pilotlight_identity::{JoinToken, Member, MemberCertificate, Role, TokenRecord};
use pilotlight_proto::control::v1 as control;
use tonic::Status;

use super::{
    access::Caller,
    control::{ControlService, asked, unavailable},
};
use crate::{
    authority::{Authorities, LiveAuthorities},
    members::{self, NodeJoins, RevocationRecord, UserRecord},
    model::keys,
    reconcile::view::timestamp,
    store::{StoreError, StoreExt as _, Transaction},
};

/// How long a join token may be used unless asked for otherwise, and at most.
const DEFAULT_TOKEN_LIFETIME: Duration = Duration::from_secs(3600);
const MAX_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Lifetime of a user's certificate unless asked for otherwise, and at most.
const DEFAULT_USER_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
const MAX_USER_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// The operator whose certificate each start of a coordinator writes.
const FIRST_OPERATOR: &str = "admin";

impl ControlService {
    pub(super) fn authorities(&self) -> Result<&LiveAuthorities, Status> {
        self.authorities.as_ref().ok_or_else(|| {
            Status::failed_precondition("this coordinator runs without TLS (`dev`): it has no tokens and no users")
        })
    }

    pub(super) async fn make_token(
        &self,
        caller: &Caller,
        request: control::CreateTokenRequest,
    ) -> Result<control::CreateTokenResponse, Status> {
        let authorities = self.authorities()?.current();
        let ttl = lifetime(request.ttl, DEFAULT_TOKEN_LIFETIME, MAX_TOKEN_LIFETIME)?;
        let pattern = Some(request.node).filter(|pattern| !pattern.is_empty());
        pattern.as_deref().map(pilotlight_identity::check_pattern).transpose().map_err(invalid("node"))?;
        let now = Timestamp::now();
        let expires_at = now + ttl;
        let (token, record) = JoinToken::generate(&authorities.signer, expires_at.as_second())
            .map_err(|error| Status::internal(error.to_string()))?;
        let record = TokenRecord {
            node: pattern,
            replace: request.replace,
            created_by: caller.name.clone(),
            created_at: now.as_second(),
            ..record
        };
        let key = keys::token(token.id());
        let write = Transaction::new().expect_absent(&key).put_json(&key, &record);
        self.store.commit(write).await.map_err(unavailable)?;
        Ok(control::CreateTokenResponse { token: token.to_string(), expires_at: Some(timestamp(expires_at)) })
    }

    pub(super) async fn usable_tokens(&self) -> Result<Vec<control::Token>, Status> {
        let now = Timestamp::now().as_second();
        let tokens = self.store.list_json::<TokenRecord>(keys::TOKENS).await.map_err(unavailable)?;
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let usable = tokens.into_iter().filter(|token| now < token.expires_at);
        Ok(usable
            .map(|token| control::Token {
                id: token.id,
                node: token.node.unwrap_or_default(),
                replace: token.replace,
                created_by: token.created_by,
                created_at: at(token.created_at),
                expires_at: at(token.expires_at),
            })
            .collect())
    }

    pub(super) async fn delete_token(&self, id: &str) -> Result<(), Status> {
        let key = keys::token(id);
        let missing = || Status::not_found(format!("token {id:?} not found: it is unknown, used or revoked"));
        let entry = self.store.get(&key).await.map_err(unavailable)?.ok_or_else(missing)?;
        let write = Transaction::new().expect_revision(&key, entry.mod_revision).delete(&key);
        match self.store.commit(write).await {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict { .. }) => Err(missing()),
            Err(error) => Err(unavailable(error)),
        }
    }

    pub(super) async fn joins(&self, node: &str) -> Result<Vec<control::Join>, Status> {
        let nodes = self.store.list_json::<NodeJoins>(keys::JOINS).await.map_err(unavailable)?;
        let mut joins: Vec<_> = nodes
            .into_iter()
            .filter(|joins| asked(node, &joins.node))
            .flat_map(|NodeJoins { node, joins }| joins.into_iter().map(move |join| (node.clone(), join)))
            .collect();
        joins.sort_by_key(|(_, join)| join.time);
        Ok(joins
            .into_iter()
            .map(|(node, join)| control::Join {
                node,
                time: Some(timestamp(join.time)),
                token_id: join.token_id,
                token_created_by: join.token_created_by,
                certificate_sha256: join.certificate_sha256,
                remote_address: join.remote_address,
                replaced: join.replaced,
            })
            .collect())
    }

    pub(super) async fn refuse_node(&self, caller: &Caller, name: &str) -> Result<(), Status> {
        let member = Member::node(name).map_err(invalid("name"))?;
        self.authorities()?;
        let joined = self.store.get(&keys::joins(name)).await.map_err(unavailable)?.is_some();
        if !joined && self.store.get(&keys::node(name)).await.map_err(unavailable)?.is_none() {
            return Err(Status::not_found(format!("node {name} not found: no node of this name has joined")));
        }
        self.revoke(caller, &member, Transaction::new()).await
    }

    pub(super) async fn make_user(
        &self,
        caller: &Caller,
        request: control::CreateUserRequest,
    ) -> Result<control::CreateUserResponse, Status> {
        let authorities = self.authorities()?.current();
        let role = Role::from_name(&request.role).ok_or_else(|| {
            Status::invalid_argument(format!("role: {:?}, expected viewer, operator or admin", request.role))
        })?;
        let namespace = Some(request.namespace).filter(|namespace| !namespace.is_empty());
        if role == Role::Admin && namespace.is_some() {
            return Err(Status::invalid_argument("namespace: an admin has all namespaces; leave it out"));
        }
        let member = Member::operator(&request.name, role, namespace.as_deref()).map_err(invalid("name"))?;
        let ttl = lifetime(request.ttl, DEFAULT_USER_LIFETIME, MAX_USER_LIFETIME)?;
        let name = request.name;
        if name == FIRST_OPERATOR {
            return Err(Status::invalid_argument(
                "name: \"admin\" is the operator whose certificate the coordinator writes",
            ));
        }
        let (key, now) = (keys::user(&name), Timestamp::now());
        let stored = self.store.get(&key).await.map_err(unavailable)?;
        if let Some(stored) = &stored {
            let user: UserRecord =
                serde_json::from_slice(&stored.value).map_err(|error| Status::internal(format!("{key}: {error}")))?;
            if user.is_valid(now) {
                return Err(Status::already_exists(format!(
                    "user {name} has a certificate that is valid; first run `pilotlight user revoke {name}`"
                )));
            }
        }
        let issued_at = self.issue_time(&member).await?;
        let certificate_pem =
            authorities.signer.sign(&request.csr_pem, &member, ttl, issued_at).map_err(invalid("csr_pem"))?;
        let user = UserRecord {
            name,
            role: role.to_string(),
            namespace,
            created_by: caller.name.clone(),
            created_at: now,
            expires_at: now + ttl,
            certificate_sha256: fingerprint(&certificate_pem)?,
            revoked_at: None,
            trusted: fingerprints(&authorities),
        };
        let write = match stored {
            Some(stored) => Transaction::new().expect_revision(&key, stored.mod_revision),
            None => Transaction::new().expect_absent(&key),
        };
        self.store.commit(write.put_json(&key, &user)).await.map_err(unavailable)?;
        let ca_pem = authorities.bundle();
        Ok(control::CreateUserResponse { user: Some(shown(user)), certificate_pem, ca_pem })
    }

    /// Signs a new certificate for the caller, who holds this one. It expires when this one does.
    pub(super) async fn renew_own(
        &self,
        held: Option<MemberCertificate>,
        csr_pem: &str,
    ) -> Result<control::RenewUserResponse, Status> {
        let authorities = self.authorities()?.current();
        let refused = || Status::permission_denied("only an operator may renew an operator's certificate");
        let MemberCertificate { member, expires_at, .. } = held.ok_or_else(refused)?;
        let Member::Operator { name, .. } = &member else { return Err(refused()) };
        let lifetime = Duration::from_secs((expires_at - Timestamp::now().as_second()).max(1).cast_unsigned());
        let issued_at = self.issue_time(&member).await?;
        let certificate_pem =
            authorities.signer.sign(csr_pem, &member, lifetime, issued_at).map_err(invalid("csr_pem"))?;
        let key = keys::user(name);
        match self.store.get(&key).await.map_err(unavailable)? {
            Some(stored) => {
                let user: UserRecord = serde_json::from_slice(&stored.value)
                    .map_err(|error| Status::internal(format!("{key}: {error}")))?;
                let certificate_sha256 = fingerprint(&certificate_pem)?;
                let user = UserRecord { certificate_sha256, trusted: fingerprints(&authorities), ..user };
                let write = Transaction::new().expect_revision(&key, stored.mod_revision).put_json(&key, &user);
                self.store.commit(write).await.map_err(unavailable)?;
            }
            // The coordinator has created it, and keeps no record.
            None if name == FIRST_OPERATOR => {}
            None => return Err(Status::not_found(format!("user {name} not found"))),
        }
        Ok(control::RenewUserResponse { certificate_pem, ca_pem: authorities.bundle() })
    }

    pub(super) async fn users(&self) -> Result<Vec<control::User>, Status> {
        let users = self.store.list_json::<UserRecord>(keys::USERS).await.map_err(unavailable)?;
        Ok(users.into_iter().map(shown).collect())
    }

    pub(super) async fn refuse_user(&self, caller: &Caller, name: &str) -> Result<(), Status> {
        let member = Member::operator(name, Role::Viewer, None).map_err(invalid("name"))?;
        let stored = self.store.get_json::<UserRecord>(&keys::user(name)).await.map_err(unavailable)?;
        let write = match stored {
            Some(user) => {
                let user = UserRecord { revoked_at: Some(Timestamp::now()), ..user };
                Transaction::new().put_json(&keys::user(name), &user)
            }
            // The coordinator has created it, and writes a new certificate at its next start.
            None if name == FIRST_OPERATOR => Transaction::new(),
            None => return Err(Status::not_found(format!("user {name} not found"))),
        };
        self.authorities()?;
        self.revoke(caller, &member, write).await
    }

    async fn revoke(&self, caller: &Caller, member: &Member, write: Transaction) -> Result<(), Status> {
        let subject = member.subject().ok_or_else(|| Status::invalid_argument("a coordinator cannot be revoked"))?;
        let write = RevocationRecord::put(subject, &caller.name, write);
        self.store.commit(write).await.map(drop).map_err(unavailable)
    }

    async fn issue_time(&self, member: &Member) -> Result<std::time::SystemTime, Status> {
        let subject = member.subject().unwrap_or_default();
        members::issue_time(&self.store, &subject).await.map_err(unavailable)
    }
}

/// SHA-256 of the authorities, hexadecimal; the one that signs comes first.
fn fingerprints(authorities: &Authorities) -> Vec<String> {
    authorities.trusted().into_iter().map(|authority| authority.sha256).collect()
}

fn fingerprint(certificate_pem: &str) -> Result<String, Status> {
    let certificate = MemberCertificate::from_pem(certificate_pem);
    certificate.map(|certificate| certificate.fingerprint).map_err(|error| Status::internal(error.to_string()))
}

fn lifetime(given: Option<prost_types::Duration>, default: Duration, max: Duration) -> Result<Duration, Status> {
    let Some(given) = given else { return Ok(default) };
    let given = Duration::try_from(given).map_err(|_| Status::invalid_argument("ttl: must not be negative"))?;
    if given.is_zero() || given > max {
        return Err(Status::invalid_argument(format!(
            "ttl: {given:?}, expected more than 0 and at most {}h",
            max.as_secs() / 3600
        )));
    }
    Ok(given)
}

fn invalid(field: &'static str) -> impl Fn(pilotlight_identity::IdentityError) -> Status {
    move |error| Status::invalid_argument(format!("{field}: {error}"))
}

fn shown(user: UserRecord) -> control::User {
    control::User {
        name: user.name,
        role: user.role,
        namespace: user.namespace.unwrap_or_default(),
        created_by: user.created_by,
        created_at: Some(timestamp(user.created_at)),
        expires_at: Some(timestamp(user.expires_at)),
        revoked_at: user.revoked_at.map(timestamp),
        certificate_sha256: user.certificate_sha256,
    }
}
