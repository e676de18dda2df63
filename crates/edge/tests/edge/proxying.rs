//! What passes through a gateway, and what it refuses.

use std::time::Duration;

use bytes::Bytes;
use futures::channel::mpsc;
use http::{HeaderMap, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nexus_model::kind::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::*;

#[tokio::test]
async fn host_and_path_choose_the_app() {
    let (a, b) = (named("a").await, named("b").await);
    let edge = edge(options()).await;
    let mut plan = table(1, vec![service("a", vec![backend(1, a.address)]), service("b", vec![backend(2, b.address)])]);
    plan.routes.push(nexus_model::plan::TableRoute { host: "a.localhost".into(), path: "/b".into(), service: 1 });
    edge.gateway.offer(plan);
    assert_eq!(get(&edge, "A.localhost:8000").await.body, "a");
    assert_eq!(ask(&client(), &edge, "GET", "a.localhost", "/b/x", "").await.body, "b");
    let unknown = get(&edge, "c.localhost").await;
    assert_eq!(unknown.status, 404);
    assert_eq!(unknown.headers["content-type"], "application/problem+json");
    assert!(unknown.body.contains("c.localhost"), "{}", unknown.body);
}

#[tokio::test]
async fn instances_learn_who_asked_and_errors_of_theirs_pass() {
    let instance = serve(free(), |request| async move {
        let mut answer = Response::new(Full::new(Bytes::from(format!("{:?}", request.headers()))));
        *answer.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        answer.headers_mut().insert("keep-alive", "timeout=5".parse().unwrap());
        answer
    })
    .await;
    let edge = edge(options()).await;
    edge.gateway.offer(table(1, vec![service("a", vec![backend(1, instance.address)])]));
    let got = get(&edge, "a.localhost").await;
    assert_eq!(got.status, 500);
    assert!(got.body.contains(r#""x-forwarded-for": "127.0.0.1""#), "{}", got.body);
    assert!(got.body.contains(r#""x-forwarded-host": "a.localhost""#), "{}", got.body);
    assert!(got.headers["x-request-id"].to_str().unwrap().starts_with("req-"));
    assert!(!got.headers.contains_key("keep-alive"));
    assert_eq!(instance.count(), 1);
    assert!(
        edge.gateway.metrics_text().contains(r#"nexus_gateway_requests_total{service="default/a:80",class="5xx"} 1"#)
    );
}

type Piece = Result<Frame<Bytes>, std::io::Error>;

/// Frames one by one, both ways, each only after the one before has come back, and trailers at the end.
async fn streams_both_ways(protocol: Protocol, http2: bool) {
    let instance = serve(free(), |request| async move {
        let version = request.version();
        let mut answer = Response::new(request.into_body());
        answer.headers_mut().insert("trailer", "x-sum".parse().unwrap());
        answer.headers_mut().insert("x-version", format!("{version:?}").parse().unwrap());
        answer
    })
    .await;
    let edge = edge(options()).await;
    let mut app = service("a", vec![backend(1, instance.address)]);
    app.protocol = protocol;
    edge.gateway.offer(table(1, vec![app]));
    let client: legacy::Client<_, StreamBody<mpsc::Receiver<Piece>>> =
        legacy::Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
    let (mut send, body) = mpsc::channel(1);
    let uri = format!("http://{}/", edge.address);
    let request = Request::builder().method("POST").uri(uri).header("te", "trailers").header("trailer", "x-sum");
    // HTTP/2 takes the host from the target, which is the gateway's address here.
    let request = if http2 { request } else { request.header("host", "a.localhost") };
    if http2 {
        let mut plan = table(2, vec![service("a", vec![backend(1, instance.address)])]);
        plan.services[0].protocol = protocol;
        plan.routes[0].host = "127.0.0.1".into();
        edge.gateway.offer(plan);
    }
    let answer = client.request(request.body(StreamBody::new(body)).unwrap());
    let mut answer = tokio::time::timeout(LONG, answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.version(), if http2 { Version::HTTP_2 } else { Version::HTTP_11 });
    let expected = if protocol == Protocol::H2c { "HTTP/2.0" } else { "HTTP/1.1" };
    assert_eq!(answer.headers()["x-version"], expected);
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
async fn http1_streams_both_ways() {
    streams_both_ways(Protocol::Http, false).await;
}

#[tokio::test]
async fn http2_users_reach_http2_instances() {
    streams_both_ways(Protocol::H2c, true).await;
}

#[tokio::test]
async fn http2_users_reach_http1_instances_and_the_other_way_round() {
    streams_both_ways(Protocol::Http, true).await;
    streams_both_ways(Protocol::H2c, false).await;
}

#[tokio::test]
async fn a_connection_can_change_its_protocol() {
    let instance = serve(free(), |mut request| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            let (mut from, mut to) = tokio::io::split(&mut stream);
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let mut answer = Response::new(Empty::<Bytes>::new());
        *answer.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
        for (name, value) in [("upgrade", "websocket"), ("connection", "upgrade")] {
            answer.headers_mut().insert(name, value.parse().unwrap());
        }
        answer
    })
    .await;
    let edge = edge(options()).await;
    edge.gateway.offer(table(1, vec![service("a", vec![backend(1, instance.address)])]));
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let ask = "GET / HTTP/1.1\r\nhost: a.localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
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

/// Sends bytes and returns all that comes back until the gateway closes.
async fn raw(edge: &Edge, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    // The gateway may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let mut back = Vec::new();
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut back)).await.expect("the gateway closes");
    String::from_utf8_lossy(&back).into_owned()
}

#[tokio::test]
async fn header_bombs_and_malformed_requests_are_refused() {
    let a = named("a").await;
    let edge = edge(options()).await;
    edge.gateway.offer(table(1, vec![service("a", vec![backend(1, a.address)])]));
    let large = format!("GET / HTTP/1.1\r\nhost: a.localhost\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\nhost: a.localhost\r\n{}\r\n", "x: 1\r\n".repeat(1000));
    for bomb in [large, many] {
        let got = raw(&edge, bomb.as_bytes()).await;
        assert!(got.is_empty() || got.starts_with("HTTP/1.1 4"), "{got}");
    }
    let twice = raw(&edge, b"GET / HTTP/1.1\r\nhost: a.localhost\r\nhost: b\r\nconnection: close\r\n\r\n").await;
    assert!(twice.starts_with("HTTP/1.1 400"), "{twice}");
    let both = b"POST / HTTP/1.1\r\nhost: a.localhost\r\ncontent-length: x\r\nconnection: close\r\n\r\n";
    assert!(raw(&edge, both).await.starts_with("HTTP/1.1 400"));
    assert_eq!(a.count(), 0);
    assert_eq!(get(&edge, "a.localhost").await.body, "a");
}

#[tokio::test]
async fn users_who_never_finish_their_headers_are_let_go() {
    let a = named("a").await;
    let edge = edge(nexus_edge::Options { header_timeout: Duration::from_millis(300), ..options() }).await;
    edge.gateway.offer(table(1, vec![service("a", vec![backend(1, a.address)])]));
    for start in ["", "GET / HT", "PRI * HTTP", "GET / HTTP/1.1\r\nhost: a.localhost\r\n"] {
        assert_eq!(raw(&edge, start.as_bytes()).await, "", "{start}");
    }
    // Neither after a request that was fine.
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a.localhost\r\n\r\n").await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"\r\n\r\na") {
        got.push(tokio::time::timeout(LONG, stream.read_u8()).await.unwrap().unwrap());
    }
    stream.write_all(b"GET / HTTP").await.unwrap();
    let rest = tokio::time::timeout(LONG, stream.read_to_end(&mut got)).await.expect("the gateway closes");
    assert!(rest.is_ok_and(|n| n == 0));
}
