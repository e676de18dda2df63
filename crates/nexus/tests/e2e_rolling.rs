//! A rolling restart of everything, one after the other, while users go on: servers, agents, keepers and gateways. No
//! request may fail, and none is tried twice: each is one connection to one gateway. Needs root.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cloud::Cloud;
use serde_json::Value;

const EVERY: Duration = Duration::from_millis(20);
/// Generous: the machine may be busy.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Users who come at a fixed rate, whether those before them were answered or not.
struct Users {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    failures: Arc<Mutex<Vec<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Users {
    fn start(gateways: Vec<SocketAddr>, host: &'static str) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let failures: Arc<Mutex<Vec<String>>> = Arc::default();
        let (ended, counted, failed) = (stop.clone(), sent.clone(), failures.clone());
        let thread = std::thread::spawn(move || {
            let mut running = Vec::new();
            let mut next = Instant::now();
            for n in 0.. {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                let (gateway, failed) = (gateways[n % gateways.len()], failed.clone());
                counted.fetch_add(1, Ordering::SeqCst);
                running.push(std::thread::spawn(move || {
                    let began = Instant::now();
                    if let Err(why) = once(gateway, host, "/") {
                        failed.lock().unwrap().push(format!("{gateway} after {:?}: {why}", began.elapsed()));
                    }
                }));
                running.retain(|r| !r.is_finished());
                next += EVERY;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            for request in running {
                request.join().unwrap();
            }
        });
        Self { stop, sent, failures, thread: Some(thread) }
    }

    /// Fails if any request has failed, until some more have come.
    fn check(&self, after: &str) {
        let until = self.count() + 50;
        while self.count() < until {
            std::thread::sleep(EVERY);
        }
        let failures = self.failures.lock().unwrap();
        let some = &failures[..failures.len().min(5)];
        assert!(failures.is_empty(), "{after}: {} requests of {} failed: {some:#?}", failures.len(), self.count());
    }

    fn count(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    fn finish(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{failures:#?}");
        eprintln!("{} requests, none lost", self.count());
    }
}

/// One request on a connection of its own, tried once.
fn once(address: SocketAddr, host: &str, path: &str) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN).map_err(text)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(text)?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    if answer.starts_with("HTTP/1.1 200 ") {
        return Ok(());
    }
    Err(format!("{:?}", answer.lines().next().unwrap_or("the connection was closed without an answer")))
}

fn restart(cloud: &Cloud, name: &str) {
    let pid = |cloud: &Cloud| member(cloud, name)["pid"].as_i64();
    let before = pid(cloud);
    cloud.ok(&["local", "restart", name]);
    cloud.wait(&format!("{name} to be back"), || match pid(cloud) {
        Some(now) if Some(now) != before => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// The process of a host's keeper, as the machine sees it.
fn keeper_of(cloud: &Cloud, host: &str) -> nix::unistd::Pid {
    let config = cloud.data_dir().join("config").join(host);
    let of = |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = String::from_utf8(std::fs::read(entry.path().join("cmdline")).ok()?).ok()?;
        let words: Vec<&str> = line.split('\0').collect();
        (words.get(1) == Some(&"keeper") && words.iter().any(|w| w.starts_with(config.to_str().unwrap())))
            .then_some(pid)
    };
    let found: Vec<i32> = std::fs::read_dir("/proc").unwrap().flatten().filter_map(of).collect();
    assert_eq!(found.len(), 1, "keepers of {host}: {found:?}");
    nix::unistd::Pid::from_raw(found[0])
}

fn member(cloud: &Cloud, name: &str) -> Value {
    let members = cloud.json(&["local", "list"]);
    members.as_array().unwrap().iter().find(|m| m["name"] == name).unwrap().clone()
}

/// Changes something by the API, at whichever server takes it, again and again; each change must be taken at the
/// first call, because the command line turns to another server by itself.
struct Operator {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Result<u64, String>>>,
}

impl Operator {
    fn start(cloud: &Cloud) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, file, context) = (stop.clone(), cloud.path("zone.yaml"), cloud.path("context.json"));
        let thread = std::thread::spawn(move || {
            let mut n = 0u64;
            while !ended.load(Ordering::SeqCst) {
                let zone = "apiVersion: cloudnexus/v1\nkind: Zone\nmetadata: {name: zone-a}\nspec: {displayName: write";
                std::fs::write(&file, format!("{zone} {n}}}\n")).map_err(|e| e.to_string())?;
                let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
                command.args(["apply", "-f"]).arg(&file).env("NEXUS_CONFIG", &context).stdin(Stdio::null());
                command.env_remove("CNX_URL").env_remove("CNX_TOKEN");
                let output = command.output().map_err(|e| e.to_string())?;
                if !output.status.success() {
                    return Err(format!("write {n}: {}", String::from_utf8_lossy(&output.stderr)));
                }
                n += 1;
            }
            Ok(n)
        });
        Self { stop, thread: Some(thread) }
    }

    fn finish(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let writes = self.thread.take().unwrap().join().unwrap().unwrap();
        eprintln!("{writes} writes, each taken at the first call");
        assert!(writes > 0);
    }
}

#[test]
fn a_rolling_restart_of_everything_loses_no_request() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::nginx(files.path());
    let cloud = Cloud::up(&["--zones", "3", "--hosts-per-zone", "1"]);
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "nginx"]);
    cloud.ok(&["deploy", "web", "--image", "nginx", "--replicas", "3", "--port", "80", "--timeout", "90"]);
    let before = cloud.wait_ready("web", 3);
    let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let gateways: Vec<SocketAddr> = [0, 1].map(|n| address(cloud.gateway_port + n)).to_vec();
    for gateway in &gateways {
        cloud.wait("the app to be reached", || once(*gateway, "web.localhost", "/"));
    }

    let users = Users::start(gateways, "web.localhost");
    let operator = Operator::start(&cloud);
    for server in ["server-a", "server-b", "server-c"] {
        restart(&cloud, server);
        cloud.wait("all servers to answer", || {
            let output = cloud.run(&["status", "-o", "json"]);
            let status: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
            let servers = status["servers"].as_array().cloned().unwrap_or_default();
            let all = servers.len() == 3 && servers.iter().all(|s| s["reachable"] == true);
            if all && status["leader"].is_string() { Ok(()) } else { Err(status.to_string()) }
        });
        users.check(server);
    }
    operator.finish();
    for host in ["zone-a-1", "zone-b-1", "zone-c-1"] {
        cloud.ok(&["local", "restart", &format!("agent@{host}")]);
        cloud.wait_ready("web", 3);
        // The keeper executes its own file again, in the same process; what it owns does not notice.
        let keeper = keeper_of(&cloud, host);
        nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGHUP).unwrap();
        users.check(host);
        assert_eq!(keeper_of(&cloud, host), keeper);
    }
    for (n, gateway) in ["gateway-1", "gateway-2"].into_iter().enumerate() {
        restart(&cloud, gateway);
        let admin = address(cloud.gateway_port + 100 + u16::try_from(n).unwrap());
        cloud.wait("the gateway to be ready", || once(admin, "localhost", "/readyz"));
        users.check(gateway);
    }
    users.finish();
    let life = |i: &Value| format!("{} {}", i["metadata"]["uid"], i["status"]["started"]);
    let lives = |all: &[Value]| {
        let mut lives: Vec<String> = all.iter().map(life).collect();
        lives.sort();
        lives
    };
    assert_eq!(
        lives(&before),
        lives(&cloud.wait_ready("web", 3)),
        "a restart of the control plane touched an instance"
    );
    cloud.down();
}
