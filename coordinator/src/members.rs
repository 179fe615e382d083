//! What the store holds about nodes that joined, users and revocations.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use pilotlight_identity::{RevocationList, Revocations};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::{
    model::keys,
    store::{Store, StoreError, StoreExt as _, Transaction},
};

/// Joins that are kept of one node; older ones are dropped.
pub(crate) const MAX_JOINS: usize = 20;

/// All joins under one node name that are kept, oldest first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct NodeJoins {
    /// Name of the node.
    pub node: String,
    /// At most [`MAX_JOINS`].
    pub joins: Vec<JoinRecord>,
}

/// One certificate that a node got by a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinRecord {
    /// When.
    pub time: Timestamp,
    /// Public part of the token.
    pub token_id: String,
    /// Name of the user who created the token; empty for tokens of earlier versions.
    pub token_created_by: String,
    /// SHA-256 of the certificate, hexadecimal.
    pub certificate_sha256: String,
    /// host:port that the request came from; empty if unknown.
    pub remote_address: String,
    /// Whether the name was known before.
    pub replaced: bool,
}

/// An operator who was given a certificate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UserRecord {
    /// Name, a DNS label.
    pub name: String,
    /// "viewer", "operator" or "admin".
    pub role: String,
    /// The one namespace that the user may see and change; `None` is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name of the user who created it.
    pub created_by: String,
    /// When the certificate was issued.
    pub created_at: Timestamp,
    /// When it expires.
    pub expires_at: Timestamp,
    /// SHA-256 of it, hexadecimal.
    pub certificate_sha256: String,
    /// When it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<Timestamp>,
    /// SHA-256 of the authorities that the user was told to trust, hexadecimal; the one that issued the certificate comes
    /// first. Empty in records of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted: Vec<String>,
}

impl UserRecord {
    /// Returns `true` if the certificate is neither revoked nor expired.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.revoked_at.is_none() && now < self.expires_at
    }
}

/// Certificates of one member that are refused before they expire.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RevocationRecord {
    /// As [`pilotlight_identity::Member::subject`] returns it.
    pub subject: String,
    /// Certificates issued at this time or earlier are refused, in seconds since the Unix epoch.
    pub issued_until: i64,
    /// Name of the user who revoked them.
    pub revoked_by: String,
}

impl RevocationRecord {
    /// Adds the revocation of all certificates that the member holds now.
    pub fn put(subject: String, revoked_by: &str, write: Transaction) -> Transaction {
        let key = keys::revocation(&subject);
        let issued_until = Timestamp::now().as_second();
        write.put_json(&key, &Self { subject, issued_until, revoked_by: revoked_by.to_owned() })
    }
}

/// When a certificate for the subject is issued: now, or later if one issued now would be refused.
pub(crate) async fn issue_time(store: &Arc<dyn Store>, subject: &str) -> Result<SystemTime, StoreError> {
    let revocation = store.get_json::<RevocationRecord>(&keys::revocation(subject)).await?;
    let earliest = revocation.map_or(0, |revocation| revocation.issued_until.saturating_add(1).max(0));
    Ok(SystemTime::now().max(SystemTime::UNIX_EPOCH + Duration::from_secs(earliest.cast_unsigned())))
}

/// Reads the revocations.
///
/// # Errors
/// The store cannot be read.
pub(crate) async fn load(store: &Arc<dyn Store>, revocations: &Revocations) -> Result<u64, StoreError> {
    let listing = store.list(keys::REVOCATIONS).await?;
    let mut list = RevocationList::new();
    for entry in &listing.entries {
        let record: RevocationRecord = serde_json::from_slice(&entry.value)
            .map_err(|error| StoreError::Unreadable { key: entry.key.clone(), reason: error.to_string() })?;
        list.insert(record.subject, record.issued_until);
    }
    if *revocations.subscribe().borrow().as_ref() != list {
        info!(subjects = list.len(), "revocations changed");
        revocations.replace(list);
    }
    Ok(listing.revision)
}
