//! Request headers with a meaning here: preconditions, preferences, idempotency keys and tokens.

use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, IF_MATCH, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue};
use nexus_model::{ApiError, Code, RequestId};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(crate) const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
pub(crate) const PREFER: HeaderName = HeaderName::from_static("prefer");
pub(crate) const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
/// Whether the object had settled when a `Prefer: wait` was answered.
pub(crate) const SETTLED: HeaderName = HeaderName::from_static("x-cnx-settled");
/// How old the copy may be that a read with `?consistency=stale` was answered from.
pub(crate) const STALE_MS: HeaderName = HeaderName::from_static("x-cnx-stale-ms");
pub(crate) const CALLBACK: HeaderName = HeaderName::from_static("callback");
pub(crate) const CALLBACK_SECRET: HeaderName = HeaderName::from_static("callback-secret");
pub(crate) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The longest `Prefer: wait`.
pub(crate) const MAX_WAIT_SECONDS: u64 = 300;

fn bad(detail: impl Into<String>) -> ApiError {
    ApiError::new(Code::BadRequest, detail)
}

/// A header that may be given once, as text.
pub(crate) fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(bad(format!("the header {name} is given twice")));
    }
    value.to_str().map(|t| Some(t.trim())).map_err(|_| bad(format!("the header {name} is not plain ASCII")))
}

/// The revision within an entity tag such as `"42"`.
fn revision_of(tag: &str) -> Option<u64> {
    let digits = tag.strip_prefix('"')?.strip_suffix('"')?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// What `If-Match` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfMatch {
    /// `*`: the object exists.
    Exists,
    Revision(u64),
}

pub(crate) fn if_match(headers: &HeaderMap) -> Result<Option<IfMatch>, ApiError> {
    let Some(text) = single(headers, &IF_MATCH)? else { return Ok(None) };
    if text == "*" {
        return Ok(Some(IfMatch::Exists));
    }
    let wrong = || bad("If-Match is * or one revision in quotes, such as \"42\"");
    revision_of(text).map(|r| Some(IfMatch::Revision(r))).ok_or_else(wrong)
}

/// What `If-None-Match` names: `*`, or entity tags without their quotes and weakness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum IfNoneMatch {
    Any,
    Tags(Vec<String>),
}

impl IfNoneMatch {
    pub fn names(&self, tag: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Tags(tags) => tags.iter().any(|t| t == tag),
        }
    }
}

pub(crate) fn if_none_match(headers: &HeaderMap) -> Result<Option<IfNoneMatch>, ApiError> {
    let Some(text) = single(headers, &IF_NONE_MATCH)? else { return Ok(None) };
    if text == "*" {
        return Ok(Some(IfNoneMatch::Any));
    }
    let wrong = || bad("If-None-Match is * or a list of tags in quotes, such as \"42\"");
    let tag = |t: &str| {
        let t = t.trim();
        let t = t.strip_prefix("W/").unwrap_or(t).strip_prefix('"')?.strip_suffix('"')?;
        (!t.is_empty() && !t.contains('"')).then(|| t.to_owned())
    };
    let tags: Option<Vec<_>> = text.split(',').take(64).map(tag).collect();
    tags.map(|t| Some(IfNoneMatch::Tags(t))).ok_or_else(wrong)
}

pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = single(headers, &IDEMPOTENCY_KEY)? else { return Ok(None) };
    let printable = key.bytes().all(|b| b.is_ascii_graphic());
    if (1..=128).contains(&key.len()) && printable {
        Ok(Some(key.to_owned()))
    } else {
        Err(bad("Idempotency-Key has 1 to 128 printable ASCII characters and no spaces"))
    }
}

/// The `wait` of `Prefer` (RFC 7240), at most [`MAX_WAIT_SECONDS`]. Other preferences are passed over, as the RFC says.
pub(crate) fn prefer_wait(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    for value in headers.get_all(&PREFER) {
        let Ok(text) = value.to_str() else { continue };
        for preference in text.split(',') {
            let preference = preference.split(';').next().unwrap_or("").trim();
            let (name, seconds) = preference.split_once('=').unwrap_or((preference, ""));
            if !name.trim().eq_ignore_ascii_case("wait") {
                continue;
            }
            let seconds = seconds.trim().trim_matches('"');
            let digits = !seconds.is_empty() && seconds.len() <= 9 && seconds.bytes().all(|b| b.is_ascii_digit());
            let seconds: u64 = seconds
                .parse()
                .ok()
                .filter(|_| digits)
                .ok_or_else(|| bad("Prefer: wait=N takes a number of seconds"))?;
            return Ok(Some(Duration::from_secs(seconds.min(MAX_WAIT_SECONDS))));
        }
    }
    Ok(None)
}

/// The request's own id if it has a well-formed one.
pub(crate) fn request_id(headers: &HeaderMap) -> Option<RequestId> {
    single(headers, &REQUEST_ID).ok()??.parse().ok()
}

/// Where an event stream broke off.
pub(crate) fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(text) = single(headers, &LAST_EVENT_ID)? else { return Ok(None) };
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits).map(Some).ok_or_else(|| bad("Last-Event-ID is a revision"))
}

pub(crate) enum Bearer<'a> {
    None,
    Token(&'a str),
}

/// The bearer token (RFC 6750). Another scheme counts as none.
pub(crate) fn bearer(headers: &HeaderMap) -> Bearer<'_> {
    let Ok(Some(text)) = single(headers, &AUTHORIZATION) else { return Bearer::None };
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Bearer::Token(token.trim()),
        _ => Bearer::None,
    }
}

/// Refuses a body that is not of one of `types`.
pub(crate) fn check_content_type(headers: &HeaderMap, types: &[&str]) -> Result<(), ApiError> {
    let given = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let mut parts = given.split(';').map(str::trim);
    let essence = parts.next().unwrap_or("");
    let known = types.iter().any(|t| t.eq_ignore_ascii_case(essence));
    let utf8 = parts.all(|p| {
        let (name, value) = p.split_once('=').unwrap_or((p, ""));
        !name.trim().eq_ignore_ascii_case("charset") || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
    });
    if known && utf8 {
        return Ok(());
    }
    let detail = format!("the body must be {} in UTF-8, and Content-Type must say so", types.join(" or "));
    Err(ApiError::new(Code::UnsupportedMediaType, detail))
}

/// The ETag of a revision.
pub(crate) fn etag(revision: u64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{revision}\"")).expect("digits in quotes are a header value")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn preconditions_are_read_strictly() {
        assert_eq!(if_match(&with(IF_MATCH, "\"42\"")).unwrap(), Some(IfMatch::Revision(42)));
        assert_eq!(if_match(&with(IF_MATCH, "*")).unwrap(), Some(IfMatch::Exists));
        for wrong in ["42", "W/\"42\"", "\"4\", \"5\"", "\"x\"", "\"\"", "\"99999999999999999999\""] {
            assert!(if_match(&with(IF_MATCH, wrong)).is_err(), "{wrong}");
        }
        let some = if_none_match(&with(IF_NONE_MATCH, "\"1\", W/\"42\"")).unwrap().unwrap();
        assert!(some.names("42") && !some.names("4"));
        assert!(if_none_match(&with(IF_NONE_MATCH, "42")).is_err());
    }

    #[test]
    fn a_wait_is_found_among_other_preferences_and_bounded() {
        let wait = |v| prefer_wait(&with(PREFER, v));
        assert_eq!(wait("respond-async, wait=30; x").unwrap(), Some(Duration::from_secs(30)));
        assert_eq!(wait("wait=100000").unwrap(), Some(Duration::from_secs(300)));
        assert_eq!(wait("return=minimal").unwrap(), None);
        assert!(wait("wait=soon").is_err());
    }

    #[test]
    fn a_body_says_that_it_is_json() {
        let check = |v| check_content_type(&with(CONTENT_TYPE, v), &["application/json"]);
        assert!(check("application/json").is_ok() && check("Application/JSON; charset=UTF-8").is_ok());
        assert!(check("application/json; charset=latin1").is_err() && check("text/plain").is_err());
    }
}
