//! Secrets: what a new version keeps true, and what an app gets of them.
//!
//! The writer never sees a value. A write brings one version's values sealed, in `spec.sealed`; they go into a row of their own,
//! and the object keeps the version and its keys. What is sealed is bound to its version, so a write that was sealed for
//! another one than comes next is refused, and the server seals it anew.

use nexus_model::kind::*;
use nexus_model::{ApiError, Code, FieldError, Name, Object, key};
use serde_json::Value;

use crate::intent::Change;
use crate::rules::app::Missing;
use crate::rules::{delivery, job};
use crate::step::{Dirty, Step};
use crate::world::World;

/// Secrets of a project in one region.
const PER_PROJECT: usize = 1_000;

pub fn admit(step: &mut Step<'_>, old: Option<&Object<Secret>>, new: &mut Object<Secret>) -> Result<(), ApiError> {
    let project = new.metadata.project.clone().expect("secrets have a project");
    let name = &new.metadata.name;
    if new.spec.data.is_some() || new.spec.binary.is_some() {
        let detail = "the values were not sealed: send them to a server of this release";
        return Err(ApiError::new(Code::Internal, detail));
    }
    let moved = || {
        let detail = format!("secret {name} has a new version meanwhile: read it again");
        ApiError::new(Code::PreconditionFailed, detail)
    };
    let last = old.map_or(0, |old| old.spec.version);
    let Some(sealed) = new.spec.sealed.take() else {
        return match old {
            None => Err(ApiError::invalid(vec![FieldError::new("spec.data", "at least one key")])),
            Some(old) if old.spec == new.spec => Ok(()),
            Some(_) => Err(moved()),
        };
    };
    if new.spec.version != last + 1 {
        return Err(moved());
    }
    if old.is_none() && step.world.secrets.within(&project).count() >= PER_PROJECT {
        let detail = format!("project {project} has {PER_PROJECT} secrets here, which is the most: delete some");
        return Err(ApiError::new(Code::QuotaExceeded, detail));
    }
    let versions = &mut new.status.versions;
    versions.push(SecretVersion { version: new.spec.version, created: step.now });
    let surplus = versions.len().saturating_sub(SECRET_VERSIONS);
    for gone in versions.drain(..surplus) {
        step.set(key::secret_version(&project, name, gone.version), None);
    }
    step.set(key::secret_version(&project, name, new.spec.version), Some(sealed.into()));
    Ok(())
}

/// Makes the changes of a retry equal to those of its first try: sealing the same twice gives different texts. The server
/// compares what was sealed.
pub fn leave_out_values(change: &mut Change) {
    match change {
        Change::Create { object } | Change::Put { object } => object.spec = Value::Null,
        Change::Patch { patch } => {
            if let Some(patch) = patch.as_object_mut() {
                patch.shift_remove("spec");
            }
        }
        Change::Delete
        | Change::Rollout { .. }
        | Change::Audit { .. }
        | Change::Tell { .. }
        | Change::Rebalance { .. } => {}
    }
}

/// The apps of a project that name a secret.
pub fn users<'a>(world: &'a World, project: &'a Name, name: &'a Name) -> impl Iterator<Item = &'a Object<App>> {
    world.apps.within(project).filter(move |app| app.spec.parts().all_secrets().any(|s| s.name == *name))
}

pub fn changed(step: &mut Step<'_>, secret: &Object<Secret>) {
    let Some(project) = &secret.metadata.project else { return };
    let users = users(step.world, project, &secret.metadata.name);
    let users: Vec<_> = users.map(|a| (a.metadata.project.clone(), a.metadata.name.clone())).collect();
    users.into_iter().for_each(|place| step.mark(Dirty::App(place)));
    let jobs = job::waiting_for(step.world, project, |t| names(t, &secret.metadata.name));
    jobs.into_iter().for_each(|dirty| step.mark(dirty));
}

/// Whether a template names a secret.
pub fn names(template: &Template, secret: &Name) -> bool {
    template.parts().all_secrets().any(|s| s.name == *secret)
}

pub fn refuse_used(step: &Step<'_>, secret: &Object<Secret>) -> Result<(), ApiError> {
    let (Some(project), name) = (&secret.metadata.project, &secret.metadata.name) else { return Ok(()) };
    let users: Vec<&str> = users(step.world, project, name).map(|app| app.metadata.name.as_str()).take(6).collect();
    if let Some(hook) = delivery::users(step.world, project, name).next() {
        let detail = format!("secret {name} signs for webhook {}: give that another first", hook.metadata.name);
        return Err(ApiError::new(Code::Conflict, detail));
    }
    if users.is_empty() {
        return refuse_used_by_jobs(step, project, name);
    }
    let more = if users.len() > 5 { " and others" } else { "" };
    let shown = users[..users.len().min(5)].join(", ");
    let detail = format!("secret {name} is named by apps ({shown}{more}): take it out of them first");
    Err(ApiError::new(Code::Conflict, detail))
}

fn refuse_used_by_jobs(step: &Step<'_>, project: &Name, name: &Name) -> Result<(), ApiError> {
    let jobs = job::users(step.world, project, |t| names(t, name)).map(|j| ("job", &j.metadata.name));
    let crons = step.world.cron_jobs.within(project).filter(|c| names(&c.spec.job.template, name));
    let crons = crons.map(|c| ("cron job", &c.metadata.name));
    match jobs.chain(crons).next() {
        None => Ok(()),
        Some((what, user)) => {
            let detail = format!("secret {name} is named by {what} {user}: delete that, or wait until it has finished");
            Err(ApiError::new(Code::Conflict, detail))
        }
    }
}

/// Removes the sealed values of a secret that is erased.
pub fn forget_versions(step: &mut Step<'_>, secret: &Object<Secret>) {
    if let Some(project) = &secret.metadata.project {
        for kept in &secret.status.versions {
            step.set(key::secret_version(project, &secret.metadata.name, kept.version), None);
        }
    }
}

/// What instances of an app are made from: its template, in which each variable's secret has a version.
pub fn resolve(world: &World, app: &Object<App>) -> Result<Template, Missing> {
    resolve_in(world, app.metadata.project.as_ref(), app.spec.template())
}

/// The same for any template of a project.
pub fn resolve_in(world: &World, project: Option<&Name>, mut template: Template) -> Result<Template, Missing> {
    let Some(project) = project else { return Ok(template) };
    let parts = template.init.iter_mut().chain(&mut template.sidecars).flat_map(|part| &mut part.secrets);
    for wanted in template.secrets.iter_mut().chain(parts) {
        let name = &wanted.name;
        let Some(secret) = world.secret(project, name) else {
            return Err((
                "SecretNotFound",
                format!("there is no secret {name}: set it with `nexus secret set {name} KEY`"),
            ));
        };
        if let Some(version) = wanted.version {
            if !secret.status.versions.iter().any(|v| v.version == version) {
                let message = format!("secret {name} has no version {version}: see `nexus secret versions {name}`");
                return Err(("SecretVersionNotFound", message));
            }
        } else {
            let missing = wanted.env.values().find(|key| !secret.spec.keys.contains(*key));
            if let Some(key) = missing {
                let message = format!("secret {name} has no key {key}: set it with `nexus secret set {name} {key}`");
                return Err(("SecretKeyNotFound", message));
            }
            if !wanted.env.is_empty() {
                wanted.version = Some(secret.spec.version);
            }
        }
    }
    Ok(template)
}
