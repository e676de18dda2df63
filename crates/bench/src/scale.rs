//! A whole region's control plane under 10,000 hosts and 100,000 instances, in one process: the embedded store on the real
//! disk, the writer's loop and the view as a server runs them, and an agent's two tasks per host.
//!
//! The agents are the real ones' behaviour without a machine: they follow their plan, start what it says (it takes a tenth
//! of a second), and report every second and at once on a change. Every report, answer and plan is encoded and decoded as
//! the wire does it. Left out is what the wire adds: HTTP/2 and TLS, and the two other members of a group of three.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use bytes::Bytes as Message;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Change, Intent, Passed, Provenance, Target, Writer as _};
use nexus_control::region::{Config, Forward, ForwardError, Region};
use nexus_control::view::View;
use nexus_env::Env;
use nexus_model::kind::*;
use nexus_model::plan::{Desired, HostPlan, HostReport, InstanceReport, ReportAck};
use nexus_model::{Bytes, Digest, Metadata, MilliCpu, Name, Object, Uid};
use nexus_store::embedded::{self, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, PeerError, Store};
use tokio::runtime::{self, Builder};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::report::{Row, cpu_seconds, percentile};

const ZONES: [&str; 3] = ["zone-a", "zone-b", "zone-c"];
const CELLS_PER_ZONE: usize = 8;
const PROJECTS: usize = 100;
const APPS_PER_PROJECT: usize = 10;

const REPORT_EVERY: Duration = Duration::from_secs(1);
const COALESCE: Duration = Duration::from_millis(20);
const START_TAKES: Duration = Duration::from_millis(100);

const SETTLING: Duration = Duration::from_secs(20);
const WATCHED: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(1_800);

pub(crate) fn name(text: &str) -> Name {
    text.parse().expect("a well-formed name")
}

/// A number from the environment: a smaller run for whoever works on the bench.
fn from_env(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A group of one calls nobody.
pub(crate) struct Alone;

#[async_trait]
impl Peers for Alone {
    async fn call(&self, to: &PeerRef, _: &GroupId, _: Message) -> Result<Message, PeerError> {
        Err(PeerError::Unreachable(format!("there is no {}", to.node)))
    }
}

#[async_trait]
impl Forward for Alone {
    async fn forward(&self, node: u64, _: &Intent, _: Duration) -> Result<Accepted, ForwardError> {
        Err(ForwardError::NotTaken(format!("there is no {node}")))
    }

    async fn pass(&self, via: u64, _: &Passed, _: Duration) -> Result<Accepted, ForwardError> {
        Err(ForwardError::NotTaken(format!("there is no {via}")))
    }
}

/// What the wire does to a message: named fields in MessagePack, there and back.
fn over_the_wire<T: serde::Serialize + serde::de::DeserializeOwned>(message: &T) -> T {
    let bytes = rmp_serde::to_vec_named(message).expect("messages are plain data");
    rmp_serde::from_slice(&bytes).expect("what was just written")
}

struct Server {
    store: Arc<EmbeddedStore>,
    region: Arc<Region>,
    view: View,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Server {
    async fn start(dir: &Path) -> anyhow::Result<Self> {
        let env = Env::real();
        let members = BTreeMap::from([(1, "alone".to_owned())]);
        let config = embedded::Config::new(1, "local".parse().context("a group's name")?, dir, members);
        let store = Arc::new(EmbeddedStore::open(config, env.clone(), Arc::new(Alone)).await?);
        let (view, stop, mut tasks) = (View::new("localhost"), CancellationToken::new(), JoinSet::new());
        let (follows, contract, stopped) = (view.clone(), store.clone() as Arc<dyn Store>, stop.clone());
        tasks.spawn(async move { follows.follow(contract, stopped).await });
        let region = lead(&store, &env, &mut tasks, &stop);
        Ok(Self { store, region, view, stop, tasks })
    }

    /// For whoever waits: where hosts and instances stand, and what the writer has done.
    fn progress(&self) -> String {
        let (mut hosts, mut instances) = (BTreeMap::<String, u64>::new(), BTreeMap::<String, u64>::new());
        self.view.read(|world| {
            for host in world.hosts.live.values() {
                *hosts.entry(format!("{:?}", host.status.state)).or_default() += 1;
            }
            for instance in world.instances.live.values() {
                let leaves = if instance.metadata.deleting.is_some() { ", to be deleted" } else { "" };
                *instances.entry(format!("{:?}{leaves}", instance.status.phase)).or_default() += 1;
            }
        });
        let c = &self.region.counters;
        let [rounds, commits, began] = [&c.rounds, &c.commits, &c.beginnings].map(|n| n.load(Ordering::Relaxed));
        format!(
            "hosts {hosts:?}, instances {instances:?}; {rounds} rounds, {commits} transactions, the writer began {began} times"
        )
    }

    async fn end(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.store.shutdown().await;
    }
}

fn lead(store: &Arc<EmbeddedStore>, env: &Env, tasks: &mut JoinSet<()>, stop: &CancellationToken) -> Arc<Region> {
    let bootstrap = Bootstrap {
        region: name("local"),
        domain: "localhost".into(),
        zones: ZONES.map(name).to_vec(),
        cells: Vec::new(),
    };
    let config = Config { node: 1, server: "server-1".into(), bootstrap, fleet: None };
    let region = Arc::new(Region::new(config, env.clone(), store.clone(), Arc::new(Alone)));
    let (runs, stopped) = (region.clone(), stop.clone());
    tasks.spawn(async move { runs.run(stopped).await });
    region
}

async fn submit(region: &Region, object: nexus_model::AnyObject, plural: &str) -> anyhow::Result<Accepted> {
    let m = &object.metadata;
    let target = Target { plural: plural.into(), project: m.project.clone(), organization: None, name: m.name.clone() };
    let intent = Intent {
        request_id: name("bench").as_str().parse().context("a request id")?,
        actor: "bench".into(),
        by: Provenance::default(),
        target,
        change: Change::Put { object },
        if_match: None,
        idempotency_key: None,
        dry_run: false,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match region.submit(intent.clone()).await {
            Err(e) if e.code.is_retryable() && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answer => return answer.map_err(|e| anyhow::anyhow!("{}", e.detail)),
        }
    }
}

fn object<K: Kind>(project: Option<&Name>, of: &str, spec: K::Spec) -> (nexus_model::AnyObject, &'static str) {
    (Object::<K>::new(Metadata::new(name(of), project.cloned()), spec).to_any(), K::PLURAL)
}

/// What all agents share.
#[derive(Default)]
struct Tally {
    /// Microseconds from sending a report to its answer, while it is being noted.
    latencies: Mutex<Vec<f64>>,
    noting: AtomicBool,
    /// How often a report was not taken in, by why.
    refused: Mutex<BTreeMap<String, u64>>,
    running: AtomicU64,
}

impl Tally {
    fn refusals(&self) -> u64 {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

struct Agent {
    host: Name,
    spec: HostSpec,
    region: Arc<Region>,
    view: View,
    tally: Arc<Tally>,
}

impl Agent {
    fn number(n: usize, region: Arc<Region>, view: View, tally: Arc<Tally>) -> Self {
        let (high, low) = (n / 250, n % 250);
        let spec = HostSpec {
            zone: name(ZONES[n % ZONES.len()]),
            cell: name(ANY_CELL),
            address: format!("[fd01::{n:x}]:7440").parse().expect("a well-formed address"),
            prefix6: format!("fd00:0:0:{n:x}::").parse().expect("a well-formed address"),
            prefix4: [10, high as u8, low as u8, 0].into(),
            runtimes: vec![Runtime::Container],
            capacity: Capacity {
                cpu: MilliCpu(16_000),
                memory: Bytes(64 << 30),
                scratch: Bytes(1 << 40),
                instances: 250,
            },
            ..HostSpec::default()
        };
        Self { host: name(&format!("host-{n:05}")), spec, region, view, tally }
    }

    /// Follows the plan and reports, until the task is ended.
    async fn live(self, first: Duration) {
        tokio::time::sleep(first).await;
        let mut plans = self.view.plan(&self.host);
        let mut plan: HostPlan = over_the_wire(&**plans.borrow_and_update());
        let mut known: BTreeMap<Uid, InstanceReport> = BTreeMap::new();
        let mut starting: Option<tokio::time::Instant> = None;
        loop {
            if self.follow(&plan, &mut known) {
                starting = Some(tokio::time::Instant::now() + START_TAKES);
            }
            self.report(&plan, &known).await;
            let heartbeat = tokio::time::Instant::now() + REPORT_EVERY;
            tokio::select! {
                changed = plans.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    plan = over_the_wire(&**plans.borrow_and_update());
                    tokio::time::sleep(COALESCE).await;
                }
                () = tokio::time::sleep_until(starting.unwrap_or(heartbeat).min(heartbeat)) => {}
            }
            if starting.is_some_and(|at| at <= tokio::time::Instant::now()) {
                starting = None;
                for instance in known.values_mut().filter(|i| !i.ready) {
                    (instance.phase, instance.ready) = (InstancePhase::Running, true);
                    self.tally.running.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Does what the plan says. True if something was started.
    fn follow(&self, plan: &HostPlan, known: &mut BTreeMap<Uid, InstanceReport>) -> bool {
        let wanted = |uid: &Uid| plan.instances.iter().any(|i| i.uid == *uid && i.desired == Desired::Running);
        known.retain(|uid, _| wanted(uid));
        let mut started = false;
        for i in plan.instances.iter().filter(|i| i.desired == Desired::Running) {
            known.entry(i.uid).or_insert_with(|| {
                started = true;
                InstanceReport {
                    uid: i.uid,
                    epoch: i.epoch,
                    phase: InstancePhase::Starting,
                    ready: false,
                    endpoint: Some((i.address6, 8080).into()),
                    restarts: 0,
                    started: None,
                    exit_code: None,
                    message: String::new(),
                    parts: Vec::new(),
                }
            });
        }
        started
    }

    async fn report(&self, plan: &HostPlan, known: &BTreeMap<Uid, InstanceReport>) {
        let report = HostReport {
            host: self.host.clone(),
            spec: self.spec.clone(),
            boot_id: "boot-1".into(),
            agent_version: "bench".into(),
            applied: Some(plan.revision),
            instances: known.values().cloned().collect(),
            images: vec![Digest::of(b"image")],
            load: 0.3,
            networks: Some(0),
            certificate_ends: None,
            usage: Vec::new(),
            telemetry: Default::default(),
            failing: None,
        };
        let begun = Instant::now();
        match self.region.report(over_the_wire(&report)).await {
            Ok(epoch) => drop(over_the_wire(&ReportAck { epoch, servers: vec!["server-1".into()] })),
            Err(why) => {
                let mut refused = self.tally.refused.lock().unwrap_or_else(PoisonError::into_inner);
                *refused.entry(format!("{why:?}")).or_default() += 1;
            }
        }
        if self.tally.noting.load(Ordering::Relaxed) {
            let micros = begun.elapsed().as_secs_f64() * 1e6;
            self.tally.latencies.lock().unwrap_or_else(PoisonError::into_inner).push(micros);
        }
    }
}

/// Looks four times a second until it is so; answers after how long.
async fn until(what: &str, server: &Server, mut so: impl FnMut() -> bool) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut told = Instant::now();
    while !so() {
        if begun.elapsed() > PATIENCE {
            bail!("gave up after {} s waiting for {what}", PATIENCE.as_secs());
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            eprintln!(
                "  {:.0} s, still waiting for {what}; {:.0} CPU seconds; {}",
                begun.elapsed().as_secs_f64(),
                cpu_seconds(),
                server.progress()
            );
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// Processor seconds of this process's threads, by the name that their runtime gave them.
fn cpu_by_thread() -> HashMap<String, f64> {
    let mut sums = HashMap::new();
    // Ticks of a hundredth of a second: proc(5), and the same on every Linux of note.
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
        let Some((_, thread)) = head.split_once('(') else { continue };
        let ticks = tail.split(' ').skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>();
        *sums.entry(thread.to_owned()).or_default() += ticks / 100.0;
    }
    sums
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|k| k.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

fn threads(name: &str) -> anyhow::Result<runtime::Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(2).thread_name(name).enable_all().build()?)
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    // Two runtimes, so that what the agents cost can be told from what the control plane does.
    let (control, agents) = (threads("control")?, threads("agents")?);
    let dir = tempfile::tempdir().context("a folder for the store")?;
    control.block_on(measure(dir.path(), &agents))
}

async fn measure(dir: &Path, agents: &runtime::Runtime) -> anyhow::Result<Vec<Row>> {
    let hosts = from_env("NEXUS_SCALE_HOSTS", 10_000);
    let instances = from_env("NEXUS_SCALE_INSTANCES", 100_000);
    let replicas = u32::try_from(instances / (PROJECTS * APPS_PER_PROJECT)).context("too many instances")?;
    let total = u64::from(replicas) * (PROJECTS * APPS_PER_PROJECT) as u64;
    let server = Server::start(dir).await?;
    let mut rows = Vec::new();

    eprintln!("{hosts} hosts join {} cells", ZONES.len() * CELLS_PER_ZONE);
    for zone in ZONES {
        for n in 1..=CELLS_PER_ZONE {
            let spec = CellSpec { zone: Some(name(zone)), max_hosts: 1_000 };
            let (cell, plural) = object::<Cell>(None, &format!("{zone}-{n}"), spec);
            submit(&server.region, cell, plural).await?;
        }
    }
    let tally = Arc::new(Tally::default());
    let mut living = Vec::new();
    for n in 0..hosts {
        let agent = Agent::number(n, server.region.clone(), server.view.clone(), tally.clone());
        // Spread over a second, as they are in life.
        living.push(agents.spawn(agent.live(REPORT_EVERY.mul_f64(n as f64 / hosts as f64))));
    }
    let ready_hosts = |world: &nexus_control::world::World| {
        world.hosts.live.values().filter(|h| h.status.state == HostState::Ready).count()
    };
    let took = until("hosts to be ready", &server, || server.view.read(ready_hosts) == hosts).await?;
    rows.push(Row::new(format!("{hosts} hosts joined"), took, "s"));

    eprintln!("{total} instances in {PROJECTS} projects");
    let before = cpu_seconds();
    let begun = Instant::now();
    deploy(&server.region, replicas).await?;
    rows.push(Row::new("all apps accepted", begun.elapsed().as_secs_f64(), "s"));
    let all_ready = |world: &nexus_control::world::World| {
        world.apps.live.values().map(|app| u64::from(app.status.ready_replicas)).sum::<u64>() == total
    };
    until("every instance to be ready", &server, || server.view.read(all_ready)).await?;
    rows.push(
        Row::new(format!("{total} instances ready"), begun.elapsed().as_secs_f64(), "s")
            .cpu_per_op((cpu_seconds() - before) / total as f64),
    );

    eprintln!("steady state");
    tokio::time::sleep(SETTLING).await;
    for (why, times) in &*tally.refused.lock().unwrap_or_else(PoisonError::into_inner) {
        eprintln!("  {times} reports were refused: {why}");
    }
    rows.extend(watch(&server, &tally).await?);

    eprintln!("one host dies");
    let victim = server
        .view
        .read(|world| world.on_host.iter().max_by_key(|(_, uids)| uids.len()).map(|(host, _)| host.clone()))
        .context("nothing runs anywhere")?;
    let n: usize = victim.as_str().trim_start_matches("host-").parse().context("a host's number")?;
    living[n].abort();
    let moved = |world: &nexus_control::world::World| {
        let left = world.instances_on(&victim).any(|i| i.metadata.deleting.is_none());
        !left && all_ready(world)
    };
    let lost = server.view.read(|world| world.instances_on(&victim).count());
    let after = until("its instances to run elsewhere", &server, || server.view.read(moved)).await?;
    rows.push(Row::new(format!("{lost} instances of a host that dies ready elsewhere"), after, "s"));

    let violations = server.region.counters.violations.load(Ordering::Relaxed);
    if violations > 0 {
        bail!("the figures are void: {violations} invariants did not hold");
    }
    living.iter().for_each(tokio::task::JoinHandle::abort);

    eprintln!("another writer takes over");
    let Server { store, region, view, stop, mut tasks } = server;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    drop((region, view));
    let (stop, begun) = (CancellationToken::new(), Instant::now());
    let region = lead(&store, &Env::real(), &mut tasks, &stop);
    let (zone, plural) = object::<Zone>(None, "zone-d", ZoneSpec::default());
    submit(&region, zone, plural).await?;
    rows.push(Row::new("a new writer's first commit, its state loaded", begun.elapsed().as_secs_f64(), "s"));
    Server { store, region, view: View::new("localhost"), stop, tasks }.end().await;
    Ok(rows)
}

async fn deploy(region: &Arc<Region>, replicas: u32) -> anyhow::Result<()> {
    let mut all = JoinSet::new();
    for n in 0..PROJECTS {
        let region = region.clone();
        all.spawn(async move {
            let project = name(&format!("project-{n:03}"));
            let (tenant, plural) = object::<Project>(None, project.as_str(), ProjectSpec::default());
            submit(&region, tenant, plural).await?;
            let digest = Digest::of(b"image");
            let spec =
                ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 1 }], source: None };
            let (image, plural) = object::<Image>(Some(&project), "web", spec);
            submit(&region, image, plural).await?;
            for app in 0..APPS_PER_PROJECT {
                let mut spec = AppSpec { image: name("web"), replicas, ..App::example() };
                // What is measured here is no network: a project's own holds far fewer instances.
                spec.network = Some(TemplateNetwork::None);
                (spec.resources.cpu, spec.resources.memory) = (MilliCpu(100), Bytes(128 << 20));
                spec.env = (0..4).map(|n| (format!("VARIABLE_{n}"), "a value of some length".to_owned())).collect();
                let (app, plural) = object::<App>(Some(&project), &format!("app-{app}"), spec);
                submit(&region, app, plural).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = all.join_next().await {
        done??;
    }
    Ok(())
}

/// The steady state's figures.
async fn watch(server: &Server, tally: &Tally) -> anyhow::Result<Vec<Row>> {
    let c = &server.region.counters;
    let counts = || [&c.reports, &c.rounds, &c.commits, &c.operations].map(|c| c.load(Ordering::Relaxed) as f64);
    tally.noting.store(true, Ordering::Relaxed);
    let (cpu, threads, begun, before) = (cpu_seconds(), cpu_by_thread(), Instant::now(), counts());
    let refused = tally.refusals();
    // A user's request every second, to see what waits for what.
    let mut answers = Vec::new();
    while begun.elapsed() < WATCHED {
        let asked = Instant::now();
        let spec = ZoneSpec { display_name: format!("Hall {}", answers.len()) };
        let (zone, plural) = object::<Zone>(None, ZONES[0], spec);
        submit(&server.region, zone, plural).await?;
        answers.push(asked.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let (cpu, after, threads_after) = (cpu_seconds() - cpu, counts(), cpu_by_thread());
    tally.noting.store(false, Ordering::Relaxed);
    let rate = |i: usize| (after[i] - before[i]) / seconds;
    let of_agents = threads_after.get("agents").unwrap_or(&0.0) - threads.get("agents").unwrap_or(&0.0);
    let latencies = std::mem::take(&mut *tally.latencies.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(vec![
        Row::new("steady state, share of one core", cpu / seconds, "1"),
        Row::new("of it the agents, with both ends' coding of messages", of_agents / seconds, "1"),
        Row::new("steady state, reports taken in", rate(0), "1/s").cpu_per_op(cpu / (after[0] - before[0])),
        Row::new("steady state, writer rounds", rate(1), "1/s"),
        Row::new("steady state, transactions", rate(2), "1/s"),
        Row::new("steady state, operations", rate(3), "1/s"),
        Row::new("steady state, report to answer, p99", percentile(&latencies, 0.99) / 1e3, "ms"),
        Row::new("steady state, request to commit, worst", percentile(&answers, 1.0), "ms"),
        Row::new("steady state, reports refused", (tally.refusals() - refused) as f64, "1"),
        Row::new("reports refused before it", refused as f64, "1"),
        Row::new("times the writer began, once is enough", c.beginnings.load(Ordering::Relaxed) as f64, "1"),
        Row::new("memory, agents included", resident_mib(), "MiB"),
    ])
}
