//! Holders of locks: each tries to put a key under a lease, and believes that it holds the lock from the answer until the
//! lease's time after its last keep-alive was asked for. No two beliefs may overlap.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_store::{Compare, Op, Store, StoreError, Txn, TxnOutcome};
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::world::World;

const TTL: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(6);

/// A time in which somebody was sure to hold a lock.
#[derive(Debug, Clone)]
pub struct Belief {
    pub lock: u64,
    pub holder: String,
    pub from: Duration,
    pub to: Duration,
}

#[derive(Clone, Default)]
pub struct Beliefs(Arc<Mutex<Vec<Belief>>>);

impl Beliefs {
    fn push(&self, belief: Belief) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(belief);
    }

    /// Pairs that overlap.
    pub fn conflicts(&self) -> Vec<String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.retain(|b| b.to > b.from);
        all.sort_by_key(|b| (b.lock, b.from));
        let mut found = Vec::new();
        let mut latest: Option<&Belief> = None;
        for next in &all {
            if let Some(held) = latest.filter(|h| h.lock == next.lock && h.to > next.from) {
                found.push(format!(
                    "lock {}: {} from {:?} to {:?}, and {} from {:?}",
                    held.lock, held.holder, held.from, held.to, next.holder, next.from
                ));
            }
            if latest.is_none_or(|h| h.lock != next.lock || h.to < next.to) {
                latest = Some(next);
            }
        }
        found
    }
}

pub struct Holder {
    pub world: Arc<World>,
    pub id: u64,
    pub locks: u64,
    pub dice: Dice,
    pub beliefs: Beliefs,
    pub stop: Arc<AtomicBool>,
}

impl Holder {
    pub async fn run(self) {
        let mut turn = 0;
        while !self.stop.load(Ordering::SeqCst) {
            turn += 1;
            self.hold(turn).await;
            sleep(self.dice.millis(50, 600)).await;
        }
    }

    async fn hold(&self, turn: u64) {
        let trace = &self.world.trace;
        let lock = self.dice.below(self.locks);
        let node = *self.dice.pick(&self.world.nodes).expect("a world has servers");
        let Some(server) = self.world.server(node) else { return };
        let granted_at = trace.now();
        let Ok(Ok(lease)) = timeout(PATIENCE, server.door.lease_grant(TTL)).await else { return };
        if !server.life.is_on() {
            return;
        }
        trace.count("leases granted");
        let key = format!("lock/{lock}");
        let op = Op::Put { key: key.clone().into(), value: format!("h{}-{turn}", self.id).into(), lease: Some(lease) };
        let answer = timeout(PATIENCE, server.door.txn(Txn::new(vec![Compare::absent(key)], vec![op]))).await;
        if !server.life.is_on() || !matches!(answer, Ok(Ok(TxnOutcome::Committed { .. }))) {
            return;
        }
        let holder = format!("holder {} at server {node}, turn {turn}", self.id);
        let from = trace.now();
        let mut to = granted_at + TTL;
        trace.count("locks taken");
        trace.note(format_args!("{holder} takes lock {lock} by lease {lease}"));
        let leave_at = from + self.dice.millis(500, 8_000);
        while trace.now() < leave_at && trace.now() < to && server.life.is_on() && !self.stop.load(Ordering::SeqCst) {
            sleep(self.dice.millis(200, 900)).await;
            if trace.now() >= to || !server.life.is_on() {
                break;
            }
            let asked = trace.now();
            let answer = timeout(to - asked, server.door.lease_keep_alive(lease)).await;
            match answer {
                Ok(Ok(ttl)) if server.life.is_on() && trace.now() < to => to = asked + ttl,
                Ok(Err(StoreError::LeaseNotFound(_))) => {
                    // The lease must not end before its time.
                    if server.life.is_on() && trace.now() < to {
                        trace.violation(
                            "a lease lasts as long as was said",
                            format_args!("{holder}: lease {lease} is over at {:?}, before {to:?}", trace.now()),
                        );
                    }
                    break;
                }
                _ => {}
            }
        }
        // It stops believing before it gives the lock up.
        let end = to.min(trace.now());
        let until = if trace.now() < to && server.life.is_on() { end } else { to };
        self.beliefs.push(Belief { lock, holder, from, to: until });
        if server.life.is_on() && self.dice.chance(600) {
            let _ = timeout(PATIENCE, server.door.lease_revoke(lease)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beliefs_that_overlap_are_found() {
        let belief = |lock, from, to| Belief {
            lock,
            holder: format!("{from}"),
            from: Duration::from_secs(from),
            to: Duration::from_secs(to),
        };
        let beliefs = Beliefs::default();
        for b in [belief(1, 0, 5), belief(1, 5, 6), belief(2, 1, 9), belief(1, 7, 9)] {
            beliefs.push(b);
        }
        assert_eq!(beliefs.conflicts(), Vec::<String>::new());
        beliefs.push(belief(1, 8, 10));
        assert_eq!(beliefs.conflicts().len(), 1);
    }
}
