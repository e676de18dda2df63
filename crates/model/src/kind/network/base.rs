//! A tenant's network, and which addresses a network may have.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Egress, Home, Kind, Scope, Verbs};
use crate::plan::FlowLogs;
use crate::{Cidr, Condition, FieldError, Name};

/// Networks of a project in one region.
pub const MAX_NETWORKS: usize = 50;
/// CIDRs of one network.
const MAX_CIDRS: usize = 16;

/// The name of a project's default network, and of the subnet in it.
pub const DEFAULT_NETWORK: &str = "default";
/// What a default network that the cloud makes has of IPv4, beside an IPv6 network of its own. All of them have the same.
pub const DEFAULT_CIDR4: &str = "172.31.0.0/16";
/// The subnet has so much of each family, and leaves the rest to others.
pub const DEFAULT_LENGTHS: [u8; 2] = [18, 64];

/// What no network may have, and why.
const RESERVED: &[(&str, &str)] = &[
    ("0.0.0.0/8", "is `this network`"),
    ("127.0.0.0/8", "is the loopback's"),
    ("169.254.0.0/16", "is link-local"),
    ("224.0.0.0/3", "is multicast or reserved"),
    ("::/8", "is reserved"),
    ("fd6e:7875::/32", "is the cloud's own"),
    ("fe80::/10", "is link-local"),
    ("ff00::/8", "is multicast"),
];

/// Why a CIDR can't be part of a network, if it can't.
pub(super) fn refuse_cidr(cidr: &Cidr) -> Option<String> {
    if !cidr.is_trimmed() {
        return Some(format!("has bits behind its prefix: write {}/{}", cidr.first(), cidr.length));
    }
    let (shortest, longest) = if cidr.is_ipv4() { (8, 28) } else { (40, 64) };
    if !(shortest..=longest).contains(&cidr.length) {
        return Some(format!("a prefix of /{shortest} to /{longest}"));
    }
    let reserved = RESERVED.iter().map(|(net, why)| (net.parse::<Cidr>().expect("a well-formed network"), why));
    let mut hit = reserved.filter(|(net, _)| net.overlaps(cidr));
    hit.next().map(|(net, why)| format!("overlaps {net}, which {why}"))
}

/// Whether an address may be one of the outside, as routes and rules name it.
pub fn is_unicast(address: IpAddr) -> bool {
    !(address.is_multicast() || address.is_loopback() || address.is_unspecified())
}

#[derive(Debug, Clone)]
pub struct Network;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NetworkSpec {
    /// What belongs to the network: IPv4 of /8 to /28, IPv6 of /40 to /64. Other tenants may have the same.
    #[schemars(length(min = 1, max = MAX_CIDRS))]
    pub cidrs: Vec<Cidr>,
    /// What hosts note of its packets, for `nexus net flows`: nothing, what was dropped, or new connections too.
    #[serde(default)]
    pub flow_logs: FlowLogs,
    /// What subnets without a route table reach outside.
    #[serde(default, skip_serializing_if = "NetworkEgress::is_none")]
    pub egress: NetworkEgress,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkEgress {
    /// Nothing.
    #[default]
    None,
    /// What the project's own `egress` allows, by the address of the host that each NIC is on.
    Project,
}

impl NetworkEgress {
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NetworkPhase {
    #[default]
    Pending,
    Ready,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkStatus {
    pub phase: NetworkPhase,
    /// Its number on the wire between hosts (VXLAN), which no other network of the region has.
    pub vni: u32,
    /// With `spec.egress: project`, what that allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    pub conditions: Vec<Condition>,
}

impl Kind for Network {
    const KIND: &'static str = "Network";
    const PLURAL: &'static str = "networks";
    const SHORT: &'static [&'static str] = &["vpc"];
    const ABOUT: &'static str = "A network of a project's own: addresses that it chooses, seen by nobody else.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("CIDR", "/spec/cidrs/0"),
        Column::count("CIDRS", "/spec/cidrs").wide(),
        Column::new("PHASE", "/status/phase"),
        Column::new("EGRESS", "/spec/egress").wide(),
        Column::new("VNI", "/status/vni").wide(),
        Column::new("FLOW-LOGS", "/spec/flowLogs").wide(),
    ];
    type Spec = NetworkSpec;
    type Status = NetworkStatus;

    fn validate(spec: &NetworkSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if !(1..=MAX_CIDRS).contains(&spec.cidrs.len()) {
            errors.push(FieldError::new("spec.cidrs", format!("between 1 and {MAX_CIDRS}")));
        }
        for (i, cidr) in spec.cidrs.iter().enumerate().take(MAX_CIDRS) {
            let at = || format!("spec.cidrs[{i}]");
            if let Some(why) = refuse_cidr(cidr) {
                errors.push(FieldError::new(at(), why));
            }
            if let Some(other) = spec.cidrs[..i].iter().find(|other| other.overlaps(cidr)) {
                errors.push(FieldError::new(at(), format!("overlaps {other}")));
            }
        }
        errors
    }

    fn example() -> NetworkSpec {
        let cidr = |text: &str| text.parse().expect("a well-formed network");
        let cidrs = vec![cidr("10.0.0.0/16"), cidr("fd12:3456:789a::/48")];
        NetworkSpec { cidrs, flow_logs: FlowLogs::Dropped, ..NetworkSpec::default() }
    }
}

/// The name of something of the same project that is in a network, for statuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NetworkRef {
    pub name: Name,
    pub uid: crate::Uid,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(cidrs: &[&str]) -> Vec<String> {
        let cidrs = cidrs.iter().map(|c| c.parse().unwrap()).collect();
        let spec = NetworkSpec { cidrs, ..NetworkSpec::default() };
        Network::validate(&spec).into_iter().map(|e| format!("{} {}", e.field, e.message)).collect()
    }

    #[test]
    fn a_network_has_addresses_that_can_be_routed_and_do_not_overlap() {
        for good in [
            &["10.0.0.0/8"][..],
            &["10.0.0.0/28", "10.0.0.16/28"],
            &["fd00::/40", "192.168.0.0/16"],
            &["2001:db8::/64"],
        ] {
            assert_eq!(errors(good), Vec::<String>::new(), "{good:?}");
        }
        for (bad, why) in [
            (&[][..], "between 1 and 16"),
            (&["10.0.0.0/7"], "/8 to /28"),
            (&["10.0.0.0/29"], "/8 to /28"),
            (&["10.0.0.1/16"], "write 10.0.0.0/16"),
            (&["fd00::/39"], "/40 to /64"),
            (&["fd00::/65"], "/40 to /64"),
            (&["127.0.0.0/8"], "the loopback's"),
            (&["169.254.0.0/24"], "link-local"),
            (&["224.0.0.0/24"], "multicast"),
            (&["240.0.0.0/8"], "reserved"),
            (&["fe80::/64"], "link-local"),
            (&["ff02::/64"], "multicast"),
            (&["10.0.0.0/16", "10.0.1.0/24"], "spec.cidrs[1] overlaps 10.0.0.0/16"),
        ] {
            let errors = errors(bad);
            assert!(errors.len() == 1 && errors[0].contains(why), "{bad:?}: {errors:?}");
        }
    }
}
