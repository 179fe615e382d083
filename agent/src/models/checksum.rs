//! What a source says of a file's content beside its size, and whether what came is that.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::HeaderMap;
use md5::{Digest as _, Md5};

use super::{
    content::{self, Named},
    plan::{Object, hex},
};

const SHA256_BYTES: usize = 32;
const MD5_BYTES: usize = 16;

/// Checksums of one file, lower-case hex, where they are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checksums {
    /// SHA-256 of the whole content.
    pub sha256: Option<String>,
    /// MD5 of the whole content.
    pub md5: Option<String>,
    /// BLAKE3 of the whole content; no store gives it, other nodes do.
    pub blake3: Option<String>,
}

/// A difference between what was listed and what came.
#[derive(Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Name of the checksum.
    pub kind: &'static str,
    /// As listed.
    pub expected: String,
    /// As computed.
    pub found: String,
}

impl Checksums {
    /// What an S3 store's answer to a HEAD says. A checksum of checksums, as uploads in parts have it, says
    /// nothing of the content as a whole; nor does the ETag of an object that is encrypted with a key of
    /// KMS or of the client.
    pub fn of_s3(headers: &HeaderMap) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let kms = text("x-amz-server-side-encryption").is_some_and(|kind| kind.starts_with("aws:kms"));
        let client_key = headers.contains_key("x-amz-server-side-encryption-customer-algorithm");
        let etag = text("etag").map(|etag| etag.trim_matches('"').to_ascii_lowercase());
        let is_md5 = |etag: &String| etag.len() == 2 * MD5_BYTES && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self {
            sha256: text("x-amz-checksum-sha256").and_then(|value| of_base64(value, SHA256_BYTES)),
            md5: etag.filter(is_md5).filter(|_| !kms && !client_key),
            blake3: None,
        }
    }

    /// What a web server's answer to a HEAD says: `Content-MD5` (RFC 1864).
    pub fn of_web(headers: &HeaderMap) -> Self {
        let md5 = headers.get("content-md5").and_then(|value| value.to_str().ok());
        Self { md5: md5.and_then(|value| of_base64(value, MD5_BYTES)), ..Self::default() }
    }

    /// What a source's listing says of a file.
    pub fn listed(object: &Object) -> Self {
        Self { sha256: object.sha256.clone(), md5: object.md5.clone(), blake3: None }
    }

    /// What another node says of a content by its name.
    pub(super) fn of_name(name: Option<&str>) -> Self {
        match name.and_then(content::parse) {
            Some((Named::Sha256, hex)) => Self { sha256: Some(hex.to_owned()), ..Self::default() },
            Some((Named::Blake3, hex)) => Self { blake3: Some(hex.to_owned()), ..Self::default() },
            None => Self::default(),
        }
    }

    /// The content's name; `None` where neither hash of which names are made was computed.
    pub(super) fn name(&self) -> Option<String> {
        self.sha256.clone().or_else(|| Some(content::by_blake3(self.blake3.as_deref()?)))
    }

    /// The first that what came does not have. `found` must have each that is expected.
    pub fn differ(&self, found: &Self) -> Option<Mismatch> {
        let pairs = [
            ("SHA-256", &self.sha256, &found.sha256),
            ("MD5", &self.md5, &found.md5),
            ("BLAKE3", &self.blake3, &found.blake3),
        ];
        pairs.into_iter().find_map(|(kind, expected, found)| {
            let (expected, found) = (expected.clone()?, found.clone().unwrap_or_default());
            (expected != found).then_some(Mismatch { kind, expected, found })
        })
    }
}

/// Lower-case hex of a base64 text that is this many bytes.
fn of_base64(text: &str, bytes: usize) -> Option<String> {
    BASE64_STANDARD.decode(text.trim()).ok().filter(|decoded| decoded.len() == bytes).map(|decoded| hex(&decoded))
}

/// Reads a file once: its SHA-256, and its MD5 where asked for.
///
/// # Errors
/// The disk refuses.
pub fn of_file(path: &Path, with_md5: bool) -> io::Result<Checksums> {
    let mut file = File::open(path)?;
    let mut sha256 = ring::digest::Context::new(&ring::digest::SHA256);
    let mut md5 = with_md5.then(Md5::new);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            let sha256 = Some(hex(sha256.finish().as_ref()));
            return Ok(Checksums { sha256, md5: md5.map(|md5| hex(&md5.finalize())), blake3: None });
        }
        sha256.update(&buffer[..read]);
        if let Some(md5) = &mut md5 {
            md5.update(&buffer[..read]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    /// Of no bytes at all.
    const MD5_HEX: &str = "d41d8cd98f00b204e9800998ecf8427e";
    const MD5_BASE64: &str = "1B2M2Y8AsgTpgAmY7PhCfg==";
    const SHA256_BASE64: &str = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

    #[test]
    fn only_what_covers_the_whole_content_counts() {
        let etag = format!("\"{MD5_HEX}\"");
        let of = |pairs: &[(&'static str, &str)]| Checksums::of_s3(&headers(pairs));
        let whole = of(&[("etag", &etag), ("x-amz-checksum-sha256", SHA256_BASE64)]);
        assert_eq!(whole.md5.as_deref(), Some(MD5_HEX));
        assert!(whole.sha256.unwrap().starts_with("e3b0c442"));
        let parts =
            of(&[("etag", &format!("\"{MD5_HEX}-3\"")), ("x-amz-checksum-sha256", &format!("{SHA256_BASE64}-3"))]);
        assert_eq!(parts, Checksums::default());
        let kms = of(&[("etag", &etag), ("x-amz-server-side-encryption", "aws:kms")]);
        assert_eq!(kms, Checksums::default());
        assert_eq!(of(&[("etag", &etag), ("x-amz-server-side-encryption", "AES256")]).md5.as_deref(), Some(MD5_HEX));
        assert_eq!(Checksums::of_web(&headers(&[("content-md5", MD5_BASE64)])).md5.as_deref(), Some(MD5_HEX));
        assert_eq!(Checksums::of_web(&headers(&[("content-md5", "AAAA")])), Checksums::default());
    }

    #[test]
    fn a_difference_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let found = of_file(file.path(), true).unwrap();
        assert_eq!(found.md5.as_deref(), Some(MD5_HEX));
        assert_eq!(Checksums::default().differ(&found), None);
        assert_eq!(found.differ(&found), None);
        let other = Checksums { md5: Some("00".to_owned()), ..Checksums::default() };
        assert_eq!(other.differ(&found).unwrap().kind, "MD5");
    }
}
