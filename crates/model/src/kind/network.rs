//! Tenants' networks: what a project owns of them. What hosts are told is made of these by the control plane (see
//! [`crate::plan::HostNetworks`]).
//!
//! A [`Network`] is a tenant's own, with addresses that it chooses; others may have the same. Its [`Subnet`]s are where [`Nic`]s
//! get their addresses; [`SecurityGroup`]s say who may talk to whom. Names are those of the same project and region.

mod balancer;
mod base;
mod floating;
mod gateways;
mod group;
mod nic;
mod peering;
mod prefixes;
mod routes;
mod subnet;
mod zone;

pub use balancer::*;
pub use base::*;
pub use floating::*;
pub use gateways::*;
pub use group::*;
pub(super) use nic::validate_nics;
pub use nic::*;
pub use peering::*;
pub use prefixes::*;
pub use routes::*;
use schemars::{Schema, SchemaGenerator, json_schema};
pub use subnet::*;
pub use zone::*;

const PATTERN4: &str = r"((25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])\.){3}(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])";
/// Some odd spellings of an address do not match.
const PATTERN6: &str = concat!(
    r"(([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,6}:[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,5}(:[0-9a-f]{1,4}){1,2}",
    r"|([0-9a-f]{1,4}:){1,4}(:[0-9a-f]{1,4}){1,3}|([0-9a-f]{1,4}:){1,2}(:[0-9a-f]{1,4}){1,5})",
);

/// An IPv4 address in text, or nothing.
fn address4_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["string", "null"], "pattern": format!("^{PATTERN4}$")})
}

/// An address of either family in text, or nothing.
fn address_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["string", "null"], "pattern": format!("^({PATTERN4}|{PATTERN6})$")})
}

/// Some IPv4 addresses.
fn address4_items(_: &mut SchemaGenerator) -> Schema {
    let item = json_schema!({"type": "string", "pattern": format!("^{PATTERN4}$")});
    json_schema!({"type": "array", "items": item, "minItems": 1, "maxItems": 16})
}

/// Some IPv6 addresses.
fn address6_items(_: &mut SchemaGenerator) -> Schema {
    let item = json_schema!({"type": "string", "pattern": format!("^{PATTERN6}$")});
    json_schema!({"type": "array", "items": item, "minItems": 1, "maxItems": 16})
}

/// An IPv6 address in text, or nothing.
fn address6_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["string", "null"], "pattern": format!("^{PATTERN6}$")})
}
