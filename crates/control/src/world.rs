//! A group's state as typed tables: the projection of its metadata log that the writer decides on and that plans and
//! routing tables are read from. A region's world carries a copy of the global one.
//!
//! A table holds a kind's living objects by project and name, and its buried ones (tombstones) by uid. Every change goes
//! through [`World::set`], which keeps the indexes true; the writer's world also carries a [`Scheduler`], so that what is
//! reserved on a host is by construction the sum over the rows that say so.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nexus_model::kind::{self, *};
use nexus_model::plan::RegionSummary;
use nexus_model::{ApiError, Code, Name, Object, Timestamp, Uid, key};
use nexus_store::KeyValue;
use serde::{Deserialize, Serialize};

use crate::audit::Trail;
use crate::intent::Accepted;
use crate::nets::{self, Nets};
use crate::outbox::Outbox;
use crate::rules::{cron, job};
use crate::scheduler::Scheduler;
use crate::step::Dirty;
use crate::traffic::Traffic;

/// Where an object stands: project or organization (for kinds that belong to one) and name.
pub type Place = (Option<Name>, Name);

#[derive(Debug)]
pub struct Table<K: Kind> {
    pub live: BTreeMap<Place, Object<K>>,
    pub buried: BTreeMap<Uid, Object<K>>,
}

impl<K: Kind> Default for Table<K> {
    fn default() -> Self {
        Self { live: BTreeMap::new(), buried: BTreeMap::new() }
    }
}

impl<K: Kind> Table<K> {
    pub fn get(&self, within: Option<&Name>, name: &Name) -> Option<&Object<K>> {
        self.live.get(&(within.cloned(), name.clone()))
    }

    /// What is in a project or organization.
    pub fn within<'a>(&'a self, project: &'a Name) -> impl Iterator<Item = &'a Object<K>> {
        let first: Name = "0".parse().expect("a well-formed name");
        self.live
            .range((Some(project.clone()), first)..)
            .take_while(move |((p, _), _)| p.as_ref() == Some(project))
            .map(|(_, object)| object)
    }

    pub fn all(&self) -> impl Iterator<Item = &Object<K>> {
        self.live.values().chain(self.buried.values())
    }
}

/// The first answer to an idempotency key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Remembered {
    /// Identifies the request that was answered.
    pub fingerprint: String,
    pub answer: Accepted,
    /// Milliseconds since the epoch.
    pub at: i64,
}

/// Which group a [`World`] shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Part {
    /// A region that is a fleet of its own: its group holds the global kinds too.
    #[default]
    Alone,
    /// The group that all regions share.
    Global,
    /// One region's group, with a copy of the global one beside it.
    Region,
}

/// What a region last said of itself to the writer of the global group.
#[derive(Debug, Clone)]
pub struct Heard {
    pub summary: RegionSummary,
    /// By the monotonic clock of the server that leads.
    pub at: Duration,
}

#[derive(Debug, Default)]
pub struct World {
    pub part: Part,
    /// Apps are reached at `NAME.<domain>`.
    pub domain: String,
    /// Beside a region's world: the global group, as far as this server has followed it. Read, never written.
    pub global: Option<Box<World>>,
    /// The revision that `global` shows; 0 before the first.
    pub global_revision: u64,
    /// The newest revision of the global group that any writer of this region has decided upon. A copy that is older
    /// knows less than the region's own rows do, so nothing is torn down by it.
    pub adopted: u64,
    /// Only in the global writer's world: what the regions say.
    pub heard: BTreeMap<Name, Heard>,
    /// Only in a regional writer's world: the global apps, by uid, whose share this region can't make, and why.
    pub blocked: BTreeMap<Uid, Blocked>,
    pub organizations: Table<Organization>,
    pub projects: Table<Project>,
    pub users: Table<User>,
    pub groups: Table<Group>,
    pub service_accounts: Table<ServiceAccount>,
    pub role_bindings: Table<RoleBinding>,
    pub policies: Table<Policy>,
    pub tokens: Table<Token>,
    pub access_keys: Table<AccessKey>,
    pub sessions: Table<Session>,
    pub credentials: Table<Credential>,
    pub identity_providers: Table<IdentityProvider>,
    pub departures: Table<Departure>,
    pub signing_keys: Table<SigningKey>,
    pub regions: Table<Region>,
    pub zones: Table<Zone>,
    pub cells: Table<Cell>,
    pub hosts: Table<Host>,
    pub images: Table<Image>,
    pub secrets: Table<Secret>,
    pub apps: Table<App>,
    pub app_revisions: Table<AppRevision>,
    pub jobs: Table<Job>,
    pub cron_jobs: Table<CronJob>,
    pub instances: Table<Instance>,
    pub routes: Table<Route>,
    pub events: Table<Event>,
    pub usages: Table<Usage>,
    pub webhooks: Table<Webhook>,
    pub deliveries: Table<Delivery>,
    pub networks: Table<Network>,
    pub subnets: Table<Subnet>,
    pub security_groups: Table<SecurityGroup>,
    pub nics: Table<Nic>,
    pub prefix_lists: Table<PrefixList>,
    pub route_tables: Table<RouteTable>,
    pub peerings: Table<Peering>,
    pub internet_gateways: Table<InternetGateway>,
    pub nat_gateways: Table<NatGateway>,
    pub address_pools: Table<AddressPool>,
    pub floating_ips: Table<FloatingIp>,
    pub load_balancers: Table<LoadBalancer>,
    pub dns_zones: Table<DnsZone>,
    /// What of networks is given out, and to whom.
    pub nets: Nets,
    /// What is to be told to others' servers.
    pub outbox: Outbox,
    /// Events of which webhooks are yet to be told.
    pub untold: BTreeSet<Place>,
    pub remembered: BTreeMap<String, Remembered>,
    /// Keys whose values can't be read, and why. Nothing is written over them; the rest of the world goes on.
    pub unreadable: BTreeMap<String, String>,
    /// Living projects by their organization.
    pub projects_of: BTreeMap<Name, BTreeSet<Name>>,
    /// When each key last changed, as the store counts.
    pub revisions: BTreeMap<String, u64>,
    /// Living instances by uid.
    pub by_uid: BTreeMap<Uid, Place>,
    /// Living instances by the uid of their app.
    pub of_app: BTreeMap<Uid, BTreeSet<Uid>>,
    /// Apps whose rollouts time, or how requests are answered, may bring on or end.
    pub rolling: BTreeSet<Place>,
    /// The revisions that are kept of each app, by their numbers.
    pub revisions_of: BTreeMap<Uid, BTreeMap<u64, Place>>,
    /// Instances, living and buried, by the host that they were placed on.
    pub on_host: BTreeMap<Name, BTreeSet<Uid>>,
    /// Hosts by their addresses and prefixes: see [`addresses_of`].
    pub host_addresses: BTreeMap<SocketAddr, Name>,
    /// Each project's events, oldest first.
    pub event_order: BTreeMap<Name, VecDeque<Name>>,
    /// Living objects that are to be looked at although nothing happens to them, by when.
    pub timers: BTreeSet<(Timestamp, Dirty)>,
    /// Only in a view's world: hosts whose plans changed since they were last taken.
    pub replanned: Option<BTreeSet<Name>>,
    /// Only in the writer's world: hosts whose last report was no news of any instance, with that report's fingerprint. As
    /// long as no row of an instance placed there changes, the same report is no news either.
    pub settled: HashMap<Name, u64>,
    /// Only in the writer's world: what gateways say of requests.
    pub traffic: Arc<Traffic>,
    /// Only in the writer's world.
    pub scheduler: Option<Scheduler>,
    /// Only in the writer's world: the right edge of the group's audit log.
    pub trail: Option<Trail>,
}

/// Why a region can't make its share of a global app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    pub place: Place,
    /// One CamelCase word.
    pub reason: &'static str,
    pub message: String,
}

/// A kind whose table is in the [`World`].
pub trait Stored: Kind {
    fn table(world: &World) -> &Table<Self>;
    fn table_mut(world: &mut World) -> &mut Table<Self>;
    /// Keeps indexes true when a row goes from `old` to `new`.
    fn index(_world: &mut World, _old: Option<&Object<Self>>, _new: Option<&Object<Self>>) {}
}

macro_rules! stored {
    ($($kind:ident => $table:ident $(, $index:path)?;)*) => {
        $(impl Stored for $kind {
            fn table(world: &World) -> &Table<Self> {
                &world.$table
            }

            fn table_mut(world: &mut World) -> &mut Table<Self> {
                &mut world.$table
            }

            $(fn index(world: &mut World, old: Option<&Object<Self>>, new: Option<&Object<Self>>) {
                $index(world, old, new);
            })?
        })*
    };
}

/// Runs generic code for the kind that a plural names; `None` for a plural that names none.
macro_rules! for_kind {
    ($plural:expr, $K:ident => $body:expr) => {
        for_kind!(@ $plural, $K, $body,
            Organization Project User Group ServiceAccount RoleBinding Policy Token AccessKey Session Credential
            IdentityProvider Departure SigningKey Region Zone Cell Host Image Secret App AppRevision Job CronJob Instance
            Route Event Usage Webhook Delivery Network Subnet SecurityGroup Nic
            PrefixList RouteTable Peering InternetGateway NatGateway AddressPool FloatingIp LoadBalancer DnsZone)
    };
    (@ $plural:expr, $K:ident, $body:expr, $($kind:ident)*) => {{
        let plural: &str = $plural;
        match plural {
            $(p if p == <nexus_model::kind::$kind as nexus_model::kind::Kind>::PLURAL => {
                type $K = nexus_model::kind::$kind;
                Some($body)
            })*
            _ => None,
        }
    }};
}
pub(crate) use for_kind;

stored! {
    Organization => organizations;
    Project => projects, index_project;
    User => users;
    Group => groups;
    ServiceAccount => service_accounts;
    RoleBinding => role_bindings;
    Policy => policies;
    Token => tokens;
    AccessKey => access_keys;
    Session => sessions;
    Credential => credentials;
    IdentityProvider => identity_providers;
    Departure => departures;
    SigningKey => signing_keys;
    Region => regions;
    Zone => zones;
    Cell => cells;
    Host => hosts, index_host;
    Image => images;
    Secret => secrets;
    App => apps, index_app;
    AppRevision => app_revisions, index_revision;
    Job => jobs, index_job;
    CronJob => cron_jobs, index_cron;
    Instance => instances, index_instance;
    Route => routes;
    Event => events, index_event;
    Usage => usages;
    Webhook => webhooks;
    Delivery => deliveries, index_delivery;
    Network => networks, nets::index_network;
    Subnet => subnets, nets::index_subnet;
    SecurityGroup => security_groups, nets::index_group;
    Nic => nics, nets::index_nic;
    PrefixList => prefix_lists, nets::index_prefix_list;
    RouteTable => route_tables, nets::index_route_table;
    Peering => peerings, nets::index_peering;
    InternetGateway => internet_gateways, nets::index_internet_gateway;
    NatGateway => nat_gateways, nets::index_nat_gateway;
    AddressPool => address_pools;
    FloatingIp => floating_ips, nets::index_floating;
    LoadBalancer => load_balancers, nets::index_balancer;
    DnsZone => dns_zones, nets::index_zone;
}

/// What no two hosts may share: their address, and both prefixes as addresses with port 0.
pub fn addresses_of(spec: &HostSpec) -> [SocketAddr; 3] {
    [spec.address, (spec.prefix6, 0).into(), (spec.prefix4, 0).into()]
}

fn index_project(world: &mut World, old: Option<&Object<Project>>, new: Option<&Object<Project>>) {
    let living = |o: &&Object<Project>| o.metadata.deleting.is_none();
    if let Some(old) = old.filter(living) {
        remove_from(&mut world.projects_of, &old.spec.organization, &old.metadata.name);
    }
    if let Some(new) = new.filter(living) {
        let its = world.projects_of.entry(new.spec.organization.clone()).or_default();
        its.insert(new.metadata.name.clone());
    }
}

fn index_app(world: &mut World, old: Option<&Object<App>>, new: Option<&Object<App>>) {
    let place = |o: &Object<App>| (o.metadata.project.clone(), o.metadata.name.clone());
    let open = |o: &&Object<App>| {
        o.metadata.deleting.is_none() && o.status.rollout.as_ref().is_some_and(|r| r.phase.is_open())
    };
    if let Some(old) = old.filter(open) {
        world.rolling.remove(&place(old));
    }
    if let Some(new) = new.filter(open) {
        world.rolling.insert(place(new));
    }
}

fn index_revision(world: &mut World, old: Option<&Object<AppRevision>>, new: Option<&Object<AppRevision>>) {
    let owner = |o: &Object<AppRevision>| o.metadata.owner.as_ref().map(|o| o.uid).unwrap_or_default();
    if let Some(old) = old
        && let Some(of) = world.revisions_of.get_mut(&owner(old))
    {
        of.remove(&old.spec.revision);
        if of.is_empty() {
            world.revisions_of.remove(&owner(old));
        }
    }
    if let Some(new) = new {
        let place = (new.metadata.project.clone(), new.metadata.name.clone());
        world.revisions_of.entry(owner(new)).or_default().insert(new.spec.revision, place);
    }
}

fn index_host(world: &mut World, old: Option<&Object<Host>>, new: Option<&Object<Host>>) {
    let spec = |o: Option<&Object<Host>>| o.map(|o| addresses_of(&o.spec));
    if spec(old) != spec(new) {
        if let Some(old) = old {
            for address in addresses_of(&old.spec) {
                if world.host_addresses.get(&address) == Some(&old.metadata.name) {
                    world.host_addresses.remove(&address);
                }
            }
        }
        if let Some(new) = new {
            let name = &new.metadata.name;
            world.host_addresses.extend(addresses_of(&new.spec).map(|address| (address, name.clone())));
        }
    }
    nets::index_host(world, old, new);
    if let (Some(scheduler), Some(new)) = (&mut world.scheduler, new) {
        scheduler.set_host(new);
    }
    if let (Some(old), None) = (old, new) {
        world.settled.remove(&old.metadata.name);
    }
}

fn index_instance(world: &mut World, old: Option<&Object<Instance>>, new: Option<&Object<Instance>>) {
    let living = |o: &&Object<Instance>| o.metadata.deleting.is_none();
    if let Some(old) = old.filter(living) {
        world.by_uid.remove(&old.metadata.uid);
        remove_from(&mut world.of_app, &app_uid(old), &old.metadata.uid);
    }
    if let Some(new) = new.filter(living) {
        let m = &new.metadata;
        world.by_uid.insert(m.uid, (m.project.clone(), m.name.clone()));
        world.of_app.entry(app_uid(new)).or_default().insert(m.uid);
    }
    fn host(o: Option<&Object<Instance>>) -> Option<&Name> {
        o.and_then(|o| o.status.host.as_ref())
    }
    if host(old) != host(new) {
        if let (Some(old), Some(name)) = (old, host(old)) {
            remove_from(&mut world.on_host, name, &old.metadata.uid);
        }
        if let (Some(new), Some(name)) = (new, host(new)) {
            world.on_host.entry(name.clone()).or_default().insert(new.metadata.uid);
        }
    }
    if !world.settled.is_empty() {
        for name in host(old).into_iter().chain(host(new)) {
            world.settled.remove(name);
        }
    }
    if let Some(hosts) = &mut world.replanned
        && old.map(for_plan) != new.map(for_plan)
    {
        hosts.extend(host(old).into_iter().chain(host(new)).cloned());
    }
    nets::index_instance(world, old, new);
    if let Some(scheduler) = &mut world.scheduler {
        scheduler.set_instance(old, new);
    }
}

/// The part of an instance's row that its host's plan depends on and that can change.
fn for_plan(i: &Object<Instance>) -> impl PartialEq + use<'_> {
    let s = &i.status;
    (s.host.as_ref(), s.epoch, s.address6, s.address4, i.metadata.deleting.is_some(), s.finished.is_some())
}

fn index_job(world: &mut World, old: Option<&Object<Job>>, new: Option<&Object<Job>>) {
    let dirty = |o: &Object<Job>| Dirty::Job((o.metadata.project.clone(), o.metadata.name.clone()));
    set_timer(world, old, new, job::due, dirty);
}

fn index_cron(world: &mut World, old: Option<&Object<CronJob>>, new: Option<&Object<CronJob>>) {
    let dirty = |o: &Object<CronJob>| Dirty::Cron((o.metadata.project.clone(), o.metadata.name.clone()));
    set_timer(world, old, new, cron::due, dirty);
}

fn set_timer<K: Kind>(
    world: &mut World,
    old: Option<&Object<K>>,
    new: Option<&Object<K>>,
    due: impl Fn(&Object<K>) -> Option<Timestamp>,
    dirty: impl Fn(&Object<K>) -> Dirty,
) {
    let timer = |o: &Object<K>| Some((due(o).filter(|_| o.metadata.deleting.is_none())?, dirty(o)));
    if let Some(timer) = old.and_then(timer) {
        world.timers.remove(&timer);
    }
    if let Some(timer) = new.and_then(timer) {
        world.timers.insert(timer);
    }
}

fn index_delivery(world: &mut World, old: Option<&Object<Delivery>>, new: Option<&Object<Delivery>>) {
    world.outbox.replaced(old, new);
}

fn index_event(world: &mut World, old: Option<&Object<Event>>, new: Option<&Object<Event>>) {
    if let Some(event) = new.or(old) {
        let place = (event.metadata.project.clone(), event.metadata.name.clone());
        match new.is_some_and(|new| new.spec.untold) {
            true => drop(world.untold.insert(place)),
            false => drop(world.untold.remove(&place)),
        }
    }
    match (old, new) {
        (None, Some(new)) => {
            let project = new.metadata.project.clone().expect("events have a project");
            world.event_order.entry(project).or_default().push_back(new.metadata.name.clone());
        }
        (Some(old), None) => {
            let project = old.metadata.project.clone().expect("events have a project");
            if let Some(order) = world.event_order.get_mut(&project) {
                // Nearly always the oldest goes.
                match order.front() {
                    Some(first) if *first == old.metadata.name => drop(order.pop_front()),
                    _ => order.retain(|name| *name != old.metadata.name),
                }
            }
        }
        _ => {}
    }
}

fn remove_from<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = index.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

/// The uid of the app that an instance belongs to.
pub fn app_uid(instance: &Object<Instance>) -> Uid {
    instance.metadata.owner.as_ref().map(|o| o.uid).unwrap_or_default()
}

/// Where a row stands in its table.
#[derive(Debug, Clone)]
pub(crate) enum Seat {
    Live(Place),
    Buried(Uid),
}

impl Seat {
    pub fn of<K: Kind>(object: &Object<K>) -> Self {
        let m = &object.metadata;
        match m.deleting {
            Some(_) => Self::Buried(m.uid),
            None => Self::Live((m.within().cloned(), m.name.clone())),
        }
    }
}

/// The store key of a typed object.
pub fn key_of<K: Kind>(object: &Object<K>) -> String {
    let m = &object.metadata;
    let descriptor = kind::stored(K::PLURAL).expect("every kind is listed");
    match m.deleting {
        Some(_) => key::tombstone(descriptor, m.uid),
        None => key::object(descriptor, m.within(), &m.name),
    }
}

/// A stored value that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{key} does not hold JSON of the expected shape: {source}")]
    Json { key: String, source: serde_json::Error },
    #[error("{key} holds an object that does not belong there")]
    Misplaced { key: String },
}

impl World {
    /// Takes out what stands at `from` and puts `new` where it belongs: the one door through which rows change. Answers
    /// what was taken out.
    pub(crate) fn replace<K: Stored>(&mut self, from: &Seat, new: Option<Object<K>>) -> Option<Object<K>> {
        let table = K::table_mut(self);
        let old = match from {
            Seat::Live(place) => table.live.remove(place),
            Seat::Buried(uid) => table.buried.remove(uid),
        };
        K::index(self, old.as_ref(), new.as_ref());
        if let Some(new) = new {
            let table = K::table_mut(self);
            match Seat::of(&new) {
                Seat::Live(place) => table.live.insert(place, new),
                Seat::Buried(uid) => table.buried.insert(uid, new),
            };
        }
        old
    }

    /// Takes in one stored key, as loading and following do. Keys of other families are passed over.
    pub fn take_in(&mut self, kv: &KeyValue) -> Result<(), LoadError> {
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        let read = self.read_in(&key, kv);
        match &read {
            Ok(()) if self.unreadable.is_empty() => {}
            Ok(()) => drop(self.unreadable.remove(&key)),
            // What stood there before stays in the tables, so that hosts and gateways keep what they have.
            Err(error) => drop(self.unreadable.insert(key, error.to_string().chars().take(300).collect())),
        }
        read
    }

    fn read_in(&mut self, key: &str, kv: &KeyValue) -> Result<(), LoadError> {
        let json = |source| LoadError::Json { key: key.to_owned(), source };
        if let Some(rest) = key.strip_prefix("i/") {
            let remembered: Remembered = serde_json::from_slice(&kv.value).map_err(json)?;
            self.remembered.insert(rest.to_owned(), remembered);
        } else if key == key::ADOPTED {
            self.adopted = serde_json::from_slice(&kv.value).map_err(json)?;
        } else if key.starts_with("o/") || key.starts_with("t/") {
            let plural = key.split('/').nth(1).unwrap_or_default();
            for_kind!(plural, K => self.take_in_object::<K>(Object::<K>::from_slice(&kv.value).map_err(json)?, key)?);
            match self.revisions.get_mut(key) {
                Some(revision) => *revision = kv.mod_revision.0,
                None => drop(self.revisions.insert(key.to_owned(), kv.mod_revision.0)),
            }
        }
        Ok(())
    }

    fn take_in_object<K: Stored>(&mut self, new: Object<K>, key: &str) -> Result<(), LoadError> {
        if new.metadata.project.is_some() != matches!(K::SCOPE, Scope::Project) || key_of(&new) != key {
            return Err(LoadError::Misplaced { key: key.to_owned() });
        }
        self.replace(&Seat::of(&new), Some(new));
        Ok(())
    }

    /// Forgets one deleted key.
    pub fn leave_out(&mut self, key: &str) {
        self.unreadable.remove(key);
        self.revisions.remove(key);
        let mut parts = key.splitn(4, '/');
        let (family, plural) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        match (family, parts.next(), parts.next()) {
            ("i", _, _) => {
                self.remembered.remove(&key[2..]);
            }
            ("o", Some(project), Some(name)) => {
                let Ok(name) = name.parse::<Name>() else { return };
                let place = (project.parse().ok().filter(|_| project != "-"), name);
                for_kind!(plural, K => {
                    self.replace::<K>(&Seat::Live(place), None);
                });
            }
            ("t", Some(uid), None) => {
                let Ok(uid) = uid.parse::<Uid>() else { return };
                for_kind!(plural, K => {
                    self.replace::<K>(&Seat::Buried(uid), None);
                });
            }
            _ => {}
        }
    }

    /// Refuses a name whose key holds something that can't be read: it is evidence, and perhaps somebody's object.
    pub fn refuse_unreadable<K: Kind>(&self, within: Option<&Name>, name: &Name) -> Result<(), ApiError> {
        if self.unreadable.is_empty() {
            return Ok(());
        }
        let key = key::object(kind::stored(K::PLURAL).expect("every kind is listed"), within, name);
        match self.unreadable.get(&key) {
            None => Ok(()),
            Some(why) => {
                let detail = format!(
                    "what is stored for {} {name} can't be read: look at it with `nexus debug store get {key}`, or choose another name ({why})",
                    K::KIND
                );
                Err(ApiError::new(Code::Conflict, detail))
            }
        }
    }

    /// The audit log of the writer whose world this is.
    pub(crate) fn trail(&self) -> &Trail {
        self.trail.as_ref().expect("a core gives its world a trail")
    }

    pub(crate) fn trail_mut(&mut self) -> &mut Trail {
        self.trail.as_mut().expect("a core gives its world a trail")
    }

    pub fn instance(&self, uid: Uid) -> Option<&Object<Instance>> {
        match self.by_uid.get(&uid) {
            Some(place) => self.instances.live.get(place),
            None => self.instances.buried.get(&uid),
        }
    }

    /// What is to be looked at by `now` although nothing happens to it.
    pub fn due(&self, now: Timestamp) -> impl Iterator<Item = Dirty> + '_ {
        self.timers.iter().take_while(move |(at, _)| *at <= now).map(|(_, dirty)| dirty.clone())
    }

    pub fn instances_of(&self, app: Uid) -> impl Iterator<Item = &Object<Instance>> {
        self.of_app.get(&app).into_iter().flatten().filter_map(|uid| self.instance(*uid))
    }

    pub fn instances_on(&self, host: &Name) -> impl Iterator<Item = &Object<Instance>> {
        self.on_host.get(host).into_iter().flatten().filter_map(|uid| self.instance(*uid))
    }

    /// The world that holds the global kinds: the copy beside a region's, else this one.
    pub fn fleet(&self) -> &World {
        self.global.as_deref().unwrap_or(self)
    }

    /// Whether the copy of the global group says what is and what is not.
    pub fn knows_fleet(&self) -> bool {
        self.part != Part::Region || (self.global_revision > 0 && self.global_revision >= self.adopted)
    }

    /// The living projects of an organization.
    pub fn projects_of(&self, organization: &Name) -> impl Iterator<Item = &Name> {
        self.fleet().projects_of.get(organization).into_iter().flatten()
    }

    /// What a project uses here.
    pub fn usage(&self, project: &Name) -> Option<&Object<Usage>> {
        self.usages.get(Some(project), project)
    }

    /// The secret that an app of a project means by a name: the region's own, else that of all regions.
    pub fn secret(&self, project: &Name, name: &Name) -> Option<&Object<Secret>> {
        let own = self.secrets.get(Some(project), name);
        own.or_else(|| self.global.as_ref()?.secrets.get(Some(project), name))
    }

    pub fn host(&self, name: &Name) -> Option<&Object<Host>> {
        self.hosts.get(None, name)
    }

    pub fn project(&self, name: &Name) -> Option<&Object<Project>> {
        self.fleet().projects.get(None, name)
    }

    pub fn organization(&self, name: &Name) -> Option<&Object<Organization>> {
        self.fleet().organizations.get(None, name)
    }
}
