//! Clusters in one process: members that talk over function calls whose links can be cut, on disks that can lose power.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod contract;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::{Env, MemDisk};
use nexus_store::embedded::{Config, EmbeddedStore, Peers};
use nexus_store::{GroupId, PeerError, Store, StoreError};

/// Members of a cluster by id, and which links are cut.
#[derive(Default)]
pub struct Wires {
    nodes: Mutex<BTreeMap<u64, Arc<EmbeddedStore>>>,
    cut: Mutex<BTreeSet<(u64, u64)>>,
}

impl Wires {
    pub fn cut(&self, from: u64, to: u64) {
        self.cut.lock().unwrap().insert((from, to));
    }

    pub fn cut_off(&self, node: u64, others: impl IntoIterator<Item = u64>) {
        for other in others {
            self.cut(node, other);
            self.cut(other, node);
        }
    }

    pub fn heal(&self) {
        self.cut.lock().unwrap().clear();
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        self.cut.lock().unwrap().contains(&(from, to))
    }
}

struct Wire {
    from: u64,
    wires: Arc<Wires>,
}

#[async_trait]
impl Peers for Wire {
    async fn call(&self, to: u64, _group: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        if self.wires.is_cut(self.from, to) {
            // A cut cable does not say so.
            std::future::pending::<()>().await;
        }
        let node = self.wires.nodes.lock().unwrap().get(&to).cloned();
        let node = node.ok_or_else(|| PeerError::Unreachable("connection refused".into()))?;
        // Handling goes on even if the caller gives up, as in another process.
        let answer = tokio::spawn(async move { node.handle(message).await }).await;
        if self.wires.is_cut(to, self.from) {
            std::future::pending::<()>().await;
        }
        answer.map_err(|e| PeerError::Lost(e.to_string()))
    }
}

pub struct Cluster {
    pub wires: Arc<Wires>,
    pub disks: BTreeMap<u64, MemDisk>,
    pub adjust: fn(&mut Config),
}

impl Cluster {
    pub async fn start(size: u64, seed: u64) -> Self {
        Self::start_with(size, seed, |_| {}).await
    }

    pub async fn start_with(size: u64, seed: u64, adjust: fn(&mut Config)) -> Self {
        let disks = (1..=size).map(|n| (n, MemDisk::new(seed.wrapping_mul(31).wrapping_add(n)))).collect();
        let cluster = Self { wires: Arc::new(Wires::default()), disks, adjust };
        for node in 1..=size {
            cluster.boot(node).await.unwrap();
        }
        cluster
    }

    pub fn ids(&self) -> Vec<u64> {
        self.disks.keys().copied().collect()
    }

    pub async fn boot(&self, node: u64) -> Result<Arc<EmbeddedStore>, StoreError> {
        let members = self.disks.keys().map(|n| (*n, format!("mem:{n}"))).collect();
        let group = GroupId::new("test").unwrap();
        let mut config = Config::new(node, group, PathBuf::from("/data/store"), members);
        (self.adjust)(&mut config);
        let env = Env::real().with_disk(Arc::new(self.disks[&node].mount()));
        let wire = Arc::new(Wire { from: node, wires: self.wires.clone() });
        let store = Arc::new(EmbeddedStore::open(config, env, wire).await?);
        self.wires.nodes.lock().unwrap().insert(node, store.clone());
        Ok(store)
    }

    pub fn node(&self, node: u64) -> Arc<EmbeddedStore> {
        self.wires.nodes.lock().unwrap()[&node].clone()
    }

    pub fn try_node(&self, node: u64) -> Option<Arc<EmbeddedStore>> {
        self.wires.nodes.lock().unwrap().get(&node).cloned()
    }

    /// Pulls a member's plug: it is unreachable and its disk loses what was not synced, at this very instant.
    pub async fn kill(&self, node: u64) {
        let store = self.wires.nodes.lock().unwrap().remove(&node);
        self.disks[&node].crash();
        if let Some(store) = store {
            store.shutdown().await;
        }
    }

    pub async fn stop(&self) {
        let nodes = std::mem::take(&mut *self.wires.nodes.lock().unwrap());
        for store in nodes.into_values() {
            store.shutdown().await;
        }
    }

    /// The member that leads, once there is one that can serve.
    pub async fn leader(&self) -> u64 {
        until("a leader", async || {
            let nodes: Vec<_> = self.wires.nodes.lock().unwrap().iter().map(|(n, s)| (*n, s.clone())).collect();
            nodes.into_iter().find(|(_, s)| s.leadership().borrow().is_self).map(|(n, _)| n)
        })
        .await
    }
}

/// Waits for something, for as long as a loaded machine may need.
pub async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = found().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A seed from the environment to replay, or a fresh one; printed either way.
pub fn seed() -> u64 {
    use nexus_env::RngExt;
    let seed =
        std::env::var("NEXUS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| nexus_env::RealRng.u64());
    println!("NEXUS_SEED={seed}");
    seed
}
