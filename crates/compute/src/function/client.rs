//! The agent's blocking half: one exchange with an executor, and a socket inside a network namespace.

use std::fs::File;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};

use super::control::{self, Reply, Request};

/// How long an executor may take to answer. Loading a large artefact and ending guests are the slow cases.
const ANSWER: Duration = Duration::from_secs(15);

/// Asks the executor whose socket is `name` in `folder`. Blocks.
pub(super) fn ask(folder: &Path, name: &str, request: &Request, fds: &[OwnedFd]) -> io::Result<Reply> {
    // By a descriptor of the folder, for a socket's path may have 107 bytes only.
    let folder = File::open(folder)?;
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    control::send(&stream, request, &raw)?;
    Ok(control::receive(&stream)?.0)
}

/// Opens the socket of an instance in its own network namespace: on every address of both families. Its executor listens, once
/// it can serve: until then who connects is refused, and may try again, for nothing of a request was taken. Blocks.
pub(super) fn bind(netns: &Path, port: u16) -> io::Result<OwnedFd> {
    let netns = File::open(netns)?;
    let open = move || -> io::Result<OwnedFd> {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        Ok(socket.into())
    };
    // A namespace belongs to a thread, and this one ends with its foreign one; a socket stays in that it was made in.
    let thread = thread::Builder::new().name("netns-bind".into()).spawn(open)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that binds panicked")))
}
