//! What instances of two tenants reach on two hosts, and what they are told of names.

use std::collections::{BTreeMap, HashMap};
use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;

use nexus_network::NAMESERVER;
use nexus_network::firewall::{Firewall, Guest, Net, Rules, Tenant};
use nexus_network::names::serve::Resolver;
use nexus_network::names::{Directory, Named, Project};
use tokio::sync::watch;

use super::*;

/// For what must not be reached: a refusal that is silent.
const BRIEFLY: Duration = Duration::from_millis(1200);
const OUTSIDE4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2));
const OUTSIDE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));

pub(crate) fn run(netns: &NetnsRef, command: &str) -> String {
    let words: Vec<String> = command.split(' ').map(str::to_owned).collect();
    inside(netns, move || {
        let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    })
}

struct Guests {
    world: World,
    /// `[host][tenant]`
    at: Vec<Vec<(NetnsRef, InstanceAddress)>>,
    walls: Vec<Firewall>,
}

/// Two hosts with an instance of each of two tenants, and the world outside beyond the machine.
async fn guests() -> Guests {
    let world = world(2).await;
    let mut at = Vec::new();
    for (n, link) in world.hosts.iter().enumerate() {
        let mut here = Vec::new();
        for tenant in 0..2 {
            let address = instance(link, 2 + tenant);
            let path = world.nets[n].create(&format!("t{tenant}"), address).await.unwrap();
            here.push((NetnsRef::Path(path), address));
        }
        at.push(here);
    }
    run(&NetnsRef::Own, "ip link set lo up");
    for address in [OUTSIDE4, OUTSIDE6] {
        run(&NetnsRef::Own, &format!("ip addr add {address} dev lo"));
    }
    let walls = world.hosts.iter().map(|h| Firewall::on_host(h.netns.clone())).collect();
    Guests { world, at, walls }
}

impl Guests {
    fn rules(&self, host: usize, first: impl Fn(&mut Tenant)) -> Rules {
        let both = |a: &InstanceAddress| [IpAddr::from(a.address6), a.address4.into()];
        let member = |tenant: usize| self.at.iter().flat_map(move |here| both(&here[tenant].1)).collect();
        let mut tenants = vec![
            Tenant { name: "first".into(), members: member(0), ..Tenant::default() },
            Tenant { name: "2nd-one".into(), members: member(1), ..Tenant::default() },
        ];
        first(&mut tenants[0]);
        let guest = |(tenant, at): (usize, &(NetnsRef, InstanceAddress))| Guest {
            name: format!("t{tenant}"),
            address: at.1,
            tenant,
        };
        let hosts = &self.world.hosts;
        let whole = |h: &HostLink| -> [Net; 2] { [(h.address6.into(), 128), (h.address4.into(), 32)] };
        Rules {
            guests: self.at[host].iter().enumerate().map(guest).collect(),
            tenants,
            instances: hosts.iter().flat_map(|h| [(h.instances6.into(), 64), (h.instances4.into(), 24)]).collect(),
            infrastructure: hosts.iter().flat_map(whole).collect(),
        }
    }

    async fn apply(&self, first: impl Fn(&mut Tenant)) {
        for (host, wall) in self.walls.iter().enumerate() {
            wall.apply(self.rules(host, &first)).await.unwrap();
        }
    }

    /// Whether `from` reaches an instance on either family: both or neither.
    fn between(&self, from: &NetnsRef, to: &(NetnsRef, InstanceAddress), patience: Duration) -> bool {
        let six = reaches(from, &to.0, to.1.address6.into(), patience);
        assert_eq!(reaches(from, &to.0, to.1.address4.into(), patience), six, "both families");
        six
    }
}

/// The address that a listener outside sees, if it is reached.
fn seen_from_outside(from: &NetnsRef, at: IpAddr, patience: Duration) -> Option<IpAddr> {
    let listener = TcpListener::bind((at, 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let connected = inside(from, move || TcpStream::connect_timeout(&to, patience).is_ok());
    connected.then(|| listener.accept().unwrap().1.ip())
}

#[test]
fn tenants_reach_their_own_and_nobody_elses() {
    isolated("firewall::tenants_reach_their_own_and_nobody_elses", async || {
        let g = guests().await;
        run(&g.world.hosts[0].netns, "nft add table inet somebody_elses");
        g.apply(|_| {}).await;
        g.apply(|_| {}).await;
        let [a, b] = &g.at[0][..] else { panic!() };
        let [c, d] = &g.at[1][..] else { panic!() };
        assert!(g.between(&a.0, c, DEADLINE) && g.between(&c.0, a, DEADLINE) && g.between(&b.0, d, DEADLINE));
        assert!(!g.between(&a.0, d, BRIEFLY) && !g.between(&a.0, b, BRIEFLY) && !g.between(&d.0, a, BRIEFLY));
        // Gateways and health checks.
        assert!(g.between(&NetnsRef::Own, a, DEADLINE) && g.between(&g.world.hosts[0].netns, a, DEADLINE));
        // The receiver's host looks too: the sender's may be broken.
        g.walls[0].remove().await.unwrap();
        g.walls[0].remove().await.unwrap();
        assert!(!g.between(&a.0, d, BRIEFLY) && g.between(&a.0, c, DEADLINE));
        assert!(!g.walls[0].stands().await.unwrap() && g.walls[1].stands().await.unwrap());
        assert!(run(&g.world.hosts[0].netns, "nft list tables").contains("somebody_elses"));
    });
}

#[test]
fn what_is_added_counts_like_what_was_set_whole() {
    isolated("firewall::what_is_added_counts_like_what_was_set_whole", async || {
        let g = guests().await;
        g.apply(|_| {}).await;
        let wall = &g.walls[0];
        let whole = g.rules(0, |t| t.everything = true);
        let mut fewer = Rules { guests: Vec::new(), tenants: Vec::new(), ..whole.clone() };
        let mut standing = wall.apply(fewer.clone()).await.unwrap();
        let (a, b, c) = (&g.at[0][0], &g.at[0][1], &g.at[1][0]);
        assert!(!g.between(&c.0, a, BRIEFLY), "an instance that is not in the rules is silent");
        // The first of a tenant, then one more tenant.
        for n in 1..=2 {
            (fewer.guests, fewer.tenants) = (whole.guests[..n].to_vec(), whole.tenants[..n].to_vec());
            standing = wall.extend(standing, fewer.clone()).await.unwrap().expect("only additions");
            assert_eq!(standing.rules, fewer);
            assert!(g.between(&c.0, a, DEADLINE));
            assert!(g.between(&a.0, c, DEADLINE));
        }
        assert!(!g.between(&b.0, a, BRIEFLY) && !g.between(&a.0, b, BRIEFLY), "tenants stay apart");
        assert!(seen_from_outside(&a.0, OUTSIDE4, DEADLINE).is_some());
        assert!(seen_from_outside(&b.0, OUTSIDE4, BRIEFLY).is_none());
        // What is taken away, or changed, is not an addition.
        let mut changed = whole.clone();
        changed.tenants[1].everything = true;
        assert_eq!(wall.extend(standing.clone(), changed).await.unwrap(), None);
        let gone = Rules { guests: whole.guests[..1].to_vec(), ..whole.clone() };
        assert_eq!(wall.extend(standing.clone(), gone).await.unwrap(), None);
        // Nor can anything be added to what somebody has flushed.
        wall.remove().await.unwrap();
        let empty = Rules { guests: Vec::new(), ..standing.rules.clone() };
        standing.rules = empty;
        assert_eq!(wall.extend(standing, whole).await.unwrap(), None);
    });
}

#[test]
fn outside_is_reached_as_far_as_the_tenant_may_and_infrastructure_never() {
    isolated("firewall::outside_is_reached_as_far_as_the_tenant_may_and_infrastructure_never", async || {
        let g = guests().await;
        let (a, host) = (&g.at[0][0], &g.world.hosts[0]);
        let seen = |patience| [OUTSIDE4, OUTSIDE6].map(|at| seen_from_outside(&a.0, at, patience));
        g.apply(|_| {}).await;
        assert_eq!(seen(BRIEFLY), [None, None]);
        g.apply(|t| t.networks = vec![("203.0.113.9".parse().unwrap(), 24)]).await;
        assert_eq!(seen(DEADLINE)[0], Some(host.address4.into()), "by the host's own address");
        assert_eq!(seen(BRIEFLY)[1], None);
        g.apply(|t| t.everything = true).await;
        assert_eq!(seen(DEADLINE), [Some(host.address4.into()), Some(host.address6.into())]);
        // Everything is not everything.
        let other = &g.world.hosts[1];
        for (what, to, address) in [
            ("another host", &other.netns, IpAddr::from(other.address4)),
            ("another host", &other.netns, other.address6.into()),
            ("its own host", &host.netns, host.address4.into()),
            ("its own host", &host.netns, host.address6.into()),
            ("the machine on the hosts' wire", &NetnsRef::Own, ADDRESS.address4.into()),
            ("the machine on the hosts' wire", &NetnsRef::Own, ADDRESS.address6.into()),
            ("another tenant", &g.at[1][1].0, g.at[1][1].1.address4.into()),
            ("another tenant here", &g.at[0][1].0, g.at[0][1].1.address6.into()),
        ] {
            assert!(!reaches(&a.0, to, address, BRIEFLY), "{what}: {address}");
        }
        // What is open ends with the right to it.
        let listener = TcpListener::bind((OUTSIDE4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let mut stream = inside(&a.0, move || TcpStream::connect_timeout(&to, DEADLINE).unwrap());
        let (mut far, _) = listener.accept().unwrap();
        g.apply(|t| t.everything = true).await;
        let mut said = [0; 3];
        stream.write_all(b"one").unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        far.read_exact(&mut said).unwrap();
        g.apply(|_| {}).await;
        stream.write_all(b"two").unwrap();
        far.set_read_timeout(Some(BRIEFLY)).unwrap();
        assert!(far.read_exact(&mut said).is_err(), "nothing passes any more");
        assert_eq!(seen(BRIEFLY), [None, None]);
    });
}

#[test]
fn who_bears_anothers_address_is_not_heard() {
    isolated("firewall::who_bears_anothers_address_is_not_heard", async || {
        let g = guests().await;
        let (a, c) = (&g.at[0][0], &g.at[1][0]);
        g.apply(|t| t.everything = true).await;
        let heard = |from: Ipv4Addr| {
            let listener = inside(&c.0, {
                let at = c.1.address4;
                move || UdpSocket::bind((at, 0)).unwrap()
            });
            listener.set_read_timeout(Some(BRIEFLY)).unwrap();
            let to = listener.local_addr().unwrap();
            inside(&a.0, move || UdpSocket::bind((from, 0)).unwrap().send_to(b"x", to).unwrap());
            listener.recv_from(&mut [0; 8]).is_ok()
        };
        assert!(heard(a.1.address4));
        // A member of the tenant, on another host.
        run(&a.0, &format!("ip addr add {}/32 dev eth0", instance(&g.world.hosts[1], 9).address4));
        assert!(!heard(instance(&g.world.hosts[1], 9).address4));
    });
}

#[test]
fn connections_outlive_a_new_set_of_rules_and_forty_tenants_fit() {
    isolated("firewall::connections_outlive_a_new_set_of_rules_and_forty_tenants_fit", async || {
        let g = guests().await;
        g.apply(|_| {}).await;
        let (a, c) = (&g.at[0][0], &g.at[1][0]);
        let at = c.1.address4;
        let listener = inside(&c.0, move || TcpListener::bind((at, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let mut stream = inside(&a.0, move || TcpStream::connect_timeout(&to, DEADLINE).unwrap());
        let (mut far, _) = listener.accept().unwrap();
        for round in 1..=10u8 {
            let mut rules = g.rules(0, |t| t.networks = vec![(IpAddr::from([198, 51, 100, round]), 32)]);
            rules.tenants.extend((0..40).map(|n| Tenant {
                name: format!("other-{n}"),
                members: (0..50).map(|m| IpAddr::from([10, 99, n, m])).collect(),
                ..Tenant::default()
            }));
            g.walls[0].apply(rules).await.unwrap();
            stream.write_all(&[round]).unwrap();
            let mut said = [0];
            far.set_read_timeout(Some(DEADLINE)).unwrap();
            far.read_exact(&mut said).unwrap();
            assert_eq!(said, [round]);
        }
    });
}

/// A question for the A records of a name, as RFC 1035 writes it.
fn question(name: &str) -> Vec<u8> {
    let mut out = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.extend([0, 0, 1, 0, 1]);
    out
}

/// The answer's code and its last four bytes, by UDP and by TCP; the question is asked again while nobody answers.
fn ask(from: &NetnsRef, name: &str) -> Option<(u8, Vec<u8>)> {
    asking(from, name, || ())
}

/// The same, and `asks` is called each time that the question goes out.
fn asking(from: &NetnsRef, name: &str, asks: impl Fn() + Send + 'static) -> Option<(u8, Vec<u8>)> {
    let message = question(name);
    let by_udp = inside(from, {
        let message = message.clone();
        move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut buffer = [0; 1500];
            let end = Instant::now() + BRIEFLY * 4;
            while Instant::now() < end {
                socket.send_to(&message, (NAMESERVER, 53)).unwrap();
                asks();
                if let Ok(length) = socket.recv(&mut buffer) {
                    return Some(buffer[..length].to_vec());
                }
            }
            None
        }
    })?;
    let by_tcp = inside(from, move || {
        let mut stream = TcpStream::connect_timeout(&(NAMESERVER, 53).into(), DEADLINE).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&[&(message.len() as u16).to_be_bytes()[..], &message].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer).unwrap();
        answer
    });
    assert_eq!(by_udp, by_tcp, "one address, so one order");
    Some((by_udp[3] & 15, by_udp[by_udp.len() - 4..].to_vec()))
}

#[test]
fn instances_are_told_names_and_only_those_who_may_hear_of_the_world_outside() {
    isolated("firewall::instances_are_told_names_and_only_those_who_may_hear_of_the_world_outside", async || {
        let g = guests().await;
        g.apply(|_| {}).await;
        let (a, b) = (&g.at[0][0], &g.at[0][1]);
        let named = |at: &InstanceAddress| Named {
            address6: at.address6,
            address4: at.address4,
            ready: true,
            only4: false,
            ports: Vec::new(),
        };
        let project = |at: &InstanceAddress, outside| Project {
            apps: BTreeMap::from([("web".to_owned(), vec![named(at)])]),
            outside,
        };
        let directory = Directory {
            region: "local".into(),
            projects: BTreeMap::from([
                ("shop".to_owned(), project(&g.at[1][0].1, false)),
                ("bank".to_owned(), project(&g.at[1][1].1, true)),
            ]),
            askers: HashMap::from([(a.1.address4, "shop".to_owned()), (b.1.address4, "bank".to_owned())]),
            inside: HashMap::new(),
            instances: Vec::new(),
        };
        // The host's resolver is on the machine: it says 192.0.2.53 to whatever it is asked.
        let conf = g.world._dir.path().join("resolv.conf");
        std::fs::write(&conf, format!("nameserver {}\n", ADDRESS.address4)).unwrap();
        let upstream = |mut question: Vec<u8>| {
            question[2] |= 0x80;
            question[7] = 1;
            question.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 53]);
            question
        };
        let udp = UdpSocket::bind((ADDRESS.address4, 53)).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&upstream(buffer[..length].to_vec()), from);
            }
        });
        let tcp = TcpListener::bind((ADDRESS.address4, 53)).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = tcp.accept() {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut question).unwrap();
                let answer = upstream(question);
                stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat()).unwrap();
            }
        });
        let (_keep, watched) = watch::channel(Arc::new(directory));
        let resolver = Resolver::new(g.world.hosts[0].netns.clone(), conf, watched, Arc::new(|_| 0));
        let counts = resolver.counts.clone();
        let serving = tokio::spawn(resolver.clone().run());
        let ask = async |from: &NetnsRef, name: &'static str| {
            let from = from.clone();
            tokio::task::spawn_blocking(move || super::firewall::ask(&from, name)).await.unwrap()
        };
        let own = g.at[1][0].1.address4.octets().to_vec();
        assert_eq!(ask(&a.0, "web.shop.internal").await, Some((0, own.clone())));
        assert_eq!(ask(&a.0, "web.bank.internal").await.unwrap().0, 3);
        assert_eq!(ask(&b.0, "web.bank.internal").await, Some((0, g.at[1][1].1.address4.octets().to_vec())));
        assert_eq!(ask(&a.0, "example.com").await.unwrap().0, 5, "REFUSED");
        assert_eq!(ask(&b.0, "example.com").await, Some((0, vec![192, 0, 2, 53])));
        let counted: BTreeMap<_, _> = counts.all().into();
        for end in ["forwarded", "refused", "nxdomain"] {
            assert!(counted[end] >= 2, "{end}: {counted:?}");
        }
        // Who serves is replaced while somebody asks: the question is repeated, not failed.
        serving.abort();
        let _ = serving.await;
        let asker = a.0.clone();
        let (asks, mut asked) = tokio::sync::mpsc::unbounded_channel();
        let waiting = tokio::task::spawn_blocking(move || {
            asking(&asker, "web.shop.internal", move || {
                asks.send(()).ok();
            })
        });
        // The second time says that the first had no answer.
        for _ in 0..2 {
            tokio::time::timeout(DEADLINE, asked.recv()).await.unwrap().unwrap();
        }
        let serving = tokio::spawn(resolver.run());
        assert_eq!(waiting.await.unwrap(), Some((0, own)));
        serving.abort();
    });
}
