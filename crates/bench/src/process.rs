//! Looking at and running other processes: whose they are, what they use, and ending them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Runs a program that must succeed; its output is shown only if it does not.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| shown.clone())?;
    if !output.status.success() {
        bail!("{shown}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A child that ends with its owner.
pub struct Owned(pub Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: sends a signal to a child that has not been waited for, so that the pid is still its own.
        unsafe { libc::kill(self.0.id().cast_signed(), libc::SIGTERM) };
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Processes that were started with `mark` among their words, and all their descendants.
pub fn family(mark: &str) -> BTreeSet<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Some(parent) = stat(pid).and_then(|s| s.get(1)?.parse().ok()) else { continue };
        children.entry(parent).or_default().push(pid);
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&words).contains(mark) {
            found.push(pid);
        }
    }
    let mut family = BTreeSet::new();
    while let Some(pid) = found.pop() {
        if family.insert(pid) {
            found.extend(children.get(&pid).into_iter().flatten());
        }
    }
    family
}

/// A process and its descendants.
pub fn tree(root: u32) -> BTreeSet<u32> {
    let mut tree = BTreeSet::from([root]);
    loop {
        let before = tree.len();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            let parent = stat(pid).and_then(|s| s.get(1)?.parse::<u32>().ok());
            if parent.is_some_and(|p| tree.contains(&p)) {
                tree.insert(pid);
            }
        }
        if tree.len() == before {
            return tree;
        }
    }
}

/// The fields of `/proc/PID/stat` that follow the name, the first of which is the state.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(") ")?.1.split(' ').map(str::to_owned).collect())
}

/// Seconds of processor time that processes have used, in user and kernel, their ended children included.
pub fn cpu_seconds(pids: &BTreeSet<u32>) -> f64 {
    // SAFETY: asks for a constant of the system.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64;
    let used = |pid: &u32| -> Option<u64> {
        let fields = stat(*pid)?;
        fields.get(11..15)?.iter().map(|f| f.parse::<u64>().ok()).sum()
    };
    pids.iter().filter_map(used).sum::<u64>() as f64 / ticks
}

/// The processes' shares of memory, in bytes: a page that several share counts in parts.
pub fn pss_bytes(pids: &BTreeSet<u32>) -> u64 {
    let share = |pid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        text.lines().find_map(|l| l.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
    };
    pids.iter().filter_map(share).sum::<u64>() << 10
}

/// Seconds of processor time that ended children of this process have used.
pub fn children_cpu_seconds() -> f64 {
    // SAFETY: all-zero is a valid `rusage`, and the call only writes to it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// The `nexus` that was built with this bench.
pub fn nexus() -> anyhow::Result<std::path::PathBuf> {
    let own = std::env::current_exe().context("finding this program's file")?;
    let nexus = own.parent().unwrap_or(Path::new("/")).join("nexus");
    if !nexus.is_file() {
        bail!("{} is missing: run this by `cargo xtask bench`, which builds it", nexus.display());
    }
    Ok(nexus)
}

/// Waits until `condition` answers something.
pub fn wait<T>(
    what: &str,
    patience: Duration,
    pause: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = condition() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", patience.as_secs());
        }
        std::thread::sleep(pause);
    }
}
