//! What instances with NICs find in their networks, as the resolver takes it: from what servers tell of networks, which know where
//! NICs are, and of projects, which know whose they are and whether they are ready.
//!
//! Architecture invariant: nothing here waits or does anything; see [`crate::fabric`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use nexus_model::plan::{HostNames, HostNetworks, HostPlan, NetworkPlan, NicPlan, RecordData};
use nexus_model::{Cidr, Name, Uid};
use nexus_network::names::{Inside, NamedNic, Zone, ZoneData};

/// Whose a NIC is.
#[derive(Clone, Copy)]
struct Of<'a> {
    project: &'a Name,
    app: &'a Name,
    ready: bool,
}

/// By the addresses from which instances ask. Those in the same networks share one.
pub(crate) fn inside(
    plan: &HostPlan,
    names: &HostNames,
    networks: Option<&HostNetworks>,
) -> HashMap<Ipv4Addr, Arc<Inside>> {
    let Some(networks) = networks.filter(|n| !n.networks.is_empty()) else { return HashMap::new() };
    let mut whose: BTreeMap<Uid, Of<'_>> = BTreeMap::new();
    for told in &names.projects {
        for i in &told.instances {
            let Some(uid) = i.uid else { continue };
            whose.insert(uid, Of { project: &told.project, app: &i.app, ready: i.ready });
        }
    }
    let mut members: BTreeMap<Uid, BTreeSet<usize>> = BTreeMap::new();
    for (at, network) in networks.networks.iter().enumerate() {
        let here = network.nics.iter().filter_map(|nic| nic.at.as_ref()).filter(|at| at.host == networks.host);
        for nic in here {
            members.entry(nic.instance).or_default().insert(at);
        }
    }
    let mut made: BTreeMap<&BTreeSet<usize>, Arc<Inside>> = BTreeMap::new();
    let mut out = HashMap::new();
    for instance in plan.instances.iter().filter(|i| !i.kept) {
        let Some(own) = members.get(&instance.uid) else { continue };
        let found = made.entry(own).or_insert_with(|| Arc::new(of(own, networks, &whose)));
        out.insert(instance.address4, found.clone());
    }
    out
}

/// What is found by whoever is in these networks.
fn of(own: &BTreeSet<usize>, told: &HostNetworks, whose: &BTreeMap<Uid, Of<'_>>) -> Inside {
    let mut out = Inside::default();
    let mut add = |network: &NetworkPlan, within: Option<&[Cidr]>| {
        for nic in &network.nics {
            let Some(of) = nic.at.as_ref().and_then(|at| whose.get(&at.instance)) else { continue };
            let Some(named) = named(nic, within, of.ready) else { continue };
            let nics = out.apps.entry((of.project.to_string(), of.app.to_string())).or_default();
            if !nics.contains(&named) {
                nics.push(named);
            }
        }
    };
    for at in own {
        let network = &told.networks[*at];
        add(network, None);
        for peering in &network.peerings {
            let other = told.networks.iter().enumerate().find(|(_, n)| n.uid == peering.network);
            if let Some((at, other)) = other
                && !own.contains(&at)
            {
                add(other, Some(&peering.cidrs));
            }
        }
    }
    for network in own.iter().map(|at| &told.networks[*at]) {
        let nets = network.cidrs.iter().chain(network.peerings.iter().flat_map(|p| &p.cidrs));
        out.cidrs.extend(nets.map(|cidr| (cidr.address, cidr.length)));
        out.zones.extend(network.zones.iter().map(|zone| {
            let records = zone.records.iter().map(|r| {
                let data = match &r.data {
                    RecordData::A(all) => ZoneData::A(all.clone()),
                    RecordData::Aaaa(all) => ZoneData::Aaaa(all.clone()),
                    RecordData::Cname(to) => ZoneData::Cname(to.clone()),
                    RecordData::Txt(all) => ZoneData::Txt(all.clone()),
                };
                (r.name.clone(), r.ttl, data)
            });
            Zone::new(&zone.domain, records)
        }));
    }
    out
}

/// A NIC's addresses that can be reached.
fn named(nic: &NicPlan, within: Option<&[Cidr]>, ready: bool) -> Option<NamedNic> {
    let open = |address: IpAddr| within.is_none_or(|cidrs| cidrs.iter().any(|c| c.contains(address)));
    let address4 = nic.address4.filter(|a| open((*a).into()));
    let address6 = nic.address6.filter(|a| open((*a).into()));
    (address4.is_some() || address6.is_some()).then_some(NamedNic { address4, address6, ready })
}
