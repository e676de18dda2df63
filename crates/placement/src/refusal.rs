//! Why no host can take a request, in numbers that a tenant can read.
//!
//! Each host is counted once, at the first filter of [`Filter::ALL`] that turned it away, so the counts add up to the
//! number of hosts.

use crate::types::{ClassId, GroupId, LabelId, Node};
use std::fmt;

/// The filters, in the order in which they are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Filter {
    /// The host is not ready (joining, cordoned, suspect or dead).
    Ready,
    /// It does not offer the runtime.
    Runtime,
    /// It has too few free units of a compute class.
    Class,
    Cpu,
    Memory,
    Scratch,
    /// It has too little of a storage class.
    Storage,
    /// It runs as many instances as it may.
    Slots,
    /// Too few of its NUMA nodes have room for their part, or it can't keep an instance to a node.
    Numa,
    /// It is not in a zone that was asked for.
    Zone,
    /// It lacks a label.
    Label,
    /// No gateway is as near as was asked for.
    Latency,
    /// The request excludes it by name.
    Excluded,
    /// It holds nothing of a group that the request is to be with.
    With,
    /// It holds some of a group that the request is not to be with.
    Without,
    /// The group is on another host, and is to stay together.
    Together,
    /// Its rack holds members of another fault domain of the group.
    Domain,
    /// It holds as many of the group as one host may.
    PerHost,
    /// Required spread: its domain holds more of the group than another one.
    Spread,
}

impl Filter {
    /// All filters, in order.
    pub const ALL: [Filter; 19] = [
        Filter::Ready,
        Filter::Runtime,
        Filter::Class,
        Filter::Cpu,
        Filter::Memory,
        Filter::Scratch,
        Filter::Storage,
        Filter::Slots,
        Filter::Numa,
        Filter::Zone,
        Filter::Label,
        Filter::Latency,
        Filter::Excluded,
        Filter::With,
        Filter::Without,
        Filter::Together,
        Filter::Domain,
        Filter::PerHost,
        Filter::Spread,
    ];

    /// A stable lower-case name, for metrics and conditions.
    pub const fn name(self) -> &'static str {
        match self {
            Filter::Ready => "ready",
            Filter::Runtime => "runtime",
            Filter::Class => "class",
            Filter::Cpu => "cpu",
            Filter::Memory => "memory",
            Filter::Scratch => "scratch",
            Filter::Storage => "storage",
            Filter::Slots => "slots",
            Filter::Numa => "numa",
            Filter::Zone => "zone",
            Filter::Label => "label",
            Filter::Latency => "latency",
            Filter::Excluded => "excluded",
            Filter::With => "with",
            Filter::Without => "without",
            Filter::Together => "together",
            Filter::Domain => "domain",
            Filter::PerHost => "per-host",
            Filter::Spread => "spread",
        }
    }
}

/// What the hosts that one filter turned away lacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// [`Filter::Class`], [`Filter::Cpu`], [`Filter::Memory`], [`Filter::Scratch`] or [`Filter::Storage`].
    pub filter: Filter,
    /// Which class, when it is a class.
    pub class: Option<ClassId>,
    /// What the request wants, in the filter's unit.
    pub wanted: u64,
    /// The most that any host turned away by this filter has free.
    pub most_free: u64,
}

/// What the hosts were like that were too far from every gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFar {
    /// Microseconds; as asked for, exclusive.
    pub below: u32,
    /// The lowest round trip measured of any of them.
    pub lowest: Option<u32>,
    /// Hosts of which none has been measured.
    pub unmeasured: u32,
}

/// What the hosts' NUMA nodes were like that had no room for a part of the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crowded {
    /// On so many nodes of a host.
    pub span: u8,
    /// Of each node.
    pub wanted: Node,
    /// The most that any node has free, of each by itself.
    pub most: Node,
    /// The most memory free on a node that has the cpu.
    pub memory_with_cpu: Option<u64>,
    /// Hosts that can't keep an instance to a node at all.
    pub unpinned: u32,
}

impl Crowded {
    pub(crate) fn of(span: u8, wanted: Node, free: &[Node]) -> Self {
        let most = |of: fn(&Node) -> u64| free.iter().map(of).max().unwrap_or(0);
        Crowded {
            span,
            wanted,
            most: Node { cpu: most(|n| n.cpu.into()) as u32, memory: most(|n| n.memory) },
            memory_with_cpu: free.iter().filter(|n| n.cpu >= wanted.cpu).map(|n| n.memory).max(),
            unpinned: 0,
        }
    }

    fn merge(&mut self, other: Crowded) {
        self.most.cpu = self.most.cpu.max(other.most.cpu);
        self.most.memory = self.most.memory.max(other.most.memory);
        self.memory_with_cpu = self.memory_with_cpu.max(other.memory_with_cpu);
        self.unpinned += other.unpinned;
    }

    /// What came nearest.
    fn nearest(&self) -> String {
        let (wanted, most) = (self.wanted, self.most);
        match self.memory_with_cpu {
            _ if most.cpu < wanted.cpu => {
                format!("no node has more than {} free, {} wanted", cpus(most.cpu), cpus(wanted.cpu))
            }
            _ if most.memory < wanted.memory => {
                format!("no node has more than {} of memory free, {} wanted", bytes(most.memory), bytes(wanted.memory))
            }
            Some(memory) if memory < wanted.memory => {
                let (cpu, free, memory) = (cpus(wanted.cpu), bytes(memory), bytes(wanted.memory));
                format!("no node with {cpu} free has more than {free} of memory free, {memory} wanted")
            }
            _ => format!("room on {} nodes of one host wanted", self.span),
        }
    }
}

/// What a description calls things that the caller has interned.
pub trait Names {
    fn class(&self, id: ClassId) -> String {
        format!("class #{}", id.0)
    }
    fn label(&self, id: LabelId) -> String {
        format!("label #{}", id.0)
    }
    fn group(&self, id: GroupId) -> String {
        format!("group #{}", id.0)
    }
}

/// Names nothing: things are called by their numbers.
#[derive(Debug)]
pub struct Numbers;

impl Names for Numbers {}

/// No host of the cell can take the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Hosts in the cell.
    pub total: u32,
    counts: Box<[u32; Filter::ALL.len()]>,
    /// One per kind of resource that was short, in the order of the filters.
    pub shortfalls: Vec<Shortfall>,
    /// When [`Filter::Latency`] turned hosts away.
    pub too_far: Option<TooFar>,
    /// When [`Filter::Numa`] did.
    pub crowded: Option<Box<Crowded>>,
    /// The labels that hosts were turned away for, in order, with how many lacked each.
    pub labels: Vec<(LabelId, u32)>,
    /// The groups that hosts were turned away for by [`Filter::With`] and [`Filter::Without`], likewise.
    pub groups: Vec<(Filter, GroupId, u32)>,
}

impl Refusal {
    pub(crate) fn new(total: u32) -> Self {
        Refusal {
            total,
            counts: Box::new([0; Filter::ALL.len()]),
            shortfalls: Vec::new(),
            too_far: None,
            crowded: None,
            labels: Vec::new(),
            groups: Vec::new(),
        }
    }

    pub(crate) fn count(&mut self, filter: Filter, hosts: u32) {
        self.counts[filter as usize] += hosts;
    }

    /// Notes that a host turned away by a resource filter had `free` of it.
    pub(crate) fn lacking(&mut self, filter: Filter, class: Option<ClassId>, wanted: u64, free: u64) {
        match self.shortfalls.iter_mut().find(|s| s.filter == filter && s.class == class) {
            Some(seen) => seen.most_free = seen.most_free.max(free),
            None => self.shortfalls.push(Shortfall { filter, class, wanted, most_free: free }),
        }
    }

    /// Notes that a host was too far from every gateway.
    pub(crate) fn far(&mut self, below: u32, rtt: Option<u32>) {
        self.farther(TooFar { below, lowest: rtt, unmeasured: u32::from(rtt.is_none()) });
    }

    fn farther(&mut self, other: TooFar) {
        let seen = self.too_far.get_or_insert(TooFar { unmeasured: 0, ..other });
        seen.lowest = seen.lowest.into_iter().chain(other.lowest).min();
        seen.unmeasured += other.unmeasured;
    }

    pub(crate) fn crowd(&mut self, other: Crowded) {
        match &mut self.crowded {
            Some(seen) => seen.merge(other),
            none => *none = Some(Box::new(other)),
        }
    }

    pub(crate) fn unlabelled(&mut self, label: LabelId, hosts: u32) {
        match self.labels.iter_mut().find(|(id, _)| *id == label) {
            Some((_, n)) => *n += hosts,
            None => self.labels.push((label, hosts)),
        }
    }

    pub(crate) fn company(&mut self, filter: Filter, group: GroupId, hosts: u32) {
        match self.groups.iter_mut().find(|(f, id, _)| (*f, *id) == (filter, group)) {
            Some((.., n)) => *n += hosts,
            None => self.groups.push((filter, group, hosts)),
        }
    }

    /// The most free seen so far among hosts turned away by `filter`, if any was.
    pub(crate) fn most_free(&self, filter: Filter) -> Option<u64> {
        self.shortfalls.iter().find(|s| s.filter == filter).map(|s| s.most_free)
    }

    pub(crate) fn finish(mut self) -> Self {
        self.shortfalls.sort_by_key(|s| (s.filter, s.class));
        self.labels.sort_unstable();
        self.groups.sort_unstable();
        self
    }

    /// The refusals of several cells as one: counts add up, and the most free of any cell counts. `None` of none.
    pub fn merged(refusals: &[Refusal]) -> Option<Refusal> {
        let (first, rest) = refusals.split_first()?;
        let mut all = first.clone();
        for refusal in rest {
            all.total += refusal.total;
            for (filter, hosts) in refusal.per_filter() {
                all.count(filter, hosts);
            }
            for s in &refusal.shortfalls {
                all.lacking(s.filter, s.class, s.wanted, s.most_free);
            }
            refusal.too_far.into_iter().for_each(|far| all.farther(far));
            refusal.crowded.iter().for_each(|crowded| all.crowd(**crowded));
            refusal.labels.iter().for_each(|(label, n)| all.unlabelled(*label, *n));
            refusal.groups.iter().for_each(|(filter, group, n)| all.company(*filter, *group, *n));
        }
        Some(all.finish())
    }

    /// Counts hosts that the caller turned away before it asked their cell.
    pub fn turned_away(hosts: u32, filter: Filter) -> Self {
        let mut refusal = Self::new(hosts);
        refusal.count(filter, hosts);
        refusal
    }

    /// Hosts that `filter` was the first to turn away.
    pub fn at(&self, filter: Filter) -> u32 {
        self.counts[filter as usize]
    }

    /// Every filter with its count, in order, zeros included.
    pub fn per_filter(&self) -> impl Iterator<Item = (Filter, u32)> + '_ {
        Filter::ALL.into_iter().zip(*self.counts)
    }

    /// The shortfall that is smallest in proportion to what was wanted: what to ask less of.
    pub fn nearest(&self) -> Option<&Shortfall> {
        // free/wanted compared by cross products, so that no precision is lost.
        self.shortfalls.iter().reduce(|best, s| {
            let closer =
                u128::from(s.most_free) * u128::from(best.wanted) > u128::from(best.most_free) * u128::from(s.wanted);
            if closer { s } else { best }
        })
    }

    /// Writes the refusal with ids turned into names by the caller, who interned them.
    pub fn describe(&self, names: &dyn Names) -> String {
        if self.total == 0 {
            return "no host can take it: the cell has no hosts".to_owned();
        }
        let parts: Vec<String> =
            self.per_filter().filter(|(_, n)| *n > 0).map(|(filter, n)| self.part(filter, n, names)).collect();
        let hosts = if self.total == 1 { "the one host can't" } else { "can" };
        match self.total {
            1 => format!("{hosts} take it: {}", parts.join(", ")),
            total => format!("no host of {total} {hosts} take it: {}", parts.join(", ")),
        }
    }

    fn part(&self, filter: Filter, hosts: u32, names: &dyn Names) -> String {
        let lack = if hosts == 1 { "lacks" } else { "lack" };
        match filter {
            Filter::Ready => format!("{hosts} not ready"),
            Filter::Runtime => format!("{hosts} without the runtime"),
            Filter::Class | Filter::Cpu | Filter::Memory | Filter::Scratch | Filter::Storage => {
                let what: Vec<String> = self
                    .shortfalls
                    .iter()
                    .filter(|s| s.filter == filter)
                    .map(|s| {
                        let name = s.class.map_or_else(|| filter.name().to_owned(), |class| names.class(class));
                        let unit = |n| quantity(filter, n);
                        format!("{name} ({} wanted, at most {} free)", unit(s.wanted), unit(s.most_free))
                    })
                    .collect();
                format!("{hosts} {lack} {}", what.join(" or "))
            }
            Filter::Slots => format!("{hosts} at {} instance limit", if hosts == 1 { "its" } else { "their" }),
            Filter::Numa => {
                let crowded = self.crowded.as_deref().copied().unwrap_or_default();
                let whose = if hosts - crowded.unpinned == 1 { "its" } else { "their" };
                let full = match hosts - crowded.unpinned {
                    0 => None,
                    full => Some(format!("{full} without room on {whose} NUMA nodes ({})", crowded.nearest())),
                };
                let unpinned = match crowded.unpinned {
                    0 => None,
                    n => Some(format!("{n} that can't keep an instance to a NUMA node")),
                };
                full.into_iter().chain(unpinned).collect::<Vec<_>>().join(", ")
            }
            Filter::Zone => format!("{hosts} in other zones"),
            Filter::Label => {
                let what: Vec<_> = self.labels.iter().map(|(id, _)| names.label(*id)).collect();
                format!("{hosts} without {}", what.join(" or "))
            }
            Filter::Latency => match self.too_far {
                Some(TooFar { below, lowest: Some(lowest), .. }) => {
                    let (below, lowest) = (duration(below), duration(lowest));
                    format!("{hosts} not within {below} of a gateway (the lowest latency measured is {lowest})")
                }
                Some(TooFar { below, .. }) => {
                    format!("{hosts} not within {} of a gateway (no latency has been measured yet)", duration(below))
                }
                None => format!("{hosts} too far from every gateway"),
            },
            Filter::With => format!("{hosts} without {}", self.groups_of(filter, names)),
            Filter::Without => format!("{hosts} with {}", self.groups_of(filter, names)),
            Filter::Excluded => format!("{hosts} excluded"),
            Filter::Together => format!("{hosts} apart from the group"),
            Filter::Domain => format!("{hosts} in racks of the group's other fault domains"),
            Filter::PerHost => format!("{hosts} at the group's limit per host"),
            Filter::Spread => format!("{hosts} spread"),
        }
    }
}

impl Refusal {
    fn groups_of(&self, filter: Filter, names: &dyn Names) -> String {
        let of = self.groups.iter().filter(|(f, ..)| *f == filter);
        of.map(|(_, id, _)| names.group(*id)).collect::<Vec<_>>().join(" or ")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe(&Numbers))
    }
}

impl std::error::Error for Refusal {}

/// A number in the unit of its filter: `2` or `250m` cores, `1Gi`, `1.5Gi`, or a plain count.
fn quantity(filter: Filter, n: u64) -> String {
    match filter {
        Filter::Cpu if n.is_multiple_of(1000) => (n / 1000).to_string(),
        Filter::Cpu => format!("{n}m"),
        Filter::Memory | Filter::Scratch | Filter::Storage => bytes(n),
        _ => n.to_string(),
    }
}

/// Millicores as people read them: `3 CPUs`, `1 CPU`, `250m of a CPU`.
fn cpus(n: u32) -> String {
    match n {
        1000 => "1 CPU".to_owned(),
        n if n.is_multiple_of(1000) => format!("{} CPUs", n / 1000),
        n => format!("{n}m of a CPU"),
    }
}

/// Microseconds as people read them: `31 ms`, `1.5 ms`, `250 us`.
fn duration(micros: u32) -> String {
    match micros {
        0..1_000 => format!("{micros} us"),
        n if n.is_multiple_of(1_000) || n >= 10_000 => format!("{} ms", n / 1_000),
        n => format!("{}.{} ms", n / 1_000, n % 1_000 / 100),
    }
}

/// Bytes in the largest binary unit that keeps the number at one or more, to a tenth, rounded down.
fn bytes(n: u64) -> String {
    const UNITS: [(u32, &str); 5] = [(50, "Pi"), (40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
    let Some((shift, unit)) = UNITS.into_iter().find(|(shift, _)| n >> shift > 0) else {
        return n.to_string();
    };
    let whole = n >> shift;
    let tenths = ((n - (whole << shift)) as u128 * 10) >> shift;
    if tenths == 0 { format!("{whole}{unit}") } else { format!("{whole}.{tenths}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_a_sentence() {
        let mut refusal = Refusal::new(6);
        refusal.count(Filter::Ready, 2);
        refusal.count(Filter::Memory, 3);
        refusal.lacking(Filter::Memory, None, 1 << 30, 100 << 20);
        refusal.lacking(Filter::Memory, None, 1 << 30, 512 << 20);
        refusal.count(Filter::Spread, 1);
        assert_eq!(
            refusal.to_string(),
            "no host of 6 can take it: 2 not ready, 3 lack memory (1Gi wanted, at most 512Mi free), 1 spread"
        );
        assert_eq!(Refusal::new(0).to_string(), "no host can take it: the cell has no hosts");
    }

    #[test]
    fn names_the_class_and_the_nearest_miss() {
        let mut refusal = Refusal::new(3);
        refusal.count(Filter::Cpu, 1);
        refusal.lacking(Filter::Cpu, None, 2000, 1750);
        refusal.count(Filter::Class, 2);
        refusal.lacking(Filter::Class, Some(ClassId(7)), 4, 1);
        let refusal = refusal.finish();
        struct Gpu;
        impl Names for Gpu {
            fn class(&self, _: ClassId) -> String {
                "gpu-v100".to_owned()
            }
        }
        assert_eq!(
            refusal.describe(&Gpu),
            "no host of 3 can take it: 2 lack gpu-v100 (4 wanted, at most 1 free), 1 lacks cpu (2 wanted, at most 1750m free)"
        );
        assert_eq!(refusal.nearest().map(|s| s.filter), Some(Filter::Cpu));
    }

    #[test]
    fn says_what_constraints_wanted_and_what_came_nearest() {
        let mut refusal = Refusal::new(7);
        refusal.count(Filter::Latency, 3);
        refusal.far(20_000, Some(31_400));
        refusal.far(20_000, None);
        refusal.far(20_000, Some(90_000));
        refusal.count(Filter::Label, 2);
        refusal.unlabelled(LabelId(1), 2);
        refusal.count(Filter::With, 1);
        refusal.company(Filter::With, GroupId(4), 1);
        refusal.count(Filter::Storage, 1);
        refusal.lacking(Filter::Storage, Some(ClassId(2)), 1 << 30, 1 << 29);
        assert_eq!(refusal.too_far, Some(TooFar { below: 20_000, lowest: Some(31_400), unmeasured: 1 }));
        assert_eq!(
            refusal.to_string(),
            "no host of 7 can take it: 1 lacks class #2 (1Gi wanted, at most 512Mi free), 2 without label #1, 3 not within \
             20 ms of a gateway (the lowest latency measured is 31 ms), 1 without group #4"
        );
        let merged = Refusal::merged(&[refusal.clone(), refusal]).unwrap();
        assert_eq!(
            (merged.at(Filter::Latency), merged.labels, merged.too_far.unwrap().unmeasured),
            (6, vec![(LabelId(1), 4)], 2)
        );
        assert_eq!([250, 1_500, 20_000, 31_400].map(duration), ["250 us", "1.5 ms", "20 ms", "31 ms"]);
    }

    #[test]
    fn quantities_read_as_people_write_them() {
        assert_eq!(bytes(1023), "1023");
        assert_eq!(bytes(1 << 20), "1Mi");
        assert_eq!(bytes((3 << 30) / 2), "1.5Gi");
        assert_eq!(bytes(u64::MAX), "16383.9Pi");
    }
}
