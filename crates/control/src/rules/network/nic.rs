//! NICs: gives them addresses, to instances and back.
//!
//! The NICs of an instance are made with it, before it has a host, and stay until its host has confirmed that it is gone: it may
//! say good-bye over them. Then they leave what hosts are told, and when their host confirms that too, what they had is free.

use std::net::IpAddr;

use nexus_model::kind::*;
use nexus_model::plan::Mac;
use nexus_model::{AnyObject, ApiError, Code, Digest, FieldError, Name, Object, Uid};

use super::{default, missing, outside, project_of, refuse_more};
use crate::rules::app::Missing;
use crate::step::{Dirty, Step};
use crate::world::{World, key_of};

/// The instance that a NIC was made with.
pub fn owner(nic: &Object<Nic>) -> Option<Uid> {
    nic.metadata.owner.as_ref().filter(|o| o.kind == Instance::KIND).map(|o| o.uid)
}

/// What a template's NICs name, if all of it is there and fits together.
pub fn resolve(world: &World, project: Option<&Name>, nics: &[TemplateNic]) -> Result<(), Missing> {
    for nic in nics {
        let Some(subnet) = world.subnets.get(project, &nic.subnet) else {
            let message = format!("there is no subnet {} here: apply one, or take it out of the NICs", nic.subnet);
            return Err(("SubnetNotFound", message));
        };
        for name in &nic.security_groups {
            let group = world.security_groups.get(project, name);
            if group.is_none_or(|group| group.spec.network != subnet.spec.network) {
                let message = format!("there is no security group {name} in network {}", subnet.spec.network);
                return Err(("SecurityGroupNotFound", message));
            }
        }
    }
    Ok(())
}

/// The zone that all of a template's NICs leave to an instance, if they are bound to any.
pub fn zones<'a>(
    world: &'a World,
    project: Option<&'a Name>,
    nics: &'a [TemplateNic],
) -> impl Iterator<Item = &'a Name> {
    nics.iter().filter_map(move |nic| world.subnets.get(project, &nic.subnet)?.spec.zone.as_ref())
}

/// A hardware address made of a NIC's id alone, unless another of the network has it: unicast, locally administered.
fn mac_of(world: &World, network: Uid, nic: Uid) -> Mac {
    let held = world.nets.held(network);
    let made = (0u32..).map(|n| {
        let hash = Digest::of(format!("{nic}/{n}").as_bytes()).hex();
        let byte = |at: usize| u8::from_str_radix(&hash[at * 2..at * 2 + 2], 16).expect("hexadecimal digits");
        Mac([0x06, byte(0), byte(1), byte(2), byte(3), byte(4)])
    });
    let mut free = made.filter(|mac| !held.is_some_and(|held| held.has_mac(*mac)));
    free.next().expect("a network has fewer NICs than there are hardware addresses")
}

fn full(subnet: &Object<Subnet>, taken: u128) -> Missing {
    let message = format!("subnet {} has no free IPv4 address: {taken} of {taken} are in use", subnet.metadata.name);
    ("NoAddress", message)
}

/// Gives a NIC without a network its addresses in a subnet: those that its spec asks for, else the first that are free.
fn give(world: &World, nic: &mut Object<Nic>, subnet: &Object<Subnet>) -> Result<(), Missing> {
    let network = world.networks.get(nic.metadata.project.as_ref(), &subnet.spec.network);
    let Some(network) = network.map(|n| NetworkRef { name: n.metadata.name.clone(), uid: n.metadata.uid }) else {
        return Err(("NetworkNotFound", format!("there is no network {}", subnet.spec.network)));
    };
    let (nets, s) = (&world.nets, &mut nic.status);
    let six_is_free = |range| {
        nets.free6(network.uid, range)
            .ok_or_else(|| ("NoAddress", format!("subnet {} has no free IPv6 address", subnet.metadata.name)))
    };
    s.address4 = match (nic.spec.address4, subnet.spec.range4()) {
        (Some(fixed), _) => Some(fixed),
        (None, Some(range)) => {
            let free = nets.free4(network.uid, range);
            Some(free.ok_or_else(|| full(subnet, nets.taken4(network.uid, range)))?)
        }
        (None, None) => None,
    };
    s.address6 = match (nic.spec.address6, subnet.spec.range6()) {
        (Some(fixed), _) => Some(fixed),
        (None, Some(range)) => Some(six_is_free(range)?),
        (None, None) => None,
    };
    s.mac = Some(mac_of(world, network.uid, nic.metadata.uid));
    s.network = Some(network);
    Ok(())
}

/// Gives a load balancer its address: of the subnet's IPv4 network, else of its IPv6 network.
pub fn give_balancer(
    world: &World,
    s: &mut LoadBalancerStatus,
    network: NetworkRef,
    subnet: &Object<Subnet>,
) -> Result<(), Missing> {
    let nets = &world.nets;
    if let Some(range) = subnet.spec.range4() {
        let free = nets.free4(network.uid, range);
        s.address4 = Some(free.ok_or_else(|| full(subnet, nets.taken4(network.uid, range)))?);
    } else if let Some(range) = subnet.spec.range6() {
        let none = || ("NoAddress", format!("subnet {} has no free IPv6 address", subnet.metadata.name));
        s.address6 = Some(nets.free6(network.uid, range).ok_or_else(none)?);
    }
    s.network = Some(network);
    Ok(())
}

/// Checks the addresses that a user asks for.
fn check_fixed(world: &World, spec: &NicSpec, subnet: &Object<Subnet>) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    let outside = |family: &str| format!("is none of subnet {}'s {family} addresses for NICs", subnet.metadata.name);
    if let Some(four) = spec.address4
        && !subnet.spec.range4().is_some_and(|(first, last)| (first..=last).contains(&four))
    {
        errors.push(FieldError::new("spec.address4", outside("IPv4")));
    }
    if let Some(six) = spec.address6
        && !subnet.spec.range6().is_some_and(|(first, last)| (first..=last).contains(&six))
    {
        errors.push(FieldError::new("spec.address6", outside("IPv6")));
    }
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors));
    }
    let network = world.networks.get(subnet.metadata.project.as_ref(), &subnet.spec.network);
    let held = network.and_then(|n| world.nets.held(n.metadata.uid));
    let fixed = spec.address4.map(IpAddr::from).into_iter().chain(spec.address6.map(IpAddr::from));
    for address in fixed {
        if held.is_some_and(|held| held.has(address)) {
            let detail = format!(
                "{address} is in use in network {}, or its host has not confirmed yet that it is not: choose another",
                subnet.spec.network
            );
            return Err(ApiError::new(Code::Conflict, detail));
        }
    }
    Ok(())
}

fn refuse_full(world: &World, subnet: &Object<Subnet>) -> Result<(), ApiError> {
    let network = world.networks.get(subnet.metadata.project.as_ref(), &subnet.spec.network);
    let have = network.and_then(|n| world.nets.held(n.metadata.uid)).map_or(0, |held| held.nics);
    refuse_more(have, MAX_NICS, &format!("network {}", subnet.spec.network), "NICs")
}

pub fn admit(step: &mut Step<'_>, old: Option<&Object<Nic>>, new: &mut Object<Nic>) -> Result<(), ApiError> {
    let world = &*step.world;
    let project = project_of(new).clone();
    if let Some(old) = old.filter(|old| owner(old).is_some() && old.spec != new.spec) {
        let owner = old.metadata.owner.as_ref().map(|o| o.name.to_string()).unwrap_or_default();
        let detail = format!("nic {} was made with instance {owner}: change its app", old.metadata.name);
        return Err(ApiError::new(Code::Conflict, detail));
    }
    let name = &new.spec.subnet;
    let subnet = world.subnets.get(Some(&project), name).ok_or_else(|| missing("spec.subnet", "subnet", name))?;
    for (i, group) in new.spec.security_groups.iter().enumerate() {
        let found = world.security_groups.get(Some(&project), group);
        if found.is_none_or(|found| found.spec.network != subnet.spec.network) {
            let message = format!("there is no security group {group} in network {}", subnet.spec.network);
            return Err(ApiError::invalid(vec![FieldError::new(format!("spec.securityGroups[{i}]"), message)]));
        }
    }
    let before = old.and_then(|old| old.spec.instance.as_ref());
    if let Some(instance) = new.spec.instance.as_ref().filter(|name| Some(*name) != before) {
        let found = world.instances.get(Some(&project), instance);
        let found = found.ok_or_else(|| missing("spec.instance", "instance", instance))?;
        if let Err(message) = fits(world, new.metadata.uid, subnet, found) {
            return Err(ApiError::invalid(vec![FieldError::new("spec.instance", message)]));
        }
    }
    if let Some(old) = old {
        if old.spec.forwards && !new.spec.forwards {
            let name = &old.metadata.name;
            let leads = |via: &RouteVia| matches!(via, RouteVia::Nic(to) if to == name);
            super::refuse_used("nic", name, super::route::leading(world, &project, leads))?;
        }
        return Ok(());
    }
    refuse_full(world, subnet)?;
    check_fixed(world, &new.spec, subnet)?;
    give(world, new, subnet).map_err(|(_, message)| ApiError::new(Code::Conflict, message))?;
    new.status.phase = if new.spec.instance.is_none() { NicPhase::Available } else { NicPhase::Pending };
    Ok(())
}

/// Whether an instance can have a NIC of a subnet beside those that it has; else why not.
fn fits(world: &World, nic: Uid, subnet: &Object<Subnet>, instance: &Object<Instance>) -> Result<(), String> {
    let name = &instance.metadata.name;
    if instance.spec.template.runtime == Runtime::Function {
        return Err(format!(
            "instance {name} is a function's, which has no interfaces but one in its project's default network"
        ));
    }
    if instance.status.finished.is_some() {
        return Err(format!("instance {name} has run to its end"));
    }
    let others = world.nets.of_instance(instance.metadata.uid).filter(|uid| *uid != nic).count();
    if others >= MAX_INSTANCE_NICS {
        return Err(format!("instance {name} has {MAX_INSTANCE_NICS} NICs, which is the most"));
    }
    match (&subnet.spec.zone, &instance.status.zone) {
        (Some(wanted), Some(zone)) if wanted != zone => {
            Err(format!("subnet {} is of zone {wanted}, instance {name} is in {zone}", subnet.metadata.name))
        }
        _ => Ok(()),
    }
}

pub fn may_delete(step: &Step<'_>, old: &Object<Nic>) -> Result<(), ApiError> {
    let name = &old.metadata.name;
    let Some(instance) = owner(old).and_then(|uid| step.world.instance(uid)) else {
        return super::refuse_used("nic", name, outside::users_of_nic(step.world, project_of(old), name));
    };
    let detail =
        format!("nic {name} was made with instance {}: delete that, or change its app", instance.metadata.name);
    Err(ApiError::new(Code::Conflict, detail))
}

pub fn delete(step: &mut Step<'_>, old: &Object<Nic>) -> AnyObject {
    let mut any = old.to_any();
    any.metadata.deleting = Some(step.now);
    release(step, old);
    any
}

/// The hosts that may still have a NIC that its host is to part with.
fn left_behind(world: &World, nic: &Object<Nic>) -> Vec<Name> {
    let mut hosts: Vec<Name> = nic.status.leaving.iter().chain(&nic.status.host).cloned().collect();
    hosts.sort();
    hosts.dedup();
    hosts.retain(|host| world.host(host).is_some());
    hosts
}

/// Ends a NIC. Its name is free at once; its addresses are when the hosts that had it have confirmed that they have not.
pub fn release(step: &mut Step<'_>, nic: &Object<Nic>) {
    outside::nic_gone(step, project_of(nic), &nic.metadata.name);
    let mut last = nic.clone();
    last.status.leaving = left_behind(step.world, nic);
    (last.status.host, last.status.phase) = (None, NicPhase::Pending);
    if last.status.leaving.is_empty() {
        return erase(step, nic);
    }
    step.bury(&last);
}

fn erase(step: &mut Step<'_>, nic: &Object<Nic>) {
    step.erase(nic);
    // An instance may wait for an address.
    step.mark(Dirty::Room);
}

/// Makes those NICs of an instance that its template asks for and that are not there yet: all, or none and why.
pub fn ensure(step: &mut Step<'_>, instance: &Object<Instance>) -> Result<(), Missing> {
    let wanted = &instance.spec.template.nics;
    let project = instance.metadata.project.as_ref();
    let has: Vec<Option<u8>> = step.world.nics_of(instance.metadata.uid).iter().map(|nic| nic.status.index).collect();
    let indexed = (0u8..).zip(wanted);
    let missing: Vec<_> = indexed.filter(|(index, _)| !has.contains(&Some(*index))).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if let Some(project) = project {
        default::ensure(step, project, wanted)?;
    }
    resolve(step.world, project, wanted)?;
    let mut made = Vec::new();
    for (index, template) in missing {
        match make(step, instance, template, index) {
            Ok(nic) => made.push(nic),
            Err(why) => {
                made.iter().for_each(|nic| step.erase(nic));
                return Err(why);
            }
        }
    }
    Ok(())
}

fn make(
    step: &mut Step<'_>,
    instance: &Object<Instance>,
    template: &TemplateNic,
    index: u8,
) -> Result<Object<Nic>, Missing> {
    let project = instance.metadata.project.as_ref();
    let subnet = step.world.subnets.get(project, &template.subnet).cloned();
    let subnet = subnet.ok_or_else(|| ("SubnetNotFound", format!("there is no subnet {}", template.subnet)))?;
    refuse_full(step.world, &subnet).map_err(|e| ("TooManyNics", default::advise(&subnet, e.detail)))?;
    let stem: String = instance.spec.app.as_str().chars().take(50).collect();
    let (stem, uid) = (stem.trim_end_matches('-'), instance.metadata.uid);
    // Whoever has taken such a name keeps it.
    let names = [format!("{stem}-{}-{index}", uid.short()), format!("nic-{uid}-{index}")];
    let names = names.map(|name| name.parse::<Name>().expect("a name, hexadecimal digits and a number"));
    let free = |name: &Name| {
        step.world.nics.get(project, name).is_none() && step.world.refuse_unreadable::<Nic>(project, name).is_ok()
    };
    let Some(name) = names.into_iter().find(free) else {
        return Err(("NameTaken", format!("NICs have the names that NIC {index} of the instance could have")));
    };
    let mut metadata = step.new_metadata(name, project.cloned());
    metadata.owner = Some(instance.owner_ref());
    metadata.request_id = instance.metadata.request_id.clone();
    let spec = NicSpec {
        subnet: template.subnet.clone(),
        security_groups: template.security_groups.clone(),
        rate: template.rate,
        forwards: template.forwards,
        instance: Some(instance.metadata.name.clone()),
        ..NicSpec::default()
    };
    let mut nic = Object::<Nic>::new(metadata, spec);
    give(step.world, &mut nic, &subnet)?;
    (nic.status.instance, nic.status.index) = (Some(uid), Some(index));
    step.put(nic.clone());
    Ok(nic)
}

/// Tells the NICs of an instance where it is now.
pub fn follow(step: &mut Step<'_>, instance: Uid) {
    let nics: Vec<Uid> = step.world.nets.of_instance(instance).collect();
    nics.into_iter().for_each(|nic| reconcile(step, nic));
}

/// Has the NICs of an instance looked at that is no more, or has ended.
pub fn mark(step: &mut Step<'_>, instance: Uid) {
    let nics: Vec<Uid> = step.world.nets.of_instance(instance).collect();
    nics.into_iter().for_each(|nic| step.mark(Dirty::Nic(nic)));
}

/// The instance that has a NIC, or is to have it: also one that is on its way out.
fn instance_of<'a>(world: &'a World, nic: &Object<Nic>) -> Option<&'a Object<Instance>> {
    if let Some(uid) = owner(nic) {
        return world.instance(uid).filter(|i| i.status.finished.is_none());
    }
    let name = nic.spec.instance.as_ref()?;
    let living = world.instances.get(nic.metadata.project.as_ref(), name);
    let last = || world.instance(nic.status.instance?).filter(|i| i.metadata.name == *name);
    living.or_else(last).filter(|i| i.status.finished.is_none())
}

pub fn reconcile(step: &mut Step<'_>, uid: Uid) {
    let Some(nic) = step.world.nic(uid).cloned() else { return };
    if nic.metadata.deleting.is_some() {
        let known = |host: &Name| step.world.host(host).is_some();
        if !nic.status.leaving.iter().any(known) {
            erase(step, &nic);
        }
        return;
    }
    let instance = instance_of(step.world, &nic).cloned();
    if instance.is_none() && owner(&nic).is_some() {
        return release(step, &nic);
    }
    let mut new = nic.clone();
    let s = &mut new.status;
    s.message = String::new();
    match &instance {
        None => {
            (s.instance, s.index) = (None, None);
            s.phase = if nic.spec.instance.is_none() { NicPhase::Available } else { NicPhase::Pending };
            if let Some(name) = &nic.spec.instance {
                s.message = format!("there is no instance {name} any more: give the NIC to another");
            }
        }
        Some(i) => attach(step.world, &nic, i, s),
    }
    let host = instance.filter(|_| s.instance.is_some()).and_then(|i| i.status.host);
    s.leaving.retain(|name| step.world.host(name).is_some() && Some(name) != host.as_ref());
    if s.host != host {
        let left = s.host.take().filter(|name| step.world.host(name).is_some() && !s.leaving.contains(name));
        s.leaving.extend(left);
        s.leaving.sort();
        s.host = host;
    }
    if s.instance.is_some() {
        s.phase = if s.host.is_some() { NicPhase::Attached } else { NicPhase::Pending };
        if s.host.is_none() {
            s.message = "its instance has no host yet".into();
        }
    }
    if new.status != nic.status {
        let left = new.status.leaving != nic.status.leaving;
        step.put(new.clone());
        if left {
            // What a host says of the row as it was is no word about this.
            step.unsettle(&new);
        }
    }
}

/// Gives a NIC to an instance, as the first of its places that is free, or says why it can't have it.
fn attach(world: &World, nic: &Object<Nic>, instance: &Object<Instance>, s: &mut NicStatus) {
    let uid = instance.metadata.uid;
    if s.instance == Some(uid) {
        return;
    }
    (s.instance, s.index, s.phase) = (None, None, NicPhase::Pending);
    let Some(subnet) = world.subnets.get(nic.metadata.project.as_ref(), &nic.spec.subnet) else { return };
    if let Err(why) = fits(world, nic.metadata.uid, subnet, instance) {
        s.message = why;
        return;
    }
    let others = world.nics_of(uid);
    let most = u8::try_from(MAX_INSTANCE_NICS).expect("an instance has few NICs");
    // Those of its template have the first places, made or not.
    let own = u8::try_from(instance.spec.template.nics.len()).unwrap_or(most);
    let free = |index: &u8| !others.iter().any(|other| other.status.index == Some(*index));
    match (own..most).find(free) {
        Some(index) => (s.instance, s.index) = (Some(uid), Some(index)),
        None => s.message = format!("instance {} has {most} NICs, which is the most", instance.metadata.name),
    }
}

/// Takes in which revision of its networks a host has applied, as far as fits in a step: what it had and has not any more is
/// free. Nothing of it is left on a host that knows no networks.
pub fn confirm(step: &mut Step<'_>, host: &Name, applied: Option<u64>) {
    let applied = applied.unwrap_or(u64::MAX);
    let before = step.world.nets.applied.insert(host.clone(), applied);
    if before != Some(applied) || applied == u64::MAX {
        let waiting: Vec<Dirty> = super::waiting(step.world).collect();
        waiting.into_iter().for_each(|dirty| step.mark(dirty));
    }
    let leaving: Vec<Uid> = step.world.nets.leaving(host).collect();
    for uid in leaving {
        if step.is_long() {
            return;
        }
        let Some(nic) = step.world.nic(uid) else { continue };
        // What has not been committed yet nobody has been told.
        let told = step.world.revisions.get(&key_of(nic)).copied().filter(|_| step.committed_revision(nic).is_some());
        if told.is_none_or(|at| applied < at) {
            continue;
        }
        let mut new = nic.clone();
        new.status.leaving.retain(|name| name != host);
        if new.metadata.deleting.is_some() && new.status.leaving.is_empty() {
            let old = nic.clone();
            erase(step, &old);
        } else {
            step.put(new);
        }
    }
}

/// What a host had that is deleted is nobody's to confirm.
pub fn forget_host(step: &mut Step<'_>, host: &Name) {
    let leaving: Vec<Uid> = step.world.nets.leaving(host).collect();
    leaving.into_iter().for_each(|uid| step.mark(Dirty::Nic(uid)));
    let waiting: Vec<Dirty> = super::waiting(step.world).collect();
    waiting.into_iter().for_each(|dirty| step.mark(dirty));
}
