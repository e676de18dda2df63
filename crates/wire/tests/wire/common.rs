//! A server with every shape of call on a free port of the loopback, and certificates for it and its callers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use nexus_env::{Endpoint, Env};
use nexus_wire::{ClientOptions, Refusal, Server, ServerBuilder, ServerOptions};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// No wait in a test is longer; none that passes comes near.
pub const LONG: Duration = Duration::from_secs(30);

/// An authority, with rustls configurations for peers of it.
pub struct Pki {
    root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { root, issuer: Issuer::new(params, key) }
    }

    fn leaf(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["nexus.internal".to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (vec![cert.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        Arc::new(roots)
    }

    pub fn server(&self) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let callers = rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots(), provider.clone())
            .build()
            .unwrap();
        let (chain, key) = self.leaf();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(callers)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![nexus_wire::ALPN.to_vec()];
        Arc::new(config)
    }

    pub fn client(&self) -> Arc<ClientConfig> {
        let (chain, key) = self.leaf();
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots())
            .with_client_auth_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![nexus_wire::ALPN.to_vec()];
        Arc::new(config)
    }
}

/// Handlers that are running, and those that were dropped before their end.
#[derive(Default)]
pub struct Watched {
    pub begun: AtomicUsize,
    pub dropped: AtomicUsize,
}

/// Counts a handler as dropped, unless it is told that it is done.
pub struct Witness(pub Arc<Watched>);

impl Witness {
    fn new(watched: &Arc<Watched>) -> Self {
        watched.begun.fetch_add(1, Ordering::SeqCst);
        Self(watched.clone())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

pub fn server_options() -> ServerOptions {
    ServerOptions { drain_timeout: Duration::from_millis(200), max_message: 100_000, ..Default::default() }
}

pub fn client_options() -> ClientOptions {
    ClientOptions { backoff_max: Duration::from_millis(200), ..Default::default() }
}

/// Bytes that differ at every place, so that nothing lost or swapped goes unseen.
pub fn blob(length: usize) -> Bytes {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// A server with a method of each shape.
pub fn methods(builder: ServerBuilder, watched: &Arc<Watched>) -> ServerBuilder {
    let (hangs, streams, duplexes) = (watched.clone(), watched.clone(), watched.clone());
    builder
        .identify(|chain| chain.first().map(|_| "somebody".to_owned()))
        .authorize(|caller, method| caller.id.is_some() && method != "forbidden")
        .unary("add", |_, (a, b): (u64, u64)| async move { Ok(a + b) })
        .unary("whoami", |caller, (): ()| async move {
            Ok((caller.id.map(|id| id.to_string()), caller.request_id.to_string(), caller.deadline.is_some()))
        })
        .unary("follow", |_, (): ()| async move { Err::<(), _>(Refusal::not_leader(Some("s2".into()))) })
        .unary("full", |_, (): ()| async move { Err::<(), _>(Refusal::new("disk-full", "no room on h1")) })
        .unary("panic", |_, (): ()| async move { if true { panic!("on purpose") } else { Ok(()) } })
        .unary("forbidden", |_, (): ()| async move { Ok(()) })
        .unary("big", |_, length: usize| async move { Ok("x".repeat(length)) })
        .unary("hang", move |_, (): ()| {
            let witness = Witness::new(&hangs);
            async move {
                std::future::pending::<()>().await;
                drop(witness);
                Ok(())
            }
        })
        .unary_bytes("echo", |_, bytes| async move { Ok(bytes) })
        .stream("count", |_, to: u64| async move {
            if to == 0 {
                return Err(Refusal::new("nothing-to-count", ""));
            }
            Ok(futures::stream::iter((0..to).map(Ok::<u64, Refusal>)))
        })
        .stream("count-then-fail", |_, to: u64| async move {
            let failure = futures::stream::iter([Err(Refusal::new("tired", "of counting"))]);
            Ok(futures::stream::iter((0..to).map(Ok::<u64, Refusal>)).chain(failure))
        })
        .stream("quiet", move |_, (): ()| {
            let witness = Witness::new(&streams);
            async move {
                let first = futures::stream::iter([Ok::<u64, Refusal>(1)]);
                Ok(first.chain(futures::stream::pending()).map(move |item| {
                    let _ = &witness;
                    item
                }))
            }
        })
        .bytes_stream("download", |_, length: usize| async move {
            let whole = blob(length);
            let pieces: Vec<_> = whole.chunks(50_000).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
            Ok(futures::stream::iter(pieces))
        })
        .bytes_stream("broken-download", |_, (): ()| async move {
            let pieces = [Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("bad sector"))];
            Ok(futures::stream::iter(pieces))
        })
        .upload("upload", |_, name: String, mut body| async move {
            let mut got = Vec::new();
            while let Some(piece) = body.next().await {
                got.extend_from_slice(&piece.map_err(|e| Refusal::internal(e.to_string()))?);
            }
            let length = got.len();
            Ok((name, length, got == blob(length)))
        })
        .upload("refuse-upload", |_, (): (), _| async move { Err::<(), _>(Refusal::new("disk-full", "")) })
        .duplex("shout", |_, greeting: String, mut sink, mut frames| async move {
            let gone = |e: nexus_wire::WireError| Refusal::internal(e.to_string());
            sink.send(9, greeting.into()).await.map_err(gone)?;
            while let Some(frame) = frames.next().await {
                let (channel, bytes) = frame.map_err(gone)?;
                sink.send(channel, bytes.to_ascii_uppercase().into()).await.map_err(gone)?;
            }
            Err(Refusal::new("exit", "7"))
        })
        .duplex("wait", move |_, (): (), sink, frames| {
            let witness = Witness::new(&duplexes);
            async move {
                std::future::pending::<()>().await;
                drop((sink, frames, witness));
                Ok(())
            }
        })
}

/// A server that runs until it is stopped or dropped.
pub struct Running {
    pub endpoint: Endpoint,
    pub watched: Arc<Watched>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    pub async fn start(env: &Env, tls: Arc<ServerConfig>, at: Endpoint) -> Self {
        let watched = Arc::new(Watched::default());
        let builder = Server::builder(env, at, tls).options(server_options());
        let server = methods(builder, &watched).bind().await.unwrap();
        let (endpoint, stop) = (server.local(), CancellationToken::new());
        let task = tokio::spawn(server.serve(stop.clone()));
        Self { endpoint, watched, stop, task }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        let mut this = self;
        tokio::time::timeout(LONG, &mut this.task).await.expect("draining is bounded").unwrap();
    }

    /// Ends it without a word to its callers.
    pub async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn loopback() -> Endpoint {
    "127.0.0.1:0".parse().unwrap()
}

/// Waits until `holds`.
pub async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}
