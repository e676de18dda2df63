//! A part of a network from which NICs get addresses.

use std::net::{Ipv4Addr, Ipv6Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use super::base::refuse_cidr;
use crate::{Cidr, Condition, FieldError, Name};

/// Subnets of one network.
pub const MAX_SUBNETS: usize = 200;

#[derive(Debug, Clone)]
pub struct Subnet;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SubnetSpec {
    pub network: Name,
    /// Of the network's, /8 to /28. The first address is the gateway's; the network's own and the last are nobody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidr4: Option<Cidr>,
    /// Of the network's, /40 to /64. The first address is the gateway's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidr6: Option<Cidr>,
    /// Only instances of this zone; of all zones, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    /// Where packets go that are for nobody of the network; nowhere, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route_table: Option<Name>,
}

impl Default for SubnetSpec {
    fn default() -> Self {
        let network = "none".parse().expect("a well-formed name");
        Self { network, cidr4: None, cidr6: None, zone: None, route_table: None }
    }
}

impl SubnetSpec {
    pub fn cidrs(&self) -> impl Iterator<Item = Cidr> {
        self.cidr4.into_iter().chain(self.cidr6)
    }

    pub fn gateway4(&self) -> Option<Ipv4Addr> {
        match self.cidr4?.first() {
            std::net::IpAddr::V4(a) => Some((a.to_bits() + 1).into()),
            std::net::IpAddr::V6(_) => None,
        }
    }

    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        match self.cidr6?.first() {
            std::net::IpAddr::V6(a) => Some((a.to_bits() + 1).into()),
            std::net::IpAddr::V4(_) => None,
        }
    }

    /// The first and last IPv4 addresses that NICs may have.
    pub fn range4(&self) -> Option<(Ipv4Addr, Ipv4Addr)> {
        match (self.cidr4?.first(), self.cidr4?.last()) {
            (std::net::IpAddr::V4(a), std::net::IpAddr::V4(z)) => {
                Some(((a.to_bits() + 2).into(), (z.to_bits() - 1).into()))
            }
            _ => None,
        }
    }

    /// The first and last IPv6 addresses that NICs may have. What is written with few digits is given out first.
    pub fn range6(&self) -> Option<(Ipv6Addr, Ipv6Addr)> {
        match (self.cidr6?.first(), self.cidr6?.last()) {
            (std::net::IpAddr::V6(a), std::net::IpAddr::V6(z)) => Some(((a.to_bits() + 2).into(), z)),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SubnetStatus {
    /// Every host answers for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub gateway4: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub gateway6: Option<Ipv6Addr>,
    pub conditions: Vec<Condition>,
}

impl Kind for Subnet {
    const KIND: &'static str = "Subnet";
    const PLURAL: &'static str = "subnets";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A part of a network from which NICs get their addresses.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("NETWORK", "/spec/network"),
        Column::new("CIDR4", "/spec/cidr4"),
        Column::new("CIDR6", "/spec/cidr6"),
        Column::new("ZONE", "/spec/zone"),
        Column::new("ROUTES", "/spec/routeTable"),
        Column::new("GATEWAY4", "/status/gateway4").wide(),
    ];
    type Spec = SubnetSpec;
    type Status = SubnetStatus;

    const IMMUTABLE: &'static [&'static str] = &["network", "cidr4", "cidr6", "zone"];

    fn validate(spec: &SubnetSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.cidr4.is_none() && spec.cidr6.is_none() {
            errors.push(FieldError::new("spec.cidr4", "a subnet has cidr4, cidr6 or both"));
        }
        for (field, cidr, four) in [("spec.cidr4", &spec.cidr4, true), ("spec.cidr6", &spec.cidr6, false)] {
            let Some(cidr) = cidr else { continue };
            if cidr.is_ipv4() != four {
                errors.push(FieldError::new(field, if four { "an IPv4 network" } else { "an IPv6 network" }));
            } else if let Some(why) = refuse_cidr(cidr) {
                errors.push(FieldError::new(field, why));
            }
        }
        errors
    }

    fn example() -> SubnetSpec {
        SubnetSpec {
            network: "shop".parse().expect("a well-formed name"),
            cidr4: Some("10.0.1.0/24".parse().expect("a well-formed network")),
            cidr6: Some("fd12:3456:789a:1::/64".parse().expect("a well-formed network")),
            zone: None,
            route_table: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_is_the_gateways_and_the_ends_are_nobodys() {
        let spec = Subnet::example();
        assert_eq!(spec.gateway4().unwrap().to_string(), "10.0.1.1");
        assert_eq!(spec.gateway6().unwrap().to_string(), "fd12:3456:789a:1::1");
        let (first, last) = spec.range4().unwrap();
        assert_eq!((first.to_string().as_str(), last.to_string().as_str()), ("10.0.1.2", "10.0.1.254"));
        assert_eq!(spec.range6().unwrap().0.to_string(), "fd12:3456:789a:1::2");
    }

    #[test]
    fn a_subnet_has_a_network_of_each_family_at_most() {
        let subnet = |four: Option<&str>, six: Option<&str>| {
            let cidr = |text: Option<&str>| text.map(|t| t.parse().unwrap());
            Subnet::validate(&SubnetSpec { cidr4: cidr(four), cidr6: cidr(six), ..Subnet::example() }).len()
        };
        assert_eq!(subnet(Some("10.0.0.0/28"), Some("fd00::/64")), 0);
        assert_eq!(subnet(None, Some("fd00::/64")), 0);
        for (four, six) in
            [(None, None), (Some("fd00::/64"), None), (None, Some("10.0.0.0/24")), (Some("10.0.0.0/29"), None)]
        {
            assert_eq!(subnet(four, six), 1, "{four:?} {six:?}");
        }
    }
}
