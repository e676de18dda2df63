//! Begins jobs by the clock.
//!
//! `status.decided` says up to when it is decided about every run that was due; a run is a job whose name has the minute that it
//! was due in. So a leader that takes over in the middle begins nothing twice and forgets nothing: what was due while nobody led
//! is missed, and the spec says what happens to that.

use std::collections::VecDeque;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::schedule::Schedule;
use nexus_model::{AnyObject, ApiError, Code, FieldError, Name, Object, Timestamp, Uid};

use crate::rules::buried::Teardown;
use crate::rules::job;
use crate::rules::usage::recharge;
use crate::step::{Dirty, Step};
use crate::world::Place;

/// A run that is begun so late is on time: leaders change in less.
const LATE: Duration = Duration::from_secs(30);
/// Jobs begun, ended or deleted in one step, so that a step fits in a transaction.
const PER_STEP: usize = 4;
/// Jobs that one run takes the place of.
const REPLACED: usize = 12;
/// CronJobs of a project in one region.
const PER_PROJECT: usize = 1_000;
/// The annotation of a job that says for when it was due.
pub const DUE: &str = "scheduled-at";
/// The annotation by which a new job says which cron job it is a run of, although no clock asked for it.
pub const RUN_OF: &str = "run-of";

/// When it is to be looked at although nothing happens to it.
pub fn due(cron: &Object<CronJob>) -> Option<Timestamp> {
    cron.status.next_run.filter(|_| !cron.spec.suspend)
}

pub fn admit(step: &mut Step<'_>, old: Option<&Object<CronJob>>, new: &mut Object<CronJob>) -> Result<(), ApiError> {
    let project = new.metadata.project.clone().expect("cron jobs have a project");
    if old.is_none() && step.world.cron_jobs.within(&project).count() >= PER_PROJECT {
        let detail = format!("project {project} has {PER_PROJECT} cron jobs here, which is the most: delete some");
        return Err(ApiError::new(Code::QuotaExceeded, detail));
    }
    schedule(new).map_err(|message| ApiError::invalid(vec![FieldError::new("spec.schedule", message)]))?;
    let times = |c: &Object<CronJob>| (c.spec.schedule.clone(), c.spec.time_zone.clone(), c.spec.suspend);
    if old.is_none_or(|old| times(old) != times(new)) {
        // Nothing was due by a schedule that did not hold.
        new.status.decided = Some(step.now);
        new.status.next_run = None;
    }
    Ok(())
}

fn schedule(cron: &Object<CronJob>) -> Result<Schedule, String> {
    Schedule::new(&cron.spec.schedule, &cron.spec.time_zone).map_err(|e| e.to_string())
}

/// Takes a new job that says so into the history of its cron job. What names none that is there is nobody's.
pub fn claim(step: &mut Step<'_>, job: &mut Object<Job>) {
    let named = job.metadata.annotations.get(RUN_OF).and_then(|name| name.parse::<Name>().ok());
    let Some(name) = named.filter(|_| !job.metadata.annotations.contains_key(DUE)) else { return };
    let place = (job.metadata.project.clone(), name);
    if let Some(cron) = step.world.cron_jobs.live.get(&place) {
        job.metadata.owner = Some(cron.owner_ref());
        step.mark(Dirty::Cron(place));
    }
}

/// Whether the clock asked for it. Only such runs are in each other's way.
fn is_by_the_clock(job: &Object<Job>) -> bool {
    !job.metadata.annotations.contains_key(RUN_OF)
}

/// Deletes it; its jobs follow.
pub fn bury(step: &mut Step<'_>, cron: &Object<CronJob>) -> AnyObject {
    let buried = step.bury(cron);
    step.mark(Dirty::Buried(CronJob::PLURAL, cron.metadata.uid));
    buried.to_any()
}

fn is_of(job: &Object<Job>, cron: Uid) -> bool {
    job.metadata.owner.as_ref().is_some_and(|o| o.uid == cron)
}

pub fn tear_down(step: &mut Step<'_>, uid: Uid) -> Teardown {
    let Some(project) = step.world.cron_jobs.buried.get(&uid).and_then(|c| c.metadata.project.clone()) else {
        return Teardown::Gone;
    };
    let living: Vec<_> = step.world.jobs.within(&project).filter(|j| is_of(j, uid)).take(PER_STEP).cloned().collect();
    for job in &living {
        job::bury(step, job);
    }
    if !living.is_empty() {
        Teardown::Progressed
    } else if step.world.jobs.buried.values().any(|j| is_of(j, uid)) {
        Teardown::Waiting
    } else {
        Teardown::Gone
    }
}

/// The newest so many runs that were due after `from` and until `now`, and how many were due before them.
fn were_due(schedule: &Schedule, from: Timestamp, now: Timestamp) -> (VecDeque<Timestamp>, u64) {
    let (mut newest, mut more, mut last) = (VecDeque::new(), 0, from);
    while let Some(next) = schedule.next(last).filter(|next| *next <= now) {
        newest.push_back(next);
        if newest.len() > CATCH_UP {
            newest.pop_front();
            more += 1;
        }
        last = next;
    }
    (newest, more)
}

/// Which of the runs that were due are to be begun. `due` is in order.
fn chosen(missed: Missed, due: &VecDeque<Timestamp>, now: Timestamp) -> Vec<Timestamp> {
    match missed {
        Missed::Skip => due.back().filter(|at| now.since(**at) <= LATE).copied().into_iter().collect(),
        Missed::Once => due.back().copied().into_iter().collect(),
        Missed::All => due.iter().copied().collect(),
    }
}

pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    let Some(cron) = step.world.cron_jobs.live.get(place).cloned() else { return };
    let Some(project) = &place.0 else { return };
    let jobs: Vec<_> = step.world.jobs.within(project).filter(|j| is_of(j, cron.metadata.uid)).cloned().collect();
    let mut more = forget_old(step, &cron, &jobs);
    let mut new = cron.clone();
    let s = &mut new.status;
    s.observed_generation = cron.metadata.generation;
    let complete = jobs.iter().filter(|j| j.status.phase == JobPhase::Complete).filter_map(|j| j.status.finished);
    s.last_success = complete.max().max(s.last_success);
    let (mut active, by_hand): (Vec<&Object<Job>>, Vec<&Object<Job>>) =
        jobs.iter().filter(|j| j.status.finished.is_none()).partition(|j| is_by_the_clock(j));
    let mut begun: Vec<Name> = Vec::new();
    match schedule(&cron) {
        Err(why) => {
            s.next_run = None;
            set_condition(&mut s.conditions, "Scheduled", ConditionStatus::False, "Invalid", &why, step.now);
        }
        Ok(_) if cron.spec.suspend => {
            s.next_run = None;
            let why = "no run is begun: resume it with `nexus cron resume`";
            set_condition(&mut s.conditions, "Scheduled", ConditionStatus::False, "Suspended", why, step.now);
        }
        Ok(schedule) => {
            set_condition(&mut s.conditions, "Scheduled", ConditionStatus::True, "Scheduled", "", step.now);
            let (mut decided, mut skipped) = (s.decided.unwrap_or(cron.metadata.created), 0);
            let reach = i64::from(cron.spec.starting_deadline_seconds) * 1_000;
            let oldest = Timestamp::from_millis(step.now.as_millis() - reach);
            let too_old = count_due(&schedule, decided, oldest);
            if too_old > 0 {
                (decided, skipped) = (oldest, too_old);
                s.decided = Some(oldest);
            }
            let (due, before) = were_due(&schedule, decided.max(oldest), step.now);
            // What comes due while an earlier run goes on under `forbid` is decided when that has finished.
            let waits = cron.spec.concurrency == Concurrency::Forbid && !active.is_empty();
            if let Some(newest) = due.back().filter(|_| !waits) {
                let mut runs = chosen(cron.spec.missed, &due, step.now);
                match cron.spec.concurrency {
                    // One after the other.
                    Concurrency::Forbid => runs.truncate(1),
                    Concurrency::Replace => drop(runs.drain(..runs.len().saturating_sub(1))),
                    Concurrency::Allow => runs.truncate(PER_STEP),
                }
                let until = match (cron.spec.missed, cron.spec.concurrency, runs.last()) {
                    (Missed::All, Concurrency::Allow | Concurrency::Forbid, Some(last)) => *last,
                    _ => *newest,
                };
                let considered = due.iter().filter(|at| **at <= until).count();
                skipped += before + (considered - runs.len()) as u64;
                if cron.spec.concurrency == Concurrency::Replace && !runs.is_empty() {
                    for job in active.drain(..active.len().min(REPLACED)) {
                        job::finish(step, job, JobPhase::Failed, "Replaced", "the next run took its place");
                    }
                }
                for at in runs {
                    match begin(step, &cron, at) {
                        Ok(name) => {
                            s.last_run = Some(at);
                            begun.push(name);
                        }
                        Err(error) => {
                            skipped += 1;
                            let why = format!("the run of {at}: {}", error.detail);
                            step.event(Some(project), cron.owner_ref(), Severity::Warning, "CantBegin", why);
                        }
                    }
                }
                s.decided = Some(until);
                more |= until < *newest && (cron.spec.concurrency != Concurrency::Forbid || begun.is_empty());
            }
            tell_skipped(step, &cron, s, skipped);
            s.next_run = schedule.next(step.now);
        }
    }
    s.active = active.iter().chain(&by_hand).map(|j| j.metadata.name.clone()).chain(begun).collect();
    s.active.sort();
    s.active.dedup();
    s.active.truncate(100);
    if new.status != cron.status {
        step.put(new);
    }
    if more {
        step.mark(Dirty::Cron(place.clone()));
    }
}

/// How many runs were due after `from` and before `until`, as far as it is worth counting.
fn count_due(schedule: &Schedule, from: Timestamp, until: Timestamp) -> u64 {
    let (mut count, mut last) = (0, from);
    while let Some(next) = schedule.next(last).filter(|next| *next <= until && count < 10_000) {
        (count, last) = (count + 1, next);
    }
    count
}

fn tell_skipped(step: &mut Step<'_>, cron: &Object<CronJob>, s: &mut CronJobStatus, skipped: u64) {
    if skipped > 0 {
        s.missed = s.missed.saturating_add(skipped);
        let message = format!("{skipped} runs that were due were not begun");
        step.event(cron.metadata.project.as_ref(), cron.owner_ref(), Severity::Warning, "MissedRun", message);
    }
}

/// Deletes finished jobs beyond the history. True if more are left.
fn forget_old(step: &mut Step<'_>, cron: &Object<CronJob>, jobs: &[Object<Job>]) -> bool {
    let mut doomed = Vec::new();
    for (phase, kept) in
        [(JobPhase::Complete, cron.spec.successful_history), (JobPhase::Failed, cron.spec.failed_history)]
    {
        let mut of: Vec<_> = jobs.iter().filter(|j| j.status.phase == phase).collect();
        of.sort_by_key(|j| (std::cmp::Reverse(j.status.finished), j.metadata.uid));
        doomed.extend(of.into_iter().skip(kept as usize));
    }
    for job in doomed.iter().take(PER_STEP) {
        job::bury(step, job);
    }
    doomed.len() > PER_STEP
}

/// Makes the job of one run, unless it was made already.
fn begin(step: &mut Step<'_>, cron: &Object<CronJob>, at: Timestamp) -> Result<Name, ApiError> {
    let project = cron.metadata.project.clone().expect("cron jobs have a project");
    let stem: String = cron.metadata.name.as_str().chars().take(48).collect();
    let name = format!("{}-{}", stem.trim_end_matches('-'), at.as_millis() / 60_000);
    let name: Name = name.parse().expect("a name and digits");
    if let Some(there) = step.world.jobs.get(Some(&project), &name) {
        if is_of(there, cron.metadata.uid) {
            return Ok(name);
        }
        return Err(ApiError::new(Code::AlreadyExists, format!("another job is called {name}")));
    }
    step.world.refuse_unreadable::<Job>(Some(&project), &name)?;
    job::refuse_more(step.world, &project)?;
    let mut metadata = step.new_metadata(name.clone(), Some(project.clone()));
    metadata.owner = Some(cron.owner_ref());
    metadata.labels = cron.metadata.labels.clone();
    metadata.annotations.insert(DUE.into(), at.to_string());
    metadata.request_id = cron.metadata.request_id.clone();
    let job = Object::<Job>::new(metadata, cron.spec.job.clone());
    recharge(step, &project, [0; 3], job::charge(&job))?;
    step.put(job);
    let message = format!("job {name}, due at {at}");
    step.event(Some(&project), cron.owner_ref(), Severity::Normal, "Begun", message);
    step.mark(Dirty::Job((Some(project), name.clone())));
    Ok(name)
}
