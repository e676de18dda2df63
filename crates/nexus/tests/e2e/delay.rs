//! A way that takes its time: what a local host sends to the machine passes a TUN device of the host's own, behind which a
//! thread of the test holds each packet for a while and puts it back. The kernels that tests run on have no netem.
//!
//! Only what the host itself sends is turned to the device (`ip rule … iif lo`); what comes back from it is forwarded
//! as anything else is. The rule and the device go with the relay.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const DEVICE: &str = "slow0";
const TABLE: &str = "77";
/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;

pub struct Relay {
    stop: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Delays what the host whose first process is `pid` sends to `to`.
    pub fn start(pid: i64, to: Ipv6Addr, delay: Duration) -> Self {
        let (stop, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, counted) = (stop.clone(), passed.clone());
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let space = File::open(format!("/proc/{pid}/ns/net")).unwrap();
            // A namespace is a thread's: this one ends with the relay.
            nix::sched::setns(space, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let device = open_device();
            let to = to.to_string();
            let rule = ["-6", "rule", "add", "iif", "lo", "to", to.as_str(), "lookup", TABLE, "priority", "100"];
            ip(&["link", "set", DEVICE, "up"]);
            ip(&["-6", "route", "add", "default", "dev", DEVICE, "table", TABLE]);
            ip(&rule);
            ready.send(()).unwrap();
            carry(device, delay, &ended, &counted);
            ip(&rule.map(|word| if word == "add" { "del" } else { word }));
        });
        is_ready.recv_timeout(Duration::from_secs(30)).expect("the relay starts");
        Self { stop, passed, thread: Some(thread) }
    }

    /// Packets that have passed.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().unwrap();
    assert!(output.status.success(), "ip {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
}

/// `struct ifreq` of linux/if.h, as far as the call reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

fn open_device() -> File {
    let mut options = OpenOptions::new();
    let device = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").unwrap();
    let mut request = Request { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    request.name[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
    // SAFETY: the kernel reads one struct of this layout.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw const request) };
    assert_eq!(done, 0, "making a TUN device: {}", std::io::Error::last_os_error());
    device
}

/// Reads packets and writes each back when its time has come.
fn carry(mut device: File, delay: Duration, stop: &AtomicBool, passed: &AtomicU64) {
    let mut held: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut buffer = [0; 65_536];
    while !stop.load(Ordering::SeqCst) {
        while let Ok(length) = device.read(&mut buffer) {
            held.push_back((Instant::now() + delay, buffer[..length].to_vec()));
        }
        while let Some((_, packet)) = held.pop_front_if(|(due, _)| *due <= Instant::now()) {
            // A packet that the kernel doesn't take back is lost, as packets are.
            let _ = device.write(&packet);
            passed.fetch_add(1, Ordering::SeqCst);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
