//! Network namespaces: named by a file, made, entered on a throw-away thread, and removed.
//!
//! A thread that has entered another namespace is never given back to a pool: it ends with its work. That is the one
//! rule that keeps a process in the namespace that it was started in.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, statfs};

use crate::{Attempt, NetError};

/// `NSFS_MAGIC` of linux/magic.h: the file system of namespace files.
const NSFS: FsType = FsType(0x6e73_6673);

/// A network namespace to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsRef {
    /// The one that this process lives in.
    Own,
    /// A file such as /run/netns/NAME or /proc/PID/ns/net.
    Path(PathBuf),
    /// The one that a process lives in.
    Pid(u32),
}

impl NetnsRef {
    pub(crate) fn open(&self) -> Result<File, NetError> {
        let path = match self {
            Self::Own => PathBuf::from("/proc/thread-self/ns/net"),
            Self::Path(path) => path.clone(),
            Self::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        };
        File::open(&path).attempt(|| format!("opening the network namespace {}", path.display()))
    }
}

/// Moves the calling thread into a network namespace, for good.
pub fn enter(netns: &File) -> Result<(), NetError> {
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).attempt(|| "entering a network namespace".into())
}

/// Makes a network namespace that lives as long as the file is open or a process is in it.
pub fn new_namespace() -> Result<File, NetError> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).attempt(|| "making a network namespace".into())?;
        NetnsRef::Own.open()
    };
    let thread = std::thread::Builder::new().name("netns".into()).stack_size(512 << 10).spawn(make);
    let lost = || NetError::Thread("a new network namespace".into());
    thread.map_err(|_| lost())?.join().map_err(|_| lost())?
}

/// Does blocking work on a thread of its own, which starts in `netns` and may go where it likes.
///
/// The work goes on to its end when the caller stops waiting.
pub(crate) async fn aside<T: Send + 'static>(
    netns: NetnsRef,
    what: &'static str,
    work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    let (done, wait) = tokio::sync::oneshot::channel();
    let body = move || {
        let result = match netns {
            NetnsRef::Own => work(),
            other => other.open().and_then(|file| enter(&file)).and_then(|()| work()),
        };
        // Nobody waits any more: there is nobody to tell.
        let _ = done.send(result);
    };
    std::thread::Builder::new()
        .name("netns".into())
        .stack_size(512 << 10)
        .spawn(body)
        .map_err(|_| NetError::Thread(what.into()))?;
    wait.await.map_err(|_| NetError::Thread(what.into()))?
}

/// Whether the file is a namespace that is mounted there.
pub(crate) fn is_netns(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == NSFS)
}

/// Moves the calling thread into a new network namespace and binds that to `path`.
pub(crate) fn create_at(path: &Path) -> Result<(), NetError> {
    let attempt = || format!("making the network namespace {}", path.display());
    match File::create_new(path) {
        // A file that an earlier try left without a mount on it.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        other => drop(other.attempt(attempt)?),
    }
    unshare(CloneFlags::CLONE_NEWNET).attempt(attempt)?;
    let own = "/proc/thread-self/ns/net";
    mount(Some(own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).attempt(attempt)
}

/// Unbinds a namespace and removes its file. Harmless when there is none.
pub(crate) fn delete_at(path: &Path) -> Result<(), NetError> {
    let attempt = || format!("removing the network namespace {}", path.display());
    // Mounted twice by two runs that crossed: each layer is taken off.
    for _ in 0..8 {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(e) => return Err(e).attempt(attempt),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).attempt(attempt),
        _ => Ok(()),
    }
}

/// Sets a value under /proc/sys/net of the calling thread's namespace. A kernel without IPv6 has no such file: then
/// there is nothing to set.
pub(crate) fn sysctl(key: &str, value: &str) -> Result<(), NetError> {
    let path = Path::new("/proc/sys/net").join(key);
    match fs::read_to_string(&path) {
        // Already so: it may be read-only.
        Ok(now) if now.trim() == value => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        _ => fs::write(&path, value).attempt(|| format!("setting {} to {value}", path.display())),
    }
}
