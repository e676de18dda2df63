//! The real binary, whole: a three-zone cloud with real hosts, a real container and a real function, and everything
//! that can be killed, killed. Needs root, and the Debian packages that `cargo xtask test` installs.

mod cloud;
#[cfg(feature = "etcd")]
mod etcd;
mod guide;
mod images;
mod load;
#[allow(dead_code)] // Other test programs use the rest.
mod process;
mod regions;
mod tenants;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use cloud::Cloud;
use load::Load;
use serde_json::Value;

/// Where the agents of a local cloud tell their metrics.
const AGENT_METRICS: u16 = 7451;

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_owned()
}

/// What tells one start of one instance from another.
fn lives(instances: &[Value]) -> BTreeSet<String> {
    let life = |i: &Value| {
        format!("{} started {} restarts {}", i["metadata"]["uid"], i["status"]["started"], i["status"]["restarts"])
    };
    instances.iter().map(life).collect()
}

fn host_of(instance: &Value) -> String {
    text(&instance["status"]["host"])
}

fn get(url: &str, host: &str) -> Result<(u16, String), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(15)).build().unwrap();
        let answer = client.get(url).header("host", host).send().await.map_err(|e| e.to_string())?;
        Ok((answer.status().as_u16(), answer.text().await.map_err(|e| e.to_string())?))
    })
}

/// Fetches a page until it is what it should be.
fn wait_page(cloud: &Cloud, gateway: u16, host: &str, path: &str, wanted: &str) {
    let url = format!("{}{path}", cloud.gateway(gateway));
    cloud.wait(&format!("{url} of {host}"), || match get(&url, host) {
        Ok((200, body)) if body.trim_end() == wanted.trim_end() => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

#[test]
fn an_app_stays_up_while_everything_under_it_is_killed() {
    everything_is_killed(&[], |cloud| {
        // Nothing can be written without a majority, and that is said.
        let (code, error) = cloud.fails(&["apply", "-f", cloud.manifest("refused").to_str().unwrap()]);
        assert_eq!(code, 5, "{error}");
        assert!(error.contains("majority") || error.contains("leader"), "{error}");
    });
}

/// `alone` looks at the cloud while one server of three lives.
fn everything_is_killed(args: &[&str], alone: fn(&Cloud)) {
    rustls::crypto::ring::default_provider().install_default().ok();
    let files = tempfile::tempdir().unwrap();
    let layout = images::nginx(files.path());
    let cloud = Cloud::up(args);
    cloud.start(&[]);

    cloud.ok(&["image", "import", layout.to_str().unwrap(), "--name", "nginx"]);
    cloud.ok(&["deploy", "web", "--image", "nginx", "--replicas", "3", "--port", "80", "--timeout", "90"]);
    let instances = cloud.wait_ready("web", 3);
    let zones: BTreeSet<String> = instances.iter().map(|i| text(&i["status"]["zone"])).collect();
    assert_eq!(zones.len(), 3, "not spread over zones: {zones:?}");
    for gateway in [0, 1] {
        wait_page(&cloud, gateway, "web.localhost", "/", images::PAGE);
    }

    let load = Load::start([cloud.gateway(0), cloud.gateway(1)], "web.localhost");
    an_agent_is_killed(&cloud);
    load.check("an agent was killed");
    a_host_is_killed(&cloud);
    load.check("a host was killed");
    the_leader_is_killed(&cloud);
    load.check("the leader was killed");
    all_servers_are_killed(&cloud, &load, alone);
    load.check("all servers were killed and started again");
    a_link_is_cut(&cloud);
    load.finish();

    let output =
        cloud.ok(&["exec", &text(&cloud.instances("web")[0]["metadata"]["name"]), "--", "/usr/sbin/nginx", "-v"]);
    assert!(output.is_empty(), "nginx -v speaks on standard error: {output}");
    cloud.ok(&["delete", "app", "web", "--wait"]);
    cloud.wait("the instances to be gone", || {
        let left = cloud.json(&["get", "instances", "--deleting"]);
        if left["items"].as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(left.to_string()) }
    });
    cloud.down();
}

fn an_agent_is_killed(cloud: &Cloud) {
    let before = cloud.wait_ready("web", 3);
    let host = host_of(&before[0]);
    cloud.ok(&["local", "kill", &format!("agent@{host}")]);
    // The new one counts from nothing. It is back when a server has taken a report that it made after it saw what runs.
    let members = cloud.json(&["local", "list"]);
    let address = members.as_array().unwrap().iter().find(|m| m["name"] == host.as_str()).map(|m| text(&m["address"]));
    let metrics = format!("http://[{}]:{AGENT_METRICS}/metrics", address.expect("the host is listed"));
    let count = |metric: &str| -> Result<u64, String> {
        let (_, page) = get(&metrics, "localhost")?;
        let value = page.lines().find_map(|line| line.strip_prefix(metric)?.trim().parse().ok());
        value.ok_or_else(|| format!("no {metric} in {page}"))
    };
    let sent = || count("nexus_agent_reports_sent_total ");
    let before_it = cloud.wait("the agent to see what runs", || match count("nexus_agent_instances_ready ")? {
        0 => Err("nothing is ready".to_owned()),
        _ => sent(),
    });
    cloud.wait("a server to take its report", || match sent()? {
        // The one on its way may have been made before.
        sent if sent >= before_it + 2 => Ok(()),
        sent => Err(format!("{sent} reports")),
    });
    let after = cloud.wait_ready("web", 3);
    assert_eq!(lives(&before), lives(&after), "an agent's death restarted a workload");
}

/// Waits until a lost host's instance has a successor.
fn wait_elsewhere(cloud: &Cloud, host: &str) {
    cloud.wait("the instance to run elsewhere", || {
        let ready: Vec<Value> = cloud.instances("web").into_iter().filter(|i| i["status"]["ready"] == true).collect();
        let elsewhere = ready.iter().all(|i| host_of(i) != host);
        if ready.len() == 3 && elsewhere { Ok(()) } else { Err(format!("{ready:#?}")) }
    });
}

/// Waits until a host is ready again and has stopped what was superseded.
fn wait_back(cloud: &Cloud, host: &str) {
    cloud.wait("the host to be back", || {
        let hosts = cloud.list("hosts");
        let back = hosts.iter().find(|h| h["metadata"]["name"] == host).unwrap();
        let empty = back["status"]["reserved"]["instances"] == 0;
        if back["status"]["state"] == "ready" && empty { Ok(()) } else { Err(back["status"].to_string()) }
    });
}

fn a_host_is_killed(cloud: &Cloud) {
    let before = cloud.wait_ready("web", 3);
    let host = host_of(&before[0]);
    let killed = Instant::now();
    cloud.ok(&["local", "kill", &host]);
    wait_elsewhere(cloud, &host);
    eprintln!("a host's instance ran elsewhere {:?} after its host's death", killed.elapsed());
    let hosts = cloud.list("hosts");
    let dead = hosts.iter().find(|h| h["metadata"]["name"] == host.as_str()).unwrap();
    assert_eq!(dead["status"]["state"], "dead");
    cloud.ok(&["local", "start", &host]);
    wait_back(cloud, &host);
    cloud.wait_ready("web", 3);
}

fn the_leader_is_killed(cloud: &Cloud) {
    let before = cloud.wait_ready("web", 3);
    let leader = cloud.leader();
    cloud.ok(&["local", "kill", &leader]);
    cloud.wait("a write to be taken by a new leader", || {
        let output = cloud.run(&["apply", "-f", cloud.manifest("after-failover").to_str().unwrap()]);
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    });
    assert_ne!(cloud.leader(), leader);
    cloud.ok(&["local", "start", &leader]);
    let after = cloud.wait_ready("web", 3);
    assert_eq!(lives(&before), lives(&after), "a leader's death restarted a workload");
}

fn all_servers_are_killed(cloud: &Cloud, load: &Load, alone: fn(&Cloud)) {
    cloud.wait("all servers to be reachable", || {
        let status = cloud.json(&["status"]);
        if status["status"] == "healthy" { Ok(()) } else { Err(status.to_string()) }
    });
    let before = cloud.wait_ready("web", 3);
    cloud.ok(&["local", "kill", "server-a"]);
    cloud.ok(&["local", "kill", "server-b"]);
    alone(cloud);
    load.check("two servers were killed");
    cloud.ok(&["local", "kill", "server-c"]);

    // Nobody leads, nobody serves; the data plane comes back from its caches alone.
    let host = host_of(&before[0]);
    cloud.ok(&["local", "restart", &format!("agent@{host}")]);
    cloud.ok(&["local", "restart", &format!("keeper@{host}")]);
    cloud.ok(&["local", "restart", "gateway-1"]);
    wait_page(cloud, 0, "web.localhost", "/", images::PAGE);
    load.check("an agent, a keeper and a gateway were restarted with every server dead");
    let address = text(&before[0]["status"]["address6"]);
    let direct = get(&format!("http://[{address}]/"), "web.localhost");
    assert_eq!(direct.map(|(status, _)| status), Ok(200), "the instance under the restarted keeper");

    for server in ["server-a", "server-b", "server-c"] {
        cloud.ok(&["local", "start", server]);
    }
    let after = cloud.wait_ready("web", 3);
    // Everyone reports again before anything is compared.
    cloud.wait("all hosts to be ready", || {
        let hosts = cloud.list("hosts");
        let ready = hosts.iter().filter(|h| h["status"]["state"] == "ready").count();
        if ready == 6 { Ok(()) } else { Err(format!("{ready} of 6")) }
    });
    let uids = |all: &[Value]| all.iter().map(|i| text(&i["metadata"]["uid"])).collect::<BTreeSet<_>>();
    assert_eq!(uids(&before), uids(&after), "an instance was started twice or replaced");
    assert_eq!(lives(&before), lives(&cloud.wait_ready("web", 3)), "a workload was restarted");
}

fn a_link_is_cut(cloud: &Cloud) {
    let before = cloud.wait_ready("web", 3);
    let host = host_of(&before[0]);
    cloud.ok(&["local", "cut", &host]);
    let cut = Instant::now();
    wait_elsewhere(cloud, &host);
    std::thread::sleep(Duration::from_secs(60).saturating_sub(cut.elapsed()));
    cloud.ok(&["local", "heal", &host]);
    wait_back(cloud, &host);
    cloud.wait_ready("web", 3);
}

impl Cloud {
    /// A small manifest whose apply is a write.
    fn manifest(&self, name: &str) -> std::path::PathBuf {
        let path = self.path(&format!("{name}.yaml"));
        let manifest = format!(
            "apiVersion: cloudnexus/v1\nkind: Route\nmetadata:\n  name: {name}\nspec:\n  host: {name}.example.com\n  app: web\n"
        );
        std::fs::write(&path, manifest).unwrap();
        path
    }
}

#[test]
fn a_function_answers_with_a_fresh_instance_each_time_and_bad_ones_harm_nobody() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let files = tempfile::tempdir().unwrap();
    let component = images::hello_function(files.path());
    let cloud = Cloud::up(&["--zones", "1", "--hosts-per-zone", "1"]);
    cloud.ok(&["deploy", "hello", "--image", component.to_str().unwrap(), "--env", "NAME=e2e", "--timeout", "90"]);
    cloud.wait_ready("hello", 1);
    wait_page(&cloud, 0, "hello.localhost", "/", "Hello from e2e");
    for _ in 0..3 {
        let (status, body) = get(&format!("{}/counter", cloud.gateway(0)), "hello.localhost").unwrap();
        assert_eq!((status, body.trim()), (200, "1"), "a fresh instance counts from nothing");
    }

    // Stopped and started again, as over a power cut, the cloud resumes with its app.
    cloud.ok(&["down"]);
    cloud.start(&["--zones", "1", "--hosts-per-zone", "1"]);
    wait_page(&cloud, 0, "hello.localhost", "/", "Hello from e2e");

    // What is not a component is refused where it is imported.
    let garbage = files.path().join("garbage.wasm");
    std::fs::write(&garbage, b"not wasm").unwrap();
    let (_, error) = cloud.fails(&["image", "import", garbage.to_str().unwrap(), "--name", "garbage"]);
    assert!(error.contains("is not WebAssembly"), "{error}");
    // A manifest with a field that does not exist, a wrong unit, a name too long.
    for (spec, place) in [
        ("imagee: hello", "spec.imagee"),
        ("image: hello\n  resources:\n    memory: 64 megs", "spec.resources.memory"),
        ("image: hello\n  replicas: -1", "spec.replicas"),
    ] {
        let path = files.path().join("bad.yaml");
        let manifest = format!("apiVersion: cloudnexus/v1\nkind: App\nmetadata:\n  name: bad\nspec:\n  {spec}\n");
        std::fs::write(&path, manifest).unwrap();
        let (_, error) = cloud.fails(&["apply", "-f", path.to_str().unwrap()]);
        assert!(error.contains(place), "{error}");
    }
    let (code, error) = cloud.fails(&["get", "appz"]);
    assert!(error.contains("app"), "{code}: {error}");
    wait_page(&cloud, 0, "hello.localhost", "/", "Hello from e2e");
    cloud.down();
}
