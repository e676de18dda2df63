//! One process: how it is started, how it is recognised later, and the record of it on disk.
//!
//! A pid alone names nobody for long. A record holds the pid, the moment at which the kernel started it (field 22 of
//! /proc/PID/stat, proc(5)) and the boot's id: together they are never used twice.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use nexus_compute::keep::{LogFiles, Spawn};
use nexus_model::Timestamp;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid};
use serde::{Deserialize, Serialize};

/// The wall clock, in the form that records and log lines have.
pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// What is on disk of a kept process. Read leniently: the keeper that reads may be newer or older than the writer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    pub version: u32,
    pub id: String,
    pub boot: String,
    pub pid: i32,
    /// Clock ticks from boot to the process's start.
    pub ticks: u64,
    pub since: Timestamp,
    pub logs: Option<LogFiles>,
    #[serde(default)]
    pub ended: Option<Ended>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ended {
    pub code: Option<i32>,
    pub at: Timestamp,
    pub message: String,
}

impl Record {
    pub fn path(dir: &Path, id: &str) -> PathBuf {
        dir.join(format!("{id}.json"))
    }

    /// Replaces the record in one step. Not synced: after a power cut every process has ended anyway, which the boot's
    /// id tells.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let path = Self::path(dir, &self.id);
        let temporary = path.with_extension("tmp");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(temporary, path)
    }
}

/// What the kernel says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub parent: i32,
    pub ticks: u64,
}

/// Reads /proc/PID/stat. `None` when there is no such process.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything; the fields after it are numbers.
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
    Some(Stat { parent: fields.get(1)?.parse().ok()?, ticks: fields.get(19)?.parse().ok()? })
}

/// The id of this boot.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A file descriptor that becomes readable when the process ends.
pub(super) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends a signal to exactly the process that the descriptor names.
pub(super) fn signal_pidfd(fd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) with no siginfo and no flags.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A process that has been started.
#[derive(Debug)]
pub(super) struct Started {
    pub pid: i32,
    /// Of a shim: where it writes the pid of what it made.
    pub adopted: Option<OwnedFd>,
}

/// Starts `spawn` on the given standard streams, in a session and process group of its own.
///
/// `record` is written by the new process itself before it becomes the program: a keeper that is killed between the two
/// leaves no process without a record.
pub(super) fn start(
    spawn: &Spawn,
    stdio: [OwnedFd; 3],
    shim: bool,
    record: Option<(PathBuf, Record)>,
) -> io::Result<Started> {
    let Some((program, arguments)) = spawn.argv.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no command"));
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(spawn.env.iter().map(|(k, v)| (k, v)));
    if let Some(cwd) = &spawn.cwd {
        command.current_dir(cwd);
    }
    let [stdin, stdout, stderr] = stdio;
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).stderr(Stdio::from(stderr));
    let (mut reader, mut writer) = (None, None);
    if shim {
        let (r, w) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
        (reader, writer) = (Some(r), Some(w));
    }
    let netns = match &spawn.netns {
        Some(path) => Some(File::open(path).map_err(|e| because("the network namespace", path, &e))?),
        None => None,
    };
    let (user, cgroups) = (spawn.user, spawn.cgroups.clone());
    let pid_pipe = writer.as_ref().map(AsRawFd::as_raw_fd);
    let prepare = move || -> io::Result<()> {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        setsid()?;
        for cgroup in &cgroups {
            // 0 is the writer itself.
            fs::write(cgroup.join("cgroup.procs"), "0").map_err(|e| because("joining the cgroup", cgroup, &e))?;
        }
        if let Some((dir, record)) = &record {
            let pid = std::process::id() as i32;
            let ticks = stat(pid).ok_or_else(|| io::Error::other("/proc is not of this pid namespace"))?.ticks;
            Record { pid, ticks, ..record.clone() }.write(dir)?;
        }
        if let Some(netns) = &netns {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        }
        if let Some((uid, gid)) = user {
            // SAFETY: prctl(2) with integers.
            if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)?;
        }
        if let Some(fd) = pid_pipe {
            // SAFETY: 3 is held by the reserve of `reserve_fd_3` or by something of the keeper's: all close on exec
            // anyway. The copy does not.
            if unsafe { libc::dup2(fd, 3) } < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: clears O_NONBLOCK and, in case that the pipe itself was 3, FD_CLOEXEC.
            unsafe {
                libc::fcntl(3, libc::F_SETFL, 0);
                libc::fcntl(3, libc::F_SETFD, 0);
            }
        }
        Ok(())
    };
    // SAFETY: the keeper has one thread, so that a forked child may allocate and do I/O.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn()?;
    drop(writer);
    // Reaped by the keeper's loop, not by `Child`.
    Ok(Started { pid: child.id() as i32, adopted: reader })
}

fn because(what: &str, path: &Path, error: &io::Error) -> io::Error {
    // The child can pass only a number to its parent, so the text matters in the parent alone.
    match error.raw_os_error() {
        Some(code) if what.starts_with("joining") => io::Error::from_raw_os_error(code),
        _ => io::Error::new(error.kind(), format!("{what} {}: {error}", path.display())),
    }
}

/// Keeps descriptor 3 taken in this process, so that the standard library's own pipe to a child never is 3, which a
/// shim's child overwrites.
pub(super) fn reserve_fd_3() -> io::Result<()> {
    // SAFETY: F_GETFD only asks.
    if unsafe { libc::fcntl(3, libc::F_GETFD) } >= 0 {
        return Ok(());
    }
    let null = File::options().read(true).open("/dev/null")?;
    if null.as_raw_fd() == 3 {
        std::mem::forget(null);
        return Ok(());
    }
    // SAFETY: 3 is free, as was just seen, and this process has one thread.
    if unsafe { libc::dup3(null.as_raw_fd(), 3, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// As shells count: the status, or 128 + the signal.
pub(super) fn code(status: nix::sys::wait::WaitStatus) -> Option<(i32, i32)> {
    use nix::sys::wait::WaitStatus::{Exited, Signaled};
    match status {
        Exited(pid, code) => Some((pid.as_raw(), code)),
        Signaled(pid, signal, _) => Some((pid.as_raw(), 128 + signal as i32)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself() {
        let own = stat(std::process::id() as i32).unwrap();
        assert_eq!(own.parent, nix::unistd::getppid().as_raw());
        assert!(own.ticks > 0);
        assert_eq!(stat(i32::MAX), None);
        assert_eq!(boot_id().unwrap().len(), 36);
    }
}
