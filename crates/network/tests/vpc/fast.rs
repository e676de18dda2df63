//! Open connections between hosts take the fast path: for as long as they may, and nobody but they.

use std::os::fd::AsRawFd as _;

use nexus_model::plan::{BalancedProtocol, BalancerPlan, ListenerPlan, TargetPlan};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};

use super::*;

/// Two NICs of a network, on two hosts, and a third beside the first.
async fn three() -> (Cloud, [NetnsRef; 3]) {
    let mut cloud = Cloud::new(2, true).await;
    cloud.networks = vec![network(1)];
    let at = [cloud.instance(0, 10).await, cloud.instance(1, 11).await, cloud.instance(0, 12).await];
    for (number, host, instance) in [(5, 0, 10), (6, 1, 11), (7, 0, 12)] {
        cloud.nic(0, number, host, instance, 0);
    }
    cloud.apply().await;
    (cloud, at)
}

/// Whether a connection is noted in both directions, by the two ports in that order.
fn noted(own: &NetnsRef, ports: [u16; 2]) -> bool {
    let notes = ["notes4", "notes6"].map(|set| run(own, &format!("nft list set netdev nexus {set}"))).concat();
    let [one, other] = ports;
    notes.contains(&format!(" . {one} . {other} ")) && notes.contains(&format!(" . {other} . {one} "))
}

fn ports(open: &Open) -> [u16; 2] {
    [open.asker.local_addr().unwrap().port(), open.asker.peer_addr().unwrap().port()]
}

/// Lets a connection be used until it is noted by both hosts.
fn used(cloud: &Cloud, open: &mut Open) {
    let end = Instant::now() + DEADLINE;
    let ports = ports(open);
    while !(0..2).all(|host| noted(&cloud.inside_network(host, 0), ports)) {
        assert!(Instant::now() < end, "{ports:?} is never noted");
        open.goes_on();
    }
}

/// How many packets a namespace has routed.
fn routed(own: &NetnsRef) -> u64 {
    let four = run(own, "cat /proc/net/snmp");
    let mut four = four.lines().filter(|l| l.starts_with("Ip:")).map(|l| l.split_whitespace().collect::<Vec<_>>());
    let (names, values) = (four.next().unwrap(), four.next().unwrap());
    let at = names.iter().position(|n| *n == "ForwDatagrams").unwrap();
    let six = run(own, "cat /proc/net/snmp6");
    let six = six.lines().find_map(|l| l.strip_prefix("Ip6OutForwDatagrams")).unwrap();
    values[at].parse::<u64>().unwrap() + six.trim().parse::<u64>().unwrap()
}

/// Packets that were dropped for a reason.
fn dropped(own: &NetnsRef, reason: &str) -> u64 {
    let counter = run(own, &format!("nft list counter inet nexus drop_{reason}"));
    counter.split_whitespace().skip_while(|w| *w != "packets").nth(1).unwrap().parse().unwrap()
}

#[test]
fn an_open_connection_is_not_looked_at_again_until_rules_change() {
    isolated("vpc::fast::an_open_connection_is_not_looked_at_again_until_rules_change", async || {
        let (mut cloud, [a, b, _]) = three().await;
        let own = cloud.inside_network(0, 0);
        let mut all: Vec<Open> = [four(6), six(6)].map(|to| open(&a, &b, to)).into();
        for open in &mut all {
            used(&cloud, open);
            let before = routed(&own);
            (0..500).for_each(|_| open.goes_on());
            let long = routed(&own) - before;
            assert!(long < 500, "{long} of 1,000 packets or more took the long way");
        }
        // What is open ends with the rule that let it.
        all.iter_mut().for_each(|open| used(&cloud, open));
        cloud.networks[0].groups[0].rules.retain(|rule| rule.direction == Direction::Egress);
        cloud.apply().await;
        for open in &mut all {
            open.asker.write_all(b"ping").unwrap();
            open.answerer.set_read_timeout(Some(BRIEFLY)).unwrap();
            assert!(open.answerer.read_exact(&mut [0; 4]).is_err(), "a rule that is gone lets nobody through");
            assert!(!noted(&cloud.inside_network(1, 0), ports(open)));
        }
        cloud.all_right().await;
    });
}

#[test]
fn a_connection_that_was_idle_goes_on_from_either_end() {
    isolated("vpc::fast::a_connection_that_was_idle_goes_on_from_either_end", async || {
        let (mut cloud, [a, b, _]) = three().await;
        // Nobody may begin anything in the other direction.
        cloud.networks[0].groups[0].rules.retain(|rule| rule.direction == Direction::Egress);
        let listens = cloud.networks[0].groups.len() as u32;
        let mut open_to_all = network(1).groups.remove(0);
        open_to_all.uid = uid(4, 9);
        open_to_all.name = "listens".parse().unwrap();
        open_to_all.rules.retain(|rule| rule.direction == Direction::Ingress);
        cloud.networks[0].groups.push(open_to_all);
        let nic = cloud.networks[0].nics[1].uid;
        cloud.nic_mut(nic).groups = vec![listens];
        cloud.apply().await;
        let mut open = open(&a, &b, four(6));
        used(&cloud, &mut open);
        let end = Instant::now() + DEADLINE;
        while (0..2).any(|host| noted(&cloud.inside_network(host, 0), ports(&open))) {
            assert!(Instant::now() < end, "notes stay");
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut open = open.reversed();
        open.goes_on();
        used(&cloud, &mut open.reversed());
    });
}

#[test]
fn a_balancers_connections_are_never_noted() {
    isolated("vpc::fast::a_balancers_connections_are_never_noted", async || {
        let (mut cloud, [a, b, _]) = three().await;
        let target = inside(&b, || TcpListener::bind((four(6), 0)).unwrap());
        let to = target.local_addr().unwrap();
        let address: IpAddr = "10.0.0.200".parse().unwrap();
        let listener = ListenerPlan {
            port: 80,
            protocol: BalancedProtocol::Tcp,
            source_hash: false,
            targets: vec![TargetPlan { address: to.ip(), port: to.port(), weight: 1, failing: false }],
            proxy_protocol: None,
            check: None,
        };
        let name = "front".parse().unwrap();
        cloud.networks[0].balancers = vec![BalancerPlan { uid: uid(9, 1), name, address, listeners: vec![listener] }];
        cloud.apply().await;
        let connect = |to: SocketAddr| {
            let asker = inside(&a, move || TcpStream::connect_timeout(&to, DEADLINE).unwrap());
            Open { asker, answerer: target.accept().unwrap().0 }
        };
        let mut balanced = connect((address, 80).into());
        let mut direct = connect(to);
        for _ in 0..3 {
            used(&cloud, &mut direct);
            balanced.goes_on();
            let client = ports(&balanced)[0];
            for host in 0..2 {
                let own = cloud.inside_network(host, 0);
                assert!(
                    host == 1 || !noted(&own, [client, to.port()]),
                    "what is changed on host {host} is noted there"
                );
                assert!(!noted(&own, [client, 80]));
            }
        }
    });
}

#[test]
fn nobody_uses_a_note_in_anothers_name() {
    isolated("vpc::fast::nobody_uses_a_note_in_anothers_name", async || {
        let (cloud, [a, b, c]) = three().await;
        let own = cloud.inside_network(0, 0);
        let mut open = open(&a, &b, four(6));
        used(&cloud, &mut open);
        let before = dropped(&own, "spoofed_address");
        let ports = ports(&open);
        // In the midst of that connection, as it would be sent by its own end: but from a NIC beside it.
        const FORGED: u64 = 20;
        inside(&c, move || {
            let (IpAddr::V4(from), IpAddr::V4(to)) = (four(5), four(6)) else { panic!() };
            let mut packet = vec![0x45, 0, 0, 41, 0, 0, 0x40, 0, 64, 6, 0, 0];
            packet.extend(from.octets().into_iter().chain(to.octets()));
            packet.extend(ports.into_iter().flat_map(u16::to_be_bytes));
            packet.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0x10, 0, 0, 0, 0, 0, b'x']);
            let raw = (AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw);
            let socket = socket(raw.0, raw.1, raw.2, raw.3).unwrap();
            let at = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
            for _ in 0..FORGED {
                assert_eq!(sendto(socket.as_raw_fd(), &packet, &at, MsgFlags::empty()), Ok(packet.len()));
            }
        });
        assert_eq!(dropped(&own, "spoofed_address") - before, FORGED);
        open.goes_on();
    });
}

#[test]
fn a_nic_that_is_plugged_in_anew_has_its_fast_path_again() {
    isolated("vpc::fast::a_nic_that_is_plugged_in_anew_has_its_fast_path_again", async || {
        let (cloud, [a, b, _]) = three().await;
        used(&cloud, &mut open(&a, &b, four(6)));
        let link = nexus_network::vpc::links::nic(cloud.networks[0].nics[0].uid);
        for host in [0, 1] {
            let nic =
                if host == 0 { link.clone() } else { nexus_network::vpc::links::nic(cloud.networks[0].nics[1].uid) };
            run(&cloud.inside_network(host, 0), &format!("ip link del {nic}"));
            cloud.apply().await;
            let mut open = open(&a, &b, four(6));
            used(&cloud, &mut open);
            let before = routed(&cloud.inside_network(0, 0)) + routed(&cloud.inside_network(1, 0));
            (0..500).for_each(|_| open.goes_on());
            let long = routed(&cloud.inside_network(0, 0)) + routed(&cloud.inside_network(1, 0)) - before;
            assert!(long < 1000, "{long} of 2,000 packets took the long way");
            cloud.all_right().await;
        }
    });
}
