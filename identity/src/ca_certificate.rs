//! Certificates of authorities, as members trust them.

use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::{extensions::ParsedExtension, prelude::FromDer as _, prelude::X509Certificate};

use crate::{IdentityError, authority, member::hex};

/// The certificate of an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaCertificate {
    der: CertificateDer<'static>,
    /// SHA-256 of the certificate, hexadecimal.
    pub sha256: String,
    /// Its subject key identifier, hexadecimal, which certificates that it signs name; empty if it has none.
    pub key_id: String,
    /// When it begins to be valid.
    pub not_before: SystemTime,
    /// When it ceases to be valid.
    pub not_after: SystemTime,
}

impl CaCertificate {
    /// Reads all certificates of PEM text.
    ///
    /// # Errors
    /// The text is not PEM, or holds no certificate or one that cannot be read.
    pub fn bundle(pem: &str) -> Result<Vec<Self>, IdentityError> {
        let bad = |reason: String| IdentityError::Pem { what: "authority's certificate", reason };
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let certificates = certificates.map_err(|error| bad(error.to_string()))?;
        if certificates.is_empty() {
            return Err(bad("there is no certificate in it".to_owned()));
        }
        certificates.into_iter().map(|der| Self::from_der(der).map_err(bad)).collect()
    }

    fn from_der(der: CertificateDer<'static>) -> Result<Self, String> {
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
        let key_id = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(hex(id.0)),
            _ => None,
        });
        let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).cast_unsigned());
        let (not_before, not_after) =
            (at(parsed.validity().not_before.timestamp()), at(parsed.validity().not_after.timestamp()));
        let (sha256, key_id) = (hex(&authority::pin(&der)), key_id.unwrap_or_default());
        Ok(Self { der, sha256, key_id, not_before, not_after })
    }

    /// The certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
}
