//! ID tokens (OIDC Core 1.0, sections 2 and 3.1.3.7) and the tokens of CI systems, which have the same form.

use std::time::{Duration, SystemTime};

use ring::digest;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use subtle::ConstantTimeEq;

use super::FederationError;
use super::keys::{Algorithm, ProviderKeys};
use crate::jwt::jws;

/// Tokens with many groups are long.
const MAX_TOKEN: usize = 32 * 1024;
/// OIDC Core 1.0, section 2.
const MAX_SUBJECT: usize = 255;
const MAX_AUDIENCES: usize = 50;

/// A person or program as its provider knows it: the key of a user that is made at the first sign-in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Subject {
    pub issuer: String,
    pub subject: String,
}

impl Subject {
    /// 64 hexadecimal digits that stand for the pair, for use in a key of the store.
    pub fn key(&self) -> String {
        let text = format!("{}\n{}{}", self.issuer.len(), self.issuer, self.subject);
        hex::encode(digest::digest(&digest::SHA256, text.as_bytes()))
    }
}

/// What an ID token must be to be taken.
#[derive(Debug, Clone, Copy)]
pub struct IdTokenRules<'a> {
    pub issuer: &'a str,
    /// The audience: our id with the provider, or the audience agreed on with a CI system.
    pub client_id: &'a str,
    /// What was sent at the start of this sign-in. `None` only for tokens that no browser brought, as in an exchange.
    pub nonce: Option<&'a str>,
    /// The access token that came with it, which `at_hash` must fit if it is there.
    pub access_token: Option<&'a str>,
    pub now: SystemTime,
    /// How far clocks may differ.
    pub leeway: Duration,
    /// How long ago it may have been issued.
    pub max_age: Duration,
}

/// What a provider says of somebody.
#[derive(Debug, Clone, PartialEq)]
pub struct IdToken {
    pub subject: Subject,
    pub expires: SystemTime,
    /// For showing, never for finding a user.
    pub email: Option<String>,
    pub email_verified: bool,
    pub preferred_username: Option<String>,
    pub name: Option<String>,
    /// How the provider proved who it is.
    pub amr: Vec<String>,
    /// All claims, for [`super::GroupMapping`].
    pub claims: Map<String, Value>,
}

pub fn verify_id_token(token: &str, keys: &ProviderKeys, rules: &IdTokenRules<'_>) -> Result<IdToken, FederationError> {
    if token.len() > MAX_TOKEN {
        return Err(FederationError::TooLong { what: "ID token", max: MAX_TOKEN });
    }
    let parts = jws::split(token).map_err(FederationError::Malformed)?;
    let algorithm = check_header(&parts.header)?;
    let kid = match parts.header.get("kid") {
        None => None,
        Some(kid) => Some(kid.as_str().ok_or(FederationError::UnknownKey)?),
    };
    keys.verify(kid, algorithm, parts.signed.as_bytes(), &parts.signature)?;

    let claims = jws::object(&parts.payload).map_err(|e| FederationError::Malformed(e.to_string()))?;
    let needed = |key: &'static str| jws::text(&claims, key).ok_or(FederationError::Claim(key));
    if needed("iss")? != rules.issuer {
        return Err(FederationError::Issuer);
    }
    let subject = needed("sub")?;
    if subject.is_empty() || subject.len() > MAX_SUBJECT {
        return Err(FederationError::Claim("sub"));
    }
    check_audience(&claims, rules.client_id)?;
    let expires = check_times(&claims, rules)?;
    if let Some(nonce) = rules.nonce {
        let same = jws::text(&claims, "nonce").is_some_and(|n| n.as_bytes().ct_eq(nonce.as_bytes()).into());
        if !same {
            return Err(FederationError::Nonce);
        }
    }
    if let (Some(access_token), Some(hash)) = (rules.access_token, claims.get("at_hash"))
        && hash != &Value::from(at_hash(algorithm, access_token))
    {
        return Err(FederationError::AtHash);
    }
    let text = |key: &str| jws::text(&claims, key).map(|t| t.chars().take(MAX_SUBJECT).collect());
    let amr = claims.get("amr").and_then(Value::as_array).into_iter().flatten();
    Ok(IdToken {
        subject: Subject { issuer: rules.issuer.to_owned(), subject: subject.to_owned() },
        expires,
        email: text("email"),
        // Some providers send a text.
        email_verified: claims.get("email_verified").is_some_and(|v| v == &Value::Bool(true) || v == "true"),
        preferred_username: text("preferred_username"),
        name: text("name"),
        amr: amr.filter_map(Value::as_str).take(10).map(|t| t.chars().take(40).collect()).collect(),
        claims,
    })
}

fn check_header(header: &Map<String, Value>) -> Result<Algorithm, FederationError> {
    if header.contains_key("crit") {
        return Err(FederationError::Critical);
    }
    let alg = jws::text(header, "alg").unwrap_or_default();
    let algorithm = Algorithm::parse(alg).ok_or_else(|| FederationError::Algorithm(alg.chars().take(20).collect()))?;
    // Access and logout tokens of the same provider, with the same keys, say what they are here.
    match header.get("typ") {
        None => Ok(algorithm),
        Some(Value::String(typ)) if typ.eq_ignore_ascii_case("JWT") => Ok(algorithm),
        Some(_) => Err(FederationError::Type),
    }
}

fn check_audience(claims: &Map<String, Value>, client_id: &str) -> Result<(), FederationError> {
    let is_ours = |v: &Value| v == client_id;
    let several = match claims.get("aud") {
        Some(one @ Value::String(_)) if is_ours(one) => false,
        Some(Value::String(_)) => return Err(FederationError::Audience),
        Some(Value::Array(list)) if list.len() <= MAX_AUDIENCES && list.iter().all(Value::is_string) => {
            if !list.iter().any(is_ours) {
                return Err(FederationError::Audience);
            }
            list.len() > 1
        }
        _ => return Err(FederationError::Claim("aud")),
    };
    // For whom it was made, when others may see it too.
    match claims.get("azp") {
        Some(azp) if is_ours(azp) => Ok(()),
        None if !several => Ok(()),
        _ => Err(FederationError::Audience),
    }
}

/// When the token ends.
fn check_times(claims: &Map<String, Value>, rules: &IdTokenRules<'_>) -> Result<SystemTime, FederationError> {
    let (now, leeway) = (crate::unix_secs(rules.now), rules.leeway.as_secs());
    let exp = seconds(claims, "exp")?.ok_or(FederationError::Claim("exp"))?;
    let iat = seconds(claims, "iat")?.ok_or(FederationError::Claim("iat"))?;
    let nbf = seconds(claims, "nbf")?.unwrap_or(0);
    if exp.saturating_add(leeway) <= now {
        return Err(FederationError::Expired);
    }
    if iat.max(nbf) > now.saturating_add(leeway) {
        return Err(FederationError::NotYet);
    }
    if iat.saturating_add(rules.max_age.as_secs()).saturating_add(leeway) < now {
        return Err(FederationError::TooOld);
    }
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(exp)).ok_or(FederationError::Claim("exp"))
}

/// RFC 7519, section 2: seconds since 1970, which may have a fraction. Whatever else stands there is an error, not an
/// absent claim.
fn seconds(claims: &Map<String, Value>, key: &'static str) -> Result<Option<u64>, FederationError> {
    let Some(value) = claims.get(key) else { return Ok(None) };
    // Casting a float saturates.
    let float = || value.as_f64().filter(|f| f.is_finite() && *f >= 0.0).map(|f| f as u64);
    value.as_u64().or_else(float).map(Some).ok_or(FederationError::Claim(key))
}

/// The left half of the hash that belongs to the algorithm. For Ed25519 that is SHA-512 (RFC 8032), as providers do it.
fn at_hash(algorithm: Algorithm, access_token: &str) -> String {
    let by = if algorithm == Algorithm::EdDsa { &digest::SHA512 } else { &digest::SHA256 };
    let hash = digest::digest(by, access_token.as_bytes());
    jws::encode(&hash.as_ref()[..hash.as_ref().len() / 2])
}
