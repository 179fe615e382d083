//! Values of secrets and config maps: sealed in the store, open only in this process's memory.
//!
//! Sealed with AES-256-GCM under a key that is not in the store, and bound to their place in it, so that
//! one entry cannot be put in another's place. They leave the coordinator only in assignments.

use std::{
    collections::BTreeMap,
    fmt,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom as _, SystemRandom},
};
use serde::{Deserialize, Serialize};

use crate::{
    model::keys,
    spec::{Auxiliary, AuxiliaryKind, EnvSource, EnvVar},
    store::{Store, StoreError, StoreExt as _},
};

/// Bytes of a key.
const KEY_BYTES: usize = 32;

/// Why values cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum ValuesError {
    /// The key file cannot be read or made.
    #[error("secrets-key: {path}: {reason}")]
    KeyFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A stored value was sealed with another key, or changed since.
    #[error("{0} cannot be opened: was it sealed with another secrets-key? all coordinators of a cell need the same")]
    Sealed(String),
    /// Sealing failed.
    #[error("the value cannot be sealed")]
    Sealing,
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A sealed object, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SealedRecord {
    /// Which kind.
    pub kind: AuxiliaryKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Nonce and ciphertext, base64.
    pub sealed: String,
}

impl SealedRecord {
    fn key(&self) -> String {
        keys::value(self.kind, &self.namespace, &self.name)
    }
}

/// Seals values for the store, and opens what is stored.
pub struct Vault {
    key: LessSafeKey,
    values: Arc<Values>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.values)
    }
}

/// All values of the cell, open.
#[derive(Default)]
pub struct Values {
    open: ArcSwap<BTreeMap<String, Arc<Auxiliary>>>,
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} objects, not shown", self.open.load().len())
    }
}

/// Name of the key file, below the data directory or below systemd's credentials directory.
const KEY_FILE: &str = "secrets.key";

impl Vault {
    /// No values yet, with the key in `given`; else with systemd's credential `secrets.key`; else with `secrets.key`
    /// below `data_dir`, which is made if it is missing.
    ///
    /// # Errors
    /// As [`Vault::with_key_file`].
    pub fn open(given: Option<&Path>, data_dir: &Path) -> Result<Self, ValuesError> {
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        match given.map(Path::to_owned).or_else(|| credential(credentials.as_deref())) {
            Some(file) => Self::with_key_file(&file, false),
            None => Self::with_key_file(&data_dir.join(KEY_FILE), true),
        }
    }

    /// No values yet, with the key in `file`; a missing file is made where `make` says so.
    ///
    /// # Errors
    /// The file cannot be read or made, or holds no key.
    pub fn with_key_file(file: &Path, make: bool) -> Result<Self, ValuesError> {
        let failed = |reason: String| ValuesError::KeyFile { path: file.to_owned(), reason };
        if make && !file.exists() {
            write_new_key(file).map_err(|error| failed(error.to_string()))?;
        }
        if make {
            pilotlight_identity::private_file(file).map_err(|error| failed(error.to_string()))?;
        }
        let text = std::fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
        let bytes = STANDARD.decode(text.trim()).ok().filter(|bytes| bytes.len() == KEY_BYTES);
        let bytes = bytes.ok_or_else(|| failed(format!("must hold {KEY_BYTES} random bytes in base64")))?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| failed("is not a key".to_owned()))?;
        Ok(Self { key: LessSafeKey::new(key), values: Arc::default() })
    }

    /// The open values.
    pub fn values(&self) -> &Arc<Values> {
        &self.values
    }

    /// Opens all that is stored.
    ///
    /// # Errors
    /// The store cannot be read, or an entry was sealed with another key.
    pub async fn load(&self, store: &Arc<dyn Store>) -> Result<(), ValuesError> {
        let mut open = BTreeMap::new();
        for record in store.list_json::<SealedRecord>(keys::VALUES).await? {
            open.insert(record.key(), Arc::new(self.unseal(&record)?));
        }
        self.values.open.store(Arc::new(open));
        Ok(())
    }

    /// Seals an object for the store.
    ///
    /// # Errors
    /// There is no randomness to be had.
    pub fn seal(&self, object: &Auxiliary) -> Result<SealedRecord, ValuesError> {
        let mut record = SealedRecord {
            kind: object.kind,
            namespace: object.namespace.clone(),
            name: object.name.clone(),
            sealed: String::new(),
        };
        let bytes = serde_json::to_vec(&object.data).map_err(|_| ValuesError::Sealing)?;
        record.sealed = self.seal_bytes(&record.key(), bytes)?;
        Ok(record)
    }

    /// Seals bytes for the store, bound to the key that they are stored under; nonce and ciphertext in base64.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn seal_bytes(&self, place: &str, mut bytes: Vec<u8>) -> Result<String, ValuesError> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| ValuesError::Sealing)?;
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place), &mut bytes)
            .map_err(|_| ValuesError::Sealing)?;
        Ok(STANDARD.encode([&nonce[..], &bytes].concat()))
    }

    /// Opens what [`Vault::seal_bytes`] returned.
    ///
    /// # Errors
    /// It was sealed with another key or for another place, or was changed since.
    pub fn unseal_bytes(&self, place: &str, sealed: &str) -> Result<Vec<u8>, ValuesError> {
        let failed = || ValuesError::Sealed(place.to_owned());
        let mut bytes = STANDARD.decode(sealed).map_err(|_| failed())?;
        if bytes.len() < NONCE_LEN {
            return Err(failed());
        }
        let mut sealed = bytes.split_off(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(&bytes).map_err(|_| failed())?;
        let opened = self.key.open_in_place(nonce, Aad::from(place), &mut sealed).map_err(|_| failed())?;
        Ok(opened.to_vec())
    }

    fn unseal(&self, record: &SealedRecord) -> Result<Auxiliary, ValuesError> {
        let opened = self.unseal_bytes(&record.key(), &record.sealed)?;
        Ok(Auxiliary {
            kind: record.kind,
            namespace: record.namespace.clone(),
            name: record.name.clone(),
            data: serde_json::from_slice(&opened).map_err(|_| ValuesError::Sealed(record.key()))?,
        })
    }
}

impl Values {
    /// An object, where there is one.
    pub fn get(&self, kind: AuxiliaryKind, namespace: &str, name: &str) -> Option<Arc<Auxiliary>> {
        self.open.load().get(&keys::value(kind, namespace, name)).cloned()
    }

    /// All objects, sorted by kind, namespace and name.
    pub fn all(&self) -> Vec<Arc<Auxiliary>> {
        self.open.load().values().cloned().collect()
    }

    /// Remembers what has been stored.
    pub fn remember(&self, object: Auxiliary) {
        let (key, object) = (keys::value(object.kind, &object.namespace, &object.name), Arc::new(object));
        self.open.rcu(|open| {
            let mut open = BTreeMap::clone(open);
            open.insert(key.clone(), Arc::clone(&object));
            open
        });
    }

    /// Forgets what has been deleted.
    pub fn forget(&self, kind: AuxiliaryKind, namespace: &str, name: &str) {
        let key = keys::value(kind, namespace, name);
        self.open.rcu(|open| {
            let mut open = BTreeMap::clone(open);
            open.remove(&key);
            open
        });
    }

    /// Name and value of each variable of a container in `namespace`, in order.
    ///
    /// # Errors
    /// What is missing, for people; optional variables are left out instead.
    pub fn resolve(&self, namespace: &str, env: &[EnvVar]) -> Result<Vec<(String, String)>, String> {
        let mut resolved = Vec::new();
        for variable in env {
            match &variable.from {
                None => resolved.push((variable.name.clone(), variable.value.clone())),
                Some(from) => match self.look_up(namespace, &variable.name, from) {
                    Ok(found) => resolved.extend(found),
                    Err(_) if from.optional => {}
                    Err(missing) => return Err(missing),
                },
            }
        }
        Ok(resolved)
    }

    fn look_up(&self, namespace: &str, name: &str, from: &EnvSource) -> Result<Vec<(String, String)>, String> {
        let what = format!("{} {namespace}/{}", from.kind, from.name);
        let object = self.get(from.kind, namespace, &from.name).ok_or_else(|| format!("{what} is not there"))?;
        if from.key.is_empty() {
            let names = object.data.0.iter().filter(|(key, _)| is_variable(key));
            return Ok(names.filter_map(|(key, value)| Some((format!("{name}{key}"), text(value)?))).collect());
        }
        let value = object.data.0.get(&from.key).ok_or_else(|| format!("{what} has no key {}", from.key))?;
        let value = text(value).ok_or_else(|| format!("{what}: the value of {} is not text", from.key))?;
        Ok(vec![(name.to_owned(), value)])
    }
}

/// The key file that systemd's `LoadCredential=` or `SetCredential=` provides, if it does.
fn credential(directory: Option<&Path>) -> Option<PathBuf> {
    directory.map(|directory| directory.join(KEY_FILE)).filter(|file| file.exists())
}

fn is_variable(key: &str) -> bool {
    !key.starts_with(|sign: char| sign.is_ascii_digit())
        && key.chars().all(|sign| sign.is_ascii_alphanumeric() || "_.-".contains(sign))
}

fn text(value: &[u8]) -> Option<String> {
    String::from_utf8(value.to_vec()).ok().filter(|text| !text.contains('\0'))
}

fn write_new_key(file: &Path) -> std::io::Result<()> {
    let mut bytes = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| std::io::Error::other("there is no randomness to be had"))?;
    let mut written = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    writeln!(written, "{}", STANDARD.encode(bytes))?;
    written.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Data;

    fn secret(name: &str, value: &str) -> Auxiliary {
        Auxiliary {
            kind: AuxiliaryKind::Secret,
            namespace: "default".into(),
            name: name.into(),
            data: Data(BTreeMap::from([("token".to_owned(), value.as_bytes().to_vec())])),
        }
    }

    fn variable(name: &str, key: &str, optional: bool) -> EnvVar {
        let from = EnvSource { kind: AuxiliaryKind::Secret, name: "s".into(), key: key.into(), optional };
        EnvVar { name: name.into(), value: String::new(), from: Some(from) }
    }

    #[test]
    fn what_is_sealed_opens_only_in_its_place_and_with_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        assert!(Vault::with_key_file(&file, false).is_err(), "a key that is named must be there");
        let values = Vault::with_key_file(&file, true).unwrap();
        let record = values.seal(&secret("s", "hunter2")).unwrap();
        let stored = serde_json::to_string(&record).unwrap();
        assert!(!stored.contains("hunter2") && !stored.contains(&STANDARD.encode("hunter2")), "{stored}");
        let again = Vault::with_key_file(&file, true).unwrap();
        assert_eq!(again.unseal(&record).unwrap(), secret("s", "hunter2"));
        assert!(again.unseal(&SealedRecord { name: "other".into(), ..record.clone() }).is_err(), "moved");
        let other = Vault::with_key_file(&directory.path().join("other"), true).unwrap();
        assert!(other.unseal(&record).is_err(), "another key");
        let short = SealedRecord { sealed: "AA==".into(), ..record };
        assert!(again.unseal(&short).is_err(), "cut short");
    }

    #[test]
    fn the_key_comes_from_a_systemd_credential_if_there_is_one() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(credential(Some(directory.path())), None, "no such credential");
        assert_eq!(credential(None), None, "not started by systemd");
        std::fs::write(directory.path().join("secrets.key"), "").unwrap();
        assert_eq!(credential(Some(directory.path())), Some(directory.path().join("secrets.key")));
    }

    #[test]
    fn variables_are_filled_or_the_lack_is_named() {
        let values = Values::default();
        let missing = values.resolve("default", &[variable("A", "token", false)]).unwrap_err();
        assert_eq!(missing, "Secret default/s is not there");
        assert_eq!(values.resolve("default", &[variable("A", "token", true)]), Ok(vec![]));
        values.remember(secret("s", "v"));
        let plain = EnvVar { name: "B".into(), value: "b".into(), from: None };
        let found = values.resolve("default", &[variable("A", "token", false), plain, variable("P_", "", false)]);
        let expected = [("A", "v"), ("B", "b"), ("P_token", "v")].map(|(name, value)| (name.into(), value.into()));
        assert_eq!(found, Ok(expected.to_vec()));
        assert!(values.resolve("default", &[variable("A", "none", false)]).unwrap_err().contains("no key none"));
        assert!(values.resolve("other", &[variable("A", "token", false)]).is_err(), "another namespace's");
        assert!(!format!("{values:?} {:?}", values.all()).contains("118"), "values are not printed");
    }
}
