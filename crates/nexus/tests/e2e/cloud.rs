//! A local cloud under test: the real binary, in a folder and on ports of its own, driven by its command line.

#[path = "ports.rs"]
pub mod ports;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything that is waited for may take. Generous: the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub struct Cloud {
    dir: tempfile::TempDir,
    pub api_port: u16,
    pub gateway_port: u16,
}

impl Cloud {
    /// Starts a cloud and waits until it is ready.
    pub fn up(args: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("nexus-e2e-").tempdir().unwrap();
        // As many as several regions need.
        let api_port = ports::range(100);
        let gateway_port = loop {
            let port = ports::range(150);
            if port.abs_diff(api_port) >= 300 {
                break port;
            }
        };
        let cloud = Self { dir, api_port, gateway_port };
        let _turn = ports::starting();
        cloud.start(args);
        cloud
    }

    /// `nexus up`, also when it is up already.
    pub fn start(&self, args: &[&str]) {
        let (api, gateway) = (self.api_port.to_string(), self.gateway_port.to_string());
        let mut all = vec!["up", "--detach", "--api-port-base", &api, "--gateway-port-base", &gateway];
        all.extend(args);
        self.ok(&all);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path("data")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
        command.args(args).stdin(Stdio::null());
        command.env("NEXUS_CONFIG", self.path("context.json")).env("HOME", self.dir.path());
        command.env_remove("CNX_URL").env_remove("CNX_TOKEN");
        if matches!(args[0], "up" | "down" | "local") {
            command.arg("--data-dir").arg(self.data_dir());
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed; answers its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "nexus {}: {}\n{out}\n{err}", args.join(" "), output.status);
        out.into_owned()
    }

    /// Runs a command that must fail; answers its exit code and standard error.
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        assert!(!output.status.success(), "nexus {} succeeded", args.join(" "));
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("nexus {}: {e}: {text}", all.join(" ")))
    }

    /// The objects of a kind.
    pub fn list(&self, kind: &str) -> Vec<Value> {
        let list = self.json(&["get", kind]);
        list["items"].as_array().unwrap_or_else(|| panic!("{list}")).clone()
    }

    /// The living instances of an app.
    pub fn instances(&self, app: &str) -> Vec<Value> {
        self.list("instances").into_iter().filter(|i| i["spec"]["app"] == app).collect()
    }

    /// Waits until `condition` answers `Ok`; fails with its last reason.
    pub fn wait<T>(&self, what: &str, condition: impl FnMut() -> Result<T, String>) -> T {
        wait_for(what, PATIENCE, condition)
    }

    /// Waits until an app has so many ready instances, and answers them.
    pub fn wait_ready(&self, app: &str, replicas: usize) -> Vec<Value> {
        self.wait(&format!("{app} to have {replicas} ready instances"), || {
            let output = self.run(&["get", "instances", "-o", "json"]);
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned());
            }
            let list: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
            let all = list["items"].as_array().cloned().unwrap_or_default();
            let mine: Vec<Value> = all.into_iter().filter(|i| i["spec"]["app"] == app).collect();
            let ready: Vec<Value> = mine.iter().filter(|i| i["status"]["ready"] == true).cloned().collect();
            if ready.len() == replicas && mine.len() == replicas {
                Ok(ready)
            } else {
                Err(format!("{} of {} ready: {mine:#?}", ready.len(), mine.len()))
            }
        })
    }

    pub fn gateway(&self, n: u16) -> String {
        format!("http://127.0.0.1:{}", self.gateway_port + n)
    }

    /// The name of the leading server.
    pub fn leader(&self) -> String {
        self.wait("a leader", || {
            let output = self.run(&["status", "-o", "json"]);
            let status: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
            status["leader"].as_str().map(str::to_owned).ok_or_else(|| status.to_string())
        })
    }

    /// Ends the cloud and checks that nothing of it is left on the machine.
    pub fn down(self) {
        let id = self.cluster_id();
        self.ok(&["down", "--purge"]);
        assert!(!self.data_dir().exists(), "the data folder was not purged");
        let dir = self.dir.path().to_str().unwrap().to_owned();
        let left = leftovers(&dir, &id);
        assert!(left.is_empty(), "left behind: {left:#?}");
    }

    fn cluster_id(&self) -> String {
        let text = std::fs::read_to_string(self.data_dir().join("nexus-cloud.json")).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        let id = value["cluster_id"].as_str().or(value["clusterId"].as_str());
        id.unwrap_or_else(|| panic!("no cluster id in {text}")).to_owned()
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if self.data_dir().exists() {
            if std::thread::panicking() {
                show_logs(&self.data_dir().join("logs"));
            }
            let _ = self.run(&["down", "--purge"]);
        }
    }
}

/// The ends of all logs, for a failed run.
fn show_logs(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(25)..].join("\n");
        eprintln!("--- {}\n{tail}", path.display());
    }
}

/// Processes, mounts, cgroups and links that name a cloud's folder or cluster.
fn leftovers(dir: &str, cluster_id: &str) -> Vec<String> {
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let own = entry.file_name().to_str() == Some(&std::process::id().to_string());
        if command.contains(dir) && !own {
            left.push(format!("process {command}"));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    left.extend(mounts.lines().filter(|l| l.contains(dir)).map(|l| format!("mount {l}")));
    let short = cluster_id.trim_start_matches("cnx-");
    for name in ["/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/pids"] {
        for entry in std::fs::read_dir(name).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(short) {
                left.push(format!("cgroup {}", entry.path().display()));
            }
        }
    }
    for entry in std::fs::read_dir("/sys/class/net").unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("x{}", &short[..3])) {
            left.push(format!("link {}", entry.file_name().to_string_lossy()));
        }
    }
    left
}

/// Waits until `condition` answers `Ok`; fails with its last reason when the patience ends.
pub fn wait_for<T>(what: &str, patience: Duration, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(why) if started.elapsed() > patience => panic!("waited {patience:?} for {what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
