//! Finds out, by trying, whether this machine can run a local cloud, and says all that is missing at once.
//!
//! Nothing is concluded from version numbers or capability bits: a namespace is made, a bridge built and an overlay
//! mounted in a short-lived child, in namespaces that vanish with it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nexus_network::firewall::{Firewall, Rules};
use nexus_network::{HostLink, NetnsRef, Underlay, UnderlayAddress};
use nix::mount::{MsFlags, mount};

use super::plan::Plan;
use super::spawn::{Place, own_program, spawn};
use super::{cgroup, procs};
use crate::exit::Fail;

/// Below this, images and logs would soon fill the disk.
const DISK_NEEDED: u64 = 1 << 30;
const PROBE_PATIENCE: Duration = Duration::from_secs(20);
/// The subcommand that tries things out.
pub const PROBE: &str = "local-probe";
const PROBE_DONE: &str = "probe done";

/// Checks everything that the first or next start needs. Ports of members that run already are theirs.
pub fn check(plan: &Plan, root: &Path, running: &[procs::Found]) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    if nix::unistd::geteuid().is_root() {
        problems.extend(cgroup::try_out());
        problems.extend(try_namespaces(root)?);
    } else {
        problems.push(
            "root is needed to make network namespaces, links and mounts: run it with sudo, or as root in a container \
             that has CAP_SYS_ADMIN and CAP_NET_ADMIN"
                .to_owned(),
        );
    }
    if root.starts_with("/run") || root.starts_with("/proc") || root.starts_with("/sys") {
        problems.push(format!("{} can't be a data folder: each host has its own /run and /proc", root.display()));
    }
    let member_runs = |name: &str| running.iter().any(|f| f.path.file_stem().is_some_and(|s| s == name));
    for (port, who) in plan.ports().into_iter().filter(|(_, who)| !member_runs(who.as_str())) {
        problems.extend(try_port(port, who.as_str()));
    }
    problems.extend(try_disk(root));
    if problems.is_empty() {
        return Ok(());
    }
    let list: String = problems.iter().map(|p| format!("\n  - {p}")).collect();
    Err(Fail::conflict(format!("this machine can't run the cloud yet:{list}")).into())
}

fn try_port(port: u16, who: &str) -> Option<String> {
    match TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => None,
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let holder = procs::listener(port).unwrap_or_else(|| "another process".to_owned());
            Some(format!(
                "port {port}, which {who} needs, is in use by {holder}: stop that, or move with --api-port-base or \
                 --gateway-port-base"
            ))
        }
        Err(e) => Some(format!("port {port}, which {who} needs, can't be used: {e}")),
    }
}

/// The folder itself, or the nearest one above it that exists.
fn existing(root: &Path) -> PathBuf {
    root.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn try_disk(root: &Path) -> Option<String> {
    let folder = existing(root);
    match nix::sys::statvfs::statvfs(&folder) {
        Ok(disk) => {
            let free = disk.blocks_available() * disk.fragment_size();
            (free < DISK_NEEDED).then(|| {
                format!(
                    "{} has {} MiB free, and at least {} MiB are needed: make room, or choose another --data-dir",
                    folder.display(),
                    free >> 20,
                    DISK_NEEDED >> 20
                )
            })
        }
        Err(e) => Some(format!("{} can't be asked how full it is: {e}", folder.display())),
    }
}

/// Runs the probe as a host would run.
fn try_namespaces(root: &Path) -> anyhow::Result<Vec<String>> {
    let scratch = existing(root).join(format!(".nexus-probe-{}", std::process::id()));
    if let Err(e) = fs::create_dir(&scratch) {
        return Ok(vec![format!("{} can't be made: {e}: choose another --data-dir", scratch.display())]);
    }
    let result = run_probe(&scratch);
    fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    result
}

fn run_probe(scratch: &Path) -> anyhow::Result<Vec<String>> {
    let path = scratch.join("result");
    let output = fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
    let program = own_program().context("finding this program's file")?;
    let probe = match spawn(&program, &[OsStr::new(PROBE), scratch.as_os_str()], &output, Place::NewHost) {
        Ok(probe) => probe,
        Err(e) => {
            return Ok(vec![format!(
                "new pid, mount, network, uts and ipc namespaces can't be made: {e}; a kernel with CONFIG_NAMESPACES and \
                 CAP_SYS_ADMIN are needed (docker: --privileged)"
            )]);
        }
    };
    let ended = probe.wait(PROBE_PATIENCE).context("waiting for the probe")?;
    if !ended {
        probe.signal(nix::sys::signal::Signal::SIGKILL).context("ending the probe")?;
    }
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(probe.pid()), None).context("waiting for the probe")?;
    let text = fs::read_to_string(&path).context("reading the probe's result")?;
    let mut problems: Vec<String> = text.lines().filter(|l| *l != PROBE_DONE).map(str::to_owned).collect();
    if !text.lines().any(|l| l == PROBE_DONE) && problems.is_empty() {
        problems.push(format!("trying out a host's namespaces did not end within {} s", PROBE_PATIENCE.as_secs()));
    }
    Ok(problems)
}

/// The probe itself: prints one line for each thing that can't be done here.
pub fn probe(scratch: &Path) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    let say = |attempt: &str, error: String, remedy: &str| println!("{attempt}: {error}; {remedy}");
    if let Err(e) = mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none) {
        say("mounts can't be made private", e.to_string(), "CAP_SYS_ADMIN is needed (docker: --privileged)");
    }
    if let Err(e) = mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none) {
        say("a new /proc can't be mounted", e.to_string(), "an unmasked /proc is needed (docker: --privileged)");
    }
    if let Err(e) = try_overlay(scratch) {
        say(
            &format!("an overlay can't be mounted in {}", scratch.parent().unwrap_or(scratch).display()),
            format!("{e:#}"),
            "`modprobe overlay`, and a --data-dir on ext4, xfs or btrfs rather than on another overlay",
        );
    }
    if let Err(e) = mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none) {
        say("a tmpfs can't be mounted", e.to_string(), "CAP_SYS_ADMIN is needed (docker: --privileged)");
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        say(
            "IPv6 is not there",
            "no /proc/sys/net/ipv6".to_owned(),
            "remove `ipv6.disable=1` from the kernel's command line and `modprobe ipv6`",
        );
    } else if let Err(e) = try_links() {
        say(
            "a bridge and veth with IPv6 can't be made",
            format!("{e:#}"),
            "`modprobe bridge veth`; CAP_NET_ADMIN is needed; `sysctl net.ipv6.conf.default.disable_ipv6` must be 0",
        );
    }
    if let Err(e) = try_filter() {
        say(
            "a packet filter can't be set",
            format!("{e:#}").replace('\n', " "),
            "`apt install nftables`, `modprobe nf_tables nft_ct nft_masq`; CAP_NET_ADMIN is needed",
        );
    }
    println!("{PROBE_DONE}");
    Ok(())
}

/// The rules of a host that has no instance.
fn try_filter() -> anyhow::Result<()> {
    super::small_runtime()?.block_on(Firewall::own().apply(Rules::default()))?;
    Ok(())
}

fn try_overlay(scratch: &Path) -> anyhow::Result<()> {
    let folder = |name: &str| -> anyhow::Result<PathBuf> {
        let path = scratch.join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    };
    let (lower, upper, work, merged) = (folder("lower")?, folder("upper")?, folder("work")?, folder("merged")?);
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).context("mounting")?;
    fs::write(merged.join("file"), "x").context("writing through it")?;
    nix::mount::umount(&merged).context("unmounting")
}

/// A bridge here, and a veth to a second network namespace, which lives as long as the thread that made it.
fn try_links() -> anyhow::Result<()> {
    let (told, tell) = std::sync::mpsc::channel();
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
        // The receivers live until this thread has been joined.
        told.send(made.map(|()| nix::unistd::gettid())).ok();
        held.recv().ok();
    });
    let result = tell.recv().context("making a network namespace").and_then(|made| {
        let thread_id = made.context("making a network namespace")?;
        let netns = NetnsRef::Path(format!("/proc/self/task/{thread_id}/ns/net").into());
        connect(netns)
    });
    drop(hold);
    thread.join().ok();
    result
}

fn connect(netns: NetnsRef) -> anyhow::Result<()> {
    let address6 = |text: &str| text.parse().expect("a well-formed address");
    let address4 = |last: u8| std::net::Ipv4Addr::new(10, 255, 0, last);
    let bridge = UnderlayAddress { address6: address6("fd00:255::1"), length6: 64, address4: address4(1), length4: 24 };
    let host = HostLink {
        host: "probe".to_owned(),
        netns,
        address6: address6("fd00:255::2"),
        address4: address4(2),
        instances6: address6("fd00:255:0:1::"),
        instances4: std::net::Ipv4Addr::new(10, 255, 1, 0),
    };
    let underlay = Underlay::new("xprb", bridge)?;
    super::small_runtime()?.block_on(async {
        underlay.create().await?;
        underlay.attach(&host).await
    })?;
    Ok(())
}
