//! Floating addresses, NAT and balancers, and what is closed to all.

use std::collections::BTreeMap;

use nexus_model::plan::Via;

use super::plans::*;
use super::*;

pub const OUTSIDE4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2));
pub const OUTSIDE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));

/// The world beyond the machine.
pub fn beyond() {
    firewall::run(&NetnsRef::Own, "ip link set lo up");
    for address in [OUTSIDE4, OUTSIDE6] {
        firewall::run(&NetnsRef::Own, &format!("ip addr add {address} dev lo"));
    }
}

#[test]
fn floating_addresses_lead_both_ways_and_nat_one_way_and_infrastructure_is_closed() {
    isolated(
        "rules::outside::floating_addresses_lead_both_ways_and_nat_one_way_and_infrastructure_is_closed",
        async || {
            let mut plan = network(1);
            plan.groups = vec![open_group(1, 0)];
            plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 1, &[0]), nic(1, 4, 0, &[0])];
            nat(&mut plan, vec![(host_name(1), "10.96.0.210".parse().unwrap())]);
            route(&mut plan, "0.0.0.0/0", Via::Nat(0));
            route(&mut plan, "203.0.113.0/30", Via::Internet);
            route(&mut plan, "203.0.113.4/30", Via::Nat(0));
            let first = plan.nics[0].uid;
            let floating4: IpAddr = "10.96.0.200".parse().unwrap();
            floating(&mut plan, floating4, first);
            let mut site = Site::new(2).await;
            beyond();
            firewall::run(&NetnsRef::Own, "ip addr add 203.0.113.5 dev lo");
            for host in &site.world.hosts {
                let own = [(host.address4.into(), 32), (host.address6.into(), 128), (ADDRESS.address4.into(), 32)];
                site.closed.extend(own);
            }
            site.apply(vec![plan]).await;
            let [a, b, c] = [0, 1, 2].map(|n| site.nic(n));
            let (out, by_nat): (SocketAddr, SocketAddr) =
                ((OUTSIDE4, 7000).into(), "203.0.113.5:7000".parse().unwrap());
            assert_eq!(serves(&a, &NetnsRef::Own, out, out, DEADLINE), Some(floating4), "out by its floating address");
            assert_eq!(
                serves(&a, &NetnsRef::Own, by_nat, by_nat, DEADLINE),
                Some(floating4),
                "its own before one that is lent"
            );
            let own = site.world.hosts[0].address4;
            assert_eq!(serves(&c, &NetnsRef::Own, by_nat, by_nat, DEADLINE), Some(own.into()), "by the host's own");
            let lent: IpAddr = "10.96.0.210".parse().unwrap();
            assert_eq!(serves(&b, &NetnsRef::Own, by_nat, by_nat, DEADLINE), Some(lent), "by what the gateway lends");
            assert!(!connects(&b, &NetnsRef::Own, out, BRIEFLY), "without a floating address");
            assert!(site.dropped(1, "no_floating_address") > 0);
            // Inwards: to whom it leads, seen from where it comes.
            let at = SocketAddr::new(address4(1, 2).into(), 7001);
            let seen = serves(&NetnsRef::Own, &a, SocketAddr::new(floating4, 7001), at, DEADLINE);
            assert_eq!(seen, Some(ADDRESS.address4.into()));
            // A neighbour meets it from outside, too.
            let seen = serves(&b, &a, SocketAddr::new(floating4, 7001), at, DEADLINE);
            assert_eq!(seen, Some(lent));
            let at = SocketAddr::new(address4(1, 3).into(), 7001);
            assert_eq!(serves(&NetnsRef::Own, &b, SocketAddr::new(lent, 7001), at, BRIEFLY), None, "NAT is one way");
            let hosts = &site.world.hosts;
            for (what, to, address) in [
                ("its own host", &hosts[0].netns, IpAddr::from(hosts[0].address4)),
                ("another host", &hosts[1].netns, hosts[1].address4.into()),
                ("the machine", &NetnsRef::Own, ADDRESS.address4.into()),
                ("its own host's loopback", &hosts[0].netns, "169.254.1.1".parse().unwrap()),
            ] {
                let at = SocketAddr::new(address, 7002);
                // Where the address is not the host's own yet, all of the host listens.
                let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 7002);
                let listens = if what.ends_with("loopback") { everywhere } else { at };
                for from in [&a, &b] {
                    // Bound to the NIC's address: an instance also has its infrastructure's.
                    let source = if from == &a { address4(1, 2) } else { address4(1, 3) };
                    let _listener = inside(to, move || TcpListener::bind(listens).unwrap());
                    let connected = inside(from, move || {
                        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                        socket.bind(&SocketAddr::new(source.into(), 0).into()).unwrap();
                        socket.connect_timeout(&at.into(), BRIEFLY).is_ok()
                    });
                    assert!(!connected, "{what}: {address}");
                }
            }
        },
    );
}

#[test]
fn a_balancer_shares_by_weight_keeps_a_client_and_serves_its_own_targets() {
    isolated("rules::outside::a_balancer_shares_by_weight_keeps_a_client_and_serves_its_own_targets", async || {
        let mut plan = network(1);
        plan.groups = vec![open_group(1, 0)];
        plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 0, &[0]), nic(1, 4, 1, &[0])];
        let four = |n| IpAddr::from(address4(1, n));
        balancer(&mut plan, four(200), 80, false, &[(four(3), 8080, 1), (four(4), 8080, 3)]);
        balancer(&mut plan, four(201), 80, true, &[(four(3), 8080, 1), (four(4), 8080, 1)]);
        balancer(&mut plan, four(202), 80, false, &[(four(2), 8080, 1)]);
        let six = |n| IpAddr::from(address6(1, n));
        balancer(&mut plan, six(202), 80, false, &[(six(2), 8081, 1)]);
        let mut site = Site::new(2).await;
        site.apply(vec![plan]).await;
        let listen = |n: usize, at: SocketAddr| {
            let listener = inside(&site.nic(n), move || TcpListener::bind(at).unwrap());
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let listeners = [listen(1, (address4(1, 3), 8080).into()), listen(2, (address4(1, 4), 8080).into())];
        let client = site.nic(0);
        let shares = |balancer: IpAddr, count: usize| {
            let mut found = BTreeMap::new();
            for _ in 0..count {
                let at = SocketAddr::new(balancer, 80);
                let _open = inside(&client, move || TcpStream::connect_timeout(&at, DEADLINE).unwrap());
                let end = Instant::now() + DEADLINE;
                let to = loop {
                    if let Some(n) = listeners.iter().position(|l| l.accept().is_ok()) {
                        break n;
                    }
                    assert!(Instant::now() < end);
                };
                *found.entry(to).or_insert(0) += 1;
            }
            found
        };
        assert_eq!(shares(four(200), 40), BTreeMap::from([(0, 10), (1, 30)]));
        let kept = shares(four(201), 10);
        assert_eq!(kept.len(), 1, "{kept:?}");
        // Also past a change of rules.
        site.change(|n| n.flow_logs = nexus_model::plan::FlowLogs::All).await;
        assert_eq!(shares(four(201), 3).keys().next(), kept.keys().next());
        let own = site.nic(0);
        for (balancer, own_address, port) in [(four(202), four(2), 8080), (six(202), six(2), 8081)] {
            let at = SocketAddr::new(own_address, port);
            let seen = serves(&own, &own, SocketAddr::new(balancer, 80), at, DEADLINE);
            let gateway = if balancer.is_ipv6() { six(1) } else { four(1) };
            assert_eq!(seen, Some(gateway), "seen as coming from the gateway");
            assert!(pings(&own, balancer));
        }
    });
}
