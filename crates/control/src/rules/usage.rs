//! What a project uses of its quota in this region: a row that is written in the same step as the rows that it counts.
//!
//! The row is also how a region knows that it holds anything of a project at all. It names the project's uid, and when
//! no living project has that uid any more, everything of the project is torn down here and the row goes last. So a
//! region needs no list of what was deleted while it was away.

use nexus_model::kind::{AppSpec, *};
use nexus_model::{ApiError, Bytes, Code, Metadata, MilliCpu, Name, Object};

use crate::rules::buried::{Teardown, tear_down_project};
use crate::step::{Dirty, Step};
use crate::world::Part;

/// What an app takes of its project's quota: what its spec asks for, whether it runs yet or not. One that is scaled by the cloud
/// takes the most that it may come to have, so that scaling is never refused for a quota, and no quota is passed by it.
pub fn charge(spec: &AppSpec) -> [u64; 3] {
    charge_with(spec, 0)
}

/// What an app takes with what its rollout has made beyond its replicas: the blue beside the green, a surge.
pub fn charge_app(app: &Object<App>) -> [u64; 3] {
    charge_with(&app.spec, surge_of(app))
}

/// The instances beyond its replicas that an app is charged with.
pub fn surge_of(app: &Object<App>) -> u32 {
    app.status.rollout.as_ref().map_or(0, |r| r.surge)
}

/// What an app takes with so many instances beyond its replicas.
pub fn charge_with(spec: &AppSpec, surge: u32) -> [u64; 3] {
    charge_of(spec.most_replicas().saturating_add(surge), &spec.parts().reserved())
}

/// What so many instances take.
pub fn charge_of(instances: u32, each: &Resources) -> [u64; 3] {
    let n = u64::from(instances);
    [n, n * u64::from(each.cpu.0), n.saturating_mul(each.memory.0)]
}

/// The amounts in the order of [`charge`].
pub fn amounts(used: &QuotaUse) -> [u64; 3] {
    [u64::from(used.instances), u64::from(used.cpu.0), used.memory.0]
}

/// The other way round; what is more than any project can use is drawn to the bound.
pub fn quota_use(amounts: [u64; 3]) -> QuotaUse {
    let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    QuotaUse { instances: narrow(amounts[0]), cpu: MilliCpu(narrow(amounts[1])), memory: Bytes(amounts[2]) }
}

/// The project's row, made if this region has held nothing of the project so far. Refused while what a deleted project
/// of this name left here is still being torn down.
pub fn open(step: &mut Step<'_>, project: &Name) -> Result<Object<Usage>, ApiError> {
    let Some(owner) = step.world.project(project).map(Object::owner_ref) else {
        return Err(ApiError::not_found("Project", project.as_str()));
    };
    match step.world.usage(project).cloned() {
        Some(usage) if usage.metadata.owner.as_ref().is_some_and(|o| o.uid == owner.uid) => Ok(usage),
        Some(_) => {
            let detail = format!("what a deleted project {project} had here is still being torn down: try again soon");
            Err(ApiError::new(Code::Conflict, detail))
        }
        None => {
            step.world.refuse_unreadable::<Usage>(Some(project), project)?;
            let metadata = step.new_metadata(project.clone(), Some(project.clone()));
            let usage = Object::<Usage>::new(Metadata { owner: Some(owner), ..metadata }, UsageSpec {});
            step.put(usage.clone());
            Ok(usage)
        }
    }
}

/// What all projects of an organization use in this region.
fn used_by(step: &Step<'_>, organization: &Name) -> [u64; 3] {
    let usages = step.world.projects_of(organization).filter_map(|project| step.world.usage(project));
    usages.fold([0; 3], |sum: [u64; 3], usage| {
        let used = amounts(&usage.status.used);
        std::array::from_fn(|i| sum[i].saturating_add(used[i]))
    })
}

/// Refuses what grows past a quota, with the quota's name, limit and use.
fn within(whose: &str, quota: &Quota, used: [u64; 3], new: [u64; 3], grows: [bool; 3]) -> Result<(), ApiError> {
    let limit = [u64::from(quota.instances), u64::from(quota.cpu.0), quota.memory.0];
    for (i, name) in ["instances", "cpu", "memory"].into_iter().enumerate() {
        if grows[i] && new[i] > limit[i] {
            let show = |amount: u64| match i {
                0 => amount.to_string(),
                1 => u32::try_from(amount).map_or_else(|_| format!("{amount}m"), |m| MilliCpu(m).to_string()),
                _ => Bytes(amount).to_string(),
            };
            let detail = format!(
                "the {name} quota of {whose} is {}, {} are in use, this would make it {}: ask for less or raise the quota",
                show(limit[i]),
                show(used[i]),
                show(new[i]),
            );
            return Err(ApiError::new(Code::QuotaExceeded, detail));
        }
    }
    Ok(())
}

/// Changes a project's use from one charge to another in this same step, or says which quota would be passed.
pub fn recharge(step: &mut Step<'_>, project: &Name, before: [u64; 3], after: [u64; 3]) -> Result<(), ApiError> {
    if step.world.part == Part::Global {
        // A global app is charged where its replicas run.
        return Ok(());
    }
    let mut usage = match step.world.usage(project).cloned() {
        Some(usage) if after == [0; 3] => usage,
        None if after == [0; 3] => return Ok(()),
        _ => open(step, project)?,
    };
    if before == after {
        return Ok(());
    }
    let used = amounts(&usage.status.used);
    let new: [u64; 3] = std::array::from_fn(|i| used[i].saturating_sub(before[i]).saturating_add(after[i]));
    let grows: [bool; 3] = std::array::from_fn(|i| after[i] > before[i]);
    if let Some(owner) = step.world.project(project) {
        within(&format!("project {project}"), &owner.spec.quota, used, new, grows)?;
        let organization = &owner.spec.organization;
        let quota = step.world.organization(organization).map(|o| o.spec.quota);
        if let Some(quota) = quota.filter(|_| grows.contains(&true)) {
            let all = used_by(step, organization);
            let new = std::array::from_fn(|i| all[i].saturating_sub(before[i]).saturating_add(after[i]));
            within(&format!("organization {organization}"), &quota, all, new, grows)?;
        }
    }
    usage.status.used = quota_use(new);
    step.put(usage);
    if (0..3).any(|i| after[i] < before[i]) {
        // Room has come for what a quota kept out, the project's or the organization's.
        let waiting: Vec<_> = step.world.blocked.values().map(|b| Dirty::Child(b.place.clone())).collect();
        waiting.into_iter().for_each(|dirty| step.mark(dirty));
    }
    Ok(())
}

/// Whether a region's row is of a project that is no more.
fn is_orphan(step: &Step<'_>, usage: &Object<Usage>) -> bool {
    let uid = usage.metadata.owner.as_ref().map(|o| o.uid);
    step.world.project(&usage.metadata.name).map(|p| p.metadata.uid) != uid
}

/// Tears down what a region holds of a project that is no more.
pub fn reconcile(step: &mut Step<'_>, project: &Name) {
    // Nothing is known to be gone before the global group has been read as far as it ever was here.
    if step.world.part != Part::Region || !step.world.knows_fleet() {
        return;
    }
    let Some(usage) = step.world.usage(project).cloned().filter(|u| is_orphan(step, u)) else { return };
    match tear_down_project(step, project) {
        Teardown::Waiting => {}
        Teardown::Progressed => step.mark(Dirty::Usage(project.clone())),
        Teardown::Gone => {
            step.erase(&usage);
            // A new project of that name may have waited for this.
            let waiting: Vec<_> = step.world.blocked.values().map(|b| b.place.clone()).collect();
            waiting.into_iter().for_each(|place| step.mark(Dirty::Child(place)));
        }
    }
}
