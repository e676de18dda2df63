//! Who may talk to whom: rules for the NICs that name a group.
//!
//! A NIC's rules are those of all its groups together, the lowest priority first, refusals before permissions. The first that
//! matches decides; what none matches is dropped. Answers to what was let through pass.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::{Column, Home, Kind, Scope, Verbs};
use crate::plan::{Direction, RuleProtocol};
use crate::{Cidr, Condition, FieldError, Name};

/// Security groups of one network.
pub const MAX_GROUPS: usize = 500;
/// Rules of one group, and of one network: what its hosts are told has to stay small.
pub const MAX_RULES: usize = 1_000;
pub const MAX_NETWORK_RULES: usize = 5_000;
/// Port ranges, and others, that one rule names.
const MAX_PORTS: usize = 16;
const MAX_REMOTES: usize = 64;

/// Ports from one to another, the last included: `80` or `8000-8010`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

/// Why a text is no [`PortRange`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a port such as 80, or ports such as 8000-8010, between 1 and 65535, the lower first")]
pub struct PortRangeError;

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| {
            let plain = text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u16>().ok().filter(|port| plain && *port > 0).ok_or(PortRangeError)
        };
        let (first, last) = (port(first)?, port(last)?);
        if first <= last { Ok(Self { first, last }) } else { Err(PortRangeError) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.first == self.last {
            true => serializer.serialize_u16(self.first),
            false => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text<'a> {
            Number(u16),
            Text(Cow<'a, str>),
        }
        match Text::deserialize(deserializer).map_err(|_| D::Error::custom(PortRangeError))? {
            Text::Number(0) => Err(D::Error::custom(PortRangeError)),
            Text::Number(port) => Ok(Self { first: port, last: port }),
            Text::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// A port, or two. What no pattern says is that the lower comes first.
const PORTS_PATTERN: &str = concat!(
    "^([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])",
    "(-([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$",
);

impl JsonSchema for PortRange {
    fn schema_name() -> Cow<'static, str> {
        "PortRange".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A port, or ports from one to another such as 8000-8010, the lower first.",
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 65535},
                {"type": "string", "pattern": PORTS_PATTERN},
            ],
        })
    }
}

/// The other side of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum RuleRemote {
    Cidr(Cidr),
    /// The NICs of a security group of the same network.
    Group(Name),
    PrefixList(Name),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RuleAction {
    #[default]
    Allow,
    Deny,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecurityRule {
    /// Names it for good, within its group: by it one rule can change, and traces tell of it.
    pub id: Name,
    /// Of the NIC's.
    pub direction: Direction,
    /// The lowest counts first.
    #[serde(default = "usual_priority")]
    pub priority: u16,
    #[serde(default)]
    pub action: RuleAction,
    #[serde(default = "any_protocol")]
    pub protocol: RuleProtocol,
    /// Destination ports of TCP or UDP; all of them, without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_PORTS))]
    pub ports: Vec<PortRange>,
    /// The other side; anybody, without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_REMOTES))]
    pub remotes: Vec<RuleRemote>,
}

fn usual_priority() -> u16 {
    1_000
}

fn any_protocol() -> RuleProtocol {
    RuleProtocol::Any
}

#[derive(Debug, Clone)]
pub struct SecurityGroup;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecurityGroupSpec {
    pub network: Name,
    /// What none of a NIC's rules matches is dropped.
    #[serde(default)]
    #[schemars(length(max = MAX_RULES))]
    pub rules: Vec<SecurityRule>,
}

impl Default for SecurityGroupSpec {
    fn default() -> Self {
        Self { network: "none".parse().expect("a well-formed name"), rules: Vec::new() }
    }
}

impl SecurityGroupSpec {
    /// The groups that its rules name.
    pub fn named(&self) -> impl Iterator<Item = &Name> {
        self.rules.iter().flat_map(|rule| &rule.remotes).filter_map(|remote| match remote {
            RuleRemote::Group(name) => Some(name),
            RuleRemote::Cidr(_) | RuleRemote::PrefixList(_) => None,
        })
    }

    /// The prefix lists that its rules name.
    pub fn lists(&self) -> impl Iterator<Item = &Name> {
        self.rules.iter().flat_map(|rule| &rule.remotes).filter_map(|remote| match remote {
            RuleRemote::PrefixList(name) => Some(name),
            RuleRemote::Cidr(_) | RuleRemote::Group(_) => None,
        })
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecurityGroupStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for SecurityGroup {
    const KIND: &'static str = "SecurityGroup";
    const PLURAL: &'static str = "security-groups";
    const SHORT: &'static [&'static str] = &["sg", "security-group"];
    const ABOUT: &'static str = "Rules for the NICs that name it: who may talk to them, and to whom they may.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] =
        &[Column::new("NETWORK", "/spec/network"), Column::count("RULES", "/spec/rules")];
    type Spec = SecurityGroupSpec;
    type Status = SecurityGroupStatus;

    const IMMUTABLE: &'static [&'static str] = &["network"];

    fn validate(spec: &SecurityGroupSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.rules.len() > MAX_RULES {
            errors.push(FieldError::new("spec.rules", format!("at most {MAX_RULES}")));
        }
        let mut ids = std::collections::BTreeSet::new();
        for (i, rule) in spec.rules.iter().enumerate().take(MAX_RULES) {
            let mut check = |ok: bool, field: &str, message: &str| {
                if !ok {
                    errors.push(FieldError::new(format!("spec.rules[{i}].{field}"), message));
                }
            };
            check(ids.insert(&rule.id), "id", "listed twice");
            let with_ports = matches!(rule.protocol, RuleProtocol::Tcp | RuleProtocol::Udp);
            check(rule.ports.is_empty() || with_ports, "ports", "only TCP and UDP have ports: say which protocol");
            check(rule.ports.len() <= MAX_PORTS, "ports", "at most 16");
            check(rule.remotes.len() <= MAX_REMOTES, "remotes", "at most 64");
            for (j, remote) in rule.remotes.iter().enumerate() {
                if let RuleRemote::Cidr(cidr) = remote
                    && !cidr.is_trimmed()
                {
                    let message = format!("has bits behind its prefix: write {}/{}", cidr.first(), cidr.length);
                    check(false, &format!("remotes[{j}].cidr"), &message);
                }
            }
        }
        errors
    }

    fn example() -> SecurityGroupSpec {
        let name = |text: &str| text.parse::<Name>().expect("a well-formed name");
        let rule = |id: &str, direction, protocol| SecurityRule {
            id: name(id),
            direction,
            priority: usual_priority(),
            action: RuleAction::Allow,
            protocol,
            ports: Vec::new(),
            remotes: Vec::new(),
        };
        let web = SecurityRule {
            ports: vec![PortRange { first: 80, last: 80 }],
            ..rule("http", Direction::Ingress, RuleProtocol::Tcp)
        };
        SecurityGroupSpec { network: name("shop"), rules: vec![web, rule("out", Direction::Egress, RuleProtocol::Any)] }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kind::KindDescriptor;

    #[test]
    fn ports_are_one_or_from_one_to_another() {
        for (text, range) in [("80", (80, 80)), ("8000-8010", (8000, 8010)), ("1-65535", (1, 65535))] {
            let read: PortRange = text.parse().unwrap();
            assert_eq!((read.first, read.last), range);
            assert_eq!(read.to_string(), text);
        }
        for bad in ["", "0", "80-", "-80", "90-80", "65536", "+80", "a", "1-2-3"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rules_words_are_judged_where_they_stand() {
        let parse = KindDescriptor::of::<SecurityGroup>().parse_spec;
        let with = |rules: serde_json::Value| parse(&json!({"network": "shop", "rules": rules}));
        let rule = |more: serde_json::Value| {
            let mut rule = json!({"id": "a", "direction": "ingress"});
            rule.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            rule
        };
        let whole = with(json!([
            rule(json!({"protocol": "tcp", "ports": [22, "8000-8010"], "remotes": [{"cidr": "10.0.0.0/8"}]})),
            rule(json!({"id": "b", "action": "deny", "remotes": [{"group": "web"}]})),
        ]));
        assert_eq!(whole.unwrap()["rules"][0]["ports"], json!([22, "8000-8010"]));
        for (rules, field) in [
            (json!([rule(json!({})), rule(json!({}))]), "spec.rules[1].id"),
            (json!([rule(json!({"ports": [80]}))]), "spec.rules[0].ports"),
            (json!([rule(json!({"protocol": "tcp", "ports": ["90-80"]}))]), "spec.rules[0].ports[0]"),
            (json!([rule(json!({"remotes": [{"cidr": "10.0.0.1/8"}]}))]), "spec.rules[0].remotes[0].cidr"),
            (json!([rule(json!({"protocol": "sctp"}))]), "spec.rules[0].protocol"),
        ] {
            assert_eq!(with(rules).unwrap_err()[0].field, field);
        }
    }
}
