//! `:logs` and `:exec`: what an instance says, and a command within it.
//!
//! Logs are the instance's lines as plain text. Exec is a WebSocket whose binary messages are one byte for the channel and
//! then the data: 0 standard input (an empty one ends it) from the client; 1 standard output, 2 standard error and, last,
//! 3 the exit code as decimal text to the client. An error after the upgrade closes the socket with 1011 and says why.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use http::request::Parts;
use http::{HeaderValue, Method, header};
use nexus_model::plan::{ExecRequest, LogsRequest, channel};
use nexus_model::{ApiError, Code, Name, Uid};
use nexus_store::Consistency;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::doors::{Frame, FrameStream};
use crate::flows;
use crate::list::{find, unreadable};
use crate::networks;
use crate::problem::Refusal;
use crate::query::Query;
use crate::render::Stored;
use crate::route::{Place, Target, Verb};
use crate::serve::{Context, Server};
use crate::watch::right_ended;

/// The most lines that `tail` may ask for.
pub(crate) const MAX_TAIL: u32 = 1_000_000;
const MAX_COMMAND_WORDS: usize = 256;
/// One message of a client.
const MAX_MESSAGE: usize = 1 << 20;
/// A client that vanished is found by a ping.
const PING: Duration = Duration::from_secs(20);
/// How long a client may take to accept one message.
const SEND: Duration = Duration::from_secs(60);

pub(crate) async fn handle(
    server: &Arc<Server>,
    place: &Place,
    name: &Name,
    verb: Verb,
    parts: &mut Parts,
    context: &Context,
) -> Result<Response, Refusal> {
    let target = Target::Custom(place.clone(), name.clone(), verb);
    let ended = right_ended(Arc::clone(server), context.clone(), target);
    match verb {
        Verb::Logs => logs(server, place, name, parts, ended).await,
        Verb::Exec => exec(server, place, name, parts, ended).await,
        Verb::Capture => networks::capture(server, place, name, parts, ended).await,
        Verb::Flows => flows::flows(server, place, name, parts, ended).await,
        // Answered elsewhere.
        _ => Err(Refusal::new(Code::NotFound, "only instances have streams")),
    }
}

/// The init step or sidecar that a request means, if it names one.
fn part_of(query: &Query) -> Result<Option<Name>, ApiError> {
    let wrong = || ApiError::new(Code::BadRequest, "part is the name of one of the instance's init steps or sidecars");
    query.get("part").map(|text| text.parse().map_err(|_| wrong())).transpose()
}

/// An instance or a NIC, and the host that has it. An instance must have the part that is asked for.
pub(crate) async fn locate(
    server: &Server,
    place: &Place,
    name: &Name,
    part: Option<&Name>,
) -> Result<(Uid, Name), ApiError> {
    let kv = find(server, place, name, Consistency::Stale).await?;
    let kv = match kv {
        Some(kv) => Some(kv),
        // It may be newer than what this server knows.
        None => find(server, place, name, Consistency::Linearizable).await?,
    };
    let kv = kv.ok_or_else(|| ApiError::not_found(place.kind.kind, name.as_str()))?;
    let stored = Stored::read(&kv).map_err(|e| unreadable(&kv, &e))?;
    let host = stored.status()["host"].as_str().and_then(|h| h.parse().ok());
    let host = host.ok_or_else(|| {
        let detail = format!("{} {:?} has no host yet", place.kind.kind, name.as_str());
        ApiError::new(Code::Conflict, detail)
    })?;
    if let Some(part) = part {
        let spec = stored.spec();
        let names = |list: &str| {
            let parts = spec["template"][list].as_array().cloned().unwrap_or_default();
            parts.iter().filter_map(|p| p["name"].as_str().map(str::to_owned)).collect::<Vec<_>>()
        };
        let known = [names("init"), names("sidecars")].concat();
        if !known.iter().any(|name| part == name.as_str()) {
            let has = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let detail = format!("instance {:?} has no part {part}; it has: {has}", name.as_str());
            return Err(ApiError::new(Code::NotFound, detail));
        }
    }
    Ok((stored.metadata.uid, host))
}

async fn logs(
    server: &Arc<Server>,
    place: &Place,
    name: &Name,
    parts: &Parts,
    ended: BoxFuture<'static, ApiError>,
) -> Result<Response, Refusal> {
    let query = Query::parse(parts.uri.query(), &["follow", "tail", "stream", "part"], &[])?;
    let part = part_of(&query)?;
    let follow = query.flag("follow")?;
    let tail = query.number("tail", 0..=MAX_TAIL)?;
    let only = match query.one_of("stream", &["stdout", "stderr"])? {
        Some("stdout") => Some(channel::STDOUT),
        Some(_) => Some(channel::STDERR),
        None => None,
    };
    let permit = server.stream_permit()?;
    let (uid, host) = locate(server, place, name, part.as_ref()).await?;
    let mut response = Response::new(Body::empty());
    if parts.method != Method::HEAD {
        let asked = LogsRequest { uid, follow, tail, part };
        let timeout = server.api.limits.request_timeout;
        let frames = tokio::time::timeout(timeout, server.api.hosts.logs(&host, asked)).await;
        let frames = frames.map_err(|_| ApiError::new(Code::Timeout, format!("the host {host} does not answer")))??;
        *response.body_mut() = Body::from_stream(lines(server, frames, only, permit, ended));
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    // These are the tenant's bytes: a browser must not take them for a page.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

fn lines(
    server: &Arc<Server>,
    frames: FrameStream,
    only: Option<u8>,
    permit: OwnedSemaphorePermit,
    ended: BoxFuture<'static, ApiError>,
) -> impl futures::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let shutdown = server.api.shutdown.clone();
    let until = futures::future::select(Box::pin(shutdown.cancelled_owned()), ended);
    frames.take_until(until).filter_map(move |frame| {
        let _held = &permit;
        let line = match frame {
            Ok(frame) if only.is_none_or(|c| c == frame.channel) => Some(Ok(frame.data)),
            Ok(_) => None,
            Err(error) => {
                tracing::info!(%error, "a log stream broke off");
                Some(Err(io::Error::other(error)))
            }
        };
        std::future::ready(line)
    })
}

async fn exec(
    server: &Arc<Server>,
    place: &Place,
    name: &Name,
    parts: &mut Parts,
    ended: BoxFuture<'static, ApiError>,
) -> Result<Response, Refusal> {
    let query = Query::parse(parts.uri.query(), &["command", "stdin", "part"], &["command"])?;
    let part = part_of(&query)?;
    let command = query.all("command");
    let stdin = query.flag("stdin")?;
    if !(1..=MAX_COMMAND_WORDS).contains(&command.len()) || command[0].is_empty() {
        let detail = format!("give the command's words as `command` parameters, 1 to {MAX_COMMAND_WORDS}");
        return Err(Refusal::new(Code::BadRequest, detail));
    }
    if command.iter().any(|w| w.contains('\0')) {
        return Err(Refusal::new(Code::BadRequest, "a command's word has no zero byte"));
    }
    let upgrade = WebSocketUpgrade::from_request_parts(parts, &()).await.map_err(|_| {
        let refusal = Refusal::new(Code::BadRequest, "exec is a WebSocket: open this URL with a WebSocket client");
        refusal.with(header::UPGRADE, HeaderValue::from_static("websocket"))
    })?;
    let permit = server.stream_permit()?;
    let (uid, host) = locate(server, place, name, part.as_ref()).await?;
    let asked = ExecRequest { uid, command, stdin, part };
    let timeout = server.api.limits.request_timeout;
    let opened = tokio::time::timeout(timeout, server.api.hosts.exec(&host, asked)).await;
    let (input, output) =
        opened.map_err(|_| ApiError::new(Code::Timeout, format!("the host {host} does not answer")))??;
    let server = Arc::clone(server);
    let upgrade = upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let _permit = permit;
        let stop = server.api.shutdown.clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            why = ended => tracing::info!(%why, "an exec was ended with its caller's right to it"),
            () = Box::pin(converse(socket, input, output)) => {}
        }
    }))
}

async fn send(socket: &mut WebSocket, message: Message) -> bool {
    matches!(tokio::time::timeout(SEND, socket.send(message)).await, Ok(Ok(())))
}

async fn close(socket: &mut WebSocket, code: u16, reason: &str) {
    // The reason has at most 123 bytes (RFC 6455, 5.5).
    let reason: String =
        reason.chars().take(30).collect::<String>() + if reason.chars().count() > 30 { "…" } else { "" };
    let _ = send(socket, Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await;
}

/// Waits for room towards the host; `None` if it no longer takes input.
async fn room(input: Option<mpsc::Sender<Frame>>) -> Option<mpsc::OwnedPermit<Frame>> {
    input?.reserve_owned().await.ok()
}

/// Carries frames both ways until the command ends or the client goes.
async fn converse(mut socket: WebSocket, input: mpsc::Sender<Frame>, mut output: FrameStream) {
    let mut input = Some(input);
    // One frame of input waits here while the host is slow, and nothing more is read from the client meanwhile.
    let mut waiting: Option<Bytes> = None;
    let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + PING, PING);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = true;
    loop {
        tokio::select! {
            biased;
            frame = output.next() => match frame {
                Some(Ok(frame)) => {
                    let exit = frame.channel == channel::EXIT;
                    let mut message = Vec::with_capacity(frame.data.len() + 1);
                    message.push(frame.channel);
                    message.extend_from_slice(&frame.data);
                    if !send(&mut socket, Message::Binary(message.into())).await {
                        return;
                    }
                    if exit {
                        return close(&mut socket, 1000, "").await;
                    }
                }
                Some(Err(error)) => return close(&mut socket, 1011, &error.detail).await,
                None => return close(&mut socket, 1011, "the host broke off").await,
            },
            permit = room(input.clone()), if waiting.is_some() => match (permit, waiting.take()) {
                (Some(permit), Some(data)) => drop(permit.send(Frame { channel: channel::STDIN, data })),
                // The command no longer reads; its output and exit code still come.
                _ => input = None,
            },
            message = socket.recv(), if waiting.is_none() => match message {
                Some(Ok(Message::Binary(data))) => {
                    heard = true;
                    match data.split_first() {
                        Some((&channel::STDIN, _)) if input.is_some() => waiting = Some(data.slice(1..)),
                        Some((&channel::STDIN, _)) => {}
                        _ => return close(&mut socket, 1008, "send channel 0 only").await,
                    }
                }
                Some(Ok(Message::Text(_))) => return close(&mut socket, 1003, "binary messages only").await,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => heard = true,
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
            },
            _ = ping.tick() => {
                if !heard && waiting.is_none() {
                    return close(&mut socket, 1001, "no answer to a ping").await;
                }
                heard = false;
                if !send(&mut socket, Message::Ping(Bytes::new())).await {
                    return;
                }
            }
        }
    }
}
