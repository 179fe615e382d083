//! A certificate, its key, and whom its holder trusts; in memory and in a directory.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use x509_parser::{prelude::FromDer as _, prelude::X509Certificate};

use crate::{CaCertificate, IdentityError, live::certified, member::issuer_key_id};

/// How often credentials are read again that another process is replacing, and the pause before. Three files are written
/// and synced in less.
const REPLACED_READS: usize = 25;
const REPLACED_PAUSE: Duration = Duration::from_millis(20);

/// File names in a credentials directory.
const FILES: [&str; 3] = ["cert.pem", "key.pem", "ca.pem"];

/// A certificate, its key, and the authority that its holder trusts; all PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The holder's certificate.
    pub certificate_pem: String,
    /// The holder's key. Secret.
    pub key_pem: String,
    /// Certificates of the authorities that the holder trusts, one or more.
    pub ca_pem: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("certificate_pem", &self.certificate_pem).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads `cert.pem`, `key.pem` and `ca.pem`. If another process is replacing them, it waits until the certificate and
    /// the key belong together.
    ///
    /// # Errors
    /// A file cannot be read or holds no usable PEM, or certificate and key do not belong together.
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        for _ in 0..REPLACED_READS {
            match Self::load_once(directory) {
                Err(IdentityError::Tls(rustls::Error::InconsistentKeys(_))) => std::thread::sleep(REPLACED_PAUSE),
                loaded => return loaded,
            }
        }
        Self::load_once(directory)
    }

    fn load_once(directory: &Path) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).map_err(|error| IdentityError::File { path, error })
        };
        let [certificate_pem, key_pem, ca_pem] = [read(FILES[0])?, read(FILES[1])?, read(FILES[2])?];
        let credentials = Self { certificate_pem, key_pem, ca_pem };
        certified(&credentials)?;
        Ok(credentials)
    }

    /// True where the directory holds credentials.
    pub fn exist(directory: &Path) -> bool {
        FILES.iter().all(|name| directory.join(name).exists())
    }

    /// Writes the three files, each whole or not at all; the key is readable by its owner alone.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| IdentityError::File { path, error }
        };
        crate::private_dir(directory)?;
        // The certificate goes last: whoever finds one finds the key that belongs to it.
        let files = [
            (FILES[2], &self.ca_pem, 0o600),
            (FILES[1], &self.key_pem, 0o600),
            (FILES[0], &self.certificate_pem, 0o600),
        ];
        for (name, text, mode) in files {
            let path = directory.join(name);
            let write = || {
                let mut file = tempfile::NamedTempFile::new_in(directory)?;
                file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
                file.write_all(text.as_bytes())?;
                file.as_file().sync_all()?;
                file.persist(&path).map_err(|error| error.error)
            };
            write().map_err(failed(&path))?;
        }
        Ok(())
    }

    /// The certificate and its authority's. If the certificate does not name its authority, all that are trusted.
    pub(crate) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        let mut chain = certificates("certificate", &self.certificate_pem)?;
        let authorities = CaCertificate::bundle(&self.ca_pem)?;
        let issuer = issuer_key_id(&chain[0]).unwrap_or_default();
        let is_issuer = |authority: &&CaCertificate| !issuer.is_empty() && authority.key_id == issuer;
        match authorities.iter().find(is_issuer) {
            Some(authority) => chain.push(authority.der().clone()),
            None => chain.extend(authorities.into_iter().map(|authority| authority.der().clone())),
        }
        Ok(chain)
    }

    /// Returns `true` if the certificate names this authority as its issuer.
    pub fn is_issued_by(&self, authority: &CaCertificate) -> bool {
        let chain = certificates("certificate", &self.certificate_pem).unwrap_or_default();
        let issuer = chain.first().and_then(issuer_key_id);
        issuer.is_some_and(|issuer| issuer == authority.key_id)
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, IdentityError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|error| IdentityError::Pem { what: "key", reason: error.to_string() })
    }

    /// When the certificate begins and ceases to be valid.
    ///
    /// # Errors
    /// The certificate cannot be read.
    pub fn validity(&self) -> Result<(SystemTime, SystemTime), IdentityError> {
        let chain = self.chain()?;
        let (_, certificate) = X509Certificate::from_der(&chain[0])
            .map_err(|error| IdentityError::Pem { what: "certificate", reason: error.to_string() })?;
        let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0) as u64);
        let validity = certificate.validity();
        Ok((at(validity.not_before.timestamp()), at(validity.not_after.timestamp())))
    }

    /// When two thirds of the certificate's life are over.
    ///
    /// # Errors
    /// The certificate cannot be read.
    pub fn renew_at(&self) -> Result<SystemTime, IdentityError> {
        let (from, until) = self.validity()?;
        let life = until.duration_since(from).unwrap_or_default();
        Ok(from + life * 2 / 3)
    }
}

fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let certificates = certificates.map_err(|error| IdentityError::Pem { what, reason: error.to_string() })?;
    if certificates.is_empty() {
        return Err(IdentityError::Pem { what, reason: "there is no certificate in it".into() });
    }
    Ok(certificates)
}
