//! Ways to choose a host, to compare the engine with on the same run. All share the engine's filters, and differ in
//! how they look for a host and which they prefer.

use crate::types::{HostId, Request};
use crate::{Capacity, Cell};

/// How a host is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// This crate: [`Cell::place`].
    Indexed,
    /// This crate's score by a scan of every host.
    Exhaustive,
    /// The first host that passes the filters.
    FirstFit,
    /// A scan for the host that is left with the least of its dominant resource.
    BestFit,
    /// The rule of the Kubernetes scheduler's `NodeResourcesFit` plugin with strategy `MostAllocated`: the mean of the
    /// requested percentages of cpu and memory, over every feasible host. (Kubernetes itself samples hosts in cells of
    /// this size, by `percentageOfNodesToScore`; a scan is the best that its rule can do.)
    MostAllocated,
}

impl Strategy {
    /// The strategy's name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Indexed => "indexed",
            Strategy::Exhaustive => "exhaustive",
            Strategy::FirstFit => "first-fit",
            Strategy::BestFit => "best-fit",
            Strategy::MostAllocated => "most-allocated",
        }
    }

    /// Chooses a host, or none.
    pub fn decide(self, cell: &Cell, request: &Request) -> Option<HostId> {
        match self {
            Strategy::Indexed => cell.place(request).ok().map(|d| d.host),
            Strategy::Exhaustive => cell.place_exhaustive(request).ok().map(|d| d.host),
            Strategy::FirstFit => cell.feasible(request).next(),
            Strategy::BestFit => best_by(cell, request, |host| {
                let left =
                    |free: u64, want: u64, of: u64| (u128::from(free - want) * 1000 / u128::from(of.max(1))) as i64;
                let cpu = left(host.free.cpu.into(), request.cpu.into(), host.capacity.cpu.into());
                -cpu.max(left(host.free.memory, request.memory, host.capacity.memory))
            }),
            Strategy::MostAllocated => best_by(cell, request, |host| {
                let used =
                    |free: u64, want: u64, of: u64| (u128::from(of - free + want) * 100 / u128::from(of.max(1))) as i64;
                let cpu = used(host.free.cpu.into(), request.cpu.into(), host.capacity.cpu.into());
                (cpu + used(host.free.memory, request.memory, host.capacity.memory)) / 2
            }),
        }
    }
}

struct Sizes {
    capacity: Capacity,
    free: Capacity,
}

fn best_by(cell: &Cell, request: &Request, score: impl Fn(Sizes) -> i64) -> Option<HostId> {
    let mut best: Option<(i64, HostId)> = None;
    for host in cell.feasible(request) {
        let (capacity, free) = cell.sizes(host).expect("feasible hosts are in the cell");
        let score = score(Sizes { capacity, free });
        if best.is_none_or(|(seen, _)| score > seen) {
            best = Some((score, host));
        }
    }
    best.map(|(_, host)| host)
}
