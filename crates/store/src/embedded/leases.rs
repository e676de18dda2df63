//! The leader's clock over leases.
//!
//! Only the leader measures time, by the monotonic clock of its environment; that a lease is over is a committed command, so
//! every member sees it end at the same revision. A new leader starts every lease anew. A lease whose end has been proposed
//! can't be kept alive any more, so nobody is told that it lives while its end is on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;

use super::core::Core;
use super::mvcc::LeaseChange;
use super::raft::Command;
use crate::types::LeaseId;

/// Leases that end in one command.
const AT_ONCE: usize = 64;
/// Before ending leases is tried again after a failure.
const RETRY: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Inner {
    ticking: bool,
    /// By the leader's monotonic clock.
    due: BTreeMap<LeaseId, Duration>,
    /// Due times in order.
    order: BTreeSet<(Duration, LeaseId)>,
    ending: BTreeSet<LeaseId>,
}

impl Inner {
    fn set(&mut self, id: LeaseId, due: Duration) {
        if let Some(old) = self.due.insert(id, due) {
            self.order.remove(&(old, id));
        }
        self.order.insert((due, id));
    }

    fn forget(&mut self, id: LeaseId) {
        if let Some(old) = self.due.remove(&id) {
            self.order.remove(&(old, id));
        }
        self.ending.remove(&id);
    }
}

#[derive(Default)]
pub struct LeaseClock {
    inner: Mutex<Inner>,
}

impl LeaseClock {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a lease's time anew, up to `due`; `false` if it is ending.
    pub fn renew(&self, id: LeaseId, due: Duration) -> bool {
        let mut inner = self.lock();
        if inner.ending.contains(&id) {
            return false;
        }
        // Before this leader has armed its clock there is nothing to renew: arming gives the full time anyway.
        if inner.ticking {
            inner.set(id, due);
        }
        true
    }
}

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>) {
    let mut leadership = core.leadership.clone();
    loop {
        // Whoever does not lead keeps no time, so what changes meanwhile is dropped.
        loop {
            core.shared.take_lease_changes();
            tokio::select! {
                biased;
                leads = leadership.wait_for(|l| l.is_self) => match leads {
                    Ok(_) => break,
                    Err(_) => return,
                },
                () = core.shared.lease_wake.notified() => {}
            }
        }
        let epoch = leadership.borrow_and_update().epoch;
        // Leases are armed from a state that has everything the former leader committed.
        if core.barrier(true).await.is_err() {
            sleep(RETRY).await;
            continue;
        }
        core.shared.take_lease_changes();
        arm(&core);
        loop {
            let next = core.leases.lock().order.first().map(|(due, _)| *due);
            let wait = async {
                match next {
                    // If the timer is quicker than the clock that counts, nothing is due yet and the rest is waited for.
                    Some(due) => sleep(due.saturating_sub(core.env.monotonic())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = leadership.changed() => {
                    let now = *leadership.borrow_and_update();
                    if changed.is_err() {
                        return;
                    }
                    if !now.is_self || now.epoch != epoch {
                        break;
                    }
                }
                () = core.shared.lease_wake.notified() => take_changes(&core),
                () = wait => end_due(&core).await,
            }
        }
        *core.leases.lock() = Inner::default();
    }
}

fn arm(core: &Core) {
    let now = core.env.monotonic();
    let leases: Vec<_> = core.shared.read().leases.iter().map(|(id, l)| (LeaseId(*id), l.ttl_ms)).collect();
    let mut inner = core.leases.lock();
    *inner = Inner { ticking: true, ..Inner::default() };
    for (id, ttl_ms) in leases {
        inner.set(id, now + Duration::from_millis(ttl_ms));
    }
}

fn take_changes(core: &Core) {
    let now = core.env.monotonic();
    for change in core.shared.take_lease_changes() {
        match change {
            LeaseChange::Granted(id) => {
                let ttl = core.shared.read().leases.get(&id.0).map(|l| Duration::from_millis(l.ttl_ms));
                let mut inner = core.leases.lock();
                // A keep-alive may have come first and knows better.
                if let Some(ttl) = ttl
                    && !inner.due.contains_key(&id)
                {
                    inner.set(id, now + ttl);
                }
            }
            LeaseChange::Ended(id) => core.leases.lock().forget(id),
        }
    }
}

async fn end_due(core: &Core) {
    let now = core.env.monotonic();
    let ids: Vec<LeaseId> = {
        let mut inner = core.leases.lock();
        let ids: Vec<_> =
            inner.order.iter().take_while(|(due, _)| *due <= now).take(AT_ONCE).map(|(_, id)| *id).collect();
        inner.ending.extend(&ids);
        ids
    };
    if ids.is_empty() {
        return;
    }
    if let Err(e) = core.submit(Command::Expire { ids: ids.clone() }, core.config.request_timeout, true).await {
        // The end may still be committed, so the leases stay un-renewable; the next try settles it.
        tracing::warn!(leases = ids.len(), failure = ?e, "leases could not be ended; trying again");
        let mut inner = core.leases.lock();
        for id in ids {
            inner.set(id, now + RETRY);
        }
        return;
    }
    let mut inner = core.leases.lock();
    ids.into_iter().for_each(|id| inner.forget(id));
}
