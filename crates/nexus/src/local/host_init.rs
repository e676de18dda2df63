//! The first process of a local host: pid 1 of its own pid namespace, the init of a very small machine.
//!
//! It joins the host's cgroups, makes the mounts private, puts a fresh `/proc` and `/run` in place, waits for the link
//! and gives it the host's lasting hardware address, then starts the keeper and the agent and keeps both running, as systemd would. Orphans come to it and are reaped. On
//! SIGTERM it stops the agent and ends; with it, the kernel ends everything else that the host runs. It has one thread
//! and waits in one system call, because it forks.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::backoff::Backoff;
use super::state::open_log;
use crate::config::HostInitConfig;

/// The supervisor connects a host right after it started it.
const LINK_PATIENCE: Duration = Duration::from_secs(30);
/// How long an agent may take to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Runs the host until it is told to stop.
pub fn run(config: &HostInitConfig) -> anyhow::Result<()> {
    if std::process::id() != 1 {
        bail!("host-init is started by `nexus up` as the first process of a host, not by hand");
    }
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    // Blocked signals wait to be asked for. That also makes them count: the kernel throws away what a namespace's
    // first process has no handler for.
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    for group in &config.cgroups {
        let file = group.join("cgroup.procs");
        fs::write(&file, "0").with_context(|| format!("joining the cgroup {}", group.display()))?;
    }
    nix::unistd::sethostname(config.name.as_str()).context("setting the host name")?;
    mounts(&config.run_dir)?;
    let link = wait_for_link(config.address)?;
    set_hardware_address(&link, config.address)?;
    supervise(config, &signals)
}

fn mounts(run_dir: &Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making the mounts private")?;
    let restricted = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), restricted, none).context("mounting /proc")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, Some("mode=755,size=64m")).context("mounting /run")?;
    fs::create_dir_all(run_dir).with_context(|| format!("making {}", run_dir.display()))?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("making a boot id")?;
    fs::write(run_dir.join("boot-id"), boot_id.trim()).context("writing the boot id")
}

/// The name of the link that has the address, as soon as there is one.
fn wait_for_link(address: IpAddr) -> anyhow::Result<String> {
    let IpAddr::V6(address) = address else { bail!("the host's address {address} is not an IPv6 address") };
    let digits: String = address.octets().iter().map(|b| format!("{b:02x}")).collect();
    let deadline = Instant::now() + LINK_PATIENCE;
    loop {
        let addresses = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
        let line = addresses.lines().find(|l| l.starts_with(&digits));
        if let Some(link) = line.and_then(|l| l.split_whitespace().last()) {
            return Ok(link.to_owned());
        }
        if Instant::now() > deadline {
            bail!("no link with the address {address} came within {} s", LINK_PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A veth is born with a hardware address by chance. A host that boots again must keep its own: neighbours would send to
/// the old one until their caches notice, which takes them longer than the control plane takes to call a host dead.
fn set_hardware_address(link: &str, address: IpAddr) -> anyhow::Result<()> {
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if link.len() >= request.ifr_name.len() {
        bail!("{link:?} is too long for a link's name");
    }
    for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *to = from.cast_signed();
    }
    let hardware = hardware_address(address);
    let socket = std::net::UdpSocket::bind(("::", 0)).context("opening a socket to configure links with")?;
    // SAFETY: writing a plain field of the union; the kernel reads it as such for this request. The request outlives
    // the call.
    let done = unsafe {
        request.ifr_ifru.ifru_hwaddr.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in request.ifr_ifru.ifru_hwaddr.sa_data.iter_mut().zip(hardware) {
            *to = from.cast_signed();
        }
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request)
    };
    Errno::result(done).with_context(|| format!("setting the hardware address of {link}"))?;
    Ok(())
}

/// Locally administered, unicast, and as different as the hosts' addresses are.
fn hardware_address(address: IpAddr) -> [u8; 6] {
    let octets = match address {
        IpAddr::V6(a) => a.octets(),
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
    };
    // Of the cluster's random bits three bytes, and the host's number.
    [0x02, octets[3], octets[4], octets[5], octets[14], octets[15]]
}

/// One of the two daemons.
struct Daemon {
    role: &'static str,
    config: PathBuf,
    log: PathBuf,
    pid: Option<Pid>,
    backoff: Backoff,
    due: Instant,
}

impl Daemon {
    fn new(role: &'static str, config: &Path, log: &Path) -> Self {
        let (config, log) = (config.to_owned(), log.to_owned());
        Self { role, config, log, pid: None, backoff: Backoff::default(), due: Instant::now() }
    }

    fn start(&mut self, program: &Path, now: Instant) {
        match self.spawn(program) {
            Ok(pid) => {
                eprintln!("started the {}", self.role);
                self.pid = Some(pid);
            }
            Err(e) => {
                eprintln!("starting the {}: {e:#}", self.role);
                self.due = now + self.backoff.failed(now);
                return;
            }
        }
        self.backoff.started(now);
    }

    fn spawn(&self, program: &Path) -> anyhow::Result<Pid> {
        let log = open_log(&self.log)?;
        let mut command = Command::new(program);
        command.arg(self.role).arg("--config").arg(&self.config).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        // SAFETY: only a system call between fork and exec. The mask would outlive the exec otherwise.
        unsafe {
            command.pre_exec(|| {
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(io::Error::from)
            });
        }
        let child = command.spawn().with_context(|| format!("executing {}", program.display()))?;
        Ok(Pid::from_raw(child.id().cast_signed()))
    }
}

fn supervise(config: &HostInitConfig, signals: &SigSet) -> anyhow::Result<()> {
    // In this order: an agent needs its keeper.
    let mut daemons = [
        Daemon::new("keeper", &config.keeper_config, &config.keeper_log),
        Daemon::new("agent", &config.agent_config, &config.agent_log),
    ];
    loop {
        let now = Instant::now();
        for daemon in daemons.iter_mut().filter(|d| d.pid.is_none()) {
            if daemon.due <= now {
                daemon.start(&config.program, now);
            }
        }
        let due = daemons.iter().filter(|d| d.pid.is_none()).map(|d| d.due).min();
        let signal = wait_signal(signals, due.map(|d| d.saturating_duration_since(Instant::now())))?;
        let ended = reap();
        let now = Instant::now();
        for daemon in &mut daemons {
            if let Some(status) = daemon.pid.and_then(|pid| ended.get(&pid)) {
                let pause = daemon.backoff.failed(now);
                eprintln!("the {} ended ({status:?}); it starts again in {pause:?}", daemon.role);
                daemon.pid = None;
                daemon.due = now + pause;
            }
        }
        if matches!(signal, Some(Signal::SIGTERM | Signal::SIGINT)) {
            return stop(&daemons[1], signals);
        }
    }
}

/// Stops the agent. What it ran ends with this process.
fn stop(agent: &Daemon, signals: &SigSet) -> anyhow::Result<()> {
    let Some(pid) = agent.pid else { return Ok(()) };
    kill(pid, Signal::SIGTERM).ok();
    let deadline = Instant::now() + STOP_PATIENCE;
    while !reap().contains_key(&pid) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            eprintln!("the agent did not stop within {} s", STOP_PATIENCE.as_secs());
            break;
        }
        wait_signal(signals, Some(left))?;
    }
    Ok(())
}

/// Waits for one of the signals, or until the time has passed.
fn wait_signal(signals: &SigSet, patience: Option<Duration>) -> anyhow::Result<Option<Signal>> {
    let limit = patience.map(|p| libc::timespec {
        tv_sec: p.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: p.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), |l| &raw const *l);
    // SAFETY: the set is valid, no information is asked for, and the limit is null or outlives the call.
    let signal = unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), limit) };
    match Errno::result(signal) {
        Ok(signal) => Ok(Signal::try_from(signal).ok()),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(e) => Err(e).context("waiting for a signal"),
    }
}

/// Takes note of everything that has ended, adopted orphans too.
fn reap() -> BTreeMap<Pid, WaitStatus> {
    let mut ended = BTreeMap::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(_) => return ended,
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    ended.insert(pid, status);
                }
            }
        }
    }
}
