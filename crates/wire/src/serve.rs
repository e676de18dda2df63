//! One connection of a server, and the calls on it.
//!
//! Each call is one task of the connection's. Only that task touches the sending half of the HTTP/2 stream: HTTP/2
//! wakes a single waiter for resets and for window space, so a second one would wait for ever.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode};
use nexus_env::{BoxStream, Endpoint};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::debug;

use crate::error::{Refusal, code};
use crate::frame::{BodyError, Frame, FrameReader, Kind, read_whole, send_frame, send_whole};
use crate::keepalive::{Finding, Metered, Timing, Usage, watch};
use crate::server::{Caller, Core, Handler, Items, log_panic, version_of};
use crate::streams::{ByteStream, FrameSink, FrameStream, Out};
use crate::{HEADER_DEADLINE, HEADER_REQUEST, HEADER_VERSION, MAX_HEADERS, PATH_PREFIX, VERSION};

/// Frames that a duplex handler may be ahead of the wire: enough that it need not wait for each.
const DUPLEX_QUEUE: usize = 2;
/// Longer request ids are cut: they go to logs.
const MAX_REQUEST_ID: usize = 128;

/// Serves one connection to its end.
pub(crate) async fn connection(core: Arc<Core>, stream: BoxStream, remote: Endpoint) {
    let usage = Arc::new(Usage::default());
    let options = &core.options;
    let handshake = async {
        let accepted = core.tls.accept(Metered::new(stream, usage.clone())).await;
        let tls = accepted.map_err(|e| match e.kind() {
            // Whoever only wants to know how far away this is opens a connection and closes it.
            std::io::ErrorKind::UnexpectedEof => String::new(),
            _ => format!("TLS: {e}"),
        })?;
        let id = tls.get_ref().1.peer_certificates().and_then(|chain| (core.identify)(chain));
        let conn = h2::server::Builder::new()
            .initial_window_size(options.stream_window)
            .initial_connection_window_size(options.connection_window)
            .max_frame_size(crate::MAX_H2_FRAME)
            .max_header_list_size(MAX_HEADERS)
            .max_concurrent_streams(options.max_calls)
            .max_send_buffer_size(options.stream_window as usize)
            .data_frame_budget(crate::SMALL_FRAME_BUDGET)
            .handshake::<_, Bytes>(tls)
            .await
            .map_err(|e| e.to_string())?;
        Ok::<_, String>((conn, id))
    };
    let shaken = tokio::select! {
        biased;
        () = core.shutdown.cancelled() => return,
        shaken = timeout(options.handshake_timeout, handshake) => shaken,
    };
    let (mut conn, id) = match shaken.unwrap_or_else(|_| Err("it took too long".to_owned())) {
        Ok(done) => done,
        Err(why) if why.is_empty() => return,
        Err(why) => return core.handshake_failed(&remote, &why),
    };
    core.handshake_done(&remote);
    let peer = Arc::new(Peer { core: core.clone(), id: id.map(Into::into), remote });

    let mut ping = conn.ping_pong().expect("taken for the first time");
    let timing = Timing { interval: options.ping_interval, timeout: options.ping_timeout, idle: options.idle_timeout };
    let mut finding = std::pin::pin!(watch(&mut ping, &usage, timing));
    let mut watching = true;
    let mut calls = JoinSet::new();
    // Set when no new calls are taken; the connection ends at this moment at the latest.
    let mut drain_until: Option<Instant> = None;
    let far = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = core.shutdown.cancelled(), if drain_until.is_none() => {
                conn.graceful_shutdown();
                drain_until = Some(Instant::now() + options.drain_timeout);
            }
            () = sleep_until(drain_until.unwrap_or(far)), if drain_until.is_some() => break,
            found = &mut finding, if watching => match found {
                Finding::Silent => {
                    debug!(peer = %peer.remote, "a peer has stopped answering");
                    break;
                }
                Finding::Idle => {
                    watching = false;
                    conn.graceful_shutdown();
                    drain_until = drain_until.or(Some(Instant::now() + options.drain_timeout));
                }
            },
            Some(done) = calls.join_next() => log_panic(done),
            accepted = conn.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let in_use = usage.begin();
                    let peer = peer.clone();
                    calls.spawn(async move {
                        call(peer, request, respond).await;
                        drop(in_use);
                    });
                }
                Some(Err(e)) => {
                    debug!(peer = %peer.remote, reason = %e, "a connection broke");
                    break;
                }
                None => break,
            },
        }
    }
    // Dropping the set drops the handlers: their caller is gone.
}

/// Who is at the other end.
struct Peer {
    core: Arc<Core>,
    id: Option<Arc<str>>,
    remote: Endpoint,
}

/// Serves one call to its end.
async fn call(peer: Arc<Peer>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let (head, body) = request.into_parts();
    let (caller, handler) = match admit(&peer, &head) {
        Ok(admitted) => admitted,
        Err(refusal) => return refuse(&peer.core, respond, &refusal).await,
    };
    let core = &peer.core;
    match handler {
        Handler::Unary(run) => {
            let until = caller.deadline.expect("unary calls are admitted with one");
            let work = async {
                let message = read_whole(body, core.options.max_message).await.map_err(bad_body)?;
                run(caller, message).await
            };
            let outcome = tokio::select! {
                biased;
                _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return,
                outcome = timeout_at(until, work) => outcome,
            };
            reply(core, respond, outcome.unwrap_or_else(|_| Err(too_late()))).await;
        }
        Handler::Stream(run) => {
            let open = async {
                let limit = core.options.max_message;
                let message = timely(core, read_whole(body, limit)).await?;
                run(caller, message).await
            };
            let opened = tokio::select! {
                biased;
                _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return,
                opened = open => opened,
            };
            match opened {
                Ok(items) => {
                    let Ok(to) = respond.send_response(head_of(StatusCode::OK), false) else { return };
                    // An error here is the caller's going away.
                    let _ = send_items(core, to, items).await;
                }
                Err(refusal) => refuse(core, respond, &refusal).await,
            }
        }
        Handler::Upload(run) => {
            let until = caller.deadline;
            let work = async {
                let mut frames = FrameReader::new(body, core.options.max_message);
                let message = first_message(core, &mut frames).await?;
                run(caller, message, ByteStream::from_request(frames)).await
            };
            let outcome = tokio::select! {
                biased;
                _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return,
                outcome = by(until, work) => outcome,
            };
            reply(core, respond, outcome).await;
        }
        Handler::Duplex(run) => {
            let mut frames = FrameReader::new(body, core.options.max_message);
            let message = tokio::select! {
                biased;
                _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => return,
                message = first_message(core, &mut frames) => message,
            };
            let message = match message {
                Ok(message) => message,
                Err(refusal) => return refuse(core, respond, &refusal).await,
            };
            let Ok(to) = respond.send_response(head_of(StatusCode::OK), false) else { return };
            let (tell, out) = mpsc::channel(DUPLEX_QUEUE);
            let sink = FrameSink::queue(tell.clone(), core.options.max_message);
            let run = async {
                let outcome = run(caller, message, sink, FrameStream::from_request(frames)).await;
                // Behind every frame that the handler has sent.
                let _ = tell.send(Out::End(outcome)).await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                biased;
                // An error here is the caller's going away, which drops the handler.
                _ = pump(to, out) => {}
                () = run => {}
            }
        }
    }
}

/// Checks everything about a call but its message.
fn admit<'a>(peer: &'a Peer, head: &http::request::Parts) -> Result<(Caller, &'a Handler), Refusal> {
    let core = &peer.core;
    if version_of(&head.headers).is_err() {
        return Err(Refusal::new(code::VERSION_MISMATCH, VERSION.to_string()));
    }
    let method = head.uri.path().strip_prefix(PATH_PREFIX).filter(|_| head.method == Method::POST);
    let text = |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok());
    let mut caller = Caller {
        id: peer.id.clone(),
        remote: peer.remote.clone(),
        request_id: text(HEADER_REQUEST).unwrap_or_default().chars().take(MAX_REQUEST_ID).collect::<String>().into(),
        deadline: None,
    };
    let known = method.and_then(|name| core.methods.get(name).map(|handler| (name, handler)));
    let Some((name, handler)) = known else {
        return Err(Refusal::new(code::UNKNOWN_METHOD, format!("there is no `{} {}`", head.method, head.uri.path())));
    };
    if !(core.authorize)(&caller, name) {
        let who = caller.id.as_deref().unwrap_or("a caller without an id");
        return Err(Refusal::new(code::FORBIDDEN, format!("{who} may not call `{name}`")));
    }
    let asked = match text(HEADER_DEADLINE).map(str::parse::<u64>) {
        Some(Ok(millis)) => Some(Duration::from_millis(millis).min(core.options.max_deadline)),
        Some(Err(_)) => return Err(Refusal::new(code::BAD_REQUEST, format!("{HEADER_DEADLINE} is no number"))),
        None => matches!(handler, Handler::Unary(_)).then_some(core.options.default_deadline),
    };
    caller.deadline = asked.map(|asked| Instant::now() + asked);
    Ok((caller, handler))
}

fn too_late() -> Refusal {
    Refusal::new(code::DEADLINE, "the deadline has passed")
}

fn bad_body(error: BodyError) -> Refusal {
    match error {
        BodyError::TooLarge { limit } => Refusal::too_large(limit),
        other => Refusal::new(code::BAD_REQUEST, other.to_string()),
    }
}

/// Runs `work` until the deadline, if there is one.
async fn by<T>(until: Option<Instant>, work: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    match until {
        Some(until) => timeout_at(until, work).await.unwrap_or_else(|_| Err(too_late())),
        None => work.await,
    }
}

/// Reads of a request within the transfer timeout.
async fn timely<T>(core: &Core, read: impl Future<Output = Result<T, BodyError>>) -> Result<T, Refusal> {
    match timeout(core.options.transfer_timeout, read).await {
        Ok(done) => done.map_err(bad_body),
        Err(_) => Err(Refusal::new(code::DEADLINE, "the request did not arrive in time")),
    }
}

async fn first_message(core: &Core, frames: &mut FrameReader) -> Result<Bytes, Refusal> {
    let frame = timely(core, frames.next()).await?;
    match frame.kind {
        Kind::Item => Ok(frame.payload),
        Kind::End | Kind::Refusal => Err(Refusal::new(code::BAD_REQUEST, "the request has no message")),
    }
}

fn head_of(status: StatusCode) -> Response<()> {
    let mut head = Response::new(());
    *head.status_mut() = status;
    head.headers_mut().insert(HEADER_VERSION, VERSION.into());
    head
}

async fn reply(core: &Core, mut respond: SendResponse<Bytes>, outcome: Result<Bytes, Refusal>) {
    let answer = match outcome {
        Ok(answer) if answer.len() > core.options.max_message => Err(Refusal::too_large(core.options.max_message)),
        other => other,
    };
    match answer {
        Ok(answer) => {
            let Ok(mut to) = respond.send_response(head_of(StatusCode::OK), answer.is_empty()) else { return };
            if !answer.is_empty() {
                deliver(core, &mut to, answer).await;
            }
        }
        Err(refusal) => refuse(core, respond, &refusal).await,
    }
}

async fn refuse(core: &Core, mut respond: SendResponse<Bytes>, refusal: &Refusal) {
    if let Ok(mut to) = respond.send_response(head_of(refusal.status()), false) {
        deliver(core, &mut to, refusal.to_bytes()).await;
    }
}

/// Sends the last of a reply. A peer that does not take it loses it.
async fn deliver(core: &Core, to: &mut SendStream<Bytes>, bytes: Bytes) {
    if timeout(core.options.transfer_timeout, send_whole(to, bytes, true)).await.is_err() {
        to.send_reset(Reason::CANCEL);
    }
}

/// Sends the frame that ends a body.
async fn send_end(to: &mut SendStream<Bytes>, outcome: Result<(), Refusal>) -> Result<(), h2::Error> {
    let (kind, payload) = match outcome {
        Ok(()) => (Kind::End, Bytes::new()),
        Err(refusal) => (Kind::Refusal, refusal.to_bytes()),
    };
    send_frame(to, Frame { kind, channel: 0, payload }, true).await
}

/// Sends a handler's stream until it ends, the caller goes away or the server goes down.
async fn send_items(core: &Core, mut to: SendStream<Bytes>, mut items: Items) -> Result<(), h2::Error> {
    let max = core.options.max_message;
    // Asked once: thousands of streams wait for it beside their items.
    let mut shutdown = std::pin::pin!(core.shutdown.cancelled());
    loop {
        let item = tokio::select! {
            biased;
            _ = std::future::poll_fn(|cx| to.poll_reset(cx)) => return Ok(()),
            () = &mut shutdown => Some(Err(Refusal::new(code::DRAINING, "the server is going down"))),
            item = items.next() => item,
        };
        match item {
            Some(Ok(payload)) if payload.len() > max => return send_end(&mut to, Err(Refusal::too_large(max))).await,
            Some(Ok(payload)) => send_frame(&mut to, Frame { kind: Kind::Item, channel: 0, payload }, false).await?,
            Some(Err(refusal)) => return send_end(&mut to, Err(refusal)).await,
            None => return send_end(&mut to, Ok(())).await,
        }
    }
}

/// Sends what a duplex handler puts out, to the end. An error means that the caller is gone.
async fn pump(mut to: SendStream<Bytes>, mut out: mpsc::Receiver<Out>) -> Result<(), h2::Error> {
    loop {
        let next = tokio::select! {
            biased;
            reset = std::future::poll_fn(|cx| to.poll_reset(cx)) => return reset.and_then(|reason| Err(reason.into())),
            next = out.recv() => next,
        };
        match next {
            Some(Out::Frame(channel, payload)) => {
                send_frame(&mut to, Frame { kind: Kind::Item, channel, payload }, false).await?;
            }
            Some(Out::End(outcome)) => return send_end(&mut to, outcome).await,
            None => return Ok(()),
        }
    }
}
