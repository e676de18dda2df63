//! Where packets of a subnet go that are for nobody of its network.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use super::prefixes::refuse_untrimmed;
use crate::{Cidr, Condition, FieldError, Name};

/// Route tables of one network, and routes of one table.
pub const MAX_ROUTE_TABLES: usize = 50;
const MAX_ROUTES: usize = 100;

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum RouteVia {
    /// A NIC of the network that forwards.
    Nic(Name),
    Peering(Name),
    /// A NAT gateway of the network.
    Nat(Name),
    /// Outside, for NICs with a floating address. The network has an internet gateway.
    Internet,
    /// Nowhere.
    Blackhole,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NetworkRoute {
    pub to: Cidr,
    pub via: RouteVia,
}

#[derive(Debug, Clone)]
pub struct RouteTable;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouteTableSpec {
    pub network: Name,
    /// The longest prefix counts. The network's own addresses go before all of them.
    #[serde(default)]
    #[schemars(length(max = MAX_ROUTES))]
    pub routes: Vec<NetworkRoute>,
}

impl Default for RouteTableSpec {
    fn default() -> Self {
        Self { network: "none".parse().expect("a well-formed name"), routes: Vec::new() }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteTableStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for RouteTable {
    const KIND: &'static str = "RouteTable";
    const PLURAL: &'static str = "route-tables";
    const SHORT: &'static [&'static str] = &["route-table"];
    const ABOUT: &'static str =
        "Where packets go that leave a network: to a peered one, through a NAT, outside, or to a NIC.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] =
        &[Column::new("NETWORK", "/spec/network"), Column::count("ROUTES", "/spec/routes")];
    type Spec = RouteTableSpec;
    type Status = RouteTableStatus;

    const IMMUTABLE: &'static [&'static str] = &["network"];

    fn validate(spec: &RouteTableSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.routes.len() > MAX_ROUTES {
            errors.push(FieldError::new("spec.routes", format!("at most {MAX_ROUTES}")));
        }
        for (i, route) in spec.routes.iter().enumerate().take(MAX_ROUTES) {
            let at = format!("spec.routes[{i}].to");
            errors.extend(refuse_untrimmed(&route.to).map(|why| FieldError::new(&at, why)));
            if spec.routes[..i].iter().any(|other| other.to == route.to) {
                errors.push(FieldError::new(&at, "listed twice"));
            }
        }
        errors
    }

    fn example() -> RouteTableSpec {
        let route = NetworkRoute { to: "0.0.0.0/0".parse().expect("a well-formed network"), via: RouteVia::Blackhole };
        RouteTableSpec { network: "shop".parse().expect("a well-formed name"), routes: vec![route] }
    }
}
