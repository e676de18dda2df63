//! Errors on their way out: every one becomes a problem document (RFC 9457), with the headers that its status asks for.

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use nexus_model::{ApiError, Code, RequestId};
use nexus_store::{StoreError, WatchError};

pub(crate) const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// A refusal: the error, and headers beside it (`Allow`, `WWW-Authenticate`).
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Boxed, so that a handler's result stays small.
    pub error: Box<ApiError>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self { error: Box::new(error), headers: Vec::new() }
    }
}

impl Refusal {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        ApiError::new(code, detail).into()
    }

    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub fn into_response(mut self, request_id: &RequestId) -> Response {
        self.error.request_id = Some(request_id.to_string());
        let body = serde_json::to_vec(&self.error).expect("problems are plain data");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(self.error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, PROBLEM_JSON);
        if matches!(self.error.code, Code::Overloaded | Code::Unavailable) {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        for (name, value) in self.headers {
            headers.insert(name, value);
        }
        response
    }
}

/// What a user is told when the store can't answer. Causes inside go to the log.
pub fn from_store(error: StoreError) -> ApiError {
    match error {
        StoreError::NoLeader { .. } | StoreError::Unavailable { .. } | StoreError::Closed => ApiError::new(
            Code::Unavailable,
            format!("{error}; send the request again, or read with ?consistency=stale"),
        ),
        StoreError::Unknown { .. } => ApiError::new(Code::Timeout, error.to_string()),
        StoreError::Compacted { oldest } => compacted(oldest.0),
        StoreError::Full(reason) => ApiError::new(
            Code::Overloaded,
            format!(
                "the metadata store is full and nothing may grow: {reason}. It clears by itself when there is room: send \
                 the request again then"
            ),
        ),
        StoreError::FutureRevision { asked, current } => ApiError::new(
            Code::BadRequest,
            format!("revision {asked} has not been reached, the newest is {current}: list, and watch from there"),
        ),
        other => {
            tracing::error!(error = %other, "the metadata store failed");
            ApiError::new(Code::Internal, "the metadata store failed; the server's log says why")
        }
    }
}

pub(crate) fn from_watch(error: WatchError) -> ApiError {
    match error {
        WatchError::Compacted { oldest } => compacted(oldest.0),
        WatchError::Lagged => {
            ApiError::new(Code::Compacted, "the reader fell behind: list again, and watch from there")
        }
        WatchError::Closed => ApiError::new(Code::Unavailable, "this server is stopping: watch from another"),
    }
}

fn compacted(oldest: u64) -> ApiError {
    let detail = format!("history before revision {oldest} is no longer kept: list again, and watch from there");
    ApiError::new(Code::Compacted, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_store_is_told_as_what_passes_and_what_helps() {
        let error = from_store(StoreError::Full("12 MiB are free on its disk: free some space".into()));
        assert_eq!((error.code, error.status), (Code::Overloaded, 429));
        assert!(error.detail.contains("12 MiB") && error.detail.contains("free some space"), "{error}");
        let response = Refusal::from(error).into_response(&"req-1".parse().expect("a well-formed id"));
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(response.headers().contains_key(RETRY_AFTER));
    }

    #[test]
    fn what_broke_inside_stays_inside() {
        let error = from_store(StoreError::Storage("/secret/path is broken".into()));
        assert_eq!(error.code, Code::Internal);
        assert!(!error.detail.contains("/secret"), "{error}");
    }
}
