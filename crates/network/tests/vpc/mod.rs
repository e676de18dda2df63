//! Tenants' networks on hosts that are namespaces: what reaches what, what a second time changes, what a crash leaves.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use nexus_model::plan::{
    Direction, FloatingPlan, GroupPlan, HostNetworks, Mac, NatPlan, NetworkPlan, NicPlace, NicPlan, PeeringPlan,
    RoutePlan, RouteTablePlan, RulePlan, RuleProtocol, SubnetPlan, Via,
};
use nexus_model::{Cidr, Uid};
use nexus_network::vpc::Engine;

use super::*;

mod fast;
mod faults;
mod ways;

/// For what must not be reached: a refusal that is silent.
const BRIEFLY: Duration = Duration::from_millis(1200);

fn run(netns: &NetnsRef, command: &str) -> String {
    let (done, out) = attempt(netns, command);
    assert!(done, "{command}: {out}");
    out
}

fn attempt(netns: &NetnsRef, command: &str) -> (bool, String) {
    let words: Vec<String> = command.split(' ').map(str::to_owned).collect();
    inside(netns, move || {
        let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    })
}

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

/// Of a network, a NIC or an instance, the same every time.
fn uid(kind: u8, n: u16) -> Uid {
    let [a, b] = n.to_be_bytes();
    Uid::from_random([kind, a, b, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, kind, a, b])
}

fn instance_uid(n: u16) -> Uid {
    uid(3, n)
}

/// A network of 10.0.0.0/16 and fd12::/48, in which everybody may speak with everybody.
fn network(n: u16) -> NetworkPlan {
    let rule = |direction, id: &str| RulePlan {
        id: id.parse().unwrap(),
        direction,
        priority: 100,
        allow: true,
        protocol: RuleProtocol::Any,
        ports: Vec::new(),
        remotes: Vec::new(),
    };
    let group = GroupPlan {
        uid: uid(4, n),
        name: "default".parse().unwrap(),
        rules: vec![rule(Direction::Ingress, "in"), rule(Direction::Egress, "out")],
    };
    NetworkPlan {
        uid: uid(1, n),
        project: format!("tenant-{n}").parse().unwrap(),
        name: "blue".parse().unwrap(),
        vni: 1000 + u32::from(n),
        mtu: 1400,
        cidrs: vec![cidr("10.0.0.0/16"), cidr("fd12::/48")],
        subnets: vec![SubnetPlan {
            uid: uid(5, n),
            name: "web".parse().unwrap(),
            cidr4: Some(cidr("10.0.0.0/20")),
            cidr6: Some(cidr("fd12::/64")),
            gateway4: Some("10.0.0.1".parse().unwrap()),
            gateway6: Some("fd12::1".parse().unwrap()),
            route_table: 0,
        }],
        nics: Vec::new(),
        groups: vec![group],
        route_tables: vec![RouteTablePlan { name: "main".parse().unwrap(), routes: Vec::new() }],
        peerings: Vec::new(),
        nats: Vec::new(),
        floating: Vec::new(),
        balancers: Vec::new(),
        zones: Vec::new(),
        flow_logs: nexus_model::plan::FlowLogs::None,
    }
}

/// Hosts with engines, and networks with NICs on them.
struct Cloud {
    world: World,
    engines: Vec<Engine>,
    six: bool,
    networks: Vec<NetworkPlan>,
}

impl Cloud {
    async fn new(hosts: u8, six: bool) -> Self {
        let world = world(hosts).await;
        let engine = |n: usize| {
            let dir = world._dir.path().join(format!("vpc-{n}"));
            Engine::new(dir, world.nets[n].clone(), world.hosts[n].netns.clone())
        };
        let engines = (0..usize::from(hosts)).map(engine).collect();
        Self { engines, world, six, networks: Vec::new() }
    }

    fn endpoint(&self, host: usize) -> IpAddr {
        let host = &self.world.hosts[host];
        if self.six { host.address6.into() } else { host.address4.into() }
    }

    fn told(&self, host: usize) -> Arc<HostNetworks> {
        let name = self.world.hosts[host].host.parse().unwrap();
        let here = |n: &&NetworkPlan| n.nics.iter().any(|n| n.at.as_ref().is_some_and(|at| at.host == name));
        let mut uids: BTreeSet<Uid> = self.networks.iter().filter(here).map(|n| n.uid).collect();
        for network in self.networks.iter().filter(here) {
            uids.extend(network.peerings.iter().map(|p| p.network));
        }
        let mut tunnels: Vec<IpAddr> =
            (0..self.world.hosts.len()).filter(|h| *h != host).map(|h| self.endpoint(h)).collect();
        tunnels.sort();
        let mut networks: Vec<NetworkPlan> = self.networks.iter().filter(|n| uids.contains(&n.uid)).cloned().collect();
        networks.sort_by_key(|n| n.uid);
        Arc::new(HostNetworks {
            version: 1,
            host: name,
            revision: 1,
            endpoint: self.endpoint(host),
            tunnels,
            networks: networks.into_iter().map(Arc::new).collect(),
        })
    }

    /// Puts a NIC of a network into an instance of a host: its addresses end in `number`.
    fn nic(&mut self, network: usize, number: u16, host: usize, instance: u16, index: u8) -> Uid {
        let place = NicPlace {
            host: self.world.hosts[host].host.parse().unwrap(),
            endpoint: self.endpoint(host),
            instance: instance_uid(instance),
            index,
        };
        let [high, low] = number.to_be_bytes();
        let uid = uid(20 + network as u8, number);
        self.networks[network].nics.push(NicPlan {
            uid,
            name: format!("nic-{number}").parse().unwrap(),
            subnet: 0,
            mac: Mac([6, network as u8, 0, 0, high, low]),
            address4: Some(Ipv4Addr::new(10, 0, high, low)),
            address6: Some(Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, number)),
            at: Some(place),
            groups: vec![0],
            rate: None,
            forwards: false,
        });
        self.networks[network].nics.sort_by_key(|n| n.uid);
        uid
    }

    fn nic_mut(&mut self, uid: Uid) -> &mut NicPlan {
        self.networks.iter_mut().flat_map(|n| &mut n.nics).find(|n| n.uid == uid).unwrap()
    }

    /// Makes an instance's namespace as the agent does before it starts one.
    async fn instance(&self, host: usize, number: u16) -> NetnsRef {
        let address = instance(&self.world.hosts[host], number as u8);
        let name = instance_uid(number).to_string();
        NetnsRef::Path(self.world.nets[host].create(&name, address).await.unwrap())
    }

    async fn apply(&self) -> usize {
        let mut changes = 0;
        for (host, engine) in self.engines.iter().enumerate() {
            let applied = engine.apply(self.told(host), Vec::new()).await.unwrap();
            assert!(applied.networks.is_empty() && applied.troubles.is_empty(), "{applied:?}");
            changes += applied.changes;
        }
        changes
    }

    async fn differences(&self, host: usize) -> Vec<String> {
        let found = self.engines[host].check(self.told(host), Vec::new()).await.unwrap();
        found.into_iter().map(|difference| difference.what).collect()
    }

    async fn all_right(&self) {
        for host in 0..self.engines.len() {
            assert_eq!(self.differences(host).await, Vec::<String>::new());
        }
    }

    fn inside_network(&self, host: usize, network: usize) -> NetnsRef {
        NetnsRef::Path(self.engines[host].namespace(self.networks[network].uid))
    }
}

fn four(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 0, high, low).into()
}

fn six(number: u16) -> IpAddr {
    Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, number).into()
}

/// Whether `from` reaches the NIC of this number in `to`, on both families or on neither.
fn meets(from: &NetnsRef, to: &NetnsRef, number: u16, patience: Duration) -> bool {
    let one = reaches(from, to, four(number), patience);
    assert_eq!(reaches(from, to, six(number), patience), one, "both families, of {number}");
    one
}

/// An open connection that echoes bytes.
struct Open {
    asker: TcpStream,
    answerer: TcpStream,
}

fn open(from: &NetnsRef, to: &NetnsRef, address: IpAddr) -> Open {
    let listener = inside(to, move || TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let end = Instant::now() + DEADLINE;
    let asker = loop {
        match inside(from, move || TcpStream::connect_timeout(&at, Duration::from_secs(1))) {
            Ok(asker) => break asker,
            Err(e) => assert!(Instant::now() < end, "{address}: {e}"),
        }
    };
    let answerer = listener.accept().unwrap().0;
    for stream in [&asker, &answerer] {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
    }
    Open { asker, answerer }
}

impl Open {
    fn goes_on(&mut self) {
        let mut word = [0; 4];
        self.asker.write_all(b"ping").unwrap();
        self.answerer.read_exact(&mut word).unwrap();
        self.answerer.write_all(b"pong").unwrap();
        self.asker.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"pong");
    }

    /// Sends that much and says how long it took to arrive.
    fn carries(mut self, bytes: usize) -> Duration {
        let start = Instant::now();
        let sender = std::thread::spawn(move || {
            self.asker.write_all(&vec![7; bytes]).unwrap();
            self.asker
        });
        let mut rest = vec![0; bytes];
        self.answerer.read_exact(&mut rest).unwrap();
        drop(sender.join().unwrap());
        start.elapsed()
    }

    fn reversed(self) -> Self {
        Self { asker: self.answerer, answerer: self.asker }
    }
}

#[test]
fn tenants_with_the_same_addresses_reach_their_own_across_hosts_and_nobody_elses() {
    isolated("vpc::tenants_with_the_same_addresses_reach_their_own_across_hosts_and_nobody_elses", async || {
        for v6 in [true, false] {
            let mut cloud = Cloud::new(2, v6).await;
            cloud.networks = vec![network(1), network(2)];
            let mut at = Vec::new();
            for tenant in 0..2_u16 {
                // Two on the first host, one on the second.
                for (slot, host) in [(0, 0), (1, 0), (2, 1)] {
                    let number = 10 + tenant * 10 + slot;
                    at.push(cloud.instance(host, number).await);
                    cloud.nic(usize::from(tenant), 5 + slot, host, number, 0);
                }
            }
            cloud.apply().await;
            for tenant in 0..2 {
                let [a, b, c] = &at[tenant * 3..tenant * 3 + 3] else { panic!() };
                assert!(meets(a, b, 6, DEADLINE), "on one host");
                assert!(meets(a, c, 7, DEADLINE) && meets(c, b, 6, DEADLINE), "across hosts");
                // The gateway is everywhere.
                let got = inside(a, || TcpStream::connect_timeout(&"10.0.0.1:9".parse().unwrap(), BRIEFLY));
                assert!(got.is_err());
            }
            // The listener is in the other tenant: whom the address means is the own one, who does not listen.
            assert!(!meets(&at[0], &at[5], 7, BRIEFLY) && !meets(&at[0], &at[4], 6, BRIEFLY));
            cloud.all_right().await;
            for engine in &cloud.engines {
                engine.remove().await.unwrap();
            }
            Underlay::destroy("nxt").await.unwrap();
        }
    });
}

#[test]
fn an_unknown_address_is_refused_at_once_and_nothing_is_flooded() {
    isolated("vpc::an_unknown_address_is_refused_at_once_and_nothing_is_flooded", async || {
        let mut cloud = Cloud::new(2, true).await;
        cloud.networks = vec![network(1)];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(0, 6, 1, 11, 0);
        cloud.apply().await;
        assert!(meets(&a, &b, 6, DEADLINE));
        let own = cloud.inside_network(0, 0);
        let sent = || -> u64 {
            let line = run(&own, "ip -s link show vx");
            let numbers = line.lines().last().unwrap().split_whitespace().nth(1).unwrap().to_owned();
            numbers.parse().unwrap()
        };
        let before = sent();
        for unknown in [four(99), four(0x1234), six(99), six(0x9999)] {
            let start = Instant::now();
            let to = SocketAddr::new(unknown, 80);
            let got = inside(&a, move || TcpStream::connect_timeout(&to, DEADLINE));
            assert!(got.is_err() && start.elapsed() < DEADLINE, "{unknown}: {got:?}");
        }
        // A workload that thinks it is on a wire with others asks for all of them by broadcast.
        run(&a, "ip addr add 10.0.0.5/20 dev nic0");
        let to = SocketAddr::new(four(77), 80);
        assert!(inside(&a, move || TcpStream::connect_timeout(&to, BRIEFLY)).is_err());
        assert_eq!(sent(), before, "nothing went into the tunnel");
        // And reaches those that there are: the gateway answers for them.
        assert!(reaches(&a, &b, four(6), DEADLINE));
    });
}

#[test]
fn a_second_time_changes_nothing_and_connections_go_on() {
    isolated("vpc::a_second_time_changes_nothing_and_connections_go_on", async || {
        let mut cloud = Cloud::new(2, true).await;
        let mut plan = network(1);
        plan.nats = vec![NatPlan { uid: uid(6, 1), name: "nat".parse().unwrap(), addresses: Vec::new() }];
        plan.route_tables[0].routes = vec![
            RoutePlan { to: cidr("0.0.0.0/0"), via: Via::Nat(0) },
            RoutePlan { to: cidr("198.51.100.0/24"), via: Via::Blackhole },
        ];
        cloud.networks = vec![plan];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        let nic = cloud.nic(0, 5, 0, 10, 0);
        cloud.nic_mut(nic).rate = Some(100_000_000);
        cloud.nic(0, 6, 1, 11, 0);
        assert!(cloud.apply().await > 20);
        let mut connections: Vec<Open> = [four(6), six(6)].map(|to| open(&a, &b, to)).into();
        let own = cloud.inside_network(0, 0);
        let links = || run(&own, "ip -o link show").replace(' ', "");
        let before = links();
        assert_eq!(cloud.apply().await, 0);
        // An agent that was started anew knows nothing but what it finds.
        let dir = cloud.world._dir.path().join("vpc-0");
        let again = Engine::new(dir, cloud.world.nets[0].clone(), cloud.world.hosts[0].netns.clone());
        assert_eq!(again.apply(cloud.told(0), Vec::new()).await.unwrap().changes, 0);
        cloud.instance(0, 10).await;
        assert_eq!(again.apply(cloud.told(0), Vec::new()).await.unwrap().changes, 0);
        assert_eq!(links(), before);
        connections.iter_mut().for_each(Open::goes_on);
        // A third NIC is news, and touches nobody.
        cloud.instance(1, 12).await;
        cloud.nic(0, 7, 1, 12, 0);
        assert!(cloud.apply().await > 0);
        connections.iter_mut().for_each(Open::goes_on);
        cloud.all_right().await;
    });
}

#[test]
fn what_is_somebody_elses_is_left_alone_and_all_of_ours_goes() {
    isolated("vpc::what_is_somebody_elses_is_left_alone_and_all_of_ours_goes", async || {
        let mut cloud = Cloud::new(1, true).await;
        let mut plan = network(1);
        plan.route_tables[0].routes = vec![RoutePlan { to: cidr("0.0.0.0/0"), via: Via::Internet }];
        cloud.networks = vec![plan, network(2)];
        let host = cloud.world.hosts[0].netns.clone();
        let a = cloud.instance(0, 10).await;
        for command in [
            "ip link add nx0 type bridge",
            "ip link add nxuforeign type bridge",
            "ip link set nx0 up",
            "ip addr add 192.0.2.1/24 dev nx0",
            "ip route add 198.51.100.0/24 dev nx0",
            "ip route add 198.51.100.0/24 dev nx0 table 1000",
            "ip rule add from 192.0.2.0/24 lookup 1000 pref 300",
            "ip neigh add proxy 192.0.2.9 dev nx0",
            "nft add table inet somebody_elses",
        ] {
            run(&host, command);
        }
        run(&a, "ip route add 192.0.2.0/24 via 169.254.1.1 dev eth0 onlink");
        let state = |of: &NetnsRef| {
            let all = ["ip -o link show", "ip addr show", "ip route show table all", "ip -6 route show table all"];
            let more = ["ip rule show", "ip -6 rule show", "ip neigh show proxy", "nft list tables"];
            let mut out = String::new();
            for command in all.iter().chain(&more) {
                out += &run(of, command);
            }
            // Lifetimes and what the kernel itself has learnt go.
            let steady = |l: &&str| !l.contains("valid_lft") && !l.contains("multicast");
            let proxies = ["ipv4/neigh/uplink/proxy_delay", "ipv6/conf/uplink/proxy_ndp"];
            let values = proxies.map(|key| {
                let path = format!("/proc/sys/net/{key}");
                inside(of, move || std::fs::read_to_string(path).unwrap_or_default())
            });
            out.lines().filter(steady).collect::<Vec<_>>().join("\n") + &values.concat()
        };
        let before = (state(&host), state(&a));
        let nic = cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(1, 6, 0, 10, 1);
        cloud.networks[0].floating = vec![FloatingPlan {
            uid: uid(7, 1),
            name: "door".parse().unwrap(),
            address: "10.96.0.200".parse().unwrap(),
            nic,
        }];
        assert!(cloud.apply().await > 0);
        assert_ne!(state(&host), before.0);
        assert!(run(&a, "ip route show").contains("192.0.2.0/24 via 169.254.1.1 dev eth0"));
        assert!(run(&host, "ip neigh show proxy").contains("10.96.0.200 dev uplink"));
        cloud.engines[0].remove().await.unwrap();
        cloud.engines[0].remove().await.unwrap();
        assert_eq!(state(&host), before.0);
        assert_eq!(state(&a), before.1);
        assert!(!cloud.world._dir.path().join("vpc-0").exists());
        // And back.
        cloud.apply().await;
        cloud.all_right().await;
    });
}

#[test]
fn a_nic_comes_and_goes_while_its_instance_runs() {
    isolated("vpc::a_nic_comes_and_goes_while_its_instance_runs", async || {
        let mut cloud = Cloud::new(2, true).await;
        cloud.networks = vec![network(1)];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        let nic = cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(0, 6, 1, 11, 0);
        let plugged = cloud.networks.clone();
        cloud.nic_mut(nic).at = None;
        cloud.apply().await;
        let address = instance(&cloud.world.hosts[0], 10);
        let infrastructure = [address.address6.into(), address.address4.into()];
        let default = |six: bool| run(&a, if six { "ip -6 route show default" } else { "ip route show default" });
        assert!(default(false).contains("169.254.1.1 dev eth0") && default(true).contains("fe80::1 dev eth0"));
        // A gateway's request, which is open all the time.
        let mut requests: Vec<Open> = infrastructure.map(|to: IpAddr| open(&NetnsRef::Own, &a, to)).into();
        for _ in 0..3 {
            cloud.networks = plugged.clone();
            cloud.apply().await;
            assert!(default(false).contains("10.0.0.1 dev nic0") && default(true).contains("fd12::1 dev nic0"));
            assert!(meets(&a, &b, 6, DEADLINE) && meets(&b, &a, 5, DEADLINE));
            requests.iter_mut().for_each(Open::goes_on);
            for to in infrastructure {
                assert!(reaches(&NetnsRef::Own, &a, to, DEADLINE), "{to}");
            }
            // Names are still asked for by the old way.
            assert!(run(&a, "ip route get 169.254.1.1").contains("dev eth0"));
            let mut traffic = open(&a, &b, four(6));
            cloud.nic_mut(nic).at = None;
            cloud.apply().await;
            assert!(default(false).contains("169.254.1.1 dev eth0") && default(true).contains("fe80::1 dev eth0"));
            assert_eq!(run(&a, "ip rule show").lines().count(), 3);
            requests.iter_mut().for_each(Open::goes_on);
            assert!(!attempt(&a, "ip link show nic0").0);
            // What was open through it finds no way.
            traffic.answerer.set_read_timeout(Some(BRIEFLY)).unwrap();
            let _ = traffic.asker.write_all(b"ping");
            assert!(traffic.answerer.read_exact(&mut [0; 4]).is_err());
            cloud.all_right().await;
        }
    });
}

#[test]
fn a_nic_waits_for_its_instance_and_follows_it_into_a_new_namespace() {
    isolated("vpc::a_nic_waits_for_its_instance_and_follows_it_into_a_new_namespace", async || {
        let mut cloud = Cloud::new(1, true).await;
        cloud.networks = vec![network(1)];
        let b = cloud.instance(0, 11).await;
        let waits = cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(0, 6, 0, 11, 0);
        let applied = cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
        assert_eq!(applied.waiting, BTreeSet::from([(waits, instance_uid(10))]));
        assert_eq!(applied.plugged.len(), 1);
        cloud.all_right().await;
        for _ in 0..2 {
            let a = cloud.instance(0, 10).await;
            let applied = cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
            assert_eq!((applied.plugged.len(), applied.waiting.len()), (2, 0), "{applied:?}");
            assert!(meets(&a, &b, 6, DEADLINE) && meets(&b, &a, 5, DEADLINE));
            // The instance ends, something of it lingers; it starts anew in a namespace of the same name.
            let NetnsRef::Path(path) = &a else { panic!() };
            let lingers = std::fs::File::open(path).unwrap();
            cloud.world.nets[0].delete(&instance_uid(10).to_string()).await.unwrap();
            let c = cloud.instance(0, 10).await;
            assert_eq!(cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap().plugged.len(), 2);
            assert!(meets(&c, &b, 6, DEADLINE));
            drop(lingers);
            cloud.world.nets[0].delete(&instance_uid(10).to_string()).await.unwrap();
            assert_eq!(cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap().waiting.len(), 1);
        }
    });
}
