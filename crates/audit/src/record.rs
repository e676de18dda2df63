//! A record: who did what to which object, from where, by which policies, and what was answered.
//!
//! Its one encoding is JSON in the canonical form of RFC 8785, which anybody can make again: members sorted, no
//! whitespace, absent members left out, numbers whole and below 2⁵³. The hash of a record is that of the encoding as a leaf
//! of its tree. `docs/audit-format.md` describes it byte by byte.
//!
//! What identifies a person beyond a stable name stands outside, encrypted ([`crate::personal`]); the record commits to the
//! ciphertext only.

use std::borrow::Cow;

use nexus_model::{RequestId, Uid};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hash::Hash;
use crate::personal::Sealed;

/// The version of the encoding that this release writes.
pub const VERSION: u8 = 1;
/// A record's encoding has at most this many bytes.
pub const MAX_RECORD: usize = 16 * 1024;
/// Whole numbers beyond this are not the same in every reader of JSON (RFC 8785, section 3.2.2.3).
pub const MAX_NUMBER: u64 = (1 << 53) - 1;

/// Why there is no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("a record has at most {MAX_RECORD} bytes, this one has {0}: shorten its names")]
    TooLong(usize),
    #[error("`{0}` is above 2^53 - 1, which JSON can't carry faithfully")]
    Number(&'static str),
    #[error("this is no record: {0}")]
    Unreadable(String),
    #[error("the record's version is {0}; this release reads version {VERSION}: use a newer one")]
    Version(u8),
    #[error("the bytes are a record, but not in its canonical form")]
    NotCanonical,
}

/// How long a record's content must be kept. The hash of one whose content is gone stays in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retention {
    /// Identity, policies, refusals, anchors: the longest.
    Security,
    /// Changes of resources.
    Change,
    /// Reads and logins: the shortest.
    Access,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActorKind {
    Anonymous,
    Gateway,
    Host,
    Operator,
    Server,
    ServiceAccount,
    User,
    Workload,
}

// In all of these the members stand in the order of their encoded names, which makes serde write them sorted.

/// Who did it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Actor {
    /// The id of the access key that signed the request; never its secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_key: Option<String>,
    pub kind: ActorKind,
    /// The principal's stable name. It stays for ever: no e-mail address, no name of a person.
    pub name: String,
    /// The principal's organization. Servers and hosts have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
}

/// What it was done to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// As it was asked for: in a refusal it need not be the name of anything.
    pub name: String,
    /// The organization that it belongs to, itself or by its project. What is the fleet's has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    /// The kind's plural, as in its path.
    pub plural: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<Uid>,
}

/// The hashes of the spec before and after. Neither holds the content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Hash>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Hash>,
}

impl Change {
    /// The hashes of two specs in canonical form (RFC 8785). A short secret can be guessed from its hash: of a secret pass what is
    /// stored, which is encrypted.
    pub fn of(before: Option<&Value>, after: Option<&Value>) -> Self {
        let hash = |spec: &Value| {
            // It refuses numbers that aren't finite, which a value can't hold.
            Hash::of(&serde_json_canonicalizer::to_vec(spec).expect("a JSON value has a canonical form"))
        };
        Self { after: after.map(hash), before: before.map(hash) }
    }
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Cow<'_, str>", into = "String")]
pub enum Answer {
    Ok,
    /// The stable code of the error.
    Error(String),
}

const OK: &str = "ok";

impl From<Cow<'_, str>> for Answer {
    fn from(text: Cow<'_, str>) -> Self {
        if text == OK { Self::Ok } else { Self::Error(text.into_owned()) }
    }
}

impl From<Answer> for String {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Ok => OK.to_owned(),
            Answer::Error(code) => code,
        }
    }
}

/// Records `from` to `to` (both included) of a server's own chain are settled: the last one's hash is `head`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    pub from: u64,
    pub head: Hash,
    pub server: String,
    pub to: u64,
}

/// The commitment to the personal part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PersonalRef {
    /// The SHA-256 of the ciphertext.
    pub digest: Hash,
    /// Names the key.
    pub subject: String,
}

/// What is known before the record has its place in a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub time: u64,
    pub actor: Actor,
    /// `{plural}:{verb}`, as policies name it.
    pub action: String,
    pub target: Option<Target>,
    /// The policies that decided.
    pub policies: Vec<String>,
    pub answer: Answer,
    /// The newest revision of the group that the decision rests on. The change itself is committed at a later one, which is
    /// that of the record's own row in the store.
    pub revision: Option<u64>,
    pub request_id: RequestId,
    pub change: Option<Change>,
    pub retention: Retention,
    pub anchor: Option<Anchor>,
    pub personal: Option<Sealed>,
}

/// A record in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    pub action: String,
    pub actor: Actor,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<Anchor>,
    pub answer: Answer,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// The log: a region or `global`, or, for a server's own chain, `{region}/{server}`.
    pub group: String,
    /// The place in the log, from 0.
    pub index: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub personal: Option<PersonalRef>,
    pub policies: Vec<String>,
    /// The hash of the record before, [`Hash::ZERO`] in the first.
    pub previous: Hash,
    pub request_id: RequestId,
    pub retention: Retention,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    pub time: u64,
    #[serde(rename = "v")]
    pub version: u8,
}

impl Record {
    /// The canonical encoding.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let numbers = [
            ("index", Some(self.index)),
            ("time", Some(self.time)),
            ("revision", self.revision),
            ("anchor.from", self.anchor.as_ref().map(|a| a.from)),
            ("anchor.to", self.anchor.as_ref().map(|a| a.to)),
        ];
        if let Some((name, _)) = numbers.into_iter().find(|(_, n)| n.is_some_and(|n| n > MAX_NUMBER)) {
            return Err(RecordError::Number(name));
        }
        if self.version != VERSION {
            return Err(RecordError::Version(self.version));
        }
        let mut bytes = Vec::with_capacity(640);
        serde_json::to_writer(&mut bytes, self).expect("a record has string keys and writes to memory");
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads a canonical encoding, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLong(bytes.len()));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(|e| RecordError::Unreadable(e.to_string()))?;
        if record.encode()? == bytes { Ok(record) } else { Err(RecordError::NotCanonical) }
    }

    /// Its hash as a leaf of its tree, which the next record names as `previous`.
    pub fn hash(&self) -> Result<Hash, RecordError> {
        Ok(Hash::leaf(&self.encode()?))
    }
}

/// A record as it is stored and exported: with its personal part, while there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The proof that the record is in the tree, in an export of selected records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inclusion: Option<Vec<Hash>>,
    /// The ciphertext, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "base64_option")]
    pub personal: Option<Vec<u8>>,
    pub record: Record,
}

impl Entry {
    /// Reads a row as [`crate::log::Appended`] gave it.
    pub fn from_row(row: &[u8]) -> Result<Self, RecordError> {
        serde_json::from_slice(row).map_err(|e| RecordError::Unreadable(e.to_string()))
    }

    pub fn to_row(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an entry has string keys and writes to memory")
    }

    /// The personal part, if it is still there.
    pub fn sealed(&self) -> Option<Sealed> {
        let subject = self.record.personal.as_ref()?.subject.clone();
        Some(Sealed { subject, bytes: self.personal.clone()? })
    }

    /// Whether the personal part is the one that the record commits to, or gone.
    pub fn personal_fits(&self) -> bool {
        match (&self.personal, &self.record.personal) {
            (None, _) => true,
            (Some(bytes), Some(commitment)) => Hash::of(bytes) == commitment.digest,
            (Some(_), None) => false,
        }
    }
}

mod base64_option {
    //! Bytes as base64 text, for serde.

    use std::borrow::Cow;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, s: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => s.serialize_str(&STANDARD.encode(bytes)),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Cow::<str>::deserialize(d)?;
        STANDARD.decode(text.as_bytes()).map(Some).map_err(serde::de::Error::custom)
    }
}
