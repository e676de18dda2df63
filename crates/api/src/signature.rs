//! Requests that are signed with an access key (AWS Signature Version 4): whose they are, and that their body is the one that
//! was signed.
//!
//! The service is `nexus`, the region the one that the server serves; a client may be five minutes off. A signature is good once
//! at each server. A body that is not what was signed ends as one that broke off, before anything is done with it.

use std::sync::PoisonError;
use std::time::Duration;

use axum::body::Body;
use futures::StreamExt;
use http::header::HOST;
use http::request::Parts;
use nexus_iam::access_key::SecretKey;
use nexus_iam::sigv4::{BodyCheck, Presented, Request, Rules};
use nexus_model::kind::Holder;
use nexus_model::{Name, Object, kind};
use sha2::{Digest, Sha256};

use crate::serve::Server;

const SERVICE: &str = "nexus";
const SKEW: Duration = Duration::from_secs(300);
/// What changes a request's meaning has to be signed if it is there.
const MUST_SIGN: &[&str] = &["content-type", "if-match", "if-none-match", "idempotency-key"];
/// Signatures that one server remembers, of ten minutes.
pub(crate) const REMEMBERED: usize = 100_000;

/// Whose a signed request is.
pub(crate) struct Signed {
    pub organization: Name,
    pub name: Name,
    pub id: String,
    pub holder: Holder,
    pub project: Option<Name>,
    /// What its body must hash to, if that was signed.
    pub body: Option<[u8; 32]>,
}

fn headers<'a>(parts: &'a Parts, host: Option<&'a str>) -> Vec<(&'a str, &'a [u8])> {
    let mut all: Vec<(&str, &[u8])> = parts.headers.iter().map(|(n, v)| (n.as_str(), v.as_bytes())).collect();
    // Over HTTP/2 it stands in `:authority`.
    if !parts.headers.contains_key(HOST)
        && let Some(host) = host
    {
        all.push(("host", host.as_bytes()));
    }
    all
}

/// Whether a request claims to be signed.
pub(crate) fn is_signed(parts: &Parts) -> bool {
    let headers = headers(parts, None);
    let query = parts.uri.query().unwrap_or("");
    Request { method: parts.method.as_str(), path: parts.uri.path(), query, headers: &headers }.is_signed()
}

impl Server {
    /// Proves a signed request, or says what is wrong with it.
    pub fn by_signature(&self, parts: &Parts) -> Result<Signed, String> {
        let host = parts.uri.authority().map(http::uri::Authority::as_str);
        let headers = headers(parts, host);
        let query = parts.uri.query().unwrap_or("");
        let request = Request { method: parts.method.as_str(), path: parts.uri.path(), query, headers: &headers };
        let presented = Presented::parse(&request).map_err(|e| e.to_string())?;
        let unknown = || "this access key is not known, or was deleted".to_owned();
        let key: Object<kind::AccessKey> = self
            .api
            .directory
            .read(|known| known.access_key(presented.access_key().as_str()).cloned())
            .ok_or_else(unknown)?;
        let secret = self.secret_of(&key)?;
        let now = nexus_iam::at_millis(self.api.env.now_millis());
        let rules = Rules {
            region: self.api.region.as_str(),
            service: SERVICE,
            now,
            max_skew: SKEW,
            allow_unsigned_body: true,
            must_sign: MUST_SIGN,
        };
        let verified = presented.verify(&request, &secret, &rules, None).map_err(|e| e.to_string())?;
        let mut replays = self.replays.lock().unwrap_or_else(PoisonError::into_inner);
        replays.admit(&verified, now).map_err(|e| e.to_string())?;
        let body = match verified.body {
            BodyCheck::Sha256(hash) => Some(hash),
            BodyCheck::Done | BodyCheck::Unsigned => None,
        };
        let m = &key.metadata;
        let organization = m.organization.clone().ok_or_else(unknown)?;
        let holder = key.spec.holder.clone().ok_or_else(unknown)?;
        let id = presented.access_key().as_str().to_owned();
        Ok(Signed { organization, name: m.name.clone(), id, holder, project: key.spec.project.clone(), body })
    }

    /// The secret half of an access key.
    pub fn secret_of(&self, key: &Object<kind::AccessKey>) -> Result<SecretKey, String> {
        let damaged = || "this access key can't be read: make another".to_owned();
        let id = key.spec.id.as_ref().and_then(|id| id.parse().ok()).ok_or_else(damaged)?;
        let sealed = key.spec.sealed.as_ref().and_then(|s| serde_json::from_str(s).ok()).ok_or_else(damaged)?;
        SecretKey::open(&sealed, &id, &*self.api.master_keys).map_err(|error| {
            tracing::warn!(%error, "the secret of an access key can't be opened");
            "this server can't open the secret of this access key now".to_owned()
        })
    }
}

/// The same body, which breaks off at its end if it is not the one that was signed.
pub(crate) fn checked(body: Body, signed: [u8; 32]) -> Body {
    let state = (body.into_data_stream(), Some(Sha256::new()));
    let pieces = futures::stream::unfold(state, move |(mut pieces, mut hash)| async move {
        let hashing = hash.as_mut()?;
        match pieces.next().await {
            Some(Ok(piece)) => {
                hashing.update(&piece);
                Some((Ok(piece), (pieces, hash)))
            }
            Some(Err(error)) => Some((Err(std::io::Error::other(error)), (pieces, None))),
            None => {
                let found: [u8; 32] = hash.take()?.finalize().into();
                let wrong = std::io::Error::other("the body is not the one that was signed");
                (found != signed).then(|| (Err(wrong), (pieces, None)))
            }
        }
    });
    Body::from_stream(pieces)
}
