//! Exchanges that are more than a request and its answer, the same through one gateway and through two.

use std::net::SocketAddr;

use bytes::Bytes;
use futures::channel::mpsc;
use http::{HeaderMap, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nexus_model::kind::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::*;

/// An instance that sends every request's body back as it comes, and says in which version it was asked.
pub async fn echo() -> Instance {
    serve(free(), |request| async move {
        let version = request.version();
        let mut answer = Response::new(request.into_body());
        answer.headers_mut().insert("trailer", "x-sum".parse().unwrap());
        answer.headers_mut().insert("x-version", format!("{version:?}").parse().unwrap());
        answer
    })
    .await
}

type Piece = Result<Frame<Bytes>, std::io::Error>;

/// Frames one by one, both ways, each only after the one before has come back, and trailers at the end. `gateway` must
/// route the host 127.0.0.1 to [`echo`]: HTTP/2 takes the host from the target, which is the gateway's address here.
pub async fn streams_both_ways(gateway: SocketAddr, protocol: Protocol, http2: bool) {
    let client: legacy::Client<_, StreamBody<mpsc::Receiver<Piece>>> =
        legacy::Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
    let (mut send, body) = mpsc::channel(1);
    let uri = format!("http://{gateway}/");
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

/// An instance that changes to another protocol when it is asked to, in which it sends everything back.
pub async fn changer() -> Instance {
    serve(free(), |mut request| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let mut answer = Response::new(Empty::<Bytes>::new());
        *answer.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
        for (name, value) in [("upgrade", "websocket"), ("connection", "upgrade")] {
            answer.headers_mut().insert(name, value.parse().unwrap());
        }
        answer
    })
    .await
}

/// Bytes go both ways after a change of the protocol. `gateway` must route the host x.localhost to [`changer`].
pub async fn changes_its_protocol(gateway: SocketAddr) {
    let mut stream = TcpStream::connect(gateway).await.unwrap();
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
