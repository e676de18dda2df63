//! Tenants' networks on one host: for each a namespace of its own, in which everything is routed and filtered.
//!
//! ```text
//! instance's namespace        network's namespace                                 host's namespace
//! nic0 10.0.0.5/32 ══ veth ══ nxn…   lo: gateways of all subnets
//!   default via gateway       vx ─── VXLAN ────────────────────────────────────── UDP 4789 on the underlay
//!                             up ════ veth ══════════════════════════════════════ nxu…  NAT, floating addresses
//!                             np… ═══ veth to a peered network's namespace
//! ```
//!
//! Tenants may have the same addresses: what tells them apart is the namespace, with its own routes, its own connection
//! tracking and its own packet filter, and on the wire the VXLAN network identifier. Nothing is flooded and nothing is learned:
//! neighbours, forwarding entries and routes come from the plan ([`nexus_model::plan::HostNetworks`]).
//!
//! This is the one place where eBPF programs could take over later: they would take the same plan and stand on the same links,
//! first of all on those of the [fast path](fast_path).

pub mod able;
mod announce;
pub mod answer;
pub mod capture;
pub mod counters;
pub mod drops;
mod engine;
mod fast_path;
mod filter;
pub mod flows;
mod hand;
pub mod health;
mod inside;
pub mod links;
mod network;
mod outside;
pub mod probe;
pub mod relay;
pub mod rules;
pub mod text;
pub mod verdict;
mod want;

pub use engine::{Applied, Engine};
pub use hand::Difference;
