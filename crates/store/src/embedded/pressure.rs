//! What happens before there is no room left.
//!
//! A store whose disk is full can't even say that it is: it can't write its log. So part of the disk is kept back: the
//! configured reserve, and room for one more snapshot, which must be written before the log can be cut. It is used up in
//! steps:
//!
//! * Less than that is free, or the keys take more memory than allowed: the pressure is [`Pressure::Full`]. Whoever
//!   decides what is written (the API's writer) takes no more wishes that grow. The store still takes what those who
//!   clean up must write, such as the tombstones of what is deleted.
//! * Half of the reserve is gone, or an eighth too much memory taken: the leader itself refuses what makes the keys grow.
//!   What replaces a value by one of the same size goes on, so that reports and leaderships live; so do deletes, with a
//!   little room for the records that they leave; so does compaction.
//! * Three quarters are gone: only commands without any put are taken.
//!
//! The free space is measured every second whether or not anything is written, so the state clears by itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_env::on_disk;
use tokio::time::sleep;

use super::core::Core;
use super::mvcc::State;
use super::propose::Pending;
use super::raft::Command;
use crate::types::{Op, Pressure};

const MEASURE_EVERY: Duration = Duration::from_secs(1);
/// A value may get longer by so much and still count as replaced: numbers in it gain digits.
const SLACK: i64 = 64;
/// What a transaction that deletes something may add beside it: a tombstone, an event.
const BURIAL: i64 = 16 << 10;

/// Measures the free space until the store is shut down, and logs when the pressure changes.
pub async fn run(core: Arc<Core>) {
    let mut was = Pressure::None;
    loop {
        let (disk, dir) = (core.env.disk.clone(), core.config.dir.clone());
        // A file system that can't say keeps what was known.
        if let Ok(Ok(free)) = on_disk(&core.env.disk, move || disk.free_space(&dir)).await {
            core.gauges.free_bytes.store(free, Ordering::Relaxed);
        }
        let now = of(&core, &core.shared.read());
        if std::mem::discriminant(&now) != std::mem::discriminant(&was) {
            match &now {
                Pressure::None => tracing::info!(group = %core.config.group, "the store has room again"),
                Pressure::High(reason) => tracing::warn!(group = %core.config.group, reason, "the store fills up"),
                Pressure::Full(reason) => tracing::error!(group = %core.config.group, reason, "growth is refused"),
            }
            was = now;
        }
        sleep(MEASURE_EVERY).await;
    }
}

/// What is kept back of the disk.
fn reserve(core: &Core) -> u64 {
    core.config.reserve_bytes.saturating_add(core.snapshots.bytes())
}

/// Whether this member itself has to refuse growth.
fn refuses(core: &Core, state: &State) -> bool {
    let limit = core.config.memory_bytes;
    let disk = core.gauges.free().is_some_and(|free| free < reserve(core) - core.config.reserve_bytes / 2);
    disk || state.live_bytes as u64 > limit.saturating_add(limit / 8)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// How close this member is to having no room.
pub fn of(core: &Core, state: &State) -> Pressure {
    let reserve = reserve(core);
    let disk = core.gauges.free().filter(|free| *free < reserve.saturating_mul(2)).map(|free| {
        let reason = format!(
            "the disk of {} has {} left, of which {} are kept back for the log and its snapshots: free some space, or delete \
             what is not needed",
            core.config.dir.display(),
            mib(free),
            mib(reserve),
        );
        (free < reserve, reason)
    });
    let (live, limit) = (state.live_bytes as u64, core.config.memory_bytes);
    let memory = (live > limit / 5 * 4).then(|| {
        let reason = format!("keys and values take {} of {}: delete what is not needed", mib(live), mib(limit));
        (live > limit, reason)
    });
    let worst = [disk, memory].into_iter().flatten().max_by_key(|(full, _)| *full);
    match worst {
        None => Pressure::None,
        Some((false, reason)) => Pressure::High(reason),
        Some((true, reason)) => Pressure::Full(reason),
    }
}

/// Whether a command may go through while there is no room.
fn fits(command: &Command, state: &State, dire: bool) -> bool {
    match command {
        Command::Txn(txn) => {
            let puts = txn.ops.iter().any(|op| matches!(op, Op::Put { .. }));
            if dire || !puts {
                return !puts;
            }
            let deletes = txn.ops.iter().any(|op| matches!(op, Op::Delete { key } if state.keys.contains_key(key)));
            state.growth(&txn.ops) <= if deletes { BURIAL } else { SLACK }
        }
        Command::Grant { .. } => false,
        Command::Revoke { .. } | Command::Expire { .. } | Command::Compact { .. } | Command::Raise { .. } => true,
    }
}

/// What may be written, what not, and why not.
type Sorted = (Vec<Pending>, Vec<Pending>, String);

/// Lets a batch through if there is room; else sorts it.
pub fn admit(core: &Core, batch: Vec<Pending>) -> Result<Vec<Pending>, Sorted> {
    if !refuses(core, &core.shared.read()) {
        return Ok(batch);
    }
    let state = core.shared.read().clone();
    let reason = of(core, &state).reason().unwrap_or("there is no room").to_owned();
    let dire = core.gauges.free().is_some_and(|free| free < core.config.reserve_bytes / 4);
    let (fits, refused) = batch.into_iter().partition(|p| fits(&p.command, &state, dire));
    Err((fits, refused, reason))
}
