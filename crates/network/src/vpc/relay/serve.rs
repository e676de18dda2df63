//! The relay's process: from its words to its confinement, and connections from their first byte to their last.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, chroot, setgroups, setresgid, setresuid};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{
    BUFFER, CONNECT, IDLE, IDLE_HALF, MAX_CONNECTIONS, MAX_OF_CLIENT, PORT, RelayListener, RelayPlan, RelayState, SENT,
    TRIES, header, read_frame, write_frame,
};
use crate::{Attempt, NetError, fnv};

/// Who a relay is: nobody else on a host.
const USER: u32 = 64_977;
const FILES: u64 = 2 * MAX_CONNECTIONS as u64 + 256;
/// What the kernel keeps for either side of a connection, each way, in bytes.
const KERNELS: usize = 256 << 10;
/// Asks a silent peer whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(300);
/// A client or a target that takes no byte of the header.
const HEADER: Duration = Duration::from_secs(10);
/// Before the next try to accept, when the process has no room.
const BREATH: Duration = Duration::from_millis(50);

/// The program `relay SOCKET ROOT`, called before any thread exists: binds the socket by which it is told what to do, gives up all
/// rights but one, and relays until it is ended. `ROOT` is an empty folder.
pub fn main(words: &[String]) -> Result<(), NetError> {
    let [socket, root] = words else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).attempt(|| "reading the relay's words".into());
    };
    let socket = PathBuf::from(socket);
    let control = bind(&socket).attempt(|| format!("binding {}", socket.display()))?;
    confine(Path::new(root)).attempt(|| "giving up the relay's rights".into())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.attempt(|| "starting the relay".into())?.block_on(Relay::default().run(control))
}

/// In a folder that is the agent's alone.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Leaves no file, no user and no right, but that of sending from others' addresses, which every connection to a target needs. It
/// reaches no further than the namespace that the process is in and can't leave.
fn confine(root: &Path) -> io::Result<()> {
    let failed = |e: caps::errors::CapsError| io::Error::other(e);
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let hard = getrlimit(Resource::RLIMIT_NOFILE)?.1;
    setrlimit(Resource::RLIMIT_NOFILE, FILES.min(hard), FILES.min(hard))?;
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0)?;
    prctl::set_no_new_privs()?;
    chroot(root)?;
    chdir("/")?;
    for capability in caps::all() {
        if caps::has_cap(None, CapSet::Bounding, capability).map_err(failed)? {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
        }
    }
    prctl::set_keepcaps(true)?;
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    let only = CapsHashSet::from([Capability::CAP_NET_RAW]);
    caps::set(None, CapSet::Effective, &only).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &only).map_err(failed)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(failed)?;
    prctl::set_dumpable(false)?;
    // What each connection needs: a kernel before Linux 5.17 wants another right for the mark.
    let probe = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    probe.set_ip_transparent_v4(true)?;
    probe.set_mark(SENT)
}

/// Relays connections in the network namespace that it is run in.
#[derive(Clone, Default)]
pub struct Relay {
    inner: Arc<Inner>,
}

struct Inner {
    known: Mutex<Known>,
    room: Arc<Semaphore>,
    turn: AtomicU64,
    relayed: AtomicU64,
    failed: AtomicU64,
}

impl Default for Inner {
    fn default() -> Self {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (known, turn, relayed, failed) = Default::default();
        Self { known, room, turn, relayed, failed }
    }
}

#[derive(Default)]
struct Known {
    number: u64,
    listeners: HashMap<SocketAddr, Arc<RelayListener>>,
    /// Those that are bound.
    own: Vec<IpAddr>,
    /// Connections of clients.
    of: HashMap<IpAddr, usize>,
}

/// One of a client's connections.
struct OfClient(Relay, IpAddr);

impl Drop for OfClient {
    fn drop(&mut self) {
        let mut known = self.0.known();
        if let Some(count) = known.of.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                known.of.remove(&self.1);
            }
        }
    }
}

impl Relay {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what it is told by the socket, for ever.
    pub async fn run(self, control: UnixListener) -> Result<(), NetError> {
        let control = tokio::net::UnixListener::from_std(control).attempt(|| "listening to the agent".into())?;
        loop {
            match control.accept().await {
                Ok((stream, _)) => {
                    let relay = self.clone();
                    // The agent is the only one that may connect, and closes when it is answered.
                    tokio::spawn(async move { relay.talk(stream).await });
                }
                Err(_) => tokio::time::sleep(BREATH).await,
            }
        }
    }

    async fn talk(&self, mut stream: UnixStream) {
        while let Ok(words) = read_frame(&mut stream).await {
            if !words.is_empty()
                && let Ok(plan) = serde_json::from_slice::<RelayPlan>(&words)
            {
                self.follow(plan, fnv(&words).max(1));
            }
            let answer = serde_json::to_vec(&self.state()).expect("a state is plain data");
            if write_frame(&mut stream, &answer).await.is_err() {
                return;
            }
        }
    }

    fn state(&self) -> RelayState {
        let number = |n: &AtomicU64| n.load(Ordering::Relaxed);
        RelayState {
            plan: self.known().number,
            connections: (MAX_CONNECTIONS - self.inner.room.available_permits()) as u64,
            relayed: number(&self.inner.relayed),
            failed: number(&self.inner.failed),
        }
    }

    /// From now on new connections are relayed so.
    fn follow(&self, plan: RelayPlan, number: u64) {
        let mut known = self.known();
        for own in plan.own {
            if known.own.contains(&own) {
                continue;
            }
            match listen(SocketAddr::new(own, PORT)) {
                Ok(listener) => {
                    known.own.push(own);
                    let relay = self.clone();
                    tokio::spawn(async move { relay.accept(listener).await });
                }
                // The number is not taken over: the agent tells it again, and says so meanwhile.
                Err(_) => return,
            }
        }
        known.listeners = plan.listeners.into_iter().map(|l| (l.at, Arc::new(l))).collect();
        known.number = number;
    }

    async fn accept(self, listener: TcpListener) {
        loop {
            let Ok(room) = self.inner.room.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let relay = self.clone();
                    tokio::spawn(async move {
                        if relay.one(stream, from).await.is_none() {
                            relay.inner.failed.fetch_add(1, Ordering::Relaxed);
                        }
                        drop(room);
                    });
                }
                Err(_) => tokio::time::sleep(BREATH).await,
            }
        }
    }

    /// One connection, to its end. Nothing, if it came to none: then it is reset.
    async fn one(&self, mut client: TcpStream, from: SocketAddr) -> Option<()> {
        // Until it is known to end well.
        let resets = |stream: &TcpStream| SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
        resets(&client)?;
        let _counted = self.count(from.ip())?;
        let at = original(&client)?;
        let listener = self.known().listeners.get(&at).cloned()?;
        settle(&client).ok()?;
        let order = order(&listener, from.ip(), self.inner.turn.fetch_add(1, Ordering::Relaxed));
        let mut target = None;
        for to in order {
            if let Ok(Ok(found)) = tokio::time::timeout(CONNECT, connect(from.ip(), to)).await {
                target = Some(found);
                break;
            }
        }
        let mut target = target?;
        resets(&target)?;
        let header = header(listener.version, from, at);
        tokio::time::timeout(HEADER, target.write_all(&header)).await.ok()?.ok()?;
        self.inner.relayed.fetch_add(1, Ordering::Relaxed);
        if both(&mut client, &mut target).await.is_ok() {
            for stream in [&client, &target] {
                SockRef::from(stream).set_linger(None).ok();
            }
        }
        Some(())
    }

    fn count(&self, client: IpAddr) -> Option<OfClient> {
        let mut known = self.known();
        let count = known.of.entry(client).or_default();
        if *count >= MAX_OF_CLIENT {
            return None;
        }
        *count += 1;
        drop(known);
        Some(OfClient(self.clone(), client))
    }
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // The address may not be there yet.
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&at.into())?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into())
}

/// The address that the client has called.
fn original(stream: &TcpStream) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let found = match stream.local_addr().ok()? {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    found.ok()?.as_socket().map(|at| SocketAddr::new(at.ip(), at.port()))
}

/// The targets that a connection is tried at: the one whose turn it is, or that is its client's, then the others.
fn order(listener: &RelayListener, client: IpAddr, turn: u64) -> Vec<SocketAddr> {
    let sum: u64 = listener.targets.iter().map(|(_, weight)| u64::from(*weight)).sum();
    if sum == 0 {
        return Vec::new();
    }
    let place = if listener.by_source { fnv(client.to_string().as_bytes()) } else { turn } % sum;
    let mut end = 0;
    let first = listener.targets.iter().position(|(_, weight)| {
        end += u64::from(*weight);
        place < end
    });
    let all = listener.targets.iter().map(|(target, _)| *target);
    all.clone().cycle().skip(first.unwrap_or(0)).take(TRIES.min(all.len().max(2))).collect()
}

async fn connect(from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if to.is_ipv6() {
        socket.set_ip_transparent_v6(true)?;
    } else {
        socket.set_ip_transparent_v4(true)?;
    }
    socket.set_mark(SENT)?;
    // Of connections that have just ended too: what counts is that no two are the same.
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    match socket.connect(&to.into()) {
        Err(e) if e.raw_os_error() != Some(nix::libc::EINPROGRESS) => return Err(e),
        _ => {}
    }
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    settle(&stream)?;
    Ok(stream)
}

fn settle(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // What the kernel holds for tenants' connections is the host's memory.
    SockRef::from(stream).set_send_buffer_size(KERNELS)?;
    SockRef::from(stream).set_recv_buffer_size(KERNELS)?;
    SockRef::from(stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
}

/// When something passed last, and whether one direction has ended.
struct Seen {
    since: Instant,
    last_ms: AtomicU64,
    half: AtomicBool,
}

impl Seen {
    fn now(&self) {
        let passed = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(passed, Ordering::Relaxed);
    }

    /// Returns when nothing has passed for too long.
    async fn idle(&self) {
        loop {
            let limit = if self.half.load(Ordering::Relaxed) { IDLE_HALF } else { IDLE };
            let end = self.since + Duration::from_millis(self.last_ms.load(Ordering::Relaxed)) + limit;
            if end <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(end.min(Instant::now() + IDLE_HALF)).await;
        }
    }
}

/// Passes all on in both directions, until both have ended.
async fn both(client: &mut TcpStream, target: &mut TcpStream) -> io::Result<()> {
    let seen = Seen { since: Instant::now(), last_ms: AtomicU64::new(0), half: AtomicBool::new(false) };
    let ((from_client, to_client), (from_target, to_target)) = (client.split(), target.split());
    let passing =
        async { tokio::try_join!(pass(from_client, to_target, &seen), pass(from_target, to_client, &seen)).map(drop) };
    tokio::select! {
        biased;
        done = passing => done,
        () = seen.idle() => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn pass(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, seen: &Seen) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        seen.now();
        if count == 0 {
            seen.half.store(true, Ordering::Relaxed);
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        seen.now();
    }
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::ProxyProtocol;

    use super::*;

    #[test]
    fn targets_take_turns_by_weight_and_a_client_keeps_its_own() {
        let at = |n: u8| SocketAddr::from(([10, 0, 0, n], 80));
        let mut listener = RelayListener {
            at: at(9),
            version: ProxyProtocol::V2,
            by_source: false,
            targets: vec![(at(1), 1), (at(2), 3)],
        };
        let firsts: Vec<_> = (0..8).map(|turn| order(&listener, [10, 0, 0, 7].into(), turn)[0]).collect();
        assert_eq!(firsts.iter().filter(|t| **t == at(1)).count(), 2);
        assert_eq!(order(&listener, [10, 0, 0, 7].into(), 0), [at(1), at(2)], "another, if the first can't be reached");
        listener.by_source = true;
        let of = |n: u8| order(&listener, [10, 0, 0, n].into(), n.into())[0];
        assert!((0..50).all(|n| of(n) == order(&listener, [10, 0, 0, n].into(), 77)[0]));
        assert!((0..50).any(|n| of(n) == at(1)) && (0..50).any(|n| of(n) == at(2)));
        listener.targets.truncate(1);
        assert_eq!(order(&listener, [10, 0, 0, 7].into(), 0), [at(1), at(1)]);
        listener.targets.clear();
        assert!(order(&listener, [10, 0, 0, 7].into(), 0).is_empty());
    }
}
