//! What hosts are told of the projects that they run something of: by which they answer names and filter packets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nexus_model::kind::{Egress, GLOBAL, Host, Instance, Port};
use nexus_model::plan::{HostNames, NamedInstance, NamedPort, PLAN_VERSION, ProjectNames};
use nexus_model::{Cidr, Name, Object};

use super::State;
use crate::world::World;

/// What a project of this name may reach, as far as this world knows it.
pub(super) fn egress(world: &World, project: &str) -> Option<Egress> {
    let name: Name = project.parse().ok()?;
    world.projects.get(None, &name).map(|p| p.spec.egress.clone())
}

/// Tells every host that listens, where something has changed for it.
pub(super) fn publish(state: &State, revision: u64) {
    // A region's server that has not read the global group yet would say that every project's egress is closed.
    if state.names.is_empty() || (state.region.is_some() && state.world.global.is_none()) {
        return;
    }
    let mut builder = Builder::new(&state.world, state.region.as_ref(), revision);
    for (host, sender) in &state.names {
        let table = builder.host(host);
        sender.send_if_modified(|old| {
            let same = old.projects == table.projects
                && old.instances == table.instances
                && old.infrastructure == table.infrastructure
                && old.region == table.region;
            *old = Arc::new(table);
            !same
        });
    }
}

/// Makes the tables of many hosts: what they share is made once.
pub(super) struct Builder<'a> {
    world: &'a World,
    whole: HostNames,
    projects: BTreeMap<Name, Arc<ProjectNames>>,
}

impl<'a> Builder<'a> {
    pub fn new(world: &'a World, region: Option<&Name>, revision: u64) -> Self {
        let region = region.cloned().unwrap_or_else(|| GLOBAL.parse().expect("a well-formed name"));
        let hosts = || world.hosts.live.values();
        let prefixes = |h: &Object<Host>| {
            let four = Cidr { address: h.spec.prefix4.into(), length: 24 };
            [four, Cidr { address: h.spec.prefix6.into(), length: 64 }]
        };
        let instances: BTreeSet<Cidr> = hosts().flat_map(prefixes).collect();
        let mut infrastructure: BTreeSet<IpAddr> = hosts().map(|h| h.spec.address.ip()).collect();
        for region in world.fleet().regions.live.values() {
            infrastructure.extend(region.status.gateways.iter().map(SocketAddr::ip));
            infrastructure.extend(region.status.servers.iter().filter_map(|s| address_of(&s.wire)));
        }
        let whole = HostNames {
            version: PLAN_VERSION,
            revision,
            region,
            instances: instances.into_iter().collect(),
            infrastructure: infrastructure.into_iter().map(Cidr::host).collect(),
            projects: Vec::new(),
        };
        Self { world, whole, projects: BTreeMap::new() }
    }

    pub fn host(&mut self, host: &Name) -> HostNames {
        let world = self.world;
        let here = world.instances_on(host).filter_map(|i| i.metadata.project.clone());
        // Who is in a peered network is found by name, whichever project that is of.
        let peered = super::networks::held(world, host).into_iter().filter_map(|place| place.0);
        let here: BTreeSet<Name> = here.chain(peered).collect();
        let projects = here.into_iter().map(|name| {
            let made = self.projects.entry(name.clone());
            made.or_insert_with(|| Arc::new(project(world, &name))).clone()
        });
        HostNames { projects: projects.collect(), ..self.whole.clone() }
    }
}

/// The address in an endpoint such as `tcp:10.0.0.1:7440`; none for what is a name.
fn address_of(endpoint: &str) -> Option<IpAddr> {
    let at = endpoint.strip_prefix("tcp:").unwrap_or(endpoint);
    at.parse::<SocketAddr>().ok().map(|at| at.ip())
}

fn named_ports(instance: &Object<Instance>) -> Vec<NamedPort> {
    let named = |port: &Port| port.name.clone().map(|name| NamedPort { name, port: port.port });
    instance.spec.template.ports.iter().filter_map(named).collect()
}

fn project(world: &World, name: &Name) -> ProjectNames {
    let mut instances: Vec<NamedInstance> = world
        .instances
        .within(name)
        // The address of what has ended is another's now.
        .filter(|i| i.status.finished.is_none())
        .filter_map(|i| {
            let address4 = i.status.address4?;
            Some(NamedInstance {
                uid: Some(i.metadata.uid),
                app: i.spec.app.clone(),
                address6: i.status.address6?,
                address4,
                // A job has no name to be found by, though it may be called as an app is.
                ready: i.status.ready && i.spec.job.is_none(),
                only4: i.status.endpoint.is_some_and(|e| e.is_ipv4()),
                ports: named_ports(i),
            })
        })
        .collect();
    instances.sort_by_key(|i| i.address6);
    let egress = world.fleet().projects.get(None, name).map(|p| p.spec.egress.clone());
    ProjectNames {
        project: name.clone(),
        egress: egress.unwrap_or_default(),
        apps: world.apps.within(name).map(|a| a.metadata.name.clone()).collect(),
        instances,
    }
}
