//! Starting processes: plainly, in a network namespace that is there, or as the first process of new namespaces.
//!
//! `clone3` with namespace flags makes a process that is pid 1 of its own namespace without a second process to look
//! after it. The child does nothing but a few system calls before it becomes another program, so it does not matter that
//! the parent may have other threads.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;

use super::procs::Process;
use crate::inherit;

/// Where a process lives.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// In the namespaces of its parent.
    Here,
    /// Alone in new pid, mount, network, host name and IPC namespaces.
    NewHost,
    /// In another network namespace, with listeners that were opened in the parent's.
    Within(&'a File, &'a [TcpListener]),
    /// In the namespaces of its parent, with listeners that outlive it.
    Holding(&'a [TcpListener]),
}

/// Variables that processes of the cloud inherit; nothing else is.
const INHERITED: &[&str] = &["PATH", "RUST_LOG", "RUST_BACKTRACE", "NEXUS_LOG"];

/// Starts `program` in a session of its own, with output and errors to `output` and nothing to read.
pub fn spawn(program: &Path, arguments: &[&OsStr], output: &File, place: Place<'_>) -> io::Result<Process> {
    let text = |t: &OsStr| CString::new(t.as_bytes()).map_err(|_| io::Error::other("a zero byte in an argument"));
    let path = text(program.as_os_str())?;
    let argv =
        std::iter::once(Ok(path.clone())).chain(arguments.iter().map(|a| text(a))).collect::<Result<Vec<_>, _>>()?;
    let variable = |name: &&str| {
        let value = std::env::var_os(name)?;
        let mut pair = OsStr::new(name).to_owned();
        pair.push("=");
        pair.push(value);
        text(&pair).ok()
    };
    let mut env: Vec<CString> = INHERITED.iter().filter_map(variable).collect();
    let (netns, handed) = match place {
        Place::Within(netns, listeners) => (Some(netns.as_raw_fd()), listeners),
        Place::Holding(listeners) => (None, listeners),
        Place::Here | Place::NewHost => (None, &[][..]),
    };
    let handed: Vec<libc::c_int> = handed.iter().map(|l| l.as_raw_fd()).collect();
    if let Place::Within(_, listeners) | Place::Holding(listeners) = place {
        let named = |l: &TcpListener| Ok(format!("{}={}", l.local_addr()?, l.as_raw_fd()));
        let named = listeners.iter().map(named).collect::<io::Result<Vec<_>>>()?.join(" ");
        env.push(text(OsStr::new(&format!("{}={named}", inherit::VARIABLE)))?);
    }
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        texts.iter().map(|t| t.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv_pointers, env_pointers) = (pointers(&argv), pointers(&env));
    let null = File::open("/dev/null")?;
    let (input, output) = (null.as_raw_fd(), output.as_raw_fd());

    let mut pidfd: libc::c_int = -1;
    let namespaces =
        libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    let flags = libc::CLONE_PIDFD | if matches!(place, Place::NewHost) { namespaces } else { 0 };
    // SAFETY: all-zero is a valid `clone_args`: no stack means a copy of this one, as fork does.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned());
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: `args` is valid for the size given. The child runs on a copy of this stack and, before it becomes another
    // program or ends, makes only async-signal-safe system calls on memory that was made ready above.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: see above; `become_program` never returns.
        unsafe { become_program(&path, &argv_pointers, &env_pointers, input, output, netns, &handed) }
    }
    Errno::result(pid)?;
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so the kernel has stored a new descriptor there.
    let fd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Process::from_parts(i32::try_from(pid).expect("a pid is a small number"), fd))
}

/// The child's part.
///
/// # Safety
/// To be called in a child that shares nothing with its parent; both pointer lists must end with null.
unsafe fn become_program(
    path: &CString,
    argv: &[*const libc::c_char],
    env: &[*const libc::c_char],
    input: libc::c_int,
    output: libc::c_int,
    netns: Option<libc::c_int>,
    handed: &[libc::c_int],
) -> ! {
    // SAFETY: only system calls, on descriptors and memory that the parent holds open across the clone.
    unsafe {
        libc::setsid();
        // The supervisor blocks signals to read them one by one; a new program starts with none blocked.
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::dup2(input, 0);
        libc::dup2(output, 1);
        libc::dup2(output, 2);
        if let Some(netns) = netns
            && libc::setns(netns, libc::CLONE_NEWNET) != 0
        {
            fail(b"the network namespace can't be entered\n");
        }
        for descriptor in handed {
            libc::fcntl(*descriptor, libc::F_SETFD, 0);
        }
        libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr());
        fail(b"the program can't be executed\n")
    }
}

/// Ends the child with a word on why.
///
/// # Safety
/// To be called in a child that shares nothing with its parent.
unsafe fn fail(message: &[u8]) -> ! {
    // SAFETY: two system calls on memory that stands.
    unsafe {
        libc::write(2, message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

/// This program's own file, also after a build has replaced it.
pub fn own_program() -> io::Result<std::path::PathBuf> {
    let path = std::env::current_exe()?;
    match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(bytes) => Ok(OsStr::from_bytes(bytes).into()),
        None => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_process_starts_with_its_arguments_and_output() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let arguments = [OsStr::new("-c"), OsStr::new("echo out; echo err >&2; read x || echo no input")];
        let process = spawn(Path::new("/bin/sh"), &arguments, file.as_file(), Place::Here).unwrap();
        assert!(process.wait(Duration::from_secs(20)).unwrap());
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(process.pid()), None).unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "out\nerr\nno input\n");
    }

    #[test]
    fn a_process_within_a_namespace_holds_the_listeners_of_its_parent() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let netns = nexus_network::new_namespace().unwrap();
        let listeners = [TcpListener::bind("127.0.0.1:0").unwrap()];
        let file = tempfile::NamedTempFile::new().unwrap();
        let script = "echo $V; readlink /proc/self/fd/${V##*=}; wc -l < /proc/net/tcp".replace('V', inherit::VARIABLE);
        let arguments = [OsStr::new("-c"), OsStr::new(&script)];
        let place = Place::Within(&netns, &listeners);
        let process = spawn(Path::new("/bin/sh"), &arguments, file.as_file(), place).unwrap();
        assert!(process.wait(Duration::from_secs(20)).unwrap());
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(process.pid()), None).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let address = listeners[0].local_addr().unwrap().to_string();
        assert!(lines[0].starts_with(&format!("{address}=")), "{text}");
        assert!(lines[1].starts_with("socket:"), "{text}");
        assert_eq!(lines[2].trim(), "1", "an empty table of another namespace: {text}");
    }
}
