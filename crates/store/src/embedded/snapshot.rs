//! Snapshot files.
//!
//! A file is an 8-byte magic with the format version, then parts: length (u32), CRC-32C of the payload (u32), payload
//! (MessagePack). The first part is the header, the last says `End`; a file without it, or with a wrong sum, is not a
//! snapshot. Files are written beside their final name and renamed when durable, so a name like
//! `snapshot-<index>-<count>.snap` always means a complete file. Only the newest is kept.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use nexus_env::{Disk, File};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::mvcc::{Counters, Lease, Record, Slot, State, Version};
use super::pack::Pack;
use super::raft::{LogId, SnapshotMeta};
use crate::error::StoreError;

pub const MAGIC: &[u8; 8] = b"NXSNAP\x00\x01";
/// Keys or records per part: large enough to be cheap, small enough to be checked piecewise.
const PART_BYTES: usize = 512 * 1024;
/// A length beyond this is damage, not data: the largest value is 1 MiB, and parts close soon after `PART_BYTES`.
pub const MAX_PART: usize = 1 << 30;
/// So much of a file is written before it is made durable piece by piece: a log that is synced meanwhile waits for one
/// piece at most, not for all of it.
const SYNC_BYTES: usize = 4 << 20;

/// A complete snapshot file, or one that was received and not yet checked.
#[derive(Debug, Clone)]
pub struct SnapshotFile {
    pub path: PathBuf,
    pub len: u64,
}

#[derive(Serialize)]
pub enum Part {
    Header(Box<(SnapshotMeta, Counters)>),
    Keys(Vec<(Bytes, Slot)>),
    History(Vec<Arc<Record>>),
    Leases(Vec<(u64, Lease)>),
    End { keys: u64, records: u64 },
}

/// A [`Part`] as it lies in a file.
#[derive(Deserialize)]
enum StoredPart<'a> {
    Header(Box<(SnapshotMeta, Counters)>),
    Keys(#[serde(borrow)] Vec<(&'a [u8], StoredSlot<'a>)>),
    History(#[serde(borrow)] Vec<StoredRecord<'a>>),
    Leases(Vec<(u64, Lease)>),
    End { keys: u64, records: u64 },
}

#[derive(Deserialize)]
struct StoredSlot<'a> {
    #[serde(borrow)]
    newest: StoredVersion<'a>,
    #[serde(borrow)]
    older: Option<Vec<StoredVersion<'a>>>,
}

#[derive(Deserialize)]
struct StoredVersion<'a> {
    modified: u64,
    created: u64,
    lease: u64,
    value: Option<&'a [u8]>,
}

#[derive(Deserialize)]
struct StoredRecord<'a> {
    revision: u64,
    timestamp_ms: i64,
    #[serde(borrow)]
    keys: Vec<&'a [u8]>,
    cost: usize,
}

/// Reads parts, and keeps what is in them in few allocations.
#[derive(Default)]
pub struct PartReader {
    keys: Pack,
    values: Pack,
    /// Gone first, so apart from the rest.
    past_keys: Pack,
    past_values: Pack,
}

impl PartReader {
    pub fn read(&mut self, payload: &[u8]) -> Result<Part, rmp_serde::decode::Error> {
        Ok(match rmp_serde::from_slice(payload)? {
            StoredPart::Header(parts) => Part::Header(parts),
            StoredPart::Leases(leases) => Part::Leases(leases),
            StoredPart::End { keys, records } => Part::End { keys, records },
            StoredPart::Keys(keys) => {
                Part::Keys(keys.into_iter().map(|(key, slot)| (self.keys.keep(key), self.slot(slot))).collect())
            }
            StoredPart::History(records) => Part::History(
                records
                    .into_iter()
                    .map(|StoredRecord { revision, timestamp_ms, keys, cost }| {
                        let keys = keys.into_iter().map(|key| self.past_keys.keep(key)).collect();
                        Arc::new(Record { revision, timestamp_ms, keys, cost })
                    })
                    .collect(),
            ),
        })
    }

    fn slot(&mut self, slot: StoredSlot<'_>) -> Slot {
        let past = &mut self.past_values;
        let older = slot.older.map(|all| Arc::new(all.into_iter().map(|v| v.kept(past)).collect()));
        Slot { newest: slot.newest.kept(&mut self.values), older }
    }
}

impl StoredVersion<'_> {
    fn kept(self, pack: &mut Pack) -> Version {
        let Self { modified, created, lease, value } = self;
        Version { modified, created, lease, value: value.map(|v| pack.keep(v)) }
    }
}

struct PartWriter {
    file: Box<dyn File>,
    len: u64,
    /// One part with its head; kept, because a fresh one for each part is mostly paging.
    out: Vec<u8>,
    unsynced: usize,
}

impl PartWriter {
    fn write(&mut self, part: &Part) -> io::Result<()> {
        const HEAD: usize = 8;
        self.out.clear();
        self.out.resize(HEAD, 0);
        rmp_serde::encode::write(&mut self.out, part).map_err(io::Error::other)?;
        let (head, payload) = self.out.split_at_mut(HEAD);
        head[..4].copy_from_slice(&u32::try_from(payload.len()).map_err(io::Error::other)?.to_le_bytes());
        head[4..].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        self.len += self.out.len() as u64;
        self.file.append(&self.out)?;
        self.unsynced += self.out.len();
        if self.unsynced >= SYNC_BYTES {
            self.file.sync()?;
            self.unsynced = 0;
        }
        Ok(())
    }
}

/// Where one group's snapshots live.
pub struct SnapshotDir {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    current: Mutex<Option<(SnapshotMeta, SnapshotFile)>>,
    count: AtomicU64,
    /// How far the newest snapshot reaches, or why one from the leader could not be installed.
    reach: watch::Sender<Result<Option<LogId>, String>>,
    saving: watch::Sender<bool>,
    sending: AtomicUsize,
}

/// Held while a snapshot is on its way to another member.
pub struct Sending<'a>(&'a SnapshotDir);

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.0.sending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Says that nothing is being saved any more, however saving ended.
struct Saving<'a>(&'a watch::Sender<bool>);

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

impl SnapshotDir {
    /// Finds the newest snapshot and loads it; removes what a crash left.
    pub fn open(disk: Arc<dyn Disk>, dir: PathBuf) -> Result<(Self, State), StoreError> {
        let storage = |e: io::Error| StoreError::Storage(e.to_string());
        let mut names: Vec<String> = Vec::new();
        for entry in disk.list(&dir).map_err(storage)? {
            if entry.name.starts_with("snapshot-") && entry.name.ends_with(".snap") {
                names.push(entry.name);
            } else if entry.name.starts_with("incoming-") || entry.name.ends_with(".snap.tmp") {
                disk.remove_file(&dir.join(&entry.name)).map_err(storage)?;
            }
        }
        names.sort();
        let this = Self {
            disk,
            dir,
            current: Mutex::new(None),
            count: AtomicU64::new(0),
            reach: watch::Sender::new(Ok(None)),
            saving: watch::Sender::new(false),
            sending: AtomicUsize::new(0),
        };
        let Some(newest) = names.pop() else { return Ok((this, State::default())) };
        let count = newest.trim_end_matches(".snap").rsplit('-').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        this.count.store(count + 1, Ordering::Relaxed);
        let path = this.dir.join(&newest);
        let (meta, state, len) = load(&*this.disk, &path)?;
        for old in names {
            this.disk.remove_file(&this.dir.join(old)).map_err(storage)?;
        }
        drop(this.reach.send_replace(Ok(meta.last_log_id)));
        *this.lock() = Some((meta, SnapshotFile { path, len }));
        Ok((this, state))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(SnapshotMeta, SnapshotFile)>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub fn current(&self) -> Option<(SnapshotMeta, SnapshotFile)> {
        self.lock().clone()
    }

    pub fn bytes(&self) -> u64 {
        self.lock().as_ref().map_or(0, |(_, file)| file.len)
    }

    /// Opens a snapshot to send it. The open file outlives its removal by a newer one.
    pub fn open_file(&self, file: &SnapshotFile) -> io::Result<Box<dyn File>> {
        self.disk.open(&file.path)
    }

    /// Begins a file for a snapshot that arrives in chunks.
    pub fn begin_incoming(&self) -> io::Result<(PathBuf, Box<dyn File>)> {
        let path = self.dir.join(format!("incoming-{}", self.count.fetch_add(1, Ordering::Relaxed)));
        let file = self.disk.create(&path)?;
        Ok((path, file))
    }

    /// Removes a file that did not become a snapshot.
    pub fn discard(&self, path: &Path) {
        if let Err(e) = self.disk.remove_file(path)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), error = %e, "an unfinished snapshot can't be removed");
        }
    }

    /// The newest snapshot, to send it; one that is being saved is waited for. Sending an old one would be in vain: the
    /// log behind it goes as soon as the newer one is there.
    pub async fn newest(&self) -> Option<(SnapshotMeta, SnapshotFile)> {
        // An error would mean that this very folder is gone.
        drop(self.saving.subscribe().wait_for(|saving| !saving).await);
        self.current()
    }

    pub fn sending(&self) -> Sending<'_> {
        self.sending.fetch_add(1, Ordering::Relaxed);
        Sending(self)
    }

    /// Whether another member is being sent a snapshot. A newer one would cost it the log that it needs after it.
    pub fn is_sending(&self) -> bool {
        self.sending.load(Ordering::Relaxed) > 0
    }

    /// Writes the state to a new file and makes it the current snapshot.
    pub fn save(&self, state: &State) -> io::Result<(SnapshotMeta, SnapshotFile)> {
        self.saving.send_replace(true);
        let _saving = Saving(&self.saving);
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let meta = meta_of(state, count);
        let path = self.name(&meta, count);
        let temporary = path.with_extension("snap.tmp");
        let len = write(&*self.disk, &temporary, &meta, state)?;
        let file = SnapshotFile { path, len };
        self.publish(&temporary, meta.clone(), file.clone())?;
        Ok((meta, file))
    }

    /// Checks a received file, makes it the current snapshot and answers its state.
    pub fn install(&self, meta: &SnapshotMeta, received: &SnapshotFile) -> io::Result<State> {
        let (found, state, len) = load(&*self.disk, &received.path).map_err(io::Error::other)?;
        if found.last_log_id != meta.last_log_id {
            return Err(io::Error::other("the received snapshot is not the one that was announced"));
        }
        let path = self.name(meta, self.count.fetch_add(1, Ordering::Relaxed));
        self.publish(&received.path, meta.clone(), SnapshotFile { path, len })?;
        Ok(state)
    }

    /// Waits until a durable snapshot holds everything up to `id`: only then may the log forget it. The consensus library
    /// orders the log to be cut while a snapshot from the leader is still being installed.
    pub async fn holds(&self, id: LogId) -> Result<(), String> {
        let mut reach = self.reach.subscribe();
        match reach.wait_for(|r| r.as_ref().map_or(true, |r| *r >= Some(id))).await {
            Ok(reach) => reach.as_ref().map(|_| ()).map_err(Clone::clone),
            Err(_) => Err("the store is closed".into()),
        }
    }

    /// Tells those who wait for a snapshot that it will not come.
    pub fn failed(&self, reason: &str) {
        drop(self.reach.send_replace(Err(reason.to_owned())));
    }

    fn name(&self, meta: &SnapshotMeta, count: u64) -> PathBuf {
        let index = meta.last_log_id.map_or(0, |id| id.index);
        self.dir.join(format!("snapshot-{index:020}-{count:010}.snap"))
    }

    fn publish(&self, from: &Path, meta: SnapshotMeta, file: SnapshotFile) -> io::Result<()> {
        let mut current = self.lock();
        let newer = |(m, _): &(SnapshotMeta, SnapshotFile)| m.last_log_id > meta.last_log_id;
        if current.as_ref().is_some_and(newer) {
            // A snapshot from the leader overtook one that was being built here.
            drop(current);
            self.discard(from);
            return Ok(());
        }
        self.disk.rename(from, &file.path)?;
        self.disk.sync_dir(&self.dir)?;
        let reach = meta.last_log_id;
        let old = current.replace((meta, file.clone()));
        drop(current);
        drop(self.reach.send_replace(Ok(reach)));
        if let Some((_, old)) = old
            && old.path != file.path
        {
            self.discard(&old.path);
        }
        Ok(())
    }
}

/// What a snapshot of the state says of itself.
pub fn meta_of(state: &State, count: u64) -> SnapshotMeta {
    let applied = state.counters.applied;
    SnapshotMeta {
        last_log_id: applied,
        last_membership: state.counters.membership.clone(),
        snapshot_id: format!("{}-{count}", applied.map_or(0, |id| id.index)),
    }
}

/// Writes a state to a new file, durably but for its name; answers the length.
pub fn write(disk: &dyn Disk, path: &Path, meta: &SnapshotMeta, state: &State) -> io::Result<u64> {
    let file = disk.create(path)?;
    file.append(MAGIC)?;
    let mut out = PartWriter { file, len: MAGIC.len() as u64, out: Vec::new(), unsynced: 0 };
    out.write(&Part::Header(Box::new((meta.clone(), state.counters.clone()))))?;
    out.write(&Part::Leases(state.leases.iter().map(|(id, lease)| (*id, lease.clone())).collect()))?;
    let (mut part, mut bytes) = (Vec::new(), 0);
    for (key, slot) in &state.keys {
        let versions = std::iter::once(&slot.newest).chain(slot.older.iter().flat_map(|o| o.iter()));
        bytes += key.len() + versions.map(|v| 48 + v.value.as_ref().map_or(0, Bytes::len)).sum::<usize>();
        part.push((key.clone(), slot.clone()));
        if bytes >= PART_BYTES {
            out.write(&Part::Keys(std::mem::take(&mut part)))?;
            bytes = 0;
        }
    }
    out.write(&Part::Keys(part))?;
    let (mut part, mut bytes) = (Vec::new(), 0);
    for record in &state.history {
        bytes += 32 + record.keys.iter().map(|k| k.len() + 8).sum::<usize>();
        part.push(record.clone());
        if bytes >= PART_BYTES {
            out.write(&Part::History(std::mem::take(&mut part)))?;
            bytes = 0;
        }
    }
    out.write(&Part::History(part))?;
    out.write(&Part::End { keys: state.keys.len() as u64, records: state.history.len() as u64 })?;
    out.file.sync()?;
    Ok(out.len)
}

/// Reads and checks a whole file.
pub fn load(disk: &dyn Disk, path: &Path) -> Result<(SnapshotMeta, State, u64), StoreError> {
    let file = disk.open(path).map_err(|e| StoreError::Storage(e.to_string()))?;
    let at = std::cell::Cell::new(0u64);
    let corrupt = |reason: &str| StoreError::Corrupt {
        path: path.display().to_string(),
        offset: at.get(),
        reason: reason.to_owned(),
    };
    let total = file.len().map_err(|e| StoreError::Storage(e.to_string()))?;
    let read = |buf: &mut Vec<u8>, len: usize| -> Result<(), StoreError> {
        if at.get() + len as u64 > total {
            return Err(corrupt("the snapshot ends too early"));
        }
        buf.resize(len, 0);
        file.read_exact_at(at.get(), buf).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => corrupt("the snapshot ends too early"),
            _ => StoreError::Storage(e.to_string()),
        })?;
        at.set(at.get() + len as u64);
        Ok(())
    };
    // One buffer for all parts; what is kept of them is copied out of it.
    let (mut magic, mut head, mut payload) = (Vec::new(), Vec::new(), Vec::new());
    read(&mut magic, MAGIC.len())?;
    if magic[..6] != MAGIC[..6] {
        return Err(corrupt("not a snapshot"));
    }
    if magic != MAGIC {
        let found = u32::from(magic[7]);
        return Err(StoreError::NewerFormat { path: path.display().to_string(), found, supported: 1 });
    }
    let mut state = State::default();
    let mut parts = PartReader::default();
    let mut header = None;
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    loop {
        read(&mut head, 8)?;
        let len = word(&head) as usize;
        if len > MAX_PART {
            return Err(corrupt("impossible length"));
        }
        read(&mut payload, len)?;
        if crc32c::crc32c(&payload) != word(&head[4..]) {
            return Err(corrupt("checksum mismatch"));
        }
        match parts.read(&payload).map_err(|e| corrupt(&e.to_string()))? {
            Part::Header(said) => {
                let (meta, counters) = *said;
                state.counters = counters;
                header = Some(meta);
            }
            Part::Leases(leases) => state.leases.extend(leases),
            Part::Keys(keys) => state.keys.extend(keys),
            Part::History(records) => state.history.extend(records),
            Part::End { keys, records } => {
                if (keys, records) != (state.keys.len() as u64, state.history.len() as u64) {
                    return Err(corrupt("parts are missing"));
                }
                break;
            }
        }
    }
    let meta = header.ok_or_else(|| corrupt("the header is missing"))?;
    state.rebuild();
    Ok((meta, state, at.get()))
}

#[cfg(test)]
mod tests {
    use nexus_env::MemDisk;

    use super::super::mvcc::Retention;
    use super::super::raft::{Batch, Command};
    use super::*;
    use crate::types::{LeaseId, Op, RangeRequest, Revision, Txn};

    fn filled() -> State {
        let mut state = State::default();
        let put = |i: u32| {
            let lease = i.is_multiple_of(3).then_some(LeaseId(1));
            let op = Op::Put { key: format!("k{:03}", i % 100).into(), value: vec![i as u8; 3000].into(), lease };
            Command::Txn(Txn::new(vec![], vec![op]))
        };
        let commands = std::iter::once(Command::Grant { ttl_ms: 9 }).chain((0..700).map(put)).collect();
        state.apply(Batch { at_ms: 1, commands }, &Retention::default());
        state.compact(100);
        state
    }

    #[test]
    fn a_saved_state_comes_back_with_its_history_and_leases() {
        let disk: Arc<dyn Disk> = Arc::new(MemDisk::new(1));
        let dir = PathBuf::from("/s");
        disk.create_dir_all(&dir).unwrap();
        let state = filled();
        let (snapshots, _) = SnapshotDir::open(disk.clone(), dir.clone()).unwrap();
        snapshots.save(&state).unwrap();
        snapshots.save(&state).unwrap();
        assert_eq!(disk.list(&dir).unwrap().len(), 1, "only the newest is kept");
        let (_, back) = SnapshotDir::open(disk, dir).unwrap();
        for at in [100, 300, 700] {
            let request = RangeRequest::prefix("").at(Revision(at));
            assert_eq!(back.range(&request), state.range(&request));
        }
        let all = |_: &Bytes| true;
        assert_eq!(back.changes_after(100, 1000, all), state.changes_after(100, 1000, all));
        assert_eq!(back.leases.get(&1).unwrap().keys, state.leases.get(&1).unwrap().keys);
        assert_eq!(back.counters.live_keys, 100);
    }

    #[test]
    fn damage_is_named_and_never_loaded() {
        let disk = MemDisk::new(1);
        let dir = PathBuf::from("/s");
        disk.create_dir_all(&dir).unwrap();
        let door: Arc<dyn Disk> = Arc::new(disk.clone());
        let (snapshots, _) = SnapshotDir::open(door.clone(), dir.clone()).unwrap();
        let (_, file) = snapshots.save(&filled()).unwrap();
        for offset in [20, file.len / 2, file.len - 1] {
            disk.flip_bit(&file.path, offset).unwrap();
            let error = SnapshotDir::open(door.clone(), dir.clone()).err().unwrap();
            assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
            disk.flip_bit(&file.path, offset).unwrap();
        }
        assert!(SnapshotDir::open(door, dir).is_ok());
    }
}
