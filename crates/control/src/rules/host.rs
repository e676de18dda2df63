//! Hosts: what joins, what is declared dead, what is forgotten, and what is reserved on each.

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::plan::HostReport;
use nexus_model::{AnyObject, Name, Object, Uid};

use crate::rules::instance;
use crate::scheduler::Scheduler;
use crate::step::{Dirty, Step};

/// Instances handled in one step.
const PER_STEP: usize = 12;

/// Writes what the rows reserve on a host into its status, in the step that changes those rows.
pub fn recount(step: &mut Step<'_>, name: &Name) {
    let Some(host) = step.world.host(name).cloned() else { return };
    let reserved = Scheduler::reserved(step.world.instances_on(name));
    if host.status.reserved != reserved {
        let mut host = host;
        host.status.reserved = reserved;
        step.put(host);
    }
}

/// Registers a host at its first report, or takes in what it now says of itself. Refused when its cell is full.
pub fn join(step: &mut Step<'_>, report: &HostReport) -> Result<(), String> {
    let known = step.world.host(&report.host).cloned();
    let Some(host) = known else {
        let cell = step.world.cells.get(None, &report.spec.cell);
        let Some(cell) = cell else { return Err(format!("there is no cell {}", report.spec.cell)) };
        let hosts = step.world.hosts.live.values().filter(|h| h.spec.cell == report.spec.cell).count();
        if hosts >= cell.spec.max_hosts as usize {
            return Err(format!("cell {} has {hosts} hosts, as many as it may", report.spec.cell));
        }
        let clash = step.world.hosts.live.values().find(|h| {
            h.spec.prefix6 == report.spec.prefix6
                || h.spec.prefix4 == report.spec.prefix4
                || h.spec.address == report.spec.address
        });
        if let Some(other) = clash {
            return Err(format!("its address or prefix is that of host {}", other.metadata.name));
        }
        let metadata = step.new_metadata(report.host.clone(), None);
        let mut host = Object::<Host>::new(metadata, report.spec.clone());
        host.status.boot_id = Some(report.boot_id.clone());
        host.status.agent_version = Some(report.agent_version.clone());
        host.status.since = step.now;
        step.put(host.clone());
        step.event(None, host.owner_ref(), Severity::Normal, "Joined", format!("cell {}", host.spec.cell));
        step.mark(Dirty::Host(report.host.clone()));
        return Ok(());
    };
    let mut new = host.clone();
    // What operators decide stays theirs; what the machine is, it says itself. Zone and cell never change.
    new.spec = HostSpec {
        cordoned: host.spec.cordoned,
        zone: host.spec.zone.clone(),
        cell: host.spec.cell.clone(),
        ..report.spec.clone()
    };
    new.status.boot_id = Some(report.boot_id.clone());
    new.status.agent_version = Some(report.agent_version.clone());
    let mut images = report.images.clone();
    images.sort();
    images.dedup();
    images.truncate(2_000);
    new.status.images = images;
    if new.spec != host.spec || new.status != host.status {
        if new.spec != host.spec {
            new.metadata.generation += 1;
        }
        if new.status.boot_id != host.status.boot_id {
            step.event(None, host.owner_ref(), Severity::Warning, "Rebooted", "the host has booted anew");
        }
        step.put(new);
    }
    Ok(())
}

/// Moves a host to another state, and tells people.
pub fn set_state(step: &mut Step<'_>, name: &Name, state: HostState, why: &str) {
    let Some(host) = step.world.host(name).cloned() else { return };
    if host.status.state == state {
        return;
    }
    let mut new = host.clone();
    new.status.state = state;
    new.status.since = step.now;
    if state == HostState::Dead {
        new.status.epoch += 1;
    }
    let (status, reason, severity) = match state {
        HostState::Joining => (ConditionStatus::Unknown, "Joining", Severity::Normal),
        HostState::Ready => (ConditionStatus::True, "Ready", Severity::Normal),
        HostState::Suspect => (ConditionStatus::Unknown, "Suspect", Severity::Warning),
        HostState::Dead => (ConditionStatus::False, "Dead", Severity::Warning),
    };
    set_condition(&mut new.status.conditions, "Ready", status, reason, why, step.now);
    step.put(new);
    step.event(None, host.owner_ref(), severity, reason, why);
    step.mark(Dirty::Host(name.clone()));
}

/// Looks after the instances of a host whose state or room changed.
pub fn reconcile(step: &mut Step<'_>, name: &Name) {
    let Some(host) = step.world.host(name).cloned() else { return };
    match host.status.state {
        HostState::Dead => {
            let living = |i: &&Object<Instance>| i.metadata.deleting.is_none();
            let lost: Vec<_> = step.world.instances_on(name).filter(living).take(PER_STEP).cloned().collect();
            for i in &lost {
                instance::bury(step, i, &format!("host {name} is dead: a successor runs elsewhere"));
            }
            if lost.len() == PER_STEP {
                step.mark(Dirty::Host(name.clone()));
            }
        }
        HostState::Ready => {
            // Room may have come: whoever waits is asked again.
            let waiting: Vec<Uid> = step
                .world
                .instances
                .live
                .values()
                .filter(|i| i.status.host.is_none())
                .map(|i| i.metadata.uid)
                .collect();
            for uid in waiting {
                step.mark(Dirty::Instance(uid));
            }
        }
        HostState::Joining | HostState::Suspect => {}
    }
}

/// Forgets a dead host with everything that was on it.
pub fn forget(step: &mut Step<'_>, host: &Object<Host>) -> AnyObject {
    let name = host.metadata.name.clone();
    let on_it: Vec<_> = step.world.instances_on(&name).cloned().collect();
    for i in on_it {
        let buried = match i.metadata.deleting {
            Some(_) => i,
            None => instance::bury(step, &i, &format!("host {name} was deleted")),
        };
        instance::erase(step, &buried);
    }
    if let Some(host) = step.world.host(&name).cloned() {
        step.erase(&host);
    }
    if let Some(scheduler) = &mut step.world.scheduler {
        scheduler.remove_host(&name);
    }
    let mut any = host.to_any();
    any.metadata.deleting = Some(step.now);
    any
}
