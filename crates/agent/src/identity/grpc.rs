//! gRPC over HTTP/2, the serving side, as much of it as the Workload API needs: calls with one request, answered by one
//! message or by a stream of them.
//!
//! A call is a POST whose body is one message behind five bytes (a flag and a length). The answer is the same, once or
//! several times, and trailers with `grpc-status`; a call that fails at once is answered by headers alone that hold it.
//!
//! Who calls is a stranger: connections, calls, headers and messages are bounded, and whoever sends half a request or does
//! not read what it asked for is given up after a while.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream as Items;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use nexus_env::{BoxStream, Listener};
use prost::Message;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::authority::PlainAuthority;

/// A whole request must have come by then.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Whoever reads nothing for so long has gone.
const STALL_LIMIT: Duration = Duration::from_secs(60);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const MAX_HEADERS: u32 = 16 << 10;
const WINDOW: u32 = 64 << 10;
/// Between tries to accept when that fails, as when there are no descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);
const CONTENT_TYPE: &str = "application/grpc";

/// The status codes of gRPC that are given here.
pub mod code {
    pub const INVALID_ARGUMENT: u32 = 3;
    pub const PERMISSION_DENIED: u32 = 7;
    pub const RESOURCE_EXHAUSTED: u32 = 8;
    pub const UNIMPLEMENTED: u32 = 12;
    pub const UNAVAILABLE: u32 = 14;
}

/// Why a call fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub code: u32,
    pub message: String,
}

impl Status {
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Messages, encoded, and perhaps a failure, after which nothing follows.
pub type Answers = Items<'static, Result<Bytes, Status>>;

pub enum Reply {
    One(Bytes),
    Many(Answers),
}

/// What is served.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Refuses a call by its path and headers, before its message is read.
    fn check(&self, path: &str, headers: &HeaderMap) -> Result<(), Status>;

    async fn call(&self, path: &str, message: Bytes) -> Result<Reply, Status>;
}

/// Bounds of one socket.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Further ones wait to be accepted.
    pub connections: usize,
    /// Calls at once over all connections, streams too; further ones are refused.
    pub calls: usize,
    /// Bytes of a request.
    pub message: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 32, calls: 64, message: 16 << 10 }
    }
}

/// A message as it is sent.
pub fn encoded(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// Reads a request.
pub fn decoded<M: Message + Default>(message: Bytes) -> Result<M, Status> {
    M::decode(message).map_err(|e| Status::new(code::INVALID_ARGUMENT, format!("the request can't be read: {e}")))
}

/// Serves a socket until it is dropped.
pub async fn serve(mut listener: Box<dyn Listener>, service: Arc<dyn Service>, limits: Limits) {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let calls = Arc::new(Semaphore::new(limits.calls));
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let permit = connections.clone().acquire_owned().await.expect("nobody closes it");
        match listener.accept().await {
            Ok((stream, _)) => {
                let (service, calls) = (service.clone(), calls.clone());
                tasks.spawn(async move {
                    let _permit = permit;
                    if let Err(reason) = connection(stream, service, calls, limits).await {
                        tracing::debug!(%reason, "a connection of a workload ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a workload's connection can't be accepted");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

async fn connection(
    stream: BoxStream,
    service: Arc<dyn Service>,
    calls: Arc<Semaphore>,
    limits: Limits,
) -> Result<(), String> {
    let handshake = h2::server::Builder::new()
        .max_concurrent_streams(u32::try_from(limits.calls).unwrap_or(u32::MAX))
        .max_header_list_size(MAX_HEADERS)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(4 * WINDOW)
        .max_send_buffer_size(WINDOW as usize)
        .handshake::<_, Bytes>(PlainAuthority::new(stream));
    let mut connection = timeout(HANDSHAKE_LIMIT, handshake).await.map_err(|_| "no handshake in time".to_owned())?;
    let connection = connection.as_mut().map_err(|e| e.to_string())?;
    // What is under way ends with the connection.
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            Some(_) = tasks.join_next() => {}
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    tasks.spawn(call(service.clone(), calls.clone(), limits, request, respond));
                }
                Some(Err(error)) => return Err(error.to_string()),
                None => return Ok(()),
            },
        }
    }
}

async fn call(
    service: Arc<dyn Service>,
    calls: Arc<Semaphore>,
    limits: Limits,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (head, body) = request.into_parts();
    let kind = head.headers.get(http::header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if head.method != Method::POST || !kind.starts_with(CONTENT_TYPE) {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        let _ = respond.send_response(response, true);
        return;
    }
    let Ok(_permit) = calls.try_acquire() else {
        let why = format!("{} calls are under way on this socket: close streams that nobody reads", limits.calls);
        return fail(&mut respond, &Status::new(code::RESOURCE_EXHAUSTED, why));
    };
    let answer = async {
        service.check(head.uri.path(), &head.headers)?;
        let message = timeout(REQUEST_LIMIT, message(body, limits.message)).await;
        let message = message.unwrap_or_else(|_| Err(Status::new(code::INVALID_ARGUMENT, "the request is incomplete")));
        service.call(head.uri.path(), message?).await
    };
    let answer = tokio::select! {
        biased;
        // Whoever asked does not wait any more.
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
        answer = answer => answer,
    };
    // What can't be sent is of no interest to anyone: the caller has gone.
    match answer {
        Err(status) => fail(&mut respond, &status),
        Ok(Reply::One(message)) => {
            let Ok(mut stream) = respond.send_response(head_of_answer(), false) else { return };
            if send(&mut stream, message).await.is_ok() {
                let _ = stream.send_trailers(trailers(None));
            }
        }
        Ok(Reply::Many(messages)) => {
            let Ok(stream) = respond.send_response(head_of_answer(), false) else { return };
            let _ = stream_out(stream, messages).await;
        }
    }
}

/// The one message of a request.
async fn message(mut body: RecvStream, limit: usize) -> Result<Bytes, Status> {
    let mut buffer = BytesMut::new();
    let invalid = |why: &str| Status::new(code::INVALID_ARGUMENT, why);
    while let Some(data) = body.data().await {
        let data = data.map_err(|e| invalid(&format!("the request broke off: {e}")))?;
        let _ = body.flow_control().release_capacity(data.len());
        if buffer.len() + data.len() > 5 + limit {
            return Err(Status::new(code::RESOURCE_EXHAUSTED, format!("a request has at most {limit} bytes")));
        }
        buffer.extend_from_slice(&data);
    }
    if buffer.len() < 5 {
        return Err(invalid("the request holds no message"));
    }
    if buffer.get_u8() != 0 {
        return Err(Status::new(code::UNIMPLEMENTED, "the request is compressed: send it plain"));
    }
    if buffer.get_u32() as usize != buffer.len() {
        return Err(invalid("the request is not exactly one message"));
    }
    Ok(buffer.freeze())
}

async fn stream_out(mut stream: SendStream<Bytes>, mut messages: Answers) -> Result<(), h2::Error> {
    loop {
        let next = tokio::select! {
            biased;
            _ = poll_fn(|cx| stream.poll_reset(cx)) => return Ok(()),
            next = messages.next() => next,
        };
        match next {
            Some(Ok(message)) => send(&mut stream, message).await?,
            Some(Err(status)) => return stream.send_trailers(trailers(Some(&status))),
            None => return stream.send_trailers(trailers(None)),
        }
    }
}

/// Sends a message as fast as it is read.
async fn send(stream: &mut SendStream<Bytes>, message: Bytes) -> Result<(), h2::Error> {
    let mut out = BytesMut::with_capacity(5 + message.len());
    out.put_u8(0);
    out.put_u32(u32::try_from(message.len()).expect("answers are small"));
    out.extend_from_slice(&message);
    let mut left = out.freeze();
    while !left.is_empty() {
        stream.reserve_capacity(left.len());
        match timeout(STALL_LIMIT, poll_fn(|cx| stream.poll_capacity(cx))).await {
            Ok(Some(room)) => {
                let piece = left.split_to(room?.min(left.len()));
                if !piece.is_empty() {
                    stream.send_data(piece, false)?;
                }
            }
            Ok(None) => return Err(Reason::STREAM_CLOSED.into()),
            Err(_) => {
                stream.send_reset(Reason::CANCEL);
                return Err(Reason::CANCEL.into());
            }
        }
    }
    Ok(())
}

fn head_of_answer() -> Response<()> {
    let mut response = Response::new(());
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    response
}

/// `None`: all went well.
fn trailers(failed: Option<&Status>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("grpc-status", HeaderValue::from(failed.map_or(0, |s| s.code)));
    if let Some(status) = failed {
        let message = HeaderValue::from_str(&escape(&status.message)).expect("escaped text is plain ASCII");
        headers.insert("grpc-message", message);
    }
    headers
}

fn fail(respond: &mut SendResponse<Bytes>, status: &Status) {
    let mut response = head_of_answer();
    response.headers_mut().extend(trailers(Some(status)));
    let _ = respond.send_response(response, true);
}

/// gRPC writes what is no printable ASCII as `%XX`.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | ..=0x1f | 0x7f.. => out.push_str(&format!("%{byte:02X}")),
            plain => out.push(char::from(plain)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_statuses_are_escaped() {
        assert_eq!(escape("100% é\n"), "100%25 %C3%A9%0A");
    }
}
