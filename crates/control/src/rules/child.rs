//! A region's share of global apps: for each of them that this region should run, one app of the same project and name,
//! owned by it. Users change the global app; what an app of their own in this region has the name of stays as it is, and
//! the global app says that it is in the way.

use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Name, Object};

use crate::rules::app;
use crate::rules::usage::{charge, charge_app, recharge};
use crate::step::{Dirty, Step};
use crate::world::{Blocked, Part, Place, World};

/// Whether an app is a region's share of a global one.
pub fn is_child(app: &Object<App>) -> bool {
    app.metadata.owner.as_ref().is_some_and(|o| o.kind == App::KIND)
}

/// The regions that should run a global app, in order, with each one's share of its replicas.
pub fn shares(fleet: &World, app: &Object<App>) -> Vec<(Name, u32)> {
    shares_of(fleet, app, app.spec.replicas)
}

/// Shares something out over the regions of a global app: evenly, the first by name take what is left over, and where there is
/// anything at all each gets one at least.
fn shares_of(fleet: &World, app: &Object<App>, total: u32) -> Vec<(Name, u32)> {
    let named = &app.spec.regions;
    let all = fleet.regions.live.keys().map(|(_, name)| name);
    let regions: Vec<&Name> = all.filter(|name| named.is_empty() || named.contains(name)).collect();
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let share = |i: usize| {
        let surplus = u32::try_from(i).is_ok_and(|i| i < total % count);
        let least = u32::from(total > 0);
        (total / count + u32::from(surplus)).max(least)
    };
    regions.into_iter().enumerate().map(|(i, name)| (name.clone(), share(i))).collect()
}

/// Refuses what only the global app may change.
pub fn refuse_users(app: &Object<App>) -> Result<(), ApiError> {
    if !is_child(app) {
        return Ok(());
    }
    let name = &app.metadata.name;
    let detail = format!("{name} is this region's share of the global app {name}: change that one, in region `global`");
    Err(ApiError::new(Code::Conflict, detail))
}

/// Brings a global app's share in this region to what it should be.
pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    if step.world.part != Part::Region || !step.world.knows_fleet() {
        return;
    }
    let fleet = step.world.fleet();
    let living = place.0.as_ref().is_some_and(|p| fleet.projects.get(None, p).is_some());
    let global = fleet.apps.live.get(place).filter(|_| living).cloned();
    let share = global.as_ref().and_then(|app| {
        let mine = shares(fleet, app).into_iter().find(|(region, _)| region == step.region());
        mine.map(|(_, replicas)| replicas)
    });
    step.block(place, None);
    let here = step.world.apps.live.get(place).cloned();
    let (Some(global), Some(replicas)) = (global, share) else {
        if let Some(child) = here.filter(is_child) {
            app::bury(step, &child);
        }
        return;
    };
    let uid = global.metadata.uid;
    let outcome = match here {
        Some(child) if is_child(&child) && child.metadata.owner.as_ref().is_some_and(|o| o.uid == uid) => {
            change(step, &global, &child, replicas)
        }
        Some(other) if is_child(&other) => {
            // Of a global app that was deleted and made anew.
            app::bury(step, &other);
            step.mark(Dirty::Child(place.clone()));
            Ok(())
        }
        Some(other) => {
            let name = &other.metadata.name;
            let message =
                format!("region {} has an app {name} of its own: delete or rename one of the two", step.region());
            step.block(place, Some((uid, Blocked { place: place.clone(), reason: "NameTaken", message })));
            Ok(())
        }
        None => make(step, &global, replicas),
    };
    if let Err(error) = outcome {
        let reason = if error.code == Code::QuotaExceeded { "QuotaExceeded" } else { "Waiting" };
        let message = format!("region {}: {}", step.region(), error.detail);
        step.block(place, Some((uid, Blocked { place: place.clone(), reason, message })));
    }
}

fn spec_of(fleet: &World, region: &Name, global: &Object<App>, replicas: u32) -> AppSpec {
    // Each region scales by itself, within its share of the bounds.
    let mine = |total: u32| {
        let all = shares_of(fleet, global, total);
        all.into_iter().find(|(name, _)| name == region).map_or(total, |(_, share)| share)
    };
    let autoscale = global.spec.autoscale.clone().map(|a| Autoscale {
        min_replicas: mine(a.min_replicas),
        max_replicas: mine(a.max_replicas),
        schedule: a.schedule.into_iter().map(|w| ScaleWindow { min_replicas: mine(w.min_replicas), ..w }).collect(),
        ..a
    });
    AppSpec { replicas, autoscale, regions: Vec::new(), ..global.spec.clone() }
}

/// Takes over from the global app what users write there. The generation is the global app's own, so that a region can
/// say which one its share is of.
fn follow(child: &mut Object<App>, global: &Object<App>, spec: AppSpec) {
    child.spec = spec;
    let (to, from) = (&mut child.metadata, &global.metadata);
    to.generation = from.generation;
    to.labels = from.labels.clone();
    to.annotations = from.annotations.clone();
    to.request_id = from.request_id.clone();
    // Its own rollout heeds what was ordered for all regions.
    let orders = |app: &Object<App>| app.status.rollout.as_ref().map(|r| r.orders).unwrap_or_default();
    if orders(child) != orders(global) {
        child.status.rollout.get_or_insert_default().orders = orders(global);
    }
}

fn change(step: &mut Step<'_>, global: &Object<App>, child: &Object<App>, replicas: u32) -> Result<(), ApiError> {
    let mut new = child.clone();
    let spec = spec_of(step.world.fleet(), step.region(), global, replicas);
    follow(&mut new, global, spec);
    if new.spec == child.spec && new.metadata == child.metadata && new.status == child.status {
        return Ok(());
    }
    let project = child.metadata.project.clone().expect("apps have a project");
    recharge(step, &project, charge_app(child), charge_app(&new))?;
    let place = (child.metadata.project.clone(), child.metadata.name.clone());
    step.put(new);
    step.mark(Dirty::App(place));
    Ok(())
}

fn make(step: &mut Step<'_>, global: &Object<App>, replicas: u32) -> Result<(), ApiError> {
    let project = global.metadata.project.clone().expect("apps have a project");
    let spec = spec_of(step.world.fleet(), step.region(), global, replicas);
    step.world.refuse_unreadable::<App>(Some(&project), &global.metadata.name)?;
    recharge(step, &project, [0; 3], charge(&spec))?;
    let mut metadata = step.new_metadata(global.metadata.name.clone(), Some(project.clone()));
    metadata.owner = Some(global.owner_ref());
    let mut child = Object::<App>::new(metadata, spec.clone());
    follow(&mut child, global, spec);
    let place = (Some(project.clone()), child.metadata.name.clone());
    step.put(child.clone());
    let message = format!("{replicas} of the global app's replicas");
    step.event(Some(&project), child.owner_ref(), Severity::Normal, "Created", message);
    step.mark(Dirty::App(place));
    Ok(())
}
