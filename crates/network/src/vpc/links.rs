//! How the links of tenants' networks are named: the same on every host and after every restart, so that what is ours is known
//! by its name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_model::{Cidr, Uid};

use crate::{fnv, link_name};

/// How a NIC's end in its network's namespace begins.
pub const NIC_PREFIX: &str = "nxn";
/// How the host's end of a network's way out begins.
pub const HOST_PREFIX: &str = "nxu";
/// How a peering's end in either network's namespace begins.
pub const PEER_PREFIX: &str = "np";
/// The tunnel, in the network's namespace.
pub const TUNNEL: &str = "vx";
/// The way out, in the network's namespace.
pub const UPLINK: &str = "up";

/// A NIC's end in its network's namespace.
pub fn nic(nic: Uid) -> String {
    link_name(NIC_PREFIX, &nic.to_string())
}

/// The host's end of a network's way out.
pub fn host(network: Uid) -> String {
    link_name(HOST_PREFIX, &network.to_string())
}

/// A peering's end in the namespace of either network: one has one name, the other the same.
pub fn peering(peering: Uid) -> String {
    link_name(PEER_PREFIX, &peering.to_string())
}

/// A NIC inside its instance.
pub fn inside(index: u8) -> String {
    format!("nic{index}")
}

/// What every NIC's gateway looks like to it, on every host.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x9c, 0x5f, 0, 0, 1];
/// The address from which a gateway speaks to a NIC's link alone.
pub const GATEWAY_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A network's own address on its way out, the same on every host: 250.x.y.z with the VNI as its last 24 bits, which no
/// network outside has (RFC 1112 section 4), and a ULA.
pub fn transit(vni: u32) -> (Ipv4Addr, Ipv6Addr) {
    let four = Ipv4Addr::from_bits(250 << 24 | (vni & 0xff_ffff));
    (four, Ipv6Addr::new(0xfd6e, 0x7875, 0, 0, 0, 0, (vni >> 16) as u16 & 0xff, vni as u16))
}

/// The networks of [`prober`].
pub const PROBERS: (Cidr, Cidr) = (
    Cidr { address: IpAddr::V4(Ipv4Addr::new(244, 0, 0, 0)), length: 6 },
    Cidr { address: IpAddr::V6(Ipv6Addr::new(0xfd6e, 0x7875, 1, 0, 0, 0, 0, 0)), length: 64 },
);

/// The addresses by which a host asks balancers' targets whether they answer: every host can work out those of every other.
/// Targets never see them, but their gateway. That of IPv4 is of a reserved network (RFC 1112 section 4) that no tenant's
/// network overlaps; its 26 bits leave two of a network's hundred hosts the same address once in 13,000 networks.
pub fn prober(endpoint: IpAddr) -> (Ipv4Addr, Ipv6Addr) {
    let hash = hash(endpoint);
    let [.., a, b, c, d] = hash.to_be_bytes();
    let four = Ipv4Addr::new(244 | (a & 3), b, c, d);
    (four, Ipv6Addr::from_bits(0xfd6e_7875_0001 << 80 | u128::from(hash)))
}

fn hash(endpoint: IpAddr) -> u64 {
    match endpoint {
        IpAddr::V4(a) => fnv(&a.octets()),
        IpAddr::V6(a) => fnv(&a.octets()),
    }
}

/// How the fast path of IPv4 names the end of a host's tunnels, for `nft` takes no next hop of the other family: of a reserved
/// network (RFC 1112 section 4), and known to nothing but the tunnel's own neighbours.
pub fn hop4(endpoint: IpAddr) -> Ipv4Addr {
    Ipv4Addr::from_bits(0xf << 28 | (hash(endpoint) >> 36) as u32)
}

/// The end of a host's tunnels: its hardware address, and the next hop by which others name it. Every host can work out
/// those of every other.
pub fn hop(endpoint: IpAddr) -> ([u8; 6], Ipv6Addr) {
    let hash = hash(endpoint);
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    // Locally administered, unicast.
    ([0x02, a, b, c, d, e], Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(hash)))
}
