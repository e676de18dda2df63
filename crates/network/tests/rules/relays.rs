//! Listeners with the PROXY protocol: relayed by the client's host, and seen by everybody as if the client spoke.

use std::path::PathBuf;
use std::thread::JoinHandle;

use nexus_model::plan::{Direction, ProxyProtocol, Remote, RuleProtocol, TraceVerdict, TracedPacket};
use nexus_network::vpc::relay::{Relay, RelayPlan, header, told};
use nexus_network::vpc::verdict::trace;
use tokio::sync::oneshot;

use super::plans::*;
use super::*;

const PORT: u16 = 8080;

/// A relay as its process is, but for its confinement.
struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(netns: NetnsRef, socket: PathBuf) -> Self {
        let (stop, stopped) = oneshot::channel();
        let work = move || {
            let NetnsRef::Path(path) = netns else { unreachable!() };
            enter(&std::fs::File::open(path).unwrap()).unwrap();
            let _ = std::fs::remove_file(&socket);
            let control = std::os::unix::net::UnixListener::bind(&socket).unwrap();
            control.set_nonblocking(true).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    ended = Relay::default().run(control) => ended.unwrap(),
                }
            });
        };
        Self { stop: Some(stop), thread: Some(std::thread::spawn(work)) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The first network's relay on host 0, told what there is to do.
async fn relay(site: &Site) -> Running {
    let socket = site.world._dir.path().join("relay");
    let running = Running::start(site.inside_network(0, site.networks[0].uid), socket);
    tell(site).await;
    running
}

async fn tell(site: &Site) {
    let (socket, hosts) = (site.world._dir.path().join("relay"), site.told(0));
    let network = hosts.networks.iter().find(|n| n.uid == site.networks[0].uid).unwrap();
    let plan = RelayPlan::of(&hosts, network).unwrap();
    let end = Instant::now() + DEADLINE;
    while !told(&socket, &plan).await.is_ok_and(|state| state.plan == plan.number()) {
        assert!(Instant::now() < end, "the relay does not follow its plan");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn proxied(plan: &mut NetworkPlan, address: IpAddr, targets: &[IpAddr], version: ProxyProtocol) {
    let targets: Vec<_> = targets.iter().map(|a| (*a, PORT, 1)).collect();
    balancer(plan, address, 80, false, &targets);
    plan.balancers.last_mut().unwrap().listeners[0].proxy_protocol = Some(version);
}

fn listen(netns: &NetnsRef) -> TcpListener {
    inside(netns, || TcpListener::bind(("::", PORT)).unwrap())
}

fn call(client: &NetnsRef, at: IpAddr) -> TcpStream {
    let stream = inside(client, move || TcpStream::connect_timeout(&(at, 80).into(), DEADLINE)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// The next connection that a target has, within some time.
fn accept(listener: &TcpListener, patience: Duration) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let end = Instant::now() + patience;
    loop {
        if let Ok((stream, from)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            return Some((stream, SocketAddr::new(from.ip().to_canonical(), from.port())));
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A connection that a target has taken, with the header read and found to be as it should.
fn opened(client: &NetnsRef, at: IpAddr, version: ProxyProtocol, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let asker = call(client, at);
    let own = asker.local_addr().unwrap();
    let (mut answerer, from) = accept(listener, DEADLINE).expect("a target gets it");
    assert_eq!(from.ip(), own.ip(), "it comes from the client's own address");
    let expected = header(version, own, (at, 80).into());
    let mut found = vec![0; expected.len()];
    answerer.read_exact(&mut found).unwrap();
    assert_eq!(found, expected);
    (asker, answerer)
}

fn goes_on((asker, answerer): &mut (TcpStream, TcpStream)) {
    let mut word = [0; 4];
    asker.write_all(b"ping").unwrap();
    answerer.read_exact(&mut word).unwrap();
    answerer.write_all(b"pong").unwrap();
    asker.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"pong");
}

/// Clients 2 and 5 on host 0; targets 3 on host 0 and 4 on host 1, which let in nobody but group 0.
fn plan() -> NetworkPlan {
    let mut plan = network(1);
    let mut clients = rule("clients", Direction::Ingress);
    clients.protocol = RuleProtocol::Tcp;
    clients.ports = vec![(PORT, PORT)];
    clients.remotes = vec![Remote::Group(0)];
    let mut narrow = rule("narrow", Direction::Egress);
    narrow.remotes = vec![net("10.1.0.3/32")];
    let stranger = group(1, 2, vec![everything(Direction::Egress)]);
    let bound = group(1, 3, vec![narrow]);
    plan.groups = vec![open_group(1, 0), group(1, 1, vec![clients]), stranger, bound];
    plan.nics = vec![
        nic(1, 2, 0, &[0]),
        nic(1, 3, 0, &[1]),
        nic(1, 4, 1, &[1]),
        nic(1, 5, 0, &[2]),
        nic(1, 6, 0, &[0, 3]),
        nic(1, 7, 0, &[3]),
    ];
    plan
}

fn four(n: u8) -> IpAddr {
    address4(1, n).into()
}

fn six(n: u8) -> IpAddr {
    address6(1, n).into()
}

#[test]
fn targets_are_told_who_the_client_is_and_see_its_own_address() {
    isolated("rules::relays::targets_are_told_who_the_client_is_and_see_its_own_address", async || {
        let mut plan = plan();
        let (v1, v2) = (ProxyProtocol::V1, ProxyProtocol::V2);
        // Elsewhere and here, in both families and versions; the client itself.
        let ways = [
            (four(200), four(4), v2, 2),
            (six(200), six(4), v2, 2),
            (four(201), four(3), v1, 1),
            (six(201), six(3), v1, 1),
        ];
        for (at, target, version, _) in ways {
            proxied(&mut plan, at, &[target], version);
        }
        proxied(&mut plan, four(202), &[four(2)], v2);
        let mut site = Site::new(2).await;
        site.apply(vec![plan]).await;
        let _relay = relay(&site).await;
        let client = site.nic(0);
        for (at, target, version, n) in ways {
            let listener = listen(&site.nic(n));
            let (mut asker, mut answerer) = opened(&client, at, version, &listener);
            // All is passed on before one end is closed, and the other stays open.
            asker.write_all(b"how much?").unwrap();
            asker.shutdown(std::net::Shutdown::Write).unwrap();
            let mut question = String::new();
            answerer.read_to_string(&mut question).unwrap();
            assert_eq!(question, "how much?");
            let all: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
            let sent = all.clone();
            let sending = std::thread::spawn(move || answerer.write_all(&sent).map(|()| drop(answerer)).unwrap());
            let mut got = Vec::new();
            asker.read_to_end(&mut got).unwrap();
            sending.join().unwrap();
            assert!(got == all, "{} of {} bytes to {target}", got.len(), all.len());

            let packet = TracedPacket { to: at, protocol: RuleProtocol::Tcp, port: 80 };
            let told = site.told(0);
            let traced = trace(&told, told.networks[0].nics[0].uid, packet);
            assert_eq!(traced.verdict, TraceVerdict::Delivered, "{traced:?}");
            let version = if version == v1 { "relayed (PROXY v1)" } else { "relayed (PROXY v2)" };
            assert!(traced.hops.iter().any(|h| h.what.starts_with(version)), "{traced:?}");
        }
        // To a client that is its own target the gateway is the client, as without a relay.
        let listener = listen(&client);
        let asker = call(&client, four(202));
        let (mut answerer, from) = accept(&listener, DEADLINE).expect("it is its own target");
        assert_eq!(from.ip(), four(1));
        let mut found = [0; 28];
        answerer.read_exact(&mut found).unwrap();
        assert_eq!(found[..], header(v2, asker.local_addr().unwrap(), (four(202), 80).into()));
        for host in 0..2 {
            let differences = site.engines[host].check(site.told(host), site.closed.clone()).await.unwrap();
            assert_eq!(differences, []);
        }
        // Nobody calls the relay by its own address.
        let own = nexus_network::vpc::links::prober(endpoint(0)).0;
        let to_relay = inside(&client, move || TcpStream::connect_timeout(&(own, 15_001).into(), BRIEFLY));
        assert!(to_relay.is_err());
    });
}

#[test]
fn security_groups_judge_a_relayed_connection_as_its_clients() {
    isolated("rules::relays::security_groups_judge_a_relayed_connection_as_its_clients", async || {
        let mut plan = plan();
        proxied(&mut plan, four(200), &[four(4)], ProxyProtocol::V2);
        proxied(&mut plan, four(201), &[four(3)], ProxyProtocol::V2);
        let mut site = Site::new(2).await;
        site.apply(vec![plan]).await;
        let _relay = relay(&site).await;
        let (there, here) = (listen(&site.nic(2)), listen(&site.nic(1)));
        let said = |nic: usize, at: IpAddr| {
            let told = site.told(0);
            let packet = TracedPacket { to: at, protocol: RuleProtocol::Tcp, port: 80 };
            let traced = trace(&told, told.networks[0].nics[nic].uid, packet);
            (traced.verdict, traced.hops.last().unwrap().at.clone())
        };
        // A stranger to the targets' groups, one who may call none but 10.1.0.3, and one of neither's.
        for (nic, at, listener, refused) in [
            (3, four(200), &there, Some("ingress rules")),
            (3, four(201), &here, Some("ingress rules")),
            (5, four(200), &there, Some("egress rules")),
            (0, four(200), &there, None),
            (4, four(201), &here, None),
        ] {
            let asker = call(&site.nic(nic), at);
            let came = accept(listener, if refused.is_some() { BRIEFLY } else { DEADLINE });
            assert_eq!(came.is_none(), refused.is_some(), "{nic} {at}");
            let (verdict, hop) = said(nic, at);
            assert_eq!((verdict == TraceVerdict::Dropped).then_some(hop.as_str()), refused, "{nic} {at}");
            drop(asker);
        }
    });
}

#[test]
fn open_connections_outlive_changes_and_a_relay_that_died_is_replaced() {
    isolated("rules::relays::open_connections_outlive_changes_and_a_relay_that_died_is_replaced", async || {
        let mut plan = plan();
        let v2 = ProxyProtocol::V2;
        proxied(&mut plan, four(200), &[four(3), four(4)], v2);
        let mut site = Site::new(2).await;
        site.apply(vec![plan]).await;
        let running = relay(&site).await;
        let client = site.nic(0);
        let listeners = [listen(&site.nic(1)), listen(&site.nic(2))];
        // In turn.
        let mut open = [0, 1].map(|n| opened(&client, four(200), v2, &listeners[n]));
        // One target goes: what is open goes on, and nothing new comes to it.
        site.change(|plan| plan.balancers[0].listeners[0].targets.truncate(1)).await;
        tell(&site).await;
        for _ in 0..3 {
            goes_on(&mut opened(&client, four(200), v2, &listeners[0]));
        }
        assert!(accept(&listeners[1], Duration::ZERO).is_none());
        open.iter_mut().for_each(goes_on);
        // A target that can't be reached is passed over.
        site.change(|plan| {
            let mut dead = plan.balancers[0].listeners[0].targets[0].clone();
            dead.port = 1;
            plan.balancers[0].listeners[0].targets.insert(0, dead);
        })
        .await;
        tell(&site).await;
        for _ in 0..3 {
            goes_on(&mut opened(&client, four(200), v2, &listeners[0]));
        }
        open.iter_mut().for_each(goes_on);
        drop(running);
        let mut rest = Vec::new();
        let ended = open[0].0.read_to_end(&mut rest);
        assert!(ended.is_err() || rest.is_empty(), "who relayed is no more");
        let refused = inside(&client, || TcpStream::connect_timeout(&(four(200), 80).into(), BRIEFLY));
        assert!(refused.is_err());
        let _relay = relay(&site).await;
        goes_on(&mut opened(&client, four(200), v2, &listeners[0]));
    });
}

#[test]
fn a_peered_networks_listener_is_relayed_by_the_clients_host() {
    isolated("rules::relays::a_peered_networks_listener_is_relayed_by_the_clients_host", async || {
        let (mut own, mut other) = (network(1), network(2));
        own.groups = vec![open_group(1, 0)];
        other.groups = vec![open_group(2, 0)];
        own.nics = vec![nic(1, 2, 0, &[0])];
        other.nics = vec![nic(2, 3, 1, &[0]), nic(2, 4, 0, &[0])];
        peer(&mut own, &mut other, 1);
        let there = |n| IpAddr::from(address4(2, n));
        proxied(&mut other, there(200), &[there(3)], ProxyProtocol::V2);
        proxied(&mut other, there(201), &[there(4)], ProxyProtocol::V1);
        let mut site = Site::new(2).await;
        site.apply(vec![own, other]).await;
        let _relay = relay(&site).await;
        let client = site.nic(0);
        for (n, at, version) in [(0, 200, ProxyProtocol::V2), (1, 201, ProxyProtocol::V1)] {
            let listener = listen(&site.of(&site.networks[1].nics[n]));
            goes_on(&mut opened(&client, there(at), version, &listener));
        }
    });
}
