//! What a workload sends that it had better not: as a router, in others' names on the link, without end, and in pieces.

use nexus_model::plan::{BalancedProtocol, Direction, RulePlan, RuleProtocol};

use super::groups::{send_frame, tcp};
use super::plans::*;
use super::*;

const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const BROADCAST: [u8; 6] = [0xff; 6];

/// Two NICs on one host and one on another, which let everything through.
async fn three() -> Site {
    let mut plan = network(1);
    plan.groups = vec![open_group(1, 0)];
    plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 0, &[0]), nic(1, 4, 1, &[0])];
    let mut site = Site::new(2).await;
    site.apply(vec![plan]).await;
    site
}

fn mac(n: u8) -> [u8; 6] {
    [6, 0, 0, 0, 1, n]
}

/// Waits until so many are counted.
fn counted(site: &Site, reason: &str, least: u64) {
    let end = Instant::now() + DEADLINE;
    while site.dropped(0, reason) < least {
        assert!(Instant::now() < end, "{reason}: {} of {least}", site.dropped(0, reason));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A router advertisement that says of its sender that it is the default router.
fn advertisement(from: u8) -> Vec<u8> {
    let source = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0x400, 0xff, 0xfe00, 0x100 + u16::from(from)).octets();
    let to = "ff02::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08];
    message.extend([0; 8]);
    let mut pseudo = [&source[..], &to, &[0, 0, 0, 16, 0, 0, 0, 58]].concat();
    pseudo.extend(&message);
    let sum: u32 = pseudo.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    message[2..4].copy_from_slice(&(!(((sum & 0xffff) + (sum >> 16)) as u16)).to_be_bytes());
    let header = [&[0x60, 0, 0, 0, 0, 16, 58, 255][..], &source, &to].concat();
    [&ALL_NODES[..], &mac(from), &[0x86, 0xdd], &header, &message].concat()
}

/// A question of who has an address, by which its sender says that `own` is at `hardware`.
fn arp(from: u8, hardware: [u8; 6], own: [u8; 4], asked: [u8; 4]) -> Vec<u8> {
    let head = [&BROADCAST[..], &mac(from), &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    [&head[..], &hardware, &own, &[0; 6], &asked].concat()
}

#[test]
fn a_workload_that_plays_the_router_is_heard_by_nobody() {
    isolated("rules::hostile::a_workload_that_plays_the_router_is_heard_by_nobody", async || {
        let site = three().await;
        // Its neighbours would believe it.
        let routers = |n: usize| firewall::run(&site.nic(n), "ip -6 route show proto ra");
        for n in [1, 2] {
            firewall::run(&site.nic(n), "sysctl -qw net.ipv6.conf.nic0.accept_ra=2");
        }
        send_frame(&site.nic(0), &advertisement(2), 5);
        counted(&site, "rogue", 5);
        for n in [1, 2] {
            assert_eq!(routers(n), "", "nobody has a route by it");
        }
        assert!(connects(&site.nic(1), &site.nic(2), (address6(1, 4), 80).into(), DEADLINE), "all is as it was");
    });
}

#[test]
fn who_claims_anothers_address_on_the_link_changes_nothing_and_a_flood_of_questions_ends() {
    isolated(
        "rules::hostile::who_claims_anothers_address_on_the_link_changes_nothing_and_a_flood_of_questions_ends",
        async || {
            let site = three().await;
            // It says that its neighbour's and its gateway's addresses are its own.
            for claimed in [[10, 1, 0, 3], [10, 1, 0, 4], [10, 1, 0, 1]] {
                send_frame(&site.nic(0), &arp(2, mac(2), claimed, claimed), 1);
            }
            // Or that its own is at somebody else's.
            send_frame(&site.nic(0), &arp(2, mac(3), [10, 1, 0, 2], [10, 1, 0, 1]), 1);
            counted(&site, "arp_spoofed", 4);
            assert!(connects(&site.nic(2), &site.nic(1), (address4(1, 3), 80).into(), DEADLINE));
            assert!(connects(&site.nic(1), &site.nic(2), (address4(1, 4), 80).into(), DEADLINE));
            send_frame(&site.nic(0), &arp(2, mac(2), [10, 1, 0, 2], [10, 1, 9, 9]), 5000);
            counted(&site, "arp_flood", 1000);
            // The others are not the slower for it, nor deaf: they ask anew.
            firewall::run(&site.nic(1), "ip neigh flush dev nic0");
            assert!(connects(&site.nic(1), &site.nic(2), (address4(1, 4), 80).into(), DEADLINE));
        },
    );
}

/// Whether a datagram of so many bytes arrives whole.
fn arrives(site: &Site, to: SocketAddr, length: usize, patience: Duration) -> bool {
    let ear = inside(&site.nic(2), move || UdpSocket::bind(to).unwrap());
    ear.set_read_timeout(Some(patience)).unwrap();
    let text: Vec<u8> = (0..length).map(|n| n as u8).collect();
    let sent = text.clone();
    inside(&site.nic(0), move || {
        let any: SocketAddr = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }.parse().unwrap();
        UdpSocket::bind(any).unwrap().send_to(&sent, to).unwrap();
    });
    let mut buffer = vec![0; 70_000];
    ear.recv(&mut buffer).is_ok_and(|heard| buffer[..heard] == text)
}

#[test]
fn what_comes_in_pieces_is_judged_as_a_whole() {
    isolated("rules::hostile::what_comes_in_pieces_is_judged_as_a_whole", async || {
        let mut site = three().await;
        let open = RulePlan {
            protocol: RuleProtocol::Udp,
            ports: vec![(5000, 5000)],
            ..rule("datagrams", Direction::Ingress)
        };
        let mut guarded = group(1, 1, vec![open, tcp("web", &[(80, 80)], Vec::new())]);
        guarded.rules.push(everything(Direction::Egress));
        site.change(|plan| {
            plan.groups.push(guarded);
            plan.nics[2].groups = vec![1];
        })
        .await;
        for host in [IpAddr::from(address4(1, 4)), address6(1, 4).into()] {
            for length in [1200, 3000, 60_000] {
                assert!(arrives(&site, (host, 5000).into(), length, DEADLINE), "{host}: {length} bytes");
            }
            // Later pieces have no ports, and open nothing.
            assert!(!arrives(&site, (host, 5001).into(), 3000, BRIEFLY), "{host}");
        }
        // A second piece without a first never comes out.
        let source = [10, 1, 0, 2];
        let mut packet = vec![0x45, 0, 0, 60, 0, 9, 0x00, 3, 64, 17, 0, 0];
        packet.extend(source);
        packet.extend([10, 1, 0, 4]);
        packet.resize(60, 7);
        let ear = inside(&site.nic(2), || UdpSocket::bind((address4(1, 4), 5000)).unwrap());
        ear.set_read_timeout(Some(BRIEFLY)).unwrap();
        let gateway = nexus_network::vpc::links::GATEWAY_MAC;
        send_frame(&site.nic(0), &[&gateway[..], &mac(2), &[8, 0], &packet].concat(), 100);
        assert!(ear.recv(&mut [0; 99]).is_err());
        drop(ear);
        assert!(arrives(&site, (address4(1, 4), 5000).into(), 3000, DEADLINE), "after that");
    });
}

#[test]
fn datagrams_are_balanced_and_a_client_keeps_its_target() {
    isolated("rules::hostile::datagrams_are_balanced_and_a_client_keeps_its_target", async || {
        let mut site = three().await;
        let four = |n| IpAddr::from(address4(1, n));
        site.change(|plan| {
            let targets = [(four(3), 5353, 1), (four(4), 5353, 3)];
            balancer(plan, four(200), 53, false, &targets);
            balancer(plan, four(201), 53, true, &targets);
            plan.balancers.iter_mut().for_each(|b| b.listeners[0].protocol = BalancedProtocol::Udp);
        })
        .await;
        let ears = [1, 2].map(|n| {
            let ear = inside(&site.nic(n), move || UdpSocket::bind((address4(1, 2 + n as u8), 5353)).unwrap());
            ear.set_nonblocking(true).unwrap();
            ear
        });
        // Each from a port of its own: each is a flow of its own, and is answered by whom it called.
        let shares = |balancer: IpAddr, count: usize| {
            let mut found = [0; 2];
            for _ in 0..count {
                let asking = inside(&site.nic(0), move || {
                    let socket = UdpSocket::bind((address4(1, 2), 0)).unwrap();
                    socket.connect((balancer, 53)).unwrap();
                    socket.send(b"who?").unwrap();
                    socket
                });
                let end = Instant::now() + DEADLINE;
                let mut word = [0; 8];
                let by = 'heard: loop {
                    for (n, ear) in ears.iter().enumerate() {
                        if let Ok((_, from)) = ear.recv_from(&mut word) {
                            ear.send_to(b"I", from).unwrap();
                            break 'heard n;
                        }
                    }
                    assert!(Instant::now() < end);
                };
                asking.set_read_timeout(Some(DEADLINE)).unwrap();
                asking.recv(&mut word).expect("the answer comes from the balancer's address");
                found[by] += 1;
            }
            found
        };
        assert_eq!(shares(four(200), 40), [10, 30]);
        let kept = shares(four(201), 10);
        assert!(kept.contains(&10), "{kept:?}");
    });
}
