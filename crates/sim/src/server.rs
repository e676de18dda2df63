//! One server: its store over the machine's disk, and what stands on the store. All that knows how a server is put together
//! is here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::{Env, MemTransport};
use nexus_store::embedded::{Config, EmbeddedStore, PeerRef, Peers, Retention};
use nexus_store::{GroupId, PeerError, Store, StoreError};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::chance::Dice;
use crate::disk::SimDisk;
use crate::life::{Life, Step};
use crate::mutant::{Door, Mutant};
use crate::net::{Handling, Net, store_message};
use crate::region::Part;
use crate::world::{Machine, World};

/// The members of one group by node, as their configuration says.
pub fn members(nodes: &[u64]) -> BTreeMap<u64, String> {
    nodes.iter().map(|n| (*n, endpoint(*n))).collect()
}

pub fn endpoint(node: u64) -> String {
    format!("server-{node}:7440")
}

pub struct Server {
    pub life: Arc<Life>,
    pub store: Arc<EmbeddedStore>,
    /// The store as everything above it sees it.
    pub door: Arc<Door>,
    /// The region's control loop, in worlds that have one.
    pub part: Option<Part>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

/// What a server's store says to the others.
struct Wire {
    world: Weak<World>,
    net: Arc<Net>,
    life: Arc<Life>,
}

/// Runs work as the server's own, so that it ends with it. `None`: the server ended.
pub fn as_servers<T: Send + 'static>(
    server: &Arc<Server>,
    work: impl Future<Output = T> + Send + 'static,
) -> Handling<T> {
    let (reply, answer) = oneshot::channel();
    let life = server.life.clone();
    {
        let mut tasks = server.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let outcome = work.await;
            // What a server says after its end is not heard.
            if life.is_on() {
                let _ = reply.send(outcome);
            }
        });
    }
    Some(Box::pin(async move { answer.await.ok() }))
}

#[async_trait]
impl Peers for Wire {
    async fn call(&self, to: &PeerRef, _: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        if !self.life.is_on() {
            return std::future::pending().await;
        }
        // The second byte of the envelope says how many are still to pass it on.
        if self.life.stage.mutant == Some(Mutant::NoRelay) && message.get(1).is_some_and(|hops| *hops > 0) {
            return Err(PeerError::Unreachable("nobody passes messages on".into()));
        }
        let kind = store_message(&message);
        let (from, to, world) = (self.life.node, to.node, self.world.clone());
        if kind == "Vote" && self.life.step(Step::Election) {
            return std::future::pending().await;
        }
        let may_come_twice = !matches!(kind, "Forward" | "Membership");
        let handle = move || {
            let server = world.upgrade()?.server(to)?;
            if kind == "Forward" && server.life.step(Step::Forward) {
                return None;
            }
            let (store, message) = (server.store.clone(), message.clone());
            as_servers(&server, async move { store.handle(message).await })
        };
        self.net.exchange(from, to, kind, may_come_twice, handle).await
    }
}

impl Server {
    /// Starts a server's process on its machine.
    pub async fn start(world: &Arc<World>, machine: &Machine, life: Arc<Life>) -> Result<Arc<Self>, StoreError> {
        let node = life.node;
        let dice = |purpose: &str| Dice::new(world.seed, &format!("{purpose} {node} {}", life.number));
        let disk = SimDisk::new(&machine.disk, life.clone(), dice("disk"), machine.slow_ms.clone());
        let env = Env {
            clock: machine.clock.clone(),
            rng: dice("server").rng(),
            disk: Arc::new(disk),
            transport: Arc::new(MemTransport::new()),
        };
        let mut config = Config::new(
            node,
            GroupId::new("local").expect("a well-formed name"),
            PathBuf::from("/data/store/local"),
            members(&world.founders),
        );
        if !world.founders.contains(&node) {
            config.join = true;
            config.members = BTreeMap::new();
        }
        // Small enough that a short run rolls segments, saves, purges and sends snapshots.
        config.segment_bytes = 24_000;
        config.snapshot_after_bytes = world.snapshot_after;
        config.reserve_bytes = 40_000;
        config.request_timeout = Duration::from_secs(3);
        config.retention = Retention::default();
        let wire = Arc::new(Wire { world: Arc::downgrade(world), net: world.net.clone(), life: life.clone() });
        let store = Arc::new(EmbeddedStore::open(config, env.clone(), wire).await?);
        let door = Arc::new(Door::new(store.clone(), life.clone(), dice("door")));
        let mut tasks = JoinSet::new();
        let part = world.with_region.then(|| Part::start(world, &life, env, door.clone(), &mut tasks));
        Ok(Arc::new(Self { life, store, door, part, tasks: Arc::new(Mutex::new(tasks)) }))
    }

    /// Clears away what is left of a server whose process is over.
    pub async fn clear(self: Arc<Self>) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.store.shutdown().await;
    }

    /// Why the store has stopped by itself, if it has.
    pub async fn failure(&self) -> Option<String> {
        self.store.status().await.failure
    }
}
