//! AWS Signature Version 4: requests signed with an access key, in their headers or as a presigned link.
//!
//! ```text
//! Authorization: AWS4-HMAC-SHA256 Credential=<id>/<date>/<region>/<service>/aws4_request,
//!                SignedHeaders=host;x-amz-date, Signature=<64 hexadecimal digits>
//! ```
//!
//! The signature is an HMAC over the time, the scope and the hash of the canonical request, by a key that is derived
//! from the secret, the day, the region and the service. A check has two steps, because the secret must be found between
//! them: [`Presented::parse`] reads what the request claims, [`Presented::verify`] proves it.
//!
//! Stricter than the protocol: `host` and every `x-amz-*` header must be signed, nothing that matters may be there twice,
//! and outside S3 a path with empty or dot segments is refused, since the signature would not see them and a router
//! would. Bodies that are signed in chunks (`STREAMING-…`) are not supported yet and are refused by name.

mod canonical;
mod replays;
mod sign;

use std::time::{Duration, SystemTime};

use ring::{digest, hmac};
use zeroize::Zeroizing;

use crate::access_key::{AccessKeyId, SecretKey};

pub use replays::{ReplayError, Replays};
pub use sign::{Body, SignedHeaders, presign, sign};

pub const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const UNSIGNED: &str = "UNSIGNED-PAYLOAD";
const END: &str = "aws4_request";
const CONTENT_SHA256: &str = "x-amz-content-sha256";
/// A request's time may differ from ours by no more than this, whatever is configured.
pub const MAX_SKEW: Duration = Duration::from_secs(15 * 60);
pub const DEFAULT_SKEW: Duration = Duration::from_secs(5 * 60);
/// The longest life of a presigned link.
pub const MAX_PRESIGNED: Duration = Duration::from_secs(7 * 86_400);
const MAX_AUTHORIZATION: usize = 4 * 1024;
const MAX_SIGNED_HEADERS: usize = 64;
const MAX_TARGET: usize = 64 * 1024;

/// Why a signed request is refused. Never repeats secrets or signatures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SigV4Error {
    #[error("the request is not signed with {ALGORITHM}")]
    NotSigned,
    #[error("the request's signature can't be read: {0}")]
    Malformed(&'static str),
    #[error("`{0}` may stand in a signed request once only")]
    Repeated(String),
    #[error("the header `{0}` is needed in a signed request")]
    MissingHeader(String),
    #[error("the header `{0}` must be signed")]
    UnsignedHeader(String),
    #[error("the request is signed for the {what} `{got}`, here is `{want}`")]
    Scope { what: &'static str, got: String, want: String },
    #[error("the request's time differs from the server's by more than {0:?}: is the clock right?")]
    Skewed(Duration),
    #[error("the presigned link has expired")]
    Expired,
    #[error("a presigned link lives for 1 second to {0:?}")]
    Life(Duration),
    #[error("outside S3 a signed path must have no empty or dot segments")]
    Path,
    #[error("the body must be signed here: send its SHA-256 as `{CONTENT_SHA256}`")]
    UnsignedBody,
    #[error(
        "bodies that are signed in chunks (`STREAMING-…`) are not supported yet: send the body's SHA-256 or `{UNSIGNED}`"
    )]
    Streaming,
    #[error("the request does not say its body's SHA-256 (`{CONTENT_SHA256}`): the body must be read first")]
    BodyNeeded,
    #[error("the body is not the one that was signed")]
    BodyMismatch,
    #[error("the signature is wrong: is the secret right, and did nothing change the request on its way?")]
    Signature,
}

/// A request as it was sent.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a str,
    /// Still percent-encoded.
    pub path: &'a str,
    /// What stands behind `?`, still percent-encoded.
    pub query: &'a str,
    /// In the order of sending. Over HTTP/2, `:authority` is to be given as `host`.
    pub headers: &'a [(&'a str, &'a [u8])],
}

impl<'a> Request<'a> {
    fn values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// The text of a header that may be there once.
    fn single(&self, name: &str) -> Result<Option<&'a str>, SigV4Error> {
        let mut values = self.values(name);
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(SigV4Error::Repeated(name.to_owned()));
        }
        let text = std::str::from_utf8(value).map_err(|_| SigV4Error::Malformed("a header is not text"))?;
        Ok(Some(text.trim()))
    }

    /// Whether the request claims to be signed this way: then it is to be judged by this, not by another credential.
    pub fn is_signed(&self) -> bool {
        self.values("authorization").any(|v| v.starts_with(b"AWS4-"))
            || self.query.split('&').any(|p| p.starts_with("X-Amz-Signature=") || p.starts_with("X-Amz-Algorithm="))
    }
}

/// What a request must be signed for.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    pub region: &'a str,
    pub service: &'a str,
    pub now: SystemTime,
    /// Drawn to [`MAX_SKEW`].
    pub max_skew: Duration,
    /// Whether `UNSIGNED-PAYLOAD` is taken, which trusts TLS with the body.
    pub allow_unsigned_body: bool,
    /// Headers that must be signed if they are there, besides `host` and `x-amz-*`; in lower case.
    pub must_sign: &'a [&'a str],
}

/// How a request carried its signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Header,
    Presigned,
}

/// What is known of the body once the signature is found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyCheck {
    /// The body that was given is the one that was signed.
    Done,
    /// The signature is over this SHA-256: whoever reads the body must compare.
    Sha256([u8; 32]),
    /// The body was not signed.
    Unsigned,
}

/// A request that is by the holder of the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub access_key: AccessKeyId,
    pub form: Form,
    pub signature: [u8; 32],
    /// Until when the same request would pass again; see [`Replays`].
    pub usable_until: SystemTime,
    pub body: BodyCheck,
}

/// What a request claims; nothing of it is believed yet.
#[derive(Debug, Clone)]
pub struct Presented {
    access_key: AccessKeyId,
    form: Form,
    scope: Scope,
    /// The time as it was written.
    stamp: String,
    time: SystemTime,
    expires: Option<Duration>,
    signed_headers: Vec<String>,
    signature: [u8; 32],
    payload: Option<String>,
    pairs: Vec<canonical::Pair>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Scope {
    date: String,
    region: String,
    service: String,
}

impl Scope {
    fn text(&self) -> String {
        format!("{}/{}/{}/{END}", self.date, self.region, self.service)
    }

    fn is_s3(&self) -> bool {
        self.service == "s3"
    }
}

impl Presented {
    pub fn parse(request: &Request<'_>) -> Result<Self, SigV4Error> {
        if request.path.len() + request.query.len() > MAX_TARGET {
            return Err(SigV4Error::Malformed("its path and query are too long"));
        }
        let pairs = canonical::pairs(request.query)?;
        let authorization = request.single("authorization")?;
        let presigned = pairs.iter().any(|(k, _)| k == b"X-Amz-Signature" || k == b"X-Amz-Algorithm");
        match (authorization, presigned) {
            (None, false) => Err(SigV4Error::NotSigned),
            (Some(_), true) => Err(SigV4Error::Malformed("it is signed both in a header and in its query")),
            (Some(text), false) => Self::from_header(request, text, pairs),
            (None, true) => Self::from_query(request, pairs),
        }
    }

    fn from_header(request: &Request<'_>, text: &str, pairs: Vec<canonical::Pair>) -> Result<Self, SigV4Error> {
        if text.len() > MAX_AUTHORIZATION {
            return Err(SigV4Error::Malformed("its Authorization header is too long"));
        }
        let rest = text.strip_prefix(ALGORITHM).ok_or(SigV4Error::NotSigned)?;
        let rest = rest.strip_prefix(' ').ok_or(SigV4Error::NotSigned)?;
        let (mut credential, mut signed, mut signature) = (None, None, None);
        for part in rest.split(',') {
            let (name, value) =
                part.trim().split_once('=').ok_or(SigV4Error::Malformed("its Authorization header lacks a value"))?;
            let place = match name {
                "Credential" => &mut credential,
                "SignedHeaders" => &mut signed,
                "Signature" => &mut signature,
                _ => return Err(SigV4Error::Malformed("its Authorization header holds something unknown")),
            };
            if place.replace(value).is_some() {
                return Err(SigV4Error::Repeated(name.to_owned()));
            }
        }
        let (Some(credential), Some(signed), Some(signature)) = (credential, signed, signature) else {
            return Err(SigV4Error::Malformed("Credential, SignedHeaders and Signature are needed"));
        };
        let stamp = request.single("x-amz-date")?;
        let stamp = stamp.ok_or_else(|| SigV4Error::MissingHeader("x-amz-date".to_owned()))?;
        Self::new(request, Form::Header, [credential, signed, signature, stamp], None, None, pairs)
    }

    fn from_query(request: &Request<'_>, pairs: Vec<canonical::Pair>) -> Result<Self, SigV4Error> {
        let all = pairs.clone();
        let get = |name: &str| -> Result<Option<&str>, SigV4Error> {
            let mut values = all.iter().filter(|(k, _)| k == name.as_bytes()).map(|(_, v)| v);
            let Some(value) = values.next() else { return Ok(None) };
            if values.next().is_some() {
                return Err(SigV4Error::Repeated(name.to_owned()));
            }
            std::str::from_utf8(value).map(Some).map_err(|_| SigV4Error::Malformed("a parameter is not text"))
        };
        let need = |name: &str| {
            get(name)?.ok_or(SigV4Error::Malformed(
                "a presigned link needs X-Amz-Algorithm, -Credential, -Date, -Expires, -SignedHeaders and -Signature",
            ))
        };
        if need("X-Amz-Algorithm")? != ALGORITHM {
            return Err(SigV4Error::NotSigned);
        }
        let expires = need("X-Amz-Expires")?;
        let is_number = (1..=7).contains(&expires.len()) && expires.bytes().all(|b| b.is_ascii_digit());
        let expires = expires.parse().ok().filter(|_| is_number).map(Duration::from_secs);
        let expires = expires.filter(|e| (Duration::from_secs(1)..=MAX_PRESIGNED).contains(e));
        let expires = expires.ok_or(SigV4Error::Life(MAX_PRESIGNED))?;
        let texts =
            [need("X-Amz-Credential")?, need("X-Amz-SignedHeaders")?, need("X-Amz-Signature")?, need("X-Amz-Date")?];
        let payload = get("X-Amz-Content-Sha256")?;
        Self::new(request, Form::Presigned, texts, Some(expires), payload, pairs)
    }

    fn new(
        request: &Request<'_>,
        form: Form,
        [credential, signed, signature, stamp]: [&str; 4],
        expires: Option<Duration>,
        payload: Option<&str>,
        pairs: Vec<canonical::Pair>,
    ) -> Result<Self, SigV4Error> {
        let parts: Vec<&str> = credential.split('/').collect();
        let &[id, date, region, service, END] = parts.as_slice() else {
            return Err(SigV4Error::Malformed("Credential must be <id>/<date>/<region>/<service>/aws4_request"));
        };
        let access_key = id.parse().map_err(|_| SigV4Error::Malformed("the access key's id is not one of ours"))?;
        let time = time_of(stamp).ok_or(SigV4Error::Malformed("its time must look like 20130524T000000Z"))?;
        if date != &stamp[..8] {
            return Err(SigV4Error::Scope { what: "day", got: date.to_owned(), want: stamp[..8].to_owned() });
        }
        let mut bytes = [0; 32];
        let is_hex = signature.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !is_hex || hex::decode_to_slice(signature, &mut bytes).is_err() {
            return Err(SigV4Error::Malformed("the signature must be 64 hexadecimal digits in lower case"));
        }
        let names: Vec<String> = signed.split(';').take(MAX_SIGNED_HEADERS + 1).map(str::to_owned).collect();
        if names.len() > MAX_SIGNED_HEADERS {
            return Err(SigV4Error::Malformed("too many headers are signed"));
        }
        let is_name = |n: &String| !n.is_empty() && n.bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase());
        if !names.iter().all(is_name) || !names.windows(2).all(|w| w[0] < w[1]) {
            return Err(SigV4Error::Malformed("SignedHeaders must be names in lower case, sorted, each once"));
        }
        let header = request.single(CONTENT_SHA256)?;
        if header.is_some() && payload.is_some() {
            return Err(SigV4Error::Repeated(CONTENT_SHA256.to_owned()));
        }
        Ok(Self {
            access_key,
            form,
            scope: Scope { date: date.to_owned(), region: region.to_owned(), service: service.to_owned() },
            stamp: stamp.to_owned(),
            time,
            expires,
            signed_headers: names,
            signature: bytes,
            payload: header.or(payload).map(str::to_owned),
            pairs,
        })
    }

    /// Whose secret is needed to go on.
    pub fn access_key(&self) -> &AccessKeyId {
        &self.access_key
    }

    /// Proves the claim. `request` is the one that was parsed; `body` is the SHA-256 of its body if that was read
    /// already. Where it was not, [`Verified::body`] says what is still to compare.
    pub fn verify(
        &self,
        request: &Request<'_>,
        secret: &SecretKey,
        rules: &Rules<'_>,
        body: Option<[u8; 32]>,
    ) -> Result<Verified, SigV4Error> {
        let scope = |what, got: &str, want: &str| {
            let error = || SigV4Error::Scope { what, got: got.to_owned(), want: want.to_owned() };
            if got == want { Ok(()) } else { Err(error()) }
        };
        scope("region", &self.scope.region, rules.region)?;
        scope("service", &self.scope.service, rules.service)?;
        let usable_until = self.check_time(rules)?;
        self.check_signed(request, rules)?;
        if !self.scope.is_s3() && !canonical::is_plain(request.path) {
            return Err(SigV4Error::Path);
        }
        let (payload, check) = self.payload(rules, body)?;

        let canonical = canonical::request(request, self.scope.is_s3(), &self.pairs, &self.signed_headers, &payload)?;
        let text = string_to_sign(&self.stamp, &self.scope, &canonical);
        let key = signing_key(secret.expose(), &self.scope);
        hmac::verify(&key, text.as_bytes(), &self.signature).map_err(|_| SigV4Error::Signature)?;
        let check = match (check, body) {
            (BodyCheck::Sha256(signed), Some(read)) if signed == read => BodyCheck::Done,
            (BodyCheck::Sha256(_), Some(_)) => return Err(SigV4Error::BodyMismatch),
            (check, _) => check,
        };
        Ok(Verified {
            access_key: self.access_key.clone(),
            form: self.form,
            signature: self.signature,
            usable_until,
            body: check,
        })
    }

    /// Until when the request is good.
    fn check_time(&self, rules: &Rules<'_>) -> Result<SystemTime, SigV4Error> {
        let skew = rules.max_skew.min(MAX_SKEW);
        if self.time > rules.now + skew {
            return Err(SigV4Error::Skewed(skew));
        }
        let end = self.time + self.expires.unwrap_or(skew);
        match (rules.now > end, self.form) {
            (true, Form::Header) => Err(SigV4Error::Skewed(skew)),
            (true, Form::Presigned) => Err(SigV4Error::Expired),
            (false, _) => Ok(end),
        }
    }

    fn check_signed(&self, request: &Request<'_>, rules: &Rules<'_>) -> Result<(), SigV4Error> {
        let is_signed = |name: &str| self.signed_headers.iter().any(|s| s == name);
        if request.single("host")?.is_none() {
            return Err(SigV4Error::MissingHeader("host".to_owned()));
        }
        if !is_signed("host") {
            return Err(SigV4Error::UnsignedHeader("host".to_owned()));
        }
        for (name, _) in request.headers {
            let name = name.to_ascii_lowercase();
            let must = name.starts_with("x-amz-") || rules.must_sign.contains(&name.as_str());
            if must && !is_signed(&name) {
                return Err(SigV4Error::UnsignedHeader(name));
            }
        }
        Ok(())
    }

    /// What stands for the body in the canonical request.
    fn payload(&self, rules: &Rules<'_>, body: Option<[u8; 32]>) -> Result<(String, BodyCheck), SigV4Error> {
        let unsigned = || {
            let answer = (UNSIGNED.to_owned(), BodyCheck::Unsigned);
            if rules.allow_unsigned_body { Ok(answer) } else { Err(SigV4Error::UnsignedBody) }
        };
        match self.payload.as_deref() {
            Some(UNSIGNED) => unsigned(),
            Some(text) if text.starts_with("STREAMING-") => Err(SigV4Error::Streaming),
            Some(text) => {
                let mut bytes = [0; 32];
                hex::decode_to_slice(text, &mut bytes)
                    .map_err(|_| SigV4Error::Malformed("the body's SHA-256 must be 64 hexadecimal digits"))?;
                Ok((text.to_owned(), BodyCheck::Sha256(bytes)))
            }
            // S3's links don't sign the body, unless they say so.
            None if self.form == Form::Presigned && self.scope.is_s3() => unsigned(),
            None => {
                let body = body.ok_or(SigV4Error::BodyNeeded)?;
                Ok((hex::encode(body), BodyCheck::Sha256(body)))
            }
        }
    }
}

fn string_to_sign(stamp: &str, scope: &Scope, canonical: &[u8]) -> String {
    let hash = hex::encode(digest::digest(&digest::SHA256, canonical));
    format!("{ALGORITHM}\n{stamp}\n{}\n{hash}", scope.text())
}

fn signing_key(secret: &str, scope: &Scope) -> hmac::Key {
    let first = Zeroizing::new(format!("AWS4{secret}"));
    let mut key = hmac::Key::new(hmac::HMAC_SHA256, first.as_bytes());
    for part in [&scope.date, &scope.region, &scope.service, END] {
        key = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, part.as_bytes()).as_ref());
    }
    key
}

/// `20130524T000000Z`.
fn stamp_of(time: SystemTime) -> String {
    // The range ends in the year 9999; a clock beyond it signs nothing that anybody takes.
    let secs = i64::try_from(crate::unix_secs(time)).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(secs).unwrap_or(jiff::Timestamp::MAX).strftime("%Y%m%dT%H%M%SZ").to_string()
}

fn time_of(stamp: &str) -> Option<SystemTime> {
    let bytes = stamp.as_bytes();
    let shaped = bytes.len() == 16
        && bytes.iter().enumerate().all(|(i, b)| match i {
            8 => *b == b'T',
            15 => *b == b'Z',
            _ => b.is_ascii_digit(),
        });
    if !shaped {
        return None;
    }
    let civil = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", stamp).ok()?;
    let secs = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_second();
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(secs).ok()?))
}

#[cfg(test)]
mod tests;
