//! Tenants' networks: what a project owns of them. What hosts are told is made of these by the control plane (see
//! [`crate::plan::HostNetworks`]).
//!
//! A [`Network`] is a tenant's own, with addresses that it chooses; others may have the same. Its [`Subnet`]s are where [`Nic`]s
//! get their addresses; [`SecurityGroup`]s say who may talk to whom. Names are those of the same project and region.

mod base;
mod group;
mod nic;
mod subnet;

pub use base::*;
pub use group::*;
pub(super) use nic::validate_nics;
pub use nic::*;
use schemars::{Schema, SchemaGenerator, json_schema};
pub use subnet::*;

/// An IPv4 address in text, or nothing.
fn address4_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["string", "null"],
        "pattern": r"^((25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])\.){3}(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])$",
    })
}

/// An IPv6 address in text, or nothing. Some odd spellings of one do not match.
fn address6_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["string", "null"],
        "pattern": r"^(([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,6}:[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,5}(:[0-9a-f]{1,4}){1,2}|([0-9a-f]{1,4}:){1,4}(:[0-9a-f]{1,4}){1,3}|([0-9a-f]{1,4}:){1,2}(:[0-9a-f]{1,4}){1,5})$",
    })
}
