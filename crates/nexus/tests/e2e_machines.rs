//! Real machines, as an operator makes them: the commands of `docs/guide/real-machines.md` and
//! `docs/guide/metadata-engines.md` on three addresses of one network namespace, a fleet that goes to etcd and back, and a
//! region whose first server is lost before it began. Needs root.
//!
//! A stand-in for systemd starts what the units say; what only systemd can do (sockets, confinement) is left to it.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[cfg(feature = "etcd")]
#[path = "../../store/tests/common/etcd.rs"]
mod cluster;
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/process.rs"]
mod process;

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

use cloud::{PATIENCE, ports, wait_for};
use guide::Block;
use process::{Namespace, Process, ip};
use serde_json::Value;

/// Machines that share an operator, each with a folder of its own in place of `/`.
struct Machines {
    /// Ended before their folders and their network go.
    running: Mutex<Vec<(String, Process)>>,
    /// Where all of them are, if not in the test's own.
    namespace: Option<Namespace>,
    dir: tempfile::TempDir,
}

impl Machines {
    fn new(namespace: Option<Namespace>) -> Self {
        rustls::crypto::ring::default_provider().install_default().ok();
        let dir = tempfile::Builder::new().prefix("nexus-machines-").tempdir().unwrap();
        let machines = Self { dir, namespace, running: Mutex::default() };
        std::fs::create_dir(machines.path("bin")).unwrap();
        for (name, text) in [("systemctl", SYSTEMCTL), ("nexus", NEXUS)] {
            let path = machines.path("bin").join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        machines
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn within(&self, mut command: Command, context: &str) -> Command {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        command.env("PATH", path).env("NEXUS_CONFIG", self.path(context)).env("HOME", self.dir.path());
        command.env_remove("CNX_URL").env_remove("CNX_TOKEN").current_dir(self.dir.path());
        let mut command = match &self.namespace {
            Some(namespace) => namespace.command(&command),
            None => command,
        };
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, context: &str, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
        command.args(args);
        self.within(command, context).output().unwrap()
    }

    fn ok(&self, context: &str, args: &[&str]) -> String {
        let output = self.run(context, args);
        assert!(output.status.success(), "nexus {}: {output:?}\n{}", args.join(" "), self.logs());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn json(&self, args: &[&str]) -> Result<Value, String> {
        let output = self.run("context.json", &[args, &["-o", "json"]].concat());
        serde_json::from_slice(&output.stdout).map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Starts a role of a machine, as systemd would by its unit.
    fn start(&self, name: &str, role: &str, config: &str) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
        command.args([role, "--config", config]).env("NEXUS_LOG", "info,openraft=warn");
        let process = Process::start(self.within(command, "none.json"), self.path(&format!("{name}.log")));
        self.running.lock().unwrap().push((name.to_owned(), process));
    }

    fn stop(&self, name: &str) {
        self.running.lock().unwrap().retain(|(n, _)| n != name);
    }

    fn wait<T>(&self, what: &str, mut condition: impl FnMut() -> Result<T, String>) -> T {
        wait_for(what, PATIENCE, || condition().map_err(|why| format!("{why}\n{}", self.logs())))
    }

    fn logs(&self) -> String {
        let mut out = String::new();
        for (name, _) in &*self.running.lock().unwrap() {
            let text = std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            out.push_str(&format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(15)..].join("\n")));
        }
        out
    }

    /// A first server, on ports of the loopback; answers its configuration.
    fn init(&self, name: &str, more: &[&str]) -> PathBuf {
        let (data, wire, api) =
            (self.text(name), format!("127.0.0.1:{}", ports::one()), format!("127.0.0.1:{}", ports::one()));
        let mut init = vec!["server", "init", "--data-dir", &data, "--name", name, "--wire", &wire];
        init.extend(["--api-listen", &api]);
        init.extend(more);
        self.ok("context.json", &init);
        self.path(name).join("nexus.toml")
    }

    /// The command by which a server joins, as another machine would: without the operator's context.
    fn joining(&self, name: &str) -> Vec<String> {
        let grant = self.json(&["server", "token", "--zone", "zone-a"]).unwrap();
        let text = |key: &str| grant[key].as_str().unwrap();
        let (data, at) = (self.text(name), grant["endpoints"][0].as_str().unwrap());
        let (wire, api) = (format!("127.0.0.1:{}", ports::one()), format!("127.0.0.1:{}", ports::one()));
        let mut args = vec!["server", "join", "--token", text("token"), "--ca-pin", text("caPin"), "--api", at];
        args.extend(["--name", name, "--data-dir", &data, "--wire", &wire, "--api-listen", &api]);
        args.into_iter().map(str::to_owned).collect()
    }

    fn status(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait("the status", || {
            let status = self.json(&["status"])?;
            if wanted(&status) { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// Waits until exactly these servers are members that answer.
    fn wait_members(&self, wanted: &[&str]) -> Vec<Value> {
        self.wait(&format!("the servers to be {wanted:?}"), || {
            let list = self.json(&["server", "list"])?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let member = |s: &&Value| s["state"] == "member" && s["reachable"] == true;
            let mut names: Vec<&str> = items.iter().filter(member).filter_map(|s| s["name"].as_str()).collect();
            names.sort_unstable();
            if names == wanted && items.len() == wanted.len() { Ok(items) } else { Err(list.to_string()) }
        })
    }

    fn project(&self, name: &str) {
        let manifest = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: {name}}}\nspec: {{}}\n");
        std::fs::write(self.path("project.yaml"), manifest).unwrap();
        self.wait(&format!("project {name} to be taken"), || {
            let output = self.run("context.json", &["apply", "-f", "project.yaml"]);
            if output.status.success() { Ok(()) } else { Err(format!("{output:?}")) }
        });
    }

    /// Waits until these projects are there, and this one is not.
    fn wait_projects(&self, wanted: &[&str], gone: &str) {
        self.wait(&format!("projects {wanted:?} without {gone:?}"), || {
            let list = self.json(&["get", "projects"])?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let has = |name: &str| items.iter().any(|p| p["metadata"]["name"] == name);
            if wanted.iter().all(|n| has(n)) && !has(gone) { Ok(()) } else { Err(list.to_string()) }
        });
    }
}

fn edit(path: &PathBuf, change: impl FnOnce(String) -> String) {
    let text = std::fs::read_to_string(path).unwrap();
    std::fs::write(path, change(text)).unwrap();
}

#[test]
fn a_region_whose_first_server_never_began_it_says_so_and_what_to_do_and_that_helps() {
    let machines = Machines::new(None);
    let config = machines.init("m2", &[]);
    let config_text = config.to_str().unwrap().to_owned();
    // As if it had been written by hand for two, of which the first is lost before it ever ran.
    let lost = "[members.1]\nname = \"m1\"\nwire = \"tcp:127.0.0.1:1\"\napi = \"https://127.0.0.1:1\"\n";
    edit(&config, |text| {
        text.replace("node_id = 1\n", "node_id = 2\n").replace("[members.1]\n", &format!("{lost}\n[members.2]\n"))
    });
    machines.start("m2", "server", &config_text);
    let status = machines.status(|s| s["message"].is_string());
    let message = status["message"].as_str().unwrap();
    assert_eq!(status["status"], "unavailable");
    for said in ["never begun", "member 1 is server m1", "Start that one", "[members]", "nexus.toml"] {
        assert!(message.contains(said), "{message:?} does not say {said:?}");
    }
    std::fs::write(
        machines.path("zone.yaml"),
        "apiVersion: cloudnexus/v1\nkind: Zone\nmetadata: {name: z}\nspec: {}\n",
    )
    .unwrap();
    let refused = machines.run("context.json", &["apply", "-f", "zone.yaml"]);
    assert_eq!(refused.status.code(), Some(5), "{refused:?}");

    machines.stop("m2");
    edit(&config, |text| text.replace(lost, ""));
    machines.start("m2", "server", &config_text);
    machines.status(|s| s["status"] == "healthy");
    machines.ok("context.json", &["apply", "-f", "zone.yaml"]);
}

/// The blocks of the guide that have not been run yet.
#[cfg(feature = "etcd")]
struct Guide(Vec<String>);

#[cfg(feature = "etcd")]
impl Guide {
    fn take(&mut self, says: &str) -> String {
        let at = self.0.iter().position(|script| script.contains(says));
        self.0.remove(at.unwrap_or_else(|| panic!("no block of the guide says {says:?}")))
    }
}

/// The fleet of a backup that was made on the one engine goes on, on the other: two servers in etcd, the same two with
/// stores of their own, and in etcd again. The commands of the guide for engines are run on the way.
#[cfg(feature = "etcd")]
#[test]
fn servers_join_a_fleet_on_etcd_and_the_fleet_moves_between_the_engines() {
    let etcd = cluster::Etcd::start(cluster::Shape { tls: true, ..cluster::Shape::ONE });
    let machines = Machines::new(None);
    let blocks = guide::sections("metadata-engines.md", 4).into_iter().flat_map(|(_, blocks)| blocks);
    let mut guide = Guide(blocks.map(|b| b.script).collect());
    let file = |name: &str| etcd.file(name).to_str().unwrap().to_owned();
    for name in ["etcd.password", "root.password"] {
        std::fs::write(etcd.file(name), format!("the {name}\n")).unwrap();
    }
    let at = etcd.url();
    let hosts = at.strip_prefix("etcd://").unwrap().split('/').next().unwrap();
    let etcdctl = format!(
        "cd '{}'; export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=https://{hosts} ETCDCTL_CACERT=ca.pem ETCDCTL_CERT=client.pem \
         ETCDCTL_KEY=client.key\n",
        file("")
    );
    machines.block("m1", &format!("{etcdctl}{}", guide.take("etcdctl auth enable")));
    let url = format!("{}&password-file={}", at.replace("etcd://", "etcd://nexus@"), file("etcd.password"));

    let config = |name: &str| machines.text(&format!("{name}/nexus.toml"));
    let start = || ["m1", "m2"].iter().for_each(|name| machines.start(name, "server", &config(name)));
    let stop = || ["m1", "m2"].iter().for_each(|name| machines.stop(name));
    machines.init("m1", &["--store", &url, "--region", "eu-1"]);
    let serve = guide.take("nexus server --config");
    let quoted: Vec<&str> = serve.split('\'').collect();
    let [_, shown, _] = quoted[..] else { panic!("{serve}") };
    let mut command = Command::new("sh");
    command
        .args(["-euc", &format!("cd m1; exec {}", serve.replace(shown, &url))])
        .env("REAL", env!("CARGO_BIN_EXE_nexus"));
    let served = Process::start(machines.within(command, "none.json"), machines.path("m1.log"));
    machines.running.lock().unwrap().push(("m1".into(), served));
    machines.status(|s| s["status"] == "healthy");
    let looked = guide.take("etcdctl get --prefix");
    let found = machines.block("m1", &format!("{etcdctl}export ETCDCTL_USER='root:the root.password'\n{looked}"));
    assert!(found.contains("/nexus/eu-1/k/o/") && found.contains("/nexus/eu-1/m/leader"), "{found}");

    // Files of the first server are not the second one's: it is asked for its own way in.
    let joining = machines.joining("m2");
    let mut joining: Vec<&str> = joining.iter().map(String::as_str).collect();
    let refused = machines.run("none.json", &joining);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("--store") && why.contains("etcd://"), "{why}");
    // The same command again, with what was asked for: the token has not been lost.
    joining.extend(["--store", &url]);
    machines.ok("none.json", &joining);
    machines.start("m2", "server", &config("m2"));
    let servers = machines.wait_members(&["m1", "m2"]);
    assert!(servers.iter().all(|s| s["voter"].is_null() && s["lagEntries"].is_null()), "nobody votes: {servers:?}");
    let table = machines.ok("context.json", &["server", "list"]);
    assert!(table.contains("leader") && table.contains("follower") && !table.contains("voter"), "{table}");

    machines.project("first");
    let backup = |name: &str| {
        let made = machines.json(&["backup", "create", name]).unwrap();
        made["folder"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
    };
    let of_etcd = backup("of-etcd");
    machines.project("late");
    stop();

    // To stores of their own: `[store]` goes, and each server is restored, with the generation that the first said.
    let section = std::fs::read_to_string(config("m1")).unwrap();
    let section =
        section[section.find("\n[store]\n").unwrap() + 1..].split_inclusive("\n\n").next().unwrap().to_owned();
    for name in ["m1", "m2"] {
        edit(&config(name).into(), |text| text.replace(&section, ""));
    }
    let restore = |name: &str, from: &str, more: &[&str]| {
        let config = config(name);
        let args = [&["backup", "restore", "--from", from, "--config", &config, "-o", "json"], more].concat();
        let done: Value = serde_json::from_str(&machines.ok("none.json", &args)).unwrap();
        done["generation"].as_u64().unwrap_or_else(|| panic!("{done}")).to_string()
    };
    let generation = restore("m1", &of_etcd, &[]);
    restore("m2", &of_etcd, &["--generation", &generation]);
    start();
    machines.wait_projects(&["first"], "late");
    let servers = machines.wait_members(&["m1", "m2"]);
    assert!(servers.iter().all(|s| s["voter"] == true), "both vote, in one group: {servers:?}");
    machines.project("second");

    // And back, into an etcd that still has what was left there. Once is enough.
    let of_servers = backup("of-servers");
    stop();
    for name in ["m1", "m2"] {
        edit(&config(name).into(), |text| format!("{}\n\n{section}", text.trim_end()));
    }
    let restoring = guide.take("nexus backup restore").replace("/srv/backups/good-day", &of_servers);
    let restoring = format!("cd m1; {restoring}");
    assert!(guide.0.is_empty(), "blocks that nobody ran: {:?}", guide.0);
    // While a server that was killed is still held to be there, a restore waits for its mark to end.
    machines.wait("etcd to be free", || {
        let mut command = Command::new("sh");
        command.args(["-euc", &restoring]).env("REAL", env!("CARGO_BIN_EXE_nexus"));
        let output = machines.within(command, "none.json").output().unwrap();
        if output.status.success() { Ok(()) } else { Err(format!("{output:?}")) }
    });
    // The other one has a store of its own still, and says so instead of choosing.
    let output = machines.run("none.json", &["server", "--config", &config("m2")]);
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && why.contains("If another server has done that"), "{output:?}");
    std::fs::rename(machines.path("m2/data/store"), machines.path("m2/data/store.old")).unwrap();
    start();
    machines.wait_projects(&["first", "second"], "late");
    machines.wait_members(&["m1", "m2"]);
    machines.project("third");
}

/// What stands in for systemd: a process for each unit, by its own command line.
const SYSTEMCTL: &str = r#"#!/bin/sh -eu
test "$1" = enable && test "$2" = --now || exit 0
shift 2
for unit; do
    case "$unit" in *.socket) continue ;; esac
    unit="${unit%.service}"
    sed -n 's/^ExecStart=//p' "$UNITS/$unit.service" | tr -d '"' >> "$WANTED"
done
"#;

/// `nexus`, but what it installs goes to the test's machine.
const NEXUS: &str = r#"#!/bin/sh -eu
if test "$1" = install; then
    exec "$REAL" "$@" --unit-dir "$UNITS" --program "$REAL"
fi
exec "$REAL" "$@"
"#;

impl Machines {
    /// Runs a block of a guide on one of the machines, and starts what it enables there; answers what it printed.
    fn block(&self, place: &str, script: &str) -> String {
        let root = self.path(place);
        let units = root.join("units");
        std::fs::create_dir_all(&units).unwrap();
        let wanted = root.join("wanted");
        std::fs::write(&wanted, "").unwrap();
        let script = script.replace("/var/lib/", &format!("{}/", root.display()));
        println!("{place}: {script}");
        let mut command = Command::new("sh");
        command.args(["-euc", &script]).env("UNITS", &units).env("WANTED", &wanted);
        command.env("REAL", env!("CARGO_BIN_EXE_nexus"));
        let output = self.within(command, "context.json").output().unwrap();
        assert!(output.status.success(), "{script}\n{output:?}\n{}", self.logs());
        for line in std::fs::read_to_string(&wanted).unwrap().lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [program, role, "--config", config] = words[..] else { panic!("{line:?} is no role of nexus") };
            assert_eq!(program, env!("CARGO_BIN_EXE_nexus"));
            self.start(&format!("{place}-{role}"), role, config);
        }
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// The word after another one in a command that was printed.
fn after<'a>(printed: &'a str, word: &str) -> &'a str {
    let mut words = printed.split_whitespace().skip_while(|w| *w != word).skip(1);
    words.next().unwrap_or_else(|| panic!("{printed:?} says no {word}"))
}

#[test]
fn the_guide_for_real_machines_does_what_it_says() {
    assert!(nix::unistd::geteuid().is_root(), "a host makes namespaces: run this as root");
    let namespace = Namespace::new(&format!("nxm{}", std::process::id()));
    for machine in 1..=3 {
        ip(&["-n", namespace.name(), "addr", "add", &format!("10.0.0.{machine}/32"), "dev", "lo"]);
    }
    let machines = Machines::new(Some(namespace));
    // What the newest token's command says: the reader copies it.
    let mut grant = (String::new(), String::new());
    let mut joins = Vec::new();
    for (heading, blocks) in guide::sections("real-machines.md", 7) {
        for Block { place, script } in blocks {
            let place = place.expect("a machine after `run`");
            let script = script.replace("cnx_…", &grant.0).replace("sha256:…", &grant.1);
            if script.contains("/run/nexus") || script.contains("host join") {
                // The machines share one `/run`.
                std::fs::create_dir_all(machines.path("run")).unwrap();
            }
            let script = script.replace("--name host-1", &format!("--name host-1 --run-dir {}", machines.text("run")));
            if script.contains("server join") {
                joins.push(script.clone());
            }
            let printed = machines.block(&place, &script);
            if script.contains(" token ") {
                grant = (after(&printed, "--token").to_owned(), after(&printed, "--ca-pin").to_owned());
            }
        }
        match heading.as_str() {
            "The first server" => drop(machines.status(|s| s["status"] == "healthy")),
            "Two more" => {
                machines.wait_members(&["m1", "m2"]);
                // "Likewise on m3."
                let printed = machines.block("m1", "nexus server token --zone zone-c");
                let [second] = &joins[..] else { panic!("one server joins in the guide: {joins:?}") };
                let third = second.replace("m2", "m3").replace("10.0.0.2:", "10.0.0.3:");
                let third = third.replace(&grant.0, after(&printed, "--token"));
                machines.block("m3", &third);
                let servers = machines.wait_members(&["m1", "m2", "m3"]);
                let zones: Vec<&str> = servers.iter().filter_map(|s| s["zone"].as_str()).collect();
                assert!(servers.iter().all(|s| s["voter"] == true), "{servers:?}");
                assert_eq!(zones, ["zone-a", "zone-b", "zone-c"]);
            }
            "Hosts" => machines.wait("the host to be ready", || {
                let hosts = machines.json(&["get", "hosts"])?;
                if hosts["items"][0]["status"]["state"] == "ready" { Ok(()) } else { Err(hosts.to_string()) }
            }),
            "Gateways" => machines.wait("the gateway to be known", || {
                let status = machines.json(&["status"])?;
                let known = status["certificates"].to_string().contains("gateway gateway-1");
                if known && status["status"] == "healthy" { Ok(()) } else { Err(status.to_string()) }
            }),
            _ => {}
        }
    }
    // The keeper outlives the agent on purpose: what it has goes first.
    machines.ok("context.json", &["host", "leave", "host-1"]);
}
