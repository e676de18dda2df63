//! Unpacks layers, each to a folder of its own that overlayfs can stack: `layers/<digest>/fs`.
//!
//! A layer comes from a stranger. Its entries are placed by file descriptors that the kernel resolves beneath the
//! layer's folder, so that neither `..` nor a symbolic link leads out; device nodes are refused; what it may unpack to
//! is bounded while it is read. A layer is there whole or not at all, and is made durable before it counts. Several
//! unpackings of one layer at once are harmless: the first to finish stays.
//!
//! Whiteouts become what overlayfs expects: `.wh.NAME` a character device 0:0, `.wh..wh..opq` the attribute
//! `trusted.overlay.opaque`. Other `trusted.` attributes are dropped, because overlayfs would obey them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nexus_model::Digest;
use rustix::fs::{
    self as rfs, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::tarball::{Entry, Kind, TarError, TarReader};
use super::{BlobStore, Descriptor, Image, ImageError};

/// What a layer may unpack to, so that a small blob can't fill a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Bytes of one layer, whatever its compressed size.
    pub max_bytes: u64,
    /// So many bytes are let pass at any ratio …
    pub free_bytes: u64,
    /// … and beyond them so many for each compressed byte.
    pub max_ratio: u64,
    pub max_entries: u64,
}

impl Default for UnpackLimits {
    fn default() -> Self {
        Self { max_bytes: 20 << 30, free_bytes: 1 << 30, max_ratio: 200, max_entries: 2_000_000 }
    }
}

impl UnpackLimits {
    fn bytes(&self, compressed: u64) -> u64 {
        compressed.saturating_mul(self.max_ratio).max(self.free_bytes).min(self.max_bytes)
    }
}

/// Folders remember their times until everything in them is placed; so many bytes of their paths are held at most.
const MAX_REMEMBERED: usize = 64 << 20;
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Unpacks what is missing of an image's layers below `layers`, and returns their folders, lowest first. Blocks.
pub fn unpack(
    blobs: &BlobStore,
    image: &Image,
    layers: &Path,
    limits: UnpackLimits,
) -> Result<Vec<PathBuf>, ImageError> {
    let pairs = image.manifest.layers.iter().zip(&image.config.rootfs.diff_ids);
    pairs.map(|(layer, diff_id)| unpack_layer(blobs, layer, *diff_id, layers, limits)).collect()
}

fn unpack_layer(
    blobs: &BlobStore,
    layer: &Descriptor,
    diff_id: Digest,
    layers: &Path,
    limits: UnpackLimits,
) -> Result<PathBuf, ImageError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let place = layers.join(layer.digest.hex());
    if !place.exists() {
        fs::create_dir_all(layers).map_err(ImageError::io(format!("making {}", layers.display())))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = Temporary(layers.join(format!(".new-{}-{number}", std::process::id())));
        fill(blobs, layer, diff_id, &temporary.0, limits)?;
        let placed = fs::rename(&temporary.0, &place);
        // Another unpacking of the same layer may have been faster.
        if !place.exists() {
            placed.map_err(ImageError::io(format!("placing layer {}", layer.digest)))?;
        }
        let synced = File::open(layers).and_then(|d| d.sync_all());
        synced.map_err(ImageError::io(format!("syncing {}", layers.display())))?;
    }
    let known = fs::read_to_string(place.join("diff-id"));
    let known = known.map_err(ImageError::io(format!("reading layer {}", layer.digest)))?;
    if known != diff_id.to_string() {
        return Err(wrong_diff_id(layer.digest, diff_id, &known));
    }
    Ok(place.join("fs"))
}

/// A folder that is removed when it was not renamed to its place.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.0.exists()
            && let Err(error) = fs::remove_dir_all(&self.0)
        {
            tracing::warn!(path = %self.0.display(), %error, "a half-unpacked layer could not be removed");
        }
    }
}

fn wrong_diff_id(layer: Digest, expected: Digest, found: &str) -> ImageError {
    let message = format!("unpacks to {found} where the image's configuration says {expected}");
    ImageError::Layer { layer, message }
}

fn fill(
    blobs: &BlobStore,
    layer: &Descriptor,
    diff_id: Digest,
    dir: &Path,
    limits: UnpackLimits,
) -> Result<(), ImageError> {
    let files = dir.join("fs");
    let host = |attempt: &str| ImageError::io(format!("{attempt} of layer {}", layer.digest));
    fs::create_dir_all(&files).map_err(host("making the folder"))?;
    let root = rfs::open(&files, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| host("opening the folder")(e.into()))?;
    rfs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(|e| host("setting the mode")(e.into()))?;

    let blob = blobs.reader(layer.digest)?;
    let compressed = blob.metadata().map_err(host("reading the blob"))?.len();
    if compressed != layer.size {
        return Err(ImageError::WrongSize { blob: layer.digest, expected: layer.size, found: compressed });
    }
    let stream = decompress(blob).map_err(host("reading the blob"))?;
    let metered = Metered { inner: stream, left: limits.bytes(compressed), hash: Sha256::new() };
    let mut reader = TarReader::new(metered);
    let mut unpacker = Unpacker { layer: layer.digest, root, parent: None, folders: Vec::new(), remembered: 0 };
    let mut entries = 0;
    while let Some(entry) = reader.next().map_err(|e| unpacker.bad_archive(e))? {
        entries += 1;
        if entries > limits.max_entries {
            let message = format!("has more than {} entries", limits.max_entries);
            return Err(ImageError::Layer { layer: layer.digest, message });
        }
        unpacker.place(&entry, &mut reader)?;
    }
    reader.drain().map_err(|e| unpacker.bad_archive(e.into()))?;
    unpacker.finish()?;
    let found = Digest::from_sha256(reader.into_inner().hash.finalize().into());
    if found != diff_id {
        return Err(wrong_diff_id(layer.digest, diff_id, &found.to_string()));
    }
    fs::write(dir.join("diff-id"), diff_id.to_string()).map_err(host("writing the diff id"))?;
    // A layer that is in its place is trusted after a power cut too.
    rfs::syncfs(&unpacker.root).map_err(|e| host("making durable the files")(e.into()))
}

/// Layers are told by their first bytes, not by media types, which registries and tools get wrong.
pub(super) fn decompress(mut blob: File) -> io::Result<Box<dyn Read>> {
    let mut magic = [0; 4];
    let mut filled = 0;
    while filled < magic.len() {
        match blob.read(&mut magic[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    io::Seek::rewind(&mut blob)?;
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(io::BufReader::with_capacity(1 << 16, blob))),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::new(blob)?),
        _ => Box::new(io::BufReader::with_capacity(1 << 16, blob)),
    })
}

/// Hashes what passes and stops a bomb.
struct Metered<R> {
    inner: R,
    left: u64,
    hash: Sha256,
}

#[derive(Debug, thiserror::Error)]
#[error("unpacks to far more than its size allows: refused as a decompression bomb")]
struct Bomb;

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| io::Error::other(Bomb))?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

struct Unpacker {
    layer: Digest,
    root: OwnedFd,
    /// The folder that the last entry went to; the next goes there too more often than not.
    parent: Option<(Vec<u8>, OwnedFd)>,
    folders: Vec<(Vec<u8>, (i64, u32))>,
    remembered: usize,
}

impl Unpacker {
    /// Reading failed: a failure of the disk is the host's, the rest is the archive's.
    fn bad_archive(&self, error: TarError) -> ImageError {
        match error {
            TarError::Io(source) if source.raw_os_error().is_some() => {
                ImageError::Io { attempt: format!("reading layer {}", self.layer), source }
            }
            other => ImageError::Layer { layer: self.layer, message: other.to_string() },
        }
    }

    fn refuse(&self, entry: &[u8], message: impl Into<String>) -> ImageError {
        let entry = String::from_utf8_lossy(&entry[..entry.len().min(200)]).into_owned();
        ImageError::Entry { layer: self.layer, entry, message: message.into() }
    }

    /// The kernel refused: either the way leads out of the layer, or the host has trouble.
    fn errno(&self, entry: &[u8], errno: Errno) -> ImageError {
        match errno {
            Errno::XDEV | Errno::LOOP => self.refuse(entry, "leads out of the layer through a symbolic link"),
            Errno::NOTDIR => self.refuse(entry, "has a file where a folder must be"),
            Errno::NAMETOOLONG => self.refuse(entry, "has a name longer than 255 bytes"),
            Errno::INVAL => self.refuse(entry, "is not a valid file name"),
            other => {
                let shown = String::from_utf8_lossy(&entry[..entry.len().min(200)]);
                ImageError::Io { attempt: format!("unpacking {shown:?} of layer {}", self.layer), source: other.into() }
            }
        }
    }

    /// The components of a path in the archive.
    fn components<'a>(&self, path: &'a [u8]) -> Result<Vec<&'a [u8]>, ImageError> {
        if path.starts_with(b"/") {
            return Err(self.refuse(path, "is an absolute path"));
        }
        if path.contains(&0) {
            return Err(self.refuse(path, "has a zero byte in its name"));
        }
        let parts: Vec<_> = path.split(|b| *b == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
        if parts.contains(&&b".."[..]) {
            return Err(self.refuse(path, "leads out of the layer by \"..\""));
        }
        Ok(parts)
    }

    fn beneath(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        rfs::openat2(&self.root, path, FOLDER, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
    }

    /// Opens the folder that `parts` name, making what is missing of it.
    fn folder(&mut self, entry: &[u8], parts: &[&[u8]]) -> Result<OwnedFd, ImageError> {
        let path = parts.join(&b'/');
        if let Some((known, fd)) = &self.parent
            && *known == path
        {
            return fd.try_clone().map_err(ImageError::io("duplicating a file descriptor"));
        }
        let opened = match self.beneath(&path) {
            Err(Errno::NOENT) => {
                let mut at = self.beneath(b"").map_err(|e| self.errno(entry, e))?;
                for depth in 1..=parts.len() {
                    match rfs::mkdirat(&at, parts[depth - 1], Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(self.errno(entry, e)),
                    }
                    at = match self.beneath(&parts[..depth].join(&b'/')) {
                        Ok(at) => at,
                        Err(Errno::NOENT) => return Err(self.refuse(entry, "goes through a dangling symbolic link")),
                        Err(e) => return Err(self.errno(entry, e)),
                    };
                }
                at
            }
            other => other.map_err(|e| self.errno(entry, e))?,
        };
        let copy = opened.try_clone().map_err(ImageError::io("duplicating a file descriptor"))?;
        self.parent = Some((path, opened));
        Ok(copy)
    }

    fn place(&mut self, entry: &Entry, content: &mut impl Read) -> Result<(), ImageError> {
        let parts = self.components(&entry.path)?;
        let Some((name, above)) = parts.split_last() else {
            return match entry.kind {
                Kind::Dir => {
                    let root = self.root.try_clone().map_err(ImageError::io("duplicating a file descriptor"))?;
                    self.remember(Vec::new(), entry);
                    self.dress(entry, &root).map_err(|e| self.errno(&entry.path, e))
                }
                _ => Err(self.refuse(&entry.path, "has no name")),
            };
        };
        let parent = self.folder(&entry.path, above)?;
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(entry, &parent, hidden);
        }
        let placed = match entry.kind {
            Kind::Dir => self.place_folder(entry, &parent, name, parts.join(&b'/')),
            Kind::File => return self.place_file(entry, &parent, name, content),
            Kind::HardLink => return self.place_hard_link(entry, &parent, name),
            Kind::Symlink if entry.link.is_empty() => return Err(self.refuse(&entry.path, "is a link to nowhere")),
            Kind::Symlink => self.place_symlink(entry, &parent, name),
            Kind::Fifo => self.place_fifo(entry, &parent, name),
            Kind::Device => return Err(self.refuse(&entry.path, "is a device node, which images may not bring")),
        };
        placed.map_err(|e| self.errno(&entry.path, e))
    }

    fn whiteout(&mut self, entry: &Entry, parent: &OwnedFd, hidden: &[u8]) -> Result<(), ImageError> {
        if hidden == b".wh..opq" {
            return opaque(parent).map_err(|e| self.errno(&entry.path, e));
        }
        if hidden.starts_with(b".wh.") {
            // Leftovers of aufs, which mean nothing here.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(self.refuse(&entry.path, "hides no name"));
        }
        let hide = || match rfs::statat(parent, hidden, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => rfs::mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0),
            // A whiteout speaks of the layers below: what this layer itself has of that name stays.
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                opaque(&rfs::openat(parent, hidden, FOLDER | OFlags::NOFOLLOW, Mode::empty())?)
            }
            Ok(_) => Ok(()),
            Err(e) => Err(e),
        };
        hide().map_err(|e| self.errno(&entry.path, e))
    }

    fn place_folder(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8], path: Vec<u8>) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(0o755);
        let mut hidden = false;
        let made = rfs::mkdirat(parent, name, mode);
        if made == Err(Errno::EXIST) {
            let stat = rfs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind != FileType::Directory {
                hidden = kind == FileType::CharacterDevice;
                rfs::unlinkat(parent, name, AtFlags::empty())?;
                rfs::mkdirat(parent, name, mode)?;
            }
        } else {
            made?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rfs::openat(parent, name, flags, Mode::empty())?;
        if hidden {
            opaque(&folder)?;
        }
        self.remember(path, entry);
        self.dress(entry, &folder)
    }

    fn place_file(
        &self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &[u8],
        content: &mut impl Read,
    ) -> Result<(), ImageError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = clear(parent, name).and_then(|()| rfs::openat(parent, name, flags, Mode::from_raw_mode(0o600)));
        let mut file = File::from(made.map_err(|e| self.errno(&entry.path, e))?);
        let mut left = entry.size;
        let mut buffer = [0; 1 << 16];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let n = content.read(&mut buffer[..most]).map_err(|e| self.bad_archive(e.into()))?;
            if n == 0 {
                return Err(self.refuse(&entry.path, "is cut off"));
            }
            io::Write::write_all(&mut file, &buffer[..n]).map_err(|source| {
                let attempt = format!("unpacking {:?} of layer {}", String::from_utf8_lossy(&entry.path), self.layer);
                ImageError::Io { attempt, source }
            })?;
            left -= n as u64;
        }
        let dressed = self.dress(entry, &file).and_then(|()| rfs::futimens(&file, &times(entry.mtime)));
        dressed.map_err(|e| self.errno(&entry.path, e))
    }

    fn place_hard_link(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<(), ImageError> {
        // Some writers begin a link's target with a slash; it still means the archive's root.
        let target = entry.link.strip_prefix(b"/").unwrap_or(&entry.link);
        let parts = self.components(target)?;
        let Some((from, above)) = parts.split_last() else {
            return Err(self.refuse(&entry.path, "is a link to nowhere"));
        };
        let link = || {
            let folder = self.beneath(&above.join(&b'/'))?;
            let stat = rfs::statat(&folder, *from, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice {
                return Err(Errno::NOENT);
            }
            let to = rfs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
            if to.is_ok_and(|to| (to.st_dev, to.st_ino) == (stat.st_dev, stat.st_ino)) {
                return Ok(());
            }
            clear(parent, name)?;
            rfs::linkat(&folder, *from, parent, name, AtFlags::empty())
        };
        match link() {
            Err(Errno::NOENT | Errno::PERM) => {
                let target = String::from_utf8_lossy(target).into_owned();
                Err(self.refuse(&entry.path, format!("is a link to {target:?}, which the layer does not have")))
            }
            other => other.map_err(|e| self.errno(&entry.path, e)),
        }
    }

    fn place_symlink(&self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        clear(parent, name)?;
        rfs::symlinkat(entry.link.as_slice(), parent, name)?;
        let (uid, gid) = owner(entry);
        rfs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        rfs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
    }

    fn place_fifo(&self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        clear(parent, name)?;
        rfs::mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(entry.mode), 0)?;
        let (uid, gid) = owner(entry);
        rfs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        rfs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Owner first, because changing it clears the set-user-id bit and capabilities.
    fn dress(&self, entry: &Entry, fd: &impl AsFd) -> Result<(), Errno> {
        let (uid, gid) = owner(entry);
        rfs::fchown(fd, uid, gid)?;
        rfs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
        for (name, value) in &entry.xattrs {
            let kept =
                name == "security.capability" || (name.starts_with("user.") && !name.starts_with("user.overlay."));
            if kept {
                match rfs::fsetxattr(fd, name.as_str(), value, XattrFlags::empty()) {
                    // The file system has no room or no mind for it: the file is still good.
                    Ok(()) | Err(Errno::OPNOTSUPP) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    fn remember(&mut self, path: Vec<u8>, entry: &Entry) {
        self.remembered += path.len() + size_of::<(Vec<u8>, (i64, u32))>();
        // Times of folders are a courtesy: a layer with more folders than fit goes without the rest.
        if self.remembered <= MAX_REMEMBERED {
            self.folders.push((path, entry.mtime));
        }
    }

    fn finish(&mut self) -> Result<(), ImageError> {
        self.parent = None;
        for (path, mtime) in self.folders.drain(..).rev() {
            let name: &[u8] = if path.is_empty() { b"." } else { &path };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // A later entry may have put something else in its place.
            if let Ok(folder) = rfs::openat2(&self.root, name, flags, Mode::empty(), ResolveFlags::BENEATH) {
                let set = rfs::futimens(&folder, &times(mtime));
                set.map_err(|e| ImageError::io(format!("setting times in layer {}", self.layer))(e.into()))?;
            }
        }
        Ok(())
    }
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    // The highest id means "unchanged" to the kernel; nobody can own a file by it.
    let uid = (entry.uid != u32::MAX).then(|| Uid::from_raw(entry.uid));
    (uid, (entry.gid != u32::MAX).then(|| Gid::from_raw(entry.gid)))
}

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn opaque(folder: &OwnedFd) -> Result<(), Errno> {
    // By path, because a descriptor opened for its path alone takes no attributes.
    let path = format!("/proc/self/fd/{}", folder.as_raw_fd());
    rfs::setxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty())
}

/// Makes way for a new entry.
fn clear(parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    match rfs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {
            // The standard library removes a tree without following links.
            let path = Path::new(&format!("/proc/self/fd/{}", parent.as_raw_fd())).join(OsStr::from_bytes(name));
            fs::remove_dir_all(path).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
        }
        Err(e) => Err(e),
    }
}
