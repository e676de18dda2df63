//! The command line's HTTP client: one cloud, several endpoints.
//!
//! A request goes to the endpoint that answered last. When that one can't be connected to, or says 503, the next is
//! asked, until each had its turn; so it is when a server can't tell the outcome (504). That is harmless, because every
//! change carries an `Idempotency-Key`, which lets the API give its first answer again, and an upload is known by its
//! digest.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use nexus_env::RngExt;
use nexus_iam::tls::{Clock, public_client_config};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::Target;
use crate::exit::Exit;
use crate::session::{Granted, Session};

const CONNECT: Duration = Duration::from_secs(3);
/// Longer than the longest `Prefer: wait` that the API honours.
const ANSWER: Duration = Duration::from_secs(75);
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// A line of a stream that is longer than this is not one of ours.
const MAX_LINE: usize = 4 << 20;

/// Why there is no answer, or not a good one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no server answers; tried {tried}: {last}")]
    Unreachable { tried: String, last: String },
    #[error("{0}")]
    Refused(Box<Problem>),
    #[error("{endpoint} answered something that this program can't read: {message}")]
    Unreadable { endpoint: String, message: String },
    #[error("{what}: {message}")]
    Setup { what: String, message: String },
}

impl ClientError {
    /// The exit code that tells a script what happened.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Unreachable { .. } => Exit::Unavailable,
            Self::Refused(problem) => match problem.status.as_u16() {
                404 | 410 => Exit::NotFound,
                409 | 412 | 428 => Exit::Conflict,
                408 | 429 | 502..=504 => Exit::Unavailable,
                _ => Exit::Failed,
            },
            Self::Unreadable { .. } | Self::Setup { .. } => Exit::Failed,
        }
    }

    /// The problem document, if the API refused.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused(problem) => Some(problem),
            _ => None,
        }
    }
}

/// An answer that is not a success.
#[derive(Debug, Clone)]
pub struct Problem {
    pub status: StatusCode,
    /// The document (RFC 9457), if it was one.
    pub document: Option<serde_json::Value>,
    pub text: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(document) = &self.document else {
            return write!(f, "the API answered {}: {}", self.status, self.text.trim());
        };
        let text = |key: &str| document.get(key).and_then(|v| v.as_str()).filter(|t| !t.is_empty());
        let said = text("detail").or(text("error_description")).or(text("title"));
        write!(f, "{}", said.unwrap_or("the API refused"))
    }
}

/// The body and headers of one request.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    pub headers: HeaderMap,
    pub body: Option<(HeaderValue, Bytes)>,
    /// How long to wait for the whole answer; `None` is the usual time.
    pub timeout: Option<Duration>,
}

impl Parts {
    pub fn json<T: Serialize>(body: &T) -> Result<Self, ClientError> {
        Self::of_type("application/json", body)
    }

    /// A JSON merge patch (RFC 7396).
    pub fn merge_patch<T: Serialize>(body: &T) -> Result<Self, ClientError> {
        Self::of_type("application/merge-patch+json", body)
    }

    fn of_type<T: Serialize>(content_type: &'static str, body: &T) -> Result<Self, ClientError> {
        let bytes = serde_json::to_vec(body)
            .map_err(|e| ClientError::Setup { what: "writing the request".into(), message: e.to_string() })?;
        Ok(Self { body: Some((HeaderValue::from_static(content_type), bytes.into())), ..Self::default() })
    }

    pub fn header(mut self, name: HeaderName, value: &str) -> Result<Self, ClientError> {
        let value = HeaderValue::from_str(value)
            .map_err(|e| ClientError::Setup { what: format!("header {name}"), message: e.to_string() })?;
        self.headers.insert(name, value);
        Ok(self)
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

/// One server-sent event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SseEvent {
    /// The event's name, `message` if it has none.
    pub event: String,
    pub id: Option<String>,
    pub data: String,
}

fn bearer(token: &str) -> Result<HeaderValue, ClientError> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ClientError::Setup {
        what: "reading the token".into(),
        message: "it holds characters that no token has".into(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// A client of one cloud. Cheap to make, not to be made for every request.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    endpoints: Vec<String>,
    /// The endpoint that answered last.
    preferred: AtomicUsize,
    token: Option<HeaderValue>,
    session: Option<(PathBuf, tokio::sync::Mutex<Option<Session>>)>,
}

impl Client {
    /// The client of the cloud that the context or the environment names.
    pub fn from_context() -> anyhow::Result<Self> {
        Ok(Self::new(&crate::context::target()?)?)
    }

    pub fn new(target: &Target) -> Result<Self, ClientError> {
        let setup = |what: &str, message: String| ClientError::Setup { what: what.to_owned(), message };
        if target.endpoints.is_empty() {
            return Err(setup("finding the cloud", "the context names no endpoint".into()));
        }
        let token = target.token.as_deref().map(bearer).transpose()?;
        let session = target.session.clone().map(|path| (path, tokio::sync::Mutex::new(None)));
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("nexus/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT);
        match &target.ca {
            Some(pem) => {
                let failed = |e: nexus_iam::TlsError| setup("reading the context's authority", e.to_string());
                let roots = nexus_iam::Roots::from_pem(pem).map_err(failed)?;
                let clock = nexus_env::Env::real().clock;
                let config =
                    public_client_config(&roots, &[b"h2", b"http/1.1"], Clock::millis(move || clock.now_millis()))
                        .map_err(failed)?;
                builder = builder.tls_backend_preconfigured((*config).clone());
            }
            // The system's authorities, checked by the provider that this process installs once.
            None => crate::install_crypto(),
        }
        let http = builder.build().map_err(|e| setup("making the HTTP client", chain(&e)))?;
        let (endpoints, preferred) = (target.endpoints.clone(), AtomicUsize::new(0));
        Ok(Self { http, endpoints, preferred, token, session })
    }

    /// What requests carry to say who sends them.
    pub async fn authorization(&self) -> Result<Option<HeaderValue>, ClientError> {
        let Some((path, held)) = &self.session else { return Ok(self.token.clone()) };
        let setup = |e: anyhow::Error| ClientError::Setup { what: "the session".into(), message: format!("{e:#}") };
        let now = nexus_env::Env::real().now_millis();
        let mut held = held.lock().await;
        if held.is_none() {
            *held = Some(Session::read(path).map_err(setup)?);
        }
        if !held.as_ref().is_some_and(|s| s.is_fresh(now)) {
            let _turn = crate::session::lock(path).map_err(setup)?;
            let mut session = Session::read(path).map_err(setup)?;
            if !session.is_fresh(now) {
                let refresh = session.refresh_token.as_deref();
                let refresh = refresh.ok_or_else(|| setup(anyhow::anyhow!("it has ended: sign in again")))?;
                session = self.sign_in(&[("grant_type", "refresh_token"), ("refresh_token", refresh)]).await?;
                session.write(path).map_err(setup)?;
            }
            *held = Some(session);
        }
        held.as_ref().map(|s| bearer(&s.access_token)).transpose()
    }

    /// Asks the token endpoint.
    pub async fn sign_in(&self, form: &[(&str, &str)]) -> Result<Session, ClientError> {
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let body: Vec<String> = form.iter().map(|(k, v)| format!("{k}={}", encode(v))).collect();
        let content_type = HeaderValue::from_static("application/x-www-form-urlencoded");
        let bytes = Bytes::from(body.join("&"));
        let answer = self.attempt_as(None, Method::POST, "/oauth2/token", Parts::default(), Some(ANSWER), |request| {
            Ok(request.header(CONTENT_TYPE, &content_type).body(bytes.clone()))
        });
        let response = answer.await?;
        let endpoint = response.url().to_string();
        let granted: Granted =
            response.json().await.map_err(|e| ClientError::Unreadable { endpoint, message: chain(&e) })?;
        Ok(granted.into_session(nexus_env::Env::real().now_millis()))
    }

    /// Sends a change that must not be repeated: what it answers is told once.
    pub async fn once<T: DeserializeOwned>(&self, method: Method, path: &str, parts: Parts) -> Result<T, ClientError> {
        let (body, parts) = (parts.body.clone(), Parts { body: None, ..parts });
        let response = self.attempt(method, path, parts, Some(ANSWER), |request| {
            Ok(match &body {
                Some((content_type, body)) => request.header(CONTENT_TYPE, content_type).body(body.clone()),
                None => request,
            })
        });
        let response = response.await?;
        let endpoint = response.url().to_string();
        response.json().await.map_err(|e| ClientError::Unreadable { endpoint, message: chain(&e) })
    }

    /// The endpoints in the order in which they would be asked now.
    pub fn endpoints(&self) -> impl Iterator<Item = &str> {
        let first = self.preferred.load(Ordering::Relaxed);
        (0..self.endpoints.len()).map(move |i| self.endpoints[(first + i) % self.endpoints.len()].as_str())
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::GET, path, Parts::default()).await
    }

    /// Sends a JSON merge patch.
    pub async fn patch<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ClientError> {
        self.json(Method::PATCH, path, Parts::merge_patch(body)?).await
    }

    /// Sends a request and reads a JSON answer. An empty answer reads as `null`.
    pub async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, parts: Parts) -> Result<T, ClientError> {
        let response = self.send(method, path, parts).await?;
        let endpoint = response.url().to_string();
        let unreadable = |message: String| ClientError::Unreadable { endpoint: endpoint.clone(), message };
        let body = response.bytes().await.map_err(|e| unreadable(chain(&e)))?;
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body).map_err(|e| unreadable(e.to_string()))
    }

    /// Sends a request; the answer is a success whose body has not been read.
    pub async fn send(&self, method: Method, path: &str, parts: Parts) -> Result<Response, ClientError> {
        self.request(method, path, parts, Some(ANSWER)).await
    }

    /// Sends a request and turns the answer's body into a stream without a deadline.
    pub async fn stream(
        &self,
        method: Method,
        path: &str,
        parts: Parts,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Unpin + use<>, ClientError> {
        let response = self.request(method, path, parts, None).await?;
        let endpoint = response.url().to_string();
        Ok(response
            .bytes_stream()
            .map_err(move |e| ClientError::Unreadable { endpoint: endpoint.clone(), message: chain(&e) }))
    }

    /// Watches server-sent events. The stream ends with the connection: the caller asks again from its last id.
    pub async fn events(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<SseEvent, ClientError>> + Unpin + use<>, ClientError> {
        let mut parts = Parts::default();
        parts.headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let body = self.stream(Method::GET, path, parts).await?;
        let state = (body, SseDecoder::default(), std::collections::VecDeque::new());
        let events = futures::stream::try_unfold(state, |(mut body, mut decoder, mut ready)| async move {
            loop {
                if let Some(event) = ready.pop_front() {
                    return Ok(Some((event, (body, decoder, ready))));
                }
                match body.next().await {
                    Some(chunk) => ready.extend(decoder.feed(&chunk?)?),
                    None => return Ok(None),
                }
            }
        });
        Ok(Box::pin(events))
    }

    /// PUTs `length` bytes that `body` begins to read anew for every endpoint that is tried.
    pub async fn upload(
        &self,
        path: &str,
        length: u64,
        timeout: Duration,
        mut body: impl FnMut() -> Result<reqwest::Body, ClientError>,
    ) -> Result<Response, ClientError> {
        let mut parts = Parts { timeout: Some(timeout), ..Parts::default() };
        parts.headers.insert(reqwest::header::CONTENT_LENGTH, HeaderValue::from(length));
        parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        self.attempt(Method::PUT, path, parts, None, |request| Ok(request.body(body()?))).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        mut parts: Parts,
        deadline: Option<Duration>,
    ) -> Result<Response, ClientError> {
        let body = parts.body.take();
        // With a key, a change whose outcome its server could not tell is asked for again without being done twice.
        if !method.is_safe() {
            with_key(&mut parts.headers);
        }
        self.attempt(method, path, parts, deadline, |request| {
            Ok(match &body {
                Some((content_type, body)) => request.header(CONTENT_TYPE, content_type).body(body.clone()),
                None => request,
            })
        })
        .await
    }

    async fn attempt(
        &self,
        method: Method,
        path: &str,
        parts: Parts,
        deadline: Option<Duration>,
        with_body: impl FnMut(reqwest::RequestBuilder) -> Result<reqwest::RequestBuilder, ClientError>,
    ) -> Result<Response, ClientError> {
        let authorization = Box::pin(self.authorization()).await?;
        self.attempt_as(authorization, method, path, parts, deadline, with_body).await
    }

    async fn attempt_as(
        &self,
        authorization: Option<HeaderValue>,
        method: Method,
        path: &str,
        mut parts: Parts,
        deadline: Option<Duration>,
        mut with_body: impl FnMut(reqwest::RequestBuilder) -> Result<reqwest::RequestBuilder, ClientError>,
    ) -> Result<Response, ClientError> {
        parts.headers.extend(authorization.map(|value| (AUTHORIZATION, value)));
        let deadline = parts.timeout.or(deadline);
        let repeatable = method.is_safe() || parts.headers.contains_key(IDEMPOTENCY_KEY);
        let first = self.preferred.load(Ordering::Relaxed);
        let (mut last, mut said) = (String::new(), None);
        for turn in 0..self.endpoints.len() {
            let index = (first + turn) % self.endpoints.len();
            let mut request = self
                .http
                .request(method.clone(), format!("{}{path}", self.endpoints[index]))
                .headers(parts.headers.clone());
            request = with_body(request)?;
            if let Some(deadline) = deadline {
                request = request.timeout(deadline);
            }
            match request.send().await {
                Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => {
                    let refused = refused(response).await;
                    last = refused.to_string();
                    said = Some(refused);
                }
                // The leader changed while it decided, for one: another server knows the answer, or decides now.
                Ok(response) if response.status() == StatusCode::GATEWAY_TIMEOUT && repeatable => {
                    let refused = refused(response).await;
                    last = refused.to_string();
                    said = Some(refused);
                }
                Ok(response) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return if response.status().is_success() { Ok(response) } else { Err(refused(response).await) };
                }
                Err(e) => last = chain(&e),
            }
        }
        // What a server said tells more than that another can't be reached.
        Err(said.unwrap_or_else(|| ClientError::Unreachable { tried: self.endpoints.join(", "), last }))
    }
}

/// Gives a change its `Idempotency-Key`, unless it has one.
fn with_key(headers: &mut HeaderMap) {
    if !headers.contains_key(IDEMPOTENCY_KEY) {
        let random: [u8; 16] = nexus_env::Env::real().rng.bytes();
        let value = random.iter().map(|b| format!("{b:02x}")).collect::<String>();
        headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_str(&value).expect("hexadecimal is a valid header"));
    }
}

async fn refused(response: Response) -> ClientError {
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    let document = serde_json::from_str(&text).ok().filter(serde_json::Value::is_object);
    ClientError::Refused(Box::new(Problem { status, document, text: text.chars().take(2000).collect() }))
}

/// An error with its causes, because reqwest's own text hides the one that matters.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

/// Reads `text/event-stream` (HTML standard, section 9.2).
#[derive(Default)]
struct SseDecoder {
    rest: Vec<u8>,
    event: SseEvent,
    has_data: bool,
}

impl SseDecoder {
    fn feed(&mut self, chunk: &[u8]) -> Result<Vec<SseEvent>, ClientError> {
        let mut done = Vec::new();
        self.rest.extend_from_slice(chunk);
        while let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                if std::mem::take(&mut self.has_data) {
                    let name = if event.event.is_empty() { "message".to_owned() } else { event.event };
                    done.push(SseEvent { event: name, ..event });
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => self.event.event = value.to_owned(),
                "id" => self.event.id = Some(value.to_owned()),
                "data" => {
                    if std::mem::replace(&mut self.has_data, true) {
                        self.event.data.push('\n');
                    }
                    self.event.data.push_str(value);
                }
                _ => {}
            }
        }
        if self.rest.len() > MAX_LINE || self.event.data.len() > MAX_LINE {
            return Err(ClientError::Unreadable {
                endpoint: "the event stream".into(),
                message: format!("an event of more than {MAX_LINE} bytes"),
            });
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    #[test]
    fn events_are_read_however_they_are_cut() {
        let text = b"event: changed\nid: 7\ndata: {\"a\":\ndata: 1}\n\n: ping\n\ndata:x\n\n";
        for size in 1..text.len() {
            let mut decoder = SseDecoder::default();
            let events: Vec<SseEvent> = text.chunks(size).flat_map(|c| decoder.feed(c).unwrap()).collect();
            let first = SseEvent { event: "changed".into(), id: Some("7".into()), data: "{\"a\":\n1}".into() };
            let second = SseEvent { event: "message".into(), id: None, data: "x".into() };
            assert_eq!(events, [first, second], "in pieces of {size}");
        }
    }

    /// Answers every request with the same bytes.
    fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut buffer = [0; 4096];
                if stream.read(&mut buffer).is_ok() {
                    stream.write_all(answer.as_bytes()).ok();
                }
            }
        });
        addr
    }

    fn dead() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    fn client(addrs: &[SocketAddr]) -> Client {
        let name = |n: &str| n.parse().unwrap();
        Client::new(&Target {
            endpoints: addrs.iter().map(|a| format!("http://{a}")).collect(),
            ca: None,
            token: Some("cnx_x".into()),
            session: None,
            region: name("local"),
            project: name("default"),
            organization: name("default"),
        })
        .unwrap()
    }

    const LOST: &str = "HTTP/1.1 504 Gateway Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n42";
    const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const GONE: &str =
        "HTTP/1.1 404 Not Found\r\ncontent-length: 26\r\nconnection: close\r\n\r\n{\"detail\": \"no such thing\"}";

    #[tokio::test]
    async fn a_dead_or_busy_server_is_passed_over_and_the_good_one_remembered() {
        let good = server(OK);
        let client = client(&[dead(), server(BUSY), good]);
        assert_eq!(client.get::<u32>("/x").await.unwrap(), 42);
        assert_eq!(client.endpoints().next().unwrap(), format!("http://{good}"));
    }

    #[tokio::test]
    async fn what_one_server_lost_another_is_asked() {
        let client = client(&[server(LOST), server(OK)]);
        let done: u32 = client.json(Method::PUT, "/x", Parts::json(&1).unwrap()).await.unwrap();
        assert_eq!(done, 42);
    }

    #[tokio::test]
    async fn no_answer_at_all_is_unavailable_and_names_every_endpoint() {
        let (a, b) = (dead(), dead());
        let error = client(&[a, b]).get::<u32>("/x").await.unwrap_err();
        assert_eq!(error.exit(), Exit::Unavailable);
        assert!(error.to_string().contains(&a.to_string()) && error.to_string().contains(&b.to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_refusal_is_not_asked_again_elsewhere() {
        let error = client(&[server(GONE), server(OK)]).get::<u32>("/x").await.unwrap_err();
        assert_eq!(error.exit(), Exit::NotFound);
        assert_eq!(error.problem().unwrap().status, 404);
    }
}
