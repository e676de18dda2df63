//! Bearer tokens: `cnx_` and 32 random bytes in base64url.
//!
//! A token says nothing by itself. Whoever accepts it keeps only its SHA-256 and compares in constant time, so a
//! stolen database opens no door. A plain hash is enough, because the secret has 256 random bits and can't be guessed
//! from a list as a password can. The prefix lets scanners find a token that was published by mistake.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

const PREFIX: &str = "cnx_";
/// 32 bytes in base64 without padding.
const BODY_LENGTH: usize = 43;

/// Why a text is not a token. Never repeats the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("a token starts with `{PREFIX}`")]
    Prefix,
    #[error("a token has {BODY_LENGTH} characters after `{PREFIX}`, this one has {0}: was it copied whole?")]
    Length(usize),
    #[error("a token holds letters, digits, `-` and `_` only, in a pattern that this one breaks: was it copied whole?")]
    Alphabet,
    #[error("a token's hash is 64 hexadecimal digits")]
    Hash,
}

/// A token in the clear: shown once to its owner, never stored.
#[derive(Clone)]
pub struct TokenSecret([u8; 32]);

impl TokenSecret {
    /// `random` must come from a cryptographic source.
    pub fn generate(random: [u8; 32]) -> Self {
        Self(random)
    }

    /// Reads what a client sent, without surrounding blanks.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        let length = body.chars().count();
        if length != BODY_LENGTH {
            return Err(TokenError::Length(length));
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Alphabet)?;
        Ok(Self(bytes.try_into().map_err(|_| TokenError::Alphabet)?))
    }

    /// The text that its owner sends as `Authorization: Bearer …`.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(self.0))
    }

    pub fn hash(&self) -> TokenHash {
        let digest = digest::digest(&digest::SHA256, self.reveal().as_bytes());
        TokenHash(digest.as_ref().try_into().expect("SHA-256 gives 32 bytes"))
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(cnx_…)")
    }
}

impl FromStr for TokenSecret {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        Self::parse(text)
    }
}

/// The SHA-256 of a token's text; what is stored. Written as 64 hexadecimal digits.
///
/// `==` takes the same time wherever the two differ. The order, for use as a key, does not promise that, and need
/// not: who can choose a hash's prefix at will has broken SHA-256.
#[derive(Clone, Copy, Eq, PartialOrd, Ord)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    pub fn matches(&self, secret: &TokenSecret) -> bool {
        *self == secret.hash()
    }
}

impl PartialEq for TokenHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl std::hash::Hash for TokenHash {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenHash({self})")
    }
}

impl FromStr for TokenHash {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| TokenError::Hash)?;
        Ok(Self(bytes))
    }
}

impl Serialize for TokenHash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_hash_alone() {
        let secret = TokenSecret::generate([7; 32]);
        let stored: TokenHash = secret.hash().to_string().parse().unwrap();
        let sent = TokenSecret::parse(&format!(" {}\n", secret.reveal())).unwrap();
        assert!(stored.matches(&sent));
        assert!(!stored.matches(&TokenSecret::generate([8; 32])));
        let json = serde_json::to_string(&stored).unwrap();
        assert_eq!(serde_json::from_str::<TokenHash>(&json).unwrap(), stored);
    }

    #[test]
    fn nothing_prints_the_secret() {
        let secret = TokenSecret::generate([7; 32]);
        let shown = format!("{secret:?}");
        assert!(!shown.contains(&secret.reveal()[4..]) && !shown.contains('7'), "{shown}");
        assert!(!secret.hash().to_string().contains(&hex::encode([7; 32])));
    }

    #[test]
    fn bad_tokens_say_what_is_wrong_with_them() {
        let good = TokenSecret::generate([7; 32]).reveal();
        assert_eq!(TokenSecret::parse("hunter2").unwrap_err(), TokenError::Prefix);
        assert_eq!(TokenSecret::parse(&good[..20]).unwrap_err(), TokenError::Length(16));
        assert_eq!(TokenSecret::parse(&good.replace("Bw", "B!")).unwrap_err(), TokenError::Alphabet);
        // The last character carries two bits that must be zero: one token has one text.
        let last = format!("{}x", &good[..good.len() - 1]);
        assert_eq!(TokenSecret::parse(&last).unwrap_err(), TokenError::Alphabet);
        assert_eq!("zz".parse::<TokenHash>().unwrap_err(), TokenError::Hash);
    }
}
