//! Each local host's own cgroups, on version 1, version 2 and mixed machines.
//!
//! ```text
//! <hierarchy>/nexus-<cluster>/<host>/init        the host's own daemons
//!                                   /instances   what they run; agents make groups below it
//! ```
//!
//! In version 2 a group that passes controllers on may hold no process of its own, hence the two leaves. Groups that are
//! not below `nexus-<cluster>` are never written, except that version 2's root is asked to pass the controllers on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// The controllers that runtimes use.
const WANTED: &[&str] = &["cpu", "memory", "pids", "cpuset", "io"];
/// Without these, instances can't be limited.
const NEEDED: &[&str] = &["cpu", "memory", "pids"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// A mounted hierarchy of groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    pub mount: PathBuf,
    pub version: Version,
    /// For version 1.
    controllers: Vec<String>,
}

/// Every hierarchy with a controller, and version 2's even without one.
pub fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    Ok(parse_mounts(&fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse_mounts(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(mount) = left.split(' ').nth(4) else { continue };
        let mut right = right.split(' ');
        let (kind, options) = (right.next().unwrap_or_default(), right.nth(1).unwrap_or_default());
        let hierarchy = match kind {
            "cgroup2" => Hierarchy { mount: mount.into(), version: Version::V2, controllers: Vec::new() },
            "cgroup" => {
                let controllers: Vec<String> = options
                    .split(',')
                    .filter(|o| !matches!(*o, "rw" | "ro" | "xattr" | "noprefix") && !o.contains('='))
                    .map(str::to_owned)
                    .collect();
                if controllers.is_empty() {
                    continue; // A named hierarchy, such as systemd's, limits nothing.
                }
                Hierarchy { mount: mount.into(), version: Version::V1, controllers }
            }
            _ => continue,
        };
        if !found.iter().any(|h| h.mount == hierarchy.mount) {
            found.push(hierarchy);
        }
    }
    found
}

impl Hierarchy {
    /// What this hierarchy controls.
    fn controllers(&self) -> Vec<String> {
        match self.version {
            Version::V1 => self.controllers.clone(),
            Version::V2 => words(&self.mount.join("cgroup.controllers")),
        }
    }

    /// Makes the group `path` (relative) and those above it.
    fn create(&self, path: &Path) -> anyhow::Result<()> {
        let mut folder = self.mount.clone();
        for part in path {
            if self.version == Version::V2 {
                self.pass_on(&folder)?;
            }
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(e).with_context(|| format!("making the cgroup {}", folder.display()));
                }
                _ => {}
            }
            if self.controllers.iter().any(|c| c == "cpuset") {
                inherit_cpuset(&folder)?;
            }
        }
        Ok(())
    }

    /// Version 2: lets groups below `folder` use the controllers that runtimes need.
    fn pass_on(&self, folder: &Path) -> anyhow::Result<()> {
        let control = folder.join("cgroup.subtree_control");
        let passed = words(&control);
        for controller in words(&folder.join("cgroup.controllers")) {
            if WANTED.contains(&controller.as_str()) && !passed.contains(&controller) {
                let result = fs::write(&control, format!("+{controller}"));
                if NEEDED.contains(&controller.as_str()) {
                    result
                        .with_context(|| format!("passing the controller {controller} on in {}", folder.display()))?;
                }
            }
        }
        Ok(())
    }
}

fn words(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// Version 1's cpuset starts empty, and an empty one lets no process in.
fn inherit_cpuset(folder: &Path) -> anyhow::Result<()> {
    let Some(parent) = folder.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = folder.join(file);
        if words(&own).is_empty() {
            let value = fs::read_to_string(parent.join(file)).unwrap_or_default();
            fs::write(&own, value.trim()).with_context(|| format!("writing {}", own.display()))?;
        }
    }
    Ok(())
}

/// A host's group, relative to every hierarchy.
pub fn of_host(cloud: &str, host: &str) -> PathBuf {
    Path::new(cloud).join(host)
}

/// Where agents make the groups of instances.
pub fn instances(cloud: &str, host: &str) -> PathBuf {
    of_host(cloud, host).join("instances")
}

/// Makes a host's groups; the result are the folders that its first process joins.
pub fn create(cloud: &str, host: &str) -> anyhow::Result<Vec<PathBuf>> {
    let init = of_host(cloud, host).join("init");
    let all = hierarchies().context("reading the mounted cgroup hierarchies")?;
    for hierarchy in &all {
        hierarchy.create(&init)?;
        hierarchy.create(&instances(cloud, host))?;
    }
    Ok(all.iter().map(|h| h.mount.join(&init)).collect())
}

/// Removes a group of ours with all below it, in every hierarchy. Processes that are still in it are killed: the group's
/// name is the cloud's own. Groups linger for a moment after their last process, so this waits up to `patience`.
pub fn remove(group: &Path, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    for hierarchy in hierarchies().context("reading the mounted cgroup hierarchies")? {
        let folder = hierarchy.mount.join(group);
        loop {
            match remove_tree(&folder) {
                Ok(()) => break,
                Err(e) if Instant::now() > deadline => {
                    return Err(e).with_context(|| format!("removing the cgroup {}", folder.display()));
                }
                Err(_) => {
                    kill_members(&folder);
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }
    Ok(())
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn kill_members(folder: &Path) {
    for pid in words(&folder.join("cgroup.procs")).iter().filter_map(|p| p.parse::<i32>().ok()).filter(|p| *p > 1) {
        if let Ok(Some(process)) = super::procs::Process::open(pid) {
            // Still there now that it is held: then it is the one meant.
            if words(&folder.join("cgroup.procs")).contains(&pid.to_string()) {
                process.signal(nix::sys::signal::Signal::SIGKILL).ok();
            }
        }
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            kill_members(&entry.path());
        }
    }
}

/// Finds out by trying whether groups can be made and have the controllers that are needed.
pub fn try_out() -> Vec<String> {
    let all = match hierarchies() {
        Ok(all) if !all.is_empty() => all,
        _ => {
            return vec![
                "no cgroup hierarchy is mounted: `mount -t cgroup2 none /sys/fs/cgroup` mounts one".to_owned(),
            ];
        }
    };
    let mut problems = Vec::new();
    let controllers: Vec<String> = all.iter().flat_map(Hierarchy::controllers).collect();
    for needed in NEEDED {
        if !controllers.iter().any(|c| c == needed) {
            problems.push(format!(
                "the cgroup controller `{needed}` is not available: remove `cgroup_disable={needed}` from the kernel's \
                 command line, or mount its hierarchy"
            ));
        }
    }
    let probe = format!("nexus-probe-{}", std::process::id());
    for hierarchy in &all {
        let folder = hierarchy.mount.join(&probe);
        match fs::create_dir(&folder) {
            Ok(()) => drop(fs::remove_dir(&folder)),
            Err(e) => problems.push(format!(
                "a cgroup can't be made in {}: {e}; in a container, mount it read-write (docker: --privileged \
                 --cgroupns=host)",
                hierarchy.mount.display()
            )),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_machines_have_both_versions() {
        let text = "23 27 0:22 / /sys rw,relatime - sysfs sysfs rw\n\
            32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse_mounts(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].controllers, ["cpu", "cpuacct"]);
        assert_eq!((found[1].version, found[1].mount.to_str()), (Version::V2, Some("/sys/fs/cgroup/unified")));
    }
}
