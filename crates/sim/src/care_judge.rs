//! What must be true, in every revision, of what the region looks after for long: rollouts and drains stop no ready instance that
//! they may not, no more instances are made than asked for, apps are scaled within their bounds and by their steps, jobs count
//! every end once, runs by the clock are begun once.
//!
//! A revision may hold several steps of the writer, and reports between them. So what is counted as ready when something was
//! stopped is what was ready before or became ready in the same revision: the most that the writer may have gone by.

use std::collections::{BTreeMap, BTreeSet};

use nexus_control::rules::cron::DUE;
use nexus_model::kind::{
    App, Autoscale, Concurrency, CronJob, Host, HostState, Instance, Job, JobPhase, Missed, Strategy,
};
use nexus_model::object::ConditionStatus;
use nexus_model::{Name, Object, Uid};
use nexus_store::WatchEvent;

use crate::care_users::Promise;
use crate::hosts::Ends;
use crate::recorder::Log;
use crate::trace::Trace;

/// One kind's rows, by their keys.
struct Rows<K: nexus_model::kind::Kind> {
    prefix: String,
    all: BTreeMap<String, Object<K>>,
}

/// How one row changed.
struct Change<K: nexus_model::kind::Kind> {
    before: Option<Object<K>>,
    after: Option<Object<K>>,
}

impl<K: nexus_model::kind::Kind> Rows<K> {
    fn new() -> Self {
        Self { prefix: format!("o/{}/", K::PLURAL), all: BTreeMap::new() }
    }

    /// Takes in a revision; answers what changed.
    fn take(&mut self, events: &[WatchEvent]) -> Vec<Change<K>> {
        let mut changes = Vec::new();
        for event in events {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            if !key.starts_with(&self.prefix) {
                continue;
            }
            let after = match event {
                WatchEvent::Put { kv, .. } => Object::<K>::from_slice(&kv.value).ok(),
                WatchEvent::Delete { .. } => None,
            };
            let before = match &after {
                Some(row) => self.all.insert(key, row.clone()),
                None => self.all.remove(&key),
            };
            changes.push(Change { before, after });
        }
        changes
    }
}

/// The reasons of instances that were deleted in a revision while they were ready, as their tombstones say. A report in the same
/// revision may have said just before that one was not ready any more: then its condition says that.
fn reasons(events: &[WatchEvent]) -> BTreeMap<Uid, String> {
    let mut found = BTreeMap::new();
    for event in events {
        if let WatchEvent::Put { kv, .. } = event
            && event.key().starts_with(b"t/instances/")
            && let Ok(instance) = Object::<Instance>::from_slice(&kv.value)
            && instance.status.conditions.iter().any(|c| c.kind == "Ready" && c.status == ConditionStatus::True)
        {
            found.insert(instance.metadata.uid, instance.status.message);
        }
    }
    found
}

fn owner(instance: &Object<Instance>) -> Option<Uid> {
    instance.metadata.owner.as_ref().map(|owner| owner.uid)
}

/// Rollouts, drains and rebalances.
pub fn apps(log: &Log, promises: &BTreeMap<Name, Promise>, trace: &Trace) {
    let (mut apps, mut instances, mut hosts) = (Rows::<App>::new(), Rows::<Instance>::new(), Rows::<Host>::new());
    for (revision, told) in log {
        let (instances_before, hosts_before) = (instances.all.clone(), hosts.all.clone());
        let drains_before = drains(&instances, &hosts);
        apps.take(&told.events);
        hosts.take(&told.events);
        let changes = instances.take(&told.events);
        if changes.is_empty() {
            continue;
        }
        let why = reasons(&told.events);
        let is_silent = |host: Option<&Name>| {
            let state = |rows: &BTreeMap<String, Object<Host>>| {
                rows.get(&format!("o/hosts/{}", host?)).map(|host| host.status.state)
            };
            let silent = |state: Option<HostState>| matches!(state, Some(HostState::Suspect | HostState::Dead));
            silent(state(&hosts_before)) && silent(state(&hosts.all))
        };
        for app in apps.all.values() {
            let Some(promise) = promises.get(&app.metadata.name) else { continue };
            let uid = app.metadata.uid;
            let mine = |i: &Object<Instance>| owner(i) == Some(uid);
            let wanted = promise.replicas as usize;
            let of = |rows: &BTreeMap<String, Object<Instance>>| rows.values().filter(|i| mine(i)).count();
            let (made, stopped): (Vec<_>, Vec<_>) = changes
                .iter()
                .filter(|c| c.before.as_ref().or(c.after.as_ref()).is_some_and(mine))
                .partition(|c| c.before.is_none());
            if promise.autoscale.is_none() && !made.is_empty() {
                let most = most(promise) + usize::from(drains_before || drains(&instances, &hosts));
                let count = of(&instances.all);
                if count > most {
                    let text =
                        format!("revision {revision}: {} has {count} instances, {most} at most", app.metadata.name);
                    trace.violation("no more instances than replicas and surge", text);
                }
            }
            let was_ready =
                |c: &&&Change<Instance>| c.before.as_ref().is_some_and(|i| i.status.ready) && c.after.is_none();
            let taken: Vec<&Object<Instance>> =
                stopped.iter().filter(was_ready).filter_map(|c| c.before.as_ref()).collect();
            let for_what = |i: &&&Object<Instance>, what: &[&str]| {
                why.get(&i.metadata.uid).is_some_and(|why| what.iter().any(|w| why.contains(w)))
            };
            let rolled = taken.iter().filter(|i| for_what(i, &["newer template"])).count();
            let drained = taken.iter().filter(|i| for_what(i, &["is drained", "rebalance"])).count();
            if rolled + drained == 0 || promise.autoscale.is_some() {
                continue;
            }
            let before = instances_before.values().filter(|i| mine(i) && i.status.ready);
            let was: BTreeSet<Uid> = before.clone().map(|i| i.metadata.uid).collect();
            let silent = before.filter(|i| drained > 0 && rolled == 0 && is_silent(i.status.host.as_ref())).count();
            let became = instances.all.values().filter(|i| mine(i) && i.status.ready);
            let became = became.filter(|i| !was.contains(&i.metadata.uid)).count();
            let left = (was.len() + became).saturating_sub(rolled + drained + silent);
            let rollouts = wanted.saturating_sub(promise.rollout.max_unavailable.floor(wanted));
            let budget = promise.disruption.least(wanted);
            let (least, property) = match (rolled, drained) {
                (_, 0) => (rollouts, "a rollout leaves as many ready as it must"),
                (0, _) => (budget, "a drain leaves an app its budget"),
                _ => (rollouts.min(budget), "a rollout leaves as many ready as it must"),
            };
            trace.count(if drained > 0 { "stopped while ready: drained" } else { "stopped while ready: replaced" });
            if left < least {
                let is =
                    |c: &Option<Object<Instance>>| c.as_ref().map(|i| if i.status.ready { "ready" } else { "unready" });
                let changed = changes.iter().filter(|c| c.before.as_ref().or(c.after.as_ref()).is_some_and(mine));
                let changed: Vec<_> = changed
                    .map(|c| {
                        let i =
                            c.before.as_ref().or(c.after.as_ref()).map(|i| (i.metadata.name.as_str(), i.metadata.uid));
                        let (name, uid) = i.expect("a change is of something");
                        let hash = c.before.as_ref().or(c.after.as_ref()).map(|i| i.spec.template_hash[..4].to_owned());
                        format!("{name} {hash:?} {:?}>{:?} {:?}", is(&c.before), is(&c.after), why.get(&uid))
                    })
                    .collect();
                let text = format!(
                    "revision {revision}: {left} of {wanted} are left of {}, {least} at least: {rolled} were replaced, {drained} \
                     drained, {silent} are silent; {} were ready, {became} became so; {changed:?}",
                    app.metadata.name,
                    was.len()
                );
                trace.violation(property, text);
            }
        }
    }
}

/// Whether instances are being moved for operators.
fn drains(instances: &Rows<Instance>, hosts: &Rows<Host>) -> bool {
    hosts.all.values().any(|host| host.spec.draining) || instances.all.values().any(|i| i.status.moving_to.is_some())
}

/// How many instances an app may have at most while a rollout is on its way.
fn most(promise: &Promise) -> usize {
    let wanted = promise.replicas as usize;
    let of_sides = match promise.rollout.strategy {
        Strategy::Rolling => wanted,
        // The shares of both are rounded up.
        Strategy::Canary => wanted + 1,
        Strategy::BlueGreen => 2 * wanted,
    };
    of_sides + promise.rollout.max_surge.ceil(wanted).max(1)
}

/// What the autoscaler decided.
pub fn scaling(log: &Log, promises: &BTreeMap<Name, Promise>, trace: &Trace) {
    let mut apps = Rows::<App>::new();
    for (revision, told) in log {
        for change in apps.take(&told.events) {
            let Some(app) = change.after else { continue };
            let Some(promise) = promises.get(&app.metadata.name) else { continue };
            let Some(bounds) = &promise.autoscale else { continue };
            let decided = |app: &Object<App>| app.status.autoscale.as_ref().map(|s| s.desired_replicas);
            let Some(now) = decided(&app) else { continue };
            if !(bounds.min_replicas..=bounds.max_replicas).contains(&now) {
                let text = format!("revision {revision}: {} is to have {now}: {bounds:?}", app.metadata.name);
                trace.violation("an app is scaled within its bounds", text);
            }
            let before = change.before.as_ref().and_then(decided).unwrap_or(promise.replicas);
            if now != before {
                trace.count(if now > before { "scaled: out" } else { "scaled: in" });
            }
            if !in_one_step(bounds, before, now) {
                let text =
                    format!("revision {revision}: {} goes from {before} to {now}: {bounds:?}", app.metadata.name);
                trace.violation("an app is scaled by its steps", text);
            }
        }
    }
}

fn in_one_step(bounds: &Autoscale, before: u32, now: u32) -> bool {
    let share = |percent: u32| before * percent / 100;
    let most = before + share(bounds.scale_out.step_percent).max(4);
    let least = before.saturating_sub(share(bounds.scale_in.step_percent).max(1));
    (least..=most).contains(&now)
}

/// Jobs and what their instances did. `ends`: how instances truly ended, as nobody inside the world can know it.
pub fn jobs(log: &Log, ends: &Ends, trace: &Trace) {
    let (mut jobs, mut instances) = (Rows::<Job>::new(), Rows::<Instance>::new());
    let mut indexes: BTreeMap<Uid, BTreeSet<u32>> = BTreeMap::new();
    let truth = ends.all();
    for (revision, told) in log {
        let mut ended: BTreeMap<Uid, (u32, u32)> = BTreeMap::new();
        let before_jobs: BTreeMap<Uid, bool> =
            jobs.all.values().map(|job| (job.metadata.uid, job.status.finished.is_some())).collect();
        for change in instances.take(&told.events) {
            let Some(now) = change.after else { continue };
            let (Some(at), Some(job)) = (now.status.finished, owner(&now)) else { continue };
            let (uid, code) = (now.metadata.uid, now.status.exit_code);
            if let Some(before) = change.before.filter(|b| b.status.finished.is_some()) {
                if (before.status.finished, before.status.exit_code) != (Some(at), code) {
                    let text = format!("revision {revision}: {uid} ended twice");
                    trace.violation("an instance that has ended never changes", text);
                }
                continue;
            }
            if code.is_some() && truth.get(&uid) != code.as_ref() {
                let text =
                    format!("revision {revision}: {uid} is said to have ended with {code:?}: {:?}", truth.get(&uid));
                trace.violation("an end is what its host saw", text);
            }
            let (good, bad) = ended.entry(job).or_default();
            *(if code == Some(0) { good } else { bad }) += 1;
            let index = now.spec.job.and_then(|job| job.index).filter(|_| code == Some(0));
            // What ends after its job has finished counts no more.
            if let Some(index) = index.filter(|_| before_jobs.get(&job) == Some(&false))
                && !indexes.entry(job).or_default().insert(index)
            {
                let text = format!("revision {revision}: index {index} of job {job} succeeded twice");
                trace.violation("an index succeeds once at most", text);
            }
        }
        for change in jobs.take(&told.events) {
            let Some(now) = change.after else { continue };
            let (name, s) = (&now.metadata.name, &now.status);
            let before = change.before.as_ref().filter(|b| b.metadata.uid == now.metadata.uid).map(|b| &b.status);
            let (had, lost) = before.map_or((0, 0), |b| (b.succeeded, b.failed));
            if let Some(before) = before.filter(|b| b.finished.is_some()) {
                let same = (before.finished, before.phase, had, lost) == (s.finished, s.phase, s.succeeded, s.failed);
                if !same {
                    let text = format!("revision {revision}: {name} was {before:?}, is {s:?}");
                    trace.violation("a job that has finished stays so", text);
                }
                continue;
            }
            let (good, bad) = ended.remove(&now.metadata.uid).unwrap_or_default();
            // Ends that come in after the verdict, in the same revision, count no more.
            let exact = s.finished.is_none();
            let counts =
                |had: u32, is: u32, new: u32| is >= had && if exact { is == had + new } else { is <= had + new };
            if !counts(had, s.succeeded, good) || !counts(lost, s.failed, bad) {
                let text = format!(
                    "revision {revision}: {name} counts {} and {}, had {had} and {lost}, and {good} and {bad} ended",
                    s.succeeded, s.failed
                );
                trace.violation("a job counts each end once", text);
            }
            if s.finished.is_none() {
                continue;
            }
            trace.count(if s.phase == JobPhase::Complete { "jobs: complete" } else { "jobs: failed" });
            let right = match s.phase {
                JobPhase::Complete => s.succeeded == now.spec.completions,
                _ => s.succeeded < now.spec.completions,
            };
            let excused = now.spec.cancelled || s.conditions.iter().any(|c| c.reason == "Replaced");
            let too_many = s.failed > now.spec.backoff_limit;
            if !right || (s.phase == JobPhase::Failed && !excused && !too_many) {
                let text = format!("revision {revision}: {name}, of {:?}: {s:?}", now.spec.completions);
                trace.violation("a job finishes when it should", text);
            }
        }
        for (job, (good, bad)) in ended {
            // Its row says so in the same revision, if it is still there and open.
            if before_jobs.get(&job) == Some(&false) && jobs.all.values().any(|j| j.metadata.uid == job) {
                let text = format!("revision {revision}: {good} and {bad} ended of job {job}, which counts none");
                trace.violation("a job counts each end once", text);
            }
        }
    }
}

/// Runs by the clock: each once, and where all are to be made up for, none left out.
pub fn crons(log: &Log, trace: &Trace) {
    let (mut jobs, mut crons) = (Rows::<Job>::new(), Rows::<CronJob>::new());
    let mut begun: BTreeMap<(Uid, String), Uid> = BTreeMap::new();
    let mut minutes: BTreeMap<Uid, BTreeSet<i64>> = BTreeMap::new();
    for (revision, told) in log {
        for change in jobs.take(&told.events) {
            let (None, Some(job)) = (change.before, change.after) else { continue };
            let Some(cron) = job.metadata.owner.as_ref().filter(|o| o.kind == "CronJob") else { continue };
            let due = job.metadata.annotations.get(DUE).cloned().unwrap_or_default();
            trace.count("runs begun by the clock");
            let minute = job.metadata.name.as_str().rsplit('-').next().and_then(|m| m.parse::<i64>().ok());
            minutes.entry(cron.uid).or_default().extend(minute);
            if begun.insert((cron.uid, due.clone()), job.metadata.uid).is_some() {
                let text = format!("revision {revision}: {}'s run of {due}", cron.name);
                trace.violation("a run by the clock is begun once", text);
            }
        }
        for change in crons.take(&told.events) {
            let (Some(before), Some(now)) = (change.before, change.after) else { continue };
            if now.spec != before.spec || now.metadata.uid != before.metadata.uid {
                continue;
            }
            if now.status.decided < before.status.decided {
                let text = format!("revision {revision}: {} goes back: {:?}", now.metadata.name, now.status);
                trace.violation("what is decided about runs stays decided", text);
            }
        }
    }
    for cron in crons.all.values() {
        let all = cron.spec.missed == Missed::All && cron.spec.concurrency == Concurrency::Allow;
        let Some(until) = cron.status.decided.filter(|_| all) else { continue };
        // Suspending it set `decided` anew: runs that were due shortly before were never promised.
        let Some(last) = cron.status.last_run else { continue };
        let (from, until) = (cron.metadata.created.as_millis() / 60_000 + 1, until.min(last).as_millis() / 60_000);
        let due: BTreeSet<i64> = (from..=until).collect();
        let begun = minutes.remove(&cron.metadata.uid).unwrap_or_default();
        let missed: Vec<_> = due.difference(&begun).collect();
        if missed.len() as u64 > cron.status.missed {
            let text =
                format!("{}: runs of the minutes {missed:?} were not begun: {:?}", cron.metadata.name, cron.status);
            trace.violation("no run by the clock is missed", text);
        }
    }
}
