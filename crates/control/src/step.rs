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

use crate::rules::delivery;
use crate::world::{Blocked, Place, Remembered, Seat, Stored, World, key_of};

/// Events kept per project; the oldest go first.
const EVENTS_PER_PROJECT: usize = 2_000;

/// What the reconcilers should look at again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dirty {
    App(Place),
    /// A global app's place in a region.
    Child(Place),
    Instance(Uid),
    /// What a project has in a region.
    Usage(Name),
    /// What all regions together report of a project.
    Project(Name),
    /// A buried organization, project or app that may be erased.
    Buried(&'static str, Uid),
    Host(Name),
    /// Room may have come for instances that found none.
    Room,
    Job(Place),
    Cron(Place),
    /// Webhooks are to be told of it.
    Event(Place),
    /// A callback that waits for the end of a change.
    Delivery(Place),
    /// A NIC whose instance has come, moved or gone.
    Nic(Uid),
    /// A peering of which one side has changed.
    Peering(Place),
}

/// Store operations by key: `None` deletes.
pub type Ops = IndexMap<String, Option<Bytes>>;

/// Operations after which a step that goes over many objects leaves the rest to another step: with what one more object
/// adds, it still fits in a transaction.
const ENOUGH: usize = 60;

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

    /// Whether what else there is to do should be left to another step.
    pub fn is_long(&self) -> bool {
        self.ops.len() >= ENOUGH
    }

    /// The region whose group this is, or `global`.
    pub fn region(&self) -> &'a Name {
        self.region
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

    /// Puts a new object or replaces the one of its name.
    pub fn put<K: Stored>(&mut self, new: Object<K>) {
        let (key, seat) = (key_of(&new), Seat::of(&new));
        // Whoever gets here has not asked: better that this one step fails than that the evidence is gone.
        assert!(!self.world.unreadable.contains_key(&key), "{key} holds something that can't be read");
        self.ops.insert(key, Some(new.to_vec().into()));
        self.wake(new.metadata.uid);
        let old = self.world.replace(&seat, Some(new));
        self.undo.push(Box::new(move |world| drop(world.replace(&seat, old))));
    }

    /// Turns a living object into a tombstone: its name is free at once, its teardown goes on.
    pub fn bury<K: Stored>(&mut self, old: &Object<K>) -> Object<K> {
        let mut new = old.clone();
        new.metadata.deleting = Some(self.now);
        self.wake(old.metadata.uid);
        self.ops.insert(key_of(old), None);
        self.ops.insert(key_of(&new), Some(new.to_vec().into()));
        let (from, to) = (Seat::of(old), Seat::of(&new));
        let old = self.world.replace(&from, Some(new.clone()));
        self.undo.push(Box::new(move |world| drop(world.replace(&to, old))));
        new
    }

    /// Removes an object, living or buried, for good.
    pub fn erase<K: Stored>(&mut self, old: &Object<K>) {
        self.ops.insert(key_of(old), None);
        self.wake(old.metadata.uid);
        let seat = Seat::of(old);
        let old = self.world.replace::<K>(&seat, None);
        self.undo.push(Box::new(move |world| drop(world.replace(&seat, old))));
    }

    /// Has those look who wait for a change of an object.
    fn wake(&mut self, uid: Uid) {
        self.dirty.extend(self.world.outbox.waiting_for(uid).into_iter().map(Dirty::Delivery));
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
            self.tell(&project, event);
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
            untold: false,
        };
        self.tell(&project, Object::<Event>::new(metadata, spec));
        let order = self.world.event_order.get(&project);
        if let Some(oldest) = order.filter(|o| o.len() > EVENTS_PER_PROJECT).and_then(|o| o.front()).cloned()
            && let Some(event) = self.world.events.get(Some(&project), &oldest).cloned()
        {
            self.erase(&event);
        }
    }

    /// Puts an event, for webhooks too.
    fn tell(&mut self, project: &Name, mut event: Object<Event>) {
        event.spec.untold |= delivery::is_wanted(self.world, project, &event.spec);
        if event.spec.untold {
            self.mark(Dirty::Event((Some(project.clone()), event.metadata.name.clone())));
        }
        self.put(event);
    }

    /// The store's key and revision of an object, for preconditions. `None` while a change of it is not yet committed.
    pub fn committed_revision<K: Stored>(&self, object: &Object<K>) -> Option<u64> {
        let key = key_of(object);
        if self.ops.contains_key(&key) { None } else { self.world.revisions.get(&key).copied() }
    }

    /// Forgets at which revision a row was committed last: what hosts say of that one is no news of what it is now.
    pub(crate) fn unsettle<K: Stored>(&mut self, object: &Object<K>) {
        let key = key_of(object);
        if let Some(revision) = self.world.revisions.remove(&key) {
            self.undo.push(Box::new(move |world| {
                world.revisions.insert(key, revision);
            }));
        }
    }

    /// Notes that this region can't make its share of the global app at a place, or that nothing is in its way.
    pub fn block(&mut self, place: &Place, now: Option<(Uid, Blocked)>) {
        let old: Vec<_> = self.world.blocked.iter().filter(|(_, b)| b.place == *place).map(|(uid, _)| *uid).collect();
        let old: Vec<_> = old.into_iter().filter_map(|uid| self.world.blocked.remove_entry(&uid)).collect();
        let new = now.as_ref().map(|(uid, _)| *uid);
        self.world.blocked.extend(now);
        if !old.is_empty() || new.is_some() {
            self.undo.push(Box::new(move |world| {
                new.iter().for_each(|uid| drop(world.blocked.remove(uid)));
                world.blocked.extend(old);
            }));
        }
    }

    /// Sets or deletes a row that is in no table.
    pub(crate) fn set(&mut self, key: String, value: Option<Bytes>) {
        self.ops.insert(key, value);
    }

    /// Has something done if the step is dropped, before what was noted earlier.
    pub(crate) fn undo(&mut self, undo: impl FnOnce(&mut World) + Send + 'static) {
        self.undo.push(Box::new(undo));
    }

    pub(crate) fn rng(&self) -> &'a dyn Rng {
        self.rng
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
    kind::stored(K::PLURAL).expect("every kind is listed")
}

/// The key of an object in any shape.
pub fn any_key(object: &AnyObject) -> Option<String> {
    kind::stored(&object.kind).map(|d| key::of(d, object))
}
