//! One seed: makes a world, lets load and faults loose on it, makes all good again, and looks at what is left.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nexus_store::{RangeRequest, Revision, Store, Txn};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::care::{self, Care};
use crate::chance::{self, Dice};
use crate::check::check;
use crate::clients::{Calls, Client, PREFIX};
use crate::judge::{self, Ground};
use crate::leases::{Beliefs, Holder};
use crate::members::{self, Operator};
use crate::mutant::Mutant;
use crate::nemesis::{FAULTS_LAST, Nemesis};
use crate::recorder::Recorder;
use crate::releases::{self, Releases};
use crate::site::{Group, Site};
use crate::trace::{Trace, Violation};
use crate::users::{self, Known, User, Way};
use crate::world::{Plan, World};
use crate::{clock, fleet, partial, region};

/// Once nothing is broken any more, every server serves within this.
const RECOVERS_WITHIN: Duration = Duration::from_secs(20);

/// Where clocks run far apart, locks go from hand to hand so long when nothing else goes on.
const HANDS_OVER: Duration = Duration::from_secs(30);

/// What a seed came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    pub seed: u64,
    pub kind: String,
    pub hash: u64,
    pub virtual_seconds: f64,
    pub counters: BTreeMap<String, u64>,
    pub violations: Vec<Violation>,
}

/// Runs a seed in a runtime whose time is virtual, on this thread.
pub fn run(seed: u64, mutant: Option<Mutant>, verbose: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime can be made");
    let outcome = runtime.block_on(async {
        let trace = Trace::new(verbose);
        let kind = seed_kind(seed);
        trace.note(format_args!("seed {seed}: {kind:?}"));
        trace.count(&format!("worlds: {}", kind.name()));
        match kind {
            Kind::Store { servers } => store_world(seed, servers, 0, false, mutant, &trace).await,
            Kind::Releases => store_world(seed, 3, 0, true, mutant, &trace).await,
            Kind::Members => store_world(seed, 3, 3, false, mutant, &trace).await,
            Kind::Region { servers } => region_world(seed, servers, mutant, &trace).await,
            Kind::Fleet => fleet::world(seed, mutant, &trace).await,
            Kind::Partial => partial_world(seed, mutant, &trace).await,
            Kind::Care(care) => care::world(seed, care, mutant, &trace).await,
        }
        Outcome {
            seed,
            kind: kind.name().to_owned(),
            hash: trace.hash(),
            virtual_seconds: trace.now().as_secs_f64(),
            counters: trace.counters(),
            violations: trace.violations(),
        }
    });
    runtime.shutdown_background();
    outcome
}

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Store { servers: u64 },
    Region { servers: u64 },
    Fleet,
    Partial,
    Members,
    Releases,
    Care(Care),
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Store { .. } => "store",
            Self::Region { .. } => "region",
            Self::Fleet => "fleet",
            Self::Partial => "partial",
            Self::Members => "members",
            Self::Releases => "releases",
            Self::Care(Care::Apps) => "apps",
            Self::Care(Care::Scaling) => "scaling",
            Self::Care(Care::Work) => "work",
        }
    }
}

/// A seed's remainder by this says which world it is about.
pub const WORLDS: u64 = 9;

/// Which world a seed is about.
pub fn seed_kind(seed: u64) -> Kind {
    match seed % WORLDS {
        0 => Kind::Region { servers: 3 },
        1 => Kind::Store { servers: 5 },
        2 if (seed / WORLDS).is_multiple_of(2) => Kind::Store { servers: 3 },
        2 => Kind::Releases,
        3 => Kind::Fleet,
        4 => Kind::Members,
        5 => Kind::Partial,
        6 => Kind::Care(Care::Apps),
        7 => Kind::Care(Care::Scaling),
        _ => Kind::Care(Care::Work),
    }
}

/// Servers with a store each, and clients of it; if there are spares, an operator who changes the members; perhaps one who
/// changes the servers' release.
async fn store_world(
    seed: u64,
    servers: u64,
    spares: u64,
    changes_releases: bool,
    mutant: Option<Mutant>,
    trace: &Trace,
) {
    let dice = Dice::new(seed, "run");
    let plan = Plan {
        seed,
        sites: Site::alone(servers),
        spares,
        with_region: false,
        snapshot_after: dice.range(15_000, 60_000),
        skew_ms: if dice.chance(500) { dice.range(1, 5_000) } else { 0 },
        mutant,
    };
    let world = World::new(&plan, trace.clone());
    let mut standing = start(&world);
    let recorder = Recorder::new(Group::Own, &world.nodes);
    for node in &world.nodes {
        let dice = Dice::new(seed, &format!("recorder {node}"));
        standing.spawn(recorder.clone().follow(world.clone(), *node, dice.clone()));
        let prefix = format!("{PREFIX}{}", dice.below(10));
        standing.spawn(recorder.clone().follow_some(world.clone(), *node, prefix));
    }
    standing.spawn(compact_now_and_then(world.clone(), recorder.clone(), Dice::new(seed, "compact")));
    let (calls, beliefs, stop) = (Calls::default(), Beliefs::default(), Arc::new(AtomicBool::new(false)));
    let mut load = JoinSet::new();
    for id in 0..servers + 2 {
        let client = Client {
            world: world.clone(),
            id,
            dice: Dice::new(seed, &format!("client {id}")),
            calls: calls.clone(),
            stop: stop.clone(),
            pause_ms: dice.range(20, 120),
        };
        load.spawn(client.run());
    }
    let (mut holders, let_go) = (JoinSet::new(), Arc::new(AtomicBool::new(false)));
    for id in 0..3 {
        let holder = Holder {
            world: world.clone(),
            id,
            locks: 1,
            dice: Dice::new(seed, &format!("holder {id}")),
            beliefs: beliefs.clone(),
            stop: let_go.clone(),
        };
        holders.spawn(holder.run());
    }
    let nemesis = Nemesis::of_servers(&world, (100, 1_400));
    sleep(Duration::from_secs(2)).await;
    let mut operating = JoinSet::new();
    if spares > 0 {
        let operator = Operator { world: world.clone(), dice: Dice::new(seed, "operator"), stop: stop.clone() };
        operating.spawn(operator.run());
    }
    if changes_releases {
        standing.spawn(releases::watch_levels(world.clone()));
        let releases = Releases { world: world.clone(), dice: Dice::new(seed, "releases") };
        operating.spawn(releases.run());
    }
    nemesis.run(Instant::now() + FAULTS_LAST).await;
    // A server that is being added serves when it has been.
    if timeout(Duration::from_secs(240), operating.join_next()).await.is_err() {
        trace.violation("operators' work gets done", "the operator did not come to an end");
    }
    serves_again(&world, Group::Own, "probe").await;
    sleep(Duration::from_millis(500)).await;
    end_load(&stop, load, Duration::from_secs(20), trace).await;
    if world.drift_ppm == clock::WORST_PPM {
        // Without faults only time ends leases, so that it shows whether their holders count alike.
        sleep(HANDS_OVER).await;
    }
    end_load(&let_go, holders, Duration::from_secs(20), trace).await;
    if spares > 0 {
        members::agree(&world).await;
    }
    if changes_releases {
        releases::agree(&world).await;
    }
    settle(&world, &recorder).await;
    recorder.check_narrow(&world);
    for (property, detail) in check(&calls.all(), &recorder.log(), PREFIX.as_bytes()) {
        trace.violation(property, detail);
    }
    for conflict in beliefs.conflicts() {
        trace.violation("a lease is never held by two", conflict);
    }
    trace.add("revisions", recorder.newest());
    end(&world, standing).await;
}

/// Five servers whose links are cut in a shape that is meant to stop them, and stays so.
async fn partial_world(seed: u64, mutant: Option<Mutant>, trace: &Trace) {
    let plan =
        Plan { seed, sites: Site::alone(5), spares: 0, with_region: false, snapshot_after: 60_000, skew_ms: 0, mutant };
    let world = World::new(&plan, trace.clone());
    let mut standing = start(&world);
    let recorder = record(&world, seed, &mut standing);
    let (calls, stop) = (Calls::default(), Arc::new(AtomicBool::new(false)));
    serves_again(&world, Group::Own, "first").await;
    let mut load = JoinSet::new();
    for id in 0..5 {
        let client = Client {
            world: world.clone(),
            id,
            dice: Dice::new(seed, &format!("client {id}")),
            calls: calls.clone(),
            stop: stop.clone(),
            pause_ms: 100,
        };
        load.spawn(client.run());
    }
    sleep(Duration::from_secs(1)).await;
    partial::torment(&world, &Dice::new(seed, "partial")).await;
    world.net.heal_all();
    serves_again(&world, Group::Own, "probe").await;
    end_load(&stop, load, Duration::from_secs(20), trace).await;
    settle(&world, &recorder).await;
    for (property, detail) in check(&calls.all(), &recorder.log(), PREFIX.as_bytes()) {
        trace.violation(property, detail);
    }
    end(&world, standing).await;
}

/// A region: servers with the control loop, hosts, users.
async fn region_world(seed: u64, servers: u64, mutant: Option<Mutant>, trace: &Trace) {
    let dice = Dice::new(seed, "run");
    let plan = Plan {
        seed,
        sites: Site::alone(servers),
        spares: 0,
        with_region: true,
        snapshot_after: dice.range(100_000, 400_000),
        skew_ms: if dice.chance(500) { dice.range(1, 5_000) } else { 0 },
        mutant,
    };
    let world = World::new(&plan, trace.clone());
    let mut standing = start(&world);
    let recorder = record(&world, seed, &mut standing);
    let ground = Ground::lay(&world, &world.sites[0], &mut standing);
    let (known, stop) = (Known::default(), Arc::new(AtomicBool::new(false)));
    let way = Way::of_region(&world.nodes);
    users::import_image(&world, &dice, &region::name(users::PROJECT), &way).await;
    let mut load = JoinSet::new();
    for id in 0..4 {
        let user = User {
            world: world.clone(),
            id,
            dice: Dice::new(seed, &format!("user {id}")),
            known: known.clone(),
            way: way.clone(),
            stop: stop.clone(),
        };
        load.spawn(user.run());
    }
    let nemesis = Nemesis {
        world: world.clone(),
        dice: Dice::new(seed, "nemesis"),
        pace: (200, 2_000),
        hosts: ground.hosts.clone(),
        gateways: ground.gateways.clone(),
    };
    nemesis.run(Instant::now() + 2 * FAULTS_LAST).await;
    serves_again(&world, Group::Own, "probe").await;
    end_load(&stop, load, Duration::from_secs(60), trace).await;
    judge::converges(&world, || judge::difference(&world, &ground, &known.all())).await;
    settle(&world, &recorder).await;
    judge::history(&recorder.log(), trace);
    judge::tables(&recorder.log(), &ground.gateways, trace);
    for server in world.servers() {
        world.take_recount(&server);
    }
    trace.add("revisions", recorder.newest());
    end(&world, standing).await;
}

/// Records what the region's own group does, as each of its servers tells it.
pub fn record(world: &Arc<World>, seed: u64, standing: &mut JoinSet<()>) -> Recorder {
    let recorder = Recorder::new(Group::Own, &world.nodes);
    for node in &world.nodes {
        let dice = Dice::new(seed, &format!("recorder {node}"));
        standing.spawn(recorder.clone().follow(world.clone(), *node, dice));
    }
    recorder
}

/// Asks the load to end, which it does when what it has begun is answered.
pub async fn end_load(stop: &AtomicBool, mut load: JoinSet<()>, limit: Duration, trace: &Trace) {
    stop.store(true, Ordering::SeqCst);
    if timeout(limit, async { while load.join_next().await.is_some() {} }).await.is_err() {
        trace.violation("every request ends in time", "the load did not end");
    }
}

/// Starts everybody.
pub fn start(world: &Arc<World>) -> JoinSet<()> {
    let mut standing = JoinSet::new();
    for node in &world.nodes {
        standing.spawn(world.clone().supervise(*node));
    }
    standing
}

pub async fn end(world: &Arc<World>, mut standing: JoinSet<()>) {
    standing.shutdown().await;
    for server in world.servers() {
        server.life.kill();
    }
}

/// Forgets history behind what is recorded, as an operator's job would.
async fn compact_now_and_then(world: Arc<World>, recorder: Recorder, dice: Dice) {
    loop {
        sleep(dice.millis(500, 6_000)).await;
        let before = recorder.newest().saturating_sub(dice.range(1, 200));
        let Some(server) = dice.pick(&world.nodes).and_then(|node| world.server(*node)) else { continue };
        match server.door.compact(Revision(before)).await {
            Ok(()) => world.trace.count("compactions"),
            Err(error) => world.trace.note(format_args!("compaction before {before}: {error}")),
        }
    }
}

/// Every server must take a write and a read again.
pub async fn serves_again(world: &Arc<World>, group: Group, name: &str) {
    let deadline = Instant::now() + RECOVERS_WITHIN;
    for node in &world.present() {
        let mut why = "it is down".to_owned();
        loop {
            if let Some(door) = world.server(*node).and_then(|server| server.door(group).cloned()) {
                let key = format!("{name}/{node}");
                let done = async {
                    door.txn(Txn::put(key.clone(), "here")).await?;
                    door.range(RangeRequest::get(key.clone())).await
                };
                match timeout(Duration::from_secs(8), done).await {
                    Ok(Ok(_)) => break,
                    Ok(Err(error)) => why = error.to_string(),
                    Err(_) => "no answer".clone_into(&mut why),
                }
            }
            if Instant::now() >= deadline {
                let text = format!("server {node} does not serve {RECOVERS_WITHIN:?} after the last fault: {why}");
                world.trace.violation("the store recovers when faults end", text);
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    world.trace.note("every server serves");
}

/// Waits until every server and the record have come to the same revision, and compares what they hold.
pub async fn settle(world: &Arc<World>, recorder: &Recorder) {
    let deadline = Instant::now() + RECOVERS_WITHIN;
    let mut contents = BTreeMap::new();
    let mut nodes = world.present();
    nodes.retain(|node| recorder.nodes.contains(node));
    let member = |node: u64| Some(world.server(node)?.door(recorder.group)?.store.clone());
    for node in &nodes {
        loop {
            if let Some(store) = member(*node)
                && let Ok(Ok(found)) = timeout(Duration::from_secs(5), store.range(RangeRequest::prefix(""))).await
            {
                contents.insert(*node, found);
                break;
            }
            if Instant::now() >= deadline {
                world
                    .trace
                    .violation("the store recovers when faults end", format_args!("server {node} can't be read"));
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    let newest = contents.values().map(|c| c.revision.0).max().unwrap_or(0);
    // A lease may end between two reads, so contents are compared at one revision.
    for node in &nodes {
        let Some(store) = member(*node) else { continue };
        let request = RangeRequest::prefix("").at(Revision(newest));
        if let Ok(Ok(found)) = timeout(Duration::from_secs(5), store.range(request)).await {
            contents.insert(*node, found);
        }
    }
    let mut all = contents.iter();
    if let Some((first, want)) = all.next() {
        for (node, have) in all {
            if have.kvs != want.kvs {
                let text = format!("servers {first} and {node} differ at revision {newest}");
                world.trace.violation("all servers come to hold the same", text);
            }
        }
    }
    while recorder.newest() < newest {
        if Instant::now() >= deadline {
            let text = format!("watches came to {}, the store to {newest}", recorder.newest());
            world.trace.violation("a watch tells every revision once and in order", text);
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Runs a seed on a thread of its own, so that nothing that ran before on this one is left in it, and takes in panics.
pub fn in_thread(seed: u64, mutant: Option<Mutant>, verbose: bool) -> anyhow::Result<Outcome> {
    static PANICS: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        PANICS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(info.to_string());
    }));
    let thread = std::thread::Builder::new().stack_size(16 << 20).spawn(move || {
        // Here, so that what this process did before (reading arguments, opening a log) leaves no mark.
        chance::fix(seed);
        run(seed, mutant, verbose)
    })?;
    let mut outcome = thread.join().map_err(|_| anyhow::anyhow!("the run of seed {seed} panicked"))?;
    let panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    outcome.violations.extend(panics.into_iter().map(|detail| Violation { property: "nothing panics".into(), detail }));
    Ok(outcome)
}
