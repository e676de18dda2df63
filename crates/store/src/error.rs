//! What can go wrong, sorted by what the caller may conclude: not committed, perhaps committed, or never possible.

use crate::types::{LeaseId, Revision};

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nobody leads and no leader came in time. Nothing was committed; try again.
    #[error("the metadata store has no leader: {reason}")]
    NoLeader { reason: String },
    /// The store can't answer now (too few members reachable, or overloaded). Nothing was committed; try again.
    #[error("the metadata store is unavailable: {reason}")]
    Unavailable { reason: String },
    /// No answer came in time. The change may have been committed or may yet be; read before trying again.
    #[error("the outcome is unknown, the change may have been committed: {reason}")]
    Unknown { reason: String },
    /// More operations or bytes than one transaction may have.
    #[error("transaction too large: {what} is {actual}, at most {limit} allowed")]
    TooLarge { what: &'static str, actual: usize, limit: usize },
    /// The revision is older than the history that is kept.
    #[error("history before revision {oldest} has been compacted")]
    Compacted { oldest: Revision },
    /// The revision has not been reached.
    #[error("revision {asked} is in the future: the store is at {current}")]
    FutureRevision { asked: Revision, current: Revision },
    #[error("lease {0} does not exist")]
    LeaseNotFound(LeaseId),
    /// The request breaks the contract.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// This node's disk failed or is full. Nothing was committed by this call.
    #[error("storage failed: {0}")]
    Storage(String),
    /// There is hardly any room, so nothing may grow. Nothing was committed. The embedded engine still takes deletes and
    /// compaction, etcd nothing; the reason says what to do. It clears by itself once there is room.
    #[error("the metadata store is full, growth is refused: {0}")]
    Full(String),
    /// The membership can't be changed like this; the reason says what to do first.
    #[error("the membership was not changed: {0}")]
    Membership(String),
    /// The data folder was written by a newer release.
    #[error("{path} has format {found}; this release reads up to {supported}: run the newer release")]
    NewerFormat { path: String, found: u32, supported: u32 },
    /// The data folder is damaged where no crash could have damaged it.
    #[error("{path} is corrupt at byte {offset}: {reason}")]
    Corrupt { path: String, offset: u64, reason: String },
    /// This node's store has been shut down.
    #[error("the metadata store is closed")]
    Closed,
}

impl StoreError {
    /// True if nothing was committed and the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NoLeader { .. } | Self::Unavailable { .. })
    }

    /// True if the change may have been committed although no outcome is known.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. })
    }
}

/// Why a watch ended. Both mean: list again, and watch after the list's revision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The revisions that the watch needed next have been compacted.
    #[error("history before revision {oldest} has been compacted: list again")]
    Compacted { oldest: Revision },
    /// The reader fell behind further than the store keeps history.
    #[error("the watch fell behind the kept history: list again")]
    Lagged,
    #[error("the metadata store is closed")]
    Closed,
}

/// Why a peer did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The message certainly never reached the peer.
    #[error("peer unreachable: {0}")]
    Unreachable(String),
    /// The message may have been handled, but no answer came.
    #[error("no answer from peer: {0}")]
    Lost(String),
}
