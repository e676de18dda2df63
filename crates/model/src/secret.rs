//! The values of secrets, on their way from whoever sets them to what they are mounted into.
//!
//! They are wiped when they are dropped and never shown by `Debug`. In the form that is sealed and sent between machines each
//! is base64, because it need not be text.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::FieldError;

/// Keys of one secret.
pub const MAX_KEYS: usize = 64;
/// Bytes of all keys and values of one version.
pub const MAX_BYTES: usize = 64 << 10;
/// A key is the name of a file: no path, and nothing hidden.
pub const KEY_PATTERN: &str = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$";

/// Whether a text names a value, as [`KEY_PATTERN`] says.
pub fn is_key(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=128).contains(&text.len()) && text.bytes().all(good) && !text.starts_with(['.', '-'])
}

/// One value in clear.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct SecretValue(Zeroizing<Vec<u8>>);

impl SecretValue {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Reads base64. The error says nothing of the text.
    pub fn from_base64(text: &str) -> Option<Self> {
        STANDARD.decode(text).ok().map(Self::new)
    }

    pub fn to_base64(&self) -> Zeroizing<String> {
        // In one piece: a buffer that grows would leave copies behind.
        let mut text = Zeroizing::new(String::with_capacity(self.0.len().div_ceil(3) * 4));
        STANDARD.encode_string(&*self.0, &mut text);
        text
    }

    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The value, if it is text.
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(…)")
    }
}

impl Serialize for SecretValue {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.to_base64())
    }
}

impl<'de> Deserialize<'de> for SecretValue {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(d)?);
        Self::from_base64(&text).ok_or_else(|| serde::de::Error::custom("not base64"))
    }
}

/// The values of one version by their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretData(pub BTreeMap<String, SecretValue>);

impl SecretData {
    pub fn keys(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    /// What is sealed.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        // Room for all of it at once, for the same reason as above.
        let room = self.0.iter().map(|(k, v)| k.len() + v.0.len() * 4 / 3 + 16).sum::<usize>() + 2;
        let mut bytes = Zeroizing::new(Vec::with_capacity(room));
        serde_json::to_writer(&mut *bytes, self).expect("texts by text are JSON");
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// What is wrong with it; names keys, never values.
    pub fn check(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if self.0.is_empty() {
            errors.push(FieldError::new("spec.data", "at least one key"));
        }
        if self.0.len() > MAX_KEYS {
            errors.push(FieldError::new("spec.data", format!("at most {MAX_KEYS} keys")));
        }
        let wrong = self.0.keys().filter(|key| !is_key(key)).take(20);
        errors.extend(wrong.map(|key| wrong_key("spec.data", key)));
        if self.0.iter().map(|(k, v)| k.len() + v.0.len()).sum::<usize>() > MAX_BYTES {
            errors.push(FieldError::new("spec.data", format!("at most {MAX_BYTES} bytes in all")));
        }
        errors
    }
}

/// Says of a key that it is none.
pub fn wrong_key(field: &str, key: &str) -> FieldError {
    let key: String = key.chars().take(64).collect();
    let message = "a key has at most 128 letters, digits, '_', '.' and '-', and begins with a letter, digit or '_'";
    FieldError::new(format!("{field}.{key}"), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_never_shown_and_comes_back_whole() {
        let value = SecretValue::new(b"hunter2\0\xff".to_vec());
        let data = SecretData(BTreeMap::from([("password".to_owned(), value.clone())]));
        assert!(!format!("{data:?}").contains("hunter2"), "{data:?}");
        let bytes = data.to_bytes();
        assert!(bytes.capacity() >= bytes.len());
        assert_eq!(SecretData::from_bytes(&bytes), Some(data));
        assert!(value.text().is_none() && SecretValue::new(b"a".to_vec()).text() == Some("a"));
    }

    #[test]
    fn keys_are_names_of_files_and_values_are_bounded() {
        for good in ["password", "tls.crt", "A_B-c", "_x", "0"] {
            assert!(is_key(good), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "-f", "a/b", "a b", "é", &"k".repeat(129)] {
            assert!(!is_key(bad), "{bad}");
        }
        let one =
            |key: &str, size: usize| SecretData(BTreeMap::from([(key.to_owned(), SecretValue::new(vec![0; size]))]));
        assert!(one("k", MAX_BYTES - 1).check().is_empty());
        assert_eq!(one("k", MAX_BYTES).check()[0].field, "spec.data");
        assert_eq!(one("a/b", 1).check()[0].field, "spec.data.a/b");
        assert_eq!(SecretData::default().check().len(), 1);
    }
}
