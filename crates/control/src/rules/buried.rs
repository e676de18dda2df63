//! Teardown of what owns other things: organizations, projects and apps are erased when nothing of them is left.

use nexus_model::kind::*;
use nexus_model::{Name, Object, Uid};

use crate::rules::{app, cron, fleet, instance, job, network, secret};
use crate::step::{Dirty, Step};
use crate::world::{Stored, World};

/// Objects of each kind handled in one step, so that a step fits in a transaction.
const PER_STEP: usize = 8;

/// Each with its versions.
const SECRETS_PER_STEP: usize = 2;

/// How far one step of a teardown came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Teardown {
    /// Nothing is left.
    Gone,
    /// This step took something away; another may take more.
    Progressed,
    /// What is left waits for a host, whose report marks it again.
    Waiting,
}

pub fn reconcile(step: &mut Step<'_>, plural: &'static str, uid: Uid) {
    match plural {
        p if p == App::PLURAL && step.world.apps.buried.contains_key(&uid) => {
            let teardown = app::tear_down(step, uid);
            finish::<App>(step, uid, teardown);
        }
        p if p == Job::PLURAL && step.world.jobs.buried.contains_key(&uid) => {
            let teardown = job::tear_down(step, uid);
            let owner = step.world.jobs.buried.get(&uid).and_then(|j| j.metadata.owner.as_ref().map(|o| o.uid));
            finish::<Job>(step, uid, teardown);
            owner.into_iter().for_each(|owner| step.mark(Dirty::Buried(CronJob::PLURAL, owner)));
        }
        p if p == CronJob::PLURAL && step.world.cron_jobs.buried.contains_key(&uid) => {
            let teardown = cron::tear_down(step, uid);
            finish::<CronJob>(step, uid, teardown);
        }
        p if p == Project::PLURAL && step.world.projects.buried.contains_key(&uid) => {
            let teardown = tear_down_buried_project(step, uid);
            finish::<Project>(step, uid, teardown);
        }
        p if p == Network::PLURAL => finish_confirmed::<Network>(step, uid),
        p if p == FloatingIp::PLURAL => finish_confirmed::<FloatingIp>(step, uid),
        p if p == LoadBalancer::PLURAL => finish_confirmed::<LoadBalancer>(step, uid),
        p if p == Organization::PLURAL && step.world.organizations.buried.contains_key(&uid) => {
            let teardown = tear_down_organization(step, uid);
            finish::<Organization>(step, uid, teardown);
        }
        _ => {}
    }
}

/// Erases what every host has confirmed to be gone.
fn finish_confirmed<K: Stored>(step: &mut Step<'_>, uid: Uid) {
    if network::is_gone::<K>(step.world, uid) {
        finish::<K>(step, uid, Teardown::Gone);
    }
}

fn finish<K: Stored>(step: &mut Step<'_>, uid: Uid, teardown: Teardown) {
    match teardown {
        Teardown::Waiting => {}
        Teardown::Progressed => step.mark(Dirty::Buried(K::PLURAL, uid)),
        Teardown::Gone => {
            let Some(object) = K::table(step.world).buried.get(&uid).cloned() else { return };
            step.erase(&object);
            // Whoever owned it may now be empty too.
            let projects: Vec<Uid> = step
                .world
                .projects
                .buried
                .values()
                .filter(|p| object.metadata.project.as_ref() == Some(&p.metadata.name))
                .map(|p| p.metadata.uid)
                .collect();
            let organizations: Vec<Uid> = step.world.organizations.buried.keys().copied().collect();
            projects.into_iter().for_each(|uid| step.mark(Dirty::Buried(Project::PLURAL, uid)));
            if let Some(project) = &object.metadata.project {
                step.mark(Dirty::Usage(project.clone()));
            }
            organizations.into_iter().for_each(|uid| step.mark(Dirty::Buried(Organization::PLURAL, uid)));
        }
    }
}

fn take<K: Stored>(world: &World, within: &Name) -> Vec<Object<K>> {
    K::table(world).within(within).take(PER_STEP).cloned().collect()
}

/// What the global group has of a project goes first, then what is in the regions, then the project.
fn tear_down_buried_project(step: &mut Step<'_>, uid: Uid) -> Teardown {
    let Some(project) = step.world.projects.buried.get(&uid).cloned() else { return Teardown::Gone };
    match tear_down_project(step, &project.metadata.name) {
        Teardown::Gone => {}
        other => return other,
    }
    if !fleet::confirmed(step.world, &project, |region| region.projects.iter().any(|p| p.uid == uid)) {
        return Teardown::Waiting;
    }
    // What was granted over it goes too, or a later project of that name would begin with it.
    let (organization, name) = (&project.spec.organization, Some(&project.metadata.name));
    let bindings = step.world.role_bindings.within(organization).filter(|b| b.spec.project.as_ref() == name);
    let bindings: Vec<_> = bindings.take(PER_STEP).cloned().collect();
    let policies = step.world.policies.within(organization).filter(|p| p.spec.project.as_ref() == name);
    let policies: Vec<_> = policies.take(PER_STEP).cloned().collect();
    if !bindings.is_empty() || !policies.is_empty() {
        bindings.iter().for_each(|b| step.erase(b));
        policies.iter().for_each(|p| step.erase(p));
        return Teardown::Progressed;
    }
    if let Some(usage) = step.world.usage(&project.metadata.name).cloned() {
        step.erase(&usage);
    }
    Teardown::Gone
}

/// Takes away some of what this group holds of a project, its `Usage` aside.
pub fn tear_down_project(step: &mut Step<'_>, name: &Name) -> Teardown {
    let (apps, routes, images) =
        (take::<App>(step.world, name), take::<Route>(step.world, name), take::<Image>(step.world, name));
    let (instances, secrets) = (take::<Instance>(step.world, name), take::<Secret>(step.world, name));
    // Before their jobs, or they would go on making some.
    let (crons, jobs) = (take::<CronJob>(step.world, name), take::<Job>(step.world, name));
    crons.iter().for_each(|c| drop(cron::bury(step, c)));
    if crons.is_empty() {
        jobs.iter().for_each(|j| drop(job::bury(step, j)));
    }
    if !crons.is_empty() || !jobs.is_empty() {
        return Teardown::Progressed;
    }
    let mut progressed =
        !(apps.is_empty() && routes.is_empty() && images.is_empty() && instances.is_empty() && secrets.is_empty());
    apps.iter().for_each(|a| drop(app::bury(step, a)));
    routes.iter().for_each(|r| step.erase(r));
    images.iter().for_each(|i| step.erase(i));
    for s in secrets.iter().take(SECRETS_PER_STEP) {
        secret::forget_versions(step, s);
        step.erase(s);
    }
    // Instances of an app that is buried above are found again in the next step, with their app's own teardown.
    if apps.is_empty() {
        instances.iter().for_each(|i| drop(instance::bury(step, i, "its project was deleted")));
    }
    let mine = |p: Option<&Name>| p == Some(name);
    let waiting = step.world.apps.buried.values().any(|a| mine(a.metadata.project.as_ref()))
        || step.world.jobs.buried.values().any(|j| mine(j.metadata.project.as_ref()))
        || step.world.cron_jobs.buried.values().any(|c| mine(c.metadata.project.as_ref()))
        || step.world.instances.buried.values().any(|i| mine(i.metadata.project.as_ref()));
    if !progressed && !waiting {
        progressed = network::tear_down(step, name, PER_STEP)
            || take_away::<SecurityGroup>(step, name)
            || take_away::<Subnet>(step, name)
            || take_away::<RouteTable>(step, name)
            || take_away::<Peering>(step, name)
            || take_away::<NatGateway>(step, name)
            || take_away::<InternetGateway>(step, name)
            || take_away::<PrefixList>(step, name)
            || take_away::<DnsZone>(step, name)
            || take_away::<Webhook>(step, name)
            || take_away::<Delivery>(step, name)
            || take_away::<Event>(step, name);
        if !progressed {
            return Teardown::Gone;
        }
    }
    if progressed { Teardown::Progressed } else { Teardown::Waiting }
}

fn tear_down_organization(step: &mut Step<'_>, uid: Uid) -> Teardown {
    let Some(organization) = step.world.organizations.buried.get(&uid).cloned() else { return Teardown::Gone };
    let name = &organization.metadata.name;
    let mine = step.world.projects_of(name).filter_map(|project| step.world.project(project));
    let projects: Vec<_> = mine.take(PER_STEP).cloned().collect();
    for p in &projects {
        step.bury(p);
        step.mark(Dirty::Buried(Project::PLURAL, p.metadata.uid));
    }
    if !projects.is_empty() {
        Teardown::Progressed
    } else if step.world.projects.buried.values().any(|p| p.spec.organization == *name) {
        Teardown::Waiting
    } else if take_away::<Session>(step, name)
        || take_away::<Token>(step, name)
        || take_away::<AccessKey>(step, name)
        || take_away::<Credential>(step, name)
        || take_away::<RoleBinding>(step, name)
        || take_away::<Policy>(step, name)
        || take_away::<Group>(step, name)
        || take_away::<ServiceAccount>(step, name)
        || take_away::<User>(step, name)
        || take_away::<IdentityProvider>(step, name)
        || take_away::<Departure>(step, name)
    {
        Teardown::Progressed
    } else {
        Teardown::Gone
    }
}

/// Erases some of what there is of a kind in a project or organization. True if there was anything.
fn take_away<K: Stored>(step: &mut Step<'_>, within: &Name) -> bool {
    let some = take::<K>(step.world, within);
    some.iter().for_each(|object| step.erase(object));
    !some.is_empty()
}
