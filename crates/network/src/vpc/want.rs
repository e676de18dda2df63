//! What one network needs in its namespace, worked out from the plan alone: values, no kernel.
//!
//! Ways are looked up in this order:
//!
//! ```text
//!   90  marked           answers to the relay of PROXY listeners: to this namespace itself
//!  100  main           NICs here and elsewhere; the rest of the network's CIDRs: unreachable
//!  110  by np…, up     nowhere: who came from outside the network goes no further than its NICs
//!  120  by lo          what the namespace itself sends: errors about packets of peered networks and of outside
//!  200  by nxn…        of NICs that forward, whose packets have others' sources: their subnet's route table
//!  300  from SUBNET    the subnet's route table: also for what came here through the tunnel to a NIC that forwards
//!  400  by vx          routes to NICs here that forward
//! ```
//!
//! Which table it is follows from the source and not from a mark, so that the host of the next hop decides as the first did.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_model::plan::{HostNetworks, NetworkPlan, NicPlan, SubnetPlan, Via};
use nexus_model::{Cidr, Uid};

use super::links::{self, GATEWAY_LINK, TUNNEL, UPLINK, hop, hop4};
use super::{relay, rules};
use crate::netlink::{Forward, Limit, MAIN, Policy, Then, Vxlan};

/// The port of RFC 7348.
pub(super) const PORT: u16 = 4789;
/// Of the first of a network's route tables; the others follow.
const TABLES: u32 = 1000;
const TO_FORWARDERS: u32 = 999;
const FROM_HERE: u32 = 998;
const TO_RELAY: u32 = 997;
/// Of links that only carry what others' limits let through. A workload that raises its own MTU is told what fits.
pub(super) const WIDE_MTU: u32 = 9216;

/// The two ends of a link that is not a NIC's.
pub(super) const FIRST_END: ([u8; 6], Ipv6Addr) =
    ([0x02, 0x9c, 0x5f, 0, 1, 1], Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
pub(super) const SECOND_END: ([u8; 6], Ipv6Addr) =
    ([0x02, 0x9c, 0x5f, 0, 1, 2], Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2));

/// Everything of one network in its namespace on this host, with links by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetworkWant {
    pub uid: Uid,
    /// For sentences: `acme/blue`.
    pub called: String,
    pub mtu: u32,
    pub tunnel: Vxlan,
    pub nics: Vec<NicWant>,
    pub peerings: Vec<PeeringWant>,
    /// Whether there is a way out.
    pub uplink: bool,
    pub addresses: BTreeSet<(String, IpAddr, u8)>,
    pub neighbours: BTreeSet<(String, IpAddr, [u8; 6])>,
    pub forwards: BTreeSet<Forward>,
    /// Of addresses of NICs elsewhere, the tunnel's neighbours that lead to their hosts.
    pub hops: BTreeMap<IpAddr, IpAddr>,
    /// Hosts to which no tunnel can lead.
    pub apart: BTreeSet<IpAddr>,
    pub routes: BTreeMap<(u32, IpAddr, u8), Way>,
    pub policies: BTreeSet<Policy>,
    pub limits: BTreeMap<String, Limit>,
    /// Addresses of outside that lead here.
    pub outside: BTreeSet<IpAddr>,
}

/// A NIC of an instance of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NicWant {
    pub uid: Uid,
    pub instance: Uid,
    pub index: u8,
    /// Its end in the network's namespace, and the one in its instance.
    pub link: String,
    pub inside: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub address4: Option<Ipv4Addr>,
    pub address6: Option<Ipv6Addr>,
    pub gateway4: Option<Ipv4Addr>,
    pub gateway6: Option<Ipv6Addr>,
    pub cidrs: Vec<Cidr>,
    pub rate: Option<u64>,
    pub forwards: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PeeringWant {
    pub link: String,
    pub other: Uid,
    /// Whether this network's end is the first.
    pub first: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    Link {
        link: String,
        via: Option<IpAddr>,
        source: Option<IpAddr>,
        mtu: Option<u32>,
    },
    Unreachable,
    Blackhole,
    /// To the namespace itself, whatever its addresses are.
    Local,
}

impl PeeringWant {
    /// This network's end and the other's.
    pub fn ends(&self) -> [([u8; 6], Ipv6Addr); 2] {
        if self.first { [FIRST_END, SECOND_END] } else { [SECOND_END, FIRST_END] }
    }
}

impl NicWant {
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.address4.map(IpAddr::V4).into_iter().chain(self.address6.map(IpAddr::V6))
    }
}

fn whole(address: IpAddr) -> u8 {
    Cidr::host(address).length
}

fn addresses(nic: &NicPlan) -> impl Iterator<Item = IpAddr> {
    nic.address4.map(IpAddr::V4).into_iter().chain(nic.address6.map(IpAddr::V6))
}

fn subnet_of<'a>(network: &'a NetworkPlan, nic: &NicPlan) -> Option<&'a SubnetPlan> {
    network.subnets.get(nic.subnet as usize)
}

impl NetworkWant {
    pub fn of(plan: &HostNetworks, network: &NetworkPlan) -> Self {
        let mut want = Self {
            uid: network.uid,
            called: format!("{}/{}", network.project, network.name),
            mtu: network.mtu.into(),
            tunnel: Vxlan { vni: network.vni, local: plan.endpoint, port: PORT },
            nics: Vec::new(),
            peerings: Vec::new(),
            uplink: false,
            addresses: BTreeSet::new(),
            neighbours: BTreeSet::new(),
            forwards: BTreeSet::new(),
            hops: BTreeMap::new(),
            apart: BTreeSet::new(),
            routes: BTreeMap::new(),
            policies: BTreeSet::new(),
            limits: BTreeMap::new(),
            outside: BTreeSet::new(),
        };
        want.outside(plan, network);
        want.own(network);
        for nic in &network.nics {
            match &nic.at {
                Some(at) if at.host == plan.host => want.nic_here(network, nic, at.instance, at.index),
                Some(at) => want.nic_elsewhere(plan, nic, at.endpoint),
                None => {}
            }
        }
        want.peerings(plan, network);
        want.probers(plan, network);
        want.relay(plan, network);
        want.tables(plan, network);
        // Where all is in the main table nothing needs a rule to be found, and the kernel looks there at once.
        if want.routes.keys().all(|(table, ..)| *table == MAIN) {
            want.policies.clear();
        }
        want
    }

    fn way(&mut self, table: u32, to: Cidr, way: Way) {
        self.routes.insert((table, to.first(), to.length), way);
    }

    fn both(&mut self, priority: u32, iif: Option<&str>, then: Then) {
        for six in [false, true] {
            let iif = iif.map(str::to_owned);
            self.policies.insert(Policy { six, priority, from: None, iif, mark: None, then });
        }
    }

    /// The network's own addresses, and that nothing of it is looked for elsewhere.
    fn own(&mut self, network: &NetworkPlan) {
        let lo = |a: IpAddr| ("lo".to_owned(), a, whole(a));
        for subnet in &network.subnets {
            self.addresses.extend(subnet.gateway4.map(|a| lo(a.into())));
            self.addresses.extend(subnet.gateway6.map(|a| lo(a.into())));
        }
        self.addresses.extend(network.balancers.iter().map(|b| lo(b.address)));
        for cidr in &network.cidrs {
            self.way(MAIN, *cidr, Way::Unreachable);
        }
        self.both(100, None, Then::Table(MAIN));
        self.both(400, Some(TUNNEL), Then::Table(TO_FORWARDERS));
        self.both(120, Some("lo"), Then::Table(FROM_HERE));
    }

    fn nic_here(&mut self, network: &NetworkPlan, nic: &NicPlan, instance: Uid, index: u8) {
        let Some(subnet) = subnet_of(network, nic) else { return };
        let want = NicWant {
            uid: nic.uid,
            instance,
            index,
            link: links::nic(nic.uid),
            inside: links::inside(index),
            mac: nic.mac.0,
            mtu: network.mtu.into(),
            address4: nic.address4,
            address6: nic.address6,
            gateway4: subnet.gateway4,
            gateway6: subnet.gateway6,
            cidrs: subnet.cidr4.into_iter().chain(subnet.cidr6).collect(),
            rate: nic.rate,
            forwards: nic.forwards,
        };
        let link = &want.link;
        self.addresses.insert((link.clone(), GATEWAY_LINK.into(), 64));
        // IPv6 answers for an address only on the link that has it.
        self.addresses.extend(subnet.gateway6.map(|a| (link.clone(), a.into(), 128)));
        for address in addresses(nic) {
            self.neighbours.insert((link.clone(), address, nic.mac.0));
            let source = match address {
                IpAddr::V4(_) => subnet.gateway4.map(IpAddr::V4),
                IpAddr::V6(_) => subnet.gateway6.map(IpAddr::V6),
            };
            let way = Way::Link { link: link.clone(), via: None, source, mtu: Some(self.mtu) };
            self.way(MAIN, Cidr::host(address), way);
        }
        if let Some(rate) = nic.rate {
            self.limits.insert(link.clone(), Limit::of(rate));
        }
        if nic.forwards {
            self.both(200, Some(link), Then::Table(TABLES + subnet.route_table));
        }
        self.nics.push(want);
    }

    fn nic_elsewhere(&mut self, plan: &HostNetworks, nic: &NicPlan, endpoint: IpAddr) {
        if endpoint == plan.endpoint {
            return;
        }
        // A tunnel of IPv6 can't lead to an end in IPv4.
        if endpoint.is_ipv6() != plan.endpoint.is_ipv6() {
            self.apart.insert(endpoint);
            return;
        }
        let via = self.tunnel_to(endpoint);
        let via4 = IpAddr::V4(hop4(endpoint));
        let named = |mac| (TUNNEL.to_owned(), via4, mac);
        let neighbour = named(hop(endpoint).0);
        // Of two hosts with the same the second has none: its NICs are reached the long way.
        let one = self.neighbours.range(named([0; 6])..=named([0xff; 6])).all(|other| *other == neighbour);
        for address in addresses(nic) {
            self.way(MAIN, Cidr::host(address), through_tunnel(via));
            if address.is_ipv6() {
                self.hops.insert(address, via.into());
            } else if one {
                self.hops.insert(address, via4);
                self.neighbours.insert(neighbour.clone());
            }
        }
    }

    fn peerings(&mut self, plan: &HostNetworks, network: &NetworkPlan) {
        for peering in &network.peerings {
            if peering.network == network.uid || !plan.networks.iter().any(|n| n.uid == peering.network) {
                continue;
            }
            let link = links::peering(peering.uid);
            let want = PeeringWant { link, other: peering.network, first: network.uid < peering.network };
            let [own, other] = want.ends();
            self.addresses.insert((want.link.clone(), own.1.into(), 64));
            self.neighbours.insert((want.link.clone(), other.1.into(), other.0));
            self.both(110, Some(&want.link), Then::Unreachable);
            for cidr in &peering.cidrs {
                let way = via(&want.link, other.1);
                self.way(FROM_HERE, *cidr, way);
            }
            self.peerings.push(want);
        }
    }

    /// The way of the answers to hosts that ask this network's targets whether they answer: those that have NICs of it, and those
    /// that have NICs of a peered network.
    fn probers(&mut self, plan: &HostNetworks, network: &NetworkPlan) {
        if !network.balancers.iter().flat_map(|b| &b.listeners).any(|l| l.check.is_some()) {
            return;
        }
        let peered = |n: &NetworkPlan| network.peerings.iter().any(|p| p.network == n.uid);
        let networks = plan.networks.iter().filter(|n| n.uid == network.uid || peered(n));
        let hosts: BTreeSet<IpAddr> =
            networks.flat_map(|n| &n.nics).filter_map(|nic| Some(nic.at.as_ref()?.endpoint)).collect();
        let (four, six) = links::prober(plan.endpoint);
        self.addresses.extend([("lo".to_owned(), four.into(), 32), ("lo".to_owned(), six.into(), 128)]);
        for endpoint in hosts {
            if endpoint.is_ipv6() != plan.endpoint.is_ipv6() || endpoint == plan.endpoint {
                continue;
            }
            let via = self.tunnel_to(endpoint);
            let (four, six) = links::prober(endpoint);
            for address in [IpAddr::from(four), six.into()] {
                self.way(MAIN, Cidr::host(address), through_tunnel(via));
            }
        }
    }

    /// The relay's own addresses, and the way to it for answers to those in whose names it speaks.
    fn relay(&mut self, plan: &HostNetworks, network: &NetworkPlan) {
        if rules::proxied(plan, network).next().is_none() {
            return;
        }
        let (four, six) = links::prober(plan.endpoint);
        self.addresses.extend([("lo".to_owned(), four.into(), 32), ("lo".to_owned(), six.into(), 128)]);
        for any in EVERYTHING {
            self.way(TO_RELAY, any, Way::Local);
            let (six, mark) = (any.address.is_ipv6(), Some(relay::ANSWERS));
            let then = Then::Table(TO_RELAY);
            self.policies.insert(Policy { six, priority: 90, from: None, iif: None, mark, then });
        }
    }

    /// Lets the tunnel lead to a host; answers the next hop.
    fn tunnel_to(&mut self, endpoint: IpAddr) -> Ipv6Addr {
        let (mac, via) = hop(endpoint);
        self.neighbours.insert((TUNNEL.to_owned(), via.into(), mac));
        self.forwards.insert(Forward { mac, endpoint });
        via
    }

    /// The way out, if anything leads there.
    fn outside(&mut self, plan: &HostNetworks, network: &NetworkPlan) {
        let here = |nic: &Uid| {
            let at = network.nics.iter().find(|n| n.uid == *nic).and_then(|n| n.at.as_ref());
            at.is_some_and(|at| at.host == plan.host)
        };
        self.outside.extend(network.floating.iter().filter(|f| here(&f.nic)).map(|f| f.address));
        for (host, address) in network.nats.iter().flat_map(|n| &n.addresses) {
            if *host == plan.host {
                self.outside.insert(*address);
            }
        }
        self.uplink = rules::leads_out(plan, network);
        if self.uplink {
            let (four, six) = links::transit(network.vni);
            let up = UPLINK.to_owned();
            self.addresses.insert((up.clone(), SECOND_END.1.into(), 64));
            self.addresses.insert((up.clone(), four.into(), 32));
            self.addresses.insert((up.clone(), six.into(), 128));
            self.neighbours.insert((up.clone(), FIRST_END.1.into(), FIRST_END.0));
            self.both(110, Some(UPLINK), Then::Unreachable);
            for any in EVERYTHING {
                self.way(FROM_HERE, any, via(UPLINK, FIRST_END.1));
            }
        }
    }

    /// The route tables, each for its subnets.
    fn tables(&mut self, plan: &HostNetworks, network: &NetworkPlan) {
        let nics: BTreeMap<Uid, &NicPlan> = network.nics.iter().map(|n| (n.uid, n)).collect();
        for (number, table) in (TABLES..).zip(&network.route_tables) {
            for route in &table.routes {
                let way = match route.via {
                    Via::Blackhole => Way::Blackhole,
                    Via::Internet | Via::Nat(_) => via(UPLINK, FIRST_END.1),
                    Via::Peering(n) => self.to_peer(network, n),
                    Via::Nic(uid) => {
                        let way = nics.get(&uid).map_or(Way::Unreachable, |nic| to_nic(plan, nic, route.to));
                        if matches!(&way, Way::Link { link, .. } if link != TUNNEL) {
                            self.routes
                                .entry((TO_FORWARDERS, route.to.first(), route.to.length))
                                .or_insert(way.clone());
                        }
                        way
                    }
                };
                self.way(number, route.to, way);
            }
        }
        for subnet in network.subnets.iter().filter(|s| (s.route_table as usize) < network.route_tables.len()) {
            for cidr in subnet.cidr4.iter().chain(&subnet.cidr6) {
                self.policies.insert(Policy {
                    six: cidr.address.is_ipv6(),
                    priority: 300,
                    from: Some((cidr.first(), cidr.length)),
                    iif: None,
                    mark: None,
                    then: Then::Table(TABLES + subnet.route_table),
                });
            }
        }
    }

    fn to_peer(&self, network: &NetworkPlan, n: u32) -> Way {
        let link = network.peerings.get(n as usize).map(|p| links::peering(p.uid));
        match self.peerings.iter().find(|p| Some(&p.link) == link.as_ref()) {
            Some(peering) => via(&peering.link, peering.ends()[1].1),
            None => Way::Unreachable,
        }
    }
}

const EVERYTHING: [Cidr; 2] = [
    Cidr { address: IpAddr::V4(Ipv4Addr::UNSPECIFIED), length: 0 },
    Cidr { address: IpAddr::V6(Ipv6Addr::UNSPECIFIED), length: 0 },
];

fn via(link: &str, next: Ipv6Addr) -> Way {
    Way::Link { link: link.to_owned(), via: Some(next.into()), source: None, mtu: None }
}

fn through_tunnel(next: Ipv6Addr) -> Way {
    via(TUNNEL, next)
}

/// The way to a NIC that forwards, for what is not for itself.
fn to_nic(plan: &HostNetworks, nic: &NicPlan, to: Cidr) -> Way {
    let Some(at) = nic.at.as_ref().filter(|_| nic.forwards) else { return Way::Unreachable };
    if at.host != plan.host {
        return match at.endpoint.is_ipv6() == plan.endpoint.is_ipv6() {
            true => through_tunnel(hop(at.endpoint).1),
            false => Way::Unreachable,
        };
    }
    let next = match to.address {
        IpAddr::V4(_) => nic.address4.map(IpAddr::V4).or(nic.address6.map(IpAddr::V6)),
        IpAddr::V6(_) => nic.address6.map(IpAddr::V6),
    };
    match next {
        Some(next) => Way::Link { link: links::nic(nic.uid), via: Some(next), source: None, mtu: None },
        None => Way::Unreachable,
    }
}
