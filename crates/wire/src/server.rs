//! The answering side: which methods there are, who may call them, and the listener.
//!
//! A method is registered with an `async` function. It is dropped at its next await when the caller resets the call,
//! goes away or runs out of time, so it must leave nothing half done; work that has to finish is handed to a task of
//! its owner's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream as BoxItems;
use futures::{FutureExt, Stream, StreamExt};
use nexus_env::{Endpoint, Env, Listener};
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::error::{Refusal, code};
use crate::serve;
use crate::streams::{ByteStream, FrameSink, FrameStream};
use crate::{MAX_MESSAGE, VERSION};

/// After a failed accept, such as one for want of file descriptors, the listener rests this long.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// How many addresses with a failing handshake are remembered, so that each is logged once.
const MANY_FAILING: usize = 1024;

/// How a server behaves.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// TLS and HTTP/2 handshakes together.
    pub handshake_timeout: Duration,
    /// How long a request's message may take to arrive, and a unary reply to be taken.
    pub transfer_timeout: Duration,
    /// The deadline of unary calls that bring none …
    pub default_deadline: Duration,
    /// … and the longest that they may bring.
    pub max_deadline: Duration,
    /// How long calls that are running may take to end when the server goes down.
    pub drain_timeout: Duration,
    pub ping_interval: Duration,
    pub ping_timeout: Duration,
    /// A connection without calls is closed after this long. Longer than the clients', which so close first.
    pub idle_timeout: Duration,
    pub max_message: usize,
    pub max_connections: usize,
    /// Calls at once on one connection; a client waits before it makes more.
    pub max_calls: u32,
    pub stream_window: u32,
    pub connection_window: u32,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            transfer_timeout: Duration::from_secs(30),
            default_deadline: Duration::from_secs(30),
            max_deadline: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(5),
            ping_interval: Duration::from_secs(5),
            ping_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(300),
            max_message: MAX_MESSAGE,
            max_connections: 4096,
            max_calls: 256,
            stream_window: 256 * 1024,
            connection_window: 1024 * 1024,
        }
    }
}

/// Who calls, and how long they wait.
#[derive(Debug, Clone)]
pub struct Caller {
    /// What the server's `identify` made of the caller's certificate.
    pub id: Option<Arc<str>>,
    pub remote: Endpoint,
    pub request_id: Arc<str>,
    /// After this nobody waits for the answer any more. Streams have none.
    pub deadline: Option<Instant>,
}

impl Caller {
    /// The time left until the deadline.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

pub(crate) type Unary = dyn Fn(Caller, Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> + Send + Sync;
pub(crate) type Items = BoxItems<'static, Result<Bytes, Refusal>>;
pub(crate) type StreamOf = dyn Fn(Caller, Bytes) -> BoxFuture<'static, Result<Items, Refusal>> + Send + Sync;
pub(crate) type Upload = dyn Fn(Caller, Bytes, ByteStream) -> BoxFuture<'static, Result<Bytes, Refusal>> + Send + Sync;
pub(crate) type Duplex =
    dyn Fn(Caller, Bytes, FrameSink, FrameStream) -> BoxFuture<'static, Result<(), Refusal>> + Send + Sync;

pub(crate) enum Handler {
    Unary(Box<Unary>),
    Stream(Box<StreamOf>),
    Upload(Box<Upload>),
    Duplex(Box<Duplex>),
}

type Identify = dyn Fn(&[CertificateDer<'_>]) -> Option<String> + Send + Sync;
type Authorize = dyn Fn(&Caller, &str) -> bool + Send + Sync;

/// What every connection needs of its server.
pub(crate) struct Core {
    pub tls: tokio_rustls::TlsAcceptor,
    pub options: ServerOptions,
    pub methods: BTreeMap<String, Handler>,
    pub identify: Box<Identify>,
    pub authorize: Box<Authorize>,
    pub shutdown: CancellationToken,
    /// Addresses whose last handshake failed: a misconfigured agent tries for ever and should fill no log.
    failing: Mutex<BTreeSet<IpAddr>>,
}

impl Core {
    pub fn handshake_failed(&self, remote: &Endpoint, why: &str) {
        let news = remote.tcp().is_none_or(|addr| {
            let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
            failing.len() < MANY_FAILING && failing.insert(addr.ip())
        });
        if news {
            warn!(peer = %remote, reason = why, "a peer's handshake failed");
        } else {
            debug!(peer = %remote, reason = why, "a peer's handshake failed again");
        }
    }

    pub fn handshake_done(&self, remote: &Endpoint) {
        if let Some(addr) = remote.tcp() {
            self.failing.lock().unwrap_or_else(PoisonError::into_inner).remove(&addr.ip());
        }
    }
}

/// Collects methods; see [`Server::builder`].
pub struct ServerBuilder {
    env: Env,
    endpoint: Endpoint,
    tls: Arc<rustls::ServerConfig>,
    options: ServerOptions,
    methods: BTreeMap<String, Handler>,
    twice: Option<String>,
    identify: Box<Identify>,
    authorize: Box<Authorize>,
}

fn read<Q: DeserializeOwned>(message: &[u8]) -> Result<Q, Refusal> {
    crate::decode(message).map_err(|e| Refusal::new(code::BAD_REQUEST, format!("the request can't be read: {e}")))
}

fn write<A: Serialize>(answer: &A) -> Result<Bytes, Refusal> {
    crate::encode(answer).map_err(|e| Refusal::internal(format!("the answer can't be written: {e}")))
}

impl ServerBuilder {
    pub fn options(mut self, options: ServerOptions) -> Self {
        self.options = options;
        self
    }

    /// How a certificate chain, already verified by TLS, becomes [`Caller::id`]. Without it nobody has an id.
    pub fn identify(
        mut self,
        identify: impl Fn(&[CertificateDer<'_>]) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.identify = Box::new(identify);
        self
    }

    /// Who may call which method. Without it, whoever has an id may call all.
    pub fn authorize(mut self, authorize: impl Fn(&Caller, &str) -> bool + Send + Sync + 'static) -> Self {
        self.authorize = Box::new(authorize);
        self
    }

    /// One question, one answer.
    pub fn unary<Q, A, F, H>(self, method: &str, handler: H) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
        F: Future<Output = Result<A, Refusal>> + Send + 'static,
        H: Fn(Caller, Q) -> F + Send + Sync + 'static,
    {
        let call: Box<Unary> = Box::new(move |caller, message| match read(&message) {
            Ok(request) => handler(caller, request).map(|answer| write(&answer?)).boxed(),
            Err(refusal) => std::future::ready(Err(refusal)).boxed(),
        });
        self.method(method, Handler::Unary(call))
    }

    /// As [`ServerBuilder::unary`], with bodies that are the caller's own bytes.
    pub fn unary_bytes<F, H>(self, method: &str, handler: H) -> Self
    where
        F: Future<Output = Result<Bytes, Refusal>> + Send + 'static,
        H: Fn(Caller, Bytes) -> F + Send + Sync + 'static,
    {
        let call: Box<Unary> = Box::new(move |caller, message| handler(caller, message).boxed());
        self.method(method, Handler::Unary(call))
    }

    /// One question, many answers. The call is accepted when the handler has returned its stream.
    pub fn stream<Q, A, S, F, H>(self, method: &str, handler: H) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
        S: Stream<Item = Result<A, Refusal>> + Send + 'static,
        F: Future<Output = Result<S, Refusal>> + Send + 'static,
        H: Fn(Caller, Q) -> F + Send + Sync + 'static,
    {
        let call: Box<StreamOf> = Box::new(move |caller, message| match read(&message) {
            Ok(request) => handler(caller, request).map(|items| Ok(items?.map(|item| write(&item?)).boxed())).boxed(),
            Err(refusal) => std::future::ready(Err(refusal)).boxed(),
        });
        self.method(method, Handler::Stream(call))
    }

    /// A blob to download.
    pub fn bytes_stream<Q, S, F, H>(self, method: &str, handler: H) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
        F: Future<Output = Result<S, Refusal>> + Send + 'static,
        H: Fn(Caller, Q) -> F + Send + Sync + 'static,
    {
        let call: Box<StreamOf> = Box::new(move |caller, message| match read(&message) {
            Ok(request) => handler(caller, request)
                .map(|pieces| {
                    let failed = |e: io::Error| Refusal::internal(format!("the blob can't be read: {e}"));
                    Ok(pieces?.map(move |piece| piece.map_err(failed)).boxed())
                })
                .boxed(),
            Err(refusal) => std::future::ready(Err(refusal)).boxed(),
        });
        self.method(method, Handler::Stream(call))
    }

    /// A blob that the caller sends. What it was is known only at its end, so act on it there.
    pub fn upload<Q, A, F, H>(self, method: &str, handler: H) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
        F: Future<Output = Result<A, Refusal>> + Send + 'static,
        H: Fn(Caller, Q, ByteStream) -> F + Send + Sync + 'static,
    {
        let call: Box<Upload> = Box::new(move |caller, message, body| match read(&message) {
            Ok(request) => handler(caller, request, body).map(|answer| write(&answer?)).boxed(),
            Err(refusal) => std::future::ready(Err(refusal)).boxed(),
        });
        self.method(method, Handler::Upload(call))
    }

    /// Frames both ways, until the handler returns.
    pub fn duplex<Q, F, H>(self, method: &str, handler: H) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        F: Future<Output = Result<(), Refusal>> + Send + 'static,
        H: Fn(Caller, Q, FrameSink, FrameStream) -> F + Send + Sync + 'static,
    {
        let call: Box<Duplex> = Box::new(move |caller, message, sink, frames| match read(&message) {
            Ok(request) => handler(caller, request, sink, frames).boxed(),
            Err(refusal) => std::future::ready(Err(refusal)).boxed(),
        });
        self.method(method, Handler::Duplex(call))
    }

    fn method(mut self, name: &str, handler: Handler) -> Self {
        if self.methods.insert(name.to_owned(), handler).is_some() {
            self.twice = Some(name.to_owned());
        }
        self
    }

    /// Takes the endpoint. Fails too if a method was registered twice.
    pub async fn bind(self) -> io::Result<Server> {
        if let Some(twice) = self.twice {
            let why = format!("the method `{twice}` is registered twice");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let listener = self.env.transport.bind(&self.endpoint).await?;
        Ok(Server {
            listener,
            core: Core {
                tls: self.tls.into(),
                options: self.options,
                methods: self.methods,
                identify: self.identify,
                authorize: self.authorize,
                shutdown: CancellationToken::new(),
                failing: Mutex::default(),
            },
        })
    }

    /// Binds and serves until `shutdown`.
    pub async fn serve(self, shutdown: CancellationToken) -> io::Result<()> {
        self.bind().await?.serve(shutdown).await;
        Ok(())
    }
}

/// A server that has its endpoint.
pub struct Server {
    listener: Box<dyn Listener>,
    core: Core,
}

impl Server {
    pub fn builder(env: &Env, endpoint: Endpoint, tls: Arc<rustls::ServerConfig>) -> ServerBuilder {
        ServerBuilder {
            env: env.clone(),
            endpoint,
            tls,
            options: ServerOptions::default(),
            methods: BTreeMap::new(),
            twice: None,
            identify: Box::new(|_| None),
            authorize: Box::new(|caller, _| caller.id.is_some()),
        }
    }

    /// Where it listens: with the port that was free, if 0 was asked for.
    pub fn local(&self) -> Endpoint {
        self.listener.local()
    }

    /// Serves until `shutdown`, then drains: returns when every call has ended, at the latest after the drain timeout.
    /// Dropping it stops everything at once.
    pub async fn serve(self, shutdown: CancellationToken) {
        let Self { mut listener, mut core } = self;
        core.shutdown = shutdown.clone();
        let room = Arc::new(Semaphore::new(core.options.max_connections));
        let core = Arc::new(core);
        let mut connections = JoinSet::new();
        let mut accepting = true;
        loop {
            // No room: peers wait in the listener's backlog.
            let permit = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(done) = connections.join_next() => { log_panic(done); continue; }
                permit = room.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
            };
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, remote)) => {
                    accepting = true;
                    let core = core.clone();
                    connections.spawn(async move {
                        serve::connection(core, stream, remote).await;
                        drop(permit);
                    });
                }
                Err(e) => {
                    if std::mem::replace(&mut accepting, false) {
                        warn!(endpoint = %listener.local(), reason = %e, "accepting connections fails");
                    }
                    sleep(ACCEPT_REST).await;
                }
            }
        }
        // New connections are refused while the old ones drain.
        drop(listener);
        while let Some(done) = connections.join_next().await {
            log_panic(done);
        }
    }
}

pub(crate) fn log_panic(done: Result<(), tokio::task::JoinError>) {
    if let Err(e) = done
        && e.is_panic()
    {
        tracing::error!(reason = %e, "a task of the wire server panicked");
    }
}

/// The version that a request or reply names, or what it says instead.
pub(crate) fn version_of(headers: &http::HeaderMap) -> Result<u16, String> {
    let text = headers.get(crate::HEADER_VERSION).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    match text {
        Some(text) => match text.parse() {
            Ok(VERSION) => Ok(VERSION),
            _ => Err(text),
        },
        None => Err("none".to_owned()),
    }
}
