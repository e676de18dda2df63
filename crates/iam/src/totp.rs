//! One-time passwords by time (RFC 6238: SHA-1, six digits, 30 seconds) and the codes that replace a lost device.
//!
//! SHA-1, six digits and 30 seconds are what every authenticator app understands; HMAC does not need the property of
//! SHA-1 that was broken. A code is taken one step early or late. Each code opens once: [`TotpSecret::verify`] gives the
//! step that was used, the caller stores it with the user and hands it in the next time. Six digits can be guessed, so
//! the caller throttles attempts.

use std::fmt;
use std::time::SystemTime;

use data_encoding::BASE32_NOPAD;
use percent_encoding::utf8_percent_encode;
use ring::{digest, hmac};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::{UNRESERVED, chance};

const STEP_SECS: u64 = 30;
/// Steps before and after the present one whose codes are taken.
const WINDOW: u64 = 1;
const DIGITS: usize = 6;
/// RFC 4226, section 4, R6: 160 bits are recommended.
const SECRET_BYTES: usize = 20;

const RECOVERY_CODES: usize = 10;
/// 80 random bits: can't be guessed from their hash, so a plain hash is enough.
const RECOVERY_BYTES: usize = 10;

/// Why a code does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TotpError {
    #[error("a one-time password has {DIGITS} digits")]
    Malformed,
    #[error("the one-time password is wrong: is the device's clock right?")]
    Wrong,
    #[error("this one-time password was used already: wait for the next one")]
    Used,
    #[error("a one-time password's secret has {SECRET_BYTES} bytes")]
    Secret,
}

/// What the user's device and we share. To be stored sealed; wiped when dropped.
#[derive(Clone)]
pub struct TotpSecret(Zeroizing<[u8; SECRET_BYTES]>);

impl fmt::Debug for TotpSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TotpSecret(…)")
    }
}

impl TotpSecret {
    pub fn generate() -> Self {
        Self(Zeroizing::new(chance::bytes()))
    }

    /// Reads what [`Self::expose`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TotpError> {
        Ok(Self(Zeroizing::new(bytes.try_into().map_err(|_| TotpError::Secret)?)))
    }

    pub fn expose(&self) -> &[u8] {
        self.0.as_slice()
    }

    /// For users who type it in.
    pub fn to_base32(&self) -> Zeroizing<String> {
        Zeroizing::new(BASE32_NOPAD.encode(self.0.as_slice()))
    }

    /// What is drawn as a QR code; as secret as the secret.
    pub fn uri(&self, issuer: &str, account: &str) -> Zeroizing<String> {
        let part = |text| utf8_percent_encode(text, UNRESERVED);
        Zeroizing::new(format!(
            "otpauth://totp/{}:{}?secret={}&issuer={}&algorithm=SHA1&digits={DIGITS}&period={STEP_SECS}",
            part(issuer),
            part(account),
            *self.to_base32(),
            part(issuer)
        ))
    }

    /// The code of a step.
    fn code(&self, step: u64) -> Zeroizing<String> {
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, self.0.as_slice());
        let tag = hmac::sign(&key, &step.to_be_bytes());
        let tag = tag.as_ref();
        // RFC 4226, section 5.3: the last four bits say where the 31 bits are.
        let at = usize::from(tag[tag.len() - 1] & 0xf);
        let bits = u32::from_be_bytes([tag[at] & 0x7f, tag[at + 1], tag[at + 2], tag[at + 3]]);
        Zeroizing::new(format!("{:0width$}", bits % 10u32.pow(DIGITS as u32), width = DIGITS))
    }

    /// Checks what the user typed; blanks in it don't count. Gives the step to remember as `last_used` from now on: no
    /// code of it or before opens again.
    pub fn verify(&self, typed: &str, now: SystemTime, last_used: Option<u64>) -> Result<u64, TotpError> {
        let code: Zeroizing<String> = Zeroizing::new(typed.chars().filter(|c| *c != ' ').take(DIGITS + 1).collect());
        if code.len() != DIGITS || !code.bytes().all(|b| b.is_ascii_digit()) {
            return Err(TotpError::Malformed);
        }
        let present = step_at(now);
        let mut matched = None;
        // All are compared, so that time does not tell which one it was.
        for step in present.saturating_sub(WINDOW)..=present.saturating_add(WINDOW) {
            if bool::from(self.code(step).as_bytes().ct_eq(code.as_bytes())) {
                matched = Some(step);
            }
        }
        match (matched, last_used) {
            (None, _) => Err(TotpError::Wrong),
            (Some(step), Some(last)) if step <= last => Err(TotpError::Used),
            (Some(step), _) => Ok(step),
        }
    }

    /// The code that a device shows at `now`. For tests and for tools that act as the device.
    pub fn code_at(&self, now: SystemTime) -> Zeroizing<String> {
        self.code(step_at(now))
    }
}

fn step_at(now: SystemTime) -> u64 {
    crate::unix_secs(now) / STEP_SECS
}

/// The hashes of the recovery codes that are left: what is stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RecoveryCodes(Vec<String>);

impl RecoveryCodes {
    /// Ten new codes, shown once to the user, and their hashes.
    pub fn generate() -> (Vec<Zeroizing<String>>, Self) {
        let codes: Vec<Zeroizing<String>> = (0..RECOVERY_CODES)
            .map(|_| {
                let text = BASE32_NOPAD.encode(&chance::bytes::<RECOVERY_BYTES>());
                Zeroizing::new(format!("{}-{}-{}-{}", &text[..4], &text[4..8], &text[8..12], &text[12..]))
            })
            .collect();
        let hashes = codes.iter().map(|c| hash_of(c).expect("just written in its form")).collect();
        (codes, Self(hashes))
    }

    /// As they are stored.
    pub fn from_hashes(hashes: Vec<String>) -> Self {
        Self(hashes)
    }

    pub fn into_hashes(self) -> Vec<String> {
        self.0
    }

    /// How many are left.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// Takes the code that the user typed out of the list; case, blanks and dashes don't count. The caller stores what
    /// is left before it lets the user in.
    pub fn consume(&mut self, typed: &str) -> bool {
        let Some(hash) = hash_of(typed) else { return false };
        let mut found = None;
        for (i, stored) in self.0.iter().enumerate() {
            if bool::from(stored.as_bytes().ct_eq(hash.as_bytes())) {
                found = Some(i);
            }
        }
        found.map(|i| self.0.remove(i)).is_some()
    }
}

fn hash_of(typed: &str) -> Option<String> {
    const LENGTH: usize = RECOVERY_BYTES * 8 / 5;
    let kept = typed.chars().filter(|c| !matches!(c, ' ' | '-')).take(LENGTH + 1);
    let code: Zeroizing<String> = Zeroizing::new(kept.map(|c| c.to_ascii_uppercase()).collect());
    let fits = code.len() == LENGTH && BASE32_NOPAD.decode(code.as_bytes()).is_ok();
    fits.then(|| hex::encode(digest::digest(&digest::SHA256, code.as_bytes())))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(secs: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(secs)
    }

    /// RFC 6238, appendix B, SHA-1; the last six of its eight digits.
    #[test]
    fn the_codes_are_those_of_the_rfc() {
        let secret = TotpSecret::from_bytes(b"12345678901234567890").unwrap();
        for (secs, code) in [
            (59, "287082"),
            (1_111_111_109, "081804"),
            (1_111_111_111, "050471"),
            (1_234_567_890, "005924"),
            (2_000_000_000, "279037"),
            (20_000_000_000, "353130"),
        ] {
            assert_eq!(*secret.code_at(at(secs)), code);
            assert_eq!(secret.verify(code, at(secs), None), Ok(secs / 30));
        }
    }

    #[test]
    fn a_code_opens_one_step_early_or_late_and_once() {
        let secret = TotpSecret::generate();
        let now = at(1_800_000_000);
        let code = secret.code_at(now);
        let step = secret.verify(&code, now, None).unwrap();
        assert_eq!(secret.verify(&code, now + Duration::from_secs(30), None), Ok(step));
        assert_eq!(secret.verify(&code, now - Duration::from_secs(30), None), Ok(step));
        assert_eq!(secret.verify(&format!("{} {}", &code[..3], &code[3..]), now, Some(step - 1)), Ok(step));
        assert_eq!(secret.verify(&code, now, Some(step)), Err(TotpError::Used));
        assert_eq!(secret.verify(&code, now, Some(step + 1)), Err(TotpError::Used), "an older code opens no more");
        for bad in ["", "12345", "1234567", "12345a", "１２３４５６", &"1".repeat(100_000)] {
            assert_eq!(secret.verify(bad, now, None), Err(TotpError::Malformed), "{}", bad.len());
        }
        assert!(TotpSecret::from_bytes(&[1; 19]).is_err());
        let ancient = SystemTime::UNIX_EPOCH - Duration::from_secs(9);
        assert_eq!(secret.verify(&secret.code_at(ancient), ancient, None), Ok(0), "a clock before 1970 is drawn to it");
    }

    #[test]
    fn codes_of_other_times_are_wrong() {
        let secret = TotpSecret::from_bytes(b"12345678901234567890").unwrap();
        assert_eq!(secret.verify("287082", at(1_234_567_890), None), Err(TotpError::Wrong));
        assert_eq!(secret.verify("287082", at(59 + 90), None), Err(TotpError::Wrong));
    }

    #[test]
    fn the_uri_is_what_authenticators_read() {
        let secret = TotpSecret::from_bytes(b"12345678901234567890").unwrap();
        assert_eq!(
            *secret.uri("Cloud Nexus", "ann@example.com"),
            "otpauth://totp/Cloud%20Nexus:ann%40example.com?secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ\
             &issuer=Cloud%20Nexus&algorithm=SHA1&digits=6&period=30"
        );
        assert_eq!(format!("{secret:?}"), "TotpSecret(…)");
    }

    #[test]
    fn each_recovery_code_opens_once() {
        let (codes, stored) = RecoveryCodes::generate();
        let mut stored: RecoveryCodes = serde_json::from_str(&serde_json::to_string(&stored).unwrap()).unwrap();
        assert_eq!((codes.len(), stored.left()), (10, 10));
        assert!(!stored.consume("AAAA-AAAA-AAAA-AAAA") && !stored.consume("") && !stored.consume(&"A".repeat(9999)));
        assert!(stored.consume(&codes[3].to_lowercase().replace('-', " ")));
        assert!(!stored.consume(&codes[3]));
        assert_eq!(stored.left(), 9);
        assert!(!serde_json::to_string(&stored).unwrap().contains(codes[0].as_str()));
    }
}
