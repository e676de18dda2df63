//! The other side: signs requests of our own command line and of tests.

use std::fmt;
use std::time::{Duration, SystemTime};

use ring::hmac;

use super::{
    ALGORITHM, MAX_PRESIGNED, Request, Scope, SigV4Error, UNSIGNED, canonical, signing_key, stamp_of, string_to_sign,
};
use crate::access_key::AccessKey;

/// What is signed of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    Sha256([u8; 32]),
    Unsigned,
}

impl Body {
    fn text(self) -> String {
        match self {
            Self::Sha256(hash) => hex::encode(hash),
            Self::Unsigned => UNSIGNED.to_owned(),
        }
    }
}

/// The headers that a signed request needs in addition.
#[derive(Clone)]
pub struct SignedHeaders(pub Vec<(&'static str, String)>);

impl fmt::Debug for SignedHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignedHeaders(…)")
    }
}

/// Signs all of the request's headers, `host` must be among them, and gives those to add: `authorization`,
/// `x-amz-date`, `x-amz-content-sha256`, and `x-amz-nonce`, which makes equal requests of one second differ.
pub fn sign(
    request: &Request<'_>,
    body: Body,
    key: &AccessKey,
    region: &str,
    service: &str,
    now: SystemTime,
) -> Result<SignedHeaders, SigV4Error> {
    let (stamp, scope) = (stamp_of(now), scope(region, service, now));
    let mut added = vec![
        ("x-amz-content-sha256", body.text()),
        ("x-amz-date", stamp.clone()),
        ("x-amz-nonce", crate::jwt::random_id()),
    ];
    let mut headers = request.headers.to_vec();
    headers.extend(added.iter().map(|(name, value)| (*name, value.as_bytes())));
    let whole = Request { headers: &headers, ..*request };
    let (names, signature) =
        signature(&whole, &body.text(), key.secret.expose(), &stamp, &scope, &canonical::pairs(request.query)?)?;
    let id = &key.id;
    let text = format!("{ALGORITHM} Credential={id}/{}, SignedHeaders={names}, Signature={signature}", scope.text());
    added.push(("authorization", text));
    Ok(SignedHeaders(added))
}

/// The query of a link that is good for `life`; the request's own query is part of it. Only `host` has to be sent with
/// it, besides what else the request's headers hold.
pub fn presign(
    request: &Request<'_>,
    body: Body,
    key: &AccessKey,
    region: &str,
    service: &str,
    now: SystemTime,
    life: Duration,
) -> Result<String, SigV4Error> {
    if life < Duration::from_secs(1) || life > MAX_PRESIGNED {
        return Err(SigV4Error::Life(MAX_PRESIGNED));
    }
    let (stamp, scope) = (stamp_of(now), scope(region, service, now));
    let mut pairs = canonical::pairs(request.query)?;
    let mut add = |name: &str, value: &str| pairs.push((name.into(), value.into()));
    add("X-Amz-Algorithm", ALGORITHM);
    add("X-Amz-Credential", &format!("{}/{}", key.id, scope.text()));
    add("X-Amz-Date", &stamp);
    add("X-Amz-Expires", &life.as_secs().to_string());
    add("X-Amz-SignedHeaders", &signed_names(request).join(";"));
    // What a reader assumes where nothing is said: unsigned for S3, the body's own hash elsewhere.
    if scope.is_s3() != (body == Body::Unsigned) {
        add("X-Amz-Content-Sha256", &body.text());
    }
    let (_, signature) = signature(request, &body.text(), key.secret.expose(), &stamp, &scope, &pairs)?;
    Ok(format!("{}&X-Amz-Signature={signature}", canonical::query(pairs.iter())))
}

fn scope(region: &str, service: &str, now: SystemTime) -> Scope {
    Scope { date: stamp_of(now)[..8].to_owned(), region: region.to_owned(), service: service.to_owned() }
}

fn signed_names(request: &Request<'_>) -> Vec<String> {
    let mut names: Vec<String> = request.headers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
    names.sort();
    names.dedup();
    names
}

/// The names of the signed headers, and the signature in hexadecimal digits.
pub(super) fn signature(
    request: &Request<'_>,
    payload: &str,
    secret: &str,
    stamp: &str,
    scope: &Scope,
    pairs: &[canonical::Pair],
) -> Result<(String, String), SigV4Error> {
    let names = signed_names(request);
    if !names.iter().any(|n| n == "host") {
        return Err(SigV4Error::MissingHeader("host".to_owned()));
    }
    let canonical = canonical::request(request, scope.is_s3(), pairs, &names, payload)?;
    let text = string_to_sign(stamp, scope, &canonical);
    let tag = hmac::sign(&signing_key(secret, scope), text.as_bytes());
    Ok((names.join(";"), hex::encode(tag)))
}
