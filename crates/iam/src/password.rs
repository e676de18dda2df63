//! Passwords: argon2id hashes as PHC strings, and the rule that a new password must pass.
//!
//! A sign-in does the same work whether the user exists or not: [`verify`] takes an optional hash and, where there is
//! none, checks against a dummy with today's parameters. A hash costs 19 MiB of memory and tens of milliseconds, so
//! the caller bounds how many run at once and keeps them off the threads that serve others.
//!
//! Passwords are compared as the bytes that were sent: a client that sends another Unicode form of the same letters
//! sends another password.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use argon2::password_hash::phc;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::chance;

/// OWASP Password Storage Cheat Sheet, "Argon2id": 19 MiB of memory, two passes, one lane.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
const OUTPUT: usize = 32;
/// RFC 9106, section 3.1: 16 bytes of salt are recommended for passwords.
const SALT: usize = 16;

/// A stored hash may not make a sign-in dearer than this, whoever wrote it.
const MAX_MEMORY_KIB: u32 = 256 * 1024;
const MAX_PASSES: u32 = 16;
const MAX_LANES: u32 = 16;
const MAX_PHC: usize = 512;

/// Characters.
pub const MIN_LENGTH: usize = 12;
/// Bytes.
pub const MAX_BYTES: usize = 1024;
/// A shorter user name may stand in a password: it would be there by chance.
const MIN_NAME: usize = 3;
const MIN_DISTINCT: usize = 5;

/// What everybody tries first. Also refused with digits and marks around them, or repeated.
const HOPELESS: &[&str] = &[
    "abcdefghijkl",
    "abcdefghijklmnopqrstuvwxyz",
    "administrator",
    "changeme",
    "changemenow",
    "cloudnexus",
    "correcthorsebatterystaple",
    "defaultpassword",
    "iloveyou",
    "letmein",
    "letmeinplease",
    "nexus",
    "passphrase",
    "password",
    "passwort",
    "qwertyuiop",
    "qwertyuiopasdfgh",
    "qwertzuiop",
    "secret",
    "supersecret",
    "trustno",
    "welcome",
];

/// Why a password may not be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WeakPassword {
    #[error("a password has at least {MIN_LENGTH} characters: take a few words that don't belong together")]
    TooShort,
    #[error("a password has at most {MAX_BYTES} bytes")]
    TooLong,
    #[error("the password contains the user's name: choose one that nobody derives from it")]
    HasName,
    #[error("the password is one of the first that anybody tries: take a few words that don't belong together")]
    Hopeless,
}

/// Why a hash can't be made or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PasswordError {
    #[error("a password has at most {MAX_BYTES} bytes")]
    TooLong,
    #[error("the password's hash can't be made: {0}")]
    Hash(String),
    #[error("the stored text is not an argon2id hash in PHC form: {0}")]
    Stored(&'static str),
    #[error("the stored hash asks for more work than a sign-in may cost; the user needs a new password")]
    Dear,
}

/// What a user typed. Never printed; wiped when dropped.
#[derive(Clone)]
pub struct Password(Zeroizing<String>);

impl Password {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// Whether this may become the password of the user `name` (a name or an e-mail address).
    pub fn check_strength(&self, name: &str) -> Result<(), WeakPassword> {
        if self.0.len() > MAX_BYTES {
            return Err(WeakPassword::TooLong);
        }
        if self.0.chars().count() < MIN_LENGTH {
            return Err(WeakPassword::TooShort);
        }
        let lower = Zeroizing::new(self.0.to_lowercase());
        let name = name.to_lowercase();
        let local = name.split('@').next().unwrap_or_default();
        if [name.as_str(), local].iter().any(|n| n.chars().count() >= MIN_NAME && lower.contains(n)) {
            return Err(WeakPassword::HasName);
        }
        if is_hopeless(&lower) { Err(WeakPassword::Hopeless) } else { Ok(()) }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

impl<'de> Deserialize<'de> for Password {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d).map(Self::new)
    }
}

/// `lower` is in lower case.
fn is_hopeless(lower: &str) -> bool {
    let distinct: std::collections::BTreeSet<char> = lower.chars().collect();
    if distinct.len() < MIN_DISTINCT {
        return true;
    }
    // 123456789012, abcdefghijkl, 987654321098: each character follows from the one before.
    let steps = |by: i32| {
        lower.as_bytes().windows(2).all(|w| {
            let step = i32::from(w[1]) - i32::from(w[0]);
            step == by || (w[0].is_ascii_digit() && w[1].is_ascii_digit() && step == -9 * by)
        })
    };
    if steps(1) || steps(-1) {
        return true;
    }
    let core = lower.trim_matches(|c: char| !c.is_alphabetic());
    // A few letters can't carry a password, whatever stands around them, but digits inside can.
    HOPELESS.iter().any(|word| {
        let rest = core.replace(word, "");
        core.contains(word) && rest.chars().all(|c| !c.is_alphabetic())
    })
}

/// An argon2id hash in PHC form: what is stored. Not a secret like a password, but not shown either: who has it can
/// guess at leisure.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

fn hasher() -> Argon2<'static> {
    let params =
        Params::new(MEMORY_KIB, PASSES, LANES, Some(OUTPUT)).expect("the parameters are within argon2's bounds");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

impl PasswordHash {
    /// Hashes with a new salt and today's parameters. Strength is [`Password::check_strength`]'s to judge.
    pub fn of(password: &Password) -> Result<Self, PasswordError> {
        if password.0.len() > MAX_BYTES {
            return Err(PasswordError::TooLong);
        }
        let salt: [u8; SALT] = chance::bytes();
        let hash: phc::PasswordHash = hasher()
            .hash_password_with_salt(password.0.as_bytes(), &salt)
            .map_err(|e| PasswordError::Hash(e.to_string()))?;
        Ok(Self(hash.to_string()))
    }

    /// Reads what [`Self::as_str`] gave. Refuses other algorithms, and parameters that would exhaust the server.
    pub fn parse(text: &str) -> Result<Self, PasswordError> {
        let params = params_of(text)?;
        if params.m_cost() > MAX_MEMORY_KIB || params.t_cost() > MAX_PASSES || params.p_cost() > MAX_LANES {
            return Err(PasswordError::Dear);
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the password should be hashed anew at the next good sign-in: the parameters are not today's.
    pub fn needs_rehash(&self) -> bool {
        params_of(&self.0).is_ok_and(|p| {
            (p.m_cost(), p.t_cost(), p.p_cost(), p.output_len()) != (MEMORY_KIB, PASSES, LANES, Some(OUTPUT))
        })
    }

    fn matches(&self, password: &Password) -> bool {
        let hash = phc::PasswordHash::new(&self.0).expect("checked when read");
        hasher().verify_password(password.0.as_bytes(), &hash).is_ok()
    }
}

fn params_of(text: &str) -> Result<Params, PasswordError> {
    if text.len() > MAX_PHC {
        return Err(PasswordError::Stored("it is too long"));
    }
    let hash = phc::PasswordHash::new(text).map_err(|_| PasswordError::Stored("it can't be read"))?;
    if hash.algorithm.as_str() != "argon2id" {
        return Err(PasswordError::Stored("it is by another algorithm"));
    }
    if hash.version != Some(Version::V0x13.into()) {
        return Err(PasswordError::Stored("it is by another version of argon2"));
    }
    if hash.salt.is_none() || hash.hash.is_none() {
        return Err(PasswordError::Stored("its salt or its hash is missing"));
    }
    Params::try_from(&hash).map_err(|_| PasswordError::Stored("its parameters are out of bounds"))
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(…)")
    }
}

impl FromStr for PasswordHash {
    type Err = PasswordError;

    fn from_str(text: &str) -> Result<Self, PasswordError> {
        Self::parse(text)
    }
}

impl Serialize for PasswordHash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for PasswordHash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Whether `password` belongs to `stored`. With `None` (no such user, or one without a password) the answer is always
/// no, after the same work.
pub fn verify(stored: Option<&PasswordHash>, password: &Password) -> bool {
    // Hashed with a random password once: what matches it, nobody knows.
    static DUMMY: LazyLock<PasswordHash> = LazyLock::new(|| {
        let unknown = Password::new(hex::encode(chance::bytes::<32>()));
        PasswordHash::of(&unknown).expect("a short text can be hashed")
    });
    // Longer than any that could be set: no work is needed, and saying so tells nothing about the user.
    if password.0.len() > MAX_BYTES {
        return false;
    }
    let matches = stored.unwrap_or_else(|| &DUMMY).matches(password);
    matches && stored.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(text: &str) -> Password {
        Password::new(text.to_owned())
    }

    #[test]
    fn a_password_is_known_by_its_hash_alone() {
        let good = password("seven green bottles");
        let hash = PasswordHash::of(&good).unwrap();
        assert!(hash.as_str().starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{}", hash.as_str());
        let stored: PasswordHash = serde_json::from_str(&serde_json::to_string(&hash).unwrap()).unwrap();
        assert!(verify(Some(&stored), &good));
        assert!(!verify(Some(&stored), &password("seven green bottle")));
        assert!(!verify(Some(&stored), &password(&"x".repeat(MAX_BYTES + 1))));
        assert!(!verify(None, &good));
        assert!(!stored.needs_rehash());
        assert_ne!(PasswordHash::of(&good).unwrap().as_str(), hash.as_str(), "each has its own salt");
        assert_eq!(PasswordHash::of(&password(&"x".repeat(MAX_BYTES + 1))).unwrap_err(), PasswordError::TooLong);
    }

    #[test]
    fn an_older_hash_still_opens_and_wants_renewal() {
        let params = Params::new(8 * 1024, 1, 1, Some(OUTPUT)).unwrap();
        let old = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let text: phc::PasswordHash = old.hash_password_with_salt(b"seven green bottles", &[7; 16]).unwrap();
        let hash: PasswordHash = text.to_string().parse().unwrap();
        assert!(hash.needs_rehash());
        assert!(verify(Some(&hash), &password("seven green bottles")));
        assert!(!verify(Some(&hash), &password("eight green bottles")));
    }

    #[test]
    fn foreign_and_costly_hashes_are_refused() {
        let good = PasswordHash::of(&password("seven green bottles")).unwrap().as_str().to_owned();
        for (from, to) in [
            ("argon2id", "argon2i"),
            ("argon2id", "scrypt"),
            ("v=19", "v=16"),
            ("m=19456", "m=4294967295"),
            ("m=19456", "m=1048576"),
            ("t=2", "t=1000000"),
            ("m=19456,", ""),
        ] {
            let bad = good.replacen(from, to, 1);
            let outcome = bad.parse::<PasswordHash>();
            assert!(outcome.is_err() || (to.is_empty() && outcome.unwrap().as_str() == bad), "{bad}");
        }
        for bad in ["", "$argon2id$v=19$m=19456,t=2,p=1", "hunter2", &"$".repeat(10_000)] {
            assert!(bad.parse::<PasswordHash>().is_err(), "{bad}");
        }
    }

    #[test]
    fn weak_passwords_say_why() {
        let check = |text: &str| password(text).check_strength("ann.lee@example.com");
        assert_eq!(check("seven green bottles"), Ok(()));
        assert_eq!(check("kЯ9!vv2Öqпж€"), Ok(()));
        assert_eq!(check("short"), Err(WeakPassword::TooShort));
        assert_eq!(check(&"ab3de".repeat(300)), Err(WeakPassword::TooLong));
        assert_eq!(check("my name is Ann.Lee ok"), Err(WeakPassword::HasName));
        for text in [
            "aaaaaaaaaaaa",
            "abababababab",
            "123456789012",
            "098765432109",
            "abcdefghijkl",
            "Password1234",
            "passwordpassword",
            "12!cloudnexus!34",
            "CorrectHorseBatteryStaple",
            "letmein-letmein",
        ] {
            assert_eq!(check(text), Err(WeakPassword::Hopeless), "{text}");
        }
        assert_eq!(password("al is here today").check_strength("al"), Ok(()), "two letters are there by chance");
        assert_eq!(password("al is here today").check_strength(""), Ok(()));
    }

    #[test]
    fn nothing_prints_a_password() {
        let secret = password("seven green bottles");
        let hash = PasswordHash::of(&secret).unwrap();
        let shown = format!("{secret:?} {hash:?} {:?}", secret.check_strength("green"));
        assert!(!shown.contains("bottles") && !shown.contains("argon2id"), "{shown}");
    }
}
