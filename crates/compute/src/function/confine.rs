//! How an executor gives up every right before it touches a tenant's bytes.
//!
//! The process starts as whoever the keeper is and confines itself, rather than being started as the unprivileged user:
//! its program may lie in a folder which that user can't enter, and its control socket is to lie where only the agent can
//! reach it. What is left afterwards is a process with no capability, no file system, no network, no way to gain a right, and the
//! descriptors that it is handed.

use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, chroot, geteuid, setgroups, setresgid, setresuid};

/// Bounds beside the loss of rights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Address space, or no bound: a pool of linear memories reserves far more than it uses.
    pub address_space: Option<u64>,
    pub open_files: u64,
    /// The largest file that it may write.
    pub file_size: u64,
}

/// Closes what was inherited beside the standard streams. Must be called before anything is opened.
pub(super) fn close_inherited() {
    // SAFETY: no descriptor above 2 has an owner in this process yet, as the caller promises.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// Leaves the host's network for an empty one. What an executor is to reach, it is handed.
pub(super) fn isolate() -> io::Result<()> {
    if geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNET)?;
    }
    Ok(())
}

/// Makes the calling, still single-threaded process the user `id` in the folder `root`, for good. A process that is not
/// root stays who and where it is, and loses what it can.
pub(super) fn confine(id: u32, root: &Path, bounds: Bounds) -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let hard = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)?.1;
    let files = bounds.open_files.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    setrlimit(Resource::RLIMIT_FSIZE, bounds.file_size, bounds.file_size)?;
    if let Some(bytes) = bounds.address_space {
        setrlimit(Resource::RLIMIT_AS, bytes, bytes)?;
    }
    prctl::set_no_new_privs()?;
    if geteuid().is_root() {
        chroot(root)?;
        chdir("/")?;
        setgroups(&[])?;
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        setresgid(gid, gid, gid)?;
        // Takes every capability along, for no id of the process is root's any more.
        setresuid(uid, uid, uid)?;
    }
    prctl::set_dumpable(false)?;
    Ok(())
}
