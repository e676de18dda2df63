//! A region's state as typed tables: the projection of its metadata log that the writer decides on and that plans and
//! routing tables are read from.
//!
//! A table holds a kind's living objects by project and name, and its buried ones (tombstones) by uid. Every change goes
//! through [`World::set`], which keeps the indexes true; the writer's world also carries a [`Scheduler`], so that what is
//! reserved on a host is by construction the sum over the rows that say so.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use nexus_model::kind::{self, *};
use nexus_model::object::DecodeError;
use nexus_model::{AnyObject, Name, Object, Uid, key};
use nexus_store::KeyValue;
use serde::{Deserialize, Serialize};

use crate::intent::Accepted;
use crate::scheduler::Scheduler;

/// Where an object stands: project (for kinds that have one) and name.
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
    pub fn get(&self, project: Option<&Name>, name: &Name) -> Option<&Object<K>> {
        self.live.get(&(project.cloned(), name.clone()))
    }

    pub fn in_project<'a>(&'a self, project: &'a Name) -> impl Iterator<Item = &'a Object<K>> {
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

#[derive(Debug, Default)]
pub struct World {
    /// Apps are reached at `NAME.<domain>`.
    pub domain: String,
    pub organizations: Table<Organization>,
    pub projects: Table<Project>,
    pub regions: Table<Region>,
    pub zones: Table<Zone>,
    pub cells: Table<Cell>,
    pub hosts: Table<Host>,
    pub images: Table<Image>,
    pub apps: Table<App>,
    pub instances: Table<Instance>,
    pub routes: Table<Route>,
    pub events: Table<Event>,
    pub remembered: BTreeMap<String, Remembered>,
    /// When each key last changed, as the store counts.
    pub revisions: BTreeMap<String, u64>,
    /// Living instances by uid.
    pub by_uid: BTreeMap<Uid, Place>,
    /// Living instances by the uid of their app.
    pub of_app: BTreeMap<Uid, BTreeSet<Uid>>,
    /// Instances, living and buried, by the host that they were placed on.
    pub on_host: BTreeMap<Name, BTreeSet<Uid>>,
    /// Each project's events, oldest first.
    pub event_order: BTreeMap<Name, VecDeque<Name>>,
    /// Only in the writer's world.
    pub scheduler: Option<Scheduler>,
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
        for_kind!(@ $plural, $K, $body, Organization Project Region Zone Cell Host Image App Instance Route Event)
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
    Project => projects;
    Region => regions;
    Zone => zones;
    Cell => cells;
    Host => hosts, index_host;
    Image => images;
    App => apps;
    Instance => instances, index_instance;
    Route => routes;
    Event => events, index_event;
}

fn index_host(world: &mut World, _old: Option<&Object<Host>>, new: Option<&Object<Host>>) {
    if let (Some(scheduler), Some(new)) = (&mut world.scheduler, new) {
        scheduler.set_host(new);
    }
}

fn index_instance(world: &mut World, old: Option<&Object<Instance>>, new: Option<&Object<Instance>>) {
    let living = |o: &&Object<Instance>| o.metadata.deleting.is_none();
    if let Some(old) = old.filter(living) {
        world.by_uid.remove(&old.metadata.uid);
        remove_from(&mut world.of_app, &app_uid(old), old.metadata.uid);
    }
    if let Some(new) = new.filter(living) {
        let m = &new.metadata;
        world.by_uid.insert(m.uid, (m.project.clone(), m.name.clone()));
        world.of_app.entry(app_uid(new)).or_default().insert(m.uid);
    }
    let host = |o: Option<&Object<Instance>>| o.and_then(|o| o.status.host.clone());
    if host(old) != host(new) {
        if let (Some(old), Some(name)) = (old, host(old)) {
            remove_from(&mut world.on_host, &name, old.metadata.uid);
        }
        if let (Some(new), Some(name)) = (new, host(new)) {
            world.on_host.entry(name).or_default().insert(new.metadata.uid);
        }
    }
    if let Some(scheduler) = &mut world.scheduler {
        scheduler.set_instance(old, new);
    }
}

fn index_event(world: &mut World, old: Option<&Object<Event>>, new: Option<&Object<Event>>) {
    match (old, new) {
        (None, Some(new)) => {
            let project = new.metadata.project.clone().expect("events have a project");
            world.event_order.entry(project).or_default().push_back(new.metadata.name.clone());
        }
        (Some(old), None) => {
            let project = old.metadata.project.clone().expect("events have a project");
            if let Some(order) = world.event_order.get_mut(&project) {
                order.retain(|name| *name != old.metadata.name);
            }
        }
        _ => {}
    }
}

fn remove_from<K: Ord + Clone>(index: &mut BTreeMap<K, BTreeSet<Uid>>, key: &K, uid: Uid) {
    if let Some(set) = index.get_mut(key) {
        set.remove(&uid);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

/// The uid of the app that an instance belongs to.
pub fn app_uid(instance: &Object<Instance>) -> Uid {
    instance.metadata.owner.as_ref().map(|o| o.uid).unwrap_or_default()
}

/// The store key of a typed object.
pub fn key_of<K: Kind>(object: &Object<K>) -> String {
    let m = &object.metadata;
    let descriptor = kind::find(K::PLURAL).expect("every kind is listed");
    match m.deleting {
        Some(_) => key::tombstone(descriptor, m.uid),
        None => key::object(descriptor, m.project.as_ref(), &m.name),
    }
}

/// A stored value that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{key} does not hold JSON of the expected shape: {source}")]
    Json { key: String, source: serde_json::Error },
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl World {
    /// Puts, replaces or (with `None` of both) leaves: the one door through which rows change. `old` is taken out of where
    /// it stood, `new` put where it belongs.
    pub fn set<K: Stored>(&mut self, old: Option<&Object<K>>, new: Option<Object<K>>) {
        if let Some(old) = old {
            let m = &old.metadata;
            let table = K::table_mut(self);
            match m.deleting {
                Some(_) => table.buried.remove(&m.uid),
                None => table.live.remove(&(m.project.clone(), m.name.clone())),
            };
        }
        K::index(self, old, new.as_ref());
        if let Some(new) = new {
            let m = &new.metadata;
            let table = K::table_mut(self);
            match m.deleting {
                Some(_) => table.buried.insert(m.uid, new),
                None => table.live.insert((m.project.clone(), m.name.clone()), new),
            };
        }
    }

    /// Takes in one stored key, as loading and following do. Keys of other families are passed over.
    pub fn take_in(&mut self, kv: &KeyValue) -> Result<(), LoadError> {
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        let json = |source| LoadError::Json { key: key.clone(), source };
        if let Some(rest) = key.strip_prefix("i/") {
            let remembered: Remembered = serde_json::from_slice(&kv.value).map_err(json)?;
            self.remembered.insert(rest.to_owned(), remembered);
        } else if key.starts_with("o/") || key.starts_with("t/") {
            let any: AnyObject = serde_json::from_slice(&kv.value).map_err(json)?;
            let plural = key.split('/').nth(1).unwrap_or_default();
            for_kind!(plural, K => self.take_in_object::<K>(&any)?);
            self.revisions.insert(key, kv.mod_revision.0);
        }
        Ok(())
    }

    fn take_in_object<K: Stored>(&mut self, any: &AnyObject) -> Result<(), LoadError> {
        let new = Object::<K>::from_any(any)?;
        let m = &new.metadata;
        let table = K::table_mut(self);
        let old = match m.deleting {
            Some(_) => table.buried.remove(&m.uid),
            None => table.live.remove(&(m.project.clone(), m.name.clone())),
        };
        self.set(old.as_ref(), Some(new));
        Ok(())
    }

    /// Forgets one deleted key.
    pub fn leave_out(&mut self, key: &str) {
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
                    let old = K::table_mut(self).live.remove(&place);
                    self.set(old.as_ref(), None);
                });
            }
            ("t", Some(uid), None) => {
                let Ok(uid) = uid.parse::<Uid>() else { return };
                for_kind!(plural, K => {
                    let old = K::table_mut(self).buried.remove(&uid);
                    self.set(old.as_ref(), None);
                });
            }
            _ => {}
        }
    }

    pub fn instance(&self, uid: Uid) -> Option<&Object<Instance>> {
        match self.by_uid.get(&uid) {
            Some(place) => self.instances.live.get(place),
            None => self.instances.buried.get(&uid),
        }
    }

    pub fn instances_of(&self, app: Uid) -> impl Iterator<Item = &Object<Instance>> {
        self.of_app.get(&app).into_iter().flatten().filter_map(|uid| self.instance(*uid))
    }

    pub fn instances_on(&self, host: &Name) -> impl Iterator<Item = &Object<Instance>> {
        self.on_host.get(host).into_iter().flatten().filter_map(|uid| self.instance(*uid))
    }

    pub fn host(&self, name: &Name) -> Option<&Object<Host>> {
        self.hosts.get(None, name)
    }

    pub fn project(&self, name: &Name) -> Option<&Object<Project>> {
        self.projects.get(None, name)
    }
}
