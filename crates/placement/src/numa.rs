//! NUMA nodes: what each has, what is reserved on it, and which of them take a request.
//!
//! A request that spans n nodes takes an equal part of each of n nodes and is booked on them; which ones is said by the
//! reservation ([`Request::nodes`]), because the cell doesn't remember who holds what. A request without a wish floats: it
//! is booked on the host alone, as on a host without nodes. Both are kept apart soundly without deciding where a floating
//! one runs: as long as no node is booked beyond what it has, nor the host beyond what it has, the floating ones, cut at
//! will, fit in what the nodes have left.

use crate::cell::{Host, ReserveError};
use crate::refusal::Filter;
use crate::score::{fraction, packing};
use crate::types::{HostId, MAX_NODES, Node, Nodes, Request};

/// One node of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeUse {
    pub(crate) capacity: Node,
    /// Whether the host (still) says that it has this node.
    pub(crate) offered: bool,
    /// Reserved, wider than [`Node`] as `adopt` can't be refused.
    pub(crate) cpu: u64,
    pub(crate) memory: u128,
}

impl NodeUse {
    pub(crate) fn free(&self) -> Node {
        Node {
            cpu: u32::try_from(u64::from(self.capacity.cpu).saturating_sub(self.cpu)).unwrap_or(0),
            memory: u64::try_from(u128::from(self.capacity.memory).saturating_sub(self.memory)).unwrap_or(0),
        }
    }

    pub(crate) fn oversold(&self) -> bool {
        self.cpu > u64::from(self.capacity.cpu) || self.memory > u128::from(self.capacity.memory)
    }
}

/// Sets the nodes of a host, keeping what is reserved on them. A single node is none.
pub(crate) fn set_nodes(nodes: &mut Vec<NodeUse>, offered: &[Node]) {
    let offered = if offered.len() < 2 { &[] } else { &offered[..offered.len().min(MAX_NODES)] };
    nodes.resize(nodes.len().max(offered.len()), NodeUse::default());
    for (at, node) in nodes.iter_mut().enumerate() {
        node.offered = at < offered.len();
        node.capacity = offered.get(at).copied().unwrap_or_default();
    }
    forget_idle(nodes);
}

/// Drops nodes at the end that the host no longer has, once nothing is reserved there.
fn forget_idle(nodes: &mut Vec<NodeUse>) {
    while nodes.last().is_some_and(|node| !node.offered && node.cpu == 0 && node.memory == 0) {
        nodes.pop();
    }
}

/// What a request takes of each of its nodes.
pub(crate) fn part(request: &Request) -> Node {
    let span = u32::from(request.span.max(1));
    Node { cpu: request.cpu.div_ceil(span), memory: request.memory.div_ceil(u64::from(span)) }
}

/// The nodes on which a reservation for the request is booked.
pub(crate) fn named(request: &Request) -> Nodes {
    if request.span == 0 { Nodes::NONE } else { request.nodes }
}

/// Whether the nodes that a request names are as many as it spans, and have room.
pub(crate) fn check(id: HostId, host: &Host, request: &Request) -> Result<(), ReserveError> {
    if request.span == 0 {
        return Ok(());
    }
    let wanted = if host.is_numa() { usize::from(request.span) } else { 0 };
    let offered = request.nodes.iter().all(|at| host.nodes.get(at).is_some_and(|node| node.offered));
    if request.nodes.len() != wanted || !offered || !host.is_numa() && request.span > 1 {
        return Err(ReserveError::Nodes { host: id, span: request.span, named: request.nodes.len() });
    }
    let part = part(request);
    for node in request.nodes.iter().map(|at| host.nodes[at].free()) {
        let exceeds = |wanted, free| ReserveError::Exceeds { host: id, resource: Filter::Numa, wanted, free };
        if node.cpu < part.cpu {
            return Err(exceeds(part.cpu.into(), node.cpu.into()));
        }
        if node.memory < part.memory {
            return Err(exceeds(part.memory, node.memory));
        }
    }
    Ok(())
}

/// Whether so much is reserved on the nodes that the request names.
pub(crate) fn holds(nodes: &[NodeUse], request: &Request) -> bool {
    let part = part(request);
    let held = |node: &NodeUse| node.cpu >= part.cpu.into() && node.memory >= part.memory.into();
    named(request).iter().all(|at| nodes.get(at).is_some_and(held))
}

/// Books a request on the nodes that it names.
pub(crate) fn take(nodes: &mut Vec<NodeUse>, request: &Request) {
    let part = part(request);
    for at in named(request).iter() {
        // Only `adopt` names a node that the host doesn't have.
        nodes.resize(nodes.len().max(at + 1), NodeUse::default());
        nodes[at].cpu += u64::from(part.cpu);
        nodes[at].memory += u128::from(part.memory);
    }
}

/// Takes a request off the nodes that it names; the caller has checked [`holds`].
pub(crate) fn give_back(nodes: &mut Vec<NodeUse>, request: &Request) {
    let part = part(request);
    for at in named(request).iter() {
        nodes[at].cpu -= u64::from(part.cpu);
        nodes[at].memory -= u128::from(part.memory);
    }
    forget_idle(nodes);
}

/// What requests that want the same of nodes have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shape {
    pub(crate) span: u8,
    /// Of each node.
    pub(crate) cpu: u32,
    pub(crate) memory: u64,
}

impl Shape {
    /// The request's shape, if it has a wish.
    pub(crate) fn of(request: &Request) -> Option<Shape> {
        let part = part(request);
        (request.span > 0).then_some(Shape { span: request.span, cpu: part.cpu, memory: part.memory })
    }
}

/// More than this many of a shape on one host count as so many.
pub(crate) const MOST: u32 = 255;

/// What a host with several nodes has free. Hosts with the same are worth the same to any mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Free {
    nodes: [Node; MAX_NODES],
    capacity: [Node; MAX_NODES],
    len: usize,
    /// Of the whole host: less than the nodes' sum while floating requests run there.
    whole: Node,
}

impl Free {
    /// `None` of a host that is a single node.
    pub(crate) fn of(nodes: &[NodeUse], whole: Node) -> Option<Free> {
        let none = [Node::default(); MAX_NODES];
        let mut free = Free { nodes: none, capacity: none, len: 0, whole };
        for node in nodes.iter().take(MAX_NODES).take_while(|node| node.offered) {
            free.nodes[free.len] = node.free();
            free.capacity[free.len] = node.capacity;
            free.len += 1;
        }
        (free.len > 1).then_some(free)
    }

    /// How many of a shape fit, one after the other, at most [`MOST`].
    pub(crate) fn count(&self, shape: Shape) -> u32 {
        let times = |node: &Node, span: u64| {
            let cpu = u64::from(node.cpu).checked_div(u64::from(shape.cpu) * span);
            let memory = node.memory.checked_div(shape.memory.saturating_mul(span));
            cpu.unwrap_or(u64::MAX).min(memory.unwrap_or(u64::MAX)).min(u64::from(MOST)) as u32
        };
        let span = u32::from(shape.span.max(1));
        let mut each = [0; MAX_NODES];
        for (at, node) in self.nodes[..self.len].iter().enumerate() {
            each[at] = times(node, 1);
        }
        let sum: u32 = each.iter().sum();
        let mut most = (sum / span).min(times(&self.whole, u64::from(span)));
        // So many fit if no node is needed more than once by one of them (McNaughton's wrap-around rule).
        while span > 1 && most > 0 {
            let usable: u32 = each.iter().map(|n| (*n).min(most)).sum();
            if usable >= span * most {
                break;
            }
            most = usable / span;
        }
        most.min(MOST)
    }

    fn has(&self, at: usize, shape: Shape) -> bool {
        self.nodes[at].cpu >= shape.cpu && self.nodes[at].memory >= shape.memory
    }

    /// Whether one of a shape fits.
    pub(crate) fn fits(&self, shape: Shape) -> bool {
        let span = u64::from(shape.span);
        u64::from(self.whole.cpu) >= u64::from(shape.cpu) * span
            && self.whole.memory >= shape.memory.saturating_mul(span)
            && (0..self.len).filter(|at| self.has(*at, shape)).count() >= usize::from(shape.span)
    }

    /// The sets of nodes worth comparing for a shape that fits: each node for a span of one; beyond, the tightest so many,
    /// or those with the next one in the place of any of them.
    pub(crate) fn choices(&self, shape: Shape, mut offer: impl FnMut(Nodes)) {
        let span = usize::from(shape.span);
        if span == 1 {
            (0..self.len).filter(|at| self.has(*at, shape)).for_each(|at| offer(Nodes::NONE.with(at)));
            return;
        }
        let mut able = [0usize; MAX_NODES];
        let mut found = 0;
        for at in (0..self.len).filter(|at| self.has(*at, shape)) {
            able[found] = at;
            found += 1;
        }
        able[..found].sort_by_key(|at| (self.tightness(Nodes::NONE.with(*at), shape) ^ u32::MAX, *at));
        let set = able[..found.min(span + 1)].iter().fold(Nodes::NONE, |set, at| set.with(*at));
        if set.len() <= span {
            offer(set);
        } else {
            able[..span + 1].iter().for_each(|at| offer(set.without(*at)));
        }
    }

    /// What is left when a shape has taken its parts of some nodes.
    pub(crate) fn after(&self, shape: Shape, nodes: Nodes) -> Free {
        let mut left = *self;
        for at in nodes.iter().take_while(|at| *at < self.len) {
            left.nodes[at].cpu = left.nodes[at].cpu.saturating_sub(shape.cpu);
            left.nodes[at].memory = left.nodes[at].memory.saturating_sub(shape.memory);
            left.whole.cpu = left.whole.cpu.saturating_sub(shape.cpu);
            left.whole.memory = left.whole.memory.saturating_sub(shape.memory);
        }
        left
    }

    /// [`packing`] of what the nodes have left of themselves: how they are chosen for a shape that is not known yet.
    pub(crate) fn tightness(&self, nodes: Nodes, shape: Shape) -> u32 {
        let (mut left, mut of) = ((0, 0), (0, 0));
        for at in nodes.iter() {
            left.0 += u64::from(self.nodes[at].cpu.saturating_sub(shape.cpu));
            left.1 += self.nodes[at].memory.saturating_sub(shape.memory);
            of.0 += u64::from(self.capacity[at].cpu);
            of.1 += self.capacity[at].memory;
        }
        packing(fraction(left.0, of.0.max(1)), fraction(left.1, of.1.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn free(nodes: &[(u32, u64)]) -> Free {
        let nodes: Vec<NodeUse> = nodes
            .iter()
            .map(|(cpu, memory)| NodeUse {
                capacity: Node { cpu: *cpu, memory: *memory },
                offered: true,
                ..NodeUse::default()
            })
            .collect();
        let whole = nodes.iter().fold(Node::default(), |sum, node| Node {
            cpu: sum.cpu + node.capacity.cpu,
            memory: sum.memory + node.capacity.memory,
        });
        Free::of(&nodes, whole).expect("several nodes")
    }

    #[test]
    fn counts_what_fits_on_single_nodes_and_across() {
        let host = free(&[(8, 16), (4, 32), (2, 2)]);
        assert_eq!(host.count(Shape { span: 1, cpu: 2, memory: 4 }), 4 + 2);
        assert_eq!(host.count(Shape { span: 2, cpu: 2, memory: 4 }), 2);
        assert_eq!(host.count(Shape { span: 3, cpu: 1, memory: 1 }), 2);
        assert_eq!(host.count(Shape { span: 4, cpu: 1, memory: 1 }), 0);
        assert_eq!(host.count(Shape { span: 1, cpu: 0, memory: 0 }), MOST);
    }

    proptest! {
        #[test]
        fn the_count_is_what_can_be_taken_one_after_the_other_and_no_less(
            nodes in prop::collection::vec((0u32..9, 0u64..9), 2..5), span in 1u8..4, cpu in 1u32..4, memory in 1u64..4,
        ) {
            let shape = Shape { span, cpu, memory };
            let mut host = free(&nodes);
            let count = host.count(shape);
            prop_assert_eq!(count > 0, host.fits(shape));
            // The fullest stay for last: the wrap-around rule, by always taking from the nodes with most room.
            let mut taken = 0;
            while host.fits(shape) {
                let room = |at: &usize| (host.nodes[*at].cpu / cpu).min((host.nodes[*at].memory / memory) as u32);
                let mut by_room: Vec<usize> = (0..host.len).filter(|at| host.has(*at, shape)).collect();
                by_room.sort_by_key(|at| std::cmp::Reverse(room(at)));
                let nodes = by_room[..usize::from(span)].iter().fold(Nodes::NONE, |set, at| set.with(*at));
                host = host.after(shape, nodes);
                taken += 1;
            }
            prop_assert_eq!(count, taken);
        }
    }
}
