//! Where things are: regions of zones of cells of hosts.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, MAX_NUMA_NODES, MAX_TROUBLE, NumaNode, NumaRoom, Runtime, Scope, Verbs, numa};
use crate::{Bytes, Condition, Digest, FieldError, MilliCpu, Name, Timestamp};

#[derive(Debug, Clone)]
pub struct Region;

/// The name under which what belongs to no region has its paths; no region may have it.
pub const GLOBAL: &str = "global";

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    #[default]
    Core,
    Regional,
    Edge,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RegionSpec {
    /// As its servers are configured: only core regions vote in the global group.
    pub tier: Tier,
}

/// A server of a region's control plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegionServer {
    pub name: Name,
    /// Its number in the fleet, never given twice.
    pub node: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    /// Where other servers reach it.
    pub wire: String,
    /// Where users reach its API.
    pub api: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RegionStatus {
    pub servers: Vec<RegionServer>,
    /// Where its gateways take requests from other regions' gateways.
    #[schemars(with = "Vec<String>")]
    pub gateways: Vec<SocketAddr>,
    /// When it last reported, to within half a minute while it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heard: Option<Timestamp>,
    /// How old its copy of the global group was when it last said something new.
    pub stale_ms: u64,
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PlaceStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for Region {
    const KIND: &'static str = "Region";
    const PLURAL: &'static str = "regions";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "Zones that share one metadata log and one writer.";
    const SCOPE: Scope = Scope::Global;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs { create: false, update: true, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("TIER", "/spec/tier"),
        Column::count("SERVERS", "/status/servers"),
        Column::age("HEARD", "/status/heard"),
        Column::millis("STALE", "/status/staleMs"),
    ];
    const IMMUTABLE: &'static [&'static str] = &["tier"];
    type Spec = RegionSpec;
    type Status = RegionStatus;

    fn validate(_: &RegionSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> RegionSpec {
        RegionSpec::default()
    }
}

#[derive(Debug, Clone)]
pub struct Zone;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ZoneSpec {
    /// What people call it.
    #[schemars(length(max = 200))]
    pub display_name: String,
}

impl Kind for Zone {
    const KIND: &'static str = "Zone";
    const PLURAL: &'static str = "zones";
    const SHORT: &'static [&'static str] = &["az"];
    const ABOUT: &'static str = "A failure domain of a region: power, cooling and network of its own.";
    const SCOPE: Scope = Scope::Region;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[Column::new("DISPLAY NAME", "/spec/displayName")];
    type Spec = ZoneSpec;
    type Status = PlaceStatus;

    fn validate(spec: &ZoneSpec) -> Vec<FieldError> {
        if spec.display_name.chars().count() > 200 {
            vec![FieldError::new("spec.displayName", "at most 200 characters")]
        } else {
            Vec::new()
        }
    }

    fn example() -> ZoneSpec {
        ZoneSpec { display_name: "Hall 1".into() }
    }
}

#[derive(Debug, Clone)]
pub struct Cell;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CellSpec {
    /// At most this many hosts may join.
    #[schemars(range(min = 1, max = 50_000))]
    pub max_hosts: u32,
    /// Only hosts of this zone may join. Without it, the first host's zone becomes the cell's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
}

impl Default for CellSpec {
    fn default() -> Self {
        Self { max_hosts: 10_000, zone: None }
    }
}

/// Who would feel the loss of a cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BlastRadius {
    pub instances: u32,
    /// Of all that are placed in the region, rounded up.
    pub instances_percent: u32,
    /// Projects with instances here.
    pub projects: u32,
    /// Of all with instances in the region, rounded up.
    pub projects_percent: u32,
    /// Projects whose every instance is here.
    pub projects_wholly: u32,
}

/// The name that a host gives as its cell to be put where there is room.
pub const ANY_CELL: &str = "auto";

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CellStatus {
    pub hosts: u32,
    pub ready_hosts: u32,
    /// The server that judges this cell's hosts, and the epoch of that right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    pub epoch: u64,
    /// Set while the brake holds: so many hosts vanished at once that none is declared dead.
    pub brake: bool,
    /// How much of the hosts' processors is reserved. Refreshed every few seconds, as is the blast radius.
    pub reserved_percent: u32,
    pub blast_radius: BlastRadius,
    /// Objects with a part in this cell that are set aside because their reconciler panics, a few of them by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quarantined: Vec<String>,
    pub conditions: Vec<Condition>,
}

impl Kind for Cell {
    const KIND: &'static str = "Cell";
    const PLURAL: &'static str = "cells";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str =
        "Hosts that are scheduled and judged together; the blast radius of a controller's fault.";
    const SCOPE: Scope = Scope::Region;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("HOSTS", "/status/hosts"),
        Column::new("READY", "/status/readyHosts"),
        Column::new("RESERVED %", "/status/reservedPercent"),
        Column::new("INSTANCES", "/status/blastRadius/instances"),
        Column::new("PROJECTS", "/status/blastRadius/projects"),
        Column::new("PROJECTS %", "/status/blastRadius/projectsPercent"),
        Column::new("WHOLLY HERE", "/status/blastRadius/projectsWholly").wide(),
        Column::new("HOLDER", "/status/holder"),
        Column::new("BRAKE", "/status/brake"),
    ];
    type Spec = CellSpec;
    type Status = CellStatus;

    fn validate(spec: &CellSpec) -> Vec<FieldError> {
        if (1..=50_000).contains(&spec.max_hosts) {
            Vec::new()
        } else {
            vec![FieldError::new("spec.maxHosts", "between 1 and 50000")]
        }
    }

    fn example() -> CellSpec {
        CellSpec::default()
    }
}

#[derive(Debug, Clone)]
pub struct Host;

/// What a host can hold, or what is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Capacity {
    pub cpu: MilliCpu,
    pub memory: Bytes,
    pub scratch: Bytes,
    pub instances: u32,
}

/// Countable compute classes by name, such as `gpu-v100 = 2`.
pub type Classes = IndexMap<Name, u32>;

const MAX_CLASSES: usize = 16;
/// Units of one class that a host has, or that an instance takes.
const MAX_UNITS: u32 = 1024;

/// Storage classes by name, with their size.
pub type StorageClasses = IndexMap<Name, Bytes>;

/// The schema of [`StorageClasses`]: only agents declare them, so no amount is refused.
fn storage_schema(generator: &mut SchemaGenerator) -> Schema {
    let bytes = generator.subschema_for::<Bytes>();
    json_schema!({
        "type": "object",
        "propertyNames": {"pattern": Name::PATTERN},
        "additionalProperties": bytes,
    })
}

/// The schema of [`Classes`] with their bounds.
pub fn classes_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": MAX_CLASSES,
        "patternProperties": {Name::PATTERN: {"type": "integer", "minimum": 1, "maximum": MAX_UNITS}},
        "additionalProperties": false,
    })
}

/// What is wrong with classes that came from outside.
pub fn validate_classes(field: &str, classes: &Classes) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if classes.len() > MAX_CLASSES {
        errors.push(FieldError::new(field, format!("at most {MAX_CLASSES}")));
    }
    if !classes.values().all(|n| (1..=MAX_UNITS).contains(n)) {
        errors.push(FieldError::new(field, format!("counts between 1 and {MAX_UNITS}")));
    }
    errors
}

/// A socket address. A text that matches is one; a few odd spellings of one do not match.
const ADDRESS_PATTERN: &str = concat!(
    r"^(\[(([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,7}:|([0-9a-f]{1,4}:){1,4}(:[0-9a-f]{1,4}){1,3}",
    r"|([0-9a-f]{1,4}:){1,6}:[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,5}(:[0-9a-f]{1,4}){1,2}",
    r"|([0-9a-f]{1,4}:){1,2}(:[0-9a-f]{1,4}){1,5}|:(:[0-9a-f]{1,4}){1,7})\]",
    r"|((25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])\.){3}(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9]))",
    r":(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})$",
);

/// What a host's agent declares when it joins, and what an operator decides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostSpec {
    pub zone: Name,
    pub cell: Name,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rack: Option<Name>,
    /// What it fails with, where that is not its rack: a power feed, a row, a room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault_domain: Option<Name>,
    /// Where servers reach the agent.
    #[schemars(with = "String", regex(pattern = ADDRESS_PATTERN))]
    pub address: SocketAddr,
    /// The /64 from which this host's instances get their infrastructure addresses.
    #[schemars(with = "String", regex(pattern = "^([0-9a-f]{1,4}:){1,4}:$"))]
    pub prefix6: Ipv6Addr,
    /// The /24 for programs in instances that listen on IPv4 alone.
    #[schemars(with = "String", regex(pattern = r"^((25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])\.){3}0$"))]
    pub prefix4: Ipv4Addr,
    pub runtimes: Vec<Runtime>,
    pub capacity: Capacity,
    #[serde(default)]
    pub classes: Classes,
    /// Storage classes, with the size of the folder behind each.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    #[schemars(schema_with = "storage_schema")]
    pub storage: StorageClasses,
    /// Its NUMA nodes, by number, with their shares of the capacity. Of an agent that tells none, the host is one node of
    /// everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_NUMA_NODES))]
    pub numa_nodes: Vec<NumaNode>,
    /// Why instances can't be kept to one of its nodes, if that is so: nothing with `numa=single` is placed here then.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = MAX_TROUBLE))]
    pub numa_trouble: String,
    /// Why tenants' networks can't be on it, if that is so: nothing that has NICs is placed here then.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = MAX_TROUBLE))]
    pub network_trouble: String,
    /// No new instance is placed here while true.
    #[serde(default)]
    pub cordoned: bool,
    /// While true, its instances are moved to other hosts, as a new version of their apps would be: each goes when another
    /// is ready in its place. Nothing new is placed here.
    #[serde(default)]
    pub draining: bool,
}

impl Default for HostSpec {
    fn default() -> Self {
        let name: Name = "none".parse().expect("a well-formed name");
        Self {
            zone: name.clone(),
            cell: name,
            rack: None,
            fault_domain: None,
            address: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            prefix6: Ipv6Addr::UNSPECIFIED,
            prefix4: Ipv4Addr::UNSPECIFIED,
            runtimes: Vec::new(),
            capacity: Capacity::default(),
            classes: Classes::new(),
            storage: StorageClasses::new(),
            numa_nodes: Vec::new(),
            numa_trouble: String::new(),
            network_trouble: String::new(),
            cordoned: false,
            draining: false,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    #[default]
    Joining,
    Ready,
    /// Heartbeats are late: nothing new is placed here.
    Suspect,
    /// Declared lost: its instances run elsewhere.
    Dead,
}

/// How far a gateway is from a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RoundTrip {
    pub gateway: Name,
    /// Microseconds.
    pub us: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HostStatus {
    pub state: HostState,
    /// Counts the times that the host was declared dead: what was started before is superseded.
    pub epoch: u64,
    /// Changes with every boot of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// When the state last changed.
    pub since: Timestamp,
    pub reserved: Capacity,
    /// Units of compute classes that are reserved.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub reserved_classes: Classes,
    /// Bytes of storage classes that are reserved.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub reserved_storage: StorageClasses,
    /// What is reserved and what is free on each of its NUMA nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numa_nodes: Vec<NumaRoom>,
    /// The lowest round trip between it and a gateway, in microseconds. Written down when it has changed by a quarter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_trip_us: Option<u32>,
    /// Each gateway's, the lowest of its last few measurements.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub round_trips: Vec<RoundTrip>,
    /// The address slot that was given last: all others are given before it is given again.
    pub last_slot: u16,
    /// Content of images that the host already has.
    pub images: Vec<Digest>,
    /// When its agent's certificate ends; it is renewed long before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_ends: Option<Timestamp>,
    pub conditions: Vec<Condition>,
}

impl Kind for Host {
    const KIND: &'static str = "Host";
    const PLURAL: &'static str = "hosts";
    const SHORT: &'static [&'static str] = &["ho"];
    const ABOUT: &'static str = "A machine that runs instances; registered by its agent.";
    const SCOPE: Scope = Scope::Region;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs { create: false, update: true, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("STATE", "/status/state"),
        Column::new("ZONE", "/spec/zone"),
        Column::new("CELL", "/spec/cell").wide(),
        Column::new("INSTANCES", "/status/reserved/instances"),
        Column::new("CPU", "/status/reserved/cpu"),
        Column::new("OF", "/spec/capacity/cpu"),
        Column::new("MEMORY", "/status/reserved/memory"),
        Column::new("OF", "/spec/capacity/memory"),
        Column::micros("RTT", "/status/roundTripUs"),
        Column::new("CORDONED", "/spec/cordoned").wide(),
        Column::new("DRAINING", "/spec/draining").wide(),
        Column::new("ADDRESS", "/spec/address").wide(),
    ];
    const IMMUTABLE: &'static [&'static str] = &[
        "zone",
        "cell",
        "rack",
        "faultDomain",
        "address",
        "prefix6",
        "prefix4",
        "runtimes",
        "capacity",
        "classes",
        "storage",
        "numaNodes",
        "numaTrouble",
        "networkTrouble",
    ];
    type Spec = HostSpec;
    type Status = HostStatus;

    fn validate(spec: &HostSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.prefix6.segments()[4..].iter().any(|s| *s != 0) {
            errors.push(FieldError::new("spec.prefix6", "the last 64 bits must be zero"));
        }
        if spec.prefix4.octets()[3] != 0 {
            errors.push(FieldError::new("spec.prefix4", "the last 8 bits must be zero"));
        }
        errors.extend(numa::validate(spec));
        if spec.network_trouble.chars().count() > MAX_TROUBLE {
            errors.push(FieldError::new("spec.networkTrouble", format!("at most {MAX_TROUBLE} characters")));
        }
        errors
    }

    fn example() -> HostSpec {
        let name = |s: &str| s.parse::<Name>().expect("a well-formed name");
        HostSpec {
            zone: name("zone-a"),
            cell: name("cell-1"),
            address: "[fd00::1]:7440".parse().expect("a well-formed address"),
            prefix6: "fd00:0:0:1::".parse().expect("a well-formed address"),
            prefix4: Ipv4Addr::new(10, 97, 1, 0),
            runtimes: vec![Runtime::Container, Runtime::Function],
            capacity: Capacity {
                cpu: MilliCpu(8000),
                memory: Bytes(32 << 30),
                scratch: Bytes(100 << 30),
                instances: 250,
            },
            ..HostSpec::default()
        }
    }
}
