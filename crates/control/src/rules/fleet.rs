//! The global group's side of the regions: registers those that report, says which are silent, adds up what they use, and
//! tells how far global apps are. What the regions say lives in memory; only what it changes is committed.
//!
//! A buried project or global app is erased when every region that exists has looked at the global group since the
//! burial and holds nothing of it any more. A region that is lost keeps such tombstones waiting; an operator who knows
//! that it will not come back deletes the region.

use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::plan::{ChildSummary, RegionSummary};
use nexus_model::{Name, Object, Uid};

use crate::rules::app::{content, hostnames, template_hash};
use crate::rules::child::shares;
use crate::rules::history;
use crate::rules::usage::{amounts, quota_use};
use crate::step::{Dirty, Step};
use crate::world::{Heard, Part, Place, Stored, World, key_of};

/// A region that is silent for so long is said to be.
pub const SILENT_AFTER: Duration = Duration::from_secs(5);
/// `status.heard` of a region that reports is written so often.
const HEARD_EVERY: Duration = Duration::from_secs(30);
/// A copy of the global group that is older than this is worth a commit.
const STALE: u64 = 5_000;

/// Takes in what a region says of itself; the first time, registers it.
pub fn hear(step: &mut Step<'_>, summary: &RegionSummary, now: Duration) -> Result<(), String> {
    if summary.region == GLOBAL {
        return Err(format!("`{GLOBAL}` is not the name of a region"));
    }
    let before = step.world.heard.get(&summary.region).cloned();
    if let Some(before) = &before
        && before.summary.epoch > summary.epoch
        && now.saturating_sub(before.at) < SILENT_AFTER
    {
        return Err("another server of the region leads by now".to_owned());
    }
    step.world.heard.insert(summary.region.clone(), Heard { summary: summary.clone(), at: now });
    register(step, summary);
    follow_up(step, before.as_ref().map(|b| &b.summary), summary);
    Ok(())
}

fn register(step: &mut Step<'_>, summary: &RegionSummary) {
    let known = step.world.regions.get(None, &summary.region).cloned();
    let mut region = known.clone().unwrap_or_else(|| {
        let metadata = step.new_metadata(summary.region.clone(), None);
        Object::<Region>::new(metadata, RegionSpec { tier: summary.tier })
    });
    if region.spec.tier != summary.tier {
        region.spec.tier = summary.tier;
        region.metadata.generation += 1;
    }
    let s = &mut region.status;
    s.servers.clone_from(&summary.servers);
    s.gateways.clone_from(&summary.gateways);
    set_condition(&mut s.conditions, "Ready", ConditionStatus::True, "Reporting", "its servers report", step.now);
    let due = s.heard.is_none_or(|heard| step.now.since(heard) >= HEARD_EVERY);
    let crossed = (s.stale_ms > STALE) != (summary.stale_ms > STALE);
    let changed = known.as_ref().is_none_or(|k| k.status != *s || k.spec != region.spec);
    if !(due || crossed || changed) {
        return;
    }
    s.heard = Some(step.now);
    s.stale_ms = summary.stale_ms;
    step.put(region.clone());
    match known {
        None => {
            step.event(None, region.owner_ref(), Severity::Normal, "Joined", "the fleet has a new region");
            everywhere(step);
        }
        Some(old) if ready(&old) == Some(ConditionStatus::False) => {
            step.event(None, region.owner_ref(), Severity::Normal, "Reporting", "its servers report again");
            everywhere(step);
        }
        Some(_) => {}
    }
}

fn ready(region: &Object<Region>) -> Option<ConditionStatus> {
    region.status.conditions.iter().find(|c| c.kind == "Ready").map(|c| c.status)
}

/// Everything that depends on which regions there are.
pub fn everywhere(step: &mut Step<'_>) {
    let apps: Vec<_> = step.world.apps.live.keys().cloned().map(Dirty::App).collect();
    let projects: Vec<_> = step.world.projects.live.keys().map(|(_, name)| Dirty::Project(name.clone())).collect();
    apps.into_iter().chain(projects).for_each(|dirty| step.mark(dirty));
    look_at_the_buried(step);
}

fn look_at_the_buried(step: &mut Step<'_>) {
    let apps: Vec<Uid> = step.world.apps.buried.keys().copied().collect();
    let projects: Vec<Uid> = step.world.projects.buried.keys().copied().collect();
    apps.into_iter().for_each(|uid| step.mark(Dirty::Buried(App::PLURAL, uid)));
    projects.into_iter().for_each(|uid| step.mark(Dirty::Buried(Project::PLURAL, uid)));
}

/// Marks what a region's new summary bears upon.
fn follow_up(step: &mut Step<'_>, before: Option<&RegionSummary>, now: &RegionSummary) {
    if before.is_none_or(|b| b.projects != now.projects) {
        let names = before.into_iter().flat_map(|b| &b.projects).chain(&now.projects).map(|p| p.name.clone());
        let changed: Vec<Name> = names
            .filter(|name| {
                let used = |s: &RegionSummary| s.projects.iter().find(|p| p.name == *name).map(|p| p.used);
                before.and_then(used) != used(now)
            })
            .collect();
        changed.into_iter().for_each(|name| step.mark(Dirty::Project(name)));
    }
    if before.is_none_or(|b| b.apps != now.apps) {
        let places: Vec<Place> = step.world.apps.live.keys().cloned().collect();
        places.into_iter().for_each(|place| step.mark(Dirty::App(place)));
    }
    if before.is_none_or(|b| b.looked != now.looked || b.projects != now.projects || b.apps != now.apps) {
        look_at_the_buried(step);
    }
}

/// Says of regions that fell silent that they did. `since`: when this server began to listen.
pub fn judge(step: &mut Step<'_>, since: Duration, now: Duration) {
    let regions: Vec<_> = step.world.regions.live.values().cloned().collect();
    for mut region in regions {
        let name = region.metadata.name.clone();
        let last = step.world.heard.get(&name).map_or(since, |h| h.at.max(since));
        if now.saturating_sub(last) < SILENT_AFTER || ready(&region) == Some(ConditionStatus::False) {
            continue;
        }
        let message = "its servers can't be heard: they go on with what they know, or are down";
        let conditions = &mut region.status.conditions;
        set_condition(conditions, "Ready", ConditionStatus::False, "Silent", message, step.now);
        step.put(region.clone());
        step.event(None, region.owner_ref(), Severity::Warning, "Silent", message);
        let apps: Vec<_> = step.world.apps.live.keys().cloned().collect();
        apps.into_iter().for_each(|place| step.mark(Dirty::App(place)));
    }
}

/// Whether every region has looked at the global group since an object was buried there, and none holds anything of it.
pub fn confirmed<K: Stored>(world: &World, buried: &Object<K>, holds: impl Fn(&RegionSummary) -> bool) -> bool {
    if world.part != Part::Global {
        return true;
    }
    let Some(at) = world.revisions.get(&key_of(buried)) else { return false };
    world
        .regions
        .live
        .keys()
        .all(|(_, region)| world.heard.get(region).is_some_and(|h| h.summary.looked >= *at && !holds(&h.summary)))
}

/// Adds up what the regions use of a project.
pub fn add_up(step: &mut Step<'_>, name: &Name) {
    let Some(mut project) = step.world.projects.get(None, name).cloned() else { return };
    let of = |s: &RegionSummary| s.projects.iter().find(|p| p.uid == project.metadata.uid).map(|p| amounts(&p.used));
    let member = |h: &&Heard| step.world.regions.get(None, &h.summary.region).is_some();
    let sum =
        step.world.heard.values().filter(member).filter_map(|h| of(&h.summary)).fold([0u64; 3], |mut sum, part| {
            sum.iter_mut().zip(part).for_each(|(total, part)| *total = total.saturating_add(part));
            sum
        });
    let used = quota_use(sum);
    if project.status.used != used {
        project.status.used = used;
        step.put(project);
    }
}

fn part_of<'a>(world: &'a World, region: &Name, app: Uid) -> Option<&'a ChildSummary> {
    world.heard.get(region)?.summary.apps.iter().find(|a| a.uid == app)
}

/// Writes a global app's status from what its regions say.
pub fn reconcile_app(step: &mut Step<'_>, place: &Place) {
    let Some(app) = step.world.apps.live.get(place).cloned() else { return };
    let mut new = app.clone();
    let s = &mut new.status;
    let mut regions = Vec::new();
    let mut troubles: Vec<(&'static str, String)> = Vec::new();
    let mut behind = 0;
    for (region, desired_replicas) in shares(step.world, &app) {
        let silent = step.world.regions.get(None, &region).and_then(ready) == Some(ConditionStatus::False);
        let mut part = AppRegion {
            region: region.clone(),
            desired_replicas,
            replicas: 0,
            ready_replicas: 0,
            updated_replicas: 0,
            rollout: None,
            message: String::new(),
        };
        let told = part_of(step.world, &region, app.metadata.uid);
        // How many a region runs within its share of the bounds is its own decision.
        let own = told.filter(|_| app.spec.autoscale.is_some()).map(|t| t.desired_replicas);
        let desired_replicas = own.unwrap_or(desired_replicas);
        part.desired_replicas = desired_replicas;
        if let Some(told) = told {
            part.replicas = told.replicas;
            part.ready_replicas = told.ready_replicas;
            // What it says of a template is of the one that it knows.
            if told.generation == app.metadata.generation {
                (part.updated_replicas, part.rollout) = (told.updated_replicas, told.rollout);
            }
            part.message.clone_from(&told.message);
        }
        let current = told.is_some_and(|t| {
            t.generation == app.metadata.generation
                && t.desired_replicas == desired_replicas
                && t.updated_replicas == desired_replicas
                && t.ready_replicas >= desired_replicas
        });
        if silent {
            part.message = "the region is silent; this is what it last said".to_owned();
            troubles.push(("RegionSilent", format!("region {region} is silent")));
        } else if let Some(told) = told.filter(|t| !t.reason.is_empty()) {
            let reason = if told.reason == "NameTaken" { "NameTaken" } else { "Blocked" };
            troubles.push((reason, told.message.clone()));
        }
        behind += usize::from(!current);
        regions.push(part);
    }
    let (spec, project) = (&app.spec, place.0.as_ref());
    if let Ok(content) = content(step.world, project, spec.parts(), spec.image_digest, &spec.part_digests) {
        // Versions of secrets are each region's own affair.
        let template = app.spec.template();
        let hash = template_hash(&template, &content);
        let revision = history::note(step, &app, &hash, &template, &content);
        history::prune(step, &app, &[&hash]);
        let rollout = s.rollout.get_or_insert_default();
        (rollout.revision, rollout.template_hash) = (revision, hash);
        // The regions follow them from here.
        rollout.heeded = rollout.orders;
    }
    let failed = |r: &AppRegion| matches!(r.rollout, Some(RolloutPhase::RolledBack | RolloutPhase::RollingBack));
    let sum = |f: fn(&AppRegion) -> u32| regions.iter().map(f).fold(0u32, u32::saturating_add);
    s.observed_generation = app.metadata.generation;
    s.desired_replicas = sum(|r| r.desired_replicas);
    s.replicas = sum(|r| r.replicas);
    s.ready_replicas = sum(|r| r.ready_replicas);
    s.updated_replicas = sum(|r| r.updated_replicas);
    s.hostnames = hostnames(&app, &step.world.domain);
    let settled = behind == 0 && troubles.is_empty() && !regions.is_empty();
    s.phase = match (s.desired_replicas, s.ready_replicas) {
        (0, _) if s.replicas == 0 && settled => AppPhase::Stopped,
        _ if settled => AppPhase::Ready,
        _ if !regions.is_empty() && regions.iter().all(failed) => AppPhase::RolledBack,
        (_, 0) => AppPhase::Pending,
        _ => AppPhase::Progressing,
    };
    let (status, reason, message) = match troubles.first() {
        Some((reason, first)) => {
            let more = if troubles.len() > 1 { format!(" (and {} more)", troubles.len() - 1) } else { String::new() };
            (ConditionStatus::False, *reason, format!("{first}{more}"))
        }
        None if regions.is_empty() => {
            let message = "none of its regions is part of the fleet: see `nexus get regions`".to_owned();
            (ConditionStatus::False, "NoRegion", message)
        }
        None if settled => {
            let message = format!("{} replicas are ready in {} regions", s.ready_replicas, regions.len());
            (ConditionStatus::True, "AllReady", message)
        }
        None => {
            let why = regions.iter().find(|r| !r.message.is_empty()).map(|r| format!(": {}: {}", r.region, r.message));
            let why = why.unwrap_or_default();
            let message = format!("{} of {} replicas are ready{why}", s.ready_replicas, s.desired_replicas);
            (ConditionStatus::False, "NotAllReady", message)
        }
    };
    s.regions = regions;
    set_condition(&mut s.conditions, "Ready", status, reason, &message, step.now);
    if new.status == app.status {
        return;
    }
    if new.status.phase != app.status.phase {
        let severity = if troubles.is_empty() { Severity::Normal } else { Severity::Warning };
        let reason = match new.status.phase {
            AppPhase::Pending => "Pending",
            AppPhase::Ready => "Ready",
            AppPhase::Progressing => "Progressing",
            AppPhase::Stopped => "Stopped",
            AppPhase::RolledBack => "RolledBack",
        };
        step.event(app.metadata.project.as_ref(), app.owner_ref(), severity, reason, message);
    }
    step.put(new);
}
