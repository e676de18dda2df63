//! Plans of networks for tests, in few words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use nexus_model::plan::{
    BalancedProtocol, BalancerPlan, Direction, FloatingPlan, GroupPlan, HostNetworks, ListenerPlan, Mac, NatPlan,
    NetworkPlan, NicPlace, NicPlan, PeeringPlan, Remote, RoutePlan, RouteTablePlan, RulePlan, RuleProtocol, SubnetPlan,
    TargetPlan, Via,
};
use nexus_model::{Name, Uid};

pub fn uid(kind: u8, network: u8, n: u8) -> Uid {
    let mut bytes = [0; 16];
    (bytes[0], bytes[1], bytes[2]) = (kind, network, n);
    Uid::from_random(bytes)
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn host_name(host: u8) -> Name {
    name(&format!("zone-a-host-{}", host + 1))
}

pub fn endpoint(host: u8) -> IpAddr {
    Ipv4Addr::new(10, 96, 0, 11 + host).into()
}

/// 10.N.0.0/16 and fd00:N::/32 with one subnet of each.
pub fn network(n: u8) -> NetworkPlan {
    network_as(n, n)
}

/// The same, as another network that has chosen the same addresses.
pub fn network_as(id: u8, n: u8) -> NetworkPlan {
    NetworkPlan {
        uid: uid(1, id, 0),
        project: name("shop"),
        name: name(&format!("net-{id}")),
        vni: 1000 + u32::from(id),
        mtu: 1400,
        cidrs: vec![format!("10.{n}.0.0/16").parse().unwrap(), format!("fd00:{n:x}::/32").parse().unwrap()],
        subnets: vec![SubnetPlan {
            uid: uid(2, id, 0),
            name: name("main"),
            cidr4: Some(format!("10.{n}.0.0/24").parse().unwrap()),
            cidr6: Some(format!("fd00:{n:x}::/64").parse().unwrap()),
            gateway4: Some(Ipv4Addr::new(10, n, 0, 1)),
            gateway6: Some(Ipv6Addr::new(0xfd00, n.into(), 0, 0, 0, 0, 0, 1)),
            route_table: 0,
        }],
        nics: Vec::new(),
        groups: Vec::new(),
        route_tables: vec![RouteTablePlan { name: name("main"), routes: Vec::new() }],
        peerings: Vec::new(),
        nats: Vec::new(),
        floating: Vec::new(),
        balancers: Vec::new(),
        zones: Vec::new(),
        flow_logs: nexus_model::plan::FlowLogs::None,
    }
}

pub fn address4(network: u8, n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, network, 0, n)
}

pub fn address6(network: u8, n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, network.into(), 0, 0, 0, 0, 0, n.into())
}

/// A NIC with the address of its number, which is above 1.
pub fn nic(network: u8, n: u8, host: u8, groups: &[u32]) -> NicPlan {
    nic_as(network, network, n, host, groups)
}

pub fn nic_as(id: u8, network: u8, n: u8, host: u8, groups: &[u32]) -> NicPlan {
    let place = NicPlace { host: host_name(host), endpoint: endpoint(host), instance: uid(4, id, n), index: 0 };
    NicPlan {
        uid: uid(3, id, n),
        name: name(&format!("nic-{id}-{n}")),
        subnet: 0,
        mac: Mac([6, 0, 0, 0, id, n]),
        address4: Some(address4(network, n)),
        address6: Some(address6(network, n)),
        at: Some(place),
        groups: groups.to_vec(),
        rate: None,
        forwards: false,
    }
}

pub fn group(network: u8, n: u8, rules: Vec<RulePlan>) -> GroupPlan {
    GroupPlan { uid: uid(5, network, n), name: name(&format!("group-{n}")), rules }
}

pub fn rule(id: &str, direction: Direction) -> RulePlan {
    RulePlan {
        id: name(id),
        direction,
        priority: 1000,
        allow: true,
        protocol: RuleProtocol::Any,
        ports: Vec::new(),
        remotes: Vec::new(),
    }
}

pub fn everything(direction: Direction) -> RulePlan {
    rule(if direction == Direction::Ingress { "all-in" } else { "all-out" }, direction)
}

/// A group that lets all through.
pub fn open_group(network: u8, n: u8) -> GroupPlan {
    group(network, n, vec![everything(Direction::Ingress), everything(Direction::Egress)])
}

pub fn net(text: &str) -> Remote {
    Remote::Cidr(text.parse().unwrap())
}

pub fn route(plan: &mut NetworkPlan, to: &str, via: Via) {
    plan.route_tables[0].routes.push(RoutePlan { to: to.parse().unwrap(), via });
}

/// Agreed on by both for all of both, with routes.
pub fn peer(a: &mut NetworkPlan, b: &mut NetworkPlan, n: u8) {
    let (all_a, all_b) = (a.cidrs.clone(), b.cidrs.clone());
    let (uid_a, uid_b) = (a.uid, b.uid);
    for (plan, network, cidrs) in [(a, uid_b, all_b), (b, uid_a, all_a)] {
        let index = plan.peerings.len() as u32;
        for to in &cidrs {
            plan.route_tables[0].routes.push(RoutePlan { to: *to, via: Via::Peering(index) });
        }
        let peering = PeeringPlan { uid: uid(6, 0, n), name: name(&format!("peering-{n}")), network, cidrs };
        plan.peerings.push(peering);
    }
}

pub fn nat(plan: &mut NetworkPlan, addresses: Vec<(Name, IpAddr)>) {
    let n = plan.nats.len() as u8;
    plan.nats.push(NatPlan { uid: uid(7, 0, n), name: name(&format!("nat-{n}")), addresses });
}

pub fn floating(plan: &mut NetworkPlan, address: IpAddr, nic: Uid) {
    let n = plan.floating.len() as u8;
    plan.floating.push(FloatingPlan { uid: uid(8, 0, n), name: name(&format!("floating-{n}")), address, nic });
}

pub fn balancer(plan: &mut NetworkPlan, address: IpAddr, port: u16, source_hash: bool, targets: &[(IpAddr, u16, u16)]) {
    let n = plan.balancers.len() as u8;
    let target = |(address, port, weight): &(IpAddr, u16, u16)| TargetPlan {
        address: *address,
        port: *port,
        weight: *weight,
        failing: false,
    };
    let listener = ListenerPlan {
        port,
        protocol: BalancedProtocol::Tcp,
        source_hash,
        targets: targets.iter().map(target).collect(),
        proxy_protocol: None,
        check: None,
    };
    let name = name(&format!("balancer-{n}"));
    plan.balancers.push(BalancerPlan { uid: uid(9, 0, n), name, address, listeners: vec![listener] });
}

/// What one of two hosts is told.
pub fn on_host(host: u8, hosts: u8, networks: &[Arc<NetworkPlan>]) -> HostNetworks {
    HostNetworks {
        version: 1,
        host: host_name(host),
        revision: 1,
        endpoint: endpoint(host),
        tunnels: (0..hosts).filter(|h| *h != host).map(endpoint).collect(),
        networks: networks.to_vec(),
    }
}
