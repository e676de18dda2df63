//! A change of a security group on ten hosts of a local cloud: from the moment when the request is sent to the API until it counts
//! for packets on the last host.
//!
//! One instance sends datagrams to an instance on each host all the time. The group of those lets them in or does not, in turn: a
//! permission counts when all ten have heard one that was sent after the request, a refusal when the last of them has heard its
//! last.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nexus_network::NetnsRef;
use serde_json::{Value, json};

use super::inside;
use crate::cloud::Cloud;
use crate::report::{Row, median, percentile};
use crate::{container, process};

const HOSTS: u64 = 10;
const CHANGES: usize = 20;
const PORT: u16 = 7777;
const EVERY: Duration = Duration::from_millis(5);
/// So long nothing must be heard after a refusal: 200 datagrams to each.
const SILENCE: Duration = Duration::from_secs(1);
const SETTLING: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(20);

/// When somebody heard last, and when what was heard was sent.
type Heard = Mutex<Option<(Instant, Instant)>>;

pub fn change() -> anyhow::Result<Vec<Row>> {
    let cloud = Cloud::up_as(&["--zones", "2", "--hosts-per-zone", "5", "--timeout", "120"])?;
    let archive = cloud.scratch("busybox.tar");
    container::busybox(&archive)?;
    cloud.import(&archive, "busybox")?;
    cloud.create("Network", "networks", "shop", &json!({"cidrs": ["10.0.0.0/16"]}))?;
    cloud.create("Subnet", "subnets", "front", &json!({"network": "shop", "cidr4": "10.0.1.0/24"}))?;
    let out = json!([{"id": "out", "direction": "egress"}]);
    cloud.create("SecurityGroup", "security-groups", "client", &json!({"network": "shop", "rules": out}))?;
    cloud.create("SecurityGroup", "security-groups", "web", &json!({"network": "shop", "rules": rules(true)}))?;
    let app = |replicas: u64, group: &str| {
        json!({
            "image": "busybox",
            "replicas": replicas,
            "spread": "host",
            "ports": [{"port": 80}],
            "resources": {"memory": "16Mi", "cpu": "20m"},
            "stopSignal": "KILL",
            "nics": [{"subnet": "front", "securityGroups": [group]}],
        })
    };
    cloud.create("App", "apps", "web", &app(HOSTS, "web"))?;
    cloud.create("App", "apps", "client", &app(1, "client"))?;
    cloud.wait_ready("web", HOSTS)?;
    cloud.wait_ready("client", 1)?;
    let hosts: std::collections::BTreeSet<String> =
        cloud.instances("web")?.iter().map(|i| i["status"]["host"].to_string()).collect();
    ensure!(hosts.len() as u64 == HOSTS, "the targets are on {} hosts", hosts.len());

    let nics: Value = cloud.list("nics")?;
    let mut addresses: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for app in ["web", "client"] {
        let instances: Vec<String> =
            cloud.instances(app)?.iter().filter_map(|i| Some(i["metadata"]["name"].as_str()?.to_owned())).collect();
        let of = |nic: &&Value| instances.iter().any(|i| nic["spec"]["instance"] == i.as_str());
        let items = nics["items"].as_array().context("a list")?.iter().filter(of);
        let its = items.filter_map(|nic| nic["status"]["address4"].as_str()?.parse().ok()).collect();
        addresses.insert(app.to_owned(), its);
    }
    let (targets, client) = (addresses["web"].clone(), addresses["client"][0]);
    ensure!(targets.len() as u64 == HOSTS, "{} targets have an address: {nics}", targets.len());
    let places = places(&cloud)?;
    let place = |a: &IpAddr| places.get(a).cloned().with_context(|| format!("no process has {a}"));

    let heard: Arc<Vec<Heard>> = Arc::new(targets.iter().map(|_| Mutex::default()).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let begin = Instant::now();
    let mut threads = Vec::new();
    for (n, target) in targets.iter().enumerate() {
        let at = SocketAddr::new(*target, PORT);
        let socket = inside(&place(target)?, move || UdpSocket::bind(at))??;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let (heard, stop) = (heard.clone(), stop.clone());
        threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let mut word = [0; 8];
                if let Ok(8) = socket.recv(&mut word) {
                    let sent = begin + Duration::from_nanos(u64::from_be_bytes(word));
                    *heard[n].lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), sent));
                }
            }
        }));
    }
    let sender = inside(&place(&client)?, || UdpSocket::bind(("0.0.0.0", 0)))??;
    let (to, stopped) = (targets.clone(), stop.clone());
    threads.push(std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            for target in &to {
                let word = (begin.elapsed().as_nanos() as u64).to_be_bytes();
                // Refused while nobody may listen: the next one is sent all the same.
                let _ = sender.send_to(&word, SocketAddr::new(*target, PORT));
            }
            std::thread::sleep(EVERY);
        }
    }));

    let heard = |n: usize| *heard[n].lock().unwrap_or_else(PoisonError::into_inner);
    let all_since = |since: Instant| (0..targets.len()).all(|n| heard(n).is_some_and(|(_, sent)| sent >= since));
    process::wait("datagrams at all", PATIENCE, Duration::from_millis(10), || all_since(begin).then_some(()))?;
    std::thread::sleep(SETTLING);
    let mut seconds = Vec::new();
    for change in 0..CHANGES {
        let allow = change % 2 == 1;
        let start = Instant::now();
        let spec = json!({"spec": {"rules": rules(allow)}});
        cloud.patch("/v1/regions/local/projects/default/security-groups/web", &spec)?;
        let took = if allow {
            process::wait("a permission to count", PATIENCE, Duration::from_millis(1), || {
                all_since(start).then_some(())
            })?;
            start.elapsed()
        } else {
            let last = || (0..targets.len()).filter_map(|n| Some(heard(n)?.0)).max();
            process::wait("a refusal to count", PATIENCE, Duration::from_millis(10), || {
                last().is_none_or(|last| last.elapsed() > SILENCE).then_some(())
            })?;
            last().map_or(Duration::ZERO, |last| last.saturating_duration_since(start))
        };
        seconds.push(took.as_secs_f64());
        std::thread::sleep(Duration::from_millis(300));
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| drop(t.join()));
    let name = |share: &str| format!("a rule's change on {HOSTS} hosts, API to packet, {share}");
    Ok(vec![
        Row::new(name("median"), median(&seconds) * 1e3, "ms"),
        Row::new(name(&format!("p99 of {CHANGES}")), percentile(&seconds, 0.99) * 1e3, "ms"),
    ])
}

fn rules(allow: bool) -> Value {
    let mut all = json!([{"id": "http", "direction": "ingress", "protocol": "tcp", "ports": [80]}]);
    if allow && let Some(all) = all.as_array_mut() {
        all.push(json!({"id": "told", "direction": "ingress", "protocol": "udp", "ports": [PORT]}));
    }
    all
}

/// The network namespaces of the cloud's containers, by their NICs' addresses.
fn places(cloud: &Cloud) -> anyhow::Result<BTreeMap<IpAddr, NetnsRef>> {
    let mut found = BTreeMap::new();
    for pid in cloud.processes() {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if !String::from_utf8_lossy(&words).contains("httpd\0-f") {
            continue;
        }
        let place = NetnsRef::Path(format!("/proc/{pid}/ns/net").into());
        let list = || process::run(std::process::Command::new("ip").args(["-4", "-o", "addr", "show", "dev", "nic0"]));
        let Ok(Ok(text)) = inside(&place, list) else { continue };
        let address = text.split_whitespace().skip_while(|w| *w != "inet").nth(1).and_then(|a| a.split('/').next());
        if let Some(address) = address.and_then(|a| a.parse().ok()) {
            found.insert(address, place);
        }
    }
    Ok(found)
}
