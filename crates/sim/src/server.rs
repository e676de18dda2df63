//! One server: its store over the machine's disk, and what stands on the store. All that knows how a server is put together
//! is here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
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
use crate::site::{Group, global_group};
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
    /// Its member of the group that all regions share, in a fleet.
    pub global: Option<Arc<Door>>,
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
    async fn call(&self, to: &PeerRef, group: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
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
        let may_raise = kind == "Append" && self.life.stage.releases.load(Ordering::Relaxed);
        if may_raise && raises(&message) && self.life.step(Step::Raise) {
            return std::future::pending().await;
        }
        let may_come_twice = !matches!(kind, "Forward" | "Membership");
        let group = if *group == global_group() { Group::Global } else { Group::Own };
        let handle = move || {
            let server = world.upgrade()?.server(to)?;
            if kind == "Forward" && server.life.step(Step::Forward) {
                return None;
            }
            let (store, message) = (server.door(group)?.store.clone(), message.clone());
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
        let wire = Arc::new(Wire { world: Arc::downgrade(world), net: world.net.clone(), life: life.clone() });
        let site = world.site(node);
        let own = Config::new(node, site.group(), PathBuf::from("/data/store/local"), members(&founders(world, node)));
        let store = open(world, machine, own, &env, wire.clone()).await?;
        let door = Arc::new(Door::new(store.clone(), life.clone(), dice("door"), Group::Own));
        let mut global = None;
        if world.is_fleet() {
            let own = Config::new(node, global_group(), PathBuf::from("/data/store/global"), members(&world.voters()));
            let store = open(world, machine, own.for_distance(), &env, wire).await?;
            global = Some(Arc::new(Door::new(store, life.clone(), dice("global door"), Group::Global)));
        }
        let mut tasks = JoinSet::new();
        let part = world.with_region.then(|| Part::start(world, &life, &env, door.clone(), global.clone(), &mut tasks));
        Ok(Arc::new(Self { life, store, door, global, part, tasks: Arc::new(Mutex::new(tasks)) }))
    }

    /// Clears away what is left of a server whose process is over.
    pub async fn clear(self: Arc<Self>) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.store.shutdown().await;
        if let Some(global) = &self.global {
            global.store.shutdown().await;
        }
    }

    /// Its member of a group, as everything above sees it.
    pub fn door(&self, group: Group) -> Option<&Arc<Door>> {
        match group {
            Group::Own => Some(&self.door),
            Group::Global => self.global.as_ref(),
        }
    }

    /// Why one of its stores has stopped by itself, if one has.
    pub async fn failure(&self) -> Option<String> {
        for door in [Some(&self.door), self.global.as_ref()].into_iter().flatten() {
            if let Some(failure) = door.store.status().await.failure {
                return Some(failure);
            }
        }
        None
    }
}

/// The founders of a server's own group.
fn founders(world: &World, node: u64) -> Vec<u64> {
    world.site(node).nodes.iter().copied().filter(|n| world.founders.contains(n)).collect()
}

/// Opens one group's member as this world runs it.
async fn open(
    world: &World,
    machine: &Machine,
    mut config: Config,
    env: &Env,
    wire: Arc<Wire>,
) -> Result<Arc<EmbeddedStore>, StoreError> {
    if !config.members.contains_key(&config.node) {
        config.join = true;
        config.founder = false;
        config.members = BTreeMap::new();
    }
    // Small enough that a short run rolls segments, saves, purges and sends snapshots.
    config.segment_bytes = 24_000;
    config.snapshot_after_bytes = world.snapshot_after;
    config.reserve_bytes = 40_000;
    config.request_timeout = Duration::from_secs(3);
    config.retention = Retention::default();
    config.feature_level = machine.release.load(Ordering::SeqCst);
    if world.stage.mutant == Some(Mutant::EarlyLevel) {
        let newest = world.machines.values().map(|m| m.newest_release.load(Ordering::SeqCst)).max();
        config.feature_level = newest.unwrap_or(config.feature_level);
    }
    // All timers are the runtime's, which goes at one speed; what they wait for is derived from these.
    let rate = machine.clock.rate;
    let (shortest, longest) = config.election_timeout;
    config.election_timeout = (rate.lasts(shortest), rate.lasts(longest));
    for span in [&mut config.heartbeat, &mut config.leader_wait, &mut config.request_timeout] {
        *span = rate.lasts(*span);
    }
    Ok(Arc::new(EmbeddedStore::open(config, env.clone(), wire).await?))
}

/// Whether a message carries the entry that raises the feature level. Its encoding names it.
fn raises(message: &[u8]) -> bool {
    const NAME: &[u8] = b"\xa5Raise";
    message.windows(NAME.len()).any(|window| window == NAME)
}
