//! Tenants' networks: what passes between two containers on two hosts in a second, and how long a question and its answer
//! take; beside a veth pair and a VXLAN tunnel that are made by hand in the same shape, without any rule. Then how long a NIC
//! takes until something answers it, and a host's thousand NICs.
//!
//! Hosts and containers are network namespaces on one wire, in this process's own. Both ways are measured in turn, so that
//! what else the machine does meets both. IPv4 within, IPv6 on the wire. [`balance`], [`change`] and [`told`] tell of
//! themselves. `NEXUS_BENCH_PARTS=throughput,nics,elsewhere,balance,change,told` picks parts.

mod balance;
mod change;
mod told;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nexus_model::plan::{
    Direction, GroupPlan, HostNetworks, Mac, NetworkPlan, NicPlace, NicPlan, Remote, RouteTablePlan, RulePlan,
    RuleProtocol, SubnetPlan,
};
use nexus_model::{Cidr, Uid};
use nexus_network::vpc::Engine;
use nexus_network::{HostLink, HostNet, InstanceAddress, InstanceNet, NetnsRef, Underlay, UnderlayAddress, enter};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::process;
use crate::report::{Row, median, percentile};

const ROUNDS: usize = 6;
const STREAM: Duration = Duration::from_secs(2);
/// Of each way, again and again in turn.
const QUESTIONS: usize = 250;
const TURNS: usize = 20;
/// Where asker and answerer run. On one core, all time is the way's; on two, as on two hosts, most of it is the waking of the other.
const CORES: [[usize; 2]; 2] = [[0, 0], [0, 1]];
const NICS: u16 = 1_000;
/// Of networks that a host has one NIC of.
const ELSEWHERE: [u16; 2] = [4_000, 16_000];
const RULES: u16 = 200;
const PEER: &str = "veth and VXLAN by hand";
const PATIENCE: Duration = Duration::from_secs(20);

struct World {
    dir: tempfile::TempDir,
    hosts: Vec<HostLink>,
    _files: Vec<std::fs::File>,
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    let parts =
        std::env::var("NEXUS_BENCH_PARTS").unwrap_or_else(|_| "throughput,nics,elsewhere,balance,change,told".into());
    let asked = |part: &str| parts.split(',').any(|p| p == part);
    let mut rows = Vec::new();
    // In the machine's own namespaces, before this process leaves them.
    if asked("change") {
        rows.extend(change::change()?);
    }
    if asked("told") {
        rows.extend(told::told()?);
    }
    if !["throughput", "nics", "balance", "elsewhere"].iter().any(|p| asked(p)) {
        return Ok(rows);
    }
    alone()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let world = World::new(5).await?;
        if asked("throughput") {
            rows.extend(throughput(&world).await?);
        }
        if asked("balance") {
            rows.extend(balance::connections(&world).await?);
        }
        if asked("nics") {
            rows.extend(thousand(&world).await?);
        }
        if asked("elsewhere") {
            for nics in ELSEWHERE {
                rows.push(elsewhere(&world, nics).await?);
            }
        }
        Ok(rows)
    })
}

/// Into namespaces of our own, which end with this process.
fn alone() -> anyhow::Result<()> {
    // SAFETY: plain system calls, before this process has a second thread.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) == 0
            && libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
    };
    ensure!(done, "a network namespace of its own (run as root): {}", std::io::Error::last_os_error());
    Ok(())
}

/// A bridge that stands for a switch has no packet filter, whatever else of this machine's has one.
fn wire_filters_nothing() -> anyhow::Result<()> {
    for kind in ["iptables", "ip6tables", "arptables"] {
        match std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{kind}"), "0") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            done => done?,
        }
    }
    Ok(())
}

impl World {
    async fn new(hosts: u8) -> anyhow::Result<Self> {
        use std::os::fd::AsRawFd as _;
        let address = UnderlayAddress {
            address6: Ipv6Addr::new(0xfd00, 0xff, 0, 0, 0, 0, 0, 1),
            length6: 64,
            address4: Ipv4Addr::new(10, 96, 0, 1),
            length4: 24,
        };
        let wire = Underlay::new("nxb", address)?;
        HostNet::prepare().await?;
        wire.create().await?;
        wire_filters_nothing()?;
        let mut world = Self { dir: tempfile::tempdir()?, hosts: Vec::new(), _files: Vec::new() };
        for n in 1..=hosts {
            let file = nexus_network::new_namespace()?;
            let netns = NetnsRef::Path(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
            world._files.push(file);
            HostNet::prepare_in(netns.clone()).await?;
            let link = HostLink {
                host: format!("host-{n}"),
                netns,
                address6: Ipv6Addr::new(0xfd00, 0xff, 0, 0, 0, 0, 1, n.into()),
                address4: Ipv4Addr::new(10, 96, 0, 10 + n),
                instances6: Ipv6Addr::new(0xfd00, 0xff, 1, n.into(), 0, 0, 0, 0),
                instances4: Ipv4Addr::new(10, 97, n, 0),
            };
            wire.attach(&link).await?;
            world.hosts.push(link);
        }
        Ok(world)
    }

    fn instances(&self, host: usize) -> InstanceNet {
        InstanceNet::on_host(self.dir.path().join(format!("instances-{host}")), self.hosts[host].netns.clone())
    }

    fn engine(&self, host: usize) -> Engine {
        let dir = self.dir.path().join(format!("networks-{host}"));
        Engine::new(dir, self.instances(host), self.hosts[host].netns.clone())
    }

    async fn instance(&self, host: usize, number: u16) -> anyhow::Result<NetnsRef> {
        let mut segments = self.hosts[host].instances6.segments();
        segments[7] = number;
        let [a, b, c, _] = self.hosts[host].instances4.octets();
        let address = InstanceAddress { address6: segments.into(), address4: Ipv4Addr::new(a, b, c, number as u8) };
        Ok(NetnsRef::Path(self.instances(host).create(&uid(3, number).to_string(), address).await?))
    }

    fn told(&self, host: usize, networks: &[NetworkPlan]) -> anyhow::Result<Arc<HostNetworks>> {
        Ok(Arc::new(HostNetworks {
            version: 1,
            host: self.hosts[host].host.parse()?,
            revision: 1,
            endpoint: self.hosts[host].address6.into(),
            tunnels: self
                .hosts
                .iter()
                .enumerate()
                .filter(|(n, _)| *n != host)
                .map(|(_, h)| h.address6.into())
                .collect(),
            networks: networks.iter().map(|n| Arc::new(n.clone())).collect(),
        }))
    }

    fn nic(&self, host: usize, instance: u16, number: u16) -> anyhow::Result<NicPlan> {
        let [high, low] = number.to_be_bytes();
        Ok(NicPlan {
            uid: uid(2, number),
            name: format!("nic-{number}").parse()?,
            subnet: 0,
            mac: Mac([6, 0, 0, 0, high, low]),
            address4: Some(Ipv4Addr::new(10, 0, high, low)),
            address6: Some(Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, number)),
            at: Some(NicPlace {
                host: self.hosts[host].host.parse()?,
                endpoint: self.hosts[host].address6.into(),
                instance: uid(3, instance),
                index: 0,
            }),
            groups: vec![0],
            rate: None,
            forwards: false,
        })
    }
}

fn uid(kind: u8, number: u16) -> Uid {
    let [high, low] = number.to_be_bytes();
    Uid::from_random([kind, high, low, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, kind, high, low])
}

fn cidr(text: &str) -> Cidr {
    text.parse().expect("a well-formed network")
}

/// A network in which everybody may speak with everybody, by the last of so many rules.
fn network(n: u16, rules: u16) -> anyhow::Result<NetworkPlan> {
    let mut all = Vec::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        for n in 0..rules {
            all.push(RulePlan {
                id: format!("{}-{n}", if direction == Direction::Ingress { "in" } else { "out" }).parse()?,
                direction,
                priority: n,
                // Neither alike nor side by side, so that they stay as many.
                allow: n % 2 == 0,
                protocol: if n % 3 == 0 { RuleProtocol::Udp } else { RuleProtocol::Tcp },
                ports: vec![(1 + n * 2, 1 + n * 2)],
                remotes: vec![Remote::Cidr(Cidr::host(Ipv4Addr::new(192, 0, 2, n as u8).into()))],
            });
        }
        all.push(RulePlan {
            id: format!("{}-all", if direction == Direction::Ingress { "in" } else { "out" }).parse()?,
            direction,
            priority: 30_000,
            allow: true,
            protocol: RuleProtocol::Any,
            ports: Vec::new(),
            remotes: Vec::new(),
        });
    }
    Ok(NetworkPlan {
        uid: uid(1, n),
        project: "acme".parse()?,
        name: format!("net-{n}").parse()?,
        vni: 4711 + u32::from(n),
        mtu: 1430,
        cidrs: vec![cidr("10.0.0.0/16"), cidr("fd12::/48")],
        subnets: vec![SubnetPlan {
            uid: uid(5, n),
            name: "web".parse()?,
            cidr4: Some(cidr("10.0.0.0/16")),
            cidr6: Some(cidr("fd12::/64")),
            gateway4: Some(Ipv4Addr::new(10, 0, 0, 1)),
            gateway6: Some(Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 1)),
            route_table: 0,
        }],
        nics: Vec::new(),
        groups: vec![GroupPlan { uid: uid(1, n), name: "default".parse()?, rules: all }],
        route_tables: vec![RouteTablePlan { name: "main".parse()?, routes: Vec::new() }],
        peerings: Vec::new(),
        nats: Vec::new(),
        floating: Vec::new(),
        balancers: Vec::new(),
        zones: Vec::new(),
        flow_logs: nexus_model::plan::FlowLogs::None,
    })
}

async fn throughput(world: &World) -> anyhow::Result<Vec<Row>> {
    // One network without rules and one with many, both there all the time.
    let mut plans = vec![network(1, 0)?, network(2, RULES)?];
    let mut ways: Vec<(NetnsRef, NetnsRef, IpAddr)> = Vec::new();
    for (n, plan) in plans.iter_mut().enumerate() {
        let [from, to] = [10 + 2 * n as u16, 11 + 2 * n as u16];
        plan.nics = vec![world.nic(0, from, from)?, world.nic(1, to, to)?];
        let address = Ipv4Addr::new(10, 0, 0, to as u8).into();
        ways.push((world.instance(0, from).await?, world.instance(1, to).await?, address));
    }
    let engines = [world.engine(0), world.engine(1)];
    for (host, engine) in engines.iter().enumerate() {
        let applied = engine.apply(world.told(host, &plans)?, Vec::new()).await?;
        ensure!(applied.plugged.len() == 2 && applied.networks.is_empty(), "{applied:?}");
    }
    let ([from, to], _routers) = by_hand(world).await?;
    ways.push((from, to, Ipv4Addr::new(172, 31, 1, 2).into()));

    let mut rates = vec![Vec::new(); ways.len()];
    let mut waits = CORES.map(|_| vec![Vec::new(); ways.len()]);
    for round in 0..ROUNDS {
        // Each is first as often as any other.
        for way in (0..ways.len()).map(|n| (n + round) % ways.len()) {
            let (from, to, address) = &ways[way];
            rates[way].push(stream(from, to, *address)?);
        }
        for (cores, waits) in CORES.iter().zip(&mut waits) {
            let anywhere = sched_getaffinity(Pid::from_raw(0))?;
            let mut asked = Vec::new();
            for (from, to, address) in &ways {
                asked.push(Asked::new(from, to, *address, *cores)?);
            }
            for _ in 0..TURNS {
                asked.iter_mut().try_for_each(Asked::ask)?;
            }
            for (asked, waits) in asked.into_iter().zip(waits) {
                waits.push(asked.end()?);
            }
            sched_setaffinity(Pid::from_raw(0), &anywhere)?;
        }
    }
    let [none, many, hand] = [0, 1, 2].map(|w| median(&rates[w]));
    let mut rows = vec![
        Row::new("TCP between two hosts", none, "Gbit/s").peer(PEER, hand),
        Row::new(format!("TCP between two hosts, {RULES} rules"), many, "Gbit/s").peer("no rules", none),
    ];
    for ((called, waits), (what, share)) in
        ["on one core", "on two cores"].iter().zip(&waits).flat_map(|w| [("p50", 0.5), ("p99", 0.99)].map(|s| (w, s)))
    {
        let of = |way: usize| median(&waits[way].iter().map(|w| percentile(w, share)).collect::<Vec<_>>());
        rows.push(Row::new(format!("a question and its answer {called}, {what}"), of(0), "µs").peer(PEER, of(2)));
        let name = format!("a question and its answer {called}, {RULES} rules, {what}");
        rows.push(Row::new(name, of(1), "µs").peer("no rules", of(0)));
    }

    let ours: IpAddr = Ipv4Addr::new(10, 0, 0, 11).into();
    let mut firsts = Vec::new();
    for n in 0..ROUNDS as u16 {
        let from = world.instance(0, 20 + n).await?;
        plans[0].nics.push(world.nic(0, 20 + n, 20 + n)?);
        let listener = inside(&ways[0].1, move || TcpListener::bind((ours, 0)))??;
        let at = listener.local_addr()?;
        let start = Instant::now();
        for (host, engine) in engines.iter().enumerate() {
            engine.apply(world.told(host, &plans)?, Vec::new()).await?;
        }
        connect(&from, at)?;
        firsts.push(start.elapsed().as_secs_f64() * 1e3);
    }
    rows.push(Row::new("a NIC, from its plan to its first answer", median(&firsts), "ms"));
    Ok(rows)
}

/// The same shape by hand, on two other hosts: a container behind a veth pair, a namespace that routes, a tunnel.
async fn by_hand(world: &World) -> anyhow::Result<([NetnsRef; 2], Vec<std::fs::File>)> {
    use std::os::fd::AsRawFd as _;
    let (mut ends, mut routers) = (Vec::new(), Vec::new());
    for (side, host) in [2_usize, 3].into_iter().enumerate() {
        let container = world.dir.path().join(format!("by-hand-{side}"));
        let net = InstanceNet::on_host(world.dir.path(), world.hosts[host].netns.clone());
        let address = InstanceAddress {
            address6: Ipv6Addr::new(0xfd00, 0xff, 1, host as u16 + 1, 0, 0, 0, 9),
            address4: Ipv4Addr::new(10, 97, host as u8 + 1, 9),
        };
        net.create(&format!("by-hand-{side}"), address).await?;
        let inner = NetnsRef::Path(container.clone());
        let routing = nexus_network::new_namespace()?;
        let routing_at = format!("/proc/{}/fd/{}", std::process::id(), routing.as_raw_fd());
        let router = NetnsRef::Path(routing_at.clone().into());
        HostNet::prepare_in(router.clone()).await?;
        routers.push(routing);
        let (own, far) = (world.hosts[host].address6, world.hosts[2 + (1 - side)].address6);
        let netns = world.hosts[host].netns.clone();
        let tunnel = format!("ip link add hx type vxlan id 99 dstport 4789 local {own} remote {far} nolearning");
        command(&netns, &tunnel)?;
        command(&netns, &format!("ip link set hx netns {routing_at}"))?;
        let commands = [
            format!("ip link add hv type veth peer name c0 netns {}", container.display()),
            "ip link set hv mtu 1430 up".into(),
            "ip link set hx mtu 1430 up".into(),
            format!("ip addr add 172.31.255.{side}/31 dev hx"),
            format!("ip addr add 172.31.{side}.1/24 dev hv"),
            format!("ip route add 172.31.{}.0/24 via 172.31.255.{} dev hx", 1 - side, 1 - side),
        ];
        commands.iter().try_for_each(|c| command(&router, c))?;
        for c in [
            "ip link set c0 mtu 1430 up".to_owned(),
            format!("ip addr add 172.31.{side}.2/24 dev c0"),
            format!("ip route add 172.31.0.0/16 via 172.31.{side}.1 dev c0"),
        ] {
            command(&inner, &c)?;
        }
        ends.push(inner);
    }
    Ok((ends.try_into().map_err(|_| anyhow::anyhow!("two ends"))?, routers))
}

async fn thousand(world: &World) -> anyhow::Result<Vec<Row>> {
    let mut plan = network(1, 0)?;
    let engine = world.engine(4);
    for n in 0..NICS {
        world.instance(4, 100 + n).await?;
        plan.nics.push(world.nic(4, 100 + n, 100 + n)?);
    }
    let start = Instant::now();
    let applied = engine.apply(world.told(4, std::slice::from_ref(&plan))?, Vec::new()).await?;
    let took = start.elapsed().as_secs_f64();
    ensure!(applied.plugged.len() == usize::from(NICS), "{:?}", applied.troubles);
    let start = Instant::now();
    let again = engine.apply(world.told(4, std::slice::from_ref(&plan))?, Vec::new()).await?;
    ensure!(again.changes == 0, "{again:?}");
    let looked = start.elapsed().as_secs_f64();
    engine.remove().await?;
    Ok(vec![
        Row::new("1,000 NICs of a host, from nothing", took, "s"),
        Row::new("1,000 NICs of a host, nothing to do", looked, "s"),
    ])
}

/// What a NIC that changes its address elsewhere costs a host of its network; the peer is an agent that has just begun, and so puts
/// the whole packet filter in its place.
async fn elsewhere(world: &World, nics: u16) -> anyhow::Result<Row> {
    let mut plan = network(1, 0)?;
    plan.groups[0].rules[0].remotes = vec![Remote::Group(0)];
    world.instance(0, 1).await?;
    plan.nics.push(world.nic(0, 1, 2)?);
    for n in 1..nics {
        plan.nics.push(world.nic(1 + usize::from(n % 4), 1_000 + n, 2 + n)?);
    }
    plan.nics.sort_by_key(|nic| nic.uid);
    let lasting = world.engine(0);
    let mut last = plan.clone();
    let started = Instant::now();
    lasting.apply(world.told(0, std::slice::from_ref(&plan))?, Vec::new()).await?;
    eprintln!("{nics} NICs elsewhere, from nothing: {:.2} s", started.elapsed().as_secs_f64());
    let (mut steps, mut wholes) = (Vec::new(), Vec::new());
    for round in 0..2 * ROUNDS {
        let some = plan.nics.iter_mut().rfind(|nic| nic.name != *"nic-2").context("a NIC elsewhere")?;
        some.address4 = Some(Ipv4Addr::new(10, 0, 255, 1 + round as u8));
        let begun = world.engine(0);
        let (engine, times) = if round % 2 == 0 { (&lasting, &mut steps) } else { (&begun, &mut wholes) };
        // It knows what stands.
        lasting.apply(world.told(0, std::slice::from_ref(&last))?, Vec::new()).await?;
        let told = world.told(0, std::slice::from_ref(&plan))?;
        let start = Instant::now();
        let applied = engine.apply(told.clone(), Vec::new()).await?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        ensure!(applied.networks.is_empty() && applied.changes > 0, "{applied:?}");
        ensure!(engine.check(told, Vec::new()).await?.is_empty(), "it is not as it is to be");
        last = plan.clone();
    }
    lasting.remove().await?;
    let row = Row::new(format!("a NIC elsewhere, of {nics}: applied by a host"), median(&steps), "ms");
    Ok(row.peer("the packet filter whole", median(&wholes)))
}

/// Runs something on a thread inside a namespace.
fn inside<T: Send + 'static>(netns: &NetnsRef, work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    let NetnsRef::Path(path) = netns.clone() else { bail!("a namespace with a file") };
    let thread = std::thread::spawn(move || -> anyhow::Result<T> {
        enter(&std::fs::File::open(&path).with_context(|| path.display().to_string())?)?;
        Ok(work())
    });
    thread.join().map_err(|_| anyhow::anyhow!("a thread in a namespace was lost"))?
}

fn command(netns: &NetnsRef, text: &str) -> anyhow::Result<()> {
    let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
    inside(netns, move || process::run(Command::new(&words[0]).args(&words[1..])).map(drop))?
}

fn connect(from: &NetnsRef, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let end = Instant::now() + PATIENCE;
    loop {
        match inside(from, move || TcpStream::connect_timeout(&to, Duration::from_millis(200)))? {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > end => return Err(e).with_context(|| format!("reaching {to}")),
            Err(_) => {}
        }
    }
}

fn pair(from: &NetnsRef, to: &NetnsRef, address: IpAddr) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = inside(to, move || TcpListener::bind((address, 0)))??;
    let asker = connect(from, listener.local_addr()?)?;
    let (answerer, _) = listener.accept()?;
    for stream in [&asker, &answerer] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    Ok((asker, answerer))
}

/// Gigabits a second.
fn stream(from: &NetnsRef, to: &NetnsRef, address: IpAddr) -> anyhow::Result<f64> {
    let (mut sender, mut receiver) = pair(from, to, address)?;
    let sending = std::thread::spawn(move || -> std::io::Result<()> {
        let block = vec![7; 128 << 10];
        let end = Instant::now() + STREAM;
        while Instant::now() < end {
            sender.write_all(&block)?;
        }
        Ok(())
    });
    let (mut block, mut bytes) = (vec![0; 256 << 10], 0_u64);
    let start = Instant::now();
    loop {
        match receiver.read(&mut block)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    let took = start.elapsed().as_secs_f64();
    sending.join().map_err(|_| anyhow::anyhow!("the sender was lost"))??;
    Ok(bytes as f64 * 8.0 / took / 1e9)
}

/// Keeps this thread on one of the machine's cores.
fn pin(core: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("keeping a thread on one core")
}

/// Small questions over one connection, and the times that their answers took in microseconds.
struct Asked {
    asker: TcpStream,
    answering: std::thread::JoinHandle<()>,
    times: Vec<f64>,
}

impl Asked {
    fn new(from: &NetnsRef, to: &NetnsRef, address: IpAddr, cores: [usize; 2]) -> anyhow::Result<Self> {
        let (asker, mut answerer) = pair(from, to, address)?;
        pin(cores[0])?;
        let answering = std::thread::spawn(move || {
            if pin(cores[1]).is_err() {
                return;
            }
            let mut word = [0; 64];
            while answerer.read_exact(&mut word).is_ok() && answerer.write_all(&word).is_ok() {}
        });
        Ok(Self { asker, answering, times: Vec::new() })
    }

    fn ask(&mut self) -> anyhow::Result<()> {
        let mut word = [7; 64];
        for _ in 0..QUESTIONS {
            let start = Instant::now();
            self.asker.write_all(&word)?;
            self.asker.read_exact(&mut word)?;
            self.times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        Ok(())
    }

    fn end(self) -> anyhow::Result<Vec<f64>> {
        drop(self.asker);
        self.answering.join().map_err(|_| anyhow::anyhow!("the answerer was lost"))?;
        Ok(self.times)
    }
}
