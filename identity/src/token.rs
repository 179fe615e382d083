//! Join tokens: short-lived, used once, and bound to one authority.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{digest, rand::SecureRandom as _, rand::SystemRandom};
use serde::{Deserialize, Serialize};

use crate::{Authority, IdentityError};

const PREFIX: &str = "plt1";

/// A token as handed to an agent: `plt1.<id>.<secret>.<pin>`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    id: String,
    secret: [u8; 24],
    pin: [u8; 32],
}

/// What is kept of a token; the secret itself is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Public part of the token.
    pub id: String,
    /// SHA-256 of the secret, base64. The secret is random, so that no salt is needed.
    pub secret_sha256: String,
    /// Seconds since the Unix epoch after which the token is void.
    pub expires_at: i64,
    /// Names of nodes that may join by it: a name, or a pattern with `*` and `?`; `None` is any name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Whether a node may join under a name that is known already.
    #[serde(default)]
    pub replace: bool,
    /// Name of the user who created it.
    #[serde(default)]
    pub created_by: String,
    /// When it was created, seconds since the Unix epoch.
    #[serde(default)]
    pub created_at: i64,
}

/// A new bearer token: 32 random bytes in URL-safe base64.
///
/// # Errors
/// The system has no randomness.
pub fn random_token() -> Result<String, IdentityError> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| IdentityError::Randomness)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

impl JoinToken {
    /// Makes a token for an authority's cell, and what to keep of it.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn generate(authority: &Authority, expires_at: i64) -> Result<(Self, TokenRecord), IdentityError> {
        let random = SystemRandom::new();
        let (mut id, mut secret) = ([0; 8], [0; 24]);
        let filled = random.fill(&mut id).and_then(|()| random.fill(&mut secret));
        filled.map_err(|_| IdentityError::Token("the system has no randomness"))?;
        let token = Self { id: format!("{:016x}", u64::from_be_bytes(id)), secret, pin: authority.pin() };
        let record = TokenRecord {
            id: token.id.clone(),
            secret_sha256: token.secret_sha256(),
            expires_at,
            node: None,
            replace: false,
            created_by: String::new(),
            created_at: 0,
        };
        Ok((token, record))
    }

    /// Public part, by which the record is found.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// SHA-256 of the authority's certificate.
    pub fn pin(&self) -> [u8; 32] {
        self.pin
    }

    fn secret_sha256(&self) -> String {
        URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, &self.secret))
    }
}

impl TokenRecord {
    /// True where this is the token and it is still valid at `now` (seconds since the Unix epoch).
    pub fn admits(&self, token: &JoinToken, now: i64) -> bool {
        // Hashes are compared, so that how long it takes says nothing about the secret.
        now < self.expires_at && self.id == token.id && self.secret_sha256 == token.secret_sha256()
    }

    /// Returns `true` if a node of this name may join by the token.
    pub fn covers(&self, node: &str) -> bool {
        self.node.as_ref().is_none_or(|pattern| matches(pattern.as_bytes(), node.as_bytes()))
    }
}

/// Checks that a pattern can match names of nodes.
///
/// # Errors
/// It is empty or too long, or holds a character that no name has.
pub fn check_pattern(pattern: &str) -> Result<(), IdentityError> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-*?".contains(&byte);
    let good = (1..=63).contains(&pattern.len()) && pattern.bytes().all(allowed);
    if good { Ok(()) } else { Err(IdentityError::Pattern(pattern.to_owned())) }
}

/// `*` matches any characters, `?` one. Linear in memory, at most |pattern| × |name| steps.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut matched, mut star) = (0, 0, None);
    while matched < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, matched));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[matched] => (at, matched) = (at + 1, matched + 1),
            // Let the last star match one character more.
            _ => match &mut star {
                Some((star_at, star_matched)) => {
                    *star_matched += 1;
                    (at, matched) = (*star_at + 1, *star_matched);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (secret, pin) = (URL_SAFE_NO_PAD.encode(self.secret), URL_SAFE_NO_PAD.encode(self.pin));
        write!(f, "{PREFIX}.{}.{secret}.{pin}", self.id)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let [prefix, id, secret, pin] = text.trim().split('.').collect::<Vec<_>>()[..] else {
            return Err(IdentityError::Token("it has not four parts"));
        };
        if prefix != PREFIX {
            return Err(IdentityError::Token("it does not begin with plt1"));
        }
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
            return Err(IdentityError::Token("its id holds other characters than letters, digits, - and _"));
        }
        let secret = part(secret).ok_or(IdentityError::Token("its secret is damaged"))?;
        let pin = part(pin).ok_or(IdentityError::Token("its pin is damaged"))?;
        Ok(Self { id: id.to_owned(), secret, pin })
    }
}

fn part<const N: usize>(text: &str) -> Option<[u8; N]> {
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_through_text_and_only_its_record_admits_it() {
        let authority = Authority::generate("main").unwrap();
        let (token, record) = JoinToken::generate(&authority, 100).unwrap();
        let (other, _) = JoinToken::generate(&authority, 100).unwrap();
        assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
        assert!(record.admits(&token, 99) && !record.admits(&token, 100) && !record.admits(&other, 99));
        let forged = JoinToken { secret: [7; 24], ..token.clone() };
        assert!(!record.admits(&forged, 99));
        assert!(record.id.bytes().all(|byte| byte.is_ascii_hexdigit()), "a leading - would be an option of the CLI");
        assert!(!format!("{token:?}{record:?}").contains(&URL_SAFE_NO_PAD.encode(token.secret)));
    }

    #[test]
    fn a_token_covers_the_names_that_its_pattern_matches() {
        let authority = Authority::generate("main").unwrap();
        let (_, any) = JoinToken::generate(&authority, 100).unwrap();
        let covers = |pattern: &str, node| TokenRecord { node: Some(pattern.into()), ..any.clone() }.covers(node);
        assert!(any.covers("gpu-7"));
        assert!(covers("gpu-7", "gpu-7") && !covers("gpu-7", "gpu-70") && !covers("gpu-7", "xgpu-7"));
        assert!(covers("gpu-*", "gpu-") && covers("gpu-*", "gpu-77") && !covers("gpu-*", "cpu-1"));
        assert!(covers("*-a-*-b", "x-a-y-a-z-b") && !covers("*-a-*-b", "x-a-b"));
        assert!(covers("gpu-?", "gpu-7") && !covers("gpu-?", "gpu-77"));
        assert!(check_pattern("gpu-*").is_ok() && check_pattern("").is_err() && check_pattern("GPU").is_err());
    }

    #[test]
    fn damaged_tokens_say_what_is_wrong() {
        let cases = [("", "four parts"), ("a.b.c.d", "plt1"), ("plt1.a/b.c.d", "id"), ("plt1.a.!.d", "secret")];
        for (text, part) in cases {
            let error = text.parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("token create"), "{text}: {error}");
        }
    }
}
