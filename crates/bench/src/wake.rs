//! A function that nobody has asked for a while: from nothing that runs to the first answer.
//!
//! Twice. *Cold*: a host has the compiled artefact and no instance; the time goes from the order to start to the answer, by the
//! host's own engine and a keeper. The project has no executor: it gets the one that stands by, as on any host that has a component; once
//! more at once, for a second project, there is none that stands by. *Wake*: the app has no instance anywhere; the time goes from the request
//! that a gateway holds to its answer, and is cut where the cloud wrote down what it did. The peer of both is a bare wasmtime: a
//! program that loads the same compiled component from disk, answers one request and ends.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nexus_agent::keeper::Client as Keeper;
use nexus_compute::function::{FunctionConfig, FunctionRuntime, bench_compile, bench_load_and_run};
use nexus_compute::keep::LogFiles;
use nexus_compute::{Runtime, Sandbox};
use nexus_env::{Clock, RealClock};
use nexus_model::kind::{Port, Template};
use nexus_model::{Bytes, Digest, Timestamp, Uid};
use serde_json::{Value, json};

use crate::cloud::{Cloud, PATIENCE};
use crate::function;
use crate::http::Client;
use crate::process::{self, Owned};
use crate::report::{Row, median};

const ROUNDS: usize = 9;
/// Longer than a host takes to have another executor stand by.
const REST: Duration = Duration::from_secs(2);
const PEER: &str = "bare wasmtime, load and run";
const APP: &str = "sleeper";
const PATH: &str = "/counter";

pub fn run() -> anyhow::Result<Vec<Row>> {
    let component = function::build()?;
    let host = Host::new(&component)?;
    let cloud = Cloud::up()?;
    cloud.import(&component, APP)?;
    let autoscale = json!({"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 1});
    let spec = json!({"runtime": "function", "image": APP, "resources": {"cpu": "100m", "memory": "64Mi"},
        "autoscale": autoscale});
    cloud.create("App", "apps", APP, &spec)?;
    cloud.first_answer(APP, PATH)?;

    // Files get into the page cache.
    host.bare()?;
    host.cold(0)?;
    let (mut bare, mut inside, mut cold, mut second) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut wakes = Vec::<Wake>::new();
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        let (whole, own) = host.bare()?;
        bare.push(whole);
        inside.push(own);
        let (first, then) = host.cold(round)?;
        cold.push(first);
        second.push(then);
        wakes.push(wake(&cloud)?);
    }
    let peer = median(&bare);
    let of = |pick: fn(&Wake) -> f64| median(&wakes.iter().map(pick).collect::<Vec<_>>());
    Ok(vec![
        Row::new("cold, order to start to first answer", median(&cold), "ms").peer(PEER, peer),
        Row::new("  with no executor that stands by", median(&second), "ms").peer(PEER, peer),
        Row::new("wake, held request to its answer", of(|w| w.whole), "ms").peer(PEER, peer),
        Row::new("  of which until the writer has decided", of(|w| w.decided), "ms"),
        Row::new("  of which until the host has started it", of(|w| w.started), "ms"),
        Row::new("  of which until the answer", of(|w| w.answered), "ms"),
        Row::new("  the writer knows it as ready, after the request", of(|w| w.ready), "ms"),
        Row::new("the peer's load and run, without its process", median(&inside), "ms"),
    ])
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// `nexus-bench load-and-run ARTEFACT PATH`: the bare program. Says how long it took since its own first line, then the answer.
pub fn bare(words: &[String]) -> anyhow::Result<()> {
    let begin = Instant::now();
    let [artefact, path] = words else { bail!("an artefact and a path are needed") };
    let body = bench_load_and_run(Path::new(artefact), path)?;
    print!("{} {}", millis(begin), String::from_utf8_lossy(&body));
    Ok(())
}

/// One host's function engine without a cloud: a keeper of its own, and the component compiled.
struct Host {
    dir: tempfile::TempDir,
    runtime: Arc<FunctionRuntime>,
    tokio: tokio::runtime::Runtime,
    image: Digest,
    artefact: PathBuf,
    _keeper: Owned,
}

impl Drop for Host {
    fn drop(&mut self) {
        // As an agent that ends, before its keeper does.
        self.tokio.block_on(self.runtime.close());
    }
}

impl Host {
    fn new(component: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("nexus-bench-").tempdir()?;
        let bytes = std::fs::read(component).context("reading the component")?;
        let image = Digest::of(&bytes);
        let at = dir.path().to_owned();
        std::fs::create_dir(at.join("blobs"))?;
        std::fs::write(at.join("blobs").join(image.hex()), &bytes)?;
        let artefact = at.join("bare.cwasm");
        bench_compile(&bytes, &artefact)?;
        let (exe, socket) = (process::nexus()?, at.join("keeper.sock"));
        let keeper = Owned(keeper(&exe, &at, &socket)?);
        let blobs = at.join("blobs");
        let runtime = FunctionRuntime::new(FunctionConfig {
            dir: at.join("functions"),
            keep: Arc::new(Keeper::new(socket)),
            blob: Arc::new(move |digest| blobs.join(digest.hex())),
            exe,
        })?;
        let runtime = Arc::new(runtime);
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        tokio.block_on(runtime.prepare(image))?;
        let kept = runtime.clone();
        tokio.spawn(async move { kept.upkeep().await });
        Ok(Self { dir, runtime, tokio, image, artefact, _keeper: keeper })
    }

    /// Milliseconds of the whole program, and those since its first line.
    fn bare(&self) -> anyhow::Result<(f64, f64)> {
        let begin = Instant::now();
        let said =
            process::run(Command::new(std::env::current_exe()?).arg("load-and-run").arg(&self.artefact).arg(PATH))?;
        let whole = millis(begin);
        let (own, body) = said.split_once(' ').context("the peer's time and answer")?;
        expect(body.as_bytes())?;
        Ok((whole, own.parse()?))
    }

    /// Milliseconds from the order to start an instance to its first answer: of one project, and of another right after it.
    fn cold(&self, round: usize) -> anyhow::Result<(f64, f64)> {
        // The one that stands by was taken by the round before, and is replaced as an agent does.
        std::thread::sleep(REST);
        let sandboxes = [self.sandbox(round, "first")?, self.sandbox(ROUNDS + 1 + round, "second")?];
        let first = self.start(&sandboxes[0])?;
        let second = self.start(&sandboxes[1])?;
        for sandbox in sandboxes {
            // With its last instance the executor ends.
            self.tokio.block_on(self.runtime.remove(sandbox.uid))?;
        }
        Ok((first, second))
    }

    fn start(&self, sandbox: &Sandbox) -> anyhow::Result<f64> {
        let port = sandbox.template.ports[0].port;
        let begin = Instant::now();
        self.tokio.block_on(self.runtime.start(sandbox))?;
        let answer = Client::connect(port, "localhost", None)?.get(PATH)?;
        let taken = millis(begin);
        expect(&answer.body)?;
        Ok(taken)
    }

    fn sandbox(&self, round: usize, project: &str) -> anyhow::Result<Sandbox> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let uid = Uid::from_random([u8::try_from(round)? + 1; 16]);
        let ports = vec![Port { port, protocol: Default::default(), name: None }];
        let mut template = Template { ports, ..Template::default() };
        template.resources.memory = Bytes(64 << 20);
        Ok(Sandbox {
            uid,
            epoch: 1,
            name: "cold-1".parse()?,
            project: project.parse()?,
            app: "cold".parse()?,
            template,
            image: self.image,
            netns: PathBuf::from("/proc/self/ns/net"),
            address6: Ipv6Addr::LOCALHOST,
            address4: Ipv4Addr::LOCALHOST,
            identity: None,
            secrets: Default::default(),
            part: None,
            cpuset: None,
            shared: None,
            logs: LogFiles { dir: self.dir.path().join(format!("logs-{uid}")), max_bytes: 1 << 20, keep: 2 },
        })
    }
}

fn keeper(exe: &Path, dir: &Path, socket: &Path) -> anyhow::Result<Child> {
    let config = dir.join("keeper.toml");
    let state = dir.join("keeper");
    std::fs::create_dir(&state)?;
    std::fs::write(&config, format!("socket = {socket:?}\nstate_dir = {state:?}\n"))?;
    let log = std::fs::File::create(dir.join("keeper.log"))?;
    let mut command = Command::new(exe);
    command.arg("keeper").arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let child = command.spawn().context("starting a keeper")?;
    process::wait("the keeper's socket", PATIENCE, Duration::from_millis(5), || socket.exists().then_some(()))?;
    Ok(child)
}

fn expect(body: &[u8]) -> anyhow::Result<()> {
    if body == b"1\n" {
        return Ok(());
    }
    bail!("the figures are void: the component answered {:?}", String::from_utf8_lossy(body))
}

/// One wake, in milliseconds: the whole, its parts one after the other, and when the writer knew, counted from the request.
struct Wake {
    whole: f64,
    decided: f64,
    started: f64,
    ready: f64,
    answered: f64,
}

/// Waits until the app has no instance, and asks for it.
fn wake(cloud: &Cloud) -> anyhow::Result<Wake> {
    process::wait("the app to sleep", PATIENCE, Duration::from_millis(50), || {
        let app = cloud.object("apps", APP).ok()?;
        let asleep = app["status"]["desiredReplicas"] == 0 && cloud.instances(APP).ok()?.is_empty();
        asleep.then_some(())
    })?;
    // Its host clears what is left of the instance away, and gateways have heard.
    std::thread::sleep(Duration::from_secs(2));
    let mut client = Client::connect(cloud.gateway_port, &format!("{APP}.localhost"), None)?;
    let clock = RealClock::new();
    let (asked, begin) = (clock.now_millis(), Instant::now());
    let answer = client.get(PATH)?;
    let whole = millis(begin);
    if answer.status != 200 {
        bail!("the app answered {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    expect(&answer.body)?;
    // A gateway goes where it can connect to; the writer hears of it a moment later.
    let instance = process::wait("the instance to be known as ready", PATIENCE, Duration::from_millis(20), || {
        cloud.instances(APP).ok()?.pop().filter(|instance| instance["status"]["ready"] == true)
    })?;
    let moment = |value: &Value| -> anyhow::Result<f64> {
        let at: Timestamp = serde_json::from_value(value.clone()).context("a moment")?;
        Ok((at.as_millis() - asked) as f64)
    };
    let ready = instance["status"]["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == "Ready");
    let decided = moment(&instance["metadata"]["created"])?;
    let started = moment(&instance["status"]["started"])?;
    let ready = moment(&ready.context("a condition Ready")?["since"])?;
    Ok(Wake { whole, decided, started: started - decided, ready, answered: whole - started })
}
