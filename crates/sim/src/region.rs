//! What stands on a server's stores in worlds that have a control loop: the region's writer, in a fleet also the global
//! one, and the view that plans and tables are read from.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Accepted, Intent, Passed};
use nexus_control::region::{Config, Fleet, Forward, ForwardError, Region, Upward};
use nexus_control::view::View;
use nexus_env::Env;
use nexus_model::Name;
use nexus_model::kind::{GLOBAL, RegionServer};
use nexus_model::plan::{RegionSummary, RoutingTable};
use nexus_store::{PeerError, Store};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::life::{Life, Step};
use crate::mutant::{Door, Mutant};
use crate::net::Net;
use crate::server::{as_servers, endpoint};
use crate::site::Group;
use crate::world::World;

/// A name that the simulator made up.
pub fn name(text: &str) -> Name {
    text.parse().expect("the simulator's names are well formed")
}

pub struct Part {
    pub region: Arc<Region>,
    /// The writer of the group that all regions share, in a fleet.
    pub global: Option<Arc<Region>>,
    pub view: View,
    life: Arc<Life>,
    /// The first table that was asked for, for the bug that needs it.
    first_table: std::sync::OnceLock<Arc<RoutingTable>>,
}

/// The way to another server's writer of one group.
struct Wire {
    world: Weak<World>,
    net: Arc<Net>,
    life: Arc<Life>,
    group: Group,
}

#[async_trait]
impl Forward for Wire {
    async fn forward(&self, node: u64, intent: &Intent, deadline: Duration) -> Result<Accepted, ForwardError> {
        let (world, intent, group) = (self.world.clone(), intent.clone(), self.group);
        let handle = move || {
            let server = world.upgrade()?.server(node)?;
            let writer = server.part.as_ref()?.writer(group)?.clone();
            let intent = intent.clone();
            as_servers(&server, async move { writer.submit_here(intent).await })
        };
        let kind = if self.group == Group::Global { "submit to global" } else { "submit" };
        let exchange = self.net.exchange(self.life.node, node, kind, false, handle);
        match tokio::time::timeout(deadline, exchange).await {
            Ok(Ok(None)) => Err(ForwardError::NotTaken("it does not lead".into())),
            Ok(Ok(Some(Ok(accepted)))) => Ok(accepted),
            Ok(Ok(Some(Err(error)))) => Err(ForwardError::Answered(error)),
            Ok(Err(error)) => Err(unanswered(error)),
            Err(_) => Err(ForwardError::Unknown("no answer in time".into())),
        }
    }

    async fn pass(&self, via: u64, passed: &Passed, deadline: Duration) -> Result<Accepted, ForwardError> {
        let (world, passed, group) = (self.world.clone(), passed.clone(), self.group);
        let handle = move || {
            let server = world.upgrade()?.server(via)?;
            let writer = server.part.as_ref()?.writer(group)?.clone();
            let passed = passed.clone();
            as_servers(&server, async move { writer.pass_on(passed).await })
        };
        let exchange = self.net.exchange(self.life.node, via, "intent by a detour", false, handle);
        match tokio::time::timeout(deadline, exchange).await {
            Ok(Ok(passed)) => passed,
            Ok(Err(error)) => Err(unanswered(error)),
            Err(_) => Err(ForwardError::Unknown("no answer in time".into())),
        }
    }
}

fn unanswered(error: PeerError) -> ForwardError {
    match error {
        PeerError::Unreachable(why) => ForwardError::NotTaken(why),
        PeerError::Lost(why) => ForwardError::Unknown(why),
    }
}

/// The way of a region's summaries to the global writer, here or wherever it runs.
struct Uplink {
    world: Weak<World>,
    net: Arc<Net>,
    life: Arc<Life>,
    store: Arc<Door>,
    global: Arc<Region>,
}

#[async_trait]
impl Upward for Uplink {
    async fn summarize(&self, summary: &RegionSummary, deadline: Duration) -> Result<u64, String> {
        let leader = *self.store.leadership().borrow();
        if leader.is_self {
            return self.global.hear(summary.clone()).await.map_err(|e| format!("{e:?}"));
        }
        let node = leader.leader.ok_or("nobody leads the global group, as far as this server can see")?;
        let (world, summary) = (self.world.clone(), summary.clone());
        let handle = move || {
            let server = world.upgrade()?.server(node)?;
            let writer = server.part.as_ref()?.global.clone()?;
            let (summary, life) = (summary.clone(), server.life.clone());
            as_servers(&server, async move {
                let heard = writer.hear(summary).await;
                life.step(Step::Heard);
                heard
            })
        };
        let exchange = self.net.exchange(self.life.node, node, "summary", true, handle);
        match tokio::time::timeout(deadline, exchange).await {
            Ok(Ok(heard)) => heard.map_err(|e| format!("{e:?}")),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer in time".into()),
        }
    }
}

impl Part {
    pub fn start(
        world: &Arc<World>,
        life: &Arc<Life>,
        env: &Env,
        door: Arc<Door>,
        global: Option<Arc<Door>>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (node, site) = (life.node, world.site(life.node));
        let wire = |group| {
            let net = world.net.clone();
            Arc::new(Wire { world: Arc::downgrade(world), net, life: life.clone(), group })
        };
        let config = |bootstrap, fleet| Config { node, server: format!("server-{node}"), bootstrap, fleet };
        // Tasks end with the process, so nothing is ever asked to stop.
        let stop = CancellationToken::new();
        let mut view = View::new("localhost");
        let (mut writer, mut fleet) = (None, None);
        if let Some(global) = global {
            let copy = Arc::new(global.copied());
            let domain = "localhost".into();
            let bootstrap = Bootstrap { region: name(GLOBAL), domain, zones: Vec::new(), cells: Vec::new() };
            let region =
                Arc::new(Region::new(config(bootstrap, None), env.clone(), global.clone(), wire(Group::Global)));
            view = view.in_region(&site.name);
            let (follows, store, stopped) = (view.clone(), copy.clone() as Arc<dyn Store>, stop.clone());
            tasks.spawn(async move { follows.follow_global(store, stopped).await });
            let (runs, stopped) = (region.clone(), stop.clone());
            tasks.spawn(async move { runs.run(stopped).await });
            let uplink = Uplink {
                world: Arc::downgrade(world),
                net: world.net.clone(),
                life: life.clone(),
                store: global,
                global: region.clone(),
            };
            let servers = site.nodes.iter().map(|node| RegionServer {
                name: name(&format!("server-{node}")),
                node: *node,
                zone: None,
                wire: endpoint(*node),
                api: format!("https://server-{node}:8443"),
            });
            let servers = servers.collect();
            fleet = Some(Fleet { store: copy, upward: Arc::new(uplink), tier: site.tier, servers });
            writer = Some(region);
        }
        let bootstrap = Bootstrap {
            region: site.name.clone(),
            domain: "localhost".into(),
            zones: site.zone_names(),
            cells: site.cell_names(),
        };
        let region = Arc::new(Region::new(config(bootstrap, fleet), env.clone(), door.clone(), wire(Group::Own)));
        let (runs, stopped) = (region.clone(), stop.clone());
        tasks.spawn(async move { runs.run(stopped).await });
        let (follows, store) = (view.clone(), door as Arc<dyn Store>);
        tasks.spawn(async move { follows.follow(store, stop).await });
        Self { region, global: writer, view, life: life.clone(), first_table: std::sync::OnceLock::new() }
    }

    pub fn writer(&self, group: Group) -> Option<&Arc<Region>> {
        match group {
            Group::Own => Some(&self.region),
            Group::Global => self.global.as_ref(),
        }
    }

    /// The routing table that gateways are fed, once there is one.
    pub fn table(&self) -> Option<Arc<RoutingTable>> {
        if *self.view.revision().borrow() == 0 {
            return None;
        }
        let table = self.view.table().borrow().clone();
        if self.life.stage.mutant == Some(Mutant::StuckTable) && !table.services.is_empty() {
            return Some(self.first_table.get_or_init(|| table).clone());
        }
        Some(table)
    }

    /// Differences that the writers' own recounts found.
    pub fn violations(&self) -> u64 {
        let of = |region: &Arc<Region>| region.counters.violations.load(Ordering::Relaxed);
        of(&self.region) + self.global.as_ref().map_or(0, of)
    }
}
