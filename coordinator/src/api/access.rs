//! Who is calling, and what they may do.

use std::sync::Arc;

use pilotlight_identity::{Member, MemberCertificate, Revocations, Role};
use tonic::{Request, Status, metadata::MetadataMap, service::Interceptor};
use tracing::warn;

/// How callers are told apart.
#[derive(Clone)]
pub enum Access {
    /// Whoever presents this bearer token may do everything: `dev`, on loopback.
    Token(Arc<str>),
    /// By certificate; no certificate, no access.
    Certified(Arc<CellMembers>),
}

/// Whose certificates are accepted.
#[derive(Debug)]
pub struct CellMembers {
    /// Name of the cell.
    pub cell: String,
    /// Certificates that are refused before they expire.
    pub revocations: Arc<Revocations>,
}

/// An operator who may make a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Name, for logs.
    pub name: String,
    /// The one namespace that the caller may see and change; `None` is all.
    pub namespace: Option<String>,
}

impl Access {
    /// The caller's certificate; `None` only if callers have none.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` if a certificate or token is needed and none was presented, `PERMISSION_DENIED` if the
    /// certificate is another cell's or was revoked.
    pub fn caller<T>(&self, request: &Request<T>) -> Result<Option<MemberCertificate>, Status> {
        match self {
            Self::Token(token) => check_token(token, request.metadata()).map(|()| None),
            Self::Certified(members) => {
                let certificate = pilotlight_identity::peer_of(request).map_err(|error| {
                    Status::unauthenticated(format!("a client certificate of this cell is needed: {error}"))
                })?;
                members.check(&certificate)?;
                Ok(Some(certificate))
            }
        }
    }

    /// Lets an operator of all namespaces through whose role is at least `role`.
    ///
    /// # Errors
    /// As [`Access::caller`], and `PERMISSION_DENIED` with the wrong role or the scope of one namespace.
    pub fn operator<T>(&self, request: &Request<T>, role: Role) -> Result<Caller, Status> {
        let caller = self.any_scope(request, role)?;
        match &caller.namespace {
            None => Ok(caller),
            Some(namespace) => Err(Status::permission_denied(format!(
                "{} may only use namespace {namespace}, and this call is for the whole cell",
                caller.name
            ))),
        }
    }

    /// Lets an operator through whose role is at least `role` and whose scope includes `namespace`; an empty namespace
    /// is all.
    ///
    /// # Errors
    /// As [`Access::operator`].
    pub fn in_namespace<T>(&self, request: &Request<T>, role: Role, namespace: &str) -> Result<Caller, Status> {
        let caller = self.any_scope(request, role)?;
        caller.check_namespace(namespace)?;
        Ok(caller)
    }

    /// Lets an operator through whose role is at least `role`, whatever its scope: the call checks that itself.
    ///
    /// # Errors
    /// As [`Access::caller`], and `PERMISSION_DENIED` with the wrong role.
    pub fn any_scope<T>(&self, request: &Request<T>, role: Role) -> Result<Caller, Status> {
        match self.caller(request)?.map(|certificate| certificate.member) {
            None => Ok(Caller { name: "dev".to_owned(), namespace: None }),
            Some(Member::Operator { role: held, name, namespace }) if held >= role => Ok(Caller { name, namespace }),
            Some(member) => {
                warn!(target: "audit", caller = %member, needs = %role, outcome = "denied");
                Err(Status::permission_denied(format!("{member} needs the role {role}")))
            }
        }
    }
}

impl Caller {
    /// Checks that a namespace is in the caller's scope; an empty one is all.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` if it is not.
    pub fn check_namespace(&self, namespace: &str) -> Result<(), Status> {
        match &self.namespace {
            Some(scope) if scope != namespace => {
                warn!(target: "audit", caller = %self.name, namespace, scope, outcome = "denied");
                let asked = if namespace.is_empty() { "all namespaces".to_owned() } else { format!("{namespace:?}") };
                Err(Status::permission_denied(format!(
                    "namespace: {asked}, but {} may only use {scope:?}; pass `-n {scope}`",
                    self.name
                )))
            }
            _ => Ok(()),
        }
    }
}

impl CellMembers {
    fn check(&self, certificate: &MemberCertificate) -> Result<(), Status> {
        let MemberCertificate { member, cell, .. } = certificate;
        if *cell != self.cell {
            return Err(Status::permission_denied(format!(
                "the certificate of {member} is for cell {cell:?}, and this is cell {:?}",
                self.cell
            )));
        }
        match self.revocations.revoked_at(certificate) {
            None => Ok(()),
            Some(_) => Err(Status::permission_denied(format!("the certificate of {member} was revoked"))),
        }
    }
}

/// Lets only callers of this cell use a service that has no roles, such as reflection.
impl Interceptor for Access {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.caller(&request)?;
        Ok(request)
    }
}

fn check_token(token: &str, metadata: &MetadataMap) -> Result<(), Status> {
    let given = metadata.get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    // Hashes are compared, so that the time it takes says nothing about the token.
    let hash = |text: &str| ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    match given {
        Some(given) if hash(given).as_ref() == hash(token).as_ref() => Ok(()),
        Some(_) => Err(Status::unauthenticated("the token is not that of the `pilotlight dev` that runs now")),
        None => Err(Status::unauthenticated(
            "`pilotlight dev` needs its token: run the command as the user who started it, or pass --token-file",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pilotlight_identity::Authority;

    use super::*;

    fn certificate(cell: &str, name: &str) -> MemberCertificate {
        let authority = Authority::generate(cell).unwrap();
        let member = Member::operator(name, Role::Viewer, None).unwrap();
        let issued = authority.issue(&member, &[], Duration::from_secs(60)).unwrap();
        MemberCertificate::from_pem(&issued.certificate_pem).unwrap()
    }

    #[test]
    fn certificates_of_other_cells_and_revoked_ones_are_refused() {
        let members = CellMembers { cell: "main".into(), revocations: Arc::default() };
        let ada = certificate("main", "ada");
        assert!(members.check(&ada).is_ok());
        let other = members.check(&certificate("other", "ada")).unwrap_err();
        assert!(other.message().contains("for cell \"other\""), "{other}");
        members.revocations.replace([("operator/ada".to_owned(), ada.issued_at)].into());
        assert!(members.check(&ada).unwrap_err().message().contains("was revoked"));
        assert!(members.check(&certificate("main", "bob")).is_ok());
    }

    #[test]
    fn a_scoped_caller_may_use_its_namespace_alone() {
        let caller = Caller { name: "ada".into(), namespace: Some("a".into()) };
        assert!(caller.check_namespace("a").is_ok());
        assert!(caller.check_namespace("b").unwrap_err().message().contains("-n a"));
        assert!(caller.check_namespace("").unwrap_err().message().contains("all namespaces"));
        assert!(Caller { namespace: None, ..caller }.check_namespace("").is_ok());
    }

    #[test]
    fn only_the_right_token_opens_dev() {
        let access = Access::Token("secret".into());
        let with = |value: Option<&str>| {
            let mut request = Request::new(());
            if let Some(value) = value {
                request.metadata_mut().insert("authorization", value.parse().unwrap());
            }
            access.operator(&request, Role::Admin).map_err(|status| status.code())
        };
        assert!(with(Some("Bearer secret")).is_ok());
        for wrong in [None, Some("Bearer other"), Some("secret"), Some("Bearer ")] {
            assert_eq!(with(wrong), Err(tonic::Code::Unauthenticated), "{wrong:?}");
        }
    }
}
