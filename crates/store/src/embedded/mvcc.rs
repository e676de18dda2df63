//! The state that the log builds: keys with their history, and leases.
//!
//! Everything is in persistent maps, so a clone is a consistent snapshot and costs nothing. Applying is pure: the same
//! batches in the same order give the same state on every member. The history holds, for each revision after `oldest`,
//! which keys it changed; values live only in the keys' slots, oldest version first.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use imbl::{OrdMap, OrdSet, Vector};
use serde::{Deserialize, Serialize};

use super::raft::{Batch, Command, LogId, Membership, Outcome};
use crate::error::StoreError;
use crate::types::{
    Compare, CompareTarget, KeyValue, LeaseId, Op, RangeRequest, RangeResponse, Revision, Txn, TxnOutcome, WatchBatch,
    WatchEvent,
};

/// How much history is kept without being asked to compact.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// At least this many revisions, unless they exceed `hard_bytes`.
    pub revisions: usize,
    /// At most this many revisions.
    pub max_revisions: usize,
    /// Replaced values may take this much before revisions beyond `revisions` go.
    pub soft_bytes: usize,
    /// Replaced values may never take more: memory is finite.
    pub hard_bytes: usize,
    /// When keys, values and history together take more, history goes, down to the last [`FLOOR`] revisions.
    pub state_bytes: usize,
}

/// Revisions that are kept however large the keys are, so that watches survive.
const FLOOR: usize = 1_000;

impl Default for Retention {
    fn default() -> Self {
        Self {
            revisions: 10_000,
            max_revisions: 100_000,
            soft_bytes: 64 << 20,
            hard_bytes: 512 << 20,
            state_bytes: 2 << 30,
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Version {
    pub modified: u64,
    pub created: u64,
    /// 0: none.
    pub lease: u64,
    /// `None`: deleted.
    pub value: Option<Bytes>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Slot {
    pub newest: Version,
    /// Oldest first; `None` when there are none, as for most keys.
    pub older: Option<Arc<Vec<Version>>>,
}

impl Slot {
    /// Every version that is kept, oldest first.
    pub fn versions(&self) -> impl Iterator<Item = &Version> {
        self.older.iter().flat_map(|o| o.iter()).chain(std::iter::once(&self.newest))
    }

    pub fn position_at(&self, revision: u64) -> Option<&Version> {
        if self.newest.modified <= revision {
            return Some(&self.newest);
        }
        self.older.as_deref()?.iter().rev().find(|v| v.modified <= revision)
    }

    fn live_at(&self, key: &Bytes, revision: u64) -> Option<KeyValue> {
        self.position_at(revision).and_then(|v| v.to_kv(key))
    }
}

impl Version {
    pub fn to_kv(&self, key: &Bytes) -> Option<KeyValue> {
        Some(KeyValue {
            key: key.clone(),
            value: self.value.clone()?,
            create_revision: Revision(self.created),
            mod_revision: Revision(self.modified),
        })
    }

    pub fn cost(&self) -> usize {
        std::mem::size_of::<Self>() + self.value.as_ref().map_or(0, Bytes::len)
    }
}

/// One revision of the history.
#[derive(Debug, Serialize)]
pub struct Record {
    pub revision: u64,
    pub timestamp_ms: i64,
    pub keys: Vec<Bytes>,
    /// What the versions that it replaced cost.
    pub cost: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Lease {
    pub ttl_ms: u64,
    #[serde(skip)]
    pub keys: OrdSet<Bytes>,
}

/// Fields that a snapshot stores as they are.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Counters {
    pub applied: Option<LogId>,
    pub membership: Membership,
    pub revision: u64,
    pub timestamp_ms: i64,
    pub oldest: u64,
    pub last_lease: u64,
    pub live_keys: u64,
    pub history_cost: usize,
    /// 0 stands for the first.
    #[serde(default)]
    pub feature_level: u32,
}

#[derive(Debug, Clone, Default)]
pub struct State {
    pub counters: Counters,
    pub keys: OrdMap<Bytes, Slot>,
    pub history: Vector<Arc<Record>>,
    pub leases: OrdMap<u64, Lease>,
    /// What the keys with their newest versions take. Not stored: counted when a state is loaded.
    pub live_bytes: usize,
}

/// A lease that a batch granted or ended, for the leader's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    Granted(LeaseId),
    Ended(LeaseId),
}

/// What applying a batch told the outside.
#[derive(Debug, Default)]
pub struct Effects {
    pub outcomes: Vec<Outcome>,
    pub changes: Vec<WatchBatch>,
    pub leases: Vec<LeaseChange>,
}

type Change = (Bytes, Option<(Bytes, u64)>);

impl State {
    pub fn revision(&self) -> Revision {
        Revision(self.counters.revision)
    }

    pub fn oldest(&self) -> Revision {
        Revision(self.counters.oldest)
    }

    /// What stored data and messages may contain.
    pub fn feature_level(&self) -> u32 {
        self.counters.feature_level.max(1)
    }

    /// What keys, values and history take, roughly.
    pub fn bytes(&self) -> usize {
        self.live_bytes + self.counters.history_cost
    }

    /// How much more the keys would take after these operations, history left aside.
    pub fn growth(&self, ops: &[Op]) -> i64 {
        let mut seen = BTreeSet::new();
        let size = |bytes: usize| i64::try_from(bytes).unwrap_or(i64::MAX / 1024);
        let mut sum = 0;
        for op in ops.iter().rev().filter(|op| seen.insert(op.key().clone())) {
            let held = self.keys.get(op.key()).filter(|slot| slot.newest.value.is_some());
            let before = held.map_or(0, |slot| size(op.key().len() + slot.newest.cost()));
            let after = match op {
                Op::Put { key, value, .. } => size(key.len() + std::mem::size_of::<Version>() + value.len()),
                Op::Delete { .. } => 0,
            };
            sum += after - before;
        }
        sum
    }

    /// Applies one log entry's commands.
    pub fn apply(&mut self, batch: Batch, retention: &Retention) -> Effects {
        let mut effects = Effects { outcomes: Vec::with_capacity(batch.commands.len()), ..Effects::default() };
        for command in batch.commands {
            let outcome = self.command(command, batch.at_ms, &mut effects);
            effects.outcomes.push(outcome);
        }
        self.retain(retention);
        effects
    }

    fn command(&mut self, command: Command, at_ms: i64, effects: &mut Effects) -> Outcome {
        match command {
            Command::Txn(txn) => self.txn(txn, at_ms, effects),
            Command::Grant { ttl_ms } => {
                self.counters.last_lease += 1;
                let id = self.counters.last_lease;
                self.leases.insert(id, Lease { ttl_ms, keys: OrdSet::new() });
                effects.leases.push(LeaseChange::Granted(LeaseId(id)));
                Outcome::Granted(LeaseId(id))
            }
            Command::Revoke { id } => match self.leases.remove(&id.0) {
                None => Outcome::LeaseNotFound(id),
                Some(lease) => {
                    self.end_lease(id, lease, at_ms, effects);
                    Outcome::Done
                }
            },
            Command::Expire { ids } => {
                for id in ids {
                    if let Some(lease) = self.leases.remove(&id.0) {
                        self.end_lease(id, lease, at_ms, effects);
                    }
                }
                Outcome::Done
            }
            Command::Raise { level } => {
                self.counters.feature_level = self.counters.feature_level.max(level);
                Outcome::Done
            }
            Command::Compact { before } => {
                if before > self.revision() {
                    return Outcome::Future { current: self.revision() };
                }
                self.compact(before.0);
                Outcome::Done
            }
        }
    }

    fn end_lease(&mut self, id: LeaseId, lease: Lease, at_ms: i64, effects: &mut Effects) {
        let changes = lease.keys.iter().map(|key| (key.clone(), None)).collect();
        self.commit(changes, at_ms, effects);
        effects.leases.push(LeaseChange::Ended(id));
    }

    fn txn(&mut self, txn: Txn, at_ms: i64, effects: &mut Effects) -> Outcome {
        if let Some(index) = txn.compares.iter().position(|c| !self.holds(c)) {
            return Outcome::Txn(TxnOutcome::CompareFailed { revision: self.revision(), index });
        }
        let leases = txn.ops.iter().filter_map(|op| if let Op::Put { lease, .. } = op { *lease } else { None });
        for lease in leases {
            if !self.leases.contains_key(&lease.0) {
                return Outcome::LeaseNotFound(lease);
            }
        }
        // The last operation on a key is the one that counts.
        let mut seen = BTreeSet::new();
        let mut changes: Vec<Change> = Vec::with_capacity(txn.ops.len());
        for op in txn.ops.into_iter().rev() {
            if seen.insert(op.key().clone()) {
                changes.push(match op {
                    Op::Put { key, value, lease } => (key, Some((value, lease.map_or(0, |l| l.0)))),
                    Op::Delete { key } => (key, None),
                });
            }
        }
        changes.reverse();
        self.commit(changes, at_ms, effects);
        Outcome::Txn(TxnOutcome::Committed { revision: self.revision() })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let live = self.keys.get(&compare.key).map(|s| &s.newest).filter(|v| v.value.is_some());
        match &compare.target {
            CompareTarget::Exists(wanted) => live.is_some() == *wanted,
            CompareTarget::ModRevision(revision) => live.map_or(0, |v| v.modified) == revision.0,
            CompareTarget::Value(value) => live.is_some_and(|v| v.value.as_ref() == Some(value)),
        }
    }

    /// Makes one revision of the changes; none if they change nothing.
    fn commit(&mut self, mut changes: Vec<Change>, at_ms: i64, effects: &mut Effects) {
        changes
            .retain(|(key, put)| put.is_some() || self.keys.get(key).is_some_and(|slot| slot.newest.value.is_some()));
        if changes.is_empty() {
            return;
        }
        let c = &mut self.counters;
        c.revision += 1;
        c.timestamp_ms = at_ms.max(c.timestamp_ms + 1);
        let (revision, timestamp_ms) = (c.revision, c.timestamp_ms);
        let mut events = Vec::with_capacity(changes.len());
        let mut keys = Vec::with_capacity(changes.len());
        let mut cost = 0;
        for (key, put) in changes {
            keys.push(key.clone());
            let prev = self.set(&key, put, revision, &mut cost);
            let now = self.keys.get(&key).and_then(|slot| slot.newest.to_kv(&key));
            events.push(match now {
                Some(kv) => WatchEvent::Put { kv, prev },
                None => WatchEvent::Delete { key, prev, mod_revision: Revision(revision) },
            });
        }
        cost += keys.iter().map(Bytes::len).sum::<usize>() + 64 * keys.len();
        self.counters.history_cost += cost;
        self.history.push_back(Arc::new(Record { revision, timestamp_ms, keys, cost }));
        effects.changes.push(WatchBatch { revision: Revision(revision), timestamp_ms, events });
    }

    fn set(&mut self, key: &Bytes, put: Option<(Bytes, u64)>, revision: u64, cost: &mut usize) -> Option<KeyValue> {
        let (value, lease) = put.map_or((None, 0), |(value, lease)| (Some(value), lease));
        let old = self.keys.get(key).map(|slot| slot.newest.clone());
        let was_live = old.as_ref().is_some_and(|v| v.value.is_some());
        let created = match &old {
            Some(v) if was_live => v.created,
            _ => revision,
        };
        let newest = Version { modified: revision, created, lease, value };
        match (was_live, newest.value.is_some()) {
            (false, true) => self.counters.live_keys += 1,
            (true, false) => self.counters.live_keys -= 1,
            _ => {}
        }
        let old_lease = old.as_ref().map_or(0, |v| v.lease);
        if old_lease != lease {
            if let Some(l) = self.leases.get_mut(&old_lease) {
                l.keys.remove(key);
            }
            if let Some(l) = self.leases.get_mut(&lease) {
                l.keys.insert(key.clone());
            }
        }
        let prev = old.as_ref().and_then(|v| v.to_kv(key));
        self.live_bytes += newest.cost() + old.as_ref().map_or(key.len(), |_| 0);
        self.live_bytes -= old.as_ref().map_or(0, Version::cost);
        match (self.keys.get_mut(key), old) {
            (Some(slot), Some(old)) => {
                *cost += old.cost();
                Arc::make_mut(slot.older.get_or_insert_default()).push(old);
                slot.newest = newest;
            }
            _ => drop(self.keys.insert(key.clone(), Slot { newest, older: None })),
        }
        prev
    }

    /// Forgets the history before `before`, which has been reached.
    pub fn compact(&mut self, before: u64) {
        if before <= self.counters.oldest {
            return;
        }
        self.counters.oldest = before;
        while self.history.front().is_some_and(|r| r.revision <= before) {
            let Some(record) = self.history.pop_front() else { break };
            self.counters.history_cost -= record.cost;
            for key in &record.keys {
                self.trim(key, before);
            }
        }
    }

    /// Drops the versions of a key that no read at `oldest` or later can see.
    fn trim(&mut self, key: &Bytes, oldest: u64) {
        let Some(slot) = self.keys.get_mut(key) else { return };
        if slot.newest.modified <= oldest {
            slot.older = None;
            if slot.newest.value.is_none() {
                self.live_bytes -= key.len() + slot.newest.cost();
                self.keys.remove(key);
            }
            return;
        }
        let Some(older) = &mut slot.older else { return };
        let visible = older.iter().rposition(|v| v.modified <= oldest).unwrap_or(0);
        let dead_first = older.get(visible).is_some_and(|v| v.value.is_none() && v.modified <= oldest);
        let cut = visible + usize::from(dead_first);
        if cut == older.len() {
            slot.older = None;
        } else if cut > 0 {
            Arc::make_mut(older).drain(..cut);
        }
    }

    fn retain(&mut self, keep: &Retention) {
        let too_much = |s: &Self| {
            let (len, cost) = (s.history.len(), s.counters.history_cost);
            len > keep.max_revisions
                || cost > keep.hard_bytes
                || (len > keep.revisions && cost > keep.soft_bytes)
                || (len > FLOOR && s.bytes() > keep.state_bytes)
        };
        while too_much(self) {
            let Some(front) = self.history.front().map(|r| r.revision) else { break };
            self.compact(front);
        }
    }

    /// Whether a read at `at` can be answered; the revision to read at.
    pub fn readable_at(&self, at: Option<Revision>) -> Result<u64, StoreError> {
        match at {
            None => Ok(self.counters.revision),
            Some(asked) if asked > self.revision() => {
                Err(StoreError::FutureRevision { asked, current: self.revision() })
            }
            Some(asked) if asked < self.oldest() => Err(StoreError::Compacted { oldest: self.oldest() }),
            Some(asked) => Ok(asked.0),
        }
    }

    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        let revision = self.readable_at(request.at)?;
        let mut response = RangeResponse { revision: Revision(revision), kvs: Vec::new(), more: false };
        if !request.end.is_empty() && request.start >= request.end {
            return Ok(response);
        }
        let end = if request.end.is_empty() { Bound::Unbounded } else { Bound::Excluded(&request.end) };
        let range = self.keys.range::<_, Bytes>((Bound::Included(&request.start), end));
        let mut take = |key: &Bytes, slot: &Slot| {
            if let Some(kv) = slot.live_at(key, revision) {
                if request.limit > 0 && response.kvs.len() == request.limit {
                    response.more = true;
                    return false;
                }
                response.kvs.push(kv);
            }
            true
        };
        if request.reverse {
            let _ = range.rev().all(|(key, slot)| take(key, slot));
        } else {
            let _ = { range }.all(|(key, slot)| take(key, slot));
        }
        Ok(response)
    }

    /// The kept revisions after `after`, at most `scan` of them, reduced to the keys that `wanted` names; with the last
    /// revision that was looked at.
    pub fn changes_after(&self, after: u64, scan: usize, wanted: impl Fn(&Bytes) -> bool) -> (Vec<WatchBatch>, u64) {
        let skip = usize::try_from(after - self.counters.oldest).unwrap_or(usize::MAX).min(self.history.len());
        let mut seen = after;
        let mut out = Vec::new();
        for record in self.history.iter().skip(skip).take(scan) {
            seen = record.revision;
            let events: Vec<_> =
                record.keys.iter().filter(|k| wanted(k)).filter_map(|k| self.event(k, record.revision)).collect();
            if !events.is_empty() {
                let (revision, timestamp_ms) = (Revision(record.revision), record.timestamp_ms);
                out.push(WatchBatch { revision, timestamp_ms, events });
            }
        }
        (out, seen)
    }

    fn event(&self, key: &Bytes, revision: u64) -> Option<WatchEvent> {
        let slot = self.keys.get(key)?;
        let now = slot.position_at(revision).filter(|v| v.modified == revision)?;
        let prev = slot.live_at(key, revision - 1);
        Some(match now.to_kv(key) {
            Some(kv) => WatchEvent::Put { kv, prev },
            None => WatchEvent::Delete { key: key.clone(), prev, mod_revision: Revision(revision) },
        })
    }

    /// Rebuilds what a snapshot leaves out because the keys say it: which keys each lease holds, and how large all is.
    pub fn rebuild(&mut self) {
        let Self { keys, leases, live_bytes, .. } = self;
        *live_bytes = 0;
        for (key, slot) in &*keys {
            *live_bytes += key.len() + slot.newest.cost();
            if slot.newest.lease != 0
                && let Some(lease) = leases.get_mut(&slot.newest.lease)
            {
                lease.keys.insert(key.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(state: &mut State, command: Command) -> Outcome {
        let keep = Retention::default();
        state.apply(Batch { at_ms: 5, commands: vec![command] }, &keep).outcomes.remove(0)
    }

    fn put(state: &mut State, key: &'static str, value: &'static str) {
        apply(state, Command::Txn(Txn::put(key, value)));
    }

    fn values(state: &State, at: Option<u64>) -> Vec<(String, String)> {
        let request = RangeRequest { at: at.map(Revision), ..RangeRequest::prefix("") };
        let text = |b: &Bytes| String::from_utf8(b.to_vec()).unwrap();
        state.range(&request).unwrap().kvs.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect()
    }

    #[test]
    fn compaction_keeps_every_later_view_and_event() {
        let mut state = State::default();
        for i in 0..50u64 {
            match i % 5 {
                0..3 => put(&mut state, ["a", "b", "c"][(i % 3) as usize], ["x", "y"][(i % 2) as usize]),
                3 => drop(apply(&mut state, Command::Txn(Txn::delete(["a", "b"][(i % 2) as usize])))),
                _ => put(&mut state, "d", "z"),
            }
        }
        let whole = state.clone();
        for before in 1..=state.counters.revision {
            state.compact(before);
            for at in before..=state.counters.revision {
                assert_eq!(values(&state, Some(at)), values(&whole, Some(at)), "compacted {before}, read {at}");
                let all = |_: &Bytes| true;
                assert_eq!(state.changes_after(at, 1000, all), whole.changes_after(at, 1000, all));
            }
            assert!(before == 0 || state.readable_at(Some(Revision(before - 1))).is_err());
        }
        assert_eq!(state.keys.len() as u64, state.counters.live_keys, "tombstones are gone");
        assert_eq!(state.counters.history_cost, 0);
        let counted = state.live_bytes;
        state.rebuild();
        assert_eq!(state.live_bytes, counted, "the size was kept right all along");
    }

    #[test]
    fn history_gives_way_to_memory_but_not_all_of_it() {
        let keep = Retention { state_bytes: 100_000, ..Retention::default() };
        let mut state = State::default();
        for i in 0..3_000 {
            let txn = Txn::put(format!("k{}", i % 10), vec![7; 500]);
            state.apply(Batch { at_ms: 0, commands: vec![Command::Txn(txn)] }, &keep);
        }
        assert_eq!(state.history.len(), FLOOR);
        assert!(state.growth(&[Op::put("k1", vec![7; 500])]) == 0 && state.growth(&[Op::put("new", "x")]) > 0);
        assert!(state.growth(&[Op::put("k1", vec![7; 900]), Op::delete("k1")]) < -500, "the last operation counts");
    }

    #[test]
    fn timestamps_grow_even_when_the_clock_goes_back() {
        let (mut state, keep) = (State::default(), Retention::default());
        let mut stamps = Vec::new();
        for at_ms in [100, 50, 100, 200] {
            let commands = vec![Command::Txn(Txn::put("k", "v"))];
            stamps.push(state.apply(Batch { at_ms, commands }, &keep).changes[0].timestamp_ms);
        }
        assert_eq!(stamps, [100, 101, 102, 200]);
    }

    #[test]
    fn history_is_bounded_without_being_asked() {
        let keep = Retention {
            revisions: 10,
            max_revisions: 20,
            soft_bytes: 1 << 30,
            hard_bytes: 1 << 30,
            state_bytes: 1 << 30,
        };
        let mut state = State::default();
        for _ in 0..100 {
            state.apply(Batch { at_ms: 0, commands: vec![Command::Txn(Txn::put("k", "v"))] }, &keep);
        }
        assert_eq!((state.counters.revision, state.history.len(), state.counters.oldest), (100, 20, 80));
    }

    #[test]
    fn a_lease_takes_its_keys_but_not_those_that_left_it() {
        let mut state = State::default();
        let Outcome::Granted(id) = apply(&mut state, Command::Grant { ttl_ms: 1 }) else { panic!("no lease") };
        let leased = |k: &'static str| Op::Put { key: k.into(), value: "v".into(), lease: Some(id) };
        apply(&mut state, Command::Txn(Txn::new(vec![], vec![leased("a"), leased("b")])));
        put(&mut state, "b", "free");
        apply(&mut state, Command::Expire { ids: vec![id] });
        assert_eq!(values(&state, None), [("b".to_owned(), "free".to_owned())]);
        let gone = Txn::new(vec![], vec![leased("c")]);
        assert_eq!(apply(&mut state, Command::Txn(gone)), Outcome::LeaseNotFound(id));
    }
}
