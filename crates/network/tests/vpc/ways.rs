//! Ways beyond one network, and how much goes through them.

use super::*;

const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2));
const OUTSIDE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));

/// The address that a listener outside sees, if it is reached.
fn seen_from_outside(from: &NetnsRef, at: IpAddr, patience: Duration) -> Option<IpAddr> {
    let listener = TcpListener::bind((at, 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let connected = inside(from, move || TcpStream::connect_timeout(&to, patience).is_ok());
    connected.then(|| listener.accept().unwrap().1.ip())
}

fn outside_is_there() {
    run(&NetnsRef::Own, "ip link set lo up");
    for address in [OUTSIDE, OUTSIDE6] {
        run(&NetnsRef::Own, &format!("ip addr add {address} dev lo"));
    }
}

#[test]
fn peered_networks_meet_on_whichever_hosts_they_are() {
    isolated("vpc::ways::peered_networks_meet_on_whichever_hosts_they_are", async || {
        let mut cloud = Cloud::new(2, true).await;
        let (mut one, mut two) = (network(1), network(2));
        two.cidrs = vec![cidr("10.1.0.0/16"), cidr("fd13::/48")];
        two.subnets[0].cidr4 = Some(cidr("10.1.0.0/24"));
        two.subnets[0].cidr6 = Some(cidr("fd13::/64"));
        two.subnets[0].gateway4 = Some("10.1.0.1".parse().unwrap());
        two.subnets[0].gateway6 = Some("fd13::1".parse().unwrap());
        two.mtu = 1300;
        let cidrs = [one.cidrs.clone(), two.cidrs.clone()];
        let uids = [one.uid, two.uid];
        for (n, plan) in [&mut one, &mut two].into_iter().enumerate() {
            let (network, cidrs) = (uids[1 - n], cidrs[1 - n].clone());
            plan.route_tables[0].routes = cidrs.iter().map(|to| RoutePlan { to: *to, via: Via::Peering(0) }).collect();
            plan.peerings = vec![PeeringPlan { uid: uid(8, 1), name: "both".parse().unwrap(), network, cidrs }];
        }
        cloud.networks = vec![one, two];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        let c = cloud.instance(0, 12).await;
        cloud.nic(0, 5, 0, 10, 0);
        for (number, host, instance) in [(6, 1, 11), (7, 0, 12)] {
            let nic = cloud.nic(1, number, host, instance, 0);
            let nic = cloud.nic_mut(nic);
            nic.address4 = Some(Ipv4Addr::new(10, 1, 0, number as u8));
            nic.address6 = Some(Ipv6Addr::new(0xfd13, 0, 0, 0, 0, 0, 0, number));
        }
        cloud.apply().await;
        // Workloads that think that as much fits there as here.
        for one in [&b, &c] {
            run(one, "ip link set nic0 mtu 1400");
        }
        for (to, address) in [(&b, "10.1.0.6"), (&b, "fd13::6"), (&c, "10.1.0.7"), (&c, "fd13::7")] {
            let address: IpAddr = address.parse().unwrap();
            assert!(reaches(&a, to, address, DEADLINE), "{address}");
            let back = if address.is_ipv6() { six(5) } else { four(5) };
            assert!(reaches(to, &a, back, DEADLINE), "back from {address}");
            // What fits the first network and not the second is told.
            open(&a, to, address).carries(1 << 20);
        }
        for host in 0..2 {
            let differences = cloud.differences(host).await;
            assert!(differences.len() == 1 && differences[0].contains("MTU"), "{differences:?}");
        }
        cloud.apply().await;
        assert_eq!(cloud.apply().await, 0);
        cloud.all_right().await;
        // Without the agreement there is no way.
        for plan in &mut cloud.networks {
            plan.peerings.clear();
        }
        cloud.apply().await;
        assert!(!reaches(&a, &c, "10.1.0.7".parse().unwrap(), BRIEFLY));
        cloud.all_right().await;
    });
}

#[test]
fn floating_addresses_lead_in_and_out_and_follow_their_nic() {
    isolated("vpc::ways::floating_addresses_lead_in_and_out_and_follow_their_nic", async || {
        let mut cloud = Cloud::new(2, true).await;
        outside_is_there();
        let mut plan = network(1);
        plan.nats = vec![NatPlan { uid: uid(6, 1), name: "nat".parse().unwrap(), addresses: Vec::new() }];
        let outside = |via| ["0.0.0.0/0", "::/0"].map(|to| RoutePlan { to: cidr(to), via }).into();
        plan.route_tables[0].routes = outside(Via::Internet);
        plan.route_tables.push(RouteTablePlan { name: "private".parse().unwrap(), routes: outside(Via::Nat(0)) });
        plan.subnets.push(SubnetPlan {
            uid: uid(5, 2),
            name: "private".parse().unwrap(),
            cidr4: Some(cidr("10.0.16.0/24")),
            cidr6: Some(cidr("fd12:0:0:1::/64")),
            gateway4: Some("10.0.16.1".parse().unwrap()),
            gateway6: Some("fd12:0:0:1::1".parse().unwrap()),
            route_table: 1,
        });
        cloud.networks = vec![plan];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(0, 11).await;
        let c = cloud.instance(1, 12).await;
        let nic = cloud.nic(0, 5, 0, 10, 0);
        let private = cloud.nic(0, 6, 0, 11, 0);
        let private = cloud.nic_mut(private);
        private.subnet = 1;
        private.address4 = Some(Ipv4Addr::new(10, 0, 16, 6));
        private.address6 = Some("fd12:0:0:1::6".parse().unwrap());
        let other = cloud.nic(0, 7, 1, 12, 0);
        let floating: [IpAddr; 2] = ["10.96.0.200".parse().unwrap(), "fd00:ff::200".parse().unwrap()];
        let doors = |nic| {
            let door = |(n, address): (usize, &IpAddr)| FloatingPlan {
                uid: uid(7, n as u16),
                name: format!("door-{n}").parse().unwrap(),
                address: *address,
                nic,
            };
            floating.iter().enumerate().map(door).collect::<Vec<_>>()
        };
        cloud.networks[0].floating = doors(nic);
        cloud.apply().await;
        let host = &cloud.world.hosts[0];
        for (own, to, at) in [(four(5), floating[0], OUTSIDE), (six(5), floating[1], OUTSIDE6)] {
            assert_eq!(seen_from_outside(&a, at, DEADLINE), Some(to), "out by its own address");
            assert!(reaches_at(&NetnsRef::Own, &a, own, to, DEADLINE), "in by {to}");
        }
        assert_eq!(seen_from_outside(&b, OUTSIDE, DEADLINE), Some(host.address4.into()), "out by the host's");
        assert_eq!(seen_from_outside(&b, OUTSIDE6, DEADLINE), Some(host.address6.into()), "out by the host's");
        // It moves: everybody on the wire is told.
        cloud.networks[0].floating = doors(other);
        cloud.apply().await;
        for (own, to, at) in [(four(7), floating[0], OUTSIDE), (six(7), floating[1], OUTSIDE6)] {
            assert_eq!(seen_from_outside(&c, at, DEADLINE), Some(to));
            assert!(reaches_at(&NetnsRef::Own, &c, own, to, DEADLINE), "in by {to}");
        }
        assert_eq!(cloud.apply().await, 0);
        cloud.all_right().await;
    });
}

/// Whether who calls `called` reaches a listener on `own` in `to`.
fn reaches_at(from: &NetnsRef, to: &NetnsRef, own: IpAddr, called: IpAddr, patience: Duration) -> bool {
    let listener = inside(to, move || TcpListener::bind(SocketAddr::new(own, 0)).unwrap());
    let at = SocketAddr::new(called, listener.local_addr().unwrap().port());
    let end = Instant::now() + patience;
    while Instant::now() < end {
        if inside(from, move || TcpStream::connect_timeout(&at, Duration::from_millis(500))).is_ok() {
            return true;
        }
    }
    false
}

#[test]
fn what_is_for_others_goes_to_the_nic_that_forwards_it_on_any_host() {
    isolated("vpc::ways::what_is_for_others_goes_to_the_nic_that_forwards_it_on_any_host", async || {
        let mut cloud = Cloud::new(2, false).await;
        let mut plan = network(1);
        let router = uid(20, 9);
        plan.route_tables[0].routes =
            ["192.168.9.0/24", "2001:db8:9::/48"].map(|to| RoutePlan { to: cidr(to), via: Via::Nic(router) }).into();
        cloud.networks = vec![plan];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        let r = cloud.instance(1, 12).await;
        cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(0, 6, 1, 11, 0);
        assert_eq!(cloud.nic(0, 9, 1, 12, 0), router);
        cloud.nic_mut(router).forwards = true;
        cloud.apply().await;
        for address in ["192.168.9.1", "2001:db8:9::1"] {
            run(&r, &format!("ip addr add {address} dev lo nodad"));
            for from in [&a, &b] {
                assert!(reaches(from, &r, address.parse().unwrap(), DEADLINE), "{address}");
            }
        }
        assert_eq!(run(&r, "cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
        cloud.all_right().await;
    });
}

#[test]
fn what_is_too_big_is_told_so_and_what_fits_passes() {
    isolated("vpc::ways::what_is_too_big_is_told_so_and_what_fits_passes", async || {
        let mut cloud = Cloud::new(2, true).await;
        cloud.networks = vec![network(1)];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(1, 11).await;
        let c = cloud.instance(0, 12).await;
        for (number, host, instance) in [(5, 0, 10), (6, 1, 11), (7, 0, 12)] {
            cloud.nic(0, number, host, instance, 0);
        }
        cloud.apply().await;
        assert!(run(&a, "ip link show nic0").contains("mtu 1400"));
        // Workloads that think that more fits: both, so that neither says by its segments' size what it takes.
        for one in [&a, &b, &c] {
            run(one, "ip link set nic0 mtu 1500");
        }
        for (to, address) in [(&b, four(6)), (&b, six(6)), (&c, four(7)), (&c, six(7))] {
            open(&a, to, address).carries(1 << 20);
            let own = if address.is_ipv6() { six(5) } else { four(5) };
            open(to, &a, own).carries(1 << 20);
            // What opens a connection says by now what fits: others are told.
            inside(&a, move || {
                let socket = std::net::UdpSocket::bind((own, 0)).unwrap();
                socket.send_to(&[7; 1440], (address, 9)).unwrap();
            });
            let told = run(&a, &format!("ip route get {address} from {own}"));
            assert!(told.contains("mtu 1400"), "{told}");
        }
        // The next time puts it right.
        assert!(cloud.apply().await > 0);
        assert!(run(&a, "ip link show nic0").contains("mtu 1400"));
    });
}

#[test]
fn a_nic_sends_and_gets_no_more_than_its_rate() {
    isolated("vpc::ways::a_nic_sends_and_gets_no_more_than_its_rate", async || {
        let mut cloud = Cloud::new(1, true).await;
        cloud.networks = vec![network(1)];
        let a = cloud.instance(0, 10).await;
        let b = cloud.instance(0, 11).await;
        let nic = cloud.nic(0, 5, 0, 10, 0);
        cloud.nic(0, 6, 0, 11, 0);
        cloud.nic_mut(nic).rate = Some(40_000_000);
        cloud.apply().await;
        // 5 MB at 5 MB a second, less what may be sent at once.
        let atleast = Duration::from_millis(700);
        assert!(open(&a, &b, four(6)).carries(5_000_000) > atleast, "out");
        assert!(open(&a, &b, four(6)).reversed().carries(5_000_000) > atleast, "in");
        assert_eq!(cloud.apply().await, 0);
        cloud.nic_mut(nic).rate = Some(40_000_000_003);
        assert!(cloud.apply().await > 0);
        assert_eq!(cloud.apply().await, 0, "a large rate is read as it was written");
        cloud.nic_mut(nic).rate = None;
        cloud.apply().await;
        let left = run(&a, "tc qdisc show dev nic0") + &run(&cloud.inside_network(0, 0), "tc qdisc show");
        assert!(!left.contains("tbf"), "{left}");
        cloud.all_right().await;
    });
}

/// What a class of a shared link has sent, in bytes, and how many packets it has dropped.
fn class(host: &NetnsRef, minor: u8) -> (u64, u64) {
    let told = run(host, "tc -s class show dev uplink");
    let mut lines = told.lines().skip_while(|l| !l.starts_with(&format!("class htb 9c5f:{minor}0 ")));
    let sent: Vec<&str> = lines.nth(1).unwrap_or_else(|| panic!("{told}")).split([' ', ',']).collect();
    let after = |word: &str| sent[sent.iter().position(|w| *w == word).unwrap() + 1].parse().unwrap();
    (after("Sent"), after("(dropped"))
}

/// Sends so much to another host as servers and agents do, with whatever else is on the way.
fn control(from: &NetnsRef, to: &NetnsRef, at: IpAddr, bytes: usize) {
    let listener = inside(to, move || TcpListener::bind((at, 0)).unwrap());
    let endpoint = nexus_env::Endpoint::Tcp(listener.local_addr().unwrap());
    let reading =
        std::thread::spawn(move || std::io::copy(&mut listener.accept().unwrap().0, &mut std::io::sink()).unwrap());
    inside(from, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use nexus_env::Transport as _;
            use tokio::io::AsyncWriteExt as _;
            let mut stream = nexus_env::RealTransport.connect(&endpoint).await.unwrap();
            stream.write_all(&vec![0; bytes]).await.unwrap();
            stream.shutdown().await.unwrap();
        });
    });
    assert_eq!(reading.join().unwrap(), bytes as u64);
}

#[test]
fn control_goes_before_tenants_on_a_link_that_is_full() {
    isolated("vpc::ways::control_goes_before_tenants_on_a_link_that_is_full", async || {
        for v6 in [true, false] {
            let mut cloud = Cloud::new(2, v6).await;
            for (n, engine) in cloud.engines.iter_mut().enumerate() {
                let (dir, host) = (cloud.world._dir.path().join(format!("vpc-{n}")), &cloud.world.hosts[n].netns);
                *engine = Engine::with_uplink(dir, cloud.world.nets[n].clone(), host.clone(), Some(20_000_000));
            }
            let hosts: Vec<NetnsRef> = cloud.world.hosts.iter().map(|h| h.netns.clone()).collect();
            // What somebody else has chosen for a link stays, and it is told.
            run(&hosts[1], "tc qdisc add dev uplink root handle 7: tbf rate 1gbit burst 100kb latency 50ms");
            cloud.networks = vec![network(1)];
            let a = cloud.instance(0, 10).await;
            let b = cloud.instance(1, 11).await;
            cloud.nic(0, 5, 0, 10, 0);
            cloud.nic(0, 6, 1, 11, 0);
            cloud.apply().await;
            assert_eq!(cloud.apply().await, 0);
            assert_eq!(cloud.differences(0).await, Vec::<String>::new());
            let told = cloud.differences(1).await;
            assert!(told.len() == 1 && told[0].contains("uplink has a queue of somebody else's"), "{told:?}");
            assert!(run(&hosts[1], "tc qdisc show dev uplink").contains("tbf 7:"));

            open(&a, &b, four(6)).carries(500_000);
            assert!(class(&hosts[0], 3).0 > 500_000);
            let there = cloud.endpoint(1);
            let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let flood = {
                let (a, stop) = (a.clone(), stop.clone());
                std::thread::spawn(move || {
                    inside(&a, move || {
                        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                        // Says of itself that it is control, which is not for tenants to say.
                        let _ = socket2::SockRef::from(&socket).set_tos_v4(48 << 2);
                        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                            let _ = socket.send_to(&[0; 1300], (four(6), 9));
                        }
                    });
                })
            };
            let deadline = Instant::now() + DEADLINE;
            while class(&hosts[0], 3).1 == 0 {
                assert!(Instant::now() < deadline, "the link is never full");
            }
            control(&hosts[0], &hosts[1], there, 500_000);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            flood.join().unwrap();
            let (sent, dropped) = class(&hosts[0], 1);
            assert!(sent > 500_000 && dropped == 0, "{sent} bytes of control, {dropped} packets lost");

            run(&hosts[0], "tc class del dev uplink classid 9c5f:10");
            assert_eq!(cloud.differences(0).await.len(), 1);
            cloud.apply().await;
            assert_eq!(cloud.differences(0).await, Vec::<String>::new());
            for engine in &cloud.engines {
                engine.remove().await.unwrap();
            }
            assert!(!run(&hosts[0], "tc qdisc show dev uplink").contains("htb"));
            assert!(run(&hosts[1], "tc qdisc show dev uplink").contains("tbf 7:"));
        }
    });
}

#[test]
fn tunnel_packets_from_elsewhere_than_our_hosts_are_dropped() {
    isolated("vpc::ways::tunnel_packets_from_elsewhere_than_our_hosts_are_dropped", async || {
        for v6 in [true, false] {
            let mut cloud = Cloud::new(2, v6).await;
            cloud.networks = vec![network(1)];
            let a = cloud.instance(0, 10).await;
            cloud.nic(0, 5, 0, 10, 0);
            let stranger = cloud.world.hosts[1].netns.clone();
            let vni = cloud.networks[0].vni;
            let endpoint = cloud.endpoint(0);
            let mac = Mac(nexus_network::vpc::links::hop(endpoint).0);
            run(&stranger, &format!("ip link add fake type vxlan id {vni} dstport 4789 local {}", cloud.endpoint(1)));
            run(&stranger, "ip link set fake up");
            run(&stranger, "ip addr add 10.0.0.77/32 dev fake");
            run(&stranger, "ip route add 10.0.0.5/32 dev fake src 10.0.0.77");
            run(&stranger, &format!("ip neigh add 10.0.0.5 lladdr {mac} dev fake nud permanent"));
            run(&stranger, &format!("bridge fdb append {mac} dev fake dst {endpoint} self permanent"));
            let arrives = |patience| {
                let listener = inside(&a, || std::net::UdpSocket::bind("10.0.0.5:0").unwrap());
                listener.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                let to = listener.local_addr().unwrap();
                let sender = inside(&stranger, || std::net::UdpSocket::bind("10.0.0.77:0").unwrap());
                let end = Instant::now() + patience;
                while Instant::now() < end {
                    sender.send_to(b"forged", to).unwrap();
                    if listener.recv(&mut [0; 16]).is_ok() {
                        return true;
                    }
                }
                false
            };
            // As long as it is one of ours, it is heard: the forgery is a good one.
            cloud.engines[0].apply(cloud.told(0), Vec::new()).await.unwrap();
            assert!(arrives(DEADLINE));
            let mut told = HostNetworks::clone(&cloud.told(0));
            told.tunnels.clear();
            cloud.engines[0].apply(Arc::new(told), Vec::new()).await.unwrap();
            assert!(!arrives(BRIEFLY));
            Underlay::destroy("nxt").await.unwrap();
        }
    });
}
