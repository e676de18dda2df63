//! What a container is to be, worked out from a sandbox and its image: the OCI runtime specification, and what the shim
//! has to make before it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nexus_model::plan::INTERNAL_DOMAIN as DOMAIN;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::image::Execution;
use crate::{IDENTITY_DIR, IDENTITY_SOCKET, Sandbox, SecretMounts};

/// Given to the shim as `plan.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Plan {
    /// The runtime specification, complete but for the user, whom only the mounted image knows.
    pub spec: Value,
    /// The image's layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// Bytes.
    pub scratch: u64,
    /// As in an image's configuration.
    pub user: String,
    pub working_dir: String,
    /// Files that are mounted over the image's: path below `/etc`, content.
    pub etc: BTreeMap<String, String>,
    /// Variables and files whose values are read when the container is made, and never written to disk.
    #[serde(default)]
    pub secrets: SecretMounts,
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Tells clients of the SPIFFE Workload API where it is (SPIFFE Workload Endpoint, section 4).
const ENDPOINT: &str = "SPIFFE_ENDPOINT_SOCKET";

/// What root may do in a container: Docker's default without raw sockets, device nodes, file capabilities and the audit
/// log. (`ping` works all the same, by ICMP datagram sockets.)
const CAPABILITIES: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Hidden and read-only paths are those of Docker and containerd.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The scheduler's period in microseconds; quotas below its least are refused by the kernel.
const CPU_PERIOD: i64 = 100_000;
const LEAST_QUOTA: i64 = 1_000;

/// The words of the command, by Docker's rules: a given command replaces the image's entry point and drops its arguments,
/// given arguments replace the image's.
pub(super) fn words(image: &Execution, command: &[String], args: &[String]) -> Vec<String> {
    let or_none = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let (mut words, defaults) = if command.is_empty() {
        (or_none(&image.entrypoint), or_none(&image.cmd))
    } else {
        (command.to_vec(), Vec::new())
    };
    words.extend(if args.is_empty() { defaults } else { args.to_vec() });
    words
}

/// The image's variables under the template's.
fn environment(image: &Execution, sandbox: &Sandbox) -> Vec<String> {
    let given = &sandbox.template.env;
    let key = |pair: &String| pair.split('=').next().unwrap_or_default().to_owned();
    let mut env: Vec<String> = Vec::new();
    for pair in image.env.iter().flatten().filter(|p| p.contains('=') && !p.contains('\0')) {
        if !given.contains_key(&key(pair)) {
            env.push(pair.clone());
        }
    }
    env.extend(given.iter().map(|(k, v)| format!("{k}={v}")));
    let mut defaults = vec![("PATH", PATH.to_owned()), ("HOSTNAME", format!("HOSTNAME={}", sandbox.name))];
    if sandbox.identity.is_some() {
        let socket = format!("{ENDPOINT}=unix://{IDENTITY_DIR}/{IDENTITY_SOCKET}");
        // What the image says of it is of another place; what the user says is meant.
        env.retain(|pair| key(pair) != ENDPOINT || given.contains_key(ENDPOINT));
        defaults.push((ENDPOINT, socket));
    }
    for (name, default) in defaults {
        if !env.iter().any(|pair| key(pair) == name) {
            env.push(default);
        }
    }
    env
}

pub(super) struct Inputs<'a> {
    pub sandbox: &'a Sandbox,
    pub image: &'a Execution,
    pub layers: Vec<PathBuf>,
    /// The instance's folder.
    pub dir: &'a Path,
    pub cgroup: &'a Path,
    pub limits_swap: bool,
    pub nameservers: &'a [IpAddr],
    /// Devices, each with the rule that allows it.
    pub devices: Vec<(Value, Value)>,
}

/// Works out the plan, or says what the image lacks.
pub(super) fn plan(inputs: Inputs<'_>) -> Result<Plan, String> {
    let Inputs { sandbox, image, layers, dir, cgroup, limits_swap, nameservers, devices } = inputs;
    let template = &sandbox.template;
    let words = words(image, &template.command, &template.args);
    if words.is_empty() || words[0].is_empty() {
        return Err("names no command to run, and the app gives none: set spec.command".into());
    }
    let working_dir = match image.working_dir.as_deref() {
        None | Some("") => "/".to_owned(),
        Some(dir) if dir.starts_with('/') => dir.to_owned(),
        Some(dir) => format!("/{dir}"),
    };
    let resources = &template.resources;
    let quota = (i64::from(resources.cpu.0) * CPU_PERIOD / 1000).max(LEAST_QUOTA);
    let memory = i64::try_from(resources.memory.0).unwrap_or(i64::MAX);
    let mut memory = json!({"limit": memory});
    if limits_swap {
        // Memory and swap together: no swap.
        memory["swap"] = memory["limit"].clone();
    }
    let etc = etc(sandbox, nameservers);
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=64k"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=64m"]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ];
    for name in etc.keys() {
        let source = dir.join("scratch/etc").join(name);
        let mut options = vec!["bind", "rprivate", "nosuid", "nodev", "noexec"];
        // Who answers names is the host's to say.
        if name == "resolv.conf" {
            options.push("ro");
        }
        mounts
            .push(json!({"destination": format!("/etc/{name}"), "type": "bind", "source": source, "options": options}));
    }
    if let Some(source) = &sandbox.identity {
        // Read-only: nothing can be left in it, and a socket is connected to all the same.
        let options = ["bind", "rprivate", "ro", "nosuid", "nodev", "noexec"];
        mounts.push(json!({"destination": IDENTITY_DIR, "type": "bind", "source": source, "options": options}));
    }
    for folder in &sandbox.secrets.folders {
        let options = ["bind", "rprivate", "ro", "nosuid", "nodev", "noexec"];
        mounts.push(json!({
            "destination": folder.destination, "type": "bind", "source": folder.source, "options": options,
        }));
    }
    if let Some(shared) = &sandbox.shared {
        let options = ["bind", "rprivate", "nosuid", "nodev"];
        mounts.push(json!({
            "destination": shared.destination, "type": "bind", "source": shared.source, "options": options,
        }));
    }
    let (devices, allowed): (Vec<Value>, Vec<Value>) = devices.into_iter().unzip();
    let rules: Vec<Value> = std::iter::once(json!({"allow": false, "access": "rwm"})).chain(allowed).collect();
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs", "readonly": false},
        "hostname": sandbox.name.as_str(),
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": words,
            "env": environment(image, sandbox),
            "cwd": working_dir,
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
                "inheritable": [],
                "ambient": [],
            },
            "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "cgroup"},
                {"type": "network", "path": sandbox.netns},
            ],
            "cgroupsPath": cgroup,
            "resources": {
                "devices": rules,
                "cpu": {
                    "shares": (u64::from(resources.cpu.0) * 1024 / 1000).max(2),
                    "quota": quota,
                    "period": CPU_PERIOD,
                },
                "memory": memory,
                "pids": {"limit": resources.pids},
            },
            "sysctl": {
                "net.ipv4.ip_unprivileged_port_start": "0",
                "net.ipv4.ping_group_range": "0 2147483647",
            },
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    if let Some(set) = &sandbox.cpuset {
        let cpu = &mut spec["linux"]["resources"]["cpu"];
        cpu["cpus"] = set.cpus.as_str().into();
        if let Some(mems) = &set.mems {
            cpu["mems"] = mems.as_str().into();
        }
    }
    if !devices.is_empty() {
        spec["linux"]["devices"] = devices.into();
    }
    let user = image.user.clone().unwrap_or_default();
    let (scratch, secrets) = (resources.scratch.0, sandbox.secrets.clone());
    Ok(Plan { spec, layers, scratch, user, working_dir, etc, secrets })
}

fn etc(sandbox: &Sandbox, nameservers: &[IpAddr]) -> BTreeMap<String, String> {
    let name = &sandbox.name;
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{}\t{name}\n{}\t{name}\n",
        sandbox.address6, sandbox.address4
    );
    let mut resolvers = String::new();
    if !nameservers.is_empty() {
        // Two dots, so that APP.PROJECT is looked for here first, also by musl, which searches for nothing that has as many
        // dots as this says. The patience covers a restart of whoever answers: glibc asks every 2 s, musl every 0.4 s.
        let project = &sandbox.project;
        resolvers = format!("search {project}.{DOMAIN} {DOMAIN}\noptions ndots:2 timeout:2 attempts:5\n");
    }
    resolvers.extend(nameservers.iter().map(|address| format!("nameserver {address}\n")));
    BTreeMap::from([
        ("hostname".to_owned(), format!("{name}\n")),
        ("hosts".to_owned(), hosts),
        ("resolv.conf".to_owned(), resolvers),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn commands_and_arguments_replace_the_images_as_in_docker() {
        let image =
            Execution { entrypoint: Some(list(&["/entry"])), cmd: Some(list(&["serve"])), ..Execution::default() };
        assert_eq!(words(&image, &[], &[]), list(&["/entry", "serve"]));
        assert_eq!(words(&image, &[], &list(&["-v"])), list(&["/entry", "-v"]));
        assert_eq!(words(&image, &list(&["sh"]), &[]), list(&["sh"]));
        assert_eq!(words(&image, &list(&["sh"]), &list(&["-c", "x"])), list(&["sh", "-c", "x"]));
        assert!(words(&Execution::default(), &[], &[]).is_empty());
    }
}
