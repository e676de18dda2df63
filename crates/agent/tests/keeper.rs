//! The keeper with real processes. This program is keeper, shim and test runner in one: a keeper must be the only thread
//! of its process, so the usual harness would not do.

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nexus_agent::keeper::{self, Client, KeeperConfig};
use nexus_compute::keep::{Entry, Keep, KeepError, KeptState, LogFiles, Spawn};

const DEADLINE: Duration = Duration::from_secs(30);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("keeper") => {
            let config = KeeperConfig { socket: args[2].clone().into(), state_dir: args[3].clone().into() };
            if let Err(error) = keeper::main(config) {
                eprintln!("{error}");
                std::process::exit(1);
            }
        }
        Some("shim") => shim(&args[2], &args[3..]),
        _ => run_tests(&args[1..]),
    }
}

/// Makes an orphan that runs a command, tells its pid, and leaves: the keeper waits for it.
#[allow(clippy::zombie_processes)]
fn shim(mode: &str, command: &[String]) {
    if mode == "fail" {
        eprintln!("first line\nthere is no such image\n");
        std::process::exit(3);
    }
    let child = Command::new(&command[0]).args(&command[1..]).spawn().unwrap();
    // SAFETY: descriptor 3 is what the keeper gives to shims.
    let mut pipe = unsafe { std::fs::File::from_raw_fd(3) };
    write!(pipe, "{}", child.id()).unwrap();
}

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        const TESTS: &[(&str, fn() -> std::pin::Pin<Box<dyn Future<Output = ()>>>)] =
            &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

tests![
    exits_are_known_until_they_are_forgotten,
    what_cant_be_started_says_why,
    output_is_stamped_and_rotated,
    a_killed_keeper_loses_no_process_and_no_output,
    an_exit_without_a_keeper_is_noticed,
    a_reexecuted_keeper_stays_the_parent,
    an_orphan_of_a_shim_is_adopted,
    a_run_has_its_own_streams_and_dies_with_its_client,
    a_second_keeper_is_refused,
    nonsense_is_refused_and_others_are_served,
    a_user_gets_no_privileges,
    changes_are_told,
];

fn run_tests(filters: &[String]) {
    if filters.iter().any(|f| f == "--list") {
        return;
    }
    let filters: Vec<&String> = filters.iter().filter(|f| !f.starts_with('-')).collect();
    let mut failed = 0;
    for (name, test) in TESTS {
        if !filters.is_empty() && !filters.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = std::panic::catch_unwind(|| runtime.block_on(test()));
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        failed += i32::from(result.is_err());
    }
    std::process::exit(failed.min(1));
}

/// A keeper in a folder of its own. Dropping it ends the keeper and all that it keeps.
struct Host {
    dir: tempfile::TempDir,
    keeper: Option<Child>,
    client: Client,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::new(dir.path().join("socket"));
        let mut host = Self { dir, keeper: None, client };
        host.start();
        host
    }

    fn command(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("keeper").arg(self.dir.path().join("socket")).arg(self.dir.path().join("state"));
        command
    }

    fn start(&mut self) {
        self.keeper = Some(self.command().spawn().unwrap());
    }

    fn kill_keeper(&mut self) {
        let mut keeper = self.keeper.take().unwrap();
        keeper.kill().unwrap();
        keeper.wait().unwrap();
    }

    fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().unwrap().id()
    }

    fn logs(&self, id: &str) -> PathBuf {
        self.dir.path().join("logs").join(id)
    }

    fn sh(&self, id: &str, script: &str) -> Spawn {
        let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        let logs = LogFiles { dir: self.logs(id), max_bytes: 1 << 20, keep: 2 };
        Spawn {
            id: id.into(),
            entry: Entry::Process,
            argv,
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            cwd: None,
            user: None,
            netns: None,
            cgroups: Vec::new(),
            logs: Some(logs),
        }
    }

    fn shim(&self, id: &str, mode: &str, script: &str) -> Spawn {
        let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
        let argv = [own.as_str(), "shim", mode, "/bin/sh", "-c", script].map(str::to_owned).to_vec();
        Spawn { entry: Entry::Shim, argv, ..self.sh(id, "") }
    }

    async fn state(&self, id: &str) -> Option<KeptState> {
        self.client.list().await.unwrap().into_iter().find(|k| k.id == id).map(|k| k.state)
    }

    async fn pid(&self, id: &str) -> i32 {
        match self.state(id).await {
            Some(KeptState::Running { pid, .. }) => pid,
            other => panic!("{id} does not run: {other:?}"),
        }
    }

    async fn exit(&self, id: &str) -> (Option<i32>, String) {
        eventually(&format!("{id} ends"), async || match self.state(id).await {
            Some(KeptState::Exited { code, message, .. }) => Some((code, message)),
            _ => None,
        })
        .await
    }

    async fn line(&self, id: &str, text: &str) {
        let path = self.logs(id).join("current");
        eventually(&format!("{id} says {text}"), async || {
            std::fs::read_to_string(&path).is_ok_and(|log| log.lines().any(|l| l.ends_with(text))).then_some(())
        })
        .await;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.kill();
            let _ = keeper.wait();
        }
        let Ok(records) = std::fs::read_dir(self.dir.path().join("state")) else { return };
        let paths = records.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.extension().is_some_and(|e| e == "json"));
        for record in paths.filter_map(|path| std::fs::read(path).ok()) {
            let Ok(record) = serde_json::from_slice::<serde_json::Value>(&record) else { continue };
            if let (Some(pid), true) = (record["pid"].as_i64().filter(|p| *p > 1), record["ended"].is_null()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGKILL);
            }
        }
    }
}

async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

fn parent(pid: i32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat[stat.rfind(')').unwrap() + 1..].split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn exits_are_known_until_they_are_forgotten() {
    let host = Host::new();
    host.client.spawn(host.sh("a", "exit 7")).await.unwrap();
    assert_eq!(host.exit("a").await.0, Some(7));
    host.client.spawn(host.sh("b", "exec sleep 1000")).await.unwrap();
    let pid = host.pid("b").await;
    host.client.spawn(host.sh("b", "exit 1")).await.unwrap();
    assert_eq!(host.pid("b").await, pid, "what runs is not started again");
    assert!(matches!(host.client.forget("b").await, Err(KeepError::Refused(_))));
    host.client.signal("b", 15).await.unwrap();
    assert_eq!(host.exit("b").await.0, Some(128 + 15));
    host.client.signal("b", 9).await.unwrap();
    host.client.signal("unknown", 9).await.unwrap();
    host.client.spawn(host.sh("b", "exit 3")).await.unwrap();
    assert_eq!(host.exit("b").await.0, Some(3));
    for id in ["a", "b", "unknown"] {
        host.client.forget(id).await.unwrap();
    }
    assert_eq!(host.client.list().await.unwrap(), []);
}

async fn what_cant_be_started_says_why() {
    let host = Host::new();
    let spawn = Spawn { argv: vec!["/no/such/program".into()], ..host.sh("a", "") };
    let error = host.client.spawn(spawn.clone()).await.unwrap_err();
    assert!(matches!(&error, KeepError::Start { message, .. } if message.contains("No such file")), "{error}");
    let (code, message) = host.exit("a").await;
    assert!(code.is_none() && message.contains("No such file"), "{message}");
    let missing = Spawn { netns: Some("/no/such/netns".into()), ..host.sh("b", "") };
    let error = host.client.spawn(missing).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/netns"), "{error}");
    for id in ["", "a/b", &"x".repeat(129)] {
        assert!(matches!(host.client.spawn(host.sh(id, "true")).await, Err(KeepError::Refused(_))), "{id}");
    }
}

async fn output_is_stamped_and_rotated() {
    let host = Host::new();
    let script = "i=0; while [ $i -lt 200 ]; do echo line-$i; i=$((i+1)); done";
    let logs = LogFiles { dir: host.logs("a"), max_bytes: 2_000, keep: 2 };
    host.client.spawn(Spawn { logs: Some(logs), ..host.sh("a", script) }).await.unwrap();
    assert_eq!(host.exit("a").await.0, Some(0));
    host.line("a", "stdout line-199").await;
    let mut names: Vec<String> =
        std::fs::read_dir(host.logs("a")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.contains(&"current".to_owned()) && names.len() <= 3, "{names:?}");

    host.client.spawn(host.sh("b", "echo out; echo err >&2")).await.unwrap();
    host.line("b", "Z stdout out").await;
    host.line("b", "Z stderr err").await;
}

async fn a_killed_keeper_loses_no_process_and_no_output() {
    let mut host = Host::new();
    let gate = host.dir.path().join("gate");
    let script = format!(
        "echo before; while [ ! -e {g} ]; do sleep 0.02; done; echo during; : > {g}-passed; \
         while [ ! -e {g}2 ]; do sleep 0.02; done; echo after",
        g = gate.display()
    );
    host.client.spawn(host.sh("a", &script)).await.unwrap();
    host.line("a", "stdout before").await;
    let pid = host.pid("a").await;
    host.kill_keeper();
    std::fs::write(&gate, "").unwrap();
    let passed = host.dir.path().join("gate-passed");
    eventually("it goes on without a keeper", async || passed.exists().then_some(())).await;
    assert!(alive(pid));
    host.start();
    assert_eq!(host.pid("a").await, pid);
    host.line("a", "stdout during").await;
    std::fs::write(host.dir.path().join("gate2"), "").unwrap();
    // Its parent is another process now: the end is noticed, the status can't be.
    assert_eq!(host.exit("a").await.0, None);
    host.line("a", "stdout after").await;
    // Signals reach what was adopted.
    host.client.spawn(host.sh("b", "exec sleep 1000")).await.unwrap();
    let pid = host.pid("b").await;
    host.kill_keeper();
    host.start();
    host.client.signal("b", 9).await.unwrap();
    host.exit("b").await;
    assert!(!alive(pid));
}

async fn an_exit_without_a_keeper_is_noticed() {
    let mut host = Host::new();
    host.client.spawn(host.sh("a", "exec sleep 1000")).await.unwrap();
    let pid = host.pid("a").await;
    host.kill_keeper();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    eventually("it ends", async || (!alive(pid)).then_some(())).await;
    host.start();
    assert_eq!(host.exit("a").await.0, None);
    // A record of an earlier boot, whose pid is someone else's now.
    host.kill_keeper();
    let path = host.dir.path().join("state/a.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["ended"] = serde_json::Value::Null;
    record["pid"] = std::process::id().into();
    record["boot"] = "another".into();
    record["logs"] = serde_json::Value::Null;
    std::fs::write(&path, record.to_string()).unwrap();
    std::fs::write(host.dir.path().join("state/torn.json"), "{\"id\":").unwrap();
    host.start();
    assert_eq!(host.exit("a").await.0, None);
    assert_eq!(host.client.list().await.unwrap().len(), 1);
}

async fn a_reexecuted_keeper_stays_the_parent() {
    let host = Host::new();
    let gate = host.dir.path().join("gate");
    let script = format!("printf half; while [ ! -e {} ]; do sleep 0.02; done; echo -whole; exit 42", gate.display());
    host.client.spawn(host.sh("a", &script)).await.unwrap();
    host.client.spawn(host.sh("b", "exit 5")).await.unwrap();
    host.exit("b").await;
    let pid = host.pid("a").await;
    for _ in 0..3 {
        host.client.reexec().await.unwrap();
        assert_eq!(host.pid("a").await, pid);
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(host.keeper_pid() as i32), nix::sys::signal::SIGHUP).unwrap();
    eventually("it answers", async || host.client.list().await.ok()).await;
    assert_eq!(parent(pid), host.keeper_pid());
    std::fs::write(&gate, "").unwrap();
    assert_eq!(host.exit("a").await.0, Some(42));
    assert_eq!(host.exit("b").await.0, Some(5));
    host.line("a", "stdout half-whole").await;
}

async fn an_orphan_of_a_shim_is_adopted() {
    let host = Host::new();
    host.client.spawn(host.shim("a", "orphan", "echo hello; exec sleep 1000")).await.unwrap();
    let pid = host.pid("a").await;
    assert_eq!(parent(pid), host.keeper_pid());
    host.line("a", "stdout hello").await;
    host.client.reexec().await.unwrap();
    assert_eq!(host.pid("a").await, pid);
    host.client.signal("a", 9).await.unwrap();
    assert_eq!(host.exit("a").await.0, Some(137));
    // One that ends before it is known keeps its status all the same.
    for n in 0..20 {
        let id = format!("quick-{n}");
        host.client.spawn(host.shim(&id, "orphan", "exit 9")).await.unwrap();
        assert_eq!(host.exit(&id).await.0, Some(9));
    }
    let error = host.client.spawn(host.shim("b", "fail", "")).await.unwrap_err();
    assert!(matches!(&error, KeepError::Start { message, .. } if message == "there is no such image"), "{error}");
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap()
}

fn null() -> OwnedFd {
    std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

fn read_all(fd: OwnedFd) -> String {
    let mut text = String::new();
    std::fs::File::from(fd).read_to_string(&mut text).unwrap();
    text
}

async fn a_run_has_its_own_streams_and_dies_with_its_client() {
    let host = Host::new();
    let (input, mut writer) = pipe();
    let (reader, output) = pipe();
    nix::unistd::write(&writer, b"from here\n").unwrap();
    writer = null();
    drop(writer);
    let spawn = host.sh("run", "read line; echo got $line; exit 6");
    let code = host.client.run(spawn, [input, output, null()], DEADLINE).await.unwrap();
    assert_eq!((code, read_all(reader).as_str()), (6, "got from here\n"));
    let (reader, output) = pipe();
    let shim = host.shim("run", "orphan", "echo tenant; exit 8");
    assert_eq!(host.client.run(shim, [null(), output, null()], DEADLINE).await.unwrap(), 8);
    assert_eq!(read_all(reader), "tenant\n");

    let pid_file = host.dir.path().join("pid");
    let script = format!("echo $$ > {}; sleep 1000 & wait", pid_file.display());
    let error = host.client.run(host.sh("run", &script), [null(), null(), null()], Duration::from_secs(3)).await;
    assert!(matches!(error, Err(KeepError::Refused(_))), "{error:?}");
    ended(&pid_file).await;
    std::fs::remove_file(&pid_file).unwrap();
    let run = host.client.run(host.sh("run", &script), [null(), null(), null()], DEADLINE);
    let begun = eventually("it begins", async || std::fs::read_to_string(&pid_file).ok()?.trim().parse::<i32>().ok());
    tokio::select! {
        biased;
        _ = run => panic!("it ended by itself"),
        _ = begun => {}
    }
    ended(&pid_file).await;
    assert_eq!(host.client.list().await.unwrap(), [], "a run is not kept");
}

async fn ended(pid_file: &Path) {
    let pid: i32 =
        eventually("the pid is written", async || std::fs::read_to_string(pid_file).ok()?.trim().parse().ok()).await;
    eventually("the command is killed", async || (!alive(pid)).then_some(())).await;
}

async fn a_second_keeper_is_refused() {
    let host = Host::new();
    host.client.spawn(host.sh("a", "exec sleep 1000")).await.unwrap();
    let second = host.command().output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another keeper"), "{second:?}");
    host.pid("a").await;
}

async fn nonsense_is_refused_and_others_are_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let host = Host::new();
    host.client.list().await.unwrap();
    let socket = host.dir.path().join("socket");
    for bytes in [&b"\xff\xff\xff\xffabc"[..], b"\0\0\0\x02{}", b"\0\0\0\x1d{\"version\":99,\"op\":\"list\"}  "] {
        let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.is_empty() || answer.contains("refused"), "{answer}");
    }
    // More clients than there may be, each silent.
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(std::os::unix::net::UnixStream::connect(&socket));
    }
    drop(silent);
    eventually("it serves again", async || host.client.list().await.ok()).await;
}

async fn a_user_gets_no_privileges() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let host = Host::new();
    let script = "id -u; id -G; grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status";
    let spawn = Spawn { user: Some((65534, 65534)), ..host.sh("a", script) };
    host.client.spawn(spawn).await.unwrap();
    for line in ["stdout 65534", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
        host.line("a", line).await;
    }
}

async fn changes_are_told() {
    let mut host = Host::new();
    host.client.spawn(host.sh("a", "exec sleep 1000")).await.unwrap();
    // The first answer stands for all that was before.
    tokio::time::timeout(DEADLINE, host.client.changed()).await.unwrap();
    host.client.signal("a", 9).await.unwrap();
    tokio::time::timeout(DEADLINE, host.client.changed()).await.unwrap();
    host.kill_keeper();
    host.start();
    tokio::time::timeout(DEADLINE, host.client.changed()).await.unwrap();
}
