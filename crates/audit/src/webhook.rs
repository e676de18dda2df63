//! The signature of what is sent to a webhook, so that whoever receives it knows who sent it and when.
//!
//! HMAC-SHA256 (RFC 2104) over the time, a full stop and the body, with a secret that both know. The header is
//! `t={seconds since 1970},v1={64 hexadecimal digits}`. A receiver refuses an old time, and compares in constant time.

use ring::hmac::{HMAC_SHA256, Key, sign, verify};

/// The header that carries it.
pub const SIGNATURE_HEADER: &str = "nexus-signature";

fn signed(time: u64, body: &[u8]) -> Vec<u8> {
    [time.to_string().as_bytes(), b".", body].concat()
}

/// The header's value.
pub fn signature(secret: &[u8], time: u64, body: &[u8]) -> String {
    let tag = sign(&Key::new(HMAC_SHA256, secret), &signed(time, body));
    format!("t={time},v1={}", hex::encode(tag))
}

/// Whether a header's value is that of the body; its time if so, which the receiver compares with its clock.
pub fn check(secret: &[u8], header: &str, body: &[u8]) -> Option<u64> {
    let (time, tag) = header.strip_prefix("t=")?.split_once(",v1=")?;
    let time: u64 = time.parse().ok()?;
    let tag = hex::decode(tag).ok()?;
    verify(&Key::new(HMAC_SHA256, secret), &signed(time, body), &tag).ok()?;
    Some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_of_one_body_time_and_secret() {
        let header = signature(b"secret", 1_700_000_000, b"body");
        assert_eq!(check(b"secret", &header, b"body"), Some(1_700_000_000));
        assert_eq!(check(b"secret", &header, b"bodx"), None);
        assert_eq!(check(b"other", &header, b"body"), None);
        assert_eq!(check(b"secret", &header.replace("t=17", "t=18"), b"body"), None);
        for wrong in ["", "t=1", "t=x,v1=00", "t=1,v1=zz"] {
            assert_eq!(check(b"secret", wrong, b"body"), None, "{wrong}");
        }
        // RFC 4231, test case 2.
        let known = sign(&Key::new(HMAC_SHA256, b"Jefe"), b"what do ya want for nothing?");
        let tag = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hex::encode(known), tag);
    }
}
