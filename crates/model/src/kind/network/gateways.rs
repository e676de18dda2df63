//! Ways out of a network.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use crate::{Condition, FieldError, Name};

/// NAT gateways of one network.
pub const MAX_NATS: usize = 8;

/// Lets routes lead outside, and addresses of the outside lead in.
#[derive(Debug, Clone)]
pub struct InternetGateway;

/// Lets NICs without an address of the outside begin connections to it.
#[derive(Debug, Clone)]
pub struct NatGateway;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GatewaySpec {
    pub network: Name,
}

impl Default for GatewaySpec {
    fn default() -> Self {
        Self { network: "none".parse().expect("a well-formed name") }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayStatus {
    pub conditions: Vec<Condition>,
}

fn example() -> GatewaySpec {
    GatewaySpec { network: "shop".parse().expect("a well-formed name") }
}

impl Kind for InternetGateway {
    const KIND: &'static str = "InternetGateway";
    const PLURAL: &'static str = "internet-gateways";
    const SHORT: &'static [&'static str] = &["igw", "internet-gateway"];
    const ABOUT: &'static str = "Opens a network to the outside, for routes via `internet` and floating addresses.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[Column::new("NETWORK", "/spec/network")];
    type Spec = GatewaySpec;
    type Status = GatewayStatus;

    const IMMUTABLE: &'static [&'static str] = &["network"];

    fn validate(_: &GatewaySpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> GatewaySpec {
        example()
    }
}

impl Kind for NatGateway {
    const KIND: &'static str = "NatGateway";
    const PLURAL: &'static str = "nat-gateways";
    const SHORT: &'static [&'static str] = &["nat", "nat-gateway"];
    const ABOUT: &'static str = "Lets a network's NICs begin connections to the outside: each host does it for its own NICs, with its own address.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[Column::new("NETWORK", "/spec/network")];
    type Spec = GatewaySpec;
    type Status = GatewayStatus;

    const IMMUTABLE: &'static [&'static str] = &["network"];

    fn validate(_: &GatewaySpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> GatewaySpec {
        example()
    }
}
