//! What kept processes say: read from FIFOs, cut into lines, stamped, written to log files that rotate.
//!
//! A FIFO has a name, so that the next keeper finds it, and the process holds it open for reading too, so that it neither
//! blocks nor is killed while no keeper lives: up to 64 KiB wait in it. A full disk costs lines, never the process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nexus_compute::keep::LogFiles;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::process::now;

/// A longer line is cut into several.
const MAX_LINE: usize = 16 << 10;
/// Read from one stream at a time, so that one that never stops can't starve the others.
const TURN: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    fn word(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// The files that one process's lines go to.
struct LogWriter {
    files: LogFiles,
    current: Option<File>,
    size: u64,
}

impl LogWriter {
    fn new(files: LogFiles) -> Self {
        Self { files, current: None, size: 0 }
    }

    fn numbered(&self, n: u32) -> PathBuf {
        self.files.dir.join(n.to_string())
    }

    fn open(&mut self) -> io::Result<()> {
        fs::create_dir_all(&self.files.dir)?;
        let path = self.files.dir.join("current");
        let file = OpenOptions::new().create(true).append(true).mode(0o640).open(path)?;
        self.size = file.metadata()?.len();
        self.current = Some(file);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let current = self.files.dir.join("current");
        self.current = None;
        if self.files.keep == 0 {
            return fs::remove_file(current);
        }
        for n in (1..self.files.keep).rev() {
            match fs::rename(self.numbered(n), self.numbered(n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        fs::rename(current, self.numbered(1))
    }

    /// Appends whole lines. What can't be written is lost: the process must not wait for a disk.
    fn write(&mut self, lines: &[u8]) {
        let mut attempt = || -> io::Result<()> {
            if self.current.is_none() {
                self.open()?;
            }
            if self.size > 0 && self.size + lines.len() as u64 > self.files.max_bytes {
                self.rotate()?;
                self.open()?;
            }
            if let Some(file) = &mut self.current {
                file.write_all(lines)?;
                self.size += lines.len() as u64;
            }
            Ok(())
        };
        if let Err(error) = attempt() {
            self.current = None;
            tracing::debug!(dir = %self.files.dir.display(), %error, "output is lost");
        }
    }
}

/// The reading end of one stream.
struct Pipe {
    fifo: Option<File>,
    partial: Vec<u8>,
}

/// Both streams of one process.
pub(super) struct Output {
    dir: PathBuf,
    id: String,
    pipes: [Pipe; 2],
    log: Option<LogWriter>,
    last_error: Vec<u8>,
}

fn fifo_path(dir: &Path, id: &str, stream: Stream) -> PathBuf {
    dir.join(format!("{id}.{}", stream.word()))
}

fn open_read(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

impl Output {
    /// Makes the FIFOs anew and returns the ends that the process is to write to.
    pub fn create(dir: &Path, id: &str, logs: Option<LogFiles>) -> io::Result<(Self, [File; 2])> {
        let mut ends = Vec::new();
        let mut pipes = Vec::new();
        for stream in Stream::BOTH {
            let path = fifo_path(dir, id, stream);
            remove_if_there(&path)?;
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            pipes.push(Pipe { fifo: Some(open_read(&path)?), partial: Vec::new() });
            ends.push(OpenOptions::new().read(true).write(true).open(&path)?);
        }
        let ends = <[File; 2]>::try_from(ends).expect("two streams");
        Ok((Self::of(dir, id, logs, pipes), ends))
    }

    fn of(dir: &Path, id: &str, logs: Option<LogFiles>, pipes: Vec<Pipe>) -> Self {
        let pipes = <[Pipe; 2]>::try_from(pipes).ok().expect("two streams");
        let log = logs.map(LogWriter::new);
        Self { dir: dir.into(), id: id.into(), pipes, log, last_error: Vec::new() }
    }

    /// Goes on reading the FIFOs of a process that an earlier keeper started. One that is gone has ended.
    pub fn reopen(dir: &Path, id: &str, logs: Option<LogFiles>) -> Self {
        let open = |stream| Pipe { fifo: open_read(&fifo_path(dir, id, stream)).ok(), partial: Vec::new() };
        Self::of(dir, id, logs, Stream::BOTH.map(open).into())
    }

    /// Puts a stream where the image of this process before its re-execution left it.
    pub fn resume(&mut self, stream: Stream, fd: OwnedFd, partial: Vec<u8>) {
        self.pipes[stream as usize] = Pipe { fifo: Some(fd.into()), partial };
    }

    /// The open streams, to poll.
    pub fn open(&self) -> impl Iterator<Item = (Stream, BorrowedFd<'_>)> {
        Stream::BOTH.into_iter().filter_map(|s| Some((s, self.pipes[s as usize].fifo.as_ref()?.as_fd())))
    }

    /// What has been read of a line that has not ended.
    pub fn partial(&self, stream: Stream) -> &[u8] {
        &self.pipes[stream as usize].partial
    }

    /// The last line of standard error that said something.
    pub fn last_error(&self) -> String {
        String::from_utf8_lossy(&self.last_error).trim().chars().take(1000).collect()
    }

    /// Reads what there is, up to a turn's worth, and logs it. Returns whether there may be more.
    pub fn read(&mut self, stream: Stream) -> bool {
        let pipe = &mut self.pipes[stream as usize];
        let Some(fifo) = &mut pipe.fifo else { return false };
        let mut buffer = [0; 8 << 10];
        let mut read = 0;
        let mut ended = false;
        while read < TURN {
            match fifo.read(&mut buffer) {
                Ok(0) => {
                    ended = true;
                    break;
                }
                Ok(n) => {
                    pipe.partial.extend_from_slice(&buffer[..n]);
                    read += n;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    ended = true;
                    break;
                }
            }
        }
        if ended {
            pipe.fifo = None;
        }
        self.log(stream, ended);
        !ended && read >= TURN
    }

    /// Moves whole lines, and at the end what is left, from the buffer to the log.
    fn log(&mut self, stream: Stream, ended: bool) {
        let partial = &mut self.pipes[stream as usize].partial;
        let mut lines = Vec::new();
        let mut taken = 0;
        while taken < partial.len() {
            let rest = &partial[taken..];
            let (text, step) = match rest.iter().take(MAX_LINE).position(|b| *b == b'\n') {
                Some(end) => (&rest[..end], end + 1),
                None if rest.len() >= MAX_LINE => (&rest[..MAX_LINE], MAX_LINE),
                None if ended => (rest, rest.len()),
                None => break,
            };
            if stream == Stream::Stderr && !text.trim_ascii().is_empty() {
                self.last_error.clear();
                self.last_error.extend_from_slice(text);
            }
            if self.log.is_some() {
                let _ = write!(lines, "{} {} ", now(), stream.word());
                lines.extend_from_slice(text);
                lines.push(b'\n');
            }
            taken += step;
        }
        partial.drain(..taken);
        if let Some(log) = &mut self.log
            && !lines.is_empty()
        {
            log.write(&lines);
        }
    }

    /// Reads all that is there now.
    pub fn drain(&mut self) {
        for stream in Stream::BOTH {
            // 16 turns are a full FIFO many times over: a writer that goes on can't hold the keeper here.
            for _ in 0..16 {
                if !self.read(stream) {
                    break;
                }
            }
        }
    }

    /// Logs what is left and removes the FIFOs.
    pub fn finish(mut self) {
        self.drain();
        for stream in Stream::BOTH {
            self.log(stream, true);
            let _ = remove_if_there(&fifo_path(&self.dir, &self.id, stream));
        }
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match nix::unistd::unlink(path) {
        Err(Errno::ENOENT) | Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(dir: &Path) -> LogFiles {
        LogFiles { dir: dir.join("log"), max_bytes: 200, keep: 2 }
    }

    #[test]
    fn lines_are_stamped_cut_and_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let (mut output, [mut out, mut err]) = Output::create(dir.path(), "a", Some(logs(dir.path()))).unwrap();
        out.write_all(b"first\nsec").unwrap();
        err.write_all(b"trouble\n\n").unwrap();
        output.drain();
        out.write_all(b"ond\n").unwrap();
        output.drain();
        let current = fs::read_to_string(dir.path().join("log/current")).unwrap();
        let tails: Vec<&str> = current.lines().map(|l| l.split_once(' ').unwrap().1).collect();
        assert_eq!(tails, ["stdout first", "stderr trouble", "stderr ", "stdout second"]);
        assert_eq!(output.last_error(), "trouble");
        for n in 0..30 {
            writeln!(out, "line {n:02} of many").unwrap();
            output.drain();
        }
        let mut names: Vec<_> = fs::read_dir(dir.path().join("log"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["1", "2", "current"]);
        assert!(fs::read_to_string(dir.path().join("log/current")).unwrap().contains("line 29"));
        write!(out, "no newline").unwrap();
        drop((out, err));
        output.finish();
        assert!(fs::read_to_string(dir.path().join("log/current")).unwrap().ends_with("stdout no newline\n"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the log folder is left");
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let files = LogFiles { max_bytes: 1 << 20, ..logs(dir.path()) };
        let (mut output, [mut out, _err]) = Output::create(dir.path(), "a", Some(files)).unwrap();
        out.write_all(&[b'x'; MAX_LINE + 5]).unwrap();
        output.drain();
        let current = fs::read_to_string(dir.path().join("log/current")).unwrap();
        assert_eq!(current.lines().count(), 1);
        assert_eq!(output.partial(Stream::Stdout).len(), 5);
    }
}
