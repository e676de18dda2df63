//! gRPC over HTTP/2, as much of it as etcd needs: one connection at a time to one of several endpoints.
//!
//! A call is a POST whose body is one message behind five bytes (a flag and a length), answered by the same and by
//! trailers with `grpc-status`. What a caller may conclude from a failure is kept apart exactly: [`GrpcError::NotSent`]
//! and a [`GrpcError::Status`] that etcd gives before proposing mean that nothing happened; all else may have happened.
//!
//! Any trouble with a connection makes the next call use the next endpoint. With a user name, a token is fetched first
//! and again when etcd no longer takes it (a refused token means that nothing happened, so the call is repeated).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request};
use nexus_env::{BoxStream, Endpoint, Env};
use prost::Message;
use rustls_pki_types::ServerName;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::proto::{AuthenticateRequest, AuthenticateResponse};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// etcd's own answers stay below its request limit, but a page of a range may hold many values.
const ANSWER_LIMIT: usize = 256 << 20;
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// One member of an etcd cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdEndpoint {
    /// The name that its certificate is checked against.
    pub host: String,
    pub at: Endpoint,
}

impl std::fmt::Display for EtcdEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.at.to_string();
        let address = at.strip_prefix("tcp:").unwrap_or(&at);
        if address.starts_with(&*self.host) || address.starts_with(&format!("[{}]", self.host)) {
            f.write_str(address)
        } else {
            write!(f, "{} at {address}", self.host)
        }
    }
}

/// A user of an etcd with authentication.
#[derive(Clone)]
pub struct Login {
    pub user: String,
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({})", self.user)
    }
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrpcError {
    /// The request certainly reached nobody.
    #[error("etcd can't be reached: {0}")]
    NotSent(String),
    /// The request may have been carried out.
    #[error("etcd's answer was lost: {0}")]
    Lost(String),
    /// etcd answered, with a failure.
    #[error("etcd answered {code}: {message}")]
    Status { code: u32, message: String },
}

/// The status codes of gRPC that are told apart here.
pub mod code {
    pub const INVALID_ARGUMENT: u32 = 3;
    pub const NOT_FOUND: u32 = 5;
    pub const PERMISSION_DENIED: u32 = 7;
    pub const RESOURCE_EXHAUSTED: u32 = 8;
    pub const FAILED_PRECONDITION: u32 = 9;
    pub const OUT_OF_RANGE: u32 = 11;
    pub const UNIMPLEMENTED: u32 = 12;
    pub const UNAUTHENTICATED: u32 = 16;
}

impl GrpcError {
    /// True if the request was certainly not carried out.
    pub fn nothing_happened(&self) -> bool {
        match self {
            Self::NotSent(_) => true,
            Self::Lost(_) => false,
            // These are given when a request is checked, before it is proposed.
            Self::Status { code, .. } => matches!(
                *code,
                code::INVALID_ARGUMENT
                    | code::NOT_FOUND
                    | code::PERMISSION_DENIED
                    | code::RESOURCE_EXHAUSTED
                    | code::FAILED_PRECONDITION
                    | code::OUT_OF_RANGE
                    | code::UNIMPLEMENTED
                    | code::UNAUTHENTICATED
            ),
        }
    }

    /// etcd has no room.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Status { code: code::RESOURCE_EXHAUSTED, message } if message.contains("space exceeded"))
    }

    /// True if another try, perhaps at another endpoint, may do better.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::NotSent(_) | Self::Lost(_) => true,
            Self::Status { code, message } => {
                !self.nothing_happened() || (*code == code::RESOURCE_EXHAUSTED && message.contains("too many requests"))
            }
        }
    }

    /// The token has expired, or permissions have changed since it was given.
    fn wants_login(&self) -> bool {
        match self {
            Self::Status { code: code::UNAUTHENTICATED, .. } => true,
            Self::Status { code: code::INVALID_ARGUMENT, message } => {
                message.contains("revision of auth store is old") || message.contains("user name is empty")
            }
            _ => false,
        }
    }
}

#[derive(Default)]
struct State {
    open: Option<(u64, SendRequest<Bytes>)>,
    generation: u64,
    /// Which endpoint is tried next.
    turn: usize,
    token: Option<String>,
    tasks: JoinSet<()>,
}

/// The way to a cluster.
pub struct Channel {
    env: Env,
    endpoints: Vec<EtcdEndpoint>,
    tls: Option<Arc<tokio_rustls::rustls::ClientConfig>>,
    login: Option<Login>,
    state: Mutex<State>,
    /// Held by whoever makes a connection or fetches a token, so that others wait instead of doing the same.
    making: tokio::sync::Mutex<()>,
}

impl Channel {
    /// `endpoints` is not empty.
    pub fn new(
        env: Env,
        endpoints: Vec<EtcdEndpoint>,
        tls: Option<Arc<tokio_rustls::rustls::ClientConfig>>,
        login: Option<Login>,
    ) -> Self {
        Self { env, endpoints, tls, login, state: Mutex::new(State::default()), making: tokio::sync::Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection out of use; the next call goes to the next endpoint.
    fn retire(&self, generation: u64) {
        let mut state = self.lock();
        if state.open.as_ref().is_some_and(|(open, _)| *open == generation) {
            state.open = None;
            state.turn += 1;
        }
    }

    async fn connection(&self, until: Instant) -> Result<(u64, SendRequest<Bytes>), GrpcError> {
        let _making = loop {
            if let Some(open) = self.lock().open.clone() {
                return Ok(open);
            }
            let late = |_| GrpcError::NotSent("connecting takes longer than the call may".into());
            let making = timeout_at(until, self.making.lock()).await.map_err(late)?;
            if self.lock().open.is_none() {
                break making;
            }
        };
        let turn = self.lock().turn;
        let endpoint = &self.endpoints[turn % self.endpoints.len()];
        let limit = until.min(Instant::now() + CONNECT_LIMIT);
        match timeout_at(limit, self.connect(endpoint)).await {
            Ok(Ok((send, connection))) => {
                let mut state = self.lock();
                state.generation += 1;
                let open = (state.generation, send);
                state.open = Some(open.clone());
                while state.tasks.try_join_next().is_some() {}
                state.tasks.spawn(async move {
                    // Whoever has a call on it sees the same error.
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a connection to etcd ended");
                    }
                });
                Ok(open)
            }
            other => {
                self.lock().turn += 1;
                let why = match other {
                    Ok(Err(why)) => why,
                    _ => "no connection in time".to_owned(),
                };
                Err(GrpcError::NotSent(format!("{endpoint}: {why}")))
            }
        }
    }

    async fn connect(
        &self,
        endpoint: &EtcdEndpoint,
    ) -> Result<(SendRequest<Bytes>, h2::client::Connection<BoxStream, Bytes>), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let plain = self.env.transport.connect(&endpoint.at).await.map_err(|e| text(&e))?;
        let stream: BoxStream = match &self.tls {
            None => plain,
            Some(config) => {
                let name = ServerName::try_from(endpoint.host.clone()).map_err(|e| text(&e))?;
                let connector = tokio_rustls::TlsConnector::from(config.clone());
                Box::new(connector.connect(name, plain).await.map_err(|e| text(&e))?)
            }
        };
        h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .enable_push(false)
            .max_send_buffer_size(4 << 20)
            .handshake(stream)
            .await
            .map_err(|e| text(&e))
    }

    async fn token(&self, until: Instant) -> Result<Option<String>, GrpcError> {
        let Some(login) = &self.login else { return Ok(None) };
        if let Some(token) = self.lock().token.clone() {
            return Ok(Some(token));
        }
        let request = AuthenticateRequest { name: login.user.clone(), password: login.password.clone() };
        let answer: AuthenticateResponse =
            self.once("/etcdserverpb.Auth/Authenticate", &request, None, until).await.map_err(|e| match e {
                // Nothing was asked for yet but the token.
                GrpcError::Lost(why) => GrpcError::NotSent(why),
                other => other,
            })?;
        self.lock().token = Some(answer.token.clone());
        Ok(Some(answer.token))
    }

    /// One request and one answer.
    pub async fn call<Q: Message, A: Message + Default>(
        &self,
        path: &'static str,
        request: &Q,
        until: Instant,
    ) -> Result<A, GrpcError> {
        let token = self.token(until).await?;
        match self.once(path, request, token.as_deref(), until).await {
            Err(e) if self.login.is_some() && e.wants_login() => {
                self.lock().token = None;
                let token = self.token(until).await?;
                self.once(path, request, token.as_deref(), until).await
            }
            other => other,
        }
    }

    async fn once<Q: Message, A: Message + Default>(
        &self,
        path: &'static str,
        request: &Q,
        token: Option<&str>,
        until: Instant,
    ) -> Result<A, GrpcError> {
        let (generation, send) = self.connection(until).await?;
        let result = match timeout_at(until, unary(send, path, request, token)).await {
            Ok(result) => result,
            Err(_) => Err(GrpcError::Lost("no answer in time".into())),
        };
        if let Err(e) = &result
            && e.is_passing()
        {
            self.retire(generation);
        }
        result
    }

    /// Opens a stream of requests and answers.
    pub async fn stream(&self, path: &'static str, until: Instant) -> Result<Duplex, GrpcError> {
        let token = self.token(until).await?;
        let (generation, send) = self.connection(until).await?;
        let opened = timeout_at(until, async {
            let mut send = send.ready().await.map_err(|e| GrpcError::NotSent(e.to_string()))?;
            let request = head(path, token.as_deref())?;
            send.send_request(request, false).map_err(|e| GrpcError::NotSent(e.to_string()))
        })
        .await
        .unwrap_or_else(|_| Err(GrpcError::NotSent("no stream in time".into())));
        match opened {
            Ok((response, requests)) => Ok(Duplex { requests, response: Some(response), body: None, generation }),
            Err(e) => {
                self.retire(generation);
                Err(e)
            }
        }
    }

    /// Says that a stream broke, so that the next call or stream goes elsewhere.
    pub fn broke(&self, stream: &Duplex) {
        self.retire(stream.generation);
        // It may have been the token's fault.
        self.lock().token = None;
    }

    /// Ends all connections.
    pub fn close(&self) {
        let mut state = self.lock();
        state.open = None;
        state.tasks.abort_all();
    }
}

fn head(path: &str, token: Option<&str>) -> Result<Request<()>, GrpcError> {
    let mut builder = Request::post(format!("http://etcd{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        // A member that has lost its leader says so instead of waiting.
        .header("hasleader", "true");
    if let Some(token) = token {
        builder = builder.header("token", token);
    }
    builder.body(()).map_err(|e| GrpcError::NotSent(e.to_string()))
}

fn frame<Q: Message>(request: &Q) -> Bytes {
    let length = request.encoded_len();
    let mut out = BytesMut::with_capacity(5 + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    request.encode(&mut out).expect("the buffer grows as needed");
    out.freeze()
}

fn status(headers: &HeaderMap) -> Option<Result<(), GrpcError>> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let code: u32 = text("grpc-status")?.parse().unwrap_or(2);
    if code == 0 {
        return Some(Ok(()));
    }
    let message = text("grpc-message").unwrap_or_default();
    Some(Err(GrpcError::Status { code, message: unescape(message) }))
}

/// gRPC writes what is no printable ASCII as `%XX`.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|h| std::str::from_utf8(h).ok()).and_then(|h| u8::from_str_radix(h, 16).ok());
        match hex {
            Some(byte) if first == b'%' => {
                out.push(byte);
                rest = &after[2..];
            }
            _ => {
                out.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn lost(error: &h2::Error) -> GrpcError {
    // A refused stream was not processed (RFC 9113, section 8.7).
    if error.reason() == Some(h2::Reason::REFUSED_STREAM) {
        GrpcError::NotSent(error.to_string())
    } else {
        GrpcError::Lost(error.to_string())
    }
}

async fn unary<Q: Message, A: Message + Default>(
    send: SendRequest<Bytes>,
    path: &str,
    request: &Q,
    token: Option<&str>,
) -> Result<A, GrpcError> {
    let mut send = send.ready().await.map_err(|e| GrpcError::NotSent(e.to_string()))?;
    let (response, mut body) =
        send.send_request(head(path, token)?, false).map_err(|e| GrpcError::NotSent(e.to_string()))?;
    body.send_data(frame(request), true).map_err(|e| lost(&e))?;
    let response = response.await.map_err(|e| lost(&e))?;
    if let Some(status) = status(response.headers()) {
        status?;
    }
    if !response.status().is_success() {
        return Err(GrpcError::Lost(format!("HTTP status {}", response.status())));
    }
    let mut answer = Messages::new(response.into_body());
    let message = answer.next().await?;
    // The trailers may bring a failure after all.
    let rest = answer.next().await?;
    match (message, rest) {
        (Some(message), None) => A::decode(message).map_err(|e| GrpcError::Lost(e.to_string())),
        _ => Err(GrpcError::Lost("not exactly one answer came".into())),
    }
}

/// The messages of a body.
struct Messages {
    body: RecvStream,
    buffer: BytesMut,
    done: bool,
}

impl Messages {
    fn new(body: RecvStream) -> Self {
        Self { body, buffer: BytesMut::new(), done: false }
    }

    fn take(&mut self) -> Result<Option<Bytes>, GrpcError> {
        let Some(head) = self.buffer.get(..5) else { return Ok(None) };
        if head[0] != 0 {
            return Err(GrpcError::Lost("the answer is compressed".into()));
        }
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > ANSWER_LIMIT {
            return Err(GrpcError::Lost(format!("an answer of {length} bytes")));
        }
        if self.buffer.len() < 5 + length {
            return Ok(None);
        }
        self.buffer.advance(5);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }

    /// The next message; `None` after the last, when the status is good. Cancel safe.
    async fn next(&mut self) -> Result<Option<Bytes>, GrpcError> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            if self.done {
                return Ok(None);
            }
            match self.body.data().await {
                Some(Ok(data)) => {
                    // The window is only a matter of this connection's own accounting.
                    let _ = self.body.flow_control().release_capacity(data.len());
                    self.buffer.extend_from_slice(&data);
                }
                Some(Err(e)) => return Err(lost(&e)),
                None => {
                    let trailers = self.body.trailers().await.map_err(|e| lost(&e))?;
                    self.done = true;
                    match trailers.as_ref().and_then(status) {
                        Some(status) => status?,
                        None => return Err(GrpcError::Lost("the answer has no status".into())),
                    }
                }
            }
        }
    }
}

/// A stream of requests and answers. Dropping it cancels the call.
pub struct Duplex {
    requests: SendStream<Bytes>,
    response: Option<h2::client::ResponseFuture>,
    body: Option<Messages>,
    generation: u64,
}

impl Duplex {
    pub fn send<Q: Message>(&mut self, request: &Q) -> Result<(), GrpcError> {
        self.requests.send_data(frame(request), false).map_err(|e| lost(&e))
    }

    /// The next answer; `None` when etcd has ended the stream. Cancel safe.
    pub async fn next<A: Message + Default>(&mut self) -> Result<Option<A>, GrpcError> {
        let body = match &mut self.body {
            Some(body) => body,
            empty => {
                let Some(response) = &mut self.response else { return Ok(None) };
                let response = response.await.map_err(|e| lost(&e))?;
                self.response = None;
                if let Some(status) = status(response.headers()) {
                    status?;
                }
                empty.insert(Messages::new(response.into_body()))
            }
        };
        match body.next().await? {
            Some(message) => A::decode(message).map(Some).map_err(|e| GrpcError::Lost(e.to_string())),
            None => Ok(None),
        }
    }

    /// The next answer, within `limit`.
    pub async fn next_within<A: Message + Default>(&mut self, limit: Duration) -> Result<Option<A>, GrpcError> {
        timeout(limit, self.next()).await.unwrap_or_else(|_| Err(GrpcError::Lost("silence".into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_statuses_are_unescaped() {
        assert_eq!(unescape("etcdserver: 100%25 %C3%A9"), "etcdserver: 100% é");
        assert_eq!(unescape("50%"), "50%");
        assert_eq!(unescape("%zz"), "%zz");
    }

    #[test]
    fn only_what_was_refused_before_it_was_proposed_did_not_happen() {
        let status = |code, message: &str| GrpcError::Status { code, message: message.into() };
        assert!(GrpcError::NotSent(String::new()).nothing_happened());
        assert!(status(code::INVALID_ARGUMENT, "too many operations").nothing_happened());
        assert!(status(code::RESOURCE_EXHAUSTED, "mvcc: database space exceeded").nothing_happened());
        assert!(!status(14, "etcdserver: request timed out").nothing_happened());
        assert!(!status(2, "something").nothing_happened());
        assert!(!GrpcError::Lost(String::new()).nothing_happened());
        assert!(!status(code::RESOURCE_EXHAUSTED, "mvcc: database space exceeded").is_passing());
        assert!(status(code::RESOURCE_EXHAUSTED, "etcdserver: too many requests").is_passing());
    }
}
