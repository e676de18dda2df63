//! The membership soak: members come, go, are replaced and are killed, round after round, under writes that never stop.
//!
//! `NEXUS_SOAK_ROUNDS=100` runs the long one; `NEXUS_SEED` replays the choices of a run (not its timing). At the end
//! every write that was acknowledged must be there, on every member, once.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::load::Load;
use common::{Cluster, seed, until};
use nexus_env::{RngExt, SeededRng};
use nexus_store::embedded::EmbeddedStore;
use nexus_store::{Store, StoreError};

const FOUNDERS: u64 = 3;

fn rounds() -> u64 {
    std::env::var("NEXUS_SOAK_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(6)
}

struct Soak {
    cluster: Arc<Cluster>,
    load: Load,
    rng: SeededRng,
    members: Vec<u64>,
    next: u64,
    down: Option<u64>,
}

impl Soak {
    fn any(&self, of: &[u64]) -> u64 {
        of[self.rng.below(of.len() as u64) as usize]
    }

    fn alive(&self) -> Vec<u64> {
        self.members.iter().copied().filter(|m| Some(*m) != self.down).collect()
    }

    /// Asks any living member, again and again as an operator would, until it is done.
    async fn change(&self, what: &str, change: impl AsyncFn(Arc<EmbeddedStore>) -> Result<(), StoreError>) {
        let alive = self.alive();
        let asked = self.any(&alive);
        let mut turn = 0;
        let last = Mutex::new(String::new());
        let done = until(what, async || {
            let node = alive[(alive.iter().position(|a| *a == asked).unwrap() + turn) % alive.len()];
            turn += 1;
            match change(self.cluster.node(node)).await {
                Ok(()) => Some(()),
                Err(error) => {
                    let text = format!("{what} at {node}: {error}");
                    if std::mem::replace(&mut *last.lock().unwrap(), text.clone()) != text {
                        println!("  {text}");
                    }
                    None
                }
            }
        });
        done.await;
    }

    async fn kill(&mut self, node: u64) {
        println!("  kill {node}");
        self.cluster.kill(node).await;
        self.down = Some(node);
    }

    async fn revive(&mut self) {
        let Some(node) = self.down.take() else { return };
        if !self.members.contains(&node) {
            return;
        }
        println!("  revive {node}");
        if node <= FOUNDERS {
            self.cluster.boot(node).await.unwrap()
        } else {
            self.cluster.join(node).await.unwrap()
        };
    }

    async fn newcomer(&mut self) -> u64 {
        let node = self.next;
        self.next += 1;
        self.cluster.join(node).await.unwrap();
        node
    }

    async fn add(&mut self) {
        let node = self.newcomer().await;
        println!("  add {node} to {:?}", self.members);
        let endpoint = format!("mem:{node}");
        self.change("add", async |s| s.add_learner(node, endpoint.clone()).await).await;
        self.change("promote", async |s| s.promote(node).await).await;
        self.members.push(node);
        self.load.ask_also(node);
    }

    async fn forget(&mut self, node: u64) {
        self.members.retain(|m| *m != node);
        self.load.ask_no_more(node);
        if self.down == Some(node) {
            self.down = None;
        } else {
            self.cluster.end(node).await;
        }
    }

    async fn remove(&mut self, node: u64) {
        println!("  remove {node} of {:?}", self.members);
        self.change("remove", async |s| s.remove(node).await).await;
        self.forget(node).await;
    }

    async fn replace(&mut self, old: u64) {
        let new = self.newcomer().await;
        println!("  replace {old} of {:?} by {new}", self.members);
        let endpoint = format!("mem:{new}");
        self.change("replace", async |s| s.replace(old, new, endpoint.clone()).await).await;
        self.members.push(new);
        self.load.ask_also(new);
        self.forget(old).await;
    }

    async fn round(&mut self, round: u64) {
        println!("round {round}: {:?}", self.members);
        // Half of the time a member dies before, so that the change happens with a minority down.
        if self.rng.below(2) == 0 {
            let victim = self.any(&self.members);
            self.kill(victim).await;
            self.load.goes_on("a kill").await;
        }
        match self.members.len() {
            ..=3 => self.add().await,
            5.. => {
                let node = self.any(&self.members);
                self.remove(node).await;
            }
            _ => match self.rng.below(3) {
                0 => self.add().await,
                1 => {
                    let node = self.down.unwrap_or_else(|| self.any(&self.members));
                    self.remove(node).await;
                }
                _ => {
                    let node = self.down.unwrap_or_else(|| self.any(&self.members));
                    self.replace(node).await;
                }
            },
        }
        if self.rng.below(3) == 0 {
            let node = self.down.unwrap_or_else(|| self.any(&self.members));
            self.replace(node).await;
        }
        self.load.goes_on("a change").await;
        self.revive().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go_and_no_write_is_lost() {
    let seed = seed();
    let cluster = Arc::new(Cluster::start(FOUNDERS, seed).await);
    cluster.leader().await;
    let members: Vec<u64> = (1..=FOUNDERS).collect();
    let load = Load::start_with(&cluster, &members, Duration::ZERO);
    let (rng, next) = (SeededRng::new(seed), FOUNDERS + 1);
    let mut soak = Soak { cluster: cluster.clone(), load, rng, members, next, down: None };
    for round in 1..=rounds() {
        soak.round(round).await;
    }
    println!("{} rounds", rounds());
    let Soak { load, mut members, .. } = soak;
    members.sort_unstable();
    load.end(&cluster, &members).await;
    for node in &members {
        let store = cluster.node(*node);
        let same = async || {
            let known = store.status().await.members;
            (known.keys().eq(&members) && known.values().all(|m| m.voter)).then_some(())
        };
        until("every member knows the members", same).await;
    }
    cluster.stop().await;
}
