//! Hosts with agents that run nothing: they pull plans from any server, keep them over restarts, start and stop instances
//! that take their time and die now and then, and report what is true. They go by the same rules as the real agent: a plan is
//! taken only if it is newer, an instance's epoch never goes back, what no plan names is stopped.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_control::region::ReportError;
use nexus_model::kind::{Capacity, HostSpec, InstancePhase, NumaNode, Runtime};
use nexus_model::plan::{Desired, HostPlan, HostReport, InstanceReport};
use nexus_model::{Bytes, MilliCpu, Name, Timestamp, Uid};
use nexus_store::PeerError;
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::clock::{BASE_MS, Rate};
use crate::fence::Present;
use crate::mutant::Mutant;
use crate::region::name;
use crate::server::as_servers;
use crate::site::Site;
use crate::world::World;

/// Hosts' places in the network come after the servers'.
const FIRST: u64 = 1_001;
const STEP: Duration = Duration::from_millis(60);
const REPORT_EVERY: Duration = Duration::from_secs(1);
const PULL_EVERY: Duration = Duration::from_millis(250);
/// Hosts' clocks are off by up to so much.
const SKEW_MS: u64 = 60_000;

/// The variable that says whether an instance ever gets ready: not if it is `ill`.
pub const ILL: &str = "DOES";
/// The variable that says how many of a thousand of a job's instances fail.
pub const FAILS: &str = "FAILS";

/// How jobs' instances truly ended, as only their hosts saw it. Clones share one.
#[derive(Clone, Default)]
pub struct Ends(Arc<Mutex<BTreeMap<Uid, i32>>>);

impl Ends {
    pub fn all(&self) -> BTreeMap<Uid, i32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, uid: Uid, code: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, code);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Running,
    Stopping,
}

#[derive(Debug, Clone)]
struct Run {
    epoch: u64,
    address: IpAddr,
    phase: Phase,
    /// When the present phase ends, if it does by itself.
    until: Duration,
    restarts: u32,
    /// By the host's own clock, which may be off.
    started: Option<Timestamp>,
    /// It never gets ready.
    ill: bool,
    /// A job's: how long it runs, and its exit code.
    once: Option<(Duration, i32)>,
}

/// How a job's instance ended, until it is not to be told any more.
#[derive(Debug, Clone, Copy)]
struct End {
    epoch: u64,
    code: i32,
    started: Option<Timestamp>,
}

#[derive(Default)]
struct State {
    /// What a restart of the agent, and even of the machine, leaves.
    plan: Option<Arc<HostPlan>>,
    /// The newest of tenants' networks that it has taken in; none in a world whose hosts can't have any.
    networks: Option<u64>,
    boots: u64,
    /// Noted before anything else is done about an end, so that a restart tells it too.
    ends: BTreeMap<Uid, End>,
    runs: BTreeMap<Uid, Run>,
    up: bool,
    /// The agent alone is down.
    agent_down: bool,
    changed: bool,
}

pub struct Host {
    pub world: Arc<World>,
    pub place: u64,
    pub name: Name,
    /// The servers of its region.
    pub servers: Vec<u64>,
    spec: HostSpec,
    dice: Dice,
    /// Milliseconds that the host's clock is off.
    skew_ms: i64,
    rate: Rate,
    state: Mutex<State>,
}

/// The hosts of a region.
pub fn hosts(world: &Arc<World>, site: &Site) -> Vec<Arc<Host>> {
    let mut all = Vec::new();
    let number = world.sites.iter().position(|s| s.name == site.name).unwrap_or(0);
    // In half of the worlds every instance that names no NICs has one in its project's default network.
    let networks = Dice::new(world.seed, "tenants' networks").chance(500).then_some(0);
    if networks.is_some() {
        world.trace.count("regions whose hosts have tenants' networks");
    }
    for (z, zone) in site.zones.iter().enumerate() {
        for n in 1..=site.hosts_per_zone {
            let index = z * 16 + n;
            let host = name(&format!("zone-{zone}-{n}"));
            let spec = HostSpec {
                zone: name(&format!("zone-{zone}")),
                cell: name(&format!("cell-{zone}")),
                address: format!("[fd00::{number}:{index}]:7440").parse().expect("a well-formed address"),
                prefix6: format!("fd00:0:{number}:{index}::").parse().expect("a well-formed address"),
                prefix4: [10, 97 + number as u8, index as u8, 0].into(),
                runtimes: vec![Runtime::Container],
                // Few enough that hosts fill up.
                capacity: Capacity {
                    cpu: MilliCpu(1_000),
                    memory: Bytes(2 << 30),
                    scratch: Bytes(10 << 30),
                    instances: 12,
                },
                numa_nodes: [0, 1]
                    .map(|id| NumaNode { id, cpus: id.to_string(), cpu: MilliCpu(500), memory: Bytes(1 << 30) })
                    .into(),
                ..HostSpec::default()
            };
            let place = FIRST + (number * 100 + index) as u64;
            let dice = Dice::new(world.seed, &format!("host {} {host}", site.name));
            let state = Mutex::new(State { up: true, networks, ..State::default() });
            let servers = site.nodes.clone();
            let skew_ms = i64::try_from(dice.below(2 * SKEW_MS)).unwrap_or(0) - SKEW_MS as i64;
            let rate = Rate::draw(&dice, world.drift_ppm);
            all.push(Arc::new(Host {
                world: world.clone(),
                place,
                name: host,
                servers,
                spec,
                dice,
                skew_ms,
                rate,
                state,
            }));
        }
    }
    all
}

impl Host {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By its own clock.
    fn now(&self) -> Duration {
        self.rate.counts(self.world.trace.now())
    }

    /// The machine loses power: what ran is gone, the plan on its disk is not.
    pub fn power_off(&self) {
        let mut state = self.state();
        state.up = false;
        for (uid, run) in std::mem::take(&mut state.runs) {
            self.world.fence.ends(uid, run.address);
        }
        state.boots += 1;
    }

    pub fn power_on(&self) {
        self.state().up = true;
    }

    /// Only the agent is down, or up again; what runs goes on.
    pub fn set_agent_down(&self, down: bool) {
        self.state().agent_down = down;
    }

    /// An instance dies by itself.
    pub fn crash_one(&self) -> bool {
        let now = self.now();
        let pause = self.dice.millis(50, 1_500);
        let mut state = self.state();
        state.changed = true;
        let run = state.runs.values_mut().find(|r| r.phase == Phase::Running);
        match run {
            Some(Run { once: Some((_, code)), until, .. }) => {
                (*code, *until) = (137, now);
                true
            }
            Some(run) => {
                *run = Run { phase: Phase::Starting, until: now + pause, restarts: run.restarts + 1, ..*run };
                true
            }
            None => false,
        }
    }

    /// What runs here, with its epoch.
    pub fn running(&self) -> BTreeMap<Uid, u64> {
        let state = self.state();
        state.runs.iter().filter(|(_, r)| r.phase == Phase::Running).map(|(uid, r)| (*uid, r.epoch)).collect()
    }

    /// Everything that exists here in any form.
    pub fn present(&self) -> usize {
        self.state().runs.len()
    }

    pub async fn run(self: Arc<Self>) {
        let mut pulled = Duration::ZERO;
        let mut reported = Duration::ZERO;
        let mut server = self.dice.below(self.servers.len() as u64) as usize;
        let mut leader = None;
        loop {
            sleep(self.rate.lasts(STEP)).await;
            let active = {
                let state = self.state();
                state.up && !state.agent_down
            };
            self.advance();
            if !active {
                continue;
            }
            if self.now() >= pulled + PULL_EVERY {
                pulled = self.now();
                if !self.pull(self.servers[server]).await {
                    server = (server + 1) % self.servers.len();
                }
                self.follow();
            }
            let changed = std::mem::take(&mut self.state().changed);
            if changed || self.now() >= reported + REPORT_EVERY {
                reported = self.now();
                self.report(&mut leader).await;
            }
        }
    }

    /// Time passes for what runs, with or without an agent.
    fn advance(&self) {
        let now = self.now();
        let mut state = self.state();
        let mut changed = false;
        let done: Vec<Uid> =
            state.runs.iter().filter(|(_, r)| r.phase == Phase::Stopping && now >= r.until).map(|(u, _)| *u).collect();
        for uid in done {
            if let Some(run) = state.runs.remove(&uid) {
                self.world.fence.ends(uid, run.address);
            }
            changed = true;
        }
        for run in state.runs.values_mut() {
            if run.phase == Phase::Starting && now >= run.until {
                run.phase = Phase::Running;
                if let Some((lasts, _)) = run.once {
                    run.until = now + lasts;
                }
                let off = now.as_millis() as i64 + self.skew_ms;
                run.started = Some(Timestamp::from_millis(BASE_MS + off));
                changed = true;
            }
        }
        let over = |run: &Run| run.once.filter(|_| run.phase == Phase::Running && now >= run.until);
        let over: Vec<_> = state.runs.iter().filter_map(|(uid, run)| Some((*uid, run.clone(), over(run)?.1))).collect();
        for (uid, run, code) in over {
            self.world.ends.add(uid, code);
            state.ends.insert(uid, End { epoch: run.epoch, code, started: run.started });
            state.runs.remove(&uid);
            self.world.fence.ends(uid, run.address);
            changed = true;
        }
        state.changed |= changed;
    }

    /// Asks a server for the plan.
    async fn pull(&self, node: u64) -> bool {
        let (world, host) = (Arc::downgrade(&self.world), self.name.clone());
        let handle = move || {
            let server = world.upgrade()?.server(node)?;
            let view = server.part.as_ref()?.view.clone();
            let host = host.clone();
            as_servers(&server, async move {
                let networks = view.networks(&host).borrow().clone();
                (view.plan(&host).borrow().clone(), networks)
            })
        };
        let answer = self.world.net.exchange(self.place, node, "plan", true, handle);
        let Ok(Ok((plan, networks))) = timeout(Duration::from_secs(3), answer).await else { return false };
        let mut state = self.state();
        if !state.up || state.agent_down {
            return true;
        }
        if state.networks.is_some_and(|applied| networks.revision > applied) {
            state.networks = Some(networks.revision);
            state.changed = true;
        }
        let held = state.plan.clone();
        if held.as_ref().is_some_and(|held| plan.revision <= held.revision) || plan.revision == 0 {
            return true;
        }
        let mut plan = (*plan).clone();
        for instance in &mut plan.instances {
            let before = held.iter().flat_map(|h| &h.instances).find(|old| old.uid == instance.uid);
            if let Some(old) = before.filter(|old| old.epoch > instance.epoch) {
                let text = format!("{}: {} from {} to {}", self.name, instance.uid, old.epoch, instance.epoch);
                self.world.trace.violation("an instance's epoch never goes back", text);
                *instance = old.clone();
            }
        }
        state.plan = Some(Arc::new(plan));
        true
    }

    /// Starts and stops what the plan says.
    fn follow(&self) {
        let now = self.now();
        let mut state = self.state();
        let Some(plan) = state.plan.clone() else { return };
        for wanted in plan.instances.iter().filter(|i| i.desired == Desired::Running) {
            if state.ends.contains_key(&wanted.uid) {
                continue;
            }
            let known = state.runs.get(&wanted.uid).map(|r| (r.phase, r.epoch));
            match known {
                None => {
                    let until = now + self.dice.millis(50, 900);
                    let address = IpAddr::V6(wanted.address6);
                    let fails = wanted.template.env.get(FAILS).and_then(|n| n.parse().ok()).unwrap_or(0);
                    let run = Run {
                        epoch: wanted.epoch,
                        address,
                        phase: Phase::Starting,
                        until,
                        restarts: 0,
                        started: None,
                        ill: wanted.template.env.get(ILL).is_some_and(|does| does == "ill"),
                        once: wanted.once.then(|| {
                            let lasts = self.dice.millis(100, 6_000);
                            (lasts, i32::from(self.dice.chance(fails)))
                        }),
                    };
                    state.runs.insert(wanted.uid, run);
                    let present = Present { uid: wanted.uid, project: wanted.project.clone(), host: self.name.clone() };
                    self.world.fence.begins(self.place, address, present);
                    state.changed = true;
                }
                Some((Phase::Starting | Phase::Running, epoch)) if epoch < wanted.epoch => {
                    let until = now + self.dice.millis(50, 400);
                    if let Some(run) = state.runs.get_mut(&wanted.uid) {
                        (run.phase, run.until) = (Phase::Stopping, until);
                    }
                    state.changed = true;
                }
                Some(_) => {}
            }
        }
        let wanted = |uid: &Uid| plan.instances.iter().any(|i| i.uid == *uid && i.desired == Desired::Running);
        state.ends.retain(|uid, _| wanted(uid));
        let over: Vec<Uid> =
            state.runs.iter().filter(|(uid, r)| r.phase != Phase::Stopping && !wanted(uid)).map(|(u, _)| *u).collect();
        for uid in over {
            let until = now + self.dice.millis(50, 1_200);
            if let Some(run) = state.runs.get_mut(&uid) {
                (run.phase, run.until) = (Phase::Stopping, until);
            }
            state.changed = true;
        }
    }

    fn what_is_true(&self) -> HostReport {
        let state = self.state();
        let hasty = self.world.stage.mutant == Some(Mutant::HastyHost);
        let told = state.runs.iter().filter(|(_, run)| !(hasty && run.phase == Phase::Stopping));
        let instances = told.map(|(uid, run)| {
            let running = run.phase == Phase::Running;
            InstanceReport {
                uid: *uid,
                epoch: run.epoch,
                phase: match run.phase {
                    Phase::Starting if run.restarts > 0 => InstancePhase::BackOff,
                    Phase::Starting => InstancePhase::Starting,
                    Phase::Running => InstancePhase::Running,
                    Phase::Stopping => InstancePhase::Stopping,
                },
                ready: running && !run.ill,
                endpoint: (running && !run.ill).then_some((run.address, 80).into()),
                restarts: run.restarts,
                started: run.started,
                exit_code: None,
                message: String::new(),
                parts: Vec::new(),
            }
        });
        let ended = state.ends.iter().map(|(uid, end)| InstanceReport {
            uid: *uid,
            epoch: end.epoch,
            phase: InstancePhase::Exited,
            ready: false,
            endpoint: None,
            restarts: 0,
            started: end.started,
            exit_code: Some(end.code),
            parts: Vec::new(),
            message: format!("it exited with {}", end.code),
        });
        let instances = instances.chain(ended);
        HostReport {
            host: self.name.clone(),
            spec: self.spec.clone(),
            boot_id: format!("boot-{}", state.boots),
            agent_version: "sim".into(),
            applied: state.plan.as_ref().map(|p| p.revision),
            instances: instances.collect(),
            images: Vec::new(),
            load: 0.1,
            networks: state.networks,
            certificate_ends: None,
            usage: Vec::new(),
            telemetry: Default::default(),
            failing: None,
        }
    }

    /// Tells whoever leads.
    async fn report(&self, leader: &mut Option<u64>) {
        let report = self.what_is_true();
        for _ in 0..3 {
            let node = leader.unwrap_or_else(|| *self.dice.pick(&self.servers).expect("a region has servers"));
            let (world, report) = (Arc::downgrade(&self.world), report.clone());
            let handle = move || {
                let server = world.upgrade()?.server(node)?;
                let region = server.part.as_ref()?.region.clone();
                let report = report.clone();
                as_servers(&server, async move { region.report(report).await })
            };
            let exchange = self.world.net.exchange(self.place, node, "report", true, handle);
            *leader = match timeout(Duration::from_secs(2), exchange).await {
                Ok(Ok(Ok(_))) => {
                    *leader = Some(node);
                    return;
                }
                Ok(Ok(Err(ReportError::NotLeader { leader }))) => leader.filter(|l| *l != node),
                Ok(Err(PeerError::Unreachable(_) | PeerError::Lost(_)) | Ok(Err(_))) | Err(_) => None,
            };
            if leader.is_none() {
                return;
            }
        }
    }
}
