//! Placement and the care of hosts, by the real binary on a local cloud: the guides' commands, latency over a way that takes
//! its time, a storage class's folder, a rebalance. Needs root.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[path = "e2e/delay.rs"]
mod delay;
#[path = "e2e/guide.rs"]
mod guide;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;
#[allow(dead_code)]
#[path = "e2e/load.rs"]
mod load;

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::net::{Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cloud::Cloud;
use load::Load;
use serde_json::{Value, json};

/// One cloud at a time is enough for a small machine.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two zones of two hosts; those of zone-a have GPUs and a fast disk.
fn small_cloud() -> Cloud {
    assert!(nix::unistd::geteuid().is_root(), "a local cloud makes namespaces: run this as root");
    let cloud = Cloud::up(&[
        "--zones",
        "2",
        "--class",
        "zone-a:gpu-v100=2",
        "--storage-class",
        "zone-a:high-iops=1Gi",
        "--timeout",
        "120",
    ]);
    images::busybox(&cloud.path(""));
    cloud
}

fn host(cloud: &Cloud, name: &str) -> Value {
    cloud.json(&["get", "host", name])
}

/// How many instances of an app each host has, as far as it has any.
fn on_hosts(cloud: &Cloud, app: &str) -> BTreeMap<String, usize> {
    let mut hosts = BTreeMap::new();
    for instance in cloud.instances(app) {
        let host = instance["status"]["host"].as_str().unwrap_or("none").to_owned();
        *hosts.entry(host).or_default() += 1;
    }
    hosts
}

/// The files of storage classes that are in use.
fn scratch_files(cloud: &Cloud) -> Vec<PathBuf> {
    let listed =
        |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
    let hosts = listed(&cloud.data_dir().join("data"));
    hosts.iter().flat_map(|host| listed(&host.join("storage/high-iops"))).collect()
}

#[test]
fn the_guide_for_placement_does_what_it_says_and_latency_is_that_of_the_way() {
    let _turn = turn();
    let cloud = small_cloud();
    // Before anything is measured nothing meets a latency: what waits is placed as soon as something is.
    guide::follow(&cloud.path(""), "placement.md", 7, &[("IMAGE", &cloud.path("busybox"))], |heading, printed| {
        match heading {
            "Classes" => {
                cloud.wait_ready("my-app", 1);
                let on: Vec<_> = on_hosts(&cloud, "my-app").into_keys().collect();
                let status = &host(&cloud, &on[0])["status"];
                assert_eq!(
                    (&status["reservedClasses"], &status["reservedStorage"]),
                    (&json!({"gpu-v100": 1}), &json!({"high-iops": "64Mi"}),)
                );
                assert!(on[0].starts_with("zone-a-"), "{on:?}");
                let files = scratch_files(&cloud);
                assert!(files.len() == 1 && files[0].to_str().unwrap().contains(&format!("/{}/", on[0])), "{files:?}");
                assert!(std::fs::metadata(&files[0]).unwrap().len() >= 64 << 20);
                assert!(printed.contains("fast\n"), "{printed}");
            }
            "Constraints" => {
                let (web, cache) = (on_hosts(&cloud, "web"), on_hosts(&cloud, "cache"));
                assert!(
                    web.keys().any(|h| h.starts_with("zone-a")) && web.keys().any(|h| h.starts_with("zone-b")),
                    "{web:?}"
                );
                assert!(cache.keys().all(|host| web.contains_key(host)), "{cache:?}");
                let batch = cloud.json(&["get", "app", "batch"]);
                assert!(batch["spec"].get("constraints").is_none(), "{batch}");
            }
            "NUMA nodes" => {
                let instance = cloud.instances("steady").remove(0);
                let node = instance["status"]["numaNodes"][0].as_u64().expect("it is kept to a node");
                assert!(printed.contains("Cpus_allowed_list:"), "{printed}");
                let on = instance["status"]["host"].as_str().unwrap();
                let rooms = host(&cloud, on)["status"]["numaNodes"].clone();
                let room = rooms.as_array().unwrap().iter().find(|room| room["id"] == node).unwrap();
                assert_ne!(room["reservedMemory"], json!("0"), "{rooms}");
                assert!(cloud.ok(&["describe", "host", on]).contains("NUMA nodes:"));
            }
            "When nothing fits" => {
                assert!(
                    printed.contains("4 not within 1 us of a gateway (the lowest latency measured is "),
                    "{printed}"
                );
                assert!(printed.contains("4 without label disk=tape; no host has a label disk"), "{printed}");
            }
            "Latency" => assert!(printed.contains("RTT") && printed.contains("gateway: gateway-"), "{printed}"),
            _ => {}
        }
    });

    // A host that is far away.
    let members = cloud.ok(&["local", "list", "-o", "json"]);
    let members: Vec<Value> = serde_json::from_str(&members).unwrap();
    let far = members.iter().find(|member| member["name"] == "zone-b-2").unwrap();
    let address: Ipv6Addr = far["address"].as_str().unwrap().parse().unwrap();
    let mut machine = address.segments();
    machine[7] = 1;
    cloud.ok(&["host", "label", "zone-b-2", "far=yes"]);
    let relay = delay::Relay::start(far["pid"].as_i64().unwrap(), machine.into(), Duration::from_millis(60));
    let measured = |cloud: &Cloud| host(cloud, "zone-b-2")["status"]["roundTripUs"].as_u64();
    let refusal = "1 not within 20 ms of a gateway (the lowest latency measured is ";
    let nearest = cloud.wait("the delay to be measured", || {
        let args = ["deploy", "edge", "--image", "my-app", "--dry-run", "--constraints", "label.far=yes, latency<20ms"];
        let output = cloud.run(&args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match said.split_once(refusal) {
            Some((_, nearest)) if !output.status.success() => Ok(nearest.split(' ').next().unwrap().to_owned()),
            _ => Err(format!("{said} ({} packets passed)", relay.passed())),
        }
    });
    let nearest: f64 = nearest.parse().unwrap();
    assert!(nearest >= 60.0, "{nearest} ms");
    cloud.wait("the host to show it", || match measured(&cloud) {
        Some(us) if us >= 60_000 => Ok(()),
        other => Err(format!("{other:?}")),
    });
    // The others are as near as they were; and so is this one when the way is free again.
    cloud.ok(&[
        "deploy",
        "near",
        "--image",
        "my-app",
        "--replicas",
        "3",
        "--spread",
        "host",
        "--constraints",
        "latency<20ms",
    ]);
    assert!(!on_hosts(&cloud, "near").contains_key("zone-b-2"));
    cloud.ok(&["deploy", "edge", "--image", "my-app", "--no-wait", "--constraints", "label.far=yes, latency<20ms"]);
    drop(relay);
    cloud.wait_ready("edge", 1);
    assert_eq!(on_hosts(&cloud, "edge").into_keys().collect::<Vec<_>>(), ["zone-b-2"]);

    // An app of all regions takes its demands to each.
    let demands = ["--compute-class", "gpu-v100", "--constraints", "latency<20ms", "--storage-class", "high-iops"];
    cloud.ok(&[&["deploy", "everywhere", "--image", "my-app", "--region", "global"][..], &demands[..]].concat());
    assert!(on_hosts(&cloud, "everywhere").keys().all(|host| host.starts_with("zone-a-")));
    cloud.ok(&["delete", "app", "everywhere", "--region", "global"]);
    cloud.ok(&["delete", "app", "my-app"]);
    cloud.wait("the writable layer to be gone", || match scratch_files(&cloud) {
        files if files.is_empty() => Ok(()),
        files => Err(format!("{files:?}")),
    });
    cloud.down();
}

#[test]
fn the_guide_for_operating_hosts_does_what_it_says() {
    let _turn = turn();
    let cloud = small_cloud();
    guide::follow(
        &cloud.path(""),
        "operating-hosts.md",
        8,
        &[("IMAGE", &cloud.path("busybox"))],
        |heading, printed| match heading {
            "What a host has" => {
                assert_eq!(host(&cloud, "zone-a-1")["metadata"]["labels"]["disk"], "nvme");
                assert!(printed.contains("gpu-v100: 2") && printed.contains("high-iops: 1Gi"), "{printed}");
            }
            "Cordon" => assert_eq!(host(&cloud, "zone-b-2")["spec"]["cordoned"], true),
            "Disruption budgets" => {
                let app = cloud.json(&["get", "app", "site"]);
                assert_eq!(app["spec"]["disruption"], json!({"minAvailable": 3}));
            }
            "Drain" => {
                assert_eq!(host(&cloud, "zone-b-2")["status"]["reserved"]["instances"], 0);
                cloud.wait_ready("site", 4);
                // What can't go anywhere is named.
                cloud.ok(&["host", "label", "zone-b-1", "only=here"]);
                let pinned = ["deploy", "pinned", "--image", "site", "--constraints", "label.only=here"];
                cloud.ok(&pinned);
                let (_, why) = cloud.fails(&["host", "drain", "zone-b-1", "--timeout", "20s"]);
                assert!(why.contains("app default/pinned") && why.contains("label only=here"), "{why}");
                cloud.ok(&["host", "uncordon", "zone-b-1"]);
                cloud.ok(&["delete", "app", "pinned"]);
                cloud.wait_ready("site", 4);
            }
            "Uncordon" => {
                assert_eq!(host(&cloud, "zone-b-2")["spec"]["cordoned"], false);
                assert!(!on_hosts(&cloud, "site").contains_key("zone-b-2"), "nothing moves by itself");
            }
            "Rebalance" => {
                assert!(printed.contains("zone-b-2") && printed.contains("others of its app"), "{printed}");
                cloud.wait("each host to have one", || {
                    let on = on_hosts(&cloud, "site");
                    let ready = cloud.instances("site").iter().all(|i| i["status"]["ready"] == true);
                    if ready && on.len() == 4 && on.values().all(|n| *n == 1) { Ok(()) } else { Err(format!("{on:?}")) }
                });
                assert!(cloud.ok(&["rebalance"]).contains("nothing would stand better elsewhere"));
                let events = cloud.ok(&["events"]);
                assert!(events.contains("Rebalanced"), "{events}");
            }
            "Remove" => {
                let left: Vec<_> = cloud.list("hosts").iter().map(|h| h["metadata"]["name"].clone()).collect();
                assert_eq!(left, ["zone-a-1", "zone-a-2", "zone-b-1"]);
                cloud.wait_ready("site", 4);
            }
            _ => {}
        },
    );
    cloud.down();
}

/// Follows instances by `nexus get --watch`, and counts how many of an app's are ready after each change.
struct ReadyWatch {
    child: Child,
    reader: std::thread::JoinHandle<Vec<usize>>,
}

impl ReadyWatch {
    fn start(cloud: &Cloud, app: &'static str) -> Self {
        let mut command = cloud.command(&["get", "instances", "--watch", "-o", "json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let (mut ready, mut counts) = (BTreeMap::new(), Vec::new());
            for line in lines.map_while(Result::ok) {
                let change: Value = serde_json::from_str(&line).unwrap();
                let object = &change["object"];
                if object["spec"]["app"] == app {
                    let is_ready = change["event"] == "put" && object["status"]["ready"] == true;
                    ready.insert(object["metadata"]["name"].to_string(), is_ready);
                    counts.push(ready.values().filter(|ready| **ready).count());
                }
            }
            counts
        });
        Self { child, reader }
    }

    fn finish(mut self) -> Vec<usize> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reader.join().unwrap()
    }
}

#[test]
fn two_hosts_drained_at_once_leave_an_app_its_budget_and_no_request_is_lost() {
    // The load speaks plain HTTP, but its client wants to be able to do more.
    rustls::crypto::ring::default_provider().install_default().ok();
    let _turn = turn();
    let cloud = small_cloud();
    let image = cloud.path("busybox").to_str().unwrap().to_owned();
    let deploy = ["deploy", "site", "--image", &image, "--replicas", "4", "--spread", "host"];
    cloud.ok(&[&deploy[..], &["--disruption", "max-unavailable=1", "--timeout", "120"]].concat());
    assert_eq!(on_hosts(&cloud, "site").len(), 4);
    cloud.wait("the app to be reached", || {
        let mut stream = TcpStream::connect(("127.0.0.1", cloud.gateway_port)).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| e.to_string())?;
        write!(stream, "GET / HTTP/1.1\r\nhost: site.localhost\r\nconnection: close\r\n\r\n")
            .map_err(|e| e.to_string())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
        if answer.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(answer) }
    });
    let load = Load::start((0..2).map(|n| format!("{}/", cloud.gateway(n))).collect::<Vec<_>>(), "site.localhost");
    let watch = ReadyWatch::start(&cloud, "site");
    let drains = ["zone-a-1", "zone-b-1"].map(|host| {
        let mut command = cloud.command(&["host", "drain", host, "--timeout", "180s"]);
        (host, command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    });
    for (host, drain) in drains {
        let output = drain.wait_with_output().unwrap();
        assert!(output.status.success(), "{host}: {}", String::from_utf8_lossy(&output.stderr));
    }
    cloud.wait_ready("site", 4);
    load.check("after two drains");
    let hosts = on_hosts(&cloud, "site");
    assert!(!hosts.contains_key("zone-a-1") && !hosts.contains_key("zone-b-1"), "{hosts:?}");
    let counts = watch.finish();
    // The list that a watch begins with comes one by one.
    let whole = counts.iter().position(|n| *n >= 4).expect("all four were ready at first");
    assert!(counts[whole..].iter().all(|n| *n >= 3), "{counts:?}");

    // A budget that nothing may be taken from, and nowhere to go: the drain says so, and what to do.
    cloud.ok(&["deploy", "site", "--disruption", "min-available=4"]);
    let mut command = cloud.command(&["host", "drain", "zone-a-2", "--timeout", "25s"]);
    cloud.ok(&["host", "cordon", "zone-b-2"]);
    let drain = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let says = "app default/site: 4 of 4 ready, its budget wants 4 at least; instance site-";
    cloud.wait("the host to say what its drain waits for", || match cloud.ok(&["describe", "host", "zone-a-2"]) {
        text if text.contains(says) && text.contains("Drained") => Ok(()),
        text => Err(text),
    });
    let output = drain.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains(says), "{error}");
    assert!(error.contains("spec.disruption") && error.contains("host leave zone-a-2 --force"), "{error}");
    cloud.wait_ready("site", 4);
    load.finish();
    cloud.down();
}

/// On a machine of two processors or more: a host is told that they are two nodes.
#[test]
fn instances_are_kept_to_the_processors_of_their_node_and_share_none() {
    let _turn = turn();
    let cloud = small_cloud();
    let file = cloud.data_dir().join("config/zone-a-1/agent.toml");
    let node = |id: u8, cpus: u8| format!("\n[[numa_nodes]]\nid = {id}\ncpus = \"{cpus}\"\nmemory = \"1Gi\"\n");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text + &node(0, 0) + &node(9, 1)).unwrap();
    cloud.ok(&["local", "restart", "agent@zone-a-1"]);
    let rooms = |cloud: &Cloud| host(cloud, "zone-a-1")["status"]["numaNodes"].clone();
    let free = cloud.wait("the host to tell its nodes", || match rooms(&cloud) {
        rooms if rooms[1]["id"] == 9 => Ok(rooms[1]["freeCpu"].clone()),
        rooms => Err(rooms.to_string()),
    });
    cloud.ok(&["host", "label", "zone-a-1", "told=yes"]);
    let image = cloud.path("busybox").to_str().unwrap().to_owned();
    let demands = ["--cpu", "800m", "--constraints", "label.told=yes, numa=single"];
    cloud.ok(&[&["deploy", "pair", "--image", &image, "--replicas", "2"][..], &demands].concat());
    let allowed = |cloud: &Cloud| -> BTreeMap<u64, String> {
        let of = |instance: Value| {
            let name = instance["metadata"]["name"].as_str().unwrap().to_owned();
            let args = ["exec", &name, "--", "busybox", "grep", "Cpus_allowed_list", "/proc/self/status"];
            // An agent that begins anew does not answer for a moment.
            let list = cloud.wait("the instance's host to answer", || {
                let output = cloud.run(&args);
                let said = String::from_utf8_lossy(&output.stdout).split_whitespace().last().map(str::to_owned);
                said.ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
            });
            (instance["status"]["numaNodes"][0].as_u64().unwrap(), list)
        };
        cloud.wait_ready("pair", 2).into_iter().map(of).collect()
    };
    assert_eq!(allowed(&cloud), BTreeMap::from([(0, "0".to_owned()), (9, "1".to_owned())]));
    let more = ["deploy", "more", "--image", "pair", "--dry-run", "--cpu", "300m"];
    let (_, why) = cloud.fails(&[&more[..], &demands[2..]].concat());
    assert!(why.contains("1 without room on its NUMA nodes (no node has more than "), "{why}");
    let described = cloud.ok(&["describe", "host", "zone-a-1"]);
    assert!(described.contains("NUMA nodes:") && described.contains("RESERVED"), "{described}");
    // A life of the agent later they are where they were; and when they are gone, so is what they held.
    cloud.ok(&["local", "restart", "agent@zone-a-1"]);
    assert_eq!(allowed(&cloud).len(), 2);
    cloud.ok(&["delete", "app", "pair", "--wait"]);
    cloud.wait("the node to be free", || match rooms(&cloud) {
        rooms if rooms[1]["freeCpu"] == free && rooms[1]["reservedMemory"] == "0" => Ok(()),
        rooms => Err(rooms.to_string()),
    });
    cloud.down();
}
