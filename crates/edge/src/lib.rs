//! The gateway: routing and balancing of requests from users to instances.
//!
//! A [`Gateway`] holds the newest routing table and serves listeners by it; [`follow`] keeps the table fresh from the
//! servers and on disk. Nothing on a request's path asks a server: with every server dead, and after a restart, the
//! gateway goes on with the table that it holds.
//!
//! How a request finds its instance: host and path choose a service ([`table`](self)), the balancer an instance of it
//! (healthy ones, the gateway's own zone first, fewest outstanding requests), and the proxy tries others when that
//! one can't be reached. What is safe to send twice is decided in one place, `proxy::Attempts`.
//!
//! Instances of a global app run in several regions. When this region has none that is well, a request is passed on to a
//! gateway of the nearest region that has ([`regions`](self)), over mTLS and once at most.
//!
//! Architecture invariant: this room knows routing tables, not kinds of resources, and no other engine.

mod backend;
mod balance;
mod body;
mod cache;
mod connections;
mod gateway;
mod headers;
mod health;
mod metrics;
mod problem;
mod proxy;
mod regions;
mod round_trips;
mod serve;
mod source;
mod table;
mod traffic;
mod tunnel;
mod upstream;

pub use gateway::{Gateway, Options};
pub use round_trips::measure;
pub use serve::PeerDoor;
pub use source::{SourceConfig, follow};
