//! A disk in memory that can lose power.
//!
//! It keeps what was synced apart from what was not. [`MemDisk::crash`] then does what a real machine may do: unsynced
//! bytes survive as a random prefix whose last sectors may be garbage or zeros, an unsynced truncation may not have
//! happened, and names that were made, renamed or removed without a folder sync may be as before. Every choice comes
//! from the seed, so a failing run replays. Errors, a full disk and slow syncs can be injected.
//!
//! Folders themselves are durable as soon as they are made: no caller depends on losing one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::disk::{DirEntry, Disk, DiskLock, File};
use crate::rng::{RngExt, SeededRng};

const SECTOR: usize = 512;

/// What a [`Fault`] strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    Open,
    Create,
    Read,
    Append,
    Sync,
    Truncate,
    Rename,
    Remove,
    SyncDir,
}

/// An error to come: the next `times` calls of `op` on a path that contains `path_part` fail with `kind`.
#[derive(Debug, Clone)]
pub struct Fault {
    pub op: DiskOp,
    pub path_part: String,
    pub kind: io::ErrorKind,
    pub times: usize,
}

type Inode = u64;

#[derive(Default)]
struct Node {
    data: Vec<u8>,
    /// `data[..synced]` is durable.
    synced: usize,
    /// Durable bytes beyond `synced` that an unsynced truncation cut off.
    cut_off: Vec<u8>,
    /// Up to here the file has durable zeros behind its end.
    reserved: usize,
    /// Open handles: a removed file lives on for those who have it open.
    handles: usize,
}

/// A change of names that has not been synced: entries as they become when it is applied.
struct NameChange {
    dir: PathBuf,
    set: Vec<(PathBuf, Option<Inode>)>,
}

struct State {
    nodes: BTreeMap<Inode, Node>,
    next_inode: Inode,
    names: BTreeMap<PathBuf, Inode>,
    durable_names: BTreeMap<PathBuf, Inode>,
    pending: Vec<NameChange>,
    dirs: BTreeSet<PathBuf>,
    locks: BTreeSet<PathBuf>,
    /// Counts power cuts; handles from before one are dead.
    power: u64,
    capacity: Option<u64>,
    sync_delay: Duration,
    simulated: bool,
    faults: Vec<Fault>,
    syncs: u64,
}

/// Clones share one disk.
#[derive(Clone)]
pub struct MemDisk {
    state: Arc<Mutex<State>>,
    rng: Arc<SeededRng>,
    /// The power count that this view was mounted at, for [`MemDisk::mount`].
    mounted: Option<u64>,
}

fn gone() -> io::Error {
    io::Error::other("the disk lost power after this file was opened")
}

fn missing(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

impl Node {
    /// What the file takes of the disk.
    fn room(&self) -> usize {
        self.data.len().max(self.reserved)
    }

    /// From now on the zeros behind the end are like any other content.
    fn fill(&mut self) {
        let room = self.room();
        self.data.resize(room, 0);
        self.reserved = 0;
    }
}

impl State {
    fn strike(&mut self, op: DiskOp, path: &Path) -> io::Result<()> {
        let text = path.to_string_lossy();
        let hit = self.faults.iter_mut().find(|f| f.op == op && f.times > 0 && text.contains(&f.path_part));
        match hit {
            Some(fault) => {
                fault.times -= 1;
                Err(io::Error::new(fault.kind, format!("injected fault on {op:?} of {}", path.display())))
            }
            None => Ok(()),
        }
    }

    fn used(&self) -> u64 {
        self.nodes.values().map(|n| n.room() as u64).sum()
    }

    fn change(&mut self, dir: &Path, set: Vec<(PathBuf, Option<Inode>)>) {
        for (path, inode) in &set {
            match inode {
                Some(inode) => drop(self.names.insert(path.clone(), *inode)),
                None => drop(self.names.remove(path)),
            }
        }
        self.pending.push(NameChange { dir: dir.to_path_buf(), set });
    }

    /// Moves a folder with all in it. Durable as one change with a sync of the new name's folder, as files' names are.
    fn rename_dir(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        if self.names.keys().chain(&self.dirs).any(|p| p.starts_with(to)) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} exists", to.display())));
        }
        let parent = self.parent(to)?.to_path_buf();
        let moved = |path: &Path| path.strip_prefix(from).map(|rest| to.join(rest)).ok();
        // Names that were not durable yet become so in the new place, or not at all.
        let mut set = Vec::new();
        for (path, inode) in self.names.iter().filter(|(p, _)| p.starts_with(from)) {
            set.push((path.clone(), None));
            set.extend(moved(path).map(|new| (new, Some(*inode))));
        }
        let folders: Vec<PathBuf> = self.dirs.iter().filter(|d| d.starts_with(from)).cloned().collect();
        for folder in folders {
            self.dirs.remove(&folder);
            self.dirs.extend(moved(&folder));
        }
        self.dirs.insert(to.to_path_buf());
        self.change(&parent, set);
        Ok(())
    }

    fn harden(&mut self, changes: Vec<NameChange>) {
        for (path, inode) in changes.into_iter().flat_map(|c| c.set) {
            match inode {
                Some(inode) => drop(self.durable_names.insert(path, inode)),
                None => drop(self.durable_names.remove(&path)),
            }
        }
    }

    fn collect_garbage(&mut self) {
        let mut live: BTreeSet<Inode> = self.names.values().chain(self.durable_names.values()).copied().collect();
        live.extend(self.pending.iter().flat_map(|c| c.set.iter().filter_map(|(_, inode)| *inode)));
        self.nodes.retain(|inode, node| node.handles > 0 || live.contains(inode));
    }

    fn parent<'a>(&self, path: &'a Path) -> io::Result<&'a Path> {
        let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        if self.dirs.contains(dir) || dir == Path::new("/") || dir == Path::new("") {
            Ok(dir)
        } else {
            Err(missing(dir))
        }
    }
}

impl MemDisk {
    pub fn new(seed: u64) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                nodes: BTreeMap::new(),
                next_inode: 1,
                names: BTreeMap::new(),
                durable_names: BTreeMap::new(),
                pending: Vec::new(),
                dirs: BTreeSet::new(),
                locks: BTreeSet::new(),
                power: 0,
                capacity: None,
                sync_delay: Duration::ZERO,
                simulated: false,
                faults: Vec::new(),
                syncs: 0,
            })),
            rng: Arc::new(SeededRng::new(seed)),
            mounted: None,
        }
    }

    fn handle(&self, s: &mut State, path: &Path, inode: Inode) -> Box<dyn File> {
        s.nodes.entry(inode).or_default().handles += 1;
        Box::new(MemFile { disk: self.clone(), path: path.to_path_buf(), inode, power: s.power })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk as one machine sees it until the next power cut: after it, every call on this view fails. Give it to
    /// whatever is to be killed, because threads that outlive their simulated machine would go on changing files.
    pub fn mount(&self) -> Self {
        Self { mounted: Some(self.state().power), ..self.clone() }
    }

    /// The state, if this view's machine still has power.
    fn powered(&self) -> io::Result<MutexGuard<'_, State>> {
        let s = self.state();
        if self.mounted.is_some_and(|at| at != s.power) { Err(gone()) } else { Ok(s) }
    }

    /// Cuts the power. Open handles and locks die; what was not synced survives in part, as the seed decides.
    pub fn crash(&self) {
        let mut guard = self.state();
        let s = &mut *guard;
        s.power += 1;
        s.locks.clear();
        // Journals keep the order of name changes, so a prefix of each folder's survives.
        let pending = std::mem::take(&mut s.pending);
        let mut keep: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for change in &pending {
            *keep.entry(change.dir.clone()).or_default() += 1;
        }
        for count in keep.values_mut() {
            *count = self.rng.below(*count + 1);
        }
        let kept = pending
            .into_iter()
            .filter(|c| {
                let left = keep.get_mut(&c.dir).expect("counted above");
                let keeps = *left > 0;
                *left = left.saturating_sub(1);
                keeps
            })
            .collect();
        s.harden(kept);
        s.names = s.durable_names.clone();
        s.nodes.values_mut().for_each(|node| node.handles = 0);
        s.collect_garbage();
        for node in s.nodes.values_mut() {
            if !node.cut_off.is_empty() && self.rng.below(2) == 0 {
                // The truncation never reached the disk, so neither did what was written after it.
                node.data.truncate(node.synced);
                node.data.append(&mut node.cut_off);
            } else {
                let unsynced = (node.data.len() - node.synced) as u64;
                let kept = node.synced + self.rng.below(unsynced + 1) as usize;
                node.data.truncate(kept);
                tear(&mut node.data, node.synced, &self.rng);
            }
            node.cut_off.clear();
            node.fill();
            node.synced = node.data.len();
        }
    }

    /// Limits the bytes that all files may hold; `None` lifts the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Every file sync takes this long (it blocks its thread, as a slow disk does). On a simulated disk every piece of
    /// work of [`on_disk`](crate::on_disk) takes this long, in the runtime's time.
    pub fn set_sync_delay(&self, delay: Duration) {
        self.state().sync_delay = delay;
    }

    /// From now on work on this disk runs in place, without threads; see [`Disk::simulated_delay`].
    pub fn simulate(&self) {
        self.state().simulated = true;
    }

    /// Lets coming calls fail.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Forgets the faults that have not struck yet.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// How many file syncs there were: what group commit saves.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Flips one bit of a file, as a failing medium does.
    pub fn flip_bit(&self, path: &Path, offset: u64) -> io::Result<()> {
        let mut s = self.state();
        let inode = *s.names.get(path).ok_or_else(|| missing(path))?;
        let node = s.nodes.get_mut(&inode).expect("a name has a node");
        if offset as usize >= node.data.len() {
            node.fill();
        }
        *node.data.get_mut(offset as usize).ok_or(io::ErrorKind::UnexpectedEof)? ^= 1;
        Ok(())
    }
}

/// Spoils sectors of the unsynced part that survived: the last one may hold garbage, any may hold zeros.
fn tear(data: &mut [u8], synced: usize, rng: &SeededRng) {
    let len = data.len();
    if len <= synced {
        return;
    }
    if rng.below(2) == 0 {
        let from = synced.max((len - 1) / SECTOR * SECTOR);
        let from = from + rng.below((len - from) as u64) as usize;
        for byte in &mut data[from..] {
            *byte = rng.u64() as u8;
        }
    }
    if rng.below(3) == 0 {
        let from = synced + rng.below((len - synced) as u64) as usize;
        let from = synced.max(from / SECTOR * SECTOR);
        let to = len.min((from / SECTOR + 1) * SECTOR);
        data[from..to].fill(0);
    }
}

struct MemFile {
    disk: MemDisk,
    path: PathBuf,
    inode: Inode,
    power: u64,
}

impl MemFile {
    fn with<T>(&self, op: DiskOp, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut s = self.disk.state();
        if s.power != self.power {
            return Err(gone());
        }
        s.strike(op, &self.path)?;
        act(&mut s)
    }
}

impl Drop for MemFile {
    fn drop(&mut self) {
        let mut s = self.disk.state();
        if s.power == self.power
            && let Some(node) = s.nodes.get_mut(&self.inode)
        {
            node.handles -= 1;
        }
    }
}

impl File for MemFile {
    fn append(&self, data: &[u8]) -> io::Result<()> {
        self.with(DiskOp::Append, |s| {
            let room = s.capacity.map_or(u64::MAX, |c| c.saturating_sub(s.used()));
            let node = s.nodes.entry(self.inode).or_default();
            let room = room.saturating_add((node.room() - node.data.len()) as u64);
            let fits = data.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            node.data.extend_from_slice(&data[..fits]);
            if fits < data.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.with(DiskOp::Read, |s| {
            let data = &s.nodes.entry(self.inode).or_default().data;
            let from = data.len().min(usize::try_from(offset).unwrap_or(usize::MAX));
            let n = buf.len().min(data.len() - from);
            buf[..n].copy_from_slice(&data[from..from + n]);
            Ok(n)
        })
    }

    fn sync(&self) -> io::Result<()> {
        let delay = {
            let state = self.disk.state();
            if state.simulated { Duration::ZERO } else { state.sync_delay }
        };
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        self.with(DiskOp::Sync, |s| {
            s.syncs += 1;
            let node = s.nodes.entry(self.inode).or_default();
            node.synced = node.data.len();
            node.cut_off.clear();
            Ok(())
        })
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.with(DiskOp::Truncate, |s| {
            let node = s.nodes.entry(self.inode).or_default();
            let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
            if len < node.synced {
                let mut cut = node.data[len..node.synced].to_vec();
                cut.append(&mut node.cut_off);
                node.cut_off = cut;
                node.synced = len;
            }
            node.data.resize(len, 0);
            node.reserved = 0;
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.with(DiskOp::Open, |s| Ok(s.nodes.entry(self.inode).or_default().data.len() as u64))
    }
}

struct MemLock {
    disk: MemDisk,
    path: PathBuf,
    power: u64,
}

impl DiskLock for MemLock {}

impl Drop for MemLock {
    fn drop(&mut self) {
        let mut s = self.disk.state();
        if s.power == self.power {
            s.locks.remove(&self.path);
        }
    }
}

impl Disk for MemDisk {
    fn simulated_delay(&self) -> Option<Duration> {
        let state = self.state();
        state.simulated.then_some(state.sync_delay)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let mut s = self.powered()?;
        s.strike(DiskOp::Open, path)?;
        let inode = *s.names.get(path).ok_or_else(|| missing(path))?;
        s.nodes.entry(inode).or_default().fill();
        Ok(self.handle(&mut s, path, inode))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let mut s = self.powered()?;
        s.strike(DiskOp::Create, path)?;
        let dir = s.parent(path)?.to_path_buf();
        if s.capacity.is_some_and(|c| s.used() >= c) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let inode = match s.names.get(path) {
            Some(inode) => {
                let inode = *inode;
                let node = s.nodes.entry(inode).or_default();
                let mut cut = node.data[..node.synced].to_vec();
                cut.append(&mut node.cut_off);
                *node = Node { cut_off: cut, handles: node.handles, ..Node::default() };
                inode
            }
            None => {
                let inode = s.next_inode;
                s.next_inode += 1;
                s.nodes.insert(inode, Node::default());
                s.change(&dir, vec![(path.to_path_buf(), Some(inode))]);
                inode
            }
        };
        Ok(self.handle(&mut s, path, inode))
    }

    fn create_reserved(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
        let file = self.create(path)?;
        let mut s = self.powered()?;
        s.strike(DiskOp::Append, path)?;
        if s.capacity.is_some_and(|c| s.used().saturating_add(bytes) > c) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let inode = *s.names.get(path).ok_or_else(|| missing(path))?;
        let node = s.nodes.entry(inode).or_default();
        node.reserved = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        // What an earlier file of that name held is overwritten for good.
        node.cut_off.clear();
        drop(s);
        Ok(file)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut s = self.powered()?;
        s.strike(DiskOp::Read, path)?;
        let inode = s.names.get(path).ok_or_else(|| missing(path))?;
        let Some(node) = s.nodes.get(inode) else { return Ok(Vec::new()) };
        let mut data = node.data.clone();
        data.resize(node.room(), 0);
        Ok(data)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut s = self.powered()?;
        s.strike(DiskOp::Rename, from)?;
        if s.dirs.contains(from) {
            return s.rename_dir(from, to);
        }
        let inode = *s.names.get(from).ok_or_else(|| missing(from))?;
        let dir = s.parent(to)?.to_path_buf();
        s.change(&dir, vec![(from.to_path_buf(), None), (to.to_path_buf(), Some(inode))]);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut s = self.powered()?;
        s.strike(DiskOp::Remove, path)?;
        if !s.names.contains_key(path) {
            return Err(missing(path));
        }
        let dir = s.parent(path)?.to_path_buf();
        s.change(&dir, vec![(path.to_path_buf(), None)]);
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut s = self.powered()?;
        let files: Vec<PathBuf> = s.names.keys().filter(|p| p.starts_with(path)).cloned().collect();
        for file in files {
            let dir = s.parent(&file)?.to_path_buf();
            s.change(&dir, vec![(file, None)]);
        }
        s.dirs.retain(|d| !d.starts_with(path));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let s = self.powered()?;
        if !s.dirs.contains(dir) {
            return Err(missing(dir));
        }
        let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let files = s.names.iter().filter(|(p, _)| p.parent() == Some(dir)).map(|(p, inode)| DirEntry {
            name: name(p),
            is_dir: false,
            len: s.nodes.get(inode).map_or(0, |n| n.room() as u64),
        });
        let dirs = s.dirs.iter().filter(|p| p.parent() == Some(dir));
        let mut out: Vec<_> = files.chain(dirs.map(|p| DirEntry { name: name(p), is_dir: true, len: 0 })).collect();
        out.sort();
        Ok(out)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut s = self.powered()?;
        for level in dir.ancestors().filter(|p| !p.as_os_str().is_empty()) {
            s.dirs.insert(level.to_path_buf());
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut s = self.powered()?;
        s.strike(DiskOp::SyncDir, dir)?;
        let (now, later) = std::mem::take(&mut s.pending).into_iter().partition(|c| c.dir == dir);
        s.pending = later;
        s.harden(now);
        s.collect_garbage();
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let s = self.powered()?;
        Ok(s.names.contains_key(path) || s.dirs.contains(path))
    }

    fn free_space(&self, _path: &Path) -> io::Result<u64> {
        let s = self.powered()?;
        Ok(s.capacity.map_or(u64::MAX, |c| c.saturating_sub(s.used())))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        let mut s = self.powered()?;
        if !s.locks.insert(path.to_path_buf()) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, format!("{} is locked", path.display())));
        }
        Ok(Box::new(MemLock { disk: self.clone(), path: path.to_path_buf(), power: s.power }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::write_atomic;

    fn disk(seed: u64) -> (MemDisk, PathBuf) {
        let disk = MemDisk::new(seed);
        let dir = PathBuf::from("/d");
        disk.create_dir_all(&dir).unwrap();
        (disk, dir)
    }

    #[test]
    fn a_renamed_folder_takes_its_files_along() {
        let (disk, dir) = disk(1);
        let (old, new) = (dir.join("old"), dir.join("new"));
        disk.create_dir_all(&old).unwrap();
        write_atomic(&disk, &old.join("f"), b"x").unwrap();
        disk.rename(&old, &new).unwrap();
        disk.sync_dir(&dir).unwrap();
        disk.crash();
        assert_eq!(disk.read(&new.join("f")).unwrap(), b"x");
        assert!(!disk.exists(&old).unwrap());
        disk.create_dir_all(&old).unwrap();
        assert!(disk.rename(&old, &new).is_err(), "nothing is overwritten");
    }

    #[test]
    fn synced_bytes_survive_every_crash_and_unsynced_ones_at_most_in_part() {
        let mut lost = 0;
        for seed in 0..200 {
            let (disk, dir) = disk(seed);
            let path = dir.join("f");
            let file = disk.create(&path).unwrap();
            file.append(&[7; 1000]).unwrap();
            file.sync().unwrap();
            disk.sync_dir(&dir).unwrap();
            file.append(&[8; 3000]).unwrap();
            disk.crash();
            assert!(file.append(b"x").is_err(), "a handle from before the crash is dead");
            let after = disk.read(&path).unwrap();
            assert_eq!(after[..1000], [7; 1000], "seed {seed}");
            assert!(after.len() <= 4000);
            lost += usize::from(after.len() < 4000 || after[1000..] != [8; 3000]);
        }
        assert!(lost > 150, "crashes must hurt: {lost}");
    }

    #[test]
    fn reserved_room_is_there_at_once_and_ends_in_zeros_after_a_crash() {
        for seed in 0..50 {
            let (disk, dir) = disk(seed);
            let path = dir.join("f");
            disk.set_capacity(Some(100));
            assert!(disk.create_reserved(&path, 101).is_err(), "no room");
            let file = disk.create_reserved(&path, 100).unwrap();
            disk.sync_dir(&dir).unwrap();
            file.append(b"durable").unwrap();
            file.sync().unwrap();
            file.append(b"perhaps").unwrap();
            assert_eq!((file.len().unwrap(), disk.read(&path).unwrap().len()), (14, 100));
            disk.crash();
            let found = disk.read(&path).unwrap();
            assert_eq!((&found[..7], found.len()), (&b"durable"[..], 100), "seed {seed}");
            assert!(found[14..].iter().all(|b| *b == 0), "seed {seed}");
            let file = disk.open(&path).unwrap();
            assert_eq!(file.len().unwrap(), 100, "opened anew, the zeros are content");
            assert!(file.append(b"more").is_err(), "and the disk is full");
        }
    }

    #[test]
    fn a_name_without_a_folder_sync_may_vanish() {
        let mut found = 0;
        for seed in 0..100 {
            let (disk, dir) = disk(seed);
            disk.create(&dir.join("f")).unwrap().sync().unwrap();
            disk.crash();
            found += usize::from(disk.exists(&dir.join("f")).unwrap());
        }
        assert!((20..80).contains(&found), "{found}");
    }

    #[test]
    fn an_atomic_write_is_old_or_new_after_a_crash_at_any_step() {
        for seed in 0..200 {
            let (disk, dir) = disk(seed);
            let path = dir.join("f");
            write_atomic(&disk, &path, b"old").unwrap();
            let op = [DiskOp::Append, DiskOp::Sync, DiskOp::Rename, DiskOp::SyncDir][seed as usize % 4];
            disk.inject(Fault { op, path_part: String::new(), kind: io::ErrorKind::Other, times: 1 });
            assert!(write_atomic(&disk, &path, b"new").is_err());
            disk.crash();
            let found = disk.read(&path).unwrap();
            assert!(found == b"old" || found == b"new", "seed {seed}: {found:?}");
        }
    }

    #[test]
    fn a_full_disk_takes_what_fits_and_says_so() {
        let (disk, dir) = disk(1);
        let file = disk.create(&dir.join("f")).unwrap();
        disk.set_capacity(Some(10));
        assert_eq!(file.append(&[1; 20]).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!((file.len().unwrap(), disk.free_space(&dir).unwrap()), (10, 0));
        disk.set_capacity(None);
        file.append(&[1; 20]).unwrap();
    }

    #[test]
    fn a_mount_dies_with_the_power() {
        let (disk, dir) = disk(1);
        let mount = disk.mount();
        mount.create(&dir.join("f")).unwrap().sync().unwrap();
        mount.sync_dir(&dir).unwrap();
        disk.crash();
        assert!(mount.remove_file(&dir.join("f")).is_err());
        assert!(mount.create(&dir.join("g")).is_err());
        assert!(disk.mount().exists(&dir.join("f")).unwrap());
    }

    #[test]
    fn the_same_seed_crashes_the_same_way() {
        let run = |seed| {
            let (disk, dir) = disk(seed);
            let file = disk.create(&dir.join("f")).unwrap();
            disk.sync_dir(&dir).unwrap();
            file.append(&[1; 5000]).unwrap();
            disk.crash();
            disk.read(&dir.join("f")).unwrap()
        };
        assert_eq!(run(3), run(3));
    }
}
