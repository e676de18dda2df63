//! Gateways of several regions that pass requests on to each other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::channel::mpsc;
use http::{HeaderMap, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo};
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

    fn counts(&self, line: &str) -> bool {
        self.edge.gateway.metrics_text().lines().any(|l| l == line)
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
    assert!(a.counts(r#"nexus_gateway_region_requests_total{region="b",outcome="answered"} 3"#));
    assert!(b.counts(r#"nexus_gateway_taken_in_total{region="a"} 3"#));
    assert!(a.edge.gateway.metrics_text().contains(r#"nexus_gateway_ejections_total{service="default/x:80"} 1"#));
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
    a.hears(2).await;
    for _ in 0..3 {
        assert_eq!(body(&a, "GET", "").await.1, "c");
    }
    // Nothing is heard of c any more, not even that it is gone. No request may fail meanwhile.
    fleet.links.cut_both("a", "c");
    let cut = Instant::now();
    until(async || {
        let (status, text) = body(&a, "PUT", "x").await;
        assert_eq!((status, &*text), (200, "b"), "after {:?}", cut.elapsed());
        a.counts(r#"nexus_gateway_region_gateways{region="c"} 0"#)
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
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for _ in 0..4 {
        assert_eq!(body(&a, "POST", "once").await, (200, "c".into()));
    }
}

#[tokio::test]
async fn what_another_region_may_have_done_is_done_again_only_if_that_is_harmless() {
    let fleet = Fleet::new();
    let (a, b, c) = (fleet.region("a").await, fleet.region("b").await, fleet.region("c").await);
    let in_c = named("c").await;
    let listener = TcpListener::bind(free()).await.unwrap();
    let (cutter, cuts) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = cuts.clone();
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buffer = [0; 4096];
            if stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    b.edge.gateway.offer(global(1, vec![backend(2, cutter)], vec![]));
    c.edge.gateway.offer(global(1, vec![backend(3, in_c.address)], vec![]));
    a.edge.gateway.offer(global(1, vec![], vec![b.remote()]));
    a.hears(1).await;
    assert_eq!(body(&a, "POST", "once").await.0, 502);
    assert_eq!((cuts.load(Ordering::SeqCst), in_c.count()), (1, 0));
    // c is behind a long cable, so that b is asked first.
    let (far, cable) = long_cable(c.peer, Duration::from_millis(40)).await;
    a.edge.gateway.offer(global(2, vec![], vec![b.remote(), RemoteRegion { gateways: vec![far], ..c.remote() }]));
    a.hears(2).await;
    assert_eq!(body(&a, "POST", "once").await.0, 502);
    assert_eq!((cuts.load(Ordering::SeqCst), in_c.count()), (2, 0));
    assert_eq!(body(&a, "PUT", "again").await, (200, "c".into()));
    assert!(cuts.load(Ordering::SeqCst) > 2);
    task.abort();
    cable.abort();
}

type Piece = Result<Frame<Bytes>, std::io::Error>;

/// Frames one by one through two gateways, each only after the one before has come back, and trailers at the end.
async fn streams_through(protocol: Protocol, http2: bool) {
    let instance = serve(free(), |request| async move {
        let version = request.version();
        let mut answer = Response::new(request.into_body());
        answer.headers_mut().insert("trailer", "x-sum".parse().unwrap());
        answer.headers_mut().insert("x-version", format!("{version:?}").parse().unwrap());
        answer
    })
    .await;
    let fleet = Fleet::new();
    let (a, b) = (fleet.region("a").await, fleet.region("b").await);
    let plan = |here: Vec<Backend>, others| {
        let mut plan = global(1, here, others);
        plan.services[0].protocol = protocol;
        // HTTP/2 takes the host from the target, which is the gateway's address here.
        plan.routes[0].host = "127.0.0.1".into();
        plan
    };
    a.edge.gateway.offer(plan(vec![], vec![b.remote()]));
    b.edge.gateway.offer(plan(vec![backend(1, instance.address)], vec![]));
    a.hears(1).await;
    let client: legacy::Client<_, StreamBody<mpsc::Receiver<Piece>>> =
        legacy::Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
    let (mut send, body) = mpsc::channel(1);
    let uri = format!("http://{}/", a.edge.address);
    let request = Request::builder().method("POST").uri(uri).header("te", "trailers").header("trailer", "x-sum");
    let answer = client.request(request.body(StreamBody::new(body)).unwrap());
    let mut answer = tokio::time::timeout(LONG, answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.version(), if http2 { Version::HTTP_2 } else { Version::HTTP_11 });
    assert_eq!(answer.headers()["x-version"], if protocol == Protocol::H2c { "HTTP/2.0" } else { "HTTP/1.1" });
    for piece in ["one", "two", "three"] {
        send.try_send(Ok(Frame::data(Bytes::from(piece)))).unwrap();
        let frame = tokio::time::timeout(LONG, answer.body_mut().frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "3".parse().unwrap());
    send.try_send(Ok(Frame::trailers(trailers))).unwrap();
    drop(send);
    let last = tokio::time::timeout(LONG, answer.body_mut().frame()).await.unwrap().unwrap().unwrap();
    assert_eq!(last.into_trailers().unwrap()["x-sum"], "3");
}

#[tokio::test]
async fn bodies_stream_through_two_gateways() {
    streams_through(Protocol::Http, false).await;
    streams_through(Protocol::H2c, true).await;
}

#[tokio::test]
async fn a_connection_changes_its_protocol_through_two_gateways() {
    let instance = serve(free(), |mut request| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let mut answer = Response::new(Empty::<Bytes>::new());
        *answer.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
        answer.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        answer.headers_mut().insert("connection", "upgrade".parse().unwrap());
        answer
    })
    .await;
    let fleet = Fleet::new();
    let (a, b) = (fleet.region("a").await, fleet.region("b").await);
    a.edge.gateway.offer(global(1, vec![], vec![b.remote()]));
    b.edge.gateway.offer(global(1, vec![backend(1, instance.address)], vec![]));
    a.hears(1).await;
    let mut stream = TcpStream::connect(a.edge.address).await.unwrap();
    let ask = "GET / HTTP/1.1\r\nhost: x.localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tokio::time::timeout(LONG, stream.read_u8()).await.unwrap().unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: websocket"), "{head}");
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    tokio::time::timeout(LONG, stream.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(&back, b"hello");
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
    a.hears(2).await;
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
