//! What an instance's constraints mean here and now: which apps they name, what other apps of the project say of its own,
//! and which hosts it is to leave. Read from the world before the scheduler is asked, because names are the world's and
//! places the scheduler's.

use nexus_model::kind::{Constraint, Instance, Spread};
use nexus_model::{Name, Object, Uid};

use crate::rules::network::nic;
use crate::world::{World, app_uid};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    pub spread: Spread,
    /// Evenness is demanded, not only preferred.
    pub even: bool,
    /// Only these zones.
    pub zones: Option<Vec<Name>>,
    pub labels: Vec<(String, String)>,
    /// The round trip must be below so many microseconds.
    pub below_us: Option<u32>,
    /// The apps that it is to be with, by name, and as far as they are there.
    pub with: Vec<(Name, Option<Uid>)>,
    /// Those that it is not to be with, by its own words or by theirs.
    pub without: Vec<(Name, Uid)>,
    /// Hosts that instances of its app are being moved away from.
    pub leaving: Vec<Name>,
}

impl Surroundings {
    pub fn of(world: &World, instance: &Object<Instance>) -> Self {
        let (own, project) = (&instance.spec.app, instance.metadata.project.as_ref());
        let app = |name: &Name| world.apps.get(project, name).map(|app| app.metadata.uid);
        let its_app = world.apps.get(project, own).filter(|_| instance.spec.job.is_none());
        let spread = its_app.map(|app| app.spec.spread).unwrap_or_default();
        let mut here = Self { spread, ..Self::default() };
        for constraint in instance.spec.template.constraints.iter() {
            match constraint {
                Constraint::Latency(us) => here.below_us = Some(here.below_us.map_or(*us, |least| least.min(*us))),
                Constraint::Zone(zones) => match &mut here.zones {
                    Some(both) => both.retain(|zone| zones.contains(zone)),
                    none => *none = Some(zones.clone()),
                },
                Constraint::Label(key, value) => here.labels.push((key.clone(), value.clone())),
                // The last one counts.
                Constraint::Spread(spread) => (here.spread, here.even) = (*spread, true),
                Constraint::With(name) => here.with.push((name.clone(), app(name))),
                Constraint::NotWith(name) => here.without.extend(app(name).map(|uid| (name.clone(), uid))),
                // Of the instance alone: the scheduler reads it there.
                Constraint::Numa(_) => {}
            }
        }
        for zone in nic::zones(world, project, &instance.spec.template.nics) {
            match &mut here.zones {
                Some(both) => both.retain(|other| other == zone),
                none => *none = Some(vec![zone.clone()]),
            }
        }
        for other in project.into_iter().flat_map(|project| world.apps.within(project)) {
            let mut company = other.spec.constraints.company();
            if other.metadata.name != *own && company.any(|(name, with)| name == own && !with) {
                here.without.push((other.metadata.name.clone(), other.metadata.uid));
            }
        }
        let moving = world.instances_of(app_uid(instance)).filter(|i| i.status.moving_to.is_some());
        here.leaving = moving.filter_map(|i| i.status.host.clone()).collect();
        here.leaving.sort();
        here.leaving.dedup();
        here
    }
}

/// Whether an instance that waits may find a place because one of `app` has found one.
pub fn waits_for_app(instance: &Object<Instance>, project: Option<&Name>, app: &Name) -> bool {
    instance.metadata.project.as_ref() == project
        && instance.spec.template.constraints.company().any(|(name, with)| with && name == app)
}

/// Whether an instance that waits may find a place because a round trip was measured.
pub fn waits_for_latency(instance: &Object<Instance>) -> bool {
    instance.spec.template.constraints.iter().any(|c| matches!(c, Constraint::Latency(_)))
}
