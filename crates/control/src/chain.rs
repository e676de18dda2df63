//! The chain that a writer's transactions make through `sys/writer`.
//!
//! A writer claims the key with a value that no other has, and each of its transactions compares the key with what the one
//! before left there and moves it on by one. So a writer that has lost its right commits nothing more, and neither does
//! anything that stands behind a transaction which failed.
//!
//! The chain also tells what became of a transaction whose answer was lost. Whatever the writer sends as a link of the
//! chain, it sends the same again until it knows: two copies compare with the same value and leave the same one, so at most
//! one of them commits, also if the first turns up late; and where the key stands says how far the chain has come. Only
//! when another writer has claimed the key, this server leads no more, or nothing is heard for long, is the writer's state
//! worth nothing.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use nexus_model::key;
use nexus_store::{Compare, Op, RangeRequest, Revision, Store, StoreError, Txn, TxnOutcome};
use tokio::task::unconstrained;
use tokio::time::{Instant, sleep};

use crate::core::Pack;

/// Bytes on their way to the store at once. Enough to fill the log entries that it has on their way, and no more: the time
/// that each transaction has begins when it is sent, not when its round ended.
const AHEAD: usize = 4 << 20;
/// How long a writer that leads and hears nothing tries to learn what became of its transactions.
const PERSISTS: Duration = Duration::from_secs(20);
/// Between the tries.
const PAUSE: Duration = Duration::from_millis(50);

/// A claim of `sys/writer`, and how far its chain is known to be committed.
pub(crate) struct Chain {
    epoch: u64,
    node: u64,
    nonce: u64,
    next: u64,
}

fn another() -> StoreError {
    StoreError::Unavailable { reason: "another server has become the writer".into() }
}

/// The outcome may be known later, or another try may do better.
fn passes(error: &StoreError) -> bool {
    error.is_unknown() || error.is_retryable()
}

impl Chain {
    /// Takes over `sys/writer`: from the revision on that is answered, no other writer can commit.
    pub async fn claim(store: &dyn Store, epoch: u64, node: u64, nonce: u64) -> Result<(Self, Revision), StoreError> {
        let old = store.range(RangeRequest::get(key::WRITER)).await?;
        let was = old.kvs.first().map_or(Revision(0), |kv| kv.mod_revision);
        let chain = Self { epoch, node, nonce, next: 0 };
        let txn = Txn::new(
            vec![Compare::mod_revision(key::WRITER, was)],
            vec![Op::put(key::WRITER, chain.value(0)), Op::put(key::FORMAT, "1")],
        );
        match store.txn(txn).await? {
            TxnOutcome::Committed { revision } => Ok((chain, revision)),
            TxnOutcome::CompareFailed { .. } => {
                Err(StoreError::Unavailable { reason: "another server claimed the writer's right".into() })
            }
        }
    }

    fn head(&self) -> String {
        format!("epoch={} node={} claim={:016x} next=", self.epoch, self.node, self.nonce)
    }

    fn value(&self, link: u64) -> Bytes {
        format!("{}{link}", self.head()).into()
    }

    /// Which link of this chain left a value; `None` if none did.
    fn link(&self, value: &[u8]) -> Option<u64> {
        std::str::from_utf8(value).ok()?.strip_prefix(&self.head())?.parse().ok()
    }

    /// The transaction that moves the chain on to `link`.
    fn txn(&self, link: u64, pack: &Pack) -> Txn {
        let ops = pack.ops.iter().map(|(key, value)| match value {
            Some(value) => Op::put(key.clone(), value.clone()),
            None => Op::delete(key.clone()),
        });
        let mut ops: Vec<Op> = ops.collect();
        ops.push(Op::put(key::WRITER, self.value(link)));
        Txn::new(vec![Compare::value(key::WRITER, self.value(link - 1))], ops)
    }

    /// Commits packs in order, and tells of each when it is committed. `leads`: this server leads as it did at the claim.
    /// An error means that of those not told of nothing is known.
    pub async fn commit(
        &mut self,
        store: &dyn Store,
        packs: &[Pack],
        leads: impl Fn() -> bool,
        mut committed: impl FnMut(&Pack, Revision),
    ) -> Result<(), StoreError> {
        let mut rest = packs.iter();
        let mut until = None;
        while !rest.as_slice().is_empty() {
            let before = self.next;
            let Some(trouble) = self.send(store, &mut rest, &mut committed).await else { return Ok(()) };
            if self.next > before {
                until = None;
            }
            if !passes(&trouble)
                || !leads()
                || Instant::now() >= *until.get_or_insert_with(|| Instant::now() + PERSISTS)
            {
                return Err(trouble);
            }
            match self.reached(store).await {
                Ok(None) => return Err(another()),
                Ok(Some(revisions)) => {
                    tracing::debug!(error = %trouble, links = revisions.len(), "the chain tells what was committed");
                    for (revision, pack) in revisions.into_iter().zip(&mut rest) {
                        self.next += 1;
                        committed(pack, revision);
                    }
                }
                Err(error) if passes(&error) => {}
                Err(error) => return Err(error),
            }
            if self.next == before {
                sleep(PAUSE).await;
            }
        }
        Ok(())
    }

    /// Sends packs until all are committed or one is not known to be; then says why, and leaves that one and those behind it.
    async fn send(
        &mut self,
        store: &dyn Store,
        rest: &mut std::slice::Iter<'_, Pack>,
        committed: &mut impl FnMut(&Pack, Revision),
    ) -> Option<StoreError> {
        // Each names the one before: an engine that may swap them gets the next when the last is done.
        let in_order = store.keeps_order();
        let mut waiting = rest.clone();
        let mut sent = self.next;
        let mut ahead = 0;
        let mut flight = FuturesOrdered::new();
        let mut trouble: Option<StoreError> = None;
        loop {
            while trouble.is_none()
                && (flight.is_empty() || (in_order && ahead < AHEAD))
                && let Some(pack) = waiting.next()
            {
                sent += 1;
                ahead += pack.bytes();
                // Whoever shares a task's time politely is polled again behind those that came after it, which would swap them.
                flight.push_back(unconstrained(store.txn(self.txn(sent, pack))));
            }
            let Some(outcome) = flight.next().await else { return trouble };
            let error = match outcome {
                Ok(TxnOutcome::Committed { revision }) => {
                    if trouble.is_none() {
                        let pack = rest.next().expect("an outcome per pack");
                        ahead -= pack.bytes();
                        self.next += 1;
                        committed(pack, revision);
                    }
                    continue;
                }
                Ok(TxnOutcome::CompareFailed { .. }) => another(),
                Err(error) => error,
            };
            if trouble.is_none() && !passes(&error) {
                return Some(error);
            }
            trouble.get_or_insert(error);
        }
    }

    /// The revisions of the links behind the last one known, as far as they are committed. `None`: another writer's chain has
    /// begun.
    async fn reached(&self, store: &dyn Store) -> Result<Option<VecDeque<Revision>>, StoreError> {
        let mut found = VecDeque::new();
        let mut at = None;
        loop {
            let request = RangeRequest { at, ..RangeRequest::get(key::WRITER) };
            let Some(kv) = store.range(request).await?.kvs.pop() else { return Ok(None) };
            match self.link(&kv.value) {
                None => return Ok(None),
                Some(link) if link <= self.next => return Ok(Some(found)),
                Some(_) => {
                    found.push_front(kv.mod_revision);
                    at = Some(Revision(kv.mod_revision.0 - 1));
                }
            }
        }
    }
}
