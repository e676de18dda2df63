//! The way to other regions' APIs: a request is passed on by HTTPS to one of the region's servers, as the global group
//! lists them, and checked against the fleet's own authority.
//!
//! What never reached a server is sent to the next; so is what broke off and may be sent twice (RFC 9110, section 9.2.2, or
//! with an `Idempotency-Key`). Answers are passed back as they come, and an upgraded connection becomes a pipe.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{HeaderName, HeaderValue, Method, StatusCode, Uri, Version};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use nexus_api::Remote;
use nexus_control::view::View;
use nexus_env::{Endpoint, Env};
use nexus_model::{ApiError, Code, Name};
use rustls_pki_types::ServerName;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

const CONNECT: Duration = Duration::from_secs(3);
/// For the head of an answer, beside what `Prefer: wait` asks for.
const ANSWER: Duration = Duration::from_secs(15);
/// The longest `Prefer: wait` that an API honours.
const LONGEST_WAIT: u64 = 300;
/// The API takes bodies of 1 MiB; what is larger is refused there.
const MAX_BODY: usize = (1 << 20) + 1;
/// Idle connections kept to one server.
const IDLE: usize = 32;

type Sender = SendRequest<Full<Bytes>>;

pub struct Remotes {
    here: Name,
    view: View,
    env: Env,
    tls: TlsConnector,
    idle: Mutex<BTreeMap<String, Vec<Sender>>>,
    /// What carries connections; all end with this.
    carriers: Mutex<JoinSet<()>>,
    stop: CancellationToken,
}

/// Why a server did not answer.
struct Failed {
    why: String,
    /// The request may have reached it.
    sent: bool,
}

impl Failed {
    fn before(why: impl std::fmt::Display) -> Self {
        Self { why: why.to_string(), sent: false }
    }
}

/// One request, read whole, so that it can be sent again.
struct Passing {
    method: Method,
    target: Uri,
    headers: http::HeaderMap,
    body: Bytes,
    deadline: Duration,
    upgrade: bool,
}

impl Remotes {
    pub fn new(here: &Name, view: View, env: Env, tls: Arc<rustls::ClientConfig>, stop: CancellationToken) -> Self {
        Self {
            here: here.clone(),
            view,
            env,
            tls: TlsConnector::from(tls),
            idle: Mutex::default(),
            carriers: Mutex::default(),
            stop,
        }
    }

    /// The APIs of a region's servers; the one that answered last first.
    fn servers(&self, region: &Name) -> Vec<String> {
        let mut servers: Vec<String> = self.view.read(|world| {
            let region = world.fleet().regions.get(None, region);
            region.into_iter().flat_map(|r| r.status.servers.iter().map(|s| s.api.clone())).collect()
        });
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        servers.sort_by_key(|api| !idle.get(api).is_some_and(|senders| senders.iter().any(Sender::is_ready)));
        servers
    }

    fn carry(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut carriers = self.carriers.lock().unwrap_or_else(PoisonError::into_inner);
        while carriers.try_join_next().is_some() {}
        let stop = self.stop.clone();
        carriers.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    fn reuse(&self, api: &str) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let senders = idle.get_mut(api)?;
        senders.retain(|sender| !sender.is_closed());
        let at = senders.iter().position(Sender::is_ready)?;
        Some(senders.swap_remove(at))
    }

    fn keep(&self, api: &str, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let senders = idle.entry(api.to_owned()).or_default();
        if senders.len() < IDLE {
            senders.push(sender);
        }
    }

    async fn connect(&self, api: &Uri) -> Result<Sender, Failed> {
        let host = api.host().ok_or_else(|| Failed::before(format!("{api} has no host")))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = api.port_u16().unwrap_or(443);
        let mut addresses = tokio::net::lookup_host((host.as_str(), port)).await.map_err(Failed::before)?;
        let address: SocketAddr = addresses.next().ok_or_else(|| Failed::before(format!("{host} has no address")))?;
        let stream = self.env.transport.connect(&Endpoint::Tcp(address)).await.map_err(Failed::before)?;
        let name = ServerName::try_from(host.clone()).map_err(Failed::before)?;
        let stream = self.tls.connect(name, stream).await.map_err(Failed::before)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(Failed::before)?;
        self.carry(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to another region ended badly");
            }
        });
        Ok(sender)
    }

    async fn ask(&self, api: &str, passing: &Passing) -> Result<http::Response<hyper::body::Incoming>, Failed> {
        let uri: Uri = api.parse().map_err(|e| Failed::before(format!("{api}: {e}")))?;
        let mut sender = match self.reuse(api) {
            Some(sender) => sender,
            None => tokio::time::timeout(CONNECT, self.connect(&uri))
                .await
                .map_err(|_| Failed::before(format!("no connection within {} s", CONNECT.as_secs())))??,
        };
        let mut request = http::Request::new(Full::new(passing.body.clone()));
        *request.method_mut() = passing.method.clone();
        *request.uri_mut() = passing.target.clone();
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = passing.headers.clone();
        let authority = uri.authority().map_or("", http::uri::Authority::as_str);
        let host = HeaderValue::try_from(authority).map_err(Failed::before)?;
        request.headers_mut().insert(HOST, host);
        let answer = tokio::time::timeout(passing.deadline, sender.try_send_request(request)).await;
        match answer {
            Ok(Ok(answer)) => {
                if !passing.upgrade {
                    self.keep(api, sender);
                }
                Ok(answer)
            }
            Ok(Err(mut error)) => {
                // A request that comes back was never written.
                let sent = error.take_message().is_none();
                Err(Failed { why: error.into_error().to_string(), sent })
            }
            Err(_) => Err(Failed { why: format!("no answer within {} s", passing.deadline.as_secs()), sent: true }),
        }
    }

    async fn try_each(
        &self,
        region: &Name,
        passing: &Passing,
    ) -> Result<http::Response<hyper::body::Incoming>, ApiError> {
        let again = passing.headers.contains_key("idempotency-key") || passing.method.is_idempotent();
        let mut last = "the fleet knows none of its servers".to_owned();
        for api in self.servers(region) {
            match self.ask(&api, passing).await {
                Ok(answer) => return Ok(answer),
                Err(Failed { why, sent }) if sent && !again => {
                    let detail = format!(
                        "region {region}: {why}; the change may have been committed: read it, or send it with an \
                         Idempotency-Key"
                    );
                    return Err(ApiError::new(Code::Timeout, detail));
                }
                Err(Failed { why, .. }) => last = format!("{api}: {why}"),
            }
        }
        let detail = format!("no server of region {region} answers from here ({last}): try again, or ask it directly");
        Err(ApiError::new(Code::Unavailable, detail))
    }
}

/// Headers that speak of one connection alone (RFC 9110, section 7.6.1).
const HOPS: [&str; 7] =
    ["keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "connection", "upgrade"];

fn strip(headers: &mut http::HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOPS {
        headers.remove(name);
    }
}

/// How long the head of the answer may take: what the client would wait, and a little.
fn patience(headers: &http::HeaderMap) -> Duration {
    let prefer = headers.get_all("prefer").iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    let wait = prefer.filter_map(|p| p.trim().strip_prefix("wait=")?.parse::<u64>().ok()).max().unwrap_or(0);
    ANSWER + Duration::from_secs(wait.min(LONGEST_WAIT))
}

#[async_trait]
impl Remote for Remotes {
    fn regions(&self) -> Vec<Name> {
        self.view.read(|world| {
            let all = world.fleet().regions.live.keys().map(|(_, name)| name.clone());
            all.filter(|name| *name != self.here).collect()
        })
    }

    async fn pass(&self, region: &Name, mut request: Request) -> Result<Response, ApiError> {
        let protocol = request.headers().get(UPGRADE).cloned().filter(|_| request.version() == Version::HTTP_11);
        let client = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        let mut headers = parts.headers;
        strip(&mut headers);
        headers.remove(HOST);
        if let Some(protocol) = &protocol {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, protocol.clone());
        }
        let body = Limited::new(body, MAX_BODY).collect().await;
        let body = body.map_err(|_| ApiError::new(Code::TooLarge, "a body has at most 1048576 bytes"))?.to_bytes();
        let target = parts.uri.path_and_query().map_or("/", |p| p.as_str());
        let target = target.parse().map_err(|e| ApiError::new(Code::BadRequest, format!("the path: {e}")))?;
        let deadline = patience(&headers);
        let passing = Passing { method: parts.method, target, headers, body, deadline, upgrade: protocol.is_some() };
        let mut answer = self.try_each(region, &passing).await?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(client) = client
        {
            let server = hyper::upgrade::on(&mut answer);
            self.carry(async move {
                let Ok((client, server)) = futures::future::try_join(client, server).await else { return };
                let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
            return Ok(answer.map(|_| Body::empty()));
        }
        strip(answer.headers_mut());
        Ok(answer.map(Body::new))
    }
}
