//! The reconcilers: each looks at one object, takes one bounded, idempotent step towards what its spec wants, and asks
//! to be called again while there is more to do.

pub mod app;
pub mod buried;
pub mod child;
pub mod cron;
pub mod delivery;
pub mod drain;
pub mod federation;
pub mod fleet;
pub mod history;
pub mod host;
pub mod instance;
pub mod job;
pub mod network;
pub mod order;
pub mod people;
pub mod rebalance;
pub mod rollout;
pub mod secret;
pub mod usage;

use crate::step::{Dirty, Step};
use crate::world::Part;

/// Takes one step for whatever is dirty.
pub fn reconcile(step: &mut Step<'_>, dirty: &Dirty) {
    match dirty {
        Dirty::App(place) if step.world.part == Part::Global => fleet::reconcile_app(step, place),
        Dirty::App(place) => app::reconcile(step, place),
        Dirty::Child(place) => child::reconcile(step, place),
        Dirty::Instance(uid) => instance::reconcile(step, *uid),
        Dirty::Usage(project) => {
            network::default::follow(step, project);
            usage::reconcile(step, project);
        }
        Dirty::Project(name) => fleet::add_up(step, name),
        Dirty::Buried(plural, uid) => buried::reconcile(step, plural, *uid),
        Dirty::Host(name) => host::reconcile(step, name),
        Dirty::Room => instance::wake(step),
        Dirty::Job(place) => job::reconcile(step, place),
        Dirty::Cron(place) => cron::reconcile(step, place),
        Dirty::Event(place) => delivery::fan_out(step, place),
        Dirty::Delivery(place) => delivery::reconcile(step, place),
        Dirty::Nic(uid) => network::nic::reconcile(step, *uid),
        Dirty::Peering(place) => network::peering::reconcile(step, place),
    }
}
