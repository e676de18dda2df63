//! A content-addressed folder: `blobs/sha256/<hex>`, as in an OCI image layout.
//!
//! A blob is there whole or not at all: it is written beside, hashed on its way, made durable, and renamed into place
//! only if its digest is the one that was promised. One process owns a store; opening it drops what an earlier one left
//! half-written. Calls block; the `_async` ones don't.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use nexus_model::{Digest, Timestamp};
use sha2::{Digest as _, Sha256};

use super::ImageError;

#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<Inner>,
}

/// A blob, and when it was last of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aged {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    pub used: Timestamp,
}

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    temporary: PathBuf,
    next: AtomicU64,
}

impl BlobStore {
    /// Opens or makes the store in `dir`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ImageError> {
        let dir = dir.as_ref();
        let blobs = dir.join("blobs/sha256");
        let temporary = dir.join("incoming");
        let attempt = || format!("opening the blob store {}", dir.display());
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(ImageError::io(attempt()))?;
        }
        for made in [&blobs, &temporary] {
            fs::create_dir_all(made).map_err(ImageError::io(attempt()))?;
        }
        Ok(Self { inner: Arc::new(Inner { blobs, temporary, next: AtomicU64::new(0) }) })
    }

    pub fn path(&self, digest: Digest) -> PathBuf {
        self.inner.blobs.join(digest.hex())
    }

    pub fn has(&self, digest: Digest) -> bool {
        self.path(digest).is_file()
    }

    /// The length of a blob in bytes, if it is here.
    pub fn size(&self, digest: Digest) -> Option<u64> {
        fs::metadata(self.path(digest)).ok().map(|m| m.len())
    }

    pub fn reader(&self, digest: Digest) -> Result<File, ImageError> {
        File::open(self.path(digest)).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing(digest),
            _ => ImageError::Io { attempt: format!("opening blob {digest}"), source },
        })
    }

    /// A whole blob of at most `limit` bytes, checked against its digest.
    pub fn read(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let file = self.reader(digest)?;
        let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(ImageError::io(format!("reading blob {digest}")))?;
        if bytes.len() as u64 > limit {
            return Err(ImageError::TooLong { blob: digest, limit });
        }
        let found = Digest::of(&bytes);
        if found != digest {
            return Err(ImageError::WrongDigest { expected: digest, found });
        }
        Ok(bytes)
    }

    /// Begins to write a blob that is to have the digest `expected` and at most `limit` bytes.
    pub fn put_stream(&self, expected: Digest, limit: u64) -> Result<BlobWriter, ImageError> {
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let temporary = self.inner.temporary.join(format!("{}-{number}", &expected.hex()[..16]));
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary);
        let file = file.map_err(ImageError::io(format!("storing blob {expected}")))?;
        Ok(BlobWriter { store: self.clone(), expected, limit, written: 0, hash: Sha256::new(), file, temporary })
    }

    /// Stores bytes that are in memory.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let digest = Digest::of(bytes);
        if !self.has(digest) {
            let mut writer = self.put_stream(digest, bytes.len() as u64)?;
            writer.write(bytes)?;
            writer.finish()?;
        }
        Ok(digest)
    }

    /// Every blob and its length in bytes, ordered by digest.
    pub fn list(&self) -> Result<Vec<(Digest, u64)>, ImageError> {
        let attempt = || format!("listing {}", self.inner.blobs.display());
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.inner.blobs).map_err(ImageError::io(attempt()))? {
            let entry = entry.map_err(ImageError::io(attempt()))?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().and_then(|hex| format!("sha256:{hex}").parse().ok()) else { continue };
            match entry.metadata() {
                Ok(meta) => found.push((digest, meta.len())),
                // Removed since the listing began.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(ImageError::io(attempt())(e)),
            }
        }
        found.sort();
        Ok(found)
    }

    /// Every blob with when it was last stored or touched, ordered by digest.
    pub fn list_aged(&self) -> Result<Vec<Aged>, ImageError> {
        let mut aged = Vec::new();
        for (digest, size) in self.list()? {
            let modified = fs::metadata(self.path(digest)).and_then(|m| m.modified());
            // One that is gone by now is left out.
            let Ok(modified) = modified else { continue };
            let millis = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
            aged.push(Aged { digest, size, used: Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX)) });
        }
        Ok(aged)
    }

    /// Notes that a blob was used, in its file's times: that outlives the process.
    pub fn touch(&self, digest: Digest, at: Timestamp) {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(at.as_millis()).unwrap_or(0));
        // It only makes a cache's choice a little worse.
        let _ = OpenOptions::new().write(true).open(self.path(digest)).and_then(|file| file.set_modified(time));
    }

    /// How full the file system is that holds the blobs, in hundredths of what users may take.
    pub fn percent_full(&self) -> Result<u8, ImageError> {
        let found = nix::sys::statvfs::statvfs(&self.inner.blobs).map_err(io::Error::from);
        let found = found.map_err(ImageError::io(format!("looking at the disk of {}", self.inner.blobs.display())))?;
        let used = found.blocks().saturating_sub(found.blocks_free());
        let usable = used + found.blocks_available();
        Ok(u8::try_from(used * 100 / usable.max(1)).unwrap_or(100))
    }

    /// Removes a blob; says whether it was there.
    pub fn remove(&self, digest: Digest) -> Result<bool, ImageError> {
        match fs::remove_file(self.path(digest)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(ImageError::io(format!("removing blob {digest}"))(e)),
        }
    }

    pub async fn put_stream_async(&self, expected: Digest, limit: u64) -> Result<BlobWriter, ImageError> {
        let store = self.clone();
        unblock(move || store.put_stream(expected, limit)).await
    }

    pub async fn read_async(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, ImageError> {
        let store = self.clone();
        unblock(move || store.read(digest, limit)).await
    }

    pub async fn list_async(&self) -> Result<Vec<(Digest, u64)>, ImageError> {
        let store = self.clone();
        unblock(move || store.list()).await
    }

    pub async fn list_aged_async(&self) -> Result<Vec<Aged>, ImageError> {
        let store = self.clone();
        unblock(move || store.list_aged()).await
    }

    pub async fn remove_async(&self, digest: Digest) -> Result<bool, ImageError> {
        let store = self.clone();
        unblock(move || store.remove(digest)).await
    }
}

/// Runs blocking file work on the threads that are for it.
pub(crate) async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| match e.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(e) => Err(ImageError::io("running file work")(io::Error::other(e))),
    })
}

/// A blob on its way into the store. Dropped before [`BlobWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter {
    store: BlobStore,
    expected: Digest,
    limit: u64,
    written: u64,
    hash: Sha256,
    file: File,
    temporary: PathBuf,
}

impl BlobWriter {
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.written += bytes.len() as u64;
        if self.written > self.limit {
            return Err(ImageError::TooLong { blob: self.expected, limit: self.limit });
        }
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(ImageError::io(format!("storing blob {}", self.expected)))
    }

    /// Checks the digest, makes the blob durable and puts it in its place. Returns its length.
    pub fn finish(self) -> Result<u64, ImageError> {
        let found = Digest::from_sha256(self.hash.clone().finalize().into());
        if found != self.expected {
            return Err(ImageError::WrongDigest { expected: self.expected, found });
        }
        let place = || -> io::Result<()> {
            self.file.sync_all()?;
            fs::rename(&self.temporary, self.store.path(self.expected))?;
            File::open(&self.store.inner.blobs)?.sync_all()
        };
        place().map_err(ImageError::io(format!("storing blob {}", self.expected)))?;
        Ok(self.written)
    }

    /// [`BlobWriter::write`] off the caller's thread; gives the writer back.
    pub async fn write_async(mut self, bytes: Bytes) -> Result<Self, ImageError> {
        unblock(move || self.write(&bytes).map(|()| self)).await
    }

    pub async fn finish_async(self) -> Result<u64, ImageError> {
        unblock(move || self.finish()).await
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // After a finish the name is gone already.
        let _ = fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        let digest = Digest::of(b"hello");
        let mut writer = store.put_stream(digest, 5).unwrap();
        writer.write(b"hel").unwrap();
        assert!(!store.has(digest));
        writer.write(b"lo").unwrap();
        assert_eq!(writer.finish().unwrap(), 5);
        assert_eq!(store.read(digest, 5).unwrap(), b"hello");
        assert_eq!(store.list().unwrap(), [(digest, 5)]);
        assert!(store.remove(digest).unwrap() && !store.remove(digest).unwrap());
        assert!(matches!(store.read(digest, 5), Err(ImageError::Missing(_))));
    }

    #[test]
    fn a_wrong_digest_or_length_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        let digest = Digest::of(b"hello");
        let mut writer = store.put_stream(digest, 100).unwrap();
        writer.write(b"jello").unwrap();
        assert!(matches!(writer.finish(), Err(ImageError::WrongDigest { expected, .. }) if expected == digest));
        let mut writer = store.put_stream(digest, 4).unwrap();
        assert!(matches!(writer.write(b"hello"), Err(ImageError::TooLong { .. })));
        drop(writer);
        assert_eq!(store.list().unwrap(), []);
        assert_eq!(fs::read_dir(dir.path().join("incoming")).unwrap().count(), 0);
    }

    #[test]
    fn opening_drops_what_was_left_half_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        let kept = store.put(b"kept").unwrap();
        fs::write(dir.path().join("incoming/half"), b"ha").unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        assert!(store.has(kept) && !dir.path().join("incoming/half").exists());
    }

    #[test]
    fn a_blobs_last_use_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        let digest = store.put(b"old").unwrap();
        store.touch(digest, Timestamp::from_millis(12_000));
        assert_eq!(store.list_aged().unwrap(), [Aged { digest, size: 3, used: Timestamp::from_millis(12_000) }]);
        // Whoever brings it again has a use for it.
        let mut writer = store.put_stream(digest, 3).unwrap();
        writer.write(b"old").unwrap();
        writer.finish().unwrap();
        assert!(store.list_aged().unwrap()[0].used > Timestamp::from_millis(12_000));
        assert!(store.percent_full().unwrap() <= 100);
    }

    #[test]
    fn a_blob_that_rots_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        let digest = store.put(b"sound").unwrap();
        fs::write(store.path(digest), b"rotten").unwrap();
        assert!(matches!(store.read(digest, 100), Err(ImageError::WrongDigest { .. })));
    }
}
