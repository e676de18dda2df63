//! What a host knows of the projects that it runs something of: who is in them and what they may reach. Names are answered
//! and packets filtered by it, also when no server answers.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::kind::Egress;
use crate::{Cidr, Name, Uid};

/// The domain under which instances find each other: `APP.PROJECT.internal`. ICANN keeps it for private use.
pub const INTERNAL_DOMAIN: &str = "internal";

/// One instance of a project, whichever host it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedInstance {
    /// By which its NICs are known to be its own, where it has some.
    #[serde(default)]
    pub uid: Option<Uid>,
    pub app: Name,
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
    /// Its app's name leads to it.
    pub ready: bool,
    /// Its program was found to answer on IPv4 alone.
    #[serde(default)]
    pub only4: bool,
    /// Those of its ports that have a name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<NamedPort>,
}

/// A port by which an instance is found: `_NAME._tcp.APP.PROJECT.internal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedPort {
    pub name: Name,
    pub port: u16,
}

/// A project within a region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProjectNames {
    pub project: Name,
    #[serde(default)]
    pub egress: Egress,
    /// All of its apps, sorted, whether anything of them runs or not.
    pub apps: Vec<Name>,
    /// All of its instances that have addresses, sorted by those.
    pub instances: Vec<NamedInstance>,
}

/// What one host is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostNames {
    /// Version of this message's meaning.
    pub version: u32,
    pub revision: u64,
    /// The region of the servers that made it.
    pub region: Name,
    /// The networks from which all hosts of the region give addresses to instances.
    pub instances: Vec<Cidr>,
    /// Hosts, servers and gateways: no instance reaches these.
    pub infrastructure: Vec<Cidr>,
    /// The projects that this host has instances of, sorted by name.
    pub projects: Vec<Arc<ProjectNames>>,
}
