//! Network interfaces: an address of a subnet, on one instance.
//!
//! The NICs of an app's or a job's instances are made with them, as their template says, and go with them. One that users
//! make is given to an instance by name, also while that runs, and taken from it again.

use std::net::{Ipv4Addr, Ipv6Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use super::{NetworkRef, address4_schema, address6_schema};
use crate::plan::Mac;
use crate::{Condition, FieldError, Name, Uid};

/// NICs of one network: each costs every host of the network two routes and two elements of a set.
pub const MAX_NICS: usize = 16_000;
/// NICs of one instance.
pub const MAX_INSTANCE_NICS: usize = 8;
/// Security groups of one NIC.
const MAX_NIC_GROUPS: usize = 8;
/// Bits a second.
const RATES: std::ops::RangeInclusive<u64> = 64_000..=1_000_000_000_000;

/// A NIC that each instance of an app or a job gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateNic {
    /// A subnet of the same project and region.
    pub subnet: Name,
    /// Groups of the subnet's network. Without any, NICs of the network that have none either may reach it, and it may reach
    /// everybody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_NIC_GROUPS))]
    pub security_groups: Vec<Name>,
    /// In each direction, in bits a second; no limit, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64_000, max = 1_000_000_000_000u64))]
    pub rate: Option<u64>,
    /// May send from and be sent to addresses that are not its own: routers, firewalls, VPN gateways.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forwards: bool,
}

/// Whether instances for which no NICs are named get one in their project's default network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TemplateNetwork {
    /// They do, whatever the project says.
    Default,
    /// They don't.
    None,
}

/// What is wrong with the groups and the rate of a NIC that stands at `field`.
fn validate_parts(field: &str, groups: &[Name], rate: Option<u64>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if groups.len() > MAX_NIC_GROUPS {
        errors.push(FieldError::new(format!("{field}.securityGroups"), format!("at most {MAX_NIC_GROUPS}")));
    }
    for (i, group) in groups.iter().enumerate() {
        if groups[..i].contains(group) {
            errors.push(FieldError::new(format!("{field}.securityGroups[{i}]"), "listed twice"));
        }
    }
    if rate.is_some_and(|rate| !RATES.contains(&rate)) {
        errors.push(FieldError::new(format!("{field}.rate"), "between 64000 and 1000000000000 bits a second"));
    }
    errors
}

/// What is wrong with the NICs of a template that stands at `spec`.
pub(in crate::kind) fn validate_nics(nics: &[TemplateNic]) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if nics.len() > MAX_INSTANCE_NICS {
        errors.push(FieldError::new("spec.nics", format!("at most {MAX_INSTANCE_NICS}")));
    }
    for (i, nic) in nics.iter().enumerate().take(MAX_INSTANCE_NICS) {
        errors.extend(validate_parts(&format!("spec.nics[{i}]"), &nic.security_groups, nic.rate));
    }
    errors
}

#[derive(Debug, Clone)]
pub struct Nic;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NicSpec {
    /// A subnet of the same project and region.
    pub subnet: Name,
    /// A free address of the subnet; the cloud chooses one, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "address4_schema")]
    pub address4: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "address6_schema")]
    pub address6: Option<Ipv6Addr>,
    /// Groups of the subnet's network. Without any, NICs of the network that have none either may reach it, and it may reach
    /// everybody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_NIC_GROUPS))]
    pub security_groups: Vec<Name>,
    /// In each direction, in bits a second; no limit, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64_000, max = 1_000_000_000_000u64))]
    pub rate: Option<u64>,
    /// May send from and be sent to addresses that are not its own: routers, firewalls, VPN gateways.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forwards: bool,
    /// The instance that has it, by name. It can be given to one that runs, and taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Name>,
}

impl Default for NicSpec {
    fn default() -> Self {
        Self {
            subnet: "none".parse().expect("a well-formed name"),
            address4: None,
            address6: None,
            security_groups: Vec::new(),
            rate: None,
            forwards: false,
            instance: None,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NicPhase {
    /// Its instance is not there, or has no host yet.
    #[default]
    Pending,
    /// Nobody has it.
    Available,
    /// Its instance's host has been told of it.
    Attached,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NicStatus {
    pub phase: NicPhase,
    /// Its own for good, and unlike all others of the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub mac: Option<Mac>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address4: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address6: Option<Ipv6Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRef>,
    /// The instance that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Uid>,
    /// Which of its instance's it is: `nic0`, `nic1` … The default route leads to the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Name>,
    /// Hosts that had it and have not confirmed yet that nothing of it is left there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub leaving: Vec<Name>,
    /// Why it is not attached, in a sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    pub conditions: Vec<Condition>,
}

impl Kind for Nic {
    const KIND: &'static str = "Nic";
    const PLURAL: &'static str = "nics";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A network interface: an address of a subnet, on one instance.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("SUBNET", "/spec/subnet"),
        Column::new("ADDRESS4", "/status/address4"),
        Column::new("ADDRESS6", "/status/address6"),
        Column::new("PHASE", "/status/phase"),
        Column::new("INSTANCE", "/spec/instance"),
        Column::new("HOST", "/status/host"),
        Column::new("MAC", "/status/mac").wide(),
        Column::new("WHY", "/status/message").wide(),
    ];
    type Spec = NicSpec;
    type Status = NicStatus;

    const IMMUTABLE: &'static [&'static str] = &["subnet", "address4", "address6"];

    fn validate(spec: &NicSpec) -> Vec<FieldError> {
        validate_parts("spec", &spec.security_groups, spec.rate)
    }

    fn example() -> NicSpec {
        NicSpec { subnet: "web".parse().expect("a well-formed name"), ..NicSpec::default() }
    }
}
