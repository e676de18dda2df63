//! Which way a packet takes in its network: first what the network itself has, then its subnet's route table.

use std::net::IpAddr;

use nexus_model::plan::{NetworkPlan, NicPlan, RoutePlan, Via};

use super::spans;
use super::table::{Family, number};

/// Where a destination lies, as the namespace's routes have it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Way<'a> {
    /// An address of the namespace itself: a gateway's or a balancer's.
    Gateway,
    Nic(&'a NicPlan),
    /// Within the network, and nobody's.
    Nobody,
    Route(&'a RoutePlan),
    /// In no route.
    Unknown,
}

/// The way to `to` for a packet that comes from a NIC of `subnet`; for one that comes by a tunnel or a peering, without.
pub fn way(plan: &NetworkPlan, subnet: Option<u32>, to: IpAddr) -> Way<'_> {
    let is_gateway = |s: &nexus_model::plan::SubnetPlan| {
        s.gateway4.is_some_and(|g| to == IpAddr::from(g)) || s.gateway6.is_some_and(|g| to == IpAddr::from(g))
    };
    if plan.subnets.iter().any(is_gateway) || plan.balancers.iter().any(|b| b.address == to) {
        return Way::Gateway;
    }
    let has = |n: &&NicPlan| {
        let own =
            n.address4.is_some_and(|a| to == IpAddr::from(a)) || n.address6.is_some_and(|a| to == IpAddr::from(a));
        own && n.at.is_some()
    };
    if let Some(nic) = plan.nics.iter().find(has) {
        return Way::Nic(nic);
    }
    if spans::nets(&plan.cidrs, Family::of(to)).iter().any(|(a, b)| (*a..=*b).contains(&number(to))) {
        return Way::Nobody;
    }
    let table = subnet.and_then(|s| plan.subnets.get(s as usize)).map(|s| s.route_table as usize);
    let routes = table.and_then(|t| plan.route_tables.get(t)).map_or(&[][..], |t| &t.routes[..]);
    longest(routes, to).map_or(Way::Unknown, Way::Route)
}

fn longest(routes: &[RoutePlan], to: IpAddr) -> Option<&RoutePlan> {
    let holds = |r: &&RoutePlan| {
        let (first, last) = spans::of(&r.to);
        Family::of(r.to.address) == Family::of(to) && (first..=last).contains(&number(to))
    };
    // Of two alike the first.
    routes.iter().filter(holds).rev().max_by_key(|r| r.to.length)
}

/// Whether these routes lead to an address by that peering.
pub(super) fn is_peered(plan: &NetworkPlan, routes: &[RoutePlan], peering: usize, to: IpAddr) -> bool {
    let within = spans::nets(&plan.cidrs, Family::of(to)).iter().any(|(a, b)| (*a..=*b).contains(&number(to)));
    !within && longest(routes, to).is_some_and(|r| r.via == Via::Peering(peering as u32))
}
