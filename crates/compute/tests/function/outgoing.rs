//! A function's requests to others: what the agent opens for it, what an agent's end does to them, and what is refused.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::join_all;
use http_body_util::BodyExt;
use nexus_compute::{Connections, NoConnection, NoConnectionKind, Runtime};
use nexus_model::Uid;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use crate::world::{World, until};

/// A network of names, as an agent would know them.
#[derive(Default)]
pub struct Names {
    names: BTreeMap<String, SocketAddr>,
    roots: Vec<Vec<u8>>,
    pub asked: Mutex<Vec<(Uid, String, u16)>>,
}

impl Names {
    pub fn of(names: &[(&str, SocketAddr)]) -> Self {
        let names = names.iter().map(|(name, address)| ((*name).to_owned(), *address)).collect();
        Self { names, ..Self::default() }
    }
}

#[async_trait]
impl Connections for Names {
    async fn connect(&self, instance: Uid, host: &str, port: u16) -> Result<OwnedFd, NoConnection> {
        self.asked.lock().unwrap().push((instance, host.to_owned(), port));
        let closed =
            || NoConnection::of(NoConnectionKind::Prohibited, format!("{host} is not in the project's egress"));
        let to = self.names.get(host).ok_or_else(closed)?;
        let stream = TcpStream::connect(to).await;
        let stream = stream.map_err(|e| NoConnection::of(NoConnectionKind::Refused, e.to_string()))?;
        Ok(stream.into_std().unwrap().into())
    }

    async fn roots(&self) -> std::io::Result<Vec<Vec<u8>>> {
        Ok(self.roots.clone())
    }
}

async fn head<S: AsyncRead + Unpin>(stream: &mut S) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

/// Answers a request with its head.
async fn mirror<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let Some(head) = head(&mut stream).await else { return };
    let answer = format!("HTTP/1.1 201 Created\r\ncontent-length: {}\r\n\r\n{head}", head.len());
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub async fn a_function_asks_others_by_connections_of_the_agents(world: &World) {
    let (listener, address) = listener().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(mirror(stream));
        }
    });
    let names = Arc::new(Names::of(&[("web", address), ("fd00::1", address)]));
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.connect_by(names.clone());
    runtime.start(&sandbox).await.unwrap();
    let (status, head) = world.get(&sandbox, "/fetch?http://web/some/path?and=query").await;
    assert_eq!(status, 201);
    assert!(head.starts_with("GET /some/path?and=query HTTP/1.1\r\n") && head.contains("\r\nhost: web\r\n"), "{head}");
    let (_, head) = world.get(&sandbox, "/fetch?http://[fd00::1]:8080").await;
    assert!(head.starts_with("GET / HTTP/1.1\r\n"), "{head}");
    let asked = names.asked.lock().unwrap().clone();
    assert_eq!(asked, [(sandbox.uid, "web".into(), 80), (sandbox.uid, "fd00::1".into(), 8080)]);
    let many = join_all((0..64).map(|_| world.get(&sandbox, "/fetch?http://web/"))).await;
    assert!(many.iter().all(|(status, _)| *status == 201), "{many:?}");
    // Another instance of the project asks for itself.
    let other = world.sandbox();
    runtime.start(&other).await.unwrap();
    assert_eq!(world.get(&other, "/fetch?http://web/").await.0, 201);
    assert_eq!(names.asked.lock().unwrap().last().unwrap().0, other.uid);
}

pub async fn https_is_checked_against_the_hosts_authorities(world: &World) {
    let authority = KeyPair::generate().unwrap();
    let mut of_authority = CertificateParams::default();
    of_authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = of_authority.self_signed(&authority).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["secure.test".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &Issuer::from_params(&of_authority, &authority)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], private).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (listener, address) = listener().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                mirror(stream).await;
            }
        }
    });
    let names =
        Names { roots: vec![root.der().to_vec()], ..Names::of(&[("secure.test", address), ("other.test", address)]) };
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.connect_by(Arc::new(names));
    runtime.start(&sandbox).await.unwrap();
    let (status, head) = world.get(&sandbox, "/fetch?https://secure.test/x").await;
    assert_eq!(status, 201, "{head}");
    assert!(head.starts_with("GET /x HTTP/1.1\r\n") && head.contains("\r\nhost: secure.test\r\n"), "{head}");
    let (status, why) = world.get(&sandbox, "/fetch?https://other.test/").await;
    assert_eq!((status, why.trim()), (502, "ErrorCode::TlsCertificateError"));
    assert!(world.log(&sandbox).contains("GET https://other.test: TLS: "), "{}", world.log(&sandbox));
}

pub async fn a_request_that_is_refused_says_why_in_the_log(world: &World) {
    let (closed, address) = listener().await;
    drop(closed);
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.connect_by(Arc::new(Names::of(&[("closed", address)])));
    runtime.start(&sandbox).await.unwrap();
    let (status, why) = world.get(&sandbox, "/fetch?http://example.com/?token=secret").await;
    assert_eq!((status, why.trim()), (502, "ErrorCode::DestinationIpProhibited"));
    let (status, why) = world.get(&sandbox, "/fetch?http://closed/").await;
    assert_eq!((status, why.trim()), (502, "ErrorCode::ConnectionRefused"));
    let (status, why) = world.get(&sandbox, "/fetch?http://user@closed/").await;
    assert_eq!((status, why.trim()), (502, "ErrorCode::HttpRequestUriInvalid"));
    let log = world.log(&sandbox);
    assert!(log.contains("GET http://example.com: example.com is not in the project's egress"), "{log}");
    assert!(!log.contains("secret"), "{log}");
}

/// Sends a part of an answer at once and the rest when it is told to; then says whether the client has gone.
async fn halves(listener: TcpListener, go: Arc<Notify>) -> bool {
    let (mut stream, _) = listener.accept().await.unwrap();
    head(&mut stream).await.unwrap();
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf").await.unwrap();
    let mut one = [0];
    tokio::select! {
        biased;
        () = go.notified() => {
            stream.write_all(b"rest").await.unwrap();
            false
        }
        read = stream.read(&mut one) => matches!(read, Ok(0) | Err(_)),
    }
}

pub async fn an_answer_goes_on_without_an_agent_and_the_next_request_waits_for_one(world: &World) {
    let ((slow, slow_at), (quick, quick_at)) = (listener().await, listener().await);
    let go = Arc::new(Notify::new());
    tokio::spawn(halves(slow, go.clone()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = quick.accept().await {
            mirror(stream).await;
        }
    });
    let names = Arc::new(Names::of(&[("slow", slow_at), ("quick", quick_at)]));
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.connect_by(names.clone());
    runtime.start(&sandbox).await.unwrap();
    let answer = world.request(&sandbox, "/fetch?http://slow/", Bytes::new()).await.unwrap();
    let mut body = answer.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "half");
    drop(runtime);

    let waiting = world.get(&sandbox, "/fetch?http://quick/");
    let resumed = async {
        go.notify_one();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "rest");
        // The next agent finds what runs, and the executor asks it.
        let runtime = world.runtime();
        runtime.connect_by(names.clone());
        runtime.observe().await.unwrap();
        runtime
    };
    let ((status, _), _runtime) = tokio::join!(waiting, resumed);
    assert_eq!(status, 201);
}

pub async fn a_removed_instance_leaves_no_connection(world: &World) {
    let (slow, address) = listener().await;
    let gone = tokio::spawn(halves(slow, Arc::new(Notify::new())));
    let (runtime, sandbox) = (world.runtime(), world.sandbox());
    runtime.connect_by(Arc::new(Names::of(&[("slow", address)])));
    runtime.start(&sandbox).await.unwrap();
    let answer = world.request(&sandbox, "/fetch?http://slow/", Bytes::new()).await.unwrap();
    runtime.remove(sandbox.uid).await.unwrap();
    assert!(answer.into_body().collect().await.is_err(), "half of an answer is none");
    assert!(gone.await.unwrap(), "the connection outlived its instance");
    until("nothing to be left", || async { runtime.observe().await.unwrap().is_empty() }).await;
}
