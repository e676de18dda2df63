//! The local cloud's life, with the real binary: up, kill, stop, cut, crash, adopt, down. Needs root.
//!
//! What the roles do is not the matter here, only that their processes, hosts and links come, stay and go.

#[path = "e2e/ports.rs"]
mod ports;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Generous: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cloud in a folder of its own, purged when the test ends, however it ends.
struct Cloud {
    temp: tempfile::TempDir,
    api_port_base: u16,
}

impl Cloud {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make namespaces: run them as root");
        Self { temp: tempfile::tempdir().unwrap(), api_port_base: ports::range(400) }
    }

    fn dir(&self) -> std::path::PathBuf {
        self.temp.path().join("cloud")
    }

    fn nexus(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
        command.args(arguments).arg("--data-dir").arg(self.dir());
        command
            .env("NEXUS_CONFIG", self.temp.path().join("context.json"))
            .env_remove("CNX_URL")
            .env_remove("CNX_TOKEN");
        command.output().unwrap()
    }

    fn up(&self) -> Output {
        let (api, gateway) = (self.api_port_base.to_string(), (self.api_port_base + 200).to_string());
        let arguments = ["up", "--detach", "--timeout", "1", "--zones", "1", "--hosts-per-zone", "2"];
        let ports = ["--api-port-base", &api, "--gateway-port-base", &gateway];
        self.nexus(&[&arguments[..], &ports[..]].concat())
    }

    /// Started, though maybe not yet ready.
    fn start(&self) {
        let _turn = ports::starting();
        let output = self.up();
        assert!(matches!(output.status.code(), Some(0 | 5)), "{output:?}");
        self.until("both hosts run", |c| c.state("zone-a-1") == "running" && c.state("zone-a-2") == "running");
    }

    fn local(&self, arguments: &[&str]) {
        let output = self.nexus(&[&["local"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }

    fn member(&self, name: &str) -> Value {
        let output = self.nexus(&["local", "list", "-o", "json"]);
        assert!(output.status.success(), "{output:?}");
        let members: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        members.into_iter().find(|m| m["name"] == name).unwrap()
    }

    fn state(&self, name: &str) -> String {
        self.member(name)["state"].as_str().unwrap().to_owned()
    }

    fn pid(&self, name: &str) -> Option<i64> {
        self.member(name)["pid"].as_i64()
    }

    fn plan(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir().join("nexus-cloud.json")).unwrap()).unwrap()
    }

    fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "in vain: {what}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn logs(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.dir().join("logs").join(name)).unwrap_or_default();
        ["supervisor.log", "zone-a-1.log", "zone-a-2.log"].map(|n| format!("--- {n}\n{}", read(n))).concat()
    }

    /// Pids of processes whose command line has the role and the cloud's folder.
    fn pids(&self, role: &str, path: &str) -> BTreeSet<i32> {
        let wanted = format!("{}{path}", self.dir().display());
        let pid_of = |entry: std::fs::DirEntry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let line = String::from_utf8(std::fs::read(entry.path().join("cmdline")).ok()?).ok()?;
            let words: Vec<&str> = line.split('\0').collect();
            let fits = words.get(1) == Some(&role) && words.iter().any(|w| w.starts_with(&wanted));
            fits.then_some(pid)
        };
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(pid_of).collect()
    }

    /// Everything of the cloud that the machine can show.
    fn traces(&self, plan: &Value) -> Vec<String> {
        let id = plan["cluster_id"].as_str().unwrap().strip_prefix("cnx-").unwrap().to_owned();
        let mut found = Vec::new();
        for role in ["server", "gateway", "host-init", "agent", "keeper", "local-supervise"] {
            found.extend(self.pids(role, "").iter().map(|pid| format!("{role} {pid}")));
        }
        let prefix = format!("x{}", &id[..3]);
        for link in std::fs::read_dir("/sys/class/net").unwrap().flatten() {
            let name = link.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                found.push(format!("link {name}"));
            }
        }
        let group = format!("nexus-{id}");
        let folders = std::iter::once(Path::new("/sys/fs/cgroup").to_owned())
            .chain(std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path()));
        found.extend(folders.map(|f| f.join(&group)).filter(|f| f.exists()).map(|f| format!("cgroup {}", f.display())));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir().to_string_lossy().into_owned();
        found.extend(mounts.lines().filter(|m| m.contains(&dir)).map(|m| format!("mount {m}")));
        let third: Vec<&str> = plan["prefix48"].as_str().unwrap().trim_end_matches("::").split(':').collect();
        let routes = std::fs::read_to_string("/proc/net/ipv6_route").unwrap();
        let hex: String = third.iter().map(|g| format!("{g:0>4}")).collect();
        found.extend(routes.lines().filter(|r| r.starts_with(&hex)).map(|r| format!("route {r}")));
        found
    }

    /// Whether the host's address answers at all: a refusal comes from a living kernel.
    fn reachable(&self) -> bool {
        let address = self.member("zone-a-1")["address"].as_str().unwrap().to_owned();
        let address: SocketAddr = format!("[{address}]:1").parse().unwrap();
        match TcpStream::connect_timeout(&address, Duration::from_millis(500)) {
            Ok(_) => true,
            Err(e) => e.kind() == ErrorKind::ConnectionRefused,
        }
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if self.dir().exists() {
            let output = self.nexus(&["down", "--purge"]);
            if !output.status.success() && !std::thread::panicking() {
                panic!("{output:?}");
            }
        }
    }
}

fn kill_9(pid: i64) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn what_is_killed_comes_back_and_what_is_stopped_stays_down() {
    let cloud = Cloud::new();
    cloud.start();

    let before = cloud.pid("zone-a-1").unwrap();
    kill_9(before);
    cloud.until("the killed host is back", |c| c.pid("zone-a-1").is_some_and(|p| p != before));

    cloud.local(&["kill", "zone-a-1"]);
    assert_eq!(cloud.state("zone-a-1"), "stopped");
    let neighbour = cloud.pid("zone-a-2").unwrap();
    cloud.local(&["restart", "zone-a-2"]);
    cloud.until("the restarted host is back", |c| c.pid("zone-a-2").is_some_and(|p| p != neighbour));
    assert_eq!(cloud.state("zone-a-1"), "stopped", "while others come and go");

    cloud.local(&["start", "zone-a-1"]);
    cloud.until("the started host runs", |c| c.state("zone-a-1") == "running");

    cloud.local(&["stop", "gateway-1"]);
    assert_eq!(cloud.state("gateway-1"), "stopped");
    cloud.start();
    assert_ne!(cloud.state("gateway-1"), "stopped", "`up` starts what was stopped");

    let unknown = cloud.nexus(&["local", "kill", "zone-q-9"]);
    assert_eq!(unknown.status.code(), Some(3), "{unknown:?}");
}

#[test]
fn a_host_is_one_piece_and_looks_after_its_daemons() {
    let cloud = Cloud::new();
    cloud.start();
    let keepers = |c: &Cloud| c.pids("keeper", "/config/zone-a-1/");
    let agents = |c: &Cloud| c.pids("agent", "/config/zone-a-1/");
    let host = cloud.pid("zone-a-1").unwrap();
    let log = |c: &Cloud| std::fs::read_to_string(c.dir().join("logs/zone-a-1.log")).unwrap_or_default();
    cloud.until("an agent was started", |c| log(c).contains("started the agent"));
    cloud.until("a killed agent was started again", |c| {
        for pid in agents(c) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).ok();
        }
        log(c).matches("started the agent").count() > 1
    });
    assert_eq!(cloud.pid("zone-a-1"), Some(host), "the host is the same");

    cloud.local(&["kill", "zone-a-1"]);
    assert!(agents(&cloud).is_empty() && keepers(&cloud).is_empty(), "all of a host ends with it");
}

#[test]
fn a_cut_cable_lets_nothing_through_until_it_is_healed() {
    let cloud = Cloud::new();
    cloud.start();
    cloud.until("the host answers", Cloud::reachable);
    cloud.local(&["cut", "zone-a-1"]);
    assert!(!cloud.reachable());

    let before = cloud.pid("zone-a-1").unwrap();
    kill_9(before);
    cloud.until("the host is back", |c| c.pid("zone-a-1").is_some_and(|p| p != before));
    cloud.until("it has seen its new link", |c| {
        let log = std::fs::read_to_string(c.dir().join("logs/zone-a-1.log")).unwrap();
        log.matches("started the keeper").count() > 1
    });
    cloud.until("the new link is cut as well", |c| !c.reachable());

    cloud.local(&["heal", "zone-a-1"]);
    cloud.until("the host answers again", Cloud::reachable);
    let server = cloud.nexus(&["local", "cut", "server-a"]);
    assert_eq!(server.status.code(), Some(2), "{server:?}");
}

#[test]
fn a_new_supervisor_adopts_what_runs_and_down_leaves_nothing() {
    let cloud = Cloud::new();
    cloud.start();
    let plan = cloud.plan();
    let hosts = [cloud.pid("zone-a-1"), cloud.pid("zone-a-2")];
    let supervisor = cloud.pids("local-supervise", "");
    assert_eq!(supervisor.len(), 1);

    cloud.start();
    assert_eq!(cloud.pids("local-supervise", ""), supervisor, "`up` twice is fine");

    kill_9(i64::from(*supervisor.first().unwrap()));
    cloud.until("the supervisor is dead", |c| c.pids("local-supervise", "").is_empty());
    assert_eq!([cloud.pid("zone-a-1"), cloud.pid("zone-a-2")], hosts, "members outlive their supervisor");
    cloud.start();
    assert_eq!([cloud.pid("zone-a-1"), cloud.pid("zone-a-2")], hosts, "and are adopted by the next");
    kill_9(hosts[0].unwrap());
    cloud.until("an adopted host is looked after", |c| c.pid("zone-a-1").is_some_and(|p| Some(p) != hosts[0]));

    // Also after a crash of everything that could clean up.
    for pid in cloud.pids("local-supervise", "") {
        kill_9(pid.into());
    }
    assert!(!cloud.traces(&plan).is_empty());
    let output = cloud.nexus(&["down"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(cloud.traces(&plan), Vec::<String>::new());

    // Stopped, it keeps its identity; purged, it is gone.
    cloud.start();
    assert_eq!(cloud.plan(), plan);
    let output = cloud.nexus(&["down", "--purge"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(cloud.traces(&plan), Vec::<String>::new());
    assert!(!cloud.dir().exists() && !cloud.temp.path().join("context.json").exists());
}

#[test]
fn what_stands_in_the_way_is_said_at_once() {
    let cloud = Cloud::new();
    let api = TcpListener::bind(("127.0.0.1", cloud.api_port_base)).unwrap();
    let gateway = TcpListener::bind(("127.0.0.1", cloud.api_port_base + 201)).unwrap();
    let output = cloud.up();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    for listener in [&api, &gateway] {
        assert!(text.contains(&format!("port {}", listener.local_addr().unwrap().port())), "{text}");
    }
    assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
    assert!(!cloud.dir().exists(), "a refused start leaves no folder");

    std::fs::create_dir(cloud.dir()).unwrap();
    std::fs::write(cloud.dir().join("nexus-cloud.json"), r#"{"format": 99, "version": "9.9.9"}"#).unwrap();
    let output = cloud.up();
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("9.9.9"), "{output:?}");
    std::fs::remove_dir_all(cloud.dir()).unwrap();
}
