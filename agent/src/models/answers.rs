//! What stores said last of models, so that a start need not wait until they have said it again.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Credentials, ModelError, Models, fetch, source};

/// A version of a model that is on this node, and who asked for it.
#[derive(Clone)]
pub struct Version {
    models: Models,
    uri: String,
    credentials: Credentials,
    key: String,
}

/// Keys of the versions that were had last, by address and credentials: what one service may read, another may
/// not. They are in memory only, so that each process asks the store before its first start.
#[derive(Clone, Default)]
pub(super) struct Answers(Arc<Mutex<HashMap<(String, Credentials), String>>>);

impl Answers {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, Credentials), String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an answer; `here` says of a key whether its folder is still on the disk.
    pub(super) fn note(&self, uri: &str, credentials: &Credentials, key: &str, here: impl Fn(&str) -> bool) {
        let mut answers = self.lock();
        let former = answers.insert((uri.to_owned(), credentials.clone()), key.to_owned());
        if former.as_deref() != Some(key) {
            answers.retain(|_, key| here(key));
        }
    }
}

impl Models {
    /// The version that this address and these credentials gave the last time, and its folder, where that is
    /// still whole. Whether the store has it still, and gives it still, [`Version::is_current`] asks.
    pub fn before(&self, uri: &str, credentials: &Credentials) -> Option<(Version, PathBuf)> {
        let key = self.answers.lock().get(&(uri.to_owned(), credentials.clone())).cloned()?;
        self.cache.record(&key)?;
        let folder = self.cache.files(&key);
        Some((Version { models: self.clone(), uri: uri.to_owned(), credentials: credentials.clone(), key }, folder))
    }
}

impl Version {
    /// The model's address.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// True where the store lists this version now. Otherwise, and where it cannot be asked, the next start
    /// waits until it has answered.
    ///
    /// # Errors
    /// The store cannot be read with these credentials.
    pub async fn is_current(&self) -> Result<bool, ModelError> {
        let Self { models, uri, credentials, key } = self;
        let listed = async {
            let source = source::open(uri, credentials, &models.clients)?;
            fetch::list(&*source, uri, models.stall).await
        };
        let current = listed.await.map(|(listed, _)| listed == *key);
        if !matches!(current, Ok(true)) {
            models.answers.lock().remove(&(uri.clone(), credentials.clone()));
        }
        current
    }
}
