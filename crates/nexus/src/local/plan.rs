//! What a local cloud consists of: names, addresses and ports, all computed from a few choices and the cluster's id.
//!
//! The plan is made once, at the first start, and kept in the data folder, so that every later start and stop finds the
//! same names. Nothing here touches the machine.
//!
//! Addresses: a ULA `/48` (RFC 4193) from the cluster id. Its subnet 0 is the underlay: `::1` is the machine itself,
//! `::100 + n` host number n. Subnet n belongs to the instances of host n. IPv4 likewise in `10.x.0.0/16`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use indexmap::IndexMap;
use nexus_model::Name;
use nexus_model::kind::Classes;
use serde::{Deserialize, Serialize};

/// The layout of the data folder that this release writes.
pub const FORMAT: u32 = 1;
/// The third octet of an IPv4 address numbers the hosts.
pub const MAX_HOSTS: usize = 200;
const WIRE_PORT: u16 = 7440;
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

/// What a user may choose at the first start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    pub zones: usize,
    pub hosts_per_zone: usize,
    pub classes: Vec<ClassGrant>,
    pub api_port_base: u16,
    pub gateway_port_base: u16,
    pub region: Name,
}

/// The whole cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// See [`FORMAT`].
    pub format: u32,
    /// The release that made the folder.
    pub version: String,
    pub cluster_id: String,
    pub region: Name,
    pub zones: Vec<Name>,
    pub hosts_per_zone: usize,
    pub classes: Vec<ClassGrant>,
    pub api_port_base: u16,
    pub gateway_port_base: u16,
    /// The first 48 bits of the ULA; the rest is zero.
    pub prefix48: Ipv6Addr,
    /// The `x` of `10.x.0.0/16`.
    pub octet: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPlan {
    pub name: Name,
    pub zone: Name,
    pub cell: Name,
    pub classes: Classes,
    /// 1 and up.
    pub number: u16,
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
    pub zone: Name,
    pub node_id: u64,
    pub wire: SocketAddr,
    pub api_tls: SocketAddr,
    pub api_http: SocketAddr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayPlan {
    pub name: Name,
    pub zone: Name,
    pub http: SocketAddr,
    pub admin: SocketAddr,
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
        let hosts = choices.zones.saturating_mul(choices.hosts_per_zone);
        if choices.hosts_per_zone == 0 || hosts > MAX_HOSTS {
            return Err(format!(
                "{} zones with {} hosts each: at least 1 host a zone and at most {MAX_HOSTS} in all",
                choices.zones, choices.hosts_per_zone
            ));
        }
        // Servers use base .. base + 4 and base + 10 .. base + 14, gateways base, base + 1, base + 100 and base + 101.
        let (api, gateway) = (choices.api_port_base, choices.gateway_port_base);
        if api == 0 || gateway == 0 || api > u16::MAX - 20 || gateway > u16::MAX - 120 {
            return Err("--api-port-base and --gateway-port-base: between 1 and 65415".to_owned());
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
        let plan = Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster_id: format!("cnx-{id}"),
            region: choices.region.clone(),
            zones: (b'a'..=b'z').take(choices.zones).map(|c| name(format!("zone-{}", c as char))).collect(),
            hosts_per_zone: choices.hosts_per_zone,
            classes: choices.classes.clone(),
            api_port_base: api,
            gateway_port_base: gateway,
            prefix48,
            octet,
        };
        for grant in &plan.classes {
            if !plan.zones.contains(&grant.place) && !plan.hosts().iter().any(|h| h.name == grant.place) {
                return Err(format!("--class {}: there is no such zone or host", grant.place));
            }
        }
        let ports = plan.ports();
        if let Some((port, who)) = ports
            .iter()
            .enumerate()
            .find_map(|(i, (p, who))| ports[..i].iter().any(|(other, _)| other == p).then_some((p, who)))
        {
            return Err(format!(
                "port {port} would be used twice, once by {who}: move --api-port-base or --gateway-port-base"
            ));
        }
        Ok(plan)
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

    /// The machine's own address on the underlay.
    pub fn machine6(&self) -> Ipv6Addr {
        self.subnet(0, 1)
    }

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
        let mut hosts = Vec::new();
        for zone in &self.zones {
            for n in 1..=self.hosts_per_zone {
                let number = u16::try_from(hosts.len() + 1).expect("at most 200 hosts");
                let host_name = name(format!("{zone}-{n}"));
                let mut classes: Classes = IndexMap::new();
                for grant in self.classes.iter().filter(|g| g.place == *zone || g.place == host_name) {
                    classes.insert(grant.class.clone(), grant.count);
                }
                let octet3 = u8::try_from(number).expect("at most 200 hosts");
                hosts.push(HostPlan {
                    name: host_name,
                    zone: zone.clone(),
                    cell: cell_of(zone),
                    classes,
                    number,
                    address6: self.subnet(0, 0x100 + number),
                    address4: Ipv4Addr::new(10, self.octet, 0, octet3 + 1),
                    prefix6: self.subnet(number, 0),
                    prefix4: Ipv4Addr::new(10, self.octet, octet3, 0),
                });
            }
        }
        hosts
    }

    /// One server in each of the first zones: as many as make a useful majority.
    pub fn servers(&self) -> Vec<ServerPlan> {
        let count: u16 = match self.zones.len() {
            0..=2 => 1,
            3 | 4 => 3,
            _ => 5,
        };
        let of = |i: u16| {
            let letter = char::from(b'a' + u8::try_from(i).expect("at most 5 servers"));
            ServerPlan {
                name: name(format!("server-{letter}")),
                zone: self.zones[usize::from(i)].clone(),
                node_id: u64::from(i) + 1,
                wire: (self.machine6(), WIRE_PORT + i).into(),
                api_tls: loopback(self.api_port_base + i),
                api_http: loopback(self.api_port_base + 10 + i),
            }
        };
        (0..count).map(of).collect()
    }

    pub fn gateways(&self) -> Vec<GatewayPlan> {
        let of = |i: u16| GatewayPlan {
            name: name(format!("gateway-{}", i + 1)),
            zone: self.zones[usize::from(i) % self.zones.len()].clone(),
            http: loopback(self.gateway_port_base + i),
            admin: loopback(self.gateway_port_base + 100 + i),
        };
        (0..GATEWAYS).map(of).collect()
    }

    /// Every cell with its zone.
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
        differs("--region", self.region.to_string(), given.region.as_ref().map(Name::to_string));
        if !given.classes.is_empty() && given.classes != self.classes {
            found.push("--class differs".to_owned());
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
    pub api_port_base: Option<u16>,
    pub gateway_port_base: Option<u16>,
    pub region: Option<Name>,
}

impl GivenChoices {
    pub fn with_defaults(&self) -> Choices {
        Choices {
            zones: self.zones.unwrap_or(3),
            hosts_per_zone: self.hosts_per_zone.unwrap_or(2),
            classes: self.classes.clone(),
            api_port_base: self.api_port_base.unwrap_or(API_PORT_BASE),
            gateway_port_base: self.gateway_port_base.unwrap_or(GATEWAY_PORT_BASE),
            region: self.region.clone().unwrap_or_else(|| name("local".to_owned())),
        }
    }
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
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// Whether an address belongs to the underlay of the plan.
    fn is_underlay(plan: &Plan, address: IpAddr) -> bool {
        match address {
            IpAddr::V6(a) => a.segments()[..4] == plan.subnet(0, 0).segments()[..4],
            IpAddr::V4(a) => a.octets()[..3] == [10, plan.octet, 0],
        }
    }

    fn plan(zones: usize, hosts: usize, classes: &[&str]) -> Result<Plan, String> {
        let given = GivenChoices {
            zones: Some(zones),
            hosts_per_zone: Some(hosts),
            classes: classes.iter().map(|c| c.parse().unwrap()).collect(),
            ..GivenChoices::default()
        };
        Plan::new(&given.with_defaults(), [0xab, 0xcd, 0xef, 0x01, 0x23, 7, 0, 0], |o| o != 7)
    }

    #[test]
    fn three_zones_with_two_hosts() {
        let plan = plan(3, 2, &["zone-a:gpu-v100=2", "zone-b-2:fpga=1"]).unwrap();
        assert_eq!(plan.cluster_id, "cnx-abcdef01");
        assert_eq!(plan.link_prefix(), "xabc");
        let hosts = plan.hosts();
        assert_eq!(hosts.len(), 6);
        assert_eq!(hosts[3].name.as_str(), "zone-b-2");
        assert_eq!(hosts[3].address6.to_string(), "fd23:abcd:ef01::104");
        assert_eq!(hosts[3].prefix6.to_string(), "fd23:abcd:ef01:4::");
        assert_eq!(hosts[3].prefix4.to_string(), "10.8.4.0", "octet 7 was taken");
        assert_eq!(hosts[0].classes.values().sum::<u32>(), 2);
        assert_eq!(hosts[1].classes.values().sum::<u32>(), 2);
        assert_eq!(hosts[3].classes.keys().next().unwrap().as_str(), "fpga");
        let servers: Vec<_> = plan.servers().iter().map(|s| s.api_tls.port()).collect();
        assert_eq!(servers, [8443, 8444, 8445]);
        let gateways: Vec<_> = plan.gateways().iter().map(|g| g.http.port()).collect();
        assert_eq!(gateways, [8000, 8001]);
    }

    #[test]
    fn servers_are_always_odd_and_never_more_than_zones() {
        for zones in 1..=26 {
            let servers = plan(zones, 1, &[]).unwrap().servers();
            assert!(servers.len() % 2 == 1 && servers.len() <= zones, "{zones} zones");
        }
    }

    #[test]
    fn no_two_hosts_share_an_address() {
        let plan = plan(20, 10, &[]).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for host in plan.hosts() {
            for address in [IpAddr::from(host.address6), host.address4.into(), host.prefix6.into(), host.prefix4.into()]
            {
                assert!(seen.insert(address), "{address}");
            }
            assert!(is_underlay(&plan, host.address6.into()) && is_underlay(&plan, host.address4.into()));
            assert!(!is_underlay(&plan, host.prefix6.into()) && !is_underlay(&plan, host.prefix4.into()));
        }
        assert!(!seen.contains(&plan.machine6().into()) && !seen.contains(&plan.machine4().into()));
    }

    #[test]
    fn impossible_choices_say_what_is_wrong() {
        assert!(plan(0, 1, &[]).unwrap_err().contains("--zones 0"));
        assert!(plan(26, 26, &[]).unwrap_err().contains("at most 200"));
        assert!(plan(3, 2, &["zone-q:gpu=1"]).unwrap_err().contains("zone-q"));
        assert!("zone-a".parse::<ClassGrant>().unwrap_err().contains("PLACE:CLASS=COUNT"));
        let given = GivenChoices { api_port_base: Some(7999), ..GivenChoices::default() };
        let error = Plan::new(&given.with_defaults(), [1; 8], |_| true).unwrap_err();
        assert!(error.contains("port 8000 would be used twice"), "{error}");
    }

    #[test]
    fn a_plan_reads_back_and_tells_what_differs() {
        let plan = plan(3, 2, &[]).unwrap();
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        assert!(plan.differences(&GivenChoices::default()).is_empty());
        assert!(plan.differences(&GivenChoices { zones: Some(3), ..GivenChoices::default() }).is_empty());
        assert_eq!(plan.differences(&GivenChoices { zones: Some(2), ..GivenChoices::default() }).len(), 1);
    }

    #[test]
    fn used_ranges_are_avoided() {
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
                      eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n\
                      eth1\t0005000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n\
                      eth2\t0000400A\t00000000\t0001\t0\t0\t0\t0000C0FF\n";
        assert!(!octet_is_free(routes, 0), "10.0.5.0/24 lies in it");
        assert!(!octet_is_free(routes, 65), "10.64.0.0/10 holds it");
        assert!(octet_is_free(routes, 7), "the default route is no conflict");
    }
}
