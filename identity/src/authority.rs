//! The cell's certificate authority.

use std::{fs, net::IpAddr, path::Path, time::Duration, time::SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SigningKey,
};
use ring::digest;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use time::OffsetDateTime;
use x509_parser::{prelude::FromDer as _, prelude::X509Certificate};

use crate::{CaCertificate, Credentials, IdentityError, Member, check_label};

/// Life of a node's certificate. Agents renew after two thirds of it.
pub const NODE_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Life of an authority.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates are valid from a little before now, for clocks that lag.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Signs the certificates of one cell.
#[derive(Debug)]
pub struct Authority {
    cell: String,
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority with a P-256 key.
    ///
    /// # Errors
    /// The cell's name is not a DNS label, or there is no randomness.
    pub fn generate(cell: &str) -> Result<Self, IdentityError> {
        check_label(cell)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, format!("Pilotlight cell {cell}"));
        validity(&mut params, AUTHORITY_LIFETIME, SystemTime::now());
        let certificate = params.self_signed(&key)?;
        Self::from_pem(cell, &certificate.pem(), &key.serialize_pem())
    }

    /// Reads an authority from PEM text.
    ///
    /// # Errors
    /// The text is not PEM, the certificate is no authority's, or the key is another's.
    pub fn from_pem(cell: &str, certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        check_label(cell)?;
        let bad = |what, reason: String| IdentityError::Pem { what, reason };
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| bad("authority's certificate", error.to_string()))?;
        let key = KeyPair::from_pem(key_pem).map_err(|error| bad("authority's key", error.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&certificate)
            .map_err(|error| bad("authority's certificate", error.to_string()))?;
        if !parsed.is_ca() {
            return Err(bad("authority's certificate", "it is not a CA certificate".into()));
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(bad("authority's key", "it does not belong to the certificate".into()));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { cell: cell.to_owned(), certificate_pem: certificate_pem.to_owned(), certificate, issuer })
    }

    /// Reads an authority from two PEM files.
    ///
    /// # Errors
    /// As [`Authority::from_pem`], or a file cannot be read.
    pub fn load(cell: &str, certificate: &Path, key: &Path) -> Result<Self, IdentityError> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|error| IdentityError::File { path: path.to_owned(), error })
        };
        Self::from_pem(cell, &read(certificate)?, &read(key)?)
    }

    /// The authority's certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The authority's key. Keep it secret.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// The authority's certificate, read.
    ///
    /// # Errors
    /// The certificate cannot be read.
    pub fn certificate(&self) -> Result<CaCertificate, IdentityError> {
        let mut bundle = CaCertificate::bundle(&self.certificate_pem)?;
        Ok(bundle.swap_remove(0))
    }

    /// SHA-256 of the certificate, by which join tokens pin it.
    pub fn pin(&self) -> [u8; 32] {
        pin(&self.certificate)
    }

    /// Checks that a request can be signed.
    ///
    /// # Errors
    /// It is not PEM, or its signature is not its key's.
    pub fn check_csr(&self, csr_pem: &str) -> Result<(), IdentityError> {
        CertificateSigningRequestParams::from_pem(csr_pem).map(drop).map_err(|e| IdentityError::Csr(e.to_string()))
    }

    /// Signs a request for `member`. The names in the request do not count.
    ///
    /// # Errors
    /// The request cannot be used.
    pub fn sign(
        &self,
        csr_pem: &str,
        member: &Member,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, IdentityError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(|error| IdentityError::Csr(error.to_string()))?;
        request.params = self.params(member, &[], lifetime, now)?;
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    /// Makes a key and certificate for `member`, which is also known by `names` (host names, addresses).
    ///
    /// # Errors
    /// A name cannot be put into a certificate.
    pub fn issue(&self, member: &Member, names: &[String], lifetime: Duration) -> Result<Credentials, IdentityError> {
        self.issue_at(member, names, lifetime, SystemTime::now())
    }

    /// As [`Authority::issue`], at another time.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn issue_at(
        &self,
        member: &Member,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Credentials, IdentityError> {
        let key = KeyPair::generate()?;
        let certificate = self.params(member, names, lifetime, now)?.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            ca_pem: self.certificate_pem.clone(),
        })
    }

    fn params(
        &self,
        member: &Member,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<CertificateParams, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, member.dns_name());
        params.subject_alt_names =
            vec![SanType::URI(member.uri(&self.cell).try_into()?), SanType::DnsName(member.dns_name().try_into()?)];
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.clone().try_into()?),
            });
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match member {
            Member::Coordinator => vec![ExtendedKeyUsagePurpose::ServerAuth],
            // Agents serve each other.
            Member::Node(_) => vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
            Member::Operator { .. } => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, lifetime, now);
        Ok(params)
    }
}

/// A new key and the request to certify it, both PEM.
///
/// # Errors
/// There is no randomness.
pub fn new_csr() -> Result<(String, String), IdentityError> {
    let key = KeyPair::generate()?;
    let request = CertificateParams::default().serialize_request(&key)?;
    Ok((key.serialize_pem(), request.pem()?))
}

/// SHA-256 of a certificate.
pub(crate) fn pin(certificate: &CertificateDer<'_>) -> [u8; 32] {
    let mut pin = [0; 32];
    pin.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
    pin
}

fn validity(params: &mut CertificateParams, lifetime: Duration, now: SystemTime) {
    params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
    params.not_after = OffsetDateTime::from(now + lifetime);
}

const _: fn() = || {
    // The issuer's key must be usable from any thread that answers a join.
    fn sendable<T: Send + Sync>() {}
    sendable::<Authority>();
    fn signs<T: SigningKey>() {}
    signs::<KeyPair>();
};
