//! A keeper for tests: it starts processes and remembers how they ended. It outlives the runtime under test, as a real one
//! outlives the agent.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use nexus_compute::keep::{Keep, KeepError, Kept, KeptState, Spawn};
use nexus_model::Timestamp;

#[derive(Default)]
pub struct TestKeep {
    children: Mutex<BTreeMap<String, Entry>>,
    /// How many commands were run to their end.
    pub ran: AtomicU32,
}

enum Entry {
    Running(Child),
    Ended(Option<i32>),
}

fn code(status: ExitStatus) -> Option<i32> {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal))
}

fn command(spawn: &Spawn) -> Command {
    assert!(spawn.user.is_none() && spawn.netns.is_none(), "this keeper does neither");
    let mut command = Command::new(&spawn.argv[0]);
    command.args(&spawn.argv[1..]).env_clear().envs(spawn.env.iter().map(|(k, v)| (k, v)));
    if let Some(cwd) = &spawn.cwd {
        command.current_dir(cwd);
    }
    command
}

impl TestKeep {
    pub fn pid(&self, prefix: &str) -> Option<u32> {
        self.pids(prefix).first().copied()
    }

    /// Those of all that run, in the order of their ids.
    pub fn pids(&self, prefix: &str) -> Vec<u32> {
        let mut children = self.children.lock().unwrap();
        let running = |(id, entry): (&String, &mut Entry)| match entry {
            Entry::Running(child) if id.starts_with(prefix) => {
                child.try_wait().unwrap().is_none().then_some(child.id())
            }
            _ => None,
        };
        children.iter_mut().filter_map(running).collect()
    }

    pub fn end_all(&self) {
        for entry in self.children.lock().unwrap().values_mut() {
            if let Entry::Running(child) = entry {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }
}

#[async_trait]
impl Keep for TestKeep {
    async fn spawn(&self, spawn: Spawn) -> Result<(), KeepError> {
        let mut children = self.children.lock().unwrap();
        if let Some(Entry::Running(child)) = children.get_mut(&spawn.id)
            && child.try_wait().unwrap().is_none()
        {
            return Ok(());
        }
        let child = command(&spawn).stdin(Stdio::null()).spawn();
        let child = child.map_err(|e| KeepError::Start { id: spawn.id.clone(), message: e.to_string() })?;
        children.insert(spawn.id, Entry::Running(child));
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Kept>, KeepError> {
        let mut children = self.children.lock().unwrap();
        for entry in children.values_mut() {
            if let Entry::Running(child) = entry
                && let Some(status) = child.try_wait().unwrap()
            {
                *entry = Entry::Ended(code(status));
            }
        }
        let at = Timestamp::from_millis(1);
        let state = |entry: &Entry| match entry {
            Entry::Running(child) => KeptState::Running { pid: child.id().cast_signed(), since: at },
            Entry::Ended(code) => KeptState::Exited { code: *code, at, message: String::new() },
        };
        Ok(children.iter().map(|(id, entry)| Kept { id: id.clone(), state: state(entry) }).collect())
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<(), KeepError> {
        if let Some(Entry::Running(child)) = self.children.lock().unwrap().get(id) {
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::try_from(signal).unwrap()).unwrap();
        }
        Ok(())
    }

    async fn forget(&self, id: &str) -> Result<(), KeepError> {
        let mut children = self.children.lock().unwrap();
        match children.get(id) {
            Some(Entry::Running(_)) => Err(KeepError::Refused(format!("{id} runs"))),
            _ => {
                children.remove(id);
                Ok(())
            }
        }
    }

    async fn run(&self, spawn: Spawn, stdio: [OwnedFd; 3], deadline: Duration) -> Result<i32, KeepError> {
        self.ran.fetch_add(1, Ordering::SeqCst);
        let [stdin, stdout, stderr] = stdio;
        let mut command = tokio::process::Command::from(command(&spawn));
        command.stdin(stdin).stdout(stdout).stderr(stderr).kill_on_drop(true);
        let mut child = command.spawn().map_err(|e| KeepError::Start { id: spawn.id, message: e.to_string() })?;
        let status = tokio::time::timeout(deadline, child.wait()).await.map_err(|_| KeepError::Deadline(deadline))?;
        Ok(code(status.unwrap()).unwrap())
    }

    async fn changed(&self) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
