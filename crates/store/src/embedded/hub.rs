//! Who watches what, and how changes reach them.
//!
//! Each watcher has a bounded queue that applying fills. When it is full the watcher is taken off the live feed and,
//! once its reader has drained the queue, it reads on from the kept history until it is level again. So a slow reader
//! costs a bounded amount of memory and misses nothing until history itself is gone.
//!
//! Nearly every watch is one key or one prefix. Both are found by hash: for a changed key one lookup, plus one for each
//! length of prefix in use. Other ranges are tried one by one.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::machine::Shared;
use crate::error::{StoreError, WatchError};
use crate::types::{Revision, WatchBatch, WatchEvent, prefix_end};
use crate::watch::{Watch, WatchSource};

/// Batches that wait for one reader before it leaves the live feed.
const QUEUE: usize = 256;
/// Revisions of history that one catch-up step looks at, so that the state's lock is held briefly.
const CATCH_UP_STEP: usize = 2_048;

#[derive(Default)]
struct QueueState {
    batches: VecDeque<WatchBatch>,
    /// On the live feed: nothing after what is queued is missing.
    live: bool,
    closed: bool,
    /// The newest revision that was queued or announced.
    told: u64,
}

pub struct Queue {
    start: Bytes,
    end: Bytes,
    state: Mutex<QueueState>,
    wake: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn covers(&self, key: &Bytes) -> bool {
        *key >= self.start && (self.end.is_empty() || *key < self.end)
    }

    fn push(&self, batch: WatchBatch) {
        {
            let mut q = self.lock();
            if !q.live {
                return;
            }
            if q.batches.len() >= QUEUE {
                q.live = false;
                return;
            }
            q.told = batch.revision.0;
            q.batches.push_back(batch);
        }
        self.wake.notify_one();
    }
}

enum Shape {
    Key,
    Prefix,
    Other,
}

fn shape(start: &Bytes, end: &Bytes) -> Shape {
    if end.len() == start.len() + 1 && end.starts_with(start) && end[start.len()] == 0 {
        Shape::Key
    } else if *end == prefix_end(start) {
        Shape::Prefix
    } else {
        Shape::Other
    }
}

#[derive(Default)]
struct Index {
    next: u64,
    queues: BTreeMap<u64, Arc<Queue>>,
    keys: HashMap<Bytes, BTreeSet<u64>>,
    prefixes: HashMap<Bytes, BTreeSet<u64>>,
    /// How many prefixes of each length are in use.
    lengths: BTreeMap<usize, usize>,
    others: BTreeSet<u64>,
    closed: bool,
}

impl Index {
    fn watchers_of(&self, key: &Bytes, found: &mut BTreeSet<u64>) {
        found.extend(self.keys.get(key).into_iter().flatten());
        for &length in self.lengths.keys() {
            if length > key.len() {
                break;
            }
            found.extend(self.prefixes.get(&key[..length]).into_iter().flatten());
        }
        found.extend(self.others.iter().filter(|id| self.queues.get(id).is_some_and(|q| q.covers(key))));
    }
}

#[derive(Default)]
pub struct Hub {
    index: Mutex<Index>,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn watchers(&self) -> usize {
        self.lock().queues.len()
    }

    fn register(&self, start: Bytes, end: Bytes) -> (u64, Arc<Queue>) {
        let mut index = self.lock();
        let id = index.next;
        index.next += 1;
        match shape(&start, &end) {
            Shape::Key => drop(index.keys.entry(start.clone()).or_default().insert(id)),
            Shape::Prefix => {
                let watchers = index.prefixes.entry(start.clone()).or_default();
                let first = watchers.is_empty();
                watchers.insert(id);
                if first {
                    *index.lengths.entry(start.len()).or_default() += 1;
                }
            }
            Shape::Other => drop(index.others.insert(id)),
        }
        let closed = index.closed;
        let state = Mutex::new(QueueState { closed, ..QueueState::default() });
        let queue = Arc::new(Queue { start, end, state, wake: Notify::new() });
        index.queues.insert(id, queue.clone());
        (id, queue)
    }

    fn unregister(&self, id: u64) {
        let mut guard = self.lock();
        let index = &mut *guard;
        let Some(queue) = index.queues.remove(&id) else { return };
        index.others.remove(&id);
        match shape(&queue.start, &queue.end) {
            Shape::Key => {
                if let Some(watchers) = index.keys.get_mut(&queue.start) {
                    watchers.remove(&id);
                    if watchers.is_empty() {
                        index.keys.remove(&queue.start);
                    }
                }
            }
            Shape::Prefix => {
                let Some(watchers) = index.prefixes.get_mut(&queue.start) else { return };
                watchers.remove(&id);
                if watchers.is_empty() {
                    index.prefixes.remove(&queue.start);
                    let length = queue.start.len();
                    let left = index.lengths.get_mut(&length).map_or(0, |n| {
                        *n -= 1;
                        *n
                    });
                    if left == 0 {
                        index.lengths.remove(&length);
                    }
                }
            }
            Shape::Other => {}
        }
    }

    /// Hands new revisions to those who watch them. Called with the state locked for writing, so that a watcher that
    /// has just caught up misses nothing.
    pub fn publish(&self, changes: &[WatchBatch]) {
        let index = self.lock();
        if index.queues.is_empty() {
            return;
        }
        let mut found = BTreeSet::new();
        for batch in changes {
            let mut per_watcher: BTreeMap<u64, Vec<WatchEvent>> = BTreeMap::new();
            for event in &batch.events {
                found.clear();
                index.watchers_of(event.key(), &mut found);
                for id in &found {
                    per_watcher.entry(*id).or_default().push(event.clone());
                }
            }
            for (id, events) in per_watcher {
                if let Some(queue) = index.queues.get(&id) {
                    queue.push(WatchBatch { events, ..*batch });
                }
            }
        }
    }

    /// Tells idle watchers how far the store is, so that their cursors do not fall behind compaction. Called with the
    /// state locked for reading.
    pub fn announce(&self, revision: crate::types::Revision, timestamp_ms: i64) {
        for queue in self.lock().queues.values() {
            let idle = {
                let q = queue.lock();
                q.live && q.batches.is_empty() && q.told < revision.0
            };
            if idle {
                queue.push(WatchBatch { revision, timestamp_ms, events: Vec::new() });
            }
        }
    }

    /// The state was replaced by a snapshot: everyone reads on from its history.
    pub fn restart(&self) {
        for queue in self.lock().queues.values() {
            queue.lock().live = false;
            queue.wake.notify_one();
        }
    }

    /// Ends every watch, now and in future.
    pub fn close(&self) {
        let mut index = self.lock();
        index.closed = true;
        for queue in index.queues.values() {
            queue.lock().closed = true;
            queue.wake.notify_one();
        }
    }
}

/// One watch on the embedded engine.
pub struct EmbeddedWatch {
    shared: Arc<Shared>,
    id: u64,
    queue: Arc<Queue>,
    /// Everything up to here has been given out or is in `ready`.
    cursor: u64,
    ready: VecDeque<WatchBatch>,
    ended: bool,
}

impl EmbeddedWatch {
    /// Watches `[start, end)` after a revision. That may come from a member that is ahead of this one, so it is waited
    /// for, up to `limit`.
    pub async fn open(
        shared: &Arc<Shared>,
        (start, end): (Bytes, Bytes),
        after: Revision,
        limit: Duration,
    ) -> Result<Watch, StoreError> {
        if !end.is_empty() && start >= end {
            return Err(StoreError::Invalid("the watched range is empty".into()));
        }
        if timeout(limit, shared.reached(|p| p.revision >= after.0)).await != Ok(true) {
            let current = shared.read().revision();
            return Err(StoreError::FutureRevision { asked: after, current });
        }
        let oldest = shared.read().oldest();
        if after < oldest {
            return Err(StoreError::Compacted { oldest });
        }
        let (id, queue) = shared.hub.register(start, end);
        let shared = shared.clone();
        let watch = Self { shared, id, queue, cursor: after.0, ready: VecDeque::new(), ended: false };
        Ok(Watch::new(Box::new(watch)))
    }

    fn catch_up(&mut self) -> Result<(), WatchError> {
        let state = self.shared.read();
        if self.cursor < state.counters.oldest {
            return Err(WatchError::Lagged);
        }
        // A member that was restored to an earlier state has nothing for this watch yet.
        if self.cursor <= state.counters.revision {
            let (found, seen) = state.changes_after(self.cursor, CATCH_UP_STEP, |key| self.queue.covers(key));
            self.ready.extend(found);
            self.cursor = seen;
        }
        if self.cursor >= state.counters.revision {
            let mut q = self.queue.lock();
            q.live = true;
            q.told = self.cursor;
        }
        Ok(())
    }
}

#[async_trait]
impl WatchSource for EmbeddedWatch {
    async fn next(&mut self) -> Option<Result<WatchBatch, WatchError>> {
        while !self.ended {
            if let Some(batch) = self.ready.pop_front() {
                return Some(Ok(batch));
            }
            let behind = {
                let mut q = self.queue.lock();
                while let Some(batch) = q.batches.pop_front() {
                    if batch.revision.0 > self.cursor {
                        self.cursor = batch.revision.0;
                        return Some(Ok(batch));
                    }
                }
                if q.closed {
                    self.ended = true;
                    return Some(Err(WatchError::Closed));
                }
                !q.live
            };
            if behind {
                if let Err(e) = self.catch_up() {
                    self.ended = true;
                    return Some(Err(e));
                }
                tokio::task::consume_budget().await;
            } else {
                self.queue.wake.notified().await;
            }
        }
        None
    }
}

impl Drop for EmbeddedWatch {
    fn drop(&mut self) {
        self.shared.hub.unregister(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_finds_its_watchers_and_no_others() {
        let hub = Hub::default();
        let watch = |start: &str, end: Bytes| hub.register(Bytes::copy_from_slice(start.as_bytes()), end).0;
        let key = watch("a/1", Bytes::from_static(b"a/1\0"));
        let prefix = watch("a/", prefix_end(b"a/"));
        let all = watch("", Bytes::new());
        let other = watch("a/0", Bytes::from_static(b"a/5"));
        let far = watch("b", prefix_end(b"b"));
        let find = |k: &'static str| {
            let mut found = BTreeSet::new();
            hub.lock().watchers_of(&Bytes::from_static(k.as_bytes()), &mut found);
            found
        };
        assert_eq!(find("a/1"), BTreeSet::from([key, prefix, all, other]));
        assert_eq!(find("a/12"), BTreeSet::from([prefix, all, other]));
        assert_eq!(find("a/7"), BTreeSet::from([prefix, all]));
        assert_eq!(find("b"), BTreeSet::from([all, far]));
        for id in [key, prefix, all, other, far] {
            hub.unregister(id);
        }
        let index = hub.lock();
        assert!(index.keys.is_empty() && index.prefixes.is_empty() && index.lengths.is_empty());
    }
}
