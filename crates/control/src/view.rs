//! What the committed state means for hosts and gateways: follows this server's own copies of the region's log and of the
//! global one, and publishes a plan per host and the routing table.
//!
//! Reads are stale on purpose: a server that can't reach a majority still tells hosts and gateways the newest that it
//! knows. Plans and tables say their revision, so a reader never goes back. A plan's is the region's; a table's is the sum
//! of both logs' revisions, which grows with either.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::plan::{
    Backend, Desired, HostNames, HostNetworks, HostPlan, HostVersions, ImagePlan, InstancePlan, NetworksMessage,
    NetworksRequest, PLAN_VERSION, RemoteRegion, RoutingTable, Service, Split, TableRoute,
};
use nexus_model::{Name, Object, Uid, key};
use nexus_store::{RangeRequest, Revision, Store, StoreError, WatchEvent};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

mod names;
mod networks;

use crate::ahead;
use crate::rules::app::hostnames;
use crate::rules::child::{is_child, shares};
use crate::rules::network::nic::owner;
use crate::world::{Place, World};

/// A routing table is made at once after a rest of so long; the changes of a burst are gathered meanwhile.
const GATHER: Duration = Duration::from_millis(20);
/// The same where a gateway holds requests for what has just become ready.
const AWAITED: Duration = Duration::from_millis(5);
/// A large table takes long to make: it is made less often, so that making it takes a tenth of one core at most …
const REST: u32 = 9;
/// … but changes never wait longer than this.
const LONGEST: Duration = Duration::from_secs(1);

/// Kinds of the global group that a region goes by.
pub(crate) const FLEET: &[&str] =
    &["o/apps/", "o/images/", "o/organizations/", "o/projects/", "o/regions/", "o/routes/", "o/secrets/"];

#[derive(Default)]
struct State {
    /// The region's name, once it is known.
    region: Option<Name>,
    world: World,
    plans: BTreeMap<Name, watch::Sender<Arc<HostPlan>>>,
    names: BTreeMap<Name, watch::Sender<Arc<HostNames>>>,
    networks: BTreeMap<Name, watch::Sender<Arc<HostVersions>>>,
    plans_of_networks: networks::Plans,
}

/// A server's view of the committed state. Cheap to clone.
#[derive(Clone)]
pub struct View {
    state: Arc<std::sync::Mutex<State>>,
    table: watch::Sender<Arc<RoutingTable>>,
    revision: watch::Sender<u64>,
    global_revision: watch::Sender<u64>,
}

/// Whether a change wants a new routing table, and how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum News {
    None,
    Some,
    /// The first instance of an app that was asleep is ready.
    Awaited,
}

/// Which log a view follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Log {
    Region,
    Global,
}

impl View {
    /// A view that has seen nothing yet. Apps are reached at `NAME.<domain>`.
    pub fn new(domain: &str) -> Self {
        let view = Self {
            state: Arc::default(),
            table: watch::Sender::default(),
            revision: watch::Sender::default(),
            global_revision: watch::Sender::default(),
        };
        domain.clone_into(&mut view.state().world.domain);
        view
    }

    /// Says which of the fleet's regions this is: its tables name the others.
    pub fn in_region(self, region: &Name) -> Self {
        self.state().region = Some(region.clone());
        self
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Reads something of the world at the newest revision seen.
    pub fn read<T>(&self, f: impl FnOnce(&World) -> T) -> T {
        f(&self.state().world)
    }

    /// The newest revision seen; 0 before the first list.
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// The newest revision of the global group seen; 0 before the first list.
    pub fn global_revision(&self) -> watch::Receiver<u64> {
        self.global_revision.subscribe()
    }

    pub fn table(&self) -> watch::Receiver<Arc<RoutingTable>> {
        self.table.subscribe()
    }

    /// The plan of one host, now and whenever it changes.
    pub fn plan(&self, host: &Name) -> watch::Receiver<Arc<HostPlan>> {
        let mut state = self.state();
        if let Some(sender) = state.plans.get(host) {
            return sender.subscribe();
        }
        let plan = host_plan(&state.world, host, *self.revision.borrow());
        let (sender, receiver) = watch::channel(Arc::new(plan));
        state.plans.insert(host.clone(), sender);
        receiver
    }

    /// What one host is told of the projects that it runs something of, now and whenever it changes.
    pub fn names(&self, host: &Name) -> watch::Receiver<Arc<HostNames>> {
        let revision = *self.revision.borrow() + *self.global_revision.borrow();
        let mut state = self.state();
        if let Some(sender) = state.names.get(host) {
            return sender.subscribe();
        }
        let table = names::Builder::new(&state.world, state.region.as_ref(), revision).host(host);
        let (sender, receiver) = watch::channel(Arc::new(table));
        state.names.insert(host.clone(), sender);
        receiver
    }

    /// What one host is told of tenants' networks, now and whenever it changes.
    pub fn networks(&self, host: &Name) -> watch::Receiver<Arc<HostVersions>> {
        let revision = *self.revision.borrow();
        let mut state = self.state();
        if let Some(sender) = state.networks.get(host) {
            return sender.subscribe();
        }
        // What is made for it must not be older than what else is made already.
        networks::publish(&mut state, revision);
        let State { world, plans_of_networks, .. } = &mut *state;
        let message = plans_of_networks.host(world, host, revision);
        let (sender, receiver) = watch::channel(Arc::new(message));
        state.networks.insert(host.clone(), sender);
        receiver
    }

    /// What an agent that asks for its host's networks is sent, for as long as it listens.
    pub fn tell_networks(
        &self,
        request: NetworksRequest,
    ) -> impl futures::Stream<Item = NetworksMessage> + Send + use<> {
        networks::stream(self.networks(&request.host), request)
    }

    /// Follows the region's store until it is closed or `stop` is cancelled.
    pub async fn follow(&self, store: Arc<dyn Store>, stop: CancellationToken) {
        self.follow_log(Log::Region, store, stop).await;
    }

    /// Follows the global group likewise.
    pub async fn follow_global(&self, store: Arc<dyn Store>, stop: CancellationToken) {
        self.follow_log(Log::Global, store, stop).await;
    }

    async fn follow_log(&self, log: Log, store: Arc<dyn Store>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                end = self.follow_once(log, &*store) => end,
            };
            match end {
                Ok(()) => tracing::debug!("the view fell behind and lists again"),
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "the view can't follow the store; trying again"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn follow_once(&self, log: Log, store: &dyn Store) -> Result<(), StoreError> {
        let prefixes = if log == Log::Global { FLEET } else { &["o/", "t/"] };
        let (world, revision) = load(store, None, prefixes, true).await?;
        self.start_anew(log, world, revision.0);
        let mut watch = store.watch("o/".into(), key::prefix_end("t/").into(), revision).await?;
        let mut table_due: Option<tokio::time::Instant> = None;
        let mut cost = Duration::ZERO;
        let mut made = tokio::time::Instant::now();
        loop {
            let batch = tokio::select! {
                biased;
                () = async { tokio::time::sleep_until(table_due.expect("guarded")).await }, if table_due.is_some() => {
                    table_due = None;
                    let begun = tokio::time::Instant::now();
                    self.publish_table();
                    made = tokio::time::Instant::now();
                    cost = made.duration_since(begun) * REST;
                    continue;
                }
                batch = watch.next() => batch,
            };
            let Some(Ok(batch)) = batch else { return Ok(()) };
            let rest = match self.apply(log, &batch.events, batch.revision.0) {
                News::None => continue,
                News::Some => GATHER,
                News::Awaited => AWAITED,
            };
            let due = tokio::time::Instant::now().max(made + cost.clamp(rest, LONGEST));
            table_due = Some(table_due.map_or(due, |before| before.min(due)));
        }
    }

    fn start_anew(&self, log: Log, world: World, revision: u64) {
        let mut state = self.state();
        match log {
            Log::Region => {
                let old = std::mem::take(&mut state.world);
                let replanned = Some(BTreeSet::new());
                state.world = World { domain: old.domain, global: old.global, replanned, ..world };
                self.revision.send_replace(revision);
            }
            Log::Global => {
                state.world.global = Some(Box::new(world));
                self.global_revision.send_replace(revision);
            }
        }
        let hosts: Vec<Name> = state.plans.keys().cloned().collect();
        for host in hosts {
            publish_plan(&state, &host, *self.revision.borrow());
        }
        if log == Log::Region {
            networks::publish_all(&mut state, *self.revision.borrow());
        }
        drop(state);
        self.publish_table();
    }

    /// Applies one revision. Answers whether the routing table may have changed.
    fn apply(&self, log: Log, events: &[WatchEvent], revision: u64) -> News {
        match log {
            Log::Region => self.apply_region(events, revision),
            Log::Global if self.apply_global(events, revision) => News::Some,
            Log::Global => News::None,
        }
    }

    fn apply_global(&self, events: &[WatchEvent], revision: u64) -> bool {
        let mut state = self.state();
        let (mut routing, mut planned) = (false, false);
        for event in events {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            let Some(global) = state.world.global.as_deref_mut() else { break };
            let Some(kind) = FLEET.iter().find(|prefix| key.starts_with(**prefix)) else { continue };
            planned |= matches!(*kind, "o/images/" | "o/secrets/");
            routing |= matches!(*kind, "o/apps/" | "o/routes/" | "o/regions/");
            let project = key.strip_prefix("o/projects/").map(str::to_owned);
            let before = project.as_deref().map(|p| names::egress(global, p));
            match event {
                WatchEvent::Put { kv, .. } => {
                    if let Err(error) = global.take_in(kv) {
                        tracing::error!(%error, "an object of the global group can't be read; it is left out");
                    }
                }
                WatchEvent::Delete { .. } => global.leave_out(&key),
            }
            // The rest of a project, such as its use, says nothing to hosts and changes all the time.
            routing |= project.as_deref().map(|p| names::egress(global, p)) != before;
        }
        if planned {
            let hosts: Vec<Name> = state.plans.keys().cloned().collect();
            for host in hosts {
                publish_plan(&state, &host, *self.revision.borrow());
            }
        }
        self.global_revision.send_replace(revision);
        routing
    }

    fn apply_region(&self, events: &[WatchEvent], revision: u64) -> News {
        let mut state = self.state();
        let (mut routing, mut awaited) = (false, false);
        let mut ahead = BTreeSet::new();
        for event in events {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            let app = app_of_key(&key);
            let image = |world: &World| {
                let app = app.as_ref().and_then(|(project, name)| world.apps.get(Some(project), name));
                let others =
                    |app: &Object<App>| app.spec.parts().other_images().into_iter().cloned().collect::<Vec<_>>();
                app.map(|app| (app.spec.image.clone(), app.spec.runtime, others(app)))
            };
            let before = image(&state.world);
            let slept = key.starts_with("o/instances/") && !has_woken(&state.world, &key);
            let instance = key.starts_with("o/instances/") || key.starts_with("t/instances/");
            routing |=
                instance || ["o/apps/", "o/hosts/", "o/projects/", "o/routes/"].iter().any(|p| key.starts_with(p));
            match event {
                WatchEvent::Put { kv, .. } => {
                    if let Err(error) = state.world.take_in(kv) {
                        tracing::error!(%error, "an object of the store can't be read; it is left out of plans");
                    }
                }
                WatchEvent::Delete { .. } => state.world.leave_out(&key),
            }
            awaited |= slept && has_woken(&state.world, &key);
            if let Some((project, name)) = &app
                && image(&state.world) != before
                && let Some(app) = state.world.apps.get(Some(project), name)
            {
                ahead.extend(ahead::concerned(&state.world, app, state.plans.keys()));
            }
        }
        let mut hosts = state.world.replanned.replace(BTreeSet::new()).unwrap_or_default();
        let planned = |key: &[u8]| key.starts_with(b"o/images/") || key.starts_with(b"o/secrets/");
        if events.iter().any(|event| planned(event.key())) {
            hosts.extend(state.plans.keys().cloned());
        }
        hosts.extend(ahead);
        routing |= state.world.nets.changed.as_ref().is_some_and(|changed| !changed.is_empty());
        for host in hosts {
            publish_plan(&state, &host, revision);
        }
        self.revision.send_replace(revision);
        match (awaited, routing) {
            (true, _) => News::Awaited,
            (_, true) => News::Some,
            _ => News::None,
        }
    }

    fn publish_table(&self) {
        let table = {
            let mut state = self.state();
            networks::publish(&mut state, *self.revision.borrow());
            let revision = *self.revision.borrow() + *self.global_revision.borrow();
            names::publish(&state, revision);
            build_table(&state.world, state.region.as_ref(), revision)
        };
        self.table.send_if_modified(|old| {
            let same = old.services == table.services
                && old.routes == table.routes
                && old.regions == table.regions
                && old.version == table.version;
            *old = Arc::new(table);
            !same
        });
    }
}

/// What one host is to have of tenants' networks, by what a world says.
pub fn host_networks(world: &World, host: &Name, revision: u64) -> HostNetworks {
    networks::Plans::default().host(world, host, revision).whole().clone()
}

/// Whose row a key is, if it is an app's.
fn app_of_key(key: &str) -> Option<(Name, Name)> {
    place_in(key, "o/apps/")
}

fn place_in(key: &str, prefix: &str) -> Option<(Name, Name)> {
    let (project, name) = key.strip_prefix(prefix)?.split_once('/')?;
    Some((project.parse().ok()?, name.parse().ok()?))
}

/// Whether the instance of a key is ready, and of an app that may sleep.
fn has_woken(world: &World, key: &str) -> bool {
    let Some((project, name)) = place_in(key, "o/instances/") else { return false };
    let Some(instance) = world.instances.get(Some(&project), &name).filter(|i| i.status.ready) else { return false };
    world.apps.get(Some(&project), &instance.spec.app).is_some_and(may_sleep)
}

fn may_sleep(app: &Object<App>) -> bool {
    app.spec.autoscale.as_ref().is_some_and(|a| a.min_replicas == 0)
}

fn publish_plan(state: &State, host: &Name, revision: u64) {
    if let Some(sender) = state.plans.get(host) {
        let plan = host_plan(&state.world, host, revision);
        sender.send_if_modified(|old| {
            let same = old.instances == plan.instances && old.prepare == plan.prepare;
            // The same plan at a later revision is news only to those who read it next.
            *old = Arc::new(plan);
            !same
        });
    }
}

/// Everything under some prefixes at one revision.
pub(crate) async fn load(
    store: &dyn Store,
    at: Option<Revision>,
    prefixes: &[&str],
    stale: bool,
) -> Result<(World, Revision), StoreError> {
    const PAGE: usize = 2_000;
    let mut world = World::default();
    let mut revision = at;
    for prefix in prefixes {
        let end = key::prefix_end(prefix);
        let mut start = bytes::Bytes::copy_from_slice(prefix.as_bytes());
        loop {
            let mut request = RangeRequest::new(start.clone(), end.clone()).limit(PAGE);
            request.at = revision;
            if stale {
                request = request.stale();
            }
            let page = store.range(request).await?;
            revision.get_or_insert(page.revision);
            for kv in &page.kvs {
                if let Err(error) = world.take_in(kv) {
                    tracing::error!(%error, "a stored object can't be read; it is passed over");
                }
            }
            match page.kvs.last() {
                Some(last) if page.more => {
                    let mut next = last.key.to_vec();
                    next.push(0);
                    start = next.into();
                }
                _ => break,
            }
        }
    }
    Ok((world, revision.unwrap_or_default()))
}

/// What one host is to run, by what a world says.
pub fn host_plan(world: &World, host: &Name, revision: u64) -> HostPlan {
    let mut instances: Vec<InstancePlan> = world.instances_on(host).filter_map(|i| instance_plan(world, i)).collect();
    instances.sort_by_key(|i| i.uid);
    let prepare = ahead::prepare(world, host);
    HostPlan { version: PLAN_VERSION, host: host.clone(), revision, instances, prepare }
}

fn instance_plan(world: &World, i: &Object<Instance>) -> Option<InstancePlan> {
    let project = i.metadata.project.as_ref()?;
    let followed = i.spec.template.parts().all_secrets().filter(|s| s.follows());
    let newest = |name: &Name| world.secret(project, name).map(|s| (name.clone(), s.spec.version));
    let format = match i.spec.template.runtime {
        Runtime::Container => ImageFormat::Oci,
        Runtime::Function => ImageFormat::Wasm,
    };
    let (deleting, ended) = (i.metadata.deleting.is_some(), i.status.finished.is_some());
    Some(InstancePlan {
        uid: i.metadata.uid,
        name: i.metadata.name.clone(),
        project: project.clone(),
        app: i.spec.app.clone(),
        epoch: i.status.epoch,
        desired: if deleting || ended { Desired::Gone } else { Desired::Running },
        template: i.spec.template.clone(),
        image: ImagePlan { format, digest: i.spec.image_digest },
        address6: i.status.address6?,
        address4: i.status.address4?,
        nics: world
            .nics_of(i.metadata.uid)
            .into_iter()
            .filter(|n| owner(n).is_some())
            .map(|n| n.metadata.uid)
            .collect(),
        secrets: followed.filter_map(|s| newest(&s.name)).collect(),
        request_id: i.metadata.request_id.clone(),
        once: i.spec.job.is_some(),
        kept: ended && !deleting,
        numa_nodes: i.status.numa_nodes.clone(),
        part_digests: i.spec.part_digests.clone(),
    })
}

/// An app as the table needs it.
struct Exposed<'a> {
    app: &'a Object<App>,
    global: bool,
    /// The other regions that should run it.
    regions: Vec<Name>,
}

/// The apps that this region's gateways answer for: its own, its shares of global ones, and the global ones that it runs
/// nothing of.
fn exposed<'a>(world: &'a World, region: Option<&Name>) -> BTreeMap<&'a Place, Exposed<'a>> {
    let global = world.global.as_ref().map(|global| &global.apps.live);
    let elsewhere = |app: Option<&Object<App>>| -> Vec<Name> {
        let shares = app.map(|app| shares(world.fleet(), app)).unwrap_or_default();
        shares.into_iter().map(|(name, _)| name).filter(|name| Some(name) != region).collect()
    };
    let mut all: BTreeMap<&Place, Exposed<'_>> = BTreeMap::new();
    for (place, app) in global.into_iter().flatten() {
        all.insert(place, Exposed { app, global: true, regions: elsewhere(Some(app)) });
    }
    for (place, app) in &world.apps.live {
        let owner = app.metadata.owner.as_ref().filter(|_| is_child(app));
        let exposed = match owner {
            None => Exposed { app, global: false, regions: Vec::new() },
            Some(owner) => {
                let parent = global.and_then(|g| g.get(place)).filter(|g| g.metadata.uid == owner.uid);
                Exposed { app, global: true, regions: elsewhere(parent) }
            }
        };
        all.insert(place, exposed);
    }
    all
}

/// The other regions, as gateways of this one reach them.
fn other_regions(world: &World, region: Option<&Name>) -> Vec<RemoteRegion> {
    let others = world.fleet().regions.live.values().filter(|r| Some(&r.metadata.name) != region);
    let remote = |r: &Object<Region>| RemoteRegion {
        name: r.metadata.name.clone(),
        tier: r.spec.tier,
        gateways: r.status.gateways.clone(),
    };
    if region.is_some() { others.map(remote).collect() } else { Vec::new() }
}

fn build_table(world: &World, region: Option<&Name>, revision: u64) -> RoutingTable {
    let mut table = RoutingTable { version: PLAN_VERSION, revision, ..RoutingTable::default() };
    if let Some(region) = region {
        table.region = region.clone();
        table.regions = other_regions(world, Some(region));
    }
    let mut known: BTreeMap<(Uid, u16), u32> = BTreeMap::new();
    let apps = exposed(world, region);
    let mut routes: Vec<(String, String, &Exposed<'_>, Option<u16>)> = Vec::new();
    let serves = |app: &Object<App>| {
        app.spec.runtime == Runtime::Function || app.spec.ports.iter().any(|p| p.protocol != Protocol::Tcp)
    };
    // Asked first: names are dear to make where most apps serve nobody.
    for exposed in apps.values().filter(|e| serves(e.app)) {
        let names = hostnames(exposed.app, &world.domain);
        routes.extend(names.into_iter().map(|h| (h, "/".to_owned(), exposed, None)));
    }
    let mut taken = BTreeSet::new();
    for route in world.routes.live.values() {
        taken.insert((&route.spec.host, &route.spec.path));
        if let Some(exposed) = apps.get(&(route.metadata.project.clone(), route.spec.app.clone())) {
            routes.push((route.spec.host.clone(), route.spec.path.clone(), exposed, route.spec.port));
        }
    }
    // A region's own route goes before a global one.
    for route in world.global.iter().flat_map(|global| global.routes.live.values()) {
        let place = (route.metadata.project.clone(), route.spec.app.clone());
        if let Some(exposed) = apps.get(&place).filter(|e| e.global)
            && !taken.contains(&(&route.spec.host, &route.spec.path))
        {
            routes.push((route.spec.host.clone(), route.spec.path.clone(), exposed, route.spec.port));
        }
    }
    for (host, path, exposed, port) in routes {
        let app = exposed.app;
        let ports = app.spec.template().served_ports();
        let chosen = match port {
            Some(wanted) => ports.iter().find(|p| p.port == wanted),
            None => ports.iter().find(|p| p.protocol != Protocol::Tcp),
        };
        let chosen = chosen.filter(|p| p.protocol != Protocol::Tcp);
        let Some(port) = chosen else { continue };
        let id = (app.metadata.uid, port.port);
        let service = *known.entry(id).or_insert_with(|| {
            table.services.push(service(world, exposed, port));
            u32::try_from(table.services.len() - 1).expect("fewer than 2^32 services")
        });
        table.routes.push(TableRoute { host, path, service });
    }
    table
}

fn service(world: &World, exposed: &Exposed<'_>, port: &Port) -> Service {
    let app = exposed.app;
    let rollout = app.status.rollout.as_ref();
    // Whoever asks for the newer template by a header is spared one that has failed.
    let header = || app.spec.rollout.header.clone().filter(|_| rollout.is_some_and(|r| !r.failed));
    let split = rollout.and_then(|r| Some(Split { percent: r.traffic_percent?, header: header() }));
    let newest = rollout.filter(|_| split.is_some()).map(|r| r.template_hash.as_str());
    let mut backends: Vec<Backend> = world
        .instances_of(app.metadata.uid)
        .filter_map(|i| {
            let address = i.status.endpoint?.ip();
            Some(Backend {
                uid: i.metadata.uid,
                address: (address, port.port).into(),
                zone: i.status.zone.clone()?,
                epoch: i.status.epoch,
                ready: i.status.ready,
                newer: newest == Some(i.spec.template_hash.as_str()),
            })
        })
        .collect();
    backends.sort_by_key(|b| b.uid);
    let starting =
        if may_sleep(app) && !backends.iter().any(|b| b.ready) { starting(world, app, port) } else { Vec::new() };
    Service {
        project: app.metadata.project.clone().expect("apps have a project"),
        app: app.metadata.name.clone(),
        port: port.port,
        protocol: port.protocol,
        runtime: app.spec.runtime,
        backends,
        global: exposed.global,
        regions: exposed.regions.clone(),
        wakes: may_sleep(app),
        starting,
        split,
    }
}

/// How many of an app's instances that are being started are named.
const STARTING: usize = 4;

/// What is being started of an app that was asleep, where no more is asked of it than a connection: functions listen at both of
/// their addresses from the moment on that they serve.
fn starting(world: &World, app: &Object<App>, port: &Port) -> Vec<Backend> {
    let starts = |i: &&Object<Instance>| {
        let template = &i.spec.template;
        let plain = template.runtime == Runtime::Function && template.health.readiness.is_none();
        plain && i.metadata.deleting.is_none() && !i.status.ready && i.status.endpoint.is_none()
    };
    let backend = |i: &Object<Instance>| {
        Some(Backend {
            uid: i.metadata.uid,
            address: (i.status.address6?, port.port).into(),
            zone: i.status.zone.clone()?,
            epoch: i.status.epoch,
            ready: false,
            newer: false,
        })
    };
    let mut all: Vec<Backend> = world.instances_of(app.metadata.uid).filter(starts).filter_map(backend).collect();
    all.sort_by_key(|b| b.uid);
    all.truncate(STARTING);
    all
}
