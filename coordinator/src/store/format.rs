//! The version of what is stored, so that an older coordinator does not misread what a newer one wrote.

use std::sync::Arc;

use super::{Store, StoreError, Transaction, snapshot};

/// Version of the records that this coordinator reads and writes.
pub const FORMAT_VERSION: u32 = 1;
pub(super) const KEY: &str = "format-version";
/// The name of the cell that the store is of.
const CELL_KEY: &str = "cell";

/// Checks that this version can read what is stored, and that it is of this cell.
///
/// # Errors
/// It was written by a newer version, it is another cell's, or the store does not answer.
pub async fn check(store: &Arc<dyn Store>, cell: &str) -> Result<(), StoreError> {
    read(store, cell).await.map(drop)
}

/// The same; notes the version and the cell in a store that has none.
///
/// # Errors
/// As [`check`].
pub async fn claim(store: &Arc<dyn Store>, cell: &str) -> Result<(), StoreError> {
    let [version, known_cell] = read(store, cell).await?;
    let mut write = Transaction::new();
    if !version {
        write = write.put(KEY, FORMAT_VERSION.to_string());
    }
    if !known_cell {
        write = write.put(CELL_KEY, cell.to_owned());
    }
    if !write.is_empty() {
        store.commit(write).await?;
    }
    Ok(())
}

/// Whether the version and the cell are noted.
async fn read(store: &Arc<dyn Store>, cell: &str) -> Result<[bool; 2], StoreError> {
    snapshot::check_complete(store).await?;
    let version = store.get(KEY).await?;
    if let Some(entry) = &version {
        parse(&entry.value)?;
    }
    let known = store.get(CELL_KEY).await?;
    match known.as_ref().map(|entry| String::from_utf8_lossy(&entry.value)) {
        Some(known) if known != cell => Err(StoreError::Open(format!(
            "cell: {cell:?}, but the store is of the cell {known:?}; start it with --cell {known}"
        ))),
        _ => Ok([version.is_some(), known.is_some()]),
    }
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
        check(&store, "main").await.unwrap();
        claim(&store, "main").await.unwrap();
        claim(&store, "main").await.unwrap();
        assert_eq!(read(&store, "main").await.unwrap(), [true, true]);
        let other = check(&store, "typo").await.unwrap_err().to_string();
        assert!(other.contains("--cell main"), "{other}");
        store.commit(Transaction::new().put(KEY, "2")).await.unwrap();
        let error = check(&store, "main").await.unwrap_err().to_string();
        assert!(error.contains("format version 2") && error.contains("up to 1"), "{error}");
    }
}
