//! Certificates with short lives: a server, a host and a gateway that joined by tokens, as real processes, renew theirs
//! over the wire before they end, and no connection notices. All of it in a network namespace of its own. Needs root.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/process.rs"]
mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use cloud::{PATIENCE, wait_for};
use process::{Namespace, Process};
use serde_json::Value;

const LIFE: &str = "30s";

struct Fleet {
    dir: tempfile::TempDir,
    namespace: Namespace,
}

impl Fleet {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "a host makes namespaces: run this as root");
        let dir = tempfile::Builder::new().prefix("nexus-renewal-").tempdir().unwrap();
        Self { dir, namespace: Namespace::new(&format!("nxr{}", std::process::id())) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn command(&self, context: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
        command.args(args).env("NEXUS_CONFIG", self.path(context)).env("HOME", self.dir.path());
        command.env_remove("CNX_URL").env_remove("CNX_TOKEN");
        let mut command = self.namespace.command(&command);
        command.stdin(Stdio::null());
        command
    }

    fn start(&self, log: &str, args: &[&str]) -> Process {
        Process::start(self.command("context.json", args), self.path(log))
    }

    fn ok(&self, context: &str, args: &[&str]) -> String {
        let output = self.command(context, args).output().unwrap();
        assert!(output.status.success(), "nexus {}: {output:?}\n{}", args.join(" "), self.logs());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn json(&self, context: &str, args: &[&str]) -> Result<Value, String> {
        let output: Output = self.command(context, &[args, &["-o", "json"]].concat()).output().unwrap();
        serde_json::from_slice(&output.stdout).map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Joins by a new token, as another machine would: without the operator's context.
    fn join(&self, role: &str, name: &str, more: &[&str]) {
        let grant = self.json("context.json", &[role, "token", "--zone", "zone-a"]).unwrap();
        let text = |key: &str| grant[key].as_str().unwrap();
        let (data, api) = (self.text(name), grant["endpoints"][0].as_str().unwrap());
        let mut args = vec![role, "join", "--token", text("token"), "--ca-pin", text("caPin"), "--api", api];
        args.extend(["--name", name, "--data-dir", &data]);
        args.extend(more);
        self.ok("none.json", &args);
    }

    fn wait<T>(&self, what: &str, mut condition: impl FnMut() -> Result<T, String>) -> T {
        wait_for(what, PATIENCE, || condition().map_err(|why| format!("{why}\n{}", self.logs())))
    }

    fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        ["a.log", "b.log", "agent.log", "gateway.log"].map(tail).concat()
    }

    /// Ends of certificates, in the fixed form of RFC 3339 that sorts as time does, as the server of a context tells.
    fn ends(&self, context: &str) -> Result<BTreeMap<String, String>, String> {
        let status = self.json(context, &["status"])?;
        let all = status["certificates"].as_array().ok_or_else(|| status.to_string())?;
        let of = |c: &Value| Some((c["name"].as_str()?.to_owned(), c["not_after"].as_str()?.to_owned()));
        // The region's authority lives for years.
        Ok(all.iter().filter_map(of).filter(|(name, _)| name != "authority").collect())
    }

    /// What the first server measures.
    fn metrics(&self) -> String {
        let mut command = Command::new("/bin/busybox");
        command.args(["wget", "-qO-", "http://127.0.0.1:8453/metrics"]);
        let output = self.namespace.command(&command).output().expect("Debian's busybox-static is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The TCP connections of a process to a port, as pairs of addresses.
    fn connections(&self, process: &Process, port: u16) -> BTreeSet<(String, String)> {
        let mut command = Command::new("ss");
        command.args(["-Htnp", "state", "established"]);
        let output = self.namespace.command(&command).output().expect("iproute2 is installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let of = format!("pid={},", process.0.id());
        let lines = text.lines().filter(|l| l.contains(&of));
        let pairs = lines.filter_map(|l| {
            let mut words = l.split_whitespace().skip(2);
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        });
        pairs.filter(|(_, peer)| peer.ends_with(&format!(":{port}"))).collect()
    }
}

fn now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    nexus_model::Timestamp::from_millis(since.as_millis().try_into().unwrap()).to_string()
}

#[test]
fn who_joined_renews_over_the_wire_and_no_connection_notices() {
    let fleet = Fleet::new();
    let (data, config) = (fleet.text("a"), |name: &str, file: &str| fleet.text(&format!("{name}/{file}")));
    let mut init = vec!["server", "init", "--data-dir", &data, "--name", "a", "--certificate-life", LIFE];
    init.extend(["--wire", "127.0.0.1:7440", "--api-listen", "127.0.0.1:8443"]);
    fleet.ok("context.json", &init);
    // Metrics are read without TLS, on this machine.
    let text = std::fs::read_to_string(fleet.path("a/nexus.toml")).unwrap();
    std::fs::write(fleet.path("a/nexus.toml"), format!("api_http_listen = \"127.0.0.1:8453\"\n{text}")).unwrap();
    let a = fleet.start("a.log", &["server", "--config", &config("a", "nexus.toml")]);
    fleet.wait("the first server", || fleet.json("context.json", &["get", "zones"]).map(drop));

    fleet.join("server", "b", &["--wire", "127.0.0.1:7441", "--api-listen", "127.0.0.1:8444"]);
    let b = fleet.start("b.log", &["server", "--config", &config("b", "nexus.toml")]);
    let run_dir = fleet.text("run");
    std::fs::create_dir(&run_dir).unwrap();
    let metrics = ["--metrics-listen", "127.0.0.1:7451"];
    fleet.join("host", "h", &[&["--wire", "127.0.0.1:7450", "--run-dir", &run_dir], &metrics[..]].concat());
    let _keeper = fleet.start("keeper.log", &["keeper", "--config", &config("h", "keeper.toml")]);
    let agent = fleet.start("agent.log", &["agent", "--config", &config("h", "agent.toml")]);
    fleet.join("gateway", "g", &["--listen", "127.0.0.1:8080"]);
    let gateway = fleet.start("gateway.log", &["gateway", "--config", &config("g", "gateway.toml")]);

    // The second server alone, as a user sees it: its API's certificate must be good at every moment.
    let context = std::fs::read_to_string(fleet.path("context.json")).unwrap();
    assert!(context.contains("127.0.0.1:8443"), "{context}");
    std::fs::write(fleet.path("b.json"), context.replace("127.0.0.1:8443", "127.0.0.1:8444")).unwrap();
    let first = fleet.wait("everyone to have joined, and to be heard by the second server", || {
        let servers = fleet.json("context.json", &["server", "list"])?;
        let members = servers["items"].as_array().into_iter().flatten().filter(|s| s["state"] == "member").count();
        let ends = fleet.ends("b.json")?;
        let all = ["wire", "api", "host h", "gateway g"].iter().all(|name| ends.contains_key(*name));
        if members == 2 && all { Ok(ends) } else { Err(format!("{servers} {ends:?}")) }
    });
    let files = ["a/tls/server.pem", "b/tls/server.pem", "b/tls/api.pem", "h/tls/agent.pem", "g/tls/gateway.pem"];
    let read = |name: &str| std::fs::read_to_string(fleet.path(name)).unwrap();
    let before = files.map(read);

    // Connections that are open all the time: a user's to the second server, and those to either server's wire.
    let watching = Process::start(fleet.command("b.json", &["get", "zones", "-w"]), fleet.path("watch.log"));
    let open = || {
        let wire = |process: &Process| {
            let mut all = fleet.connections(process, 7440);
            all.extend(fleet.connections(process, 7441));
            all
        };
        [wire(&agent), wire(&gateway), fleet.connections(&b, 7440), fleet.connections(&watching, 8444)]
    };
    let opened = fleet.wait("connections", || {
        let open = open();
        let shown = read("watch.log").contains("zone-a");
        if shown && open.iter().all(|c| !c.is_empty()) { Ok(open) } else { Err(format!("{shown} {open:?}")) }
    });

    fleet.wait("every first certificate to have ended, and a later one to be known", || {
        let ends = fleet.ends("b.json")?;
        let later = first.iter().all(|(name, end)| ends.get(name).is_some_and(|newer| newer > end));
        let over = first.values().all(|end| *end < now());
        if later && over { Ok(()) } else { Err(format!("{first:?} {ends:?}")) }
    });
    for (name, before) in files.iter().zip(before) {
        fleet.wait(&format!("{name} to be renewed on disk"), || {
            if read(name) != before { Ok(()) } else { Err("".into()) }
        });
    }
    for (before, (after, who)) in opened.iter().zip(open().iter().zip(["agent", "gateway", "server b", "user"])) {
        assert!(before.intersection(after).next().is_some(), "every connection of {who} broke: {before:?}, {after:?}");
    }

    // Everything works on: a change by the second server reaches whoever watched all the time, and nothing is amiss.
    let zone = "apiVersion: cloudnexus/v1\nkind: Zone\nmetadata: {name: zone-a}\nspec: {displayName: renewed}\n";
    std::fs::write(fleet.path("zone.yaml"), zone).unwrap();
    fleet.ok("b.json", &["apply", "-f", &fleet.text("zone.yaml")]);
    fleet
        .wait("the watcher to be told", || if read("watch.log").contains("renewed") { Ok(()) } else { Err("".into()) });
    fleet.wait("a healthy fleet", || {
        let status = fleet.json("b.json", &["status"])?;
        let good = status["certificates"].as_array().into_iter().flatten().all(|c| c["state"] == "good");
        if good && status["status"] == "healthy" { Ok(()) } else { Err(status.to_string()) }
    });

    assert!(read("b/nexus.toml").contains("certificate_seconds = 30"), "a server that joins signs as the others do");

    // A certificate that nobody renews is told of. With one that has ended a gateway still comes back, and then renews it.
    drop(gateway);
    for said in ["and was not renewed", "ended at"] {
        fleet.wait(&format!("a warning: {said}"), || {
            let status = fleet.json("b.json", &["status"])?;
            let message = status["message"].as_str().unwrap_or_default();
            let told = message.contains("the certificate of gateway g") && message.contains(said);
            if told && status["status"] == "degraded" { Ok(()) } else { Err(status.to_string()) }
        });
    }
    fleet.wait("the metrics to say so", || {
        let text = fleet.metrics();
        let value = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<i64>().ok());
        let told = (value("nexus_gateway_certificates_ending"), value("nexus_host_certificates_ending"));
        let left = value("nexus_host_certificate_seconds_left").is_some_and(|left| left > 0);
        if told == (Some(1), Some(0)) && left { Ok(()) } else { Err(text) }
    });
    let _gateway = fleet.start("gateway.log", &["gateway", "--config", &config("g", "gateway.toml")]);
    fleet.wait("the gateway to be back with a new one", || {
        let status = fleet.json("b.json", &["status"])?;
        if status["status"] == "healthy" { Ok(()) } else { Err(status.to_string()) }
    });

    // The root's key was taken away long ago. Where it is kept, the region gets another authority, and while every server is
    // down for longer than certificates are good, it is put in place. Everyone comes back by themselves.
    let (root, root_key, new) = (fleet.text("a/tls/ca.pem"), fleet.text("vault.key"), fleet.text("new"));
    std::fs::rename(fleet.path("a/root.key"), &root_key).unwrap();
    std::fs::create_dir(&new).unwrap();
    let made = ["ca", "region", "local", "--root", &root, "--root-key", &root_key, "--out", &new];
    fleet.ok("none.json", &made);
    let again = fleet.command("none.json", &made).output().unwrap();
    assert!(!again.status.success(), "an authority is not written over");
    let last = fleet.ends("b.json").unwrap().into_values().max().unwrap();
    drop((a, b));
    fleet.wait("every certificate to have ended", || if last < now() { Ok(()) } else { Err(last.clone()) });
    for name in ["a", "b"] {
        for end in ["pem", "key"] {
            let (from, to) = (format!("new/local.{end}"), format!("{name}/tls/authority.{end}"));
            std::fs::copy(fleet.path(&from), fleet.path(&to)).unwrap();
        }
    }
    let _a = fleet.start("a.log", &["server", "--config", &config("a", "nexus.toml")]);
    let _b = fleet.start("b.log", &["server", "--config", &config("b", "nexus.toml")]);
    fleet.wait("everyone to have certificates by the new authority", || {
        let status = fleet.json("b.json", &["status"])?;
        let good = status["certificates"].as_array().into_iter().flatten().all(|c| c["state"] == "good");
        if good && status["status"] == "healthy" { Ok(()) } else { Err(status.to_string()) }
    });
    let authority = read("new/local.pem");
    let (intermediate, _) = authority.split_at(authority.find("-----END").unwrap());
    for name in files {
        assert!(read(name).contains(intermediate), "{name} is signed by another authority");
    }
}
