//! The version of what is stored, so that an older coordinator does not misread what a newer one wrote.

use std::sync::Arc;

use super::{Store, StoreError, Transaction, snapshot};

/// Version of the records that this coordinator reads and writes.
pub const FORMAT_VERSION: u32 = 1;
pub(super) const KEY: &str = "format-version";

/// Checks that this version can read what is stored.
///
/// # Errors
/// It was written by a newer version, or the store does not answer.
pub async fn check(store: &Arc<dyn Store>) -> Result<(), StoreError> {
    read(store).await.map(drop)
}

/// The same; notes the version in a store that has none.
///
/// # Errors
/// As [`check`].
pub async fn claim(store: &Arc<dyn Store>) -> Result<(), StoreError> {
    if read(store).await?.is_none() {
        store.commit(Transaction::new().put(KEY, FORMAT_VERSION.to_string())).await?;
    }
    Ok(())
}

async fn read(store: &Arc<dyn Store>) -> Result<Option<u32>, StoreError> {
    snapshot::check_complete(store).await?;
    let Some(entry) = store.get(KEY).await? else { return Ok(None) };
    parse(&entry.value).map(Some)
}

/// The version that a stored value names.
///
/// # Errors
/// It is newer than this program's, or no number.
pub(super) fn parse(value: &[u8]) -> Result<u32, StoreError> {
    let text = String::from_utf8_lossy(value);
    match text.trim().parse::<u32>() {
        Ok(version) if version <= FORMAT_VERSION => Ok(version),
        _ => Err(StoreError::Open(format!(
            "the store has format version {text}, and this program ({}) reads up to {FORMAT_VERSION}: run the version \
             that wrote it, or a newer one",
            env!("CARGO_PKG_VERSION")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::embedded::EmbeddedStore;

    #[tokio::test]
    async fn a_store_of_a_newer_version_is_refused_and_an_old_one_is_claimed() {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&directory.path().join("state.redb")).unwrap());
        check(&store).await.unwrap();
        claim(&store).await.unwrap();
        claim(&store).await.unwrap();
        assert_eq!(read(&store).await.unwrap(), Some(FORMAT_VERSION));
        store.commit(Transaction::new().put(KEY, "2")).await.unwrap();
        let error = check(&store).await.unwrap_err().to_string();
        assert!(error.contains("format version 2") && error.contains("up to 1"), "{error}");
    }
}
