//! What passes through a gateway, and what it refuses.

use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use nexus_model::kind::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::*;
use crate::exchanges;

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
    assert_eq!(edge.counted(r#"nexus_gateway_requests_total{service="default/a:80",class="5xx"}"#), 1);
}

/// Through one gateway.
async fn streams_both_ways(protocol: Protocol, http2: bool) {
    let instance = exchanges::echo().await;
    let edge = edge(options()).await;
    let mut plan = table(1, vec![service("a", vec![backend(1, instance.address)])]);
    plan.services[0].protocol = protocol;
    plan.routes[0].host = "127.0.0.1".into();
    edge.gateway.offer(plan);
    exchanges::streams_both_ways(edge.address, protocol, http2).await;
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
    let instance = exchanges::changer().await;
    let edge = edge(options()).await;
    edge.gateway.offer(table(1, vec![service("x", vec![backend(1, instance.address)])]));
    exchanges::changes_its_protocol(edge.address).await;
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
