//! What a local cloud consists of: names, addresses and ports, all computed from a few choices and the cluster's id.
//!
//! The plan is made once, at the first start, and kept in the data folder, so that every later start and stop finds the
//! same names. Nothing here touches the machine.
//!
//! Addresses: a ULA `/48` (RFC 4193) from the cluster id. Its subnet 0 is the underlay: `::1` is the machine itself,
//! `::100 + n` host number n. Subnet n belongs to the instances of host n. IPv4 likewise in `10.x.0.0/16`.
//!
//! Several regions each live in a network namespace of their own, number r (from 0) on the subnets `r000` to `rfff`, in
//! the same order. Subnet `f000` is the backbone that joins them: `::r + 1` is region r. IPv4 does not leave a region.
//!
//! Ports on 127.0.0.1, for server and gateway number i (from 0) of region r: the API's base + 20 r + i with TLS and ten
//! higher without; the gateways' base + 10 r + i, and a hundred higher for health and metrics. Servers have the node ids
//! 100 r + i + 1. The number of a region that left is not given again.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use indexmap::IndexMap;
use nexus_model::kind::{Classes, GLOBAL, StorageClasses, Tier};
use nexus_model::{Bytes, Name};
use serde::{Deserialize, Serialize};

/// The layout of the data folder that this release writes.
///
/// 1: one region, in `region`. 2: any number, in `regions`.
pub const FORMAT: u32 = 2;
/// The third octet of an IPv4 address numbers the hosts.
pub const MAX_HOSTS: usize = 200;
/// Of hosts in each of several regions, so that a third octet tells region and host.
const MAX_HOSTS_APART: usize = 24;
/// At once, and over time.
pub const MAX_REGIONS: usize = 5;
const MAX_INDEX: u16 = 9;
const BACKBONE: u16 = 0xf000;
/// Founding voters of the global group.
const MAX_VOTERS: usize = 9;
const WIRE_PORT: u16 = 7440;
const PEER_PORT: u16 = 7460;
const API_PORT: u16 = 7480;
const AGENT_PORT: u16 = 7450;
const AGENT_METRICS_PORT: u16 = 7451;
pub const API_PORT_BASE: u16 = 8443;
pub const GATEWAY_PORT_BASE: u16 = 8000;
const GATEWAYS: u16 = 2;

/// `PLACE:CLASS=COUNT`: every host of a zone, or one host, offers so many of a compute class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassGrant {
    pub place: Name,
    pub class: Name,
    pub count: u32,
}

impl FromStr for ClassGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("`{text}` is not PLACE:CLASS=COUNT, such as zone-a:gpu-v100=2");
        let (place, rest) = text.split_once(':').ok_or_else(shape)?;
        let (class, count) = rest.split_once('=').ok_or_else(shape)?;
        Ok(Self {
            place: place.parse().map_err(|e| format!("{place:?}: {e}"))?,
            class: class.parse().map_err(|e| format!("{class:?}: {e}"))?,
            count: count.parse().map_err(|_| format!("{count:?} is not a whole number"))?,
        })
    }
}

/// `PLACE:CLASS=SIZE`: every host of a zone, or one host, offers so much of a storage class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageGrant {
    pub place: Name,
    pub class: Name,
    pub size: Bytes,
}

impl FromStr for StorageGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("`{text}` is not PLACE:CLASS=SIZE, such as zone-a:high-iops=1Gi");
        let (place, rest) = text.split_once(':').ok_or_else(shape)?;
        let (class, size) = rest.split_once('=').ok_or_else(shape)?;
        Ok(Self {
            place: place.parse().map_err(|e| format!("{place:?}: {e}"))?,
            class: class.parse().map_err(|e| format!("{class:?}: {e}"))?,
            size: size.parse().map_err(|e| format!("{size:?}: {e}"))?,
        })
    }
}

/// `REGION=TIER`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierGrant {
    pub region: Name,
    pub tier: Tier,
}

impl FromStr for TierGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("`{text}` is not REGION=TIER, such as region-c=edge");
        let (region, tier) = text.split_once('=').ok_or_else(shape)?;
        let tier = match tier {
            "core" => Tier::Core,
            "regional" => Tier::Regional,
            "edge" => Tier::Edge,
            other => return Err(format!("{other:?} is no tier: core, regional or edge")),
        };
        Ok(Self { region: region.parse().map_err(|e| format!("{region:?}: {e}"))?, tier })
    }
}

/// What a user may choose at the first start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    pub zones: usize,
    pub hosts_per_zone: usize,
    pub classes: Vec<ClassGrant>,
    pub storage: Vec<StorageGrant>,
    pub api_port_base: u16,
    pub gateway_port_base: u16,
    /// Of the first region.
    pub region: Name,
    pub regions: usize,
    pub tiers: Vec<TierGrant>,
    /// The URL of an etcd cluster.
    pub store: Option<String>,
}

/// One region of the cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionPlan {
    pub name: Name,
    /// Its number: see the head of this file.
    pub index: u16,
    #[serde(default)]
    pub tier: Tier,
    /// It was there when the cloud was made. Others join.
    pub founder: bool,
}

/// The whole cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// See [`FORMAT`].
    pub format: u32,
    /// The release that made the folder.
    pub version: String,
    pub cluster_id: String,
    pub regions: Vec<RegionPlan>,
    /// Each region has a network namespace of its own. A cloud that was made with one region lives in the machine's.
    pub apart: bool,
    /// The number of the next region.
    pub next_index: u16,
    /// Of each region.
    pub zones: Vec<Name>,
    pub hosts_per_zone: usize,
    pub classes: Vec<ClassGrant>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub storage: Vec<StorageGrant>,
    pub api_port_base: u16,
    pub gateway_port_base: u16,
    /// The first 48 bits of the ULA; the rest is zero.
    pub prefix48: Ipv6Addr,
    /// The `x` of `10.x.0.0/16`.
    pub octet: u8,
    /// The URL of the etcd cluster that keeps the metadata, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPlan {
    pub name: Name,
    pub region: Name,
    pub zone: Name,
    pub cell: Name,
    pub classes: Classes,
    pub storage: StorageClasses,
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
    pub prefix6: Ipv6Addr,
    pub prefix4: Ipv4Addr,
}

impl HostPlan {
    pub fn wire(&self) -> SocketAddr {
        (self.address6, AGENT_PORT).into()
    }

    pub fn metrics(&self) -> SocketAddr {
        (self.address6, AGENT_METRICS_PORT).into()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerPlan {
    pub name: Name,
    pub region: Name,
    pub zone: Name,
    pub node_id: u64,
    pub wire: SocketAddr,
    pub api_tls: SocketAddr,
    pub api_http: SocketAddr,
    /// Where servers of other regions reach its API.
    pub api_peer: Option<SocketAddr>,
}

impl ServerPlan {
    /// Where other servers are told that its API is.
    pub fn api_url(&self) -> String {
        format!("https://{}", self.api_peer.unwrap_or(self.api_tls))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayPlan {
    pub name: Name,
    pub region: Name,
    pub zone: Name,
    pub http: SocketAddr,
    pub admin: SocketAddr,
    /// Where gateways of other regions reach it.
    pub peer: Option<SocketAddr>,
}

fn name(text: String) -> Name {
    text.parse().expect("made of lower-case letters, digits and hyphens only")
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

impl Plan {
    /// Checks the choices and lays the cloud out. `random` makes the cluster's id; `octet_free` says whether
    /// `10.x.0.0/16` is unused on this machine.
    pub fn new(choices: &Choices, random: [u8; 8], octet_free: impl Fn(u8) -> bool) -> Result<Self, String> {
        if !(1..=26).contains(&choices.zones) {
            return Err(format!("--zones {}: between 1 and 26", choices.zones));
        }
        let apart = choices.regions > 1;
        let (most, where_) = if apart { (MAX_HOSTS_APART, "a region") } else { (MAX_HOSTS, "all") };
        let hosts = choices.zones.saturating_mul(choices.hosts_per_zone);
        if choices.hosts_per_zone == 0 || hosts > most {
            return Err(format!(
                "{} zones with {} hosts each: at least 1 host a zone and at most {most} in {where_}",
                choices.zones, choices.hosts_per_zone
            ));
        }
        // Servers of region r use base + 20 r and 15 more, gateways base + 10 r and base + 100 + 10 r.
        let (api, gateway) = (choices.api_port_base, choices.gateway_port_base);
        if api == 0 || gateway == 0 || api > u16::MAX - 220 || gateway > u16::MAX - 220 {
            return Err("--api-port-base and --gateway-port-base: between 1 and 65315".to_owned());
        }
        let id = hex_id(random);
        let start = random[5];
        let octet = (0..=255u8)
            .map(|i| start.wrapping_add(i))
            .find(|o| *o != 0 && octet_free(*o))
            .ok_or("every 10.x.0.0/16 is in use on this machine")?;
        let word = |a: u8, b: u8| u16::from_be_bytes([a, b]);
        let prefix48 =
            Ipv6Addr::new(word(0xfd, random[4]), word(random[0], random[1]), word(random[2], random[3]), 0, 0, 0, 0, 0);
        let mut plan = Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster_id: format!("cnx-{id}"),
            regions: Vec::new(),
            apart,
            next_index: 0,
            zones: (b'a'..=b'z').take(choices.zones).map(|c| name(format!("zone-{}", c as char))).collect(),
            hosts_per_zone: choices.hosts_per_zone,
            classes: choices.classes.clone(),
            storage: choices.storage.clone(),
            api_port_base: api,
            gateway_port_base: gateway,
            prefix48,
            octet,
            store: choices.store.clone(),
        };
        plan.add_regions(choices.regions, Some(&choices.region), &choices.tiers, true)?;
        let classes = plan.classes.iter().map(|grant| ("--class", &grant.place));
        for (flag, place) in classes.chain(plan.storage.iter().map(|grant| ("--storage-class", &grant.place))) {
            if !plan.zones.contains(place) && !plan.hosts().iter().any(|h| h.name.as_str().ends_with(place.as_str())) {
                return Err(format!("{flag} {place}: there is no such zone or host"));
            }
        }
        plan.check_ports()?;
        Ok(plan)
    }

    fn check_ports(&self) -> Result<(), String> {
        let ports = self.ports();
        if let Some((port, who)) = ports
            .iter()
            .enumerate()
            .find_map(|(i, (p, who))| ports[..i].iter().any(|(other, _)| other == p).then_some((p, who)))
        {
            return Err(format!(
                "port {port} would be used twice, once by {who}: move --api-port-base or --gateway-port-base"
            ));
        }
        Ok(())
    }

    /// Adds so many regions. Names: the first as given, the others by the letters that are free.
    fn add_regions(
        &mut self,
        count: usize,
        first: Option<&Name>,
        tiers: &[TierGrant],
        founder: bool,
    ) -> Result<(), String> {
        if !(1..=MAX_REGIONS).contains(&(self.regions.len() + count)) {
            return Err(format!("--regions {}: between 1 and {MAX_REGIONS}", self.regions.len() + count));
        }
        let before = self.regions.len();
        for _ in 0..count {
            if self.next_index > MAX_INDEX {
                return Err("this cloud has had ten regions: make another one".to_owned());
            }
            let taken = |n: &Name| self.regions.iter().any(|r| r.name == *n);
            let letters = (b'a'..=b'z').map(|c| name(format!("region-{}", c as char)));
            // Region r has the letter of its number, so that a name that left is not given again at once.
            let mut own = letters.skip(usize::from(self.next_index)).filter(|n| !taken(n));
            let given = first.filter(|_| self.regions.is_empty()).cloned();
            let name = given.or_else(|| own.next()).ok_or("no letter is left for a region")?;
            let index = self.next_index;
            self.next_index += 1;
            self.regions.push(RegionPlan { name, index, tier: Tier::Core, founder });
        }
        for grant in tiers {
            let found = self.regions.iter().position(|r| r.name == grant.region);
            let index = found.ok_or_else(|| format!("--tier {}: there is no such region", grant.region))?;
            // One that stands already was compared elsewhere.
            if index >= before {
                self.regions[index].tier = grant.tier;
            }
        }
        if self.regions.iter().any(|r| r.name == *GLOBAL) {
            return Err(format!("--region {GLOBAL}: that is the name of what belongs to no region"));
        }
        if self.regions[0].tier != Tier::Core {
            return Err(format!("--tier {}: the first region must be core", self.regions[0].name));
        }
        Ok(())
    }

    /// The same cloud with more regions, which join the running ones.
    pub fn grown(&self, regions: usize, tiers: &[TierGrant]) -> Result<Self, String> {
        let mut plan = self.clone();
        plan.add_regions(regions.saturating_sub(self.regions.len()), None, tiers, false)?;
        plan.check_ports()?;
        Ok(plan)
    }

    /// The same cloud without one of its regions.
    pub fn without(&self, region: &Name) -> Self {
        let mut plan = self.clone();
        plan.regions.retain(|r| r.name != *region);
        plan
    }

    /// Where users begin.
    pub fn first_region(&self) -> &RegionPlan {
        self.regions.first().expect("a plan has a region")
    }

    pub fn region(&self, name: &str) -> Option<&RegionPlan> {
        self.regions.iter().find(|r| r.name == *name)
    }

    /// The name of something in a region: unique in the fleet.
    fn named(&self, region: &RegionPlan, own: &str) -> Name {
        if self.apart { name(format!("{}-{own}", region.name)) } else { name(own.to_owned()) }
    }

    /// The part of the cluster id that is its own: 8 hexadecimal digits.
    pub fn short_id(&self) -> &str {
        self.cluster_id.strip_prefix("cnx-").unwrap_or(&self.cluster_id)
    }

    fn subnet(&self, subnet: u16, host: u16) -> Ipv6Addr {
        let mut segments = self.prefix48.segments();
        segments[3] = subnet;
        segments[7] = host;
        segments.into()
    }

    /// Where a region's servers and gateways are for one another and for its hosts. Without regions apart, that is the
    /// machine's own address on the underlay.
    pub fn region6(&self, region: &RegionPlan) -> Ipv6Addr {
        self.subnet(region.index << 12, 1)
    }

    /// A region's prefix, its length, and its address on the backbone.
    pub fn on_backbone(&self, region: &RegionPlan) -> (Ipv6Addr, u8, Ipv6Addr) {
        (self.subnet(region.index << 12, 0), 52, self.subnet(BACKBONE, region.index + 1))
    }

    /// The same on every region's underlay, which are apart.
    pub fn machine4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.octet, 0, 1)
    }

    /// What every network link of this cloud begins with: short, because link names are.
    pub fn link_prefix(&self) -> String {
        link_prefix(self.short_id())
    }

    /// The cgroup of everything, relative to the root of each hierarchy.
    pub fn cgroup(&self) -> String {
        format!("nexus-{}", self.short_id())
    }

    pub fn hosts(&self) -> Vec<HostPlan> {
        self.regions.iter().flat_map(|r| self.hosts_of(r)).collect()
    }

    pub fn hosts_of(&self, region: &RegionPlan) -> Vec<HostPlan> {
        let mut hosts = Vec::new();
        for zone in &self.zones {
            for n in 1..=self.hosts_per_zone {
                let number = u16::try_from(hosts.len() + 1).expect("at most 200 hosts");
                let plain = name(format!("{zone}-{n}"));
                let host_name = self.named(region, plain.as_str());
                let mut classes: Classes = IndexMap::new();
                for grant in self.classes.iter().filter(|g| [zone, &plain, &host_name].contains(&&g.place)) {
                    classes.insert(grant.class.clone(), grant.count);
                }
                let here = |place: &Name| [zone, &plain, &host_name].contains(&place);
                let storage =
                    self.storage.iter().filter(|g| here(&g.place)).map(|g| (g.class.clone(), g.size)).collect();
                // 24 hosts in each of ten regions, or 200 in one: below 250 in either case.
                let in_fleet = region.index * MAX_HOSTS_APART as u16 + number;
                let octet3 = u8::try_from(in_fleet).expect("at most 240 hosts");
                hosts.push(HostPlan {
                    name: host_name,
                    region: region.name.clone(),
                    zone: zone.clone(),
                    cell: cell_of(zone),
                    classes,
                    storage,
                    address6: self.subnet(region.index << 12, 0x100 + number),
                    address4: Ipv4Addr::new(10, self.octet, 0, octet3 + 1),
                    prefix6: self.subnet((region.index << 12) + number, 0),
                    prefix4: Ipv4Addr::new(10, self.octet, octet3, 0),
                });
            }
        }
        hosts
    }

    pub fn servers(&self) -> Vec<ServerPlan> {
        self.regions.iter().flat_map(|r| self.servers_of(r)).collect()
    }

    /// One server in each of a region's first zones: as many as make a useful majority.
    pub fn servers_of(&self, region: &RegionPlan) -> Vec<ServerPlan> {
        let count: u16 = match self.zones.len() {
            0..=2 => 1,
            3 | 4 => 3,
            _ if self.apart => 3,
            _ => 5,
        };
        let address = self.region6(region);
        let api = self.api_port_base + 20 * region.index;
        let of = |i: u16| {
            let letter = char::from(b'a' + u8::try_from(i).expect("at most 5 servers"));
            ServerPlan {
                name: self.named(region, &format!("server-{letter}")),
                region: region.name.clone(),
                zone: self.zones[usize::from(i)].clone(),
                node_id: 100 * u64::from(region.index) + u64::from(i) + 1,
                wire: (address, WIRE_PORT + i).into(),
                api_tls: loopback(api + i),
                api_http: loopback(api + 10 + i),
                api_peer: self.apart.then(|| (address, API_PORT + i).into()),
            }
        };
        (0..count).map(of).collect()
    }

    /// The servers that vote in the global group from the first.
    pub fn founding_voters(&self) -> Vec<ServerPlan> {
        let founders = self.regions.iter().filter(|r| r.founder && r.tier == Tier::Core);
        founders.flat_map(|r| self.servers_of(r)).take(MAX_VOTERS).collect()
    }

    pub fn gateways(&self) -> Vec<GatewayPlan> {
        self.regions.iter().flat_map(|r| self.gateways_of(r)).collect()
    }

    pub fn gateways_of(&self, region: &RegionPlan) -> Vec<GatewayPlan> {
        let base = self.gateway_port_base + 10 * region.index;
        let of = |i: u16| GatewayPlan {
            name: self.named(region, &format!("gateway-{}", i + 1)),
            region: region.name.clone(),
            zone: self.zones[usize::from(i) % self.zones.len()].clone(),
            http: loopback(base + i),
            admin: loopback(base + 100 + i),
            peer: self.apart.then(|| (self.region6(region), PEER_PORT + i).into()),
        };
        (0..GATEWAYS).map(of).collect()
    }

    /// Every server, host and gateway of a region by name.
    pub fn members_of(&self, region: &RegionPlan) -> Vec<Name> {
        let servers = self.servers_of(region).into_iter().map(|s| s.name);
        let hosts = self.hosts_of(region).into_iter().map(|h| h.name);
        let gateways = self.gateways_of(region).into_iter().map(|g| g.name);
        servers.chain(hosts).chain(gateways).collect()
    }

    /// Every cell of a region with its zone.
    pub fn cells(&self) -> Vec<(Name, Name)> {
        self.zones.iter().map(|z| (cell_of(z), z.clone())).collect()
    }

    /// Every loopback port and who needs it.
    pub fn ports(&self) -> Vec<(u16, Name)> {
        let mut ports = Vec::new();
        for server in self.servers() {
            ports.extend([server.api_tls, server.api_http].map(|a| (a.port(), server.name.clone())));
        }
        for gateway in self.gateways() {
            ports.extend([gateway.http, gateway.admin].map(|a| (a.port(), gateway.name.clone())));
        }
        ports
    }

    /// What a choice would change of a cloud that exists; empty when nothing.
    pub fn differences(&self, given: &GivenChoices) -> Vec<String> {
        let mut found = Vec::new();
        let mut differs = |flag: &str, has: String, wanted: Option<String>| {
            if let Some(wanted) = wanted.filter(|w| *w != has) {
                found.push(format!("{flag} is {has}, not {wanted}"));
            }
        };
        differs("--zones", self.zones.len().to_string(), given.zones.map(|z| z.to_string()));
        differs("--hosts-per-zone", self.hosts_per_zone.to_string(), given.hosts_per_zone.map(|h| h.to_string()));
        differs("--api-port-base", self.api_port_base.to_string(), given.api_port_base.map(|p| p.to_string()));
        differs(
            "--gateway-port-base",
            self.gateway_port_base.to_string(),
            given.gateway_port_base.map(|p| p.to_string()),
        );
        differs("--region", self.first_region().name.to_string(), given.region.as_ref().map(Name::to_string));
        differs("--store", self.store.clone().unwrap_or_else(|| "embedded".to_owned()), given.store.clone());
        if !given.classes.is_empty() && given.classes != self.classes {
            found.push("--class differs".to_owned());
        }
        if !given.storage.is_empty() && given.storage != self.storage {
            found.push("--storage-class differs".to_owned());
        }
        let (has, wanted) = (self.regions.len(), given.regions.unwrap_or(self.regions.len()));
        if wanted < has {
            found.push(format!("--regions is {has}, not {wanted}: `nexus region remove NAME` takes one away"));
        } else if wanted > has && !self.apart {
            found.push(format!("--regions is 1, not {wanted}: a cloud of one region does not become one of several"));
        }
        for grant in &given.tiers {
            if let Some(region) = self.region(grant.region.as_str()).filter(|r| r.tier != grant.tier) {
                found
                    .push(format!("--tier {} is {:?}, not {:?}", grant.region, region.tier, grant.tier).to_lowercase());
            }
        }
        found
    }
}

/// The choices that the user wrote out; the others have defaults.
#[derive(Debug, Clone, Default)]
pub struct GivenChoices {
    pub zones: Option<usize>,
    pub hosts_per_zone: Option<usize>,
    pub classes: Vec<ClassGrant>,
    pub storage: Vec<StorageGrant>,
    pub api_port_base: Option<u16>,
    pub gateway_port_base: Option<u16>,
    pub region: Option<Name>,
    pub regions: Option<usize>,
    pub tiers: Vec<TierGrant>,
    pub store: Option<String>,
}

impl GivenChoices {
    pub fn with_defaults(&self) -> Choices {
        let regions = self.regions.unwrap_or(1);
        let first = if regions > 1 { "region-a" } else { "local" };
        Choices {
            zones: self.zones.unwrap_or(if regions > 1 { 1 } else { 3 }),
            hosts_per_zone: self.hosts_per_zone.unwrap_or(2),
            classes: self.classes.clone(),
            storage: self.storage.clone(),
            api_port_base: self.api_port_base.unwrap_or(API_PORT_BASE),
            gateway_port_base: self.gateway_port_base.unwrap_or(GATEWAY_PORT_BASE),
            region: self.region.clone().unwrap_or_else(|| name(first.to_owned())),
            regions,
            tiers: self.tiers.clone(),
            store: self.store.clone(),
        }
    }
}

/// Makes a plan of an earlier format one of this format.
pub fn migrate(mut plan: serde_json::Value) -> serde_json::Value {
    let object = plan.as_object_mut();
    if let Some(plan) = object.filter(|p| p.get("format").and_then(serde_json::Value::as_u64) == Some(1)) {
        let region = plan.remove("region").unwrap_or_default();
        let first = serde_json::json!({"name": region, "index": 0, "tier": "core", "founder": true});
        plan.insert("regions".to_owned(), serde_json::json!([first]));
        plan.insert("apart".to_owned(), false.into());
        plan.insert("next_index".to_owned(), 1.into());
        plan.insert("format".to_owned(), 2.into());
    }
    plan
}

fn hex_id(random: [u8; 8]) -> String {
    random[..4].iter().map(|b| format!("{b:02x}")).collect()
}

fn link_prefix(short_id: &str) -> String {
    format!("x{}", &short_id[..3])
}

/// The link prefix that a plan made from `random` would have.
pub fn link_prefix_of(random: [u8; 8]) -> String {
    link_prefix(&hex_id(random))
}

fn cell_of(zone: &Name) -> Name {
    name(format!("{zone}-cell-1"))
}

/// Whether `10.octet.0.0/16` meets no route in the text of `/proc/net/route`. The default route meets nothing.
pub fn octet_is_free(routes: &str, octet: u8) -> bool {
    let own = u32::from(Ipv4Addr::new(10, octet, 0, 0));
    let hex = |field: Option<&str>| field.and_then(|f| u32::from_str_radix(f, 16).ok()).map(u32::swap_bytes);
    routes.lines().skip(1).all(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (Some(net), Some(mask)) = (hex(fields.next()), hex(fields.nth(5))) else { return true };
        mask == 0 || (net ^ own) & mask & 0xffff_0000 != 0
    })
}

#[cfg(test)]
mod tests;
