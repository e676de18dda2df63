//! How functions get connections to others: an executor asks its agent for each, and is handed the connected socket.
//!
//! An executor has no network of its own. The agent makes a pair of sockets and hands one to an executor that serves something
//! ([`super::control::Request::Outlet`]); by that the executor asks, whenever a function begins a request to somebody:
//!
//! ```text
//! executor ── Ask::Connect { instance, host, port, within }, one end of a new pair ──▶ agent
//!          ◀── Answer::Done with the connected socket, or why there is none, by that pair ──
//! ```
//!
//! Each message is one packet (`SOCK_SEQPACKET`) of JSON, and each question has a pair of its own, so that answers come in whatever
//! order, and the end of an agent is the end of every question that it has not answered: it is asked again when the next agent has
//! handed over the next socket. Connections are the executor's once it has them; no agent is needed for them.
//!
//! Who asks for whom is the agent's to check: an executor gets connections for those instances alone that it was given.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnix;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nexus_model::Uid;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::agent::blocking;
use super::client;
use super::control::{Reply, Request, take};
use crate::runtime::{Connections, NoConnection, NoConnectionKind};

/// The largest message: a name of 253 bytes, or a reason.
const MAX_MESSAGE: usize = 8 << 10;

/// The longest reason that is told.
const MAX_REASON: usize = 1024;

/// Questions of one executor that are looked into at once; more wait in the socket.
const QUESTIONS: usize = 256;

/// Questions of one executor in a second: what is opened for it takes the agent's time, which is everybody's.
const RATE: u32 = 1000;
const SECOND: Duration = Duration::from_secs(1);

/// How long an agent may take beyond what the question allows.
const SLACK: Duration = Duration::from_secs(1);

/// Between tries of a question for which the socket has no room.
const FULL: Duration = Duration::from_millis(5);

/// How long an instance may be unknown to the agent that has just been given to the executor.
const KNOWN: Duration = Duration::from_secs(1);

/// The certificates of authorities, all together.
const MAX_ROOTS: u64 = 8 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Ask {
    /// A connection for an instance, at the latest after so many milliseconds.
    Connect { instance: Uid, host: String, port: u16, within: u64 },
    /// The authorities that the host trusts, as a file of certificates: see [`write_roots`].
    Roots,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Answer {
    /// What was asked for comes along.
    Done,
    No(NoConnection),
}

/// Of packets, whatever its type says: only what both kinds have in common is used.
type Socket = UnixStream;

/// To be called within the runtime.
fn adopt(socket: OwnedFd) -> io::Result<Socket> {
    let socket = StdUnix::from(socket);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

fn send(socket: &impl AsRawFd, message: &impl Serialize, fds: &[RawFd]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    if body.len() > MAX_MESSAGE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    // The socket may be one that the other side has chosen: it holds nobody up.
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&body)], control, flags, None)?;
    Ok(())
}

/// The next message, or `None` when the other side has gone.
async fn receive<T: DeserializeOwned>(socket: &Socket) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    let taken =
        socket.async_io(Interest::READABLE, || take(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)).await;
    let (length, fds) = match taken {
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        other => other?,
    };
    if length == 0 {
        return Ok(None);
    }
    if length > MAX_MESSAGE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Some((serde_json::from_slice(&buffer[..length])?, fds)))
}

/// The executor's side.
pub(super) struct Outlet {
    agent: watch::Sender<Option<Arc<Socket>>>,
}

impl Outlet {
    pub fn new() -> Self {
        Self { agent: watch::Sender::new(None) }
    }

    /// Asks by this socket from now on. To be called within the runtime.
    pub fn replace(&self, socket: OwnedFd) -> io::Result<()> {
        self.agent.send_replace(Some(Arc::new(adopt(socket)?)));
        Ok(())
    }

    /// A connection for an instance.
    pub async fn connect(
        &self,
        instance: Uid,
        host: &str,
        port: u16,
        within: Duration,
    ) -> Result<OwnedFd, NoConnection> {
        let deadline = Instant::now() + within;
        let left = || u64::try_from(deadline.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(0);
        let ask = || Ask::Connect { instance, host: host.to_owned(), port, within: left() };
        self.ask(ask, deadline + SLACK).await
    }

    /// The authorities that the host trusts, each a certificate (DER).
    pub async fn roots(&self, within: Duration) -> Result<Vec<Vec<u8>>, NoConnection> {
        let file = self.ask(|| Ask::Roots, Instant::now() + within).await?;
        let read = blocking(move || read_roots(file.into())).await;
        read.map_err(|e| NoConnection::of(NoConnectionKind::Busy, format!("the host's authorities can't be read: {e}")))
    }

    /// Asks, as often as agents end over it.
    async fn ask(&self, question: impl Fn() -> Ask, deadline: Instant) -> Result<OwnedFd, NoConnection> {
        let silent = || {
            NoConnection::of(
                NoConnectionKind::Busy,
                "the host's agent, which opens connections, does not answer".to_owned(),
            )
        };
        let failed =
            |e: io::Error| NoConnection::of(NoConnectionKind::Busy, format!("the host's agent can't be asked: {e}"));
        let mut agents = self.agent.subscribe();
        loop {
            let known = timeout_at(deadline, agents.wait_for(Option::is_some)).await;
            let agent = known.map_err(|_| silent())?.ok().and_then(|a| a.clone()).ok_or_else(silent)?;
            let (ours, theirs) = pair().map_err(failed)?;
            match send(&*agent, &question(), &[theirs.as_raw_fd()]) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        return Err(silent());
                    }
                    sleep(FULL).await;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(failed(e)),
                // It has ended.
                Err(_) => {
                    self.lose(&agent);
                    continue;
                }
            }
            // The answer's other end is the agent's alone, so that its end is noticed.
            drop(theirs);
            let ours = adopt(ours).map_err(failed)?;
            let answered = timeout_at(deadline, receive::<Answer>(&ours)).await.map_err(|_| silent())?;
            match answered.map_err(failed)? {
                Some((Answer::Done, mut fds)) if fds.len() == 1 => return Ok(fds.remove(0)),
                Some((Answer::Done, _)) => return Err(failed(io::ErrorKind::InvalidData.into())),
                Some((Answer::No(why), _)) => return Err(why),
                None => self.lose(&agent),
            }
        }
    }

    /// Waits for another agent, unless there is one already.
    fn lose(&self, agent: &Arc<Socket>) {
        self.agent.send_if_modified(|now| {
            let same = now.as_ref().is_some_and(|now| Arc::ptr_eq(now, agent));
            if same {
                *now = None;
            }
            same
        });
    }
}

/// Whether an instance is one that an executor was given.
pub(super) type Serves = dyn Fn(&str, Uid) -> bool + Send + Sync;

/// The agent's side: a socket to each executor that serves something.
pub(super) struct Outlets {
    /// Where executors' control sockets are.
    folder: PathBuf,
    serves: Arc<Serves>,
    connections: OnceLock<Arc<dyn Connections>>,
    open: Mutex<BTreeMap<String, AbortOnDropHandle<()>>>,
}

impl Outlets {
    pub fn new(folder: PathBuf, serves: Arc<Serves>) -> Self {
        Self { folder, serves, connections: OnceLock::new(), open: Mutex::default() }
    }

    /// From now on connections are opened so.
    pub fn connect_by(&self, connections: Arc<dyn Connections>) {
        // Said once for all, by whoever drives the runtime.
        let _ = self.connections.set(connections);
    }

    /// Sees to it that an executor can ask. Returns at once.
    pub fn ensure(&self, executor: &str) {
        let Some(connections) = self.connections.get().cloned() else { return };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, task| !task.is_finished());
        if open.contains_key(executor) {
            return;
        }
        let (folder, id, serves) = (self.folder.clone(), executor.to_owned(), self.serves.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = serve(folder, &id, serves, connections).await {
                tracing::debug!(executor = %id, %error, "an executor can't ask for connections; it is tried again");
            }
        });
        open.insert(executor.to_owned(), AbortOnDropHandle::new(task));
    }
}

/// Answers an executor until it ends.
async fn serve(folder: PathBuf, id: &str, serves: Arc<Serves>, connections: Arc<dyn Connections>) -> io::Result<()> {
    let (ours, theirs) = pair()?;
    let name = id.to_owned();
    let handed = blocking(move || client::ask(&folder, &name, &Request::Outlet, &[theirs])).await?;
    if !matches!(handed, Reply::Done) {
        return Err(io::Error::other(format!("{handed:?}")));
    }
    let ours = adopt(ours)?;
    let places = Arc::new(Semaphore::new(QUESTIONS));
    let mut answering = JoinSet::new();
    let (mut begun, mut asked) = (Instant::now(), 0);
    loop {
        while answering.try_join_next().is_some() {}
        if begun.elapsed() >= SECOND {
            (begun, asked) = (Instant::now(), 0);
        } else if asked >= RATE {
            sleep_until(begun + SECOND).await;
            continue;
        }
        asked += 1;
        let place = places.clone().acquire_owned().await.expect("never closed");
        let Some((ask, fds)) = receive::<Ask>(&ours).await? else { return Ok(()) };
        let Ok([back]) = <[OwnedFd; 1]>::try_from(fds) else { continue };
        let (id, serves, connections) = (id.to_owned(), serves.clone(), connections.clone());
        answering.spawn(async move {
            let _place = place;
            let Ok(back) = adopt(back) else { return };
            // Nothing is ever said there but this answer: who has gone wants it no more.
            let outcome = tokio::select! {
                biased;
                _ = back.readable() => return,
                outcome = answer(&id, &ask, &*serves, &*connections) => outcome,
            };
            let sent = match &outcome {
                Ok(fd) => send(&back, &Answer::Done, &[fd.as_raw_fd()]),
                Err(why) => send(&back, &Answer::No(why.clone()), &[]),
            };
            if let Err(error) = sent {
                tracing::debug!(executor = %id, %error, "a question for a connection is nobody's any more");
            }
        });
    }
}

async fn answer(id: &str, ask: &Ask, serves: &Serves, connections: &dyn Connections) -> Result<OwnedFd, NoConnection> {
    match ask {
        Ask::Connect { instance, host, port, within } => {
            let deadline = Instant::now() + Duration::from_millis(*within);
            let patience = Instant::now() + KNOWN;
            while !serves(id, *instance) {
                if Instant::now() >= patience.min(deadline) {
                    let why = "the executor does not serve that instance".to_owned();
                    return Err(NoConnection::of(NoConnectionKind::Prohibited, why));
                }
                sleep(Duration::from_millis(20)).await;
            }
            let connecting = connections.connect(*instance, host, *port);
            let timely = timeout_at(deadline, connecting).await;
            let mut outcome = timely.unwrap_or_else(|_| {
                Err(NoConnection::of(NoConnectionKind::Timeout, "nothing has answered in time".to_owned()))
            });
            if let Err(no) = &mut outcome {
                let end = (0..=MAX_REASON.min(no.why.len())).rev().find(|at| no.why.is_char_boundary(*at));
                no.why.truncate(end.unwrap_or(0));
            }
            outcome
        }
        Ask::Roots => {
            let failed = |e: io::Error| {
                NoConnection::of(NoConnectionKind::Busy, format!("the host's authorities can't be read: {e}"))
            };
            let roots = connections.roots().await.map_err(failed)?;
            blocking(move || write_roots(&roots)).await.map_err(failed)
        }
    }
}

/// A file in memory with the length of each certificate in 4 bytes, little-endian, before it.
fn write_roots(roots: &[Vec<u8>]) -> io::Result<OwnedFd> {
    let file = nix::sys::memfd::memfd_create("roots", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    for root in roots {
        let length = u32::try_from(root.len()).map_err(io::Error::other)?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(root)?;
    }
    Ok(file.into())
}

fn read_roots(mut file: std::fs::File) -> io::Result<Vec<Vec<u8>>> {
    file.rewind()?;
    let mut bytes = Vec::new();
    (&mut file).take(MAX_ROOTS).read_to_end(&mut bytes)?;
    let mut bytes = VecDeque::from(bytes);
    let mut roots = Vec::new();
    while bytes.len() > 4 {
        let mut head = [0; 4];
        bytes.read_exact(&mut head)?;
        let length = u32::from_le_bytes(head) as usize;
        if length > bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        roots.push(bytes.drain(..length).collect());
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_arrive_as_they_were_sent() {
        let roots = vec![vec![1, 2, 3], vec![4; 2000]];
        assert_eq!(read_roots(write_roots(&roots).unwrap().into()).unwrap(), roots);
    }

    #[tokio::test]
    async fn a_question_is_asked_again_of_the_next_agent() {
        let outlet = Arc::new(Outlet::new());
        let (first, theirs) = pair().unwrap();
        outlet.replace(theirs).unwrap();
        let asking = tokio::spawn({
            let outlet = outlet.clone();
            async move { outlet.connect(Uid::from_random([1; 16]), "web", 80, Duration::from_secs(60)).await }
        });
        let first = adopt(first).unwrap();
        let (ask, back) = receive::<Ask>(&first).await.unwrap().unwrap();
        assert!(matches!(ask, Ask::Connect { ref host, port: 80, .. } if host == "web"), "{ask:?}");
        // It ends without an answer.
        drop((first, back));
        let (second, theirs) = pair().unwrap();
        outlet.replace(theirs).unwrap();
        let second = adopt(second).unwrap();
        let (_, back) = receive::<Ask>(&second).await.unwrap().unwrap();
        let why = NoConnection::of(NoConnectionKind::Refused, "no".into());
        send(&back[0], &Answer::No(why.clone()), &[]).unwrap();
        assert_eq!(asking.await.unwrap().map(|_| ()), Err(why));
    }

    struct Nobody;

    #[async_trait::async_trait]
    impl Connections for Nobody {
        async fn connect(&self, _: Uid, _: &str, _: u16) -> Result<OwnedFd, NoConnection> {
            Err(NoConnection::of(NoConnectionKind::Refused, "x".repeat(100_000)))
        }

        async fn roots(&self) -> io::Result<Vec<Vec<u8>>> {
            Ok(Vec::new())
        }
    }

    #[tokio::test]
    async fn an_executor_gets_connections_for_its_own_instances_alone() {
        let (own, other) = (Uid::from_random([1; 16]), Uid::from_random([2; 16]));
        let serves = move |id: &str, uid: Uid| id == "executor-1" && uid == own;
        let ask = |instance| Ask::Connect { instance, host: "web".into(), port: 80, within: 60_000 };
        let of_another = answer("executor-1", &ask(other), &serves, &Nobody).await.unwrap_err();
        assert_eq!(of_another.kind, NoConnectionKind::Prohibited, "{of_another}");
        let of_its_own = answer("executor-1", &ask(own), &serves, &Nobody).await.unwrap_err();
        assert_eq!((of_its_own.kind, of_its_own.why.len()), (NoConnectionKind::Refused, MAX_REASON));
    }

    #[tokio::test]
    async fn without_an_agent_a_question_ends_at_its_time() {
        let none = Outlet::new().connect(Uid::from_random([1; 16]), "web", 80, Duration::from_millis(10)).await;
        assert_eq!(none.unwrap_err().kind, NoConnectionKind::Busy);
    }
}
