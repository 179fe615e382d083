//! Certificates, join tokens and mutual TLS for a Pilotlight cell.
//!
//! Every member of a cell (coordinator, node, operator) holds a certificate of the cell's own
//! [`Authority`]. Its URI name says who the member is ([`Member`]), its DNS name is what TLS verifies.

mod accept;
mod authority;
mod ca_certificate;
mod coordinators;
mod credentials;
#[cfg(test)]
mod handshakes;
mod live;
mod member;
mod private;
mod revocations;
mod signatures;
mod token;
mod transport;

pub use accept::{AcceptMetrics, TlsConnection, accept_tls};
pub use authority::{Authority, NODE_LIFETIME, new_csr};
pub use ca_certificate::CaCertificate;
pub use coordinators::{Coordinators, LEADER_HEADER, STATE_TIME_HEADER};
pub use credentials::Credentials;
pub use live::LiveIdentity;
pub use member::{Member, MemberCertificate, Role, check_label};
pub use private::{DirLock, lock_dir, passable_dir, private_dir, private_file};
pub use revocations::{Revocable, RevocationList, Revocations, Revoked};
pub use token::{JoinToken, TokenRecord, check_pattern, random_token};
pub use transport::{BearerToken, Channel, Trust, channel, connect_node, connect_tls, member_of, peer_of};

/// Why an identity cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A name is not a DNS label.
    #[error("name {0:?}: expected 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit")]
    Name(String),
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// PEM text holds no usable certificate or key.
    #[error("{what}: {reason}")]
    Pem {
        /// Which part.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A certificate request cannot be used.
    #[error("certificate request: {0}")]
    Csr(String),
    /// A join token cannot be read.
    #[error("join token: {0}; expected plt1.<id>.<secret>.<pin> as printed by `pilotlight token create`")]
    Token(&'static str),
    /// A pattern of node names cannot match any.
    #[error("node pattern {0:?}: expected 1 to 63 of a-z, 0-9, '-', '*' (any characters) and '?' (one character)")]
    Pattern(String),
    /// The system has no randomness.
    #[error("the system has no randomness")]
    Randomness,
    /// A bearer token holds characters that no token has.
    #[error("token: it must consist of visible ASCII characters")]
    BearerToken,
    /// A certificate names no member of a cell.
    #[error("certificate: {0}")]
    Member(String),
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// TLS refuses the certificate or key.
    #[error("tls: {0}")]
    Tls(#[from] rustls::Error),
    /// An address is no URL.
    #[error("address {address:?}: {reason}; expected https://host:port")]
    Address {
        /// As given.
        address: String,
        /// Why.
        reason: String,
    },
}
