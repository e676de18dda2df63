//! The calling side.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use h2::client::ResponseFuture;
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode};
use nexus_env::{Endpoint, Env, RngExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::breaker;
use crate::connection::{Connection, Hold};
use crate::error::{Refusal, WireError};
use crate::frame::{Frame, FrameReader, Kind, end_frame, read_whole, send_frame, send_whole};
use crate::streams::{ByteStream, FrameSink, FrameStream, Reply, Streaming};
use crate::{HEADER_DEADLINE, HEADER_REQUEST, HEADER_VERSION, MAX_MESSAGE, MAX_REFUSAL, PATH_PREFIX, VERSION};

/// How a client behaves. The defaults suit a data centre and a laptop alike.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// For reaching the peer, TLS and the first answer together.
    pub connect_timeout: Duration,
    /// How long a stream, download or duplex call may take until the peer has accepted it.
    pub open_timeout: Duration,
    /// The first wait after a failure; it doubles up to `backoff_max`.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// A connection without calls is closed after this long.
    pub idle_timeout: Duration,
    /// A peer is pinged when calls are open and nothing came from it for this long …
    pub ping_interval: Duration,
    /// … and given up if nothing comes for this long after that.
    pub ping_timeout: Duration,
    pub max_message: usize,
    /// How many bytes a peer may send ahead of the reader, per call and in all.
    pub stream_window: u32,
    pub connection_window: u32,
    /// The protocol version to speak; another than [`VERSION`] is for tests of upgrades.
    pub version: u16,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            open_timeout: Duration::from_secs(10),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(120),
            ping_interval: Duration::from_secs(2),
            ping_timeout: Duration::from_secs(3),
            max_message: MAX_MESSAGE,
            stream_window: 256 * 1024,
            connection_window: 1024 * 1024,
            version: VERSION,
        }
    }
}

/// One peer. Connects when first used; clones share the connection, which closes with the last of them and of the
/// streams that they opened. Dropping a call or a stream cancels it at the peer.
#[derive(Clone)]
pub struct Client {
    connection: Arc<Connection>,
    request_id: Option<Arc<str>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.connection.endpoint())
    }
}

/// Why one attempt of a call failed.
enum Attempt {
    /// The peer has certainly not begun it, and its connection takes no more calls: another may.
    NotSent(Hold, String),
    Failed(WireError),
}

/// An accepted call.
struct Opened {
    body: RecvStream,
    hold: Hold,
}

impl Client {
    pub fn new(env: &Env, endpoint: Endpoint, tls: Arc<rustls::ClientConfig>, options: ClientOptions) -> Self {
        Self { connection: Arc::new(Connection::new(env, endpoint, tls, options)), request_id: None }
    }

    pub fn endpoint(&self) -> &Endpoint {
        self.connection.endpoint()
    }

    /// Whether there is a connection at this moment.
    pub fn is_connected(&self) -> bool {
        self.connection.is_open()
    }

    /// The same peer and connection, with calls made on behalf of request `id` (visible ASCII, at most 128
    /// characters; another text is ignored, and calls get fresh ids).
    pub fn for_request(&self, id: &str) -> Self {
        let fits = !id.is_empty() && id.len() <= 128 && id.bytes().all(|b| b.is_ascii_graphic());
        Self { connection: self.connection.clone(), request_id: fits.then(|| id.into()) }
    }

    /// One question, one answer.
    pub async fn call<Q: Serialize + ?Sized, A: DeserializeOwned>(
        &self,
        method: &str,
        request: &Q,
        deadline: Duration,
    ) -> Result<A, WireError> {
        let body = crate::encode(request).map_err(WireError::Local)?;
        let answer = self.call_bytes(method, body, deadline).await?;
        decode_reply(&answer)
    }

    /// As [`Client::call`], with bodies that are the caller's own bytes.
    pub async fn call_bytes(&self, method: &str, body: Bytes, deadline: Duration) -> Result<Bytes, WireError> {
        self.check_size(body.len())?;
        let until = Instant::now() + deadline;
        let work = async {
            let opened = self.open(method, body, until, Some(until), deadline).await?;
            self.whole_reply(opened).await
        };
        self.guarded(method, until, deadline, work).await
    }

    /// Runs a call under its deadline and its method's circuit breaker.
    async fn guarded<T>(
        &self,
        method: &str,
        until: Instant,
        after: Duration,
        work: impl Future<Output = Result<T, WireError>>,
    ) -> Result<T, WireError> {
        let breakers = self.connection.breakers();
        if !breakers.admits(method, Instant::now()) {
            sleep_until(until.min(Instant::now() + breaker::PAUSE)).await;
            let reason = format!("its last calls of `{method}` went unanswered; it is tried again every second");
            return Err(WireError::Unreachable { endpoint: self.endpoint().clone(), reason, sent: false });
        }
        // The work is polled first, so what it knows about its own deadline wins over the bare fact.
        let result = timeout_at(until, work)
            .await
            .unwrap_or_else(|_| Err(WireError::Deadline { method: method.to_owned(), after }));
        match &result {
            Err(WireError::Deadline { .. }) => {
                if breakers.unanswered(method, Instant::now()) {
                    tracing::warn!(peer = %self.endpoint(), method, "calls go unanswered; leaving the peer alone");
                }
            }
            // A peer that can't be reached is its connection's business.
            Err(WireError::Unreachable { .. } | WireError::Local(_)) => {}
            _ => {
                if breakers.answered(method) {
                    tracing::info!(peer = %self.endpoint(), method, "calls are answered again");
                }
            }
        }
        result
    }

    /// One question, many answers, until either side ends.
    pub async fn stream<Q: Serialize + ?Sized, A: DeserializeOwned>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<Streaming<A>, WireError> {
        Ok(Streaming::new(self.open_reply(method, request).await?))
    }

    /// Downloads a blob.
    pub async fn bytes_stream<Q: Serialize + ?Sized>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<ByteStream, WireError> {
        Ok(ByteStream::from_reply(self.open_reply(method, request).await?))
    }

    /// Uploads a blob. There is no deadline on the whole; a peer that stops answering is noticed.
    pub async fn upload<Q, A, S>(&self, method: &str, request: &Q, body: S) -> Result<A, WireError>
    where
        Q: Serialize + ?Sized,
        A: DeserializeOwned,
        S: futures::Stream<Item = std::io::Result<Bytes>> + Send,
    {
        let (response, mut sink, hold) = self.open_frames(method, request).await?;
        let mut body = std::pin::pin!(body);
        let mut response = std::pin::pin!(response);
        let max = self.connection.options().max_message;
        let send = async {
            while let Some(piece) = body.next().await {
                let mut piece = piece.map_err(|e| WireError::Local(e.to_string()))?;
                while !piece.is_empty() {
                    let payload = piece.split_to(piece.len().min(max));
                    let frame = Frame { kind: Kind::Item, channel: 0, payload };
                    if send_frame(&mut sink, frame, false).await.is_err() {
                        // The peer has heard enough; its answer says why.
                        return Ok(());
                    }
                }
            }
            let _ = send_whole(&mut sink, end_frame(), true).await;
            Ok::<_, WireError>(())
        };
        let mut send = std::pin::pin!(send);
        // The answer may come before the end of the body: a refusal usually does.
        let early = tokio::select! {
            biased;
            answered = &mut response => Some(answered),
            sent = &mut send => { sent?; None }
        };
        let answered = match early {
            Some(answered) => answered,
            None => response.await,
        };
        let answered = answered.map_err(|e| self.broken(&hold, &e))?;
        let body = self.accepted(answered, method, Duration::ZERO).await?;
        let answer = self.whole_reply(Opened { body, hold }).await?;
        decode_reply(&answer)
    }

    /// Frames both ways.
    pub async fn duplex<Q: Serialize + ?Sized>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<(FrameSink, FrameStream), WireError> {
        let limit = self.connection.options().open_timeout;
        let open = async {
            let (response, sink, hold) = self.open_frames(method, request).await?;
            let answered = response.await.map_err(|e| self.broken(&hold, &e))?;
            Ok((self.accepted(answered, method, limit).await?, sink, hold))
        };
        let (body, sink, hold) = tokio::time::timeout(limit, open)
            .await
            .unwrap_or_else(|_| Err(WireError::Deadline { method: method.to_owned(), after: limit }))?;
        let sink = FrameSink::direct(sink, self.connection.options().max_message);
        Ok((sink, FrameStream::from_reply(self.reply(Opened { body, hold }, method))))
    }

    async fn open_reply<Q: Serialize + ?Sized>(&self, method: &str, request: &Q) -> Result<Reply, WireError> {
        let body = crate::encode(request).map_err(WireError::Local)?;
        self.check_size(body.len())?;
        let limit = self.connection.options().open_timeout;
        let until = Instant::now() + limit;
        let opened = self.guarded(method, until, limit, self.open(method, body, until, None, limit)).await?;
        Ok(self.reply(opened, method))
    }

    /// Begins a call whose request is frames, and sends the message.
    async fn open_frames<Q: Serialize + ?Sized>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<(ResponseFuture, SendStream<Bytes>, Hold), WireError> {
        let message = crate::encode(request).map_err(WireError::Local)?;
        self.check_size(message.len())?;
        let limit = self.connection.options().open_timeout;
        let until = Instant::now() + limit;
        let open = async {
            let (response, mut sink, hold) =
                self.retrying(|| async { self.begin(method, until, None, false).await }).await?;
            let first = Frame { kind: Kind::Item, channel: 0, payload: message };
            // If the peer does not want it, its answer says why.
            let _ = send_frame(&mut sink, first, false).await;
            Ok((response, sink, hold))
        };
        timeout_at(until, open)
            .await
            .unwrap_or_else(|_| Err(WireError::Deadline { method: method.to_owned(), after: limit }))
    }

    /// Makes a call whose request is one message, up to the peer's acceptance.
    async fn open(
        &self,
        method: &str,
        body: Bytes,
        until: Instant,
        deadline: Option<Instant>,
        after: Duration,
    ) -> Result<Opened, WireError> {
        self.retrying(|| async {
            let (response, mut sink, hold) = self.begin(method, until, deadline, body.is_empty()).await?;
            if !body.is_empty() {
                // If the peer does not want it, its answer says why.
                let _ = send_whole(&mut sink, body.clone(), true).await;
            }
            match response.await {
                Ok(answered) => {
                    let body = self.accepted(answered, method, after).await.map_err(Attempt::Failed)?;
                    Ok(Opened { body, hold })
                }
                Err(e) if never_begun(&e) => Err(Attempt::NotSent(hold, e.to_string())),
                Err(e) => Err(Attempt::Failed(self.broken(&hold, &e))),
            }
        })
        .await
    }

    /// Runs `attempt` again, once and on another connection, if the first was certainly never begun.
    async fn retrying<T, F: Future<Output = Result<T, Attempt>>>(
        &self,
        attempt: impl Fn() -> F,
    ) -> Result<T, WireError> {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(Attempt::Failed(e)) => return Err(e),
            Err(Attempt::NotSent(hold, _)) => self.connection.retire(&hold),
        }
        match attempt().await {
            Ok(done) => Ok(done),
            Err(Attempt::Failed(e)) => Err(e),
            Err(Attempt::NotSent(hold, reason)) => {
                self.connection.retire(&hold);
                Err(WireError::Unreachable { endpoint: self.endpoint().clone(), reason, sent: false })
            }
        }
    }

    /// Gets a connection and sends the headers.
    async fn begin(
        &self,
        method: &str,
        until: Instant,
        deadline: Option<Instant>,
        end: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>, Hold), Attempt> {
        let lease = self.connection.lease(until).await.map_err(Attempt::Failed)?;
        let mut send = match lease.send.ready().await {
            Ok(send) => send,
            Err(e) => return Err(Attempt::NotSent(lease.hold, e.to_string())),
        };
        let request = self.headers(method, deadline).map_err(Attempt::Failed)?;
        match send.send_request(request, end) {
            Ok((response, sink)) => Ok((response, sink, lease.hold)),
            Err(e) => Err(Attempt::NotSent(lease.hold, e.to_string())),
        }
    }

    fn headers(&self, method: &str, deadline: Option<Instant>) -> Result<Request<()>, WireError> {
        let id = match &self.request_id {
            Some(id) => id.clone(),
            None => format!("{:016x}", self.connection.env().rng.u64()).into(),
        };
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("https://nexus.internal{PATH_PREFIX}{method}"))
            .header(HEADER_VERSION, self.connection.options().version)
            .header(HEADER_REQUEST, &*id);
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            request = request.header(HEADER_DEADLINE, u64::try_from(left).unwrap_or(u64::MAX).max(1));
        }
        request.body(()).map_err(|e| WireError::Local(format!("`{method}` is no method's name: {e}")))
    }

    /// The body of a reply that is not a refusal.
    async fn accepted(
        &self,
        answered: http::Response<RecvStream>,
        method: &str,
        after: Duration,
    ) -> Result<RecvStream, WireError> {
        let (head, body) = answered.into_parts();
        if head.status == StatusCode::OK {
            return Ok(body);
        }
        let refusal = match read_whole(body, MAX_REFUSAL).await {
            Ok(bytes) => crate::decode::<Refusal>(&bytes),
            Err(e) => Err(e.to_string()),
        };
        Err(match refusal {
            Ok(refusal) => WireError::from_refusal(refusal, method, after, self.connection.options().version),
            Err(e) => WireError::Protocol(format!("status {} with a body that is no refusal: {e}", head.status)),
        })
    }

    async fn whole_reply(&self, opened: Opened) -> Result<Bytes, WireError> {
        let Opened { body, hold } = opened;
        read_whole(body, self.connection.options().max_message)
            .await
            .map_err(|e| WireError::from_body(e, self.endpoint(), |e| hold.broken(e)))
    }

    fn reply(&self, opened: Opened, method: &str) -> Reply {
        let options = self.connection.options();
        Reply {
            frames: FrameReader::new(opened.body, options.max_message),
            hold: opened.hold,
            _connection: self.connection.clone(),
            endpoint: self.endpoint().clone(),
            method: method.to_owned(),
            version: options.version,
        }
    }

    fn broken(&self, hold: &Hold, error: &h2::Error) -> WireError {
        let reason = hold.broken(error);
        WireError::Unreachable { endpoint: self.endpoint().clone(), reason, sent: !never_begun(error) }
    }

    fn check_size(&self, length: usize) -> Result<(), WireError> {
        let limit = self.connection.options().max_message;
        if length > limit { Err(WireError::TooLarge { limit }) } else { Ok(()) }
    }
}

/// Whether an error promises that the peer did nothing (RFC 9113, section 8.7).
fn never_begun(error: &h2::Error) -> bool {
    error.is_remote()
        && ((error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM))
            || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR)))
}

fn decode_reply<A: DeserializeOwned>(answer: &[u8]) -> Result<A, WireError> {
    crate::decode(answer).map_err(|e| WireError::Protocol(format!("the answer can't be read: {e}")))
}
