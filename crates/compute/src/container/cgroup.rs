//! The cgroups of a container, in every hierarchy that the host has: version 1, version 2, or both (hybrid).
//!
//! The shim makes them, by libcontainer. Here they are read (was something killed for memory?), emptied and removed,
//! which must work when everything else of the container is gone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ROOT: &str = "/sys/fs/cgroup";

/// The folders where a cgroup `path` (absolute, as seen from the hierarchies' roots) is or would be.
pub(super) fn folders(path: &Path) -> io::Result<Vec<PathBuf>> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return Ok(vec![Path::new(ROOT).join(relative)]);
    }
    Ok(version_1_mounts(&fs::read_to_string("/proc/self/mountinfo")?).into_iter().map(|m| m.join(relative)).collect())
}

fn version_1_mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mut mounts = Vec::new();
    for line in mountinfo.lines() {
        // Fields before " - " end with the mount point and options; after it come type, source and options.
        let Some((before, after)) = line.split_once(" - ") else { continue };
        if after.starts_with("cgroup ")
            && let Some(point) = before.split(' ').nth(4)
            && !mounts.iter().any(|m| m == Path::new(point))
        {
            mounts.push(PathBuf::from(point));
        }
    }
    mounts
}

/// The processors and the memory nodes that groups below `parent` may be given, as lists; or why they can't be given any.
pub fn cpuset(parent: &Path) -> Result<(String, String), String> {
    let relative = parent.strip_prefix("/").unwrap_or(parent);
    let mountinfo = || fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("reading the mounts: {e}"));
    let unified = Path::new(ROOT).join("cgroup.controllers").exists();
    let root = match unified {
        true => PathBuf::from(ROOT),
        false => cpuset_mount(&mountinfo()?).ok_or("the cgroup controller cpuset is not mounted")?,
    };
    let whole = root.join(relative);
    let there = whole.ancestors().find(|dir| dir.exists()).filter(|dir| dir.starts_with(&root)).unwrap_or(&root);
    let read = |name: &str| fs::read_to_string(there.join(name)).map(|text| text.trim().to_owned());
    if unified && !read("cgroup.controllers").unwrap_or_default().split(' ').any(|c| c == "cpuset") {
        return Err(format!("the cgroup controller cpuset is not passed on to {}", there.display()));
    }
    let [cpus, mems] = match unified {
        true => ["cpuset.cpus.effective", "cpuset.mems.effective"],
        false => ["cpuset.effective_cpus", "cpuset.effective_mems"],
    };
    let list = |name: &str| match read(name) {
        Ok(list) if !list.is_empty() => Ok(list),
        Ok(_) => Err(format!("{} of {} is empty", name, there.display())),
        Err(e) => Err(format!("reading {name} of {}: {e}", there.display())),
    };
    Ok((list(cpus)?, list(mems)?))
}

/// Where version 1 has the controller of processors and nodes.
fn cpuset_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let options = after.strip_prefix("cgroup ")?.split(' ').nth(1)?;
        options.split(',').any(|o| o == "cpuset").then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Whether memory can be limited together with swap.
pub(super) fn limits_swap() -> bool {
    let unified = Path::new(ROOT).join("cgroup.controllers").exists();
    unified || Path::new(ROOT).join("memory/memory.memsw.limit_in_bytes").exists()
}

/// How many processes of the cgroup the kernel has killed for memory.
pub(super) fn killed_for_memory(folders: &[PathBuf]) -> u64 {
    let counters = folders.iter().flat_map(|f| [f.join("memory.oom_control"), f.join("memory.events")]);
    let texts = counters.filter_map(|path| fs::read_to_string(path).ok());
    texts.filter_map(|text| counter(&text, "oom_kill")).max().unwrap_or(0)
}

/// The processor time that the cgroup's processes have used, those that ended too.
pub(super) fn cpu_time(folders: &[PathBuf]) -> Option<Duration> {
    let read = |name: &str| folders.iter().find_map(|f| fs::read_to_string(f.join(name)).ok());
    if let Some(nanos) = read("cpuacct.usage").and_then(|text| text.trim().parse().ok()) {
        return Some(Duration::from_nanos(nanos));
    }
    counter(&read("cpu.stat")?, "usage_usec").map(Duration::from_micros)
}

fn counter(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Kills whatever runs in the cgroups and removes them. Blocks, for at most `patience`.
pub(super) fn destroy(folders: &[PathBuf], patience: Duration) -> io::Result<()> {
    let begun = Instant::now();
    for folder in folders {
        loop {
            let processes = match fs::read_to_string(folder.join("cgroup.procs")) {
                Ok(text) => text,
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => break,
                // The cgroup vanished between opening and reading.
                Err(e) if e.raw_os_error() == Some(libc::ENODEV) => break,
                Err(e) => return Err(e),
            };
            for pid in processes.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0) {
                // A process that ended meanwhile is what we want.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            match fs::remove_dir(folder) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) if begun.elapsed() > patience => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
    Ok(())
}

/// Removes a parent cgroup where it is empty.
pub(super) fn remove_parent(folders: &[PathBuf]) {
    for folder in folders {
        // Not empty, or in use by somebody else: then it stays.
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_version_1_are_found() {
        let text = "31 23 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
                    32 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    33 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(cpuset_mount(text), None);
        let line = "34 23 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n";
        assert_eq!(cpuset_mount(&format!("{text}{line}")), Some(PathBuf::from("/sys/fs/cgroup/cpuset")));
        assert_eq!(version_1_mounts(text), [Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup/cpu")]);
    }

    #[test]
    fn counters_of_both_versions_are_read() {
        assert_eq!(counter("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "oom_kill"), Some(3));
        assert_eq!(counter("low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\noom_group_kill 0\n", "oom_kill"), Some(1));
    }
}
