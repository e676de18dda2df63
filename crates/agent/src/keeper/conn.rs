//! A client's connection to the keeper: bytes and file descriptors in, bytes out, never waiting.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use super::protocol::MAX_REQUEST;

/// A client's connection.
pub(super) struct Conn {
    pub stream: UnixStream,
    pub input: Vec<u8>,
    pub fds: VecDeque<OwnedFd>,
    pub output: Vec<u8>,
    pub watching: bool,
    /// A request of it is being worked on.
    pub busy: bool,
}

impl Conn {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, input: Vec::new(), fds: VecDeque::new(), output: Vec::new(), watching: false, busy: false }
    }

    /// Reads what has come. False when the client is gone or sends more than it may.
    pub fn receive(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        let mut space = nix::cmsg_space!([i32; 8]);
        while self.input.len() <= MAX_REQUEST + 4 {
            let fd = self.stream.as_raw_fd();
            let mut parts = [io::IoSliceMut::new(&mut buffer)];
            let (length, fds) = match recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            {
                Ok(message) => {
                    let mut fds = Vec::new();
                    if let Ok(controls) = message.cmsgs() {
                        for control in controls {
                            if let ControlMessageOwned::ScmRights(raw) = control {
                                // SAFETY: the kernel has just made them for this process.
                                fds.extend(raw.into_iter().map(|f| unsafe { OwnedFd::from_raw_fd(f) }));
                            }
                        }
                    }
                    (message.bytes, fds)
                }
                Err(nix::errno::Errno::EAGAIN) => return true,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return false,
            };
            if length == 0 {
                return false;
            }
            self.fds.extend(fds);
            if self.fds.len() > 3 {
                return false;
            }
            self.input.extend_from_slice(&buffer[..length]);
        }
        true
    }

    /// Writes what the client takes. False when it is gone.
    pub fn flush(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }
}
