//! Signed tree heads: what a third party keeps, so that nobody can rewrite what came before.
//!
//! A head is a C2SP checkpoint in a signed note (c2sp.org/tlog-checkpoint, c2sp.org/signed-note), with one extension line for the
//! time, signed with Ed25519:
//!
//! ```text
//! home/audit/eu
//! 1042
//! CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=
//! time 1700000000123
//!
//! — home/audit/eu Az3grlgt…
//! ```
//!
//! Its origin, `{cluster}/audit/{group}`, is also the name of the key. As one line it is that text as a JSON string.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use crate::hash::Hash;

/// Notes are short; more is not one. Witnesses may add signatures of their own.
const MAX_NOTE: usize = 64 * 1024;
/// The signature type of Ed25519 in signed notes.
const ED25519_TYPE: u8 = 1;

/// Why a text is no head or no key, or a head is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("this is no signed tree head: {0}")]
    Malformed(&'static str),
    #[error("`{0}` is no public key of an audit log: it is written `NAME+8 HEX DIGITS+BASE64`")]
    Key(String),
    #[error("`{0}` can't name a log: cluster and group have letters, digits, `.`, `-` and `_`")]
    Origin(String),
    #[error("the tree head of `{0}` is signed by no key that you gave: get the log's public key from whom you trust")]
    UnknownKey(String),
    #[error("the signature of the tree head of `{0}` is wrong: it is forged or was changed")]
    Signature(String),
}

/// The state of a log at a moment: any two heads of one log must be of one history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeHead {
    pub cluster: String,
    pub group: String,
    /// How many records the tree has.
    pub size: u64,
    pub root: Hash,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub time: u64,
}

impl TreeHead {
    /// The log's name for everybody.
    pub fn origin(&self) -> String {
        origin(&self.cluster, &self.group)
    }

    /// What is signed.
    fn text(&self) -> String {
        format!("{}\n{}\n{}\ntime {}\n", self.origin(), self.size, STANDARD.encode(self.root.0), self.time)
    }

    fn from_text(text: &str) -> Result<Self, HeadError> {
        let malformed = HeadError::Malformed;
        let lines: Vec<&str> = text.strip_suffix('\n').ok_or(malformed("no newline at its end"))?.split('\n').collect();
        let [origin, size, root, extensions @ ..] = &lines[..] else { return Err(malformed("too few lines")) };
        let (cluster, group) = origin.split_once("/audit/").ok_or(malformed("its origin is no audit log's"))?;
        check_origin(cluster, group)?;
        let root = STANDARD.decode(root).ok().and_then(|b| b.try_into().ok()).map(Hash);
        let root = root.ok_or(malformed("its root is no hash"))?;
        let size = number(size).ok_or(malformed("its size is no number"))?;
        let [time] = extensions else { return Err(malformed("one extension line, the time, is expected")) };
        let time = time.strip_prefix("time ").and_then(number).ok_or(malformed("its time is no number"))?;
        Ok(Self { cluster: cluster.to_owned(), group: group.to_owned(), size, root, time })
    }
}

/// `{cluster}/audit/{group}`.
pub fn origin(cluster: &str, group: &str) -> String {
    format!("{cluster}/audit/{group}")
}

fn check_origin(cluster: &str, group: &str) -> Result<(), HeadError> {
    let fits = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    if fits(cluster) && fits(group) { Ok(()) } else { Err(HeadError::Origin(origin(cluster, group))) }
}

/// A decimal number without sign or leading zeros.
fn number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// Whether a signature line is that of the key's owner: the first bytes of a hash over the key and its name.
fn key_id(name: &str, public: &[u8]) -> [u8; 4] {
    let hash = Hash::of(&[name.as_bytes(), b"\n", &[ED25519_TYPE], public].concat());
    *hash.0.first_chunk().expect("a hash has 32 bytes")
}

/// A head with the signatures over it. It says nothing until a [`Verifier`] has looked at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedHead {
    head: TreeHead,
    /// Name of the key, its id, signature.
    signatures: Vec<(String, [u8; 4], Vec<u8>)>,
}

impl SignedHead {
    /// What it claims.
    pub fn claimed(&self) -> &TreeHead {
        &self.head
    }

    /// The note, one JSON string on one line.
    pub fn to_line(&self) -> String {
        serde_json::to_string(&self.to_string()).expect("a text has a JSON form")
    }
}

/// The note, as it goes into a file.
impl fmt::Display for SignedHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.head.text())?;
        for (name, id, signature) in &self.signatures {
            writeln!(f, "— {name} {}", STANDARD.encode([&id[..], signature].concat()))?;
        }
        Ok(())
    }
}

/// Reads a note, or the one line that holds it as a JSON string.
impl FromStr for SignedHead {
    type Err = HeadError;

    fn from_str(note: &str) -> Result<Self, HeadError> {
        let malformed = HeadError::Malformed;
        if note.len() > MAX_NOTE {
            return Err(malformed("it is too long"));
        }
        if note.starts_with('"') {
            let inner: String = serde_json::from_str(note.trim_end()).map_err(|_| malformed("no JSON string"))?;
            return if inner.starts_with('"') { Err(malformed("a string in a string")) } else { inner.parse() };
        }
        let (text, lines) = note.rsplit_once("\n\n").ok_or(malformed("no empty line before its signatures"))?;
        let head = TreeHead::from_text(&format!("{text}\n"))?;
        let lines = lines.strip_suffix('\n').ok_or(malformed("no newline at its end"))?;
        let mut signatures = Vec::new();
        for line in lines.split('\n') {
            let signature = line.strip_prefix("— ").and_then(|l| l.split_once(' ')).and_then(|(name, bytes)| {
                let bytes = STANDARD.decode(bytes).ok()?;
                let (id, signature) = bytes.split_first_chunk()?;
                (!name.is_empty()).then(|| (name.to_owned(), *id, signature.to_vec()))
            });
            signatures.push(signature.ok_or(malformed("a line is no signature"))?);
        }
        Ok(Self { head, signatures })
    }
}

/// Signs the heads of one log.
pub struct Signer {
    cluster: String,
    group: String,
    key: Ed25519KeyPair,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({}, …)", origin(&self.cluster, &self.group))
    }
}

impl Signer {
    /// The signer of a log by the 32 secret bytes of an Ed25519 key, which come from a source fit for keys.
    pub fn from_seed(cluster: &str, group: &str, seed: &[u8; 32]) -> Result<Self, HeadError> {
        check_origin(cluster, group)?;
        let key = Ed25519KeyPair::from_seed_unchecked(seed).expect("every 32 bytes are an Ed25519 seed");
        Ok(Self { cluster: cluster.to_owned(), group: group.to_owned(), key })
    }

    /// The key that others verify with.
    pub fn public_key(&self) -> PublicKey {
        let bytes = self.key.public_key().as_ref().try_into().expect("a public key of Ed25519 has 32 bytes");
        PublicKey { name: origin(&self.cluster, &self.group), bytes }
    }

    /// Signs what the log is now. Whoever signs must have committed the tree: two heads that aren't of one history prove a fork.
    pub fn sign(&self, size: u64, root: Hash, time: u64) -> SignedHead {
        let head = TreeHead { cluster: self.cluster.clone(), group: self.group.clone(), size, root, time };
        let PublicKey { name, bytes } = self.public_key();
        let signature = self.key.sign(head.text().as_bytes()).as_ref().to_vec();
        let id = key_id(&name, &bytes);
        SignedHead { head, signatures: vec![(name, id, signature)] }
    }
}

/// A log's public key; as text, the verifier key of signed notes: `{origin}+{key id}+{base64}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    bytes: [u8; 32],
}

impl PublicKey {
    /// The origin of the log whose heads it verifies.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key's id, eight hexadecimal digits.
    pub fn id(&self) -> String {
        hex::encode(key_id(&self.name, &self.bytes))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}+{}", self.name, self.id(), STANDARD.encode([&[ED25519_TYPE], &self.bytes[..]].concat()))
    }
}

impl FromStr for PublicKey {
    type Err = HeadError;

    fn from_str(text: &str) -> Result<Self, HeadError> {
        let parse = || {
            let mut parts = text.trim().splitn(3, '+');
            let (name, id, key) = (parts.next()?, parts.next()?, STANDARD.decode(parts.next()?).ok()?);
            let (&kind, bytes) = key.split_first()?;
            let key = Self { name: name.to_owned(), bytes: bytes.try_into().ok()? };
            let (cluster, group) = name.split_once("/audit/")?;
            check_origin(cluster, group).ok()?;
            (kind == ED25519_TYPE && key.id() == id).then_some(key)
        };
        parse().ok_or_else(|| HeadError::Key(text.to_owned()))
    }
}

/// Knows public keys and nothing else.
#[derive(Debug, Clone, Default)]
pub struct Verifier {
    keys: BTreeMap<(String, [u8; 4]), PublicKey>,
}

impl Verifier {
    pub fn new(keys: impl IntoIterator<Item = PublicKey>) -> Self {
        Self { keys: keys.into_iter().map(|k| ((k.name.clone(), key_id(&k.name, &k.bytes)), k)).collect() }
    }

    /// The head, if one of the keys of its log has signed it. Signatures by others are passed over; a wrong one by a known key
    /// makes the whole head wrong.
    pub fn verify<'a>(&self, signed: &'a SignedHead) -> Result<&'a TreeHead, HeadError> {
        let origin = signed.head.origin();
        let text = signed.head.text();
        let mut known = false;
        for (name, id, signature) in &signed.signatures {
            // A key speaks for the log of its name alone.
            let Some(key) = self.keys.get(&(name.clone(), *id)).filter(|k| k.name == origin) else { continue };
            let verified = UnparsedPublicKey::new(&ED25519, key.bytes).verify(text.as_bytes(), signature);
            verified.map_err(|_| HeadError::Signature(origin.clone()))?;
            known = true;
        }
        if known { Ok(&signed.head) } else { Err(HeadError::UnknownKey(origin)) }
    }
}
