//! The gateway's own answers, as problem documents (RFC 9457) like the API's.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use serde::Serialize;

use crate::body::ResponseBody;

/// Nobody has acted on the request: anyone else may.
pub(crate) const NOT_STARTED: HeaderValue = HeaderValue::from_static("not-started");
/// An instance may have acted on it.
pub(crate) const BROKEN: HeaderValue = HeaderValue::from_static("broken");

/// Why the gateway itself answers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    #[error("the request names no host: send one Host header")]
    NoHost,
    #[error("CONNECT is not offered here")]
    Connect,
    #[error("nothing is routed for the host `{0}` and this path: check the name, and that the app or route exists")]
    Unknown(String),
    #[error("no table of routes has arrived yet: try again soon")]
    NoTable,
    #[error("{0} has no instance that can take requests: see why with `nexus describe app`")]
    NoInstance(String),
    #[error("every instance of {0} is busy to its limit: try again soon, or scale it")]
    Busy(String),
    #[error("no instance of {0} could be reached: see `nexus describe app`")]
    Unreachable(String),
    #[error("the connection to an instance of {0} was lost before it answered; it may have acted on the request")]
    Broken(String),
    #[error("the request's body did not arrive")]
    Body,
}

#[derive(Serialize)]
struct Document<'a> {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    code: &'static str,
    detail: String,
    #[serde(rename = "requestId")]
    request_id: &'a str,
}

impl Problem {
    /// What another gateway must know of a request that it passed on and that got this answer.
    pub fn refusal(&self) -> Option<HeaderValue> {
        match self {
            Self::Unknown(_) | Self::NoTable | Self::NoInstance(_) | Self::Busy(_) | Self::Unreachable(_) => {
                Some(NOT_STARTED)
            }
            Self::Broken(_) => Some(BROKEN),
            Self::NoHost | Self::Connect | Self::Body => None,
        }
    }

    fn parts(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NoHost => (StatusCode::BAD_REQUEST, "bad-request"),
            Self::Body => (StatusCode::REQUEST_TIMEOUT, "timeout"),
            Self::Connect => (StatusCode::NOT_IMPLEMENTED, "not-implemented"),
            Self::Unknown(_) => (StatusCode::NOT_FOUND, "not-found"),
            Self::NoTable | Self::NoInstance(_) | Self::Unreachable(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
            }
            Self::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
            Self::Broken(_) => (StatusCode::BAD_GATEWAY, "bad-gateway"),
        }
    }

    pub fn answer(&self, request_id: &str) -> Response<ResponseBody> {
        let (status, code) = self.parts();
        let title = status.canonical_reason().unwrap_or("Error");
        let document = Document {
            r#type: "about:blank",
            title,
            status: status.as_u16(),
            code,
            detail: self.to_string(),
            request_id,
        };
        let mut body = serde_json::to_vec(&document).expect("a document of texts encodes");
        body.push(b'\n');
        let mut response = Response::new(ResponseBody::Own(Some(Bytes::from(body)), None));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
