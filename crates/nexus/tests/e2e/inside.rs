//! What a workload does with its network, done by the test itself: on a thread that has entered the workload's network namespace.
//! No server and no agent of the cloud takes part, so it goes on when they are dead.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// What is answered is waited for so long, and what must not come is listened for so long.
pub const PATIENCE: Duration = Duration::from_secs(10);
pub const BRIEFLY: Duration = Duration::from_millis(1500);

/// Does something on a thread of its own, in the network namespace of a process.
pub fn spawn<T: Send + 'static>(pid: i32, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::spawn(move || {
        if pid != 0 {
            let netns = File::open(format!("/proc/{pid}/ns/net")).expect("the process lives");
            setns(netns, CloneFlags::CLONE_NEWNET).expect("it is a network namespace");
        }
        work()
    })
}

/// The same, waited for. Process 0 is for this machine itself.
pub fn inside<T: Send + 'static>(pid: i32, work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn(pid, work).join().unwrap_or_else(|e| std::panic::resume_unwind(e))
}

/// What a web server says, and by which address of ours.
pub fn get(pid: i32, to: SocketAddr, path: &str, patience: Duration) -> Result<String, String> {
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    inside(pid, move || {
        let work = || {
            let mut stream = TcpStream::connect_timeout(&to, patience)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(request.as_bytes())?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            std::io::Result::Ok(text.rsplit("\r\n\r\n").next().unwrap_or_default().trim().to_owned())
        };
        work().map_err(|e| format!("{to}: {e}"))
    })
}

/// Whether a datagram comes to a receiver, and its answer back.
pub fn datagram(from: i32, receiver: i32, to: SocketAddr, patience: Duration) -> bool {
    let listening = inside(receiver, move || UdpSocket::bind((unspecified(to), to.port())));
    let listening = listening.expect("the port is free");
    listening.set_read_timeout(Some(patience)).unwrap();
    let asked = inside(from, move || {
        let socket = UdpSocket::bind((unspecified(to), 0)).unwrap();
        socket.connect(to)?;
        socket.send(b"are you there?")?;
        std::io::Result::Ok(socket)
    });
    // A network that nothing leads to refuses at once.
    let Ok(socket) = asked else { return false };
    let mut buffer = [0; 64];
    // Others may say other things to it meanwhile.
    let by = loop {
        let Ok((length, by)) = listening.recv_from(&mut buffer) else { return false };
        if &buffer[..length] == b"are you there?" {
            break by;
        }
    };
    listening.send_to(b"yes", by).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = socket.recv(&mut buffer).expect("an answer to what was let through passes");
    assert_eq!(&buffer[..length], b"yes");
    true
}

fn unspecified(like: SocketAddr) -> IpAddr {
    if like.is_ipv6() { std::net::Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// Whether an address answers a ping.
pub fn ping(pid: i32, to: IpAddr, patience: Duration) -> bool {
    let seconds = patience.as_secs().max(1).to_string();
    let to = to.to_string();
    let words = ["--net", "/bin/busybox", "ping", "-c", "1", "-W", &seconds, &to];
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string()]).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

/// The addresses of a link, as `ip` says them.
pub fn addresses(pid: i32, link: &str) -> Vec<IpAddr> {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--net", "ip", "-o", "addr", "show", "dev", link]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace().filter_map(|word| word.split_once('/')?.0.parse().ok());
    words.collect()
}

/// The address that a DHCP client on a link is given; it does nothing with it.
pub fn dhcp(pid: i32, link: &str) -> Result<IpAddr, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("told");
    std::fs::write(&script, "#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip\"\nexit 0\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--net", "/bin/busybox", "udhcpc", "-i", link]);
    command.args(["-f", "-q", "-n", "-t", "5", "-T", "2", "-s"]).arg(&script);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let (told, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    told.trim().parse().map_err(|_| format!("no address: {told}{error}"))
}

/// A link's hardware address.
pub fn mac(pid: i32, link: &'static str) -> [u8; 6] {
    let text = inside(pid, move || {
        let output = Command::new("ip").args(["-o", "link", "show", "dev", link]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    let after = text.split("link/ether ").nth(1).unwrap_or_else(|| panic!("{link} has none: {text}"));
    let mut bytes = after.split([' ', ':']).take(6).map(|b| u8::from_str_radix(b, 16).unwrap());
    std::array::from_fn(|_| bytes.next().unwrap())
}

/// A server that says back what it is told, until it is dropped.
pub struct Echo(Arc<AtomicBool>);

impl Echo {
    pub fn start(pid: i32, port: u16) -> Self {
        let listener = inside(pid, move || TcpListener::bind((std::net::Ipv6Addr::UNSPECIFIED, port))).unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, _)) => {
                        stream.set_nonblocking(false).unwrap();
                        let mut back = stream.try_clone().unwrap();
                        std::thread::spawn(move || std::io::copy(&mut stream, &mut back));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        Self(stop)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A connection to an echo that is used all the time.
pub struct Talk {
    what: String,
    stop: Arc<AtomicBool>,
    turns: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

impl Talk {
    pub fn begin(what: &str, pid: i32, to: SocketAddr) -> Self {
        Self::begin_after(what, pid, to, Vec::new(), 0)
    }

    /// The same with these bytes before, and so many more of any sort.
    pub fn begin_after(what: &str, pid: i32, to: SocketAddr, first: Vec<u8>, more: usize) -> Self {
        let (stop, turns) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), turns.clone());
        let work = move || {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| format!("connecting: {e}"))?;
            // Longer than whatever is killed may be away: a packet that is lost comes again.
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream.set_nodelay(true).unwrap();
            let mut found = vec![0; first.len() + more];
            stream.read_exact(&mut found).map_err(|e| format!("hearing the first bytes: {e}"))?;
            if !found.starts_with(&first) {
                return Err(format!("it begins with {found:?}"));
            }
            let mut buffer = [0; 256];
            while !stopped.load(Ordering::Relaxed) {
                let turn = counted.load(Ordering::Relaxed) as u8;
                stream.write_all(&[turn; 256]).map_err(|e| format!("sending: {e}"))?;
                stream.read_exact(&mut buffer).map_err(|e| format!("hearing: {e}"))?;
                if buffer != [turn; 256] {
                    return Err("another's words".into());
                }
                counted.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        };
        Self { what: what.to_owned(), stop, turns, thread: spawn(pid, work) }
    }

    /// Waits until it has gone back and forth some more.
    pub fn goes_on(&self) {
        let (before, begun) = (self.turns.load(Ordering::Relaxed), Instant::now());
        while self.turns.load(Ordering::Relaxed) < before + 20 {
            assert!(!self.thread.is_finished(), "the connection {} is broken", self.what);
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing more comes over {}", self.what);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// It must never have been broken.
    pub fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(why) = self.thread.join().unwrap() {
            panic!("the connection {} broke: {why}", self.what);
        }
    }
}

/// A socket for whole frames of a link.
fn packets(link: &str) -> (OwnedFd, LinkAddr) {
    let all = nix::libc::ETH_P_ALL;
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let index = nix::net::if_::if_nametoindex(link).unwrap();
    // SAFETY: a sockaddr_ll of nought is a well-formed one, and its length is told.
    let address = unsafe {
        let mut raw: nix::libc::sockaddr_ll = std::mem::zeroed();
        raw.sll_family = nix::libc::AF_PACKET as u16;
        raw.sll_protocol = (all as u16).to_be();
        raw.sll_ifindex = index.cast_signed();
        LinkAddr::from_raw((&raw const raw).cast(), Some(size_of::<nix::libc::sockaddr_ll>() as u32)).unwrap()
    };
    nix::sys::socket::bind(fd.as_raw_fd(), &address).unwrap();
    (fd, address)
}

/// Sends whole frames from a link. What the kernel itself refuses, such as one without a header, is passed over.
pub fn send_frames(pid: i32, link: &'static str, frames: Vec<Vec<u8>>) -> usize {
    inside(pid, move || {
        let (fd, address) = packets(link);
        let send = |frame: &Vec<u8>| sendto(fd.as_raw_fd(), frame, &address, MsgFlags::empty()).is_ok();
        frames.iter().filter(|frame| send(frame)).count()
    })
}

/// Counts the frames of a link in which these bytes are.
pub struct Sniffer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Sniffer {
    pub fn start(pid: i32, link: &'static str, bytes: &'static [u8]) -> Self {
        let fd = inside(pid, move || packets(link).0);
        setsockopt(&fd, sockopt::RcvBuf, &(16 << 20)).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut seen, mut buffer) = (0, vec![0; 1 << 16]);
            loop {
                // What came before it was stopped is read first, and then nothing more is waited for.
                let over = stopped.load(Ordering::Relaxed);
                let flags = if over { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
                match recv(fd.as_raw_fd(), &mut buffer, flags) {
                    Ok(length) => seen += u64::from(buffer[..length].windows(bytes.len()).any(|w| w == bytes)),
                    Err(_) if over => return seen,
                    Err(_) => {}
                }
            }
        });
        Self { stop, thread }
    }

    pub fn seen(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
