//! Security groups, anti-spoofing, and the log of both, between real namespaces.

use std::sync::atomic::AtomicU64;

use nexus_model::plan::{Direction, Remote, RulePlan, RuleProtocol};
use nexus_network::vpc::flows::{Flow, follow};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use super::plans::*;
use super::*;

pub fn tcp(id: &str, ports: &[(u16, u16)], remotes: Vec<Remote>) -> RulePlan {
    RulePlan { protocol: RuleProtocol::Tcp, ports: ports.to_vec(), remotes, ..rule(id, Direction::Ingress) }
}

/// Two NICs that may send anything on two hosts, and one on the second host whose group has these rules for what comes in.
async fn guarded(rules: Vec<RulePlan>) -> Site {
    let mut plan = network(1);
    let out = || everything(Direction::Egress);
    plan.groups = vec![
        group(1, 0, vec![out()]),
        group(1, 1, vec![out()]),
        group(1, 2, rules.into_iter().chain([out()]).collect()),
    ];
    plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 1, &[1]), nic(1, 4, 1, &[2])];
    let mut site = Site::new(2).await;
    site.apply(vec![plan]).await;
    site
}

fn target(port: u16) -> [SocketAddr; 2] {
    [(address4(1, 4), port).into(), (address6(1, 4), port).into()]
}

/// Asserts whether the third is reached on this port by the first and by the second, on both families alike.
fn assert_reached(site: &Site, port: u16, by: (bool, bool)) {
    for (n, reached) in [(0, by.0), (1, by.1)] {
        let patience = if reached { DEADLINE } else { BRIEFLY };
        let found = target(port).map(|at| connects(&site.nic(n), &site.nic(2), at, patience));
        assert_eq!(found, [reached; 2], "{port} from {n}, IPv4 and IPv6");
    }
}

#[test]
fn rules_are_stateful_and_one_that_is_taken_away_cuts_at_once() {
    isolated("rules::groups::rules_are_stateful_and_one_that_is_taken_away_cuts_at_once", async || {
        let mut site = guarded(vec![tcp("web", &[(80, 80)], Vec::new())]).await;
        assert_reached(&site, 80, (true, true));
        assert_reached(&site, 81, (false, false));
        assert!(site.dropped(1, "no_ingress_rule") > 0);
        // Answers need no rule; a way back on its own has none.
        assert!(!connects(&site.nic(2), &site.nic(0), (address4(1, 2), 80).into(), BRIEFLY));

        let at = target(80)[0];
        let listener = inside(&site.nic(2), move || TcpListener::bind(at).unwrap());
        let mut near = inside(&site.nic(0), move || TcpStream::connect_timeout(&at, DEADLINE).unwrap());
        let (mut far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut word = [0; 3];
        // Another rule changes: what is open goes on.
        site.change(|n| n.groups[2].rules.push(tcp("more", &[(443, 443)], Vec::new()))).await;
        near.write_all(b"one").unwrap();
        far.read_exact(&mut word).unwrap();
        site.change(|n| n.groups[2].rules.retain(|r| r.id != "web")).await;
        near.write_all(b"two").unwrap();
        far.set_read_timeout(Some(BRIEFLY)).unwrap();
        assert!(far.read_exact(&mut word).is_err(), "nothing passes any more");
    });
}

#[test]
fn refusals_go_before_permissions_and_groups_are_sources() {
    isolated("rules::groups::refusals_go_before_permissions_and_groups_are_sources", async || {
        let deny = RulePlan { allow: false, ..tcp("deny", &[(8005, 8006)], Vec::new()) };
        let early = RulePlan { priority: 1, ..tcp("early", &[(8006, 8006)], vec![Remote::Group(0)]) };
        let ports = tcp("ports", &[(8000, 8010), (9000, 9000)], Vec::new());
        let members = tcp("members", &[(22, 22)], vec![Remote::Group(1)]);
        let nets = tcp("nets", &[(23, 23)], vec![net("10.1.0.2/32"), net("fd00:1::2/127")]);
        let echo = RulePlan {
            protocol: RuleProtocol::Icmp,
            remotes: vec![Remote::Group(0)],
            ..rule("echo", Direction::Ingress)
        };
        let names = RulePlan {
            protocol: RuleProtocol::Udp,
            ports: vec![(53, 53)],
            remotes: vec![Remote::Group(0)],
            ..rule("names", Direction::Ingress)
        };
        let site = guarded(vec![deny, early, ports, members, nets, echo, names]).await;
        for (port, by) in [
            (8000, (true, true)),
            (8010, (true, true)),
            (9000, (true, true)),
            (8011, (false, false)),
            (8005, (false, false)),
            (8006, (true, false)),
            (22, (false, true)),
        ] {
            assert_reached(&site, port, by);
        }
        // Of IPv6 the network covers both.
        let [four, six] = target(23);
        assert!(
            connects(&site.nic(0), &site.nic(2), four, DEADLINE)
                && !connects(&site.nic(1), &site.nic(2), four, BRIEFLY)
        );
        assert!(
            connects(&site.nic(0), &site.nic(2), six, DEADLINE) && connects(&site.nic(1), &site.nic(2), six, DEADLINE)
        );
        for to in [IpAddr::from(address4(1, 4)), address6(1, 4).into()] {
            assert!(pings(&site.nic(0), to) && !pings(&site.nic(1), to), "{to}");
        }
        for gateway in [IpAddr::from(address4(1, 1)), address6(1, 1).into()] {
            assert!(pings(&site.nic(2), gateway), "{gateway}");
        }
        assert!(site.dropped(1, "ingress_denied") > 0);
        // Ports of one protocol are not those of another.
        assert!(!hears(&site.nic(0), &site.nic(2), target(8000)[0], BRIEFLY));
        assert!(
            hears(&site.nic(0), &site.nic(2), target(53)[0], DEADLINE)
                && !hears(&site.nic(1), &site.nic(2), target(53)[1], BRIEFLY)
        );
    });
}

/// Sends a frame as it is out of an instance's NIC, so many times.
pub fn send_frame(from: &NetnsRef, frame: &[u8], times: usize) {
    let frame = frame.to_vec();
    inside(from, move || {
        let frame_type = i32::from(u16::from_ne_bytes([frame[12], frame[13]]));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(frame_type))).unwrap();
        let index = nix::net::if_::if_nametoindex("nic0").unwrap();
        let mut storage = nix::libc::sockaddr_ll {
            sll_family: nix::libc::AF_PACKET as u16,
            sll_protocol: frame_type as u16,
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        storage.sll_addr[..6].copy_from_slice(&frame[..6]);
        let length = size_of::<nix::libc::sockaddr_ll>() as u32;
        use std::os::fd::AsRawFd as _;
        for _ in 0..times {
            // SAFETY: both buffers live until the call returns, with their true lengths.
            let sent = unsafe {
                let address = (&raw const storage).cast();
                nix::libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, address, length)
            };
            assert_eq!(sent, frame.len() as isize);
        }
    });
}

/// Sends an IPv4 datagram with whatever addresses, in a frame of its own.
fn send_raw(from: &NetnsRef, mac: [u8; 6], source: [u8; 4], to: [u8; 4], port: u16) {
    let mut packet = vec![0x45, 0, 0, 33, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend(source);
    packet.extend(to);
    let sum = packet.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    packet.extend(40_000_u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend([0, 13, 0, 0]);
    packet.extend(b"hello");
    let gateway = nexus_network::vpc::links::GATEWAY_MAC;
    send_frame(from, &[&gateway[..], &mac, &[8, 0], &packet].concat(), 1);
}

#[test]
fn who_bears_anothers_name_is_not_heard_and_is_counted() {
    isolated("rules::groups::who_bears_anothers_name_is_not_heard_and_is_counted", async || {
        let mut plan = network(1);
        plan.groups = vec![open_group(1, 0)];
        plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 0, &[0]), nic(1, 4, 0, &[0])];
        plan.nics[2].forwards = true;
        let mut site = Site::new(1).await;
        site.apply(vec![plan]).await;
        let at: SocketAddr = (address4(1, 3), 5000).into();
        let ear = inside(&site.nic(1), move || UdpSocket::bind(at).unwrap());
        let macs = [2, 4].map(|n| [6, 0, 0, 0, 1, n]);
        let heard = |patience| {
            ear.set_read_timeout(Some(patience)).unwrap();
            ear.recv_from(&mut [0; 9]).ok().map(|(_, from)| from.ip())
        };
        let (own, other, target) = ([10, 1, 0, 2], [10, 1, 0, 9], [10, 1, 0, 3]);
        // A link that has just come up may lose what is sent at once.
        let end = Instant::now() + DEADLINE;
        let first = loop {
            send_raw(&site.nic(0), macs[0], own, target, 5000);
            let first = heard(BRIEFLY);
            if first.is_some() || Instant::now() > end {
                break first;
            }
        };
        assert_eq!(first, Some(address4(1, 2).into()), "what is genuine passes");
        send_raw(&site.nic(0), macs[0], other, target, 5000);
        send_raw(&site.nic(0), [6, 0, 0, 0, 1, 99], own, target, 5000);
        assert_eq!(heard(BRIEFLY), None);
        assert_eq!((site.dropped(0, "spoofed_address"), site.dropped(0, "spoofed_mac")), (1, 1));
        // As a DHCP server to a client.
        let client: SocketAddr = (address4(1, 3), 68).into();
        inside(&site.nic(0), move || {
            UdpSocket::bind("0.0.0.0:67").unwrap().send_to(b"offer", client).unwrap();
        });
        assert_eq!(site.dropped(0, "rogue"), 1);
        send_raw(&site.nic(2), macs[1], other, target, 5000);
        assert_eq!(heard(DEADLINE), Some(address4(1, 9).into()), "who forwards may");
        // One may not be sent what is another's, either.
        let own_net = site.inside_network(0, site.networks[0].uid);
        let link = nexus_network::vpc::links::nic(site.networks[0].nics[1].uid);
        firewall::run(&own_net, &format!("ip route add 10.1.0.77/32 via 10.1.0.3 dev {link} onlink"));
        send_raw(&site.nic(0), macs[0], own, [10, 1, 0, 77], 5000);
        let end = Instant::now() + DEADLINE;
        while site.dropped(0, "not_its_address") == 0 {
            assert!(Instant::now() < end, "it is counted");
        }
    });
}

#[test]
fn flows_are_told_to_who_follows_them() {
    isolated("rules::groups::flows_are_told_to_who_follows_them", async || {
        let mut site = guarded(vec![tcp("web", &[(80, 80)], Vec::new())]).await;
        site.change(|n| n.flow_logs = nexus_model::plan::FlowLogs::All).await;
        let (out, mut flows) = mpsc::channel::<Flow>(64);
        let lost = Arc::new(AtomicU64::new(0));
        let netns = site.inside_network(1, site.networks[0].uid);
        let follower = tokio::spawn(follow(netns, out, lost));
        let end = Instant::now() + DEADLINE;
        let mut seen = (false, false);
        while seen != (true, true) {
            assert!(Instant::now() < end && !follower.is_finished(), "{seen:?}");
            let (open, closed) = (target(80)[0], target(81)[1]);
            tokio::task::yield_now().await;
            assert!(connects(&site.nic(0), &site.nic(2), open, DEADLINE));
            connects(&site.nic(0), &site.nic(2), closed, Duration::from_millis(100));
            while let Ok(Some(flow)) = tokio::time::timeout(Duration::from_millis(300), flows.recv()).await {
                let to = SocketAddr::new(flow.destination, flow.port);
                seen.0 |= to == open && flow.dropped.is_none() && flow.source == IpAddr::from(address4(1, 2));
                seen.1 |= to == closed && flow.dropped.as_deref() == Some("no_ingress_rule") && flow.protocol == 6;
            }
        }
        drop(flows);
        follower.await.unwrap().unwrap();
    });
}
