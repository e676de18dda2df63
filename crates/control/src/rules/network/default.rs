//! The network that instances are in for which nobody has named one.
//!
//! An app's template stays as its user wrote it, and so does its hash: an instance gets its NIC when a host is first looked for,
//! into its own copy of the template, and is from then on like one whose app names that NIC. What a project says later is about
//! instances that are made later.
//!
//! Every project has one, unless it says otherwise or is older than that (see [`ProjectSpec::has_default_network`]). A NIC that
//! nobody has asked for by name keeps nothing from running: where no host can have tenants' networks, instances run without it,
//! and an event says so. Where some can, they run there, and wait for them: until those are dead or gone too.
//!
//! The network and its subnet are made with the first NIC that needs them, and are ordinary objects from then on: whoever
//! makes a network or a subnet `default` first keeps theirs, and what is deleted is made again when it is needed.

use nexus_model::kind::*;
use nexus_model::{ApiError, Cidr, Name, Object};

use super::{admit_network, admit_subnet, network_changed, nic, subnet_changed};
use crate::rules::app::Missing;
use crate::scheduler::Scheduler;
use crate::step::Step;
use crate::world::World;

fn name() -> Name {
    DEFAULT_NETWORK.parse().expect("a well-formed name")
}

/// Whether a template has a place in a default network: those that name NICs are where these are.
fn can_be_in(template: &Template) -> bool {
    template.nics.is_empty()
}

/// Whether nothing but its project has a template's instances in the default network.
fn is_implied(world: &World, project: Option<&Name>, template: &Template) -> bool {
    let usual = || project.and_then(|name| world.project(name)).is_some_and(|p| p.spec.has_default_network());
    template.network.is_none() && can_be_in(template) && usual()
}

/// Why what is implied is left out, if it is.
fn left_out(world: &World) -> Option<&str> {
    world.scheduler.as_ref().and_then(Scheduler::all_unwired)
}

/// Whether what is made of a template is in its project's default network.
fn is_in(world: &World, project: Option<&Name>, template: &Template) -> bool {
    let asked = template.network == Some(TemplateNetwork::Default) && can_be_in(template);
    asked || (is_implied(world, project, template) && left_out(world).is_none())
}

/// How many NICs each instance of a template gets.
pub fn nics(world: &World, project: Option<&Name>, template: &Template) -> usize {
    template.nics.len() + usize::from(is_in(world, project, template))
}

/// Gives an instance that has no host yet its NIC in the default network, if it is to have one, and takes back what was
/// implied when some host could still have it.
pub fn furnish(step: &mut Step<'_>, instance: &mut Object<Instance>) {
    let project = instance.metadata.project.clone();
    if instance.spec.implied_nic && left_out(step.world).is_some() {
        let uid = instance.metadata.uid;
        let mut made: Vec<_> = step.world.nics_of(uid).into_iter().cloned().collect();
        // Those that users have given it are no part of its template.
        made.retain(|nic| nic::owner(nic) == Some(uid));
        made.iter().for_each(|nic| nic::release(step, nic));
        instance.spec.template.nics.clear();
        instance.spec.implied_nic = false;
        step.put(instance.clone());
    } else if is_in(step.world, project.as_ref(), &instance.spec.template) {
        instance.spec.implied_nic = is_implied(step.world, project.as_ref(), &instance.spec.template);
        let nic = TemplateNic { subnet: name(), security_groups: Vec::new(), rate: None, forwards: false };
        instance.spec.template.nics.push(nic);
        step.put(instance.clone());
    }
}

/// Says of an instance that was just placed that it should have had a NIC, if that is so.
pub fn tell(step: &mut Step<'_>, instance: &Object<Instance>) {
    let project = instance.metadata.project.as_ref();
    if is_implied(step.world, project, &instance.spec.template)
        && let Some(why) = left_out(step.world)
    {
        let message = format!(
            "it is not in the project's default network, for no host here can have tenants' networks: {why}. Say \
             `network: none` if that is fine, and `network: default` if it is to wait for such a host"
        );
        step.event(project, instance.owner_ref(), Severity::Warning, "NoDefaultNetwork", message);
    }
}

/// Makes what an instance's NIC in the default network needs, as far as it is not there.
pub fn ensure(step: &mut Step<'_>, project: &Name, nics: &[TemplateNic]) -> Result<(), Missing> {
    let name = name();
    let asked = nics.iter().any(|nic| nic.subnet == name);
    if !asked || step.world.subnets.get(Some(project), &name).is_some() {
        return Ok(());
    }
    let failed = |e: ApiError| {
        let errors: Vec<String> = e.errors.iter().map(|e| e.message.clone()).collect();
        let why = if errors.is_empty() { e.detail } else { errors.join(", ") };
        let advice = "make room, or keep apps that need no network of their own out of it (`network: none`)";
        ("NoDefaultNetwork", format!("the project's default network can't be made: {why}; {advice}"))
    };
    let network = match step.world.networks.get(Some(project), &name) {
        Some(network) => network.clone(),
        None => make_network(step, project, &name).map_err(failed)?,
    };
    let spec = free_part(step.world, project, &network).ok_or_else(|| {
        let why = "network default has nothing left for a subnet of that name: give it another CIDR, or apply a subnet default";
        ("NoDefaultNetwork", why.to_owned())
    })?;
    step.world.refuse_unreadable::<Subnet>(Some(project), &name).map_err(failed)?;
    let mut subnet = Object::<Subnet>::new(step.new_metadata(name, Some(project.clone())), spec);
    admit_subnet(step, None, &mut subnet).map_err(failed)?;
    step.put(subnet.clone());
    told(step, &subnet);
    subnet_changed(step, &subnet);
    Ok(())
}

fn make_network(step: &mut Step<'_>, project: &Name, name: &Name) -> Result<Object<Network>, ApiError> {
    step.world.refuse_unreadable::<Network>(Some(project), name)?;
    let four = DEFAULT_CIDR4.parse().expect("a well-formed network");
    let cidrs = vec![four, local_prefix(step)];
    let spec = NetworkSpec { cidrs, egress: NetworkEgress::Project, ..NetworkSpec::default() };
    let mut network = Object::<Network>::new(step.new_metadata(name.clone(), Some(project.clone())), spec);
    admit_network(step, None, &mut network)?;
    step.put(network.clone());
    told(step, &network);
    network_changed(step, &network);
    Ok(network)
}

/// A network of 48 bits that hardly anybody else has (RFC 4193, section 3.2).
fn local_prefix(step: &Step<'_>) -> Cidr {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&nexus_env::RngExt::bytes::<5>(step.rng()));
    Cidr { address: std::net::Ipv6Addr::from(octets).into(), length: 48 }
}

fn told<K: Kind>(step: &mut Step<'_>, made: &Object<K>) {
    let message = "for instances whose apps name no NICs";
    step.event(made.metadata.project.as_ref(), made.owner_ref(), Severity::Normal, "Created", message);
}

/// The beginning of a network's CIDRs, of each family the first that no other subnet has a part of.
fn free_part(world: &World, project: &Name, network: &Object<Network>) -> Option<SubnetSpec> {
    let name = &network.metadata.name;
    let siblings = || world.subnets.within(project).filter(|s| s.spec.network == *name).flat_map(|s| s.spec.cidrs());
    let part = |four: bool| {
        let least = DEFAULT_LENGTHS[usize::from(!four)];
        let of_family = network.spec.cidrs.iter().filter(|c| c.is_ipv4() == four);
        let mut parts = of_family.map(|c| Cidr { address: c.first(), length: c.length.max(least) });
        parts.find(|part| !siblings().any(|other| other.overlaps(part)))
    };
    let (cidr4, cidr6) = (part(true), part(false));
    let some = cidr4.is_some() || cidr6.is_some();
    some.then(|| SubnetSpec { network: name.clone(), cidr4, cidr6, ..SubnetSpec::default() })
}

/// What may be done when a network has no room for another NIC.
pub fn advise(subnet: &Object<Subnet>, why: String) -> String {
    if subnet.metadata.name != *DEFAULT_NETWORK {
        return why;
    }
    format!("{why}, or keep apps that need no network of their own out of it (`network: none`)")
}

/// What a network's subnets without a route table reach outside; nothing of the project is asked, without it.
pub fn egress(world: &World, network: &Object<Network>) -> Option<Egress> {
    if network.spec.egress.is_none() {
        return None;
    }
    let project = network.metadata.project.as_ref().and_then(|name| world.project(name));
    project.map(|p| p.spec.egress.clone()).or_else(|| network.status.egress.clone())
}

/// Has a project's networks go by what it allows now.
pub fn follow(step: &mut Step<'_>, project: &Name) {
    let world = &*step.world;
    let other: Vec<Object<Network>> = world
        .networks
        .within(project)
        .filter_map(|network| {
            let now = egress(world, network);
            (network.status.egress != now).then(|| {
                let mut new = network.clone();
                new.status.egress = now;
                new
            })
        })
        .collect();
    other.into_iter().for_each(|network| step.put(network));
}
