//! Addresses that the outside knows: pools of them, which operators give, and single ones that lead to a NIC.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use super::address_schema;
use super::base::is_unicast;
use super::prefixes::refuse_untrimmed;
use crate::{Cidr, Condition, FieldError, Name};

/// Pools of a region, networks of one pool, and addresses of a project.
pub const MAX_POOLS: usize = 50;
const MAX_POOL_CIDRS: usize = 16;
pub const MAX_FLOATING: usize = 500;

#[derive(Debug, Clone)]
pub struct AddressPool;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolSpec {
    /// Every address of these is given out. The network outside brings packets for them to any host of the region, or to that which
    /// answers for them on its link.
    #[schemars(length(min = 1, max = MAX_POOL_CIDRS))]
    pub cidrs: Vec<Cidr>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AddressPoolStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for AddressPool {
    const KIND: &'static str = "AddressPool";
    const PLURAL: &'static str = "address-pools";
    const SHORT: &'static [&'static str] = &["pool", "address-pool"];
    const ABOUT: &'static str = "Addresses of the outside that an operator gives for floating addresses.";
    const SCOPE: Scope = Scope::Region;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[Column::new("CIDR", "/spec/cidrs/0"), Column::count("CIDRS", "/spec/cidrs")];
    type Spec = AddressPoolSpec;
    type Status = AddressPoolStatus;

    fn validate(spec: &AddressPoolSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if !(1..=MAX_POOL_CIDRS).contains(&spec.cidrs.len()) {
            errors.push(FieldError::new("spec.cidrs", format!("between 1 and {MAX_POOL_CIDRS}")));
        }
        for (i, cidr) in spec.cidrs.iter().enumerate().take(MAX_POOL_CIDRS) {
            let at = format!("spec.cidrs[{i}]");
            errors.extend(refuse_untrimmed(cidr).map(|why| FieldError::new(&at, why)));
            if cidr.length < 8 || !is_unicast(cidr.first()) || !is_unicast(cidr.last()) {
                errors.push(FieldError::new(&at, "a network of /8 or longer, of addresses of single machines"));
            }
            if let Some(other) = spec.cidrs[..i].iter().find(|other| other.overlaps(cidr)) {
                errors.push(FieldError::new(&at, format!("overlaps {other}")));
            }
        }
        errors
    }

    fn example() -> AddressPoolSpec {
        AddressPoolSpec { cidrs: vec!["203.0.113.0/24".parse().expect("a well-formed network")] }
    }
}

#[derive(Debug, Clone)]
pub struct FloatingIp;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FloatingIpSpec {
    /// An address pool of the region.
    pub pool: Name,
    /// A free address of the pool; the cloud chooses one, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "address_schema")]
    pub address: Option<IpAddr>,
    /// The NIC that it leads to, of a network with an internet gateway. Without it the address is kept and leads nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<Name>,
}

impl Default for FloatingIpSpec {
    fn default() -> Self {
        Self { pool: "none".parse().expect("a well-formed name"), address: None, nic: None }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FloatingIpPhase {
    /// It leads nowhere.
    #[default]
    Available,
    Attached,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FloatingIpStatus {
    pub phase: FloatingIpPhase,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address: Option<IpAddr>,
    pub conditions: Vec<Condition>,
}

impl Kind for FloatingIp {
    const KIND: &'static str = "FloatingIp";
    const PLURAL: &'static str = "floating-ips";
    const SHORT: &'static [&'static str] = &["fip", "floating-ip"];
    const ABOUT: &'static str = "An address of the outside that leads to one NIC, and by which that NIC goes out.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("ADDRESS", "/status/address"),
        Column::new("POOL", "/spec/pool"),
        Column::new("NIC", "/spec/nic"),
        Column::new("PHASE", "/status/phase"),
    ];
    type Spec = FloatingIpSpec;
    type Status = FloatingIpStatus;

    const IMMUTABLE: &'static [&'static str] = &["pool", "address"];

    fn validate(_: &FloatingIpSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> FloatingIpSpec {
        FloatingIpSpec { pool: "public".parse().expect("a well-formed name"), ..FloatingIpSpec::default() }
    }
}
