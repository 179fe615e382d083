//! Who a certificate is for.

use std::fmt;

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    prelude::{FromDer as _, X509Certificate},
};

use crate::{IdentityError, authority};

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
        /// The one namespace that it may see and change; `None` is all, and what belongs to none.
        namespace: Option<String>,
    },
}

/// What a member's certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberCertificate {
    /// Whom it is for.
    pub member: Member,
    /// The cell that it is for.
    pub cell: String,
    /// When it was issued, seconds since the Unix epoch.
    pub issued_at: i64,
    /// When it expires, seconds since the Unix epoch.
    pub expires_at: i64,
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
    /// Key identifier of the authority that issued it, hexadecimal; empty if the certificate does not say.
    pub issuer_key_id: String,
}

impl MemberCertificate {
    /// Reads a certificate. The chain must have been verified before.
    ///
    /// # Errors
    /// The certificate cannot be read or names no member of a cell.
    pub fn from_der(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
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
        let (cell, member) = uri.and_then(Member::from_uri).ok_or_else(|| {
            IdentityError::Member(format!("it names no member of a cell (URI {})", uri.unwrap_or("missing")))
        })?;
        let issued_at = certificate.validity().not_before.timestamp() + authority::CLOCK_SKEW.as_secs() as i64;
        let expires_at = certificate.validity().not_after.timestamp();
        let issuer_key_id = key_id_of_issuer(&certificate).unwrap_or_default();
        Ok(Self { member, cell, issued_at, expires_at, fingerprint: hex(&authority::pin(der)), issuer_key_id })
    }

    /// Reads the first certificate of PEM text.
    ///
    /// # Errors
    /// The text is not PEM, or as [`MemberCertificate::from_der`].
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let der =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| IdentityError::Member(error.to_string()))?;
        Self::from_der(&der)
    }
}

/// Key identifier of the authority that issued a certificate, hexadecimal; `None` if the certificate does not say.
pub(crate) fn issuer_key_id(der: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    key_id_of_issuer(&certificate)
}

fn key_id_of_issuer(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(issuer) => issuer.key_identifier.as_ref().map(|id| hex(id.0)),
        _ => None,
    })
}

/// Bytes as hexadecimal text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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

    /// An operator, of one namespace or of all.
    ///
    /// # Errors
    /// The name or the namespace is not a DNS label.
    pub fn operator(name: &str, role: Role, namespace: Option<&str>) -> Result<Self, IdentityError> {
        check_label(name)?;
        namespace.map(check_label).transpose()?;
        Ok(Self::Operator { name: name.to_owned(), role, namespace: namespace.map(str::to_owned) })
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
            Self::Operator { name, role, namespace: None } => format!("operator/{role}/{name}"),
            Self::Operator { name, role, namespace: Some(namespace) } => format!("operator/{role}/{name}/{namespace}"),
        };
        format!("spiffe://{cell}.{DNS_SUFFIX}/{path}")
    }

    /// By which name certificates of this member are revoked, whatever its role; `None` for a coordinator.
    pub fn subject(&self) -> Option<String> {
        match self {
            Self::Coordinator => None,
            Self::Node(name) => Some(format!("node/{name}")),
            Self::Operator { name, .. } => Some(format!("operator/{name}")),
        }
    }

    /// The cell and the member that a URI names.
    fn from_uri(uri: &str) -> Option<(String, Self)> {
        let (cell, path) = uri.strip_prefix("spiffe://")?.split_once(&format!(".{DNS_SUFFIX}/"))?;
        let member = match path.split('/').collect::<Vec<_>>()[..] {
            ["coordinator"] => Self::Coordinator,
            ["node", name] => Self::node(name).ok()?,
            ["operator", role, name] => Self::operator(name, Role::from_name(role)?, None).ok()?,
            ["operator", role, name, namespace] => {
                Self::operator(name, Role::from_name(role)?, Some(namespace)).ok()?
            }
            _ => return None,
        };
        Some((cell.to_owned(), member))
    }
}

impl Role {
    /// The role of this name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
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
            Self::Operator { name, role, namespace: None } => write!(f, "{role} {name}"),
            Self::Operator { name, role, namespace: Some(namespace) } => {
                write!(f, "{role} {name} of namespace {namespace}")
            }
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
            Member::operator("ada", Role::Admin, None).unwrap(),
            Member::operator("bob", Role::Viewer, Some("team-a")).unwrap(),
        ];
        for member in members {
            assert_eq!(Member::from_uri(&member.uri("main")), Some(("main".to_owned(), member)));
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
