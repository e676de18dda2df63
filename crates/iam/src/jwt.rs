//! Access tokens: JWTs (RFC 7519, RFC 9068) signed with Ed25519 (RFC 8037), and the keys that sign and check them.
//!
//! A token lives for minutes and carries all that its holder may be judged by; whoever has the [`KeySet`] checks it
//! without asking. What is accepted is exactly what [`SigningKey::sign`] makes: the header holds `alg` (`EdDSA`), `typ`
//! (`at+jwt`) and `kid`, and nothing else, so that a token can't choose its algorithm, bring its own key, or be one
//! that was made for another purpose. A key's id is its thumbprint (RFC 7638), so a key can't stand under the name of
//! another.
//!
//! The signature is ring's. The crate `jsonwebtoken` was weighed: since its tenth version it brings aws-lc or a second
//! family of cryptography in place of ring, reads the clock itself, and leaves `typ`, `crit` and repeated keys to its
//! caller; what remained of it would be the split at the dots.

pub(crate) mod jws;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PKCS_ED25519};
use ring::digest;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zeroize::Zeroizing;

/// Bytes of a token; more is refused unread.
pub const MAX_TOKEN: usize = 8 * 1024;
/// Keys of one set: the present one, the next, and some that only check.
pub const MAX_KEYS: usize = 64;
const MAX_JWKS: usize = 64 * 1024;
/// How many may have acted for one another.
const MAX_ACTORS: usize = 4;
const ALG: &str = "EdDSA";
/// RFC 9068, section 2.1: says that this is an access token and no other kind of JWT.
const TYP: &str = "at+jwt";

/// Why a token is refused. Never repeats the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("a token has at most {MAX_TOKEN} bytes, this one has {0}")]
    TooLong(usize),
    #[error("the token can't be read: {0}. Was it copied whole?")]
    Malformed(String),
    #[error("the token is signed by `{0}`: only `{ALG}` is taken")]
    Algorithm(String),
    #[error("the token is not an access token: its `typ` must be `{TYP}`")]
    Type,
    #[error("the token demands extensions (`crit`), and none is understood")]
    Critical,
    #[error("the token's header holds `{0}`, which an access token of ours does not have")]
    Header(String),
    #[error("no key with the token's `kid` is known: it is by another server, or its key was retired. Sign in again")]
    UnknownKey,
    #[error("the token's signature is wrong")]
    Signature,
    #[error("the token's claims can't be read: {0}")]
    Claims(String),
    #[error("the token is by another issuer")]
    Issuer,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token has expired: refresh it or sign in again")]
    Expired,
    #[error("the token is not valid yet: are the clocks right?")]
    NotYet,
}

/// Why a key or a set of keys can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("making the signing key failed: {0}")]
    Generate(String),
    #[error("the signing key can't be read: it must be an Ed25519 key as PKCS #8 in PEM")]
    Unreadable,
    #[error("a set has at most {MAX_KEYS} keys")]
    TooMany,
    #[error("the key set can't be read: {0}")]
    Set(String),
    #[error("a token would have more than {MAX_TOKEN} bytes: the user is in too many groups")]
    TooLong,
}

/// Who acts for the subject (RFC 8693, section 4.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    pub sub: String,
    /// For whom that one acted in turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Box<Actor>>,
}

/// What a token says. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub iss: String,
    pub sub: String,
    pub aud: String,
    pub exp: u64,
    pub nbf: u64,
    pub iat: u64,
    /// Names this token alone.
    pub jti: String,
    /// The session or credential that it came from: what a revocation names.
    pub sid: String,
    /// The organization.
    pub org: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// The only project that the token opens, if it is bound to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// How the subject proved itself (RFC 8176), such as `pwd` and `otp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub amr: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Actor>,
}

/// A new `jti` or session id: 128 random bits.
pub fn random_id() -> String {
    jws::encode(crate::chance::bytes::<16>())
}

/// A key that signs tokens. Its text is secret.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    pem: Zeroizing<String>,
    public: VerifyingKey,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("kid", &self.public.kid).finish_non_exhaustive()
    }
}

impl SigningKey {
    pub fn generate() -> Result<Self, KeyError> {
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(|e| KeyError::Generate(e.to_string()))?;
        Self::from_pem(&Zeroizing::new(pair.serialize_pem()))
    }

    /// Reads PKCS #8 in PEM.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| KeyError::Unreadable)?;
        let pair =
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).map_err(|_| KeyError::Unreadable)?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| KeyError::Unreadable)?;
        Ok(Self { pair, pem: Zeroizing::new(pem.to_owned()), public: VerifyingKey::new(public) })
    }

    pub fn to_pem(&self) -> &str {
        &self.pem
    }

    pub fn kid(&self) -> &str {
        &self.public.kid
    }

    pub fn public(&self) -> &VerifyingKey {
        &self.public
    }

    pub fn sign(&self, claims: &Claims) -> Result<String, KeyError> {
        let header = json!({"alg": ALG, "typ": TYP, "kid": self.kid()}).to_string();
        let payload = serde_json::to_string(claims).expect("claims are plain data");
        let token = self.sign_parts(&header, &payload);
        if token.len() > MAX_TOKEN { Err(KeyError::TooLong) } else { Ok(token) }
    }

    /// Signs whatever it is given.
    fn sign_parts(&self, header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", jws::encode(header), jws::encode(payload));
        let signature = jws::encode(self.pair.sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }
}

/// The public half of a [`SigningKey`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyingKey {
    kid: String,
    bytes: [u8; 32],
}

impl VerifyingKey {
    pub fn new(bytes: [u8; 32]) -> Self {
        // RFC 7638: the required members in alphabetical order, without blanks.
        let members = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, jws::encode(bytes));
        Self { kid: jws::encode(digest::digest(&digest::SHA256, members.as_bytes())), bytes }
    }

    /// The thumbprint.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    fn to_jwk(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "alg": ALG, "use": "sig", "kid": self.kid, "x": jws::encode(self.bytes)})
    }

    fn from_jwk(jwk: &Value) -> Result<Self, String> {
        let member = |key: &str| jwk.get(key).and_then(Value::as_str);
        if (member("kty"), member("crv")) != (Some("OKP"), Some("Ed25519")) {
            return Err("every key must be an Ed25519 key".to_owned());
        }
        if jwk.get("d").is_some() {
            return Err("it holds a private key, which must not be published".to_owned());
        }
        let bytes = jws::decode(member("x").ok_or("a key has no `x`")?, "`x`")?;
        let key = Self::new(bytes.try_into().map_err(|_| "an Ed25519 key has 32 bytes")?);
        // `alg` and `use` may be left out, but may not say something else.
        let allows = |member: &str, only: &str| jwk.get(member).is_none_or(|v| v == only);
        if !allows("kid", &key.kid) || !allows("alg", ALG) || !allows("use", "sig") {
            return Err("a key's `kid` must be its thumbprint, its `alg` EdDSA and its `use` sig".to_owned());
        }
        Ok(key)
    }
}

/// The keys whose tokens are believed, by id. As JSON it is a JWK set (RFC 7517, section 5).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySet(BTreeMap<String, VerifyingKey>);

impl KeySet {
    /// Adding a key that is there already changes nothing.
    pub fn insert(&mut self, key: VerifyingKey) -> Result<(), KeyError> {
        if self.0.len() >= MAX_KEYS && !self.0.contains_key(&key.kid) {
            return Err(KeyError::TooMany);
        }
        self.0.insert(key.kid.clone(), key);
        Ok(())
    }

    /// Tokens by this key are refused from now on.
    pub fn remove(&mut self, kid: &str) -> Option<VerifyingKey> {
        self.0.remove(kid)
    }

    pub fn get(&self, kid: &str) -> Option<&VerifyingKey> {
        self.0.get(kid)
    }

    pub fn iter(&self) -> impl Iterator<Item = &VerifyingKey> {
        self.0.values()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `{"keys": […]}`, for `/.well-known/jwks.json`.
    pub fn to_jwks(&self) -> Value {
        json!({"keys": self.iter().map(VerifyingKey::to_jwk).collect::<Vec<_>>()})
    }

    /// Reads what another server of the cluster published. A provider's keys are read by [`crate::federation`].
    pub fn from_jwks(bytes: &[u8]) -> Result<Self, KeyError> {
        if bytes.len() > MAX_JWKS {
            return Err(KeyError::Set(format!("it has more than {MAX_JWKS} bytes")));
        }
        let set = jws::object(bytes).map_err(|e| KeyError::Set(e.to_string()))?;
        let keys = set.get("keys").and_then(Value::as_array);
        let keys = keys.ok_or_else(|| KeyError::Set("it has no list `keys`".to_owned()))?;
        let mut found = Self::default();
        for jwk in keys {
            found.insert(VerifyingKey::from_jwk(jwk).map_err(KeyError::Set)?)?;
        }
        Ok(found)
    }
}

impl FromIterator<VerifyingKey> for KeySet {
    /// Takes the first [`MAX_KEYS`].
    fn from_iter<I: IntoIterator<Item = VerifyingKey>>(keys: I) -> Self {
        Self(keys.into_iter().take(MAX_KEYS).map(|key| (key.kid.clone(), key)).collect())
    }
}

impl Serialize for KeySet {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.to_jwks().serialize(s)
    }
}

impl<'de> Deserialize<'de> for KeySet {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(d)?;
        Self::from_jwks(value.to_string().as_bytes()).map_err(serde::de::Error::custom)
    }
}

/// What a token must be to be taken.
#[derive(Debug, Clone, Copy)]
pub struct Expectations<'a> {
    pub issuer: &'a str,
    pub audience: &'a str,
    pub now: SystemTime,
    /// How far clocks may differ.
    pub leeway: Duration,
}

/// Checks a token, cheap checks first; claims are read only once the signature is known to be good.
///
/// Revocation is the caller's: this says that the token was given, not that its session still stands.
pub fn verify(token: &str, keys: &KeySet, expected: Expectations<'_>) -> Result<Claims, JwtError> {
    if token.len() > MAX_TOKEN {
        return Err(JwtError::TooLong(token.len()));
    }
    let parts = jws::split(token).map_err(JwtError::Malformed)?;
    let key = key_for(&parts, keys)?;
    let public = UnparsedPublicKey::new(&ED25519, key.bytes);
    public.verify(parts.signed.as_bytes(), &parts.signature).map_err(|_| JwtError::Signature)?;

    let claims = jws::object(&parts.payload).map_err(|e| JwtError::Claims(e.to_string()))?;
    let claims: Claims = serde_json::from_value(claims.into()).map_err(|e| JwtError::Claims(e.to_string()))?;
    check_shape(&claims)?;
    if claims.iss != expected.issuer {
        return Err(JwtError::Issuer);
    }
    if claims.aud != expected.audience {
        return Err(JwtError::Audience);
    }
    let (now, leeway) = (crate::unix_secs(expected.now), expected.leeway.as_secs());
    if claims.exp.saturating_add(leeway) <= now {
        return Err(JwtError::Expired);
    }
    if claims.nbf.max(claims.iat) > now.saturating_add(leeway) {
        return Err(JwtError::NotYet);
    }
    Ok(claims)
}

/// The key that the header names, after the header was found to be one of ours.
fn key_for<'k>(parts: &jws::Compact<'_>, keys: &'k KeySet) -> Result<&'k VerifyingKey, JwtError> {
    let header = &parts.header;
    if header.contains_key("crit") {
        return Err(JwtError::Critical);
    }
    match jws::text(header, "alg") {
        Some(ALG) => {}
        other => return Err(JwtError::Algorithm(other.unwrap_or_default().chars().take(20).collect())),
    }
    if jws::text(header, "typ") != Some(TYP) {
        return Err(JwtError::Type);
    }
    if let Some(other) = header.keys().find(|k| !matches!(k.as_str(), "alg" | "typ" | "kid")) {
        return Err(JwtError::Header(other.chars().take(20).collect()));
    }
    jws::text(header, "kid").and_then(|kid| keys.get(kid)).ok_or(JwtError::UnknownKey)
}

fn check_shape(claims: &Claims) -> Result<(), JwtError> {
    let wrong = |text: &str| Err(JwtError::Claims(text.to_owned()));
    if [&claims.sub, &claims.jti, &claims.sid, &claims.org].iter().any(|text| text.is_empty()) {
        return wrong("sub, jti, sid and org must not be empty");
    }
    if claims.exp <= claims.iat {
        return wrong("it expired before it was issued");
    }
    let mut actors = 0;
    let mut next = claims.act.as_ref();
    while let Some(actor) = next {
        actors += 1;
        next = actor.act.as_deref();
    }
    if actors > MAX_ACTORS { wrong("too many act for one another") } else { Ok(()) }
}

#[cfg(test)]
mod tests;
