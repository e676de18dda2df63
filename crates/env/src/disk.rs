//! Files, as a log or a cache needs them: append, read, make durable, swap atomically.
//!
//! Calls block; async callers go through [`on_disk`]. A write is durable only after [`File::sync`]; a created,
//! renamed or removed name only after [`Disk::sync_dir`] on its folder.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    pub name: String,
    pub is_dir: bool,
    /// Bytes; 0 for a folder.
    pub len: u64,
}

/// Holds a lock file until it is dropped (or the process dies).
pub trait DiskLock: Send + Sync {}

/// An open file. Methods take `&self`, so one handle can be read while it is appended to.
pub trait File: Send + Sync {
    /// Writes all of `data` at the end. On an error part of it may have been written.
    fn append(&self, data: &[u8]) -> io::Result<()>;
    /// Reads up to `buf.len()` bytes at `offset`; 0 means the end of the file.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Makes everything written so far durable (fdatasync). After an error nothing is known about what is durable:
    /// the only safe step is to stop and open again.
    fn sync(&self) -> io::Result<()>;
    fn truncate(&self, len: u64) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset`, or fails with `UnexpectedEof`.
    fn read_exact_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let n = self.read_at(offset, buf)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += n as u64;
            buf = &mut buf[n..];
        }
        Ok(())
    }
}

/// A file system.
pub trait Disk: Send + Sync {
    /// Opens an existing file for reading and appending.
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>>;
    /// Makes an empty file, replacing one that is there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>>;
    /// As [`Disk::create`], with room for `bytes` that is durable already, filled with zeros: a sync after an append into it
    /// writes data and nothing else, which takes a small part of the time that it takes to make a file longer. The file's
    /// end is where the appends have come to, and the zeros lie behind it until it is truncated; whoever opens it anew
    /// finds them.
    fn create_reserved(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>>;
    /// The whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder and all in it; one that is missing is fine.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The names in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>>;
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Bytes that an unprivileged writer can still use on the file system of `path`.
    fn free_space(&self, path: &Path) -> io::Result<u64>;
    /// Takes an exclusive lock on a file, made if missing; `WouldBlock` if another holds it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>>;

    /// A disk of a simulation answers at once; work on it runs where it is asked for, after this much of the runtime's
    /// own time. `None`: its calls block a thread.
    fn simulated_delay(&self) -> Option<Duration> {
        None
    }
}

/// Runs work on a disk without holding up the async runtime: on a thread for blocking work, or, for a simulated disk, in
/// place, so that nothing depends on how threads are scheduled. Fails only when the runtime is shutting down.
pub async fn on_disk<T: Send + 'static>(
    disk: &Arc<dyn Disk>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    match disk.simulated_delay() {
        Some(delay) => {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            Ok(work())
        }
        None => tokio::task::spawn_blocking(work).await.map_err(io::Error::other),
    }
}

/// Replaces a file so that a crash leaves the old or the new content, never a mixture: write beside it, sync, rename,
/// sync the folder.
pub fn write_atomic(disk: &dyn Disk, path: &Path, data: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = name.to_os_string();
    temporary.push(".tmp");
    let temporary = dir.join(temporary);
    let file = disk.create(&temporary)?;
    file.append(data)?;
    file.sync()?;
    drop(file);
    disk.rename(&temporary, path)?;
    disk.sync_dir(dir)
}

/// The machine's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

struct RealFile {
    file: fs::File,
}

/// A file with room behind its end.
struct ReservedFile {
    file: fs::File,
    end: Mutex<u64>,
}

impl ReservedFile {
    fn end(&self) -> MutexGuard<'_, u64> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File for ReservedFile {
    fn append(&self, mut data: &[u8]) -> io::Result<()> {
        let mut end = self.end();
        while !data.is_empty() {
            match self.file.write_at(data, *end) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    *end += n as u64;
                    data = &data[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end().saturating_sub(offset)).unwrap_or(usize::MAX);
        let most = buf.len().min(left);
        self.file.read_at(&mut buf[..most], offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut end = self.end();
        self.file.set_len(len)?;
        *end = len;
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(*self.end())
    }
}

/// Zeros are written in pieces of this much.
const ZEROS: usize = 256 << 10;

struct RealLock {
    _file: fs::File,
}

impl DiskLock for RealLock {}

impl File for RealFile {
    fn append(&self, data: &[u8]) -> io::Result<()> {
        (&self.file).write_all(data)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

/// An error that says which file it is about: the kernel's own texts don't.
fn on<T>(what: &str, path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(e.kind(), format!("{what} {}: {e}", path.display())))
}

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = on("open", path, fs::OpenOptions::new().read(true).append(true).open(path))?;
        Ok(Box::new(RealFile { file }))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let open = || {
            let file = fs::OpenOptions::new().read(true).append(true).create(true).open(path)?;
            file.set_len(0)?;
            Ok(file)
        };
        Ok(Box::new(RealFile { file: on("create", path, open())? }))
    }

    fn create_reserved(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
        let make = || {
            // A file of its own: whoever still has an earlier one of that name open must not write into this.
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
            let zeros = vec![0; ZEROS];
            let mut left = bytes;
            while left > 0 {
                let piece = left.min(ZEROS as u64);
                (&file).write_all(&zeros[..piece as usize])?;
                left -= piece;
            }
            file.sync_all()?;
            Ok(file)
        };
        Ok(Box::new(ReservedFile { file: on("create", path, make())?, end: Mutex::new(0) }))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        on("read", path, fs::read(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        on("rename", from, fs::rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        on("remove", path, fs::remove_file(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => on("remove", path, other),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let mut out = Vec::new();
        for entry in on("list", dir, fs::read_dir(dir))? {
            let entry = entry?;
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                // Removed between the listing and the question.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            let Ok(name) = entry.file_name().into_string() else { continue };
            let is_dir = meta.is_dir();
            out.push(DirEntry { name, is_dir, len: if is_dir { 0 } else { meta.len() } });
        }
        out.sort();
        Ok(out)
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        // Each new level is made durable in the one above it.
        let mut missing: Vec<PathBuf> = Vec::new();
        let mut level = Some(dir);
        while let Some(path) = level.filter(|p| !p.as_os_str().is_empty() && !p.exists()) {
            missing.push(path.to_path_buf());
            level = path.parent();
        }
        on("create", dir, fs::create_dir_all(dir))?;
        for path in missing {
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => self.sync_dir(parent)?,
                _ => self.sync_dir(Path::new("."))?,
            }
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        on("sync", dir, fs::File::open(dir).and_then(|d| d.sync_all()))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        on("look for", path, path.try_exists())
    }

    fn free_space(&self, path: &Path) -> io::Result<u64> {
        let stat = nix::sys::statvfs::statvfs(path).map_err(io::Error::from)?;
        Ok(stat.blocks_available() as u64 * stat.fragment_size() as u64)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        let open = fs::OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = on("open", path, open)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(RealLock { _file: file })),
            Err(fs::TryLockError::WouldBlock) => Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("{} is locked by another process", path.display()),
            )),
            Err(fs::TryLockError::Error(e)) => on("lock", path, Err(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_append_read_back_and_truncate() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        RealDisk.create_dir_all(&deep).unwrap();
        let path = deep.join("f");
        let file = RealDisk.create(&path).unwrap();
        file.append(b"hello ").unwrap();
        file.append(b"world").unwrap();
        file.sync().unwrap();
        let mut buf = [0; 5];
        file.read_exact_at(6, &mut buf).unwrap();
        assert_eq!(&buf, b"world");
        file.truncate(5).unwrap();
        file.append(b"!").unwrap();
        assert_eq!(RealDisk.read(&path).unwrap(), b"hello!");
        assert_eq!(RealDisk.open(&path).unwrap().len().unwrap(), 6);
        assert_eq!(file.read_exact_at(4, &mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(RealDisk.free_space(dir.path()).unwrap() > 0);
    }

    #[test]
    fn a_reserved_file_ends_where_appends_have_come_to_until_it_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = RealDisk.create_reserved(&path, 10).unwrap();
        assert!(file.is_empty().unwrap());
        file.append(b"abc").unwrap();
        let mut buf = [1; 8];
        assert_eq!(file.read_at(1, &mut buf).unwrap(), 2);
        assert_eq!((file.len().unwrap(), &buf[..3]), (3, &b"bc\x01"[..]));
        assert_eq!(RealDisk.read(&path).unwrap(), b"abc\0\0\0\0\0\0\0");
        file.append(b"defghijk").unwrap();
        assert_eq!(RealDisk.read(&path).unwrap(), b"abcdefghijk", "beyond the room it grows");
        file.truncate(2).unwrap();
        file.append(b"x").unwrap();
        assert_eq!(RealDisk.read(&path).unwrap(), b"abx");
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_atomic(&RealDisk, &path, b"one").unwrap();
        write_atomic(&RealDisk, &path, b"two").unwrap();
        assert_eq!(RealDisk.read(&path).unwrap(), b"two");
        let names: Vec<_> = RealDisk.list(dir.path()).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["state"]);
    }

    #[test]
    fn a_lock_is_exclusive_until_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = RealDisk.lock(&path).unwrap();
        assert_eq!(RealDisk.lock(&path).err().unwrap().kind(), io::ErrorKind::WouldBlock);
        drop(held);
        assert!(RealDisk.lock(&path).is_ok());
    }
}
