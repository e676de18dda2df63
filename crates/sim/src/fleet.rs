//! A world of several regions: each has servers with a group of its own, hosts, a gateway, and all servers are members of the
//! group that all regions share. In most of them a region joins and another leaves while faults go on.
//!
//! Beside faults drawn by lot there is one that is aimed: when everything is well, one region is cut off or lost, or two are cut
//! apart, and nothing else. Then global writes must resume wherever a majority of the core regions is in reach, a region that is
//! cut off must go on deciding for its own, and every region must answer global reads from its own copy all the time.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nexus_control::intent::{Change, Writer};
use nexus_model::kind::{App, AppSpec, Blob, Image, ImageFormat, ImageSpec, Kind};
use nexus_model::{Digest, Metadata, Object};
use nexus_store::{RangeRequest, Store, Txn};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::chance::Dice;
use crate::fleet_judge::fleet_difference;
use crate::fleet_users::{FleetUser, Known};
use crate::judge::{self, Ground};
use crate::moves::{self, Moves};
use crate::mutant::Mutant;
use crate::nemesis::{FAULTS_LAST, Nemesis, around, between};
use crate::recorder::Recorder;
use crate::region::name;
use crate::run::{end, end_load, serves_again, settle, start};
use crate::server::Server;
use crate::site::{Group, Site};
use crate::trace::Trace;
use crate::users::{PROJECT, Way, import_image, intent};
use crate::world::{Plan, World};

/// The first start takes so long at most.
const BEGINS_WITHIN: Duration = Duration::from_secs(40);
/// Writes resume within this when a region is lost, and go on without a longer pause.
const RESUMES_WITHIN: Duration = Duration::from_secs(8);
const NO_PAUSE_OVER: Duration = Duration::from_secs(5);
const HELD: Duration = Duration::from_secs(9);
/// After the faults: each step of an operator has a limit of its own.
const MOVES_WITHIN: Duration = Duration::from_secs(600);
const GLOBAL_WRITES: &str = "global writes resume while a majority of core regions reach one another";
const OWN_WRITES: &str = "a region that is cut off goes on deciding for its own";
const LOCAL_READS: &str = "any region answers global reads from its own copy, and never goes back";

pub async fn world(seed: u64, mutant: Option<Mutant>, trace: &Trace) {
    let dice = Dice::new(seed, "run");
    let plan = Plan {
        seed,
        sites: Site::fleet(seed / 6),
        spares: 0,
        with_region: true,
        snapshot_after: dice.range(100_000, 400_000),
        skew_ms: if dice.chance(500) { dice.range(1, 5_000) } else { 0 },
        mutant,
    };
    let world = World::new(&plan, trace.clone());
    let mut standing = start(&world);
    standing.spawn(moves::let_in_the_others(world.clone()));
    let mut recorders = vec![Recorder::new(Group::Global, &world.nodes)];
    recorders.extend(world.sites.iter().map(|site| Recorder::new(Group::Own, &site.nodes)));
    for recorder in &recorders {
        for node in &recorder.nodes {
            let dice = Dice::new(seed, &format!("recorder {:?} {node}", recorder.group));
            standing.spawn(recorder.clone().follow(world.clone(), *node, dice));
        }
    }
    for node in &world.nodes {
        standing.spawn(reads(world.clone(), *node));
    }
    let sites = world.sites.clone();
    let grounds: Vec<Ground> = sites.iter().map(|site| Ground::lay(&world, site, &mut standing)).collect();
    let (known, stop) = (Known::default(), Arc::new(AtomicBool::new(false)));
    begins(&world, &dice).await;
    let mut load = JoinSet::new();
    for id in 0..4 {
        let user = FleetUser {
            world: world.clone(),
            id,
            dice: Dice::new(seed, &format!("user {id}")),
            known: known.clone(),
            stop: stop.clone(),
        };
        load.spawn(user.run());
    }
    let nemesis = Nemesis {
        world: world.clone(),
        dice: Dice::new(seed, "nemesis"),
        pace: (200, 1_800),
        hosts: grounds.iter().flat_map(|g| g.hosts.clone()).collect(),
        gateways: grounds.iter().flat_map(|g| g.gateways.clone()).collect(),
    };
    let (mut moving, mut span) = (JoinSet::new(), FAULTS_LAST);
    if let Some(moves) = Moves::of(&world, Dice::new(seed, "moves"), &known) {
        moving.spawn(moves.run());
        span = span * 3 / 2;
    }
    nemesis.run(Instant::now() + span).await;
    if timeout(MOVES_WITHIN, moving.join_next()).await.is_err() {
        trace.violation("operators' work gets done", "regions did not come and go in time");
    }
    all_serve(&world, "probe").await;
    torment(&world, &Dice::new(seed, "torment"), &known).await;
    nemesis.make_good();
    all_serve(&world, "last").await;
    end_load(&stop, load, Duration::from_secs(90), trace).await;
    judge::converges(&world, || fleet_difference(&world, &grounds, &known.get())).await;
    for recorder in &recorders {
        settle(&world, recorder).await;
        judge::history(&recorder.log(), trace);
        trace.add("revisions", recorder.newest());
    }
    for server in world.servers() {
        world.take_recount(&server);
    }
    end(&world, standing).await;
}

async fn all_serve(world: &Arc<World>, name: &str) {
    serves_again(world, Group::Own, name).await;
    serves_again(world, Group::Global, name).await;
}

/// Waits until every region knows the fleet and has what users take for granted.
async fn begins(world: &Arc<World>, dice: &Dice) {
    import_image(world, dice, &name(PROJECT), &Way::of_global(world)).await;
    let knows = || {
        world.present().into_iter().all(|node| {
            let Some(server) = world.server(node) else { return false };
            let Some(part) = &server.part else { return false };
            part.view.read(|w| {
                let fleet = w.fleet();
                fleet.regions.live.len() == world.regions().len()
                    && fleet.projects.get(None, &name(PROJECT)).is_some()
                    && fleet.images.get(Some(&name(PROJECT)), &name("web")).is_some()
            })
        })
    };
    let began = Instant::now();
    while !knows() {
        if began.elapsed() > BEGINS_WITHIN {
            world.trace.violation("a fleet begins", format_args!("not within {BEGINS_WITHIN:?}"));
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// A reader's session at one server, begun anew with every life of it: its global reads are answered there, whatever is
/// broken elsewhere, and each is as new as the one before.
async fn reads(world: Arc<World>, node: u64) {
    let mut session = (u64::MAX, 0);
    loop {
        sleep(Duration::from_millis(250)).await;
        let Some(server) = world.server(node) else { continue };
        let (Some(door), Some(part)) = (&server.global, &server.part) else { continue };
        if session.0 != server.life.number {
            session = (server.life.number, 0);
        }
        let read = timeout(Duration::from_secs(1), door.store.range(RangeRequest::prefix("o/projects/").stale())).await;
        if !server.life.is_on() {
            continue;
        }
        match read {
            Ok(Ok(found)) => {
                world.trace.count("global reads answered locally");
                if found.revision.0 < session.1 {
                    let text = format!("server {node} answers at {} after {}", found.revision, session.1);
                    world.trace.violation(LOCAL_READS, text);
                }
                session.1 = found.revision.0;
                let shown = *part.view.global_revision().borrow();
                if shown > found.revision.0 {
                    let text = format!("server {node} shows revision {shown} and reads at {}", found.revision);
                    world.trace.violation(LOCAL_READS, text);
                }
            }
            other => {
                let why = other.map_or_else(|_| "no answer".to_owned(), |e| format!("{e:?}"));
                world.trace.violation(LOCAL_READS, format_args!("server {node}: {why}"));
            }
        }
    }
}

/// Cuts off or takes away a region, or cuts two apart, and watches who goes on.
async fn torment(world: &Arc<World>, dice: &Dice, known: &Known) {
    let leader = world.leader().map(|node| world.site(node).clone());
    let core: Vec<Site> = world.regions().into_iter().filter(|site| site.voter().is_some()).cloned().collect();
    let any = (*dice.pick(&world.regions()).expect("a fleet has regions")).clone();
    let shape = world.seed / 6 % 4;
    let struck = if shape == 2 { leader.unwrap_or(any) } else { any };
    let fault = |what: &str| world.trace.fault(&format!("fleet shape: {what}"), format_args!("{}", struck.name));
    let mut able: Vec<u64> = world.present().into_iter().filter(|node| !struck.nodes.contains(node)).collect();
    let mut alone = None;
    match shape {
        0 | 2 => {
            fault(if shape == 0 { "region cut off" } else { "leader's region cut off" });
            around(world, &struck, true, true).into_iter().for_each(|(from, to)| world.net.cut(from, to));
            alone = Some(struck);
        }
        1 => {
            fault("region lost");
            for node in &struck.nodes {
                world.hold_down(*node, true);
                world.power_off(*node);
            }
        }
        _ => {
            fault("two regions cut apart");
            // A majority is still in reach of everyone, by the third.
            let others: Vec<&Site> = core.iter().filter(|site| site.name != struck.name).collect();
            let other = dice.pick(&others).expect("there are three core regions");
            between(&struck, other).into_iter().for_each(|(from, to)| world.net.cut(from, to));
            able = world.present();
        }
    }
    let mut watched = JoinSet::new();
    for node in able {
        watched.spawn(goes_on(world.clone(), node, Group::Global, GLOBAL_WRITES));
    }
    if let Some(site) = alone {
        known.get().own.insert((site.name.clone(), name("probe")), 0);
        for node in &site.nodes {
            watched.spawn(goes_on(world.clone(), *node, Group::Own, OWN_WRITES));
        }
    }
    while watched.join_next().await.is_some() {}
    world.net.heal_all();
}

/// A change that harms nobody: of a global image, or of a region's app that runs nothing.
fn probe(node: u64, group: Group, n: u64) -> nexus_control::intent::Intent {
    let project = name(PROJECT);
    let (plural, object, any) = match group {
        Group::Global => {
            let (digest, object) = (Digest::of(n.to_string().as_bytes()), name(&format!("probe-{node}")));
            let spec =
                ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 3 }], source: None };
            let any = Object::<Image>::new(Metadata::new(object.clone(), Some(project.clone())), spec).to_any();
            (Image::PLURAL, object, any)
        }
        Group::Own => {
            let (object, image) = (name("probe"), name("web"));
            let spec = AppSpec { image, replicas: 0, ..App::example() };
            let mut metadata = Metadata::new(object.clone(), Some(project.clone()));
            metadata.annotations.insert("n".into(), format!("{node}-{n}"));
            (App::PLURAL, object, Object::<App>::new(metadata, spec).to_any())
        }
    };
    let key = format!("probe-{node}-{group:?}-{n}");
    intent(plural, Some(project), object, Change::Put { object: any }, key)
}

/// One write at a server. The store's members pass messages on for each other, writers don't pass on intents: so a server
/// that has no direct link to the one that leads writes to the store alone here. Its users' intents wait, or are sent to
/// another server.
async fn write(world: &World, server: &Server, group: Group, n: u64) -> Result<(), String> {
    let node = server.life.node;
    let leader = world.leader_of(group, &world.nodes);
    let is_apart = leader.is_some_and(|l| world.net.is_cut(node, l) || world.net.is_cut(l, node));
    if is_apart && group == Group::Global {
        let door = server.global.as_ref().ok_or("it is no member")?;
        let put = door.txn(Txn::put(format!("shape/{node}"), n.to_string())).await;
        return put.map(drop).map_err(|e| e.to_string());
    }
    let writer = server.part.as_ref().and_then(|part| part.writer(group)).ok_or("it has no writer")?;
    writer.submit(probe(node, group, n)).await.map(drop).map_err(|e| e.detail)
}

async fn goes_on(world: Arc<World>, node: u64, group: Group, property: &str) {
    let began = Instant::now();
    let (mut last, mut first) = (began, None);
    let mut why = "no answer".to_owned();
    for n in 0.. {
        let limit = if first.is_some() { NO_PAUSE_OVER } else { RESUMES_WITHIN };
        if last.elapsed() > limit {
            let state = if first.is_some() { "paused" } else { "did not resume" };
            let text = format!("at server {node} {group:?} writes {state} for {:?}: {why}", last.elapsed());
            world.trace.violation(property, text);
            return;
        }
        if began.elapsed() > HELD {
            break;
        }
        if let Some(server) = world.server(node) {
            match timeout(Duration::from_secs(4), write(&world, &server, group, n)).await {
                Ok(Ok(())) => {
                    first.get_or_insert(began.elapsed());
                    last = Instant::now();
                }
                Ok(Err(error)) => why = error,
                Err(_) => "no answer in 4 s".clone_into(&mut why),
            }
        }
        sleep(Duration::from_millis(250)).await;
    }
    world.trace.count(&format!("fleet: servers that go on, {group:?}"));
    world.trace.note(format_args!("server {node}: {group:?} writes again after {:?}", first.unwrap_or_default()));
}
