//! What the committed state means for hosts and gateways: follows this server's own copy of the log, and publishes a plan
//! per host and the routing table.
//!
//! Reads are stale on purpose: a server that can't reach a majority still tells hosts and gateways the newest that it
//! knows. Plans and tables say their revision, so a reader never goes back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::plan::{
    Backend, Desired, HostPlan, ImagePlan, InstancePlan, PLAN_VERSION, RoutingTable, Service, TableRoute,
};
use nexus_model::{Name, Object, Uid, key};
use nexus_store::{RangeRequest, Revision, Store, StoreError, WatchEvent};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::rules::app::hostnames;
use crate::world::World;

/// Changes of the routing table are gathered for so long, so that a burst makes one table.
const GATHER: Duration = Duration::from_millis(20);
/// A large table takes long to make: it is made less often, so that making it takes a tenth of one core at most …
const REST: u32 = 9;
/// … but changes never wait longer than this.
const LONGEST: Duration = Duration::from_secs(1);

/// Functions that hosts prepare ahead; of more, the newest.
const PREPARE_AT_MOST: usize = 256;

#[derive(Default)]
struct State {
    world: World,
    plans: BTreeMap<Name, watch::Sender<Arc<HostPlan>>>,
}

/// A server's view of the committed state. Cheap to clone.
#[derive(Clone)]
pub struct View {
    state: Arc<std::sync::Mutex<State>>,
    table: watch::Sender<Arc<RoutingTable>>,
    revision: watch::Sender<u64>,
}

impl View {
    /// A view that has seen nothing yet. Apps are reached at `NAME.<domain>`.
    pub fn new(domain: &str) -> Self {
        let view = Self { state: Arc::default(), table: watch::Sender::default(), revision: watch::Sender::default() };
        domain.clone_into(&mut view.state().world.domain);
        view
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

    pub fn table(&self) -> watch::Receiver<Arc<RoutingTable>> {
        self.table.subscribe()
    }

    /// The plan of one host, now and whenever it changes.
    pub fn plan(&self, host: &Name) -> watch::Receiver<Arc<HostPlan>> {
        let mut state = self.state();
        if let Some(sender) = state.plans.get(host) {
            return sender.subscribe();
        }
        let plan = build_plan(&state.world, host, *self.revision.borrow());
        let (sender, receiver) = watch::channel(Arc::new(plan));
        state.plans.insert(host.clone(), sender);
        receiver
    }

    /// Follows the store until it is closed or `stop` is cancelled.
    pub async fn follow(&self, store: Arc<dyn Store>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                end = self.follow_once(&*store) => end,
            };
            match end {
                Ok(()) => tracing::debug!("the view fell behind and lists again"),
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "the view can't follow the store; trying again"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn follow_once(&self, store: &dyn Store) -> Result<(), StoreError> {
        let (world, revision) = load(store, None, &["o/", "t/"], true).await?;
        self.start_anew(world, revision.0);
        let mut watch = store.watch("o/".into(), key::prefix_end("t/").into(), revision).await?;
        let mut table_due: Option<tokio::time::Instant> = None;
        let mut gather = GATHER;
        loop {
            let batch = tokio::select! {
                biased;
                () = async { tokio::time::sleep_until(table_due.expect("guarded")).await }, if table_due.is_some() => {
                    table_due = None;
                    let begun = tokio::time::Instant::now();
                    self.publish_table();
                    gather = (begun.elapsed() * REST).clamp(GATHER, LONGEST);
                    continue;
                }
                batch = watch.next() => batch,
            };
            let Some(Ok(batch)) = batch else { return Ok(()) };
            if self.apply(&batch.events, batch.revision.0) && table_due.is_none() {
                table_due = Some(tokio::time::Instant::now() + gather);
            }
        }
    }

    fn start_anew(&self, world: World, revision: u64) {
        let mut state = self.state();
        let domain = std::mem::take(&mut state.world.domain);
        state.world = World { domain, ..world };
        self.revision.send_replace(revision);
        let hosts: Vec<Name> = state.plans.keys().cloned().collect();
        for host in hosts {
            publish_plan(&state, &host, revision);
        }
        drop(state);
        self.publish_table();
    }

    /// Applies one revision. True if the routing table may have changed.
    fn apply(&self, events: &[WatchEvent], revision: u64) -> bool {
        let mut state = self.state();
        let mut hosts = BTreeSet::new();
        let mut routing = false;
        for event in events {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            let instance = key.starts_with("o/instances/") || key.starts_with("t/instances/");
            routing |= instance || key.starts_with("o/apps/") || key.starts_with("o/routes/");
            let host = |kv: &nexus_store::KeyValue| {
                let any: nexus_model::AnyObject = serde_json::from_slice(&kv.value).ok()?;
                any.status.get("host")?.as_str()?.parse::<Name>().ok()
            };
            match event {
                WatchEvent::Put { kv, prev } => {
                    if instance {
                        hosts.extend(host(kv));
                        hosts.extend(prev.as_ref().and_then(host));
                    }
                    if let Err(error) = state.world.take_in(kv) {
                        tracing::error!(%error, "an object of the store can't be read; it is left out of plans");
                    }
                }
                WatchEvent::Delete { prev, .. } => {
                    if instance {
                        hosts.extend(prev.as_ref().and_then(host));
                    }
                    state.world.leave_out(&key);
                }
            }
        }
        if events.iter().any(|event| event.key().starts_with(b"o/images/")) {
            hosts.extend(state.plans.keys().cloned());
        }
        for host in hosts {
            publish_plan(&state, &host, revision);
        }
        self.revision.send_replace(revision);
        routing
    }

    fn publish_table(&self) {
        let table = {
            let state = self.state();
            build_table(&state.world, *self.revision.borrow())
        };
        self.table.send_if_modified(|old| {
            let same = old.services == table.services && old.routes == table.routes && old.version == table.version;
            *old = Arc::new(table);
            !same
        });
    }
}

fn publish_plan(state: &State, host: &Name, revision: u64) {
    if let Some(sender) = state.plans.get(host) {
        let plan = build_plan(&state.world, host, revision);
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
                    return Err(StoreError::Invalid(format!("loading the region's state: {error}")));
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

fn build_plan(world: &World, host: &Name, revision: u64) -> HostPlan {
    let mut instances: Vec<InstancePlan> = world.instances_on(host).filter_map(instance_plan).collect();
    instances.sort_by_key(|i| i.uid);
    HostPlan { version: PLAN_VERSION, host: host.clone(), revision, instances, prepare: functions(world) }
}

/// The components that any host may be asked to run, the newest first.
fn functions(world: &World) -> Vec<ImagePlan> {
    let mut images: Vec<_> = world.images.live.values().filter(|i| i.spec.format == ImageFormat::Wasm).collect();
    images.sort_by_key(|i| (std::cmp::Reverse(i.metadata.created), i.metadata.uid));
    images.truncate(PREPARE_AT_MOST);
    images.into_iter().map(|i| ImagePlan { format: ImageFormat::Wasm, digest: i.spec.digest }).collect()
}

fn instance_plan(i: &Object<Instance>) -> Option<InstancePlan> {
    let format = match i.spec.template.runtime {
        Runtime::Container => ImageFormat::Oci,
        Runtime::Function => ImageFormat::Wasm,
    };
    Some(InstancePlan {
        uid: i.metadata.uid,
        name: i.metadata.name.clone(),
        project: i.metadata.project.clone()?,
        app: i.spec.app.clone(),
        epoch: i.status.epoch,
        desired: if i.metadata.deleting.is_some() { Desired::Gone } else { Desired::Running },
        template: i.spec.template.clone(),
        image: ImagePlan { format, digest: i.spec.image_digest },
        address6: i.status.address6?,
        address4: i.status.address4?,
        request_id: i.metadata.request_id.clone(),
    })
}

fn build_table(world: &World, revision: u64) -> RoutingTable {
    let mut table = RoutingTable { version: PLAN_VERSION, revision, ..RoutingTable::default() };
    let mut known: BTreeMap<(Uid, u16), u32> = BTreeMap::new();
    let mut routes: Vec<(String, String, &Object<App>, Option<u16>)> = Vec::new();
    let serves = |app: &&Object<App>| {
        app.spec.runtime == Runtime::Function || app.spec.ports.iter().any(|p| p.protocol != Protocol::Tcp)
    };
    // Asked first: names are dear to make where most apps serve nobody.
    for app in world.apps.live.values().filter(serves) {
        routes.extend(hostnames(app, &world.domain).into_iter().map(|h| (h, "/".to_owned(), app, None)));
    }
    for route in world.routes.live.values() {
        if let Some(app) = world.apps.get(route.metadata.project.as_ref(), &route.spec.app) {
            routes.push((route.spec.host.clone(), route.spec.path.clone(), app, route.spec.port));
        }
    }
    for (host, path, app, port) in routes {
        let ports = app.spec.template().served_ports();
        let chosen = match port {
            Some(wanted) => ports.iter().find(|p| p.port == wanted),
            None => ports.iter().find(|p| p.protocol != Protocol::Tcp),
        };
        let chosen = chosen.filter(|p| p.protocol != Protocol::Tcp);
        let Some(port) = chosen else { continue };
        let id = (app.metadata.uid, port.port);
        let service = *known.entry(id).or_insert_with(|| {
            table.services.push(service(world, app, port));
            u32::try_from(table.services.len() - 1).expect("fewer than 2^32 services")
        });
        table.routes.push(TableRoute { host, path, service });
    }
    table
}

fn service(world: &World, app: &Object<App>, port: &Port) -> Service {
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
            })
        })
        .collect();
    backends.sort_by_key(|b| b.uid);
    Service {
        project: app.metadata.project.clone().expect("apps have a project"),
        app: app.metadata.name.clone(),
        port: port.port,
        protocol: port.protocol,
        runtime: app.spec.runtime,
        backends,
    }
}
