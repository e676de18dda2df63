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

/// What a reader is told when the store can't answer. Causes inside go to the log.
pub(crate) fn from_store(error: StoreError) -> ApiError {
    match error {
        StoreError::NoLeader { .. } | StoreError::Unavailable { .. } | StoreError::Closed => ApiError::new(
            Code::Unavailable,
            format!("{error}; send the request again, or read with ?consistency=stale"),
        ),
        StoreError::Unknown { .. } => ApiError::new(Code::Timeout, error.to_string()),
        StoreError::Compacted { oldest } => compacted(oldest.0),
        StoreError::FutureRevision { asked, current } => ApiError::new(
            Code::BadRequest,
            format!("revision {asked} has not been reached, the newest is {current}: list, and watch from there"),
        ),
        other => {
            tracing::error!(error = %other, "the metadata store failed a read");
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
