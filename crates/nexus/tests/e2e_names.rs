//! Names and egress with the real binary and real containers: who finds and reaches whom, across zones, without servers, and
//! what of the world outside. Needs root, and what `cargo xtask test` installs.

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

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use cloud::Cloud;
use process::web_server;
use serde_json::Value;

/// Documentation's (RFC 5737): nobody has it, so this machine may play the world outside.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_owned()
}

/// What a command in the only instance of a project's `client` says; an error says why it failed.
fn client(cloud: &Cloud, project: &str, words: &[&str]) -> Result<String, String> {
    let mut all = vec!["exec", "--project", project, "client", "--"];
    if !words[0].starts_with('/') {
        all.push("/bin/busybox");
    }
    all.extend(words);
    let output = cloud.run(&all);
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // The command line notes which instance it was.
    if output.status.success() { Ok(said.into_owned()) } else { Err(format!("{said}{error}")) }
}

/// The machine's other address while the test runs, and a server of HTTP on it, which remembers who came.
struct Outside {
    port: u16,
    came: Arc<Mutex<Vec<IpAddr>>>,
}

impl Outside {
    fn open() -> Self {
        address("add");
        let listener = TcpListener::bind((OUTSIDE, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let came: Arc<Mutex<Vec<IpAddr>>> = Arc::default();
        let noted = came.clone();
        std::thread::spawn(move || {
            while let Ok((mut stream, from)) = listener.accept() {
                noted.lock().unwrap().push(from.ip());
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\noutside\n");
            }
        });
        Self { port, came }
    }

    fn url(&self) -> String {
        format!("http://{OUTSIDE}:{}/", self.port)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        address("del");
    }
}

fn address(verb: &str) {
    let mut ip = Command::new("ip");
    // Left by a run that was killed, it is there already.
    let _ = ip.args(["addr", verb, &format!("{OUTSIDE}/32"), "dev", "lo"]).stderr(Stdio::null()).status();
}

/// The same without any server: from this machine, within the container's root and network.
fn within(pid: i32, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--net", "--root", "--wd"]).args(words);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if output.status.success() { Ok(said) } else { Err(said) }
}

#[test]
fn apps_find_each_other_by_name_and_projects_are_apart() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::curl(files.path());
    let cloud = Cloud::up(&["--zones", "2", "--hosts-per-zone", "1"]);
    the_guide_is_followed(&cloud, &layout);
    cloud.ok(&["deploy", "client", "--env", "MARK=names-shop"]);
    let webs = cloud.wait_ready("web", 2);
    let us = cloud.wait_ready("client", 1).remove(0);

    // By every name, also those in the other zone, and by both families.
    let far = webs.iter().find(|w| w["status"]["zone"] != us["status"]["zone"]).expect("one is in the other zone");
    for name in ["web.default.internal", "web.default.local.internal"] {
        let said = cloud.wait("the name to lead to both", || {
            let said = client(&cloud, "default", &["nslookup", name])?;
            let all = webs.iter().all(|w| said.contains(&text(&w["status"]["address4"])));
            if all { Ok(said) } else { Err(said) }
        });
        assert!(said.contains(&text(&far["status"]["address6"])), "{said}");
    }
    for name in ["web", "web.default", "web.default.internal"] {
        let url = format!("http://{name}/");
        let page = cloud.wait(name, || client(&cloud, "default", &["/usr/bin/curl", "-sS", "-m", "5", &url]));
        assert_eq!(page, images::PAGE);
    }
    cloud.wait("both families to be told", || {
        let told = client(&cloud, "default", &["/usr/bin/getent", "ahosts", "web.default.internal"])?;
        if told.contains(&text(&far["status"]["address6"])) { Ok(()) } else { Err(told) }
    });
    let direct = format!("http://[{}]/", text(&far["status"]["address6"]));
    let page = cloud.wait("the far one", || client(&cloud, "default", &["/usr/bin/curl", "-sS", "-m", "3", &direct]));
    assert_eq!(page, images::PAGE);

    // Another project neither finds nor reaches them, wherever they are.
    let said = client(&cloud, "bank", &["nslookup", "web.default.internal"]).unwrap_err();
    assert!(said.contains("NXDOMAIN"), "{said}");
    for web in &webs {
        for address in [text(&web["status"]["address4"]), format!("[{}]", text(&web["status"]["address6"]))] {
            let url = format!("http://{address}/");
            let said = client(&cloud, "bank", &["/usr/bin/curl", "-sS", "-m", "2", &url]).unwrap_err();
            assert!(said.contains("timed out"), "{said}");
        }
    }
    assert!(client(&cloud, "default", &["sh", "-c", "echo x >> /etc/resolv.conf"]).is_err(), "read-only");
    assert!(client(&cloud, "default", &["cat", "/etc/hosts"]).unwrap().contains(&text(&us["metadata"]["name"])));

    egress_is_what_the_project_says(&cloud, Way::Infrastructure);
    // The same by a NIC, once the project's instances are in its default network.
    set_egress(&cloud, "{}", Way::DefaultNetwork);
    cloud.ok(&["deploy", "client", "--project", "bank", "--env", "MARK=names-bank"]);
    cloud.wait("the client to have a NIC", || client(&cloud, "bank", &["ip", "addr", "show", "dev", "nic0"]));
    egress_is_what_the_project_says(&cloud, Way::DefaultNetwork);
    servers_are_killed(&cloud, &us, &webs);
    cloud.ok(&["delete", "app", "client", "--project", "bank", "--wait"]);
    cloud.down();
}

fn the_guide_is_followed(cloud: &Cloud, layout: &Path) {
    guide::follow(&cloud.path(""), "names-and-egress.md", 4, &[("IMAGE", &layout)], |_, _| {});
}

/// By which interface what a project begins leaves.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Infrastructure,
    DefaultNetwork,
}

fn set_egress(cloud: &Cloud, egress: &str, way: Way) {
    let path = cloud.path("egress.yaml");
    let by_nic = way == Way::DefaultNetwork;
    let spec = format!("{{organization: default, egress: {egress}, defaultNetwork: {by_nic}}}");
    let manifest = format!("apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {{name: bank}}\nspec: {spec}\n");
    std::fs::write(&path, manifest).unwrap();
    cloud.ok(&["apply", "-f", path.to_str().unwrap()]);
}

fn egress_is_what_the_project_says(cloud: &Cloud, way: Way) {
    let set_egress = |cloud: &Cloud, egress: &str| set_egress(cloud, egress, way);
    let outside = Outside::open();
    let url = outside.url();
    let fetch = || client(cloud, "bank", &["/usr/bin/curl", "-sS", "-m", "2", &url]);
    let reached = |what: &str| cloud.wait(what, fetch);
    let closed = |what: &str| cloud.wait(what, || fetch().map_or(Ok(()), Err));
    set_egress(cloud, "{}");
    closed("nothing outside to be reached");
    let refused = client(cloud, "bank", &["nslookup", "example.com"]).unwrap_err();
    assert!(refused.contains("REFUSED"), "{refused}");
    set_egress(cloud, "{networks: [203.0.113.64/26]}");
    assert_eq!(reached("the network to be reached"), "outside\n");
    let hosts: Vec<String> = cloud.list("hosts").iter().map(|h| text(&h["spec"]["prefix4"])).collect();
    let from = outside.came.lock().unwrap().last().copied().expect("somebody came");
    let within = |prefix: &String| from.to_string().starts_with(prefix.trim_end_matches('0'));
    assert!(!hosts.iter().any(within), "{from} is an instance's own address");
    client(cloud, "default", &["/usr/bin/curl", "-sS", "-m", "2", &url]).unwrap_err();
    if way == Way::DefaultNetwork {
        a_trace_names_the_way_out(cloud, &outside);
    }
    set_egress(cloud, "{networks: [198.51.100.0/24]}");
    closed("the other network not to be reached");
    set_egress(cloud, "{mode: allow}");
    reached("everything outside to be reached");
    // Never what is not outside: the hosts' agents, and the servers.
    for host in cloud.list("hosts") {
        let url = format!("http://{}/", text(&host["spec"]["address"]));
        let said = client(cloud, "bank", &["/usr/bin/curl", "-sS", "-m", "2", &url]).unwrap_err();
        assert!(said.contains("timed out"), "{said}");
    }
    set_egress(cloud, "{mode: deny}");
    closed("nothing outside to be reached again");
}

fn a_trace_names_the_way_out(cloud: &Cloud, outside: &Outside) {
    let nics = cloud.json(&["get", "nics", "--project", "bank"]);
    let nic = text(&nics["items"][0]["metadata"]["name"]);
    let trace = |to: &str| cloud.json(&["net", "trace", "--project", "bank", "--from", &nic, "--to", to, "--probe"]);
    let told = trace(&format!("{OUTSIDE}:{}/tcp", outside.port));
    assert_eq!((&told["verdict"], &told["probed"]), (&"outside".into(), &true.into()), "{told:#}");
    assert!(told.to_string().contains("by 203.0.113.64/26 of the route table project-egress"), "{told:#}");
    let told = trace("198.51.100.1:80/tcp");
    assert_eq!(told["verdict"], "dropped", "{told:#}");
    assert!(told.to_string().contains("no route of the route table project-egress leads to 198.51.100.1"), "{told:#}");
}

/// Names and rules need no server, and an agent that restarts without one knows what the one before it knew.
fn servers_are_killed(cloud: &Cloud, us: &Value, webs: &[Value]) {
    let pid = web_server("MARK=names-shop").expect("the client runs");
    let members = cloud.json(&["local", "list"]);
    let names = members.as_array().unwrap().iter().filter_map(|m| m["name"].as_str());
    let servers: Vec<&str> = names.filter(|name| name.starts_with("server-")).collect();
    for server in &servers {
        cloud.ok(&["local", "kill", server]);
    }
    let resolves = || {
        let said = within(pid, &["/usr/bin/getent", "ahosts", "web.default.internal"])?;
        let all = webs.iter().all(|w| said.contains(&text(&w["status"]["address4"])));
        if all { Ok(()) } else { Err(said) }
    };
    resolves().unwrap();
    let agent = format!("agent@{}", text(&us["status"]["host"]));
    cloud.ok(&["local", "kill", &agent]);
    // Its host starts it again. Asked while nobody answers: it is asked again until somebody does.
    let asking = std::thread::spawn(move || within(pid, &["/usr/bin/curl", "-sS", "-m", "60", "http://web/"]));
    assert_eq!(asking.join().unwrap().unwrap(), images::PAGE);
    cloud.wait("the restarted agent to answer names", resolves);
    for server in &servers {
        cloud.ok(&["local", "start", server]);
    }
    let after = cloud.wait_ready("client", 1).remove(0);
    assert_eq!(after["metadata"]["uid"], us["metadata"]["uid"]);
    assert_eq!(after["status"]["restarts"], us["status"]["restarts"]);
}
