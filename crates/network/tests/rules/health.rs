//! Hosts ask balancers' targets whether they answer, and leave out those that don't.

use std::collections::BTreeSet;

use nexus_model::kind::{BalancerCheck, ExpectedAnswer};
use nexus_model::plan::{BalancerPlan, Direction, NetworkPlan, ProxyProtocol, Remote, RuleProtocol, TracedPacket};
use nexus_network::vpc::health::{Failing, Health, ask, marked, sentences};
use nexus_network::vpc::relay::nobody;
use nexus_network::vpc::verdict::trace;
use tokio::sync::mpsc;

use super::plans::*;
use super::*;

const PORT: u16 = 8080;

/// Hosts that ask, each by itself.
struct Asking {
    site: Site,
    health: Vec<Health>,
    now: Instant,
}

impl Asking {
    async fn new(hosts: u8, networks: Vec<NetworkPlan>) -> Self {
        let mut site = Site::new(hosts).await;
        site.apply(networks).await;
        Self { health: (0..hosts).map(|_| Health::default()).collect(), site, now: Instant::now() }
    }

    /// Each host asks all that it has to, and sets what it found.
    async fn round(&mut self) {
        self.now += Duration::from_secs(3600);
        for (host, health) in self.health.iter_mut().enumerate() {
            let told = self.site.told(host);
            health.follow(&told, self.now - Duration::from_secs(600));
            let (sender, mut found) = mpsc::channel(100);
            for target in health.due(self.now, 100, 100) {
                let netns = NetnsRef::Path(self.site.engines[host].namespace(target.network));
                ask(netns, told.endpoint, vec![target], sender.clone()).await;
            }
            drop(sender);
            while let Some((asked, answer)) = found.recv().await {
                assert!(answer.is_some(), "{asked:?}");
                health.found(&asked, answer);
            }
            let wanted = marked(&told, &health.failing());
            let applied = self.site.engines[host].apply(wanted.clone(), Vec::new()).await.unwrap();
            assert!(applied.networks.is_empty(), "{applied:?}");
            let differences = self.site.engines[host].check(wanted, Vec::new()).await.unwrap();
            assert_eq!(differences, []);
        }
    }

    /// The last bytes of the IPv4 addresses of those that fail, as each host has it.
    fn failing(&self) -> Vec<BTreeSet<u8>> {
        let last = |f: Failing| {
            let four = f.into_keys().filter_map(|a| if let IpAddr::V4(a) = a.address { Some(a) } else { None });
            four.map(|a| a.octets()[3]).collect()
        };
        self.health.iter().map(|h| last(h.failing())).collect()
    }
}

fn check() -> BalancerCheck {
    BalancerCheck { timeout_seconds: 1, failures: 1, successes: 1, ..BalancerCheck::default() }
}

/// All of both families on a port of a NIC.
fn listen(netns: &NetnsRef) -> TcpListener {
    let listener = inside(netns, || TcpListener::bind(("::", PORT)).unwrap());
    listener.set_nonblocking(true).unwrap();
    listener
}

/// Which of these listeners get new connections to a balancer's address; the others get none.
fn who_gets(client: &NetnsRef, at: IpAddr, listeners: &[Option<TcpListener>], count: usize) -> BTreeSet<usize> {
    let mut got = BTreeSet::new();
    for _ in 0..count {
        let (_open, who) = connect(client, at, listeners);
        got.insert(who.0);
    }
    got
}

/// A connection to a balancer's address, and who has it.
fn connect(client: &NetnsRef, at: IpAddr, listeners: &[Option<TcpListener>]) -> (TcpStream, (usize, TcpStream)) {
    let at = SocketAddr::new(at, 80);
    let asker = inside(client, move || TcpStream::connect_timeout(&at, DEADLINE)).unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    let own = asker.local_addr().unwrap();
    let end = Instant::now() + DEADLINE;
    loop {
        for (n, listener) in listeners.iter().enumerate() {
            // Others are hosts that ask.
            while let Some((stream, from)) = listener.as_ref().and_then(|l| l.accept().ok()) {
                if from.port() == own.port() && from.ip().to_canonical() == own.ip() {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(DEADLINE)).unwrap();
                    return (asker, (n, stream));
                }
            }
        }
        assert!(Instant::now() < end, "nobody got it");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn goes_on((asker, (_, answerer)): &mut (TcpStream, (usize, TcpStream))) {
    let mut word = [0; 4];
    asker.write_all(b"ping").unwrap();
    answerer.read_exact(&mut word).unwrap();
    answerer.write_all(b"pong").unwrap();
    asker.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"pong");
}

fn balanced(plan: &mut NetworkPlan, address: IpAddr, targets: &[IpAddr], check: BalancerCheck) {
    let targets: Vec<_> = targets.iter().map(|a| (*a, PORT, 1)).collect();
    balancer(plan, address, 80, false, &targets);
    plan.balancers.last_mut().unwrap().listeners[0].check = Some(check);
}

#[test]
fn a_target_whose_port_closes_gets_no_new_connections_until_it_answers_again() {
    isolated("rules::health::a_target_whose_port_closes_gets_no_new_connections_until_it_answers_again", async || {
        let mut plan = network(1);
        // Targets let clients in, and nobody else: whoever asks for the host need not be named.
        let mut clients = rule("clients", Direction::Ingress);
        clients.protocol = RuleProtocol::Tcp;
        clients.ports = vec![(PORT, PORT)];
        clients.remotes = vec![Remote::Group(0)];
        plan.groups = vec![open_group(1, 0), group(1, 1, vec![clients])];
        plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 0, &[1]), nic(1, 4, 1, &[1]), nic(1, 5, 1, &[0])];
        let (four, six) = (|n| IpAddr::from(address4(1, n)), |n| IpAddr::from(address6(1, n)));
        balanced(&mut plan, four(200), &[four(3), four(4)], check());
        balanced(&mut plan, six(200), &[six(3), six(4)], check());
        let mut hosts = Asking::new(2, vec![plan]).await;
        let (a, b) = (hosts.site.nic(0), hosts.site.nic(3));
        let targets = [hosts.site.nic(1), hosts.site.nic(2)];
        let mut listeners: Vec<_> = targets.iter().map(|t| Some(listen(t))).collect();
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::new(), BTreeSet::new()]);
        // Its gateway is who asks, on either host.
        let askers: BTreeSet<IpAddr> = std::iter::from_fn(|| listeners[1].as_ref()?.accept().ok())
            .map(|(_, from)| from.ip().to_canonical())
            .collect();
        assert_eq!(askers, BTreeSet::from([four(1), six(1)]));

        let mut open: Vec<_> = (0..2).map(|_| connect(&a, four(200), &listeners)).collect();
        assert_eq!(open.iter().map(|o| o.1.0).collect::<BTreeSet<_>>(), BTreeSet::from([0, 1]));
        listeners[1] = None;
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::from([4]), BTreeSet::from([4])]);
        for client in [&a, &b] {
            for at in [four(200), six(200)] {
                assert_eq!(who_gets(client, at, &listeners, 6), BTreeSet::from([0]));
            }
        }
        open.iter_mut().for_each(goes_on);
        // What is traced is what is set.
        let told = marked(&hosts.site.told(0), &hosts.health[0].failing());
        let packet = TracedPacket { to: four(200), protocol: RuleProtocol::Tcp, port: 80 };
        let hops = trace(&told, told.networks[0].nics[0].uid, packet).hops;
        let said = "balancer-0 hands it to 10.1.0.3:8080; not to 10.1.0.4:8080, which fails its check";
        assert!(hops.iter().any(|h| h.what == said), "{hops:?}");
        assert!(sentences(&told, &hosts.health[0].failing())[0].contains("10.1.0.4:8080 fails its check: "));

        // When nobody answers everybody is tried.
        listeners[0] = None;
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::from([3, 4]), BTreeSet::from([3, 4])]);
        listeners = targets.iter().map(|t| Some(listen(t))).collect();
        assert_eq!(who_gets(&a, four(200), &listeners, 6), BTreeSet::from([0, 1]));
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::new(), BTreeSet::new()]);
        assert_eq!(who_gets(&b, six(200), &listeners, 6), BTreeSet::from([0, 1]));
        open.iter_mut().for_each(goes_on);
    });
}

#[test]
fn a_host_asks_a_peered_networks_targets_too() {
    isolated("rules::health::a_host_asks_a_peered_networks_targets_too", async || {
        let (mut own, mut other) = (network(1), network(2));
        own.groups = vec![open_group(1, 0)];
        other.groups = vec![open_group(2, 0)];
        // The client's host has no NIC of the balancer's network.
        own.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 0, &[0])];
        other.nics = vec![nic(2, 3, 1, &[0]), nic(2, 4, 1, &[0])];
        peer(&mut own, &mut other, 1);
        let four = |n| IpAddr::from(address4(2, n));
        balanced(&mut other, four(200), &[four(3), four(4)], check());
        let mut hosts = Asking::new(2, vec![own, other]).await;
        let client = hosts.site.nic(0);
        let targets = [&hosts.site.networks[1].nics[0], &hosts.site.networks[1].nics[1]].map(|n| hosts.site.of(n));
        let mut listeners: Vec<_> = targets.iter().map(|t| Some(listen(t))).collect();
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::new(), BTreeSet::new()]);
        assert_eq!(who_gets(&client, four(200), &listeners, 4), BTreeSet::from([0, 1]));
        listeners[0] = None;
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::from([3]), BTreeSet::from([3])]);
        assert_eq!(who_gets(&client, four(200), &listeners, 4), BTreeSet::from([1]));
    });
}

#[test]
fn a_get_must_be_answered_as_expected() {
    isolated("rules::health::a_get_must_be_answered_as_expected", async || {
        let mut plan = network(1);
        plan.groups = vec![open_group(1, 0)];
        plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 1, &[0])];
        let http = |status| Some(ExpectedAnswer { path: "/healthz?deep=1".to_owned(), status });
        let target = IpAddr::from(address4(1, 3));
        for (last, http) in [(200, http(None)), (201, http(Some(204)))] {
            // Long enough for a machine that is busy.
            let check = BalancerCheck { http, timeout_seconds: 10, ..check() };
            balanced(&mut plan, address4(1, last).into(), &[target], check);
        }
        let mut hosts = Asking::new(2, vec![plan]).await;
        let listener = inside(&hosts.site.nic(1), || TcpListener::bind(("0.0.0.0", PORT)).unwrap());
        let answer = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let says = answer.clone();
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept() {
                let mut head = [0; 1024];
                let n = stream.read(&mut head).unwrap_or(0);
                assert!(n == 0 || head.starts_with(b"GET /healthz?deep=1 HTTP/1.1\r\n"));
                let answer = says.lock().unwrap().clone();
                let _ = stream.write_all(answer.as_bytes());
                if answer.is_empty() {
                    kept.push(stream);
                }
            }
        });
        let fine = ("HTTP/1.1 204 none\r\n\r\n", &[][..]);
        let cases: [(&str, &[&str]); 7] = [
            ("HTTP/1.1 200 fine\r\n\r\n", &["GET /healthz?deep=1 answers 200"]),
            fine,
            ("HTTP/1.0 503 no\r\n\r\n", &["GET /healthz?deep=1 answers 503"; 2]),
            fine,
            ("SSH-2.0-other\r\n", &["GET /healthz?deep=1 is not answered in HTTP/1.1"; 2]),
            fine,
            ("", &["no answer within 1 s"; 2]),
        ];
        for (says, failing) in cases {
            says.clone_into(&mut answer.lock().unwrap());
            if says.is_empty() {
                let briefly = |b: &mut BalancerPlan| b.listeners[0].check.as_mut().unwrap().timeout_seconds = 1;
                hosts.site.change(|plan| plan.balancers.iter_mut().for_each(briefly)).await;
            }
            hosts.round().await;
            for health in &hosts.health {
                assert_eq!(health.failing().into_values().collect::<Vec<_>>(), failing, "{says}");
            }
        }
    });
}

#[test]
fn a_target_behind_a_proxy_listener_is_told_that_nobodys_connection_asks() {
    isolated("rules::health::a_target_behind_a_proxy_listener_is_told_that_nobodys_connection_asks", async || {
        let mut plan = network(1);
        plan.groups = vec![open_group(1, 0)];
        plan.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 1, &[0])];
        let http = Some(ExpectedAnswer { path: "/".into(), status: None });
        // Long enough for a machine that is busy.
        let check = BalancerCheck { http, timeout_seconds: 10, ..check() };
        balanced(&mut plan, address4(1, 200).into(), &[address4(1, 3).into()], check);
        plan.balancers[0].listeners[0].proxy_protocol = Some(ProxyProtocol::V2);
        let mut hosts = Asking::new(2, vec![plan]).await;
        let listener = inside(&hosts.site.nic(1), || TcpListener::bind(("0.0.0.0", PORT)).unwrap());
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let expected = nobody(ProxyProtocol::V2);
                let mut head = vec![0; expected.len() + 4];
                let told = stream.read_exact(&mut head).is_ok() && head == [&expected[..], b"GET "].concat();
                let answer = if told { "HTTP/1.1 200 fine\r\n\r\n" } else { "HTTP/1.1 400 who?\r\n\r\n" };
                let _ = stream.write_all(answer.as_bytes());
                let _ = stream.read(&mut [0; 1024]);
            }
        });
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::new(), BTreeSet::new()]);
        // One that is asked at a port of its own is told nothing.
        hosts.site.change(|plan| plan.balancers[0].listeners[0].check.as_mut().unwrap().port = Some(PORT)).await;
        hosts.round().await;
        assert_eq!(hosts.failing(), [BTreeSet::from([3]), BTreeSet::from([3])]);
    });
}
