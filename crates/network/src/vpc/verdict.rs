//! What becomes of a packet: its whole way by the plan, through the very rules that are programmed.
//!
//! Each host's part is looked at as that host has it: its own table, made from the plan that all share. Which rule of which group
//! decides is read from the plan, plainly; should that reading and the programmed rules ever differ, the trace says so.

pub mod walk;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nexus_model::plan::{
    BalancedProtocol, BalancerPlan, Direction, HostNetworks, ListenerPlan, NetworkPlan, NicPlan, PeeringPlan,
    ProxyProtocol, RoutePlan, RuleProtocol, Trace, TraceHop, TraceVerdict, TracedPacket, Via,
};
use nexus_model::{Name, Uid};

use self::walk::{Choice, Packet, hook};
use super::rules::table::{Family, Hook, Table};
use super::rules::{self, Way, way};
use super::{links, relay};
use crate::firewall::{self, Net};

/// So many targets of a balancer are tried.
const MAX_TARGETS: usize = 64;
/// Networks that a packet may cross.
const MAX_NETWORKS: usize = 8;
/// How the relay of PROXY listeners is called here.
pub const RELAY: &str = "relay";
const EPHEMERAL: u16 = 40_000;
/// How the world beyond the host's links is called here.
const OUTSIDE: &str = "outside";

/// What becomes of a packet that a NIC sends. Outside, only what is closed to everybody is known to be.
pub fn trace(hosts: &HostNetworks, from: Uid, packet: TracedPacket) -> Trace {
    trace_beyond(hosts, &firewall::never(), from, packet)
}

/// The same, knowing all that is `closed` to tenants on this host.
pub fn trace_beyond(hosts: &HostNetworks, closed: &[Net], from: Uid, packet: TracedPacket) -> Trace {
    let mut choice = Choice::default();
    let first = one(hosts, closed, from, packet, &mut choice);
    // Of several targets, one that is out of reach says more.
    for index in 1..choice.of.min(MAX_TARGETS) {
        if first.verdict == TraceVerdict::Dropped {
            break;
        }
        let other = one(hosts, closed, from, packet, &mut Choice { index, of: 0 });
        if other.verdict == TraceVerdict::Dropped {
            return other;
        }
    }
    first
}

fn one(hosts: &HostNetworks, closed: &[Net], from: Uid, packet: TracedPacket, choice: &mut Choice) -> Trace {
    let mut tracer = Tracer { hosts, closed, hops: Vec::new(), choice };
    let verdict = match tracer.begin(from, packet) {
        Ok(verdict) => verdict,
        Err(Dropped) => TraceVerdict::Dropped,
    };
    Trace { hops: tracer.hops, verdict, probed: None }
}

/// The last hop says why.
struct Dropped;

struct Tracer<'a> {
    hosts: &'a HostNetworks,
    closed: &'a [Net],
    hops: Vec<TraceHop>,
    choice: &'a mut Choice,
}

/// A network as one host has it.
struct Place<'a> {
    hosts: HostNetworks,
    plan: &'a NetworkPlan,
    table: Table,
}

impl Place<'_> {
    fn name(&self) -> String {
        format!("{}/{}", self.plan.project, self.plan.name)
    }
}

impl<'a> Tracer<'a> {
    fn hop(&mut self, host: &Name, at: &str, what: impl Into<String>) {
        self.hops.push(TraceHop { host: host.clone(), at: at.to_owned(), what: what.into() });
    }

    fn drop<T>(&mut self, host: &Name, at: &str, what: impl Into<String>) -> Result<T, Dropped> {
        self.hop(host, at, format!("dropped: {}", what.into()));
        Err(Dropped)
    }

    /// What a host has been told: of this one all, of others as much as matters here.
    fn view(&self, host: &Name, endpoint: IpAddr) -> HostNetworks {
        if *host == self.hosts.host {
            return self.hosts.clone();
        }
        let mut tunnels: Vec<IpAddr> = self.hosts.tunnels.iter().copied().filter(|t| *t != endpoint).collect();
        tunnels.push(self.hosts.endpoint);
        tunnels.sort_unstable();
        HostNetworks { host: host.clone(), endpoint, tunnels, ..self.hosts.clone() }
    }

    fn place(&self, hosts: &HostNetworks, plan: &'a NetworkPlan) -> Place<'a> {
        Place { hosts: hosts.clone(), plan, table: rules::network(hosts, plan) }
    }

    fn begin(&mut self, from: Uid, packet: TracedPacket) -> Result<TraceVerdict, Dropped> {
        let hosts = self.hosts;
        let found = hosts
            .networks
            .iter()
            .find_map(|n: &'a Arc<NetworkPlan>| Some((&**n, n.nics.iter().find(|nic| nic.uid == from)?)));
        let own_host = hosts.host.clone();
        let Some((plan, nic)) = found else {
            return self.drop(&own_host, "anti-spoofing", "there is no such NIC in the networks of this host");
        };
        let Some(at) = &nic.at else {
            return self.drop(&own_host, "anti-spoofing", format!("the NIC {} is on no host", nic.name));
        };
        let family = Family::of(packet.to);
        let Some(source) = rules::address(nic, family) else {
            return self.drop(&at.host, "anti-spoofing", format!("the NIC {} has no address of that family", nic.name));
        };
        let place = self.place(&self.view(&at.host, at.endpoint), plan);
        let icmp = packet.protocol == RuleProtocol::Icmp;
        let mut packet = Packet {
            link_in: links::nic(nic.uid),
            link_out: String::new(),
            mac: Some(nic.mac),
            source,
            destination: packet.to,
            protocol: match packet.protocol {
                RuleProtocol::Tcp => 6,
                RuleProtocol::Udp => 17,
                RuleProtocol::Icmp => family.icmp(),
                RuleProtocol::Any => 0,
            },
            source_port: if icmp { 0 } else { EPHEMERAL },
            port: if icmp { 0 } else { packet.port },
            icmp: icmp.then_some(if family == Family::V6 { 128 } else { 8 }),
            hop_limit: 64,
            mark: 0,
            vni: 0,
            translated: false,
        };
        let asked = (packet.destination, packet.port);
        let host = at.host.clone();
        if let Err(reason) = hook(&place.table, Hook::Prerouting, &mut packet, self.choice) {
            return self.drop(&host, "anti-spoofing", says(&reason));
        }
        self.hop(&host, "anti-spoofing", format!("sent by {} with its own address {source}", nic.name));
        if packet.translated
            && let Some(listener) = self.listener(place.plan, asked, packet.protocol)
            && let Some(version) = listener.proxy_protocol
        {
            return self.relayed(&place, nic, listener, version, packet, asked);
        }
        if packet.translated {
            let balancer = self.balancer(place.plan, asked.0);
            let to = ended(&packet);
            let among = if self.choice.of > 1 { format!(", one of {} targets", self.choice.of) } else { String::new() };
            let failing = self.failing(place.plan, asked, packet.protocol);
            self.hop(&host, "load balancer", format!("{balancer} hands it to {to}{among}{failing}"));
        }
        self.route(&place, Some(nic), packet, MAX_NETWORKS)
    }

    /// On from the relay of the client's host, as if the client had called the target itself.
    fn relayed(
        &mut self,
        place: &Place<'a>,
        nic: &'a NicPlan,
        listener: &ListenerPlan,
        version: ProxyProtocol,
        mut packet: Packet,
        asked: (IpAddr, u16),
    ) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        if let Err(reason) = hook(&place.table, Hook::Input, &mut packet, self.choice) {
            return self.drop(&host, RELAY, says(&reason));
        }
        let shares = rules::shares(listener, Family::of(packet.source));
        self.choice.of = shares.len();
        let Some(share) = shares.get(self.choice.index).or(shares.first()) else {
            return self.drop(&host, "load balancer", format!("{} has no target", self.balancer(place.plan, asked.0)));
        };
        let (to, balancer) = (SocketAddr::new(share.address, share.port), self.balancer(place.plan, asked.0));
        let among = if shares.len() > 1 { format!(", one of {} targets", shares.len()) } else { String::new() };
        let version = match version {
            ProxyProtocol::V1 => "v1",
            ProxyProtocol::V2 => "v2",
        };
        let failing = self.failing(place.plan, asked, packet.protocol);
        self.hop(&host, "load balancer", format!("{balancer} hands it to {to}{among}{failing}"));
        self.hop(&host, RELAY, format!("relayed (PROXY {version}), from the client's own address {}", packet.source));
        (packet.destination, packet.port) = (share.address, share.port);
        (packet.mark, packet.mac, packet.translated) = (relay::SENT, None, false);
        packet.link_in = String::new();
        self.route(place, Some(nic), packet, MAX_NETWORKS)
    }

    /// The balancers that a network has or reaches: others' may have the same addresses.
    fn balancers(&self, network: &'a NetworkPlan) -> impl Iterator<Item = &'a BalancerPlan> {
        let hosts = self.hosts;
        let peers = network.peerings.iter().filter_map(move |p| rules::peer(hosts, p));
        std::iter::once(network).chain(peers).flat_map(|n| &n.balancers)
    }

    /// A balancer's listener by its address.
    fn listener(
        &self,
        network: &'a NetworkPlan,
        (address, port): (IpAddr, u16),
        protocol: u8,
    ) -> Option<&'a ListenerPlan> {
        let number = |l: &ListenerPlan| match l.protocol {
            BalancedProtocol::Tcp => 6,
            BalancedProtocol::Udp => 17,
        };
        let balancers = self.balancers(network).filter(|b| b.address == address);
        balancers.flat_map(|b| &b.listeners).find(|l| l.port == port && number(l) == protocol)
    }

    /// Which targets fail the listener's check, as this host found them.
    fn failing(&self, network: &'a NetworkPlan, asked: (IpAddr, u16), protocol: u8) -> String {
        let targets = self.listener(network, asked, protocol).map_or(&[][..], |l| &l.targets);
        let failing = targets.iter().filter(|t| t.failing);
        let failing: Vec<String> = failing.map(|t| SocketAddr::new(t.address, t.port).to_string()).collect();
        match failing.len() {
            0 => String::new(),
            n if n == targets.len() => "; all targets fail their check, so all are used".to_owned(),
            _ => format!("; not to {}, which fails its check", failing.join(", ")),
        }
    }

    fn balancer(&self, network: &'a NetworkPlan, address: IpAddr) -> String {
        let found = self.balancers(network).find(|b| b.address == address);
        found.map_or_else(|| address.to_string(), |b| b.name.to_string())
    }

    /// From where its way within a network is chosen: sent by a NIC, or without one come by a peering or from outside.
    fn route(
        &mut self,
        place: &Place<'a>,
        nic: Option<&'a NicPlan>,
        mut packet: Packet,
        left: usize,
    ) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        let to = packet.destination;
        match way(place.plan, nic.map(|n| n.subnet), to) {
            Way::Gateway => match hook(&place.table, Hook::Input, &mut packet, self.choice) {
                Ok(()) => {
                    self.hop(&host, "gateway", format!("{to} is a gateway's or a balancer's, which answers pings"));
                    Ok(TraceVerdict::Gateway)
                }
                Err(reason) => self.drop(&host, "gateway", says(&reason)),
            },
            Way::Nic(other) => self.reach_nic(place, nic, other, packet, "the network's own addresses"),
            Way::Nobody => {
                let what = format!("{to} is of {}, and nobody there has it", place.name());
                self.drop(&host, "route", what)
            }
            Way::Unknown => self.drop(&host, "route", format!("no route of {} leads to {to}", table_name(place, nic))),
            Way::Route(route) => self.by_route(place, nic, route, packet, left),
        }
    }

    fn by_route(
        &mut self,
        place: &Place<'a>,
        nic: Option<&'a NicPlan>,
        route: &'a RoutePlan,
        packet: Packet,
        left: usize,
    ) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        let by = format!("{} of {}", route.to, table_name(place, nic));
        match route.via {
            Via::Blackhole => self.drop(&host, "route", format!("{by} is a black hole")),
            Via::Nic(uid) => match place.plan.nics.iter().find(|n| n.uid == uid && n.at.is_some()) {
                Some(other) => self.reach_nic(place, nic, other, packet, &by),
                None => self.drop(&host, "route", format!("{by} leads to a NIC that is on no host")),
            },
            Via::Peering(index) => {
                let peering = place.plan.peerings.get(index as usize);
                match peering.and_then(|p| Some((p, rules::peer(self.hosts, p)?))) {
                    Some((peering, other)) => self.by_peering(place, nic, peering, other, packet, (by.as_str(), left)),
                    None => self.drop(&host, "route", format!("{by} leads to a peering that is not there")),
                }
            }
            Via::Nat(_) | Via::Internet => self.outside(place, nic, packet, (by.as_str(), left)),
        }
    }

    /// Through the rules that look at what passes between two links, and the names of those that decide.
    fn forward(
        &mut self,
        place: &Place<'a>,
        nics: [Option<&'a NicPlan>; 2],
        packet: &mut Packet,
    ) -> Result<(), Dropped> {
        let host = place.hosts.host.clone();
        // What the relay of this host sends passes nowhere else.
        let passes = if packet.mark == relay::SENT { Hook::Output } else { Hook::Forward };
        let refused = hook(&place.table, passes, packet, self.choice).err();
        let stage = refused.as_deref().map_or(Stage::Through, Stage::of);
        let [sender, receiver] = nics;
        if stage == Stage::First {
            return self.drop(&host, "anti-spoofing", says(refused.as_deref().unwrap_or_default()));
        }
        if let Some(nic) = sender {
            let refused = refused.as_deref().filter(|_| stage == Stage::Egress);
            self.groups(place, nic, (Direction::Egress, packet.destination), packet, refused)?;
        }
        if let (Stage::Way, Some(reason)) = (stage, refused.as_deref()) {
            return self.drop(&host, at(reason), says(reason));
        }
        if let Some(nic) = receiver {
            let refused = refused.as_deref().filter(|_| stage == Stage::Ingress);
            self.groups(place, nic, (Direction::Ingress, packet.source), packet, refused)?;
        }
        match refused {
            None => Ok(()),
            Some(reason) => self.drop(&host, at(&reason), says(&reason)),
        }
    }

    /// What the groups of a NIC say, with the rule that decides.
    fn groups(
        &mut self,
        place: &Place<'a>,
        nic: &NicPlan,
        (direction, other): (Direction, IpAddr),
        packet: &Packet,
        refused: Option<&str>,
    ) -> Result<(), Dropped> {
        let host = place.hosts.host.clone();
        let at = if direction == Direction::Egress { "egress rules" } else { "ingress rules" };
        let merged = rules::merged(place.plan, &nic.groups, direction);
        let found = rules::decides(place.plan, &merged, other, packet.protocol, packet.port);
        let named = found.map(|f| format!("{}/{}", f.group.name, f.rule.id));
        let programmed = refused.map(|r| r.ends_with("_denied"));
        match (programmed, found.map(|f| f.rule.allow), named) {
            (None, Some(true), Some(name)) => {
                self.hop(&host, at, format!("allowed by {name}"));
                Ok(())
            }
            (Some(true), Some(false), Some(name)) => self.drop(&host, at, format!("denied by {name}")),
            (Some(false), None, _) => self.drop(&host, at, "no rule allows it"),
            (_, _, name) => {
                let name = name.unwrap_or("no rule".into());
                self.drop(
                    &host,
                    at,
                    format!("the programmed rules differ from the plan, by which {name} decides: please report it"),
                )
            }
        }
    }

    fn reach_nic(
        &mut self,
        place: &Place<'a>,
        sender: Option<&'a NicPlan>,
        receiver: &'a NicPlan,
        mut packet: Packet,
        by: &str,
    ) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        let Some(at) = &receiver.at else {
            return self.drop(&host, "route", format!("the NIC {} is on no host", receiver.name));
        };
        if at.host == host {
            packet.link_out = links::nic(receiver.uid);
            self.hop(&host, "route", format!("to the NIC {} here, by {by}", receiver.name));
            self.forward(place, [sender, Some(receiver)], &mut packet)?;
            if hook(&place.table, Hook::Postrouting, &mut packet, self.choice).is_ok()
                && sender.is_some_and(|s| s.uid == receiver.uid)
            {
                self.hop(&host, "load balancer", format!("its own target: seen as coming from {}", packet.source));
            }
            self.hop(&host, "NIC", format!("delivered to {}", receiver.name));
            return Ok(TraceVerdict::Delivered);
        }
        if packet.link_in == links::TUNNEL || packet.link_in == links::UPLINK {
            return self.drop(&host, "route", format!("the NIC {} is on another host", receiver.name));
        }
        packet.link_out = links::TUNNEL.to_owned();
        self.hop(&host, "route", format!("to the NIC {} on {}, by {by}", receiver.name, at.host));
        self.forward(place, [sender, None], &mut packet)?;
        self.hop(&host, "tunnel", format!("to {} at {}, VXLAN {}", at.host, at.endpoint, place.plan.vni));
        let there = self.place(&self.view(&at.host, at.endpoint), place.plan);
        packet.link_in = links::TUNNEL.to_owned();
        packet.link_out = links::nic(receiver.uid);
        (packet.mac, packet.mark) = (None, 0);
        if let Err(reason) = hook(&there.table, Hook::Prerouting, &mut packet, self.choice) {
            return self.drop(&at.host, "tunnel", says(&reason));
        }
        self.forward(&there, [None, Some(receiver)], &mut packet)?;
        self.hop(&at.host, "NIC", format!("delivered to {}", receiver.name));
        Ok(TraceVerdict::Delivered)
    }

    fn by_peering(
        &mut self,
        place: &Place<'a>,
        nic: Option<&'a NicPlan>,
        peering: &'a PeeringPlan,
        other: &'a NetworkPlan,
        mut packet: Packet,
        (by, left): (&str, usize),
    ) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        if left == 0 {
            return self.drop(&host, "route", "too many networks on its way");
        }
        packet.link_out = links::peering(peering.uid);
        self.hop(&host, "route", format!("by {by} to the peering {}", peering.name));
        self.forward(place, [nic, None], &mut packet)?;
        let there = self.place(&place.hosts, other);
        self.hop(&host, "peering", format!("{} into the network {}", peering.name, there.name()));
        packet.link_in = links::peering(peering.uid);
        (packet.mac, packet.mark) = (None, 0);
        if let Err(reason) = hook(&there.table, Hook::Prerouting, &mut packet, self.choice) {
            return self.drop(&host, "peering", says(&reason));
        }
        self.route(&there, None, packet, left - 1)
    }

    fn outside(
        &mut self,
        place: &Place<'a>,
        nic: Option<&'a NicPlan>,
        mut packet: Packet,
        (by, left): (&str, usize),
    ) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        packet.link_out = links::UPLINK.to_owned();
        self.hop(&host, "route", format!("by {by} to the outside"));
        self.forward(place, [nic, None], &mut packet)?;
        if let Err(reason) = hook(&place.table, Hook::Postrouting, &mut packet, self.choice) {
            return self.drop(&host, "nat", says(&reason));
        }
        let (four, six) = links::transit(place.plan.vni);
        let lent = packet.source == IpAddr::from(four) || packet.source == IpAddr::from(six);
        let name = if lent { "the host's own address".to_owned() } else { packet.source.to_string() };
        self.hop(&host, "nat", format!("leaves with {name}"));
        self.through_host(place, packet, left)
    }

    /// Through the host's namespace: to the world, or back into a network whose floating address it is for.
    fn through_host(&mut self, place: &Place<'a>, mut packet: Packet, left: usize) -> Result<TraceVerdict, Dropped> {
        let host = place.hosts.host.clone();
        let hosts = self.hosts;
        let to = packet.destination;
        let floating = hosts.networks.iter().find_map(|n: &'a Arc<NetworkPlan>| {
            let floating = n.floating.iter().find(|f| f.address == to)?;
            let at = n.nics.iter().find(|nic| nic.uid == floating.nic)?.at.as_ref()?;
            Some((&**n, at))
        });
        let table = rules::host(&place.hosts, self.closed);
        packet.link_in = links::host(place.plan.uid);
        (packet.mac, packet.mark, packet.translated) = (None, 0, false);
        let here = floating.filter(|(_, at)| at.host == host);
        packet.link_out = here.map_or_else(|| OUTSIDE.to_owned(), |(plan, _)| links::host(plan.uid));
        let passes = hook(&table, Hook::Prerouting, &mut packet, self.choice)
            .and_then(|()| hook(&table, Hook::Forward, &mut packet, self.choice))
            .and_then(|()| hook(&table, Hook::Postrouting, &mut packet, self.choice));
        if let Err(reason) = passes {
            return self.drop(&host, "host", says(&reason));
        }
        let Some((plan, at)) = floating else {
            self.hop(&host, "host", format!("sent on to {to}"));
            return Ok(TraceVerdict::Outside);
        };
        if left == 0 {
            return self.drop(&host, "route", "too many networks on its way");
        }
        let view = self.view(&at.host, at.endpoint);
        if at.host != host {
            packet.link_in = OUTSIDE.to_owned();
            packet.link_out = links::host(plan.uid);
            let table = rules::host(&view, self.closed);
            let passes = hook(&table, Hook::Prerouting, &mut packet, self.choice)
                .and_then(|()| hook(&table, Hook::Forward, &mut packet, self.choice));
            if let Err(reason) = passes {
                return self.drop(&at.host, "host", says(&reason));
            }
        }
        let there = self.place(&view, plan);
        packet.link_in = links::UPLINK.to_owned();
        packet.link_out = String::new();
        if let Err(reason) = hook(&there.table, Hook::Prerouting, &mut packet, self.choice) {
            return self.drop(&at.host, "nat", says(&reason));
        }
        self.hop(&at.host, "nat", format!("the floating address {to} is {} of {}", packet.destination, there.name()));
        self.route(&there, None, packet, left - 1)
    }
}

fn ended(packet: &Packet) -> String {
    if packet.icmp.is_some() {
        packet.destination.to_string()
    } else {
        SocketAddr::new(packet.destination, packet.port).to_string()
    }
}

fn table_name(place: &Place<'_>, nic: Option<&NicPlan>) -> String {
    let table = nic.and_then(|n| place.plan.subnets.get(n.subnet as usize)).map(|s| s.route_table as usize);
    let table = table.and_then(|t| place.plan.route_tables.get(t));
    table.map_or_else(|| format!("the network {}", place.name()), |t| format!("the route table {}", t.name))
}

/// How far a packet came among the rules that forward it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Refused before groups are asked.
    First,
    Egress,
    /// Between what sends and what is sent to.
    Way,
    Ingress,
    Through,
}

impl Stage {
    fn of(reason: &str) -> Self {
        match reason {
            "rogue" | "flood" | "invalid" => Self::First,
            "no_egress_rule" | "egress_denied" => Self::Egress,
            "no_ingress_rule" | "ingress_denied" => Self::Ingress,
            _ => Self::Way,
        }
    }
}

/// What it is that refuses for a reason.
fn at(reason: &str) -> &'static str {
    match reason {
        "not_of_the_peering" => "peering",
        "no_floating_address" => "nat",
        "not_its_address" => "anti-spoofing",
        _ => "route",
    }
}

/// A counter's reason in words.
pub fn says(reason: &str) -> String {
    let words = match reason {
        "spoofed_mac" => "the hardware address is not the NIC's",
        "spoofed_address" => "the source address is not the sender's",
        "not_its_address" => "the destination is not the NIC's, and the NIC does not forward",
        "rogue" => "no NIC may answer as a DHCP server or router",
        "flood" => "more than one may send",
        "multicast" => "groups reach nobody here",
        "to_gateway" => "gateways and balancers answer pings, DHCP and what a balancer listens for, and nothing else",
        "no_egress_rule" | "no_ingress_rule" => "no rule allows it",
        "egress_denied" | "ingress_denied" => "a rule denies it",
        "invalid" => "it fits no connection",
        "no_way" => "there is no way between these links",
        "no_floating_address" => "the route leads to the internet, and the NIC has no floating address",
        "not_of_the_peering" => "the peering does not cover this address",
        "to_host" => "the host itself is closed to networks",
        "closed" => "closed to all networks: hosts, infrastructure, metadata and what the host is connected to",
        "not_public" => "the address is not open to the outside",
        "forged_tunnel" => "a tunnel packet from no host of ours",
        "redirect" => "nobody is told of shorter ways",
        other => return other.replace('_', " "),
    };
    words.to_owned()
}
