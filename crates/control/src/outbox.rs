//! What a group has to tell others' servers, as indexes over its deliveries: how many each project has, which wait for a
//! change to come to its end, and the last name that was given.

use std::collections::{BTreeMap, BTreeSet};

use nexus_model::kind::{Delivery, DeliveryPhase};
use nexus_model::{Name, Object, Timestamp, Uid};

use crate::world::Place;

#[derive(Debug, Default)]
pub struct Outbox {
    /// Deliveries that wait, by the object that they wait for.
    waiting: BTreeMap<Uid, BTreeSet<Place>>,
    /// Of each project: all, and those that were taken.
    counts: BTreeMap<Name, Counts>,
    last: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub all: usize,
    pub delivered: usize,
}

impl Outbox {
    pub(crate) fn replaced(&mut self, old: Option<&Object<Delivery>>, new: Option<&Object<Delivery>>) {
        if let Some(old) = old {
            if let Some(project) = &old.metadata.project {
                let counts = self.counts.entry(project.clone()).or_default();
                counts.all = counts.all.saturating_sub(1);
                counts.delivered = counts.delivered.saturating_sub(usize::from(is_delivered(old)));
                if *counts == Counts::default() {
                    self.counts.remove(project);
                }
            }
            let uid = old.spec.regarding.uid;
            if let Some(places) = self.waiting.get_mut(&uid) {
                places.remove(&place(old));
                if places.is_empty() {
                    self.waiting.remove(&uid);
                }
            }
        }
        let Some(new) = new else { return };
        if let Some(project) = &new.metadata.project {
            let counts = self.counts.entry(project.clone()).or_default();
            counts.all += 1;
            counts.delivered += usize::from(is_delivered(new));
        }
        if new.status.phase == DeliveryPhase::Waiting {
            self.waiting.entry(new.spec.regarding.uid).or_default().insert(place(new));
        }
        if let Ok(number) = u64::from_str_radix(new.metadata.name.as_str(), 16) {
            self.last = self.last.max(number);
        }
    }

    pub fn counts(&self, project: &Name) -> Counts {
        self.counts.get(project).copied().unwrap_or_default()
    }

    /// The deliveries that wait for an object.
    pub(crate) fn waiting_for(&self, uid: Uid) -> Vec<Place> {
        // Nearly always nobody waits for anything.
        if self.waiting.is_empty() {
            return Vec::new();
        }
        self.waiting.get(&uid).into_iter().flatten().cloned().collect()
    }

    pub(crate) fn all_waiting(&self) -> Vec<Place> {
        self.waiting.values().flatten().cloned().collect()
    }

    /// A name behind all that were given: deliveries are sent in the order of their names.
    pub(crate) fn next_name(&mut self, now: Timestamp) -> Name {
        let by_time = u64::try_from(now.as_millis()).unwrap_or(0) << 16;
        self.last = (self.last + 1).max(by_time);
        format!("{:016x}", self.last).parse().expect("hexadecimal digits")
    }
}

fn is_delivered(delivery: &Object<Delivery>) -> bool {
    delivery.status.phase == DeliveryPhase::Delivered
}

fn place(delivery: &Object<Delivery>) -> Place {
    (delivery.metadata.project.clone(), delivery.metadata.name.clone())
}
