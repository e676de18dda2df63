//! Secrets at rest: envelope encryption.
//!
//! Each value is encrypted by a data key of its own (AES-256-GCM), and the data key by a master key that a
//! [`KeyProvider`] holds and the store never sees. Both are bound to a [`Context`], which says what the value is and
//! whose: a ciphertext that is copied into another row opens nothing. To change the master key, [`rewrap`] encrypts the
//! data key anew and leaves the value's ciphertext as it is.
//!
//! [`FileKeys`] is the provider whose keys stand in a file; reading and writing that file is its caller's. Its text:
//!
//! ```text
//! nexus-master-keys v1
//! mk-0123456789abcdef <32 bytes in base64>    the current key comes first
//! mk-fedcba9876543210 <32 bytes in base64>    older ones only open
//! ```
//!
//! A key's id is made from the key, so a damaged line is found when it is read. Lines that start with `#` are comments.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::chance;

const HEAD: &str = "nexus-master-keys v1";
const KEY_BYTES: usize = 32;
const TAG: usize = 16;
/// One value; the store takes no more in a transaction.
pub const MAX_PLAINTEXT: usize = 1024 * 1024;
/// Keys of one file: the current one and those whose values were not rewrapped yet.
pub const MAX_MASTER_KEYS: usize = 16;
const MAX_FILE: usize = 16 * 1024;
/// The form of [`Sealed`].
const VERSION: u8 = 1;

/// Why a value can't be sealed or opened. Never repeats the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error("a secret has at most {MAX_PLAINTEXT} bytes, this one has {0}")]
    TooLong(usize),
    #[error("the value is sealed in form {0}, which this version can't read: is a newer server running?")]
    Version(u8),
    #[error("master key `{0}` is not in the key file: restore it from its backup")]
    UnknownKey(KeyId),
    #[error("the value does not open: it was changed, or copied from another place")]
    Damaged,
    #[error("the key provider failed: {0}")]
    Provider(String),
    #[error("the file of master keys can't be read: {0}")]
    File(String),
    #[error("the current master key can't be removed: rotate first")]
    Current,
}

/// Names a master key; no secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(String);

impl KeyId {
    /// A provider of another make may name its keys as it likes.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key of AES-256; wiped when dropped.
#[derive(Clone)]
pub struct DataKey(Zeroizing<[u8; KEY_BYTES]>);

impl DataKey {
    pub fn generate() -> Self {
        Self(Zeroizing::new(chance::bytes()))
    }

    /// For providers that keep keys elsewhere.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(Zeroizing::new(bytes.try_into().ok()?)))
    }

    pub fn expose(&self) -> &[u8] {
        self.0.as_slice()
    }

    fn cipher(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, self.expose()).expect("the key has 32 bytes"))
    }

    /// A random nonce, then the ciphertext with its tag. Nonces of 96 random bits repeat with a chance below 2⁻³² in
    /// 2³² messages by one key (NIST SP 800-38D, section 8.3); a data key makes one, a master key one per value.
    fn encrypt(&self, context: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = chance::bytes();
        let mut out = Vec::with_capacity(NONCE_LEN + plaintext.len() + TAG);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(plaintext);
        let tag = self
            .cipher()
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut out[NONCE_LEN..])
            .expect("the length is within AES-GCM's bound of 64 GiB");
        out.extend_from_slice(tag.as_ref());
        out
    }

    fn decrypt(&self, context: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
        let (nonce, ciphertext) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(EnvelopeError::Damaged)?;
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let length = self
            .cipher()
            .open_in_place(nonce, Aad::from(context), &mut buffer)
            .map_err(|_| EnvelopeError::Damaged)?
            .len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(…)")
    }
}

/// What a sealed value is and whose. It is not stored with the value: the reader says what it means to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context(Vec<u8>);

impl Context {
    /// `purpose` and `parts` together must name one value in the whole cluster. Each stands with its length, so that
    /// (`ab`, `c`) and (`a`, `bc`) differ.
    pub fn new(purpose: &str, parts: &[&str]) -> Self {
        let mut bytes = Vec::new();
        for part in [purpose].iter().chain(parts) {
            bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
        Self(bytes)
    }

    /// A version of a `Secret`; a project may have secrets of one name in several regions.
    pub fn secret(region: &str, project: &str, name: &str, version: u64) -> Self {
        Self::new("secret", &[region, project, name, &version.to_string()])
    }

    /// The secret half of an access key.
    pub fn access_key(id: &str) -> Self {
        Self::new("access-key", &[id])
    }

    /// The one-time-password secret of the user with this uid.
    pub fn totp(user: &str) -> Self {
        Self::new("totp", &[user])
    }

    /// The secret by which an identity provider knows the cloud: opened for no other issuer.
    pub fn client_secret(organization: &str, provider: &str, issuer: &str) -> Self {
        Self::new("client-secret", &[organization, provider, issuer])
    }

    /// The private key that signs tokens.
    pub fn signing_key(kid: &str) -> Self {
        Self::new("signing-key", &[kid])
    }
}

/// A data key, encrypted by a master key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    pub by: KeyId,
    #[serde(with = "text")]
    pub ciphertext: Vec<u8>,
}

/// Who holds the master keys. Calls may block: a provider may ask a machine elsewhere.
pub trait KeyProvider: Send + Sync {
    /// The key that [`Self::wrap`] uses now.
    fn current(&self) -> KeyId;

    /// Encrypts a data key, bound to `context`.
    fn wrap(&self, key: &DataKey, context: &Context) -> Result<WrappedKey, EnvelopeError>;

    /// Opens what [`Self::wrap`] made, by this or an earlier master key.
    fn unwrap(&self, wrapped: &WrappedKey, context: &Context) -> Result<DataKey, EnvelopeError>;
}

/// A value at rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sealed {
    version: u8,
    key: WrappedKey,
    #[serde(with = "text")]
    ciphertext: Vec<u8>,
}

impl Sealed {
    /// The master key that is needed to open it.
    pub fn master_key(&self) -> &KeyId {
        &self.key.by
    }
}

pub fn seal(keys: &dyn KeyProvider, context: &Context, plaintext: &[u8]) -> Result<Sealed, EnvelopeError> {
    if plaintext.len() > MAX_PLAINTEXT {
        return Err(EnvelopeError::TooLong(plaintext.len()));
    }
    let data_key = DataKey::generate();
    let key = keys.wrap(&data_key, context)?;
    Ok(Sealed { version: VERSION, key, ciphertext: data_key.encrypt(&context.0, plaintext) })
}

pub fn open(keys: &dyn KeyProvider, context: &Context, sealed: &Sealed) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
    checked(sealed)?;
    keys.unwrap(&sealed.key, context)?.decrypt(&context.0, &sealed.ciphertext)
}

/// The same value under the current master key, or `None` if it is under it already.
pub fn rewrap(keys: &dyn KeyProvider, context: &Context, sealed: &Sealed) -> Result<Option<Sealed>, EnvelopeError> {
    checked(sealed)?;
    if sealed.key.by == keys.current() {
        return Ok(None);
    }
    let data_key = keys.unwrap(&sealed.key, context)?;
    Ok(Some(Sealed { key: keys.wrap(&data_key, context)?, ..sealed.clone() }))
}

fn checked(sealed: &Sealed) -> Result<(), EnvelopeError> {
    if sealed.version == VERSION { Ok(()) } else { Err(EnvelopeError::Version(sealed.version)) }
}

/// Master keys from a file, the current one first.
pub struct FileKeys(Vec<(KeyId, DataKey)>);

impl fmt::Debug for FileKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FileKeys").field(&self.ids().collect::<Vec<_>>()).finish()
    }
}

impl FileKeys {
    /// One new key.
    pub fn generate() -> Self {
        Self(vec![named(DataKey::generate())])
    }

    /// Adds a new key that seals nothing yet: first every server gets it, then it is made the current one.
    pub fn add(&mut self) -> Result<KeyId, EnvelopeError> {
        if self.0.len() >= MAX_MASTER_KEYS {
            return Err(EnvelopeError::File(format!("it holds {MAX_MASTER_KEYS} keys already: remove unused ones")));
        }
        let (id, key) = named(DataKey::generate());
        self.0.push((id.clone(), key));
        Ok(id)
    }

    /// Makes a key the current one. The others go on opening what they sealed.
    pub fn promote(&mut self, id: &KeyId) -> Result<(), EnvelopeError> {
        let at = self.0.iter().position(|(k, _)| k == id).ok_or_else(|| EnvelopeError::UnknownKey(id.clone()))?;
        self.0[..=at].rotate_right(1);
        Ok(())
    }

    /// Both at once, for a file that all servers read.
    pub fn rotate(&mut self) -> Result<KeyId, EnvelopeError> {
        let id = self.add()?;
        self.promote(&id)?;
        Ok(id)
    }

    /// Forgets a key whose values were all rewrapped. What is still under it can never be opened again.
    pub fn remove(&mut self, id: &KeyId) -> Result<(), EnvelopeError> {
        if *id == self.current() {
            return Err(EnvelopeError::Current);
        }
        let at = self.0.iter().position(|(k, _)| k == id).ok_or_else(|| EnvelopeError::UnknownKey(id.clone()))?;
        self.0.remove(at);
        Ok(())
    }

    /// The current one first.
    pub fn ids(&self) -> impl Iterator<Item = &KeyId> {
        self.0.iter().map(|(id, _)| id)
    }

    pub fn parse(file: &str) -> Result<Self, EnvelopeError> {
        let fault = |text: String| Err(EnvelopeError::File(text));
        if file.len() > MAX_FILE {
            return fault(format!("it has more than {MAX_FILE} bytes"));
        }
        let mut lines = file.lines().enumerate().filter(|(_, l)| !l.trim().is_empty() && !l.starts_with('#'));
        match lines.next() {
            Some((_, HEAD)) => {}
            _ => return fault(format!("its first line must be `{HEAD}`")),
        }
        let mut keys: Vec<(KeyId, DataKey)> = Vec::new();
        for (i, line) in lines {
            let line_of = |what: &str| format!("line {}: {what}", i + 1);
            let Some((id, key)) = line.split_once(' ') else {
                return fault(line_of("a key's id, a blank and the key in base64 are expected"));
            };
            let bytes = STANDARD.decode(key.trim()).map(Zeroizing::new).unwrap_or_default();
            let Some(key) = DataKey::from_bytes(&bytes) else {
                return fault(line_of("the key must be 32 bytes in base64"));
            };
            let (made, key) = named(key);
            if made.as_str() != id {
                return fault(line_of("the id does not belong to the key: the line was changed"));
            }
            if keys.iter().any(|(other, _)| *other == made) {
                return fault(line_of("the key stands there twice"));
            }
            keys.push((made, key));
        }
        match keys.len() {
            0 => fault("it holds no key".to_owned()),
            n if n > MAX_MASTER_KEYS => fault(format!("it holds more than {MAX_MASTER_KEYS} keys")),
            _ => Ok(Self(keys)),
        }
    }

    /// What the file must hold. Whoever reads it can open every secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        // Made in one piece: a buffer that grows would leave copies behind.
        let mut text = Zeroizing::new(String::with_capacity(HEAD.len() + 1 + self.0.len() * 80));
        text.push_str(HEAD);
        text.push('\n');
        for (id, key) in &self.0 {
            text.push_str(id.as_str());
            text.push(' ');
            STANDARD.encode_string(key.expose(), &mut text);
            text.push('\n');
        }
        text
    }
}

/// The id is a MAC by the key, so it tells nothing of it.
fn named(key: DataKey) -> (KeyId, DataKey) {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.expose()), b"nexus master key id");
    (KeyId(format!("mk-{}", hex::encode(&tag.as_ref()[..8]))), key)
}

impl KeyProvider for FileKeys {
    fn current(&self) -> KeyId {
        self.0[0].0.clone()
    }

    fn wrap(&self, key: &DataKey, context: &Context) -> Result<WrappedKey, EnvelopeError> {
        let (id, master) = &self.0[0];
        Ok(WrappedKey { by: id.clone(), ciphertext: master.encrypt(&wrapping(id, context), key.expose()) })
    }

    fn unwrap(&self, wrapped: &WrappedKey, context: &Context) -> Result<DataKey, EnvelopeError> {
        let (id, master) = self
            .0
            .iter()
            .find(|(id, _)| *id == wrapped.by)
            .ok_or_else(|| EnvelopeError::UnknownKey(wrapped.by.clone()))?;
        let bytes = master.decrypt(&wrapping(id, context), &wrapped.ciphertext)?;
        DataKey::from_bytes(&bytes).ok_or(EnvelopeError::Damaged)
    }
}

/// Keeps wrapped keys and values apart: neither opens in the place of the other.
fn wrapping(id: &KeyId, context: &Context) -> Vec<u8> {
    [Context::new("wrapped key", &[id.as_str()]).0.as_slice(), &context.0].concat()
}

/// Bytes as base64 text.
mod text {
    use super::{Engine, STANDARD};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(d)?).map_err(|_| serde::de::Error::custom("not base64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_opens_where_it_was_sealed_and_nowhere_else() {
        let keys = FileKeys::generate();
        let here = Context::secret("eu", "shop", "db", 3);
        let sealed = seal(&keys, &here, b"hunter2").unwrap();
        let json = serde_json::to_string(&sealed).unwrap();
        let stored: Sealed = serde_json::from_str(&json).unwrap();
        assert_eq!(**open(&keys, &here, &stored).unwrap(), *b"hunter2");
        for there in [
            Context::secret("eu", "shop", "db", 4),
            Context::secret("eu", "shop", "db2", 3),
            Context::secret("eu", "sho", "pdb", 3),
            Context::secret("us", "shop", "db", 3),
            Context::access_key("db"),
            Context::new("", &[]),
        ] {
            assert_eq!(open(&keys, &there, &stored).unwrap_err(), EnvelopeError::Damaged);
        }
        assert_ne!(seal(&keys, &here, b"hunter2").unwrap(), sealed, "equal values look different");
        assert!(seal(&keys, &here, b"").is_ok());
        assert_eq!(
            seal(&keys, &here, &vec![0; MAX_PLAINTEXT + 1]).unwrap_err(),
            EnvelopeError::TooLong(MAX_PLAINTEXT + 1)
        );
        let other = FileKeys::generate();
        assert_eq!(open(&other, &here, &sealed).unwrap_err(), EnvelopeError::UnknownKey(keys.current()));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let keys = FileKeys::generate();
        let here = Context::secret("eu", "shop", "db", 1);
        let sealed = seal(&keys, &here, b"hunter2").unwrap();
        for at in 0..sealed.ciphertext.len() {
            let mut bad = sealed.clone();
            bad.ciphertext[at] ^= 1;
            assert_eq!(open(&keys, &here, &bad).unwrap_err(), EnvelopeError::Damaged);
        }
        for at in 0..sealed.key.ciphertext.len() {
            let mut bad = sealed.clone();
            bad.key.ciphertext[at] ^= 1;
            assert_eq!(open(&keys, &here, &bad).unwrap_err(), EnvelopeError::Damaged);
        }
        for length in 0..30 {
            let mut bad = sealed.clone();
            bad.ciphertext.truncate(length.min(sealed.ciphertext.len() - 1));
            assert_eq!(open(&keys, &here, &bad).unwrap_err(), EnvelopeError::Damaged);
            bad = sealed.clone();
            bad.key.ciphertext.truncate(length);
            assert_eq!(open(&keys, &here, &bad).unwrap_err(), EnvelopeError::Damaged);
        }
        let swapped = Sealed { ciphertext: sealed.key.ciphertext.clone(), ..sealed.clone() };
        assert_eq!(open(&keys, &here, &swapped).unwrap_err(), EnvelopeError::Damaged);
        let newer = Sealed { version: 2, ..sealed };
        assert_eq!(open(&keys, &here, &newer).unwrap_err(), EnvelopeError::Version(2));
        assert_eq!(rewrap(&keys, &here, &newer).unwrap_err(), EnvelopeError::Version(2));
    }

    #[test]
    fn the_master_key_rotates_without_touching_values() {
        let mut keys = FileKeys::generate();
        let here = Context::totp("u1");
        let old = seal(&keys, &here, b"seed").unwrap();
        let first = keys.current();
        assert_eq!(rewrap(&keys, &here, &old).unwrap(), None);
        let second = keys.rotate().unwrap();
        assert_ne!(first, second);
        assert_eq!(keys.remove(&second), Err(EnvelopeError::Current));
        let staged = keys.add().unwrap();
        assert_eq!(keys.current(), second, "a key that was only added seals nothing");
        keys.remove(&staged).unwrap();
        assert_eq!(keys.promote(&staged), Err(EnvelopeError::UnknownKey(staged)));
        let new = rewrap(&keys, &here, &old).unwrap().unwrap();
        assert_eq!((new.master_key(), &new.ciphertext), (&second, &old.ciphertext));
        let mut reread = FileKeys::parse(&keys.to_text()).unwrap();
        assert_eq!(**open(&reread, &here, &old).unwrap(), *b"seed");
        reread.remove(&first).unwrap();
        assert_eq!(**open(&reread, &here, &new).unwrap(), *b"seed");
        assert_eq!(open(&reread, &here, &old).unwrap_err(), EnvelopeError::UnknownKey(first.clone()));
        assert_eq!(rewrap(&reread, &Context::totp("u2"), &new).unwrap(), None);
        assert_eq!(reread.remove(&first), Err(EnvelopeError::UnknownKey(first)));
        for _ in reread.ids().count()..MAX_MASTER_KEYS {
            reread.rotate().unwrap();
        }
        assert!(matches!(reread.rotate(), Err(EnvelopeError::File(_))));
        assert!(FileKeys::parse(&reread.to_text()).is_ok());
    }

    #[test]
    fn a_damaged_key_file_is_not_read() {
        let keys = FileKeys::generate();
        let text = keys.to_text();
        assert!(FileKeys::parse(&format!("# by hand\n\n{}\n", *text)).is_ok());
        let line = text.lines().nth(1).unwrap();
        let (id, key) = line.split_once(' ').unwrap();
        let flipped = format!("{id} {}{}", if key.starts_with('A') { "B" } else { "A" }, &key[1..]);
        for bad in [
            String::new(),
            HEAD.to_owned(),
            text.replace("v1", "v2"),
            format!("{HEAD}\n{flipped}\n"),
            format!("{HEAD}\n{line}\n{line}\n"),
            format!("{HEAD}\nmk-1 AAAA\n"),
            format!("{HEAD}\nnonsense\n"),
            "#".repeat(MAX_FILE + 1),
        ] {
            assert!(matches!(FileKeys::parse(&bad), Err(EnvelopeError::File(_))));
        }
        let shown = format!("{keys:?} {:?} {:?}", keys.0[0].1, FileKeys::parse(&text.replace("v1", "v2")));
        assert!(!shown.contains(key), "{shown}");
    }
}
