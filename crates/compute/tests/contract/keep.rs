//! A keeper without a process of its own: the test is the sub-reaper and the parent of everything.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use nexus_compute::keep::{Entry, Keep, KeepError, Kept, KeptState, Spawn};
use nexus_model::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::sync::Notify;

#[derive(Default)]
pub struct DirectKeep {
    kept: Arc<Mutex<HashMap<String, KeptState>>>,
    changed: Arc<Notify>,
}

pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Timestamp::from_millis(since.as_millis() as i64)
}

fn command(spawn: &Spawn) -> Command {
    let mut command = Command::new(&spawn.argv[0]);
    command.args(&spawn.argv[1..]).env_clear().envs(spawn.env.iter().map(|(k, v)| (k, v))).stdin(Stdio::null());
    command
}

impl DirectKeep {
    pub fn new() -> Self {
        // SAFETY: sets a flag of this process.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0);
        Self::default()
    }

    pub fn pid(&self, id: &str) -> Option<i32> {
        match self.kept.lock().unwrap().get(id) {
            Some(KeptState::Running { pid, .. }) => Some(*pid),
            _ => None,
        }
    }

    /// What a keeper is after the host was switched off.
    pub fn lose_memory(&self) {
        self.kept.lock().unwrap().clear();
    }

    /// What a killed shim leaves comes to the sub-reaper, and holds up its container's end until it is reaped. Containers' first
    /// processes, of whatever test, have somebody who waits for them.
    fn reap_orphans() {
        std::thread::spawn(|| {
            for _ in 0..200 {
                for process in fs::read_dir("/proc").unwrap().flatten() {
                    let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
                    let status = fs::read_to_string(process.path().join("status")).unwrap_or_default();
                    let field = |name: &str| {
                        let line = status.lines().find_map(|l| l.strip_prefix(name));
                        line.map(|l| l.split_whitespace().collect::<Vec<_>>()).unwrap_or_default()
                    };
                    let mine = field("PPid:").first() == Some(&std::process::id().to_string().as_str());
                    let by_exec = matches!(field("NSpid:")[..], [_, .., inside] if inside != "1");
                    if mine && by_exec && field("State:").first() == Some(&"Z") {
                        let _ = waitpid(Pid::from_raw(pid), None);
                    }
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    }

    fn start(&self, spawn: &Spawn) -> Result<i32, String> {
        assert_eq!(spawn.entry, Entry::Shim, "only shims are tested here");
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut command = command(spawn);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let status = writer.as_raw_fd();
        // SAFETY: only calls that are safe after a fork.
        unsafe {
            command.pre_exec(
                move || if libc::dup2(status, 3) == 3 { Ok(()) } else { Err(std::io::Error::last_os_error()) },
            );
        }
        let mut shim = command.spawn().map_err(|e| e.to_string())?;
        drop(writer);
        let logs = spawn.logs.clone();
        let (out, err) = (shim.stdout.take().unwrap(), shim.stderr.take().unwrap());
        let last = Arc::new(Mutex::new(String::new()));
        let streams: [(&str, Box<dyn Read + Send>); 2] = [("stdout", Box::new(out)), ("stderr", Box::new(err))];
        let readers = streams.map(|(name, stream)| {
            let (logs, last) = (logs.clone(), Arc::clone(&last));
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if name == "stderr" {
                        last.lock().unwrap().clone_from(&line);
                    }
                    if let Some(logs) = &logs {
                        fs::create_dir_all(&logs.dir).unwrap();
                        let mut file =
                            OpenOptions::new().create(true).append(true).open(logs.dir.join("current")).unwrap();
                        // In one piece: two streams write here.
                        file.write_all(format!("{} {name} {line}\n", now()).as_bytes()).unwrap();
                    }
                }
            })
        });
        let exit = shim.wait().map_err(|e| e.to_string())?;
        if !exit.success() {
            // What it said is read to its end, unless it left somebody who holds its streams.
            let begun = std::time::Instant::now();
            while !readers.iter().all(|r| r.is_finished()) && begun.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(5));
            }
            return Err(last.lock().unwrap().clone());
        }
        let mut pid = String::new();
        std::fs::File::from(reader).read_to_string(&mut pid).unwrap();
        pid.parse().map_err(|_| format!("the shim told the pid {pid:?}"))
    }
}

#[async_trait]
impl Keep for DirectKeep {
    async fn spawn(&self, spawn: Spawn) -> Result<(), KeepError> {
        if self.pid(&spawn.id).is_some() {
            return Ok(());
        }
        let id = spawn.id.clone();
        let pid = tokio::task::block_in_place(|| self.start(&spawn))
            .map_err(|message| KeepError::Start { id: id.clone(), message })?;
        self.kept.lock().unwrap().insert(id.clone(), KeptState::Running { pid, since: now() });
        let (kept, changed) = (Arc::clone(&self.kept), Arc::clone(&self.changed));
        std::thread::spawn(move || {
            let code = loop {
                match waitpid(Pid::from_raw(pid), None) {
                    Ok(WaitStatus::Exited(_, code)) => break Some(code),
                    Ok(WaitStatus::Signaled(_, signal, _)) => break Some(128 + signal as i32),
                    Ok(_) | Err(nix::Error::EINTR) => {}
                    Err(_) => break None,
                }
            };
            let mut kept = kept.lock().unwrap();
            if kept.contains_key(&id) {
                kept.insert(id, KeptState::Exited { code, at: now(), message: String::new() });
            }
            changed.notify_waiters();
        });
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Kept>, KeepError> {
        let kept = self.kept.lock().unwrap();
        Ok(kept.iter().map(|(id, state)| Kept { id: id.clone(), state: state.clone() }).collect())
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<(), KeepError> {
        if let Some(pid) = self.pid(id) {
            let _ = kill(Pid::from_raw(pid), Signal::try_from(signal).unwrap());
        }
        Ok(())
    }

    async fn forget(&self, id: &str) -> Result<(), KeepError> {
        if self.pid(id).is_some() {
            return Err(KeepError::Refused(format!("{id} runs")));
        }
        self.kept.lock().unwrap().remove(id);
        Ok(())
    }

    async fn run(&self, spawn: Spawn, stdio: [OwnedFd; 3], deadline: Duration) -> Result<i32, KeepError> {
        let [stdin, stdout, stderr] = stdio;
        let mut command = command(&spawn);
        let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().unwrap();
        let begun = std::time::Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap()));
            }
            if begun.elapsed() > deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                Self::reap_orphans();
                return Err(KeepError::Deadline(deadline));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// A network namespace that lives as long as this does, and a path to it for other processes.
pub struct NetNs {
    _open: OwnedFd,
    pub path: std::path::PathBuf,
}

impl NetNs {
    pub fn new() -> Self {
        let open = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let file = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
            OwnedFd::from(file)
        });
        let open = open.join().unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd()).into();
        Self { _open: open, path }
    }
}

pub fn pipe() -> (std::fs::File, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: the kernel fills two descriptors, which are owned from here on.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (std::fs::File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}
