//! Peerings: two networks reach each other when both sides say so and no address is in both.

use nexus_model::kind::*;
use nexus_model::{ApiError, Cidr, Code, FieldError, Name, Object};

use super::{network, project_of, refuse_more, refuse_used, route};
use crate::step::{Dirty, Step};
use crate::world::{Place, World};

/// The place of the network that a peering leads to.
pub fn peer(peering: &Object<Peering>) -> Place {
    let project = peering.spec.peer_project.clone().or_else(|| peering.metadata.project.clone());
    (project, peering.spec.peer_network.clone())
}

fn own(peering: &Object<Peering>) -> Place {
    (peering.metadata.project.clone(), peering.spec.network.clone())
}

/// The peerings of a network.
pub fn of<'a>(world: &'a World, network: &Place) -> impl Iterator<Item = &'a Object<Peering>> + use<'a> {
    let (project, name) = network.clone();
    let first = (project.clone(), "0".parse().expect("a well-formed name"));
    let within = world.peerings.live.range(first..).take_while(move |((p, _), _)| *p == project);
    within.map(|(_, peering)| peering).filter(move |p| p.spec.network == name)
}

/// The same way, as the other side has asked for it.
pub fn other_side<'a>(world: &'a World, peering: &Object<Peering>) -> Option<&'a Object<Peering>> {
    let (here, there) = (own(peering), peer(peering));
    of(world, &there).find(|other| peer(other) == here)
}

/// What of a peering's other network may be reached, when both sides agree; else what it waits for.
pub fn agreed(world: &World, peering: &Object<Peering>) -> Result<Vec<Cidr>, String> {
    let (here, there) = (own(peering), peer(peering));
    let of_whom = there.0.as_ref().map_or("-", Name::as_str);
    let waits = || {
        format!(
            "the other side has not asked for it: project {of_whom} makes a peering of network {} with this",
            there.1
        )
    };
    if other_side(world, peering).is_none() {
        return Err(waits());
    }
    let (Some(mine), Some(theirs)) = (world.networks.live.get(&here), world.networks.live.get(&there)) else {
        return Err(waits());
    };
    if let Some((a, b)) = overlap(&mine.spec.cidrs, &theirs.spec.cidrs) {
        return Err(format!("{a} of network {} overlaps {b} of network {}", here.1, there.1));
    }
    let wanted = if peering.spec.cidrs.is_empty() { &theirs.spec.cidrs } else { &peering.spec.cidrs };
    match wanted.iter().find(|cidr| !theirs.spec.cidrs.iter().any(|whole| whole.covers(cidr))) {
        Some(cidr) => Err(format!("{cidr} is not within network {}", there.1)),
        None => Ok(wanted.clone()),
    }
}

fn overlap<'a>(some: &'a [Cidr], others: &'a [Cidr]) -> Option<(&'a Cidr, &'a Cidr)> {
    some.iter().find_map(|a| Some((a, others.iter().find(|b| a.overlaps(b))?)))
}

pub fn admit(step: &mut Step<'_>, old: Option<&Object<Peering>>, new: &mut Object<Peering>) -> Result<(), ApiError> {
    let (world, project) = (&*step.world, project_of(new).clone());
    let mine = network(world, &project, &new.spec.network)?;
    let (here, there) = (own(new), peer(new));
    if here == there {
        let message = "a network is with itself: name another";
        return Err(ApiError::invalid(vec![FieldError::new("spec.peerNetwork", message)]));
    }
    let others = || of(world, &here).filter(|other| other.metadata.name != new.metadata.name);
    if old.is_none() {
        refuse_more(others().count(), MAX_PEERINGS, &format!("network {}", new.spec.network), "peerings")?;
    }
    if let Some(same) = others().find(|other| peer(other) == there) {
        let detail = format!("peering {} is of the same two networks: change that one", same.metadata.name);
        return Err(ApiError::new(Code::Conflict, detail));
    }
    // Of a network that has not asked for this one, nothing is told.
    let known = there.0.as_ref() == Some(&project) || other_side(world, new).is_some();
    let theirs = world.networks.live.get(&there).filter(|_| known);
    if let Some(theirs) = theirs {
        if let Some((a, b)) = overlap(&mine.spec.cidrs, &theirs.spec.cidrs) {
            let detail =
                format!("{a} of network {} overlaps {b} of network {}: peered networks can't", here.1, there.1);
            return Err(ApiError::new(Code::Conflict, detail));
        }
        for other in others() {
            let third = world.networks.live.get(&peer(other)).filter(|_| agreed(world, other).is_ok());
            if let Some((a, b)) = third.and_then(|third| overlap(&theirs.spec.cidrs, &third.spec.cidrs)) {
                let detail = format!("{a} of network {} overlaps {b} of peering {}", there.1, other.metadata.name);
                return Err(ApiError::new(Code::Conflict, detail));
            }
        }
    }
    Ok(())
}

/// Refuses CIDRs of a network that overlap those of a network that it is peered with.
pub fn check_cidrs(world: &World, network: &Object<Network>) -> Result<(), ApiError> {
    let place = (network.metadata.project.clone(), network.metadata.name.clone());
    for peering in of(world, &place).filter(|p| other_side(world, p).is_some()) {
        let Some(theirs) = world.networks.live.get(&peer(peering)) else { continue };
        if let Some((a, b)) = overlap(&network.spec.cidrs, &theirs.spec.cidrs) {
            let detail = format!("{a} overlaps {b} of peering {}", peering.metadata.name);
            return Err(ApiError::new(Code::Conflict, detail));
        }
    }
    Ok(())
}

/// Has both sides of a network's peerings look again.
pub fn mark(step: &mut Step<'_>, network: &Place) {
    let peerings: Vec<_> = of(step.world, network).cloned().collect();
    for peering in peerings {
        mark_both(step, &peering);
    }
}

pub fn mark_both(step: &mut Step<'_>, peering: &Object<Peering>) {
    let place = |p: &Object<Peering>| (p.metadata.project.clone(), p.metadata.name.clone());
    let other = other_side(step.world, peering).map(place);
    step.mark(Dirty::Peering(place(peering)));
    other.into_iter().for_each(|place| step.mark(Dirty::Peering(place)));
}

pub fn may_delete(step: &Step<'_>, old: &Object<Peering>) -> Result<(), ApiError> {
    let name = &old.metadata.name;
    let leads = |via: &RouteVia| matches!(via, RouteVia::Peering(to) if to == name);
    refuse_used("peering", name, route::leading(step.world, project_of(old), leads))
}

/// Says in a peering's status whether it is open.
pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    let Some(old) = step.world.peerings.live.get(place).cloned() else { return };
    let mut new = old.clone();
    (new.status.phase, new.status.message) = match agreed(step.world, &old) {
        Ok(_) => (PeeringPhase::Ready, String::new()),
        Err(why) => (PeeringPhase::Pending, why),
    };
    if new.status != old.status {
        step.put(new);
    }
}
