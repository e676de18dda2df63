//! One decision in the making: reads and changes the [`World`], and collects the store operations that say the same.
//!
//! A step is all or nothing: what it changed in the world is taken back if it is dropped without [`Step::finish`], which is
//! how a refused intent and a dry run leave no trace.

use std::collections::BTreeSet;

use bytes::Bytes;
use indexmap::IndexMap;
use nexus_env::{Rng, RngExt};
use nexus_model::kind::{self, Event, EventSpec, Severity};
use nexus_model::{AnyObject, Metadata, Name, Object, OwnerRef, RequestId, Timestamp, Uid, key};

use crate::world::{Place, Remembered, Stored, World, key_of};

/// Events kept per project; the oldest go first.
const EVENTS_PER_PROJECT: usize = 2_000;

/// What the reconcilers should look at again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dirty {
    App(Place),
    Instance(Uid),
    /// A buried organization, project or app that may be erased.
    Buried(&'static str, Uid),
    Host(Name),
}

/// Store operations by key: `None` deletes.
pub type Ops = IndexMap<String, Option<Bytes>>;

type Undo = Box<dyn FnOnce(&mut World) + Send>;

pub struct Step<'a> {
    pub world: &'a mut World,
    pub dirty: &'a mut BTreeSet<Dirty>,
    pub now: Timestamp,
    rng: &'a dyn Rng,
    region: &'a Name,
    /// The request that this step carries out, if it does one.
    pub request_id: Option<RequestId>,
    ops: Ops,
    undo: Vec<Undo>,
}

impl<'a> Step<'a> {
    pub fn new(
        world: &'a mut World,
        dirty: &'a mut BTreeSet<Dirty>,
        now: Timestamp,
        rng: &'a dyn Rng,
        region: &'a Name,
    ) -> Self {
        Self { world, dirty, now, rng, region, request_id: None, ops: Ops::new(), undo: Vec::new() }
    }

    /// Keeps what was changed, and gives out the operations to commit.
    pub fn finish(mut self) -> Ops {
        self.undo.clear();
        std::mem::take(&mut self.ops)
    }

    pub fn new_uid(&self) -> Uid {
        Uid::from_random(self.rng.bytes())
    }

    pub fn new_metadata(&self, name: Name, project: Option<Name>) -> Metadata {
        Metadata {
            uid: self.new_uid(),
            region: Some(self.region.clone()),
            created: self.now,
            request_id: self.request_id.clone(),
            ..Metadata::new(name, project)
        }
    }

    fn record<K: Stored>(&mut self, old: Option<Object<K>>, new: Option<&Object<K>>) {
        if let Some(old) = &old
            && new.is_none_or(|new| key_of(new) != key_of(old))
        {
            self.ops.insert(key_of(old), None);
        }
        if let Some(new) = new {
            let value = serde_json::to_vec(&new.to_any()).expect("objects are plain data");
            self.ops.insert(key_of(new), Some(value.into()));
        }
        let new = new.cloned();
        self.undo.push(Box::new(move |world| world.set(new.as_ref(), old)));
    }

    /// Puts a new object or replaces the one of its name.
    pub fn put<K: Stored>(&mut self, new: Object<K>) {
        let m = &new.metadata;
        let old = match m.deleting {
            Some(_) => K::table(self.world).buried.get(&m.uid).cloned(),
            None => K::table(self.world).get(m.project.as_ref(), &m.name).cloned(),
        };
        self.record(old.clone(), Some(&new));
        self.world.set(old.as_ref(), Some(new));
    }

    /// Turns a living object into a tombstone: its name is free at once, its teardown goes on.
    pub fn bury<K: Stored>(&mut self, old: &Object<K>) -> Object<K> {
        let mut new = old.clone();
        new.metadata.deleting = Some(self.now);
        self.record(Some(old.clone()), Some(&new));
        self.world.set(Some(old), Some(new.clone()));
        new
    }

    /// Removes an object, living or buried, for good.
    pub fn erase<K: Stored>(&mut self, old: &Object<K>) {
        self.record(Some(old.clone()), None);
        self.world.set(Some(old), None);
    }

    pub fn remember(&mut self, place: String, remembered: Remembered) {
        let value = serde_json::to_vec(&remembered).expect("answers are plain data");
        self.ops.insert(format!("i/{place}"), Some(value.into()));
        self.world.remembered.insert(place.clone(), remembered);
        self.undo.push(Box::new(move |world| {
            world.remembered.remove(&place);
        }));
    }

    pub fn forget(&mut self, place: &str) {
        if let Some(old) = self.world.remembered.remove(place) {
            self.ops.insert(format!("i/{place}"), None);
            let place = place.to_owned();
            self.undo.push(Box::new(move |world| {
                world.remembered.insert(place, old);
            }));
        }
    }

    /// Tells people what happened to an object. A repetition of the newest event of that object is counted.
    pub fn event(
        &mut self,
        project: Option<&Name>,
        regarding: OwnerRef,
        severity: Severity,
        reason: &str,
        message: impl Into<String>,
    ) {
        let message = message.into();
        let system = || kind::SYSTEM_PROJECT.parse().expect("a well-formed name");
        let project: Name = project.cloned().unwrap_or_else(system);
        let order = self.world.event_order.get(&project);
        let recent = order.into_iter().flat_map(|o| o.iter().rev().take(32));
        let same = recent
            .filter_map(|name| self.world.events.get(Some(&project), name))
            .find(|e| e.spec.regarding.uid == regarding.uid)
            .filter(|e| e.spec.reason == reason && e.spec.message == message)
            .cloned();
        if let Some(mut event) = same {
            event.spec.count += 1;
            event.spec.last = self.now;
            self.put(event);
            return;
        }
        let stem: String = regarding.name.as_str().chars().take(48).collect();
        let suffix: [u8; 6] = self.rng.bytes();
        let name: String = suffix.iter().map(|b| format!("{b:02x}")).collect();
        let name: Name = format!("{stem}-{name}").parse().expect("a name and hexadecimal digits");
        let metadata = self.new_metadata(name, Some(project.clone()));
        let spec = EventSpec {
            regarding,
            severity,
            reason: reason.to_owned(),
            message,
            count: 1,
            first: self.now,
            last: self.now,
            request_id: self.request_id.clone(),
        };
        self.put(Object::<Event>::new(metadata, spec));
        let order = self.world.event_order.get(&project);
        if let Some(oldest) = order.filter(|o| o.len() > EVENTS_PER_PROJECT).and_then(|o| o.front()).cloned()
            && let Some(event) = self.world.events.get(Some(&project), &oldest).cloned()
        {
            self.erase(&event);
        }
    }

    /// The store's key and revision of an object, for preconditions. `None` while a change of it is not yet committed.
    pub fn committed_revision<K: Stored>(&self, object: &Object<K>) -> Option<u64> {
        let key = key_of(object);
        if self.ops.contains_key(&key) { None } else { self.world.revisions.get(&key).copied() }
    }

    pub fn mark(&mut self, dirty: Dirty) {
        self.dirty.insert(dirty);
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        for undo in self.undo.drain(..).rev() {
            undo(self.world);
        }
    }
}

/// The kind's descriptor of a typed kind.
pub fn descriptor<K: Stored>() -> &'static kind::KindDescriptor {
    kind::find(K::PLURAL).expect("every kind is listed")
}

/// The key of an object in any shape.
pub fn any_key(object: &AnyObject) -> Option<String> {
    kind::find(&object.kind).map(|d| key::of(d, object))
}
