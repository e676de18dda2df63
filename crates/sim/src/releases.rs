//! Rolling restarts in which servers come back with another release: with a newer one in turn, with the older one again
//! while not all have the newer, and, too late, when the group may already have gone on without it.
//!
//! A release is its feature level here. A mixed group works like any other. The group's level rises when every member's
//! release supports it; a release that is older than the group's level takes no entry that it could not read, and comes
//! back when the newer one does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_store::Store;
use tokio::time::{Instant, sleep};

use crate::chance::Dice;
use crate::life::Step;
use crate::world::World;

/// Each world goes up to this release, from the first.
const NEWEST: u32 = 3;
const LOOK: Duration = Duration::from_millis(50);
const COMES_BACK_WITHIN: Duration = Duration::from_secs(6);
const SETTLES_WITHIN: Duration = Duration::from_secs(30);
const UNREADABLE: &str = "no server is fed what its release can't read";

pub struct Releases {
    pub world: Arc<World>,
    pub dice: Dice,
}

impl Releases {
    pub async fn run(self) {
        self.world.stage.releases.store(true, Ordering::Relaxed);
        for level in 2..=NEWEST {
            let mut order = self.world.present();
            for i in (1..order.len()).rev() {
                order.swap(i, self.dice.below(i as u64 + 1) as usize);
            }
            // Somebody may keep the older release for good.
            let all = level < NEWEST || self.dice.chance(700);
            let some = order.len() - usize::from(!all);
            for (i, node) in order.iter().copied().take(some).enumerate() {
                let last = i + 1 == order.len();
                if last {
                    self.world.stage.arm(Step::Raise, self.dice.below(3));
                }
                self.restart(node, level).await;
                if !last && self.dice.chance(250) {
                    sleep(self.dice.millis(0, 2_000)).await;
                    self.restart(node, level - 1).await;
                    self.restart(node, level).await;
                }
                sleep(self.dice.millis(100, 900)).await;
            }
            if all && self.dice.chance(500) {
                // The level rises about now, so this may be too late.
                sleep(self.dice.millis(0, 1_500)).await;
                let node = *self.dice.pick(&order).expect("somebody is there");
                self.restart(node, level - 1).await;
                sleep(self.dice.millis(300, 3_000)).await;
                self.restart(node, level).await;
            }
            sleep(self.dice.millis(500, 2_500)).await;
        }
        self.world.trace.note("every release is where it stays");
    }

    /// Ends a server's process and lets another release take its place; waits a while for it to run.
    async fn restart(&self, node: u64, to: u32) {
        let machine = &self.world.machines[&node];
        let from = machine.release.swap(to, Ordering::SeqCst);
        machine.newest_release.fetch_max(to, Ordering::SeqCst);
        let what = if to > from { "a newer release" } else { "an older release" };
        self.world
            .trace
            .fault(&format!("server comes back with {what}"), format_args!("server {node}: {from} to {to}"));
        if self.dice.chance(700) {
            self.world.kill(node);
        } else {
            self.world.power_off(node);
        }
        let began = Instant::now();
        while self.world.server(node).is_none() && began.elapsed() < COMES_BACK_WITHIN {
            sleep(LOOK).await;
        }
    }
}

/// Watches the level at every server for as long as the world runs.
pub async fn watch_levels(world: Arc<World>) {
    let mut highest = 1;
    loop {
        for server in world.servers() {
            let status = server.store.status().await;
            let node = server.life.node;
            let (level, supported) = (status.feature_level, status.supported_level);
            if level > supported {
                let text = format!("server {node} of release {supported} holds what is of level {level}");
                world.trace.violation(UNREADABLE, text);
            }
            if level > highest {
                highest = level;
                world.trace.count("feature level: rises");
                world.trace.note(format_args!("the feature level is {level}, at server {node}"));
                let never = |node: &u64| world.machines[node].newest_release.load(Ordering::SeqCst) < level;
                if let Some(other) = world.present().into_iter().find(never) {
                    let text = format!("it is {level}, and server {other} never ran a release of it");
                    world.trace.violation("the feature level rises when all support it", text);
                }
            }
        }
        sleep(LOOK).await;
    }
}

/// In the end the group's level is what its oldest release supports, at every server.
pub async fn agree(world: &Arc<World>) {
    let deadline = Instant::now() + SETTLES_WITHIN;
    let nodes = world.present();
    let release = |node: &u64| world.machines[node].release.load(Ordering::SeqCst);
    let wanted = nodes.iter().map(release).min().unwrap_or(1);
    loop {
        let mut wrong = None;
        for node in &nodes {
            match world.server(*node) {
                Some(server) => {
                    let level = server.store.status().await.feature_level;
                    if level != wanted {
                        wrong = Some(format!("server {node} is at {level}, all releases support {wanted}"));
                    }
                }
                None => wrong = Some(format!("server {node} is down")),
            }
        }
        match wrong {
            None => return,
            Some(text) if Instant::now() >= deadline => {
                world.trace.violation("the feature level rises when all support it", text);
                return;
            }
            Some(_) => sleep(Duration::from_millis(200)).await,
        }
    }
}
