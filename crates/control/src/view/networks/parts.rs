//! The parts of a network's plan beside its NICs and groups: routes, peerings, ways out, load balancers and names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_model::kind::{
    Balanced, BalancerTarget, DnsZone, Egress, EgressMode, Instance, LoadBalancer, NatGateway, Network, Nic,
    RouteTable, RouteVia, Subnet, ZoneData,
};
use nexus_model::plan::{
    BalancerPlan, FloatingPlan, ListenerPlan, NatPlan, NicPlan, PeeringPlan, RecordData, RecordPlan, RoutePlan,
    RouteTablePlan, SubnetPlan, TargetPlan, Via, ZonePlan,
};
use nexus_model::{Cidr, Name, Object, Uid};

use super::{fixed, index};
use crate::rules::network::{peering, route};
use crate::world::World;

/// Seconds for which a name that stands for instances may be kept.
const INSTANCE_TTL: u32 = 5;

/// The first table is that of subnets which name none, unless there is a `usual` one: nothing leads out of it.
pub fn subnet(subnet: &Object<Subnet>, tables: &[&Object<RouteTable>], usual: u32) -> SubnetPlan {
    let (m, spec) = (&subnet.metadata, &subnet.spec);
    let named = |name: &Name| tables.iter().position(|t| t.metadata.name == *name).map(|at| index(at + 1));
    SubnetPlan {
        uid: m.uid,
        name: m.name.clone(),
        cidr4: spec.cidr4,
        cidr6: spec.cidr6,
        gateway4: spec.gateway4(),
        gateway6: spec.gateway6(),
        route_table: spec.route_table.as_ref().map_or(usual, |name| named(name).unwrap_or(0)),
    }
}

/// The peerings of a network that both sides agree upon, with their objects' names.
pub fn peerings(world: &World, network: &Object<Network>) -> Vec<(PeeringPlan, Name)> {
    let place = (network.metadata.project.clone(), network.metadata.name.clone());
    let open = peering::of(world, &place).filter_map(|p| {
        let (cidrs, other) = (peering::agreed(world, p).ok()?, peering::other_side(world, p)?);
        let there = world.networks.live.get(&peering::peer(p))?;
        let plan = PeeringPlan {
            uid: p.metadata.uid.min(other.metadata.uid),
            name: p.metadata.name.clone(),
            network: there.metadata.uid,
            cidrs,
        };
        Some((plan, p.metadata.name.clone()))
    });
    open.collect()
}

pub fn nat(nat: &Object<NatGateway>) -> NatPlan {
    NatPlan { uid: nat.metadata.uid, name: nat.metadata.name.clone(), addresses: Vec::new() }
}

/// The routes to what a project's egress allows, and the NAT that they lead to as the one after `nats` others: each host lends
/// its own address. Without anything allowed there is no way out at all.
pub fn way_out(network: &Object<Network>, egress: &Egress, nats: usize) -> (RouteTablePlan, Option<NatPlan>) {
    let everything = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)];
    let to: BTreeSet<Cidr> = match egress.mode {
        EgressMode::Allow => everything.into_iter().map(|address| Cidr { address, length: 0 }).collect(),
        EgressMode::Deny => egress.networks.iter().map(|c| Cidr { address: c.first(), length: c.length }).collect(),
    };
    let name = || fixed("project-egress");
    let routes: Vec<RoutePlan> = to.into_iter().map(|to| RoutePlan { to, via: Via::Nat(index(nats)) }).collect();
    let nat = NatPlan { uid: network.metadata.uid, name: name(), addresses: Vec::new() };
    let nat = (!routes.is_empty()).then_some(nat);
    (RouteTablePlan { name: name(), routes }, nat)
}

/// What a route leads to that is not there any more, or not yet, goes nowhere.
pub fn route_tables(
    world: &World,
    tables: &[&Object<RouteTable>],
    peerings: &[(PeeringPlan, Name)],
    nats: &[&Object<NatGateway>],
) -> Vec<RouteTablePlan> {
    let via = |table: &Object<RouteTable>, via: &RouteVia| {
        let project = table.metadata.project.as_ref();
        match via {
            RouteVia::Nic(name) => world.nics.get(project, name).map(|nic| Via::Nic(nic.metadata.uid)),
            RouteVia::Peering(name) => {
                peerings.iter().position(|(_, own)| own == name).map(|at| Via::Peering(index(at)))
            }
            RouteVia::Nat(name) => nats.iter().position(|n| n.metadata.name == *name).map(|at| Via::Nat(index(at))),
            RouteVia::Internet => {
                project.filter(|p| route::has_gateway(world, p, &table.spec.network)).map(|_| Via::Internet)
            }
            RouteVia::Blackhole => None,
        }
    };
    let plan = |table: &&Object<RouteTable>| {
        let routes = table.spec.routes.iter();
        let routes = routes.map(|r| RoutePlan { to: r.to, via: via(table, &r.via).unwrap_or(Via::Blackhole) });
        RouteTablePlan { name: table.metadata.name.clone(), routes: routes.collect() }
    };
    let none = RouteTablePlan { name: fixed("none"), routes: Vec::new() };
    std::iter::once(none).chain(tables.iter().map(plan)).collect()
}

pub fn floating(world: &World, project: &Name, nics: &[NicPlan]) -> Vec<FloatingPlan> {
    let leads = world.floating_ips.within(project).filter_map(|f| {
        let nic = nics.iter().find(|nic| Some(&nic.name) == f.spec.nic.as_ref())?;
        let address = f.status.address?;
        let same = if address.is_ipv4() { nic.address4.is_some() } else { nic.address6.is_some() };
        let plan = FloatingPlan { uid: f.metadata.uid, name: f.metadata.name.clone(), address, nic: nic.uid };
        same.then_some(plan)
    });
    leads.collect()
}

/// Whether the instance that has a NIC is ready.
fn is_ready(world: &World, nic: &NicPlan) -> bool {
    let instance = nic.at.as_ref().and_then(|at| world.instance(at.instance));
    instance.is_some_and(|i| i.status.ready && i.metadata.deleting.is_none())
}

fn address(nic: &NicPlan, four: bool) -> Option<IpAddr> {
    if four { nic.address4.map(Into::into) } else { nic.address6.map(Into::into) }
}

pub fn balancers(world: &World, network: &Object<Network>, nics: &[NicPlan]) -> Vec<BalancerPlan> {
    let project = network.metadata.project.as_ref().expect("networks have a project");
    let mine = |b: &&Object<LoadBalancer>| b.status.network.as_ref().is_some_and(|n| n.uid == network.metadata.uid);
    let all = world.load_balancers.within(project).filter(mine);
    let by_uid: BTreeMap<Uid, &NicPlan> = nics.iter().map(|nic| (nic.uid, nic)).collect();
    let plan = |b: &Object<LoadBalancer>| {
        let its = b.status.address4.map(IpAddr::from).or(b.status.address6.map(IpAddr::from))?;
        let targets = |target: &BalancerTarget, port: u16| -> Vec<TargetPlan> {
            let found = nics_of_target(world, project, &target.to, &by_uid);
            let found = found.into_iter().filter(|nic| is_ready(world, nic));
            let found = found.filter_map(|nic| address(nic, its.is_ipv4()));
            let (port, weight) = (target.port.unwrap_or(port), target.weight);
            found.map(|address| TargetPlan { address, port, weight, failing: false }).collect()
        };
        let listeners = b.spec.listeners.iter().map(|l| ListenerPlan {
            port: l.port,
            protocol: l.protocol,
            source_hash: l.source_hash,
            targets: l.targets.iter().flat_map(|target| targets(target, l.port)).collect(),
            check: l.check.clone(),
            proxy_protocol: l.proxy_protocol,
        });
        let (uid, name) = (b.metadata.uid, b.metadata.name.clone());
        Some(BalancerPlan { uid, name, address: its, listeners: listeners.collect() })
    };
    all.filter_map(plan).collect()
}

/// The NICs of a target in the network: of each of an app's instances the first.
fn nics_of_target<'a>(
    world: &World,
    project: &Name,
    to: &Balanced,
    nics: &BTreeMap<Uid, &'a NicPlan>,
) -> Vec<&'a NicPlan> {
    let plan = |nic: &Object<Nic>| nics.get(&nic.metadata.uid).copied();
    match to {
        Balanced::Nic(name) => world.nics.get(Some(project), name).and_then(plan).into_iter().collect(),
        Balanced::App(name) => {
            let Some(app) = world.apps.get(Some(project), name) else { return Vec::new() };
            let instances = world.instances_of(app.metadata.uid);
            instances.filter_map(|i| world.nics_of(i.metadata.uid).into_iter().find_map(plan)).collect()
        }
    }
}

pub fn zones(world: &World, network: &Object<Network>, nics: &[NicPlan]) -> Vec<ZonePlan> {
    let project = network.metadata.project.as_ref().expect("networks have a project");
    let mine = |z: &&Object<DnsZone>| z.spec.network == network.metadata.name;
    let all = world.dns_zones.within(project).filter(mine);
    let plan = |zone: &Object<DnsZone>| {
        let mut records: Vec<RecordPlan> = zone
            .spec
            .records
            .iter()
            .map(|record| {
                let data = match &record.data {
                    ZoneData::A(all) => RecordData::A(all.clone()),
                    ZoneData::Aaaa(all) => RecordData::Aaaa(all.clone()),
                    ZoneData::Cname(name) => RecordData::Cname(name.clone()),
                    ZoneData::Txt(all) => RecordData::Txt(all.clone()),
                };
                RecordPlan { name: record.name.clone(), ttl: record.ttl, data }
            })
            .collect();
        if zone.spec.apps {
            // What a tenant has written down goes before.
            let written: BTreeSet<String> = records.iter().map(|r| r.name.clone()).collect();
            let made = of_instances(world, nics).into_iter().filter(|r| !written.contains(&r.name));
            records.extend(made);
        }
        ZonePlan { domain: zone.spec.domain.clone(), records }
    };
    all.map(plan).collect()
}

/// `APP` for an app's ready instances, `INSTANCE` for each of all.
fn of_instances(world: &World, nics: &[NicPlan]) -> Vec<RecordPlan> {
    #[derive(Default)]
    struct Addresses(Vec<Ipv4Addr>, Vec<Ipv6Addr>);
    let mut names: BTreeMap<String, Addresses> = BTreeMap::new();
    for nic in nics {
        let Some(instance) = nic.at.as_ref().and_then(|at| world.instance(at.instance)) else { continue };
        let mut add = |name: &Name| {
            let of = names.entry(name.to_string()).or_default();
            of.0.extend(nic.address4);
            of.1.extend(nic.address6);
        };
        add(&instance.metadata.name);
        let of_app = |i: &Object<Instance>| i.spec.job.is_none() && i.status.ready && i.metadata.deleting.is_none();
        if of_app(instance) {
            add(&instance.spec.app);
        }
    }
    let mut records = Vec::new();
    for (name, Addresses(mut four, mut six)) in names {
        four.sort();
        six.sort();
        if !four.is_empty() {
            records.push(RecordPlan { name: name.clone(), ttl: INSTANCE_TTL, data: RecordData::A(four) });
        }
        if !six.is_empty() {
            records.push(RecordPlan { name, ttl: INSTANCE_TTL, data: RecordData::Aaaa(six) });
        }
    }
    records
}
