//! The personal part of a record, encrypted with a key of its subject's own, so that it can be crypto-shredded: once the key
//! is deleted nobody can read the part any more, in whatever copy or backup it stands, and no hash changes.
//!
//! AES-256-GCM under the subject's key with a nonce of 96 random bits: `nonce ‖ ciphertext ‖ tag`. What is authenticated besides
//! binds it to its subject and request. One key is good for 2³² parts (NIST SP 800-38D, section 8.3): give a
//! subject a new one long before, under a new id.

use std::fmt;

use nexus_env::{Rng, RngExt as _};
use nexus_model::RequestId;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

const CONTEXT: &str = "cloudnexus/audit/personal/1";
/// Longer texts are cut: what a client says of itself must not keep its request from being recorded.
const MAX_TEXT: usize = 512;

/// What may identify a person.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Personal {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_address: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<String>,
}

/// An encrypted [`Personal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Names the key.
    pub subject: String,
    pub bytes: Vec<u8>,
}

/// Why a personal part can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PersonalError {
    #[error("the personal part belongs to `{theirs}`, the key to `{ours}`: fetch the key of that subject")]
    Subject { theirs: String, ours: String },
    #[error("the personal part was not encrypted with this key for this request, or it was changed")]
    Unreadable,
}

/// The key of one subject. Whoever deletes its last copy shreds the subject's personal data.
pub struct SubjectKey {
    subject: String,
    key: [u8; 32],
}

impl fmt::Debug for SubjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SubjectKey({}, …)", self.subject)
    }
}

impl SubjectKey {
    /// A new key. `subject` stays readable for ever in the records: an id, no name of a person.
    pub fn generate(subject: impl Into<String>, rng: &dyn Rng) -> Self {
        Self::from_bytes(subject, rng.bytes())
    }

    pub fn from_bytes(subject: impl Into<String>, key: [u8; 32]) -> Self {
        Self { subject: subject.into(), key }
    }

    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The key itself, which is secret: it is stored encrypted only, and never in a backup that outlives it.
    pub fn secret(&self) -> &[u8; 32] {
        &self.key
    }

    pub fn seal(&self, personal: &Personal, request: &RequestId, rng: &dyn Rng) -> Sealed {
        let cut = |text: &Option<String>| text.as_deref().map(|t| t[..t.floor_char_boundary(MAX_TEXT)].to_owned());
        let personal = Personal {
            display_name: cut(&personal.display_name),
            source_address: cut(&personal.source_address),
            user_agent: cut(&personal.user_agent),
        };
        let mut text = serde_json::to_vec(&personal).expect("three texts have a JSON form");
        let nonce: [u8; NONCE_LEN] = rng.bytes();
        self.cipher()
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), self.context(request), &mut text)
            .expect("AES-GCM seals two kilobytes");
        Sealed { subject: self.subject.clone(), bytes: [&nonce[..], &text].concat() }
    }

    pub fn open(&self, sealed: &Sealed, request: &RequestId) -> Result<Personal, PersonalError> {
        if sealed.subject != self.subject {
            return Err(PersonalError::Subject { theirs: sealed.subject.clone(), ours: self.subject.clone() });
        }
        let (nonce, text) = sealed.bytes.split_first_chunk::<NONCE_LEN>().ok_or(PersonalError::Unreadable)?;
        let mut text = text.to_vec();
        let text = self
            .cipher()
            .open_in_place(Nonce::assume_unique_for_key(*nonce), self.context(request), &mut text)
            .map_err(|_| PersonalError::Unreadable)?;
        serde_json::from_slice(text).map_err(|_| PersonalError::Unreadable)
    }

    fn cipher(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &self.key).expect("the key has the cipher's length"))
    }

    /// Neither a request id nor the context holds a newline, so the three can't be read in another way.
    fn context(&self, request: &RequestId) -> Aad<Vec<u8>> {
        Aad::from(format!("{CONTEXT}\n{request}\n{}", self.subject).into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use nexus_env::SeededRng;

    use super::*;

    #[test]
    fn only_the_subjects_key_opens_a_part_and_only_for_its_request() {
        let rng = SeededRng::new(1);
        let (ann, other) = (SubjectKey::generate("u-1", &rng), SubjectKey::generate("u-1", &rng));
        let (first, second): (RequestId, RequestId) = ("req-1".parse().unwrap(), "req-2".parse().unwrap());
        let personal = Personal {
            display_name: Some("Ann".to_owned()),
            source_address: Some("192.0.2.7".to_owned()),
            user_agent: Some("é".repeat(1000)),
        };
        let sealed = ann.seal(&personal, &first, &rng);
        let opened = ann.open(&sealed, &first).unwrap();
        assert_eq!(opened.source_address.as_deref(), Some("192.0.2.7"));
        assert_eq!(opened.user_agent.unwrap().len(), 512, "long texts are cut");
        assert_eq!(other.open(&sealed, &first), Err(PersonalError::Unreadable));
        assert_eq!(ann.open(&sealed, &second), Err(PersonalError::Unreadable));
        assert_ne!(ann.seal(&personal, &first, &rng).bytes, sealed.bytes, "equal parts don't look equal");
        let mut changed = sealed.clone();
        *changed.bytes.last_mut().unwrap() ^= 1;
        assert_eq!(ann.open(&changed, &first), Err(PersonalError::Unreadable));
        let short = Sealed { subject: "u-1".to_owned(), bytes: vec![1; 5] };
        assert_eq!(ann.open(&short, &first), Err(PersonalError::Unreadable));
        let foreign = Sealed { subject: "u-2".to_owned(), ..sealed };
        assert!(matches!(ann.open(&foreign, &first), Err(PersonalError::Subject { .. })));
    }
}
