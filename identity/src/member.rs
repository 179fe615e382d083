//! Who a certificate is for.

use std::fmt;

use rustls::pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::FromDer as _, prelude::X509Certificate};

use crate::IdentityError;

/// Suffix of the DNS names that TLS verifies. They are never looked up.
const DNS_SUFFIX: &str = "pilotlight.internal";

/// A member of a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Member {
    /// A coordinator.
    Coordinator,
    /// A node's agent, by node name.
    Node(String),
    /// A person or tool that uses the control API.
    Operator {
        /// Name, a DNS label.
        name: String,
        /// What it may do.
        role: Role,
    },
}

/// What an operator may do; a higher role may do all that a lower one may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Look.
    Viewer,
    /// Apply and delete services.
    Operator,
    /// Make join tokens.
    Admin,
}

impl Member {
    /// A node.
    ///
    /// # Errors
    /// The name is not a DNS label.
    pub fn node(name: &str) -> Result<Self, IdentityError> {
        check_label(name)?;
        Ok(Self::Node(name.to_owned()))
    }

    /// An operator.
    ///
    /// # Errors
    /// The name is not a DNS label.
    pub fn operator(name: &str, role: Role) -> Result<Self, IdentityError> {
        check_label(name)?;
        Ok(Self::Operator { name: name.to_owned(), role })
    }

    /// The DNS name that TLS verifies.
    pub fn dns_name(&self) -> String {
        match self {
            Self::Coordinator => format!("coordinator.{DNS_SUFFIX}"),
            Self::Node(name) => format!("{name}.node.{DNS_SUFFIX}"),
            Self::Operator { name, .. } => format!("{name}.operator.{DNS_SUFFIX}"),
        }
    }

    /// The URI that names the member, in SPIFFE's form.
    pub fn uri(&self, cell: &str) -> String {
        let path = match self {
            Self::Coordinator => "coordinator".to_owned(),
            Self::Node(name) => format!("node/{name}"),
            Self::Operator { name, role } => format!("operator/{role}/{name}"),
        };
        format!("spiffe://{cell}.{DNS_SUFFIX}/{path}")
    }

    /// Reads the member from a certificate. The chain must have been verified before.
    ///
    /// # Errors
    /// The certificate cannot be read or has no such URI.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| IdentityError::Member(error.to_string()))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Member(error.to_string()))?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        let uri = names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        uri.and_then(Self::from_uri).ok_or_else(|| {
            IdentityError::Member(format!("it names no member of a cell (URI {})", uri.unwrap_or("missing")))
        })
    }

    fn from_uri(uri: &str) -> Option<Self> {
        let (_cell, path) = uri.strip_prefix("spiffe://")?.split_once(&format!(".{DNS_SUFFIX}/"))?;
        match path.split('/').collect::<Vec<_>>()[..] {
            ["coordinator"] => Some(Self::Coordinator),
            ["node", name] => Self::node(name).ok(),
            ["operator", role, name] => Self::operator(name, Role::from_name(role)?).ok(),
            _ => None,
        }
    }
}

impl Role {
    fn from_name(name: &str) -> Option<Self> {
        [Self::Viewer, Self::Operator, Self::Admin].into_iter().find(|role| role.to_string() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("the coordinator"),
            Self::Node(name) => write!(f, "node {name}"),
            Self::Operator { name, role } => write!(f, "{role} {name}"),
        }
    }
}

/// Checks that a name is a DNS label (RFC 1123).
///
/// # Errors
/// It is not.
pub fn check_label(name: &str) -> Result<(), IdentityError> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| *byte != b'-');
    let bytes = name.as_bytes();
    let good = (1..=63).contains(&bytes.len())
        && bytes.iter().all(|byte| inner(*byte))
        && edge(bytes.first())
        && edge(bytes.last());
    if good { Ok(()) } else { Err(IdentityError::Name(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_go_through_their_uri() {
        let members = [
            Member::Coordinator,
            Member::node("gpu-1").unwrap(),
            Member::operator("ada", Role::Admin).unwrap(),
            Member::operator("bob", Role::Viewer).unwrap(),
        ];
        for member in members {
            assert_eq!(Member::from_uri(&member.uri("main")), Some(member));
        }
        for bad in [
            "https://main.pilotlight.internal/coordinator",
            "spiffe://main/x",
            "spiffe://main.pilotlight.internal/node/a/b",
        ] {
            assert_eq!(Member::from_uri(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "gpu-1", "0x", &"a".repeat(63)] {
            assert!(check_label(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"a".repeat(64)] {
            assert!(check_label(bad).unwrap_err().to_string().contains("expected 1 to 63"), "{bad}");
        }
    }

    #[test]
    fn a_higher_role_may_do_more() {
        assert!(Role::Admin > Role::Operator && Role::Operator > Role::Viewer);
    }
}
