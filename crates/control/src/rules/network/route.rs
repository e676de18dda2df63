//! Route tables: what they may lead to, and that no packet goes round in circles.

use std::collections::BTreeSet;
use std::net::IpAddr;

use nexus_model::kind::*;
use nexus_model::{ApiError, FieldError, Name, Object};

use super::{named, network, project_of, refuse_more, refuse_used};
use crate::step::Step;
use crate::world::World;

/// The tables and subnets of one network, one of which is about to be what `new` or `moved` says.
struct Paths<'a> {
    world: &'a World,
    project: &'a Name,
    new: Option<(&'a Name, &'a RouteTableSpec)>,
    moved: Option<(&'a Name, &'a SubnetSpec)>,
}

impl Paths<'_> {
    fn routes(&self, table: &Name) -> &[NetworkRoute] {
        match self.new.filter(|(name, _)| *name == table) {
            Some((_, spec)) => &spec.routes,
            None => self.world.route_tables.get(Some(self.project), table).map_or(&[], |t| &t.spec.routes),
        }
    }

    fn table_of(&self, subnet: &Name) -> Option<&Name> {
        match self.moved.filter(|(name, _)| *name == subnet) {
            Some((_, spec)) => spec.route_table.as_ref(),
            None => self.world.subnets.get(Some(self.project), subnet)?.spec.route_table.as_ref(),
        }
    }

    /// The NIC to which a packet goes on from one that forwards it.
    fn next(&self, nic: &Name, to: IpAddr) -> Option<&Name> {
        let nic = self.world.nics.get(Some(self.project), nic)?;
        let routes = self.routes(self.table_of(&nic.spec.subnet)?);
        let best = routes.iter().filter(|route| route.to.contains(to)).max_by_key(|route| route.to.length)?;
        match &best.via {
            RouteVia::Nic(next) => Some(next),
            _ => None,
        }
    }

    /// The NICs of a way that comes back to where it was, if one does that begins with a route of this table.
    fn circle(&self, table: &Name) -> Option<String> {
        for route in self.routes(table) {
            let RouteVia::Nic(first) = &route.via else { continue };
            let (mut seen, mut way, mut at) = (BTreeSet::new(), Vec::new(), first);
            while seen.insert(at) {
                way.push(at.as_str());
                match self.next(at, route.to.first()) {
                    Some(next) => at = next,
                    None => {
                        way.clear();
                        break;
                    }
                }
            }
            if !way.is_empty() {
                return Some(format!("{} goes in a circle: nic {}, then nic {at} again", route.to, way.join(", nic ")));
            }
        }
        None
    }

    fn refuse_circles(&self, network: &Name, field: &str) -> Result<(), ApiError> {
        let tables = self.world.route_tables.within(self.project).filter(|t| t.spec.network == *network);
        let names = tables.map(|t| &t.metadata.name).chain(self.new.map(|(name, _)| name));
        let names: BTreeSet<&Name> = names.collect();
        match names.into_iter().find_map(|name| self.circle(name)) {
            None => Ok(()),
            Some(circle) => {
                let message = format!("{circle}: give the subnet of that NIC another route table");
                Err(ApiError::invalid(vec![FieldError::new(field, message)]))
            }
        }
    }
}

pub fn admit(
    step: &mut Step<'_>,
    old: Option<&Object<RouteTable>>,
    new: &mut Object<RouteTable>,
) -> Result<(), ApiError> {
    let (world, project, spec) = (&*step.world, project_of(new).clone(), &new.spec);
    let its = network(world, &project, &spec.network)?;
    if old.is_none() {
        let have = world.route_tables.within(&project).filter(|t| t.spec.network == spec.network).count();
        refuse_more(have, MAX_ROUTE_TABLES, &format!("network {}", spec.network), "route tables")?;
    }
    let mut errors = Vec::new();
    for (i, route) in spec.routes.iter().enumerate() {
        if its.spec.cidrs.iter().any(|cidr| cidr.covers(&route.to)) {
            let message = format!("is within network {}, whose own addresses go before all routes", spec.network);
            errors.push(FieldError::new(format!("spec.routes[{i}].to"), message));
        }
        if let Err(message) = check_via(world, &project, spec, route) {
            errors.push(FieldError::new(format!("spec.routes[{i}].via"), message));
        }
    }
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors));
    }
    let paths = Paths { world, project: &project, new: Some((&new.metadata.name, spec)), moved: None };
    paths.refuse_circles(&spec.network, "spec.routes")
}

fn check_via(world: &World, project: &Name, table: &RouteTableSpec, route: &NetworkRoute) -> Result<(), String> {
    let within = Some(project);
    match &route.via {
        RouteVia::Blackhole => Ok(()),
        RouteVia::Internet => match has_gateway(world, project, &table.network) {
            true => Ok(()),
            false => Err(format!("network {} has no internet gateway: make one first", table.network)),
        },
        RouteVia::Nat(name) => match world.nat_gateways.get(within, name) {
            Some(nat) if nat.spec.network == table.network => Ok(()),
            _ => Err(format!("there is no NAT gateway {name} in network {}", table.network)),
        },
        RouteVia::Peering(name) => match world.peerings.get(within, name) {
            Some(peering) if peering.spec.network == table.network => Ok(()),
            _ => Err(format!("there is no peering {name} of network {}", table.network)),
        },
        RouteVia::Nic(name) => {
            let nic = world.nics.get(within, name);
            let nic = nic.filter(|n| n.status.network.as_ref().is_some_and(|n| n.name == table.network));
            let Some(nic) = nic else {
                return Err(format!("there is no nic {name} in network {}", table.network));
            };
            let family = if route.to.is_ipv4() { nic.status.address4.is_some() } else { nic.status.address6.is_some() };
            if !nic.spec.forwards {
                return Err(format!("nic {name} does not forward: set its spec.forwards to true"));
            }
            if family { Ok(()) } else { Err(format!("nic {name} has no address of that family")) }
        }
    }
}

/// Checks a subnet's route table.
pub fn check_table(world: &World, project: &Name, name: &Name, spec: &SubnetSpec) -> Result<(), ApiError> {
    let Some(table) = &spec.route_table else { return Ok(()) };
    let found = world.route_tables.get(Some(project), table);
    if found.is_none_or(|found| found.spec.network != spec.network) {
        let message = format!("there is no route table {table} in network {}", spec.network);
        return Err(ApiError::invalid(vec![FieldError::new("spec.routeTable", message)]));
    }
    let paths = Paths { world, project, new: None, moved: Some((name, spec)) };
    paths.refuse_circles(&spec.network, "spec.routeTable")
}

pub fn may_delete(step: &Step<'_>, old: &Object<RouteTable>) -> Result<(), ApiError> {
    let name = &old.metadata.name;
    let users = named::<Subnet>(step.world, project_of(old), "subnet", |s| s.spec.route_table.as_ref() == Some(name));
    refuse_used("route table", name, users)
}

/// The route tables that lead to something.
pub fn leading<'a>(
    world: &'a World,
    project: &'a Name,
    leads: impl Fn(&RouteVia) -> bool + 'a,
) -> impl Iterator<Item = String> + 'a {
    named::<RouteTable>(world, project, "route table", move |t| t.spec.routes.iter().any(|route| leads(&route.via)))
}

pub fn has_gateway(world: &World, project: &Name, network: &Name) -> bool {
    world.internet_gateways.within(project).any(|gateway| gateway.spec.network == *network)
}
