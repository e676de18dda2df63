//! The peers: rules that scan every host, under the same constraints.

use std::collections::{BTreeMap, BTreeSet};

use nexus_placement::{Node, Nodes};

use super::Place;
use super::data::{Host, Strategy, Vm};

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The first host, and of it the first node.
    FirstFit,
    /// The host that is left with the least of its dominant resource; the tightest nodes of it.
    BestFit,
    /// The node that is left with the least of its dominant resource (a VM on two: their sum).
    BestFitByNode,
    /// Kubernetes' `NodeResourcesFit` with `MostAllocated`: the mean of the percentages of cpu and memory in use; the tightest
    /// nodes of the host. Before the recording all of a host counts as free.
    MostAllocated,
}

impl Peer {
    pub const ALL: [Peer; 4] = [Peer::FirstFit, Peer::BestFit, Peer::BestFitByNode, Peer::MostAllocated];

    pub fn name(self) -> &'static str {
        match self {
            Peer::FirstFit => "first-fit",
            Peer::BestFit => "best-fit",
            Peer::BestFitByNode => "best-fit by node",
            Peer::MostAllocated => "MostAllocated",
        }
    }
}

type GroupKey = (Strategy, usize, u32);

/// Hosts as a peer keeps them.
pub struct State<'a> {
    peer: Peer,
    hosts: &'a [Host],
    free: Vec<Vec<Node>>,
    /// Where each group's members are.
    on: BTreeMap<GroupKey, BTreeSet<usize>>,
    /// Which domain of a group a rack holds.
    racks: BTreeMap<(GroupKey, u32), u32>,
}

impl<'a> State<'a> {
    pub fn new(hosts: &'a [Host], peer: Peer) -> Self {
        let free = hosts.iter().map(|host| host.nodes.clone()).collect();
        State { peer, hosts, free, on: BTreeMap::new(), racks: BTreeMap::new() }
    }

    pub fn place(&mut self, vm: &Vm, round: usize) -> Place {
        let key = vm.group.map(|group| (vm.strategy, round, group));
        let mut best: Option<((u64, u64), usize, Nodes)> = None;
        for host in 0..self.hosts.len() {
            if !key.is_none_or(|key| self.allowed(key, vm, host)) {
                continue;
            }
            for nodes in self.choices(vm, host) {
                let cost = self.cost(vm, host, nodes);
                if best.is_none_or(|(least, ..)| cost < least) {
                    best = Some((cost, host, nodes));
                }
            }
            if self.peer == Peer::FirstFit && best.is_some() {
                break;
            }
        }
        let (_, host, nodes) = best?;
        for at in nodes.iter() {
            self.free[host][at].cpu -= part(vm).cpu;
            self.free[host][at].memory -= part(vm).memory;
        }
        if let Some(key) = key {
            self.on.entry(key).or_default().insert(host);
            self.racks.insert((key, self.hosts[host].rack), vm.domain);
        }
        Some((host, nodes))
    }

    fn allowed(&self, key: GroupKey, vm: &Vm, host: usize) -> bool {
        let on = self.on.get(&key);
        match vm.strategy {
            Strategy::None => true,
            Strategy::Affinity => on.is_none_or(|on| on.contains(&host)),
            Strategy::AntiAffinity => on.is_none_or(|on| !on.contains(&host)),
            Strategy::FaultDomain => self.racks.get(&(key, self.hosts[host].rack)).is_none_or(|d| *d == vm.domain),
        }
    }

    /// The sets of a host's nodes that have room.
    fn choices(&self, vm: &Vm, host: usize) -> impl Iterator<Item = Nodes> + use<> {
        let part = part(vm);
        let has = |node: &Node| node.cpu >= part.cpu && node.memory >= part.memory;
        let able = self.free[host].iter().enumerate().filter(|(_, node)| has(node));
        let able = able.fold(Nodes::NONE, |set, (at, _)| set.with(at));
        let all = (vm.span > 1 && able.len() >= usize::from(vm.span)).then_some(able);
        let single = if vm.span == 1 { able } else { Nodes::NONE };
        single.iter().map(|at| Nodes::NONE.with(at)).chain(all)
    }

    /// Thousandths of what is left over, the least first; then of the nodes alone.
    fn cost(&self, vm: &Vm, host: usize, nodes: Nodes) -> (u64, u64) {
        let part = part(vm);
        let (free, had) = (&self.free[host], &self.hosts[host].nodes);
        let left = |at: usize| {
            let takes = if nodes.has(at) { part } else { Node::default() };
            (u64::from(free[at].cpu - takes.cpu), free[at].memory - takes.memory)
        };
        let share = |left: u64, of: u64, whole: u64| left * whole / of.max(1);
        let by_node = nodes.iter().map(|at| {
            let (cpu, memory) = left(at);
            share(cpu, had[at].cpu.into(), 1000).max(share(memory >> 20, had[at].memory >> 20, 1000))
        });
        let by_node = by_node.sum::<u64>();
        let sum = |of: &dyn Fn(usize) -> u64| (0..had.len()).map(of).sum::<u64>();
        let cpu = |whole| share(sum(&|at| left(at).0), sum(&|at| had[at].cpu.into()), whole);
        let memory = |whole| share(sum(&|at| left(at).1 >> 20), sum(&|at| had[at].memory >> 20), whole);
        match self.peer {
            Peer::FirstFit => (0, 0),
            Peer::BestFit => (cpu(1000).max(memory(1000)), by_node),
            Peer::BestFitByNode => (by_node, 0),
            Peer::MostAllocated => ((cpu(100) + memory(100)) / 2, by_node),
        }
    }
}

fn part(vm: &Vm) -> Node {
    let span = u32::from(vm.span);
    Node { cpu: vm.cpu.div_ceil(span), memory: vm.memory.div_ceil(u64::from(span)) }
}
