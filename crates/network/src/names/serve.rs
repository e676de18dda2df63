//! The resolver's sockets: UDP and TCP on port 53 of the address by which instances know their host.
//!
//! ```text
//! instance ── UDP, TCP ──▶ 169.254.1.1:53 ── Directory::decide ──▶ answered here
//!                                                └── names from outside ──▶ the host's own resolvers
//! ```
//!
//! While nobody listens, because the agent restarts, the packet filter keeps the host from saying so; instances ask again
//! by themselves. Everything is bounded: questions a second of one instance, questions that are passed on, connections.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener as StdListener, UdpSocket as StdUdp};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket, sockopt,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::message::Question;
use super::{Carrier, Directory, Outcome, Verdict};
use crate::instance::NAMESERVER;
use crate::netns::{NetnsRef, aside};
use crate::{Attempt, NetError};

const PORT: u16 = 53;
/// Questions of one instance: a second in the long run, and at once after a rest.
const RATE: u32 = 200;
const BURST: u32 = 400;
/// Questions for names from outside that are under way, of all instances and of one.
const FORWARDS: usize = 256;
const FORWARDS_OF_ONE: usize = 64;
/// Connections, of all instances and of one.
const CONNECTIONS: usize = 128;
const CONNECTIONS_OF_ONE: usize = 8;
/// A connection without a question for so long is closed.
const IDLE: Duration = Duration::from_secs(10);
/// For one resolver; there are up to three.
const PATIENCE: Duration = Duration::from_secs(2);
const MAX_RESOLVERS: usize = 3;
/// The longest question.
const MAX_QUESTION: usize = 1024;
const MAX_ANSWER: usize = 65_535;

/// Names a number below its argument, by chance.
pub type Below = dyn Fn(usize) -> usize + Send + Sync;

/// What was asked and how it ended, since the start.
#[derive(Debug, Default)]
pub struct Counts {
    pub answered: AtomicU64,
    pub no_data: AtomicU64,
    pub no_name: AtomicU64,
    pub refused: AtomicU64,
    pub bad: AtomicU64,
    pub unknown: AtomicU64,
    pub forwarded: AtomicU64,
    /// Passed on, and no resolver answered; or too many were under way.
    pub unanswered: AtomicU64,
    /// Not looked at: the instance asks too much.
    pub limited: AtomicU64,
}

impl Counts {
    /// All of them with their names.
    pub fn all(&self) -> [(&'static str, u64); 9] {
        let of = |c: &AtomicU64| c.load(Ordering::Relaxed);
        [
            ("answered", of(&self.answered)),
            ("nodata", of(&self.no_data)),
            ("nxdomain", of(&self.no_name)),
            ("refused", of(&self.refused)),
            ("malformed", of(&self.bad)),
            ("unknown-project", of(&self.unknown)),
            ("forwarded", of(&self.forwarded)),
            ("unanswered", of(&self.unanswered)),
            ("limited", of(&self.limited)),
        ]
    }

    fn count(&self, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Answered => &self.answered,
            Outcome::NoData => &self.no_data,
            Outcome::NoName => &self.no_name,
            Outcome::Refused => &self.refused,
            Outcome::Bad => &self.bad,
            Outcome::Unknown => &self.unknown,
        };
        one(counter);
    }
}

fn one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A host's resolver.
#[derive(Clone)]
pub struct Resolver {
    host: NetnsRef,
    /// Names the host's own resolvers, as resolv.conf(5) does.
    resolv_conf: PathBuf,
    directory: watch::Receiver<Arc<Directory>>,
    below: Arc<Below>,
    pub counts: Arc<Counts>,
    forwards: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    limits: Arc<std::sync::Mutex<HashMap<Ipv4Addr, Limit>>>,
}

/// What one instance may still ask.
struct Limit {
    tokens: f64,
    at: Instant,
    forwards: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Limit {
    fn new(now: Instant) -> Self {
        let forwards = Arc::new(Semaphore::new(FORWARDS_OF_ONE));
        Self { tokens: BURST.into(), at: now, forwards, connections: Arc::new(Semaphore::new(CONNECTIONS_OF_ONE)) }
    }

    fn take(&mut self, now: Instant) -> bool {
        let more = now.duration_since(self.at).as_secs_f64() * f64::from(RATE);
        (self.tokens, self.at) = ((self.tokens + more).min(BURST.into()), now);
        let may = self.tokens >= 1.0;
        if may {
            self.tokens -= 1.0;
        }
        may
    }
}

impl Resolver {
    /// A resolver on the host of `host`, which answers by whatever `directory` holds.
    pub fn new(
        host: NetnsRef,
        resolv_conf: impl Into<PathBuf>,
        directory: watch::Receiver<Arc<Directory>>,
        below: Arc<Below>,
    ) -> Self {
        Self {
            host,
            resolv_conf: resolv_conf.into(),
            directory,
            below,
            counts: Arc::default(),
            forwards: Arc::new(Semaphore::new(FORWARDS)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            limits: Arc::default(),
        }
    }

    /// Serves until it is dropped. While the port is another's, such as an agent's that is about to end, it waits.
    pub async fn run(self) {
        let mut told = false;
        loop {
            match self.sockets().await {
                Ok((udp, tcp)) => {
                    tokio::join!(self.clone().datagrams(udp), self.clone().streams(tcp));
                    return;
                }
                Err(error) if !told => {
                    told = true;
                    tracing::warn!(%error, "names can't be answered yet; trying again");
                }
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn sockets(&self) -> Result<(UdpSocket, TcpListener), NetError> {
        let opened = aside(self.host.clone(), "the resolver's sockets", || {
            let udp = open(SockType::Datagram).attempt(|| format!("listening on UDP {NAMESERVER}:{PORT}"))?;
            let tcp = open(SockType::Stream).attempt(|| format!("listening on TCP {NAMESERVER}:{PORT}"))?;
            Ok((StdUdp::from(udp), StdListener::from(tcp)))
        });
        let (udp, tcp) = opened.await?;
        let attempt = || "taking the resolver's sockets into use".to_owned();
        Ok((UdpSocket::from_std(udp).attempt(attempt)?, TcpListener::from_std(tcp).attempt(attempt)?))
    }

    /// Whether an instance may ask one more question.
    pub(super) fn may_ask(&self, asker: Ipv4Addr) -> bool {
        // Only those that are here are counted, so there are never more counters than instances.
        if !self.directory.borrow().askers.contains_key(&asker) {
            return false;
        }
        let may = self.limit(asker, Limit::take);
        if !may {
            one(&self.counts.limited);
        }
        may
    }

    fn limit<T>(&self, asker: Ipv4Addr, f: impl FnOnce(&mut Limit, Instant) -> T) -> T {
        let mut limits = self.limits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = Instant::now();
        if limits.len() > 4096 {
            let directory = self.directory.borrow();
            limits.retain(|asker, _| directory.askers.contains_key(asker));
        }
        f(limits.entry(asker).or_insert_with(|| Limit::new(now)), now)
    }

    pub(super) fn decide(&self, message: &[u8], asker: Ipv4Addr, carrier: Carrier) -> Verdict {
        let directory = self.directory.borrow().clone();
        let verdict = directory.decide(message, asker, carrier, &mut |n| (self.below)(n));
        if let Verdict::Answer(_, outcome) = &verdict {
            self.counts.count(*outcome);
        }
        verdict
    }

    async fn datagrams(self, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut passing: JoinSet<()> = JoinSet::new();
        let mut buffer = [0; MAX_QUESTION + 1];
        loop {
            while passing.try_join_next().is_some() {}
            let (length, from) = match socket.recv_from(&mut buffer).await {
                Ok((length, SocketAddr::V4(from))) => (length, from),
                Ok(_) => continue,
                // Such as an answer that could not be delivered.
                Err(_) => continue,
            };
            let asker = *from.ip();
            if length > MAX_QUESTION || !self.may_ask(asker) {
                continue;
            }
            let message = &buffer[..length];
            match self.decide(message, asker, Carrier::Udp) {
                Verdict::Answer(answer, _) => drop(socket.send_to(&answer, from).await),
                Verdict::Ignore => {}
                Verdict::Forward => {
                    let (resolver, socket, message) = (self.clone(), socket.clone(), message.to_vec());
                    let Some(permits) = self.permits(asker) else {
                        if let Some(answer) = Directory::failed(&message, Carrier::Udp) {
                            let _ = socket.send_to(&answer, from).await;
                        }
                        continue;
                    };
                    passing.spawn(async move {
                        let _permits = permits;
                        if let Some(answer) = resolver.pass_on(&message, Carrier::Udp).await {
                            let _ = socket.send_to(&answer, from).await;
                        }
                    });
                }
            }
        }
    }

    /// The right to pass a question on: of the host, and of the one that asks.
    pub(super) fn permits(&self, asker: Ipv4Addr) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let own = self.limit(asker, |limit, _| limit.forwards.clone());
        let permits = self.forwards.clone().try_acquire_owned().ok().zip(own.try_acquire_owned().ok());
        if permits.is_none() {
            one(&self.counts.unanswered);
        }
        permits
    }

    async fn streams(self, listener: TcpListener) {
        let mut connections: JoinSet<()> = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            let (stream, from) = match listener.accept().await {
                Ok((stream, SocketAddr::V4(from))) => (stream, from),
                Ok(_) => continue,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let asker = *from.ip();
            if !self.directory.borrow().askers.contains_key(&asker) {
                continue;
            }
            let own = self.limit(asker, |limit, _| limit.connections.clone());
            let Ok(own) = own.try_acquire_owned() else { continue };
            let resolver = self.clone();
            connections.spawn(async move {
                let _permits = (permit, own);
                // However it ends, it is over.
                let _ = resolver.stream(stream, asker).await;
            });
        }
    }

    /// One connection: questions with their lengths in front (RFC 7766), answered in turn.
    async fn stream(&self, mut stream: TcpStream, asker: Ipv4Addr) -> io::Result<()> {
        loop {
            let read = async {
                let length = usize::from(stream.read_u16().await?);
                if length > MAX_QUESTION {
                    return Err(io::Error::from(io::ErrorKind::InvalidData));
                }
                let mut message = vec![0; length];
                stream.read_exact(&mut message).await?;
                Ok(message)
            };
            let message = timeout(IDLE, read).await.map_err(|_| io::ErrorKind::TimedOut)??;
            if !self.may_ask(asker) {
                return Ok(());
            }
            let answer = match self.decide(&message, asker, Carrier::Tcp) {
                Verdict::Answer(answer, _) => Some(answer),
                Verdict::Ignore => return Ok(()),
                Verdict::Forward => match self.permits(asker) {
                    Some(_permits) => self.pass_on(&message, Carrier::Tcp).await,
                    None => Directory::failed(&message, Carrier::Tcp),
                },
            };
            let Some(answer) = answer else { return Ok(()) };
            let length = u16::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidData)?;
            let mut framed = length.to_be_bytes().to_vec();
            framed.extend(answer);
            timeout(IDLE, stream.write_all(&framed)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        }
    }

    /// Asks the host's own resolvers, one after the other, and answers in the asker's words.
    pub(super) async fn pass_on(&self, message: &[u8], carrier: Carrier) -> Option<Vec<u8>> {
        let id = [message[0], message[1]];
        let mut question = message.to_vec();
        for resolver in self.resolvers().await {
            // Nobody may guess what an answer has to bear.
            question[0] = (self.below)(256) as u8;
            question[1] = (self.below)(256) as u8;
            let asked = match carrier {
                Carrier::Udp => timeout(PATIENCE, self.ask_by_udp(resolver, &question)).await,
                Carrier::Tcp => timeout(PATIENCE, self.ask_by_tcp(resolver, &question)).await,
            };
            match asked {
                Ok(Ok(mut answer)) => {
                    answer[..2].copy_from_slice(&id);
                    one(&self.counts.forwarded);
                    return Some(answer);
                }
                Ok(Err(error)) => tracing::debug!(%resolver, %error, "a resolver can't be asked"),
                Err(_) => tracing::debug!(%resolver, "a resolver does not answer"),
            }
        }
        one(&self.counts.unanswered);
        Directory::failed(message, carrier)
    }

    async fn resolvers(&self) -> Vec<SocketAddr> {
        let path = self.resolv_conf.clone();
        tokio::task::spawn_blocking(move || resolvers(&path)).await.unwrap_or_default()
    }

    async fn ask_by_udp(&self, resolver: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
        let any: SocketAddr = match resolver {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let opened = match &self.host {
            NetnsRef::Own => StdUdp::bind(any)?,
            other => {
                let bound = aside(other.clone(), "a question", move || StdUdp::bind(any).attempt(String::new));
                bound.await.map_err(io::Error::other)?
            }
        };
        opened.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(opened)?;
        socket.connect(resolver).await?;
        socket.send(question).await?;
        let mut buffer = vec![0; MAX_ANSWER];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if is_answer(question, &buffer[..length]) {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
    }

    async fn ask_by_tcp(&self, resolver: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = match &self.host {
            NetnsRef::Own => TcpStream::connect(resolver).await?,
            other => {
                let connected = aside(other.clone(), "a question", move || {
                    std::net::TcpStream::connect_timeout(&resolver, PATIENCE).attempt(String::new)
                });
                let stream = connected.await.map_err(io::Error::other)?;
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream)?
            }
        };
        let length = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(question);
        stream.write_all(&framed).await?;
        let length = usize::from(stream.read_u16().await?);
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await?;
        if is_answer(question, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

fn is_answer(question: &[u8], answer: &[u8]) -> bool {
    Question::read(question).is_ok_and(|q| q.is_answered_by(answer))
}

/// A socket on the resolver's address, which need not be there yet: it comes with the first instance.
fn open(kind: SockType) -> Result<OwnedFd, nix::Error> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet, kind, flags, None)?;
    setsockopt(&fd, sockopt::IpFreebind, &true)?;
    if kind == SockType::Stream {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(NAMESERVER, PORT)))?;
    if kind == SockType::Stream {
        listen(&fd, Backlog::new(128)?)?;
    }
    Ok(fd)
}

/// The resolvers that a resolv.conf(5) names.
fn resolvers(path: &Path) -> Vec<SocketAddr> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            return None;
        }
        let address: IpAddr = words.next()?.parse().ok()?;
        // It would be this one.
        (address != NAMESERVER).then_some(SocketAddr::new(address, PORT))
    });
    named.take(MAX_RESOLVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_as_resolv_conf_names_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let text = "# a comment\nsearch example\nnameserver 9.9.9.9\n nameserver  2620:fe::fe \nnameserver 169.254.1.1\n\
                    nameserver nonsense\nnameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        std::fs::write(&path, text).unwrap();
        let found: Vec<String> = resolvers(&path).iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["9.9.9.9:53", "[2620:fe::fe]:53", "1.1.1.1:53"]);
        assert!(resolvers(&dir.path().join("none")).is_empty());
    }

    #[test]
    fn an_instance_asks_so_much_and_no_more() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        assert_eq!((0..1000).filter(|_| limit.take(start)).count(), BURST as usize);
        let later = start + Duration::from_millis(500);
        assert_eq!((0..1000).filter(|_| limit.take(later)).count(), (RATE / 2) as usize);
    }
}
