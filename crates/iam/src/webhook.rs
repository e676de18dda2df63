//! The signature of what is told to others' servers, as Standard Webhooks 1.0 has it: HMAC-SHA256 (RFC 2104) over the
//! message's id, its time and its body, with full stops between them. Three headers carry it, so that libraries that know
//! that standard check it as it is.
//!
//! A receiver refuses a time that is far from its own, and knows a message that comes twice by its id.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac::{HMAC_SHA256, Key, sign, verify};
use zeroize::Zeroizing;

use crate::chance;

pub const ID_HEADER: &str = "webhook-id";
pub const TIME_HEADER: &str = "webhook-timestamp";
pub const SIGNATURE_HEADER: &str = "webhook-signature";

/// Before the base64 of a key's bytes.
const PREFIX: &str = "whsec_";
const VERSION: &str = "v1,";
const KEY_BYTES: usize = 32;
/// Fewer bytes are no secret.
pub const LEAST_BYTES: usize = 16;

/// Why a text is no signing key. Does not repeat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("what follows `whsec_` is not base64")]
    Base64,
    #[error("a signing key has at least {LEAST_BYTES} bytes")]
    Short,
}

/// What signs messages to one receiver.
pub struct SigningKey(Key);

impl SigningKey {
    /// A new key as a text, which is told to the receiver.
    pub fn generate() -> Zeroizing<String> {
        let bytes: Zeroizing<[u8; KEY_BYTES]> = Zeroizing::new(chance::bytes());
        let encoded = Zeroizing::new(STANDARD.encode(*bytes));
        Zeroizing::new([PREFIX, encoded.as_str()].concat())
    }

    /// From `whsec_` and base64, or any other bytes as they are.
    pub fn parse(text: &[u8]) -> Result<Self, KeyError> {
        let text = text.trim_ascii();
        let bytes = Zeroizing::new(match text.strip_prefix(PREFIX.as_bytes()) {
            Some(encoded) => STANDARD.decode(encoded).map_err(|_| KeyError::Base64)?,
            None => text.to_vec(),
        });
        if bytes.len() < LEAST_BYTES {
            return Err(KeyError::Short);
        }
        Ok(Self(Key::new(HMAC_SHA256, &bytes)))
    }

    /// The value of [`SIGNATURE_HEADER`]; `time` is in seconds since 1970.
    pub fn sign(&self, id: &str, time: u64, body: &[u8]) -> String {
        format!("{VERSION}{}", STANDARD.encode(sign(&self.0, &signed(id, time, body))))
    }

    /// Whether one of the signatures in a header's value is that of a message.
    pub fn check(&self, id: &str, time: u64, body: &[u8], header: &str) -> bool {
        let tags = header.split(' ').filter_map(|s| STANDARD.decode(s.strip_prefix(VERSION)?).ok());
        let signed = signed(id, time, body);
        tags.into_iter().any(|tag| verify(&self.0, &signed, &tag).is_ok())
    }
}

fn signed(id: &str, time: u64, body: &[u8]) -> Vec<u8> {
    [id.as_bytes(), b".", time.to_string().as_bytes(), b".", body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_that_of_the_standards_own_example() {
        let key = SigningKey::parse(b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let (id, time, body) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        let header = key.sign(id, time, body);
        assert_eq!(header, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert!(key.check(id, time, body, &header));
        assert!(
            key.check(id, time, body, &format!("v1a,x v1,AAAA {header}")),
            "a receiver that changes keys gets several"
        );
        for (other, t, b) in [("msg_x", time, &body[..]), (id, time + 1, body), (id, time, b"{}")] {
            assert!(!key.check(other, t, b, &header));
        }
        for wrong in ["", "v1,", "v1,!", "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="] {
            assert!(!key.check(id, time, body, wrong), "{wrong}");
        }
        let other = SigningKey::parse(b"a key of no particular form").unwrap();
        assert!(!other.check(id, time, body, &header));
    }

    #[test]
    fn a_key_is_made_read_back_and_long_enough() {
        let (one, two) = (SigningKey::generate(), SigningKey::generate());
        assert!(one.starts_with("whsec_") && *one != *two);
        let with_line = [one.as_bytes(), b"\n"].concat();
        let signed = SigningKey::parse(&with_line).unwrap().sign("a", 1, b"b");
        assert!(SigningKey::parse(one.as_bytes()).unwrap().check("a", 1, b"b", &signed));
        assert_eq!(SigningKey::parse(b"short").err(), Some(KeyError::Short));
        assert_eq!(SigningKey::parse(b"whsec_c2hvcnQ=").err(), Some(KeyError::Short));
        assert_eq!(SigningKey::parse(b"whsec_!").err(), Some(KeyError::Base64));
    }
}
