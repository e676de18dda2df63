//! What servers ask of a host: an instance's output, and commands run in it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nexus_compute::ExecIo;
use nexus_env::{Disk, Endpoint, Env, File};
use nexus_model::kind::Runtime;
use nexus_model::plan::{CaptureRequest, ExecRequest, FlowsRequest, LogsRequest, TraceRequest, channel, method};
use nexus_network::vpc::capture::Capture;
use nexus_wire::{FrameSink, FrameStream, Refusal, Server, ServerBuilder, WireError, code};
use nix::fcntl::OFlag;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::config::AgentConfig;
use crate::launch::log_dir;
use crate::networks::Networks;
use crate::outcome;
use crate::worker::Shared;

/// How often a followed log is looked at.
const FOLLOW: Duration = Duration::from_millis(200);
const PIECE: usize = 32 << 10;
/// A longer line is sent in pieces.
const MAX_LINE: usize = 64 << 10;
const EXEC_DEADLINE: Duration = Duration::from_secs(4 * 3600);
/// What a command's orphans still say is not waited for longer.
const EXEC_TAIL: Duration = Duration::from_secs(2);

/// What one capture sends at most, and how long it goes on.
const CAPTURE_BYTES: usize = 256 << 20;
const CAPTURE_DEADLINE: Duration = Duration::from_secs(3600);

/// The host's own server. Who may call is the configuration's matter.
pub(crate) fn server(config: &AgentConfig, env: &Env, shared: Arc<Shared>, at: Endpoint) -> ServerBuilder {
    let (identify, authorize) = (config.identify.clone(), config.authorize.clone());
    let for_exec = shared.clone();
    let (for_trace, for_check, for_capture) = (shared.clone(), shared.clone(), shared.clone());
    let for_flows = shared.clone();
    Server::builder(env, at, config.server_tls.clone())
        .identify(move |chain| identify(chain))
        .authorize(move |caller, method| authorize(caller, method))
        .duplex(method::LOGS, move |_, request: LogsRequest, sink, frames| {
            let shared = shared.clone();
            async move { logs(&shared, request, sink, frames).await }
        })
        .duplex(method::EXEC, move |_, request: ExecRequest, sink, frames| {
            let shared = for_exec.clone();
            async move { exec(&shared, request, sink, frames).await }
        })
        .unary(method::TRACE, move |_, request: TraceRequest| {
            let shared = for_trace.clone();
            async move { networks(&shared)?.trace(&request).await.map_err(|e| Refusal::new(code::BAD_REQUEST, e)) }
        })
        .unary(method::NETWORK_CHECK, move |_, (): ()| {
            let shared = for_check.clone();
            async move { networks(&shared)?.check().await.map_err(Refusal::internal) }
        })
        .unary(method::FLOWS, move |_, request: FlowsRequest| {
            let shared = for_flows.clone();
            async move { networks(&shared)?.flows(&request).await.map_err(Refusal::internal) }
        })
        .duplex(method::CAPTURE, move |_, request: CaptureRequest, sink, frames| {
            let shared = for_capture.clone();
            async move { capture(networks(&shared)?, request, sink, frames).await }
        })
}

fn networks(shared: &Shared) -> Result<&Networks, Refusal> {
    let none = || Refusal::new(code::BAD_REQUEST, "this host has no part in tenants' networks");
    shared.networks.as_ref().ok_or_else(none)
}

/// Sends what passes a NIC until the caller leaves, or a bound is met.
async fn capture(
    networks: &Networks,
    request: CaptureRequest,
    mut sink: FrameSink,
    mut frames: FrameStream,
) -> Result<(), Refusal> {
    let mut capture = networks.capture(&request).await.map_err(|e| Refusal::new(code::BAD_REQUEST, e))?;
    sink.send(channel::STDOUT, Bytes::from(Capture::header())).await.map_err(gone)?;
    let (mut room, mut listening) = (CAPTURE_BYTES, true);
    let end = tokio::time::sleep(CAPTURE_DEADLINE);
    let mut end = std::pin::pin!(end);
    loop {
        let record = tokio::select! {
            biased;
            frame = frames.next(), if listening => match frame {
                None => { listening = false; continue }
                Some(Ok(_)) => return Ok(()),
                Some(Err(e)) => return Err(gone(e)),
            },
            () = &mut end => return Ok(()),
            record = capture.next() => record.map_err(|e| Refusal::internal(format!("nothing more is heard: {e}")))?,
        };
        room = room.saturating_sub(record.len());
        if room == 0 {
            return Ok(());
        }
        sink.send(channel::STDOUT, Bytes::from(record)).await.map_err(gone)?;
    }
}

fn gone(e: WireError) -> Refusal {
    Refusal::internal(format!("the caller is gone: {e}"))
}

/// Reads on the threads that are for it.
async fn unblock<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await.map_err(io::Error::other);
    done.flatten().map_err(|e| Refusal::internal(format!("the log can't be read: {e}")))
}

async fn logs(
    shared: &Shared,
    request: LogsRequest,
    mut sink: FrameSink,
    mut frames: FrameStream,
) -> Result<(), Refusal> {
    let own = shared.logs(request.uid);
    let dir = log_dir(&shared.logs_dir, request.uid, request.part.as_ref());
    let disk = shared.env.disk.clone();
    let known = shared.handle.snapshot().instances.contains_key(&request.uid);
    if !known && !disk.exists(&dir).unwrap_or(false) {
        return Err(Refusal::new(code::BAD_REQUEST, format!("instance {} is not on this host", request.uid)));
    }
    // The live file is opened before the old ones are read: what is rotated meanwhile is not lost.
    let current = dir.join("current");
    let opening = (disk.clone(), current.clone());
    let mut live = unblock(move || open(&*opening.0, &opening.1)).await?;
    let mut offset = 0;
    let mut lines = Lines::default();
    let mut held: Option<VecDeque<(u8, Bytes)>> = request.tail.map(|_| VecDeque::new());
    let keep = request.tail.unwrap_or(0) as usize;

    let listing = (disk.clone(), dir.clone());
    for old in unblock(move || old_files(&*listing.0, &listing.1)).await? {
        let reading = disk.clone();
        // One that rotation has taken away meanwhile is no error.
        let text = unblock(move || Ok(reading.read(&old).unwrap_or_default())).await?;
        for frame in lines.push(&text) {
            give(frame, &mut held, keep, &mut sink).await?;
        }
    }
    loop {
        // Asked before the log is read to its end, so that nothing is missed of what was written last.
        let over = outcome::is_there(&*disk, &own);
        let Some(file) = live.clone() else {
            if !request.follow || over {
                break;
            }
            pause(&mut frames).await?;
            let opening = (disk.clone(), current.clone());
            live = unblock(move || open(&*opening.0, &opening.1)).await?;
            offset = 0;
            if live.is_none()
                && !disk.exists(&dir).unwrap_or(false)
                && !shared.handle.snapshot().instances.contains_key(&request.uid)
            {
                break;
            }
            continue;
        };
        let reading = file.clone();
        let at = offset;
        let piece = unblock(move || {
            let mut piece = vec![0; PIECE];
            let n = reading.read_at(at, &mut piece)?;
            piece.truncate(n);
            Ok(piece)
        })
        .await?;
        offset += piece.len() as u64;
        for frame in lines.push(&piece) {
            give(frame, &mut held, keep, &mut sink).await?;
        }
        if !piece.is_empty() {
            continue;
        }
        // The end for now: what was held back for `tail` is complete.
        for (channel, text) in held.take().into_iter().flatten() {
            sink.send(channel, text).await.map_err(gone)?;
        }
        if !request.follow || over {
            break;
        }
        pause(&mut frames).await?;
        // Rotated, if what has the name now is not as long as what was read, and that has not grown.
        let looking = (disk.clone(), current.clone(), file);
        let rotated = unblock(move || {
            let named = open(&*looking.0, &looking.1)?;
            let length = match &named {
                Some(file) => Some(file.len()?),
                None => None,
            };
            Ok((length != Some(offset) && looking.2.len()? == offset).then_some(named))
        })
        .await?;
        if let Some(next) = rotated {
            (live, offset) = (next, 0);
        }
    }
    for (channel, text) in held.take().into_iter().flatten() {
        sink.send(channel, text).await.map_err(gone)?;
    }
    Ok(())
}

/// Waits before the next look, or ends when the caller says anything or leaves.
async fn pause(frames: &mut FrameStream) -> Result<(), Refusal> {
    tokio::select! {
        biased;
        frame = frames.next() => match frame {
            // Having nothing more to send is usual: only the reset of the call ends it, and drops this future.
            None => { tokio::time::sleep(FOLLOW).await; Ok(()) }
            Some(Ok(_)) => Ok(()),
            Some(Err(e)) => Err(gone(e)),
        },
        () = tokio::time::sleep(FOLLOW) => Ok(()),
    }
}

async fn give(
    frame: (u8, Bytes),
    held: &mut Option<VecDeque<(u8, Bytes)>>,
    keep: usize,
    sink: &mut FrameSink,
) -> Result<(), Refusal> {
    match held {
        Some(held) => {
            held.push_back(frame);
            if held.len() > keep {
                held.pop_front();
            }
            Ok(())
        }
        None => sink.send(frame.0, frame.1).await.map_err(gone),
    }
}

fn open(disk: &dyn Disk, path: &Path) -> io::Result<Option<Arc<dyn File>>> {
    match disk.open(path) {
        Ok(file) => Ok(Some(file.into())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The rotated files, oldest first.
fn old_files(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<PathBuf>> {
    if !disk.exists(dir)? {
        return Ok(Vec::new());
    }
    let mut numbers: Vec<u32> = disk.list(dir)?.iter().filter_map(|e| e.name.parse().ok()).collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    Ok(numbers.into_iter().map(|n| dir.join(n.to_string())).collect())
}

/// Cuts a log into lines and takes the stamp off each.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    fn push(&mut self, text: &[u8]) -> Vec<(u8, Bytes)> {
        self.partial.extend_from_slice(text);
        let mut out = Vec::new();
        let mut taken = 0;
        while let Some(end) = self.partial[taken..].iter().position(|b| *b == b'\n') {
            out.extend(line(&self.partial[taken..=taken + end]));
            taken += end + 1;
        }
        self.partial.drain(..taken);
        if self.partial.len() > MAX_LINE {
            self.partial.clear();
        }
        out
    }
}

/// `<moment> stdout|stderr <text>\n` as a channel and the text. A line of another shape is left out.
fn line(bytes: &[u8]) -> Option<(u8, Bytes)> {
    let mut words = bytes.splitn(3, |b| *b == b' ');
    let (_, stream, text) = (words.next()?, words.next()?, words.next()?);
    let channel = match stream {
        b"stdout" => channel::STDOUT,
        b"stderr" => channel::STDERR,
        _ => return None,
    };
    Some((channel, Bytes::copy_from_slice(text)))
}

async fn exec(
    shared: &Shared,
    request: ExecRequest,
    mut sink: FrameSink,
    mut frames: FrameStream,
) -> Result<(), Refusal> {
    if request.command.is_empty() {
        return Err(Refusal::new(code::BAD_REQUEST, "there is no command"));
    }
    let view = shared.observer.subscribe().borrow().clone();
    let found = match &request.part {
        None => view.instances.get(&request.uid).map(|(kind, _)| (*kind, request.uid)),
        Some(part) => view.parts.get(&request.uid).and_then(|parts| Some((Runtime::Container, parts.get(part)?.uid))),
    };
    let found = found.and_then(|(kind, uid)| Some((shared.engines.runtimes.get(&kind)?.clone(), uid)));
    let Some((runtime, uid)) = found else {
        let what = request.part.as_ref().map_or_else(String::new, |part| format!("part {part} of "));
        let why = format!("{what}instance {} does not run on this host", request.uid);
        return Err(Refusal::new(code::BAD_REQUEST, why));
    };
    let failed = |e: io::Error| Refusal::internal(format!("a pipe for the command: {e}"));
    let (stdin, input) = pair().map_err(failed)?;
    let (output, stdout) = pair().map_err(failed)?;
    let (errors, stderr) = pair().map_err(failed)?;
    let mut input = request.stdin.then(|| pipe::Sender::from_owned_fd(input)).transpose().map_err(failed)?;
    let mut output = pipe::Receiver::from_owned_fd(output).map_err(failed)?;
    let mut errors = pipe::Receiver::from_owned_fd(errors).map_err(failed)?;
    let io = ExecIo { stdin, stdout, stderr };
    let mut running = std::pin::pin!(runtime.exec(uid, &request.command, io, EXEC_DEADLINE));

    let (mut out, mut err) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut out_open, mut err_open, mut listening) = (true, true, true);
    let mut result = None;
    let tail = tokio::time::sleep(EXEC_DEADLINE * 2);
    let mut tail = std::pin::pin!(tail);
    while result.is_none() || out_open || err_open {
        tokio::select! {
            biased;
            n = output.read(&mut out), if out_open => match n {
                Ok(n) if n > 0 => sink.send(channel::STDOUT, Bytes::copy_from_slice(&out[..n])).await.map_err(gone)?,
                _ => out_open = false,
            },
            n = errors.read(&mut err), if err_open => match n {
                Ok(n) if n > 0 => sink.send(channel::STDERR, Bytes::copy_from_slice(&err[..n])).await.map_err(gone)?,
                _ => err_open = false,
            },
            ended = &mut running, if result.is_none() => {
                result = Some(ended);
                input = None;
                tail.as_mut().reset(tokio::time::Instant::now() + EXEC_TAIL);
            }
            frame = frames.next(), if listening => match frame {
                Some(Ok((channel::STDIN, bytes))) if !bytes.is_empty() => {
                    if let Some(pipe) = &mut input
                        && write_while(pipe, &bytes, &mut output, &mut errors, &mut sink).await.is_err()
                    {
                        // The command does not read any more.
                        input = None;
                    }
                }
                Some(Ok(_)) => input = None,
                // No more will come.
                None => (input, listening) = (None, false),
                Some(Err(e)) => return Err(gone(e)),
            },
            () = &mut tail => break,
        }
    }
    match result {
        Some(Ok(code)) => sink.send(channel::EXIT, Bytes::from(code.to_string())).await.map_err(gone),
        Some(Err(e)) => Err(Refusal::new("exec", e.to_string())),
        None => Err(Refusal::new("exec", "the command took too long")),
    }
}

/// Writes to the command's input, and goes on reading its output: else both sides could wait for each other.
async fn write_while(
    input: &mut pipe::Sender,
    bytes: &[u8],
    output: &mut pipe::Receiver,
    errors: &mut pipe::Receiver,
    sink: &mut FrameSink,
) -> io::Result<()> {
    let mut rest = bytes;
    let (mut out, mut err) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut out_open, mut err_open) = (true, true);
    while !rest.is_empty() {
        tokio::select! {
            biased;
            n = output.read(&mut out), if out_open => match n? {
                0 => out_open = false,
                n => sink.send(channel::STDOUT, Bytes::copy_from_slice(&out[..n])).await.map_err(io::Error::other)?,
            },
            n = errors.read(&mut err), if err_open => match n? {
                0 => err_open = false,
                n => sink.send(channel::STDERR, Bytes::copy_from_slice(&err[..n])).await.map_err(io::Error::other)?,
            },
            n = input.write(rest) => rest = &rest[n?..],
        }
    }
    Ok(())
}

/// A pipe's reading and writing end, both closed in children.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lose_their_stamp_and_come_whole() {
        let mut lines = Lines::default();
        assert!(lines.push(b"2026-01-01T00:00:00.000Z stdout he").is_empty());
        let out = lines.push(b"llo world\n2026-01-01T00:00:00.000Z stderr \nnonsense\n");
        assert_eq!(out, [(channel::STDOUT, "hello world\n".into()), (channel::STDERR, "\n".into())]);
    }
}
