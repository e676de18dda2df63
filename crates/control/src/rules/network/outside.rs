//! What leads out of networks and into them: gateways, pools of addresses, and the addresses that lead to NICs.

use nexus_model::kind::*;
use nexus_model::{AnyObject, ApiError, Code, FieldError, Name, Object};

use super::{missing, named, network, project_of, refuse_more, refuse_used, route};
use crate::rules::network::nic;
use crate::step::{Dirty, Step};
use crate::world::World;

pub fn admit_internet_gateway(step: &Step<'_>, new: &Object<InternetGateway>) -> Result<(), ApiError> {
    let (world, project) = (&*step.world, project_of(new));
    network(world, project, &new.spec.network)?;
    let same =
        |g: &&Object<InternetGateway>| g.spec.network == new.spec.network && g.metadata.name != new.metadata.name;
    match world.internet_gateways.within(project).find(same) {
        None => Ok(()),
        Some(other) => {
            let detail = format!("network {} has internet gateway {}", new.spec.network, other.metadata.name);
            Err(ApiError::new(Code::Conflict, detail))
        }
    }
}

pub fn may_delete_internet_gateway(step: &Step<'_>, old: &Object<InternetGateway>) -> Result<(), ApiError> {
    let (world, project, its) = (&*step.world, project_of(old), &old.spec.network);
    let tables = named::<RouteTable>(world, project, "route table", |t| {
        t.spec.network == *its && t.spec.routes.iter().any(|r| r.via == RouteVia::Internet)
    });
    let floating = named::<FloatingIp>(world, project, "floating ip", |f| {
        let nic = f.spec.nic.as_ref().and_then(|nic| world.nics.get(Some(project), nic));
        nic.and_then(|nic| nic.status.network.as_ref()).is_some_and(|n| n.name == *its)
    });
    refuse_used("internet gateway", &old.metadata.name, tables.chain(floating))
}

pub fn admit_nat(step: &Step<'_>, old: Option<&Object<NatGateway>>, new: &Object<NatGateway>) -> Result<(), ApiError> {
    let (world, project) = (&*step.world, project_of(new));
    network(world, project, &new.spec.network)?;
    let have = world.nat_gateways.within(project).filter(|n| n.spec.network == new.spec.network).count();
    let have = if old.is_some() { 0 } else { have };
    refuse_more(have, MAX_NATS, &format!("network {}", new.spec.network), "NAT gateways")
}

pub fn may_delete_nat(step: &Step<'_>, old: &Object<NatGateway>) -> Result<(), ApiError> {
    let name = &old.metadata.name;
    let leads = |via: &RouteVia| matches!(via, RouteVia::Nat(to) if to == name);
    refuse_used("NAT gateway", name, route::leading(step.world, project_of(old), leads))
}

pub fn admit_pool(
    step: &Step<'_>,
    old: Option<&Object<AddressPool>>,
    new: &Object<AddressPool>,
) -> Result<(), ApiError> {
    let world = &*step.world;
    let others = || world.address_pools.live.values().filter(|p| p.metadata.name != new.metadata.name);
    if old.is_none() {
        refuse_more(others().count(), MAX_POOLS, "the region", "address pools")?;
    }
    let mut errors = Vec::new();
    for (i, cidr) in new.spec.cidrs.iter().enumerate() {
        let at = || format!("spec.cidrs[{i}]");
        if let Some(other) = others().find(|p| p.spec.cidrs.iter().any(|c| c.overlaps(cidr))) {
            errors.push(FieldError::new(at(), format!("overlaps address pool {}", other.metadata.name)));
        }
        if let Some(host) = world.hosts.live.values().find(|h| cidr.contains(h.spec.address.ip())) {
            errors.push(FieldError::new(at(), format!("has the address of host {}", host.metadata.name)));
        }
    }
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors));
    }
    let name = &new.metadata.name;
    let outside = |f: &&Object<FloatingIp>| {
        f.spec.pool == *name && f.status.address.is_some_and(|a| !new.spec.cidrs.iter().any(|c| c.contains(a)))
    };
    refuse_used("what this takes away of address pool", name, floating(world, outside))
}

fn floating<'a>(
    world: &'a World,
    which: impl FnMut(&&'a Object<FloatingIp>) -> bool + 'a,
) -> impl Iterator<Item = String> + 'a {
    let found = world.floating_ips.live.values().filter(which);
    found.map(|f| format!("floating ip {}/{}", project_of(f), f.metadata.name))
}

pub fn may_delete_pool(step: &Step<'_>, old: &Object<AddressPool>) -> Result<(), ApiError> {
    let name = &old.metadata.name;
    refuse_used("address pool", name, floating(step.world, |f| f.spec.pool == *name))
}

pub fn admit_floating(
    step: &mut Step<'_>,
    old: Option<&Object<FloatingIp>>,
    new: &mut Object<FloatingIp>,
) -> Result<(), ApiError> {
    let (world, project) = (&*step.world, project_of(new).clone());
    if old.is_none() {
        refuse_more(
            world.floating_ips.within(&project).count(),
            MAX_FLOATING,
            &format!("project {project}"),
            "floating ips",
        )?;
        let pool = world.address_pools.get(None, &new.spec.pool);
        let pool = pool.ok_or_else(|| missing("spec.pool", "address pool", &new.spec.pool))?;
        new.status.address = Some(give(world, pool, new.spec.address)?);
    }
    new.status.phase = FloatingIpPhase::Available;
    let Some(name) = &new.spec.nic else { return Ok(()) };
    let invalid = |message: String| ApiError::invalid(vec![FieldError::new("spec.nic", message)]);
    let nic = world.nics.get(Some(&project), name).ok_or_else(|| missing("spec.nic", "nic", name))?;
    let its = nic.status.network.as_ref().map(|n| n.name.clone()).unwrap_or_else(|| nic.spec.subnet.clone());
    if !route::has_gateway(world, &project, &its) {
        return Err(invalid(format!("network {its} of nic {name} has no internet gateway: make one first")));
    }
    let four = new.status.address.is_some_and(|a| a.is_ipv4());
    if (four && nic.status.address4.is_none()) || (!four && nic.status.address6.is_none()) {
        return Err(invalid(format!("nic {name} has no address of that family")));
    }
    let same = |f: &&Object<FloatingIp>| {
        f.spec.nic.as_ref() == Some(name)
            && f.metadata.name != new.metadata.name
            && f.status.address.is_some_and(|a| a.is_ipv4()) == four
    };
    if let Some(other) = world.floating_ips.within(&project).find(same) {
        return Err(ApiError::new(Code::Conflict, format!("nic {name} has floating ip {}", other.metadata.name)));
    }
    new.status.phase = FloatingIpPhase::Attached;
    Ok(())
}

fn give(
    world: &World,
    pool: &Object<AddressPool>,
    fixed: Option<std::net::IpAddr>,
) -> Result<std::net::IpAddr, ApiError> {
    let name = &pool.metadata.name;
    if let Some(address) = fixed {
        if !pool.spec.cidrs.iter().any(|cidr| cidr.contains(address)) {
            let message = format!("is not in address pool {name}");
            return Err(ApiError::invalid(vec![FieldError::new("spec.address", message)]));
        }
        if world.nets.outside.has(address) {
            let detail = format!("{address} is in use, or hosts have not confirmed yet that it is not: choose another");
            return Err(ApiError::new(Code::Conflict, detail));
        }
        return Ok(address);
    }
    let free = pool.spec.cidrs.iter().find_map(|cidr| world.nets.outside.free(cidr.first(), cidr.last()));
    free.ok_or_else(|| ApiError::new(Code::QuotaExceeded, format!("address pool {name} has no free address")))
}

pub fn delete_floating(step: &mut Step<'_>, old: &Object<FloatingIp>) -> AnyObject {
    let buried = step.bury(old);
    step.mark(Dirty::Buried(FloatingIp::PLURAL, buried.metadata.uid));
    buried.to_any()
}

/// Notes that a NIC is no more, to which floating addresses lead.
pub fn nic_gone(step: &mut Step<'_>, project: &Name, nic: &Name) {
    let its = step.world.floating_ips.within(project).filter(|f| f.spec.nic.as_ref() == Some(nic));
    let its: Vec<_> = its.filter(|f| f.status.phase == FloatingIpPhase::Attached).cloned().collect();
    for mut floating in its {
        floating.status.phase = FloatingIpPhase::Available;
        step.put(floating);
    }
}

/// Who leads to a NIC by its name.
pub fn users_of_nic<'a>(world: &'a World, project: &'a Name, nic: &'a Name) -> impl Iterator<Item = String> + 'a {
    let tables = route::leading(world, project, move |via| matches!(via, RouteVia::Nic(to) if to == nic));
    let floating = named::<FloatingIp>(world, project, "floating ip", move |f| f.spec.nic.as_ref() == Some(nic));
    let to_nic = move |b: &Object<LoadBalancer>| {
        let mut targets = b.spec.listeners.iter().flat_map(|l| &l.targets);
        targets.any(|t| matches!(&t.to, Balanced::Nic(to) if to == nic))
    };
    tables.chain(floating).chain(named::<LoadBalancer>(world, project, "load balancer", to_nic))
}

pub fn admit_balancer(
    step: &mut Step<'_>,
    old: Option<&Object<LoadBalancer>>,
    new: &mut Object<LoadBalancer>,
) -> Result<(), ApiError> {
    let (world, project) = (&*step.world, project_of(new).clone());
    let name = &new.spec.subnet;
    let subnet = world.subnets.get(Some(&project), name).ok_or_else(|| missing("spec.subnet", "subnet", name))?;
    let its = network(world, &project, &subnet.spec.network)?;
    let of_network = NetworkRef { name: its.metadata.name.clone(), uid: its.metadata.uid };
    for (i, listener) in new.spec.listeners.iter().enumerate() {
        for (j, target) in listener.targets.iter().enumerate() {
            let Balanced::Nic(name) = &target.to else { continue };
            let found = world.nics.get(Some(&project), name);
            if found.is_none_or(|nic| nic.status.network.as_ref() != Some(&of_network)) {
                let field = format!("spec.listeners[{i}].targets[{j}].to.nic");
                let message = format!("there is no nic {name} in network {}", of_network.name);
                return Err(ApiError::invalid(vec![FieldError::new(field, message)]));
            }
        }
    }
    if old.is_some() {
        return Ok(());
    }
    let have = world.load_balancers.within(&project).filter(|b| b.status.network.as_ref() == Some(&of_network)).count();
    refuse_more(have, MAX_BALANCERS, &format!("network {}", of_network.name), "load balancers")?;
    nic::give_balancer(world, &mut new.status, of_network, subnet)
        .map_err(|(_, why)| ApiError::new(Code::Conflict, why))
}

pub fn delete_balancer(step: &mut Step<'_>, old: &Object<LoadBalancer>) -> AnyObject {
    let buried = step.bury(old);
    step.mark(Dirty::Buried(LoadBalancer::PLURAL, buried.metadata.uid));
    buried.to_any()
}

pub fn admit_zone(step: &Step<'_>, old: Option<&Object<DnsZone>>, new: &Object<DnsZone>) -> Result<(), ApiError> {
    let (world, project) = (&*step.world, project_of(new));
    network(world, project, &new.spec.network)?;
    let others = || {
        let others = world.dns_zones.within(project).filter(|z| z.spec.network == new.spec.network);
        others.filter(|z| z.metadata.name != new.metadata.name)
    };
    if old.is_none() {
        refuse_more(others().count(), MAX_ZONES, &format!("network {}", new.spec.network), "DNS zones")?;
    }
    match others().find(|other| other.spec.domain == new.spec.domain) {
        None => Ok(()),
        Some(other) => {
            let detail = format!("{} is the domain of DNS zone {}", new.spec.domain, other.metadata.name);
            Err(ApiError::new(Code::Conflict, detail))
        }
    }
}
