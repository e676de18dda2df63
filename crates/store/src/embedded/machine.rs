//! The state machine: applies committed entries to the [`State`], tells watchers and lease clock, makes and installs
//! snapshots. The state is in memory; a restart loads the newest snapshot and replays the log after it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nexus_env::on_disk;
use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, RaftSnapshotBuilder, Snapshot};
use tokio::sync::{Notify, watch};

use super::hub::Hub;
use super::mvcc::{LeaseChange, Retention, State};
use super::raft::{
    Applied, Batch, Command, Entry, LogId, Membership, Outcome, SnapshotMeta, StorageError, TypeConfig, decode,
    machine_error,
};
use super::snapshot::{SnapshotDir, SnapshotFile};

/// How far this member has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// The log index after the last applied entry.
    pub next_index: u64,
    pub revision: u64,
}

impl Position {
    fn of(state: &State) -> Self {
        let next_index = state.counters.applied.map_or(0, |id| id.index + 1);
        Self { next_index, revision: state.counters.revision }
    }
}

/// The applied state and those who follow it.
pub struct Shared {
    state: RwLock<State>,
    pub hub: Hub,
    position: watch::Sender<Position>,
    /// Leases that changed and the leader's clock has not seen yet. Drained on every member, so it stays small.
    lease_changes: Mutex<VecDeque<LeaseChange>>,
    pub lease_wake: Notify,
    /// Payload bytes applied since the last snapshot began.
    unsaved_bytes: AtomicU64,
    pub snapshot_wake: Notify,
    /// So many bytes of the log at least between two snapshots, as configured; and with what is known of the state's size.
    save_at_least: u64,
    pub snapshot_after: AtomicU64,
    retention: Retention,
}

impl Shared {
    pub fn new(state: State, retention: Retention, snapshot_after: u64) -> Self {
        let shared = Self {
            state: RwLock::new(State::default()),
            hub: Hub::default(),
            position: watch::Sender::new(Position::default()),
            lease_changes: Mutex::new(VecDeque::new()),
            lease_wake: Notify::new(),
            unsaved_bytes: AtomicU64::new(0),
            snapshot_wake: Notify::new(),
            save_at_least: snapshot_after,
            snapshot_after: AtomicU64::new(snapshot_after),
            retention,
        };
        shared.replace(state);
        shared
    }

    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn take_lease_changes(&self) -> VecDeque<LeaseChange> {
        std::mem::take(&mut *self.lease_changes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, state: State) {
        let position = {
            let mut guard = self.write();
            *guard = state;
            self.hub.restart();
            Position::of(&guard)
        };
        self.position.send_replace(position);
    }

    /// Takes over a state that was loaded elsewhere.
    #[cfg(feature = "etcd")]
    pub fn load(&self, state: State) {
        self.replace(state);
    }

    /// Changes the state for an engine whose log is elsewhere, and hands on the changes that `change` answers.
    #[cfg(feature = "etcd")]
    pub fn amend(&self, change: impl FnOnce(&mut State) -> Vec<crate::types::WatchBatch>) {
        let mut state = self.write();
        let changes = change(&mut state);
        self.hub.publish(&changes);
        let position = Position::of(&state);
        drop(state);
        self.position.send_replace(position);
    }

    /// Waits until this member has come as far as `far` wants; `false` if it is shut down before.
    ///
    /// The channel's guard is dropped here: whoever held it while taking the state's lock would stand in the way of
    /// applying, which goes from the state to the position. For the same reason the position is only ever sent with
    /// the state unlocked.
    pub async fn reached(&self, far: impl FnMut(&Position) -> bool) -> bool {
        self.position.subscribe().wait_for(far).await.is_ok()
    }

    /// Applies an entry; refuses one that raises the feature level beyond what this release supports.
    fn apply(&self, entry: Entry, supported: u32) -> Result<Applied, TooNew> {
        // Decoding happens before the lock is taken.
        let batch = match entry.payload {
            EntryPayload::Blank => Work::Nothing,
            EntryPayload::Membership(membership) => Work::Membership(membership),
            EntryPayload::Normal(proposal) => {
                self.count_unsaved(proposal.0.len() as u64);
                match decode::<Batch>(&proposal.0) {
                    Ok(batch) => Work::Batch(batch),
                    Err(e) => {
                        // Every member skips it alike. It can only come from a newer release, which must not propose
                        // what the oldest member can't read.
                        tracing::error!(log_id = %entry.log_id, error = %e, "a log entry can't be read and is skipped");
                        Work::Unreadable
                    }
                }
            }
        };
        if let Work::Batch(batch) = &batch {
            let raised = batch
                .commands
                .iter()
                .filter_map(|c| if let Command::Raise { level } = c { Some(*level) } else { None });
            TooNew::check(raised.max().unwrap_or(1), supported)?;
        }
        let mut state = self.write();
        state.counters.applied = Some(entry.log_id);
        let mut outcomes = Vec::new();
        match batch {
            Work::Nothing => {}
            Work::Unreadable => outcomes.push(Outcome::Unreadable),
            Work::Membership(m) => state.counters.membership = Membership::new(Some(entry.log_id), m),
            Work::Batch(batch) => {
                let effects = state.apply(batch, &self.retention);
                self.hub.publish(&effects.changes);
                if !effects.leases.is_empty() {
                    self.lease_changes.lock().unwrap_or_else(PoisonError::into_inner).extend(effects.leases);
                    self.lease_wake.notify_one();
                }
                outcomes = effects.outcomes;
            }
        }
        let position = Position::of(&state);
        drop(state);
        self.position.send_replace(position);
        Ok(Applied(outcomes))
    }

    fn count_unsaved(&self, bytes: u64) {
        // The fixed part stands for what an entry costs beside its payload.
        let bytes = bytes + 64;
        let unsaved = self.unsaved_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if unsaved > self.snapshot_after.load(Ordering::Relaxed) {
            self.snapshot_wake.notify_one();
        }
    }

    /// Whether the state should be saved. While a snapshot is being sent it may wait for twice as much of the log, but
    /// not longer: the log takes memory, too.
    pub fn snapshot_due(&self, sending: bool) -> bool {
        let after = self.snapshot_after.load(Ordering::Relaxed);
        self.unsaved_bytes.load(Ordering::Relaxed) > if sending { after.saturating_mul(2) } else { after }
    }

    /// Learns how large a snapshot is. Saving writes all of it, so it waits for twice as much of the log, as long as that
    /// takes no more than four times what is configured, which has to be read again after a restart and is kept in memory
    /// until then; for a large state it waits for a quarter.
    pub fn note_snapshot(&self, bytes: u64) {
        let more = (2 * bytes).min(4 * self.save_at_least).max(bytes / 4);
        self.snapshot_after.store(more.max(self.save_at_least), Ordering::Relaxed);
    }
}

/// The group's feature level has risen beyond this release: what comes now it may not be able to read.
#[derive(Debug, thiserror::Error)]
#[error("the group is at feature level {level}, this release supports {supported}: run the newer release")]
struct TooNew {
    level: u32,
    supported: u32,
}

impl TooNew {
    fn check(level: u32, supported: u32) -> Result<(), Self> {
        if level > supported { Err(Self { level, supported }) } else { Ok(()) }
    }
}

enum Work {
    Nothing,
    Unreadable,
    Membership(openraft::Membership<u64, openraft::BasicNode>),
    Batch(Batch),
}

/// The consensus library's handle on the state.
#[derive(Clone)]
pub struct Machine {
    pub shared: Arc<Shared>,
    pub snapshots: Arc<SnapshotDir>,
    /// The highest feature level that this release reads.
    pub supported: u32,
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Membership), StorageError> {
        let state = self.shared.read();
        Ok((state.counters.applied, state.counters.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Applied>, StorageError>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let applied = entries.into_iter().map(|entry| self.shared.apply(entry, self.supported));
        applied.collect::<Result<_, _>>().map_err(machine_error)
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotFile>, StorageError> {
        // Chunks are received by our own messages; see `receive`.
        Err(machine_error("snapshots are received by chunks"))
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, file: Box<SnapshotFile>) -> Result<(), StorageError> {
        let (snapshots, meta) = (self.snapshots.clone(), meta.clone());
        let installed = on_disk(self.snapshots.disk(), move || snapshots.install(&meta, &file)).await.and_then(|i| i);
        let state = installed.map_err(|e| {
            self.snapshots.failed(&e.to_string());
            machine_error(e)
        })?;
        if let Err(e) = TooNew::check(state.feature_level(), self.supported) {
            self.snapshots.failed(&e.to_string());
            return Err(machine_error(e));
        }
        tracing::info!(revision = state.counters.revision, "installed a snapshot from the leader");
        self.shared.unsaved_bytes.store(0, Ordering::Relaxed);
        self.shared.note_snapshot(self.snapshots.bytes());
        self.shared.replace(state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        Ok(self.snapshots.current().map(|(meta, file)| Snapshot { meta, snapshot: Box::new(file) }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError> {
        self.shared.unsaved_bytes.store(0, Ordering::Relaxed);
        let state = self.shared.read().clone();
        let snapshots = self.snapshots.clone();
        let (meta, file) = on_disk(self.snapshots.disk(), move || snapshots.save(&state))
            .await
            .map_err(machine_error)?
            .map_err(machine_error)?;
        self.shared.note_snapshot(file.len);
        Ok(Snapshot { meta, snapshot: Box::new(file) })
    }
}
