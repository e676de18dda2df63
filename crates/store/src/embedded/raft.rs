//! The types that the consensus library is instantiated with, and what peers say to each other.
//!
//! Every message is one version byte and MessagePack. A log entry carries a [`Batch`] in the same form, encoded once
//! where it is proposed, so that log, network and state machine copy bytes instead of walking structures.

use bytes::Bytes;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::reach::LinkState;
use super::snapshot::SnapshotFile;
use crate::types::{LeaseId, MemberHealth, Revision, Txn, TxnOutcome};

openraft::declare_raft_types!(
    /// One group's consensus.
    pub TypeConfig:
        D = Proposal,
        R = Applied,
        NodeId = u64,
        Node = openraft::BasicNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = SnapshotFile,
        AsyncRuntime = super::runtime::Patient,
);

pub type Raft = openraft::Raft<TypeConfig>;
pub type Entry = openraft::Entry<TypeConfig>;
pub type LogId = openraft::LogId<u64>;
pub type Vote = openraft::Vote<u64>;
pub type Membership = openraft::StoredMembership<u64, openraft::BasicNode>;
pub type SnapshotMeta = openraft::SnapshotMeta<u64, openraft::BasicNode>;
pub type StorageError = openraft::StorageError<u64>;
pub type StorageIoError = openraft::StorageIOError<u64>;

/// The version of everything that this file encodes.
const VERSION: u8 = 1;

/// An encoded [`Batch`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proposal(pub Bytes);

impl std::fmt::Debug for Proposal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proposal({} bytes)", self.0.len())
    }
}

/// What each command of a batch came to, in order. Empty for entries that are not batches.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Applied(pub Vec<Outcome>);

/// The commands of one log entry, from any number of clients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Batch {
    /// The leader's wall clock.
    pub at_ms: i64,
    pub commands: Vec<Command>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    Txn(Txn),
    Grant {
        ttl_ms: u64,
    },
    Revoke {
        id: LeaseId,
    },
    /// The leader found these leases' time over.
    Expire {
        ids: Vec<LeaseId>,
    },
    Compact {
        before: Revision,
    },
    /// Every member's release can read what this feature level writes.
    Raise {
        level: u32,
    },
}

impl Command {
    /// Roughly what it takes in a log entry.
    pub fn bytes(&self) -> usize {
        64 + match self {
            Self::Txn(txn) => txn.bytes() + 32 * (txn.ops.len() + txn.compares.len()),
            Self::Expire { ids } => ids.len() * 9,
            Self::Grant { .. } | Self::Revoke { .. } | Self::Compact { .. } | Self::Raise { .. } => 0,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Txn(TxnOutcome),
    Granted(LeaseId),
    Done,
    LeaseNotFound(LeaseId),
    Future {
        current: Revision,
    },
    /// An entry that this release can't read; see [`decode`].
    Unreadable,
}

/// What one member asks another.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<u64>),
    Snapshot(SnapshotChunk),
    /// Commands for the leader, each answered by itself.
    Forward {
        commands: Vec<Command>,
        timeout_ms: u64,
    },
    /// The log index that a linearizable read has to wait for.
    ReadIndex {
        timeout_ms: u64,
    },
    KeepAlive {
        id: LeaseId,
        timeout_ms: u64,
    },
    /// Whether this member lives, and what it knows of the links.
    Ping(Vec<LinkState>),
    /// Whether a vote would be given to a candidate whose log ends here.
    PreVote {
        last: Option<LogId>,
    },
    /// The leader makes room: this member is to stand for election at once.
    TakeOver,
    /// A change of the membership, for the leader.
    Change(Change),
    /// How the members do, for the leader.
    Health,
}

impl Request {
    /// Whether doing it twice is as good as once, so that it may be sent again when no answer came.
    pub fn is_repeatable(&self) -> bool {
        !matches!(self, Self::Forward { .. })
    }
}

/// One step of the membership. Each may be asked for again when it is done already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    AddLearner {
        node: u64,
        endpoint: String,
    },
    Promote {
        node: u64,
    },
    Remove {
        node: u64,
    },
    /// Gives the place of one voter to another member.
    Swap {
        old: u64,
        new: u64,
    },
    /// The member lives elsewhere now.
    Move {
        node: u64,
        endpoint: String,
    },
    /// A voter reads along from now on.
    Demote {
        node: u64,
    },
}

/// What a member says to a ping.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pong {
    pub at_ms: i64,
    pub links: Vec<LinkState>,
    /// The highest feature level that its release supports.
    pub feature: u32,
    /// Set if whoever asks is not in the membership.
    pub stranger: Option<Stranger>,
}

/// Why a member takes another for none of the group's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stranger {
    /// Where the membership stands in the log.
    pub since: Option<LogId>,
    pub vote: Vote,
    pub leads: bool,
}

/// A piece of a snapshot file, in order; the first has offset 0.
#[derive(Debug, Serialize, Deserialize)]
pub struct SnapshotChunk {
    pub vote: Vote,
    pub meta: SnapshotMeta,
    pub offset: u64,
    pub data: Bytes,
    pub done: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    Append(AppendEntriesResponse<u64>),
    Vote(VoteResponse<u64>),
    /// The chunk is written; go on.
    SnapshotMore,
    SnapshotDone(SnapshotResponse<u64>),
    Forward(Vec<Result<Outcome, Failure>>),
    ReadIndex(u64),
    KeepAlive {
        ttl_ms: u64,
    },
    LeaseNotFound,
    Failed(Failure),
    Pong(Pong),
    PreVote {
        granted: bool,
        vote: Vote,
    },
    /// Done: elections and changes of the membership.
    Done,
    Health(Vec<MemberHealth>),
    /// A relay could not pass the message from one member to the next.
    NotPassed {
        from: u64,
        to: u64,
        /// It may have arrived all the same.
        sent: bool,
        reason: String,
    },
}

/// Why a member could not do it, sorted by what that means for the outcome.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Failure {
    /// Nothing was done: ask the leader.
    NotLeader,
    /// Nothing was done.
    Unavailable(String),
    /// It may have been done.
    Unknown(String),
    /// This member's store has stopped.
    Stopped(String),
    /// Nothing was done: the leader has no room for growth.
    Full(String),
    /// Nothing was done: the message was meant for another member.
    Astray(String),
    /// Nothing was done: the sender belongs to a generation that is over; this is the present one.
    Fenced(u64),
    /// Nothing was done, and trying again won't help.
    Refused(String),
}

/// Bytes that are no message of a version that this release reads.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("empty message")]
    Empty,
    #[error("message version {0}; this release reads {VERSION}")]
    Version(u8),
    #[error("the envelope ends too early or names too many hops")]
    Envelope,
    #[error("malformed message: {0}")]
    Malformed(#[from] rmp_serde::decode::Error),
}

pub fn encode<T: Serialize>(value: &T) -> Bytes {
    let mut out = Vec::with_capacity(256);
    out.push(VERSION);
    rmp_serde::encode::write(&mut out, value).expect("our own plain types always encode");
    out.into()
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    match bytes.split_first() {
        None => Err(DecodeError::Empty),
        Some((&VERSION, rest)) => Ok(rmp_serde::from_slice(rest)?),
        Some((&other, _)) => Err(DecodeError::Version(other)),
    }
}

/// A storage error in the consensus library's words.
pub fn log_error(e: impl std::fmt::Display) -> StorageError {
    StorageIoError::write_logs(openraft::AnyError::error(e)).into()
}

pub fn machine_error(e: impl std::fmt::Display) -> StorageError {
    StorageIoError::write_state_machine(openraft::AnyError::error(e)).into()
}
