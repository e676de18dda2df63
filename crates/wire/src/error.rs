//! How a call fails: what the callee says ([`Refusal`]) and what the caller gets ([`WireError`]).

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use nexus_env::Endpoint;
use serde::{Deserialize, Serialize};

use crate::frame::BodyError;

/// The codes that this room itself refuses with. Handlers may use them too, in the same sense.
pub mod code {
    /// The message can't be read.
    pub const BAD_REQUEST: &str = "bad-request";
    pub const UNKNOWN_METHOD: &str = "unknown-method";
    /// The caller may not use the method.
    pub const FORBIDDEN: &str = "forbidden";
    pub const DEADLINE: &str = "deadline";
    pub const TOO_LARGE: &str = "too-large";
    pub const VERSION_MISMATCH: &str = "version-mismatch";
    /// Another server leads; the refusal may say which.
    pub const NOT_LEADER: &str = "not-leader";
    /// The callee is going down or can't serve now: try again, or elsewhere.
    pub const DRAINING: &str = "draining";
    pub const INTERNAL: &str = "internal";
}

/// A handler's "no".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Refusal {
    /// Stable and machine-readable, lower-case words joined by `-`.
    pub code: Cow<'static, str>,
    #[serde(default)]
    pub detail: String,
    /// With [`code::NOT_LEADER`]: where the leader is, if known.
    #[serde(default)]
    pub leader: Option<String>,
}

impl Refusal {
    pub fn new(code: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self { code: code.into(), detail: detail.into(), leader: None }
    }

    pub fn not_leader(leader: Option<String>) -> Self {
        Self { leader, ..Self::new(code::NOT_LEADER, "this server does not lead") }
    }

    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(code::INTERNAL, detail)
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        Self::new(code::TOO_LARGE, limit.to_string())
    }

    /// The HTTP status is for tools that look from outside; peers read the code.
    pub(crate) fn status(&self) -> StatusCode {
        match &*self.code {
            code::BAD_REQUEST => StatusCode::BAD_REQUEST,
            code::UNKNOWN_METHOD => StatusCode::NOT_FOUND,
            code::FORBIDDEN => StatusCode::FORBIDDEN,
            code::DEADLINE => StatusCode::GATEWAY_TIMEOUT,
            code::TOO_LARGE => StatusCode::PAYLOAD_TOO_LARGE,
            code::VERSION_MISMATCH => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            code::NOT_LEADER => StatusCode::MISDIRECTED_REQUEST,
            code::DRAINING => StatusCode::SERVICE_UNAVAILABLE,
            code::INTERNAL => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::UNPROCESSABLE_ENTITY,
        }
    }

    /// The refusal as a message, cut to what a peer will read.
    pub(crate) fn to_bytes(&self) -> Bytes {
        let mut short = self.clone();
        if short.detail.len() > crate::MAX_REFUSAL / 2 {
            short.detail = short.detail.chars().take(crate::MAX_REFUSAL / 8).collect();
        }
        crate::encode(&short).expect("three texts encode")
    }
}

/// Why a call did not give an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No connection, or it broke. `sent`: the peer may have begun the call, and perhaps finished it.
    #[error("{endpoint} can't be reached: {reason}")]
    Unreachable { endpoint: Endpoint, reason: String, sent: bool },
    /// The peer may have finished the call all the same.
    #[error("no answer to `{method}` within {after:?}")]
    Deadline { method: String, after: Duration },
    #[error("refused, {code}: {detail}")]
    Refused { code: String, detail: String },
    #[error("the peer does not lead{}", leader.as_ref().map(|l| format!("; {l} does")).unwrap_or_default())]
    NotLeader { leader: Option<String> },
    /// The peer said something that the protocol does not know.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    #[error("this side speaks version {ours} of the protocol, the peer {theirs}")]
    VersionMismatch { ours: u16, theirs: String },
    #[error("a message is larger than {limit} bytes")]
    TooLarge { limit: usize },
    /// The message can't be encoded, or the stream to upload failed on this side.
    #[error("the request can't be sent: {0}")]
    Local(String),
}

impl WireError {
    /// Whether the same call may succeed later. It may also have succeeded already: see [`WireError::may_have_run`].
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Deadline { .. } | Self::NotLeader { .. } => true,
            Self::Refused { code, .. } => code == code::DRAINING,
            Self::Protocol(_) | Self::VersionMismatch { .. } | Self::TooLarge { .. } | Self::Local(_) => false,
        }
    }

    /// Whether the peer may have acted on the call.
    pub fn may_have_run(&self) -> bool {
        match self {
            Self::Unreachable { sent, .. } => *sent,
            Self::Deadline { .. } | Self::Protocol(_) => true,
            Self::Refused { .. } | Self::NotLeader { .. } => false,
            Self::VersionMismatch { .. } | Self::TooLarge { .. } | Self::Local(_) => false,
        }
    }

    pub(crate) fn from_refusal(refusal: Refusal, method: &str, after: Duration, ours: u16) -> Self {
        match &*refusal.code {
            code::DEADLINE => Self::Deadline { method: method.to_owned(), after },
            code::TOO_LARGE => Self::TooLarge { limit: refusal.detail.parse().unwrap_or(0) },
            code::NOT_LEADER => Self::NotLeader { leader: refusal.leader },
            code::VERSION_MISMATCH => Self::VersionMismatch { ours, theirs: refusal.detail },
            _ => Self::Refused { code: refusal.code.into_owned(), detail: refusal.detail },
        }
    }

    /// A reply's body that could not be read; `broken` words a broken connection.
    pub(crate) fn from_body(error: BodyError, endpoint: &Endpoint, broken: impl FnOnce(&h2::Error) -> String) -> Self {
        match error {
            BodyError::H2(e) => Self::Unreachable { endpoint: endpoint.clone(), reason: broken(&e), sent: true },
            BodyError::TooLarge { limit } => Self::TooLarge { limit },
            BodyError::CutOff => {
                let reason = "the reply was cut off".to_owned();
                Self::Unreachable { endpoint: endpoint.clone(), reason, sent: true }
            }
            BodyError::Malformed(what) => Self::Protocol(what),
        }
    }
}
