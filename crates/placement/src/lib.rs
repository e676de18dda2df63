//! Placement: which host of a cell takes an instance.
//!
//! A [`Cell`] holds what is known about its hosts (state, capacity, what is reserved, cached images, load) and answers
//! two questions about a [`Request`]: *may* a host take it (the filters, in the fixed order of [`Filter`]) and *which*
//! host takes it best (the score, see [`score`]). A refusal counts the hosts by the first filter that turned them away,
//! so that a tenant can read why.
//!
//! Invariants kept here:
//! * a reservation beyond a host's capacity is refused ([`Cell::reserve`]), so nothing is oversold;
//! * a decision is a function of the calls made on the cell so far: no clock, no chance, no hash order;
//! * [`Cell::place`] finds a host whenever one is feasible, in the best spread tier, and its merit is at least
//!   [`score::GUARANTEE`] of what a scan of every host would find.
//!
//! Deliberately absent: I/O, clocks, async, names (ids are interned by the caller), and any memory of *who* holds a
//! reservation: the caller keeps that record, and [`Cell::audit`] recounts the cell against it.
//!
//! [`workload`] is the generator and the benchmark that the promised speed is measured with.

mod cell;
mod group;
mod hostset;
mod mix;
mod numa;
mod pool;
#[cfg(test)]
mod properties;
mod refusal;
pub mod score;
mod search;
pub mod telemetry;
mod types;
pub mod workload;

pub use cell::{Cell, CellTotals, Counts, Drift, HostSnapshot, ReserveError};
pub use refusal::{Crowded, Filter, Names, Numbers, Refusal, Shortfall, TooFar};
pub use score::Score;
pub use search::Decision;
pub use telemetry::Telemetry;
pub use types::{
    Capacity, ClassId, DomainId, FaultId, GroupId, HostId, HostSpec, HostState, HostUpdate, ImageId, LabelId, Load,
    MAX_NODES, Node, Nodes, RackId, Request, Runtime, Runtimes, Spread, SpreadLevel, UnknownHost, ZoneId,
};
