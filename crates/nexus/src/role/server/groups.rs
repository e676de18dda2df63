//! The groups of the metadata store that a server belongs to, `global` and its region's, and the ways between them: to
//! the server that leads `global`, and to the region's own.
//!
//! A server of a core region may be a founding voter of `global`; any other asks the voters to let it in. It reads along;
//! whether it votes is for [`super::voters`] to say.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Intent, Passed};
use nexus_control::region::{self, Forward, ForwardError, Region, ReportError, Upward};
use nexus_env::{Endpoint, Env};
use nexus_model::kind::{GLOBAL, RegionServer};
use nexus_model::plan::{RegionSummary, ServerNote, method};
use nexus_store::embedded::{self, EmbeddedStore, Peers};
use nexus_store::{GroupId, Store};
use nexus_wire::{Pool, Refusal, ServerBuilder, code};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::fleet::Fleet;
use super::southbound::{forward, pass, passed_on, submitted};
use crate::config::ServerConfig;

/// How often a server says what it is, and which gateways it feeds.
const NOTE_EVERY: Duration = Duration::from_secs(1);
const NOTE_DEADLINE: Duration = Duration::from_secs(2);
/// Between tries to be let into `global`.
const JOIN_EVERY: Duration = Duration::from_secs(2);
/// A newcomer may have much to read before it has caught up.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);

/// This server's members of the groups.
#[derive(Clone)]
pub struct Groups {
    /// The region's name, which is its group's.
    pub region_id: GroupId,
    pub region: Arc<Engine>,
    pub global: Arc<Engine>,
}

impl Groups {
    /// Opens both stores under `<data_dir>/store/<group>`.
    pub async fn open(config: &ServerConfig, env: &Env, peers: Arc<dyn Peers>) -> anyhow::Result<Self> {
        let store = config.data_dir.join("store");
        if store.join("FORMAT").exists() {
            let at = store.display();
            anyhow::bail!("{at} is of a release in which a region had one group: this one can't read it. Start anew");
        }
        std::fs::create_dir_all(&store).with_context(|| format!("making {}", store.display()))?;
        let open = |group: GroupId, members: &BTreeMap<u64, crate::config::Member>| {
            let dir = store.join(group.as_str());
            let endpoints = members.iter().map(|(id, m)| (*id, m.wire.to_string())).collect();
            let own = embedded::Config::new(config.node_id, group.clone(), dir, endpoints);
            let mut own = if group == global_id() { own.for_distance() } else { own };
            if config.join || !members.contains_key(&config.node_id) {
                own = embedded::Config { members: BTreeMap::new(), founder: false, join: true, ..own };
            }
            Engine::open(config, own, env, peers.clone())
        };
        let region_id: GroupId = config.region.as_str().parse().context("the region as a store group")?;
        let region = open(region_id.clone(), &config.members).await.context("opening the region's store")?;
        let global = open(global_id(), config.global_members()).await.context("opening the global store")?;
        Ok(Self { region_id, region: Arc::new(region), global: Arc::new(global) })
    }

    /// What other servers may call: the groups of the embedded engine.
    pub fn by_id(&self) -> BTreeMap<GroupId, Arc<EmbeddedStore>> {
        let engines = [(self.region_id.clone(), &self.region), (global_id(), &self.global)];
        engines.into_iter().filter_map(|(group, engine)| Some((group, engine.embedded()?))).collect()
    }

    pub async fn shutdown(&self) {
        futures::join!(self.region.shutdown(), self.global.shutdown());
    }
}

fn global_id() -> GroupId {
    GLOBAL.parse().expect("a well-formed name")
}

/// The way to whoever leads `global`.
pub struct GlobalWire {
    store: Arc<Engine>,
    pool: Arc<Pool>,
}

impl GlobalWire {
    pub fn new(store: Arc<Engine>, pool: Arc<Pool>) -> Self {
        Self { store, pool }
    }

    async fn endpoint(&self, node: u64) -> Result<Endpoint, String> {
        let member = self.store.status().await.members.remove(&node);
        let member = member.ok_or_else(|| format!("node {node} is not a member of {GLOBAL}"))?;
        member.endpoint.parse().map_err(|e| format!("node {node}'s endpoint in the membership: {e}"))
    }
}

#[async_trait]
impl Forward for GlobalWire {
    async fn forward(&self, node: u64, intent: &Intent, deadline: Duration) -> Result<Accepted, ForwardError> {
        let endpoint = self.endpoint(node).await.map_err(ForwardError::NotTaken)?;
        forward(&self.pool.get(&endpoint), method::SUBMIT_GLOBAL, intent, deadline).await
    }

    async fn pass(&self, via: u64, passed: &Passed, deadline: Duration) -> Result<Accepted, ForwardError> {
        let endpoint = self.endpoint(via).await.map_err(ForwardError::NotTaken)?;
        pass(&self.pool.get(&endpoint), method::PASS_GLOBAL, passed, deadline).await
    }
}

/// Tells the global writer what a region has, here or wherever it runs.
pub struct Uplink {
    pub wire: Arc<GlobalWire>,
    pub global: Arc<Region>,
}

#[async_trait]
impl Upward for Uplink {
    async fn summarize(&self, summary: &RegionSummary, deadline: Duration) -> Result<u64, String> {
        let leader = *self.wire.store.leadership().borrow();
        if leader.is_self {
            return self.global.hear(summary.clone()).await.map_err(|e| format!("{e:?}"));
        }
        let node = leader.leader.ok_or("nobody leads the global group, as far as this server can see")?;
        let endpoint = self.wire.endpoint(node).await?;
        let client = self.wire.pool.get(&endpoint);
        client.call(method::SUMMARY, summary, deadline).await.map_err(|e| e.to_string())
    }
}

/// The writers of the two groups, as this server runs them.
pub struct Writers {
    pub region: Arc<Region>,
    pub global: Arc<Region>,
}

impl Writers {
    pub fn new(
        config: &ServerConfig,
        env: &Env,
        groups: &Groups,
        fleet: &Fleet,
        peers: Arc<dyn Forward>,
        pool: &Arc<Pool>,
    ) -> Self {
        let bootstrap = |region: nexus_model::Name, own: bool| Bootstrap {
            region,
            domain: config.domain.clone(),
            zones: if own { config.zones.clone() } else { Vec::new() },
            cells: if own { config.cells.iter().map(|c| c.name.clone()).collect() } else { Vec::new() },
        };
        let wire = Arc::new(GlobalWire::new(groups.global.clone(), pool.clone()));
        let of = |bootstrap, fleet, store: &Arc<Engine>, forward| {
            let config = region::Config { node: config.node_id, server: config.name.to_string(), bootstrap, fleet };
            Arc::new(Region::new(config, env.clone(), store.clone(), forward))
        };
        let global = GLOBAL.parse().expect("a well-formed name");
        let global = of(bootstrap(global, false), None, &groups.global, wire.clone() as Arc<dyn Forward>);
        let link = region::Fleet {
            store: groups.global.clone(),
            upward: Arc::new(Uplink { wire, global: global.clone() }),
            tier: config.tier,
            servers: fleet.servers().into_values().map(|e| server_entry(&e)).collect(),
        };
        let region = of(bootstrap(config.region.clone(), true), Some(link), &groups.region, peers);
        Self { region, global }
    }
}

fn server_entry(entry: &nexus_api::operations::ServerEntry) -> RegionServer {
    RegionServer {
        name: entry.name.clone(),
        node: entry.node,
        zone: Some(entry.zone.clone()),
        wire: entry.wire.clone(),
        api: entry.api.clone(),
    }
}

/// The gateways that this server feeds and other regions' gateways can reach, with how many streams each has.
#[derive(Debug, Clone, Default)]
pub struct Gateways(Arc<Mutex<BTreeMap<SocketAddr, usize>>>);

/// A gateway is known while this is held.
#[derive(Debug)]
pub struct Fed {
    gateways: Gateways,
    peer: SocketAddr,
}

impl Gateways {
    fn held(&self) -> std::sync::MutexGuard<'_, BTreeMap<SocketAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn feed(&self, peer: SocketAddr) -> Fed {
        *self.held().entry(peer).or_default() += 1;
        Fed { gateways: self.clone(), peer }
    }

    fn all(&self) -> Vec<SocketAddr> {
        self.held().keys().copied().collect()
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        let mut held = self.gateways.held();
        if let Some(count) = held.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.peer);
            }
        }
    }
}

/// Says of this server to its region's writer what other regions should know, until `stop`.
pub async fn tell_the_writer(
    config: ServerConfig,
    groups: Groups,
    writers: Arc<Writers>,
    fleet: Fleet,
    gateways: Gateways,
    pool: Arc<Pool>,
    stop: CancellationToken,
) {
    let own = config.members.get(&config.node_id).cloned();
    loop {
        let recorded = fleet.servers().remove(&config.node_id).map(|e| server_entry(&e));
        let configured = own.as_ref().map(|m| RegionServer {
            name: config.name.clone(),
            node: config.node_id,
            zone: Some(config.zone.clone()),
            wire: m.wire.to_string(),
            api: m.api.clone(),
        });
        if let Some(server) = configured.or(recorded) {
            let note = ServerNote { server, gateways: gateways.all() };
            let leader = *groups.region.leadership().borrow();
            if leader.is_self {
                if let Err(error) = writers.region.note(note) {
                    tracing::debug!(?error, "the writer does not take this server's note");
                }
            } else if let Some(endpoint) = leader.leader.and_then(|node| fleet.wire_of(node)) {
                let told = pool.get(&endpoint).call::<_, ()>(method::SERVER_NOTE, &note, NOTE_DEADLINE).await;
                if let Err(error) = told {
                    tracing::debug!(%error, "the region's leader does not take this server's note");
                }
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(NOTE_EVERY) => {}
        }
    }
}

/// Asks to be let into `global`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GlobalJoin {
    pub node: u64,
    pub wire: String,
}

/// Asks until this server is a member of `global`. Founders are from the start; one that joined by a token is let in by its
/// region's leader.
pub async fn join_global(config: ServerConfig, groups: Groups, pool: Arc<Pool>, stop: CancellationToken) {
    if config.join || config.global_members().contains_key(&config.node_id) {
        return;
    }
    let Some(own) = config.members.get(&config.node_id) else { return };
    let asked = GlobalJoin { node: config.node_id, wire: own.wire.to_string() };
    let mut said = String::new();
    loop {
        for member in config.global_members().values() {
            if groups.global.status().await.members.contains_key(&config.node_id) {
                return;
            }
            let client = pool.get(&member.wire);
            let answer = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                answer = client.call::<_, ()>(method::GLOBAL_JOIN, &asked, JOIN_DEADLINE) => answer,
            };
            match answer {
                Ok(()) => {
                    tracing::info!(node = asked.node, "this server is a member of the global group");
                    return;
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != said {
                        tracing::warn!(server = %member.name, %error, "the global group has not let this server in yet");
                        said = text;
                    }
                }
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(JOIN_EVERY) => {}
        }
    }
}

async fn let_in(global: &Engine, asked: GlobalJoin) -> Result<(), Refusal> {
    let failed = |e: nexus_store::StoreError| Refusal::new(code::DRAINING, e.to_string());
    let members = global.status().await.members;
    match members.get(&asked.node) {
        Some(member) if member.endpoint != asked.wire => {
            let why = format!("node {} is {} in the global group", asked.node, member.endpoint);
            Err(Refusal::new(code::FORBIDDEN, why))
        }
        Some(_) => Ok(()),
        None => global.add_learner(asked.node, asked.wire).await.map_err(failed),
    }
}

fn not_led(error: ReportError) -> Refusal {
    match error {
        ReportError::NotLeader { .. } => Refusal::not_leader(None),
        ReportError::Refused(why) => Refusal::new("region-refused", why),
        ReportError::Overloaded => Refusal::new(code::DRAINING, "the writer's queue is full"),
    }
}

/// The methods that groups and regions need.
pub fn methods(builder: ServerBuilder, groups: &Groups, writers: &Arc<Writers>) -> ServerBuilder {
    let (submit, hear, note, global) = (writers.clone(), writers.clone(), writers.clone(), groups.global.clone());
    let (pass_region, pass_global) = (writers.clone(), writers.clone());
    builder
        .unary(method::PASS, move |_, passed: String| {
            let writers = pass_region.clone();
            async move { passed_on(&writers.region, &passed).await }
        })
        .unary(method::PASS_GLOBAL, move |_, passed: String| {
            let writers = pass_global.clone();
            async move { passed_on(&writers.global, &passed).await }
        })
        .unary(method::SUBMIT_GLOBAL, move |_, intent: String| {
            let writers = submit.clone();
            async move { submitted(&writers.global, &intent).await?.ok_or_else(|| Refusal::not_leader(None)) }
        })
        .unary(method::SUMMARY, move |_, summary: RegionSummary| {
            let writers = hear.clone();
            async move { writers.global.hear(summary).await.map_err(not_led) }
        })
        .unary(method::SERVER_NOTE, move |_, told: ServerNote| {
            let writers = note.clone();
            async move { writers.region.note(told).map_err(not_led) }
        })
        .unary(method::GLOBAL_JOIN, move |_, asked: GlobalJoin| {
            let global = global.clone();
            async move { let_in(&global, asked).await }
        })
}
