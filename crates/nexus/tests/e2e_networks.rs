//! Tenants' networks with the real binary and real containers on two hosts: who reaches whom, what stands when servers and agents
//! are gone, and what is left in the end. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[allow(dead_code)]
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;
#[allow(dead_code)]
#[path = "e2e/process.rs"]
mod process;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use cloud::Cloud;
use process::web_server;
use serde_json::Value;

/// Where a local host keeps what does not outlive a boot, as its own processes see it.
const RUN_DIR: &str = "run/nexus";
const TENANTS: [&str; 2] = ["default", "bank"];
/// The guide's project with a default network.
const LAB: &str = "lab";

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_owned()
}

/// What a command in the only instance of a project's `client` says; an error says why it failed.
fn client(cloud: &Cloud, project: &str, words: &[&str]) -> Result<String, String> {
    let mut all = vec!["exec", "--project", project, "client", "--"];
    all.extend(words);
    said(cloud.run(&all))
}

fn said(output: std::process::Output) -> Result<String, String> {
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{out}{error}")) }
}

/// A command from this machine, within a container's root and network: no server takes part.
fn within(pid: i32, words: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--net", "--root", "--wd"]).args(words).stdin(Stdio::null());
    command
}

fn list(cloud: &Cloud, kind: &str, project: &str) -> Vec<Value> {
    let list = cloud.json(&["get", kind, "--project", project]);
    list["items"].as_array().unwrap_or_else(|| panic!("{list}")).clone()
}

struct Nic {
    name: String,
    host: String,
    address: String,
}

/// The NICs of an app's instances.
fn nics(cloud: &Cloud, project: &str, app: &str) -> Vec<Nic> {
    let instances = list(cloud, "instances", project);
    let of: Vec<&Value> = instances.iter().filter(|i| i["spec"]["app"] == app).map(|i| &i["metadata"]["uid"]).collect();
    let found = list(cloud, "nics", project);
    let mine = found.iter().filter(|nic| of.contains(&&nic["status"]["instance"]));
    let nic = |nic: &Value| Nic {
        name: text(&nic["metadata"]["name"]),
        host: text(&nic["status"]["host"]),
        address: text(&nic["status"]["address4"]),
    };
    mine.map(nic).collect()
}

fn members(cloud: &Cloud, role: &str) -> Vec<(String, i64)> {
    let members = cloud.json(&["local", "list"]);
    let all = members.as_array().unwrap().iter().filter(|m| m["role"] == role);
    all.map(|m| (text(&m["name"]), m["pid"].as_i64().unwrap_or(-1))).collect()
}

/// A trace with a probe; it must not differ from what became of the packet.
fn trace(cloud: &Cloud, project: &str, from: &str, to: &str) -> Value {
    cloud.json(&["net", "trace", "--project", project, "--from", from, "--to", to, "--probe"])
}

const CURL: &[&str] = &["/usr/bin/curl", "-sS", "-m", "5"];

fn fetch(cloud: &Cloud, project: &str, url: &str) -> Result<String, String> {
    client(cloud, project, &[CURL, &[url]].concat())
}

#[test]
fn tenants_with_the_same_addresses_are_apart_and_their_networks_stand_by_themselves() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::curl(files.path());
    let cloud = Cloud::up(&["--zones", "2", "--hosts-per-zone", "1"]);
    guide::follow(&cloud.path(""), "networks.md", 18, &[("IMAGE", &layout)], |heading, printed| match heading {
        "Balance" => assert!(printed.contains("TARGETS") && printed.contains("Kind:        LoadBalancer"), "{printed}"),
        "Tell targets which address was called" => assert!(printed.contains("relayed (PROXY v2)"), "{printed}"),
        "Say who talks to whom" => {
            let shown = |words: &[&str]| printed.lines().any(|l| l.split_whitespace().eq(words.iter().copied()));
            assert!(shown(&["http", "ingress", "1000", "allow", "tcp", "80", "group:client"]), "{printed}");
            assert!(shown(&["offices", "ingress", "1000", "allow", "tcp", "443", "list:offices"]), "{printed}");
            assert!(printed.contains("prefix list offices is used by security group web"), "{printed}");
        }
        "Lead packets on" => assert!(printed.contains("of the route table out is a black hole"), "{printed}"),
        "An address that the outside knows" => assert!(printed.contains(images::PAGE), "{printed}"),
        "Join two networks" => {
            let waits = "the other side has not asked for it";
            assert!(printed.contains(waits) && printed.contains(images::PAGE), "{printed}");
        }
        "Names of your own" => {
            assert!(printed.contains(images::PAGE) && printed.contains("10.0.1.77"), "{printed}");
        }
        _ => {}
    });
    cloud.wait_ready("web", 2);
    guide::follow(&cloud.path(""), "troubleshooting-networks.md", 4, &[], |heading, printed| match heading {
        "Ask what becomes of a packet" => {
            let ends = ["\ndelivered\n", "\ndropped\n"].map(|end| printed.matches(end).count());
            assert_eq!(ends, [2, 1], "port 80 and pings are open, port 81 is not: {printed}");
            assert!(printed.contains("web/http") && printed.contains("client/out"), "{printed}");
        }
        "See who connects to whom" => {
            let allowed = printed.lines().any(|l| l.contains(" allowed ") && l.contains(":80 "));
            let refused = printed.lines().any(|l| l.contains("dropped: no_ingress_rule") && l.contains(":81 "));
            assert!(allowed && refused, "both ports, by their NICs' names: {printed}");
            let file = std::fs::read_to_string(cloud.path("flows.ndjson")).unwrap();
            let first: Value =
                serde_json::from_str(file.lines().next().expect("what was noted comes at once")).unwrap();
            assert!(first["host"].is_string() && first["time"].is_string(), "{first}");
        }
        "See the packets" => {
            let file = std::fs::read(cloud.path("client.pcap")).unwrap();
            assert_eq!(file[..4], [0xd4, 0xc3, 0xb2, 0xa1]);
            let seen = file.windows(5).any(|w| w == b"GET /") && file.windows(9).any(|w| w == b"It is ser");
            assert!(seen, "a request and its answer, in {} bytes", file.len());
        }
        _ => {}
    });
    a_balancers_targets_are_shown(&cloud);
    a_default_network_is_what_its_project_is_in(&cloud);
    two_tenants_are_apart(&cloud, &layout);
    traces_are_as_it_is(&cloud);
    what_is_taken_away_comes_back(&cloud);
    servers_and_agents_are_killed(&cloud);
    nothing_is_left(&cloud);
    cloud.down();
}

/// Every host asks by itself, and what they find is shown.
fn a_balancers_targets_are_shown(cloud: &Cloud) {
    let apply = |port: u16| {
        let check = format!("{{port: {port}, intervalSeconds: 1, timeoutSeconds: 1, failures: 1, successes: 1}}");
        let spec = format!(
            "apiVersion: cloudnexus/v1\nkind: LoadBalancer\nmetadata: {{name: shown}}\nspec:\n  subnet: front\n  \
             listeners: [{{port: 80, targets: [{{to: {{app: web}}}}], check: {check}}}]\n"
        );
        std::fs::write(cloud.path("shown.yaml"), spec).unwrap();
        cloud.ok(&["apply", "-f", cloud.path("shown.yaml").to_str().unwrap()]);
    };
    let shows = |what: &str, counts: &str, sees: &dyn Fn(&str) -> bool| {
        cloud.wait(what, || {
            let line = said(cloud.run(&["get", "load-balancers"]))?;
            let text = said(cloud.run(&["describe", "load-balancer", "shown"]))?;
            let shown = line.lines().any(|l| l.starts_with("shown ") && l.contains(counts));
            if shown && sees(&text) { Ok(()) } else { Err(format!("{line}{text}")) }
        });
    };
    // Nobody listens there.
    apply(81);
    shows("both hosts to say that no target answers", " 0/2 ", &|text| {
        let lines = text.lines().filter(|l| l.contains("tcp 80") && l.contains("web-") && l.contains("refused"));
        lines.filter(|l| l.split_whitespace().any(|word| word == "2")).count() == 2 && text.contains("0/2 take new")
    });
    apply(80);
    shows("all targets to be in again", " 2/2 ", &|text| text.contains("2/2 take new") && !text.contains("refused"));
    cloud.ok(&["delete", "load-balancer", "shown"]);
}

/// The guide's apps there name no NICs, but for one that wants none.
fn a_default_network_is_what_its_project_is_in(cloud: &Cloud) {
    let webs = nics(cloud, LAB, "web");
    let hosts: std::collections::BTreeSet<&str> = webs.iter().map(|n| n.host.as_str()).collect();
    assert_eq!((webs.len(), hosts.len(), nics(cloud, LAB, "client").len()), (2, 2, 1), "one on each host");
    assert!(nics(cloud, LAB, "apart").is_empty());
    // Names lead to NICs, by both families, and on any port.
    for (family, word) in [("ahostsv4", "172.31."), ("ahostsv6", "fd")] {
        let words = ["/usr/bin/getent", family, "web.lab.internal"];
        cloud.wait("the name to lead to both NICs", || {
            let told = client(cloud, LAB, &words)?;
            let lead: std::collections::BTreeSet<&str> = told.lines().filter(|l| l.starts_with(word)).collect();
            if lead.iter().filter(|l| l.contains("STREAM")).count() == 2 { Ok(()) } else { Err(told) }
        });
    }
    let from = nics(cloud, LAB, "client").remove(0);
    for nic in &webs {
        let url = format!("http://{}/", nic.address);
        assert_eq!(fetch(cloud, LAB, &url).unwrap(), images::PAGE);
        let told = trace(cloud, LAB, &from.name, &format!("{}:9/tcp", nic.address));
        assert_eq!(told["verdict"], "delivered", "{told:#}");
        assert!(told.to_string().contains("allowed by default/members"), "{told:#}");
    }
    let (_, error) = cloud.fails(&["delete", "network", "default", "--project", LAB]);
    assert!(error.contains("subnet default"), "{error}");
    for app in ["web", "client", "apart"] {
        cloud.ok(&["delete", "app", app, "--project", LAB, "--wait"]);
    }
    cloud.ok(&["delete", "subnet", "default", "--project", LAB, "--wait"]);
    cloud.ok(&["delete", "network", "default", "--project", LAB, "--wait"]);
}

/// The same networks again, for another project.
fn two_tenants_are_apart(cloud: &Cloud, layout: &Path) {
    let project = cloud.path("bank.yaml");
    let spec = "apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {name: bank}\nspec: {organization: default}\n";
    std::fs::write(&project, spec).unwrap();
    cloud.ok(&["apply", "-f", project.to_str().unwrap()]);
    cloud.ok(&["apply", "--project", "bank", "-f", cloud.path("shop.yaml").to_str().unwrap()]);
    let image = layout.to_str().unwrap();
    let deploy = |words: &[&str]| {
        cloud.ok(&[&["deploy", "--project", "bank", "--image", image, "--port", "80"], words].concat())
    };
    deploy(&["web", "--replicas", "2", "--nic", "front:web"]);
    deploy(&["client", "--nic", "front:client", "--env", "MARK=networks-bank"]);
    cloud.ok(&["deploy", "client", "--env", "MARK=networks-shop"]);
    cloud.wait_ready("client", 1);

    for project in TENANTS {
        for instance in list(cloud, "instances", project).iter().filter(|i| i["spec"]["app"] == "web") {
            let name = text(&instance["metadata"]["name"]);
            let write = format!("echo {project} > /srv/who; dd if=/dev/zero of=/srv/large bs=1k count=600");
            cloud.ok(&["exec", "--project", project, &name, "--", "/bin/busybox", "sh", "-c", &write]);
        }
    }
    let web = TENANTS.map(|project| nics(cloud, project, "web"));
    for (project, web) in TENANTS.iter().zip(&web) {
        let hosts: std::collections::BTreeSet<&str> = web.iter().map(|n| n.host.as_str()).collect();
        assert_eq!((web.len(), hosts.len()), (2, 2), "one on each host");
        for nic in web {
            let url = format!("http://{}/who", nic.address);
            let told = cloud.wait("the other host's to be reached too", || fetch(cloud, project, &url));
            assert_eq!(told.trim(), *project, "{url}: its own, whoever else has the address");
        }
        let told = cloud.wait("by name too", || fetch(cloud, project, "http://web/who"));
        assert_eq!(told.trim(), *project);
    }
    // What only the other one has is nowhere.
    for (project, other) in [(TENANTS[0], &web[1]), (TENANTS[1], &web[0])] {
        let own: Vec<String> = list(cloud, "nics", project).iter().map(|n| text(&n["status"]["address4"])).collect();
        for nic in other.iter().filter(|n| !own.contains(&n.address)) {
            let said =
                client(cloud, project, &["/usr/bin/curl", "-sS", "-m", "2", &format!("http://{}/who", nic.address)]);
            said.expect_err("another tenant's address leads nowhere");
        }
    }
    // Nor does the infrastructure answer to a NIC: neither another instance's own address nor a host.
    let infra: Vec<String> = list(cloud, "instances", "bank").iter().map(|i| text(&i["status"]["address4"])).collect();
    for address in infra {
        let words = ["/usr/bin/curl", "-sS", "-m", "2", "--interface", "nic0", &format!("http://{address}/")];
        client(cloud, "default", &words).expect_err("a NIC leads to no instance's infrastructure address");
    }
}

fn traces_are_as_it_is(cloud: &Cloud) {
    let from = nics(cloud, "default", "client").remove(0);
    for nic in nics(cloud, "default", "web") {
        for (to, verdict, probed) in [
            (format!("{}:80/tcp", nic.address), "delivered", true),
            (format!("{}:81/tcp", nic.address), "dropped", false),
            (format!("{}/icmp", nic.address), "delivered", true),
        ] {
            let told = trace(cloud, "default", &from.name, &to);
            assert_eq!((&told["verdict"], &told["probed"]), (&verdict.into(), &probed.into()), "{to}: {told:#}");
            let hops = told["hops"].as_array().unwrap();
            assert_eq!(hops[0]["host"], from.host.as_str(), "{told:#}");
            if probed {
                assert_eq!(hops.last().unwrap()["host"], nic.host.as_str(), "{told:#}");
            }
        }
    }
    // Nobody has it.
    let told = trace(cloud, "default", &from.name, "10.0.1.251:80/tcp");
    assert_eq!((&told["verdict"], &told["probed"]), (&"dropped".into(), &false.into()), "{told:#}");
    let (code, error) = cloud.fails(&["net", "trace", "--from", "none", "--to", "10.0.1.251:80/tcp"]);
    assert_eq!(code, 3, "{error}");
}

fn what_is_taken_away_comes_back(cloud: &Cloud) {
    cloud.wait("every host to have what it should", || said(cloud.run(&["net", "check"])));
    let (host, pid) = members(cloud, "host").remove(0);
    cloud.wait("the missing table to be told", || {
        let mut nft = Command::new("nsenter");
        nft.args(["--target", &pid.to_string(), "--net", "nft", "delete", "table", "inet", "nexus-vpc"]);
        // It may be gone still, or be back before anybody has looked.
        nft.stderr(Stdio::null()).status().unwrap();
        let code = cloud.run(&["net", "check"]).status.code();
        if code == Some(1) { Ok(()) } else { Err(format!("{host}: {code:?}")) }
    });
    cloud.wait("the table to be back", || said(cloud.run(&["net", "check"])));
}

/// A download that takes a while: broken off, it fails.
fn download(pid: i32, address: &str) -> Child {
    let url = format!("http://{address}/large");
    let words = ["/usr/bin/curl", "-sS", "-m", "120", "--limit-rate", "30k", "-o", "/dev/null", &url];
    within(pid, &words).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

fn servers_and_agents_are_killed(cloud: &Cloud) {
    let us = nics(cloud, "default", "client").remove(0);
    let webs = nics(cloud, "default", "web");
    let far = webs.iter().find(|n| n.host != us.host).expect("one is on the other host");
    let pid = web_server("MARK=networks-shop").expect("the client runs");
    let running = webs.iter().map(|nic| download(pid, &nic.address)).collect::<Vec<_>>();
    let servers = members(cloud, "server");
    for (server, _) in &servers {
        cloud.ok(&["local", "kill", server]);
    }
    let reached = |address: &str| {
        let words = ["/usr/bin/curl", "-sS", "-m", "5", &format!("http://{address}/who")];
        said(within(pid, &words).output().unwrap()).map(|told| assert_eq!(told.trim(), "default"))
    };
    for nic in &webs {
        reached(&nic.address).expect("new connections need no server");
    }
    reached("web").expect("nor do names");
    // Hosts start their agents again, which find no server, and everything as it is.
    for host in [&us.host, &far.host] {
        cloud.ok(&["local", "kill", &format!("agent@{host}")]);
        for nic in &webs {
            reached(&nic.address).expect("nor an agent");
        }
    }
    cloud.wait("restarted agents to answer names", || reached("web"));
    for download in running {
        let output = download.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "a connection that was open is broken: {error}");
    }
    for (server, _) in &servers {
        cloud.ok(&["local", "start", server]);
    }
    let after = cloud.wait_ready("client", 1).remove(0);
    assert_eq!(after["status"]["restarts"].as_u64().unwrap_or(0), 0);
    cloud.wait("every host to have what it should", || said(cloud.run(&["net", "check"])));
}

/// What a host has of tenants' networks, by its own namespaces.
fn remains(pid: i64) -> Vec<String> {
    let within = |words: &[&str]| {
        let output =
            Command::new("nsenter").args(["--target", &pid.to_string(), "--net"]).args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let mut left: Vec<String> = Vec::new();
    let ours = |line: &&str| ["nxu", "nxn", ": vx", ": np"].iter().any(|p| line.contains(p));
    left.extend(within(&["ip", "-o", "link"]).lines().filter(ours).map(str::to_owned));
    left.extend(within(&["nft", "list", "tables"]).lines().filter(|l| l.contains("nexus-vpc")).map(str::to_owned));
    let files = std::fs::read_dir(format!("/proc/{pid}/root/{RUN_DIR}/networks"));
    left.extend(files.into_iter().flatten().flatten().map(|f| f.file_name().to_string_lossy().into_owned()));
    left
}

fn nothing_is_left(cloud: &Cloud) {
    let hosts = || members(cloud, "host");
    assert!(hosts().iter().all(|(_, pid)| remains(*pid).len() >= 3), "what is looked for is there as yet");
    for app in ["web", "client"] {
        cloud.ok(&["delete", "app", app, "--project", "default", "--wait"]);
    }
    cloud.ok(&["delete", "-f", cloud.path("shop.yaml").to_str().unwrap(), "--project", "default", "--wait"]);
    // All at once; a NIC of somebody's own goes along. Without the apps nothing is changed.
    let lone = "apiVersion: cloudnexus/v1\nkind: Nic\nmetadata: {name: lone}\nspec: {subnet: front}\n";
    std::fs::write(cloud.path("lone.yaml"), lone).unwrap();
    cloud.ok(&["apply", "--project", "bank", "-f", cloud.path("lone.yaml").to_str().unwrap()]);
    let cascade = ["--cascade", "--project", "bank", "--wait"];
    let (code, error) = cloud.fails(&[&["delete", "network", "shop", "--yes"][..], &cascade].concat());
    assert_eq!(code, 4, "{error}");
    assert!(
        error.contains("app/client") && error.contains("app/web") && list(cloud, "nics", "bank").len() == 4,
        "{error}"
    );
    let all = ["delete", "network/shop", "app/web", "app/client"];
    let (code, error) = cloud.fails(&[&all[..], &cascade].concat());
    assert!(code == 2 && error.contains("delete  nic/lone") && error.contains("--yes"), "nobody answers: {error}");
    cloud.ok(&[&all[..], &["--yes"], &cascade].concat());
    cloud.ok(&[&all[..], &["--yes", "--ignore-not-found"], &cascade].concat());
    for project in TENANTS {
        for kind in ["networks", "subnets", "nics", "security-groups"] {
            assert!(list(cloud, kind, project).is_empty(), "{kind} of {project}");
        }
    }
    cloud.wait("nothing to be left of the networks on any host", || {
        let left: Vec<_> = hosts().into_iter().map(|(name, pid)| (name, remains(pid))).collect();
        if left.iter().all(|(_, left)| left.is_empty()) { Ok(()) } else { Err(format!("{left:#?}")) }
    });
}
