//! What the agent and an executor say to each other over the executor's unix socket.
//!
//! One request and one reply per connection. Each is a frame: its length in 4 bytes, little-endian, then JSON. File
//! descriptors travel (`SCM_RIGHTS`) with the length of the frame that names them: for [`Request::Add`] these are, in
//! order, the compiled artefact, the bound socket and the folder of the logs, and for [`Request::Outlet`] a socket. Both sides give up after a deadline, and
//! neither keeps a connection open, so that an agent that vanishes leaves nothing behind.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nexus_model::{Name, Timestamp, Uid};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bounds what one side makes the other allocate. An instance's environment is the largest part of a frame.
const MAX_FRAME: usize = 4 << 20;

/// No request carries more.
const MAX_FDS: usize = 3;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Serve an instance from now on. Harmless if it is served already.
    Add(Box<Add>),
    /// Accept no more, finish what is under way, and forget the instance then.
    Drain(Uid),
    /// End the instance now. Harmless if there is none.
    Remove(Uid),
    List,
    /// The project that the executor serves: that of the first instance that it was given.
    Whose,
    /// Ask for connections by the socket that comes along, from now on: see [`super::outlet`].
    Outlet,
    /// End the process, unless it serves something.
    ExitIfIdle,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Add {
    /// The first makes the executor this project's for good; it refuses every other.
    pub project: Name,
    pub uid: Uid,
    pub epoch: u64,
    pub env: Vec<(String, String)>,
    /// Bytes of linear memory that all requests under way may hold together.
    pub memory: u64,
    pub concurrency: u32,
    pub timeout_seconds: u32,
    pub log_max_bytes: u64,
    pub log_keep: u32,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    Instances(Vec<Served>),
    /// Nobody's, as long as it was given nothing.
    Owner(Option<Name>),
    /// The artefact was made by another engine: compile again.
    Incompatible(String),
    /// The component can't be served; its author must change it or its limits.
    Unfit(String),
    Failed(String),
    /// The answer to [`Request::ExitIfIdle`] of one that is not.
    Busy,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Served {
    pub uid: Uid,
    pub epoch: u64,
    pub since: Timestamp,
    pub draining: bool,
}

fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

pub(super) fn send(stream: &UnixStream, message: &impl Serialize, fds: &[RawFd]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    if body.len() > MAX_FRAME {
        return Err(invalid(format!("a frame of {} bytes; {MAX_FRAME} are allowed", body.len())));
    }
    let head = u32::try_from(body.len()).expect("bounded above").to_le_bytes();
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&head)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    let mut stream = stream;
    stream.write_all(&head[sent..])?;
    stream.write_all(&body)
}

pub(super) fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut head = [0; 4];
    let (read, fds) = take(stream.as_raw_fd(), &mut head, MsgFlags::empty())?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut stream = stream;
    stream.read_exact(&mut head[read..])?;
    let length = u32::from_le_bytes(head) as usize;
    if length > MAX_FRAME {
        return Err(invalid(format!("a frame of {length} bytes; {MAX_FRAME} are allowed")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((serde_json::from_slice(&body)?, fds))
}

/// Receives once: how many bytes came, and with them which descriptors.
pub(super) fn take(socket: RawFd, buffer: &mut [u8], flags: MsgFlags) -> io::Result<(usize, Vec<OwnedFd>)> {
    // Room for as many as the kernel lets pass (SCM_MAX_FD): of more than any message has, none is kept.
    let mut space = nix::cmsg_space!([RawFd; 253]);
    let mut fds = Vec::new();
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), flags | MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
            fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if fds.len() > MAX_FDS {
        return Err(invalid("more descriptors than any message has".to_owned()));
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_frame_arrives_whole_with_its_descriptors() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"passed").unwrap();
        let uid = Uid::from_random([7; 16]);
        let long = "x".repeat(100_000);
        let add = Add {
            project: "default".parse().unwrap(),
            uid,
            epoch: 3,
            env: vec![("K".into(), long.clone())],
            memory: 1,
            concurrency: 1,
            timeout_seconds: 1,
            log_max_bytes: 1,
            log_keep: 1,
        };
        let sender = std::thread::spawn(move || send(&a, &Request::Add(Box::new(add)), &[file.as_raw_fd()]).unwrap());
        let (request, mut fds) = receive::<Request>(&b).unwrap();
        sender.join().unwrap();
        let Request::Add(add) = request else { panic!("{request:?}") };
        assert_eq!((add.uid, add.epoch, &add.env[0].1), (uid, 3, &long));
        let mut received = File::from(fds.remove(0));
        let mut text = String::new();
        std::io::Seek::rewind(&mut received).unwrap();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "passed");
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_read() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert_eq!(receive::<Request>(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
