//! Brings a job to its end: makes instances until enough have succeeded, pauses after failures, and gives up when there were too
//! many or the time is over.
//!
//! An end counts in the transaction that takes its report in ([`ended`]), and a row of an instance that has ended never changes
//! again; so every end counts once, whoever leads. What vanishes without an end (its host died, somebody deleted it) is no
//! failure: it runs again.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::{AnyObject, ApiError, Code, Name, Object, Timestamp, Uid};

use crate::rules::app::{Content, Missing, content, per_step, template_hash};
use crate::rules::buried::Teardown;
use crate::rules::network::{default, nic};
use crate::rules::usage::{charge_of, recharge};
use crate::rules::{instance, secret};
use crate::step::{Dirty, Step};
use crate::world::{Place, World, app_uid};

/// Instances made or buried in one step, so that a step fits in a transaction.
const PER_STEP: usize = 12;
/// The pause after the first failure; it doubles from there.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_LAST: Duration = Duration::from_secs(300);
/// Instances that have ended and whose output is kept, the newest.
pub const ENDED_KEPT: usize = 20;
/// Jobs of a project in one region, finished ones too.
const PER_PROJECT: usize = 10_000;

/// What a job takes of its project's quota: what may run at once, until it has finished.
pub fn charge(job: &Object<Job>) -> [u64; 3] {
    if job.status.finished.is_some() {
        [0; 3]
    } else {
        charge_of(job.spec.at_once(), &job.spec.template.parts().reserved())
    }
}

/// When a job is to be looked at although nothing happens to it.
pub fn due(job: &Object<Job>) -> Option<Timestamp> {
    let after = |from: Option<Timestamp>, seconds: u32| Some(from?.plus(Duration::from_secs(seconds.into())));
    let s = &job.status;
    if s.finished.is_some() {
        return after(s.finished, job.spec.ttl_seconds_after_finished);
    }
    let deadline = job.spec.active_deadline_seconds.and_then(|d| after(s.started, d));
    s.retry_at.into_iter().chain(deadline).min()
}

fn place_of(job: &Object<Job>) -> Place {
    (job.metadata.project.clone(), job.metadata.name.clone())
}

/// Refuses one job more than a project may have.
pub fn refuse_more(world: &World, project: &Name) -> Result<(), ApiError> {
    if world.jobs.within(project).count() < PER_PROJECT {
        return Ok(());
    }
    let detail =
        format!("project {project} has {PER_PROJECT} jobs here, which is the most: delete some that have finished");
    Err(ApiError::new(Code::QuotaExceeded, detail))
}

/// Ends a job of whatever state: its name and quota are free at once, its instances are buried with it.
pub fn bury(step: &mut Step<'_>, job: &Object<Job>) -> AnyObject {
    let project = job.metadata.project.clone().expect("jobs have a project");
    recharge(step, &project, charge(job), [0; 3]).expect("giving back is never refused");
    let buried = step.bury(job);
    step.mark(Dirty::Buried(Job::PLURAL, job.metadata.uid));
    mark_owner(step, job);
    buried.to_any()
}

/// Buries instances of a buried job, a few at a time.
pub fn tear_down(step: &mut Step<'_>, job: Uid) -> Teardown {
    let living: Vec<_> = step.world.instances_of(job).take(PER_STEP).cloned().collect();
    for i in &living {
        instance::bury(step, i, "its job was deleted");
    }
    if !living.is_empty() {
        Teardown::Progressed
    } else if step.world.instances.buried.values().any(|i| app_uid(i) == job) {
        Teardown::Waiting
    } else {
        Teardown::Gone
    }
}

fn mark_owner(step: &mut Step<'_>, job: &Object<Job>) {
    if let Some(owner) = job.metadata.owner.as_ref().filter(|o| o.kind == CronJob::KIND) {
        step.mark(Dirty::Cron((job.metadata.project.clone(), owner.name.clone())));
        step.mark(Dirty::Buried(CronJob::PLURAL, owner.uid));
    }
}

/// Counts the end of an instance, whose row says since this very step that it has ended.
pub fn ended(step: &mut Step<'_>, instance: &Object<Instance>) {
    let place = (instance.metadata.project.clone(), instance.spec.app.clone());
    let Some(job) = step.world.jobs.live.get(&place).filter(|j| j.metadata.uid == app_uid(instance)).cloned() else {
        return;
    };
    step.mark(Dirty::Job(place));
    if job.status.finished.is_some() {
        return;
    }
    let mut new = job;
    let s = &mut new.status;
    let index = instance.spec.job.and_then(|j| j.index);
    if instance.status.exit_code == Some(0) {
        s.succeeded += 1;
        if let Some(index) = index {
            let mut done = IndexSet::parse(&s.completed_indexes);
            done.insert(index);
            s.completed_indexes = done.to_string();
        }
    } else {
        s.failed += 1;
        s.retry_at = Some(step.now.plus(backoff(s.failed)));
    }
    s.ends.push(JobEnd {
        instance: instance.metadata.name.clone(),
        index,
        host: instance.status.host.clone(),
        exit_code: instance.status.exit_code,
        message: instance.status.message.clone(),
        at: step.now,
    });
    let surplus = s.ends.len().saturating_sub(ENDS_TOLD);
    s.ends.drain(..surplus);
    step.put(new);
}

/// The pause before the next instance, after so many failures.
fn backoff(failed: u32) -> Duration {
    BACKOFF_FIRST.saturating_mul(1 << failed.saturating_sub(1).min(16)).min(BACKOFF_LAST)
}

/// Finishes a job: gives its quota back in this same step, and lets what runs be stopped.
pub fn finish(step: &mut Step<'_>, job: &Object<Job>, phase: JobPhase, reason: &str, message: &str) {
    let project = job.metadata.project.clone().expect("jobs have a project");
    recharge(step, &project, charge(job), [0; 3]).expect("giving back is never refused");
    let mut new = job.clone();
    let s = &mut new.status;
    s.phase = phase;
    s.finished = Some(step.now);
    s.observed_generation = job.metadata.generation;
    (s.active, s.retry_at) = (0, None);
    let (status, severity) = match phase {
        JobPhase::Complete => (ConditionStatus::True, Severity::Normal),
        _ => (ConditionStatus::False, Severity::Warning),
    };
    set_condition(&mut s.conditions, "Complete", status, reason, message, step.now);
    step.put(new);
    step.event(Some(&project), job.owner_ref(), severity, reason, message);
    mark_owner(step, job);
    step.mark(Dirty::Job(place_of(job)));
}

/// Why a job is to finish now, if it is.
fn verdict(job: &Object<Job>, now: Timestamp) -> Option<(JobPhase, &'static str, String)> {
    let (spec, s) = (&job.spec, &job.status);
    if s.succeeded >= spec.completions {
        return Some((JobPhase::Complete, "Complete", format!("{} of {} succeeded", s.succeeded, spec.completions)));
    }
    if spec.cancelled {
        return Some((JobPhase::Failed, "Cancelled", "it was cancelled".into()));
    }
    if s.failed > spec.backoff_limit {
        let last = s.ends.iter().rev().find(|end| end.exit_code != Some(0));
        let last = last.map(|end| format!("; the last, {}: {}", end.instance, end.message)).unwrap_or_default();
        let message = format!("{} instances failed, more than backoffLimit {}{last}", s.failed, spec.backoff_limit);
        return Some((JobPhase::Failed, "BackoffLimitExceeded", message));
    }
    let deadline = spec.active_deadline_seconds?;
    if now >= s.started?.plus(Duration::from_secs(deadline.into())) {
        let message =
            format!("it had not finished after {deadline} s; {} of {} succeeded", s.succeeded, spec.completions);
        return Some((JobPhase::Failed, "DeadlineExceeded", message));
    }
    None
}

pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    let Some(mut job) = step.world.jobs.live.get(place).cloned() else { return };
    if job.status.finished.is_some() {
        return look_after_finished(step, &job);
    }
    job.status.started.get_or_insert(step.now);
    if job.status.retry_at.is_some_and(|at| at <= step.now) {
        job.status.retry_at = None;
    }
    if let Some((phase, reason, message)) = verdict(&job, step.now) {
        return finish(step, &job, phase, reason, &message);
    }
    let drained = |i: &Object<Instance>| {
        let host = i.status.host.as_ref().and_then(|name| step.world.host(name));
        host.is_some_and(|host| host.spec.draining)
    };
    let (mut going, mut active, mut over) = (Vec::new(), Vec::new(), Vec::new());
    for i in step.world.instances_of(job.metadata.uid) {
        if drained(i) {
            going.push((i.metadata.uid, "its host is drained: it runs again elsewhere"));
        } else if i.status.finished.is_some() {
            over.push(i);
        } else {
            active.push(i);
        }
    }
    let wanted = job.spec.at_once().min(job.spec.completions.saturating_sub(job.status.succeeded)) as usize;
    // The youngest has done the least.
    active.sort_by_key(|i| (i.metadata.created, i.metadata.uid));
    let surplus = active.split_off(active.len().min(wanted));
    going.extend(surplus.iter().map(|i| (i.metadata.uid, "the job is to run fewer at once")));
    going.extend(forgotten(over));
    let taken: Vec<u32> = active.iter().filter_map(|i| i.spec.job?.index).collect();
    let missing = wanted - active.len();
    let made = made_from(step.world, &job);
    let mut more = going.len() > PER_STEP;
    for (uid, why) in going.into_iter().take(PER_STEP) {
        if let Some(i) = step.world.instance(uid).cloned() {
            instance::bury(step, &i, why);
        }
    }
    let mut count = active_of(step.world, job.metadata.uid);
    if let Ok((template, content, hash)) = &made
        && job.status.retry_at.is_none()
        && !more
    {
        let done = IndexSet::parse(&job.status.completed_indexes);
        let mut free = (0..job.spec.completions).filter(|i| !done.contains(*i) && !taken.contains(i));
        let nics = default::nics(step.world, job.metadata.project.as_ref(), template);
        let make = missing.min(per_step(PER_STEP, nics));
        for _ in 0..make {
            let index = if job.spec.indexed { free.next() } else { None };
            make_instance(step, &job, template, content, hash, index);
            count += 1;
        }
        more |= missing > make;
    }
    tell(step, job, count, made.err());
    if more {
        step.mark(Dirty::Job(place.clone()));
    }
}

/// Instances that have ended and are more than are kept.
fn forgotten(mut over: Vec<&Object<Instance>>) -> impl Iterator<Item = (Uid, &'static str)> + use<> {
    over.sort_by_key(|i| (std::cmp::Reverse(i.status.finished), i.metadata.uid));
    let surplus: Vec<Uid> = over.into_iter().skip(ENDED_KEPT).map(|i| i.metadata.uid).collect();
    surplus.into_iter().map(|uid| (uid, "it ended long ago: its job keeps the output of newer ones"))
}

fn active_of(world: &World, job: Uid) -> u32 {
    let active = world.instances_of(job).filter(|i| i.status.finished.is_none()).count();
    u32::try_from(active).unwrap_or(u32::MAX)
}

/// Stops what still runs of a finished job, and deletes it when its time has come.
fn look_after_finished(step: &mut Step<'_>, job: &Object<Job>) {
    if due(job).is_some_and(|at| at <= step.now) {
        let why = format!("it finished {} s ago", job.spec.ttl_seconds_after_finished);
        step.event(job.metadata.project.as_ref(), job.owner_ref(), Severity::Normal, "Expired", why);
        bury(step, job);
        return;
    }
    let (over, active): (Vec<_>, Vec<_>) =
        step.world.instances_of(job.metadata.uid).partition(|i| i.status.finished.is_some());
    let on_drained = |i: &Object<Instance>| {
        let host = i.status.host.as_ref().and_then(|name| step.world.host(name));
        host.is_some_and(|host| host.spec.draining)
    };
    let drained: Vec<_> =
        over.iter().filter(|i| on_drained(i)).map(|i| (i.metadata.uid, "its host is drained")).collect();
    let running = active.iter().map(|i| (i.metadata.uid, "its job has finished"));
    let going: Vec<_> = running.chain(drained).chain(forgotten(over)).collect();
    for (uid, why) in going.iter().take(PER_STEP) {
        if let Some(i) = step.world.instance(*uid).cloned() {
            instance::bury(step, &i, why);
        }
    }
    if going.len() > PER_STEP {
        step.mark(Dirty::Job(place_of(job)));
    }
}

type Made = (Template, Content, String);

/// What instances are made from now: the template, with the versions that variables come from, and the image's content.
fn made_from(world: &World, job: &Object<Job>) -> Result<Made, Missing> {
    let project = job.metadata.project.as_ref();
    let content = content(world, project, job.spec.template.parts(), None, &BTreeMap::new())?;
    let mut template = secret::resolve_in(world, project, job.spec.template.clone())?;
    nic::resolve(world, project, &template.nics)?;
    tell_parts(&mut template, JOB_VARIABLE, job.metadata.name.as_str());
    tell_parts(&mut template, COMPLETIONS_VARIABLE, &job.spec.completions.to_string());
    let hash = template_hash(&template, &content);
    Ok((template, content, hash))
}

/// Sets a variable of the main part, of the init steps and of the sidecars.
fn tell_parts(template: &mut Template, variable: &str, value: &str) {
    let parts = template.init.iter_mut().chain(&mut template.sidecars);
    for env in parts.map(|part| &mut part.env).chain([&mut template.env]) {
        env.insert(variable.into(), value.into());
    }
}

fn make_instance(
    step: &mut Step<'_>,
    job: &Object<Job>,
    template: &Template,
    content: &Content,
    hash: &str,
    index: Option<u32>,
) {
    let uid = step.new_uid();
    let stem: String = job.metadata.name.as_str().chars().take(48).collect();
    let stem = stem.trim_end_matches('-');
    let name = match index {
        Some(index) => format!("{stem}-{index}-{}", uid.short()),
        None => format!("{stem}-{}", uid.short()),
    };
    let mut metadata =
        step.new_metadata(name.parse().expect("a name, digits and hyphens"), job.metadata.project.clone());
    metadata.uid = uid;
    metadata.owner = Some(job.owner_ref());
    metadata.labels = job.metadata.labels.clone();
    metadata.request_id = job.metadata.request_id.clone();
    let mut template = template.clone();
    if let Some(index) = index {
        tell_parts(&mut template, INDEX_VARIABLE, &index.to_string());
    }
    let spec = InstanceSpec {
        app: job.metadata.name.clone(),
        template_hash: hash.to_owned(),
        template,
        image_digest: content.image,
        part_digests: content.parts.clone(),
        job: Some(InstanceJob { index }),
        implied_nic: false,
    };
    step.put(Object::<Instance>::new(metadata, spec));
    instance::reconcile(step, uid);
}

/// Writes down how far it is. `job` may already differ from its row.
fn tell(step: &mut Step<'_>, mut job: Object<Job>, active: u32, missing: Option<Missing>) {
    let place = place_of(&job);
    let Some(old) = step.world.jobs.live.get(&place).map(|j| j.status.clone()) else { return };
    let stuck = step.world.instances_of(job.metadata.uid).find(|i| i.status.host.is_none());
    let stuck = stuck.map(|i| i.status.message.clone()).filter(|m| !m.is_empty());
    let s = &mut job.status;
    s.observed_generation = job.metadata.generation;
    s.active = active;
    let begun = active > 0 || s.succeeded + s.failed > 0;
    s.phase = if begun { JobPhase::Active } else { JobPhase::Pending };
    let how_far = format!("{} of {} succeeded", s.succeeded, job.spec.completions);
    let (reason, message) = match (missing, s.retry_at, stuck) {
        (Some((reason, message)), ..) => (reason, message),
        (_, Some(at), _) => ("BackOff", format!("{how_far}; after {} failures it is tried again at {at}", s.failed)),
        (_, _, Some(why)) => ("NoHost", format!("{how_far}; {why}")),
        _ => ("Active", how_far),
    };
    set_condition(&mut s.conditions, "Complete", ConditionStatus::False, reason, &message, step.now);
    if job.status == old {
        return;
    }
    let news = |s: &JobStatus| s.conditions.first().map(|c| c.reason.clone());
    if reason != "Active" && news(&old).as_deref() != Some(reason) {
        step.event(place.0.as_ref(), job.owner_ref(), Severity::Warning, reason, message);
    }
    step.put(job);
}

/// The unfinished jobs of a project that a change of an image or secret bears upon.
pub fn users<'a>(
    world: &'a World,
    project: &'a Name,
    uses: impl Fn(&Template) -> bool + 'a,
) -> impl Iterator<Item = &'a Object<Job>> {
    world.jobs.within(project).filter(move |j| j.status.finished.is_none() && uses(&j.spec.template))
}

/// Marks the jobs that waited for an image or secret.
pub fn waiting_for(world: &World, project: &Name, uses: impl Fn(&Template) -> bool) -> Vec<Dirty> {
    users(world, project, uses).map(|job| Dirty::Job(place_of(job))).collect()
}
