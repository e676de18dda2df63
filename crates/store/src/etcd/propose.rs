//! How changes get into etcd.
//!
//! One task takes what has queued up and decides it against a copy of the mirror's state: that gives every change its
//! outcome and its revision. All of them go to etcd as one transaction that holds only if the journal is still what the
//! mirror has applied. So an outcome is true at the moment of the commit, a failed compare too, and transactions of
//! several servers never need locks: who came second decides again on what the first has done.
//!
//! If etcd's answer is lost, the same transaction is sent again. It can take effect once at most, because it moves the
//! journal on. If it fails, the journal tells whether the first attempt was the reason. Only when etcd stays silent
//! until the deadline is the outcome unknown.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nexus_env::RngExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use super::Core;
use super::grpc::{GrpcError, code};
use super::layout::{Extra, Journal, Step, Stored};
use super::proto::{Compare, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse};
use crate::embedded::mvcc::{Effects, Lease, State};
use crate::embedded::raft::{Batch, Command, Outcome};
use crate::error::StoreError;
use crate::types::{LeaseId, Op, Revision, Txn, WatchBatch, WatchEvent};

/// Changes that wait before clients wait to queue up.
pub const QUEUE: usize = 4_096;
/// Keys and values of one commit. etcd refuses requests above 1.5 MiB unless told otherwise.
const COMMIT_BYTES: usize = 1 << 20;
/// Other changes that wait for the next commit because they touch the same keys.
const LEFT: usize = 512;
const PAUSE: Duration = Duration::from_millis(25);

pub enum Change {
    Txn(Txn),
    Grant { id: u64, ttl_ms: u64 },
    End { id: LeaseId },
    Compact { before: Revision },
}

pub struct Pending {
    pub change: Change,
    pub reply: oneshot::Sender<Result<Outcome, StoreError>>,
    pub deadline: Instant,
}

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>, mut queue: mpsc::Receiver<Pending>) {
    let mut waiting: VecDeque<Pending> = VecDeque::new();
    loop {
        if waiting.is_empty() {
            match queue.recv().await {
                Some(pending) => waiting.push_back(pending),
                None => return,
            }
        }
        while waiting.len() < LEFT
            && let Ok(pending) = queue.try_recv()
        {
            waiting.push_back(pending);
        }
        // Whoever has given up is not served: nothing was done for them yet.
        waiting.retain(|p| !p.reply.is_closed());
        if !waiting.is_empty() {
            commit(&core, &mut waiting).await;
        }
    }
}

/// What goes to etcd, and what it means.
struct Plan {
    /// Of the first so many that wait.
    outcomes: Vec<Outcome>,
    state: State,
    changes: Vec<WatchBatch>,
    ops: Vec<RequestOp>,
    steps: Vec<Step>,
    extra: Extra,
}

impl Plan {
    /// Notes what applying one change did, as operations of etcd.
    fn take(&mut self, core: &Core, effects: Effects) {
        self.outcomes.extend(effects.outcomes);
        for batch in effects.changes {
            self.steps.push(Step { at_ms: batch.timestamp_ms, events: batch.events.len() as u32 });
            for event in &batch.events {
                let key = core.mirror.layout.data(event.key());
                self.ops.push(match event {
                    WatchEvent::Put { kv, .. } => {
                        let lease = self.state.keys.get(&kv.key).map_or(0, |slot| slot.newest.lease);
                        let (created, modified) = (kv.create_revision.0, kv.mod_revision.0);
                        let stored = Stored { created, modified, lease, value: kv.value.clone() };
                        RequestOp::put(key, stored.encode(), 0)
                    }
                    WatchEvent::Delete { .. } => RequestOp::delete(key),
                });
            }
            self.changes.push(batch);
        }
    }
}

/// Decides as many of the first that wait as fit into one commit.
fn plan(core: &Core, state: State, waiting: &VecDeque<Pending>) -> Plan {
    let now = core.env.now_millis();
    let retention = &core.mirror.retention;
    let mut plan = Plan {
        outcomes: Vec::new(),
        state,
        changes: Vec::new(),
        ops: Vec::new(),
        steps: Vec::new(),
        extra: Extra::Nothing,
    };
    let mut touched: BTreeSet<Bytes> = BTreeSet::new();
    let mut bytes = 0;
    for (index, pending) in waiting.iter().enumerate() {
        let alone = !matches!(pending.change, Change::Txn(_));
        if alone && index > 0 {
            break;
        }
        match &pending.change {
            Change::Txn(txn) => {
                bytes += txn.bytes();
                let keys = || txn.ops.iter().map(Op::key);
                // The journal is an operation too.
                let full = plan.ops.len() + txn.ops.len() + 1 > core.max_ops || bytes > COMMIT_BYTES;
                if index > 0 && (full || keys().any(|k| touched.contains(k))) {
                    break;
                }
                touched.extend(keys().cloned());
                let batch = Batch { at_ms: now, commands: vec![Command::Txn(txn.clone())] };
                let effects = plan.state.apply(batch, retention);
                plan.take(core, effects);
            }
            Change::Grant { id, ttl_ms } => {
                let (id, ttl_ms) = (*id, *ttl_ms);
                plan.state.leases.insert(id, Lease { ttl_ms, keys: imbl::OrdSet::new() });
                let marker = core.mirror.layout.lease(id);
                plan.ops.push(RequestOp::put(marker, ttl_ms.to_string().into(), id as i64));
                plan.extra = Extra::Granted { id, ttl_ms };
                plan.outcomes.push(Outcome::Granted(LeaseId(id)));
            }
            Change::End { id } => {
                if plan.state.leases.contains_key(&id.0) {
                    let batch = Batch { at_ms: now, commands: vec![Command::Expire { ids: vec![*id] }] };
                    let effects = plan.state.apply(batch, retention);
                    plan.take(core, effects);
                    plan.ops.push(RequestOp::delete(core.mirror.layout.lease(id.0)));
                    plan.extra = Extra::Ended { id: id.0 };
                } else {
                    plan.outcomes.push(Outcome::LeaseNotFound(*id));
                }
            }
            Change::Compact { before } => {
                let current = plan.state.revision();
                if *before > current {
                    plan.outcomes.push(Outcome::Future { current });
                } else {
                    plan.state.compact(before.0);
                    plan.extra = Extra::Compacted { before: before.0 };
                    plan.outcomes.push(Outcome::Done);
                }
            }
        }
        if alone {
            break;
        }
    }
    plan
}

/// How sending a plan ended.
enum Sent {
    Committed,
    /// Somebody else committed first: decide again.
    Overtaken,
    Failed(StoreError),
}

impl Sent {
    /// What became of a commit that etcd answered with "no room". It looks twice, before it proposes a change and as it
    /// applies one, and what it finds to be too much only then has been done all the same. The journal tells.
    async fn from_full(
        core: &Core,
        (journal, generation): (i64, u64),
        id: Option<u128>,
        error: &GrpcError,
        deadline: Instant,
    ) -> Self {
        let full = refusal(core, error);
        let key = core.mirror.layout.journal();
        let look = RangeRequest { key, keys_only: true, ..RangeRequest::default() };
        let unknown = |reason: String| Self::Failed(StoreError::Unknown { reason });
        let found: Result<RangeResponse, GrpcError> =
            core.channel.call("/etcdserverpb.KV/Range", &look, deadline).await;
        let newest = match found {
            Ok(found) => found.kvs.first().map_or(0, |kv| kv.mod_revision),
            Err(lost) => return unknown(format!("{full}; {lost}")),
        };
        if newest == journal {
            return Self::Failed(full);
        }
        if !core.mirror.reached(newest, deadline).await {
            return unknown(format!("{full}; this server's copy lags behind etcd"));
        }
        match id.map(|id| core.mirror.knows_commit(id, generation)) {
            None | Some(Some(false)) => Self::Failed(full),
            Some(Some(true)) => Self::Committed,
            Some(None) => unknown(format!("{full}; its history since then is lost")),
        }
    }
}

/// Sees some of the first that wait through to an answer.
async fn commit(core: &Core, waiting: &mut VecDeque<Pending>) {
    loop {
        let base = core.mirror.base();
        let journal = base.journal;
        let generation = base.generation;
        let mut plan = plan(core, base.state, waiting);
        let Some(deadline) = waiting.iter().take(plan.outcomes.len()).map(|p| p.deadline).min() else { return };
        let started = Instant::now();
        let changes = std::mem::take(&mut plan.changes);
        let commit = Journal {
            id: u128::from_le_bytes(core.env.rng.bytes()),
            revision: plan.state.counters.revision,
            timestamp_ms: plan.state.counters.timestamp_ms,
            steps: std::mem::take(&mut plan.steps),
            extra: std::mem::take(&mut plan.extra),
        };
        let writes = !plan.ops.is_empty() || !commit.steps.is_empty() || commit.extra != Extra::Nothing;
        let ops = std::mem::take(&mut plan.ops);
        let sent = send(core, (journal, generation), writes.then_some((&commit, ops)), deadline).await;
        let taken = plan.outcomes.len();
        match sent {
            Ok((Sent::Committed, at)) => {
                if writes {
                    core.note_latency(started.elapsed());
                    core.set_full(None);
                    if let Some(at) = at {
                        core.mirror.adopt(journal, at, &commit, plan.state, &changes);
                    }
                }
                for (pending, outcome) in waiting.drain(..taken).zip(plan.outcomes) {
                    // A waiter that is gone needs no answer.
                    let _ = pending.reply.send(Ok(outcome));
                }
                return;
            }
            Ok((Sent::Overtaken, _)) => {
                if Instant::now() < deadline {
                    // Rivals that were overtaken together should not collide again.
                    let spread = core.env.rng.below(2_000);
                    sleep(Duration::from_micros(spread)).await;
                    continue;
                }
                let reason = "others commit all the time".to_owned();
                refuse(waiting, taken, &StoreError::Unavailable { reason });
                return;
            }
            Ok((Sent::Failed(error), _)) | Err(error) => {
                refuse(waiting, taken, &error);
                return;
            }
        }
    }
}

fn refuse(waiting: &mut VecDeque<Pending>, count: usize, error: &StoreError) {
    for pending in waiting.drain(..count) {
        let _ = pending.reply.send(Err(error.clone()));
    }
}

/// Sends a commit until its outcome is known, with etcd's revision of it if its answer said so.
async fn send(
    core: &Core,
    (journal, generation): (i64, u64),
    commit: Option<(&Journal, Vec<RequestOp>)>,
    deadline: Instant,
) -> Result<(Sent, Option<i64>), StoreError> {
    let key = core.mirror.layout.journal();
    let look = RequestOp::range(RangeRequest { key: key.clone(), keys_only: true, ..RangeRequest::default() });
    let mut request =
        TxnRequest { compare: vec![Compare::modified(key.clone(), journal)], success: Vec::new(), failure: vec![look] };
    let id = commit.as_ref().map(|(commit, _)| commit.id);
    if let Some((commit, ops)) = commit {
        // First, so that its event comes before those that it counts.
        request.success.push(RequestOp::put(key, commit.encode(), 0));
        request.success.extend(ops);
    }
    let mut perhaps = false;
    loop {
        let answer: Result<TxnResponse, GrpcError> =
            core.channel.call("/etcdserverpb.KV/Txn", &request, deadline).await;
        let error = match answer {
            Ok(answer) if answer.succeeded => {
                return Ok((Sent::Committed, answer.header.map(|h| h.revision)));
            }
            Ok(answer) => {
                let newest = answer.responses.first().and_then(|r| r.range.as_ref()?.kvs.first());
                let newest = newest.map_or(0, |kv| kv.mod_revision);
                if core.mirror.reached(newest, deadline).await {
                    let sent = match id.filter(|_| perhaps).map(|id| core.mirror.knows_commit(id, generation)) {
                        None | Some(Some(false)) => Sent::Overtaken,
                        Some(Some(true)) => Sent::Committed,
                        Some(None) => {
                            let reason = "etcd's answer was lost, and its history since then too".to_owned();
                            Sent::Failed(StoreError::Unknown { reason })
                        }
                    };
                    return Ok((sent, None));
                }
                if !perhaps {
                    let reason = "this server's copy lags behind etcd".to_owned();
                    return Ok((Sent::Failed(StoreError::Unavailable { reason }), None));
                }
                GrpcError::Lost("this server's copy lags behind etcd".into())
            }
            Err(error) if error.is_full() => {
                return Ok((Sent::from_full(core, (journal, generation), id, &error, deadline).await, None));
            }
            Err(error) => error,
        };
        perhaps |= id.is_some() && !error.nothing_happened();
        let over = Instant::now() + PAUSE >= deadline;
        if over || !error.is_passing() {
            let failure =
                if perhaps { StoreError::Unknown { reason: error.to_string() } } else { refusal(core, &error) };
            return Ok((Sent::Failed(failure), None));
        }
        sleep(PAUSE).await;
    }
}

/// What a failure means of which nothing came.
pub fn refusal(core: &Core, error: &GrpcError) -> StoreError {
    match error {
        GrpcError::Status { message, .. } if error.is_full() => {
            let reason = format!(
                "etcd says `{message}` and takes no change, not even a delete: compact and defragment it, or raise its \
                 quota, and then `etcdctl alarm disarm`"
            );
            core.set_full(Some(reason.clone()));
            StoreError::Full(reason)
        }
        GrpcError::Status { code: code::INVALID_ARGUMENT, message } if message.contains("too large") => {
            StoreError::Invalid(format!("{message}: start etcd with --max-request-bytes=4194304"))
        }
        GrpcError::Status { message, .. } if message.contains("no leader") => {
            StoreError::NoLeader { reason: message.clone() }
        }
        other => StoreError::Unavailable { reason: core.config.explain(other) },
    }
}
