//! The membership soak: members come, go, are replaced and are killed, round after round, under writes that never stop.
//!
//! `NEXUS_SOAK_ROUNDS=100` runs the long one; `NEXUS_SEED` replays the choices of a run (not its timing). At the end
//! every write that was acknowledged must be there, on every member, once.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Cluster, seed, until};
use nexus_env::{RngExt, SeededRng};
use nexus_store::{RangeRequest, Store, StoreError, Txn};

const FOUNDERS: u64 = 3;
const WRITERS: u64 = 4;

fn rounds() -> u64 {
    std::env::var("NEXUS_SOAK_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(6)
}

/// Clients that write without a pause, each at whichever member answers, and remember what was acknowledged.
struct Load {
    cluster: Arc<Cluster>,
    stop: AtomicBool,
    acknowledged: AtomicU64,
    /// Of each client, the numbers that were acknowledged.
    written: Mutex<BTreeMap<u64, Vec<u64>>>,
    /// Who may be asked, in any state of health.
    known: Mutex<Vec<u64>>,
}

impl Load {
    async fn client(self: Arc<Self>, client: u64) {
        let rng = SeededRng::new(client);
        let mut number = 0;
        while !self.stop.load(Ordering::SeqCst) {
            let node = {
                let known = self.known.lock().unwrap();
                known[rng.below(known.len() as u64) as usize]
            };
            let Some(store) = self.cluster.try_node(node) else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            number += 1;
            let txn = Txn::put(format!("w/{client}/{number:08}"), number.to_string());
            if store.txn(txn).await.is_ok() {
                self.written.lock().unwrap().entry(client).or_default().push(number);
                self.acknowledged.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Waits until writes have gone on since now.
    async fn goes_on(&self, after: &str) {
        let before = self.acknowledged.load(Ordering::SeqCst);
        let what = format!("writes after {after}");
        until(&what, async || (self.acknowledged.load(Ordering::SeqCst) >= before + 20).then_some(())).await;
    }
}

struct Soak {
    cluster: Arc<Cluster>,
    load: Arc<Load>,
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
    async fn change<F>(&self, what: &str, change: impl Fn(Arc<nexus_store::embedded::EmbeddedStore>) -> F)
    where
        F: Future<Output = Result<(), StoreError>>,
    {
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
        self.change("add", |s| async {
            let s = s;
            s.add_learner(node, endpoint.clone()).await
        })
        .await;
        self.change("promote", |s| async {
            let s = s;
            s.promote(node).await
        })
        .await;
        self.members.push(node);
        self.load.known.lock().unwrap().push(node);
    }

    async fn forget(&mut self, node: u64) {
        self.members.retain(|m| *m != node);
        self.load.known.lock().unwrap().retain(|m| *m != node);
        if self.down == Some(node) {
            self.down = None;
        } else {
            self.cluster.end(node).await;
        }
    }

    async fn remove(&mut self, node: u64) {
        println!("  remove {node} of {:?}", self.members);
        self.change("remove", |s| async {
            let s = s;
            s.remove(node).await
        })
        .await;
        self.forget(node).await;
    }

    async fn replace(&mut self, old: u64) {
        let new = self.newcomer().await;
        println!("  replace {old} of {:?} by {new}", self.members);
        let endpoint = format!("mem:{new}");
        self.change("replace", |s| async {
            let s = s;
            s.replace(old, new, endpoint.clone()).await
        })
        .await;
        self.members.push(new);
        self.load.known.lock().unwrap().push(new);
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
    let load = Arc::new(Load {
        cluster: cluster.clone(),
        stop: AtomicBool::new(false),
        acknowledged: AtomicU64::new(0),
        written: Mutex::default(),
        known: Mutex::new(members.clone()),
    });
    let clients: Vec<_> = (0..WRITERS).map(|c| tokio::spawn(load.clone().client(c))).collect();
    let mut soak = Soak {
        cluster: cluster.clone(),
        load: load.clone(),
        rng: SeededRng::new(seed),
        members,
        next: FOUNDERS + 1,
        down: None,
    };
    for round in 1..=rounds() {
        soak.round(round).await;
    }
    load.stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap();
    }

    let written = load.written.lock().unwrap().clone();
    let expected: BTreeMap<String, String> = written
        .iter()
        .flat_map(|(client, numbers)| numbers.iter().map(move |n| (format!("w/{client}/{n:08}"), n.to_string())))
        .collect();
    println!("{} rounds, {} writes acknowledged", rounds(), expected.len());
    for node in &soak.members {
        let store = cluster.node(*node);
        let found = until("a linearizable read", async || store.range(RangeRequest::prefix("w/")).await.ok()).await;
        let mut found: BTreeMap<String, String> = found
            .kvs
            .iter()
            .map(|kv| {
                let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
                (text(&kv.key), text(&kv.value))
            })
            .collect();
        for (key, value) in &expected {
            assert_eq!(found.remove(key).as_ref(), Some(value), "acknowledged, but not at member {node}: {key}");
        }
        // What is there beside was never acknowledged, which is allowed; but it holds what was asked.
        for (key, value) in found {
            assert!(key.ends_with(&format!("{:08}", value.parse::<u64>().unwrap())), "{key} holds {value}");
        }
        let wanted: Vec<u64> = {
            let mut members = soak.members.clone();
            members.sort_unstable();
            members
        };
        let store = &store;
        let same = async || {
            let known = store.status().await.members;
            (known.keys().copied().collect::<Vec<_>>() == wanted && known.values().all(|m| m.voter)).then_some(())
        };
        until("every member knows the members", same).await;
    }
    cluster.stop().await;
}
