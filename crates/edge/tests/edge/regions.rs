//! Gateways of several regions that pass requests on to each other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use nexus_edge::{Gateway, Options, PeerDoor};
use nexus_env::{Endpoint, Env, FaultyTransport, Links, RealTransport};
use nexus_iam::tls::{self, Policy};
use nexus_iam::{Role, SpiffeId};
use nexus_model::kind::{Protocol, Tier};
use nexus_model::plan::{Backend, RemoteRegion, RoutingTable};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::common::*;
use crate::exchanges;
use crate::tables::Pki;

/// A gateway with a listener for other gateways.
struct Region {
    name: &'static str,
    edge: Edge,
    peer: SocketAddr,
}

/// Gateways whose links can be cut by their regions' names.
struct Fleet {
    pki: Pki,
    links: Links,
}

impl Fleet {
    fn new() -> Self {
        Self { pki: Pki::new(), links: Links::new() }
    }

    async fn region(&self, name: &'static str) -> Region {
        let transport = FaultyTransport::new(Arc::new(RealTransport), name, self.links.clone());
        let env = Env::real().with_transport(Arc::new(transport));
        let own = self.pki.identity(SpiffeId::gateway("home", name).unwrap());
        let policy = || Policy::roles("home", &[Role::Gateway]);
        let client = tls::client_config(&own, self.pki.roots(), policy(), &[], self.pki.clock()).unwrap();
        let server = tls::server_config(&own, self.pki.roots(), policy(), &[], self.pki.clock()).unwrap();
        let mut listeners = Vec::new();
        for _ in 0..2 {
            listeners.push(env.transport.bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap());
        }
        let addresses: Vec<SocketAddr> = listeners.iter().map(|l| l.local().tcp().unwrap()).collect();
        self.links.name(&Endpoint::Tcp(addresses[1]), name);
        let region = Some(name.parse().unwrap());
        let gateway = Gateway::new(env, Options { region, peer_tls: Some(client), ..options() });
        let stop = CancellationToken::new();
        let (own, own_stop) = (gateway.clone(), stop.clone());
        let door = PeerDoor { listener: listeners.pop().unwrap(), tls: server };
        let users = listeners.pop().unwrap();
        let task = tokio::spawn(async move { own.serve_with_peers(users, door, own_stop).await });
        let edge = Edge { gateway, address: addresses[0], stop, task };
        Region { name, edge, peer: addresses[1] }
    }
}

impl Region {
    fn remote(&self) -> RemoteRegion {
        RemoteRegion { name: self.name.parse().unwrap(), tier: Tier::Core, gateways: vec![self.peer] }
    }

    /// Waits until the gateways of other regions that answer are so many.
    async fn hears(&self, gateways: usize) {
        until(async || {
            let text = self.edge.gateway.metrics_text();
            let lines = text.lines().filter(|l| l.starts_with("nexus_gateway_region_gateways{"));
            lines.filter(|l| l.ends_with(" 1")).count() == gateways
        })
        .await;
    }

    /// Waits until one region is known to be much nearer than another.
    async fn measures(&self, near: &str, far: &str) {
        let latency = |region: &str| {
            let metric = format!("nexus_gateway_region_latency_seconds{{region=\"{region}\"}} ");
            let text = self.edge.gateway.metrics_text();
            text.lines().find_map(|line| line.strip_prefix(&metric)?.parse::<f64>().ok())
        };
        until(async || latency(near).zip(latency(far)).is_some_and(|(near, far)| near * 3.0 < far)).await;
    }
}

/// The global app `x` with these instances here and more in these regions.
fn global(revision: u64, here: Vec<Backend>, others: Vec<RemoteRegion>) -> RoutingTable {
    let mut app = service("x", here);
    app.global = true;
    app.regions = others.iter().map(|r| r.name.clone()).collect();
    RoutingTable { regions: others, ..table(revision, vec![app]) }
}

async fn body(region: &Region, method: &str, body: &'static str) -> (u16, String) {
    let got = ask(&client(), &region.edge, method, "x.localhost", "/", body).await;
    (got.status.as_u16(), got.body)
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, pause: Duration) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        tokio::time::sleep(pause).await;
        if to.write_all(&buffer[..n]).await.is_err() {
            break;
        }
    }
}

/// Passes bytes on after a pause, as a long cable would.
async fn long_cable(to: SocketAddr, pause: Duration) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(free()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut cables = JoinSet::new();
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(to).await else { continue };
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            cables.spawn(carry(near_read, far_write, pause));
            cables.spawn(carry(far_read, near_write, pause));
        }
    });
    (address, task)
}

#[tokio::test]
async fn a_request_leaves_its_region_only_when_nobody_there_is_well() {
    let fleet = Fleet::new();
    let (a, b) = (fleet.region("a").await, fleet.region("b").await);
    let here = named("here").await;
    let there = serve(free(), |request| async move {
        Response::new(Full::new(Bytes::from(format!("there {:?}", request.headers()))))
    })
    .await;
    a.edge.gateway.offer(global(1, vec![backend(1, here.address)], vec![b.remote()]));
    b.edge.gateway.offer(global(1, vec![backend(2, there.address)], vec![a.remote()]));
    a.hears(1).await;
    assert_eq!(body(&a, "GET", "").await, (200, "here".into()));
    let address = here.address;
    here.kill().await;
    for method in ["GET", "POST", "PUT"] {
        let (status, text) = body(&a, method, "body").await;
        assert_eq!(status, 200, "{text}");
        assert!(text.starts_with("there"), "{text}");
        assert!(text.contains(r#""x-forwarded-for": "127.0.0.1""#), "the user's address and no gateway's: {text}");
        assert!(text.contains(r#""x-forwarded-host": "x.localhost""#), "{text}");
        assert!(!text.contains("x-nexus-"), "what gateways tell each other is theirs: {text}");
    }
    assert_eq!(a.edge.counted(r#"nexus_gateway_region_requests_total{region="b",outcome="answered"}"#), 3);
    assert_eq!(b.edge.counted(r#"nexus_gateway_taken_in_total{region="a"}"#), 3);
    assert_eq!(a.edge.counted(r#"nexus_gateway_ejections_total{service="default/x:80"}"#), 1);
    let _again = serve(address, |_| async { Response::new(Full::new(Bytes::from("again"))) }).await;
    until(async || body(&a, "GET", "").await.1 == "again").await;
    // A user can't claim to be a gateway.
    let forged = Request::builder()
        .uri(format!("http://{}/", b.edge.address))
        .header("host", "nowhere.localhost")
        .header("x-nexus-hop", "a")
        .header("x-nexus-service", "default/x:80")
        .body(Full::new(Bytes::new()))
        .unwrap();
    assert_eq!(client().request(forged).await.unwrap().status(), 404);
}

#[tokio::test]
async fn the_nearest_region_is_taken_and_the_next_one_when_it_is_cut_off() {
    let fleet = Fleet::new();
    let (a, b, c) = (fleet.region("a").await, fleet.region("b").await, fleet.region("c").await);
    let (in_b, in_c) = (named("b").await, named("c").await);
    // c is near; b is at the end of a long cable.
    let (far, cable) = long_cable(b.peer, Duration::from_millis(40)).await;
    fleet.links.name(&Endpoint::Tcp(far), "b");
    let behind_cable = RemoteRegion { gateways: vec![far], ..b.remote() };
    a.edge.gateway.offer(global(1, vec![], vec![behind_cable, c.remote()]));
    b.edge.gateway.offer(global(1, vec![backend(2, in_b.address)], vec![]));
    c.edge.gateway.offer(global(1, vec![backend(3, in_c.address)], vec![]));
    a.measures("c", "b").await;
    for _ in 0..3 {
        assert_eq!(body(&a, "GET", "").await.1, "c");
    }
    // Nothing is heard of c any more, not even that it is gone. No request may fail meanwhile.
    fleet.links.cut_both("a", "c");
    let cut = Instant::now();
    until(async || {
        let (status, text) = body(&a, "PUT", "x").await;
        assert_eq!((status, &*text), (200, "b"), "after {:?}", cut.elapsed());
        a.edge.counted(r#"nexus_gateway_region_gateways{region="c"}"#) == 0
    })
    .await;
    a.hears(1).await;
    assert_eq!(body(&a, "GET", "").await.1, "b");
    fleet.links.heal_all();
    until(async || body(&a, "GET", "").await.1 == "c").await;
    cable.abort();
}

#[tokio::test]
async fn a_region_that_has_nobody_is_passed_over_and_a_request_hops_once() {
    let fleet = Fleet::new();
    let (a, b, c) = (fleet.region("a").await, fleet.region("b").await, fleet.region("c").await);
    let in_c = named("c").await;
    // Both of the others might pass it round for ever.
    a.edge.gateway.offer(global(1, vec![], vec![b.remote()]));
    b.edge.gateway.offer(global(1, vec![], vec![a.remote(), c.remote()]));
    c.edge.gateway.offer(global(1, vec![backend(3, in_c.address)], vec![]));
    a.hears(1).await;
    b.hears(2).await;
    let got = get(&a.edge, "x.localhost").await;
    assert_eq!((got.status.as_u16(), in_c.count()), (503, 0), "b has instances in c in mind, but it is not the first");
    assert!(!got.headers.contains_key("x-nexus-refused"), "users are told in words");
    // With c in its own table, a goes there by itself, with any method.
    a.edge.gateway.offer(global(2, vec![], vec![b.remote(), c.remote()]));
    a.hears(2).await;
    for method in ["GET", "POST", "POST"] {
        assert_eq!(body(&a, method, "once").await, (200, "c".into()));
    }
    assert_eq!(in_c.count(), 3);
    // A gateway that has never heard of the app refuses as well.
    b.edge.gateway.offer(table(2, vec![]));
    let refused = r#"nexus_gateway_region_requests_total{region="b",outcome="refused"}"#;
    let before = a.edge.counted(refused);
    until(async || {
        assert_eq!(body(&a, "POST", "once").await, (200, "c".into()));
        a.edge.counted(refused) > before
    })
    .await;
}

#[tokio::test]
async fn what_another_region_may_have_done_is_done_again_only_if_that_is_harmless() {
    let fleet = Fleet::new();
    let (a, b, c) = (fleet.region("a").await, fleet.region("b").await, fleet.region("c").await);
    let in_c = named("c").await;
    let (cutter, cuts, task) = cutter(b"").await;
    b.edge.gateway.offer(global(1, vec![backend(2, cutter)], vec![]));
    c.edge.gateway.offer(global(1, vec![backend(3, in_c.address)], vec![]));
    a.edge.gateway.offer(global(1, vec![], vec![b.remote()]));
    a.hears(1).await;
    assert_eq!(body(&a, "POST", "once").await.0, 502);
    assert_eq!((cuts.load(Ordering::SeqCst), in_c.count()), (1, 0));
    // c is behind a long cable, so that b is asked first.
    let (far, cable) = long_cable(c.peer, Duration::from_millis(40)).await;
    a.edge.gateway.offer(global(2, vec![], vec![b.remote(), RemoteRegion { gateways: vec![far], ..c.remote() }]));
    a.measures("b", "c").await;
    assert_eq!(body(&a, "POST", "once").await.0, 502);
    assert_eq!((cuts.load(Ordering::SeqCst), in_c.count()), (2, 0));
    assert_eq!(body(&a, "PUT", "again").await, (200, "c".into()));
    assert!(cuts.load(Ordering::SeqCst) > 2);
    task.abort();
    cable.abort();
}

#[tokio::test]
async fn what_is_under_way_when_its_region_is_cut_off_is_done_again_only_if_that_is_harmless() {
    let fleet = Fleet::new();
    let (a, b, c) = (fleet.region("a").await, fleet.region("b").await, fleet.region("c").await);
    // b takes requests and is cut off before it answers.
    let in_b = serve(free(), |_| std::future::pending::<Response<Full<Bytes>>>()).await;
    let in_c = named("c").await;
    b.edge.gateway.offer(global(1, vec![backend(2, in_b.address)], vec![]));
    c.edge.gateway.offer(global(1, vec![backend(3, in_c.address)], vec![]));
    let (far, cable) = long_cable(c.peer, Duration::from_millis(40)).await;
    a.edge.gateway.offer(global(1, vec![], vec![b.remote(), RemoteRegion { gateways: vec![far], ..c.remote() }]));
    a.measures("b", "c").await;
    let client = client();
    let send = |method| ask(&client, &a.edge, method, "x.localhost", "/", "once");
    let cut = async {
        until(async || in_b.count() == 2).await;
        fleet.links.cut_both("a", "b");
    };
    let (post, put, ()) = tokio::join!(send("POST"), send("PUT"), cut);
    assert_eq!((post.status.as_u16(), post.body.contains("may have acted")), (502, true), "{}", post.body);
    assert_eq!((put.status.as_u16(), &*put.body), (200, "c"));
    assert_eq!((in_b.count(), in_c.count()), (2, 1), "the PUT alone was done again");
    // Whatever comes from now on goes where somebody answers.
    assert_eq!(body(&a, "POST", "once").await, (200, "c".into()));
    cable.abort();
}

/// Through two gateways.
async fn streams_through(protocol: Protocol, http2: bool) {
    let instance = exchanges::echo().await;
    let fleet = Fleet::new();
    let (a, b) = (fleet.region("a").await, fleet.region("b").await);
    let plan = |here: Vec<Backend>, others| {
        let mut plan = global(1, here, others);
        plan.services[0].protocol = protocol;
        plan.routes[0].host = "127.0.0.1".into();
        plan
    };
    a.edge.gateway.offer(plan(vec![], vec![b.remote()]));
    b.edge.gateway.offer(plan(vec![backend(1, instance.address)], vec![]));
    a.hears(1).await;
    exchanges::streams_both_ways(a.edge.address, protocol, http2).await;
}

#[tokio::test]
async fn bodies_stream_through_two_gateways() {
    streams_through(Protocol::Http, false).await;
    streams_through(Protocol::H2c, true).await;
}

#[tokio::test]
async fn a_connection_changes_its_protocol_through_two_gateways() {
    let instance = exchanges::changer().await;
    let fleet = Fleet::new();
    let (a, b) = (fleet.region("a").await, fleet.region("b").await);
    a.edge.gateway.offer(global(1, vec![], vec![b.remote()]));
    b.edge.gateway.offer(global(1, vec![backend(1, instance.address)], vec![]));
    a.hears(1).await;
    exchanges::changes_its_protocol(a.edge.address).await;
}

#[tokio::test]
async fn only_gateways_are_let_in_by_the_peers_door() {
    let fleet = Fleet::new();
    let b = fleet.region("b").await;
    let instance = named("b").await;
    b.edge.gateway.offer(global(1, vec![backend(1, instance.address)], vec![]));
    let ask = async |id: SpiffeId| -> Result<String, String> {
        let own = fleet.pki.identity(id);
        let policy = Policy::roles("home", &[Role::Gateway]);
        let config = tls::client_config(&own, fleet.pki.roots(), policy, &[], fleet.pki.clock()).unwrap();
        let stream = TcpStream::connect(b.peer).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("any.example").unwrap();
        let mut stream =
            tokio_rustls::TlsConnector::from(config).connect(name, stream).await.map_err(|e| e.to_string())?;
        let ask = "GET / HTTP/1.1\r\nhost: x.localhost\r\nx-nexus-hop: a\r\nx-nexus-service: default/x:80\r\n\
                   connection: close\r\n\r\n";
        stream.write_all(ask.as_bytes()).await.map_err(|e| e.to_string())?;
        let mut answer = String::new();
        tokio::time::timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().map_err(|e| e.to_string())?;
        Ok(answer)
    };
    let answer = ask(SpiffeId::gateway("home", "a").unwrap()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for stranger in [SpiffeId::agent("home", "host-1").unwrap(), SpiffeId::server("home", "server-1").unwrap()] {
        let answer = ask(stranger).await;
        assert!(answer.is_err(), "{answer:?}");
    }
    assert_eq!(instance.count(), 1);
}

#[tokio::test]
async fn a_gateway_that_drains_is_left_without_a_failure() {
    let fleet = Fleet::new();
    let (a, b, c) = (fleet.region("a").await, fleet.region("b").await, fleet.region("c").await);
    let (in_b, in_c) = (named("b").await, named("c").await);
    let (far, cable) = long_cable(c.peer, Duration::from_millis(30)).await;
    a.edge.gateway.offer(global(1, vec![], vec![b.remote(), RemoteRegion { gateways: vec![far], ..c.remote() }]));
    b.edge.gateway.offer(global(1, vec![backend(2, in_b.address)], vec![]));
    c.edge.gateway.offer(global(1, vec![backend(3, in_c.address)], vec![]));
    a.measures("b", "c").await;
    assert_eq!(body(&a, "GET", "").await.1, "b");
    b.edge.stop.cancel();
    until(async || {
        let (status, text) = body(&a, "POST", "body").await;
        assert_eq!(status, 200, "{text}");
        text == "c"
    })
    .await;
    cable.abort();
}
