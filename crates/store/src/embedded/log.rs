//! The consensus library's view of the log: entries since the last purge in memory, every change durable through the
//! group-commit writer before it is acknowledged.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{LogState, RaftLogReader};

use super::eager::Eager;
use super::raft::{Entry, LogId, StorageError, TypeConfig, Vote, log_error};
use super::snapshot::SnapshotDir;
use super::wal::{GroupLog, Kind};
use super::writer::{Done, Job, Record, WalHandle, to_body};
use crate::types::GroupId;

/// One replication message carries at most about this much, so that it stays well under what the wire allows.
const MESSAGE_BYTES: u64 = 1 << 20;

struct Inner {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// From the entry after `purged` on, without a gap, with the size of each.
    entries: VecDeque<(Entry, u64)>,
}

impl Inner {
    fn last(&self) -> Option<LogId> {
        self.entries.back().map(|(e, _)| e.log_id).or(self.purged)
    }

    /// The stored entries of a range.
    fn slice(&self, range: &impl RangeBounds<u64>) -> impl Iterator<Item = &(Entry, u64)> {
        let first = self.entries.front().map_or(0, |(e, _)| e.log_id.index);
        let from = match range.start_bound() {
            Bound::Included(&i) => i,
            Bound::Excluded(&i) => i + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(&i) => i.saturating_add(1),
            Bound::Excluded(&i) => i,
            Bound::Unbounded => u64::MAX,
        };
        let len = self.entries.len() as u64;
        let from = from.saturating_sub(first).min(len);
        let to = to.saturating_sub(first).min(len).max(from);
        self.entries.range(from as usize..to as usize)
    }
}

/// Clones share one log.
#[derive(Clone)]
pub struct LogStore {
    node: u64,
    group: GroupId,
    inner: Arc<Mutex<Inner>>,
    wal: WalHandle,
    eager: Arc<Eager>,
    snapshots: Arc<SnapshotDir>,
}

impl LogStore {
    pub fn new(
        node: u64,
        group: GroupId,
        log: GroupLog,
        wal: WalHandle,
        eager: Arc<Eager>,
        snapshots: Arc<SnapshotDir>,
    ) -> Self {
        let GroupLog { vote, committed, purged, entries } = log;
        // The consensus library lets a leader that restarts go on in its old term, which is safe only if nothing was
        // sent before it was durable here, and if the commit position was. Neither holds (see `eager`, and
        // `save_committed`): a follower may hold an entry that this member has lost, and this member would give its
        // place to another. So a leader comes back as one that has merely voted for itself, and needs a new term.
        let vote = vote.map(|v| Vote { committed: v.committed && v.leader_id.voted_for != Some(node), ..v });
        let inner = Inner { vote, committed, purged, entries };
        Self { node, group, inner: Arc::new(Mutex::new(inner)), wal, eager, snapshots }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, kind: Kind, body: Vec<u8>) -> Record {
        Record { kind, group: self.group.clone(), body, index: None }
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        Ok(self.lock().slice(&range).map(|(e, _)| e.clone()).collect())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        let inner = self.lock();
        let mut bytes = 0;
        let mut out = Vec::new();
        for (entry, size) in inner.slice(&(start..end)) {
            bytes += size;
            if bytes > MESSAGE_BYTES && !out.is_empty() {
                break;
            }
            out.push(entry.clone());
        }
        Ok(out)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let inner = self.lock();
        Ok(LogState { last_purged_log_id: inner.purged, last_log_id: inner.last() })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let record = self.record(Kind::Vote, to_body(vote));
        self.wal.write(vec![record]).await.map_err(log_error)?;
        self.lock().vote = Some(*vote);
        Ok(())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        Ok(self.lock().vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        if let Some(id) = committed {
            self.lock().committed = Some(id);
            self.wal.gauges.note_committed(&self.group, to_body(&id));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        let inner = self.lock();
        // Positions are not synced by themselves; one must never point behind the log.
        Ok(inner.committed.min(inner.last()))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let mut records = Vec::new();
        let mut sized = Vec::new();
        for entry in entries {
            let body = to_body(&entry);
            sized.push((entry.clone(), body.len() as u64));
            records.push(Record {
                kind: Kind::Entry,
                group: self.group.clone(),
                body,
                index: Some(entry.log_id.index),
            });
        }
        let lead = {
            let mut inner = self.lock();
            let prev = inner.last();
            let vote = inner.vote.filter(|v| v.committed && v.leader_id.voted_for == Some(self.node));
            let lead = vote.map(|vote| {
                let entries: Vec<Entry> = sized.iter().map(|(e, _)| e.clone()).collect();
                (vote, prev, entries, inner.committed)
            });
            inner.entries.extend(sized);
            lead
        };
        // A leader's followers write at the same time as it does itself, not after it.
        if let Some((vote, prev, entries, committed)) = lead {
            self.eager.send(vote, prev, entries, committed);
        }
        self.wal.submit(Job { records, done: Done::Flushed(callback) }).await.map_err(log_error)
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        {
            let mut inner = self.lock();
            while inner.entries.back().is_some_and(|(e, _)| e.log_id.index >= log_id.index) {
                inner.entries.pop_back();
            }
        }
        let record = self.record(Kind::Truncate, log_id.index.to_le_bytes().to_vec());
        self.wal.write(vec![record]).await.map_err(log_error)
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.snapshots.holds(log_id).await.map_err(log_error)?;
        {
            let mut inner = self.lock();
            while inner.entries.front().is_some_and(|(e, _)| e.log_id.index <= log_id.index) {
                inner.entries.pop_front();
            }
            inner.purged = inner.purged.max(Some(log_id));
        }
        let (tx, rx) = tokio::sync::oneshot::channel();
        let record = self.record(Kind::Purge, to_body(&log_id));
        let done = Done::Purged(self.group.clone(), log_id.index, tx);
        self.wal.submit(Job { records: vec![record], done }).await.map_err(log_error)?;
        rx.await.map_err(log_error)?.map_err(log_error)
    }
}
