//! Functions: from a component's deployment to its first answer, and a fresh instance per request through gateway and
//! executor beside the same component in one process without sockets.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail};
use nexus_compute::function::bench_in_process;
use serde_json::json;

use crate::cloud::Cloud;
use crate::load::{Load, Outcome};
use crate::process;
use crate::report::{Row, cpu_seconds, median};

const ROUNDS: usize = 5;
const SECONDS: u32 = 5;
const CONNECTIONS: u32 = 32;
const PEER: &str = "in-process wasmtime";
const PEER_REQUESTS: u32 = 40_000;

pub fn run() -> anyhow::Result<Vec<Row>> {
    let component = build()?;
    let cloud = Cloud::up()?;
    let (mut imports, mut deploys) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        eprintln!("deployment {round} of {ROUNDS}");
        let (import, deploy) = deploy(&cloud, &component, round)?;
        imports.push(import * 1e3);
        deploys.push(deploy * 1e3);
    }

    cloud.import(&component, "hello")?;
    cloud.create("App", "apps", "hello", &function("hello"))?;
    cloud.first_answer("hello", "/counter")?;
    let bytes = std::fs::read(&component).context("reading the component")?;
    let host = "hello.localhost";
    let load = Load {
        port: cloud.gateway_port,
        path: "/counter",
        host,
        token: None,
        body: Some("1\n"),
        connections: CONNECTIONS,
        seconds: SECONDS,
    };
    // Connections and pages get warm.
    Load { seconds: 1, ..load }.run(&cloud.scratch(""))?;
    let (mut rates, mut peers, mut cpu, mut peer_cpu): (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>) = Default::default();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for round in 1..=ROUNDS {
        eprintln!("load {round} of {ROUNDS}");
        let before = cpu_seconds();
        let peer = bench_in_process(&bytes, "/counter", PEER_REQUESTS)?;
        if peer.body != b"1\n" {
            bail!("the figures are void: the component answered {:?}", String::from_utf8_lossy(&peer.body));
        }
        peers.push(f64::from(peer.requests) / peer.elapsed.as_secs_f64());
        // Compiling is not in the time; its processor time is, spread over the requests.
        peer_cpu.push((cpu_seconds() - before) / f64::from(peer.requests));
        let before = cloud.cpu_seconds();
        let outcome = load.run(&cloud.scratch(""))?;
        cpu.push((cloud.cpu_seconds() - before) / outcome.requests as f64);
        rates.push(outcome.per_second());
        outcomes.push(outcome);
    }
    let of = |pick: fn(&Outcome) -> f64| median(&outcomes.iter().map(pick).collect::<Vec<_>>());
    Ok(vec![
        Row::new("component, deploy to first answer", median(&deploys), "ms"),
        Row::new("component, import and deploy to first answer", median(&imports), "ms"),
        Row::new("fresh instance per request", median(&rates), "1/s")
            .peer(PEER, median(&peers))
            .cpu_per_op(median(&cpu)),
        Row::new("the peer's own processor time", median(&peer_cpu) * 1e6, "us"),
        Row::new("request by 32 connections, median", of(|o| o.p50_us), "us"),
        Row::new("request by 32 connections, p99", of(|o| o.p99_us), "us"),
    ])
}

fn function(image: &str) -> serde_json::Value {
    json!({"runtime": "function", "image": image, "resources": {"cpu": "2", "memory": "256Mi"}})
}

/// Seconds from the import's begin, and from the app's creation, to the first answer. The component is new to the cloud:
/// its host fetches and compiles it on the way.
fn deploy(cloud: &Cloud, component: &Path, round: usize) -> anyhow::Result<(f64, f64)> {
    let name = format!("fn-{round}");
    let fresh = cloud.scratch(&format!("{name}.wasm"));
    different(component, &fresh, round)?;
    let begin = Instant::now();
    cloud.import(&fresh, &name)?;
    let imported = Instant::now();
    cloud.create("App", "apps", &name, &function(&name))?;
    let body = cloud.first_answer(&name, "/counter")?;
    let end = Instant::now();
    if body != b"1\n" {
        bail!("the figures are void: the component answered {:?}", String::from_utf8_lossy(&body));
    }
    cloud.delete_app(&name)?;
    Ok((end.duration_since(begin).as_secs_f64(), end.duration_since(imported).as_secs_f64()))
}

/// The same component with one more custom section, which gives it another digest.
fn different(component: &Path, to: &Path, round: usize) -> anyhow::Result<()> {
    std::fs::copy(component, to).context("copying the component")?;
    let name = b"round";
    let number = [u8::try_from(round).context("few rounds")?];
    let length = u8::try_from(1 + name.len() + number.len())?;
    let section = [&[0, length, u8::try_from(name.len())?][..], name, &number].concat();
    let mut file = std::fs::OpenOptions::new().append(true).open(to)?;
    file.write_all(&section).context("writing a section")
}

/// Builds the example for wasm32-wasip2.
pub fn build() -> anyhow::Result<PathBuf> {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hello-function");
    let nexus = process::nexus()?;
    let target = nexus.parent().and_then(Path::parent).context("a target folder")?.join("bench-function");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&example).args(["build", "--release", "--locked", "--target", "wasm32-wasip2", "--target-dir"]);
    cargo.arg(&target);
    // Settings of the outer build are not the component's.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    process::run(&mut cargo)?;
    Ok(target.join("wasm32-wasip2/release/hello_function.wasm"))
}
