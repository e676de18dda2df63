//! Tenants' networks: what may be written, what names what, and what has to go before what.
//!
//! Whatever is named must be there when it is named, and may not go while it is: so what hosts are told never points nowhere.

pub mod default;
pub mod nic;
pub mod outside;
pub mod peering;
pub mod route;

use nexus_env::RngExt;
use nexus_model::kind::*;
use nexus_model::{AnyObject, ApiError, Cidr, Code, FieldError, Name, Object, OwnerRef, Uid};

use crate::rules::job;
use crate::step::{Dirty, Step};
use crate::world::{Stored, World, key_of};

/// So many users are named in a refusal.
const NAMED: usize = 5;

/// The object whose step could not be taken.
pub(crate) fn regarding(world: &World, item: &Dirty) -> Option<(Option<Name>, OwnerRef)> {
    match item {
        Dirty::Nic(uid) => world.nic(*uid).map(|o| (o.metadata.project.clone(), o.owner_ref())),
        Dirty::Peering(place) => world.peerings.live.get(place).map(|o| (place.0.clone(), o.owner_ref())),
        _ => None,
    }
}

pub(crate) fn project_of<K: Kind>(object: &Object<K>) -> &Name {
    object.metadata.project.as_ref().expect("what is of networks has a project")
}

pub(crate) fn missing(field: &str, what: &str, name: &Name) -> ApiError {
    let message = format!("there is no {what} {name} in this project and region");
    ApiError::invalid(vec![FieldError::new(field, message)])
}

/// The network that an object of the same project names.
pub(crate) fn network<'a>(world: &'a World, project: &Name, name: &Name) -> Result<&'a Object<Network>, ApiError> {
    world.networks.get(Some(project), name).ok_or_else(|| missing("spec.network", "network", name))
}

/// Refuses one more than there may be.
pub(crate) fn refuse_more(have: usize, most: usize, whose: &str, what: &str) -> Result<(), ApiError> {
    if have < most {
        return Ok(());
    }
    let detail = format!("{whose} has {most} {what}, which is the most: delete some first");
    Err(ApiError::new(Code::QuotaExceeded, detail))
}

/// Refuses to delete what others name. `users` are such as `nic a` or `app b`.
pub(crate) fn refuse_used(what: &str, name: &Name, users: impl Iterator<Item = String>) -> Result<(), ApiError> {
    let users: Vec<String> = users.take(NAMED + 1).collect();
    if users.is_empty() {
        return Ok(());
    }
    let more = if users.len() > NAMED { " and others" } else { "" };
    let shown = users[..users.len().min(NAMED)].join(", ");
    Err(ApiError::new(Code::Conflict, format!("{what} {name} is used by {shown}{more}: delete or change them first")))
}

/// What of a kind in a project names something, such as `subnet web`.
fn named<'a, K: Stored>(
    world: &'a World,
    project: &'a Name,
    what: &'a str,
    names: impl Fn(&Object<K>) -> bool + 'a,
) -> impl Iterator<Item = String> + 'a {
    let all = K::table(world).within(project).filter(move |o| names(o));
    all.map(move |o| format!("{what} {}", o.metadata.name))
}

/// The apps and jobs of a project whose templates say something.
fn templates<'a>(
    world: &'a World,
    project: &'a Name,
    says: impl Fn(&TemplateNic) -> bool + Copy + 'a,
) -> impl Iterator<Item = String> + 'a {
    let apps = named::<App>(world, project, "app", move |a| a.spec.nics.iter().any(says));
    let of_job = move |j: &Object<Job>| j.status.finished.is_none() && j.spec.template.nics.iter().any(says);
    let jobs = named::<Job>(world, project, "job", of_job);
    let crons = named::<CronJob>(world, project, "cron job", move |c| c.spec.job.template.nics.iter().any(says));
    apps.chain(jobs).chain(crons)
}

/// Has those look again who wait for something of a network to be there.
fn wake(step: &mut Step<'_>, project: &Name, says: impl Fn(&TemplateNic) -> bool + Copy) {
    let apps = step.world.apps.within(project).filter(|a| a.spec.nics.iter().any(says));
    let apps: Vec<_> = apps.map(|a| Dirty::App((a.metadata.project.clone(), a.metadata.name.clone()))).collect();
    let jobs = job::waiting_for(step.world, project, |t| t.nics.iter().any(says));
    apps.into_iter().chain(jobs).for_each(|dirty| step.mark(dirty));
    step.mark(Dirty::Room);
}

pub fn admit_network(
    step: &mut Step<'_>,
    old: Option<&Object<Network>>,
    new: &mut Object<Network>,
) -> Result<(), ApiError> {
    let project = project_of(new).clone();
    refuse_infrastructure(step.world, "spec.cidrs", &new.spec.cidrs)?;
    new.status.egress = default::egress(step.world, new);
    if old.is_some() {
        peering::check_cidrs(step.world, new)?;
    }
    let Some(old) = old else {
        let have = step.world.networks.within(&project).count();
        refuse_more(have, MAX_NETWORKS, &format!("project {project}"), "networks here")?;
        let seed: [u8; 4] = step.rng().bytes();
        let vni = step.world.nets.free_vni(u32::from_be_bytes(seed) >> 8);
        let full = || ApiError::new(Code::QuotaExceeded, "every network number of the region is in use");
        new.status.vni = vni.ok_or_else(full)?;
        new.status.phase = NetworkPhase::Ready;
        return Ok(());
    };
    let name = &old.metadata.name;
    let inside = |cidr: Cidr| new.spec.cidrs.iter().any(|whole| whole.covers(&cidr));
    let outside = |s: &Object<Subnet>| s.spec.network == *name && !s.spec.cidrs().all(inside);
    refuse_used("what this takes away of network", name, named::<Subnet>(step.world, &project, "subnet", outside))
}

/// Refuses what the region itself has IPv6 addresses of: its instances reach the infrastructure by them. Its IPv4 addresses are
/// free to tenants.
fn refuse_infrastructure(world: &World, field: &str, cidrs: &[Cidr]) -> Result<(), ApiError> {
    let prefixes = || world.hosts.live.values().map(|h| Cidr { address: h.spec.prefix6.into(), length: 64 });
    for (i, cidr) in cidrs.iter().enumerate().filter(|(_, cidr)| !cidr.is_ipv4()) {
        if prefixes().any(|prefix| prefix.overlaps(cidr)) {
            let message = "overlaps addresses that the cloud's own hosts have: choose another prefix";
            return Err(ApiError::invalid(vec![FieldError::new(format!("{field}[{i}]"), message)]));
        }
    }
    Ok(())
}

pub fn may_delete_network(step: &Step<'_>, old: &Object<Network>) -> Result<(), ApiError> {
    let (world, project, name) = (&*step.world, project_of(old), &old.metadata.name);
    let subnets = named::<Subnet>(world, project, "subnet", |s| s.spec.network == *name);
    let groups = named::<SecurityGroup>(world, project, "security group", |g| g.spec.network == *name);
    let tables = named::<RouteTable>(world, project, "route table", |t| t.spec.network == *name);
    let peerings = named::<Peering>(world, project, "peering", |p| p.spec.network == *name);
    let nats = named::<NatGateway>(world, project, "NAT gateway", |g| g.spec.network == *name);
    let gateways = named::<InternetGateway>(world, project, "internet gateway", |g| g.spec.network == *name);
    let zones = named::<DnsZone>(world, project, "DNS zone", |z| z.spec.network == *name);
    let more = tables.chain(peerings).chain(nats).chain(gateways).chain(zones);
    refuse_used("network", name, subnets.chain(groups).chain(more))
}

/// A peering may have waited for a network, or may end with it; an instance may wait for one with room for its subnet.
pub fn network_changed(step: &mut Step<'_>, network: &Object<Network>) {
    step.mark(Dirty::Room);
    peering::mark(step, &(network.metadata.project.clone(), network.metadata.name.clone()));
}

/// Ends a network. Its number is its own until every host has confirmed that nothing of it is left.
pub fn delete_network(step: &mut Step<'_>, old: &Object<Network>) -> AnyObject {
    let buried = step.bury(old);
    step.mark(Dirty::Buried(Network::PLURAL, buried.metadata.uid));
    network_changed(step, old);
    buried.to_any()
}

/// What of networks is free when every host has confirmed that it is gone.
pub fn waiting(world: &World) -> impl Iterator<Item = Dirty> {
    let networks = world.networks.buried.keys().map(|uid| Dirty::Buried(Network::PLURAL, *uid));
    let floating = world.floating_ips.buried.keys().map(|uid| Dirty::Buried(FloatingIp::PLURAL, *uid));
    let balancers = world.load_balancers.buried.keys().map(|uid| Dirty::Buried(LoadBalancer::PLURAL, *uid));
    networks.chain(floating).chain(balancers)
}

/// Whether every host that there is has applied what it was told after something was deleted.
pub fn is_gone<K: Stored>(world: &World, uid: Uid) -> bool {
    let Some(buried) = K::table(world).buried.get(&uid) else { return false };
    let revision = world.revisions.get(&key_of(buried)).copied();
    let confirmed = |host: &Name| revision.is_some_and(|at| world.nets.applied.get(host).is_some_and(|n| *n >= at));
    world.hosts.live.values().all(|host| confirmed(&host.metadata.name))
}

pub fn admit_subnet(
    step: &mut Step<'_>,
    old: Option<&Object<Subnet>>,
    new: &mut Object<Subnet>,
) -> Result<(), ApiError> {
    let project = project_of(new).clone();
    let its = network(step.world, &project, &new.spec.network)?;
    route::check_table(step.world, &project, &new.metadata.name, &new.spec)?;
    if old.is_some() {
        return Ok(());
    }
    let siblings = || step.world.subnets.within(&project).filter(|s| s.spec.network == new.spec.network);
    refuse_more(siblings().count(), MAX_SUBNETS, &format!("network {}", new.spec.network), "subnets")?;
    let mut errors = Vec::new();
    for (field, cidr) in [("spec.cidr4", new.spec.cidr4), ("spec.cidr6", new.spec.cidr6)] {
        let Some(cidr) = cidr else { continue };
        if !its.spec.cidrs.iter().any(|whole| whole.covers(&cidr)) {
            let cidrs = its.spec.cidrs.iter().filter(|c| c.is_ipv4() == cidr.is_ipv4()).map(Cidr::to_string);
            let cidrs = cidrs.collect::<Vec<_>>().join(", ");
            let has = if cidrs.is_empty() { "has none of that family".to_owned() } else { format!("has {cidrs}") };
            errors.push(FieldError::new(field, format!("is not within network {}, which {has}", new.spec.network)));
        }
        if let Some((other, taken)) = siblings().find_map(|s| Some((s, s.spec.cidrs().find(|c| c.overlaps(&cidr))?))) {
            errors.push(FieldError::new(field, format!("overlaps {taken} of subnet {}", other.metadata.name)));
        }
    }
    if let Some(zone) = new.spec.zone.as_ref().filter(|zone| step.world.zones.get(None, zone).is_none()) {
        errors.push(FieldError::new("spec.zone", format!("there is no zone {zone}: see `nexus get zones`")));
    }
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors));
    }
    new.status.gateway4 = new.spec.gateway4();
    new.status.gateway6 = new.spec.gateway6();
    Ok(())
}

pub fn subnet_changed(step: &mut Step<'_>, new: &Object<Subnet>) {
    let (project, name) = (project_of(new).clone(), new.metadata.name.clone());
    wake(step, &project, |nic| nic.subnet == name);
}

pub fn may_delete_subnet(step: &Step<'_>, old: &Object<Subnet>) -> Result<(), ApiError> {
    let (world, project, name) = (&*step.world, project_of(old), &old.metadata.name);
    let nics = named::<Nic>(world, project, "nic", |n| n.spec.subnet == *name);
    let balancers = named::<LoadBalancer>(world, project, "load balancer", |b| b.spec.subnet == *name);
    refuse_used("subnet", name, nics.chain(balancers).chain(templates(world, project, |nic| nic.subnet == *name)))
}

/// What a group takes of what a network's groups may have: each rule, and each of what it names.
fn weight(group: &SecurityGroupSpec) -> usize {
    let of = |rule: &SecurityRule| 1 + rule.remotes.len() / 4 + rule.ports.len() / 8;
    group.rules.iter().map(of).sum::<usize>() + group.lists().count() * MAX_PREFIXES / 4
}

pub fn admit_group(
    step: &mut Step<'_>,
    old: Option<&Object<SecurityGroup>>,
    new: &mut Object<SecurityGroup>,
) -> Result<(), ApiError> {
    let project = project_of(new).clone();
    let (world, spec, name) = (&*step.world, &new.spec, &new.metadata.name);
    network(world, &project, &spec.network)?;
    let is_other = |g: &&Object<SecurityGroup>| g.spec.network == spec.network && g.metadata.name != *name;
    let others = || world.security_groups.within(&project).filter(is_other);
    let whose = format!("network {}", spec.network);
    if old.is_none() {
        refuse_more(others().count(), MAX_GROUPS, &whose, "security groups")?;
    }
    let taken: usize = others().map(|g| weight(&g.spec)).sum();
    if taken + weight(spec) > MAX_NETWORK_RULES {
        let detail = format!(
            "the security groups of {whose} may have {MAX_NETWORK_RULES} rules together, others have {taken}: write fewer, \
             with prefixes that cover more"
        );
        return Err(ApiError::new(Code::QuotaExceeded, detail));
    }
    let mut errors = Vec::new();
    for (i, rule) in spec.rules.iter().enumerate() {
        for (j, remote) in rule.remotes.iter().enumerate() {
            if let RuleRemote::PrefixList(list) = remote
                && world.prefix_lists.get(Some(&project), list).is_none()
            {
                let message = format!("there is no prefix list {list}");
                errors.push(FieldError::new(format!("spec.rules[{i}].remotes[{j}].prefixList"), message));
            }
            let RuleRemote::Group(group) = remote else { continue };
            if group != name && !others().any(|other| other.metadata.name == *group) {
                let message = format!("there is no security group {group} in network {}", spec.network);
                errors.push(FieldError::new(format!("spec.rules[{i}].remotes[{j}].group"), message));
            }
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(errors)) }
}

pub fn group_changed(step: &mut Step<'_>, new: &Object<SecurityGroup>) {
    let (project, name) = (project_of(new).clone(), new.metadata.name.clone());
    wake(step, &project, |nic| nic.security_groups.contains(&name));
}

pub fn may_delete_group(step: &Step<'_>, old: &Object<SecurityGroup>) -> Result<(), ApiError> {
    let (world, project, name) = (&*step.world, project_of(old), &old.metadata.name);
    let nics = named::<Nic>(world, project, "nic", |n| n.spec.security_groups.contains(name));
    let groups = named::<SecurityGroup>(world, project, "security group", |g| {
        g.metadata.name != *name && g.spec.named().any(|other| other == name)
    });
    let templates = templates(world, project, |nic| nic.security_groups.contains(name));
    refuse_used("security group", name, nics.chain(groups).chain(templates))
}

pub fn admit_prefix_list(
    step: &Step<'_>,
    old: Option<&Object<PrefixList>>,
    new: &Object<PrefixList>,
) -> Result<(), ApiError> {
    let project = project_of(new);
    let have = if old.is_some() { 0 } else { step.world.prefix_lists.within(project).count() };
    refuse_more(have, MAX_PREFIX_LISTS, &format!("project {project}"), "prefix lists")
}

pub fn may_delete_prefix_list(step: &Step<'_>, old: &Object<PrefixList>) -> Result<(), ApiError> {
    let name = &old.metadata.name;
    let names = |g: &Object<SecurityGroup>| g.spec.lists().any(|list| list == name);
    refuse_used("prefix list", name, named::<SecurityGroup>(step.world, project_of(old), "security group", names))
}

/// Takes away some NICs and networks of a project whose instances are gone. True if there was anything.
pub fn tear_down(step: &mut Step<'_>, project: &Name, most: usize) -> bool {
    let nics: Vec<_> = step.world.nics.within(project).take(most).cloned().collect();
    for nic in &nics {
        nic::release(step, nic);
    }
    let floating: Vec<_> = step.world.floating_ips.within(project).take(most).cloned().collect();
    floating.iter().for_each(|f| drop(outside::delete_floating(step, f)));
    let balancers: Vec<_> = step.world.load_balancers.within(project).take(most).cloned().collect();
    balancers.iter().for_each(|b| drop(outside::delete_balancer(step, b)));
    if !nics.is_empty() || !floating.is_empty() || !balancers.is_empty() {
        return true;
    }
    let networks: Vec<_> = step.world.networks.within(project).take(most).cloned().collect();
    for network in &networks {
        delete_network(step, network);
    }
    !networks.is_empty()
}
