//! A NIC inside its instance: addresses and ways.
//!
//! ```text
//! main         default → the first NIC's gateway; subnets of further NICs → their gateways; the resolver → eth0
//! from the infrastructure's address  → table 100: default → eth0
//! from NIC i's address               → table 101 + i: default → NIC i's gateway
//! ```
//!
//! An instance that loses its last NIC gets back the default route that it had without any.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::hand::{Hand, Others};
use super::links::GATEWAY_MAC;
use super::want::NicWant;
use crate::NetError;
use crate::instance::{GATEWAY4, GATEWAY6, INSIDE, NAMESERVER};
use crate::netlink::{
    Limit, LinkAddress, LinkState, MAIN, Neighbour, Policy, Route, RouteKind, RouteState, Then, everything,
};

/// The table of the infrastructure's link; NICs' follow.
const TABLE: u32 = 100;
const FROM_INFRASTRUCTURE: u32 = 1000;
const FROM_NICS: u32 = 1010;

/// Brings what these NICs need into the instance in whose namespace the thread is, and removes what no NIC needs. Answers
/// which of them are not there.
pub(super) fn settle(hand: &mut Hand<'_>, nics: &[&NicWant]) -> Result<Vec<nexus_model::Uid>, NetError> {
    let links: BTreeMap<String, LinkState> =
        hand.links.link_states()?.into_iter().map(|l| (l.name.clone(), l)).collect();
    for link in links.values() {
        hand.name(link.index, &link.name);
    }
    let mut missing = Vec::new();
    let mut plugged: Vec<(&NicWant, u32)> = Vec::new();
    let mut limits = BTreeMap::new();
    for nic in nics {
        let Some(link) = links.get(&nic.inside) else {
            hand.differs(|| format!("{} is missing", nic.inside));
            missing.push(nic.uid);
            continue;
        };
        let mac = (link.mac != Some(nic.mac)).then_some(nic.mac);
        let mtu = (link.mtu != nic.mtu).then_some(nic.mtu);
        if mac.is_some() || mtu.is_some() {
            let what = || format!("{} has another hardware address or MTU", nic.inside);
            hand.step(what, |l| l.set_link(link.index, mac, mtu));
        }
        if !link.up {
            hand.step(|| format!("{} is down", nic.inside), |l| l.set_up(link.index, true));
        }
        if let Some(rate) = nic.rate {
            limits.insert(link.index, Limit::of(rate));
        }
        plugged.push((nic, link.index));
    }
    plugged.sort_by_key(|(nic, _)| nic.index);
    hand.limits(&limits)?;
    if plugged.iter().any(|(nic, _)| nic.forwards) {
        hand.sysctl("ipv4/ip_forward", "1")?;
        hand.sysctl("ipv6/conf/all/forwarding", "1")?;
    }
    let addresses = plugged.iter().flat_map(|(nic, link)| {
        nic.addresses().map(|address| LinkAddress { link: *link, address, length: whole(address) })
    });
    hand.addresses(&addresses.collect())?;
    // Nobody has to be asked for the gateway, and nobody can say to be it.
    let gateways = plugged.iter().flat_map(|(nic, link)| {
        let both = nic.gateway4.map(IpAddr::V4).into_iter().chain(nic.gateway6.map(IpAddr::V6));
        both.map(|address| Neighbour { link: *link, address, mac: GATEWAY_MAC })
    });
    hand.neighbours(&gateways.collect())?;

    let eth0 = links.get(INSIDE).map(|l| l.index);
    let infrastructure: Vec<IpAddr> = match eth0 {
        Some(eth0) if !plugged.is_empty() => {
            let all = hand.links.addresses()?;
            let own = |a: &LinkAddress| a.link == eth0 && a.length == whole(a.address);
            all.iter().map(|(a, _)| *a).filter(own).map(|a| a.address).collect()
        }
        _ => Vec::new(),
    };
    let (others, defaults) = ways(&plugged, eth0.unwrap_or(0), &infrastructure);
    // Without a NIC in the way: as `InstanceNet::create` makes it.
    for gateway in [IpAddr::V4(GATEWAY4), GATEWAY6.into()] {
        if let Some(eth0) = eth0
            && !defaults.iter().any(|r| r.to.is_ipv6() == gateway.is_ipv6())
        {
            restore(hand, gateway, eth0)?;
        }
    }
    hand.routes(&others, Others::Replaced, false)?;
    hand.policies(&policies(&plugged, &infrastructure))?;
    // Only now, when what is the infrastructure's has its own way.
    hand.routes(&[others, defaults].concat(), Others::Replaced, true)?;
    Ok(missing)
}

fn whole(address: IpAddr) -> u8 {
    if address.is_ipv6() { 128 } else { 32 }
}

/// The default route of one family through the infrastructure's link, if there is no other.
fn restore(hand: &mut Hand<'_>, gateway: IpAddr, eth0: u32) -> Result<(), NetError> {
    let to = everything(gateway);
    let stands = |r: &RouteState| {
        (r.table, r.to, r.length) == (MAIN, to, 0) && matches!(r.kind, RouteKind::Unicast { link, .. } if link == eth0)
    };
    // A foreign default route through anything else is the workload's own.
    let there = hand.links.route_states()?;
    let any = |r: &RouteState, ours: bool| !ours && (r.table, r.to, r.length) == (MAIN, to, 0);
    if there.iter().any(|(r, ours)| stands(r) || any(r, *ours)) {
        return Ok(());
    }
    let route = Route { to, length: 0, gateway: Some(gateway), link: eth0 };
    hand.step(|| format!("there is no default route by {INSIDE}"), |l| l.ensure_route(route));
    Ok(())
}

/// All routes but the default ones of the main table, and those.
fn ways(plugged: &[(&NicWant, u32)], eth0: u32, infrastructure: &[IpAddr]) -> (Vec<RouteState>, Vec<RouteState>) {
    let route = |table, to, length, link, via, source| RouteState {
        table,
        to,
        length,
        kind: RouteKind::Unicast { link, via, source, mtu: None },
    };
    let (mut others, mut defaults) = (Vec::new(), Vec::new());
    for own in infrastructure {
        let gateway: IpAddr = if own.is_ipv6() { GATEWAY6.into() } else { GATEWAY4.into() };
        others.push(route(TABLE, everything(gateway), 0, eth0, Some(gateway), Some(*own)));
        if own.is_ipv4() {
            others.push(route(MAIN, NAMESERVER.into(), 32, eth0, None, Some(*own)));
        }
    }
    for (n, (nic, link)) in plugged.iter().enumerate() {
        let pairs = [
            (nic.address4.map(IpAddr::V4), nic.gateway4.map(IpAddr::V4)),
            (nic.address6.map(IpAddr::V6), nic.gateway6.map(IpAddr::V6)),
        ];
        for (own, gateway) in pairs {
            let (Some(own), Some(gateway)) = (own, gateway) else { continue };
            let any = everything(gateway);
            others.push(route(TABLE + 1 + u32::from(nic.index), any, 0, *link, Some(gateway), Some(own)));
            if !defaults.iter().any(|r: &RouteState| r.to == any) {
                defaults.push(route(MAIN, any, 0, *link, Some(gateway), Some(own)));
            }
            let cidrs = nic.cidrs.iter().filter(|c| n > 0 && c.address.is_ipv6() == own.is_ipv6());
            for cidr in cidrs {
                let same = |r: &RouteState| (r.table, r.to, r.length) == (MAIN, cidr.first(), cidr.length);
                if !others.iter().any(same) && !plugged[..n].iter().any(|(earlier, _)| earlier.cidrs.contains(cidr)) {
                    others.push(route(MAIN, cidr.first(), cidr.length, *link, Some(gateway), Some(own)));
                }
            }
        }
    }
    (others, defaults)
}

fn policies(plugged: &[(&NicWant, u32)], infrastructure: &[IpAddr]) -> BTreeSet<Policy> {
    let policy = |priority, own: IpAddr, table| Policy {
        six: own.is_ipv6(),
        priority,
        from: Some((own, whole(own))),
        iif: None,
        mark: None,
        then: Then::Table(table),
    };
    let mut all: BTreeSet<Policy> = infrastructure.iter().map(|own| policy(FROM_INFRASTRUCTURE, *own, TABLE)).collect();
    for (nic, _) in plugged {
        all.extend(nic.addresses().map(|own| policy(FROM_NICS, own, TABLE + 1 + u32::from(nic.index))));
    }
    all
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn nic(index: u8, address4: Option<&str>, address6: Option<&str>) -> NicWant {
        NicWant {
            uid: nexus_model::Uid::from_random([index; 16]),
            instance: nexus_model::Uid::from_random([9; 16]),
            index,
            link: String::new(),
            inside: String::new(),
            mac: [2; 6],
            mtu: 1400,
            address4: address4.map(|a| a.parse().unwrap()),
            address6: address6.map(|a| a.parse().unwrap()),
            gateway4: Some(Ipv4Addr::new(10, 0, index, 1)),
            gateway6: Some(Ipv6Addr::new(0xfd00, 0, 0, index.into(), 0, 0, 0, 1)),
            cidrs: vec![format!("10.0.{index}.0/24").parse().unwrap()],
            rate: None,
            forwards: false,
        }
    }

    #[test]
    fn the_default_route_of_a_family_leads_to_the_first_nic_that_has_it() {
        let (a, b) = (nic(0, Some("10.0.0.5"), None), nic(1, Some("10.0.1.5"), Some("fd00:0:0:1::5")));
        let infrastructure = ["fd00:9::1".parse().unwrap(), "10.9.9.9".parse().unwrap()];
        let (others, defaults) = ways(&[(&a, 7), (&b, 8)], 2, &infrastructure);
        let leads = |r: &RouteState| match r.kind {
            RouteKind::Unicast { link, via, .. } => (r.to.is_ipv6(), link, via.map(|v| v.to_string())),
            _ => panic!(),
        };
        let defaults: Vec<_> = defaults.iter().map(leads).collect();
        assert_eq!(defaults, [(false, 7, Some("10.0.0.1".into())), (true, 8, Some("fd00:0:0:1::1".into()))]);
        let subnets: Vec<_> = others.iter().filter(|r| r.table == MAIN && r.length == 24).map(leads).collect();
        assert_eq!(subnets, [(false, 8, Some("10.0.1.1".into()))], "only of further NICs");
        let rules = policies(&[(&a, 7), (&b, 8)], &infrastructure);
        assert_eq!(rules.len(), 5);
        assert!(policies(&[], &[]).is_empty());
    }
}
