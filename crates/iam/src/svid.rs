//! JWT-SVIDs: tokens by which one workload proves to another who it is (SPIFFE, JWT-SVID, version 1).
//!
//! A token names its holder (`sub`, a SPIFFE id), those whom it is for (`aud`) and its end (`exp`), a few minutes on. It is
//! signed with ES256, which every library knows. Any server signs, each with a key of its own; the public halves together
//! are the trust domain's [`JwtBundle`], in which every key says that it is for this and nothing else (`use: jwt-svid`). A
//! key's id is its thumbprint (RFC 7638), so a key can't stand under the name of another.
//!
//! What is accepted is what [`SvidKey::sign`] makes: the header holds `alg`, `kid` and perhaps `typ`, so that a token can't
//! choose its algorithm or bring its own key. The access tokens of [`crate::jwt`] are signed by other keys with another
//! algorithm and have another `typ`: neither is ever taken for the other.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use ring::digest;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use crate::chance::generator;
use crate::id::SpiffeId;
use crate::jwt::jws;

/// Bytes of a token; more is refused unread.
pub const MAX_TOKEN: usize = 8 * 1024;
/// Keys of one bundle: one for each server of all regions.
pub const MAX_KEYS: usize = 1024;
/// Bytes of a bundle.
pub const MAX_JWKS: usize = 512 * 1024;
/// For how many a token may be at once.
pub const MAX_AUDIENCES: usize = 8;
/// Bytes of the name of one of them.
pub const MAX_AUDIENCE: usize = 512;
/// How long tokens are good: JWT-SVIDs can't be taken back, so minutes.
pub const LIFE: Duration = Duration::from_secs(5 * 60);
/// How far clocks may differ.
pub const LEEWAY: Duration = Duration::from_secs(30);

const ALG: &str = "ES256";

/// Why a token is not made, or not taken. Never repeats the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    #[error("name whom the token is for: at least one audience is needed")]
    NoAudience,
    #[error("a token is for {MAX_AUDIENCES} audiences at most: ask for several tokens")]
    Audiences,
    #[error("an audience has 1 to {MAX_AUDIENCE} bytes")]
    AudienceLength,
    #[error("signing failed: the system gives no random bytes")]
    Signing,
    #[error("a token has at most {MAX_TOKEN} bytes, this one has {0}")]
    TooLong(usize),
    #[error("the token can't be read: {0}. Was it copied whole?")]
    Malformed(String),
    #[error("the token is signed by `{0}`: only `{ALG}` is taken")]
    Algorithm(String),
    #[error("the token's header holds `{0}`, which a JWT-SVID of this trust domain does not have")]
    Header(String),
    #[error("no key with the token's `kid` is in the trust domain's bundle")]
    UnknownKey,
    #[error("the token's signature is wrong")]
    Signature,
    #[error("the token's claims can't be read: {0}")]
    Claims(String),
    #[error("the token's subject is not a SPIFFE id of the trust domain `{0}`")]
    Subject(String),
    #[error("the token is for another audience")]
    Audience,
    #[error("the token has expired: fetch a new one")]
    Expired,
    #[error("the token is not valid yet: are the clocks right?")]
    NotYet,
}

/// Why a key or a bundle can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SvidKeyError {
    #[error("making the key for workloads' tokens failed: {0}")]
    Generate(String),
    #[error("the key for workloads' tokens can't be read: it must be a P-256 key as PKCS #8 in PEM")]
    Unreadable,
    #[error("a bundle has at most {MAX_KEYS} keys")]
    TooMany,
    #[error("the bundle can't be read: {0}")]
    Bundle(String),
}

/// Checks for whom a token is asked.
pub fn check_audiences(audiences: &[String]) -> Result<(), SvidError> {
    if audiences.is_empty() {
        return Err(SvidError::NoAudience);
    }
    if audiences.len() > MAX_AUDIENCES {
        return Err(SvidError::Audiences);
    }
    if audiences.iter().any(|a| a.is_empty() || a.len() > MAX_AUDIENCE) {
        return Err(SvidError::AudienceLength);
    }
    Ok(())
}

/// A key that signs workloads' tokens. Its text is secret.
pub struct SvidKey {
    pair: EcdsaKeyPair,
    pem: Zeroizing<String>,
    public: SvidPublicKey,
}

impl fmt::Debug for SvidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvidKey").field("kid", &self.public.kid).finish_non_exhaustive()
    }
}

impl SvidKey {
    pub fn generate() -> Result<Self, SvidKeyError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| SvidKeyError::Generate(e.to_string()))?;
        Self::from_pem(&Zeroizing::new(pair.serialize_pem()))
    }

    /// Reads PKCS #8 in PEM.
    pub fn from_pem(pem: &str) -> Result<Self, SvidKeyError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| SvidKeyError::Unreadable)?;
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, generator());
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, der.secret_pkcs8_der(), &random)
            .map_err(|_| SvidKeyError::Unreadable)?;
        let public = SvidPublicKey::from_point(pair.public_key().as_ref()).ok_or(SvidKeyError::Unreadable)?;
        Ok(Self { pair, pem: Zeroizing::new(pem.to_owned()), public })
    }

    pub fn to_pem(&self) -> &str {
        &self.pem
    }

    pub fn public(&self) -> &SvidPublicKey {
        &self.public
    }

    /// A token of `id` for `audiences`, good from `now` for `life`.
    pub fn sign(
        &self,
        id: &SpiffeId,
        audiences: &[String],
        now: SystemTime,
        life: Duration,
    ) -> Result<String, SvidError> {
        check_audiences(audiences)?;
        let issued = crate::unix_secs(now);
        let claims = json!({"sub": id, "aud": audiences, "iat": issued, "exp": issued + life.as_secs()});
        self.sign_parts(&json!({"alg": ALG, "typ": "JWT", "kid": self.public.kid}), &claims)
    }

    /// Signs whatever it is given.
    fn sign_parts(&self, header: &Value, claims: &Value) -> Result<String, SvidError> {
        let signed = format!("{}.{}", jws::encode(header.to_string()), jws::encode(claims.to_string()));
        let signature = self.pair.sign(&generator(), signed.as_bytes()).map_err(|_| SvidError::Signing)?;
        Ok(format!("{signed}.{}", jws::encode(signature)))
    }
}

/// The public half of a [`SvidKey`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SvidPublicKey {
    kid: String,
    /// An uncompressed point.
    point: [u8; 65],
}

impl SvidPublicKey {
    fn from_point(point: &[u8]) -> Option<Self> {
        let point: [u8; 65] = point.try_into().ok()?;
        if point[0] != 4 {
            return None;
        }
        let (x, y) = (jws::encode(&point[1..33]), jws::encode(&point[33..]));
        // RFC 7638: the required members in alphabetical order, without blanks.
        let members = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
        Some(Self { kid: jws::encode(digest::digest(&digest::SHA256, members.as_bytes())), point })
    }

    /// The thumbprint.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    pub fn to_jwk(&self) -> Value {
        let (x, y) = (jws::encode(&self.point[1..33]), jws::encode(&self.point[33..]));
        json!({"kty": "EC", "crv": "P-256", "alg": ALG, "use": "jwt-svid", "kid": self.kid, "x": x, "y": y})
    }

    /// Reads a key that another server published.
    pub fn from_jwk(jwk: &Value) -> Result<Self, SvidKeyError> {
        let wrong = |why: &str| SvidKeyError::Bundle(why.to_owned());
        let member = |key: &str| jwk.get(key).and_then(Value::as_str);
        if (member("kty"), member("crv")) != (Some("EC"), Some("P-256")) {
            return Err(wrong("every key must be a P-256 key"));
        }
        if jwk.get("d").is_some() {
            return Err(wrong("it holds a private key, which must not be published"));
        }
        let coordinate = |key: &str| {
            let bytes = jws::decode(member(key).unwrap_or_default(), key).map_err(SvidKeyError::Bundle)?;
            if bytes.len() == 32 { Ok(bytes) } else { Err(wrong("a coordinate has 32 bytes")) }
        };
        let (x, y) = (coordinate("x")?, coordinate("y")?);
        let point = [&[4], x.as_slice(), &y].concat();
        let key = Self::from_point(&point).ok_or_else(|| wrong("a point has 65 bytes"))?;
        // `alg` may be left out, but may not say something else.
        let allows = |member: &str, only: &str| jwk.get(member).is_none_or(|v| v == only);
        if !allows("kid", &key.kid) || !allows("alg", ALG) || member("use") != Some("jwt-svid") {
            return Err(wrong("a key's `kid` must be its thumbprint, its `alg` ES256 and its `use` jwt-svid"));
        }
        Ok(key)
    }
}

/// The keys whose tokens are believed, by id. As JSON it is a JWK set (RFC 7517, section 5; SPIFFE Trust Domain and
/// Bundle, section 4).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JwtBundle(BTreeMap<String, SvidPublicKey>);

impl JwtBundle {
    /// Adding a key that is there already changes nothing.
    pub fn insert(&mut self, key: SvidPublicKey) -> Result<(), SvidKeyError> {
        if self.0.len() >= MAX_KEYS && !self.0.contains_key(&key.kid) {
            return Err(SvidKeyError::TooMany);
        }
        self.0.insert(key.kid.clone(), key);
        Ok(())
    }

    pub fn get(&self, kid: &str) -> Option<&SvidPublicKey> {
        self.0.get(kid)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn to_jwks(&self) -> Value {
        json!({"keys": self.0.values().map(SvidPublicKey::to_jwk).collect::<Vec<_>>()})
    }

    pub fn from_jwks(bytes: &[u8]) -> Result<Self, SvidKeyError> {
        if bytes.len() > MAX_JWKS {
            return Err(SvidKeyError::Bundle(format!("it has more than {MAX_JWKS} bytes")));
        }
        let set = jws::object(bytes).map_err(|e| SvidKeyError::Bundle(e.to_string()))?;
        let keys = set.get("keys").and_then(Value::as_array);
        let mut found = Self::default();
        for jwk in keys.ok_or_else(|| SvidKeyError::Bundle("it has no list `keys`".to_owned()))? {
            found.insert(SvidPublicKey::from_jwk(jwk)?)?;
        }
        Ok(found)
    }
}

/// Checks a token for `audience`, cheap checks first, and returns whose it is and all that it claims.
pub fn verify(
    token: &str,
    bundle: &JwtBundle,
    trust_domain: &str,
    audience: &str,
    now: SystemTime,
) -> Result<(SpiffeId, Map<String, Value>), SvidError> {
    if token.len() > MAX_TOKEN {
        return Err(SvidError::TooLong(token.len()));
    }
    let parts = jws::split(token).map_err(SvidError::Malformed)?;
    let key = key_for(&parts.header, bundle)?;
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.point);
    public.verify(parts.signed.as_bytes(), &parts.signature).map_err(|_| SvidError::Signature)?;

    let claims = jws::object(&parts.payload).map_err(|e| SvidError::Claims(e.to_string()))?;
    let id = jws::text(&claims, "sub").and_then(|sub| sub.parse::<SpiffeId>().ok());
    let id = id.filter(|id| id.trust_domain() == trust_domain);
    let id = id.ok_or_else(|| SvidError::Subject(trust_domain.to_owned()))?;
    let is_for = match claims.get("aud") {
        Some(Value::String(one)) => one == audience,
        Some(Value::Array(several)) => several.iter().any(|one| one == audience),
        _ => false,
    };
    if !is_for {
        return Err(SvidError::Audience);
    }
    let (now, leeway) = (crate::unix_secs(now), LEEWAY.as_secs());
    let exp = claims.get("exp").and_then(Value::as_u64);
    let exp = exp.ok_or_else(|| SvidError::Claims("`exp` must be a number of seconds".to_owned()))?;
    // No leeway: its holder gets a new one long before.
    if exp <= now {
        return Err(SvidError::Expired);
    }
    for from in ["iat", "nbf"] {
        let Some(from) = claims.get(from) else { continue };
        let from = from.as_u64().ok_or_else(|| SvidError::Claims("`iat` and `nbf` must be numbers".to_owned()))?;
        if from > now.saturating_add(leeway) {
            return Err(SvidError::NotYet);
        }
    }
    Ok((id, claims))
}

/// The key that the header names, after the header was found to be one of ours.
fn key_for<'k>(header: &Map<String, Value>, bundle: &'k JwtBundle) -> Result<&'k SvidPublicKey, SvidError> {
    match jws::text(header, "alg") {
        Some(ALG) => {}
        other => return Err(SvidError::Algorithm(other.unwrap_or_default().chars().take(20).collect())),
    }
    let typ = header.get("typ").is_none_or(|typ| typ == "JWT" || typ == "JOSE");
    let strange = header.keys().find(|k| !(matches!(k.as_str(), "alg" | "kid") || *k == "typ" && typ));
    if let Some(other) = strange {
        return Err(SvidError::Header(other.chars().take(20).collect()));
    }
    jws::text(header, "kid").and_then(|kid| bundle.get(kid)).ok_or(SvidError::UnknownKey)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn id() -> SpiffeId {
        SpiffeId::workload("home", "shop", "web").unwrap()
    }

    fn made() -> (SvidKey, JwtBundle) {
        let key = SvidKey::generate().unwrap();
        let mut bundle = JwtBundle::default();
        bundle.insert(key.public().clone()).unwrap();
        (key, bundle)
    }

    fn aud(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn a_token_proves_its_holder_to_those_it_is_for_until_it_ends() {
        let (key, bundle) = made();
        let token = key.sign(&id(), &aud(&["db", "cache"]), now(), LIFE).unwrap();
        let check = |audience: &str, at: SystemTime| verify(&token, &bundle, "home", audience, at);
        let (who, claims) = check("db", now()).unwrap();
        assert_eq!((who, claims["aud"][1].as_str()), (id(), Some("cache")));
        assert!(check("cache", now() + LIFE - Duration::from_secs(1)).is_ok());
        assert_eq!(check("db", now() + LIFE).unwrap_err(), SvidError::Expired);
        assert_eq!(check("db", now() - 2 * LEEWAY).unwrap_err(), SvidError::NotYet);
        assert_eq!(check("mail", now()).unwrap_err(), SvidError::Audience);
        let elsewhere = verify(&token, &bundle, "away", "db", now());
        assert_eq!(elsewhere.unwrap_err(), SvidError::Subject("away".into()));
    }

    #[test]
    fn what_others_signed_or_changed_is_refused() {
        let (key, bundle) = made();
        let (stranger, _) = made();
        let good = key.sign(&id(), &aud(&["db"]), now(), LIFE).unwrap();
        let check = |token: &str| verify(token, &bundle, "home", "db", now()).unwrap_err();
        let theirs = stranger.sign(&id(), &aud(&["db"]), now(), LIFE).unwrap();
        assert_eq!(check(&theirs), SvidError::UnknownKey);

        let claims = json!({"sub": id(), "aud": ["db"], "exp": 1_900_000_000});
        let kid = key.public().kid();
        let forged = stranger.sign_parts(&json!({"alg": "ES256", "kid": kid}), &claims).unwrap();
        assert_eq!(check(&forged), SvidError::Signature);
        let with = |header: Value| check(&key.sign_parts(&header, &claims).unwrap());
        assert_eq!(with(json!({"alg": "none", "kid": kid})), SvidError::Algorithm("none".into()));
        assert_eq!(with(json!({"alg": "HS256", "kid": kid})), SvidError::Algorithm("HS256".into()));
        assert_eq!(with(json!({"alg": "ES256"})), SvidError::UnknownKey);
        assert_eq!(with(json!({"alg": "ES256", "kid": kid, "jwk": {}})), SvidError::Header("jwk".into()));
        assert_eq!(with(json!({"alg": "ES256", "kid": kid, "crit": ["x"]})), SvidError::Header("crit".into()));
        assert_eq!(with(json!({"alg": "ES256", "kid": kid, "typ": "at+jwt"})), SvidError::Header("typ".into()));

        let header = json!({"alg": "ES256", "kid": kid, "typ": "JOSE"});
        let says = |claims: Value| verify(&key.sign_parts(&header, &claims).unwrap(), &bundle, "home", "db", now());
        assert!(says(json!({"sub": id(), "aud": "db", "exp": 1_800_000_001})).is_ok());
        assert!(matches!(says(json!({"sub": id(), "aud": "db"})), Err(SvidError::Claims(_))), "it must end");
        assert!(matches!(says(json!({"sub": "web", "aud": "db", "exp": 1_800_000_001})), Err(SvidError::Subject(_))));
        assert_eq!(says(json!({"sub": id(), "exp": 1_800_000_001})).unwrap_err(), SvidError::Audience);

        assert!(matches!(check(&good[..good.len() - 6]), SvidError::Signature | SvidError::Malformed(_)));
        assert_eq!(check(&"x".repeat(9000)), SvidError::TooLong(9000));
        // A token for users, whatever it says, is none for workloads.
        let user = crate::jwt::SigningKey::generate().unwrap();
        assert!(bundle.get(user.kid()).is_none());
    }

    #[test]
    fn audiences_are_few_and_short() {
        let (key, _) = made();
        let sign = |names: &[String]| key.sign(&id(), names, now(), LIFE);
        assert_eq!(sign(&[]).unwrap_err(), SvidError::NoAudience);
        assert_eq!(sign(&aud(&[""])).unwrap_err(), SvidError::AudienceLength);
        assert_eq!(sign(&["a".repeat(513)]).unwrap_err(), SvidError::AudienceLength);
        assert_eq!(sign(&vec!["a".to_owned(); 9]).unwrap_err(), SvidError::Audiences);
        assert!(sign(&vec!["a".repeat(512); 8]).unwrap().len() < MAX_TOKEN);
    }

    #[test]
    fn keys_and_bundles_read_back_as_written() {
        let (key, bundle) = made();
        let again = SvidKey::from_pem(key.to_pem()).unwrap();
        assert_eq!(again.public(), key.public());
        assert!(!format!("{key:?}").contains("PRIVATE"));
        assert!(SvidKey::from_pem("nothing").is_err());
        let user = crate::jwt::SigningKey::generate().unwrap();
        assert_eq!(SvidKey::from_pem(user.to_pem()).unwrap_err(), SvidKeyError::Unreadable);

        let jwks = bundle.to_jwks();
        assert_eq!(JwtBundle::from_jwks(jwks.to_string().as_bytes()).unwrap(), bundle);
        assert_eq!(jwks["keys"][0]["use"], "jwt-svid");
        for (member, value) in [("kid", "another"), ("alg", "RS256"), ("use", "sig"), ("d", "AA"), ("x", "AA")] {
            let mut bad = jwks.clone();
            bad["keys"][0][member] = value.into();
            assert!(JwtBundle::from_jwks(bad.to_string().as_bytes()).is_err(), "{member}");
        }
        assert!(JwtBundle::from_jwks(b"{}").is_err());
        assert!(JwtBundle::from_jwks(&vec![b' '; MAX_JWKS + 1]).is_err());
    }
}
