//! Places instances, takes in what hosts report of them, and buries them.

use std::net::{Ipv4Addr, Ipv6Addr};

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::plan::InstanceReport;
use nexus_model::{Name, Object, Uid};

use crate::rules::network::{default, nic};
use crate::rules::{host, job};
use crate::step::{Dirty, Step};
use crate::surroundings::{Surroundings, waits_for_app};

/// Characters that are kept of a host's words about one part.
const PART_MESSAGE: usize = 256;

/// The infrastructure addresses of a slot on a host.
pub fn addresses(host: &HostSpec, slot: u16) -> (Ipv6Addr, Ipv4Addr) {
    let mut six = host.prefix6.segments();
    six[7] = slot;
    let mut four = host.prefix4.octets();
    four[3] = u8::try_from(slot).expect("slots end at 254");
    (six.into(), four.into())
}

/// Finds a host for an instance that has none.
pub fn reconcile(step: &mut Step<'_>, uid: Uid) {
    let living = |i: &&Object<Instance>| i.metadata.deleting.is_none();
    let Some(mut instance) = step.world.instance(uid).filter(living).cloned() else { return };
    if instance.status.host.is_some() {
        return;
    }
    default::furnish(step, &mut instance);
    let project = instance.metadata.project.clone();
    if let Err((reason, why)) = nic::ensure(step, &instance) {
        return wait(step, &instance, reason, why);
    }
    let around = Surroundings::of(step.world, &instance);
    let scheduler = step.world.scheduler.as_mut().expect("only the writer reconciles");
    let mut new = instance.clone();
    match scheduler.place(&instance, &around) {
        Ok(placed) => {
            let host = step.world.host(&placed.host).expect("placement knows the world's hosts").clone();
            let (six, four) = addresses(&host.spec, placed.slot);
            let s = &mut new.status;
            s.phase = InstancePhase::Scheduled;
            s.host = Some(placed.host.clone());
            s.zone = Some(host.spec.zone.clone());
            s.slot = Some(placed.slot);
            s.numa_nodes = placed.numa_nodes.clone();
            s.epoch = host.status.epoch + 1;
            (s.address6, s.address4) = (Some(six), Some(four));
            s.message = String::new();
            let beyond = if placed.spilled { ", beyond the project's usual cells, which are full" } else { "" };
            let node = placed.numa_nodes.iter().map(|id| format!(", NUMA node {id}")).collect::<String>();
            let message = format!("on host {}{node} in {}{beyond}", placed.host, host.spec.zone);
            set_condition(&mut s.conditions, "Scheduled", ConditionStatus::True, "Placed", &message, step.now);
            step.put(new);
            nic::follow(step, uid);
            default::tell(step, &instance);
            let scheduler = step.world.scheduler.as_ref().expect("only the writer reconciles");
            if let Some(next) = scheduler.waiting_like(&instance) {
                step.mark(Dirty::Instance(next));
            }
            wake_company(step, project.as_ref(), &instance.spec.app);
            host::recount(step, &placed.host, Some(placed.slot));
            step.event(project.as_ref(), instance.owner_ref(), Severity::Normal, "Placed", message);
        }
        Err(refusal) => wait(step, &instance, "NoHost", refusal),
    }
}

/// Notes why an instance has to wait for a host.
fn wait(step: &mut Step<'_>, instance: &Object<Instance>, reason: &str, why: String) {
    let mut new = instance.clone();
    let s = &mut new.status;
    s.phase = InstancePhase::Pending;
    s.message = why.clone();
    if set_condition(&mut s.conditions, "Scheduled", ConditionStatus::False, reason, &why, step.now) {
        step.put(new);
        step.event(instance.metadata.project.as_ref(), instance.owner_ref(), Severity::Warning, reason, why);
        mark_app(step, instance);
    }
}

/// Asks those who wait again: one of each kind that is interchangeable, for where one finds no room no other does. Each
/// that finds some asks the next.
pub fn wake(step: &mut Step<'_>) {
    let scheduler = step.world.scheduler.as_ref().expect("only the writer reconciles");
    let first: Vec<Uid> = scheduler.first_waiting().collect();
    first.into_iter().for_each(|uid| step.mark(Dirty::Instance(uid)));
}

/// The app or job that an instance belongs to.
pub fn owner(instance: &Object<Instance>) -> Dirty {
    let place = (instance.metadata.project.clone(), instance.spec.app.clone());
    if instance.spec.job.is_some() { Dirty::Job(place) } else { Dirty::App(place) }
}

/// Asks those again who wait to be with an app that has just found a place.
fn wake_company(step: &mut Step<'_>, project: Option<&Name>, app: &Name) {
    let scheduler = step.world.scheduler.as_ref().expect("only the writer reconciles");
    let first = scheduler.first_waiting().filter_map(|uid| step.world.instance(uid));
    let company: Vec<Uid> = first.filter(|i| waits_for_app(i, project, app)).map(|i| i.metadata.uid).collect();
    company.into_iter().for_each(|uid| step.mark(Dirty::Instance(uid)));
}

fn mark_app(step: &mut Step<'_>, instance: &Object<Instance>) {
    step.mark(owner(instance));
}

/// Ends an instance. Its name is free at once; capacity and address stay its own until the host confirms that it is gone.
pub fn bury(step: &mut Step<'_>, instance: &Object<Instance>, why: &str) -> Object<Instance> {
    let mut last = instance.clone();
    last.status.ready = false;
    if last.status.host.is_some() {
        last.status.phase = InstancePhase::Stopping;
    }
    last.status.message = why.to_owned();
    step.put(last.clone());
    let buried = step.bury(&last);
    step.event(instance.metadata.project.as_ref(), instance.owner_ref(), Severity::Normal, "Stopping", why);
    mark_app(step, instance);
    if buried.status.host.is_none() {
        erase(step, &buried);
    }
    buried
}

/// Forgets a buried instance whose host has confirmed that nothing of it is left.
pub fn erase(step: &mut Step<'_>, buried: &Object<Instance>) {
    step.erase(buried);
    nic::mark(step, buried.metadata.uid);
    if let Some(owner) = &buried.metadata.owner {
        let plural = if buried.spec.job.is_some() { Job::PLURAL } else { App::PLURAL };
        step.mark(Dirty::Buried(plural, owner.uid));
    }
    if let Some(project) = &buried.metadata.project {
        mark_project(step, project);
    }
    if let Some(host) = &buried.status.host {
        host::recount(step, host, None);
        step.mark(Dirty::Host(host.clone()));
    }
}

/// What was left of a project that is no more may now be gone.
fn mark_project(step: &mut Step<'_>, name: &Name) {
    let uids: Vec<_> = step.world.projects.buried.values().filter(|p| p.metadata.name == *name).collect();
    let uids: Vec<_> = uids.into_iter().map(|p| p.metadata.uid).collect();
    for uid in uids {
        step.mark(Dirty::Buried(Project::PLURAL, uid));
    }
    step.mark(Dirty::Usage(name.clone()));
}

/// A host's words about an instance, as far as they are kept.
fn message_of(report: &InstanceReport) -> &str {
    match report.message.char_indices().nth(1024) {
        Some((end, _)) => &report.message[..end],
        None => &report.message,
    }
}

/// A host's words about an instance's parts, as far as they are kept: of each part that the instance has.
fn parts_of(instance: &Object<Instance>, report: &InstanceReport) -> Vec<PartStatus> {
    let kept = |(role, part): (PartRole, &Part)| {
        let told = report.parts.iter().find(|p| p.name == part.name)?;
        let message = told.message.chars().take(PART_MESSAGE).collect();
        Some(PartStatus { role, message, ..told.clone() })
    };
    instance.spec.template.parts().all().filter_map(kept).collect()
}

/// Whether a report says anything that the instance's status does not say already.
pub fn is_news(instance: &Object<Instance>, report: &InstanceReport) -> bool {
    let s = &instance.status;
    if s.finished.is_some() {
        return false;
    }
    let known = (s.phase, s.ready, s.endpoint, s.restarts, s.started, s.exit_code, s.message.as_str(), &s.parts);
    let told = (
        report.phase,
        report.ready,
        report.endpoint,
        report.restarts,
        report.started,
        report.exit_code,
        message_of(report),
        &parts_of(instance, report),
    );
    known != told || !s.conditions.iter().any(|c| c.kind == "Ready")
}

/// Whether a report says that a job's instance has run to its end. An agent of the release before knows no jobs: it says that
/// it is about to start what has ended again.
fn has_ended(instance: &Object<Instance>, report: &InstanceReport) -> bool {
    let again = report.phase == InstancePhase::BackOff && report.exit_code.is_some();
    instance.spec.job.is_some() && (again || report.phase == InstancePhase::Exited)
}

/// Takes in the end of a job's instance: its room and its address are free, its row stays for its output.
fn end(step: &mut Step<'_>, instance: &Object<Instance>, report: &InstanceReport) {
    let mut new = instance.clone();
    let s = &mut new.status;
    s.phase = InstancePhase::Exited;
    (s.ready, s.endpoint, s.finished) = (false, None, Some(step.now));
    (s.started, s.exit_code) = (report.started.or(s.started), report.exit_code);
    message_of(report).clone_into(&mut s.message);
    s.parts = parts_of(instance, report);
    let (severity, reason) = match s.exit_code {
        Some(0) => (Severity::Normal, "Succeeded"),
        _ => (Severity::Warning, "Failed"),
    };
    let message = s.message.clone();
    set_condition(&mut s.conditions, "Ready", ConditionStatus::False, reason, &message, step.now);
    step.put(new.clone());
    nic::mark(step, new.metadata.uid);
    step.event(instance.metadata.project.as_ref(), instance.owner_ref(), severity, reason, message);
    if let Some(host) = &instance.status.host {
        host::recount(step, host, None);
        step.mark(Dirty::Host(host.clone()));
    }
    job::ended(step, &new);
}

/// Takes in what a host says of a living instance.
pub fn observe(step: &mut Step<'_>, instance: &Object<Instance>, report: &InstanceReport) {
    if has_ended(instance, report) {
        return end(step, instance, report);
    }
    let mut new = instance.clone();
    let s = &mut new.status;
    s.phase = report.phase;
    s.ready = report.ready;
    s.endpoint = report.endpoint;
    s.restarts = report.restarts;
    s.started = report.started;
    s.exit_code = report.exit_code;
    message_of(report).clone_into(&mut s.message);
    s.parts = parts_of(instance, report);
    let (status, reason) = match (s.ready, s.phase) {
        (true, _) => (ConditionStatus::True, "Serving"),
        (_, InstancePhase::Running) => (ConditionStatus::False, "NotReady"),
        (_, InstancePhase::BackOff) => (ConditionStatus::False, "BackOff"),
        _ => (ConditionStatus::False, "Starting"),
    };
    let message = s.message.clone();
    set_condition(&mut s.conditions, "Ready", status, reason, &message, step.now);
    if *s == instance.status {
        return;
    }
    let (before, after) = (&instance.status, &new.status);
    let told = match (before.phase, after.phase) {
        (a, InstancePhase::BackOff) if a != InstancePhase::BackOff => Some((Severity::Warning, "BackOff")),
        (a, InstancePhase::Running) if a != InstancePhase::Running => Some((Severity::Normal, "Started")),
        _ if before.ready != after.ready && after.ready => Some((Severity::Normal, "Ready")),
        _ if before.ready != after.ready => Some((Severity::Warning, "NotReady")),
        _ if before.message != after.message && !after.message.is_empty() && after.phase == InstancePhase::Starting => {
            Some((Severity::Normal, "Starting"))
        }
        _ => None,
    };
    if let Some((severity, reason)) = told {
        step.event(instance.metadata.project.as_ref(), instance.owner_ref(), severity, reason, after.message.clone());
    }
    let for_app = before.ready != after.ready || before.phase != after.phase || before.message != after.message;
    step.put(new);
    if for_app {
        mark_app(step, instance);
    }
}
