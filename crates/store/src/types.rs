//! The words of the store's contract. Engine-neutral values; no behaviour but shape and limits.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::StoreError;

/// Compares and operations together.
pub const MAX_TXN_OPERATIONS: usize = 128;
/// Keys and values of compares and operations together.
pub const MAX_TXN_BYTES: usize = 1024 * 1024;

/// A position in a group's history. 0 is the empty store before its first change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    pub const ZERO: Self = Self(0);

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Revision {
    type Err = std::num::ParseIntError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self)
    }
}

/// The name of a group of keys (`global`, or a region): 1 to 63 of `a-z`, `0-9`, `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupId(String);

impl GroupId {
    pub fn new(name: &str) -> Result<Self, StoreError> {
        name.parse()
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GroupId {
    type Err = StoreError;

    fn from_str(s: &str) -> Result<Self, StoreError> {
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if (1..=63).contains(&s.len()) && s.bytes().all(fits) {
            Ok(Self(s.to_owned()))
        } else {
            Err(StoreError::Invalid(format!("`{s}` is no group name: 1 to 63 of a-z, 0-9 and -")))
        }
    }
}

impl TryFrom<String> for GroupId {
    type Error = StoreError;

    fn try_from(s: String) -> Result<Self, StoreError> {
        s.parse()
    }
}

impl From<GroupId> for String {
    fn from(id: GroupId) -> Self {
        id.0
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a lease. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A condition of a transaction on one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    pub key: Bytes,
    pub target: CompareTarget,
}

/// What a [`Compare`] wants of its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompareTarget {
    Exists(bool),
    /// The key was last changed at exactly this revision; 0 means that it does not exist.
    ModRevision(Revision),
    /// The key exists and holds exactly this.
    Value(Bytes),
}

impl Compare {
    pub fn exists(key: impl Into<Bytes>) -> Self {
        Self { key: key.into(), target: CompareTarget::Exists(true) }
    }

    pub fn absent(key: impl Into<Bytes>) -> Self {
        Self { key: key.into(), target: CompareTarget::Exists(false) }
    }

    pub fn mod_revision(key: impl Into<Bytes>, revision: Revision) -> Self {
        Self { key: key.into(), target: CompareTarget::ModRevision(revision) }
    }

    pub fn value(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self { key: key.into(), target: CompareTarget::Value(value.into()) }
    }
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Without a lease the key is detached from the one that it had.
    Put {
        key: Bytes,
        value: Bytes,
        lease: Option<LeaseId>,
    },
    Delete {
        key: Bytes,
    },
}

impl Op {
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self::Delete { key: key.into() }
    }

    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All `ops` if all `compares` hold, else nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub ops: Vec<Op>,
}

impl Txn {
    pub fn new(compares: Vec<Compare>, ops: Vec<Op>) -> Self {
        Self { compares, ops }
    }

    /// One unconditional put.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self { compares: Vec::new(), ops: vec![Op::put(key, value)] }
    }

    /// One unconditional delete.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self { compares: Vec::new(), ops: vec![Op::delete(key)] }
    }

    /// Bytes of all keys and values: what [`MAX_TXN_BYTES`] limits.
    pub fn bytes(&self) -> usize {
        let compares = self.compares.iter().map(|c| {
            c.key.len()
                + match &c.target {
                    CompareTarget::Value(value) => value.len(),
                    CompareTarget::Exists(_) | CompareTarget::ModRevision(_) => 0,
                }
        });
        let ops = self.ops.iter().map(|op| match op {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete { key } => key.len(),
        });
        compares.chain(ops).sum()
    }

    /// Checks the limits of the contract.
    pub fn validate(&self) -> Result<(), StoreError> {
        let operations = self.compares.len() + self.ops.len();
        if operations > MAX_TXN_OPERATIONS {
            let what = "the number of compares and operations";
            return Err(StoreError::TooLarge { what, actual: operations, limit: MAX_TXN_OPERATIONS });
        }
        let bytes = self.bytes();
        if bytes > MAX_TXN_BYTES {
            let what = "the size in bytes";
            return Err(StoreError::TooLarge { what, actual: bytes, limit: MAX_TXN_BYTES });
        }
        let keys = self.compares.iter().map(|c| &c.key).chain(self.ops.iter().map(Op::key));
        if keys.into_iter().any(Bytes::is_empty) {
            return Err(StoreError::Invalid("a key is empty".into()));
        }
        Ok(())
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TxnOutcome {
    Committed {
        revision: Revision,
    },
    /// `index` is the first compare that did not hold, at `revision`.
    CompareFailed {
        revision: Revision,
        index: usize,
    },
}

impl TxnOutcome {
    pub fn revision(&self) -> Revision {
        match self {
            Self::Committed { revision } | Self::CompareFailed { revision, .. } => *revision,
        }
    }

    pub fn is_committed(&self) -> bool {
        matches!(self, Self::Committed { .. })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyValue {
    pub key: Bytes,
    pub value: Bytes,
    /// When the key last came into being.
    pub create_revision: Revision,
    /// When the key was last put.
    pub mod_revision: Revision,
}

/// How fresh a read has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    /// Sees every change that was acknowledged before the read began.
    #[default]
    Linearizable,
    /// What this node knows; works without a leader.
    Stale,
}

/// The keys in `[start, end)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRequest {
    pub start: Bytes,
    /// Exclusive; empty means to the end of the group.
    pub end: Bytes,
    /// 0 means no limit.
    pub limit: usize,
    /// A past revision to read at; `None` is the newest.
    pub at: Option<Revision>,
    pub consistency: Consistency,
    /// From the last key to the first.
    pub reverse: bool,
}

impl RangeRequest {
    pub fn new(start: impl Into<Bytes>, end: impl Into<Bytes>) -> Self {
        Self {
            start: start.into(),
            end: end.into(),
            limit: 0,
            at: None,
            consistency: Consistency::Linearizable,
            reverse: false,
        }
    }

    /// Every key that begins with `prefix`.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let prefix = prefix.into();
        let end = prefix_end(&prefix);
        Self::new(prefix, end)
    }

    /// One key.
    pub fn get(key: impl Into<Bytes>) -> Self {
        let key = key.into();
        let mut end = Vec::with_capacity(key.len() + 1);
        end.extend_from_slice(&key);
        end.push(0);
        Self { limit: 1, ..Self::new(key, end) }
    }

    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    pub fn at(mut self, revision: Revision) -> Self {
        self.at = Some(revision);
        self
    }

    pub fn stale(mut self) -> Self {
        self.consistency = Consistency::Stale;
        self
    }

    pub fn reversed(mut self) -> Self {
        self.reverse = true;
        self
    }
}

/// The end of the range of keys that begin with `prefix`: empty (no bound) if the prefix is empty or all `0xff`.
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            break;
        }
    }
    end.into()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeResponse {
    /// The revision that the answer shows.
    pub revision: Revision,
    pub kvs: Vec<KeyValue>,
    /// The limit left keys out.
    pub more: bool,
}

/// A change of one key, with what it replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    Put { kv: KeyValue, prev: Option<KeyValue> },
    Delete { key: Bytes, prev: Option<KeyValue>, mod_revision: Revision },
}

impl WatchEvent {
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { kv, .. } => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// What one revision changed in a watched range. No events: a notice that nothing up to `revision` is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    pub revision: Revision,
    /// Hybrid logical: close to wall time in milliseconds, and strictly growing with the revision.
    pub timestamp_ms: i64,
    pub events: Vec<WatchEvent>,
}

/// Who leads a group, as one node sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leadership {
    pub leader: Option<u64>,
    /// Grows with every change of leader.
    pub epoch: u64,
    pub is_self: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub endpoint: String,
    /// Takes part in elections and quorums.
    pub voter: bool,
}

/// How one member does, as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberHealth {
    pub node: u64,
    pub endpoint: String,
    /// Takes part in elections and quorums.
    pub voter: bool,
    /// Answered within about the last second.
    pub reachable: bool,
    /// The last log entry that it is known to have.
    pub matched: Option<u64>,
    pub lag_entries: u64,
    /// How far its wall clock is ahead of the leader's, by the quickest of the last round trips.
    pub clock_skew_ms: Option<i64>,
    /// The highest feature level that its release supports; 0 until it has said it.
    pub feature_level: u32,
}

/// How close one node's store is to having no room left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pressure {
    #[default]
    None,
    /// Time to make room; nothing is refused yet. With the reason.
    High(String),
    /// Growth is refused until there is room again. With the reason.
    Full(String),
}

impl Pressure {
    /// Why there is pressure, if there is any.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::None => None,
            Self::High(reason) | Self::Full(reason) => Some(reason),
        }
    }
}

/// What an operator wants to know of one node's store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoreStatus {
    pub node: u64,
    pub group: GroupId,
    pub leader: Option<u64>,
    pub is_leader: bool,
    pub epoch: u64,
    /// The newest revision that this node shows.
    pub applied: Revision,
    /// The oldest revision that can be read at or watched after.
    pub oldest: Revision,
    pub members: BTreeMap<u64, Member>,
    pub keys: u64,
    pub leases: u64,
    pub watchers: u64,
    pub log_bytes: u64,
    pub snapshot_bytes: u64,
    /// Moving average of the time from proposal to commit, as measured where this node proposed. Zero before the first.
    pub commit_latency: Duration,
    /// Bytes that can still be written to the disk of the data folder, as last measured; `None` when unknown.
    pub disk_free_bytes: Option<u64>,
    /// What keys, values and history take in memory, roughly.
    pub state_bytes: u64,
    pub pressure: Pressure,
    /// How often the group was begun anew by a survivor, plus one.
    #[serde(default)]
    pub generation: u64,
    /// What stored data and messages may contain: what every member's release can read.
    #[serde(default)]
    pub feature_level: u32,
    /// The highest feature level that this node's release supports.
    #[serde(default)]
    pub supported_level: u32,
    /// Why this node's store has stopped, if it has.
    pub failure: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_range_ends_after_the_last_key_with_the_prefix() {
        assert_eq!(prefix_end(b"ab"), Bytes::from_static(b"ac"));
        assert_eq!(prefix_end(b"a\xff\xff"), Bytes::from_static(b"b"));
        assert_eq!(prefix_end(b"\xff"), Bytes::new());
        assert_eq!(prefix_end(b""), Bytes::new());
    }

    #[test]
    fn limits_are_checked_and_named() {
        let many = Txn::new(vec![], (0..=MAX_TXN_OPERATIONS).map(|i| Op::delete(format!("k{i}"))).collect());
        assert!(matches!(many.validate(), Err(StoreError::TooLarge { actual: 129, limit: 128, .. })));
        let big = Txn::put("k", vec![0; MAX_TXN_BYTES]);
        assert!(matches!(big.validate(), Err(StoreError::TooLarge { limit: MAX_TXN_BYTES, .. })));
        assert!(Txn::put("k", vec![0; MAX_TXN_BYTES - 1]).validate().is_ok());
        assert!(matches!(Txn::put("", "v").validate(), Err(StoreError::Invalid(_))));
    }

    #[test]
    fn group_names_are_checked_when_read() {
        assert!(GroupId::new("eu-1").is_ok());
        for bad in ["", "EU", "a/b", &"x".repeat(64)] {
            assert!(GroupId::new(bad).is_err(), "{bad}");
        }
    }
}
