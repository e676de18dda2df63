//! The machines, which servers run on them now, and the supervisor that starts again what ended.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_env::MemDisk;
use nexus_model::Name;
use nexus_store::StoreError;
use tokio::time::{Instant, sleep};

use crate::chance::Dice;
use crate::clock::{self, Rate, SimClock, WORST_PPM};
use crate::fence::Fence;
use crate::gateways::Demand;
use crate::hosts::Ends;
use crate::life::{Life, Stage};
use crate::mutant::Mutant;
use crate::net::Net;
use crate::region::Part;
use crate::server::Server;
use crate::site::{Group, Site};
use crate::trace::Trace;

/// How often the supervisor looks.
const LOOK: Duration = Duration::from_millis(25);
/// A disk as large as nobody fills.
const ROOMY: u64 = 1 << 40;

/// What stays when a server's process ends.
pub struct Machine {
    pub disk: MemDisk,
    pub clock: Arc<SimClock>,
    pub slow_ms: Arc<AtomicU64>,
    /// The feature level of the release that starts here next.
    pub release: AtomicU32,
    /// The highest that ever ran here.
    pub newest_release: AtomicU32,
    lives: AtomicU64,
    state: Mutex<MachineState>,
}

#[derive(Default)]
struct MachineState {
    server: Option<Arc<Server>>,
    life: Option<Arc<Life>>,
    /// Not started again before.
    not_before: Option<Instant>,
    /// Stays down until somebody says otherwise.
    held_down: bool,
    /// Is no member yet, or no more: nothing runs here and nothing is expected.
    absent: bool,
}

impl Machine {
    fn state(&self) -> MutexGuard<'_, MachineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves so many bytes free; `None` makes room.
    pub fn limit(&self, free: Option<u64>) {
        self.disk.set_capacity(Some(ROOMY));
        let left = nexus_env::Disk::free_space(&self.disk, std::path::Path::new("/")).unwrap_or(ROOMY);
        self.disk.set_capacity(Some(free.map_or(ROOMY, |free| ROOMY - left + free)));
    }
}

pub struct World {
    pub seed: u64,
    pub stage: Arc<Stage>,
    pub trace: Trace,
    pub net: Arc<Net>,
    pub nodes: Vec<u64>,
    pub sites: Vec<Site>,
    /// Those who found their region's group; others join later.
    pub founders: Vec<u64>,
    pub machines: BTreeMap<u64, Machine>,
    pub snapshot_after: u64,
    /// Servers run a region's control loop.
    pub with_region: bool,
    /// What runs where, and what must not any more.
    pub fence: Fence,
    /// How jobs' instances truly ended.
    pub ends: Ends,
    /// What users ask of apps.
    pub demand: Demand,
    /// Millionths that any clock may be too fast or too slow.
    pub drift_ppm: u64,
    /// Regions that are no part of the fleet: not yet, or no more.
    apart: Mutex<BTreeSet<Name>>,
    dice: Dice,
}

/// How a world is made.
pub struct Plan {
    pub seed: u64,
    pub sites: Vec<Site>,
    /// Machines that may join later.
    pub spares: u64,
    pub with_region: bool,
    pub snapshot_after: u64,
    /// Milliseconds that servers' clocks may be off.
    pub skew_ms: u64,
    pub mutant: Option<Mutant>,
}

impl World {
    pub fn new(plan: &Plan, trace: Trace) -> Arc<Self> {
        let dice = Dice::new(plan.seed, "world");
        let mut founders: Vec<u64> = plan.sites.iter().flat_map(|site| site.nodes.clone()).collect();
        founders.sort_unstable();
        let servers = founders.len() as u64;
        let late: Vec<&Site> = plan.sites.iter().filter(|site| site.joins_later).collect();
        let comes_later = |node: u64| node > servers || late.iter().any(|site| site.nodes.contains(&node));
        let apart = late.iter().map(|site| site.name.clone()).collect();
        let drift = Dice::new(plan.seed, "drift");
        let drift_ppm = clock::drift_ppm(plan.seed);
        let nodes: Vec<u64> = (1..=servers + plan.spares).collect();
        let machines = nodes.iter().map(|node| {
            let disk = MemDisk::new(dice.u64());
            disk.simulate();
            disk.set_capacity(Some(ROOMY));
            let off =
                i64::try_from(dice.below(2 * plan.skew_ms + 1)).unwrap_or(0) - i64::try_from(plan.skew_ms).unwrap_or(0);
            let machine = Machine {
                disk,
                clock: Arc::new(SimClock::new(off, Rate::draw(&drift, drift_ppm))),
                slow_ms: Arc::default(),
                release: AtomicU32::new(1),
                newest_release: AtomicU32::new(1),
                lives: AtomicU64::new(0),
                state: Mutex::new(MachineState { absent: comes_later(*node), ..MachineState::default() }),
            };
            (*node, machine)
        });
        let machines = machines.collect();
        if plan.skew_ms > 0 {
            trace.fault("clock skew", format_args!("up to {} ms", plan.skew_ms));
        }
        let far = drift_ppm == WORST_PPM;
        trace.fault(if far { "clocks run far apart" } else { "clocks run apart" }, format_args!("{drift_ppm} ppm"));
        Arc::new(Self {
            seed: plan.seed,
            stage: Arc::new(Stage::new(trace.clone(), plan.mutant)),
            net: Net::new(trace.clone(), Dice::new(plan.seed, "net")),
            fence: Fence::new(trace.clone()),
            ends: Ends::default(),
            demand: Demand::default(),
            trace,
            nodes,
            sites: plan.sites.clone(),
            founders,
            machines,
            snapshot_after: plan.snapshot_after,
            with_region: plan.with_region,
            drift_ppm,
            apart: Mutex::new(apart),
            dice,
        })
    }

    /// The server of a node, if its process runs.
    pub fn server(&self, node: u64) -> Option<Arc<Server>> {
        self.machines.get(&node)?.state().server.clone().filter(|s| s.life.is_on())
    }

    pub fn servers(&self) -> Vec<Arc<Server>> {
        self.nodes.iter().filter_map(|node| self.server(*node)).collect()
    }

    /// Whether there is a group that all regions share.
    pub fn is_fleet(&self) -> bool {
        self.sites.len() > 1
    }

    /// The region that a server is of.
    pub fn site(&self, node: u64) -> &Site {
        self.sites.iter().find(|site| site.nodes.contains(&node)).unwrap_or(&self.sites[0])
    }

    /// Those who vote in the group that all regions share, from the beginning.
    pub fn voters(&self) -> Vec<u64> {
        self.sites.iter().filter(|site| !site.joins_later).filter_map(Site::voter).collect()
    }

    fn apart(&self) -> MutexGuard<'_, BTreeSet<Name>> {
        self.apart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A region becomes part of the fleet, or is none any more.
    pub fn set_apart(&self, region: &Name, is_apart: bool) {
        if is_apart {
            self.apart().insert(region.clone());
        } else {
            self.apart().remove(region);
        }
    }

    /// The regions that are part of the fleet now.
    pub fn regions(&self) -> Vec<&Site> {
        let apart = self.apart();
        self.sites.iter().filter(|site| !apart.contains(&site.name)).collect()
    }

    /// The server that thinks it leads, if one does: the global group in a fleet, else the only group.
    pub fn leader(&self) -> Option<u64> {
        let group = if self.is_fleet() { Group::Global } else { Group::Own };
        self.leader_of(group, &self.nodes)
    }

    /// Of some servers, the one that thinks it leads a group.
    pub fn leader_of(&self, group: Group, nodes: &[u64]) -> Option<u64> {
        use nexus_store::Store as _;
        let leads = |s: &Arc<Server>| s.door(group).is_some_and(|door| door.store.leadership().borrow().is_self);
        nodes.iter().filter_map(|node| self.server(*node)).find(leads).map(|s| s.life.node)
    }

    fn life(&self, node: u64) -> Option<Arc<Life>> {
        self.machines.get(&node)?.state().life.clone()
    }

    /// Cuts a server's power, now.
    pub fn power_off(&self, node: u64) {
        if let Some(life) = self.life(node) {
            life.power_off();
        }
    }

    /// Ends a server's process; its machine stays up.
    pub fn kill(&self, node: u64) {
        if let Some(life) = self.life(node) {
            life.kill();
        }
    }

    /// Lets a server stay down, or come back.
    pub fn hold_down(&self, node: u64, down: bool) {
        if let Some(machine) = self.machines.get(&node) {
            machine.state().held_down = down;
        }
    }

    /// A machine joins the world, or leaves it for good.
    pub fn set_absent(&self, node: u64, absent: bool) {
        if let Some(machine) = self.machines.get(&node) {
            machine.state().absent = absent;
        }
        if absent {
            self.power_off(node);
        }
    }

    /// The nodes that should run.
    pub fn present(&self) -> Vec<u64> {
        self.nodes.iter().copied().filter(|n| !self.machines[n].state().absent).collect()
    }

    /// Everyone may come back at once.
    pub fn hurry(&self) {
        for machine in self.machines.values() {
            let mut state = machine.state();
            state.held_down = false;
            state.not_before = None;
        }
    }

    /// Keeps one machine's server running: starts it, and starts it again when it ended or stopped by itself.
    pub async fn supervise(self: Arc<Self>, node: u64) {
        let Some(machine) = self.machines.get(&node) else { return };
        let mut looks = 0u64;
        loop {
            looks += 1;
            let (server, life) = {
                let state = machine.state();
                (state.server.clone(), state.life.clone())
            };
            match (server, life) {
                (Some(server), _) if !server.life.is_on() => {
                    self.trace.note(format_args!("server {node} is over"));
                    self.take_recount(&server);
                    machine.state().server = None;
                    server.clear().await;
                    machine.state().life = None;
                    self.rest(machine);
                }
                (Some(server), _) if looks.is_multiple_of(20) => {
                    if let Some(reason) = server.failure().await {
                        self.trace.count("store stopped by itself");
                        self.trace.note(format_args!("server {node} stopped: {reason}"));
                        server.life.kill();
                    }
                }
                (Some(_), _) => {}
                (None, Some(_)) => machine.state().life = None,
                (None, None) => {
                    let wait = {
                        let state = machine.state();
                        state.absent || state.held_down || state.not_before.is_some_and(|t| Instant::now() < t)
                    };
                    if !wait {
                        self.boot(node, machine).await;
                    }
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Takes in what a writer's own recount found while it led.
    pub fn take_recount(&self, server: &Server) {
        let found = server.part.as_ref().map_or(0, Part::violations);
        if found > 0 {
            let text = format!("the writer of server {} found {found} differences", server.life.node);
            self.trace.violation("what is counted equals the recount", text);
        }
    }

    fn rest(&self, machine: &Machine) {
        let pause = if self.dice.chance(200) { self.dice.millis(1_500, 5_000) } else { self.dice.millis(0, 900) };
        machine.state().not_before = Some(Instant::now() + pause);
    }

    async fn boot(self: &Arc<Self>, node: u64, machine: &Machine) {
        let number = machine.lives.fetch_add(1, Ordering::SeqCst);
        let life = Arc::new(Life::new(node, number, self.stage.clone(), machine.disk.clone()));
        machine.state().life = Some(life.clone());
        self.trace.note(format_args!("server {node} starts (life {number})"));
        match Server::start(self, machine, life.clone()).await {
            Ok(server) => {
                self.trace.count("server starts");
                machine.state().server = Some(server);
            }
            Err(error) => {
                self.trace.note(format_args!("server {node} can't start: {error}"));
                if life.is_on() && matches!(error, StoreError::Corrupt { .. } | StoreError::Invalid(_)) {
                    self.trace
                        .violation("a crash leaves a readable data folder", format_args!("server {node}: {error}"));
                }
                life.kill();
                machine.state().life = None;
                self.rest(machine);
            }
        }
    }
}
