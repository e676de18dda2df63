//! Serving one instance: HTTP/1.1 and HTTP/2 (with prior knowledge) on its listener, a fresh guest for every request.
//!
//! A request waits for its turn (the instance's concurrency, then one of the executor's slots), gets a guest, and is
//! answered as soon as the guest has set a response; bodies stream both ways while it goes on. Its whole life, waiting
//! included, has one deadline. A guest that fails before it has answered is answered for; one that fails later has its
//! connection cut, so that a client can't take a part for the whole.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use nexus_model::{Timestamp, Uid};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error as HttpError, WasiHttpView};

use super::engine::{Guest, Memory, Program};
use super::log::{Channel, Log};
use super::outgoing::{Outgoing, Way};
use super::ticker::Ticker;

/// Connections of one instance; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 4096;

/// An HTTP/1.1 connection is closed when the head of its next request has not come for so long. Longer than any gateway
/// keeps an idle connection, so that none writes into a closing one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);

/// How long accepting rests when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The longest account of a trap in a log, in bytes.
const MAX_TRAP: usize = 4096;

/// What all instances of an executor share.
pub(super) struct Shared {
    pub slots: Arc<Semaphore>,
    pub ticker: Arc<Ticker>,
    pub outgoing: Arc<Outgoing>,
}

pub(super) struct Instance {
    pub uid: Uid,
    pub epoch: u64,
    pub since: Timestamp,
    pub program: Arc<Program>,
    pub env: Vec<(String, String)>,
    pub timeout: Duration,
    pub concurrency: Arc<Semaphore>,
    pub memory: Memory,
    pub log: Arc<Log>,
    /// Of its requests to others.
    pub way: Way,
    pub shared: Arc<Shared>,
    pub guests: TaskTracker,
    /// Accept no more; finish what is under way.
    pub drain: CancellationToken,
    /// End now.
    pub kill: CancellationToken,
}

/// Why a guest gave no answer, or not all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    Timeout,
    Trap,
    Silent,
    Removed,
}

type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

impl Instance {
    /// Serves until it is told to drain or to end, and all is over.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = self.kill.cancelled() => break,
                () = self.drain.cancelled() => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(self.clone().connection(stream));
                    }
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                },
            }
        }
        drop(listener);
        self.guests.close();
        let finish = async {
            while connections.join_next().await.is_some() {}
            self.guests.wait().await;
        };
        tokio::select! {
            biased;
            () = self.kill.cancelled() => {}
            () = finish => {}
        }
        connections.shutdown().await;
        self.kill.cancel();
        self.guests.wait().await;
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        // A failure only means more delay.
        let _ = stream.set_nodelay(true);
        let instance = self.clone();
        let service = service_fn(move |request| {
            let instance = instance.clone();
            async move { Ok::<_, Infallible>(instance.handle(request).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        builder.http2().timer(TokioTimer::new()).max_concurrent_streams(1024);
        // What ends a connection early is the client's doing, or the cut that `Answer` makes: nothing to report.
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            biased;
            _ = connection.as_mut() => return,
            () = self.drain.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }

    async fn handle(self: Arc<Self>, mut request: Request<Incoming>) -> Response<Answer> {
        let deadline = Instant::now() + self.timeout;
        let Some(permits) = self.admit(deadline).await else {
            let detail = format!("no turn came within {} seconds", self.timeout.as_secs());
            let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, "function_busy", &detail);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            return response;
        };
        // Guests are promised an authority, which HTTP/1.0 clients do not send.
        if request.uri().authority().is_none() && !request.headers().contains_key(HOST) {
            request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
        }
        let head = request.method() == Method::HEAD;
        let cut = Arc::new(AtomicBool::new(false));
        let (sender, answered) = oneshot::channel();
        let run = self.clone().guest(request, sender, cut.clone(), permits, deadline);
        let mut guest = Leash(Some(self.guests.spawn(run)));
        match answered.await {
            Ok(Ok(response)) => {
                let (mut parts, body) = response.into_parts();
                let length = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
                let bodyless = head || parts.status.is_informational() || matches!(parts.status.as_u16(), 204 | 304);
                if parts.status.is_informational() {
                    parts.status = StatusCode::INTERNAL_SERVER_ERROR;
                }
                let missing = if bodyless { Some(0) } else { length };
                Response::from_parts(parts, Answer::Guest { body, guest, cut, missing })
            }
            Ok(Err(code)) => {
                self.log.line(Channel::Stderr, &format!("cloudnexus: the function answered with an error: {code:?}"));
                problem(StatusCode::INTERNAL_SERVER_ERROR, "function_failed", "the function answered with an error")
            }
            // The guest ended without an answer, and says why as it returns.
            Err(_) => match guest.end().await {
                Some(Failure::Timeout) => {
                    let detail = format!("the function did not answer within {} seconds", self.timeout.as_secs());
                    problem(StatusCode::GATEWAY_TIMEOUT, "function_timeout", &detail)
                }
                Some(Failure::Removed) => {
                    problem(StatusCode::SERVICE_UNAVAILABLE, "function_removed", "the instance is being removed")
                }
                _ => {
                    let detail = "the function failed; its log says why";
                    problem(StatusCode::INTERNAL_SERVER_ERROR, "function_failed", detail)
                }
            },
        }
    }

    async fn admit(&self, deadline: Instant) -> Option<Permits> {
        let acquire = |semaphore: &Arc<Semaphore>| {
            let semaphore = semaphore.clone();
            async move {
                match semaphore.clone().try_acquire_owned() {
                    Ok(permit) => Some(permit),
                    Err(_) => timeout_at(deadline, semaphore.acquire_owned()).await.ok()?.ok(),
                }
            }
        };
        // Always in this order, so that an instance can't hold slots that it may not use.
        let own = acquire(&self.concurrency).await?;
        Some((own, acquire(&self.shared.slots).await?))
    }

    /// Runs one guest to its end.
    async fn guest(
        self: Arc<Self>,
        request: Request<Incoming>,
        sender: oneshot::Sender<Result<Response<HyperOutgoingBody>, HttpCode>>,
        cut: Arc<AtomicBool>,
        permits: Permits,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let _permits = permits;
        let _ticking = self.shared.ticker.enter();
        let mut store = Guest::store(self.program.pre.engine(), &self.env, Some(&self.way), &self.memory);
        let run = async {
            let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
            let out = store.data_mut().http().new_response_outparam(sender)?;
            let proxy = self.program.pre.instantiate_async(&mut store).await?;
            proxy.wasi_http_incoming_handler().call_handle(&mut store, request, out).await
        };
        let outcome = tokio::select! {
            biased;
            () = self.kill.cancelled() => Err(Failure::Removed),
            outcome = timeout_at(deadline, run) => match outcome {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => {
                    self.log.line(Channel::Stderr, &account(store.data().memory_refusal(), &error));
                    Err(Failure::Trap)
                }
                Err(_) => {
                    let seconds = self.timeout.as_secs();
                    self.log.line(Channel::Stderr, &format!("cloudnexus: a request was ended after {seconds} seconds"));
                    Err(Failure::Timeout)
                }
            },
        };
        // Before the store goes, because that is what ends the body.
        cut.store(outcome.is_err(), Ordering::Release);
        drop(store);
        outcome
    }
}

type HttpCode = wasmtime_wasi_http::p2::bindings::http::types::ErrorCode;

/// A trap in the words of a log line: its cause, and where it happened.
fn account(memory: Option<String>, error: &wasmtime::Error) -> String {
    let reason = memory.map(|reason| format!(" ({reason})")).unwrap_or_default();
    let mut text = format!("cloudnexus: a request failed{reason}: {error:?}").replace('\n', " | ");
    if text.len() > MAX_TRAP {
        text.truncate((0..=MAX_TRAP).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
    }
    text
}

/// Ends a guest whose client has gone.
pub(super) struct Leash(Option<JoinHandle<Result<(), Failure>>>);

impl Leash {
    /// Lets the guest run on: it may have work left after its answer, until its deadline.
    fn release(&mut self) {
        self.0 = None;
    }

    async fn end(&mut self) -> Option<Failure> {
        match self.0.take()?.await {
            Ok(Ok(())) => Some(Failure::Silent),
            Ok(Err(failure)) => Some(failure),
            Err(_) => Some(Failure::Trap),
        }
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// The body of an answer.
pub(super) enum Answer {
    Text(Option<Bytes>),
    Guest {
        body: HyperOutgoingBody,
        guest: Leash,
        /// Set when the guest has failed: what it sent is not all.
        cut: Arc<AtomicBool>,
        /// Bytes that are still to come, where the guest has said how many there are.
        missing: Option<u64>,
    },
}

impl Body for Answer {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let (body, guest, cut, missing) = match self.get_mut() {
            Self::Text(text) => return Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Guest { body, guest, cut, missing } => (body, guest, cut, missing),
        };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        match &frame {
            None => {
                guest.release();
                if cut.load(Ordering::Acquire) {
                    return Poll::Ready(Some(Err(HttpError::HttpResponseIncomplete)));
                }
            }
            Some(Ok(part)) => {
                let length = part.data_ref().map_or(0, |data| data.len() as u64);
                if let Some(missing) = missing {
                    *missing = missing.saturating_sub(length);
                }
            }
            Some(Err(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Guest { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Self::Guest { body, .. } => body.size_hint(),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // The server stops asking when it has what it needs, which is not always the end of the stream.
        if let Self::Guest { guest, missing: Some(0), .. } = self {
            guest.release();
        }
    }
}

/// An answer of the executor's own (RFC 9457).
fn problem(status: StatusCode, code: &str, detail: &str) -> Response<Answer> {
    let title = status.canonical_reason().unwrap_or("Error");
    let body = serde_json::json!({
        "type": "about:blank", "title": title, "status": status.as_u16(), "code": code, "detail": detail,
    });
    let mut response = Response::new(Answer::Text(Some(body.to_string().into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}
