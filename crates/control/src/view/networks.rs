//! What hosts are told of tenants' networks: each network's plan is made once, when something of it has changed, and shared by
//! all hosts that hold a part of it; so is what leads to it from the plan before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use nexus_model::kind::{
    NatGateway, Network, Nic, RouteTable, RuleAction, RuleRemote, SecurityGroup, SecurityRule, Subnet,
};
use nexus_model::plan::{
    Direction, GroupPlan, HostNetworks, HostVersions, NetworkPlan, NetworkVersion, NetworksMessage, NetworksRequest,
    NicPlace, NicPlan, PLAN_VERSION, Remote, RulePlan, RuleProtocol, Teller,
};
use nexus_model::{Cidr, Name, Object};
use tokio::sync::watch;

mod parts;

use super::State;
use crate::nets::Changed;
use crate::rules::network::peering;
use crate::world::{Place, World};

/// Of the underlay, and what a tunnel's headers take of it: of Ethernet, IP, UDP and VXLAN.
const UNDERLAY_MTU: u16 = 1500;
const HEADERS: [u16; 2] = [50, 70];
/// An agent is sent what has changed at most so often; the first change after a rest at once.
const TOLD_REST: Duration = Duration::from_millis(50);

/// Plans that are made already, by their networks' places.
#[derive(Default)]
pub(super) struct Plans {
    made: BTreeMap<Place, Arc<NetworkVersion>>,
    /// Of those, what is to be made anew.
    stale: BTreeSet<Place>,
    /// Of all hosts, sorted; none, while it is to be made anew.
    endpoints: Option<Vec<(IpAddr, Name)>>,
}

impl Plans {
    fn get(&mut self, world: &World, place: &Place) -> Option<Arc<NetworkVersion>> {
        let old = self.made.get(place);
        if let Some(made) = old.filter(|_| !self.stale.contains(place)) {
            return Some(made.clone());
        }
        let made = NetworkVersion::after(old, plan(world, world.networks.live.get(place)?));
        self.stale.remove(place);
        self.made.insert(place.clone(), made.clone());
        Some(made)
    }

    /// Forgets what is no more, and notes what may have changed.
    fn changed(&mut self, world: &World, changed: &Changed) {
        if changed.hosts_differ {
            // How large a packet may be depends on the addresses of all hosts.
            self.all_changed(world);
        }
        for place in &changed.networks {
            if world.networks.live.contains_key(place) {
                self.stale.insert(place.clone());
            } else {
                self.made.remove(place);
                self.stale.remove(place);
            }
        }
    }

    fn all_changed(&mut self, world: &World) {
        self.made.retain(|place, _| world.networks.live.contains_key(place));
        self.stale = self.made.keys().cloned().collect();
        self.endpoints = None;
    }

    /// What one host is told.
    pub fn host(&mut self, world: &World, host: &Name, revision: u64) -> HostVersions {
        let mut head = HostNetworks {
            version: PLAN_VERSION,
            host: host.clone(),
            revision,
            endpoint: world.host(host).map_or(IpAddr::from([0; 16]), |h| h.spec.address.ip()),
            tunnels: Vec::new(),
            networks: Vec::new(),
        };
        let networks: Vec<_> = held(world, host).into_iter().filter_map(|place| self.get(world, &place)).collect();
        // Without a network there is no tunnel to anybody.
        if !networks.is_empty() {
            let all = self.endpoints.get_or_insert_with(|| {
                let all = world.hosts.live.values().map(|h| (h.spec.address.ip(), h.metadata.name.clone()));
                let mut all: Vec<_> = all.collect();
                all.sort();
                all
            });
            head.tunnels = all.iter().filter(|(_, other)| other != host).map(|(endpoint, _)| *endpoint).collect();
            head.tunnels.dedup();
        }
        HostVersions::new(head, networks)
    }
}

/// The networks that a host has NICs of, and those that they are peered with.
pub(super) fn held(world: &World, host: &Name) -> BTreeSet<Place> {
    let own: Vec<&Place> = world.nets.on_host(host).collect();
    let peerings = own.iter().flat_map(|place| peering::of(world, place));
    let peers = peerings.filter(|p| peering::agreed(world, p).is_ok()).map(peering::peer);
    peers.chain(own.iter().map(|place| (*place).clone())).collect()
}

/// Tells the hosts that listen what has changed for them.
pub(super) fn publish(state: &mut State, revision: u64) {
    let Some(changed) = state.world.nets.changed.as_mut().filter(|changed| !changed.is_empty()) else { return };
    let changed = std::mem::take(changed);
    state.plans_of_networks.changed(&state.world, &changed);
    let hosts: Vec<Name> = state.networks.keys().cloned().collect();
    for host in hosts {
        let told = told(&state.world, &changed, &host);
        if told || concerned(&state.world, &changed, &host) {
            let message = state.plans_of_networks.host(&state.world, &host, revision);
            send(&state.networks[&host], message, told);
        }
    }
}

/// The same after everything was read anew.
pub(super) fn publish_all(state: &mut State, revision: u64) {
    state.world.nets.changed = Some(Changed::default());
    state.plans_of_networks.all_changed(&state.world);
    for (host, sender) in &state.networks {
        let message = state.plans_of_networks.host(&state.world, host, revision);
        send(sender, message, true);
    }
}

fn send(sender: &watch::Sender<Arc<HostVersions>>, message: HostVersions, always: bool) {
    sender.send_if_modified(|old| {
        let same = old.says_the_same(&message);
        *old = Arc::new(message);
        always || !same
    });
}

/// What an agent is sent for as long as it listens. After each message that is of one moment it rests, and what changes
/// meanwhile comes with the next: instances that start together are told together.
pub(super) fn stream(
    told: watch::Receiver<Arc<HostVersions>>,
    request: NetworksRequest,
) -> impl Stream<Item = NetworksMessage> + Send {
    let start = (told, Teller::new(request), VecDeque::new(), None);
    stream::unfold(start, |(mut told, mut teller, mut waiting, mut sent): (_, Teller, VecDeque<_>, _)| async move {
        loop {
            if let Some(message) = waiting.pop_front() {
                return Some((message, (told, teller, waiting, sent)));
            }
            // The first is what stands now.
            if let Some(sent) = sent {
                told.changed().await.ok()?;
                tokio::time::sleep_until(sent + TOLD_REST).await;
            }
            let now: Arc<HostVersions> = told.borrow_and_update().clone();
            waiting = teller.tell(&now);
            sent = Some(tokio::time::Instant::now());
        }
    })
}

/// Whether a host is told in any case.
fn told(world: &World, changed: &Changed, host: &Name) -> bool {
    changed.hosts.contains(host) || (changed.everybody && world.host(host).is_some())
}

fn concerned(world: &World, changed: &Changed, host: &Name) -> bool {
    // A peering that has ended still counts: the network at its other end goes.
    let touched = |place: &Place| {
        let mut peers = peering::of(world, place).map(peering::peer);
        changed.networks.contains(place) || peers.any(|peer| changed.networks.contains(&peer))
    };
    let mut networks = world.nets.on_host(host);
    networks.any(|place| changed.hosts_differ || touched(place))
}

fn index(at: usize) -> u32 {
    u32::try_from(at).expect("a network has few parts")
}

/// A network's parts, by their names.
fn numbered<'a, T: 'a>(all: impl Iterator<Item = &'a T>, name: impl Fn(&'a T) -> &'a Name) -> BTreeMap<&'a Name, u32> {
    all.enumerate().map(|(at, part)| (name(part), index(at))).collect()
}

fn plan(world: &World, network: &Object<Network>) -> NetworkPlan {
    let (m, project) = (&network.metadata, network.metadata.project.as_ref().expect("networks have a project"));
    let subnets: Vec<&Object<Subnet>> = world.subnets.within(project).filter(|s| s.spec.network == m.name).collect();
    let groups: Vec<&Object<SecurityGroup>> =
        world.security_groups.within(project).filter(|g| g.spec.network == m.name).collect();
    let subnet_of = numbered(subnets.iter().copied(), |s| &s.metadata.name);
    // The first group is the network's own, for NICs without one.
    let group_of: BTreeMap<&Name, u32> =
        numbered(groups.iter().copied(), |g| &g.metadata.name).into_iter().map(|(name, at)| (name, at + 1)).collect();
    let mine = |n: &&Object<Nic>| n.status.network.as_ref().is_some_and(|of| of.uid == m.uid);
    let nics = world.nics.within(project).filter(mine);
    let mut nics: Vec<NicPlan> = nics.filter_map(|nic| nic_plan(world, nic, &subnet_of, &group_of)).collect();
    nics.sort_by_key(|nic| nic.uid);
    let tables: Vec<&Object<RouteTable>> =
        world.route_tables.within(project).filter(|t| t.spec.network == m.name).collect();
    let nats: Vec<&Object<NatGateway>> =
        world.nat_gateways.within(project).filter(|n| n.spec.network == m.name).collect();
    let peerings = parts::peerings(world, network);
    let way_out = network.status.egress.as_ref().map(|egress| parts::way_out(network, egress, nats.len()));
    // The last table is that of the project's egress, if the network goes by it.
    let usual = if way_out.is_some() { index(tables.len() + 1) } else { 0 };
    let (way_out, its_nat) = way_out.unzip();
    let headers = if world.hosts.live.values().any(|h| h.spec.address.is_ipv6()) { HEADERS[1] } else { HEADERS[0] };
    NetworkPlan {
        uid: m.uid,
        project: project.clone(),
        name: m.name.clone(),
        vni: network.status.vni,
        mtu: UNDERLAY_MTU - headers,
        cidrs: network.spec.cidrs.clone(),
        subnets: subnets.iter().map(|subnet| parts::subnet(subnet, &tables, usual)).collect(),
        groups: std::iter::once(usual_group(network))
            .chain(groups.iter().map(|g| group_plan(world, g, &group_of)))
            .collect(),
        route_tables: parts::route_tables(world, &tables, &peerings, &nats).into_iter().chain(way_out).collect(),
        floating: parts::floating(world, project, &nics),
        balancers: parts::balancers(world, network, &nics),
        zones: parts::zones(world, network, &nics),
        peerings: peerings.into_iter().map(|(plan, _)| plan).collect(),
        nats: nats.iter().map(|nat| parts::nat(nat)).chain(its_nat.flatten()).collect(),
        nics,
        flow_logs: network.spec.flow_logs,
    }
}

fn fixed(name: &str) -> Name {
    name.parse().expect("a well-formed name")
}

fn nic_plan(
    world: &World,
    nic: &Object<Nic>,
    subnets: &BTreeMap<&Name, u32>,
    groups: &BTreeMap<&Name, u32>,
) -> Option<NicPlan> {
    let (m, spec, s) = (&nic.metadata, &nic.spec, &nic.status);
    let mut its: Vec<u32> = spec.security_groups.iter().filter_map(|name| groups.get(name).copied()).collect();
    if spec.security_groups.is_empty() {
        its.push(0);
    }
    its.sort_unstable();
    let at = || {
        let host = world.host(s.host.as_ref()?)?;
        Some(NicPlace {
            host: host.metadata.name.clone(),
            endpoint: host.spec.address.ip(),
            instance: s.instance?,
            index: s.index?,
        })
    };
    Some(NicPlan {
        uid: m.uid,
        name: m.name.clone(),
        subnet: *subnets.get(&spec.subnet)?,
        mac: s.mac?,
        address4: s.address4,
        address6: s.address6,
        at: at(),
        groups: its,
        rate: spec.rate,
        forwards: spec.forwards,
    })
}

/// What NICs without a group have: those like them may reach them, and they may reach everybody.
fn usual_group(network: &Object<Network>) -> GroupPlan {
    let rule = |id: &str, direction, remotes| RulePlan {
        id: fixed(id),
        direction,
        priority: 1_000,
        allow: true,
        protocol: RuleProtocol::Any,
        ports: Vec::new(),
        remotes,
    };
    GroupPlan {
        uid: network.metadata.uid,
        name: fixed("default"),
        rules: vec![
            rule("members", Direction::Ingress, vec![Remote::Group(0)]),
            rule("everybody", Direction::Egress, Vec::new()),
        ],
    }
}

fn group_plan(world: &World, group: &Object<SecurityGroup>, groups: &BTreeMap<&Name, u32>) -> GroupPlan {
    let list = |name: &Name| world.prefix_lists.get(group.metadata.project.as_ref(), name).map(|list| &list.spec.cidrs);
    let rules = group.spec.rules.iter().filter_map(|rule| rule_plan(rule, groups, list)).collect();
    GroupPlan { uid: group.metadata.uid, name: group.metadata.name.clone(), rules }
}

/// None of a rule whose lists are all empty: it is about nobody, while a plan without remotes is about everybody.
fn rule_plan<'a>(
    rule: &SecurityRule,
    groups: &BTreeMap<&Name, u32>,
    list: impl Fn(&Name) -> Option<&'a Vec<Cidr>>,
) -> Option<RulePlan> {
    let mut remotes = Vec::new();
    for remote in &rule.remotes {
        match remote {
            RuleRemote::Cidr(cidr) => remotes.push(Remote::Cidr(*cidr)),
            RuleRemote::Group(name) => remotes.extend(groups.get(name).map(|at| Remote::Group(*at))),
            RuleRemote::PrefixList(name) => remotes.extend(list(name).into_iter().flatten().copied().map(Remote::Cidr)),
        }
    }
    if remotes.is_empty() && !rule.remotes.is_empty() {
        return None;
    }
    Some(RulePlan {
        id: rule.id.clone(),
        direction: rule.direction,
        priority: rule.priority,
        allow: rule.action == RuleAction::Allow,
        protocol: rule.protocol,
        ports: rule.ports.iter().map(|range| (range.first, range.last)).collect(),
        remotes,
    })
}
