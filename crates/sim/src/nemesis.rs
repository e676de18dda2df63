//! Faults, drawn by lot: power cuts at any time and at chosen steps, dead processes, cut links in every shape, weather, disks
//! that are full, slow or failing, and clocks that jump. Each lasts its while; faults overlap as they like.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_env::{DiskOp, Fault};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::chance::Dice;
use crate::coverage::{FLEET_MESSAGES, REGION_MESSAGES, STORE_MESSAGES};
use crate::gateways::Gateway;
use crate::hosts::Host;
use crate::life::Step;
use crate::net::Weather;
use crate::run::WORLDS;
use crate::site::{Group, Site};
use crate::world::World;

pub struct Nemesis {
    pub world: Arc<World>,
    pub dice: Dice,
    /// Milliseconds between two faults.
    pub pace: (u64, u64),
    /// Hosts and gateways that may be struck too.
    pub hosts: Vec<Arc<Host>>,
    pub gateways: Vec<Arc<Gateway>>,
}

impl Nemesis {
    /// One that strikes servers alone.
    pub fn of_servers(world: &Arc<World>, pace: (u64, u64)) -> Self {
        let dice = Dice::new(world.seed, "nemesis");
        Self { world: world.clone(), dice, pace, hosts: Vec::new(), gateways: Vec::new() }
    }

    /// Torments the world until a moment, then makes all good again.
    pub async fn run(&self, end: Instant) {
        let mut later: JoinSet<()> = JoinSet::new();
        // Some messages are rare, so each world begins with its own kind being lost.
        let (turn, kinds) = (self.world.seed / WORLDS, self.kinds());
        let kind = kinds[(turn % kinds.len() as u64) as usize];
        self.world.net.doom(kind, turn / kinds.len() as u64 % 2 == 1, 4);
        if !self.world.with_region && turn % 2 == 0 {
            self.world.stage.arm(Step::SnapshotInstall, 0);
            self.long_outage(self.node(), &mut later);
        }
        if self.world.is_fleet() {
            let step = Step::FLEET[(turn % Step::FLEET.len() as u64) as usize];
            self.world.stage.arm(step, 0);
            let kinds = FLEET_MESSAGES.len() as u64;
            self.world.net.doom(FLEET_MESSAGES[(turn % kinds) as usize], turn / kinds % 2 == 1, 4);
            self.unseat(&mut later);
        }
        while Instant::now() < end {
            while later.try_join_next().is_some() {}
            if self.world.is_fleet() && self.dice.chance(300) {
                self.strike_region(&mut later);
            } else if self.hosts.is_empty() || self.dice.chance(700) {
                self.strike(&mut later);
            } else if self.dice.chance(800) {
                self.strike_host(&mut later);
            } else {
                self.strike_gateway(&mut later);
            }
            let pause = Instant::now() + self.dice.millis(self.pace.0, self.pace.1);
            sleep_until(pause.min(end)).await;
        }
        later.shutdown().await;
        self.make_good();
    }

    /// Ends every fault.
    pub fn make_good(&self) {
        self.world.trace.note("all faults end");
        self.world.stage.disarm();
        self.world.net.heal_all();
        self.world.net.spare_all();
        self.world.net.set_weather(Weather::FAIR);
        for machine in self.world.machines.values() {
            machine.slow_ms.store(0, Ordering::Relaxed);
            machine.disk.clear_faults();
            machine.limit(None);
        }
        for host in &self.hosts {
            host.power_on();
            host.set_agent_down(false);
        }
        self.gateways.iter().for_each(|gateway| gateway.set_down(false));
        self.world.hurry();
    }

    fn node(&self) -> u64 {
        *self.dice.pick(&self.world.present()).expect("a world has servers")
    }

    /// The messages that this world is about.
    fn kinds(&self) -> &'static [&'static str] {
        if self.world.is_fleet() && self.dice.chance(500) {
            FLEET_MESSAGES
        } else if self.world.with_region && self.dice.chance(700) {
            REGION_MESSAGES
        } else {
            STORE_MESSAGES
        }
    }

    fn others(&self, node: u64) -> Vec<u64> {
        self.world.present().into_iter().filter(|n| *n != node).collect()
    }

    fn strike(&self, later: &mut JoinSet<()>) {
        let world = &self.world;
        let trace = &world.trace;
        let node = self.node();
        match self.dice.below(20) {
            0 => {
                trace.fault("crash at any time", format_args!("server {node}"));
                world.power_off(node);
            }
            1..=3 => {
                let steps = if world.is_fleet() && self.dice.chance(600) {
                    Step::FLEET
                } else if world.with_region && self.dice.chance(500) {
                    Step::REGION
                } else {
                    Step::STORE
                };
                let step = self.dice.pick(steps).expect("there are steps");
                let is_rare = matches!(step, Step::SnapshotInstall | Step::SnapshotSave | Step::Claim | Step::Claimed)
                    || matches!(step, Step::GlobalClaim | Step::GlobalClaimed);
                world.stage.arm(*step, if is_rare { 0 } else { self.dice.below(4) });
                match step {
                    Step::Election | Step::Claim | Step::Claimed | Step::GlobalClaim | Step::GlobalClaimed => {
                        self.unseat(later);
                    }
                    Step::SnapshotInstall => self.long_outage(node, later),
                    _ => {}
                }
            }
            4 => {
                trace.fault("process killed", format_args!("server {node}"));
                world.kill(node);
            }
            5 => {
                trace.fault("all lose power", "every server");
                world.nodes.iter().for_each(|n| world.power_off(*n));
            }
            6 => {
                let links = self.others(node).into_iter().flat_map(|o| [(node, o), (o, node)]).collect();
                self.cut("one server cut off", links, later);
            }
            7 => {
                let to = *self.dice.pick(&self.others(node)).expect("more than one server");
                self.cut("one-way cut", vec![(node, to)], later);
            }
            8 => {
                let to = *self.dice.pick(&self.others(node)).expect("more than one server");
                self.cut("partial partition", vec![(node, to), (to, node)], later);
            }
            9 => {
                let side: BTreeSet<u64> = world.nodes.iter().copied().filter(|_| self.dice.chance(500)).collect();
                let across = |a: &u64, b: &u64| side.contains(a) != side.contains(b);
                let all = &world.nodes;
                let links: Vec<_> =
                    all.iter().flat_map(|a| all.iter().filter(move |b| across(a, b)).map(move |b| (*a, *b))).collect();
                if !links.is_empty() {
                    self.cut("partition in two", links, later);
                }
            }
            10 => self.unseat(later),
            11 => {
                let slow = self.dice.range(20, 400);
                trace.fault("slow disk", format_args!("server {node}: {slow} ms"));
                world.machines[&node].slow_ms.store(slow, Ordering::Relaxed);
                let (world, span) = (world.clone(), self.dice.millis(500, 4_000));
                later.spawn(async move {
                    sleep(span).await;
                    world.machines[&node].slow_ms.store(0, Ordering::Relaxed);
                });
            }
            12 => {
                let left =
                    if self.dice.chance(500) { self.dice.range(0, 3_000) } else { self.dice.range(20_000, 60_000) };
                trace.fault("disk full", format_args!("server {node}: {left} bytes left"));
                world.machines[&node].limit(Some(left));
                let (world, span) = (world.clone(), self.dice.millis(1_000, 5_000));
                later.spawn(async move {
                    sleep(span).await;
                    world.machines[&node].limit(None);
                });
            }
            13 => {
                let op =
                    *self.dice.pick(&[DiskOp::Sync, DiskOp::Append, DiskOp::SyncDir, DiskOp::Rename]).expect("four");
                trace.fault(&format!("disk error: {op:?}"), format_args!("server {node}"));
                let fault = Fault { op, path_part: String::new(), kind: ErrorKind::Other, times: 1 };
                world.machines[&node].disk.inject(fault);
            }
            14 => {
                let by = i64::try_from(self.dice.range(200, 60_000)).unwrap_or(0);
                let back = self.dice.chance(500);
                trace.fault(
                    if back { "clock jumps back" } else { "clock jumps forward" },
                    format_args!("server {node}: {by} ms"),
                );
                world.machines[&node].clock.jump(if back { -by } else { by });
            }
            15 => {
                let weather = if self.dice.chance(400) { Weather::FOUL } else { Weather::ROUGH };
                trace.fault("bad weather", format_args!("{weather:?}"));
                world.net.set_weather(weather);
                let (world, span) = (world.clone(), self.dice.millis(1_000, 6_000));
                later.spawn(async move {
                    sleep(span).await;
                    world.net.set_weather(Weather::FAIR);
                });
            }
            16 | 17 => {
                let kind = self.dice.pick(self.kinds()).expect("there are messages");
                world.net.doom(kind, self.dice.chance(500), self.dice.range(1, 6));
                trace.note(format_args!("doomed: {kind}"));
                if *kind == "Snapshot" {
                    self.long_outage(node, later);
                }
            }
            _ => self.long_outage(node, later),
        }
    }

    /// Long enough that the others forget the log that the server would need.
    fn long_outage(&self, node: u64, later: &mut JoinSet<()>) {
        self.world.trace.fault("long outage", format_args!("server {node}"));
        self.world.hold_down(node, true);
        self.world.power_off(node);
        let (world, span) = (self.world.clone(), self.dice.millis(4_000, 8_000));
        later.spawn(async move {
            sleep(span).await;
            world.hold_down(node, false);
        });
    }

    fn strike_host(&self, later: &mut JoinSet<()>) {
        let trace = &self.world.trace;
        let Some(host) = self.dice.pick(&self.hosts).cloned() else { return };
        match self.dice.below(5) {
            0 => {
                trace.fault("host loses power", &host.name);
                host.power_off();
                let span = self.dice.millis(300, 12_000);
                later.spawn(async move {
                    sleep(span).await;
                    host.power_on();
                });
            }
            1 => {
                trace.fault("agent restarts", &host.name);
                host.set_agent_down(true);
                let span = self.dice.millis(100, 8_000);
                later.spawn(async move {
                    sleep(span).await;
                    host.set_agent_down(false);
                });
            }
            2 => {
                let both = |node: &u64| [(host.place, *node), (*node, host.place)];
                let links = host.servers.iter().flat_map(both).collect();
                self.cut_for("host cut off", links, self.dice.millis(1_000, 12_000), later);
            }
            3 => {
                let links = host.servers.iter().map(|node| (*node, host.place)).collect();
                self.cut_for("host hears nobody", links, self.dice.millis(1_000, 9_000), later);
            }
            _ => {
                if host.crash_one() {
                    trace.fault("instance dies", &host.name);
                }
            }
        }
    }

    fn strike_gateway(&self, later: &mut JoinSet<()>) {
        let Some(gateway) = self.dice.pick(&self.gateways).cloned() else { return };
        if self.dice.chance(300) {
            self.world.trace.fault("gateway restarts", &gateway.name);
            gateway.set_down(true);
            let span = self.dice.millis(200, 5_000);
            later.spawn(async move {
                sleep(span).await;
                gateway.set_down(false);
            });
        } else {
            let both = |node: &u64| [(gateway.place, *node), (*node, gateway.place)];
            let links = gateway.servers.iter().flat_map(both).collect();
            self.cut_for("gateway cut off", links, self.dice.millis(1_000, 12_000), later);
        }
    }

    /// A whole region is struck.
    fn strike_region(&self, later: &mut JoinSet<()>) {
        let regions = self.world.regions();
        let site = *self.dice.pick(&regions).expect("a fleet has regions");
        let span = self.dice.millis(1_000, 7_000);
        match self.dice.below(4) {
            0 => self.cut_for("region cut off", around(&self.world, site, true, true), span, later),
            1 => {
                let out = self.dice.chance(500);
                self.cut_for("region cut off one way", around(&self.world, site, out, !out), span, later);
            }
            2 => {
                let other = self.dice.pick(&regions).filter(|other| other.name != site.name);
                let Some(other) = other else { return };
                self.cut_for("two regions cut apart", between(site, other), span, later);
            }
            _ => {
                self.world.trace.fault("region loses power", &site.name);
                for node in &site.nodes {
                    self.world.hold_down(*node, true);
                    self.world.power_off(*node);
                }
                let (world, nodes) = (self.world.clone(), site.nodes.clone());
                later.spawn(async move {
                    sleep(span).await;
                    nodes.iter().for_each(|node| world.hold_down(*node, false));
                });
            }
        }
    }

    /// Cuts the leader off, one way or both, so that another has to take over.
    fn unseat(&self, later: &mut JoinSet<()>) {
        let world = &self.world;
        let leader = if world.is_fleet() && self.dice.chance(300) {
            let site = *self.dice.pick(&world.regions()).expect("a fleet has regions");
            world.leader_of(Group::Own, &site.nodes)
        } else {
            world.leader()
        };
        let Some(leader) = leader else { return };
        let others = self.others(leader);
        let (name, links): (_, Vec<_>) = match self.dice.below(3) {
            0 => ("leader cut off", others.iter().flat_map(|o| [(leader, *o), (*o, leader)]).collect()),
            1 => ("leader not heard", others.iter().map(|o| (leader, *o)).collect()),
            _ => ("leader hears nobody", others.iter().map(|o| (*o, leader)).collect()),
        };
        self.cut(name, links, later);
    }

    fn cut(&self, name: &str, links: Vec<(u64, u64)>, later: &mut JoinSet<()>) {
        self.cut_for(name, links, self.dice.millis(300, 4_500), later);
    }

    fn cut_for(&self, name: &str, links: Vec<(u64, u64)>, span: Duration, later: &mut JoinSet<()>) {
        self.world.trace.fault(name, format_args!("{links:?}"));
        links.iter().for_each(|(a, b)| self.world.net.cut(*a, *b));
        let world = self.world.clone();
        later.spawn(async move {
            sleep(span).await;
            links.iter().for_each(|(a, b)| world.net.heal(*a, *b));
            world.trace.note(format_args!("links heal: {links:?}"));
        });
    }
}

/// The links between a region and all others, outwards and inwards.
pub fn around(world: &World, site: &Site, out: bool, inward: bool) -> Vec<(u64, u64)> {
    let others = world.nodes.iter().copied().filter(|node| !site.nodes.contains(node));
    let both = |other: u64| site.nodes.iter().flat_map(move |own| [(*own, other, out), (other, *own, inward)]);
    others.flat_map(both).filter(|(_, _, is_cut)| *is_cut).map(|(from, to, _)| (from, to)).collect()
}

/// The links between two regions.
pub fn between(one: &Site, other: &Site) -> Vec<(u64, u64)> {
    one.nodes.iter().flat_map(|a| other.nodes.iter().flat_map(|b| [(*a, *b), (*b, *a)])).collect()
}

/// How long a fault phase lasts in virtual time.
pub const FAULTS_LAST: Duration = Duration::from_secs(16);
