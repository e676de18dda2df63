//! Hosts: what joins, what is declared dead, what is forgotten, and what is reserved on each.

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::plan::HostReport;
use nexus_model::{AnyObject, Name, Object};

use crate::numa;
use crate::rules::network::nic;
use crate::rules::{drain, instance};
use crate::scheduler::Scheduler;
use crate::step::{Dirty, Step};
use crate::world::addresses_of;

/// Instances handled in one step.
const PER_STEP: usize = 12;

/// Writes what the rows reserve on a host into its status, in the step that changes those rows, and which address slot
/// was given, if one was.
pub fn recount(step: &mut Step<'_>, name: &Name, given: Option<u16>) {
    let Some(host) = step.world.host(name).cloned() else { return };
    let reserved = Scheduler::reserved(step.world.instances_on(name));
    let last_slot = given.unwrap_or(host.status.last_slot);
    let (classes, storage) = Scheduler::reserved_classes(step.world.instances_on(name));
    let same = (&host.status.reserved_classes, &host.status.reserved_storage) == (&classes, &storage);
    let numa_nodes = numa::rooms(&host, &reserved, step.world.instances_on(name));
    let same = same && host.status.numa_nodes == numa_nodes;
    if host.status.reserved != reserved || host.status.last_slot != last_slot || !same {
        let mut host = host;
        host.status.numa_nodes = numa_nodes;
        (host.status.reserved_classes, host.status.reserved_storage) = (classes, storage);
        host.status.reserved = reserved;
        host.status.last_slot = last_slot;
        step.put(host);
    }
}

/// Registers a host at its first report, or takes in what it now says of itself. Refused when its cell is full.
pub fn join(step: &mut Step<'_>, report: &HostReport) -> Result<(), String> {
    let known = step.world.host(&report.host);
    // Nearly every report says nothing new of the host itself; that must cost nothing.
    if known.is_some_and(|host| says_the_same(host, report)) {
        return Ok(());
    }
    let mut declared = numa::bounded(&report.spec);
    declared.network_trouble = network_trouble(report, &declared).to_owned();
    let Some(host) = known.cloned() else {
        step.world.refuse_unreadable::<Host>(None, &report.host).map_err(|e| e.detail)?;
        let cell = choose_cell(step, &report.spec)?;
        let clash = addresses_of(&report.spec).iter().find_map(|a| step.world.host_addresses.get(a).cloned());
        if let Some(other) = clash {
            return Err(format!("its address or prefix is that of host {other}"));
        }
        let metadata = step.new_metadata(report.host.clone(), None);
        let mut host = Object::<Host>::new(metadata, HostSpec { cell, ..declared });
        host.status.numa_nodes = numa::rooms(&host, &Capacity::default(), std::iter::empty());
        host.status.boot_id = Some(report.boot_id.clone());
        host.status.agent_version = Some(report.agent_version.clone());
        host.status.certificate_ends = report.certificate_ends;
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
        draining: host.spec.draining,
        zone: host.spec.zone.clone(),
        cell: host.spec.cell.clone(),
        ..declared
    };
    if new.spec != host.spec {
        new.status.numa_nodes = numa::rooms(&new, &host.status.reserved, step.world.instances_on(&report.host));
    }
    new.status.boot_id = Some(report.boot_id.clone());
    new.status.agent_version = Some(report.agent_version.clone());
    new.status.certificate_ends = report.certificate_ends;
    let mut images = report.images.clone();
    images.sort();
    images.dedup();
    images.truncate(2_000);
    new.status.images = images;
    if new.spec != host.spec || new.status != host.status {
        if new.spec != host.spec {
            new.metadata.generation += 1;
            // It may have what somebody waits for.
            step.mark(Dirty::Host(report.host.clone()));
        }
        if new.status.boot_id != host.status.boot_id {
            step.event(None, host.owner_ref(), Severity::Warning, "Rebooted", "the host has booted anew");
        }
        step.put(new);
    }
    Ok(())
}

/// Why tenants' networks can't be on a host, if that is so.
fn network_trouble<'a>(report: &HostReport, declared: &'a HostSpec) -> &'a str {
    match report.networks {
        None if declared.network_trouble.is_empty() => "its agent has no part in tenants' networks",
        _ => &declared.network_trouble,
    }
}

/// Whether a report says of a host what is known.
fn says_the_same(host: &Object<Host>, report: &HostReport) -> bool {
    let HostSpec {
        zone: _,
        cell: _,
        cordoned: _,
        draining: _,
        rack,
        fault_domain,
        address,
        prefix6,
        prefix4,
        runtimes,
        capacity,
        classes,
        storage,
        numa_nodes,
        numa_trouble,
        network_trouble: trouble,
    } = &host.spec;
    let said = &report.spec;
    (rack, address, prefix6, prefix4) == (&said.rack, &said.address, &said.prefix6, &said.prefix4)
        && (runtimes, capacity, classes) == (&said.runtimes, &said.capacity, &said.classes)
        && (storage, fault_domain) == (&said.storage, &said.fault_domain)
        && (numa_nodes, numa_trouble) == (&said.numa_nodes, &said.numa_trouble)
        && trouble == network_trouble(report, said)
        && host.status.boot_id.as_deref() == Some(report.boot_id.as_str())
        && host.status.agent_version.as_deref() == Some(report.agent_version.as_str())
        && host.status.images == report.images
        && host.status.certificate_ends == report.certificate_ends
}

/// The cell of a new host: the one that it names, or, of a zone's cells with room, the one with the fewest hosts. When
/// all are full a new one is made.
fn choose_cell(step: &mut Step<'_>, spec: &HostSpec) -> Result<Name, String> {
    let scheduler = step.world.scheduler.as_ref().expect("only the writer takes hosts in");
    let hosts_in = |cell: &Name| scheduler.hosts_in(cell).len();
    if spec.cell != ANY_CELL {
        let Some(cell) = step.world.cells.get(None, &spec.cell) else {
            return Err(format!("there is no cell {}", spec.cell));
        };
        let hosts = hosts_in(&spec.cell);
        if hosts >= cell.spec.max_hosts as usize {
            return Err(format!("cell {} has {hosts} hosts, as many as it may", spec.cell));
        }
        let first = || scheduler.hosts_in(&spec.cell).find_map(|name| step.world.host(name)).map(|h| &h.spec.zone);
        if let Some(zone) = cell.spec.zone.as_ref().or_else(first).filter(|zone| **zone != spec.zone) {
            return Err(format!("cell {} is in {zone}, this host in {}", spec.cell, spec.zone));
        }
        return Ok(spec.cell.clone());
    }
    let is_here = |cell: &&Object<Cell>| {
        let first = || scheduler.hosts_in(&cell.metadata.name).find_map(|name| step.world.host(name));
        match &cell.spec.zone {
            Some(zone) => *zone == spec.zone,
            None => first().is_none_or(|host| host.spec.zone == spec.zone),
        }
    };
    let here = step.world.cells.live.values().filter(is_here);
    let counted = here.map(|cell| (hosts_in(&cell.metadata.name), cell));
    let with_room = counted.filter(|(hosts, cell)| *hosts < cell.spec.max_hosts as usize);
    if let Some((_, cell)) = with_room.min_by_key(|(hosts, cell)| (*hosts, cell.metadata.name.clone())) {
        return Ok(cell.metadata.name.clone());
    }
    let named = |n: usize| format!("{}-cell-{n}", spec.zone).parse::<Name>();
    let free = (1..).map(named).find(|name| match name {
        Ok(name) => {
            step.world.cells.get(None, name).is_none() && step.world.refuse_unreadable::<Cell>(None, name).is_ok()
        }
        Err(_) => true,
    });
    let name =
        free.expect("numbers never end").map_err(|e| format!("no name for another cell in {}: {e}", spec.zone))?;
    let metadata = step.new_metadata(name.clone(), None);
    let cell = Object::<Cell>::new(metadata, CellSpec { zone: Some(spec.zone.clone()), ..CellSpec::default() });
    step.put(cell.clone());
    step.event(None, cell.owner_ref(), Severity::Normal, "CellMade", "every other cell of the zone is full");
    Ok(name)
}

/// Moves a host to another state, and tells people.
pub fn set_state(step: &mut Step<'_>, name: &Name, state: HostState, why: &str) {
    let Some(host) = step.world.host(name).filter(|h| h.status.state != state).cloned() else { return };
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

/// Follows what an operator decided. Whether the instances here are to go or to stay, is for their apps to look at.
pub fn decided(step: &mut Step<'_>, name: &Name) {
    let apps: Vec<_> = step.world.instances_on(name).map(instance::owner).collect();
    apps.into_iter().for_each(|app| step.mark(app));
    step.mark(Dirty::Host(name.clone()));
}

/// Looks after the instances of a host whose state or room changed.
pub fn reconcile(step: &mut Step<'_>, name: &Name) {
    drain::tell(step, name);
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
            // Some may have waited for what only it could do, and can do without.
            step.mark(Dirty::Room);
        }
        HostState::Ready => {
            // One step for however many hosts have room again.
            step.mark(Dirty::Room);
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
    nic::forget_host(step, &name);
    step.mark(Dirty::Room);
    let mut any = host.to_any();
    any.metadata.deleting = Some(step.now);
    any
}
