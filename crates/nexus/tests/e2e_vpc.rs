//! Two tenants' networks with the same addresses, on three hosts: what is apart and what is open, packet by packet; again when all
//! servers are dead; and while agents are killed under traffic. Packets are sent and heard by the test itself, from within the
//! workloads' own network namespaces. Needs root, and what `cargo xtask test` installs.

#[allow(dead_code)] // The end-to-end tests use the rest.
#[path = "e2e/cloud.rs"]
mod cloud;
#[path = "e2e/frames.rs"]
mod frames;
#[allow(dead_code)]
#[path = "e2e/images.rs"]
mod images;
#[path = "e2e/inside.rs"]
mod inside;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cloud::Cloud;
use inside::{
    BRIEFLY, Echo, PATIENCE, Sniffer, Talk, addresses, datagram, dhcp, get, inside, mac, ping, send_frames, spawn,
};
use serde_json::{Value, json};

const TENANTS: [&str; 2] = ["default", "bank"];
/// Where the agents of a local cloud tell their metrics.
const AGENT_METRICS: u16 = 7451;
const ECHO: u16 = 7000;
const DATAGRAMS: u16 = 5000;
/// The balancer's, with the PROXY protocol, to the echoes.
const PROXIED: u16 = 7001;

/// What both tenants have.
const SHOP: &str = "
apiVersion: cloudnexus/v1
kind: Network
metadata: {name: shop}
spec: {cidrs: [10.0.0.0/16, 'fd12:3456:789a::/48'], flowLogs: dropped}
---
apiVersion: cloudnexus/v1
kind: RouteTable
metadata: {name: out}
spec: {network: shop}
---
apiVersion: cloudnexus/v1
kind: Subnet
metadata: {name: front}
spec: {network: shop, cidr4: 10.0.1.0/24, cidr6: 'fd12:3456:789a:1::/64'}
---
apiVersion: cloudnexus/v1
kind: Subnet
metadata: {name: back}
spec: {network: shop, cidr4: 10.0.2.0/24, cidr6: 'fd12:3456:789a:2::/64', routeTable: out}
---
apiVersion: cloudnexus/v1
kind: SecurityGroup
metadata: {name: client}
spec: {network: shop, rules: [{id: out, direction: egress}]}
---
apiVersion: cloudnexus/v1
kind: SecurityGroup
metadata: {name: web}
spec:
  network: shop
  rules:
    - {id: http, direction: ingress, protocol: tcp, ports: [80, 7000]}
    - {id: datagrams, direction: ingress, protocol: udp, ports: [5000], remotes: [{group: client}]}
    - {id: ping, direction: ingress, protocol: icmp}
---
apiVersion: cloudnexus/v1
kind: LoadBalancer
metadata: {name: front}
spec:
  subnet: front
  listeners:
    - {port: 80, targets: [{to: {app: web}}]}
    - {port: 7000, targets: [{to: {app: web}}]}
    - {port: 7001, proxyProtocol: v2, targets: [{to: {app: web}, port: 7000}]}
";

/// What only the first has: a network beside it of which a part is opened, and ways to the outside and in. POOL stands for the
/// addresses of the outside.
const BESIDE: &str = "
apiVersion: cloudnexus/v1
kind: Network
metadata: {name: data}
spec: {cidrs: [10.9.0.0/16]}
---
apiVersion: cloudnexus/v1
kind: Peering
metadata: {name: to-data}
spec: {network: shop, peerNetwork: data, cidrs: [10.9.1.0/24]}
---
apiVersion: cloudnexus/v1
kind: Peering
metadata: {name: to-shop}
spec: {network: data, peerNetwork: shop}
---
apiVersion: cloudnexus/v1
kind: RouteTable
metadata: {name: to-shop}
spec: {network: data, routes: [{to: 10.0.0.0/16, via: {peering: to-shop}}]}
---
apiVersion: cloudnexus/v1
kind: Subnet
metadata: {name: open}
spec: {network: data, cidr4: 10.9.1.0/24, routeTable: to-shop}
---
apiVersion: cloudnexus/v1
kind: Subnet
metadata: {name: shut}
spec: {network: data, cidr4: 10.9.2.0/24, routeTable: to-shop}
---
apiVersion: cloudnexus/v1
kind: SecurityGroup
metadata: {name: data}
spec:
  network: data
  rules: [{id: all, direction: ingress}, {id: out, direction: egress}]
---
apiVersion: cloudnexus/v1
kind: NatGateway
metadata: {name: nat}
spec: {network: shop}
---
apiVersion: cloudnexus/v1
kind: InternetGateway
metadata: {name: door}
spec: {network: shop}
---
apiVersion: cloudnexus/v1
kind: RouteTable
metadata: {name: out}
spec:
  network: shop
  routes:
    - {to: 10.9.0.0/16, via: {peering: to-data}}
    - {to: 0.0.0.0/0, via: {nat: nat}}
---
apiVersion: cloudnexus/v1
kind: RouteTable
metadata: {name: door}
spec: {network: shop, routes: [{to: 0.0.0.0/0, via: internet}]}
---
apiVersion: cloudnexus/v1
kind: Subnet
metadata: {name: front}
spec: {network: shop, cidr4: 10.0.1.0/24, cidr6: 'fd12:3456:789a:1::/64', routeTable: door}
---
apiVersion: cloudnexus/v1
kind: AddressPool
metadata: {name: public}
spec: {cidrs: [POOL]}
---
apiVersion: cloudnexus/v1
kind: FloatingIp
metadata: {name: shop}
spec: {pool: public, nic: NIC}
";

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_owned()
}

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {error}", words.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A command in the network namespace of a process.
fn at(pid: i32, words: &[&str]) -> String {
    run("nsenter", &[&["--target", &pid.to_string(), "--net"], words].concat())
}

/// One instance with a NIC.
#[derive(Debug, Clone)]
struct Workload {
    project: &'static str,
    app: String,
    instance: String,
    nic: String,
    host: String,
    four: Ipv4Addr,
    six: Option<IpAddr>,
    pid: i32,
}

impl Workload {
    fn all(&self) -> impl Iterator<Item = IpAddr> {
        [IpAddr::V4(self.four)].into_iter().chain(self.six)
    }

    /// What its page says.
    fn who(&self) -> String {
        format!("{}/{}", self.project, self.instance)
    }

    fn at(&self, port: u16) -> SocketAddr {
        (self.four, port).into()
    }
}

/// The web servers of this test's containers, by their environment.
fn web_servers(mark: &str) -> Vec<i32> {
    let has = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        environment.split(|b| *b == 0).any(|pair| pair == format!("MARK={mark}").as_bytes())
            && command.starts_with(b"/bin/busybox\0httpd")
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(has).collect()
}

/// What the checks need to know, read from the cloud once: they ask no server.
struct Site {
    workloads: Vec<Workload>,
    balancer: SocketAddr,
    floating: SocketAddr,
    /// The one to which the floating address leads.
    behind: Workload,
    outside: Ipv4Addr,
    /// The hosts' own addresses, and their first processes.
    hosts: Vec<(String, i32, Ipv4Addr)>,
}

impl Site {
    fn of(&self, project: &str, app: &str) -> Vec<&Workload> {
        self.workloads.iter().filter(|w| w.project == project && w.app == app).collect()
    }

    fn client(&self, project: &str) -> &Workload {
        self.of(project, "client")[0]
    }
}

/// The other end of tenants' ways out: an address of this machine, and its way to the pool.
struct Outside {
    link: String,
    address: Ipv4Addr,
    pool: String,
}

impl Outside {
    /// Addresses for benchmarks of networks (RFC 2544), which nobody else has; by the process, as other tests run beside this one.
    fn new() -> Self {
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let (link, address) = (format!("nxo{}", std::process::id()), Ipv4Addr::new(198, 18 | (high & 1), low, 1));
        let outside = Self { link, address, pool: format!("198.{}.{low}.16/28", 18 | (high & 1)) };
        let peer = format!("nxp{}", std::process::id());
        run("ip", &["link", "add", &outside.link, "type", "veth", "peer", "name", &peer]);
        run("ip", &["addr", "add", &format!("{address}/32"), "dev", &outside.link]);
        run("ip", &["link", "set", &outside.link, "up"]);
        outside
    }

    /// Leads the pool onto the wire that this host is on: whichever has an address of it answers for it.
    fn lead_to(&self, host: Ipv4Addr) {
        let route = run("ip", &["-o", "route", "get", &host.to_string()]);
        let link = route.split_whitespace().skip_while(|word| *word != "dev").nth(1).expect("hosts are on a link");
        run("ip", &["route", "add", &self.pool, "dev", link]);
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for words in [&["route", "del", &self.pool][..], &["link", "del", &self.link]] {
            Command::new("ip").args(words).stderr(Stdio::null()).status().ok();
        }
    }
}

#[test]
fn tenants_are_apart_and_what_is_open_stays_open_without_servers_and_over_agents() {
    let files = tempfile::tempdir().unwrap();
    let layout = images::curl(files.path());
    let outside = Outside::new();
    let cloud = Cloud::up(&["--zones", "3", "--hosts-per-zone", "1"]);
    let site = build(&cloud, &layout, &outside);
    let echoes: Vec<Echo> = site.workloads.iter().map(|w| Echo::start(w.pid, ECHO)).collect();

    eprintln!("as it should be");
    everything_holds(&site);
    traces_agree(&cloud, &site);
    fuzzed_packets_stay_within_their_tenant(&site, 1);
    spoofed_packets_are_counted(&cloud, &site);

    eprintln!("without servers, over agents");
    let talks = conversations(&site);
    let servers = members(&cloud, "server");
    for (server, _) in &servers {
        cloud.ok(&["local", "kill", server]);
    }
    everything_holds(&site);
    cloud.wait("hosts to tell names and addresses", || names_and_addresses_are_told(&site));
    for (host, ..) in &site.hosts {
        cloud.ok(&["local", "kill", &format!("agent@{host}")]);
    }
    // The agents come back from their disks, and find no server.
    everything_holds(&site);
    fuzzed_packets_stay_within_their_tenant(&site, 2);
    cloud.wait("restarted agents to tell names and addresses", || names_and_addresses_are_told(&site));
    talks.iter().for_each(Talk::goes_on);

    eprintln!("with servers again");
    for (server, _) in &servers {
        cloud.ok(&["local", "start", server]);
    }
    cloud.wait("every host to have what it should", || said(&cloud.run(&["net", "check"])));
    everything_holds(&site);
    talks.iter().for_each(Talk::goes_on);
    talks.into_iter().for_each(Talk::end);
    a_relay_that_is_killed_is_replaced(&cloud, &site);
    drop(echoes);

    eprintln!("a host leaves");
    a_host_leaves(&cloud, &site);
    cloud.down();
}

fn said(output: &std::process::Output) -> Result<String, String> {
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{out}{error}")) }
}

fn list(cloud: &Cloud, kind: &str, project: &str) -> Vec<Value> {
    let list = cloud.json(&["get", kind, "--project", project]);
    list["items"].as_array().unwrap_or_else(|| panic!("{list}")).clone()
}

fn members(cloud: &Cloud, role: &str) -> Vec<(String, i32)> {
    let members = cloud.json(&["local", "list"]);
    let all = members.as_array().unwrap().iter().filter(|m| m["role"] == role);
    all.map(|m| (text(&m["name"]), m["pid"].as_i64().and_then(|pid| pid.try_into().ok()).unwrap_or(-1))).collect()
}

fn apply(cloud: &Cloud, project: &str, manifests: &str) {
    let file = cloud.path("manifests.yaml");
    std::fs::write(&file, manifests).unwrap();
    cloud.ok(&["apply", "--project", project, "-f", file.to_str().unwrap()]);
}

fn build(cloud: &Cloud, layout: &Path, outside: &Outside) -> Site {
    let bank = "apiVersion: cloudnexus/v1\nkind: Project\nmetadata: {name: bank}\nspec: {organization: default}\n";
    apply(cloud, "default", bank);
    let mark = |project: &str| format!("vpc-{}-{project}", std::process::id());
    let image = layout.to_str().unwrap();
    for project in TENANTS {
        apply(cloud, project, SHOP);
        let env = format!("MARK={}", mark(project));
        let deploy = |words: &[&str]| {
            let common = ["deploy", "--project", project, "--image", image, "--port", "80", "--env", &env];
            cloud.ok(&[&common, words].concat())
        };
        deploy(&["web", "--replicas", "3", "--nic", "front:web"]);
        deploy(&["client", "--nic", "back:client"]);
    }
    let door = list(cloud, "nics", "default").into_iter().find(|n| text(&n["metadata"]["name"]).starts_with("web-"));
    let door = text(&door.expect("the web servers have NICs")["metadata"]["name"]);
    apply(cloud, "default", &BESIDE.replace("POOL", &outside.pool).replace("NIC", &door));
    for app in ["open", "shut"] {
        let (env, nic) = (format!("MARK={}", mark("default")), format!("{app}:data"));
        cloud.ok(&["deploy", app, "--image", image, "--port", "80", "--env", &env, "--nic", &nic]);
    }

    let mut workloads = Vec::new();
    for project in TENANTS {
        let pids = web_servers(&mark(project));
        for instance in list(cloud, "instances", project) {
            let name = text(&instance["metadata"]["name"]);
            let nics = list(cloud, "nics", project);
            let nic = nics.iter().find(|n| n["status"]["instance"] == instance["metadata"]["uid"]).unwrap();
            let four = text(&nic["status"]["address4"]).parse().unwrap();
            // Each instance is its own: two of two tenants may have the same addresses.
            let has = |pid: &&i32| addresses(**pid, "nic0").contains(&IpAddr::V4(four));
            let pid = *pids.iter().find(has).unwrap_or_else(|| panic!("{name} does not run with {four}"));
            let six = nic["status"]["address6"].as_str().map(|a| a.parse().unwrap());
            let (app, nic, host) = (&instance["spec"]["app"], &nic["metadata"]["name"], &nic["status"]["host"]);
            let (app, nic, host) = (text(app), text(nic), text(host));
            let workload = Workload { project, app, instance: name, nic, host, four, six, pid };
            std::fs::write(format!("/proc/{pid}/root/srv/who"), workload.who()).unwrap();
            workloads.push(workload);
        }
    }
    let hosts: Vec<_> = members(cloud, "host").into_iter().map(|(name, pid)| (name, pid, uplink(pid))).collect();
    outside.lead_to(hosts[0].2);
    let address = |kind: &str, name: &str, field: &str| {
        let object = cloud.json(&["get", kind, name]);
        text(&object["status"][field]).parse::<IpAddr>().unwrap()
    };
    let behind = workloads.iter().find(|w| w.nic == door && w.project == "default").unwrap().clone();
    let site = Site {
        balancer: (address("load-balancer", "front", "address4"), 80).into(),
        floating: (address("floating-ip", "shop", "address"), 80).into(),
        outside: outside.address,
        workloads,
        behind,
        hosts,
    };
    for project in TENANTS {
        let webs = site.of(project, "web");
        let hosts: BTreeSet<&str> = webs.iter().map(|w| w.host.as_str()).collect();
        assert_eq!((webs.len(), hosts.len()), (3, 3), "one on each host");
        let own: BTreeSet<Ipv4Addr> = site.workloads.iter().filter(|w| w.project == project).map(|w| w.four).collect();
        let shared = site.workloads.iter().filter(|w| w.project != project && own.contains(&w.four)).count();
        assert!(shared >= 2, "the tenants have the same addresses: {:#?}", site.workloads);
        // What was just made counts within a moment on every host.
        let client = site.client(project);
        for web in webs {
            cloud.wait("every web server to be reached", || get(client.pid, web.at(80), "/who", BRIEFLY));
        }
    }
    cloud.wait("the peering to be open", || {
        get(site.client("default").pid, site.of("default", "open")[0].at(80), "/who", BRIEFLY)
    });
    cloud.wait("the floating address to lead in", || get(0, site.floating, "/who", BRIEFLY));
    site
}

/// A host's own IPv4 address.
fn uplink(host: i32) -> Ipv4Addr {
    let all = addresses(host, "uplink").into_iter();
    let mut four = all.filter_map(|a| if let IpAddr::V4(a) = a { Some(a) } else { None });
    four.next().expect("hosts have an address on their wire")
}

/// Everything that is to be open is, and nothing else. Asks no server.
fn everything_holds(site: &Site) {
    std::thread::scope(|scope| {
        let checks: [fn(&Site); 6] = [
            own_is_reached,
            others_are_not,
            groups_hold,
            a_peering_opens_what_it_says,
            a_balancer_balances,
            ways_out_and_in,
        ];
        let running: Vec<_> = checks.into_iter().map(|check| scope.spawn(move || check(site))).collect();
        running.into_iter().for_each(|check| check.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
    });
}

fn own_is_reached(site: &Site) {
    for project in TENANTS {
        let client = site.client(project);
        for web in site.of(project, "web") {
            for address in web.all() {
                assert_eq!(get(client.pid, (address, 80).into(), "/who", PATIENCE), Ok(web.who()), "{address}");
                assert!(ping(client.pid, address, PATIENCE), "{project}'s client pings {address}");
                let to = (address, DATAGRAMS).into();
                assert!(datagram(client.pid, web.pid, to, PATIENCE), "{project}'s client sends to {address}");
            }
        }
    }
}

/// An address that only the other tenant has leads nowhere; one that both have leads to one's own, as seen above.
fn others_are_not(site: &Site) {
    let one = |from: &Workload, to: &Workload, address: IpAddr| {
        let (here, there) = (format!("{}'s {}", from.project, from.app), to.who());
        let got = get(from.pid, (address, 80).into(), "/who", BRIEFLY);
        assert!(got.is_err(), "{here} reaches {there} at {address} by TCP: {got:?}");
        assert!(!ping(from.pid, address, BRIEFLY), "{here} reaches {there} at {address} by ICMP");
    };
    std::thread::scope(|scope| {
        for (project, other) in [(TENANTS[0], TENANTS[1]), (TENANTS[1], TENANTS[0])] {
            let own: BTreeSet<IpAddr> =
                site.workloads.iter().filter(|w| w.project == project).flat_map(Workload::all).collect();
            let from = site.client(project);
            let others = site.workloads.iter().filter(move |w| w.project == other);
            for (to, address) in others.flat_map(|w| w.all().map(move |a| (w, a))).filter(|(_, a)| !own.contains(a)) {
                scope.spawn(move || one(from, to, address));
            }
        }
    });
    // Nothing of what one sends comes to who has the same address elsewhere.
    let sniffers: Vec<Sniffer> =
        site.of("bank", "web").iter().map(|w| Sniffer::start(w.pid, "nic0", b"of the default tenant")).collect();
    let from = site.client("default");
    for web in site.of("bank", "web") {
        let to = web.at(DATAGRAMS);
        inside(from.pid, move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            (0..5).for_each(|_| drop(socket.send_to(b"of the default tenant", to)));
        });
    }
    std::thread::sleep(Duration::from_millis(300));
    let seen: u64 = sniffers.into_iter().map(Sniffer::seen).sum();
    assert_eq!(seen, 0, "datagrams of one tenant came to the other");
}

/// What no rule allows is dropped; answers to what one allows have passed above.
fn groups_hold(site: &Site) {
    std::thread::scope(|scope| {
        for project in TENANTS {
            let (client, web) = (site.client(project), site.of(project, "web")[0]);
            scope.spawn(move || get(client.pid, web.at(81), "/", BRIEFLY).expect_err("no rule lets port 81 in"));
            // The client's own server listens, and its group lets nobody in; nor may the web servers begin anything.
            scope.spawn(move || get(web.pid, client.at(80), "/who", BRIEFLY).expect_err("no rule lets them begin"));
            scope.spawn(move || assert!(!ping(web.pid, client.four.into(), BRIEFLY)));
        }
    });
}

fn a_peering_opens_what_it_says(site: &Site) {
    let (open, shut) = (site.of("default", "open")[0], site.of("default", "shut")[0]);
    let client = site.client("default");
    assert_eq!(get(client.pid, open.at(80), "/who", PATIENCE), Ok(open.who()));
    assert!(ping(client.pid, open.four.into(), PATIENCE));
    std::thread::scope(|scope| {
        scope.spawn(|| get(client.pid, shut.at(80), "/who", BRIEFLY).expect_err("the peering is of another part"));
        scope.spawn(|| assert!(!ping(client.pid, shut.four.into(), BRIEFLY)));
        // Nor is what the peering leaves out reached the other way, or by another tenant.
        scope.spawn(|| get(shut.pid, site.of("default", "web")[0].at(80), "/who", BRIEFLY).expect_err("nor back"));
        let stranger = site.client("bank");
        scope.spawn(|| get(stranger.pid, open.at(80), "/who", BRIEFLY).expect_err("nor another tenant"));
    });
}

fn a_balancer_balances(site: &Site) {
    let client = site.client("default");
    let all: BTreeSet<String> = site.of("default", "web").iter().map(|w| w.who()).collect();
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        seen.insert(get(client.pid, site.balancer, "/who", PATIENCE).unwrap());
        if seen == all {
            return;
        }
    }
    panic!("of {all:?} the balancer leads to {seen:?}");
}

fn ways_out_and_in(site: &Site) {
    assert_eq!(get(0, site.floating, "/who", PATIENCE), Ok(site.behind.who()), "in by the floating address");
    let client = site.client("default");
    let host = site.hosts.iter().find(|(name, ..)| *name == client.host).unwrap();
    let listener = TcpListener::bind((site.outside, 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let out = spawn(client.pid, move || TcpStream::connect_timeout(&to, PATIENCE)?.write_all(b"hello"));
    out.join().unwrap().expect("a NIC without an address of the outside begins connections by the NAT gateway");
    let (mut stream, by) = listener.accept().unwrap();
    assert_eq!(by.ip(), IpAddr::V4(host.2), "out by its host's own address");
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hello");
    // The other tenant has asked for no way out, and a way out leads to no host.
    let stranger = site.client("bank");
    let tried = move || TcpStream::connect_timeout(&to, BRIEFLY).map(drop);
    inside(stranger.pid, tried).expect_err("it has no way out");
    let closed = (host.2, AGENT_METRICS).into();
    inside(client.pid, move || TcpStream::connect_timeout(&closed, BRIEFLY).map(drop)).expect_err("hosts are closed");
}

/// A name, asked as programs ask for it, in a container; and its own address, by DHCP.
fn names_and_addresses_are_told(site: &Site) -> Result<(), String> {
    let client = site.client("default");
    assert_eq!(dhcp(client.pid, "nic0")?, client.four);
    let words = ["--net", "--root", "--wd", "/usr/bin/getent", "ahostsv4", "web.default.internal"];
    let output = Command::new("nsenter").args(["--target", &client.pid.to_string()]).args(words).output().unwrap();
    let told = said(&output)?;
    let found = told.lines().filter_map(|l| l.split(' ').next()?.parse::<Ipv4Addr>().ok()).collect::<BTreeSet<_>>();
    let wanted = site.of("default", "web").iter().map(|w| w.four).collect::<BTreeSet<_>>();
    if found == wanted { Ok(()) } else { Err(format!("{found:?} instead of {wanted:?}")) }
}

/// Connections of every sort that are used from now on.
fn conversations(site: &Site) -> Vec<Talk> {
    let client = site.client("default");
    let mut all: Vec<Talk> =
        site.of("default", "web").iter().map(|w| Talk::begin(&w.who(), client.pid, w.at(ECHO))).collect();
    let (open, bank) = (site.of("default", "open")[0], site.client("bank"));
    all.push(Talk::begin("over the peering", client.pid, open.at(ECHO)));
    all.push(Talk::begin("to the balancer", client.pid, (site.balancer.ip(), ECHO).into()));
    all.push(relayed(site));
    all.push(Talk::begin("from outside", 0, (site.floating.ip(), ECHO).into()));
    all.push(Talk::begin("of the other tenant", bank.pid, site.of("bank", "web")[0].at(ECHO)));
    all.iter().for_each(Talk::goes_on);
    all
}

/// One by the relay of the client's host: the echo sends back what it was told first of the client.
fn relayed(site: &Site) -> Talk {
    let (client, to) = (site.client("default"), SocketAddr::new(site.balancer.ip(), PROXIED));
    let IpAddr::V4(balancer) = to.ip() else { panic!("{to}") };
    let header = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &client.four.octets(), &balancer.octets()].concat();
    Talk::begin_after("by a relay", client.pid, to, header, 4)
}

/// The relays of the first tenant's network, of all hosts.
fn relays(cloud: &Cloud) -> Vec<i32> {
    let network = text(&cloud.json(&["get", "network", "shop"])["metadata"]["uid"]);
    let is_one = |pid: &i32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|b| *b == 0).collect();
        words.get(1) == Some(&&b"relay"[..]) && words.get(2).is_some_and(|socket| socket.ends_with(network.as_bytes()))
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(is_one).collect()
}

/// What it relayed is lost with a relay; what comes after is relayed by another.
fn a_relay_that_is_killed_is_replaced(cloud: &Cloud, site: &Site) {
    let before = relays(cloud);
    assert_eq!(before.len(), 3, "one on each host of the network");
    for pid in &before {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let rights = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
        assert!(rights("CapEff:").ends_with("0000000000002000"), "it may only speak in others' names: {status}");
        assert!(rights("CapPrm:").ends_with("0000000000002000") && !rights("Uid:").contains("\t0"), "{status}");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    cloud.wait("other relays", || {
        let now = relays(cloud);
        if now.len() == 3 && now.iter().all(|pid| !before.contains(pid)) { Ok(()) } else { Err(format!("{now:?}")) }
    });
    cloud.wait("every host to have what it should", || said(&cloud.run(&["net", "check"])));
    let talk = relayed(site);
    talk.goes_on();
    talk.end();
}

/// The hosts' own word, held against a real packet each.
fn traces_agree(cloud: &Cloud, site: &Site) {
    let (open, shut) = (site.of("default", "open")[0], site.of("default", "shut")[0]);
    let web = site.of("default", "web")[0];
    let trace = |project: &str, from: &Workload, to: &str| {
        cloud.json(&["net", "trace", "--project", project, "--from", &from.nic, "--to", to, "--probe"])
    };
    let client = site.client("default");
    let relayed = trace("default", client, &format!("{}:{PROXIED}/tcp", site.balancer.ip()));
    assert_eq!(relayed["verdict"], "delivered", "{relayed:#}");
    assert!(relayed["hops"].to_string().contains("relayed (PROXY v2)"), "{relayed:#}");
    for (to, verdict) in [
        (format!("{}:80/tcp", web.four), "delivered"),
        (format!("{}:81/tcp", web.four), "dropped"),
        (format!("{}/icmp", web.four), "delivered"),
        (format!("{}:80/tcp", open.four), "delivered"),
        (format!("{}:80/tcp", shut.four), "dropped"),
        (format!("{}:{AGENT_METRICS}/tcp", site.hosts[0].2), "dropped"),
    ] {
        let told = trace("default", client, &to);
        assert_eq!(told["verdict"], verdict, "{to}: {told:#}");
        assert_eq!(told["probed"], verdict == "delivered", "{to}: {told:#}");
    }
    assert_eq!(trace("default", web, &format!("{}:80/tcp", client.four))["verdict"], "dropped");
    assert_eq!(trace("bank", site.client("bank"), &format!("{}:80/tcp", open.four))["verdict"], "dropped");
}

/// Has scapy send what it can think of from a workload's link, and says how much that was.
fn scapy(site: &Site, from: &Workload, seed: u64) -> usize {
    let hardware = |pid: i32| mac(pid, "nic0").map(|octet| format!("{octet:02x}")).join(":");
    let (own, hosts) = (&site.workloads, &site.hosts);
    let aims = json!({
        "seed": seed, "count": 1500, "link": "nic0", "mark": str::from_utf8(frames::MARK).unwrap(),
        "own4": from.four, "own6": from.six, "mac": hardware(from.pid), "gateway": frames::GATEWAY.map(|o| format!("{o:02x}")).join(":"),
        "four": own.iter().map(|w| w.four).chain(hosts.iter().map(|h| h.2)).collect::<Vec<_>>(),
        "six": own.iter().filter_map(|w| w.six).collect::<Vec<_>>(),
        "macs": own.iter().map(|w| hardware(w.pid)).collect::<Vec<_>>(),
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/fuzz.py");
    let mut command = Command::new("nsenter");
    // Debian's own interpreter is the one that Debian's scapy is for.
    command.args(["--target", &from.pid.to_string(), "--net", "timeout", "300", "/usr/bin/python3"]).arg(script);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(aims.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{aims}: {}", output.status);
    let sent = str::from_utf8(&output.stdout).unwrap().trim().parse().unwrap();
    assert!(sent > 1000, "{sent} of scapy's were sent");
    sent
}

/// Packets of every sort, many of them broken: none comes to the other tenant, and one's own are still reached.
fn fuzzed_packets_stay_within_their_tenant(site: &Site, seed: u64) {
    for (project, other) in [(TENANTS[0], TENANTS[1]), (TENANTS[1], TENANTS[0])] {
        let own: Vec<Sniffer> =
            site.of(project, "web").iter().map(|w| Sniffer::start(w.pid, "nic0", frames::MARK)).collect();
        let others = site.workloads.iter().filter(|w| w.project == other);
        let others: Vec<Sniffer> = others.map(|w| Sniffer::start(w.pid, "nic0", frames::MARK)).collect();
        let client = site.client(project);
        let aims = frames::Aims {
            mac: mac(client.pid, "nic0"),
            own: client.four,
            macs: site.workloads.iter().map(|w| mac(w.pid, "nic0")).collect(),
            addresses: site.workloads.iter().map(|w| w.four).chain(site.hosts.iter().map(|h| h.2)).collect(),
        };
        let sent = send_frames(client.pid, "nic0", frames::fuzzed(seed, 3000, &aims));
        assert!(sent > 2000, "{sent} were sent");
        let sent = sent + scapy(site, client, seed);
        let well: Vec<_> = site.of(project, "web").iter().map(|w| frames::datagram(&aims, w.four, DATAGRAMS)).collect();
        send_frames(client.pid, "nic0", well);
        std::thread::sleep(Duration::from_millis(500));
        let (own, others): (u64, u64) =
            (own.into_iter().map(Sniffer::seen).sum(), others.into_iter().map(Sniffer::seen).sum());
        assert!(own >= 3, "of {sent} packets {own} came to one's own: what is listened for can come");
        assert_eq!(others, 0, "of {sent} packets {others} came to another tenant (seed {seed})");
        let web = site.of(project, "web")[0];
        assert_eq!(get(client.pid, web.at(80), "/who", PATIENCE), Ok(web.who()), "after that");
    }
}

/// What a host has counted as dropped, by `project`, `network`, `reason` as they stand in its metrics.
fn dropped(cloud: &Cloud, host: &str, labels: &str) -> Result<u64, String> {
    let object = cloud.json(&["get", "host", host]);
    let address: SocketAddr = text(&object["spec"]["address"]).parse().unwrap();
    let page = get(0, (address.ip(), AGENT_METRICS).into(), "/metrics", PATIENCE)?;
    let name = format!("nexus_agent_network_dropped_packets_total{{{labels}}} ");
    let line = page.lines().find_map(|l| l.strip_prefix(&name)?.parse().ok());
    line.ok_or_else(|| format!("no {name} in {page}"))
}

fn spoofed_packets_are_counted(cloud: &Cloud, site: &Site) {
    let (client, web) = (site.client("default"), site.of("default", "web")[0]);
    let labels = "project=\"default\",network=\"shop\",reason=\"spoofed_address\"";
    let before = dropped(cloud, &client.host, labels).unwrap_or(0);
    let heard = Sniffer::start(web.pid, "nic0", frames::MARK);
    // In the name of another NIC of its own network, and of an address that nobody has.
    let lies = [site.of("default", "web")[1].four, Ipv4Addr::new(10, 0, 3, 77)].map(|own| {
        let aims = frames::Aims { mac: mac(client.pid, "nic0"), own, macs: Vec::new(), addresses: Vec::new() };
        frames::datagram(&aims, web.four, DATAGRAMS)
    });
    let lies: Vec<Vec<u8>> = std::iter::repeat_n(lies, 25).flatten().collect();
    assert_eq!(send_frames(client.pid, "nic0", lies), 50);
    cloud.wait("spoofed packets to be counted", || {
        let now = dropped(cloud, &client.host, labels)?;
        if now >= before + 50 { Ok(()) } else { Err(format!("{before}, then {now}")) }
    });
    assert_eq!(heard.seen(), 0, "nothing came of them");
    // Its tenant sees it in the network's flows, and nobody else does.
    let flows = |project: &str| cloud.json(&["net", "flows", "shop", "--project", project, "--limit", "10000"]);
    let lied = |flows: &Value| {
        let all = flows["items"].as_array().unwrap().iter();
        all.filter(|f| f["dropped"] == "spoofed_address" && f["source"] == "10.0.3.77").count()
    };
    cloud.wait("the tenant to see them", || match lied(&flows("default")) {
        0 => Err("no such flow".to_owned()),
        _ => Ok(()),
    });
    assert_eq!(lied(&flows("bank")), 0, "another tenant does not");
    // What the host's own table drops counts too: those that knocked at a host's door.
    let of_host = |reason: &str| {
        let labels = format!("project=\"\",network=\"\",reason=\"{reason}\"");
        dropped(cloud, &client.host, &labels).unwrap_or(0)
    };
    cloud.wait("the host's own table to be counted", || match of_host("closed") + of_host("to_host") {
        0 => Err("nothing is counted".to_owned()),
        _ => Ok(()),
    });
}

/// What a host has of tenants' networks, by its own namespaces.
fn remains(pid: i32) -> Vec<String> {
    let mut left: Vec<String> = Vec::new();
    let ours = |line: &&str| ["nxu", "nxn", ": vx", ": np"].iter().any(|p| line.contains(p));
    left.extend(at(pid, &["ip", "-o", "link"]).lines().filter(ours).map(str::to_owned));
    left.extend(at(pid, &["nft", "list", "tables"]).lines().filter(|l| l.contains("nexus-vpc")).map(str::to_owned));
    for dir in ["networks", "relays"] {
        let files = std::fs::read_dir(format!("/proc/{pid}/root/run/nexus/{dir}")).into_iter().flatten().flatten();
        // Where relays have no files.
        let names = files.map(|f| f.file_name().to_string_lossy().into_owned()).filter(|name| name != "root");
        left.extend(names.map(|name| format!("{dir}/{name}")));
    }
    left
}

/// One that is drained keeps nothing of tenants' networks, and all of what others have made there.
fn a_host_leaves(cloud: &Cloud, site: &Site) {
    // Not the one to which the floating address leads.
    let (name, pid, _) = site.hosts.iter().find(|(name, ..)| *name != site.behind.host).unwrap();
    assert!(remains(*pid).len() >= 3, "what is looked for is there as yet");
    at(*pid, &["ip", "link", "add", "theirs0", "type", "veth", "peer", "name", "theirs1"]);
    at(*pid, &["ip", "addr", "add", "192.0.2.7/24", "dev", "theirs0"]);
    at(*pid, &["ip", "link", "set", "theirs1", "up"]);
    at(*pid, &["ip", "link", "set", "theirs0", "up"]);
    at(*pid, &["ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.9"]);
    at(*pid, &["ip", "rule", "add", "to", "198.51.100.7", "table", "4242", "priority", "4242"]);
    at(*pid, &["nft", "add", "table", "inet", "theirs"]);
    at(*pid, &["nft", "add", "chain", "inet", "theirs", "mine"]);
    cloud.ok(&["host", "drain", name]);
    cloud.wait("nothing of tenants' networks to be left on it", || {
        let left = remains(*pid);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
    });
    assert!(at(*pid, &["ip", "-o", "addr", "show", "dev", "theirs0"]).contains("192.0.2.7/24"));
    assert!(at(*pid, &["ip", "route"]).contains("198.51.100.0/24 via 192.0.2.9 dev theirs0"));
    assert!(at(*pid, &["ip", "rule"]).contains("4242:"));
    assert!(at(*pid, &["nft", "list", "table", "inet", "theirs"]).contains("chain mine"));
    // The others serve on: whoever was on it has NICs elsewhere.
    let found = list(cloud, "nics", "bank");
    assert!(found.len() >= 4 && found.iter().all(|n| n["status"]["host"] != name.as_str()), "{found:#?}");
    assert_eq!(get(0, site.floating, "/who", PATIENCE), Ok(site.behind.who()));
}
