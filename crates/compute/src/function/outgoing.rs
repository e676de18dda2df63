//! A function's requests to others, `wasi:http/outgoing-handler`: HTTP/1.1 on a connection of its own each, with TLS for `https`.
//!
//! The connection comes from the agent ([`super::outlet`]), from within the instance's network, so what it may reach is what that
//! network lets pass. All else happens here: TLS with the authorities that the host trusts, the request, its body and the answer.
//! Everything belongs to the guest: when its time is up, its client gone or its instance removed, its connections are closed.
//!
//! A request that fails says why in the instance's log; a guest is told by no more than a code.

use std::net::TcpStream as StdTcp;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::uri::Scheme;
use http::{Method, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use nexus_model::Uid;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use wasmtime_wasi_http::{Error as HttpError, RequestOptions, WasiBody};

use super::log::{Channel, Log};
use super::outlet::Outlet;
use crate::runtime::{NoConnection, NoConnectionKind};

/// Connections of one instance at once; a request that has no place waits for one.
pub(super) const CONNECTIONS: usize = 128;

/// How long a connection may take, with TLS and with waiting for a place, if the guest does not say; and at most.
const CONNECT: Duration = Duration::from_secs(15);
const CONNECT_MAX: Duration = Duration::from_secs(60);

/// The head of an answer: bytes, and fields.
const MAX_HEAD: usize = 128 << 10;
const MAX_FIELDS: usize = 200;

/// How long authorities are believed before the host is asked for them again.
const ROOTS: Duration = Duration::from_secs(3600);

/// What an executor's requests share.
pub(super) struct Outgoing {
    pub outlet: Outlet,
    /// Made when the first request asks for it.
    tls: Mutex<Option<(Instant, Arc<ClientConfig>)>>,
}

/// The way of one instance's requests.
#[derive(Clone)]
pub(super) struct Way {
    pub shared: Arc<Outgoing>,
    pub instance: Uid,
    pub places: Arc<Semaphore>,
    pub log: Arc<Log>,
}

pub(super) type Sending<T> = Box<dyn Future<Output = Result<T, HttpError>> + Send>;

/// A request that failed: what the guest is told, and what its log.
struct Failure {
    error: HttpError,
    why: String,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Outgoing {
    pub fn new() -> Self {
        Self { outlet: Outlet::new(), tls: Mutex::new(None) }
    }

    async fn tls(&self) -> Result<Arc<ClientConfig>, Failure> {
        let mut known = self.tls.lock().await;
        if let Some((since, config)) = &*known
            && since.elapsed() < ROOTS
        {
            return Ok(config.clone());
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.outlet.roots(CONNECT).await?.into_iter().map(CertificateDer::from));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|e| Failure::new(HttpError::TlsProtocolError, e.to_string()))?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let config = Arc::new(config);
        *known = Some((Instant::now(), config.clone()));
        Ok(config)
    }
}

impl Failure {
    fn new(error: HttpError, why: impl Into<String>) -> Self {
        Self { error, why: why.into() }
    }
}

impl From<NoConnection> for Failure {
    fn from(no: NoConnection) -> Self {
        let error = match no.kind {
            NoConnectionKind::NoName => HttpError::DestinationNotFound,
            NoConnectionKind::Prohibited => HttpError::DestinationIpProhibited,
            NoConnectionKind::Refused => HttpError::ConnectionRefused,
            NoConnectionKind::Unreachable => HttpError::DestinationIpUnroutable,
            NoConnectionKind::Timeout => HttpError::ConnectionTimeout,
            NoConnectionKind::Busy => HttpError::DestinationUnavailable,
        };
        Self::new(error, no.why)
    }
}

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    tls: bool,
    /// A name, or an address without brackets.
    host: String,
    port: u16,
}

impl Target {
    fn of(uri: &Uri) -> Option<Self> {
        let tls = uri.scheme() == Some(&Scheme::HTTPS);
        let authority = uri.authority()?;
        if authority.as_str().contains('@') {
            return None;
        }
        let host = authority.host();
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let port = match authority.as_str()[host.len()..].strip_prefix(':') {
            Some(port) => port.parse().ok().filter(|port| *port != 0)?,
            None if authority.as_str().len() > host.len() => return None,
            None => {
                if tls {
                    443
                } else {
                    80
                }
            }
        };
        // A name has 253 characters at most, and may end with a dot (RFC 1035, section 2.3.4).
        (!bare.is_empty() && bare.len() <= 254).then(|| Self { tls, host: bare.to_owned(), port })
    }
}

/// Sends a request; the second of what comes of it drives the connection, as long as the answer's body is read.
pub(super) async fn send(
    way: Way,
    request: Request<WasiBody>,
    options: RequestOptions,
) -> Result<(Response<WasiBody>, Sending<()>), HttpError> {
    let (method, scheme) = (request.method().clone(), request.uri().scheme_str().unwrap_or("http").to_owned());
    // Without its path, which may hold what is nobody's to know.
    let authority = request.uri().authority().map(|a| a.to_string()).unwrap_or_default();
    match attempt(&way, request, options).await {
        Ok(done) => Ok(done),
        Err(Failure { error, why }) => {
            let text = format!("cloudnexus: {method} {scheme}://{authority}: {why}").replace(['\n', '\r'], " ");
            way.log.line(Channel::Stderr, &text);
            Err(error)
        }
    }
}

async fn attempt(
    way: &Way,
    mut request: Request<WasiBody>,
    options: RequestOptions,
) -> Result<(Response<WasiBody>, Sending<()>), Failure> {
    let target = Target::of(request.uri());
    let target =
        target.ok_or_else(|| Failure::new(HttpError::HttpRequestUriInvalid, "its authority is not HOST[:PORT]"))?;
    if *request.method() == Method::CONNECT {
        return Err(Failure::new(HttpError::HttpRequestMethodInvalid, "tunnels are not opened"));
    }
    let within = options.connect_timeout.unwrap_or(CONNECT).min(CONNECT_MAX);
    let connecting = timeout_at(Instant::now() + within, connect(way, &target, within)).await;
    let (stream, place) = connecting.unwrap_or_else(|_| {
        Err(Failure::new(HttpError::ConnectionTimeout, format!("no connection within {} ms", within.as_millis())))
    })?;
    let mut builder = http1::Builder::new();
    builder.max_buf_size(MAX_HEAD).max_headers(MAX_FIELDS);
    let refused = |error: hyper::Error| {
        let why = format!("the answer can't be had: {error}");
        if error.is_timeout() {
            Failure::new(HttpError::HttpResponseTimeout, why)
        } else {
            Failure::new(error.into(), why)
        }
    };
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(refused)?;
    // On a task of its own, which ends with this request: see the type.
    let driver = AbortOnDropHandle::new(tokio::spawn(async move {
        let _place: OwnedSemaphorePermit = place;
        connection.await
    }));
    // In the form that servers take, as opposed to proxies.
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
    *request.uri_mut() =
        path.parse().map_err(|_| Failure::new(HttpError::HttpRequestUriInvalid, "its path is none"))?;
    let answered = sender.send_request(request);
    let response = match options.first_byte_timeout {
        Some(first) => timeout_at(Instant::now() + first, answered).await.map_err(|_| {
            Failure::new(HttpError::ConnectionReadTimeout, format!("no answer within {} ms", first.as_millis()))
        })?,
        None => answered.await,
    };
    let response = response.map_err(refused)?;
    let limit = options.between_bytes_timeout.map(|limit| (limit, Box::pin(sleep(limit))));
    let response = response.map(|body| Answer { body, limit }.boxed_unsync());
    let drive = async move {
        match driver.await {
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(error)) => Err(error.into()),
        }
    };
    Ok((response, Box::new(drive)))
}

async fn connect(
    way: &Way,
    target: &Target,
    within: Duration,
) -> Result<(Box<dyn Stream>, OwnedSemaphorePermit), Failure> {
    let place = match way.places.clone().try_acquire_owned() {
        Ok(place) => place,
        Err(_) => way.places.clone().acquire_owned().await.expect("never closed"),
    };
    let socket = way.shared.outlet.connect(way.instance, &target.host, target.port, within).await?;
    let stream = adopt(socket).map_err(|e| Failure::new(HttpError::Connect(e), "its connection can't be used"))?;
    if !target.tls {
        return Ok((Box::new(stream), place));
    }
    let config = way.shared.tls().await?;
    let name = ServerName::try_from(target.host.clone());
    let name =
        name.map_err(|_| Failure::new(HttpError::HttpRequestUriInvalid, "no certificate can be for its host"))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(|e| {
        let why = format!("TLS: {e}");
        let certificate = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        match certificate {
            Some(rustls::Error::InvalidCertificate(_)) => Failure::new(HttpError::TlsCertificateError, why),
            _ => Failure::new(HttpError::Tls(e), why),
        }
    })?;
    Ok((Box::new(stream), place))
}

fn adopt(socket: OwnedFd) -> std::io::Result<TcpStream> {
    let stream = StdTcp::from(socket);
    stream.set_nonblocking(true)?;
    // A failure only means more delay.
    let _ = stream.set_nodelay(true);
    TcpStream::from_std(stream)
}

/// An answer's body, which fails when nothing of it has come for as long as the guest allows.
struct Answer {
    body: Incoming,
    limit: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if let Some((limit, timer)) = &mut this.limit {
                timer.as_mut().reset(Instant::now() + *limit);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(HttpError::from)));
        }
        match &mut this.limit {
            Some((_, timer)) => {
                ready!(timer.as_mut().poll(cx));
                Poll::Ready(Some(Err(HttpError::ConnectionReadTimeout)))
            }
            None => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_host_and_a_port() {
        let of = |uri: &str| Target::of(&uri.parse().unwrap()).map(|t| (t.tls, t.host, t.port));
        assert_eq!(of("http://web/"), Some((false, "web".into(), 80)));
        assert_eq!(of("https://web.default.internal"), Some((true, "web.default.internal".into(), 443)));
        assert_eq!(of("http://10.0.0.5:8080/x"), Some((false, "10.0.0.5".into(), 8080)));
        assert_eq!(of("http://[fd00::1]:81/x"), Some((false, "fd00::1".into(), 81)));
        assert_eq!(of("http://[fd00::1]/x"), Some((false, "fd00::1".into(), 80)));
        for bad in ["http://user@web/", "http://web:0/", "http://web:99999/", "/only/a/path"] {
            assert_eq!(bad.parse().ok().and_then(|uri| Target::of(&uri)).map(|t| t.port), None, "{bad}");
        }
    }
}
