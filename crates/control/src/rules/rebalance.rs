//! Moves instances to where they would be placed today, when an operator asks for it and never otherwise.
//!
//! A plan is what the scheduler itself would do: each instance in turn is taken off its host, placed anew, and stays there
//! if it stands better; all of that in a step that is dropped. It stands better where its app's constraints are met that
//! are not met here, where its app is spread more evenly, or when its host is overburdened and the other is not. What fits
//! tighter elsewhere is not moved for that.
//!
//! Carrying a plan out only marks instances. Their apps replace them as they do those of an old version: each goes when
//! another is ready, which is placed anew, on no host that the app's instances are leaving.

use nexus_model::kind::*;
use nexus_model::{Name, Object, Uid};
use serde::{Deserialize, Serialize};

use crate::step::{Dirty, Step};
use crate::surroundings::Surroundings;

/// Moves of one plan: with an event each they fit in a transaction.
pub const MOST_MOVES: u32 = 50;
/// Instances that one plan looks at; those of the fullest hosts come first.
const EXAMINED: usize = 2_000;
/// A host is overburdened from here on, in thousandths …
const OVERBURDENED: u16 = 800;
/// … and relieved by one that is not above this.
const RELIEF: u16 = 500;

/// One move of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Move {
    pub project: Name,
    pub instance: Name,
    pub uid: Uid,
    pub from: Name,
    pub to: Name,
    /// In a few words.
    pub why: String,
}

/// How an instance stands on a host without which its app is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The constraint that the host does not meet.
    pub broken: Option<&'static str>,
    /// Others of its app in the zone, where it is spread over zones, and in the rack or fault domain, likewise.
    pub in_zone: u32,
    pub about: u32,
    /// What `about` counts, for people.
    pub around: &'static str,
    /// Others of its app on the host, where it is spread at all.
    pub on_host: u32,
    /// Of the host, in thousandths.
    pub burden: u16,
}

/// Why `there` is better than `here`, if it is.
fn gain(here: &Standing, there: &Standing) -> Option<String> {
    let tier = |s: &Standing| (s.broken.is_some(), s.in_zone, s.about, s.on_host);
    if tier(there) > tier(here) {
        return None;
    }
    match here.broken {
        Some(constraint) if there.broken.is_none() => {
            return Some(format!("its {constraint} constraint is not met here"));
        }
        _ => {}
    }
    for (what, here, there) in [
        ("zone", here.in_zone, there.in_zone),
        (here.around, here.about, there.about),
        ("host", here.on_host, there.on_host),
    ] {
        if there < here {
            return Some(format!("{here} others of its app in this {what}, {there} there"));
        }
    }
    let relieved = here.burden >= OVERBURDENED && there.burden <= RELIEF;
    relieved.then(|| format!("the host is {} % burdened, {} % there", here.burden / 10, there.burden / 10))
}

/// Works a plan out. The step must be dropped: the world is as the plan would leave it.
pub fn plan(step: &mut Step<'_>, most: u32) -> Vec<Move> {
    let stays = |i: &&Object<Instance>| {
        let host = i.status.host.as_ref().and_then(|name| step.world.host(name));
        let settled = i.metadata.deleting.is_none() && i.status.ready && i.status.moving_to.is_none();
        // What runs to its end is not begun again for evenness' sake.
        settled && i.spec.job.is_none() && host.is_some_and(|h| h.status.state == HostState::Ready && !h.spec.draining)
    };
    let crowd = |i: &Object<Instance>| {
        let on_it = i.status.host.as_ref().and_then(|host| step.world.on_host.get(host));
        on_it.map_or(0, std::collections::BTreeSet::len)
    };
    let mut all: Vec<(std::cmp::Reverse<usize>, Uid)> = step
        .world
        .instances
        .live
        .values()
        .filter(stays)
        .map(|i| (std::cmp::Reverse(crowd(i)), i.metadata.uid))
        .collect();
    all.sort_unstable();
    let mut moves = Vec::new();
    for (_, uid) in all.into_iter().take(EXAMINED) {
        if moves.len() >= most as usize {
            break;
        }
        moves.extend(try_move(step, uid));
    }
    moves
}

fn try_move(step: &mut Step<'_>, uid: Uid) -> Option<Move> {
    let before = step.world.instance(uid)?.clone();
    let (from, project) = (before.status.host.clone()?, before.metadata.project.clone()?);
    let mut homeless = before.clone();
    (homeless.status.host, homeless.status.slot) = (None, None);
    homeless.status.numa_nodes.clear();
    step.put(homeless.clone());
    let around = Surroundings::of(step.world, &homeless);
    let scheduler = step.world.scheduler.as_mut().expect("only the writer plans");
    let placed = scheduler.place(&homeless, &around).ok().filter(|placed| placed.host != from && !placed.spilled);
    let better = placed.and_then(|placed| {
        let (here, there) =
            (scheduler.standing(&homeless, &around, &from)?, scheduler.standing(&homeless, &around, &placed.host)?);
        Some((placed, gain(&here, &there)?))
    });
    let Some((placed, why)) = better else {
        step.put(before);
        return None;
    };
    let name = before.metadata.name.clone();
    homeless.status.zone = step.world.host(&placed.host).map(|host| host.spec.zone.clone());
    (homeless.status.host, homeless.status.slot) = (Some(placed.host.clone()), Some(placed.slot));
    homeless.status.numa_nodes = placed.numa_nodes;
    step.put(homeless);
    Some(Move { project, instance: name, uid, from, to: placed.host, why })
}

/// Marks what a plan moves, as far as it is still there.
pub fn begin(step: &mut Step<'_>, moves: &[Move]) {
    for one in moves {
        let still = |i: &&Object<Instance>| i.metadata.deleting.is_none() && i.status.host.as_ref() == Some(&one.from);
        let Some(mut instance) = step.world.instance(one.uid).filter(still).cloned() else { continue };
        instance.status.moving_to = Some(one.to.clone());
        let (project, app) = (instance.metadata.project.clone(), instance.spec.app.clone());
        let message = format!("from host {}, where {} was found for it: {}", one.from, one.to, one.why);
        step.event(project.as_ref(), instance.owner_ref(), Severity::Normal, "Rebalanced", message);
        step.put(instance);
        step.mark(Dirty::App((project, app)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_is_for_constraints_then_evenness_then_relief() {
        let here = Standing { broken: None, in_zone: 1, about: 0, around: "rack", on_host: 1, burden: 100 };
        assert_eq!(gain(&here, &here), None);
        assert_eq!(gain(&here, &Standing { burden: 0, ..here.clone() }), None, "not for a little");
        let less = Standing { on_host: 0, ..here.clone() };
        assert_eq!(gain(&here, &less).unwrap(), "1 others of its app in this host, 0 there");
        assert_eq!(gain(&less, &here), None);
        assert_eq!(gain(&here, &Standing { in_zone: 2, on_host: 0, ..here.clone() }), None, "zones come first");
        let broken = Standing { broken: Some("label"), ..less.clone() };
        assert!(gain(&broken, &here).unwrap().contains("its label constraint"));
        assert_eq!(gain(&here, &broken), None);
        let busy = Standing { burden: 850, ..here.clone() };
        assert_eq!(gain(&busy, &here).unwrap(), "the host is 85 % burdened, 10 % there");
        assert_eq!(gain(&busy, &Standing { burden: 600, ..here }), None);
    }
}
