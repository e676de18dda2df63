//! What can be read of a cell: one host, the totals, the room for a request, and whether the books are right.

use super::{Cell, Host};
use crate::numa;
use crate::pool::{Place, bucket_of};
use crate::types::{
    Capacity, ClassId, DomainId, FaultId, GroupId, HostId, HostState, ImageId, LabelId, Load, MAX_NODES, Node, RackId,
    Request, Runtimes, SpreadLevel, UnknownHost, ZoneId,
};
use std::collections::{BTreeMap, BTreeSet};

/// Domains with how many of a group they hold.
pub type Counts<Domain> = Vec<(Domain, u32)>;
/// What a record adds up to on one host.
type Sums = (super::Reserved, BTreeMap<ClassId, u64>, BTreeMap<ClassId, u128>, NodeSums);
/// What a record adds up to on each node.
type NodeSums = [(u64, u128); MAX_NODES];
/// How many of each group are on each host, and of each fault domain of it in each rack.
type GroupRecord = BTreeMap<GroupId, (BTreeMap<u32, u32>, BTreeMap<(RackId, DomainId), u32>)>;
/// For each class of a pool, how many hosts have how many units free.
type ClassCounts = Vec<BTreeMap<u64, u32>>;

/// One host as the cell sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSnapshot {
    pub id: HostId,
    pub zone: ZoneId,
    pub rack: RackId,
    pub fault: FaultId,
    pub state: HostState,
    pub runtimes: Runtimes,
    pub capacity: Capacity,
    pub load: Load,
    pub images: Vec<ImageId>,
    /// Reservations held.
    pub instances: u32,
    /// What is free; nothing where more is reserved than there is.
    pub free: Capacity,
    /// Class, capacity, free.
    pub classes: Vec<(ClassId, u32, u64)>,
    /// Storage class, capacity, free; in bytes.
    pub storage: Vec<(ClassId, u64, u64)>,
    pub labels: Vec<LabelId>,
    /// Microseconds.
    pub rtt: Option<u32>,
    /// Its NUMA nodes: capacity, free. None of a host that is a single node.
    pub nodes: Vec<(Node, Node)>,
    /// Whether it can keep an instance to a node.
    pub pins: bool,
    /// More is reserved than the host has: it has shrunk, or was adopted so.
    pub oversold: bool,
}

/// Sums over the hosts of a cell, or of one zone of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CellTotals {
    pub hosts: u32,
    /// Hosts that are ready. Capacity and free count these only.
    pub ready: u32,
    pub instances: u64,
    /// Millicores.
    pub cpu: u64,
    pub cpu_free: u64,
    /// Bytes.
    pub memory: u128,
    pub memory_free: u128,
}

/// How the cell's books differ from the caller's record, or from themselves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Drift {
    #[error("a reservation is recorded on host {}, which the cell doesn't know", .0.0)]
    UnknownHost(HostId),
    #[error("host {}: the cell's sum of {what} differs from the record's", .host.0)]
    Host { host: HostId, what: &'static str },
    #[error("group {}: the cell's counts differ from the record's", .0.0)]
    Group(GroupId),
    #[error("host {}: the index is wrong about {what}", .host.0)]
    Index { host: HostId, what: &'static str },
    #[error("the index holds {indexed} hosts, {ready} are ready")]
    IndexSize { indexed: u32, ready: u32 },
}

impl Cell {
    /// One host.
    pub fn snapshot(&self, id: HostId) -> Result<HostSnapshot, UnknownHost> {
        let host = self.host(id)?;
        let hot = &self.hot[id.0 as usize];
        Ok(HostSnapshot {
            id,
            zone: host.zone,
            rack: host.rack,
            fault: host.fault,
            state: host.state,
            runtimes: host.runtimes,
            capacity: host.capacity,
            load: host.load,
            images: host.images.iter().copied().collect(),
            instances: host.reserved.instances,
            free: Capacity { cpu: hot.cpu, memory: hot.memory, scratch: hot.scratch, slots: hot.slots },
            classes: host.stock.iter().map(|s| (s.class, s.capacity, s.free())).collect(),
            storage: host.storage.iter().map(|s| (s.class, s.capacity, s.free())).collect(),
            labels: host.labels().to_vec(),
            rtt: host.rtt(),
            nodes: host.nodes.iter().map(|node| (node.capacity, node.free())).collect(),
            pins: host.pins,
            oversold: host.oversold(),
        })
    }

    /// A host's capacity and what is free of it: the cheap part of [`Cell::snapshot`].
    pub fn sizes(&self, id: HostId) -> Result<(Capacity, Capacity), UnknownHost> {
        let host = self.host(id)?;
        let hot = &self.hot[id.0 as usize];
        Ok((host.capacity, Capacity { cpu: hot.cpu, memory: hot.memory, scratch: hot.scratch, slots: hot.slots }))
    }

    /// A host's load, as it was last noted.
    pub fn load(&self, id: HostId) -> Result<Load, UnknownHost> {
        Ok(self.host(id)?.load)
    }

    /// Every host's handle, ascending.
    pub fn host_ids(&self) -> impl Iterator<Item = HostId> + '_ {
        self.live_hosts().map(|(index, _)| HostId(index))
    }

    /// Hosts on which more is reserved than they have.
    pub fn oversold_hosts(&self) -> usize {
        self.live_hosts().filter(|(_, host)| host.oversold()).count()
    }

    /// Sums over the cell, or over one zone.
    pub fn totals(&self, zone: Option<ZoneId>) -> CellTotals {
        let mut totals = CellTotals::default();
        for (index, host) in self.live_hosts().filter(|(_, host)| zone.is_none_or(|z| z == host.zone)) {
            totals.hosts += 1;
            totals.instances += u64::from(host.reserved.instances);
            if host.state == HostState::Ready {
                let hot = &self.hot[index as usize];
                totals.ready += 1;
                totals.cpu += u64::from(host.capacity.cpu);
                totals.cpu_free += u64::from(hot.cpu);
                totals.memory += u128::from(host.capacity.memory);
                totals.memory_free += u128::from(hot.memory);
            }
        }
        totals
    }

    /// How many more of a request would fit, by capacity, classes, zone, labels, round trip, exclusions and the limit per
    /// host. Spread, fault domains and the company of other groups are left out: it says where the next one goes, not how many there is room for.
    pub fn headroom(&self, request: &Request) -> u64 {
        let group = request.group.and_then(|id| self.groups.get(&id));
        let times = |free: u64, each: u64| free.checked_div(each).unwrap_or(u64::MAX);
        let room = |index: u32| {
            let (host, hot) = (self.known(index), &self.hot[index as usize]);
            let classes =
                request.classes.iter().map(|(class, _)| times(host.class_free(*class), request.wants(*class)));
            let per_host = match (request.max_per_host, request.group) {
                (Some(max), Some(_)) => u64::from(max.saturating_sub(group.map_or(0, |g| g.on_host(index)))),
                _ => u64::MAX,
            };
            times(u64::from(hot.cpu), u64::from(request.cpu))
                .min(times(hot.memory, request.memory))
                .min(times(hot.scratch, request.scratch))
                .min(request.storage.map_or(u64::MAX, |(class, bytes)| times(host.storage_free(class), bytes)))
                .min(u64::from(hot.slots))
                .min(per_host)
                .min(classes.min().unwrap_or(u64::MAX))
                .min(self.room_on_nodes(request, index))
        };
        self.live_hosts().filter(|(index, _)| self.eligible(*index, request)).map(|(index, _)| room(index)).sum()
    }

    /// How many of a group run in each zone and on each host, both ascending.
    pub fn group_counts(&self, group: GroupId) -> (Counts<ZoneId>, Counts<HostId>) {
        match self.groups.get(&group) {
            Some(group) => (group.zones(), group.hosts().map(|(host, n)| (HostId(host), n)).collect()),
            None => (Vec::new(), Vec::new()),
        }
    }

    /// How many of a group are in each rack, or in each of what fails as one, ascending. Empty of other levels.
    pub fn domain_counts(&self, group: GroupId, level: SpreadLevel) -> Vec<(u32, u32)> {
        match (self.groups.get(&group), level) {
            (Some(group), SpreadLevel::Rack) => group.racks().iter().map(|(rack, n)| (rack.0, *n)).collect(),
            (Some(group), SpreadLevel::Fault) => group.faults().iter().map(|(fault, n)| (fault.0, *n)).collect(),
            _ => Vec::new(),
        }
    }

    /// Recounts the cell against the caller's record of reservations, and its index against its hosts. For invariant
    /// checkers: it walks everything.
    pub fn audit<'a>(&self, record: impl IntoIterator<Item = (HostId, &'a Request)>) -> Result<(), Drift> {
        let mut hosts: BTreeMap<u32, Sums> = BTreeMap::new();
        let mut groups: GroupRecord = BTreeMap::new();
        for (id, request) in record {
            self.host(id).map_err(|_| Drift::UnknownHost(id))?;
            let (sum, classes, storage, nodes) = hosts.entry(id.0).or_default();
            sum.cpu += u64::from(request.cpu);
            sum.memory += u128::from(request.memory);
            sum.scratch += u128::from(request.scratch);
            sum.instances += 1;
            for (class, units) in request.classes.iter().filter(|(_, units)| *units > 0) {
                *classes.entry(*class).or_default() += u64::from(*units);
            }
            if let Some((class, bytes)) = request.storage.filter(|(_, bytes)| *bytes > 0) {
                *storage.entry(class).or_default() += u128::from(bytes);
            }
            for at in numa::named(request).iter() {
                let part = numa::part(request);
                nodes[at].0 += u64::from(part.cpu);
                nodes[at].1 += u128::from(part.memory);
            }
            if let Some(group) = request.group {
                let (on_hosts, in_racks) = groups.entry(group).or_default();
                *on_hosts.entry(id.0).or_default() += 1;
                if let Some(domain) = request.domain {
                    *in_racks.entry((self.rack_of(id.0), domain)).or_default() += 1;
                }
            }
        }
        for (index, host) in self.live_hosts() {
            let (sum, classes, storage, nodes) = hosts.remove(&index).unwrap_or_default();
            let drift = |what| Drift::Host { host: HostId(index), what };
            if host.reserved != sum {
                return Err(drift("resources"));
            }
            let held: BTreeMap<_, _> =
                host.stock.iter().filter(|s| s.reserved > 0).map(|s| (s.class, s.reserved)).collect();
            if held != classes {
                return Err(drift("classes"));
            }
            let held: BTreeMap<_, _> =
                host.storage.iter().filter(|s| s.reserved > 0).map(|s| (s.class, s.reserved)).collect();
            if held != storage {
                return Err(drift("storage"));
            }
            let held = |at: usize| host.nodes.get(at).map_or((0, 0), |node| (node.cpu, node.memory));
            if (0..MAX_NODES).any(|at| held(at) != nodes[at]) {
                return Err(drift("NUMA nodes"));
            }
        }
        self.audit_groups(&groups)?;
        self.audit_index()
    }

    fn audit_groups(&self, record: &GroupRecord) -> Result<(), Drift> {
        for id in self.groups.keys().chain(record.keys()).collect::<BTreeSet<_>>() {
            let (Some(group), Some(counts)) = (self.groups.get(id), record.get(id)) else {
                return Err(Drift::Group(*id));
            };
            let mut zones: BTreeMap<ZoneId, u32> = BTreeMap::new();
            let mut faults: BTreeMap<FaultId, u32> = BTreeMap::new();
            let (counts, domains) = counts;
            for (host, n) in counts {
                *zones.entry(self.zone_of(*host)).or_default() += n;
                *faults.entry(self.fault_of(*host)).or_default() += n;
            }
            let same_hosts = group.hosts().eq(counts.iter().map(|(host, n)| (*host, *n)));
            if !same_hosts
                || !counts.keys().all(|host| group.holds(*host))
                || !group.zones().into_iter().eq(zones)
                || group.domains() != domains
                || *group.faults() != faults
            {
                return Err(Drift::Group(*id));
            }
        }
        Ok(())
    }

    fn audit_index(&self) -> Result<(), Drift> {
        let mut ready = 0;
        let mut class_free: BTreeMap<u32, ClassCounts> = BTreeMap::new();
        for (index, host) in self.live_hosts() {
            let drift = |what| Drift::Index { host: HostId(index), what };
            let hot = &self.hot[index as usize];
            if !self.nodes_are_weighed(index) {
                return Err(drift("its NUMA nodes"));
            }
            if host.images.iter().any(|image| !self.images.get(image).is_some_and(|holders| holders.contains(index))) {
                return Err(drift("its images"));
            }
            if host.state != HostState::Ready {
                if hot.place.pool != Place::NOWHERE.pool {
                    return Err(drift("its state"));
                }
                continue;
            }
            ready += 1;
            let Place { pool, bucket, position } = hot.place;
            if self.pools.heads.get(pool as usize).is_none_or(|head| head.key != host.key()) {
                return Err(drift("its pool"));
            }
            let list = self.pools.grids[pool as usize].bucket(bucket as usize / 64, bucket as usize % 64);
            if bucket != bucket_of(hot.cpu_fraction, hot.memory_fraction) || list.get(position as usize) != Some(&index)
            {
                return Err(drift("its bucket"));
            }
            let sums = class_free.entry(pool).or_default();
            for (at, stock) in host.stock.iter().filter(|s| s.capacity > 0).enumerate() {
                sums.resize(sums.len().max(at + 1), BTreeMap::new());
                *sums[at].entry(stock.free()).or_default() += 1;
            }
            if sums.len() > self.pools.heads[pool as usize].class_free.len() {
                return Err(drift("its classes"));
            }
        }
        for (index, host) in self.live_hosts().filter(|(_, host)| host.state == HostState::Ready) {
            let pool = self.hot[index as usize].place.pool;
            if !host.stock.is_empty() && class_free.get(&pool) != Some(&self.pools.heads[pool as usize].class_free) {
                return Err(Drift::Index { host: HostId(index), what: "the free units of its classes" });
            }
        }
        let holders: usize = self.images.values().map(|holders| holders.len()).sum();
        let held: usize = self.live_hosts().map(|(_, host)| host.images.len()).sum();
        let indexed = self.pools.len();
        let numa = |(index, host): &(u32, &Host)| host.is_numa() && self.hot[*index as usize].place != Place::NOWHERE;
        if self.live_hosts().filter(numa).count() != self.numa_hosts() as usize {
            return Err(Drift::IndexSize { indexed: self.numa_hosts(), ready });
        }
        if indexed != ready || holders != held {
            return Err(Drift::IndexSize { indexed, ready });
        }
        Ok(())
    }

    pub(crate) fn live_hosts(&self) -> impl Iterator<Item = (u32, &Host)> + '_ {
        self.hosts.iter().enumerate().filter_map(|(index, host)| Some((index as u32, host.as_ref()?)))
    }
}
