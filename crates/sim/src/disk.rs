//! A server's disk: the machine's [`MemDisk`], seen by one process. When the process is over nothing passes any more; on the
//! way, steps are reported (so that crashes can be aimed at them), work takes time, and, as a planted bug, a sync may lie.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nexus_env::{DirEntry, Disk, DiskLock, File, MemDisk};

use crate::chance::Dice;
use crate::life::{Life, Step, is_log};
use crate::mutant::Mutant;

pub struct SimDisk {
    inner: MemDisk,
    life: Arc<Life>,
    dice: Dice,
    /// Extra milliseconds of every piece of work: a disk in trouble.
    slow_ms: Arc<AtomicU64>,
}

impl SimDisk {
    pub fn new(machine: &MemDisk, life: Arc<Life>, dice: Dice, slow_ms: Arc<AtomicU64>) -> Self {
        Self { inner: machine.mount(), life, dice, slow_ms }
    }

    fn on(&self) -> io::Result<&MemDisk> {
        if self.life.is_on() { Ok(&self.inner) } else { Err(over()) }
    }

    fn file(&self, path: &Path, inner: Box<dyn File>) -> Box<dyn File> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let lies = self.life.stage.mutant == Some(Mutant::SkippedFsync);
        Box::new(SimFile {
            inner,
            life: self.life.clone(),
            is_log: is_log(path),
            is_arriving: name.starts_with("incoming-"),
            lies,
        })
    }
}

fn over() -> io::Error {
    io::Error::other("this process is over")
}

struct SimFile {
    inner: Box<dyn File>,
    life: Arc<Life>,
    is_log: bool,
    is_arriving: bool,
    lies: bool,
}

impl SimFile {
    fn on(&self) -> io::Result<&dyn File> {
        if self.life.is_on() { Ok(&*self.inner) } else { Err(over()) }
    }
}

impl File for SimFile {
    fn append(&self, data: &[u8]) -> io::Result<()> {
        self.on()?.append(data)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.on()?.read_at(offset, buf)
    }

    fn sync(&self) -> io::Result<()> {
        self.on()?;
        let before =
            if self.is_arriving { Some(Step::SnapshotInstall) } else { self.is_log.then_some(Step::BeforeSync) };
        if before.is_some_and(|step| self.life.step(step)) {
            return Err(over());
        }
        if !(self.lies && self.is_log) {
            self.inner.sync()?;
        }
        if self.is_log && self.life.step(Step::AfterSync) {
            return Err(over());
        }
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.on()?.truncate(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.on()?.len()
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(self.file(path, self.on()?.open(path)?))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        Ok(self.file(path, self.on()?.create(path)?))
    }

    fn create_reserved(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
        Ok(self.file(path, self.on()?.create_reserved(path, bytes)?))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.on()?.read(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let disk = self.on()?;
        let saves = from.to_string_lossy().ends_with(".snap.tmp");
        if saves && self.life.step(Step::SnapshotSave) {
            return Err(over());
        }
        disk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.on()?.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.on()?.remove_dir_all(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.on()?.list(dir)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.on()?.create_dir_all(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.on()?.sync_dir(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.on()?.exists(path)
    }

    fn free_space(&self, path: &Path) -> io::Result<u64> {
        self.on()?.free_space(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        self.on()?.lock(path)
    }

    fn simulated_delay(&self) -> Option<Duration> {
        let slow = self.slow_ms.load(Ordering::Relaxed);
        Some(Duration::from_micros(self.dice.range(0, 2_500) + 1_000 * self.dice.range(slow / 2, slow + 1)))
    }
}
