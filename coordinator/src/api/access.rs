//! Who is calling, and may they?

use pilotlight_identity::{Member, Role};
use tonic::{Request, Status};

/// How callers are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everyone on this machine may do everything: `dev`, on loopback.
    Open,
    /// By certificate; no certificate, no access.
    Certified,
}

impl Access {
    /// The caller's identity; `None` only where access is open.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` where a certificate is needed and none was presented.
    pub fn caller<T>(self, request: &Request<T>) -> Result<Option<Member>, Status> {
        match self {
            Self::Open => Ok(None),
            Self::Certified => pilotlight_identity::peer_of(request).map(Some).map_err(|error| {
                Status::unauthenticated(format!("a client certificate of this cell is needed: {error}"))
            }),
        }
    }

    /// Lets an operator through whose role is at least `role`.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` without a certificate, `PERMISSION_DENIED` with the wrong one.
    pub fn operator<T>(self, request: &Request<T>, role: Role) -> Result<(), Status> {
        match self.caller(request)? {
            None => Ok(()),
            Some(Member::Operator { role: held, .. }) if held >= role => Ok(()),
            Some(member) => Err(Status::permission_denied(format!("{member} needs the role {role}"))),
        }
    }
}
