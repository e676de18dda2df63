//! Reading: one object, or a page of many.
//!
//! A page is found by key (a keyset cursor): it costs what it shows, wherever it begins, and objects that come and go
//! meanwhile neither repeat nor hide others. A page's work is bounded too: with a selector it may examine its share of keys
//! and end with fewer objects than asked and a cursor.

use axum::body::Body;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderValue, StatusCode};
use nexus_model::selector::Selector;
use nexus_model::{API_VERSION, ApiError, Code, Name, key};
use nexus_store::{Consistency, KeyValue, RangeRequest};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::authorize::Lens;
use crate::headers::{etag, if_none_match};
use crate::problem::from_store;
use crate::query::Query;
use crate::render::Stored;
use crate::route::Place;
use crate::serve::{Context, Server};

pub(crate) const JSON: HeaderValue = HeaderValue::from_static("application/json");

pub(crate) const DEFAULT_LIMIT: usize = 100;
pub(crate) const MAX_LIMIT: usize = 500;
/// Keys that one request with a selector may examine.
const MAX_SCAN: usize = 10_000;
/// Keys that are asked of the store at once.
const BATCH: usize = 1_000;
/// A page ends early when it has grown to this many bytes.
const MAX_PAGE_BYTES: usize = 8 << 20;

/// Parameters of one object's GET.
pub(crate) const GET_PARAMETERS: &[&str] = &["consistency"];
/// Parameters of a list.
pub(crate) const LIST_PARAMETERS: &[&str] = &["limit", "cursor", "labels", "deleting", "consistency", "watch"];

pub(crate) fn consistency(query: &Query) -> Result<Consistency, ApiError> {
    Ok(match query.one_of("consistency", &["linearizable", "stale"])? {
        Some("stale") => Consistency::Stale,
        _ => Consistency::Linearizable,
    })
}

pub(crate) fn selector(query: &Query) -> Result<Selector, ApiError> {
    let text = query.get("labels").unwrap_or("");
    if text.len() > 4096 {
        return Err(ApiError::new(Code::BadRequest, "labels has at most 4096 bytes"));
    }
    if let Some(c) = text.chars().find(|c| c.is_whitespace() && *c != ' ') {
        return Err(ApiError::new(Code::BadRequest, format!("labels may not hold {c:?}")));
    }
    text.parse().map_err(|e| ApiError::new(Code::BadRequest, format!("labels: {e}")))
}

/// A stored object that can't be read is a defect of ours.
pub(crate) fn unreadable(kv: &KeyValue, error: &serde_json::Error) -> ApiError {
    tracing::error!(key = %String::from_utf8_lossy(&kv.key), %error, "a stored object can't be read");
    ApiError::new(Code::Internal, "the stored object can't be read; the server's log says why")
}

/// The key and value of one living object.
pub(crate) async fn find(
    server: &Server,
    place: &Place,
    name: &Name,
    consistency: Consistency,
) -> Result<Option<KeyValue>, ApiError> {
    let mut request = RangeRequest::get(key::object(place.kind, place.within(), name));
    request.consistency = consistency;
    Ok(server.store(place).range(request).await.map_err(from_store)?.kvs.into_iter().next())
}

pub(crate) fn parse_name(place: &Place, text: &str) -> Result<Name, ApiError> {
    text.parse().map_err(|e| {
        let shown: String = text.chars().take(64).collect();
        ApiError::new(Code::NotFound, format!("there is no {} {shown:?}: {e}", place.kind.kind))
    })
}

pub(crate) async fn get(
    server: &Server,
    place: &Place,
    name: &str,
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Response, ApiError> {
    let name = parse_name(place, name)?;
    let query = Query::parse(query, GET_PARAMETERS, &[])?;
    let known = if_none_match(headers)?;
    let consistency = consistency(&query)?;
    let found = find(server, place, &name, consistency).await?;
    let kv = found.ok_or_else(|| ApiError::not_found(place.kind.kind, name.as_str()))?;
    let revision = kv.mod_revision.0;
    if known.is_some_and(|k| k.names(&revision.to_string())) {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response.headers_mut().insert(ETAG, etag(revision));
        server.tell_age(place, consistency, &mut response);
        return Ok(response);
    }
    let stored = Stored::read(&kv).map_err(|e| unreadable(&kv, &e))?;
    let mut response = object_response(stored.to_bytes(), revision);
    server.tell_age(place, consistency, &mut response);
    Ok(response)
}

/// 200 with an object.
pub(crate) fn object_response(body: Vec<u8>, revision: u64) -> Response {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response.headers_mut().insert(ETAG, etag(revision));
    response
}

/// Seals a cursor, so that one of another list, or an invented one, is told from ours. No secret: a cursor gives no right.
fn seal(context: &str, last: &[u8]) -> [u8; 8] {
    let mut hash = Sha256::new();
    hash.update(context.as_bytes());
    hash.update([0]);
    hash.update(last);
    hash.finalize()[..8].try_into().expect("SHA-256 is longer")
}

fn write_cursor(context: &str, last: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode([&seal(context, last)[..], last].concat())
}

fn read_cursor(context: &str, text: &str) -> Result<Vec<u8>, ApiError> {
    let wrong = || ApiError::new(Code::BadRequest, "the cursor is not one that this list gave: begin without one");
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| wrong())?;
    let (sum, last) = bytes.split_at_checked(8).ok_or_else(wrong)?;
    if last.is_empty() || sum != seal(context, last) { Err(wrong()) } else { Ok(last.to_vec()) }
}

/// Whether a tombstone, whose key tells nothing of its project, belongs to a list.
fn in_place(place: &Place, stored: &Stored<'_>) -> bool {
    place.within().is_none() || stored.metadata.within() == place.within()
}

pub(crate) async fn list(
    server: &Server,
    place: &Place,
    query: &Query,
    lens: &Lens,
    context: &Context,
) -> Result<Response, ApiError> {
    let limit = query.number("limit", 1..=MAX_LIMIT)?.unwrap_or(DEFAULT_LIMIT);
    let selector = selector(query)?;
    let deleting = query.flag("deleting")?;
    let asked = consistency(query)?;
    let mut consistency = asked;
    let mut prefixes = vec![key::objects(place.kind, place.within())];
    if deleting {
        prefixes.push(key::tombstones(place.kind));
    }
    let identity = format!("{}\0{deleting}\0{}", prefixes[0], query.get("labels").unwrap_or(""));
    let after = query.get("cursor").map(|text| read_cursor(&identity, text)).transpose()?;

    let mut items: Vec<u8> = Vec::new();
    let (mut count, mut scanned, mut revision) = (0, 0, None);
    let mut cursor: Option<Bytes> = None;
    'prefixes: for (i, prefix) in prefixes.iter().enumerate() {
        let end = Bytes::from(key::prefix_end(prefix));
        let mut start = Bytes::from(prefix.clone());
        if let Some(after) = &after {
            if after.as_slice() >= end.as_ref() {
                continue;
            }
            if after.as_slice() >= start.as_ref() {
                start = Bytes::from([after, &[0u8][..]].concat());
            }
        }
        let filtered = !selector.is_empty() || *lens != Lens::All || (i == 1 && place.within().is_some());
        loop {
            let batch = if filtered { BATCH } else { limit - count };
            let mut request = RangeRequest::new(start.clone(), end.clone()).limit(batch.min(MAX_SCAN - scanned).max(1));
            request.consistency = consistency;
            let answer = server.store(place).range(request).await.map_err(from_store)?;
            // This node has seen everything up to the first answer by now, so that later ones need not ask again.
            consistency = Consistency::Stale;
            revision.get_or_insert(answer.revision.0);
            let got = answer.kvs.len();
            for (n, kv) in answer.kvs.iter().enumerate() {
                scanned += 1;
                match Stored::read(kv) {
                    Ok(stored)
                        if selector.matches(stored.labels())
                            && (i == 0 || in_place(place, &stored))
                            && server.shows(lens, place, &stored, context) =>
                    {
                        if count > 0 {
                            items.push(b',');
                        }
                        stored.write(&mut items);
                        count += 1;
                    }
                    Ok(_) => {}
                    // One damaged object must not hide all others.
                    Err(error) => drop(unreadable(kv, &error)),
                }
                if count >= limit || scanned >= MAX_SCAN || items.len() >= MAX_PAGE_BYTES {
                    if n + 1 < got || answer.more || i + 1 < prefixes.len() {
                        cursor = Some(kv.key.clone());
                    }
                    break 'prefixes;
                }
            }
            match answer.kvs.last() {
                Some(last) if answer.more => start = Bytes::from([&last.key[..], &[0]].concat()),
                _ => break,
            }
        }
    }
    let revision = match revision {
        Some(revision) => revision,
        // Only a cursor behind everything asks the store for nothing.
        None => server.current_revision(place, consistency).await?,
    };
    let mut body = Vec::with_capacity(items.len() + 256);
    let mut metadata = serde_json::json!({"revision": revision});
    if let Some(last) = cursor {
        metadata["cursor"] = Value::String(write_cursor(&identity, &last));
    }
    let head =
        format!(r#"{{"apiVersion":"{API_VERSION}","kind":"{}List","metadata":{metadata},"items":["#, place.kind.kind);
    body.extend_from_slice(head.as_bytes());
    body.append(&mut items);
    body.extend_from_slice(b"]}");
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    server.tell_age(place, asked, &mut response);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_belongs_to_its_list() {
        let cursor = write_cursor("o/apps/default/", b"o/apps/default/web");
        assert_eq!(read_cursor("o/apps/default/", &cursor).unwrap(), b"o/apps/default/web");
        assert!(read_cursor("o/apps/other/", &cursor).is_err());
        for wrong in ["", "AAAA", "!!", &format!("{cursor}A"), &cursor[1..]] {
            assert!(read_cursor("o/apps/default/", wrong).is_err(), "{wrong}");
        }
    }
}
