//! The keeper as its callers see it: one connection per call, so that a keeper that was restarted is simply called again.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nexus_compute::keep::{Keep, KeepError, Kept, Spawn};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::protocol::{Answer, ErrorKind, MAX_ANSWER, Op, Request, VERSION, frame};

/// Most calls are answered in under a millisecond.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Longer than the keeper gives a shim.
const SPAWN_DEADLINE: Duration = Duration::from_secs(75);
/// A keeper that executes itself again is away for milliseconds, one that is restarted for a second or so.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// A caller of the keeper at a socket. The first call of [`Keep::changed`] needs a tokio runtime, and starts a task that
/// ends with the client.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    changed: Arc<Notify>,
    watcher: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), changed: Arc::new(Notify::new()), watcher: std::sync::Mutex::new(None) }
    }

    /// Makes the keeper execute its own file again. Its processes stay its children.
    pub async fn reexec(&self) -> Result<(), KeepError> {
        self.done("", Op::Reexec, CALL_DEADLINE).await
    }

    async fn call(&self, op: Op, stdio: Option<[OwnedFd; 3]>, deadline: Duration) -> Result<Answer, KeepError> {
        let exchange = async {
            let mut stream = connect_patiently(&self.socket).await?;
            send(&mut stream, &Request { version: VERSION, op }, stdio).await?;
            receive(&mut stream).await
        };
        match timeout(deadline, exchange).await {
            Err(_) => Err(KeepError::Deadline(deadline)),
            Ok(Err(source)) => Err(KeepError::Unreachable { path: self.socket.clone(), source }),
            Ok(Ok(answer)) => Ok(answer),
        }
    }

    async fn done(&self, id: &str, op: Op, deadline: Duration) -> Result<(), KeepError> {
        match self.call(op, None, deadline).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(id, other)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Ok(Some(task)) = self.watcher.get_mut().map(Option::take) {
            task.abort();
        }
    }
}

#[async_trait]
impl Keep for Client {
    async fn spawn(&self, spawn: Spawn) -> Result<(), KeepError> {
        let id = spawn.id.clone();
        self.done(&id, Op::Spawn { spawn }, SPAWN_DEADLINE).await
    }

    async fn list(&self) -> Result<Vec<Kept>, KeepError> {
        match self.call(Op::List, None, CALL_DEADLINE).await? {
            Answer::Kept { kept } => Ok(kept),
            other => Err(unexpected("", other)),
        }
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<(), KeepError> {
        self.done(id, Op::Signal { id: id.into(), signal }, CALL_DEADLINE).await
    }

    async fn forget(&self, id: &str) -> Result<(), KeepError> {
        self.done(id, Op::Forget { id: id.into() }, CALL_DEADLINE).await
    }

    async fn run(&self, spawn: Spawn, stdio: [OwnedFd; 3], deadline: Duration) -> Result<i32, KeepError> {
        let id = spawn.id.clone();
        let millis = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        // The keeper's own deadline comes first; this one is for a keeper that hangs.
        match self.call(Op::Run { spawn, millis }, Some(stdio), deadline.saturating_add(CALL_DEADLINE)).await? {
            Answer::Exit { code } => Ok(code),
            other => Err(unexpected(&id, other)),
        }
    }

    async fn changed(&self) {
        {
            let mut watcher = self.watcher.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if watcher.as_ref().is_none_or(JoinHandle::is_finished) {
                *watcher = Some(tokio::spawn(watch(self.socket.clone(), self.changed.clone())));
            }
        }
        self.changed.notified().await;
    }
}

/// Stays subscribed to the keeper's events, for as long as it is let.
async fn watch(socket: PathBuf, changed: Arc<Notify>) {
    let mut pause = Duration::from_millis(50);
    loop {
        let follow = async {
            let mut stream = UnixStream::connect(&socket).await?;
            send(&mut stream, &Request { version: VERSION, op: Op::Watch }, None).await?;
            loop {
                receive(&mut stream).await?;
                pause = Duration::from_millis(50);
                // Everybody who waits, and the next one who comes.
                changed.notify_waiters();
                changed.notify_one();
            }
        };
        let _: io::Result<()> = follow.await;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

/// Connects, and waits a little for a keeper that is just being restarted.
async fn connect_patiently(socket: &Path) -> io::Result<UnixStream> {
    let end = tokio::time::Instant::now() + CONNECT_PATIENCE;
    let mut pause = Duration::from_millis(5);
    loop {
        match UnixStream::connect(socket).await {
            Err(e) if tokio::time::Instant::now() + pause >= end => return Err(e),
            Err(_) => tokio::time::sleep(pause).await,
            Ok(stream) => return Ok(stream),
        }
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

async fn send(stream: &mut UnixStream, request: &Request, stdio: Option<[OwnedFd; 3]>) -> io::Result<()> {
    let bytes = frame(request);
    let mut sent = 0;
    if let Some(stdio) = stdio {
        let raw: Vec<i32> = stdio.iter().map(AsRawFd::as_raw_fd).collect();
        let socket = stream.as_raw_fd();
        sent = stream
            .async_io(Interest::WRITABLE, || {
                let rights = [ControlMessage::ScmRights(&raw)];
                let parts = [IoSlice::new(&bytes)];
                sendmsg::<UnixAddr>(socket, &parts, &rights, MsgFlags::MSG_NOSIGNAL, None).map_err(io::Error::from)
            })
            .await?;
    }
    stream.write_all(&bytes[sent..]).await
}

async fn receive(stream: &mut UnixStream) -> io::Result<Answer> {
    let length = stream.read_u32().await? as usize;
    if length > MAX_ANSWER {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an answer of {length} bytes")));
    }
    let mut content = vec![0; length];
    stream.read_exact(&mut content).await?;
    Ok(serde_json::from_slice(&content)?)
}

fn unexpected(id: &str, answer: Answer) -> KeepError {
    match answer {
        Answer::Error { kind: ErrorKind::Start, message } => KeepError::Start { id: id.into(), message },
        Answer::Error { kind: ErrorKind::Refused, message } => KeepError::Refused(message),
        other => KeepError::Refused(format!("an answer that does not fit: {other:?}")),
    }
}
