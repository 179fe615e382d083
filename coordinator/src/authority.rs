//! The certificate authority of the cell in its store, and the certificates that a coordinator issues to itself.

use std::{path::Path, sync::Arc, time::Duration};

use pilotlight_identity::{Authority, Credentials, LiveIdentity, Member, Role};
use tracing::{info, warn};

use crate::{
    config::Config,
    model::keys,
    server::CoordinatorError,
    store::{Entry, Store, StoreError, Transaction},
    values::Vault,
};

/// Certificates of the coordinator and its first operator; renewed at each start.
const COORDINATOR_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Directory below the data directory for the first operator's certificate.
pub(crate) const OPERATOR_DIR: &str = "operator";

/// The operator's own authority, else the cell's, which the first coordinator makes.
pub(crate) async fn open(
    store: &Arc<dyn Store>,
    cell: &str,
    own: Option<(&Path, &Path)>,
    vault: &Vault,
) -> Result<Authority, CoordinatorError> {
    if let Some((certificate, key)) = own {
        return Ok(Authority::load(cell, certificate, key)?);
    }
    if let Some(entry) = store.get(keys::AUTHORITY).await? {
        return stored(store, cell, &entry, vault).await;
    }
    let authority = Authority::generate(cell)?;
    let record = AuthorityRecord::seal(&authority, vault)?;
    let write = Transaction::new().expect_absent(keys::AUTHORITY).put_json(keys::AUTHORITY, &record);
    store.commit(write).await?;
    info!(cell, "made the cell's certificate authority");
    Ok(authority)
}

/// Reads the stored authority. A record of an earlier version, which holds the key in clear, is sealed.
async fn stored(
    store: &Arc<dyn Store>,
    cell: &str,
    entry: &Entry,
    vault: &Vault,
) -> Result<Authority, CoordinatorError> {
    let unreadable = |reason: String| StoreError::Unreadable { key: keys::AUTHORITY.to_owned(), reason };
    let record: AuthorityRecord =
        serde_json::from_slice(&entry.value).map_err(|error| unreadable(error.to_string()))?;
    let key_pem = match (&record.sealed_key, &record.key_pem) {
        (Some(sealed), _) => String::from_utf8(vault.unseal_bytes(keys::AUTHORITY, sealed)?)
            .map_err(|error| unreadable(error.to_string()))?,
        (None, Some(clear)) => clear.clone(),
        (None, None) => return Err(unreadable("it holds no key".to_owned()).into()),
    };
    let authority = Authority::from_pem(cell, &record.certificate_pem, &key_pem)?;
    if record.sealed_key.is_none() {
        let sealed = AuthorityRecord::seal(&authority, vault)?;
        let write =
            Transaction::new().expect_revision(keys::AUTHORITY, entry.mod_revision).put_json(keys::AUTHORITY, &sealed);
        store.commit(write).await?;
        warn!(cell, "sealed the authority's key, which an earlier version stored in clear; old backups still hold it");
    }
    Ok(authority)
}

/// The authority as stored. Its key is sealed with the cell's secrets key.
#[derive(serde::Serialize, serde::Deserialize)]
struct AuthorityRecord {
    certificate_pem: String,
    /// In clear; only in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_pem: Option<String>,
    /// As [`Vault::seal_bytes`] returns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed_key: Option<String>,
}

impl AuthorityRecord {
    fn seal(authority: &Authority, vault: &Vault) -> Result<Self, CoordinatorError> {
        let sealed = vault.seal_bytes(keys::AUTHORITY, authority.key_pem().into_bytes())?;
        let certificate_pem = authority.certificate_pem().to_owned();
        Ok(Self { certificate_pem, key_pem: None, sealed_key: Some(sealed) })
    }
}

/// The coordinator's own certificate, and one for its first operator, written where the CLI finds it.
pub(crate) fn own_identity(
    config: &Config,
    authority: &Authority,
    names: &[String],
) -> Result<Arc<LiveIdentity>, CoordinatorError> {
    let operator = Member::operator("admin", Role::Admin, None)?;
    let issued = authority.issue(&operator, &[], COORDINATOR_LIFETIME)?;
    let directory = config.data_dir.join(OPERATOR_DIR);
    issued.save(&directory)?;
    info!(directory = %directory.display(), "operator's certificate written; use it by --credentials");
    let own: Credentials = authority.issue(&Member::Coordinator, names, COORDINATOR_LIFETIME)?;
    Ok(LiveIdentity::new(&own)?)
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
        assert_eq!((again.pin(), again.key_pem()), (made.pin(), made.key_pem()));
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
        };
        store.commit(Transaction::new().put_json(keys::AUTHORITY, &record)).await.unwrap();
        let vault = Vault::open(None, directory.path()).unwrap();
        for _ in 0..2 {
            assert_eq!(open(&store, "main", None, &vault).await.unwrap().key_pem(), old.key_pem());
            assert!(!text(&store).await.contains("PRIVATE KEY"));
        }
    }
}
