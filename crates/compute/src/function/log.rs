//! The log of one instance: what its requests write to standard output and error, and what the executor has to say.
//!
//! Files and lines are as [`crate::keep::LogFiles`] says. The executor can't name a path, so it works in the folder's
//! descriptor that it was handed. Disk trouble loses lines, never requests.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use nexus_env::{Clock, RealClock};
use nexus_model::Timestamp;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

/// A longer line is cut into several.
const MAX_LINE: usize = 16 << 10;

/// What a guest may hand over in one write.
const WRITE_BUDGET: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    Stdout,
    Stderr,
}

pub(super) struct Log {
    folder: OwnedFd,
    max_bytes: u64,
    keep: u32,
    clock: RealClock,
    current: Mutex<Option<Current>>,
}

struct Current {
    file: File,
    length: u64,
}

impl Log {
    pub(super) fn new(folder: OwnedFd, max_bytes: u64, keep: u32) -> Self {
        Self { folder, max_bytes, keep, clock: RealClock::new(), current: Mutex::new(None) }
    }

    pub(super) fn line(&self, channel: Channel, text: &str) {
        let channel = match channel {
            Channel::Stdout => "stdout",
            Channel::Stderr => "stderr",
        };
        let now = Timestamp::from_millis(self.clock.now_millis());
        let line = format!("{now} {channel} {text}\n");
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|c| c.length > 0 && c.length + line.len() as u64 > self.max_bytes) {
            *current = None;
            self.rotate();
        }
        if current.is_none() {
            *current = self.open();
        }
        // One that can't be written (disk full) is tried anew with the next line.
        if let Some(open) = current.as_mut() {
            match open.file.write_all(line.as_bytes()) {
                Ok(()) => open.length += line.len() as u64,
                Err(_) => *current = None,
            }
        }
    }

    fn open(&self) -> Option<Current> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = File::from(openat(&self.folder, "current", flags, Mode::from_bits_truncate(0o640)).ok()?);
        let length = file.metadata().ok()?.len();
        Some(Current { file, length })
    }

    fn rotate(&self) {
        // A name that does not exist yet is no trouble: the first rotations have fewer files than are kept.
        if self.keep == 0 {
            let _ = unlinkat(&self.folder, "current", UnlinkatFlags::NoRemoveDir);
            return;
        }
        for number in (1..self.keep).rev() {
            let _ =
                renameat(&self.folder, number.to_string().as_str(), &self.folder, (number + 1).to_string().as_str());
        }
        let _ = renameat(&self.folder, "current", &self.folder, "1");
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Log({})", self.folder.as_raw_fd())
    }
}

/// One request's standard output or error. Clones share the line that has begun; the last of them ends it.
#[derive(Clone)]
pub(super) struct LogStream(Arc<Line>);

struct Line {
    log: Arc<Log>,
    channel: Channel,
    begun: Mutex<Vec<u8>>,
}

impl LogStream {
    pub(super) fn new(log: Arc<Log>, channel: Channel) -> Self {
        Self(Arc::new(Line { log, channel, begun: Mutex::new(Vec::new()) }))
    }

    fn take(&self, mut bytes: &[u8]) {
        let mut begun = self.0.begun.lock().unwrap_or_else(PoisonError::into_inner);
        while !bytes.is_empty() {
            let room = MAX_LINE - begun.len();
            let (part, ends) = match bytes.iter().take(room).position(|b| *b == b'\n') {
                Some(end) => (end, true),
                None => (bytes.len().min(room), false),
            };
            begun.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part + usize::from(ends)..];
            if ends || begun.len() >= MAX_LINE {
                self.0.log.line(self.0.channel, &String::from_utf8_lossy(&begun));
                begun.clear();
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let begun = self.begun.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !begun.is_empty() {
            self.log.line(self.channel, &String::from_utf8_lossy(begun));
        }
    }
}

#[async_trait::async_trait]
impl Pollable for LogStream {
    async fn ready(&mut self) {}
}

impl OutputStream for LogStream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.take(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_BUDGET)
    }
}

impl AsyncWrite for LogStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.take(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl IsTerminal for LogStream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for LogStream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn log(dir: &Path, max_bytes: u64, keep: u32) -> Arc<Log> {
        Arc::new(Log::new(File::open(dir).unwrap().into(), max_bytes, keep))
    }

    #[test]
    fn pieces_become_lines_and_the_last_one_needs_no_newline() {
        let dir = tempfile::tempdir().unwrap();
        let stream = LogStream::new(log(dir.path(), 1 << 20, 1), Channel::Stderr);
        stream.take(b"one ");
        stream.clone().take(b"line\ntwo");
        drop(stream);
        let text = fs::read_to_string(dir.path().join("current")).unwrap();
        let lines: Vec<_> = text.lines().map(|l| l.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["stderr one line", "stderr two"]);
        let moment = text.split(' ').next().unwrap();
        assert!(serde_json::from_value::<Timestamp>(moment.into()).is_ok(), "{moment}");
    }

    #[test]
    fn a_full_file_is_set_aside_and_the_oldest_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(dir.path(), 100, 2);
        for n in 0..20 {
            log.line(Channel::Stdout, &format!("line {n:020}"));
        }
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["1", "2", "current"]);
        assert!(fs::read_to_string(dir.path().join("current")).unwrap().contains("19\n"));
        for name in ["1", "2", "current"] {
            assert!(fs::metadata(dir.path().join(name)).unwrap().len() <= 100);
        }
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let stream = LogStream::new(log(dir.path(), 1 << 20, 1), Channel::Stdout);
        stream.take(&vec![b'x'; MAX_LINE * 2 + 5]);
        drop(stream);
        let text = fs::read_to_string(dir.path().join("current")).unwrap();
        assert_eq!(text.lines().count(), 3);
    }
}
