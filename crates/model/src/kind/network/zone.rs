//! Names that only one network sees.

use std::net::{Ipv4Addr, Ipv6Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{Column, Home, Kind, Scope, Verbs};
use super::{address4_items, address6_items};
use crate::{Condition, FieldError, Name};

/// Zones of one network, and records of one zone.
pub const MAX_ZONES: usize = 20;
const MAX_RECORDS: usize = 500;
const MAX_VALUES: usize = 16;
/// A domain of at least one label, in lower case, without a final dot.
const DOMAIN_PATTERN: &str = r"^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?){0,20}$";
/// The same, or nothing.
const LABELS_PATTERN: &str = r"^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?){0,20})?$";
/// Of one text, in bytes (RFC 1035, section 3.3).
const TEXT_PATTERN: &str = r"^[ -~]{0,255}$";

fn is_domain(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let inner = bytes.iter().all(|b| letter(*b) || matches!(b, b'-' | b'_'));
        let begins = bytes.first().is_some_and(|b| letter(*b) || *b == b'_');
        let ends = bytes.last().is_some_and(|b| letter(*b) || (bytes.len() == 1 && *b == b'_'));
        bytes.len() <= 63 && inner && begins && ends
    };
    text.len() <= 200 && text.split('.').count() <= 21 && text.split('.').all(label)
}

#[derive(Debug, Clone)]
pub struct DnsZone;

/// What a name stands for: values of one type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ZoneData {
    A(#[schemars(schema_with = "address4_items")] Vec<Ipv4Addr>),
    Aaaa(#[schemars(schema_with = "address6_items")] Vec<Ipv6Addr>),
    /// A whole name, without a final dot.
    Cname(#[schemars(length(max = 200), regex(pattern = DOMAIN_PATTERN))] String),
    Txt(#[schemars(length(min = 1, max = MAX_VALUES), inner(regex(pattern = TEXT_PATTERN)))] Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ZoneRecord {
    /// Beneath the zone's domain, such as `db`; empty for the domain itself.
    #[serde(default)]
    #[schemars(length(max = 200), regex(pattern = LABELS_PATTERN))]
    pub name: String,
    /// Seconds for which an answer may be kept.
    #[serde(default = "minute")]
    #[schemars(range(max = 86_400))]
    pub ttl: u32,
    pub data: ZoneData,
}

fn minute() -> u32 {
    60
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DnsZoneSpec {
    pub network: Name,
    /// In lower case, without a final dot.
    #[schemars(length(max = 200), regex(pattern = DOMAIN_PATTERN))]
    pub domain: String,
    /// Has `APP.DOMAIN` stand for the app's ready instances, and `INSTANCE.DOMAIN` for each instance, by their NICs in the network.
    #[serde(default = "yes")]
    pub apps: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_RECORDS))]
    pub records: Vec<ZoneRecord>,
}

fn yes() -> bool {
    true
}

impl Default for DnsZoneSpec {
    fn default() -> Self {
        Self {
            network: "none".parse().expect("a well-formed name"),
            domain: String::new(),
            apps: true,
            records: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DnsZoneStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for DnsZone {
    const KIND: &'static str = "DnsZone";
    const PLURAL: &'static str = "dns-zones";
    const SHORT: &'static [&'static str] = &["dns-zone"];
    const ABOUT: &'static str = "Names that only the instances of one network see.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("NETWORK", "/spec/network"),
        Column::new("DOMAIN", "/spec/domain"),
        Column::count("RECORDS", "/spec/records"),
    ];
    type Spec = DnsZoneSpec;
    type Status = DnsZoneStatus;

    const IMMUTABLE: &'static [&'static str] = &["network", "domain"];

    fn validate(spec: &DnsZoneSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let mut check = |ok: bool, field: String, message: &str| {
            if !ok {
                errors.push(FieldError::new(field, message));
            }
        };
        check(is_domain(&spec.domain), "spec.domain".into(), "a domain in lower case, without a final dot");
        check(spec.records.len() <= MAX_RECORDS, "spec.records".into(), "at most 500");
        for (i, record) in spec.records.iter().enumerate().take(MAX_RECORDS) {
            let at = |field: &str| format!("spec.records[{i}].{field}");
            check(record.name.is_empty() || is_domain(&record.name), at("name"), "labels in lower case, or nothing");
            check(record.ttl <= 86_400, at("ttl"), "at most 86400");
            let kind = |data: &ZoneData| std::mem::discriminant(data);
            let mut others = spec.records[..i].iter().filter(|other| other.name == record.name);
            let clash = others.any(|other| {
                let alias = |r: &ZoneRecord| matches!(r.data, ZoneData::Cname(_));
                kind(&other.data) == kind(&record.data) || alias(other) || alias(record)
            });
            check(!clash, at("name"), "has such a record already, or is another name for something");
            let (count, good) = match &record.data {
                ZoneData::A(all) => (all.len(), true),
                ZoneData::Aaaa(all) => (all.len(), true),
                ZoneData::Cname(name) => (1, is_domain(name)),
                ZoneData::Txt(all) => {
                    (all.len(), all.iter().all(|t| t.len() <= 255 && t.bytes().all(|b| (b' '..=b'~').contains(&b))))
                }
            };
            check((1..=MAX_VALUES).contains(&count), at("data"), "between 1 and 16 values");
            check(
                good,
                at("data"),
                "a name in lower case without a final dot, or texts of at most 255 ASCII characters",
            );
        }
        errors
    }

    fn example() -> DnsZoneSpec {
        let record = ZoneRecord { name: "db".into(), ttl: minute(), data: ZoneData::A(vec![[10, 0, 1, 9].into()]) };
        DnsZoneSpec {
            network: "shop".parse().expect("a well-formed name"),
            domain: "shop.example".into(),
            apps: true,
            records: vec![record],
        }
    }
}
