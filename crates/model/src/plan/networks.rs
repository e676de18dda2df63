//! What a host is to have of tenants' networks, and what it answers about them.
//!
//! ```text
//! instance's namespace        network's namespace (one per network and host)      host's namespace
//! nic0 10.0.0.5/32 ══ veth ══ nxn…   lo: gateways of all subnets
//!   default via gateway       vx ─── VXLAN, forwarding by this plan alone ─────── underlay, UDP 4789
//!                             up ════ veth ══════════════════════════════════════ nxu…  NAT, floating addresses
//!                             np… ═══ veth to a peered network's namespace
//! ```
//!
//! Each host that holds anything of a network is told the whole network, so that forwarding, filtering and names need nobody
//! else, and a packet's whole way can be traced from either end. Hosts share one copy of it in the server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kind::BalancerCheck;
use crate::{Cidr, Name, Timestamp, Uid};

/// Everything of tenants' networks that one host is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostNetworks {
    /// Version of this message's meaning.
    pub version: u32,
    pub host: Name,
    pub revision: u64,
    /// This host's address on the underlay, where its tunnels end.
    pub endpoint: IpAddr,
    /// The endpoints of all other hosts, sorted: tunnel packets from elsewhere are dropped.
    pub tunnels: Vec<IpAddr>,
    /// The networks that this host has a NIC of, and those that are peered with them, sorted by uid.
    pub networks: Vec<Arc<NetworkPlan>>,
}

/// One tenant's network, whole: on every host the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkPlan {
    pub uid: Uid,
    pub project: Name,
    pub name: Name,
    /// VXLAN network identifier (RFC 7348), 24 bits, never nought.
    pub vni: u32,
    /// Of the NICs, in bytes: the underlay's less the tunnel's headers.
    pub mtu: u16,
    /// What belongs to the network: a packet to an address in here that no NIC and no load balancer has goes nowhere.
    pub cidrs: Vec<Cidr>,
    pub subnets: Vec<SubnetPlan>,
    /// Of all hosts, sorted by uid.
    pub nics: Vec<NicPlan>,
    pub groups: Vec<GroupPlan>,
    pub route_tables: Vec<RouteTablePlan>,
    #[serde(default)]
    pub peerings: Vec<PeeringPlan>,
    #[serde(default)]
    pub nats: Vec<NatPlan>,
    #[serde(default)]
    pub floating: Vec<FloatingPlan>,
    #[serde(default)]
    pub balancers: Vec<BalancerPlan>,
    #[serde(default)]
    pub zones: Vec<ZonePlan>,
    /// What is noted of its packets, for its tenant.
    #[serde(default)]
    pub flow_logs: FlowLogs,
}

/// Which flows of a network its hosts note.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FlowLogs {
    #[default]
    None,
    /// What was dropped, and why.
    Dropped,
    /// That, and every new connection.
    All,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SubnetPlan {
    pub uid: Uid,
    pub name: Name,
    #[serde(default)]
    pub cidr4: Option<Cidr>,
    #[serde(default)]
    pub cidr6: Option<Cidr>,
    /// The first usable address: every host answers for it.
    #[serde(default)]
    pub gateway4: Option<Ipv4Addr>,
    #[serde(default)]
    pub gateway6: Option<Ipv6Addr>,
    /// An index into [`NetworkPlan::route_tables`].
    pub route_table: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NicPlan {
    pub uid: Uid,
    pub name: Name,
    /// An index into [`NetworkPlan::subnets`].
    pub subnet: u32,
    pub mac: Mac,
    #[serde(default)]
    pub address4: Option<Ipv4Addr>,
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
    /// Where it is, with that host's endpoint; nowhere while its instance has no host.
    #[serde(default)]
    pub at: Option<NicPlace>,
    /// Indices into [`NetworkPlan::groups`], sorted.
    pub groups: Vec<u32>,
    /// In each direction, in bits a second; no limit, without it.
    #[serde(default)]
    pub rate: Option<u64>,
    /// May send from and be sent to addresses that are not its own: routers, firewalls, VPN gateways.
    #[serde(default)]
    pub forwards: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NicPlace {
    pub host: Name,
    pub endpoint: IpAddr,
    pub instance: Uid,
    /// Which of its instance's NICs it is: `nic0`, `nic1` … The default route leads to the first.
    pub index: u8,
}

/// A hardware address, such as `02:9c:5f:00:1a:2b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// A security group. A NIC's rules are those of all its groups together, by priority (the lowest number first, then refusals
/// before permissions): the first that matches decides, and what none matches is dropped. Answers to what was let through pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupPlan {
    pub uid: Uid,
    pub name: Name,
    pub rules: Vec<RulePlan>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RulePlan {
    /// Stable, unique within its group.
    pub id: Name,
    pub direction: Direction,
    pub priority: u16,
    pub allow: bool,
    pub protocol: RuleProtocol,
    /// Destination ports, the last included; all of them, without any. Of TCP and UDP only.
    #[serde(default)]
    pub ports: Vec<(u16, u16)>,
    /// The other side; anybody, without any.
    #[serde(default)]
    pub remotes: Vec<Remote>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Ingress,
    Egress,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RuleProtocol {
    Any,
    Tcp,
    Udp,
    /// ICMP of the packet's own family.
    Icmp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Remote {
    Cidr(Cidr),
    /// The NICs of a group of this network: an index into [`NetworkPlan::groups`].
    Group(u32),
}

/// Routes beside those to the network's own addresses, which go before all others. The longest prefix wins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteTablePlan {
    pub name: Name,
    pub routes: Vec<RoutePlan>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoutePlan {
    pub to: Cidr,
    pub via: Via,
}

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Via {
    /// A NIC of this network that forwards.
    Nic(Uid),
    /// An index into [`NetworkPlan::peerings`].
    Peering(u32),
    /// An index into [`NetworkPlan::nats`].
    Nat(u32),
    /// Outside, for NICs that have a floating address.
    Internet,
    Blackhole,
}

/// A way to another network, made when both sides have agreed. Routes lead to it; rules go on to count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeeringPlan {
    /// The same on both sides.
    pub uid: Uid,
    pub name: Name,
    /// The other network, which is in [`HostNetworks::networks`] too.
    pub network: Uid,
    /// What of the other network may be reached from here, and may reach here.
    pub cidrs: Vec<Cidr>,
}

/// Outgoing connections bear an address that the outside knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NatPlan {
    pub uid: Uid,
    pub name: Name,
    /// Each host's own share, so that answers come straight to it; a host that is not named lends its own address.
    #[serde(default)]
    pub addresses: Vec<(Name, IpAddr)>,
}

/// An address of the outside that leads to one NIC: the host of that NIC answers for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FloatingPlan {
    pub uid: Uid,
    pub name: Name,
    pub address: IpAddr,
    /// A NIC with an address of the same family.
    pub nic: Uid,
}

/// A balancer of connections: each host does it for those that begin on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BalancerPlan {
    pub uid: Uid,
    pub name: Name,
    /// Of a subnet of the network; no NIC has it.
    pub address: IpAddr,
    pub listeners: Vec<ListenerPlan>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerPlan {
    pub port: u16,
    pub protocol: BalancedProtocol,
    /// A client keeps its target, as long as the targets stay the same.
    pub source_hash: bool,
    /// Those of instances that are ready; of its address family.
    pub targets: Vec<TargetPlan>,
    /// How each host finds out which of them answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<BalancerCheck>,
    /// Targets are told who the client is before its first byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// How a stream's first bytes say who its client is: HAProxy's PROXY protocol, as a line or as binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    V1,
    V2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BalancedProtocol {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetPlan {
    pub address: IpAddr,
    pub port: u16,
    /// 1 to 256: its share of new connections.
    pub weight: u16,
    /// Does not answer the host that says so to itself; servers never say it. New connections go to others, if there are any.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failing: bool,
}

/// So many targets a host reports that fail.
pub const MAX_FAILING: usize = 256;
/// Bytes of why one does.
pub const MAX_FAILING_WHY: usize = 200;

/// A target that does not answer a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailingTarget {
    pub balancer: Uid,
    /// The listener's.
    pub port: u16,
    pub protocol: BalancedProtocol,
    pub target: SocketAddr,
    /// In a clause.
    pub why: String,
}

/// Names that only the network sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ZonePlan {
    /// Lower case, without a final dot.
    pub domain: String,
    pub records: Vec<RecordPlan>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordPlan {
    /// Beneath the zone's domain; empty for the domain itself.
    pub name: String,
    pub ttl: u32,
    pub data: RecordData,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordData {
    A(Vec<Ipv4Addr>),
    Aaaa(Vec<Ipv6Addr>),
    Cname(String),
    Txt(Vec<String>),
}

/// Asks the host of a NIC what becomes of a packet that the NIC sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceRequest {
    pub nic: Uid,
    pub packet: TracedPacket,
    /// Sends such a packet too, and tells whether it came through.
    pub probe: bool,
}

/// A new connection's first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TracedPacket {
    pub to: IpAddr,
    /// Never [`RuleProtocol::Any`].
    pub protocol: RuleProtocol,
    /// Of TCP and UDP.
    #[serde(default)]
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// On its way, in order.
    pub hops: Vec<TraceHop>,
    /// Where it ends.
    pub verdict: TraceVerdict,
    /// Of a probe: whether it came through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probed: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceHop {
    /// The host on which it happens.
    pub host: Name,
    /// What looks at the packet: `anti-spoofing`, `egress rules`, `route`, `load balancer`, `tunnel`, `peering`, `nat`,
    /// `ingress rules` …
    pub at: String,
    /// What it does, in a sentence, with the rule that decides: `allowed by web/ssh`.
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TraceVerdict {
    /// To a NIC of this or a peered network.
    Delivered,
    /// To the outside: what becomes of it there is not known.
    Outside,
    /// To the subnet's gateway, which answers pings.
    Gateway,
    Dropped,
}

/// Asks the host of a NIC for the packets that pass it. The answer is frames of channel 1: a capture file as libpcap writes it,
/// with Ethernet frames. It goes on until the caller leaves or a bound is met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CaptureRequest {
    pub nic: Uid,
    /// Only packets from or to this address.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// Only TCP and UDP from or to this port.
    #[serde(default)]
    pub port: Option<u16>,
}

/// Asks a host for the flows that it has noted of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowsRequest {
    pub network: Uid,
    /// Only those of this moment or later, by the host's clock.
    pub since: Timestamp,
    /// Only those behind this one. The host goes by `since` where it does not know of so many.
    #[serde(default)]
    pub after: Option<u64>,
    /// Only those in which the NIC of this name takes part.
    #[serde(default)]
    pub nic: Option<Name>,
    /// The newest so many; without more than one answer may have.
    pub limit: u32,
}

/// The most flows of one answer.
pub const MAX_FLOWS: u32 = 10_000;

/// What a host has noted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostFlows {
    /// The oldest first.
    pub flows: Vec<FlowRecord>,
    /// The number of the newest that it has.
    pub last: u64,
    /// How many had no place since its agent began.
    #[serde(default)]
    pub lost: u64,
}

/// One packet that began a connection, or that was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowRecord {
    pub time: Timestamp,
    /// Why it was dropped; without it, it was let through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<String>,
    /// `tcp`, `udp`, `icmp`, or a number.
    pub protocol: String,
    pub source: IpAddr,
    /// The NIC that has this address. Of a spoofed packet, whom it was to be from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_nic: Option<Name>,
    /// Nought, where the protocol has none.
    #[serde(default)]
    pub source_port: u16,
    pub destination: IpAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_nic: Option<Name>,
    #[serde(default)]
    pub port: u16,
    /// Of the packet.
    #[serde(default)]
    pub bytes: u16,
}

/// What a host found when it compared what it should have of tenants' networks with what its kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkCheck {
    /// The revision that it was compared with; none, while nothing was told to the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    pub networks: u64,
    /// Those of instances of this host.
    pub nics: u64,
    /// Each in a sentence.
    pub differences: Vec<String>,
    /// Targets of load balancers that don't answer this host, each in a sentence. That is no difference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failing: Vec<String>,
}

/// The most differences that one answer names.
pub const MAX_DIFFERENCES: usize = 1000;

/// Why a text is no [`Mac`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a hardware address such as 02:9c:5f:00:1a:2b")]
pub struct MacError;

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::str::FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut out = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut out {
            let part = parts.next().filter(|p| p.len() == 2).ok_or(MacError)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError)?;
        }
        if parts.next().is_none() { Ok(Self(out)) } else { Err(MacError) }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_read_as_they_are_written() {
        let mac = Mac([2, 0x9c, 0x5f, 0, 0x1a, 0x2b]);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for bad in ["", "02", "02:9c:5f:00:1a", "02:9c:5f:00:1a:2b:3c", "2:9c:5f:0:1a:2b", "02-9c-5f-00-1a-2b"] {
            assert_eq!(bad.parse::<Mac>(), Err(MacError), "{bad}");
        }
    }
}
