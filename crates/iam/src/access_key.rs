//! Access keys: a public id and a secret that signs requests ([`crate::sigv4`]) or is exchanged for a token.
//!
//! Whoever checks a signature needs the secret itself, so it is stored sealed ([`crate::envelope`]), bound to its id.
//! The id starts with `CNXA`, so that scanners find one that was published by mistake.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::chance;
use crate::envelope::{self, Context, EnvelopeError, KeyProvider, Sealed};

const PREFIX: &str = "CNXA";
/// 80 random bits in base32.
const ID_BODY: usize = 16;
/// 240 random bits in base64.
const SECRET_LENGTH: usize = 40;

/// Why a text is not an access key. Never repeats it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessKeyError {
    #[error("an access key's id is `{PREFIX}` and {ID_BODY} characters of A-Z and 2-7")]
    Id,
    #[error("an access key's secret has {SECRET_LENGTH} letters, digits, `-` and `_`: was it copied whole?")]
    Secret,
}

/// The public half.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccessKeyId(String);

impl AccessKeyId {
    pub fn generate() -> Self {
        Self(format!("{PREFIX}{}", BASE32_NOPAD.encode(&chance::bytes::<{ ID_BODY * 5 / 8 }>())))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AccessKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for AccessKeyId {
    type Err = AccessKeyError;

    fn from_str(text: &str) -> Result<Self, AccessKeyError> {
        let body = text.strip_prefix(PREFIX).ok_or(AccessKeyError::Id)?;
        let fits = body.len() == ID_BODY && body.bytes().all(|b| matches!(b, b'A'..=b'Z' | b'2'..=b'7'));
        if fits { Ok(Self(text.to_owned())) } else { Err(AccessKeyError::Id) }
    }
}

impl Serialize for AccessKeyId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for AccessKeyId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The secret half: shown once to its owner, stored sealed. Never printed; wiped when dropped.
#[derive(Clone)]
pub struct SecretKey(Zeroizing<String>);

impl SecretKey {
    pub fn generate() -> Self {
        Self(Zeroizing::new(URL_SAFE_NO_PAD.encode(chance::bytes::<{ SECRET_LENGTH * 3 / 4 }>())))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether a client that sends the secret itself, to exchange it for a token, sent this one. Constant time.
    pub fn matches(&self, sent: &str) -> bool {
        self.0.as_bytes().ct_eq(sent.as_bytes()).into()
    }

    pub fn seal(&self, id: &AccessKeyId, keys: &dyn KeyProvider) -> Result<Sealed, EnvelopeError> {
        envelope::seal(keys, &Context::access_key(id.as_str()), self.0.as_bytes())
    }

    pub fn open(sealed: &Sealed, id: &AccessKeyId, keys: &dyn KeyProvider) -> Result<Self, EnvelopeError> {
        let bytes = envelope::open(keys, &Context::access_key(id.as_str()), sealed)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| EnvelopeError::Damaged)?;
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl FromStr for SecretKey {
    type Err = AccessKeyError;

    fn from_str(text: &str) -> Result<Self, AccessKeyError> {
        let fits =
            text.len() == SECRET_LENGTH && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if fits { Ok(Self(Zeroizing::new(text.to_owned()))) } else { Err(AccessKeyError::Secret) }
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(…)")
    }
}

/// Both halves, as their owner has them.
#[derive(Debug, Clone)]
pub struct AccessKey {
    pub id: AccessKeyId,
    pub secret: SecretKey,
}

impl AccessKey {
    pub fn generate() -> Self {
        Self { id: AccessKeyId::generate(), secret: SecretKey::generate() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::FileKeys;

    #[test]
    fn a_secret_comes_back_from_its_seal_under_its_own_id_only() {
        let (key, other) = (AccessKey::generate(), AccessKey::generate());
        let master = FileKeys::generate();
        let sealed = key.secret.seal(&key.id, &master).unwrap();
        let opened = SecretKey::open(&sealed, &key.id, &master).unwrap();
        assert!(opened.matches(key.secret.expose()) && !opened.matches(other.secret.expose()) && !opened.matches(""));
        assert_eq!(SecretKey::open(&sealed, &other.id, &master).unwrap_err(), EnvelopeError::Damaged);
        let stored = serde_json::to_string(&sealed).unwrap();
        assert!(!stored.contains(key.secret.expose()) && !format!("{key:?}").contains(key.secret.expose()));
    }

    #[test]
    fn keys_have_their_form() {
        let key = AccessKey::generate();
        assert_eq!((key.id.as_str().len(), key.secret.expose().len()), (20, 40));
        assert_eq!(key.id.as_str().parse(), Ok(key.id.clone()));
        assert!(key.secret.expose().parse::<SecretKey>().is_ok());
        for bad in ["", "CNXA", "AKIAIOSFODNN7EXAMPLE", "CNXAabcdefghijklmnop", "CNXAAAAAAAAAAAAAAAA1", "CNXAÄÄÄÄÄÄÄÄ"]
        {
            assert_eq!(bad.parse::<AccessKeyId>(), Err(AccessKeyError::Id), "{bad}");
        }
        for bad in ["", "short", &"ä".repeat(20), &"+".repeat(40)] {
            assert_eq!(bad.parse::<SecretKey>().unwrap_err(), AccessKeyError::Secret);
        }
    }
}
