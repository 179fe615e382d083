//! The certificate authorities of the cell in its store.
//!
//! One authority signs. During a rotation members trust a second one in addition to it: first the next, which does not
//! sign yet, then the previous one, which does not sign any longer. See `docs/security.md`.

mod own;
mod rotation;

use std::{path::Path, sync::Arc};

pub(crate) use own::{OPERATOR_DIR, OwnIdentity};
use pilotlight_identity::{Authority, CaCertificate};
pub(crate) use rotation::RotationError;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    model::keys,
    server::CoordinatorError,
    store::{Entry, Store, StoreError, Transaction},
    values::Vault,
};

/// The authorities that members of the cell trust.
#[derive(Debug, Clone)]
pub(crate) struct Authorities {
    /// Signs all new certificates.
    pub(crate) signer: Arc<Authority>,
    /// Trusted, and does not sign yet.
    pub(crate) next: Option<Arc<Authority>>,
    /// Certificate, PEM. Trusted, and does not sign any longer.
    pub(crate) previous: Option<String>,
    /// Revision of the record in the store; `None` if the authority comes from files.
    revision: Option<u64>,
}

impl Authorities {
    /// Certificates of all authorities, PEM; the one that signs comes first.
    pub(crate) fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|next| next.certificate_pem());
        let all = [Some(self.signer.certificate_pem()), next, self.previous.as_deref()];
        // PEM files of others may lack the last line's end.
        all.into_iter().flatten().map(|pem| format!("{}\n", pem.trim_end())).collect()
    }

    /// The same, read; in the same order.
    pub(crate) fn trusted(&self) -> Vec<CaCertificate> {
        // They were read before: the bundle consists of certificates that are in use.
        CaCertificate::bundle(&self.bundle()).unwrap_or_default()
    }

    /// Returns `true` if the authority comes from files, and not from the store.
    pub(crate) fn is_external(&self) -> bool {
        self.revision.is_none()
    }
}

/// The authorities as they are at the moment. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LiveAuthorities(watch::Sender<Arc<Authorities>>);

impl LiveAuthorities {
    pub(crate) fn new(authorities: Authorities) -> Self {
        Self(watch::Sender::new(Arc::new(authorities)))
    }

    pub(crate) fn current(&self) -> Arc<Authorities> {
        Arc::clone(&self.0.borrow())
    }

    /// The authorities, now and after each change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Authorities>> {
        self.0.subscribe()
    }

    fn set(&self, authorities: Authorities) {
        self.0.send_if_modified(|current| {
            let changes = current.revision != authorities.revision;
            if changes {
                info!(signer = %authorities.trusted()[0].sha256, trusted = authorities.trusted().len(), "authorities changed");
                *current = Arc::new(authorities);
            }
            changes
        });
    }

    /// Reads the authorities again. Returns the store's revision.
    pub(crate) async fn reload(
        &self,
        store: &Arc<dyn Store>,
        cell: &str,
        vault: &Vault,
    ) -> Result<u64, CoordinatorError> {
        let listing = store.list(keys::AUTHORITY).await?;
        if let Some(entry) = listing.entries.iter().find(|entry| entry.key == keys::AUTHORITY) {
            self.set(stored(store, cell, entry, vault).await?);
        }
        Ok(listing.revision)
    }
}

/// The operator's own authority, else the cell's, which the first coordinator makes.
pub(crate) async fn open(
    store: &Arc<dyn Store>,
    cell: &str,
    own: Option<(&Path, &Path)>,
    vault: &Vault,
) -> Result<Authorities, CoordinatorError> {
    if let Some((certificate, key)) = own {
        let signer = Arc::new(Authority::load(cell, certificate, key)?);
        return Ok(Authorities { signer, next: None, previous: None, revision: None });
    }
    if let Some(entry) = store.get(keys::AUTHORITY).await? {
        return stored(store, cell, &entry, vault).await;
    }
    let signer = Arc::new(Authority::generate(cell)?);
    let made = Authorities { signer, next: None, previous: None, revision: None };
    let record = AuthorityRecord::seal(&made, vault)?;
    let write = Transaction::new().expect_absent(keys::AUTHORITY).put_json(keys::AUTHORITY, &record);
    let revision = Some(store.commit(write).await?);
    info!(cell, "made the cell's certificate authority");
    Ok(Authorities { revision, ..made })
}

/// Reads the stored authorities. A record of an earlier version, which holds the key in clear, is sealed.
async fn stored(
    store: &Arc<dyn Store>,
    cell: &str,
    entry: &Entry,
    vault: &Vault,
) -> Result<Authorities, CoordinatorError> {
    let record: AuthorityRecord = serde_json::from_slice(&entry.value).map_err(|error| unreadable(&error))?;
    let authorities = record.open(cell, entry.mod_revision, vault)?;
    if record.sealed_key.is_some() {
        return Ok(authorities);
    }
    let sealed = AuthorityRecord::seal(&authorities, vault)?;
    let write =
        Transaction::new().expect_revision(keys::AUTHORITY, entry.mod_revision).put_json(keys::AUTHORITY, &sealed);
    let revision = Some(store.commit(write).await?);
    warn!(cell, "sealed the authority's key, which an earlier version stored in clear; old backups still hold it");
    Ok(Authorities { revision, ..authorities })
}

fn unreadable(reason: &impl std::fmt::Display) -> StoreError {
    StoreError::Unreadable { key: keys::AUTHORITY.to_owned(), reason: reason.to_string() }
}

/// The authorities as stored. Keys are sealed with the cell's secrets key.
#[derive(serde::Serialize, serde::Deserialize)]
struct AuthorityRecord {
    /// Of the one that signs.
    certificate_pem: String,
    /// In clear; only in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_pem: Option<String>,
    /// As [`Vault::seal_bytes`] returns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<SealedAuthority>,
    /// Certificate of the previous authority. Its key is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous_pem: Option<String>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct SealedAuthority {
    certificate_pem: String,
    sealed_key: String,
}

impl SealedAuthority {
    fn seal(authority: &Authority, vault: &Vault) -> Result<Self, CoordinatorError> {
        let sealed_key = vault.seal_bytes(keys::AUTHORITY, authority.key_pem().into_bytes())?;
        Ok(Self { certificate_pem: authority.certificate_pem().to_owned(), sealed_key })
    }
}

impl AuthorityRecord {
    fn seal(authorities: &Authorities, vault: &Vault) -> Result<Self, CoordinatorError> {
        let SealedAuthority { certificate_pem, sealed_key } = SealedAuthority::seal(&authorities.signer, vault)?;
        let next = authorities.next.as_ref().map(|next| SealedAuthority::seal(next, vault)).transpose()?;
        let previous_pem = authorities.previous.clone();
        Ok(Self { certificate_pem, key_pem: None, sealed_key: Some(sealed_key), next, previous_pem })
    }

    fn open(&self, cell: &str, revision: u64, vault: &Vault) -> Result<Authorities, CoordinatorError> {
        let unseal = |sealed: &str| -> Result<String, CoordinatorError> {
            let key = vault.unseal_bytes(keys::AUTHORITY, sealed)?;
            String::from_utf8(key).map_err(|error| unreadable(&error).into())
        };
        let key_pem = match (&self.sealed_key, &self.key_pem) {
            (Some(sealed), _) => unseal(sealed)?,
            (None, Some(clear)) => clear.clone(),
            (None, None) => return Err(unreadable(&"it holds no key").into()),
        };
        let next = self.next.as_ref().map(|next| -> Result<_, CoordinatorError> {
            Ok(Arc::new(Authority::from_pem(cell, &next.certificate_pem, &unseal(&next.sealed_key)?)?))
        });
        Ok(Authorities {
            signer: Arc::new(Authority::from_pem(cell, &self.certificate_pem, &key_pem)?),
            next: next.transpose()?,
            previous: self.previous_pem.clone(),
            revision: Some(revision),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::embedded::EmbeddedStore;

    async fn text(store: &Arc<dyn Store>) -> String {
        String::from_utf8(store.get(keys::AUTHORITY).await.unwrap().unwrap().value.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn the_authoritys_key_is_sealed_in_the_store_and_only_its_secrets_key_opens_it() {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&directory.path().join("state.redb")).unwrap());
        let vault = Vault::open(None, directory.path()).unwrap();
        let made = open(&store, "main", None, &vault).await.unwrap();
        assert!(!text(&store).await.contains("PRIVATE KEY"));
        let again = open(&store, "main", None, &vault).await.unwrap();
        assert_eq!((again.signer.pin(), again.signer.key_pem()), (made.signer.pin(), made.signer.key_pem()));
        let other = Vault::with_key_file(&directory.path().join("other"), true).unwrap();
        let refused = open(&store, "main", None, &other).await.unwrap_err();
        assert!(refused.to_string().contains("secrets-key"), "{refused}");
    }

    #[tokio::test]
    async fn a_key_that_an_earlier_version_stored_in_clear_is_sealed_at_the_first_start() {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&directory.path().join("state.redb")).unwrap());
        let old = Authority::generate("main").unwrap();
        let record = AuthorityRecord {
            certificate_pem: old.certificate_pem().to_owned(),
            key_pem: Some(old.key_pem()),
            sealed_key: None,
            next: None,
            previous_pem: None,
        };
        store.commit(Transaction::new().put_json(keys::AUTHORITY, &record)).await.unwrap();
        let vault = Vault::open(None, directory.path()).unwrap();
        for _ in 0..2 {
            assert_eq!(open(&store, "main", None, &vault).await.unwrap().signer.key_pem(), old.key_pem());
            assert!(!text(&store).await.contains("PRIVATE KEY"));
        }
    }
}
