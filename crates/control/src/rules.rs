//! The reconcilers: each looks at one object, takes one bounded, idempotent step towards what its spec wants, and asks
//! to be called again while there is more to do.

pub mod app;
pub mod buried;
pub mod host;
pub mod instance;

use crate::step::{Dirty, Step};

/// Takes one step for whatever is dirty.
pub fn reconcile(step: &mut Step<'_>, dirty: &Dirty) {
    match dirty {
        Dirty::App(place) => app::reconcile(step, place),
        Dirty::Instance(uid) => instance::reconcile(step, *uid),
        Dirty::Buried(plural, uid) => buried::reconcile(step, plural, *uid),
        Dirty::Host(name) => host::reconcile(step, name),
    }
}
