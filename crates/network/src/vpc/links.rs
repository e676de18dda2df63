//! How the links of tenants' networks are named: the same on every host and after every restart, so that what is ours is known
//! by its name.

use nexus_model::Uid;

use crate::link_name;

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
