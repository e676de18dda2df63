//! A way from one network to another, which both sides have asked for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use super::prefixes::refuse_untrimmed;
use crate::{Cidr, Condition, FieldError, Name};

/// Peerings of one network.
pub const MAX_PEERINGS: usize = 20;
const MAX_CIDRS: usize = 16;

#[derive(Debug, Clone)]
pub struct Peering;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeeringSpec {
    pub network: Name,
    /// The other network's project; this one, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_project: Option<Name>,
    pub peer_network: Name,
    /// What of the other network may be reached, and may reach this one; all of it, without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_CIDRS))]
    pub cidrs: Vec<Cidr>,
}

impl Default for PeeringSpec {
    fn default() -> Self {
        let none: Name = "none".parse().expect("a well-formed name");
        Self { network: none.clone(), peer_project: None, peer_network: none, cidrs: Vec::new() }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeeringPhase {
    /// The other side has not asked for it, or the two don't agree.
    #[default]
    Pending,
    Ready,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PeeringStatus {
    pub phase: PeeringPhase,
    /// What it waits for, in a sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    pub conditions: Vec<Condition>,
}

impl Kind for Peering {
    const KIND: &'static str = "Peering";
    const PLURAL: &'static str = "peerings";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str =
        "A way from one network to another, of this or another project, that both have asked for.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("NETWORK", "/spec/network"),
        Column::new("PEER-PROJECT", "/spec/peerProject"),
        Column::new("PEER-NETWORK", "/spec/peerNetwork"),
        Column::new("PHASE", "/status/phase"),
        Column::new("WHY", "/status/message").wide(),
    ];
    type Spec = PeeringSpec;
    type Status = PeeringStatus;

    const IMMUTABLE: &'static [&'static str] = &["network", "peerProject", "peerNetwork"];

    fn validate(spec: &PeeringSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.cidrs.len() > MAX_CIDRS {
            errors.push(FieldError::new("spec.cidrs", format!("at most {MAX_CIDRS}")));
        }
        for (i, cidr) in spec.cidrs.iter().enumerate().take(MAX_CIDRS) {
            errors.extend(refuse_untrimmed(cidr).map(|why| FieldError::new(format!("spec.cidrs[{i}]"), why)));
        }
        errors
    }

    fn example() -> PeeringSpec {
        let name = |text: &str| text.parse::<Name>().expect("a well-formed name");
        PeeringSpec { network: name("shop"), peer_network: name("data"), ..PeeringSpec::default() }
    }
}
