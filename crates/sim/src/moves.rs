//! An operator of a fleet: a region joins it and another leaves, in either order, while everything else goes on.
//!
//! It is done as the product does it. A newcomer's servers ask to be let into the group that all regions share and read along;
//! the region says that it is there, and is registered. If a core region has left, the newcomer gets the vote that is free.
//! Who leaves is not asked any more and stopped; then its servers are taken out of the group, and the region's object is
//! deleted, which is refused as long as the region is heard. A change whose outcome is not known is asked for again.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nexus_control::intent::Change;
use nexus_model::kind::{Kind, Region, Tier};
use nexus_model::{Code, Name};
use nexus_store::StoreError;
use tokio::time::{Instant, sleep, timeout};

use crate::chance::Dice;
use crate::fleet_users::Known;
use crate::mutant::Door;
use crate::server::endpoint;
use crate::site::{Group, Site};
use crate::users::{Way, intent, submit};
use crate::world::World;

/// A newcomer may have much to read before it has caught up.
const PATIENCE: Duration = Duration::from_secs(20);
const DONE_WITHIN: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(200);
const PROPERTY: &str = "regions join and leave a running fleet";

pub struct Moves {
    world: Arc<World>,
    dice: Dice,
    known: Known,
    comes: Site,
    goes: Option<Site>,
}

/// One step with a member of the group that all regions share.
#[derive(Debug, Clone, Copy)]
enum Step {
    LetIn(u64),
    Promote(u64),
    Remove(u64),
}

impl Moves {
    /// None for a fleet that stays as it is.
    pub fn of(world: &Arc<World>, dice: Dice, known: &Known) -> Option<Self> {
        let comes = world.sites.iter().find(|site| site.joins_later)?.clone();
        // What votes is made good only by what may vote.
        let may_go = |site: &&Site| !site.joins_later && (comes.tier == Tier::Core || site.tier != Tier::Core);
        let able: Vec<&Site> = world.sites.iter().filter(may_go).collect();
        let goes = dice.pick(&able).map(|site| (*site).clone());
        Some(Self { world: world.clone(), dice, known: known.clone(), comes, goes })
    }

    pub async fn run(self) {
        sleep(self.dice.millis(200, 5_000)).await;
        if self.dice.chance(600) {
            self.join().await;
            self.pause().await;
            self.leave().await;
        } else {
            self.leave().await;
            self.pause().await;
            self.join().await;
        }
        let is_core = |site: &Site| site.tier == Tier::Core;
        if is_core(&self.comes) && self.goes.as_ref().is_some_and(is_core) {
            self.take(Step::Promote(self.comes.nodes[0])).await;
        }
        self.world.trace.note("the fleet is what it stays");
    }

    async fn pause(&self) {
        sleep(self.dice.millis(0, 3_000)).await;
    }

    async fn join(&self) {
        let (world, site) = (&self.world, &self.comes);
        world.trace.fault("region joins", &site.name);
        for node in &site.nodes {
            world.set_absent(*node, false);
        }
        for node in &site.nodes {
            self.take(Step::LetIn(*node)).await;
        }
        self.until(&site.name, true).await;
        world.set_apart(&site.name, false);
        world.trace.count("regions joined");
    }

    async fn leave(&self) {
        let Some(site) = &self.goes else { return };
        let world = &self.world;
        world.set_apart(&site.name, true);
        let began = Instant::now();
        while self.known.is_asked(&site.name) {
            if began.elapsed() > DONE_WITHIN {
                let text = format!("{} leaves, and still has requests after {DONE_WITHIN:?}", site.name);
                world.trace.violation(PROPERTY, text);
                return;
            }
            sleep(LOOK).await;
        }
        // What only this region had goes with it.
        self.known.get().own.retain(|(region, _), _| *region != site.name);
        world.trace.fault("region leaves", &site.name);
        for node in &site.nodes {
            world.set_absent(*node, true);
        }
        for node in &site.nodes {
            self.take(Step::Remove(*node)).await;
        }
        self.forget(&site.name).await;
        self.until(&site.name, false).await;
        world.trace.count("regions left");
    }

    /// Has one of the servers take a step until it is taken.
    async fn take(&self, step: Step) {
        let (world, began) = (&self.world, Instant::now());
        let (Step::LetIn(node) | Step::Promote(node) | Step::Remove(node)) = step;
        loop {
            let others: Vec<u64> = world.present().into_iter().filter(|other| *other != node).collect();
            let asked = self.dice.pick(&others).and_then(|other| world.server(*other));
            if let Some(server) = asked
                && let Some(door) = &server.global
            {
                match timeout(PATIENCE, ask(door, step)).await {
                    Ok(Ok(())) if server.life.is_on() => break,
                    Ok(Err(error)) => world.trace.note(format_args!("{step:?}: {error}")),
                    _ => {}
                }
            }
            if began.elapsed() > DONE_WITHIN {
                world.trace.violation(PROPERTY, format_args!("{step:?} is not done after {DONE_WITHIN:?}"));
                return;
            }
            sleep(self.dice.millis(100, 600)).await;
        }
        world.trace.note(format_args!("{step:?} is done"));
    }

    /// Deletes a region's object. It is refused until the region is known to be silent.
    async fn forget(&self, region: &Name) {
        let (world, began, stop) = (&self.world, Instant::now(), AtomicBool::new(false));
        for n in 0.. {
            let wanted = intent(Region::PLURAL, None, region.clone(), Change::Delete, format!("leaves-{n}"));
            match submit(world, &self.dice, &wanted, &Way::of_global(world), &stop).await {
                Some(Ok(_)) => return,
                Some(Err(error)) if error.code == Code::NotFound => return,
                _ if began.elapsed() > DONE_WITHIN => {
                    world.trace.violation(PROPERTY, format_args!("{region} is not forgotten after {DONE_WITHIN:?}"));
                    return;
                }
                _ => sleep(self.dice.millis(300, 1_000)).await,
            }
        }
    }

    /// Waits until some server knows a region, or none does.
    async fn until(&self, region: &Name, is_there: bool) {
        let began = Instant::now();
        let knows = |node: u64| {
            let server = self.world.server(node)?;
            Some(server.part.as_ref()?.view.read(|w| w.fleet().regions.get(None, region).is_some()))
        };
        while self.world.present().into_iter().filter_map(knows).any(|known| known) != is_there {
            if began.elapsed() > DONE_WITHIN {
                let text = format!("{region} in the fleet is not {is_there} after {DONE_WITHIN:?}");
                self.world.trace.violation(PROPERTY, text);
                return;
            }
            sleep(LOOK).await;
        }
    }
}

async fn ask(door: &Door, step: Step) -> Result<(), StoreError> {
    match step {
        Step::LetIn(node) => door.store.add_learner(node, endpoint(node)).await,
        Step::Promote(node) => door.store.promote(node).await,
        Step::Remove(node) => door.store.remove(node).await,
    }
}

/// Lets those servers into the group that all regions share that are there from the beginning and don't vote.
pub async fn let_in_the_others(world: Arc<World>) {
    let voters = world.voters();
    for node in world.present().into_iter().filter(|node| !voters.contains(node)) {
        let mut turn = 0;
        loop {
            turn += 1;
            let door = world.server(voters[turn % voters.len()]).and_then(|s| s.door(Group::Global).cloned());
            if let Some(door) = door
                && let Ok(Ok(())) = timeout(PATIENCE, ask(&door, Step::LetIn(node))).await
            {
                break;
            }
            sleep(Duration::from_millis(300)).await;
        }
        world.trace.count("servers that read along");
    }
}
