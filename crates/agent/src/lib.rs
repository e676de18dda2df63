//! The host daemon and the keeper of its processes.
//!
//! The daemon ([`run`]) pulls the host's plan from any server, keeps a copy on disk, and brings every instance of the
//! plan to what it says: fetch, plug in, start, watch, start again, stop, clear away. It reports what is true once a
//! second, and at once when that changes. Processes belong to the [`keeper`], so that the daemon can end, crash and be
//! replaced without ending one workload. Each container can ask who it is by the SPIFFE Workload API, on a socket of its
//! own.
//!
//! Architecture invariant: the daemon needs no server to go on. It acts on its last plan, and what it finds running is
//! taken over, never started again.

mod ahead;
mod board;
mod config;
mod connect;
mod daemon;
mod fabric;
mod flows;
mod handle;
mod health;
mod identity;
pub mod images;
mod inside;
pub mod keeper;
mod launch;
mod networks;
pub mod numa;
mod observer;
mod outcome;
mod parts;
mod plans;
mod plug;
mod relays;
mod report;
mod room;
mod secrets;
mod serve;
mod servers;
pub mod step;
mod targets;
mod telemetry;
mod told;
mod worker;

pub use config::{
    AgentConfig, AgentError, Authorize, Drops, Engines, FetchError, Identify, IdentityConfig, ImageFetcher,
    InstancePlug, NetworkEngine, NicAt, PlugError, Plugged, ProbeOf,
};
pub use daemon::run;
pub use handle::{AgentHandle, AgentSnapshot};
pub use plug::HostNetworksEngine;
pub use relays::Relays;
