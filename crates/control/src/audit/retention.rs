//! Removes what records say when their time is over. The hash of each stays in the tree, so every proof and every signed head
//! holds on, and an export says of it that it was pruned.
//!
//! The server that leads a group goes over its log, once for each class, from where it ended the last time, and stops at the first
//! record that is too young. Only records whose hashes stand in a full tile go, and none that a webhook has still to get. How
//! far a class has come is a row of the group, so the next leader goes on there.

use std::sync::Arc;
use std::time::Duration;

use nexus_audit::tiles::TILE;
use nexus_audit::{Entry, Retention};
use nexus_env::Env;
use nexus_model::key;
use nexus_store::{Compare, Op, RangeRequest, Revision, Store, Txn};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::read::{self, ReadError};

/// Between two looks when there was nothing to do.
const LOOK: Duration = Duration::from_secs(3600);
/// After a failure, and between two pages, so that removing years at once disturbs nobody.
const REST: Duration = Duration::from_secs(1);
const CLASSES: [Retention; 3] = [Retention::Security, Retention::Change, Retention::Access];

/// How long records are kept, by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    pub security: Duration,
    pub change: Duration,
    pub access: Duration,
}

impl Keep {
    fn of(&self, class: Retention) -> Duration {
        match class {
            Retention::Security => self.security,
            Retention::Change => self.change,
            Retention::Access => self.access,
        }
    }
}

/// Removes a group's old records.
pub struct Pruner {
    pub env: Env,
    pub store: Arc<dyn Store>,
    pub keep: Keep,
    /// The row of a webhook that gets every record first.
    pub after: Option<String>,
}

/// A row that says how far somebody has come in the log: this, or a webhook.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Position {
    pub next: u64,
}

impl Position {
    /// Reads it, with the revision at which it was written.
    pub async fn read(store: &dyn Store, row: &str) -> Result<(Self, Revision), ReadError> {
        let Some(kv) = store.range(RangeRequest::get(row.to_owned())).await?.kvs.pop() else {
            return Ok((Self::default(), Revision(0)));
        };
        let damaged = |e: serde_json::Error| ReadError::Damaged { key: row.to_owned(), why: e.to_string() };
        Ok((serde_json::from_slice(&kv.value).map_err(damaged)?, kv.mod_revision))
    }

    /// Writes it with other operations, unless somebody else has gone on meanwhile.
    pub async fn write(self, store: &dyn Store, row: &str, was: Revision, mut ops: Vec<Op>) -> Result<(), ReadError> {
        let value = serde_json::to_vec(&self).expect("a position is plain data");
        ops.push(Op::put(row.to_owned(), value));
        store.txn(Txn::new(vec![Compare::mod_revision(row.to_owned(), was)], ops)).await?;
        Ok(())
    }
}

impl Pruner {
    /// Removes while this server leads, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                let mut wait = LOOK;
                if self.store.leadership().borrow().is_self {
                    for class in CLASSES {
                        match self.prune_one(class).await {
                            Ok(true) => wait = REST,
                            Ok(false) => {}
                            Err(error) => {
                                tracing::warn!(?class, %error, "old audit records can't be removed now");
                                wait = wait.min(60 * REST);
                            }
                        }
                    }
                }
                tokio::time::sleep(wait).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Goes over the next page of a class. False if everything behind it is too young.
    pub async fn prune_one(&self, class: Retention) -> Result<bool, ReadError> {
        let store = &*self.store;
        let row =
            format!("{}{}", key::AUDIT_PRUNED, serde_json::to_value(class).expect("a word").as_str().expect("text"));
        let (position, was) = Position::read(store, &row).await?;
        let size = read::state(store).await?.frontier.size();
        let mut whole = size - size % TILE as u64;
        if let Some(after) = &self.after {
            whole = whole.min(Position::read(store, after).await?.0.next);
        }
        let end = whole.min(position.next + TILE as u64);
        if position.next >= end {
            return Ok(false);
        }
        let now = u64::try_from(self.env.now_millis()).unwrap_or(0);
        let keep = u64::try_from(self.keep.of(class).as_millis()).unwrap_or(u64::MAX);
        let request = RangeRequest::new(key::audit_record(position.next), key::audit_record(end)).limit(TILE);
        let (mut next, mut ops) = (end, Vec::new());
        for kv in store.range(request).await?.kvs {
            // One that can't be read is no business of this: it stays to be looked at.
            let Ok(entry) = Entry::from_row(&kv.value) else { continue };
            if entry.record.time.saturating_add(keep) > now {
                next = entry.record.index;
                break;
            }
            if entry.record.retention == class {
                ops.push(Op::delete(kv.key));
            }
        }
        if next > position.next {
            Position { next }.write(store, &row, was, ops).await?;
        }
        Ok(next == end)
    }
}
