//! Clients that write all the time, so that whatever is done to a cluster is done under load.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nexus_env::{RngExt, SeededRng};
use nexus_store::{RangeRequest, Store, Txn};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::{Cluster, until};

const CLIENTS: u64 = 4;
/// Writes that show that writing goes on.
const SOME: u64 = 60;

/// What clients write, each at any of the members that they know; and what of it was acknowledged.
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Vec<u64>>>,
}

struct Shared {
    cluster: Arc<Cluster>,
    stop: AtomicBool,
    acknowledged: AtomicU64,
    /// Who may be asked, in any state of health.
    known: Mutex<Vec<u64>>,
    pause: Duration,
}

fn key(client: usize, number: u64) -> String {
    format!("load/{client}/{number:08}")
}

impl Shared {
    async fn client(self: Arc<Self>, client: usize) -> Vec<u64> {
        let rng = SeededRng::new(client as u64);
        let mut acknowledged = Vec::new();
        for number in 0.. {
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            let node = {
                let known = self.known.lock().unwrap();
                known[rng.below(known.len() as u64) as usize]
            };
            let Some(store) = self.cluster.try_node(node) else {
                sleep(Duration::from_millis(5)).await;
                continue;
            };
            if store.txn(Txn::put(key(client, number), number.to_string())).await.is_ok() {
                acknowledged.push(number);
                self.acknowledged.fetch_add(1, Ordering::SeqCst);
            }
            sleep(self.pause).await;
        }
        acknowledged
    }
}

impl Load {
    /// Begins, with a little pause behind each write, without which virtual time would be full of them.
    pub fn start(cluster: &Arc<Cluster>, nodes: &[u64]) -> Self {
        Self::start_with(cluster, nodes, Duration::from_millis(5))
    }

    pub fn start_with(cluster: &Arc<Cluster>, nodes: &[u64], pause: Duration) -> Self {
        let shared = Arc::new(Shared {
            cluster: cluster.clone(),
            stop: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            known: Mutex::new(nodes.to_vec()),
            pause,
        });
        let clients = (0..CLIENTS as usize).map(|client| tokio::spawn(shared.clone().client(client))).collect();
        Self { shared, clients }
    }

    /// How many writes were acknowledged.
    pub fn count(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    pub fn ask_also(&self, node: u64) {
        self.shared.known.lock().unwrap().push(node);
    }

    pub fn ask_no_more(&self, node: u64) {
        self.shared.known.lock().unwrap().retain(|known| *known != node);
    }

    /// Waits until writes have gone on since now.
    pub async fn goes_on(&self, after: &str) {
        let before = self.count();
        until(&format!("writes after {after}"), async || (self.count() >= before + SOME).then_some(())).await;
    }

    /// Stops, and checks that every acknowledged write is at every one of these members. What was never acknowledged may
    /// be there too, but only as it was asked.
    pub async fn end(self, cluster: &Cluster, nodes: &[u64]) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let mut expected = BTreeMap::new();
        for (client, task) in self.clients.into_iter().enumerate() {
            expected.extend(task.await.unwrap().into_iter().map(|n| (key(client, n), n.to_string())));
        }
        println!("{} writes acknowledged", expected.len());
        assert!(expected.len() as u64 >= SOME, "the load was no load: {}", expected.len());
        for node in nodes {
            let store = cluster.node(*node);
            let found = until("a read", async || store.range(RangeRequest::prefix("load/")).await.ok()).await;
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let mut found: BTreeMap<_, _> = found.kvs.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect();
            for (key, value) in &expected {
                assert_eq!(found.remove(key).as_ref(), Some(value), "acknowledged, but not at member {node}: {key}");
            }
            for (key, value) in found {
                assert!(key.ends_with(&format!("/{:08}", value.parse::<u64>().unwrap())), "{key} holds {value}");
            }
        }
    }
}
