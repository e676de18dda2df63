//! Containers: from an app's creation to its first answer with the image on the host, and a container's whole life beside
//! `runc run` with the same bundle.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use nexus_compute::container::run_once;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::cloud::Cloud;
use crate::process;
use crate::report::{Row, median};

const ROUNDS: usize = 5;
const RUNS: usize = 20;
const BUSYBOX: &str = "/bin/busybox";
const PAGE: &[u8] = b"served by a container\n";

pub fn run() -> anyhow::Result<Vec<Row>> {
    let mut rows = lives()?;
    rows.push(deploys()?);
    Ok(rows)
}

/// Start to exit, shim included.
fn lives() -> anyhow::Result<Vec<Row>> {
    let nexus = process::nexus()?;
    let dir = tempfile::Builder::new().prefix("nexus-bench-").tempdir()?;
    let cgroup = format!("/nexus-bench-{}", std::process::id());
    let bundle = bundle(dir.path(), &cgroup)?;
    let _cleanup = Cgroup(cgroup);
    let (ours, theirs) = (dir.path().join("nexus-state"), dir.path().join("runc-state"));
    let mut number = 0;
    let mut id = || {
        number += 1;
        format!("c{number}")
    };
    let run_nexus = |id: String| -> anyhow::Result<()> {
        let status = run_once(&nexus, &bundle, &ours, &id)?;
        if status.success() { Ok(()) } else { bail!("the container ended with {status}") }
    };
    let run_runc = |id: String| -> anyhow::Result<()> {
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(&theirs).args(["run", "--bundle"]).arg(&bundle).arg(&id).stdin(Stdio::null());
        let status = runc.status().context("running runc")?;
        if status.success() { Ok(()) } else { bail!("runc ended with {status}") }
    };
    let (mut own, mut peer) = (Times::default(), Times::default());
    run_nexus(id())?;
    run_runc(id())?;
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        own.measure(|| run_nexus(id()))?;
        peer.measure(|| run_runc(id()))?;
    }
    Ok(vec![
        Row::new("container, start to exit, shim included", median(&own.millis), "ms")
            .peer("runc run", median(&peer.millis))
            .cpu_per_op(median(&own.cpu)),
        Row::new("container, start to exit, processor time", median(&own.cpu) * 1e3, "ms")
            .peer("runc run", median(&peer.cpu) * 1e3),
    ])
}

#[derive(Default)]
struct Times {
    /// Of each run.
    millis: Vec<f64>,
    /// Seconds of processor time a run, of each round.
    cpu: Vec<f64>,
}

impl Times {
    fn measure(&mut self, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let before = process::children_cpu_seconds();
        for _ in 0..RUNS {
            let start = Instant::now();
            run()?;
            self.millis.push(start.elapsed().as_secs_f64() * 1e3);
        }
        self.cpu.push((process::children_cpu_seconds() - before) / RUNS as f64);
        Ok(())
    }
}

/// Folders of control groups that runtimes leave.
struct Cgroup(String);

impl Drop for Cgroup {
    fn drop(&mut self) {
        let name = self.0.trim_start_matches('/');
        let roots = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
        for root in roots.chain([PathBuf::from("/sys/fs/cgroup")]) {
            let folder = root.join(name);
            for below in fs::read_dir(&folder).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
                fs::remove_dir(below.path()).ok();
            }
            fs::remove_dir(folder).ok();
        }
    }
}

/// A bundle that runs `true`, with the namespaces, mounts and limits that containers usually have.
fn bundle(dir: &Path, cgroup: &str) -> anyhow::Result<PathBuf> {
    let bundle = dir.join("bundle");
    let root = bundle.join("rootfs");
    for made in ["bin", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(made))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).context("copying busybox")?;
    let mount = |to: &str, kind: &str, options: &[&str]| -> Value {
        json!({"destination": to, "type": kind, "source": kind, "options": options})
    };
    let namespaces = ["pid", "mount", "network", "uts", "ipc"].map(|kind| json!({"type": kind}));
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "bench",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/busybox", "true"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        },
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=64k"]),
            mount("/tmp", "tmpfs", &["nosuid", "nodev"]),
        ],
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": format!("{cgroup}/once"),
            "resources": {
                "memory": {"limit": 64 << 20},
                "cpu": {"quota": 100_000, "period": 100_000},
                "pids": {"limit": 64},
            },
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    fs::write(bundle.join("config.json"), spec.to_string())?;
    Ok(bundle)
}

/// Creation to first answer, on hosts that have the image.
fn deploys() -> anyhow::Result<Row> {
    let cloud = Cloud::up()?;
    let archive = cloud.scratch("busybox.tar");
    image(&archive)?;
    cloud.import(&archive, "busybox")?;
    let app = |replicas: u32| {
        json!({
            "image": "busybox",
            "replicas": replicas,
            "spread": "host",
            "ports": [{"port": 80}],
            "resources": {"memory": "32Mi"},
        })
    };
    // One on each host brings the image there.
    cloud.create("App", "apps", "warm", &app(6))?;
    cloud.wait_ready("warm", 6)?;
    let mut millis = Vec::new();
    for round in 1..=ROUNDS {
        eprintln!("deployment {round} of {ROUNDS}");
        let name = format!("web-{round}");
        let begin = Instant::now();
        cloud.create("App", "apps", &name, &app(1))?;
        let body = cloud.first_answer(&name, "/")?;
        millis.push(begin.elapsed().as_secs_f64() * 1e3);
        if body != PAGE {
            bail!("the figures are void: the container answered {:?}", String::from_utf8_lossy(&body));
        }
        cloud.delete_app(&name)?;
    }
    Ok(Row::new("container, deploy to first answer", median(&millis), "ms"))
}

/// busybox and a page, as `docker save` would write an image of them.
pub fn image(archive: &Path) -> anyhow::Result<()> {
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, "bin/busybox", 0o755, &fs::read(BUSYBOX).context("reading busybox")?)?;
    add(&mut layer, "www/index.html", 0o644, PAGE)?;
    let layer = layer.into_inner()?;
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&layer)));
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let command = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"];
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": command},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": ["busybox:latest"], "Layers": ["layer.tar"]}]);
    let mut tar = tar::Builder::new(fs::File::create(archive)?);
    add(&mut tar, "manifest.json", 0o644, manifest.to_string().as_bytes())?;
    add(&mut tar, "config.json", 0o644, config.to_string().as_bytes())?;
    add(&mut tar, "layer.tar", 0o644, &layer)?;
    tar.finish().context("writing the image")
}

fn add<W: std::io::Write>(tar: &mut tar::Builder<W>, path: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    Ok(tar.append_data(&mut header, path, content)?)
}
