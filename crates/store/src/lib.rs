//! The metadata store: ordered MVCC keys, transactions, watch and leases.
//!
//! A [`Store`] is a handle on one group of keys. Every committed change has a [`Revision`], one more than the one
//! before it; reads can ask for a past revision and watches resume after one, back to the last compaction.
//! Which engine runs is nobody's business but the binary's: [`embedded`] is a replicated log inside the servers, `etcd`
//! (behind the feature of that name) is a cluster of etcd.
//!
//! Architecture invariant: nothing here knows what keys and values mean.

pub mod backup;
pub mod embedded;
mod error;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod offline;
mod types;
mod watch;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub use error::{PeerError, StoreError, WatchError};
pub use types::{
    Compare, CompareTarget, Consistency, GroupId, KeyValue, Leadership, LeaseId, MAX_TXN_BYTES, MAX_TXN_OPERATIONS,
    Member, MemberHealth, Op, Pressure, RangeRequest, RangeResponse, Revision, StoreStatus, Txn, TxnOutcome,
    WatchBatch, WatchEvent, prefix_end,
};
pub use watch::{Watch, WatchSource};

/// The contract that every engine keeps, for one group of keys.
#[async_trait]
pub trait Store: Send + Sync {
    /// Commits all operations if all compares hold, or nothing. Operations apply in order and become visible together
    /// at one revision; when several name the same key, only the last counts. A transaction that changes nothing
    /// (no operations, or deletes of missing keys) answers the current revision and makes no new one.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Whether transactions that one task begins one after another at the member that leads, without waiting for their
    /// outcomes, are applied in that order, those that are applied at all.
    fn keeps_order(&self) -> bool;

    /// The keys of a range, in order.
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError>;

    /// Every revision after `after` that touched `[start, end)` (an empty `end` is no bound), once and in order.
    /// `after` may be the current revision, but not one that has been compacted.
    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError>;

    /// A lease that ends `ttl` after its last keep-alive, by the leader's clock, and takes its keys with it. A new
    /// leader starts every lease anew, so a lease may last longer than asked, never shorter by that clock. Clocks differ in
    /// speed: whoever counts on a lease measures from before it asked, by its own monotonic clock, and relies on nine tenths
    /// of the time. That is safe as long as no clock is more than 5 % too fast or too slow.
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Starts the lease's time anew; answers its time to live.
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, StoreError>;

    /// Ends a lease and deletes its keys in one revision.
    async fn lease_revoke(&self, id: LeaseId) -> Result<(), StoreError>;

    /// Forgets the history before a revision: it becomes the oldest that can be read at or watched after.
    async fn compact(&self, before: Revision) -> Result<(), StoreError>;

    async fn status(&self) -> StoreStatus;

    /// Through which other members, in order, messages to a member go now. Empty: directly, or no way is known.
    fn way_to(&self, _node: u64) -> Vec<u64> {
        Vec::new()
    }

    /// Who leads, as this node sees it.
    fn leadership(&self) -> tokio::sync::watch::Receiver<Leadership>;
}
