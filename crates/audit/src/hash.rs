//! The one hash of this room, SHA-256, and how trees use it (RFC 9162, section 2.1.1): a leaf is hashed behind a zero byte,
//! an inner node behind a one, so that neither can be passed off as the other.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use ring::digest::{Context, SHA256, digest};
use serde::{Deserialize, Serialize};

const LEAF: &[u8] = &[0];
const NODE: &[u8] = &[1];

/// A SHA-256; as text, 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

/// Why a text is not a [`Hash`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a hash is written as 64 lower-case hexadecimal digits")]
pub struct HashError;

impl Hash {
    pub const LENGTH: usize = 32;
    /// What the first record of a log names as the one before.
    pub const ZERO: Self = Self([0; 32]);

    pub fn of(bytes: &[u8]) -> Self {
        Self(array(digest(&SHA256, bytes)))
    }

    /// The root of the tree without leaves.
    pub fn of_nothing() -> Self {
        Self::of(&[])
    }

    /// The hash of a leaf: of a zero byte and the leaf.
    pub fn leaf(bytes: &[u8]) -> Self {
        joined(&[LEAF, bytes])
    }

    /// The hash of an inner node: of a one byte and its children.
    pub fn node(left: Self, right: Self) -> Self {
        joined(&[NODE, &left.0, &right.0])
    }
}

fn joined(parts: &[&[u8]]) -> Hash {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    Hash(array(context.finish()))
}

fn array(digest: ring::digest::Digest) -> [u8; 32] {
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; 64];
        hex::encode_to_slice(self.0, &mut text).expect("32 bytes are 64 digits");
        f.write_str(std::str::from_utf8(&text).expect("hexadecimal digits are ASCII"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Hash {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(HashError);
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| HashError)?;
        Ok(Self(bytes))
    }
}

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}
