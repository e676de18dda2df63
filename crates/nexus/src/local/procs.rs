//! The processes of a local cloud, found by what they are: `nexus ROLE --config FILE`, where FILE is in the data folder.
//!
//! No file of process numbers can be wrong, because there is none. A process is held by a pidfd, which never means
//! another process that got the same number later; the command line is read again once the pidfd is open.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// A process, held so that its number can't come to mean another.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// Wraps a pidfd that the kernel gave at the process's birth.
    pub fn from_parts(pid: i32, fd: OwnedFd) -> Self {
        Self { pid, fd }
    }

    /// Holds a running process; `None` if there is none of this number.
    pub fn open(pid: i32) -> io::Result<Option<Self>> {
        // SAFETY: the call takes two integers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        match Errno::result(fd) {
            Ok(fd) => {
                let fd = i32::try_from(fd).expect("a descriptor is a small number");
                // SAFETY: the kernel has just made this descriptor for us alone.
                Ok(Some(Self { pid, fd: unsafe { OwnedFd::from_raw_fd(fd) } }))
            }
            Err(Errno::ESRCH) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal. A process that has ended is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open, and a null siginfo means the usual one.
        let done =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal as libc::c_int, none, 0) };
        match Errno::result(done) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether it has ended, waiting up to `patience`.
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A process of ours.
#[derive(Debug)]
pub struct Found {
    pub role: String,
    /// The `--config` of a role, the `--data-dir` of a supervisor.
    pub path: PathBuf,
    pub process: Process,
}

/// The roles that a local cloud starts.
const ROLES: &[&str] = &["server", "gateway", "host-init", "agent", "keeper"];
/// The subcommand of the supervisor.
pub const SUPERVISE: &str = "local-supervise";

/// Every process of the cloud in `root`: its supervisor, members, agents and keepers.
pub fn find(root: &Path) -> io::Result<Vec<Found>> {
    let config = root.join("config");
    let ours = |pid: i32| -> Option<(String, PathBuf)> {
        let (role, path) = read_command(pid)?;
        let fits = if role == SUPERVISE { path == root } else { path.starts_with(&config) };
        fits.then_some((role, path))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        if ours(pid).is_none() {
            continue;
        }
        let Some(process) = Process::open(pid)? else { continue };
        if let Some((role, path)) = ours(pid) {
            found.push(Found { role, path, process });
        }
    }
    Ok(found)
}

/// The role and path of a process, if it is one of this program's and runs as the same user.
fn read_command(pid: i32) -> Option<(String, PathBuf)> {
    use std::os::unix::fs::MetadataExt as _;
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (role, path) = parse_command(&text)?;
    let owner = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    (owner == nix::unistd::geteuid().as_raw()).then_some((role, path))
}

fn parse_command(cmdline: &str) -> Option<(String, PathBuf)> {
    let mut arguments = cmdline.trim_end_matches('\0').split('\0').skip(1);
    let role = arguments.next()?;
    let flag = match role {
        SUPERVISE => "--data-dir",
        role if ROLES.contains(&role) => "--config",
        _ => return None,
    };
    arguments.find(|a| *a == flag)?;
    Some((role.to_owned(), PathBuf::from(arguments.next()?)))
}

/// Which process listens on a loopback TCP port, as "name (pid N)", if it can be found.
pub fn listener(port: u16) -> Option<String> {
    let mut inodes = Vec::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        inodes.extend(text.lines().skip(1).filter_map(|line| listening_inode(line, port)));
    }
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(target) = fs::read_link(descriptor.path()) else { continue };
            let target = target.to_string_lossy();
            if inodes.iter().any(|i| target == format!("socket:[{i}]")) {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                return Some(format!("{} (pid {pid})", name.trim()));
            }
        }
    }
    None
}

/// The inode of a line of `/proc/net/tcp` if it is a listener on `port`.
fn listening_inode(line: &str, port: u16) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let own = fields.get(1)?.rsplit_once(':')?.1;
    // State 0A is TCP_LISTEN (include/net/tcp_states.h).
    let listens = *fields.get(3)? == "0A" && u16::from_str_radix(own, 16).ok()? == port;
    listens.then(|| fields.get(9).map(|i| (*i).to_owned())).flatten()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_command_line_says_who_a_process_is() {
        let parse = |text: &str| parse_command(&text.replace(' ', "\0"));
        assert_eq!(
            parse("/usr/bin/nexus server --config /d/config/a.toml "),
            Some(("server".into(), "/d/config/a.toml".into()))
        );
        assert_eq!(parse("nexus local-supervise --data-dir /d"), Some((SUPERVISE.into(), "/d".into())));
        assert_eq!(parse("vi server --config"), None);
        assert_eq!(parse("nexus get apps --config /d/config/a.toml"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_held_process_is_signalled_and_awaited() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap().unwrap();
        assert!(!process.wait(Duration::from_millis(10)).unwrap());
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait(Duration::from_secs(20)).unwrap());
        child.wait().unwrap();
        process.signal(Signal::SIGKILL).expect("an ended process is no error");
    }

    #[test]
    fn the_listener_of_a_port_is_named() {
        let listener_socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let who = listener(listener_socket.local_addr().unwrap().port()).unwrap();
        assert!(who.contains(&format!("pid {}", std::process::id())), "{who}");
    }
}
