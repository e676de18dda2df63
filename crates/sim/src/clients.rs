//! Clients of the store: they put, delete, compare, swap and read a few keys through any server, and write down what they
//! asked and were answered. Every value is written once in a run, so that it says who wrote it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nexus_store::{
    Compare, Consistency, Op, RangeRequest, RangeResponse, Revision, Store, StoreError, Txn, TxnOutcome,
};
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::world::World;

/// The keys of this load begin so.
pub const PREFIX: &str = "r/";
const KEYS: u64 = 10;
/// Longer than any request of the store may take.
const PATIENCE: Duration = Duration::from_secs(6);

/// How a transaction ended for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnEnd {
    Committed(u64),
    /// Which compare did not hold, at which revision.
    Refused(u64, usize),
    /// Nothing was committed, the store says.
    NotDone,
    Unknown,
}

#[derive(Debug, Clone)]
pub enum What {
    Txn(Txn, TxnEnd),
    Read(RangeRequest, RangeResponse),
}

/// One question and its answer.
#[derive(Debug, Clone)]
pub struct Call {
    pub client: u64,
    pub node: u64,
    /// Places in the one order of all events: when it was asked, and when the answer came (`u64::MAX`: never).
    pub asked: u64,
    pub answered: u64,
    pub what: What,
}

/// Everything that clients asked.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<Call>>>);

impl Calls {
    pub fn push(&self, call: Call) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }

    pub fn all(&self) -> Vec<Call> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub struct Client {
    pub world: Arc<World>,
    pub id: u64,
    pub dice: Dice,
    pub calls: Calls,
    pub stop: Arc<AtomicBool>,
    /// Longest pause between two questions, in milliseconds.
    pub pause_ms: u64,
}

/// What a client has seen of a key.
#[derive(Default)]
struct Seen {
    mods: BTreeMap<Bytes, u64>,
    newest: u64,
    written: u64,
}

impl Client {
    pub async fn run(self) {
        let home = 1 + self.id % self.world.nodes.len() as u64;
        let mut seen = Seen::default();
        while !self.stop.load(Ordering::SeqCst) {
            let node = if self.dice.chance(700) { home } else { *self.dice.pick(&self.world.nodes).unwrap_or(&home) };
            self.ask(node, &mut seen).await;
            sleep(self.dice.millis(0, self.pause_ms.max(1))).await;
        }
    }

    fn key(&self) -> Bytes {
        format!("{PREFIX}{}", self.dice.below(KEYS)).into()
    }

    fn value(&self, seen: &mut Seen) -> Bytes {
        seen.written += 1;
        let mut value = format!("c{}-{}", self.id, seen.written).into_bytes();
        if self.dice.chance(120) {
            // Some weight, so that logs roll and snapshots are taken.
            value.push(b' ');
            value.resize(value.len() + self.dice.range(500, 4_000) as usize, b'.');
        }
        value.into()
    }

    fn compare(&self, key: Bytes, seen: &Seen) -> Compare {
        match self.dice.below(4) {
            0 => Compare::absent(key),
            1 => Compare::exists(key),
            _ => {
                let known = seen.mods.get(&key).copied().unwrap_or(0);
                Compare::mod_revision(key, Revision(known))
            }
        }
    }

    fn txn(&self, seen: &mut Seen) -> Txn {
        let op = |seen: &mut Seen| {
            let key = self.key();
            if self.dice.chance(200) { Op::delete(key) } else { Op::put(key, self.value(seen)) }
        };
        match self.dice.below(4) {
            0 => Txn::new(vec![], vec![op(seen)]),
            1 => {
                let key = self.key();
                Txn::new(vec![self.compare(key.clone(), seen)], vec![Op::put(key, self.value(seen))])
            }
            _ => {
                let compares = (0..self.dice.range(1, 3)).map(|_| self.compare(self.key(), seen)).collect();
                let ops = (0..self.dice.range(1, 4)).map(|_| op(seen)).collect();
                Txn::new(compares, ops)
            }
        }
    }

    fn range(&self, seen: &Seen) -> RangeRequest {
        let mut request = match self.dice.below(4) {
            0 | 1 => RangeRequest::get(self.key()),
            2 => RangeRequest::prefix(PREFIX),
            _ => RangeRequest::new(self.key(), Bytes::from_static(b"r0")).limit(self.dice.range(1, 5) as usize),
        };
        request.reverse = self.dice.chance(200);
        match self.dice.below(10) {
            0 => request.consistency = Consistency::Stale,
            1 if seen.newest > 0 => request.at = Some(Revision(self.dice.range(1, seen.newest + 1))),
            _ => {}
        }
        request
    }

    async fn ask(&self, node: u64, seen: &mut Seen) {
        let Some(server) = self.world.server(node) else { return };
        let trace = &self.world.trace;
        let asked = trace.order();
        let what = if self.dice.chance(450) {
            let request = self.range(seen);
            let answer = timeout(PATIENCE, server.door.range(request.clone())).await;
            if !server.life.is_on() {
                return;
            }
            match answer {
                Ok(Ok(found)) => {
                    trace.count("store reads");
                    if request.at.is_none() {
                        seen.newest = seen.newest.max(found.revision.0);
                        for kv in &found.kvs {
                            seen.mods.insert(kv.key.clone(), kv.mod_revision.0);
                        }
                    }
                    trace.note(format_args!("client {} read at {}: {} keys", self.id, found.revision, found.kvs.len()));
                    What::Read(request, found)
                }
                Ok(Err(error)) => {
                    self.failed("read", node, &error);
                    return;
                }
                Err(_) => {
                    trace.violation("every request ends in time", format_args!("a read at server {node} did not"));
                    return;
                }
            }
        } else {
            let txn = self.txn(seen);
            let answer = timeout(PATIENCE, server.door.txn(txn.clone())).await;
            let end = if server.life.is_on() {
                match answer {
                    Ok(Ok(TxnOutcome::Committed { revision })) => {
                        trace.count("store transactions committed");
                        TxnEnd::Committed(revision.0)
                    }
                    Ok(Ok(TxnOutcome::CompareFailed { revision, index })) => {
                        trace.count("store transactions refused by a compare");
                        TxnEnd::Refused(revision.0, index)
                    }
                    Ok(Err(error)) => {
                        self.failed("transaction", node, &error);
                        if matches!(error, StoreError::Unknown { .. } | StoreError::Closed) {
                            TxnEnd::Unknown
                        } else {
                            TxnEnd::NotDone
                        }
                    }
                    Err(_) => {
                        let text = format!("a transaction at server {node} did not");
                        trace.violation("every request ends in time", text);
                        TxnEnd::Unknown
                    }
                }
            } else {
                TxnEnd::Unknown
            };
            if end == TxnEnd::Unknown {
                trace.count("store transactions with an unknown outcome");
            }
            trace.note(format_args!("client {} at server {node}: {} -> {end:?}", self.id, short(&txn)));
            What::Txn(txn, end)
        };
        let answered = match &what {
            What::Txn(_, TxnEnd::Unknown) => u64::MAX,
            _ => trace.order(),
        };
        self.calls.push(Call { client: self.id, node, asked, answered, what });
    }

    fn failed(&self, what: &str, node: u64, error: &StoreError) {
        self.world.trace.count("store requests failed");
        self.world.trace.note(format_args!("client {} at server {node}: {what}: {error}", self.id));
    }
}

/// A transaction in one line.
pub fn short(txn: &Txn) -> String {
    let text = |b: &Bytes| String::from_utf8_lossy(b).chars().take(14).collect::<String>();
    let compares: Vec<String> = txn.compares.iter().map(|c| format!("{}?", text(&c.key))).collect();
    let ops: Vec<String> = txn
        .ops
        .iter()
        .map(|op| match op {
            Op::Put { key, value, .. } => format!("{}={}", text(key), text(value)),
            Op::Delete { key } => format!("-{}", text(key)),
        })
        .collect();
    format!("[{}] {}", compares.join(" "), ops.join(" "))
}
