//! Holders of locks: each tries to put a key under a lease, and believes that it holds the lock from the answer until nine
//! tenths of the lease's time after its last keep-alive was asked for, by its own clock. No two beliefs may overlap.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_store::{Compare, Op, Store, StoreError, Txn, TxnOutcome};
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::clock::Rate;
use crate::mutant::Mutant;
use crate::world::World;

const TTL: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(6);

/// A time in which somebody was sure to hold a lock, as nobody's clock counts it.
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
    /// How long a lease may be counted on: no clock is more than 5 % too fast or too slow.
    fn trusted(&self, ttl: Duration) -> Duration {
        if self.world.stage.mutant == Some(Mutant::TrustedClock) { ttl } else { ttl * 9 / 10 }
    }

    pub async fn run(self) {
        let mut turn = 0;
        let rate = Rate::draw(&self.dice, self.world.drift_ppm);
        while !self.stop.load(Ordering::SeqCst) {
            turn += 1;
            self.hold(turn, rate).await;
            sleep(self.dice.millis(20, 250)).await;
        }
    }

    async fn hold(&self, turn: u64, rate: Rate) {
        let trace = &self.world.trace;
        let now = || rate.counts(trace.now());
        let lock = self.dice.below(self.locks);
        let node = *self.dice.pick(&self.world.nodes).expect("a world has servers");
        let Some(server) = self.world.server(node) else { return };
        let granted_at = now();
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
        let from = now();
        let mut to = granted_at + self.trusted(TTL);
        trace.count("locks taken");
        trace.note(format_args!("{holder} takes lock {lock} by lease {lease}"));
        let leave_at = from + self.dice.millis(300, 4_000);
        while now() < leave_at && now() < to && server.life.is_on() && !self.stop.load(Ordering::SeqCst) {
            sleep(self.dice.millis(200, 900)).await;
            if now() >= to || !server.life.is_on() {
                break;
            }
            let asked = now();
            let answer = timeout(rate.lasts(to - asked), server.door.lease_keep_alive(lease)).await;
            match answer {
                Ok(Ok(ttl)) if server.life.is_on() && now() < to => to = asked + self.trusted(ttl),
                Ok(Err(StoreError::LeaseNotFound(_))) => {
                    // The lease must not end before its time.
                    if server.life.is_on() && now() < to {
                        trace.violation(
                            "a lease lasts as long as was said",
                            format_args!("{holder}: lease {lease} is over at {:?}, before {to:?}", now()),
                        );
                    }
                    break;
                }
                _ => {}
            }
        }
        if now() < to && server.life.is_on() && self.dice.chance(400) {
            // It is held up and keeps nothing alive, but goes on with what it has the lock for, as long as it may.
            sleep(rate.lasts(to - now())).await;
            trace.count("locks held to the end");
        }
        // It stops believing before it gives the lock up.
        let end = to.min(now());
        let until = if now() < to && server.life.is_on() { end } else { to };
        self.beliefs.push(Belief { lock, holder, from: rate.lasts(from), to: rate.lasts(until) });
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
