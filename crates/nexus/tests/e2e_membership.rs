//! Who belongs to a region, changed by the command line while the region works: servers join by tokens as real
//! processes, one is killed and replaced, too much is refused, hosts join and leave. Needs root.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;
#[path = "e2e/process.rs"]
mod process;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cloud::{Cloud, ports};
use process::{Namespace, Process, ip};
use serde_json::Value;

/// A write may take so long while a leader is replaced and the machine is busy.
const WRITE_WITHIN: Duration = Duration::from_secs(30);

fn free_port(ip: IpAddr) -> SocketAddr {
    TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap()
}

fn servers(cloud: &Cloud) -> Vec<Value> {
    cloud.json(&["server", "list"])["items"].as_array().unwrap().clone()
}

fn names(cloud: &Cloud) -> Vec<String> {
    let mut names: Vec<String> = servers(cloud).iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// The address of the machine on the cloud's own wire.
fn machine(cloud: &Cloud) -> IpAddr {
    let wire = servers(cloud)[0]["wire"].as_str().unwrap().to_owned();
    let address: SocketAddr = wire.trim_start_matches("tcp:").parse().unwrap();
    address.ip()
}

struct Token {
    text: String,
    api: String,
    pin: String,
}

fn token(cloud: &Cloud, role: &str, more: &[&str]) -> Token {
    let mut args = vec![role, "token"];
    args.extend(more);
    let grant = cloud.json(&args);
    let text = |key: &str| grant[key].as_str().unwrap().to_owned();
    Token { text: text("token"), api: grant["endpoints"][0].as_str().unwrap().to_owned(), pin: text("caPin") }
}

/// The command line of a join. Nothing of the operator's is in the environment.
fn join(cloud: &Cloud, role: &str, token: &Token, name: &str, more: &[&str]) -> std::process::Output {
    let dir = cloud.path(name);
    let mut args = vec![role, "join", "--token", &token.text, "--api", &token.api, "--ca-pin", &token.pin];
    args.extend(["--name", name, "--data-dir", dir.to_str().unwrap()]);
    args.extend(more);
    let mut command = cloud.command(&args);
    command.env("NEXUS_CONFIG", cloud.path("none.json")).output().unwrap()
}

fn refused(output: &std::process::Output, why: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it was let in");
    assert!(text.contains(why), "{text}");
}

/// A server of the test's own: joined, and running.
fn start_server(cloud: &Cloud, name: &str, zone: &str) -> Process {
    let token = token(cloud, "server", &["--zone", zone]);
    let wire = free_port(machine(cloud)).to_string();
    let api = format!("127.0.0.1:{}", ports::one());
    let output = join(cloud, "server", &token, name, &["--wire", &wire, "--api-listen", &api]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    run_server(cloud, name)
}

fn run_server(cloud: &Cloud, name: &str) -> Process {
    let config = cloud.path(name).join("nexus.toml");
    let command = cloud.command(&["server", "--config", config.to_str().unwrap()]);
    Process::start(command, cloud.path(&format!("{name}.log")))
}

fn wait_members(cloud: &Cloud, wanted: &[&str]) {
    cloud.wait(&format!("the servers to be {wanted:?}"), || {
        let output = cloud.run(&["server", "list", "-o", "json"]);
        let list: Value =
            serde_json::from_slice(&output.stdout).map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let mut members: Vec<&str> = items
            .iter()
            .filter(|s| s["state"] == "member" && s["voter"] == true)
            .filter_map(|s| s["name"].as_str())
            .collect();
        members.sort_unstable();
        let all = items.len() == wanted.len() && members == wanted;
        if all { Ok(()) } else { Err(format!("{list:#}")) }
    });
}

/// Writes without a pause; each must be acknowledged in time, however often it has to be sent.
struct Writes {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl Writes {
    fn start(cloud: &Cloud) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), done.clone());
        let file = cloud.path("zone.yaml");
        let context = cloud.path("context.json");
        let thread = std::thread::spawn(move || {
            let mut n = 0u64;
            while !stopped.load(Ordering::SeqCst) {
                n += 1;
                let text = format!(
                    "apiVersion: cloudnexus/v1\nkind: Zone\nmetadata: {{name: zone-a}}\nspec: {{displayName: write {n}}}\n"
                );
                std::fs::write(&file, text).map_err(|e| e.to_string())?;
                let began = Instant::now();
                loop {
                    let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
                    command.args(["apply", "-f"]).arg(&file).env("NEXUS_CONFIG", &context);
                    command.env_remove("CNX_URL").env_remove("CNX_TOKEN");
                    let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
                    if output.status.success() {
                        break;
                    }
                    if began.elapsed() > WRITE_WITHIN {
                        let why = String::from_utf8_lossy(&output.stderr).into_owned();
                        return Err(format!("write {n} was not taken within {WRITE_WITHIN:?}: {why}"));
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        Self { stop, done, thread: Some(thread) }
    }

    fn finish(mut self, cloud: &Cloud) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap().unwrap();
        let n = self.done.load(Ordering::SeqCst);
        eprintln!("{n} writes were acknowledged meanwhile");
        assert!(n > 0);
        let zone = cloud.list("zones").into_iter().find(|z| z["metadata"]["name"] == "zone-a").unwrap();
        assert_eq!(zone["spec"]["displayName"], format!("write {n}"), "the last write that was acknowledged");
    }
}

#[test]
fn servers_and_hosts_come_and_go_while_the_region_works() {
    let cloud = Cloud::up(&["--zones", "3", "--hosts-per-zone", "1"]);
    wait_members(&cloud, &["server-a", "server-b", "server-c"]);
    who_may_not_join_changes_nothing(&cloud);

    let writes = Writes::start(&cloud);
    let d = start_server(&cloud, "server-d", "zone-a");
    let e = start_server(&cloud, "server-e", "zone-b");
    wait_members(&cloud, &["server-a", "server-b", "server-c", "server-d", "server-e"]);

    cloud.ok(&["local", "kill", "server-c"]);
    let f = start_server(&cloud, "server-f", "zone-c");
    cloud.ok(&["server", "replace", "server-c", "--with", "server-f"]);
    wait_members(&cloud, &["server-a", "server-b", "server-d", "server-e", "server-f"]);
    writes.finish(&cloud);
    everyone_learns_of_them(&cloud);
    what_would_lose_the_quorum_is_refused(&cloud, e);
    a_host_joins_and_leaves(&cloud);
    a_host_is_emptied_before_it_leaves(&cloud);
    drop((d, f));
    cloud.down();
}

fn who_may_not_join_changes_nothing(cloud: &Cloud) {
    let before = names(cloud);
    let wire = free_port(machine(cloud)).to_string();
    let api = format!("127.0.0.1:{}", ports::one());
    let more = ["--wire", wire.as_str(), "--api-listen", &api];
    let good = token(cloud, "server", &["--zone", "zone-a"]);

    let garbage = Token { text: "cnx_garbage".into(), api: good.api.clone(), pin: good.pin.clone() };
    refused(&join(cloud, "server", &garbage, "server-x", &more), "no join token");
    let zeros = Token { text: format!("cnx_{}", "A".repeat(43)), ..garbage };
    refused(&join(cloud, "server", &zeros, "server-x", &more), "not known");
    let other = Token { text: good.text.clone(), api: good.api.clone(), pin: format!("sha256:{}", "0".repeat(64)) };
    refused(&join(cloud, "server", &other, "server-x", &more), "not the cluster that the token is of");
    let host = token(cloud, "host", &[]);
    refused(&join(cloud, "server", &host, "server-x", &more), "lets a host join");
    refused(&join(cloud, "server", &good, "server-a", &more), "is a member already");
    let elsewhere = [&more[..], &["--zone", "zone-b"]].concat();
    refused(&join(cloud, "server", &good, "server-x", &elsewhere), "for zone zone-a");
    let short = token(cloud, "server", &["--zone", "zone-a", "--ttl", "1s"]);
    std::thread::sleep(Duration::from_millis(1100));
    refused(&join(cloud, "server", &short, "server-x", &more), "expired");
    let (code, why) = cloud.fails(&["server", "token", "--ttl", "8d"]);
    assert!(code == 1 && why.contains("ttlSeconds"), "{code} {why}");

    let revoked = token(cloud, "server", &["--zone", "zone-a"]);
    let ids = cloud.json(&["join-token", "list"]);
    let ids: Vec<&str> = ids["items"].as_array().unwrap().iter().filter_map(|t| t["id"].as_str()).collect();
    assert_eq!(ids.len(), 3, "one for the host, two for servers: {ids:?}");
    assert!(!cloud.ok(&["join-token", "list"]).contains(&revoked.text), "a token's text is told once");
    for id in ids {
        cloud.ok(&["join-token", "revoke", id]);
    }
    refused(&join(cloud, "server", &revoked, "server-x", &more), "not known");

    // A good one lets in one machine, which may ask again; not a second one.
    let once = token(cloud, "server", &["--zone", "zone-a"]);
    let joined = |name: &str| join(cloud, "server", &once, name, &more);
    assert!(joined("server-x").status.success());
    let config = || std::fs::read_to_string(cloud.path("server-x/nexus.toml")).unwrap();
    let first = config();
    refused(&joined("server-x"), "has joined before");
    std::fs::remove_file(cloud.path("server-x/nexus.toml")).unwrap();
    assert!(joined("server-x").status.success(), "a retry with the same key");
    assert_eq!(config(), first, "gets the same answer");
    refused(&joined("server-y"), "not known");
    assert!(!cloud.path("server-y/nexus.toml").exists());
    cloud.ok(&["server", "remove", "server-x"]);
    assert_eq!(names(cloud), before);
}

/// Hosts and gateways know the servers that came, and go on without those that went.
fn everyone_learns_of_them(cloud: &Cloud) {
    let wires: Vec<String> = servers(cloud).iter().map(|s| s["wire"].as_str().unwrap().to_owned()).collect();
    for member in ["zone-a-1", "gateway-1"] {
        let path = cloud.data_dir().join("data").join(member).join("servers");
        cloud.wait(&format!("{member} to know all servers"), || {
            let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            let known: Vec<&str> = text.lines().skip(1).collect();
            let same = known.len() == wires.len() && wires.iter().all(|w| known.contains(&w.as_str()));
            if same { Ok(()) } else { Err(format!("{known:?}, not {wires:?}")) }
        });
    }
}

fn what_would_lose_the_quorum_is_refused(cloud: &Cloud, e: Process) {
    drop(e);
    cloud.ok(&["local", "kill", "server-b"]);
    cloud.wait("their silence to be noticed", || {
        let output = cloud.run(&["server", "list", "-o", "json"]);
        let list: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
        let silent = list["items"].as_array().unwrap().iter().filter(|s| s["reachable"] == false).count();
        if silent == 2 { Ok(()) } else { Err(list.to_string()) }
    });
    let (code, why) = cloud.fails(&["server", "remove", "server-d"]);
    assert!(code == 4 && why.contains("must answer"), "{code} {why}");
    let (code, _) = cloud.fails(&["server", "remove", "server-z"]);
    assert_eq!(code, 3);
    cloud.ok(&["local", "start", "server-b"]);
    cloud.wait("server-b to be back", || {
        let back = servers(cloud).iter().any(|s| s["name"] == "server-b" && s["reachable"] == true);
        if back { Ok(()) } else { Err("not reachable".into()) }
    });
    cloud.ok(&["server", "remove", "server-e"]);
    wait_members(cloud, &["server-a", "server-b", "server-d", "server-f"]);
}

/// A network namespace on the cloud's wire.
fn on_the_wire(cloud: &Cloud, address: IpAddr) -> Namespace {
    let plan = std::fs::read_to_string(cloud.data_dir().join("nexus-cloud.json")).unwrap();
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let id = plan["cluster_id"].as_str().unwrap().trim_start_matches("cnx-").to_owned();
    let namespace = Namespace::new(&format!("nxt{}", &id[..6]));
    let (name, bridge) = (namespace.name(), format!("x{}br0", &id[..3]));
    let (outside, inside) = (format!("y{}o", &id[..6]), format!("y{}i", &id[..6]));
    ip(&["link", "add", &outside, "type", "veth", "peer", "name", &inside, "netns", name]);
    ip(&["link", "set", &outside, "master", &bridge, "up"]);
    ip(&["-n", name, "link", "set", &inside, "up"]);
    ip(&["-n", name, "addr", "add", &format!("{address}/64"), "dev", &inside, "nodad"]);
    namespace
}

fn a_host_joins_and_leaves(cloud: &Cloud) {
    let IpAddr::V6(machine) = machine(cloud) else { panic!("the wire is IPv6") };
    let mut segments = machine.segments();
    segments[7] = 0x1f0;
    let address = std::net::Ipv6Addr::from(segments);
    let namespace = on_the_wire(cloud, address.into());
    let token = token(cloud, "host", &["--zone", "zone-b"]);
    let run_dir = cloud.path("run");
    let wire = format!("[{address}]:7450");
    let more = ["--wire", &wire, "--run-dir", run_dir.to_str().unwrap()];
    let output = join(cloud, "host", &token, "extra-1", &more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    refused(&join(cloud, "host", &token, "extra-2", &more), "not known");

    std::fs::create_dir_all(&run_dir).unwrap();
    let start = |role: &str| {
        let config = cloud.path("extra-1").join(format!("{role}.toml"));
        let command = namespace.command(&cloud.command(&[role, "--config", config.to_str().unwrap()]));
        Process::start(command, cloud.path(&format!("extra-1-{role}.log")))
    };
    let (keeper, agent) = (start("keeper"), start("agent"));
    let host = |name: &str| cloud.list("hosts").into_iter().find(|h| h["metadata"]["name"] == name);
    let joined = cloud.wait("the host to be ready", || match host("extra-1") {
        Some(host) if host["status"]["state"] == "ready" => Ok(host),
        other => {
            let log = std::fs::read_to_string(cloud.path("extra-1-agent.log")).unwrap_or_default();
            Err(format!("{other:?}\n{log}"))
        }
    });
    assert_eq!((&joined["spec"]["zone"], &joined["spec"]["cell"]), (&"zone-b".into(), &"zone-b-cell-1".into()));
    let prefixes = |key: &str| -> Vec<String> {
        cloud.list("hosts").iter().map(|h| h["spec"][key].as_str().unwrap().to_owned()).collect()
    };
    for key in ["prefix6", "prefix4", "address"] {
        let mut all = prefixes(key);
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4, "two hosts share a {key}: {all:?}");
    }

    cloud.ok(&["host", "leave", "extra-1"]);
    assert!(host("extra-1").is_none());
    // Its agent runs on and reports every second, and is not heard: the host does not come back.
    std::thread::sleep(Duration::from_secs(2));
    assert!(host("extra-1").is_none());
    drop((agent, keeper));
    let (code, _) = cloud.fails(&["host", "leave", "extra-1"]);
    assert_eq!(code, 3);
}

/// Instances on a host, those that are being stopped too.
fn on_host(cloud: &Cloud, name: &str) -> u64 {
    host(cloud, name).expect("the host is there")["status"]["reserved"]["instances"].as_u64().unwrap()
}

fn host(cloud: &Cloud, name: &str) -> Option<Value> {
    cloud.list("hosts").into_iter().find(|h| h["metadata"]["name"] == name)
}

fn is_cordoned(cloud: &Cloud, name: &str) -> (bool, bool) {
    let spec = &host(cloud, name).unwrap()["spec"];
    (spec["cordoned"] == true, spec["draining"] == true)
}

fn a_host_is_emptied_before_it_leaves(cloud: &Cloud) {
    let layout = images::busybox(&cloud.path(""));
    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "web"]);
    // Each host has room for one.
    let capacity = host(cloud, "zone-a-1").unwrap()["spec"]["capacity"]["cpu"].as_str().unwrap().to_owned();
    let millis = match capacity.strip_suffix('m') {
        Some(millis) => millis.parse::<u32>().unwrap(),
        None => capacity.parse::<u32>().unwrap() * 1000,
    };
    let cpu = format!("{}m", millis * 2 / 3);
    let mut deploy = vec!["deploy", "big", "--image", "web", "--replicas", "3", "--port", "80"];
    deploy.extend(["--cpu", &cpu, "--timeout", "90"]);
    cloud.ok(&deploy);
    cloud.wait_ready("big", 3);
    assert!(["zone-a-1", "zone-b-1", "zone-c-1"].iter().all(|name| on_host(cloud, name) == 1), "one on each");

    // With nowhere to go it says what it waits for; Ctrl-C leaves the host cordoned, with what it has.
    let log = cloud.path("leave.log");
    let mut leaving = Process::start(cloud.command(&["host", "leave", "zone-a-1"]), log.clone());
    let says = || std::fs::read_to_string(&log).unwrap();
    cloud.wait("it to say what blocks it", || {
        let said = says();
        if said.contains("app default/big") && said.contains("no host of 3 can take it") { Ok(()) } else { Err(said) }
    });
    assert_eq!(is_cordoned(cloud, "zone-a-1"), (true, true));
    let pid = nix::unistd::Pid::from_raw(leaving.0.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = leaving.0.wait().unwrap();
    let said = says();
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.contains("host zone-a-1 stays cordoned") && said.contains("nexus host uncordon zone-a-1"), "{said}");
    assert_eq!(is_cordoned(cloud, "zone-a-1"), (true, false));
    cloud.wait_ready("big", 3);
    assert_eq!(on_host(cloud, "zone-a-1"), 1, "what ran there runs on");

    // With room for it, the host is emptied and goes; those who use the app always have two.
    cloud.ok(&["scale", "big", "--replicas", "2", "--timeout", "90"]);
    cloud.wait_ready("big", 2);
    cloud.ok(&["host", "leave", "zone-a-1", "--timeout", "90s"]);
    assert!(host(cloud, "zone-a-1").is_none());
    let on: Vec<Value> = cloud.wait_ready("big", 2).iter().map(|i| i["status"]["host"].clone()).collect();
    assert!(on.contains(&"zone-b-1".into()) && on.contains(&"zone-c-1".into()), "{on:?}");

    let (code, why) = cloud.fails(&["host", "leave", "zone-b-1", "--timeout", "1s"]);
    assert!(code == 5 && why.contains("not empty after 1 s") && why.contains("stays cordoned"), "{code} {why}");
    cloud.ok(&["host", "uncordon", "zone-b-1"]);
    assert_eq!(is_cordoned(cloud, "zone-b-1"), (false, false));

    // By force it goes at once, and what it had is named; it is started again where there is room.
    let lost = cloud.instances("big").into_iter().find(|i| i["status"]["host"] == "zone-b-1").unwrap();
    let output = cloud.run(&["host", "leave", "zone-b-1", "--force"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let named = format!("default/{}", lost["metadata"]["name"].as_str().unwrap());
    assert!(said.contains("Lost: 1 instances") && said.contains(&named), "{said}");
    assert!(host(cloud, "zone-b-1").is_none());
    cloud.ok(&["scale", "big", "--replicas", "1", "--timeout", "90"]);
    let left = cloud.wait_ready("big", 1);
    assert_eq!(left[0]["status"]["host"], "zone-c-1");
}
