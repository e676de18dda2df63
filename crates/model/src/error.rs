//! The errors that a user reads: problem details (RFC 9457) with a stable code, the field at fault and what to do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Stable codes. Each is documented once, here, and answers with one HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request can't be read: malformed JSON, a bad header or query.
    BadRequest,
    /// The object is well-formed but not valid; `errors` lists each field.
    Invalid,
    /// No token, or one that is not known.
    Unauthenticated,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    /// The name is taken.
    AlreadyExists,
    /// `If-Match` or the resource version did not match.
    PreconditionFailed,
    /// The change contradicts the object's state, such as a delete of a protected object.
    Conflict,
    /// The revision that a watch or cursor asks for has been compacted: list again.
    Compacted,
    /// The body, list or upload is larger than allowed.
    TooLarge,
    UnsupportedMediaType,
    /// The project's quota would be passed; `detail` names the quota, its limit and its use.
    QuotaExceeded,
    /// No host can take the instance; `detail` counts hosts per filter.
    Unschedulable,
    /// Too many requests at once.
    Overloaded,
    /// The control plane has no majority or no leader now: the same request may be sent again.
    Unavailable,
    /// The deadline passed; the outcome may or may not have been committed.
    Timeout,
    Internal,
}

impl Code {
    pub fn http_status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden | Self::QuotaExceeded => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::AlreadyExists | Self::Conflict => 409,
            Self::Compacted => 410,
            Self::PreconditionFailed => 412,
            Self::TooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::Invalid | Self::Unschedulable => 422,
            Self::Overloaded => 429,
            Self::Internal => 500,
            Self::Unavailable => 503,
            Self::Timeout => 504,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "The request can't be read",
            Self::Invalid => "The object is not valid",
            Self::Unauthenticated => "A valid token is needed",
            Self::Forbidden => "Not allowed",
            Self::NotFound => "Not found",
            Self::MethodNotAllowed => "This kind does not allow that",
            Self::AlreadyExists => "The name is taken",
            Self::PreconditionFailed => "The object has changed",
            Self::Conflict => "The object's state forbids this",
            Self::Compacted => "That revision is no longer kept",
            Self::TooLarge => "Too large",
            Self::UnsupportedMediaType => "Unsupported media type",
            Self::QuotaExceeded => "Over quota",
            Self::Unschedulable => "No host can take it",
            Self::Overloaded => "Too many requests",
            Self::Unavailable => "The control plane can't commit now",
            Self::Timeout => "The deadline passed",
            Self::Internal => "Internal error",
        }
    }

    /// Whether the same request may succeed later without a change.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Overloaded | Self::Unavailable | Self::Timeout)
    }
}

/// One field at fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FieldError {
    /// A dotted path, such as `spec.ports[0].port`.
    pub field: String,
    pub message: String,
}

impl FieldError {
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// A problem document (RFC 9457). `internal` context goes to logs, never into this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[error("{title}: {detail}")]
pub struct ApiError {
    pub code: Code,
    pub title: String,
    pub status: u16,
    /// What happened and what to do next.
    pub detail: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

impl ApiError {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            code,
            title: code.title().to_owned(),
            status: code.http_status(),
            detail: detail.into(),
            errors: Vec::new(),
            request_id: None,
        }
    }

    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let detail = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>().join("; ");
        Self { errors, ..Self::new(Code::Invalid, detail) }
    }

    pub fn not_found(kind: &str, name: &str) -> Self {
        Self::new(Code::NotFound, format!("there is no {kind} {name:?}"))
    }
}
