//! An operator who changes the group's members while everything else goes on: adds servers, replaces dead ones, removes
//! some. A change whose outcome is not known is asked for again until it is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nexus_store::{Store, StoreError};
use tokio::time::{Instant, sleep, timeout};

use crate::chance::Dice;
use crate::server::{Server, endpoint};
use crate::world::World;

/// A change of members takes longer than a request: the new one has to catch up.
const PATIENCE: Duration = Duration::from_secs(60);
const SETTLES_WITHIN: Duration = Duration::from_secs(40);

pub struct Operator {
    pub world: Arc<World>,
    pub dice: Dice,
    pub stop: Arc<AtomicBool>,
}

#[derive(Debug, Clone, Copy)]
enum Change {
    Add(u64),
    /// The first is lost for good.
    Replace(u64, u64),
    Remove(u64),
}

impl Operator {
    pub async fn run(self) {
        let mut spares: Vec<u64> =
            self.world.nodes.iter().copied().filter(|n| !self.world.founders.contains(n)).rev().collect();
        for _ in 0..4 {
            sleep(self.dice.millis(200, 3_000)).await;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let present = self.world.present();
            let old = *self.dice.pick(&present).expect("somebody is always there");
            let change = match (self.dice.below(3), spares.pop()) {
                (0, Some(new)) => Change::Add(new),
                (_, Some(new)) => Change::Replace(old, new),
                (_, None) if present.len() > 3 => Change::Remove(old),
                (_, None) => return,
            };
            self.carry_out(change).await;
        }
    }

    async fn carry_out(&self, change: Change) {
        let trace = &self.world.trace;
        trace.note(format_args!("the operator begins: {change:?}"));
        match change {
            Change::Add(new) => self.world.set_absent(new, false),
            Change::Replace(old, new) => {
                trace.fault("server lost for good", format_args!("server {old}"));
                self.world.set_absent(old, true);
                self.world.set_absent(new, false);
            }
            Change::Remove(_) => {}
        }
        let began = Instant::now();
        loop {
            // Neither the one that comes nor the one that goes is asked.
            let mut able = self.world.present();
            able.retain(|n| match change {
                Change::Add(new) => *n != new,
                Change::Remove(old) => *n != old,
                Change::Replace(old, new) => *n != old && *n != new,
            });
            let node = *self.dice.pick(&able).expect("two others are there");
            if let Some(server) = self.world.server(node) {
                match timeout(PATIENCE, ask(&server, change)).await {
                    Ok(Ok(())) if server.life.is_on() => break,
                    Ok(Err(error)) => trace.note(format_args!("{change:?} by server {node}: {error}")),
                    _ => {}
                }
            }
            if began.elapsed() > 3 * PATIENCE {
                trace.violation(
                    "members can be changed",
                    format_args!("{change:?} is not done after {:?}", began.elapsed()),
                );
                return;
            }
            sleep(self.dice.millis(100, 800)).await;
        }
        if let Change::Remove(old) = change {
            self.world.set_absent(old, true);
        }
        trace.count("changes of members");
        trace.note(format_args!("the operator is done: {change:?}"));
    }
}

async fn ask(server: &Server, change: Change) -> Result<(), StoreError> {
    match change {
        Change::Add(new) => {
            server.store.add_learner(new, endpoint(new)).await?;
            server.store.promote(new).await
        }
        Change::Replace(old, new) => server.store.replace(old, new, endpoint(new)).await,
        Change::Remove(old) => server.store.remove(old).await,
    }
}

/// In the end everybody names the same members: those that should be there.
pub async fn agree(world: &Arc<World>) {
    let deadline = Instant::now() + SETTLES_WITHIN;
    let wanted = world.present();
    loop {
        let mut wrong = None;
        for node in &wanted {
            let Some(server) = world.server(*node) else {
                wrong = Some(format!("server {node} is down"));
                continue;
            };
            let members = server.store.status().await.members;
            let voters: Vec<u64> = members.iter().filter(|(_, m)| m.voter).map(|(n, _)| *n).collect();
            if voters != wanted {
                wrong = Some(format!("server {node} names {voters:?}, there should be {wanted:?}"));
            }
        }
        match wrong {
            None => return,
            Some(text) if Instant::now() >= deadline => {
                world.trace.violation("all come to name the same members", text);
                return;
            }
            Some(_) => sleep(Duration::from_millis(200)).await,
        }
    }
}
