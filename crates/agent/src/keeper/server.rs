//! The keeper's loop: waits for signals, requests, output and ends of processes, and deals with one after the other.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nexus_compute::keep::{Entry as EntryKind, Kept, KeptState, Spawn};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::conn::Conn;
use super::handover::{HANDOVER, HandedPipe, Handover, bind, take_handover};
use super::output::{Output, Stream};
use super::process::{self, Ended, Record, Stat, boot_id, now, stat};
use super::protocol::{Answer, MAX_ANSWER, MAX_REQUEST, Op, Request, VERSION, frame, take_frame};
use super::{KeeperConfig, KeeperError};

const MAX_CLIENTS: usize = 256;
const MAX_KEPT: usize = 4096;
/// A shim creates a container in milliseconds; one that takes this long hangs.
const SHIM_DEADLINE: Duration = Duration::from_secs(60);
const MAX_RUN: Duration = Duration::from_secs(24 * 3600);

/// A shim at work, and who waits for it.
struct Shim {
    pid: i32,
    pipe: OwnedFd,
    waiters: Vec<u64>,
    deadline: Instant,
}

/// A kept process, or the record of one.
struct Entry {
    record: Record,
    /// Of a process that is not this one's child.
    pidfd: Option<OwnedFd>,
    output: Option<Output>,
    shim: Option<Shim>,
}

/// A short command of a client.
struct Run {
    conn: u64,
    pid: Option<i32>,
    shim: Option<Shim>,
    deadline: Instant,
}

#[derive(Clone, Copy)]
enum Token {
    Signals,
    Listener,
    Conn(u64),
    Output(u64, Stream),
    End(u64),
}

pub(super) struct Keeper {
    config: KeeperConfig,
    /// The file that it was started from, to execute again: a newer release may have taken its place by then.
    exe: PathBuf,
    boot: String,
    lock: File,
    listener: UnixListener,
    signals: SignalFd,
    next: u64,
    conns: BTreeMap<u64, Conn>,
    entries: BTreeMap<u64, Entry>,
    ids: BTreeMap<String, u64>,
    runs: BTreeMap<u64, Run>,
    /// Ends of children that nobody knew, kept while a shim may still name one.
    unclaimed: BTreeMap<i32, i32>,
    reexec: bool,
    stop: bool,
}

pub(super) fn system<T, E: Into<io::Error>>(attempt: &str, result: Result<T, E>) -> Result<T, KeeperError> {
    result.map_err(|e| KeeperError::System { attempt: attempt.into(), source: e.into() })
}

impl Keeper {
    /// Takes the lock and the socket, and adopts what an earlier keeper left.
    pub fn start(config: KeeperConfig) -> Result<Self, KeeperError> {
        system("reserving a file descriptor", process::reserve_fd_3())?;
        // SAFETY: prctl(2) with integers. Orphans of kept processes come to this one, and are reaped.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        let mut set = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
            set.add(signal);
        }
        system("blocking signals", set.thread_block())?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = system("listening for signals", SignalFd::with_flags(&set, flags))?;
        let boot = system("reading the boot's id", boot_id())?;
        let exe = system("finding the own program", std::env::current_exe())?;
        system("making the state folder", fs::create_dir_all(&config.state_dir))?;
        let private = fs::Permissions::from_mode(0o700);
        system("closing the state folder to others", fs::set_permissions(&config.state_dir, private))?;

        let handover = take_handover(&config, &boot);
        let (lock, listener) = match &handover {
            // SAFETY: the image before left these two open for this one, and says so in a file that names this very
            // process.
            Some(h) => unsafe { (File::from_raw_fd(h.lock), UnixListener::from_raw_fd(h.listener)) },
            None => bind(&config)?,
        };
        for fd in [lock.as_fd(), listener.as_fd()] {
            system("keeping a file from children", fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)))?;
        }
        system("opening the socket", listener.set_nonblocking(true))?;
        let mut keeper = Self {
            config,
            exe,
            boot,
            lock,
            listener,
            signals,
            next: 1,
            conns: BTreeMap::new(),
            entries: BTreeMap::new(),
            ids: BTreeMap::new(),
            runs: BTreeMap::new(),
            unclaimed: BTreeMap::new(),
            reexec: false,
            stop: false,
        };
        keeper.load(handover.map(|h| h.pipes).unwrap_or_default())?;
        keeper.reap();
        tracing::info!(kept = keeper.entries.len(), "the keeper is up");
        Ok(keeper)
    }

    /// Reads the records of an earlier keeper and finds its processes.
    fn load(&mut self, mut pipes: Vec<HandedPipe>) -> Result<(), KeeperError> {
        let own = std::process::id() as i32;
        let names = system("reading the state folder", fs::read_dir(&self.config.state_dir))?;
        for path in names.filter_map(|e| Some(e.ok()?.path())) {
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let read = fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Record>(&text)?));
            let record = match read {
                Ok(record) => record,
                Err(error) => {
                    // Torn by a power cut: then nothing of that boot runs.
                    tracing::warn!(path = %path.display(), %error, "an unreadable record is removed");
                    let _ = fs::remove_file(&path);
                    continue;
                }
            };
            let key = self.key();
            self.ids.insert(record.id.clone(), key);
            let mut entry = Entry { pidfd: None, output: None, shim: None, record };
            if entry.record.ended.is_none() {
                let dir = &self.config.state_dir;
                entry.output = Some(Output::reopen(dir, &entry.record.id, entry.record.logs.clone()));
                let alive =
                    stat(entry.record.pid).filter(|s| s.ticks == entry.record.ticks && entry.record.boot == self.boot);
                if let Some(Stat { parent, .. }) = alive
                    && parent != own
                {
                    entry.pidfd = process::pidfd(entry.record.pid).ok();
                }
                // Opened and then looked at again: the descriptor names the process that is meant, or none.
                let found = stat(entry.record.pid).is_some_and(|s| s.ticks == entry.record.ticks);
                let lost =
                    alive.is_none() || !found || (alive.is_some_and(|s| s.parent != own) && entry.pidfd.is_none());
                self.entries.insert(key, entry);
                if lost {
                    self.ended(key, None, "it ended while no keeper lived");
                }
            } else {
                self.entries.insert(key, entry);
            }
        }
        for pipe in pipes.drain(..) {
            // SAFETY: left open by the image before, see `Handover`.
            let fd = unsafe { OwnedFd::from_raw_fd(pipe.fd) };
            let _ = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
            if let Some(output) = self.by_id(&pipe.id).and_then(|e| e.output.as_mut()) {
                output.resume(pipe.stream, fd, pipe.partial);
            }
        }
        Ok(())
    }

    fn key(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn by_id(&mut self, id: &str) -> Option<&mut Entry> {
        self.entries.get_mut(self.ids.get(id)?)
    }

    pub fn serve(mut self) -> Result<(), KeeperError> {
        loop {
            if self.stop {
                tracing::info!("the keeper ends; its processes go on");
                return Ok(());
            }
            if self.reexec && !self.shims_pending() {
                self.reexec = false;
                self.execute_again();
            }
            let ready = system("waiting", self.wait())?;
            for (token, flags) in ready {
                match token {
                    Token::Signals => self.take_signals(),
                    Token::Listener => self.accept(),
                    Token::Conn(key) => self.converse(key, flags),
                    Token::Output(key, stream) => {
                        if let Some(output) = self.entries.get_mut(&key).and_then(|e| e.output.as_mut()) {
                            output.read(stream);
                        }
                    }
                    Token::End(key) => {
                        self.ended(key, None, "its status went to an earlier keeper");
                    }
                }
            }
            self.expire();
            // Requests that came while an earlier one of the same connection was being worked on.
            let waiting = |c: &Conn| !c.busy && !c.input.is_empty();
            let keys: Vec<u64> = self.conns.iter().filter(|(_, c)| waiting(c)).map(|(k, _)| *k).collect();
            for key in keys {
                self.converse(key, PollFlags::empty());
            }
        }
    }

    /// Waits until something is ready or due. Without a shim or a run at work, there is nothing to wake up for.
    fn wait(&self) -> io::Result<Vec<(Token, PollFlags)>> {
        let mut set: Vec<(Token, PollFd)> = Vec::new();
        let mut add = |token, fd, flags| set.push((token, PollFd::new(fd, flags)));
        add(Token::Signals, self.signals.as_fd(), PollFlags::POLLIN);
        add(Token::Listener, self.listener.as_fd(), PollFlags::POLLIN);
        for (key, conn) in &self.conns {
            // A hang-up is reported unasked.
            let mut flags = PollFlags::empty();
            if !conn.busy {
                flags |= PollFlags::POLLIN;
            }
            if !conn.output.is_empty() {
                flags |= PollFlags::POLLOUT;
            }
            add(Token::Conn(*key), conn.stream.as_fd(), flags);
        }
        for (key, entry) in &self.entries {
            for (stream, fd) in entry.output.iter().flat_map(Output::open) {
                add(Token::Output(*key, stream), fd, PollFlags::POLLIN);
            }
            if let Some(fd) = &entry.pidfd {
                add(Token::End(*key), fd.as_fd(), PollFlags::POLLIN);
            }
        }
        let now = Instant::now();
        let timeout = self.deadlines().min().map_or(PollTimeout::NONE, |at| {
            let millis = at.saturating_duration_since(now).as_millis() + 1;
            PollTimeout::try_from(millis.min(60_000) as u32).unwrap_or(PollTimeout::MAX)
        });
        let (tokens, mut fds): (Vec<Token>, Vec<PollFd>) = set.into_iter().unzip();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready = |fd: &PollFd| fd.revents().filter(|r| !r.is_empty());
        Ok(tokens.into_iter().zip(&fds).filter_map(|(token, fd)| Some((token, ready(fd)?))).collect())
    }

    fn deadlines(&self) -> impl Iterator<Item = Instant> {
        let shims = self.entries.values().filter_map(|e| Some(e.shim.as_ref()?.deadline));
        shims.chain(self.runs.values().map(|r| r.deadline))
    }

    fn shims_pending(&self) -> bool {
        self.entries.values().any(|e| e.shim.is_some()) || self.runs.values().any(|r| r.shim.is_some())
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGHUP) => self.reexec = true,
                Ok(Signal::SIGTERM | Signal::SIGINT) => self.stop = true,
                _ => self.reap(),
            }
        }
    }

    fn reap(&mut self) {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => break,
                Ok(status) => {
                    if let Some((pid, code)) = process::code(status) {
                        self.child_ended(pid, code);
                    }
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "waiting for children");
                    break;
                }
            }
        }
        if !self.shims_pending() {
            self.unclaimed.clear();
        }
    }

    fn child_ended(&mut self, pid: i32, code: i32) {
        let entry = |e: &Entry| e.record.ended.is_none() && e.shim.is_none() && e.record.pid == pid;
        if let Some(key) = self.entries.iter().find(|(_, e)| entry(e)).map(|(k, _)| *k) {
            return self.ended(key, Some(code), "");
        }
        if let Some(key) = self.entries.iter().find(|(_, e)| is_shim(&e.shim, pid)).map(|(k, _)| *k) {
            return self.shim_ended(key, code);
        }
        if let Some(key) = self.runs.iter().find(|(_, r)| r.pid == Some(pid)).map(|(k, _)| *k) {
            return self.run_ended(key, Answer::Exit { code });
        }
        if let Some(key) = self.runs.iter().find(|(_, r)| is_shim(&r.shim, pid)).map(|(k, _)| *k) {
            return self.run_shim_ended(key, code);
        }
        if self.shims_pending() && self.unclaimed.len() < MAX_KEPT {
            self.unclaimed.insert(pid, code);
        }
    }

    /// A kept process is no more: writes that down and tells who watches.
    fn ended(&mut self, key: u64, code: Option<i32>, message: &str) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.pidfd = None;
        entry.record.ended = Some(Ended { code, at: now(), message: message.into() });
        if let Err(error) = entry.record.write(&self.config.state_dir) {
            tracing::warn!(id = entry.record.id, %error, "an exit could not be written down");
        }
        if let Some(output) = &mut entry.output {
            // Descendants may go on writing: their streams stay open until they close them or the record goes.
            output.drain();
        }
        for conn in self.conns.values_mut().filter(|c| c.watching && c.output.is_empty()) {
            conn.output = frame(&Answer::Changed);
        }
    }

    /// The shim of a kept process has ended: with the pid that it wrote, or in vain.
    fn shim_ended(&mut self, key: u64, code: i32) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(shim) = entry.shim.take() else { return };
        if let Some(output) = &mut entry.output {
            output.drain();
        }
        let answer = match adopted(&shim.pipe, code) {
            Ok(pid) => {
                let found = stat(pid);
                entry.record.pid = pid;
                entry.record.ticks = found.map_or(0, |s| s.ticks);
                entry.record.since = now();
                if let Some(code) = self.unclaimed.remove(&pid) {
                    self.ended(key, Some(code), "");
                } else if let Some(stat) = found {
                    if stat.parent != std::process::id() as i32 {
                        entry.pidfd = process::pidfd(pid).ok();
                    }
                    if let Err(error) = entry.record.write(&self.config.state_dir) {
                        tracing::warn!(id = entry.record.id, %error, "a start could not be written down");
                    }
                } else {
                    self.ended(key, None, "it ended before it was known");
                }
                Answer::Done
            }
            Err(why) => {
                let said = entry.output.as_ref().map(Output::last_error).unwrap_or_default();
                let message = if said.is_empty() { why } else { said };
                self.ended(key, None, &message);
                Answer::start(message)
            }
        };
        for conn in shim.waiters {
            self.answer(conn, &answer);
        }
    }

    fn run_shim_ended(&mut self, key: u64, code: i32) {
        let Some(run) = self.runs.get_mut(&key) else { return };
        let Some(shim) = run.shim.take() else { return };
        match adopted(&shim.pipe, code) {
            Ok(pid) => {
                run.pid = Some(pid);
                if let Some(code) = self.unclaimed.remove(&pid) {
                    self.run_ended(key, Answer::Exit { code });
                }
            }
            Err(why) => self.run_ended(key, Answer::start(why)),
        }
    }

    fn run_ended(&mut self, key: u64, answer: Answer) {
        if let Some(run) = self.runs.remove(&key) {
            self.answer(run.conn, &answer);
        }
    }

    /// Kills what has taken too long.
    fn expire(&mut self) {
        let now = Instant::now();
        for entry in self.entries.values_mut() {
            if let Some(shim) = entry.shim.as_mut().filter(|s| s.deadline <= now) {
                kill_group(shim.pid);
                // It is reaped soon; this only keeps the loop from spinning until then.
                shim.deadline = now + SHIM_DEADLINE;
            }
        }
        let due: Vec<u64> = self.runs.iter().filter(|(_, r)| r.deadline <= now).map(|(k, _)| *k).collect();
        for key in due {
            self.kill_run(key);
            self.run_ended(key, Answer::refused("the command was killed: its deadline has passed"));
        }
    }

    fn kill_run(&self, key: u64) {
        if let Some(run) = self.runs.get(&key) {
            for pid in [run.pid, run.shim.as_ref().map(|s| s.pid)].into_iter().flatten() {
                kill_group(pid);
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let known = getsockopt(&stream, sockopt::PeerCredentials);
            let own = nix::unistd::geteuid().as_raw();
            let trusted = known.is_ok_and(|c| c.uid() == 0 || c.uid() == own);
            if !trusted || self.conns.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
                // Closed at once: the client sees a hang-up and tries again later.
                continue;
            }
            let key = self.key();
            self.conns.insert(key, Conn::new(stream));
        }
    }

    fn converse(&mut self, key: u64, flags: PollFlags) {
        let Some(conn) = self.conns.get_mut(&key) else { return };
        let mut open = true;
        if flags.contains(PollFlags::POLLOUT) {
            open &= conn.flush();
        }
        if flags.contains(PollFlags::POLLIN) {
            open &= conn.receive();
        } else if flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            open = false;
        }
        while open {
            let Some(conn) = self.conns.get_mut(&key) else { return };
            if conn.busy {
                break;
            }
            if conn.watching {
                // Whoever watches has nothing more to say.
                open = conn.input.is_empty();
                break;
            }
            match take_frame(&mut conn.input, MAX_REQUEST) {
                Ok(Some(content)) => self.request(key, &content),
                Ok(None) => break,
                Err(error) => {
                    self.answer(key, &Answer::refused(error.to_string()));
                    open = false;
                }
            }
        }
        if !open {
            self.hang_up(key);
        }
    }

    fn hang_up(&mut self, key: u64) {
        self.conns.remove(&key);
        let runs: Vec<u64> = self.runs.iter().filter(|(_, r)| r.conn == key).map(|(k, _)| *k).collect();
        for run in runs {
            self.kill_run(run);
            self.runs.remove(&run);
        }
    }

    fn answer(&mut self, key: u64, answer: &Answer) {
        let Some(conn) = self.conns.get_mut(&key) else { return };
        conn.busy = false;
        let bytes = frame(answer);
        if bytes.len() > MAX_ANSWER {
            conn.output.extend(frame(&Answer::refused("the answer is too long")));
        } else {
            conn.output.extend(bytes);
        }
        if !conn.flush() {
            self.hang_up(key);
        }
    }

    fn request(&mut self, key: u64, content: &[u8]) {
        let answer = match serde_json::from_slice::<Request>(content) {
            Err(error) => Some(Answer::refused(format!("this is no request: {error}"))),
            Ok(request) if request.version != VERSION => {
                Some(Answer::refused(format!("this keeper speaks version {VERSION}, not {}", request.version)))
            }
            Ok(request) => match request.op {
                Op::Spawn { spawn } => self.spawn(key, spawn),
                Op::List => Some(Answer::Kept { kept: self.entries.values().filter_map(Entry::kept).collect() }),
                Op::Signal { id, signal } => Some(self.signal(&id, signal)),
                Op::Forget { id } => Some(self.forget(&id)),
                Op::Run { spawn, millis } => self.run(key, &spawn, Duration::from_millis(millis).min(MAX_RUN)),
                Op::Watch => {
                    if let Some(conn) = self.conns.get_mut(&key) {
                        conn.watching = true;
                    }
                    Some(Answer::Changed)
                }
                Op::Reexec => {
                    self.reexec = true;
                    Some(Answer::Done)
                }
            },
        };
        match answer {
            Some(answer) => self.answer(key, &answer),
            None => {
                if let Some(conn) = self.conns.get_mut(&key) {
                    conn.busy = true;
                }
            }
        }
    }

    /// Starts a process to keep. `None` means that the answer comes with the end of its shim.
    fn spawn(&mut self, conn: u64, spawn: Spawn) -> Option<Answer> {
        if let Err(why) = check(&spawn) {
            return Some(Answer::refused(why));
        }
        if let Some(entry) = self.by_id(&spawn.id)
            && entry.record.ended.is_none()
        {
            let Some(shim) = &mut entry.shim else { return Some(Answer::Done) };
            shim.waiters.push(conn);
            return None;
        }
        if self.entries.len() >= MAX_KEPT && !self.ids.contains_key(&spawn.id) {
            return Some(Answer::refused(format!("{MAX_KEPT} processes are kept already")));
        }
        self.drop_entry(&spawn.id);
        let record = Record {
            version: VERSION,
            id: spawn.id.clone(),
            boot: self.boot.clone(),
            pid: 0,
            ticks: 0,
            since: now(),
            logs: spawn.logs.clone(),
            ended: None,
        };
        let key = self.key();
        self.ids.insert(spawn.id.clone(), key);
        let shim = spawn.entry == EntryKind::Shim;
        match self.launch(&spawn, shim, record.clone()) {
            Ok((record, output, pid_pipe)) => {
                let waiting = pid_pipe.map(|pipe| Shim {
                    pid: record.pid,
                    pipe,
                    waiters: vec![conn],
                    deadline: Instant::now() + SHIM_DEADLINE,
                });
                let pending = waiting.is_some();
                self.entries.insert(key, Entry { record, pidfd: None, output: Some(output), shim: waiting });
                (!pending).then_some(Answer::Done)
            }
            Err(error) => {
                self.entries.insert(key, Entry { record, pidfd: None, output: None, shim: None });
                let message = error.to_string();
                self.ended(key, None, &message);
                Some(Answer::start(message))
            }
        }
    }

    fn launch(&self, spawn: &Spawn, shim: bool, mut record: Record) -> io::Result<(Record, Output, Option<OwnedFd>)> {
        let dir = &self.config.state_dir;
        let (output, [out, err]) = Output::create(dir, &spawn.id, spawn.logs.clone())?;
        let null = File::open("/dev/null")?;
        // A shim is not what is kept: the record comes when it has named that.
        let own = (!shim).then(|| (dir.clone(), record.clone()));
        match process::start(spawn, [null.into(), out.into(), err.into()], shim, own) {
            Ok(started) => {
                record.pid = started.pid;
                record.ticks = stat(started.pid).map_or(0, |s| s.ticks);
                Ok((record, output, started.adopted))
            }
            Err(error) => {
                output.finish();
                Err(error)
            }
        }
    }

    fn run(&mut self, conn: u64, spawn: &Spawn, limit: Duration) -> Option<Answer> {
        let fds = self.conns.get_mut(&conn).map(|c| std::mem::take(&mut c.fds)).unwrap_or_default();
        let Ok(stdio) = <[OwnedFd; 3]>::try_from(Vec::from(fds)) else {
            return Some(Answer::refused("a run comes with three file descriptors"));
        };
        if let Err(why) = check(spawn) {
            return Some(Answer::refused(why));
        }
        let shim = spawn.entry == EntryKind::Shim;
        match process::start(spawn, stdio, shim, None) {
            Ok(started) => {
                let deadline = Instant::now() + limit;
                let shim = started.adopted.map(|pipe| Shim { pid: started.pid, pipe, waiters: Vec::new(), deadline });
                let pid = shim.is_none().then_some(started.pid);
                let key = self.key();
                self.runs.insert(key, Run { conn, pid, shim, deadline });
                None
            }
            Err(error) => Some(Answer::start(error.to_string())),
        }
    }

    fn signal(&mut self, id: &str, signal: i32) -> Answer {
        if !(0..=64).contains(&signal) {
            return Answer::refused(format!("{signal} is no signal"));
        }
        let Some(entry) = self.by_id(id).filter(|e| e.record.ended.is_none() && e.shim.is_none()) else {
            return Answer::Done;
        };
        let sent = match &entry.pidfd {
            Some(fd) => process::signal_pidfd(fd, signal),
            // A child's pid is its own until it is reaped, and it is reaped only here.
            // SAFETY: kill(2) with integers.
            None if unsafe { libc::kill(entry.record.pid, signal) } < 0 => Err(io::Error::last_os_error()),
            None => Ok(()),
        };
        match sent {
            Err(e) if e.raw_os_error() != Some(libc::ESRCH) => Answer::refused(e.to_string()),
            _ => Answer::Done,
        }
    }

    fn forget(&mut self, id: &str) -> Answer {
        match self.by_id(id) {
            Some(entry) if entry.record.ended.is_none() => Answer::refused(format!("{id} runs")),
            _ => {
                self.drop_entry(id);
                Answer::Done
            }
        }
    }

    fn drop_entry(&mut self, id: &str) {
        let Some(entry) = self.ids.remove(id).and_then(|key| self.entries.remove(&key)) else { return };
        if let Some(output) = entry.output {
            output.finish();
        }
        let _ = fs::remove_file(Record::path(&self.config.state_dir, id));
    }

    /// Replaces this process's program by the file that it was started from, which may be newer. Returns only if that
    /// failed.
    fn execute_again(&mut self) {
        let keys: Vec<u64> = self.runs.keys().copied().collect();
        for key in keys {
            // Its client's connection can't outlive this image.
            self.kill_run(key);
            self.runs.remove(&key);
        }
        for conn in self.conns.values_mut() {
            let _ = conn.stream.set_nonblocking(false);
            let _ = conn.stream.set_write_timeout(Some(Duration::from_secs(1)));
            conn.flush();
        }
        self.conns.clear();
        let attempt = || -> io::Result<()> {
            let pid = std::process::id() as i32;
            let mut handed: Vec<BorrowedFd<'_>> = vec![self.listener.as_fd(), self.lock.as_fd()];
            let mut pipes = Vec::new();
            for entry in self.entries.values() {
                for (stream, fd) in entry.output.iter().flat_map(Output::open) {
                    let partial = entry.output.as_ref().map(|o| o.partial(stream).to_vec()).unwrap_or_default();
                    pipes.push(HandedPipe { id: entry.record.id.clone(), stream, fd: fd.as_raw_fd(), partial });
                    handed.push(fd);
                }
            }
            let handover = Handover {
                pid,
                ticks: stat(pid).map_or(0, |s| s.ticks),
                boot: self.boot.clone(),
                listener: self.listener.as_raw_fd(),
                lock: self.lock.as_raw_fd(),
                pipes,
            };
            fs::write(self.config.state_dir.join(HANDOVER), serde_json::to_vec(&handover)?)?;
            for fd in &handed {
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            let text = |t: &OsStr| CString::new(t.as_bytes()).map_err(io::Error::other);
            let program = text(self.exe.as_os_str())?;
            let arguments = std::env::args_os().map(|a| text(&a)).collect::<io::Result<Vec<_>>>()?;
            // Not by `std::process`, which would let signals through before the new image listens for them.
            let error = match nix::unistd::execv(&program, &arguments) {
                Ok(never) => match never {},
                Err(e) => io::Error::from(e),
            };
            for fd in &handed {
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            }
            Err(error)
        };
        if let Err(error) = attempt() {
            let _ = fs::remove_file(self.config.state_dir.join(HANDOVER));
            tracing::error!(%error, exe = %self.exe.display(), "the keeper can't execute itself again and goes on");
        }
    }
}

impl Entry {
    fn kept(&self) -> Option<Kept> {
        let state = match &self.record.ended {
            Some(e) => KeptState::Exited { code: e.code, at: e.at, message: e.message.clone() },
            // Not there before its shim has made it.
            None if self.shim.is_some() => return None,
            None => KeptState::Running { pid: self.record.pid, since: self.record.since },
        };
        Some(Kept { id: self.record.id.clone(), state })
    }
}

fn is_shim(shim: &Option<Shim>, pid: i32) -> bool {
    shim.as_ref().is_some_and(|s| s.pid == pid)
}

/// The pid that a shim wrote before it ended well, or why there is none.
fn adopted(pipe: &OwnedFd, code: i32) -> Result<i32, String> {
    if code != 0 {
        return Err(format!("the shim ended with {code}"));
    }
    let mut text = [0; 32];
    let length = nix::unistd::read(pipe, &mut text).unwrap_or(0);
    let text = String::from_utf8_lossy(&text[..length]);
    text.trim().parse().ok().filter(|pid| *pid > 1).ok_or_else(|| format!("the shim wrote no pid but {text:?}"))
}

fn kill_group(pid: i32) {
    // Started in a session of its own; what a shim made may not be.
    for target in [-pid, pid] {
        let _ = kill(Pid::from_raw(target), Signal::SIGKILL);
    }
}

fn check(spawn: &Spawn) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !(1..=128).contains(&spawn.id.len()) || !spawn.id.bytes().all(allowed) {
        return Err("an id has 1 to 128 of A-Z, a-z, 0-9, '-', '_', '.'".into());
    }
    if spawn.id == "handover" {
        return Err("this id is the keeper's own".into());
    }
    if spawn.argv.is_empty() {
        return Err("a process needs a command".into());
    }
    let texts = spawn.argv.iter().chain(spawn.env.iter().flat_map(|(k, v)| [k, v]));
    if texts.into_iter().any(|t| t.contains('\0')) {
        return Err("commands and variables have no zero bytes".into());
    }
    if spawn.env.iter().any(|(k, _)| k.is_empty() || k.contains('=')) {
        return Err("a variable's name is not empty and has no '='".into());
    }
    Ok(())
}
