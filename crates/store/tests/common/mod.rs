//! Clusters in one process: members that talk over function calls whose links can be cut, on disks that can lose power.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod contract;
pub mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::{DirEntry, Disk, DiskLock, Env, File, MemDisk, RngExt, SeededRng};
use nexus_store::embedded::{Config, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, PeerError, Store, StoreError};

/// Members of a cluster by id, and which links are cut.
#[derive(Default)]
pub struct Wires {
    nodes: Mutex<BTreeMap<u64, Arc<EmbeddedStore>>>,
    cut: Mutex<BTreeSet<(u64, u64)>>,
    /// The longest time that a message takes; how long each does is drawn from the seed.
    pub latency: Mutex<Option<(SeededRng, Duration)>>,
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

    /// Leaves only these links, both ways, of all that could be between the members.
    pub fn only(&self, members: &[u64], links: &[(u64, u64)]) {
        let mut cut = self.cut.lock().unwrap();
        cut.clear();
        for &a in members {
            for &b in members {
                if a != b && !links.contains(&(a, b)) && !links.contains(&(b, a)) {
                    cut.insert((a, b));
                }
            }
        }
    }

    async fn travel(&self, from: u64, to: u64) {
        let time = self.latency.lock().unwrap().as_ref().map(|(rng, max)| rng.below(max.as_micros() as u64));
        if let Some(micros) = time {
            tokio::time::sleep(Duration::from_micros(micros)).await;
        }
        if self.is_cut(from, to) {
            // A cut cable does not say so.
            std::future::pending::<()>().await;
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
    async fn call(&self, to: &PeerRef, _group: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        let to = to.node;
        self.wires.travel(self.from, to).await;
        let node = self.wires.nodes.lock().unwrap().get(&to).cloned();
        let node = node.ok_or_else(|| PeerError::Unreachable("connection refused".into()))?;
        // Handling goes on even if the caller gives up, as in another process.
        let answer = tokio::spawn(async move { node.handle(message).await }).await;
        self.wires.travel(to, self.from).await;
        answer.map_err(|e| PeerError::Lost(e.to_string()))
    }
}

pub struct Cluster {
    pub wires: Arc<Wires>,
    pub disks: BTreeMap<u64, MemDisk>,
    pub adjust: fn(&mut Config),
    /// Disks of members that joined later.
    pub joined: Mutex<BTreeMap<u64, MemDisk>>,
    pub seed: u64,
}

impl Cluster {
    pub async fn start(size: u64, seed: u64) -> Self {
        Self::start_with(size, seed, |_| {}).await
    }

    pub async fn start_with(size: u64, seed: u64, adjust: fn(&mut Config)) -> Self {
        Self::made(Wires::default(), size, seed, adjust).started().await
    }

    /// In virtual time, with cables on which messages take up to `latency`.
    pub async fn start_virtual(size: u64, seed: u64, latency: Duration) -> Self {
        Self::unbegun(size, seed, latency).started().await
    }

    async fn started(self) -> Self {
        for node in self.ids() {
            self.boot(node).await.unwrap();
        }
        self
    }

    /// In virtual time too, with nobody started yet.
    pub fn unbegun(size: u64, seed: u64, latency: Duration) -> Self {
        let wires = Wires { latency: Mutex::new(Some((SeededRng::new(seed), latency))), ..Wires::default() };
        Self::made(wires, size, seed, |_| {})
    }

    fn made(wires: Wires, size: u64, seed: u64, adjust: fn(&mut Config)) -> Self {
        let disks = (1..=size).map(|n| (n, MemDisk::new(seed.wrapping_mul(31).wrapping_add(n)))).collect();
        Self { wires: Arc::new(wires), disks, adjust, joined: Mutex::default(), seed }
    }

    /// The same with a founding member taken out of everybody's configuration.
    pub fn without(mut self, node: u64) -> Self {
        self.disks.remove(&node);
        self
    }

    pub fn ids(&self) -> Vec<u64> {
        self.disks.keys().copied().collect()
    }

    /// All founders but one.
    pub fn others(&self, than: u64) -> Vec<u64> {
        self.disks.keys().copied().filter(|n| *n != than).collect()
    }

    pub async fn boot(&self, node: u64) -> Result<Arc<EmbeddedStore>, StoreError> {
        let members = self.disks.keys().map(|n| (*n, format!("mem:{n}"))).collect();
        let group = GroupId::new("test").unwrap();
        let mut config = Config::new(node, group, PathBuf::from("/data/store"), members);
        (self.adjust)(&mut config);
        self.open(config, &self.disks[&node]).await
    }

    /// Starts a member that waits to be added, on a new disk or on the one that it had.
    pub async fn join(&self, node: u64) -> Result<Arc<EmbeddedStore>, StoreError> {
        let seed = self.seed.wrapping_mul(31).wrapping_add(node);
        let disk = self.joined.lock().unwrap().entry(node).or_insert_with(|| MemDisk::new(seed)).clone();
        let group = GroupId::new("test").unwrap();
        let mut config = Config::new(node, group, PathBuf::from("/data/store"), BTreeMap::new());
        config.join = true;
        (self.adjust)(&mut config);
        self.open(config, &disk).await
    }

    async fn open(&self, config: Config, disk: &MemDisk) -> Result<Arc<EmbeddedStore>, StoreError> {
        let node = config.node;
        let rng = Arc::new(SeededRng::new(self.seed ^ node));
        let disk: Arc<dyn Disk> = if self.wires.latency.lock().unwrap().is_some() {
            Arc::new(Prompt(Arc::new(disk.mount())))
        } else {
            Arc::new(disk.mount())
        };
        let env = Env::real().with_disk(disk).with_rng(rng);
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
        let joined = self.joined.lock().unwrap().get(&node).cloned();
        joined.as_ref().or_else(|| self.disks.get(&node)).expect("a member that was started").crash();
        if let Some(store) = store {
            store.shutdown().await;
        }
    }

    /// Ends a member cleanly.
    pub async fn end(&self, node: u64) {
        let store = self.wires.nodes.lock().unwrap().remove(&node);
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

/// A disk that answers in place, so that nothing depends on how threads are scheduled.
struct Prompt(Arc<dyn Disk>);

impl Disk for Prompt {
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.0.create(path)
    }

    fn create_reserved(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn File>> {
        self.0.create_reserved(path, bytes)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.0.open(path)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.0.read(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.remove_dir_all(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.0.list(dir)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.sync_dir(path)
    }

    fn free_space(&self, path: &Path) -> io::Result<u64> {
        self.0.free_space(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.0.exists(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        self.0.lock(path)
    }

    fn simulated_delay(&self) -> Option<Duration> {
        Some(Duration::from_micros(200))
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

/// Waits until a member says why it has stopped.
pub async fn failure(store: &dyn Store) -> String {
    until("a failure", async || store.status().await.failure).await
}

/// A seed from the environment to replay, or a fresh one; printed either way.
pub fn seed() -> u64 {
    let seed =
        std::env::var("NEXUS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| nexus_env::RealRng.u64());
    println!("NEXUS_SEED={seed}");
    seed
}
