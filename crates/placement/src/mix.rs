//! The mix of requests for NUMA nodes, learned from what was reserved, and what a host is worth to it.
//!
//! A host is worth the sum, over the shapes of the mix, of a shape's share times the square root of how many of it still
//! fit on the host. A request goes where it lowers that sum least: where it takes what few others could have used (cpu
//! behind a full memory, half of a pair whose other half is gone). This is the idea of descending the gradient of
//! fragmentation (Weng et al., "Beware of Fragmentation", USENIX ATC 2023), with the number of future requests in place of
//! idle GPUs. The root makes the last room for a shape dearer than the tenth.
//!
//! Values are kept, not computed at each decision: a table holds, for each shape and host, the fit term of the score, and
//! a change of a host renews its line. A decision reads one column. When the mix has grown by an eighth (and, of many
//! hosts, by a quarter of their number) a new table is made from it, some hosts with each reservation, and then takes
//! the place of the old one, so that no decision waits.

use crate::cell::Cell;
use crate::numa::{Free, MOST, Shape};
use crate::pool::NO_POOL;
use crate::score::{UNIT, WEIGHT_BALANCE, WEIGHT_FIT};
use crate::types::{Node, Nodes, Request};
use std::collections::BTreeMap;

/// Shapes counted; a new one takes over the count of the rarest (the "Space-Saving" rule of Metwally, Agrawal, El Abbadi,
/// "Efficient computation of frequent and top-k elements", ICDT 2005), so that any number of sizes can't grow the cell.
const COUNTED: usize = 64;
/// The most frequent ones, which the table is made of: the requests that it is measured with come in 15.
const SHAPES: usize = 24;
/// Counts are halved when they reach this sum, so that what was long ago weighs less.
const LONG_AGO: u64 = 1 << 16;
/// A table is made at first from so many reservations.
const FIRST: u64 = 16;
/// Lines of the next table that are computed with each reservation (some 50 us each) …
const AT_ONCE: u32 = 32;
/// … and hosts that are taken in: most have the same free as one before them, and get its line (some 200 ns).
const TAKEN_IN: u32 = 2048;
/// Lines that are remembered while a table is made, by what is free.
const ALIKE: usize = 1024;
/// A share of one.
const WHOLE: u64 = 1 << 16;
/// The root of one, in fixed point.
const ROOT: f64 = 256.0;
/// The worth of one of each shape: the loss at which a host gets half of the fit term's marks.
const ONE: u64 = WHOLE * ROOT as u64;

/// What is known of the requests that want NUMA nodes, and of the hosts that have some.
#[derive(Clone, Debug, Default)]
pub(crate) struct Topology {
    counts: BTreeMap<Shape, u64>,
    seen: u64,
    /// `seen` when the next table is begun.
    due: u64,
    table: Table,
    /// The next table, and how many hosts it has taken in.
    next: Option<(Table, u32)>,
    /// Ready hosts with several nodes.
    hosts: u32,
}

/// For each shape of a mix and each host by index, the fit term; 0 where the shape doesn't fit.
#[derive(Clone, Debug, Default)]
struct Table {
    mix: Vec<(Shape, u64)>,
    fits: Vec<Vec<u32>>,
    /// Square roots, by count.
    roots: Vec<u64>,
    /// While the table is made: lines, by what the hosts have free.
    alike: BTreeMap<Free, Vec<u32>>,
}

impl Table {
    fn new(counts: &BTreeMap<Shape, u64>) -> Table {
        let mut most: Vec<(u64, Shape)> = counts.iter().map(|(shape, n)| (*n, *shape)).collect();
        most.sort_unstable_by(|a, b| b.cmp(a));
        most.truncate(SHAPES);
        let sum: u64 = most.iter().map(|(n, _)| n).sum();
        let mix: Vec<_> = most.iter().map(|(n, shape)| (*shape, (n * WHOLE / sum.max(1)).max(1))).collect();
        // The root of a whole number is correctly rounded everywhere (IEEE 754).
        let roots = (0..=MOST).map(|n| (f64::from(n).sqrt() * ROOT) as u64).collect();
        Table { fits: vec![Vec::new(); mix.len()], mix, roots, alike: BTreeMap::new() }
    }

    fn column(&self, shape: Shape) -> Option<&[u32]> {
        let at = self.mix.iter().position(|(known, _)| *known == shape)?;
        Some(&self.fits[at])
    }

    fn worth(&self, free: &Free) -> u64 {
        self.mix.iter().map(|(shape, share)| share * self.roots[free.count(*shape) as usize]).sum()
    }

    /// The nodes that cost the mix least, and what they cost.
    fn cheapest(&self, free: &Free, shape: Shape) -> Option<(u64, Nodes)> {
        if !free.fits(shape) {
            return None;
        }
        let before = self.worth(free);
        let mut best: Option<(u64, Nodes)> = None;
        free.choices(shape, |nodes| {
            let loss = before.saturating_sub(self.worth(&free.after(shape, nodes)));
            if best.is_none_or(|(least, _)| loss < least) {
                best = Some((loss, nodes));
            }
        });
        best
    }

    fn fit(&self, free: Option<&Free>, shape: Shape) -> u32 {
        let loss = free.and_then(|free| self.cheapest(free, shape));
        loss.map_or(0, |(loss, _)| fit_term(loss))
    }

    fn set(&mut self, host: u32, free: Option<&Free>) {
        let line = self.line(free);
        write(&mut self.fits, host, &line);
    }

    /// The fit terms of a host, by shape.
    fn line(&self, free: Option<&Free>) -> Vec<u32> {
        self.mix.iter().map(|(shape, _)| self.fit(free, *shape)).collect()
    }

    /// Takes a host into a table that is being made. True if its line had to be computed.
    fn take_in(&mut self, host: u32, free: &Free) -> bool {
        if let Some(line) = self.alike.get(free) {
            write(&mut self.fits, host, line);
            return false;
        }
        let line = self.line(Some(free));
        write(&mut self.fits, host, &line);
        if self.alike.len() < ALIKE {
            self.alike.insert(*free, line);
        }
        true
    }
}

fn write(fits: &mut [Vec<u32>], host: u32, line: &[u32]) {
    for (column, fit) in fits.iter_mut().zip(line) {
        if column.len() <= host as usize {
            column.resize(host as usize + 1, 0);
        }
        column[host as usize] = *fit;
    }
}

/// The marks of fit and balance together, for what a request costs the mix; at least one.
fn fit_term(loss: u64) -> u32 {
    // Both factors are below 2^33, the quotient at most the first.
    let full = u64::from((WEIGHT_FIT + WEIGHT_BALANCE) * UNIT);
    ((full * ONE / (ONE + loss)) as u32).max(1)
}

impl Cell {
    /// What a ready host with several nodes has free on them.
    fn nodes_free(&self, host: u32) -> Option<Free> {
        let known = self.hosts.get(host as usize)?.as_ref()?;
        let hot = &self.hot[host as usize];
        if known.nodes.is_empty() || hot.place.pool == NO_POOL {
            return None;
        }
        Free::of(&known.nodes, Node { cpu: hot.cpu, memory: hot.memory })
    }

    /// Whether the request's parts have room on as many nodes. A host without several nodes is a single one.
    pub(crate) fn fits_nodes(&self, request: &Request, host: u32) -> bool {
        let Some(shape) = Shape::of(request) else { return true };
        let known = self.known(host);
        if !known.is_numa() || !known.pins {
            return shape.span == 1 && known.pins;
        }
        match self.topology.table.column(shape) {
            Some(column) => column.get(host as usize).is_some_and(|fit| *fit > 0),
            None => self.nodes_free(host).is_some_and(|free| free.fits(shape)),
        }
    }

    /// What each node of a host has free, and no more than the host has; a host without several is one node.
    pub(crate) fn free_by_node(&self, host: u32) -> Vec<Node> {
        let hot = &self.hot[host as usize];
        let whole = Node { cpu: hot.cpu, memory: hot.memory };
        let offered = self.known(host).nodes.iter().filter(|node| node.offered).map(|node| node.free());
        let free = offered.map(|n| Node { cpu: n.cpu.min(whole.cpu), memory: n.memory.min(whole.memory) });
        let free: Vec<Node> = free.collect();
        if free.is_empty() { vec![whole] } else { free }
    }

    /// How many more of a request its nodes have room for.
    pub(crate) fn room_on_nodes(&self, request: &Request, host: u32) -> u64 {
        let Some(shape) = Shape::of(request) else { return u64::MAX };
        match self.nodes_free(host) {
            _ if !self.known(host).pins => 0,
            Some(free) => u64::from(free.count(shape)),
            None if shape.span == 1 => u64::MAX,
            None => 0,
        }
    }

    /// The fit term of a host with several nodes, for a request that wants some. `None` of others.
    pub(crate) fn nodes_fit(&self, request: &Request, host: u32) -> Option<u32> {
        let shape = Shape::of(request)?;
        if !self.known(host).is_numa() {
            return None;
        }
        if let Some(column) = self.topology.table.column(shape) {
            return Some(column.get(host as usize).copied().unwrap_or(0));
        }
        let free = self.nodes_free(host).filter(|free| free.fits(shape));
        Some(free.map_or(0, |free| tightest(&free, shape).0.max(1)))
    }

    /// Which nodes of a host that has room a request should take. None on a host that is a single node.
    pub(crate) fn nodes_for(&self, request: &Request, host: u32) -> Nodes {
        let Some((shape, free)) = Shape::of(request).zip(self.nodes_free(host)) else { return Nodes::NONE };
        let table = &self.topology.table;
        match table.column(shape).and_then(|_| table.cheapest(&free, shape)) {
            Some((_, nodes)) => nodes,
            None => tightest(&free, shape).1,
        }
    }

    /// The hosts with several nodes on which a request's parts have room, with their fit terms, ascending by host.
    pub(crate) fn with_nodes<'a>(&'a self, request: &'a Request) -> impl Iterator<Item = (u32, u32)> + 'a {
        let shape = Shape::of(request).filter(|_| self.topology.hosts > 0);
        let column = shape.and_then(|shape| self.topology.table.column(shape));
        let known = column.into_iter().flatten().enumerate().map(|(host, fit)| (host as u32, *fit));
        let every = shape.filter(|_| column.is_none()).into_iter().flat_map(|_| self.live_hosts());
        let asked = every.filter_map(|(host, _)| Some((host, self.nodes_fit(request, host)?)));
        known.chain(asked).filter(|(_, fit)| *fit > 0)
    }

    /// Renews what the table says of a host.
    pub(crate) fn weigh_nodes(&mut self, host: u32) {
        if self.topology.hosts == 0 || !self.hosts[host as usize].as_ref().is_some_and(|h| h.is_numa()) {
            return;
        }
        let free = self.nodes_free(host);
        self.topology.table.set(host, free.as_ref());
        if let Some((next, done)) = &mut self.topology.next
            && host < *done
        {
            next.set(host, free.as_ref());
        }
    }

    /// Notes that a host with several nodes came to be ready, or ceased to be.
    pub(crate) fn count_numa(&mut self, ready: bool) {
        let hosts = &mut self.topology.hosts;
        *hosts = if ready { *hosts + 1 } else { hosts.saturating_sub(1) };
    }

    /// Counts a reservation into the mix, and goes on with the next table.
    pub(crate) fn learn(&mut self, request: &Request) {
        let Some(shape) = Shape::of(request) else { return };
        let topology = &mut self.topology;
        count(&mut topology.counts, shape);
        topology.seen += 1;
        if topology.seen >= LONG_AGO {
            topology.counts.retain(|_, n| {
                *n /= 2;
                *n > 0
            });
            topology.seen = topology.counts.values().sum();
            topology.due = topology.due.min(topology.seen);
        }
        if topology.hosts == 0 {
            return;
        }
        if topology.next.is_none() && topology.seen >= topology.due.max(FIRST) {
            // The more hosts, the more reservations share the work of a table; while little is known it is soon outdated.
            let shared = topology.seen.min(self.hosts.len() as u64 / 4);
            topology.due = topology.seen + (topology.seen / 8).max(shared).max(FIRST);
            topology.next = Some((Table::new(&topology.counts), 0));
        }
        let Some((mut next, done)) = topology.next.take() else { return };
        let (hosts, mut at, mut computed) = (self.hosts.len() as u32, done, 0);
        while at < hosts.min(done + TAKEN_IN) && computed < AT_ONCE {
            let free = self.nodes_free(at);
            computed += free.is_some_and(|free| next.take_in(at, &free)) as u32;
            at += 1;
        }
        if at == hosts {
            next.alike.clear();
            self.topology.table = next;
        } else {
            self.topology.next = Some((next, at));
        }
    }

    /// For [`Cell::audit`]: whether the table says of a host what would be computed now.
    pub(crate) fn nodes_are_weighed(&self, host: u32) -> bool {
        let table = &self.topology.table;
        let free = self.nodes_free(host);
        let said = |at: usize| table.fits[at].get(host as usize).copied().unwrap_or(0);
        table.mix.iter().enumerate().all(|(at, (shape, _))| said(at) == table.fit(free.as_ref(), *shape))
    }

    /// For [`Cell::audit`]: ready hosts with several nodes, as counted.
    pub(crate) fn numa_hosts(&self) -> u32 {
        self.topology.hosts
    }
}

fn count(counts: &mut BTreeMap<Shape, u64>, shape: Shape) {
    let mut before = 0;
    if counts.len() >= COUNTED
        && !counts.contains_key(&shape)
        && let Some((n, rarest)) = counts.iter().map(|(shape, n)| (*n, *shape)).min()
    {
        counts.remove(&rarest);
        before = n;
    }
    *counts.entry(shape).or_insert(before) += 1;
}

/// The choice of nodes for a shape that the mix doesn't know, with its fit term.
fn tightest(free: &Free, shape: Shape) -> (u32, Nodes) {
    let mut best = (0, Nodes::NONE);
    free.choices(shape, |nodes| {
        let fit = free.tightness(nodes, shape);
        if best.1.is_empty() || fit > best.0 {
            best = (fit, nodes);
        }
    });
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::*;

    #[test]
    fn a_cold_cell_has_its_first_table_soon_because_hosts_are_alike() {
        let mut cell = Cell::new();
        let node = Node { cpu: 8000, memory: 32 << 30 };
        for n in 0..20_000 {
            let nodes = vec![Node { cpu: node.cpu + n % 4 * 1000, ..node }, node];
            cell.add_host(HostSpec {
                zone: ZoneId(0),
                rack: RackId(n / 40),
                fault: FaultId(n / 40),
                state: HostState::Ready,
                runtimes: Runtimes::ALL,
                capacity: Capacity { cpu: nodes[0].cpu + node.cpu, memory: 64 << 30, scratch: 0, slots: 100 },
                classes: Vec::new(),
                images: Vec::new(),
                load: Load(0),
                storage: Vec::new(),
                labels: Vec::new(),
                rtt: None,
                nodes,
                pins: true,
            });
        }
        let mut held = Vec::new();
        for n in 0..32 {
            let mut request = Request { span: 1, ..Request::new(Runtime::Vm, 1000 + n % 3 * 500, 4 << 30) };
            // Where doesn't matter here: a decision without a table looks at each host.
            request.nodes = Nodes::NONE.with(n as usize % 2);
            cell.reserve(HostId(n * 600), &request).unwrap();
            held.push((HostId(n * 600), request));
        }
        assert_eq!(cell.topology.table.mix.len(), 3, "it took {} reservations", held.len());
        assert!(cell.topology.table.alike.is_empty());
        cell.audit(held.iter().map(|(host, request)| (*host, request))).unwrap();
    }

    #[test]
    fn any_number_of_sizes_is_counted_in_bounded_space_and_the_frequent_ones_stay() {
        let mut counts = BTreeMap::new();
        let shape = |n| Shape { span: 1, cpu: n, memory: 1 };
        for n in 0..10_000 {
            count(&mut counts, shape(1_000_000 + n));
            count(&mut counts, shape(n % 3));
        }
        assert_eq!(counts.len(), COUNTED);
        let table = Table::new(&counts);
        assert_eq!(table.mix.len(), SHAPES);
        assert!((0..3).all(|n| table.column(shape(n)).is_some()));
    }
}
