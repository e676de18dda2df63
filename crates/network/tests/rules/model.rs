//! What is traced is what happens: random networks, and for each of many random packets its traced fate and its true one.
//!
//! A failure prints its seed; `NEXUS_MODEL_SEED=N` runs that one alone.

use std::collections::BTreeSet;

use nexus_model::plan::{Direction, RulePlan, RuleProtocol, TraceVerdict, TracedPacket, Via};
use nexus_network::vpc::verdict::trace;
use socket2::{Domain, Protocol, Socket, Type};

use super::outside::{OUTSIDE4, OUTSIDE6, beyond};
use super::plans::*;
use super::*;

const WORLDS: u8 = 10;
const PROBES: usize = 100;
const PORTS: [u16; 4] = [80, 81, 443, 5000];
/// Where it is traced that nothing arrives, it is waited so long for the contrary.
const QUIET: Duration = Duration::from_millis(400);
/// What is traced to arrive and has not is sent anew so often: a busy machine may lose one.
const AGAIN: Duration = Duration::from_secs(1);

/// What some networks reach by a NIC that forwards, which has it behind itself.
const BEHIND4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 9, 1));
const BEHIND6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 1));

/// A small generator of numbers (SplitMix64): the same ones for a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % n as u64) as usize
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn in_ten(&mut self, n: usize) -> bool {
        self.below(10) < n
    }
}

fn any_rule(dice: &mut Dice, n: usize, groups: usize, direction: Direction) -> RulePlan {
    let protocol = dice.one(&[RuleProtocol::Any, RuleProtocol::Tcp, RuleProtocol::Udp, RuleProtocol::Icmp]);
    let nets = [
        "10.1.0.0/24",
        "10.1.0.2/31",
        "10.2.0.0/16",
        "fd00:1::/64",
        "fd00:2::/32",
        "203.0.113.0/24",
        "::/0",
        "0.0.0.0/0",
    ];
    let remotes = (0..dice.below(4)).map(|_| {
        if dice.in_ten(4) { nexus_model::plan::Remote::Group(dice.below(groups) as u32) } else { net(dice.one(&nets)) }
    });
    let remotes = remotes.collect();
    let first = dice.one(&PORTS);
    let ports = match protocol {
        RuleProtocol::Tcp | RuleProtocol::Udp if dice.in_ten(6) => vec![(first, first + dice.below(400) as u16)],
        _ => Vec::new(),
    };
    let allow = dice.in_ten(8);
    let priority = dice.below(3) as u16;
    RulePlan { priority, allow, protocol, ports, remotes, ..rule(&format!("r{n}"), direction) }
}

/// Two networks that may be peered, and one that has chosen the addresses of the first.
fn any_networks(seed: u8) -> Vec<NetworkPlan> {
    let mut dice = Dice(seed.into());
    let id = |k: u8| 10 + seed * 3 + k;
    let mut all = vec![network_as(id(0), 1), network_as(id(1), 2), network_as(id(2), 1)];
    for (k, plan) in all.iter_mut().enumerate() {
        for g in 0..3 {
            let rules = (0..2 + dice.below(6)).map(|n| {
                let direction = dice.one(&[Direction::Ingress, Direction::Egress]);
                any_rule(&mut dice, n, 3, direction)
            });
            let mut rules: Vec<RulePlan> = rules.collect();
            if dice.in_ten(7) {
                rules.push(RulePlan { priority: 2, ..everything(Direction::Egress) });
            }
            plan.groups.push(group(id(k as u8), g, rules));
        }
        let addresses = if k == 1 { 2 } else { 1 };
        for n in 2..5 {
            let groups: BTreeSet<u32> = (0..1 + dice.below(2)).map(|_| dice.below(3) as u32).collect();
            let groups: Vec<u32> = groups.into_iter().collect();
            let host = dice.below(2) as u8;
            plan.nics.push(nic_as(id(k as u8), addresses, n, host, &groups));
        }
        let target = 2 + dice.below(3) as u8;
        balancer(plan, address4(addresses, 200).into(), 80, false, &[(address4(addresses, target).into(), 443, 1)]);
        balancer(plan, address6(addresses, 200).into(), 80, true, &[(address6(addresses, target).into(), 80, 1)]);
    }
    let [a, b, c] = &mut all[..] else { panic!() };
    if dice.in_ten(8) {
        peer(a, b, seed);
        if dice.in_ten(5) {
            a.peerings[0].cidrs = vec!["10.2.0.0/30".parse().unwrap(), "fd00:2::/126".parse().unwrap()];
        }
    }
    for (n, plan) in [a, b, c].into_iter().enumerate() {
        let lent = (0..2).map(|h| (host_name(h), Ipv4Addr::new(10, 96, 0, 220 + 2 * n as u8 + h).into()));
        let lent: Vec<_> = lent.filter(|_| dice.in_ten(5)).collect();
        nat(plan, lent);
        for any in ["0.0.0.0/0", "::/0"] {
            match dice.below(4) {
                0 => {}
                1 => route(plan, any, Via::Internet),
                _ => route(plan, any, Via::Nat(0)),
            }
        }
        if dice.in_ten(3) {
            route(plan, "203.0.113.0/24", Via::Blackhole);
        }
        if dice.in_ten(6) {
            let router = dice.below(3);
            plan.nics[router].forwards = true;
            let via = Via::Nic(plan.nics[router].uid);
            // Of the second family only now and then: then it goes where everything else goes.
            route(plan, "192.168.9.0/24", via);
            if dice.in_ten(7) {
                route(plan, "2001:db8:9::/48", via);
            }
        }
        let nic = plan.nics[dice.below(3)].uid;
        floating(plan, Ipv4Addr::new(10, 96, 0, 200 + n as u8).into(), nic);
    }
    all
}

/// One packet, where it is to arrive, and the socket that tells.
struct Probe {
    what: String,
    arrives: bool,
    packet: TracedPacket,
    socket: Socket,
    arrived: bool,
}

fn send(from: &NetnsRef, own: IpAddr, packet: TracedPacket, n: usize) -> Socket {
    let domain = if own.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    inside(from, move || {
        let (kind, protocol) = match (packet.protocol, own) {
            (RuleProtocol::Tcp, _) => (Type::STREAM, None),
            (RuleProtocol::Udp, _) => (Type::DGRAM, None),
            (_, IpAddr::V4(_)) => (Type::RAW, Some(Protocol::ICMPV4)),
            (_, IpAddr::V6(_)) => (Type::RAW, Some(Protocol::ICMPV6)),
        };
        let socket = Socket::new(domain, kind, protocol).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&SocketAddr::new(own, 0).into()).unwrap();
        let icmp = packet.protocol == RuleProtocol::Icmp;
        let to = SocketAddr::new(packet.to, if icmp { 0 } else { packet.port }).into();
        // What can't be sent does not arrive.
        let _ = socket.connect(&to);
        say(&socket, packet, n);
        socket
    })
}

/// Sends the packet of what has no connection; the kernel sends a connection's again by itself.
fn say(socket: &Socket, packet: TracedPacket, n: usize) {
    match packet.protocol {
        RuleProtocol::Udp => drop(socket.send(&(n as u32).to_be_bytes())),
        RuleProtocol::Icmp => drop(socket.send(&echo(packet.to.is_ipv6(), n as u16))),
        _ => {}
    }
}

/// An echo request with this number; of IPv6 the kernel adds the sum.
fn echo(six: bool, n: u16) -> Vec<u8> {
    let mut out = vec![if six { 128 } else { 8 }, 0, 0, 0, 0x6e, 0x78];
    out.extend(n.to_be_bytes());
    if !six {
        let sum: u32 = out.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        out[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    out
}

/// Whether an echo reply with this number has come.
fn echoed(socket: &Socket, six: bool, n: u16) -> bool {
    use std::io::Read as _;
    let mut buffer = [0; 256];
    let mut socket = socket;
    while let Ok(length) = socket.read(&mut buffer) {
        let start = if six { 0 } else { usize::from(buffer[0] & 15) * 4 };
        let reply = if six { 129 } else { 0 };
        let message = &buffer[start.min(length)..length];
        if message.len() >= 8 && message[0] == reply && message[4..8] == [0x6e, 0x78, (n >> 8) as u8, n as u8] {
            return true;
        }
    }
    false
}

/// Sockets on all ports, which hear TCP and UDP of both families.
struct Ears {
    streams: Vec<TcpListener>,
    datagrams: Vec<UdpSocket>,
    open: Vec<TcpStream>,
}

impl Ears {
    fn new(at: &NetnsRef) -> Self {
        let (streams, datagrams) = inside(at, || {
            let bind = |kind, port: u16| {
                let socket = Socket::new(Domain::IPV6, kind, None).unwrap();
                socket.set_only_v6(false).unwrap();
                socket.set_nonblocking(true).unwrap();
                socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into()).unwrap();
                socket
            };
            let streams = PORTS.map(|p| {
                let socket = bind(Type::STREAM, p);
                socket.listen(128).unwrap();
                TcpListener::from(socket)
            });
            (streams.into_iter().collect(), PORTS.map(|p| UdpSocket::from(bind(Type::DGRAM, p))).into_iter().collect())
        });
        Self { streams, datagrams, open: Vec::new() }
    }

    /// The numbers of datagrams that came.
    fn heard(&mut self) -> Vec<usize> {
        for listener in &self.streams {
            while let Ok((stream, _)) = listener.accept() {
                self.open.push(stream);
            }
        }
        let mut out = Vec::new();
        let mut number = [0; 4];
        for socket in &self.datagrams {
            while socket.recv(&mut number).is_ok() {
                out.push(u32::from_be_bytes(number) as usize);
            }
        }
        out
    }
}

fn any_probe(site: &Site, dice: &mut Dice, n: usize) -> Option<Probe> {
    let plan = &site.networks[dice.below(site.networks.len())];
    let from = plan.nics[dice.below(plan.nics.len())].clone();
    let six = dice.in_ten(4);
    let of = dice.one(&[1_u8, 1, 2]);
    let pick = |four: Ipv4Addr, other: Ipv6Addr| -> IpAddr { if six { other.into() } else { four.into() } };
    let host = 2 + dice.below(3) as u8;
    let to = match dice.below(23) {
        0..12 => pick(address4(of, host), address6(of, host)),
        12 | 13 => pick(address4(of, 200), address6(of, 200)),
        14 => pick(address4(of, 1), address6(of, 1)),
        15 => pick(address4(of, 99), address6(of, 99)),
        16 | 17 => {
            if six {
                OUTSIDE6
            } else {
                OUTSIDE4
            }
        }
        18 => "169.254.169.254".parse().unwrap(),
        19..22 => {
            if six {
                BEHIND6
            } else {
                BEHIND4
            }
        }
        _ => Ipv4Addr::new(10, 96, 0, 200 + dice.below(3) as u8).into(),
    };
    let protocol = dice.one(&[RuleProtocol::Tcp, RuleProtocol::Tcp, RuleProtocol::Udp, RuleProtocol::Icmp]);
    // Whoever has a floating address may have no way out for answers: one way is what is traced.
    let is_floating = to.to_string().starts_with("10.96.0.");
    let protocol = if is_floating { RuleProtocol::Udp } else { protocol };
    let port = if protocol == RuleProtocol::Icmp { 0 } else { dice.one(&PORTS) };
    let own = if to.is_ipv6() { IpAddr::from(from.address6.unwrap()) } else { from.address4.unwrap().into() };
    // What it sends to itself never leaves it.
    let behind = to == BEHIND4 || to == BEHIND6;
    if own == to || (behind && from.forwards) {
        return None;
    }
    let packet = TracedPacket { to, protocol, port };
    let host = site.world.hosts.iter().position(|h| from.at.as_ref().unwrap().host == h.host.as_str()).unwrap();
    let traced = trace(&site.told(host), from.uid, packet);
    // Outside there is nobody but these.
    if traced.verdict == TraceVerdict::Outside && to != OUTSIDE4 && to != OUTSIDE6 {
        return None;
    }
    let arrives = traced.verdict != TraceVerdict::Dropped;
    let hops: Vec<String> = traced.hops.iter().map(|h| format!("  {} {}: {}", h.host, h.at, h.what)).collect();
    let what = format!("{} → {to} {protocol:?} {port}: {:?}\n{}", from.name, traced.verdict, hops.join("\n"));
    let socket = send(&site.of(&from), own, packet, n);
    Some(Probe { what, arrives, packet, socket, arrived: false })
}

/// Runs a world's probes; what is left are those whose fate was not the traced one.
fn differences(site: &Site, dice: &mut Dice) -> (usize, Vec<String>) {
    let places = site.networks.iter().flat_map(|n| &n.nics).map(|n| site.of(n)).chain([NetnsRef::Own]);
    let mut ears: Vec<Ears> = places.map(|at| Ears::new(&at)).collect();
    let mut probes = Vec::new();
    while probes.len() < PROBES {
        probes.extend(any_probe(site, dice, probes.len()));
    }
    let end = Instant::now() + DEADLINE;
    let (mut quiet, mut again) = (None, Instant::now() + AGAIN);
    loop {
        if Instant::now() > again {
            again = Instant::now() + AGAIN;
            let late = probes.iter().enumerate().filter(|(_, p)| p.arrives && !p.arrived);
            late.for_each(|(n, probe)| say(&probe.socket, probe.packet, n));
        }
        let heard: BTreeSet<usize> = ears.iter_mut().flat_map(Ears::heard).collect();
        for (n, probe) in probes.iter_mut().enumerate().filter(|(_, p)| !p.arrived) {
            let six = probe.packet.to.is_ipv6();
            probe.arrived = match probe.packet.protocol {
                RuleProtocol::Tcp => probe.socket.peer_addr().is_ok(),
                RuleProtocol::Udp => heard.contains(&n),
                _ => echoed(&probe.socket, six, n as u16),
            };
        }
        let all = probes.iter().all(|p| p.arrived || !p.arrives);
        if all && quiet.is_none() {
            quiet = Some(Instant::now() + QUIET);
        }
        if quiet.is_some_and(|q| Instant::now() > q) || Instant::now() > end {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let arrived = probes.iter().filter(|p| p.arrived).count();
    let wrong = probes.iter().filter(|p| p.arrived != p.arrives);
    (arrived, wrong.map(|p| format!("arrived: {}; traced: {}", p.arrived, p.what)).collect())
}

#[test]
fn what_is_traced_is_what_happens() {
    isolated("rules::model::what_is_traced_is_what_happens", async || {
        let only = std::env::var("NEXUS_MODEL_SEED").ok().and_then(|s| s.parse::<u8>().ok());
        let seeds: Vec<u8> = only.map_or_else(|| (0..WORLDS).collect(), |seed| vec![seed]);
        let mut site = Site::new(2).await;
        beyond();
        let (mut arrived, mut sent) = (0, 0);
        for seed in seeds {
            let networks = any_networks(seed);
            site.apply(networks).await;
            for router in site.networks.iter().flat_map(|n| &n.nics).filter(|n| n.forwards) {
                for address in [BEHIND4, BEHIND6] {
                    firewall::run(&site.of(router), &format!("ip addr add {address} dev lo nodad"));
                }
            }
            let mut dice = Dice(1000 + u64::from(seed));
            let (well, wrong) = differences(&site, &mut dice);
            assert!(wrong.is_empty(), "seed {seed}: {} differ\n{}", wrong.len(), wrong.join("\n"));
            arrived += well;
            sent += PROBES;
        }
        // It would prove little if nearly all or nearly none arrived.
        assert!(only.is_some() || (sent / 10..sent * 9 / 10).contains(&arrived), "{arrived} of {sent}");
    });
}
